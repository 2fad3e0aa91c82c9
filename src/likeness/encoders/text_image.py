"""Features of images and captions in a common embedding space, with a `CLIPModel`.

Training, its validation and evaluation share these functions, so that an image has the same features everywhere.
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
from safetensors.torch import save
from torch import Tensor
from transformers import AutoTokenizer

from likeness.encoders.latent import to_tensor
from likeness.files import first_line, write_whole
from likeness.types import InputError
from likeness.weights.files import opened_weights
from likeness.weights.packed import load_component

ATTRIBUTES = "attributes.safetensors"
"""File of the attribute head, next to `clip` and `tokenizer`."""


class AttributeHead(NamedTuple):
    """A linear layer from the pooled vector of the image encoder, before its projection, to attributes."""

    weight: Tensor
    """[C, D], the classes of all attributes concatenated."""
    bias: Tensor
    """[C]."""
    classes: Mapping[str, Sequence[str]]
    """Attribute -> its values, in the order of the classes."""


def resize_images(images: Sequence[np.ndarray], size: int) -> Tensor:
    """Resize B uint8 images by area averaging for the image encoder: [B, 3, size, size] in [-1, 1]."""
    box = Image.Resampling.BOX
    return to_tensor([np.asarray(Image.fromarray(image).resize((size, size), box)) for image in images])


def embed_images(clip: Any, images: Tensor) -> Tensor:
    """Embed images [B, 3, S, S] in [-1, 1] as unit vectors [B, P]."""
    return F.normalize(clip.get_image_features(pixel_values=images).pooler_output.float(), dim=-1)


def embed_captions(clip: Any, ids: Tensor) -> Tensor:
    """Embed token ids [B, L] as unit vectors [B, P]."""
    return F.normalize(clip.get_text_features(input_ids=ids).pooler_output.float(), dim=-1)


def text_length(clip: Any) -> int:
    """Return the length to which captions are padded."""
    return clip.text_model.embeddings.position_embedding.num_embeddings


def retrieved(queries: Tensor, candidates: Tensor, choices: int) -> Tensor:
    """Return whether each query's own candidate is the nearest one within its group, bool [n].

    `queries` and `candidates` [N, D] are features of images and of captions that belong together, of any length. Groups
    have `choices` members; an incomplete last one is left out. Raises `ValueError` if there is no complete group.
    """
    count = len(queries) // choices * choices
    if not count:
        raise ValueError(f"{len(queries)} queries are fewer than one group of {choices}")
    query, candidate = (
        F.normalize(x[:count].float(), dim=-1).unflatten(0, (-1, choices)) for x in (queries, candidates)
    )
    own = torch.arange(choices, device=query.device)
    return ((query @ candidate.mT).argmax(dim=2) == own).flatten()  # [G, C, C] -> [G * C]


@torch.no_grad()
def name_attributes(clip: Any, head: AttributeHead, images: Tensor) -> list[dict[str, str]]:
    """Predict the most probable value of every attribute for images [B, 3, S, S] in [-1, 1]."""
    pooled = clip.vision_model(pixel_values=images).pooler_output.float()  # [B, D]
    scores = F.linear(pooled, head.weight.to(pooled.device), head.bias.to(pooled.device))  # [B, C]
    parts = scores.split([len(values) for values in head.classes.values()], dim=1)
    best = {name: part.argmax(dim=1).tolist() for name, part in zip(head.classes, parts, strict=True)}
    return [{name: head.classes[name][best[name][item]] for name in best} for item in range(len(images))]


def load_text_image(folder: Path) -> tuple[Any, Any]:
    """Load a `CLIPModel` and its tokenizer from a folder with `clip`, packed or not, and `tokenizer`. Raises
    `InputError` if a part is missing or cannot be read.
    """
    try:
        clip = load_component(folder / "clip", "transformers", "CLIPModel")
        return clip, AutoTokenizer.from_pretrained(folder / "tokenizer", trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise InputError(f"{folder} is not a text-image model (clip and tokenizer): {first_line(error)}") from error


def save_attribute_head(head: AttributeHead, folder: Path) -> None:
    """Write `attributes.safetensors` with the names of the classes as metadata."""
    tensors = {"weight": head.weight.detach().float().cpu().contiguous(), "bias": head.bias.detach().float().cpu()}
    classes = {name: list(values) for name, values in head.classes.items()}
    write_whole(folder / ATTRIBUTES, save(tensors, metadata={"classes": json.dumps(classes)}))


def load_attribute_head(folder: Path) -> AttributeHead | None:
    """Load the attribute head of a folder; None if it has none."""
    if not (folder / ATTRIBUTES).is_file():
        return None
    with opened_weights(folder / ATTRIBUTES) as file:
        classes = json.loads(file.metadata()["classes"])
        return AttributeHead(file.get_tensor("weight"), file.get_tensor("bias"), classes)
