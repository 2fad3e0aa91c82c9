"""Read prepared folders of faces: a `metadata.jsonl` next to its images, as in Hugging Face's imagefolder.

A row is a plain dict: file columns are `file_name` and `<condition>_file_name`, captions are `text` (a list). Reading
rows decodes no image, so a folder of a million faces opens as fast as its metadata can be read.
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

from likeness.conditions.images import read_rgb
from likeness.files import read_json, write_whole
from likeness.types import InputError

METADATA = "metadata.jsonl"

RECORD = "dataset.json"
"""File next to the splits: contents, source, split and licence of the folder."""

ORIGINALS = "before"
"""Folder next to the splits in which `likeness prepare check --apply` keeps the files that it replaces or removes."""


def read_folder(folder: str | Path) -> list[dict[str, Any]]:
    """Read the rows of `folder`, with every file column as an absolute `Path`.

    Args:
        folder: a directory with `metadata.jsonl`, or its parent with a `train` split. A column that is null counts as
            absent: tools that write tables fill gaps with null.

    Raises:
        InputError: the metadata is missing, or a line is not JSON, lacks `file_name`, names a file outside the folder,
            or has captions that are not text.
    """
    return list(each_row(folder))


def each_row(folder: str | Path) -> Iterator[dict[str, Any]]:
    """Yield the rows of `read_folder` one at a time: the captions of a million faces take gigabytes."""
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
                raise InputError(f"{where}: text must be a caption or a list of captions")
            empty = False
            yield row
    if empty:
        raise InputError(f"{path} has no rows")


def file_inside(root: Path, name: Any, folders: dict[str, str], where: str) -> Path:
    """Return the file that a row names as an absolute path with links resolved.

    Args:
        root: folder of the rows, without links.
        name: value of the column.
        folders: cache of resolved folders. Resolving each folder once makes a million rows fast.
        where: position of the column, for messages.

    Raises:
        InputError: it is not the name of a file below `root`.
    """
    try:
        folder, base = os.path.split(name)
        if folder not in folders:
            folders[folder] = os.path.realpath(os.path.join(root, folder))
        file = os.path.join(folders[folder], base)
        if base in ("", ".", "..") or is_link(file):
            file = os.path.realpath(file)
    except (TypeError, ValueError) as error:  # not a string, or not a valid path
        raise InputError(f"{where} is {name!r}, which is not a file name") from error
    if not f"{file}{os.sep}".startswith(os.path.join(root, "")):
        raise InputError(f"{where} {name!r} points outside the folder")
    return Path(file)


def is_link(file: str) -> bool:
    """Return whether a file exists and is a link. Unlike `os.path.islink`, raises for invalid names."""
    try:
        return stat.S_ISLNK(os.lstat(file).st_mode)
    except OSError:
        return False


def root_of(folder: str | Path) -> Path:
    """Return the absolute directory whose `metadata.jsonl` is read: `folder` or its split `train`.

    Raises:
        InputError: the metadata is missing.
    """
    for root in (Path(folder), Path(folder) / "train"):
        if (root / METADATA).is_file():
            return root.resolve()
    raise InputError(
        f"{folder} has no {METADATA} and no split train: `likeness prepare ingest IMAGES OUT` writes a prepared folder"
    )


def splits_of(folder: Path) -> list[str]:
    """Return the subfolders of `folder` with metadata, `train` last, or ["."] if `folder` has metadata itself.

    Raises:
        InputError: the metadata is missing.
    """
    if (folder / METADATA).is_file():
        return ["."]
    found = [path.parent.name for path in folder.glob(f"*/{METADATA}") if path.parent.name != ORIGINALS]
    if not found:
        raise InputError(
            f"{folder} has no {METADATA} and no splits: `likeness prepare ingest IMAGES OUT` writes a prepared folder"
        )
    return sorted(found, key=lambda split: (split == "train", split))


def metadata_lines(folder: Path, split: str) -> Iterator[tuple[int, bytes]]:
    """Yield (line number from 1, line) of a split's metadata without blank lines."""
    path = folder / split / METADATA
    try:
        with path.open("rb") as lines:
            yield from ((number, line) for number, line in enumerate(lines, start=1) if line.strip())
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror or error}") from error


def line_of(row: dict[str, Any]) -> bytes:
    """Encode a row, with its files by name, as a line of the metadata.

    A lone surrogate, as in file names that are not UTF-8, cannot be encoded; its JSON escape can.
    """
    return json.dumps(row, ensure_ascii=False).encode(errors="backslashreplace") + b"\n"


def relative_row(row: dict[str, Any], root: Path) -> dict[str, Any]:
    """Return a row with its files relative to `root`, as the metadata names them."""
    return {
        column: value.relative_to(root).as_posix() if isinstance(value, Path) else value
        for column, value in row.items()
    }


def column_of(condition: str) -> str:
    """Return the file column of a condition; that of the image is `file_name`."""
    return f"{condition}_file_name"


def read_record(folder: Path) -> dict[str, Any]:
    """Return `dataset.json` of a prepared folder or of the parent of its splits; {} if it is missing."""
    for place in (folder, folder.resolve().parent):
        if (place / RECORD).is_file():
            found = read_json(place / RECORD)
            return found if isinstance(found, dict) else {}
    return {}


def open_record(out: Path, arguments: dict[str, Any], command: str) -> dict[str, Any]:
    """Return `dataset.json` of a folder that a command writes; {} if the folder is new.

    Args:
        out: the folder.
        arguments: arguments of the command, which the record must have.
        command: name of the command, for messages.

    Raises:
        InputError: the folder was written with other arguments, contains something else, or cannot be accessed.
    """
    try:
        if (out / RECORD).is_file():
            record = read_record(out)
            other = [key for key, value in arguments.items() if record.get(key) != value]
            if other:
                changes = ", ".join(f"{key} {record.get(key)!r}, not {arguments[key]!r}" for key in other[:3])
                raise InputError(f"{out} was written with {changes}: choose another folder or remove it")
            return record
        if out.exists() and any(not entry.name.startswith(f".{RECORD}.") for entry in out.iterdir()):
            raise InputError(f"{out} is not empty and was not written by `likeness prepare {command}`: choose another")
    except OSError as error:
        raise InputError(f"cannot write {out}: {error.strerror or error}") from error
    return {}


def write_record(out: Path, record: dict[str, Any]) -> None:
    """Write `dataset.json`."""
    write_whole(out / RECORD, json.dumps(record, indent=2, ensure_ascii=False) + "\n")


def captions_of(row: dict[str, Any]) -> Sequence[str]:
    """Return the captions of a row: `text` may be a string, a list, or absent."""
    text = row.get("text", ())
    return (text,) if isinstance(text, str) else tuple(text)


def read_photo(path: Path, size: int | None = None) -> np.ndarray:
    """Read an image upright as sRGB, uint8 [H, W, 3]; transparent pixels become white.

    Args:
        path: the file.
        size: side length in pixels to resize to; None keeps the size.

    Raises:
        InputError: it cannot be read, or is not square and must be resized.
    """
    image = read_rgb(path)
    if size is None or image.size == (size, size):
        return np.array(image)
    if image.width != image.height:
        raise InputError(f"{path} is {image.width}x{image.height}; training images must be square: crop it")
    return np.array(image.resize((size, size), Image.Resampling.LANCZOS))
