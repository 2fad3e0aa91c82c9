"""What all methods of editing start from: an encoded image, the region to generate, and a call between two steps.

B images, C latent channels, h x w latent size.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from likeness.pipelines.sampling import Sampling


@dataclass(frozen=True, kw_only=True)
class Editing:
    """An edit before its first step. A method advances `target` until its latents are the edited image."""

    target: Sampling
    """The call that generates."""
    source: Sampling | None
    """The call that describes the given image, with the same steps; None without a description."""
    clean: Tensor
    """x_0 of the given image, float32 [B, C, h, w]."""
    region: Tensor
    """Where to generate, bool [B, 1, h, w]."""
    start: int
    """Step at which the edit starts; larger for a smaller `strength`."""
    draw: Callable[[], Tensor]
    """Return new noise [B, C, h, w] from the generators of the call."""

    def noised(self, noise: Tensor, step: int) -> Tensor:
        """Return x_t of the given image before a step; x_0 after the last one."""
        if step == self.target.steps:
            return self.clean
        return self.target.objective.corrupt(self.clean, noise, self.target.times[step].expand(len(noise)))
