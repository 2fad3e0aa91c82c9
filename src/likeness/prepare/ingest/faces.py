"""Faces of a source with their files, which are not read yet, and files that are skipped."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

from likeness.data.folder import clean_row, is_file_column
from likeness.prepare.ingest.source import SourceFile

AHEAD = 4 * (os.cpu_count() or 1)
"""Faces of a source that are read ahead."""

NAME_BYTES = 200
"""Most bytes of a name: file systems take 255, including suffixes and numbers."""

CAPTION_COLUMNS = ("text", "captions", "caption")
"""Columns with captions; the first that exists is used and written as `text`."""

OWN_COLUMNS = {"identity", "attributes", "keypoints", *CAPTION_COLUMNS}

SPLIT_NAMES = {
    **dict.fromkeys(("train", "training"), "train"),
    **dict.fromkeys(("val", "valid", "validation", "dev"), "validation"),
    **dict.fromkeys(("test", "testing"), "test"),
}
"""Name of a split in sources, in lower case -> our name."""

SPLIT_ORDER = ("train", "validation", "test")


@dataclass(frozen=True, kw_only=True)
class SourceFace:
    """One face of a source."""

    name: str
    """Path of its image in its split, without suffix; `unique_name` makes the name of its files."""
    image: SourceFile
    conditions: Mapping[str, Any] = field(default_factory=dict)
    """Condition -> file. Also: for `mask`, class -> image of that part; for `keypoints`, {"points": [[x, y], ...],
    "size": [width, height]}."""
    captions: Callable[[], Sequence[str]] = tuple
    """Returns the captions when they are needed."""
    attributes: Mapping[str, Any] | None = None
    """Name -> true or false; other tools may have any value."""
    identity: str | None = None
    split: str | None = None
    """Split in the source, or the assigned one."""
    more: Mapping[str, Any] = field(default_factory=dict)
    """Further columns of its row, such as the license of the image."""
    image_size: tuple[int, int] | None = None
    """(width, height) that the image must have."""
    box: tuple[int, int, int, int] | None = None
    """Left, top, right and bottom of the crop; None keeps the whole image."""


@dataclass(frozen=True)
class Skipped:
    """A file or face that is not imported."""

    name: str
    reason: str


Entries = Iterator[SourceFace | Skipped]
"""What a format reads from a source."""


def with_row(face: SourceFace, row: Mapping[str, Any]) -> SourceFace | Skipped:
    """Return a face with the columns of a row: captions, attributes, identity, keypoints; others are kept.

    Returns `Skipped` if a column has the wrong type.
    """
    name = f"{face.split}/{face.name}" if face.split else face.name
    row = clean_row(dict(row))
    changes: dict[str, Any] = {}
    column = next((key for key in CAPTION_COLUMNS if key in row), None)
    if column is not None:
        captions = [row[column]] if isinstance(row[column], str) else row[column]
        if not isinstance(captions, list | tuple) or not all(isinstance(caption, str) for caption in captions):
            return Skipped(name, f"{column} must be a caption or a list of captions")
        changes["captions"] = partial(tuple, captions)
    if "attributes" in row:
        attributes = row["attributes"]
        try:  # tables store them as JSON unless all values are true or false
            attributes = clean_row(json.loads(attributes)) if isinstance(attributes, str) else attributes
        except (ValueError, RecursionError, AttributeError):
            attributes = None
        if not isinstance(attributes, dict):
            return Skipped(name, "attributes must be names with values")
        changes["attributes"] = {key: value for key, value in attributes.items() if value is not None}
    if "keypoints" in row:
        if not isinstance(row["keypoints"], dict):
            return Skipped(name, 'keypoints must be {"points": [[x, y], ...], "size": [width, height]}')
        points = {key: value for key, value in row["keypoints"].items() if value is not None}
        changes["conditions"] = {**face.conditions, "keypoints": points}
    if "identity" in row:
        changes["identity"] = str(row["identity"])
    more = {key: row[key] for key in row if key not in OWN_COLUMNS and not is_file_column(key)}
    return replace(face, **changes, more=more)


def split_named(name: str) -> str | None:
    """Return our name of a split of a source, or None if it is not the name of a split."""
    return SPLIT_NAMES.get(name.lower())


def unique_name(name: str, taken: dict[str, int]) -> str:
    """Return a file name (`file_stem`) that is not `taken`, also without regard to case, and add it to those: name in
    lower case -> last number that was appended to it.
    """
    name = plain = file_stem(name)
    number = taken.get(plain.casefold(), 1)
    while name.casefold() in taken:
        number += 1
        name = f"{plain}-{number}"
    taken[plain.casefold()], taken[name.casefold()] = number, 1
    return name


def file_stem(name: str) -> str:
    """Return a name for any file system: letters, digits and `_.+-`, at most `NAME_BYTES` bytes."""
    plain = re.sub(r"[^\w.+-]+", "_", name).strip(".")
    return plain.encode()[:NAME_BYTES].decode(errors="ignore") or "face"
