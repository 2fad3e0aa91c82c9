"""Inversion: find the noise that generates the image, then generate from it with the wanted condition and prompt.

Each step of Euler's method is inverted exactly, up to the error of a fixed-point iteration, as in AIDI (arXiv
2309.04907). Outside the region the latents follow the path of the inversion, so that they end at the given image.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from likeness.pipelines.editing.base import Editing
from likeness.pipelines.sampling import Sampling, predict

ITERATIONS = 3
"""Passes per inverted step. The error shrinks with every pass by the network's sensitivity times the step."""


def inversion(editing: Editing) -> Iterator[None]:
    """Invert with the description of the image, generate with the wanted one; notes the error of the inversion."""
    target, source = editing.target, editing.source
    assert source is not None, "the inversion needs a description of the image"
    times = [*target.times.tolist(), 0.0]
    path = {target.steps: editing.clean}
    for step in reversed(range(editing.start, target.steps)):
        after = point = path[step + 1]
        for _ in range(ITERATIONS):  # x_t = x_s + (t - s) v(x_t, t)
            point = after + (times[step] - times[step + 1]) * velocity(source, point, step)
        path[step] = point
    rebuilt = path[editing.start]
    for step in range(editing.start, target.steps):
        rebuilt = rebuilt + (times[step + 1] - times[step]) * velocity(source, rebuilt, step)
    target.notes.append(f"Inversion reconstructs the image with {decibels(target, rebuilt, editing.clean):.1f} dB")
    target.latents = path[editing.start]
    for step in range(editing.start, target.steps):
        moved = target.latents + (times[step + 1] - times[step]) * velocity(target, target.latents, step)
        target.latents, target.step = torch.where(editing.region, moved, path[step + 1]), step + 1
        yield


def velocity(sampling: Sampling, latents: Tensor, step: int) -> Tensor:
    """Return the guided prediction at x_t, [B, C, h, w]."""
    sampling.latents, sampling.step = latents, step
    return predict([sampling])[1][0]


def decibels(sampling: Sampling, latents: Tensor, wanted: Tensor) -> float:
    """Peak signal-to-noise ratio of two decoded latents, in dB."""
    found, given = (sampling.pipeline.decode(one, "pt", sampling.size) for one in (latents, wanted))
    return float(-10 * torch.log10((found - given).square().mean().clamp_min(1e-12)))
