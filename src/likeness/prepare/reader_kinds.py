"""Kinds for errors and notes of readers that have no `kind` yet. Delete this module once all of them do."""

from __future__ import annotations

from likeness.types import InputError, Note

ERRORS = {
    "has no face": "blank",
    "is blank": "blank",
    "were blended": "blended-labels",
    "cannot be read": "corrupt-file",
    "can be read": "corrupt-file",
    "is empty": "corrupt-file",
    "too many pixels": "corrupt-file",
    "too small": "corrupt-file",
    "no readable": "corrupt-file",
}

OTHER_ERRORS = {"mask": "off-palette", "sketch": "no-sketch", "keypoints": "corrupt-file"}

NOTES = {
    "in the order BGR": "colour-order",
    "blended colours": "blended-labels",
    "brought into the canonical one": "class-order",
    "were exchanged": "swapped-sides",
    "look exchanged": "swapped-sides",
    "lines on a dark ground": "inverted-sketch",
}


def error_kind(error: InputError, condition: str) -> str:
    text = str(error)
    return error.kind or next((kind for part, kind in ERRORS.items() if part in text), OTHER_ERRORS[condition])


def as_note(note: Note | str) -> Note:
    """Notes that are no faults get the kind ""."""
    if isinstance(note, Note):
        return note
    return Note(next((kind for part, kind in NOTES.items() if part in note), ""), note)
