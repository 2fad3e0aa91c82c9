"""Pictures and captions in the space where they meet: what a text-image pair (a `CLIPModel`) says of both.

Training, its measurements and evaluation share these functions, so that a picture has the same features everywhere.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors import safe_open
from safetensors.torch import save
from torch import Tensor

from likeness.encoders.latent import to_tensor
from likeness.files import write_whole

ATTRIBUTES = "attributes.safetensors"
"""File of the attribute head, beside the pair's `clip` and `tokenizer`."""


class AttributeHead(NamedTuple):
    """One matrix that reads attributes from the picture tower's pooled vector, before its projection."""

    weight: Tensor
    """[C, D], the classes of all attributes one after the other."""
    bias: Tensor
    """[C]."""
    classes: Mapping[str, Sequence[str]]
    """Attribute -> its values, in the order of the classes."""


def reduced(pictures: Sequence[np.ndarray], size: int) -> Tensor:
    """B uint8 pictures, brought to `size` by areas, as the picture tower takes them: [B, 3, size, size] in [-1, 1]."""
    box = Image.Resampling.BOX
    return to_tensor([np.asarray(Image.fromarray(picture).resize((size, size), box)) for picture in pictures])


def embed_pictures(clip: Any, pictures: Tensor) -> Tensor:
    """Pictures [B, 3, S, S] in [-1, 1] as unit vectors [B, P]."""
    return F.normalize(clip.get_image_features(pixel_values=pictures).pooler_output.float(), dim=-1)


def embed_captions(clip: Any, ids: Tensor) -> Tensor:
    """Token ids [B, L] as unit vectors [B, P]."""
    return F.normalize(clip.get_text_features(input_ids=ids).pooler_output.float(), dim=-1)


def most_tokens(clip: Any) -> int:
    """Length to which the text tower's captions are padded."""
    return clip.text_model.embeddings.position_embedding.num_embeddings


def finds(pictures: Tensor, captions: Tensor, choices: int) -> Tensor:
    """Whether each picture's own caption is the likest to it among those of its group, bool [n].

    Args:
        pictures: their features [N, D], of any length.
        captions: features of their captions [N, D], in the same order; exchanged, it is pictures that are found.
        choices: size of the groups, taken in order; what does not fill a group is left out, so n <= N. Chance is
            1 / choices.

    Raises:
        ValueError: there are fewer than `choices` pictures.
    """
    count = len(pictures) // choices * choices
    if not count:
        raise ValueError(f"{len(pictures)} pictures fill no group of {choices}")
    picture, caption = (
        F.normalize(x[:count].float(), dim=-1).unflatten(0, (-1, choices)) for x in (pictures, captions)
    )
    right = torch.arange(choices, device=picture.device)
    return ((picture @ caption.mT).argmax(dim=2) == right).flatten()  # [G, C, C] -> [G * C]


@torch.no_grad()
def name_attributes(clip: Any, head: AttributeHead, pictures: Tensor) -> list[dict[str, str]]:
    """The likeliest value of every attribute of pictures [B, 3, S, S] in [-1, 1]."""
    pooled = clip.vision_model(pixel_values=pictures).pooler_output.float()  # [B, D]
    scores = F.linear(pooled, head.weight.to(pooled.device), head.bias.to(pooled.device))  # [B, C]
    parts = scores.split([len(values) for values in head.classes.values()], dim=1)
    best = {name: part.argmax(dim=1).tolist() for name, part in zip(head.classes, parts, strict=True)}
    return [{name: head.classes[name][best[name][item]] for name in best} for item in range(len(pictures))]


def save_attribute_head(head: AttributeHead, folder: Path) -> None:
    """Write `attributes.safetensors`; the names of the classes are in its metadata."""
    tensors = {"weight": head.weight.detach().float().cpu().contiguous(), "bias": head.bias.detach().float().cpu()}
    classes = {name: list(values) for name, values in head.classes.items()}
    write_whole(folder / ATTRIBUTES, save(tensors, metadata={"classes": json.dumps(classes)}))


def load_attribute_head(folder: Path) -> AttributeHead | None:
    """What `save_attribute_head` wrote; None where there is no such file."""
    if not (folder / ATTRIBUTES).is_file():
        return None
    with safe_open(folder / ATTRIBUTES, "pt") as file:
        classes = json.loads(file.metadata()["classes"])
        return AttributeHead(file.get_tensor("weight"), file.get_tensor("bias"), classes)
