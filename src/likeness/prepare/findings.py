"""Kinds of faults that a prepared folder can have, ways to fix them, and rows of metadata, valid or not.

`likeness.data.folder` rejects a folder at the first broken row, as training must. Here all rows are read one at a time,
so that every fault can be reported.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from likeness.data.folder import is_file_column, metadata_lines, parse_row
from likeness.types import InputError

KINDS: dict[str, str] = {
    "broken-row": "a line is not JSON, lacks file_name, has a column of the wrong type or points outside the folder",
    "missing-file": "a row names a file that does not exist",
    "unlisted-file": "a file is stored among the listed ones, but no row names it",
    "corrupt-file": "a file cannot be read: empty, truncated, too large to be safe, or not what its name says",
    "blank": "an image of one tone, a mask without a face or a sketch without lines",
    "wrong-size": "an image is not square or smaller than most, or a condition has another aspect ratio than its image",
    "colour-order": "red and blue are swapped (BGR), in an image or in the colours of a mask",
    "off-palette": "the colours or numbers of a mask belong to no known palette or class order",
    "class-order": "the class numbers of a mask are in the order of another tool",
    "blended-labels": "the classes of a mask were blended by a smooth resize or by JPEG",
    "swapped-sides": "left and right are swapped, in a mask or in keypoints",
    "inverted-sketch": "a sketch has light lines on a dark background",
    "no-sketch": "a photograph or a mask in place of a sketch",
    "misplaced-keypoints": "keypoints and mask disagree about where eyes, nose and lips are: one of them is wrong",
    "shared-condition": "two different images have an identical mask, sketch or keypoints",
    "empty-caption": "a caption is empty",
    "long-caption": "a caption is longer than the 77 tokens that a text encoder reads",
    "garbled-caption": "a caption has characters of a wrong encoding or control characters",
    "duplicate": "an image occurs twice in one split, exactly or nearly",
    "leak": "an image or an identity of one split is also in another split",
}
"""Kind of fault -> description."""

FIXES: dict[str, str] = {
    "drop-row": "the row is removed",
    "drop-file": "the file is removed from the row",
    "rewrite": "the file is rewritten in its canonical form",
    "captions": "the captions are repaired, shortened or removed",
}
"""Fix -> what it does."""


@dataclass(frozen=True)
class Finding:
    """One fault of one row: a line of the fix list."""

    split: str
    """Folder of the metadata relative to the checked folder; "." if they are the same."""
    line: int
    """Line of the metadata, from 1; 0 for a file that no line names."""
    file_name: str
    """Image of the row, as the metadata names it, or name of the unlisted file."""
    column: str
    """Column with the fault; "" for the whole row."""
    kind: str
    """One of `KINDS`."""
    sentence: str
    """Description of the fault."""
    fix: str | None
    """One of `FIXES`; None if it needs a human decision."""


@dataclass(frozen=True)
class MetadataRow:
    """One line of a split's metadata."""

    split: str
    line: int
    raw: bytes
    values: dict[str, Any]
    """The columns; empty if the line cannot be read."""
    fault: str
    """Why the line cannot be used; "" if it can."""

    @property
    def place(self) -> tuple[str, int, str]:
        """(split, line, file_name): the first three fields of its findings."""
        name = str(self.values.get("file_name", ""))
        return self.split, self.line, name.encode(errors="replace").decode()  # a lone surrogate cannot be printed

    @property
    def files(self) -> dict[str, Any]:
        """File column -> value."""
        return {column: value for column, value in self.values.items() if is_file_column(column)}


def read_rows(folder: Path, split: str) -> Iterator[MetadataRow]:
    """Yield the rows of a split, broken ones with their fault."""
    for number, line in metadata_lines(folder, split):
        values, fault = {}, ""
        try:
            values = parse_row(line, "the line")
        except InputError as error:
            fault = str(error)
        yield MetadataRow(split, number, line, values, fault)
