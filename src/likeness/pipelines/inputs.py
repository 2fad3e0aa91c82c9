"""Encode the texts and conditions of a pipeline call, each distinct one once.

C latent channels, h x w latent size, T distinct texts, L tokens, M distinct conditions.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from likeness.conditions import CONDITIONS, read_condition
from likeness.conditions.base import Condition, Reading
from likeness.conditions.images import check_aspect
from likeness.encoders.latent import spatial_factor, to_tensor
from likeness.encoders.text import truncated_text
from likeness.pipelines.arguments import array_of
from likeness.types import ConditionInput, InputError, TextFeatures

SYNTAX = re.compile(r"\([^()]*:\s*\d*\.?\d+\s*\)|<lora:[^>]*>|\bBREAK\b")
"""Syntax of other tools in prompts: weights such as (smiling:1.4), LoRA tags, BREAK."""


class EncodedCondition(NamedTuple):
    """A condition in the cache."""

    latent: Tensor
    """[C, h, w]."""
    reading: Reading
    source: Any
    """The object that was passed, so that its id stays unique."""


def encode_prompts(
    pipeline: Any,
    texts: Sequence[str | TextFeatures],
    prompts: Sequence[Any],
    encoded: dict[Any, Any],
    notes: list[str],
) -> TextFeatures:
    """Encode distinct texts, tokens [T, L, D], if they are not embeddings; add notes on truncated words."""
    limit, written = pipeline.config.max_text_tokens, [text for text in texts if isinstance(text, str)]
    if written and (pipeline.text_encoder is None or pipeline.tokenizer is None):
        raise InputError(
            f"This pipeline has no text encoder for {written[0]!r}: pass prompt_embeds and negative_prompt_embeds"
        )
    for text in written:
        if match := SYNTAX.search(text):
            notes.append(f"{match[0]!r} is read as plain text: weights and LoRA tags in prompts are not supported")
        if cut := truncated_text(getattr(pipeline, "tokenizer_2", None) or pipeline.tokenizer, text, limit):
            which = "prompt" if text in prompts else "negative prompt"
            notes.append(f"the {which} is longer than {limit} tokens; truncated: {cut!r}")
    if new := [text for text in written if ("text", text) not in encoded]:
        features = pipeline.text_features(new)
        for i, text in enumerate(new):
            encoded["text", text] = TextFeatures(*(x[i : i + 1] for x in features))
    found = [encoded["text", text] if isinstance(text, str) else text for text in texts]
    config = pipeline.transformer.config
    widths = config.get("joint_attention_dim", config.get("text_dim")), config.get("pooled_projection_dim")
    for tokens, pooled in found:
        wanted = found[0].tokens.shape[1], widths[0], widths[1] or widths[0]
        if (*tokens.shape[1:], pooled.shape[1]) != wanted:
            raise InputError(
                f"The embeddings of a prompt have {tokens.shape[1]} tokens and widths {tokens.shape[2]} and "
                f"{pooled.shape[1]}; this call requires {wanted[0]} tokens and widths {wanted[1]} and {wanted[2]}"
            )
    device, dtype = pipeline._execution_device, pipeline.transformer.dtype
    return TextFeatures(*(torch.cat([x.to(device, dtype) for x in part]) for part in zip(*found, strict=True)))


def encode_conditions(
    pipeline: Any,
    conditions: Sequence[Mapping[str, ConditionInput]],
    height: int,
    width: int,
    device: torch.device,
    encoded: dict[Any, Any],
    notes: list[str],
) -> tuple[Tensor, Tensor, list[dict[str, int]]]:
    """Encode the distinct conditions of all images; add notes on how they were read. Return latents [M + 1, C, h,
    w], the first of which is an absent condition (zeros); their ids in the condition embedding [M + 1], -1 for
    absent; and for each image, condition name -> index.
    """
    factor = spatial_factor(pipeline.vae)
    sources = {(name, id(c.image), height, width): c.image for row in conditions for name, c in row.items()}
    new: dict[Any, np.ndarray] = {}
    readings: dict[Any, Reading] = {}
    for key, source in sources.items():
        if key in encoded:
            continue
        name = key[0]
        reading, lines = read_condition(name, array_of(source))
        notes.extend(lines)
        if reading.size is not None:
            size = round(reading.size[1]), round(reading.size[0])
            check_aspect(size, (height, width), f"image of the {name}")
        readings[key] = reading
        new[key] = render(CONDITIONS[name], reading.raw, height, width, pipeline.config.condition_resize)
    if new:
        images = to_tensor(list(new.values())).to(device)  # [new, 3, H, W]
        for key, latent in zip(new, pipeline.codec.encode(images).cpu(), strict=True):
            encoded[key] = EncodedCondition(latent, readings[key], sources[key])
    latents = [torch.zeros(pipeline.vae.config.latent_channels, height // factor, width // factor)]
    latents += [encoded[key].latent for key in sources]
    names, index = list(pipeline.transformer.config.condition_names), {key: i for i, key in enumerate(sources, start=1)}
    ids = [-1, *(names.index(name) for name, *_ in sources)]
    indices = [{n: index[n, id(c.image), height, width] for n, c in row.items()} for row in conditions]
    return torch.stack(latents).to(device, pipeline.transformer.dtype), torch.tensor(ids, device=device), indices


def render(condition: Condition, raw: np.ndarray, height: int, width: int, resize: str) -> np.ndarray:
    """Render the image of a condition, uint8 [height, width, 3].

    `exact` resizes the raw form, so that labels are not mixed; `lanczos` resizes the image and crops its center.
    """
    if resize == "exact" or condition.raw == "points":
        return condition.render(condition.resize(raw, height, width), height, width)
    image = Image.fromarray(condition.render(raw, *raw.shape))
    scale = max(height / image.height, width / image.width)
    size = max(width, round(image.width * scale)), max(height, round(image.height * scale))
    image = image.resize(size, Image.Resampling.LANCZOS)
    left, top = (image.width - width) // 2, (image.height - height) // 2
    return np.asarray(image.crop((left, top, left + width, top + height)))
