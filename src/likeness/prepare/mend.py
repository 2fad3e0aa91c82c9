"""The fix list that a check leaves beside the data, and carrying it out.

Files are mended one by one, each whole or not at all, and the metadata is written last; whatever is replaced or taken
away is kept under `before/`. Only what is certain is mended: a fault whose `fix` is null waits for somebody's eye.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections import Counter
from collections.abc import Collection, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

from likeness.conditions import CONDITIONS, inspection
from likeness.data.folder import METADATA, column_of, line_of
from likeness.files import write_whole
from likeness.prepare.faults import BEFORE, KINDS, MENDING, Finding, Row, metadata_lines, read_rows, splits_of
from likeness.types import InputError

FIXES = "fixes.jsonl"
"""The fix list, beside the data: one finding a line."""

MOST_PIECES = 75
"""Words, digits and marks of a caption: 77 tokens less start and end.

No CLIP tokenizer makes fewer tokens than these pieces, and that of the large models hardly more of plain English. The
tokenizer of the bundled models is no measure: with its 1,031 pieces it takes about two for a word.
"""

PIECE = re.compile(r"'(?:s|t|re|ve|m|ll|d)\b|[^\W\d_]+|\d|(?:[^\w\s]|_)+", re.IGNORECASE)
"""What CLIP splits text into before it looks for tokens."""

GARBAGE = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\ud800-\udfff\ufffd]")
"""Control characters, halves of pairs, and what decoders put where they could not read."""


def mend_captions(text: Any, kinds: Collection[str]) -> tuple[Any, list[tuple[str, str]]]:
    """The captions of a row without the faults of `kinds`.

    Args:
        text: the column `text`: a string or a list of strings where all is well.
        kinds: kinds of fault to mend.

    Returns:
        The column mended, None where nothing is left of it; and (kind, sentence) of every fault met.
    """
    captions = text if isinstance(text, list) else [text]
    if not captions:
        return (None if "empty-caption" in kinds else text), [("empty-caption", "there is no caption in the list")]
    met, kept = [], []
    for caption in captions:
        while (verdict := judge_caption(caption)) is not None:
            kind, sentence, mended = verdict
            met.append((kind, sentence))
            if kind not in kinds:
                kept.append(caption)
            if kind not in kinds or mended is None:
                break
            caption = mended
        else:
            kept.append(caption)
    return (kept if isinstance(text, list) else kept[0]) if kept else None, met


def judge_caption(caption: Any) -> tuple[str, str, str | None] | None:
    """(kind, sentence, mended or None to leave it out) of the first fault of a caption; None where it has none."""
    if caption is None or (isinstance(caption, str) and not caption.strip()):
        return "empty-caption", "a caption is empty", None
    if not isinstance(caption, str):
        return "broken-row", f"a caption is no text but {json.dumps(caption)[:60]}", None
    try:  # UTF-8 that was read as Windows-1252; right text other than plain English fails one of the two steps
        decoded = caption.encode("cp1252").decode("utf-8")
    except UnicodeError:
        decoded = caption
    if decoded != caption:
        return "garbled-caption", f"a caption is in the wrong encoding: {caption[:60]!r}", decoded
    if GARBAGE.search(caption):
        return "garbled-caption", f"a caption has unreadable characters: {caption[:60]!r}", None
    pieces = list(PIECE.finditer(caption)) if len(caption) > MOST_PIECES else []
    if len(pieces) > MOST_PIECES:
        whole = re.sub(r"\S+$", "", caption[: pieces[MOST_PIECES].start()]).rstrip(" \t\r\n,;:-")
        sentence = f"a caption has {len(pieces)} words and marks, of which {MOST_PIECES} are read: {caption[:60]!r}"
        return "long-caption", sentence, whole or None
    return None


def write_fixes(folder: Path, findings: list[Finding]) -> None:
    """Write the fix list beside the data, one finding a line; where there is none, an older list is taken away.

    Raises:
        InputError: it cannot be written.
    """
    path = folder / FIXES
    if findings:
        state = {"metadata": state_of(folder)}
        lines = [json.dumps(asdict(found) | state, ensure_ascii=False) + "\n" for found in findings]
        write_whole(path, "".join(lines).encode(errors="backslashreplace"))
    elif path.is_file():
        path.unlink()


def state_of(folder: Path) -> str:
    """Hash of all metadata: a list that was made for another state must not be carried out."""
    hashed = hashlib.sha256()
    for split in splits_of(folder):
        for _, line in metadata_lines(folder, split):
            hashed.update(line)
    return hashed.hexdigest()[:16]


def read_fixes(folder: Path) -> list[Finding]:
    """The fix list beside the data.

    Raises:
        InputError: it cannot be read, or was written for other metadata.
    """
    path, state, findings = folder / FIXES, state_of(folder), []
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path} cannot be read ({error}): check the folder again") from error
    for number, line in enumerate(lines, start=1):
        try:
            values = json.loads(line)
            written = values.pop("metadata")
            found = Finding(**values)
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise InputError(f"{path}, line {number} is no line of a fix list: check the folder again") from error
        if written != state:
            raise InputError(f"the metadata has changed since {path} was written: check the folder again")
        if found.kind not in KINDS or (found.fix is not None and found.fix not in MENDING):
            raise InputError(f"{path}, line {number}: the kind {found.kind!r} or the fix {found.fix!r} is unknown")
        findings.append(found)
    return findings


def apply_fixes(folder: Path) -> dict[str, int]:
    """Carry out the fix list. A line deleted from it, or one whose `fix` is null, leaves its fault as it is.

    Stopped half-way, it is finished by checking and applying again. The metadata of the splits that change is held in
    memory.

    Returns:
        Way of mending -> how many findings were mended so.

    Raises:
        InputError: the list cannot be used (see `read_fixes`), or a file cannot be read or written.
    """
    folder = folder.resolve()
    todo: dict[tuple[str, int], list[Finding]] = {}
    for found in read_fixes(folder):
        if found.fix is not None:
            todo.setdefault((found.split, found.line), []).append(found)
    try:
        mended = {split: b"".join(mend_split(folder, split, todo)) for split in sorted({split for split, _ in todo})}
        for split, content in mended.items():
            keep_copy(folder, split, METADATA)
            write_whole(folder / split / METADATA, content)
    except OSError as error:
        raise InputError(f"cannot mend {folder}: {error}") from error
    return dict(Counter(str(found.fix) for findings in todo.values() for found in findings))


def mend_split(folder: Path, split: str, todo: dict[tuple[str, int], list[Finding]]) -> Iterator[bytes]:
    """Mend the files of a split; yields the lines of its new metadata."""
    unneeded: set[str] = set()
    for row in read_rows(folder, split):
        unneeded |= dropped_files(row, todo.get(row.place[:2], []))
    for row in read_rows(folder, split):
        names = {name for name in row.files.values() if isinstance(name, str)}
        unneeded -= names - dropped_files(row, todo.get(row.place[:2], []))
    for row in read_rows(folder, split):
        findings = todo.get(row.place[:2], [])
        for name in dropped_files(row, findings) & unneeded:
            move_away(folder, split, name)
        if not findings:
            yield row.raw if row.raw.endswith(b"\n") else row.raw + b"\n"
        elif not any(found.fix == "drop-row" for found in findings):
            values = mend_row(folder, row, findings)
            yield line_of(values)


def mend_row(folder: Path, row: Row, findings: list[Finding]) -> dict[str, Any]:
    """The columns of a row once its files are mended."""
    columns = {fix: {found.column for found in findings if found.fix == fix} for fix in MENDING}
    values = {column: value for column, value in row.values.items() if column not in columns["drop-file"]}
    for column in columns["rewrite"] & values.keys():
        condition = next(name for name in CONDITIONS if column_of(name) == column)
        values[column] = rewrite(folder, row.split, values[column], condition)
    for column in columns["captions"] & values.keys():
        captions, _ = mend_captions(values.pop(column), {found.kind for found in findings if found.column == column})
        values |= {column: captions} if captions is not None else {}
    return values


def dropped_files(row: Row, findings: list[Finding]) -> set[str]:
    """The files that a row will not name any more; what lies outside the folder is not ours."""
    whole = any(found.fix == "drop-row" for found in findings)
    columns = {found.column for found in findings if found.fix == "drop-file"}
    outside = {found.column for found in findings if found.kind == "broken-row"}
    dropped = {column: name for column, name in row.files.items() if whole or column in columns}
    return {name for column, name in dropped.items() if isinstance(name, str) and column not in outside}


def rewrite(folder: Path, split: str, name: str, condition: str) -> str:
    """Write a mask or sketch in its canonical form; its name, which ends in .png from now on."""
    path = folder / split / name
    target = path if path.suffix == ".png" else path.with_name(f"{path.name}.png")
    # It may be done already, for another row that names it or before a run was stopped.
    if path.exists() and (target != path or CONDITIONS[condition].read(path).notes):
        report = inspection.inspect(path, condition)
        if target == path:
            keep_copy(folder, split, name)
        inspection.fix(report, target)
        if target != path:
            move_away(folder, split, name)
    return target.relative_to(folder / split).as_posix()


def keep_copy(folder: Path, split: str, name: str) -> None:
    """Copy a file to `before/`, unless this content is there already."""
    content = (folder / split / name).read_bytes()
    place = free_place(folder, split, name, content)
    if not place.exists():
        write_whole(place, content)


def move_away(folder: Path, split: str, name: str) -> None:
    """Move a file, or a folder of part files, to `before/`."""
    path = folder / split / name
    if path.exists():
        place = free_place(folder, split, name)
        place.parent.mkdir(parents=True, exist_ok=True)
        os.replace(path, place)


def free_place(folder: Path, split: str, name: str, content: bytes | None = None) -> Path:
    """Where `before/` has nothing yet, or just this content."""
    first = place = folder / BEFORE / split / name
    number = 1
    while place.exists() and (content is None or place.read_bytes() != content):
        number += 1
        place = first.with_stem(f"{first.stem}-{number}")
    return place
