"""The output of MDiTFace's static pathway: keys and values of every condition in every layer.

They depend on conditions and prompt but not on time, so one generation computes them once. The cache is an argument of
`forward`, not a module's state, so requests cannot interfere. It records its inputs, so that a stale one is rejected.

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
    """Keys and values of one layer, after QK-norm and rotary positions; conditions are concatenated."""

    keys: Tensor
    """[B, K S, H, d]."""
    values: Tensor
    """[B, K S, H, d]."""


@dataclass(frozen=True, kw_only=True)
class StaticCache:
    """Output of `MDiTFaceTransformer.static_cache`. Its input tensors must not be modified in place."""

    layers: tuple[KeysValues, ...]
    """One per block, double blocks first."""
    text: TextFeatures
    """The prompts of the static pathway."""
    condition_latents: Tensor
    """[B, K, C, h, w]."""
    condition_index: Tensor
    """[B, K], -1 if absent."""

    def samples(self, start: int, stop: int) -> StaticCache:
        """The part of samples start <= b < stop, as views."""
        return replace(
            self,
            layers=tuple(KeysValues(*(x[start:stop] for x in layer)) for layer in self.layers),
            text=TextFeatures(*(x[start:stop] for x in self.text)),
            condition_latents=self.condition_latents[start:stop],
            condition_index=self.condition_index[start:stop],
        )

    def conditions(self, keep: Sequence[int]) -> StaticCache:
        """The part of these of the K conditions. Conditions do not attend to each other in the static pathway, so this
        equals a cache of these conditions alone.
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
        """Raise `InputError` if the cache is of another request.

        Args:
            text: the prompts of the request, or None if the static pathway has no text.
            condition_latents: the conditions of the request, [B, K, C, h, w].
            condition_index: their ids, [B, K]; -1 disables a condition of the cache.
        """
        if condition_latents.shape != self.condition_latents.shape:
            own, found = tuple(self.condition_latents.shape), tuple(condition_latents.shape)
            raise InputError(f"The static cache is of conditions {own}, not {found}: compute one for this request")
        ids = self.condition_index
        same_ids = condition_index is ids or bool(((condition_index < 0) | (condition_index == ids)).all())
        if not same_ids or not same(condition_latents, self.condition_latents):
            raise InputError("The static cache is of other conditions: compute one for this request")
        if text is not None and not all(map(same, text, self.text)):
            raise InputError("The static cache is of another prompt: compute one for this request")


def same(a: Tensor, b: Tensor) -> bool:
    """Return whether two tensors are equal. The same object is not compared, which would synchronize an accelerator."""
    return a is b or torch.equal(a, b)
