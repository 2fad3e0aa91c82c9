"""What every layout yields: one face with its files, not yet read, or a file that has to be left out, and why.

Contents are read when a face is written, so that going through a million faces costs their names only.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from likeness.types import InputError

MOST_BYTES = 2**28
"""Larger files are refused: no picture of a face is, but an archive may pretend to be small."""

NAME_BYTES = 200
"""Most bytes of a name: file systems take 255, of which suffixes and numbers need some."""

CAPTION_KEYS = ("text", "captions", "caption")
"""Columns in which captions stand, the first that is there; `text` is what the others become."""

OWN_COLUMNS = {"file_name", "identity", "attributes", "keypoints", *CAPTION_KEYS}


@dataclass(frozen=True)
class Packed:
    """A file in an archive or a table."""

    name: str
    """How messages call it."""
    read: Callable[[], bytes]


File = Path | Packed


@dataclass(frozen=True, kw_only=True)
class Face:
    """One face of a source."""

    name: str
    """What its files will be called, without a suffix."""
    picture: File
    mask: File | Mapping[int, File] | None = None
    """A picture of any scheme that `conditions.mask` reads, or class -> picture of that part."""
    sketch: File | None = None
    keypoints: File | Mapping[str, Any] | None = None
    """A file, or {"points": [[x, y], ...], "size": [width, height]}."""
    captions: Callable[[], Sequence[str]] = tuple
    """Gives the captions when they are needed."""
    attributes: Mapping[str, Any] | None = None
    """Name -> true or false; from other tools, any value."""
    identity: str | None = None
    """The person."""
    split: str | None = None
    """Where the source puts it."""
    more: Mapping[str, Any] = field(default_factory=dict)
    """Further columns of its row, such as the licence of the picture."""
    canvas: tuple[int, int] | None = None
    """(width, height) that the picture must have."""
    box: tuple[int, int, int, int] | None = None
    """Left, top, right and bottom of the part of the picture to keep; None keeps all."""


@dataclass(frozen=True)
class Skipped:
    """A file that is left out."""

    name: str
    reason: str


Faces = Iterator[Face | Skipped]


def content_of(file: File) -> bytes:
    """What is in a file. Raises `InputError` where it cannot be read or is too large."""
    name = name_of(file)
    try:
        if isinstance(file, Packed):
            return file.read()
        if file.stat().st_size > MOST_BYTES:
            raise InputError(f"{name} is larger than {MOST_BYTES >> 20} MiB: no picture of a face is")
        return file.read_bytes()
    except OSError as error:
        raise InputError(f"{name} cannot be read: {error.strerror or error}") from error


def name_of(file: File) -> str:
    """How messages call a file."""
    return file.name if isinstance(file, Packed) else str(file)


def plain_name(name: str) -> str:
    """A name that every file system takes: letters, digits, and `_.+-` for the rest, at most `NAME_BYTES` bytes."""
    plain = re.sub(r"[^\w.+-]+", "_", name).strip(".")
    return plain.encode()[:NAME_BYTES].decode(errors="ignore") or "face"


def text_of(file: File) -> str:
    """The text in a file. Raises `InputError` where it is no UTF-8."""
    try:
        return content_of(file).decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise InputError(f"{name_of(file)} is no text in UTF-8 ({error.reason}): save it anew") from error


def lines_of(file: File) -> list[str]:
    """The lines of a text file that hold anything."""
    return [line.strip() for line in text_of(file).splitlines() if line.strip()]


def json_of(file: File) -> Any:
    """The document in a JSON file."""
    return parse_json(text_of(file), name_of(file))


def parse_json(text: str | bytes, name: str) -> Any:
    """A JSON document. Raises `InputError` where it is none."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise InputError(f"{name} is not valid JSON ({str(error)[:80]}): export it again") from error


def face_of_row(row: Mapping[str, Any], **files: Any) -> Face:
    """A face from a row of metadata, whose columns are ours; what else the row holds is kept.

    Args:
        row: columns `text` (one caption or a list), `attributes`, `identity`, `keypoints` and any others.
        files: the other fields of the face.

    Raises:
        InputError: a column has another type.
    """
    name = files["name"]
    column = next((key for key in CAPTION_KEYS if row.get(key) is not None), None)
    captions = row[column] if column else []
    captions = [captions] if isinstance(captions, str) else captions
    if not isinstance(captions, list | tuple) or not all(isinstance(caption, str) for caption in captions):
        raise InputError(f"the {column} of {name} is neither a caption nor a list of captions")
    attributes, points, identity = row.get("attributes"), row.get("keypoints"), row.get("identity")
    if attributes is not None:
        if isinstance(attributes, str):  # as a table has them whose values are not all true or false
            attributes = parse_json(attributes, f"attributes of {name}")
        if not isinstance(attributes, dict):
            raise InputError(f"the attributes of {name} are no names with values")
        attributes = {key: value for key, value in attributes.items() if value is not None}
    if points is not None:
        if not isinstance(points, dict):
            raise InputError(f'the keypoints of {name} must be {{"points": [[x, y], ...], "size": [width, height]}}')
        files["keypoints"] = {key: value for key, value in points.items() if value is not None}
    return Face(
        captions=partial(tuple, captions),
        attributes=attributes,
        identity=None if identity is None else str(identity),
        more={
            key: value
            for key, value in row.items()
            if key not in OWN_COLUMNS and not key.endswith("_file_name") and value is not None
        },
        **files,
    )
