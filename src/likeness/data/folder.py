"""Read prepared folders of faces: a `metadata.jsonl` next to its images, as in Hugging Face's imagefolder.

A row is a plain dict: file columns are `file_name` and `<condition>_file_name`, captions are `text` (a list). Reading
rows decodes no image, so a folder of a million faces opens as fast as its metadata can be read.
"""

from __future__ import annotations

import json
import math
import os
import re
import stat
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from decimal import Decimal
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from likeness.conditions import CONDITIONS
from likeness.conditions.images import read_rgb
from likeness.files import delete_partials, is_unfinished, locked, read_json, write_whole
from likeness.types import InputError

METADATA = "metadata.jsonl"

RECORD = "dataset.json"
"""File next to the splits: contents, source, split and license of the folder."""

ORIGINALS = "before"
"""Folder next to the splits in which `likeness prepare check --apply` keeps the files that it replaces or removes."""

HOW_TO_PREPARE = "`likeness prepare ingest IMAGES OUT` writes a prepared folder"

MAX_LINE = 2**26
"""Most bytes of a line of the metadata."""

SIDE = re.compile(r"(?<!\ball )\b(?:left|right)\b", re.IGNORECASE)
"""Words that `mirrored_caption` swaps."""


def read_folder(folder: str | Path) -> list[dict[str, Any]]:
    """Read the rows of `folder`, or of its split `train`, with every file column as an absolute `Path`. Null is absent.
    Raises `InputError` if the metadata is missing or a line is invalid.
    """
    return list(each_row(folder))


def each_row(folder: str | Path) -> Iterator[dict[str, Any]]:
    """Yield the rows of `read_folder` one at a time: the captions of a million faces take gigabytes."""
    root = root_of(folder)
    path, empty = root / METADATA, True
    folders: dict[str, str] = {}
    for number, line in metadata_lines(root, "."):
        where = f"{path}, line {number}"
        row = parse_row(line, where)
        for column in filter(is_file_column, row):
            row[column] = file_inside(root, row[column], folders, f"{where}: {column}")
        text = row.get("text", "")
        if not (isinstance(text, str) or (isinstance(text, list) and all(isinstance(each, str) for each in text))):
            raise InputError(f"{where}: text must be a caption or a list of captions")
        empty = False
        yield row
    if empty:
        raise InputError(f"{path} has no rows")


def parse_row(line: bytes, where: str) -> dict[str, Any]:
    """Parse a line of metadata, in UTF-8 with or without byte order mark, as `clean_row`. Raises `InputError` if it is
    not a JSON object with a `file_name`; `where` is its position.
    """
    try:
        row = json.loads(line.decode("utf-8-sig"))
    except (ValueError, RecursionError) as error:
        raise InputError(f"{where} is not valid JSON in UTF-8 ({str(error)[:80]})") from error
    if not isinstance(row, dict) or not isinstance(row.get("file_name"), str):
        raise InputError(f"{where} has no file_name: every row needs a file_name")
    return clean_row(row)


def clean_row(row: dict[str, Any]) -> dict[str, Any]:
    """Return a row without null and non-finite numbers, the gaps of tables, with Windows' slashes replaced. Dates and
    times of tables become text.
    """

    def finite(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: finite(inner) for key, inner in value.items()}
        if isinstance(value, list | tuple):
            return [finite(inner) for inner in value]
        if isinstance(value, float | Decimal):
            return float(value) if math.isfinite(value) else None
        return value if value is None or isinstance(value, str | int) else str(value)

    row = {column: finite(value) for column, value in row.items()}
    for column in filter(is_file_column, row):
        row[column] = row[column].replace("\\", "/") if isinstance(row[column], str) else row[column]
    return {column: value for column, value in row.items() if value is not None}


def is_file_column(column: str) -> bool:
    """Return whether a column names a file."""
    return column == "file_name" or column.endswith("_file_name")


def file_inside(root: Path, name: Any, folders: dict[str, str], where: str) -> Path:
    """Return the file that a row names as an absolute path with the links of its folder resolved. It need not exist.

    `folders` caches resolved folders; `where` is the position for messages. Raises `InputError` if it is not a file
    name below `root`, also through links, or is a pipe, a device or a socket, which could block or never end.
    """
    try:
        folder, base = os.path.split(name)
        if folder not in folders:
            folders[folder] = os.path.realpath(os.path.join(root, folder))
        file = target = os.path.join(folders[folder], base)
        mode = file_mode(file)
        if base in ("", ".", "..") or stat.S_ISLNK(mode):
            target = os.path.realpath(file)
            mode = file_mode(target)
    except (TypeError, ValueError) as error:  # not a string, or not a valid path
        raise InputError(f"{where} is {name!r}, which is not a file name") from error
    if not f"{target}{os.sep}".startswith(os.path.join(root, "")):
        raise InputError(f"{where} {name!r} points outside the folder")
    if mode and not (stat.S_ISREG(mode) or stat.S_ISDIR(mode)):
        raise InputError(f"{where} {name!r} is not a regular file")
    return Path(target if base in ("", ".", "..") else file)


def file_mode(file: str) -> int:
    """Return the mode of a file or link, 0 if it does not exist. Raises `ValueError` for invalid names."""
    try:
        return os.lstat(file).st_mode
    except OSError:
        return 0


def root_of(folder: str | Path) -> Path:
    """Return the absolute folder of metadata, `folder` or its split `train`. Raises `InputError` if it is missing."""
    for split in (".", "train"):
        if (Path(folder) / split / METADATA).is_file():
            return split_inside(Path(folder), split)
    raise InputError(f"{folder} has no {METADATA} and no split train: {HOW_TO_PREPARE}")


def splits_of(folder: Path) -> list[str]:
    """Return the subfolders of `folder` with metadata, `train` last, or ["."] if `folder` has metadata itself. Raises
    `InputError` if there is none.
    """
    if (folder / METADATA).is_file():
        return ["."]
    found = [path.parent.name for path in folder.glob(f"*/{METADATA}") if path.parent.name != ORIGINALS]
    if not found:
        raise InputError(f"{folder} has no {METADATA} and no splits: {HOW_TO_PREPARE}")
    for split in found:
        split_inside(folder, split)
    return sorted(found, key=lambda split: (split == "train", split))


def split_inside(folder: Path, split: str) -> Path:
    """Return the absolute folder of a split. Raises `InputError` if it is a link that leads outside the folder."""
    root = (folder / split).resolve()
    if not root.is_relative_to(folder.resolve()):
        raise InputError(f"{folder / split} is a link that leads outside {folder}: give the folder {root} itself")
    return root


@contextmanager
def changing(folder: Path, splits: Iterable[str]) -> Iterator[None]:
    """Lock splits of a prepared folder within a `with` block, and delete the unfinished files of killed processes.
    Raises `TryAgain` if another process changes one of them, and `InputError` if one cannot be written.
    """
    inner = {"images", *(condition.folder for condition in CONDITIONS.values())}
    with ExitStack() as locks:
        for split in splits:
            locks.enter_context(locked(folder / split))
            delete_partials(folder / split, inner)
        yield


def metadata_lines(folder: Path, split: str) -> Iterator[tuple[int, bytes]]:
    """Yield (line number from 1, line) of a split's metadata without blank lines."""
    path = folder / split / METADATA
    return ((number, line) for number, line in enumerate(lines_of(path), start=1) if line.strip())


def known_rows(out: Path) -> dict[str, str]:
    """Return the rows of a split's metadata, JSON by `file_name`; {} if it has none."""
    if not (out / METADATA).is_file():
        return {}
    parsed = (parse_row(line, f"{out / METADATA}, line {number}") for number, line in metadata_lines(out, "."))
    return {row["file_name"]: json.dumps(row) for row in parsed}


def lines_of(path: Path) -> Iterator[bytes]:
    """Yield the lines of a large file. Raises `InputError` if it cannot be read, or a line is too long."""
    try:
        with path.open("rb") as file:
            for number, line in enumerate(iter(lambda: file.readline(MAX_LINE + 1), b""), start=1):
                if len(line) > MAX_LINE:
                    raise InputError(f"{path}, line {number} is longer than {MAX_LINE >> 20} MiB: correct or remove it")
                yield line
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror or error}") from error


def line_of(row: dict[str, Any]) -> bytes:
    """Encode a row, with its files by name, as a line of the metadata.

    A lone surrogate, as in file names that are not UTF-8, cannot be encoded; its JSON escape can. NaN is not JSON.
    """
    return json.dumps(row, ensure_ascii=False, allow_nan=False).encode(errors="backslashreplace") + b"\n"


def relative_row(row: dict[str, Any], root: Path) -> dict[str, Any]:
    """Return a row with its files relative to `root`, as the metadata names them."""
    return {key: value.relative_to(root).as_posix() if isinstance(value, Path) else value for key, value in row.items()}


def column_of(condition: str) -> str:
    """Return the file column of a condition; that of the image is `file_name`."""
    return f"{condition}_file_name"


def read_record(folder: Path) -> dict[str, Any]:
    """Return `dataset.json` of a prepared folder or of the parent of its splits; {} if it is missing."""
    for place in (folder, folder.resolve().parent):
        if (place / RECORD).is_file():
            return read_json(place / RECORD)
    return {}


def open_record(out: Path, arguments: dict[str, Any], command: str) -> dict[str, Any]:
    """Return `dataset.json` of a folder that a command writes, with these arguments; {} if the folder is new. Raises
    `InputError` if it was written with other arguments, contains something else, or cannot be accessed.
    """
    try:
        if (out / RECORD).is_file():
            record = read_record(out)
            other = [key for key, value in arguments.items() if record.get(key) != value]
            if other:
                changes = ", ".join(f"{key} {record.get(key)!r}, not {arguments[key]!r}" for key in other[:3])
                raise InputError(f"{out} was written with {changes}: choose another folder, or the former options")
            return record
        if out.exists() and any(not is_unfinished(entry.name) for entry in out.iterdir()):
            raise InputError(f"{out} is not empty and was not written by `likeness prepare {command}`: choose another")
    except OSError as error:
        raise InputError(f"cannot write {out}: {error.strerror or error}") from error
    return {}


def write_record(out: Path, record: dict[str, Any]) -> None:
    """Write `dataset.json`."""
    text = json.dumps(record, indent=2, ensure_ascii=False) + "\n"
    write_whole(out / RECORD, text.encode(errors="backslashreplace"))  # see `line_of`


def captions_of(row: dict[str, Any]) -> Sequence[str]:
    """Return the captions of a row, without empty ones: `text` may be a string, a list, or absent."""
    text = row.get("text", ())
    return tuple(caption for caption in ([text] if isinstance(text, str) else text) if caption.strip())


def attributes_of(row: dict[str, Any]) -> dict[str, Any]:
    """Return the attributes of a row; {} if it has none, or a list of names without values, as other datasets have."""
    attributes = row.get("attributes")
    return attributes if isinstance(attributes, dict) else {}


def mirrored_caption(caption: str) -> str:
    """Return the caption of the mirrored image: with the words "left" and "right" swapped, except in "all right"."""

    def other(found: re.Match[str]) -> str:
        word, new = found[0], "right" if found[0].lower() == "left" else "left"
        return new.upper() if word.isupper() else new.capitalize() if word[0].isupper() else new

    return SIDE.sub(other, caption)


def read_photo(path: Path, size: int | None = None) -> np.ndarray:
    """Read an image upright as sRGB on white, uint8 [H, W, 3], resized to `size` pixels if it is given. Raises
    `InputError` if it cannot be read, or is not square and must be resized.
    """
    image = read_rgb(path)
    if size is None or image.size == (size, size):
        return np.array(image)
    if image.width != image.height:
        raise InputError(f"{path} is {image.width}x{image.height}; images must be square: crop it")
    return np.array(image.resize((size, size), Image.Resampling.LANCZOS))
