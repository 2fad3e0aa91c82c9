"""The one owner of time direction, unit, sign and weight.

Every objective is x_t = alpha(t) x_0 + sigma(t) noise with t growing from data to noise, in float32. The loop, the
pipeline and the tests ask an objective and never compute with time themselves.
"""

from __future__ import annotations

from typing import Any, Protocol

import torch
from diffusers import SchedulerMixin
from torch import Tensor


class Objective(Protocol):
    """What a training objective must answer; B is the batch."""

    def sample_time(self, uniform: Tensor) -> Tensor:
        """Training times [B] from uniform numbers in [0, 1), [B]."""
        ...

    def corrupt(self, clean: Tensor, noise: Tensor, time: Tensor) -> Tensor:
        """x_t [B, C, h, w] from x_0 and noise of the same shape and times [B]."""
        ...

    def target(self, clean: Tensor, noise: Tensor, time: Tensor) -> Tensor:
        """What the network should predict at x_t, [B, C, h, w]."""
        ...

    def weight(self, time: Tensor) -> Tensor:
        """Weight of each sample's mean squared error, [B]."""
        ...

    def noise_level(self, time: Tensor) -> Tensor:
        """sigma(t) in [0, 1]: the share of noise, by which intervals of guidance are given."""
        ...

    def model_time(self, time: Tensor) -> Tensor:
        """What the network embeds, [B]."""
        ...

    def scheduler(self) -> SchedulerMixin:
        """The diffusers scheduler that inverts this objective."""
        ...

    def schedule(self, steps: int) -> dict[str, Any]:
        """What to hand to that scheduler's `set_timesteps`, exactly."""
        ...

    def time_of(self, timesteps: Tensor) -> Tensor:
        """The scheduler's timesteps as times of this objective, float32."""
        ...

    def config(self) -> dict[str, Any]:
        """Plain values from which `make_objective` makes it again; stored in a published pipeline."""
        ...


def column(values: Tensor, like: Tensor) -> Tensor:
    """Per-sample values [B] shaped to multiply `like` [B, ...]."""
    return values.reshape(-1, *[1] * (like.ndim - 1)).to(torch.float32)
