"""Inpainting by a network that was trained to fill holes: one with the condition `photo` (`recipes/inpaint_mini.toml`).

The condition contains the photograph outside the region and the wanted mask inside, so that the region continues what
is around it. Latents outside the region are replaced after every step, as in `replacement`.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import torch
from torch import Tensor

from likeness.pipelines.editing.base import Editing
from likeness.pipelines.editing.replacement import replacement
from likeness.types import PHOTO, ConditionInput, InputError


def composite(clean: Tensor, mask: Tensor, region: Tensor) -> Tensor:
    """Return the condition `photo`: latents of the mask where the region is True, those of the image elsewhere."""
    return torch.where(region, mask, clean)


def inpainting(editing: Editing) -> Iterator[None]:
    """`replacement` with the condition `photo` instead of the mask, with the mask's scale, start and end.

    Raises:
        InputError: the call has another condition than a mask.
    """
    target, batch = editing.target, editing.target.batch
    if others := sorted({name for row in batch.conditions for name in row} - {"mask"}):
        raise InputError(f"inpainting takes only a mask as condition: leave {others[0]} out")
    masks = batch.condition_latents[[indices.get("mask", 0) for indices in batch.latent_indices]]  # [B, C, h, w]
    photos = composite(editing.clean.to(masks.dtype), masks, editing.region)
    number = list(target.pipeline.transformer.config.condition_names).index(PHOTO)
    target.batch = replace(
        batch,
        conditions=[{PHOTO: row.get("mask", ConditionInput(image=None))} for row in batch.conditions],
        latent_indices=[{PHOTO: item} for item in range(1, len(photos) + 1)],
        condition_latents=torch.cat([torch.zeros_like(photos[:1]), photos]),  # [B + 1, C, h, w]
        condition_ids=torch.tensor([-1, *[number] * len(photos)], device=photos.device),
    )
    groups = target.pipeline.groups(len(photos), photos.device)
    target.pass_functions = [target.pipeline.pass_function(target.batch, group) for group in groups]
    return replacement(editing)
