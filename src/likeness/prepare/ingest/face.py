"""Faces of a source with their files, which are not read yet, and files that are skipped.

Files are read when a face is written, so that listing a million faces costs only their names.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

from likeness.types import InputError

MAX_BYTES = 2**28
"""Largest file that is read: no image of a face is larger, but an archive may pretend to be small."""

NAME_BYTES = 200
"""Most bytes of a name: file systems take 255, including suffixes and numbers."""

CAPTION_COLUMNS = ("text", "captions", "caption")
"""Columns with captions; the first that exists is used and written as `text`."""

OWN_COLUMNS = {"file_name", "identity", "attributes", "keypoints", *CAPTION_COLUMNS}

SPLIT_NAMES = {
    **dict.fromkeys(("train", "training"), "train"),
    **dict.fromkeys(("val", "valid", "validation", "dev"), "validation"),
    **dict.fromkeys(("test", "testing"), "test"),
}
"""Name of a split in sources -> our name, in the order train, validation, test."""


@dataclass(frozen=True)
class Packed:
    """A file in an archive or a table."""

    name: str
    """Name for messages."""
    read: Callable[[], bytes]


File = Path | Packed


@dataclass(frozen=True, kw_only=True)
class Face:
    """One face of a source."""

    name: str
    """Name of its files without suffix."""
    image: File
    mask: File | Mapping[int, File] | None = None
    """An image that `conditions.mask` reads, or class -> image of that part."""
    sketch: File | None = None
    keypoints: File | Mapping[str, Any] | None = None
    """A file, or {"points": [[x, y], ...], "size": [width, height]}."""
    captions: Callable[[], Sequence[str]] = tuple
    """Returns the captions when they are needed."""
    attributes: Mapping[str, Any] | None = None
    """Name -> true or false; other tools may have any value."""
    identity: str | None = None
    split: str | None = None
    """Split in the source."""
    more: Mapping[str, Any] = field(default_factory=dict)
    """Further columns of its row, such as the licence of the image."""
    image_size: tuple[int, int] | None = None
    """(width, height) that the image must have."""
    box: tuple[int, int, int, int] | None = None
    """Left, top, right and bottom of the crop; None keeps the whole image."""


@dataclass(frozen=True)
class Skipped:
    """A file or face that is not imported."""

    name: str
    reason: str


Faces = Iterator[Face | Skipped]


def split_order(split: str) -> int:
    """Sort key of splits: train, validation, test."""
    return list(dict.fromkeys(SPLIT_NAMES.values())).index(split)


def content_of(file: File) -> bytes:
    """Read a file. Raises `InputError` if it cannot be read or is too large."""
    name = name_of(file)
    try:
        if isinstance(file, Packed):
            return file.read()
        if file.stat().st_size > MAX_BYTES:
            raise too_large(name)
        return file.read_bytes()
    except OSError as error:
        raise InputError(f"{name} cannot be read: {error.strerror or error}") from error


def too_large(name: str) -> InputError:
    return InputError(f"{name} is larger than {MAX_BYTES >> 20} MiB, too large for an image of a face")


def name_of(file: File) -> str:
    """Return the name of a file for messages."""
    return file.name if isinstance(file, Packed) else str(file)


def plain_name(name: str) -> str:
    """Return a name for any file system: letters, digits and `_.+-`, at most `NAME_BYTES` bytes."""
    plain = re.sub(r"[^\w.+-]+", "_", name).strip(".")
    return plain.encode()[:NAME_BYTES].decode(errors="ignore") or "face"


def text_of(file: File) -> str:
    """Read a text file. Raises `InputError` if it is not UTF-8."""
    try:
        return content_of(file).decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise InputError(f"{name_of(file)} is not UTF-8 text ({error.reason}): save it as UTF-8") from error


def lines_of(file: File) -> list[str]:
    """Read the lines of a text file that are not blank."""
    return [line.strip() for line in text_of(file).splitlines() if line.strip()]


def json_of(file: File) -> Any:
    """Read a JSON file."""
    return parse_json(text_of(file), name_of(file))


def parse_json(text: str | bytes, name: str) -> Any:
    """Parse JSON. Raises `InputError` if it is not valid."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise InputError(f"{name} is not valid JSON ({str(error)[:80]}): export it again") from error


def with_row(face: Face, row: Mapping[str, Any]) -> Face | Skipped:
    """Return a face with the columns of a row: captions, attributes, identity, keypoints; others are kept.

    Returns `Skipped` if a column has the wrong type.
    """
    name = f"{face.split}/{face.name}" if face.split else face.name
    changes: dict[str, Any] = {}
    column = next((key for key in CAPTION_COLUMNS if row.get(key) is not None), None)
    if column is not None:
        captions = [row[column]] if isinstance(row[column], str) else row[column]
        if not isinstance(captions, list | tuple) or not all(isinstance(caption, str) for caption in captions):
            return Skipped(name, f"{column} must be a caption or a list of captions")
        changes["captions"] = partial(tuple, captions)
    attributes, points, identity = row.get("attributes"), row.get("keypoints"), row.get("identity")
    if attributes is not None:
        try:  # tables store them as JSON unless all values are true or false
            attributes = json.loads(attributes) if isinstance(attributes, str) else attributes
        except (ValueError, RecursionError):
            attributes = None
        if not isinstance(attributes, dict):
            return Skipped(name, "attributes must be names with values")
        changes["attributes"] = {key: value for key, value in attributes.items() if value is not None}
    if points is not None:
        if not isinstance(points, dict):
            return Skipped(name, 'keypoints must be {"points": [[x, y], ...], "size": [width, height]}')
        changes["keypoints"] = {key: value for key, value in points.items() if value is not None}
    if identity is not None:
        changes["identity"] = str(identity)
    changes["more"] = {
        key: value
        for key, value in row.items()
        if key not in OWN_COLUMNS and not key.endswith("_file_name") and value is not None
    }
    return replace(face, **changes)
