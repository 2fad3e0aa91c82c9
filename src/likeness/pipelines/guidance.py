"""Which passes through the network a step needs, and with what weight each enters the prediction.

Text guidance gives each condition k a prediction v_k = u_k + g (t_k - u_k), where t has the prompt and u the negative
prompt; conditions combine as v = v_0 + sum_k s_k (v_k - v_0), v_0 being without any condition. Both are linear in the
passes, so a step is a short list of passes with weights, and a pass whose weight is 0 is never run.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple


class Pass(NamedTuple):
    """One evaluation of the network."""

    condition: str | None
    """The condition it sees."""
    negative: bool
    """Whether it reads the negative prompt instead of the prompt."""
    weight: float
    """Its factor in the prediction."""


@dataclass(frozen=True, kw_only=True)
class Control:
    """How one condition acts."""

    scale: float = 1.0
    """s_k; 0 is the same as absent."""
    start: float = 0.0
    """Fraction of the steps at which it begins to act."""
    end: float = 1.0
    """Fraction of the steps at which it ceases to act."""

    def acts(self, progress: float) -> bool:
        """Whether it acts where this fraction of the steps is done, 0 <= progress < 1."""
        return self.scale != 0 and self.start <= progress < self.end


def passes(controls: Mapping[str, Control], guidance_scale: float, progress: float) -> tuple[Pass, ...]:
    """The passes of one step for one picture.

    Args:
        controls: the conditions this picture has.
        guidance_scale: g at this step; 1 where guidance is off or prompt and negative prompt are the same.
        progress: fraction of the steps that are done, 0 <= progress < 1.
    """
    active = {name: c.scale for name, c in controls.items() if c.acts(progress)}
    terms: list[tuple[str | None, float]] = [(None, 1 - sum(active.values())), *active.items()]
    found = []
    for condition, weight in terms:
        if abs(weight) < 1e-9:  # such as 1 - (0.7 + 0.2 + 0.1)
            continue
        if guidance_scale != 0:
            found.append(Pass(condition, False, weight * guidance_scale))
        if guidance_scale != 1:
            found.append(Pass(condition, True, weight * (1 - guidance_scale)))
    return tuple(found)
