"""Read a prepared folder of faces: a `metadata.jsonl` beside its pictures, as Hugging Face's imagefolder has it.

A row is a plain dict; file columns are `file_name` and `<condition>_file_name`, captions are `text` (a list). Reading
rows decodes no picture, so a folder of a million faces opens as fast as its metadata can be read.
"""

from __future__ import annotations

import json
import os
import stat
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from likeness.conditions import CONDITIONS
from likeness.conditions.images import open_image
from likeness.types import InputError

METADATA = "metadata.jsonl"

RECORD = "dataset.json"
"""Beside the splits: what the folder holds, where it came from, how it was split and under which licence."""


def read_folder(folder: str | Path) -> list[dict[str, Any]]:
    """The rows of `folder`, every file column as an absolute `Path`.

    Args:
        folder: a directory with `metadata.jsonl`, or its parent with a `train` split. A column that is null counts as
            absent: tools that write tables fill their gaps so.

    Raises:
        InputError: there is no metadata, a line is not JSON, has no `file_name`, names a file outside the folder, or
            has captions that are no text.
    """
    return list(each_row(folder))


def each_row(folder: str | Path) -> Iterator[dict[str, Any]]:
    """The rows of `read_folder`, one at a time: the captions of a million faces are gigabytes."""
    root = root_of(folder)
    path, empty = root / METADATA, True
    folders: dict[str, str] = {}
    with path.open("rb") as lines:
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            where = f"{path}, line {number}"
            try:
                row = json.loads(line)
            except (ValueError, RecursionError) as error:
                raise InputError(f"{where}: not valid JSON ({str(error)[:80]})") from error
            if not isinstance(row, dict) or not isinstance(row.get("file_name"), str):
                raise InputError(f"{where}: every row needs a file_name")
            row = {column: value for column, value in row.items() if value is not None}
            for column in [name for name in row if name == "file_name" or name.endswith("_file_name")]:
                row[column] = file_inside(root, row[column], folders, f"{where}: {column}")
            text = row.get("text", "")
            if not (isinstance(text, str) or (isinstance(text, list) and all(isinstance(each, str) for each in text))):
                raise InputError(f"{where}: text is neither a caption nor a list of captions")
            empty = False
            yield row
    if empty:
        raise InputError(f"{path} has no rows")


def file_inside(root: Path, name: Any, folders: dict[str, str], where: str) -> Path:
    """The file that a row names, as an absolute path; links are followed.

    Args:
        root: the rows' folder, itself without links.
        name: what the row says.
        folders: where folders really are, by their names; resolving each once is what makes a million rows quick.
        where: how messages call the column.

    Raises:
        InputError: it is no name of a file below `root`.
    """
    try:
        folder, base = os.path.split(name)
        if folder not in folders:
            folders[folder] = os.path.realpath(os.path.join(root, folder))
        file = os.path.join(folders[folder], base)
        if base in ("", ".", "..") or is_link(file):
            file = os.path.realpath(file)
    except (TypeError, ValueError) as error:  # no string, or one that no file system takes
        raise InputError(f"{where} is {name!r}, which names no file") from error
    if not f"{file}{os.sep}".startswith(os.path.join(root, "")):
        raise InputError(f"{where} {name!r} points outside the folder")
    return Path(file)


def is_link(file: str) -> bool:
    """Whether a file is a link; one that is not there is none. Unlike `os.path.islink`, raises for impossible names."""
    try:
        return stat.S_ISLNK(os.lstat(file).st_mode)
    except OSError:
        return False


def root_of(folder: str | Path) -> Path:
    """The absolute directory whose `metadata.jsonl` `read_folder` reads.

    Raises:
        InputError: there is none.
    """
    for root in (Path(folder), Path(folder) / "train"):
        if (root / METADATA).is_file():
            return root.resolve()
    raise InputError(
        f"{folder} has no {METADATA}, nor has a folder train in it: `likeness prepare ingest PICTURES OUT` writes one"
    )


def line_of(row: dict[str, Any]) -> bytes:
    """A row, with its files by name, as a line of the metadata.

    Half a surrogate pair, as in names that are no UTF-8, cannot be encoded, but its backslash form is its JSON.
    """
    return json.dumps(row, ensure_ascii=False).encode(errors="backslashreplace") + b"\n"


def column_of(condition: str) -> str:
    """The file column of a condition; the picture itself is `file_name`."""
    return f"{condition}_file_name"


def condition_file(condition: str, stem: str) -> str:
    """Where a condition's file goes, as the metadata names it."""
    return CONDITIONS[condition].file(stem)


def read_record(folder: Path) -> dict[str, Any]:
    """What `dataset.json` says of a prepared folder or of the parent of its splits; empty where there is none."""
    path = next((place / RECORD for place in (folder, folder.resolve().parent) if (place / RECORD).is_file()), None)
    if path is None:
        return {}
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"{path} cannot be read ({str(error)[:80]}): prepare the folder again") from error
    return found if isinstance(found, dict) else {}


def captions_of(row: dict[str, Any]) -> Sequence[str]:
    """The captions of a row: `text` may be one string, a list, or absent."""
    text = row.get("text", ())
    return (text,) if isinstance(text, str) else tuple(text)


def read_photo(path: Path, size: int | None = None) -> np.ndarray:
    """A photograph, upright, uint8 RGB [H, W, 3].

    Args:
        path: the file.
        size: pixels a side to bring it to; None leaves it as it is.

    Raises:
        InputError: it cannot be read, or is not square where a size is asked for.
    """
    image = open_image(path).convert("RGB")
    if size is None or image.size == (size, size):
        return np.array(image)
    if image.width != image.height:
        raise InputError(f"{path} is {image.width}x{image.height}; training pictures must be square: crop it")
    return np.array(image.resize((size, size), Image.Resampling.LANCZOS))
