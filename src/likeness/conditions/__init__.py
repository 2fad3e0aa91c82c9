"""Spatial conditions: masks, sketches and keypoints."""

from __future__ import annotations

import dataclasses

from likeness.conditions.base import Condition, Reading, Source
from likeness.conditions.keypoints import KEYPOINTS
from likeness.conditions.mask import MASK
from likeness.conditions.sketch import SKETCH
from likeness.types import InputError, PortraitRequest

CONDITIONS: dict[str, Condition] = {condition.name: condition for condition in (MASK, SKETCH, KEYPOINTS)}
"""Name -> condition, in the order of the command line and of dataset columns."""

__all__ = ["CONDITIONS", "Condition", "Reading", "Source", "read_condition", "read_conditions"]


def read_condition(name: str, source: Source | Reading) -> tuple[Reading, list[str]]:
    """Read a condition, unless it is read already; also return one line per recognized format or note. Raises
    `InputError` if the condition is unknown or cannot be read.
    """
    if name not in CONDITIONS:
        raise InputError(f"Unknown condition {name!r}. Available: {', '.join(CONDITIONS)}")
    if isinstance(source, Reading):
        return source, []
    reading = CONDITIONS[name].read(source)
    return reading, [f"{name}: {text}" for text in (reading.scheme, *(note.text for note in reading.notes))]


def read_conditions(request: PortraitRequest) -> tuple[PortraitRequest, list[str]]:
    """Return a request with each image as a `Reading`, and one line per recognized format or note, before anything
    expensive starts. Raises `InputError` as `read_condition`.
    """
    conditions, lines = {}, []
    for name, condition in request.conditions.items():
        reading, notes = read_condition(name, condition.image)
        conditions[name] = dataclasses.replace(condition, image=reading)
        lines += notes
    return dataclasses.replace(request, conditions=conditions), lines
