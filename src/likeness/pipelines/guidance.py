"""The forward passes of a step and their weights in the prediction.

Text guidance turns each condition k into a prediction v_k = u_k + g (t_k - u_k), with t for the prompt and u for the
negative prompt. Conditions combine as v = v_0 + sum_k s_k (v_k - v_0), where v_0 has no condition. Both are linear in
the passes, so a step is a list of passes with weights. Passes with weight 0 are not run.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

from likeness.types import ConditionInput


class Pass(NamedTuple):
    """One evaluation of the network."""

    condition: str | None
    """Its condition."""
    negative: bool
    """Whether it reads the negative prompt instead of the prompt."""
    weight: float
    """Its factor in the prediction."""


def passes(conditions: Mapping[str, ConditionInput], guidance_scale: float, progress: float) -> tuple[Pass, ...]:
    """Return the passes of one step for an image with these conditions. `guidance_scale` is g at this step, 1 if
    guidance is off or prompt and negative prompt are equal; `progress` is the fraction of the steps that are done, 0 <=
    progress < 1.
    """
    scales = {name: condition.scale for name, condition in conditions.items() if condition.is_active(progress)}
    terms: list[tuple[str | None, float]] = [(None, 1 - sum(scales.values())), *scales.items()]
    found = []
    for condition, weight in terms:
        if abs(weight) < 1e-9:  # such as 1 - (0.7 + 0.2 + 0.1)
            continue
        if guidance_scale != 0:
            found.append(Pass(condition, False, weight * guidance_scale))
        if guidance_scale != 1:
            found.append(Pass(condition, True, weight * (1 - guidance_scale)))
    return tuple(found)
