"""Read the conditions of a request, before anything expensive begins."""

from __future__ import annotations

import dataclasses

from likeness.conditions import CONDITIONS
from likeness.conditions.base import Reading
from likeness.types import InputError, PortraitRequest


def read_conditions(request: PortraitRequest) -> tuple[PortraitRequest, list[str]]:
    """The request with every condition a `Reading`, and what each was recognised as, one sentence each.

    Raises:
        InputError: a condition is unknown or cannot be read.
    """
    readings, notes = {}, []
    for name, source in request.control_image.items():
        if name not in CONDITIONS:
            raise InputError(f"the condition {name!r} is unknown; known are {', '.join(CONDITIONS)}")
        if isinstance(source, Reading):
            readings[name] = source
            continue
        readings[name] = reading = CONDITIONS[name].read(source)
        notes += [f"{name}: {reading.scheme}", *(f"{name}: {note.text}" for note in reading.notes)]
    return dataclasses.replace(request, control_image=readings), notes
