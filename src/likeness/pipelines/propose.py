"""Masks from text: generate candidates and choose the one that breaks the fewest rules.

The rules are those of a face's geometry (brows above eyes, a nose surrounded by skin) and of the prompt ("bald", "with
glasses"), which are also applied to masks of users. The candidates of a mask come from one random generator, so that a
seed determines the mask.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from likeness.conditions.base import Reading
from likeness.conditions.mask import swap_classes
from likeness.conditions.mask.classes import PALETTE
from likeness.conditions.mask.contradictions import contradictions
from likeness.conditions.mask.geometry import broken_rules, measure, swapped_pairs
from likeness.conditions.mask.repair import nearest_colors
from likeness.pipelines.generate import check_seed
from likeness.types import ConditionInput, InputError, PortraitRequest

CANDIDATES = 4
"""Candidates for a mask."""


@dataclass(frozen=True, kw_only=True)
class Proposal:
    """A generated mask."""

    labels: np.ndarray
    """Canonical labels, uint8 [H, W]."""
    broken: tuple[str, ...]
    """Rules that it breaks, a few words each."""

    def reading(self) -> Reading:
        """Return the mask as a value of `control_image`: unlike that of an array, its format is not detected."""
        return Reading(raw=self.labels, scheme="proposed from the prompt")


def propose_mask(
    pipeline: Any,
    prompt: str,
    seed: int,
    *,
    candidates: int = CANDIDATES,
    on_step: Callable[[int, int], None] | None = None,
) -> Proposal:
    """Generate the mask of a face from text with a pipeline for masks, such as `load("mask-mini")`.

    Of up to `candidates` masks, the first that breaks no rule is returned, or the best. `on_step` is called after each
    as (candidates done, `candidates`). Raises `InputError` for another pipeline, or invalid arguments.
    """
    check_generates_masks(pipeline)
    if candidates < 1:
        raise InputError(f"the number of candidates is {candidates}; it must be at least 1")
    check_seed(seed)
    generator, encoded = torch.Generator().manual_seed(seed), {}
    best: Proposal | None = None
    for number in range(1, candidates + 1):
        (image,) = pipeline(prompt, generator=generator, encoded=encoded).images
        ((labels, _),) = nearest_colors(np.asarray(image), PALETTE)  # [H, W], exact colors
        labels = labels.astype(np.uint8)
        labels = swap_classes(labels, swapped_pairs(measure(labels)))
        broken = broken_rules(measure(labels)) + contradictions(labels, prompt)
        if best is None or len(broken) < len(best.broken):
            best = Proposal(labels=labels, broken=broken)
        if on_step:
            on_step(candidates if not broken else number, candidates)
        if not broken:
            break
    assert best is not None
    return best


def check_generates_masks(pipeline: Any) -> None:
    """Raise `InputError` if a pipeline does not generate masks."""
    if type(pipeline.vae).__name__ != "LabelDecoder":
        raise InputError("this model does not generate masks: use mask-mini, or a model packed with a label decoder")


def add_mask(request: PortraitRequest, pipeline: Any, acts: Mapping[str, float] | None = None) -> PortraitRequest:
    """Return a request with the mask that is proposed for its prompt and seed. `acts`: `scale`, `start` and `end`."""
    reading = propose_mask(pipeline, request.prompt, request.seed).reading()
    return replace(request, conditions={**request.conditions, "mask": ConditionInput(image=reading, **(acts or {}))})
