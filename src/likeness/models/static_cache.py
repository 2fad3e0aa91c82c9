"""What MDiTFace's static pathway leaves behind: the keys and values of every condition, layer by layer.

They depend on conditions and prompt but not on time, so one generation computes them once. The cache is an object that
the caller holds and passes to `forward`, never a module's state: two requests cannot meet in it. It remembers what it
was filled from, so that a stale one is refused rather than used.

B batch, K conditions, S tokens of one condition, H heads, d width of a head, L text tokens, T text width.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

from likeness.types import InputError, TextFeatures


class KeysValues(NamedTuple):
    """Of the spatial tokens in one layer, after QK-norm and rotary positions; condition after condition."""

    keys: Tensor
    """[B, K S, H, d]."""
    values: Tensor
    """[B, K S, H, d]."""


@dataclass(frozen=True, kw_only=True)
class StaticCache:
    """Made by `MDiTFaceTransformer.static_cache`. The tensors it was filled from must not be written into."""

    layers: tuple[KeysValues, ...]
    """One for every block, double blocks first."""
    text: TextFeatures
    """The prompts that the static pathway read."""
    condition_latents: Tensor
    """[B, K, C, h, w]."""
    condition_index: Tensor
    """[B, K], -1 where absent."""
    complete: bool
    """Whether no condition is absent, so that attention needs no mask."""

    def rows(self, start: int, stop: int) -> StaticCache:
        """The part for samples start <= b < stop; nothing is copied."""
        return replace(
            self,
            layers=tuple(KeysValues(*(x[start:stop] for x in layer)) for layer in self.layers),
            text=TextFeatures(*(x[start:stop] for x in self.text)),
            condition_latents=self.condition_latents[start:stop],
            condition_index=self.condition_index[start:stop],
        )

    def conditions(self, keep: Sequence[int]) -> StaticCache:
        """The part for these of the K conditions. Conditions do not see one another in the static pathway, so this
        equals a cache filled with these alone.
        """
        count = self.condition_index.shape[1]
        part = lambda x: x.unflatten(1, (count, -1))[:, keep].flatten(1, 2)  # noqa: E731  # [B, len(keep) S, H, d]
        return replace(
            self,
            layers=tuple(KeysValues(part(layer.keys), part(layer.values)) for layer in self.layers),
            condition_latents=self.condition_latents[:, keep],
            condition_index=self.condition_index[:, keep],
        )

    @property
    def bytes(self) -> int:
        """Memory of the keys and values."""
        return sum(x.numel() * x.element_size() for layer in self.layers for x in layer)

    def check(self, text: TextFeatures | None, condition_latents: Tensor, condition_index: Tensor) -> None:
        """Refuse to serve another request.

        Args:
            text: the prompts of the request, or None where the static pathway reads no text.
            condition_latents: the conditions of the request, [B, K, C, h, w].
            condition_index: their rows, [B, K]; -1 switches off a condition that the cache has.

        Raises:
            InputError: another batch size, number of conditions or latent size; another condition; another prompt.
        """
        if condition_latents.shape != self.condition_latents.shape:
            raise InputError(
                f"the static cache was filled from conditions {tuple(self.condition_latents.shape)}, not "
                f"{tuple(condition_latents.shape)}; fill one for this request"
            )
        rows = self.condition_index
        known = condition_index is rows or bool(((condition_index < 0) | (condition_index == rows)).all())
        if not known or not same(condition_latents, self.condition_latents):
            raise InputError("the static cache was filled from other conditions; fill one for this request")
        if text is not None and not all(map(same, text, self.text)):
            raise InputError("the static cache was filled from another prompt; fill one for this request")


def same(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors are equal. The very same object is not looked into, which on an accelerator saves a wait."""
    return a is b or torch.equal(a, b)
