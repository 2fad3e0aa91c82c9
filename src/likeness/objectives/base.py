"""The interface of training objectives: time direction, units, signs and weights are defined here only.

Every objective is x_t = alpha(t) x_0 + sigma(t) noise with t growing from data to noise, in float32.
"""

from __future__ import annotations

import math
from typing import Any, Protocol

import torch
from diffusers import SchedulerMixin
from torch import Tensor

from likeness.types import InputError


class Objective(Protocol):
    """A training objective for batches of B samples."""

    def sample_time(self, uniform: Tensor) -> Tensor:
        """Training times [B] from uniform numbers in [0, 1), [B]."""

    def corrupt(self, clean: Tensor, noise: Tensor, time: Tensor) -> Tensor:
        """x_t [B, C, h, w] from x_0 and noise of the same shape and times [B]."""

    def target(self, clean: Tensor, noise: Tensor, time: Tensor) -> Tensor:
        """Target of the network at x_t, [B, C, h, w]."""

    def denoise(self, noisy: Tensor, prediction: Tensor, time: Tensor) -> Tensor:
        """Estimate x_0 from x_t and the network's output, both [B, C, h, w], at times [B]."""

    def weight(self, time: Tensor) -> Tensor:
        """Weight of the mean squared error of each sample, [B]."""

    def noise_level(self, time: Tensor) -> Tensor:
        """sigma(t) in [0, 1], the unit of guidance intervals."""

    def model_time(self, time: Tensor) -> Tensor:
        """Time input of the network, [B]."""

    def scheduler(self) -> SchedulerMixin:
        """The diffusers scheduler of this objective."""

    def check_scheduler(self, scheduler: SchedulerMixin) -> None:
        """Raise `InputError` for a scheduler of another objective, which would only ruin the images."""

    def schedule(self, scheduler: SchedulerMixin, steps: int) -> dict[str, Any]:
        """Arguments of a scheduler's `set_timesteps`."""

    def time_of(self, timesteps: Tensor) -> Tensor:
        """Times of this objective from the scheduler's timesteps, float32."""

    def config(self) -> dict[str, Any]:
        """Configuration for `make_objective`, stored in pipelines."""


def check_numbers(objective: Any, *names: str, positive: bool = False) -> None:
    """Check that fields of an objective are finite numbers, and above 0 if `positive`. Raises `InputError`."""
    for name in names:
        value = getattr(objective, name)
        valid = type(value) in (int, float) and math.isfinite(value) and (value > 0 or not positive)
        if not valid:
            raise InputError(f"the objective's {name} is {value!r}: it must be a finite number{' above 0' * positive}")


def column(values: Tensor, like: Tensor) -> Tensor:
    """Reshape per-sample values [B] to broadcast with `like` [B, ...]."""
    return values.reshape(-1, *[1] * (like.ndim - 1)).to(torch.float32)
