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

__all__ = ["CONDITIONS", "Condition", "Reading", "Source", "read_conditions"]


def read_conditions(request: PortraitRequest) -> tuple[PortraitRequest, list[str]]:
    """Read the conditions of a request, before anything expensive starts.

    Returns:
        The request with each condition as a `Reading`, and one line per recognized format or note.

    Raises:
        InputError: A condition is unknown or cannot be read.
    """
    readings, lines = {}, []
    for name, source in request.control_image.items():
        if name not in CONDITIONS:
            raise InputError(f"Unknown condition {name!r}. Available: {', '.join(CONDITIONS)}")
        if isinstance(source, Reading):
            readings[name] = source
            continue
        readings[name] = reading = CONDITIONS[name].read(source)
        lines += [f"{name}: {text}" for text in (reading.scheme, *(note.text for note in reading.notes))]
    return dataclasses.replace(request, control_image=readings), lines
