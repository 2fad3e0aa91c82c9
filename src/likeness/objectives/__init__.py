"""Training objectives and their samplers: rectified flow and DDPM."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from likeness.objectives.base import Objective
from likeness.objectives.ddpm import DDPM
from likeness.objectives.flow import RectifiedFlow
from likeness.types import InputError

OBJECTIVES: dict[str, type[RectifiedFlow] | type[DDPM]] = {"rectified_flow": RectifiedFlow, "ddpm": DDPM}

__all__ = ["DDPM", "OBJECTIVES", "Objective", "RectifiedFlow", "make_objective"]


def make_objective(config: Mapping[str, Any]) -> Objective:
    """Return the objective of a configuration, `{"name": "rectified_flow" | "ddpm", ...fields}`. Raises `InputError`
    for an unknown name or field, or a value out of range.
    """
    if not isinstance(config, Mapping):
        raise InputError(f"objective is {config!r}; it must be a mapping, such as {{'name': 'rectified_flow'}}")
    fields = dict(config)
    name = fields.pop("name", None)
    if not isinstance(name, str) or name not in OBJECTIVES:
        raise InputError(f"Unknown objective {name!r}. Available: {', '.join(OBJECTIVES)}")
    try:
        return OBJECTIVES[name](**fields)
    except TypeError as error:
        raise InputError(f"The configuration of the objective {name!r} is invalid: {error}") from error
