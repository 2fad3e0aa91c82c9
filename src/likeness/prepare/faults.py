"""The kinds of fault that a prepared folder can have, the ways to mend them, and its rows as they stand, broken or not.

`likeness.data.folder` refuses a folder at the first broken row, as training must; here every row is read, one at a
time, so that all faults can be told.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from likeness.data.folder import METADATA
from likeness.types import InputError

KINDS: dict[str, str] = {
    "broken-row": "a line is no JSON, lacks its file_name, has a column of the wrong type or leads out of the folder",
    "missing-file": "a row names a file that is not there",
    "unlisted-file": "a file lies among the listed ones, but no row names it",
    "corrupt-file": "a file cannot be read: empty, truncated, too large to be safe, or not what its name says",
    "blank": "a picture of one tone, a mask without a face or a sketch without lines",
    "wrong-size": "a picture is not square or smaller than most, or a condition has another shape than its picture",
    "colour-order": "red and blue are exchanged (BGR), in a picture or in the colours of a mask",
    "off-palette": "the colours or numbers of a mask belong to no known palette or class order",
    "class-order": "the class numbers of a mask are in the order of another tool",
    "blended-labels": "the classes of a mask were blended by a smooth resize or by JPEG",
    "swapped-sides": "left and right are exchanged, in a mask or in keypoints",
    "inverted-sketch": "a sketch has light lines on a dark ground",
    "no-sketch": "a photograph or a mask stands where a sketch should be",
    "misplaced-keypoints": "keypoints and mask disagree about where eyes, nose and lips are: one of them is wrong",
    "shared-condition": "two different pictures have the very same mask, sketch or keypoints",
    "empty-caption": "a caption says nothing",
    "long-caption": "a caption is longer than the 77 tokens that a text tower reads",
    "garbled-caption": "a caption has letters of a wrong encoding or control characters",
    "duplicate": "a picture is there twice in one split, exactly or nearly",
    "leak": "a picture or a person of one split is in another one too",
}
"""Kind of fault -> what it is."""

MENDING: dict[str, str] = {
    "drop-row": "the row is left out",
    "drop-file": "the row is left without this file",
    "rewrite": "the file is written anew in its canonical form",
    "captions": "the captions are repaired, cut or left out",
}
"""Way of mending -> what it does. What it takes away is kept under `BEFORE`."""

BEFORE = "before"
"""Where the originals of whatever was mended are kept, beside the data."""


@dataclass(frozen=True)
class Finding:
    """One fault of one row: a line of the fix list."""

    split: str
    """Folder of the metadata below the one that was checked; "." where they are the same."""
    line: int
    """Line of the metadata, from 1; 0 for a file that no line names."""
    file_name: str
    """The row's picture as the metadata names it; of an unlisted file its own name."""
    column: str
    """The column at fault; "" for the whole row."""
    kind: str
    """One of `KINDS`."""
    sentence: str
    """What is wrong."""
    fix: str | None
    """How it is mended, one of `MENDING`; None where that is left to the eye."""


@dataclass(frozen=True)
class Row:
    """One line of a split's metadata."""

    split: str
    line: int
    raw: bytes
    values: dict[str, Any]
    """The columns; empty where the line cannot be read."""
    fault: str
    """Why the line cannot be used at all; "" where it can."""

    @property
    def place(self) -> tuple[str, int, str]:
        """(split, line, file_name): the first three fields of its findings."""
        name = str(self.values.get("file_name", ""))
        return self.split, self.line, name.encode(errors="replace").decode()  # half a surrogate pair cannot be printed

    @property
    def files(self) -> dict[str, Any]:
        """Column -> file as the metadata names it; null is no file."""
        columns = [key for key in self.values if key == "file_name" or key.endswith("_file_name")]
        return {key: self.values[key] for key in columns if self.values[key] is not None}


def splits_of(folder: Path) -> list[str]:
    """The folders in `folder` with metadata, `train` last: of two like rows the held-out one then counts as the first.

    Raises:
        InputError: there is none.
    """
    if (folder / METADATA).is_file():
        return ["."]
    found = [path.parent.name for path in folder.glob(f"*/{METADATA}") if path.parent.name != BEFORE]
    if not found:
        raise InputError(
            f"{folder} has no {METADATA}, nor has a folder in it: `likeness prepare ingest PICTURES OUT` writes one"
        )
    return sorted(found, key=lambda split: (split == "train", split))


def metadata_lines(folder: Path, split: str) -> Iterator[tuple[int, bytes]]:
    """(number from 1, line) of a split's metadata; blank lines are passed over."""
    path = folder / split / METADATA
    try:
        with path.open("rb") as lines:
            yield from ((number, line) for number, line in enumerate(lines, start=1) if line.strip())
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror or error}") from error


def read_rows(folder: Path, split: str) -> Iterator[Row]:
    """The rows of a split, broken ones with the reason."""
    for number, line in metadata_lines(folder, split):
        values, fault = {}, ""
        try:
            values = json.loads(line)
        except (ValueError, RecursionError) as error:
            fault = f"the line is not valid JSON ({str(error)[:80]})"
        if not fault and not (isinstance(values, dict) and isinstance(values.get("file_name"), str)):
            fault = "the row has no file_name"
        yield Row(split, number, line, values if isinstance(values, dict) else {}, fault)
