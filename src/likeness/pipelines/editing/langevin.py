"""Masked-latent replacement with Langevin steps in between, as the corrector of Song et al. (arXiv 2011.13456).

At each noise level the region is partly renoised and denoised again before the next step, so that it adapts to what is
around it: a step of the sampler alone sees the surroundings of the previous level.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from likeness.objectives.base import Objective, column
from likeness.pipelines.editing.base import Editing
from likeness.pipelines.editing.replacement import replacement
from likeness.pipelines.sampling import predict

CORRECTIONS = 2
"""Langevin steps, one pass each, at every noise level but the first."""
RENOISED = 0.5
"""Fraction of the noise's variance that a Langevin step replaces."""


def langevin(editing: Editing) -> Iterator[None]:
    """`replacement` with `CORRECTIONS` Langevin steps before each further step."""
    for _ in replacement(editing):
        yield
        if editing.target.step < editing.target.steps:
            for _ in range(CORRECTIONS):
                correct(editing)


def correct(editing: Editing) -> None:
    """One Langevin step inside the region."""
    target = editing.target
    (noisy,), (prediction,) = predict([target])
    time = target.times[target.step].expand(len(noisy))
    moved = renoised(target.objective, noisy, prediction, time, editing.draw())
    target.latents = torch.where(editing.region, moved, target.latents)


def renoised(objective: Objective, noisy: Tensor, prediction: Tensor, time: Tensor, fresh: Tensor) -> Tensor:
    """Replace a part of the noise in x_t and keep its variance: noise' = sqrt(1 - c) noise + sqrt(c) fresh.

    Args:
        objective: the objective.
        noisy: x_t, [B, C, h, w].
        prediction: the network's output at x_t.
        time: t, [B].
        fresh: new noise.
    """
    clean = objective.denoise(noisy, prediction, time)
    signal = objective.corrupt(clean, torch.zeros_like(clean), time)
    noise = (noisy - signal) / column(objective.noise_level(time), noisy)
    return objective.corrupt(clean, (1 - RENOISED) ** 0.5 * noise + RENOISED**0.5 * fresh, time)
