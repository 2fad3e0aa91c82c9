"""Masked-latent replacement, as in RePaint (arXiv 2201.09865) without resampling; image to image without a mask.

After every step the latents outside the region become x_0 of the given image, noised to the level of that step.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import torch

from likeness.pipelines.editing.base import Editing
from likeness.pipelines.sampling import advance


def replacement(editing: Editing) -> Iterator[None]:
    """Generate the region from noise, or from the noised image if `start` is not 0."""
    target, noise = editing.target, editing.target.latents
    target.latents, target.step = editing.noised(noise, editing.start), editing.start
    if editing.start == 0:
        target.latents = torch.where(editing.region, noise, target.latents)
    elif hasattr(target.scheduler, "set_begin_index"):  # others, such as DDIM, keep no index
        target.scheduler.set_begin_index(editing.start)
    while target.step < target.steps:
        advance([target])
        target.latents = torch.where(editing.region, target.latents, editing.noised(noise, target.step))
        yield


def image_to_image(editing: Editing) -> Iterator[None]:
    """SDEdit (arXiv 2108.01073): generate the whole image from the noised one, without regard to the region."""
    return replacement(replace(editing, region=torch.ones_like(editing.region)))
