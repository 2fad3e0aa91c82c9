"""Kinds of faults, the fix list that a check writes next to the data, and its application.

All rows are read one at a time, valid or not, so that every fault can be reported. Files are fixed one at a time, each
atomically, and the metadata is written last. Everything that is replaced or removed is kept in `ORIGINALS`. Findings
whose `fix` is null need a human decision. The list only selects among the findings of a new check.
"""

from __future__ import annotations

import json
import os
import re
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from likeness.conditions import CONDITIONS, inspection
from likeness.data.folder import (
    METADATA,
    ORIGINALS,
    column_of,
    file_inside,
    is_file_column,
    line_of,
    lines_of,
    metadata_lines,
    parse_row,
    split_inside,
)
from likeness.files import write_whole
from likeness.types import InputError

KINDS: dict[str, str] = {
    "broken-row": "a line is not JSON, lacks file_name, has a column of the wrong type or points outside the folder",
    "missing-file": "a row names a file that does not exist",
    "unlisted-file": "a file is stored among the listed ones, but no row names it",
    "corrupt-file": "a file cannot be read: empty, truncated, too large to be safe, or not what its name says",
    "blank": "an image of one tone, a mask without a face or a sketch without lines",
    "wrong-size": "an image is not square or smaller than most, or a condition has another aspect ratio than its image",
    "color-order": "red and blue are swapped (BGR), in most images or in the colors of a mask",
    "off-palette": "the colors or numbers of a mask belong to no known palette or class order",
    "class-order": "the class numbers of a mask are in the order of another tool",
    "blended-labels": "the classes of a mask were blended by a smooth resize or by JPEG",
    "swapped-sides": "left and right are swapped, in a mask or in keypoints",
    "inverted-sketch": "a sketch has light lines on a dark background",
    "no-sketch": "a photograph or a mask in place of a sketch",
    "misplaced-keypoints": "keypoints and mask disagree about where eyes, nose and lips are: one of them is wrong",
    "undetected-points": "keypoints have points at (0, 0), which detectors write for points that they did not find",
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


FIX_LIST = "fixes.jsonl"
"""File next to the data with one finding per line."""

MAX_PIECES = 75
"""Most words, digits and punctuation marks of a caption: 77 tokens without start and end.

No CLIP tokenizer makes fewer tokens than these pieces; that of the large models makes few more of plain English. The
tokenizer of the bundled models, with 1,031 tokens, makes about two per word and is not used here.
"""

PIECE = re.compile(r"'(?:s|t|re|ve|m|ll|d)\b|[^\W\d_]+|\d|(?:[^\w\s]|_)+", re.IGNORECASE)
"""CLIP's split of a text before tokenization."""

GARBAGE = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\ud800-\udfff\ufffd]")
"""Control characters, lone surrogates and replacement characters."""


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


# Captions


def fix_captions(text: Any, kinds: Collection[str]) -> tuple[Any, list[tuple[str, str]]]:
    """Fix the faults of a row's captions, the column `text`, that are of some kinds.

    Returns:
        The fixed column, None if no caption remains; and (kind, sentence) of every fault.
    """
    captions = text if isinstance(text, list) else [text]
    if not captions:
        return (None if "empty-caption" in kinds else text), [("empty-caption", "the list of captions is empty")]
    faults, kept = [], []
    for caption in captions:
        while (fault := caption_fault(caption)) is not None:
            kind, sentence, fixed = fault
            faults.append((kind, sentence))
            if kind not in kinds:
                kept.append(caption)
            if kind not in kinds or fixed is None:
                break
            caption = fixed
        else:
            kept.append(caption)
    return (kept if isinstance(text, list) else kept[0]) if kept else None, faults


def caption_fault(caption: Any) -> tuple[str, str, str | None] | None:
    """Return (kind, sentence, fixed caption or None to remove it) of the first fault of a caption, None if valid."""
    if caption is None or (isinstance(caption, str) and not caption.strip()):
        return "empty-caption", "a caption is empty", None
    if not isinstance(caption, str):
        return "broken-row", f"a caption is not text but {json.dumps(caption)[:60]}", None
    try:  # UTF-8 decoded as Windows-1252; correct text other than ASCII fails one of the two steps
        decoded = caption.encode("cp1252").decode("utf-8")
    except UnicodeError:
        decoded = caption
    if decoded != caption:
        return "garbled-caption", f"a caption is in the wrong encoding: {caption[:60]!r}", decoded
    if GARBAGE.search(caption):
        return "garbled-caption", f"a caption has unreadable characters: {caption[:60]!r}", None
    pieces = list(PIECE.finditer(caption)) if len(caption) > MAX_PIECES else []
    if len(pieces) > MAX_PIECES:
        short = re.sub(r"\S+$", "", caption[: pieces[MAX_PIECES].start()]).rstrip(" \t\r\n,;:-")
        sentence = f"a caption has {len(pieces)} words and marks, of which {MAX_PIECES} are read: {caption[:60]!r}"
        return "long-caption", sentence, short or None
    return None


# The list


def write_fixes(folder: Path, findings: Sequence[Finding], state: str) -> None:
    """Write the fix list next to the data; without findings, delete an older list. `state` is that of the check.

    Raises:
        InputError: it cannot be written.
    """
    path = folder / FIX_LIST
    if findings:
        lines = [json.dumps(asdict(found) | {"metadata": state}, ensure_ascii=False) + "\n" for found in findings]
        write_whole(path, "".join(lines).encode(errors="backslashreplace"))
    elif path.is_file():
        path.unlink()


def selected_fixes(folder: Path, findings: Sequence[Finding], state: str, *, current: bool = False) -> list[Finding]:
    """Return the findings of a check, without the fix of those that the fix list excludes: its line was deleted since
    the list was written for the same metadata, or has no fix. The list comes with the data, so nothing of it is used
    but this selection.

    Raises:
        InputError: the list cannot be read, or was written for other metadata although it must be `current`.
    """
    path, same = folder / FIX_LIST, True
    kept, excluded = set(), set()
    fault_of = lambda found: (found.split, found.file_name, found.column, found.kind)  # noqa: E731, lines may change
    if not path.is_file():
        return [*findings]
    for number, line in enumerate(lines_of(path), start=1):
        if not line.strip():
            continue
        try:
            values = json.loads(line)
            same &= values.pop("metadata") == state
            found = Finding(**values)
            kept.add(key_of(found))
            excluded |= {fault_of(found)} if found.fix is None else set()
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
            raise InputError(f"{path}, line {number} is not a line of a fix list: correct or delete it") from error
    if current and not same:
        raise InputError(f"the metadata has changed since {path} was written: check the folder again")
    return [
        replace(found, fix=None) if fault_of(found) in excluded or (same and key_of(found) not in kept) else found
        for found in findings
    ]


def key_of(found: Finding) -> tuple[Any, ...]:
    """Return everything by which findings are compared; the sentence is only for people."""
    return found.split, found.line, found.file_name, found.column, found.kind, found.fix


def apply_fixes(folder: Path, findings: Iterable[Finding]) -> dict[str, int]:
    """Apply the fixes of a check to the folder, which no other process may change (`likeness.data.folder.changing`).

    Findings whose `fix` is null are left alone. After an interruption, check and apply again. The metadata of changed
    splits is kept in memory.

    Returns:
        Fix -> number of findings fixed.

    Raises:
        InputError: a file cannot be read or written.
    """
    folder = folder.resolve()
    by_row: dict[tuple[str, int], list[Finding]] = {}
    for found in findings:
        if found.fix is not None:
            by_row.setdefault((found.split, found.line), []).append(found)
    try:
        fixed = {split: b"".join(fix_split(folder, split, by_row)) for split in sorted({split for split, _ in by_row})}
        for split, content in fixed.items():
            move_away(folder, split, METADATA, copy=True)
            write_whole(folder / split / METADATA, content)
    except OSError as error:
        raise InputError(f"cannot fix {folder}: {error}") from error
    return dict(Counter(str(found.fix) for findings in by_row.values() for found in findings))


def fix_split(folder: Path, split: str, by_row: dict[tuple[str, int], list[Finding]]) -> Iterator[bytes]:
    """Fix the files of a split and yield the lines of its new metadata."""
    rows = list(read_rows(folder, split))
    dropped = [dropped_files(folder, row, by_row.get(row.place[:2], [])) for row in rows]
    pairs = [(name, gone) for row, gone in zip(rows, dropped, strict=True) for name in row.files.values()]
    kept = {name for name, gone in pairs if isinstance(name, str) and name not in gone}
    for row, gone in zip(rows, dropped, strict=True):
        findings = by_row.get(row.place[:2], [])
        for name in gone - kept:
            move_away(folder, split, name)
        if not findings:
            yield row.raw.rstrip(b"\r\n") + b"\n" if row.fault else line_of(row.values)
        elif not any(found.fix == "drop-row" for found in findings):
            yield line_of(fix_row(folder, row, findings))


def fix_row(folder: Path, row: MetadataRow, findings: list[Finding]) -> dict[str, Any]:
    """Fix the files of a row and return its columns."""
    columns = {fix: {found.column for found in findings if found.fix == fix} for fix in FIXES}
    values = {column: value for column, value in row.values.items() if column not in columns["drop-file"]}
    for column in columns["rewrite"] & values.keys():
        condition = next(name for name in CONDITIONS if column_of(name) == column)
        values[column] = rewrite(folder, row.split, values[column], condition)
    for column in columns["captions"] & values.keys():
        captions, _ = fix_captions(values.pop(column), {found.kind for found in findings if found.column == column})
        values |= {column: captions} if captions is not None else {}
    return values


def dropped_files(folder: Path, row: MetadataRow, findings: list[Finding]) -> set[str]:
    """Return the files that the fixed row no longer names, except for those outside the folder."""
    whole_row = any(found.fix == "drop-row" for found in findings)
    columns = {found.column for found in findings if found.fix == "drop-file"}
    dropped = set()
    for column, name in row.files.items():
        if whole_row or column in columns:
            with suppress(InputError):
                file_inside(split_inside(folder, row.split), name, {}, column)
                dropped.add(name)
    return dropped


def rewrite(folder: Path, split: str, name: str, condition: str) -> str:
    """Write a mask or sketch in its canonical form; returns its new name, which ends in .png."""
    path = folder / split / name
    target = path if path.suffix == ".png" else path.with_name(f"{path.name}.png")
    # Already done if another row names the same file, or in an interrupted run.
    if path.exists() and (target != path or CONDITIONS[condition].read(path).notes):
        report = inspection.inspect(path, condition)
        move_away(folder, split, name, copy=True)
        inspection.fix(report, target)
        if target != path:
            path.unlink()
    return target.relative_to(folder / split).as_posix()


def move_away(folder: Path, split: str, name: str, *, copy: bool = False) -> None:
    """Move or copy a file, or move a folder of part files, to `ORIGINALS`, under a free name.

    A copy is not made again if it exists.

    Raises:
        InputError: `ORIGINALS` leads outside the folder through a link.
    """
    path = folder / split / name
    file_inside(folder, f"{ORIGINALS}/{split}/{name}", {}, "the file to keep")
    if not path.exists():
        return
    first = place = folder / ORIGINALS / split / name
    number = 1
    while place.exists() and not (copy and place.read_bytes() == path.read_bytes()):
        number += 1
        place = first.with_stem(f"{first.stem}-{number}")
    if not copy:
        place.parent.mkdir(parents=True, exist_ok=True)
        os.replace(path, place)
    elif not place.exists():
        write_whole(place, path.read_bytes())
