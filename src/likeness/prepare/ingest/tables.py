"""Parquet files as Hugging Face writes them, and WebDataset shards: faces that lie many in one file.

Both are read in place and in order. Pyarrow reads Parquet and is asked for only here and where it is written; a shard
is a plain tar archive, for which Python has a reader.
"""

from __future__ import annotations

import tarfile
import threading
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

from likeness.conditions import CONDITIONS
from likeness.prepare.ingest.face import MOST_BYTES, Faces, Packed, Skipped, parse_json
from likeness.prepare.ingest.layouts import SPLIT_NAMES, row_or_reason
from likeness.prepare.ingest.tree import PICTURES, Tree
from likeness.types import InputError

PICTURE_COLUMNS = ("image", "img", "picture", "jpg", "png")
"""Columns that hold the picture itself, the first that is there."""

ROWS = 16
"""Rows of a Parquet file that are read together."""


def import_parquet() -> Any:
    """Pyarrow's parquet module. Raises `InputError` where it is not installed."""
    try:
        import pyarrow.parquet
    except ImportError as error:
        raise InputError("Parquet files need pyarrow: pip install 'likeness[data]'") from error
    return pyarrow.parquet


def split_of(path: str) -> str | None:
    """The split that a shard belongs to: its folder, or the first word of its name, is called so."""
    *folders, name = path.split("/")
    words = [name.split("-")[0].split("_")[0].split(".")[0], *reversed(folders)]
    return next((SPLIT_NAMES[word.lower()] for word in words if word.lower() in SPLIT_NAMES), None)


def shards(tree: Tree, suffix: str) -> Iterator[tuple[str, Path]]:
    """(name, path) of the files that end in `suffix`, sorted."""
    for folder in sorted(tree.folders):
        for name in tree.pictures(folder, (suffix,)).values():
            file = tree.file(name)
            if not isinstance(file, Path):
                raise InputError(f"{name} lies in an archive: unpack it first")
            yield name, file


def parquet(tree: Tree) -> Faces:
    """Parquet: `image` {bytes, path}, `mask`, `sketch` likewise, and the columns of `metadata.jsonl`."""
    reader = import_parquet()
    for name, path in shards(tree, ".parquet"):
        try:
            yield from parquet_rows(reader, path, split_of(name))
        except (OSError, ValueError) as error:  # pyarrow's errors are of these
            if isinstance(error, InputError):
                raise
            raise InputError(f"{path} is no Parquet file that can be read ({str(error)[:80]})") from error


def parquet_rows(reader: Any, path: Path, split: str | None) -> Faces:
    """The rows of one file. Pictures are read when they are asked for, a few rows at a time."""
    import pyarrow

    file, pictures = reader.ParquetFile(path), reader.ParquetFile(path)  # threads read from the second
    schema = file.schema_arrow
    holds = {  # pictures: {bytes, path}, or bytes
        field.name: pyarrow.types.is_struct(field.type)
        for field in schema
        if pyarrow.types.is_binary(field.type)
        or pyarrow.types.is_large_binary(field.type)
        or (pyarrow.types.is_struct(field.type) and {"bytes", "path"} <= {inner.name for inner in field.type})
    }
    column = next((name for name in (*PICTURE_COLUMNS, *holds) if name in holds and name not in CONDITIONS), None)
    if column is None:
        raise InputError(f"{path} has no column of pictures: `image` should hold bytes and path")
    columns = {"picture": column, **{name: name for name in CONDITIONS if name in holds}}
    unread = sorted(set(holds) - set(columns.values()))
    if unread:
        yield Skipped(f"columns {', '.join(unread)} of {path.name}", "no condition is called so")
    values = [name for name in schema.names if name not in holds]
    cell = in_order(pictures.iter_batches(ROWS, columns=list(columns.values())))
    paths = [f"{name}.path" for name in columns.values() if holds[name]]  # tell which are there without reading them
    number = 0
    for batch in file.iter_batches(ROWS, columns=values + paths or [column]):
        for row in batch.to_pylist():
            given = {field: row.pop(name, None) if holds[name] else {} for field, name in columns.items()}
            known = (given["picture"] or {}).get("path")
            stem = known.replace("\\", "/").rpartition("/")[2].rpartition(".")[0] if known else ""
            stem = stem or f"{path.stem}_{number:06d}"
            files = {
                field: Packed(f"{name} of row {number} in {path}", partial(cell_bytes, cell, number, name, path))
                for field, name in columns.items()
                if field == "picture" or given[field] is not None
            }
            yield from row_or_reason(row, name=stem, split=split, **files)
            number += 1


def in_order(batches: Iterator[Any]) -> Callable[[int, str], Any]:
    """(row, column) -> value, of rows that are asked for nearly in order: the last few batches are kept."""
    lock, kept, start = threading.Lock(), [], 0  # kept: (first row, batch)

    def cell(row: int, column: str) -> Any:
        nonlocal start
        with lock:
            while not kept or row >= kept[-1][0] + len(kept[-1][1]):
                batch = next(batches)
                kept.append((start, batch))
                start += len(batch)
                del kept[:-4]
            first, batch = next((first, batch) for first, batch in reversed(kept) if first <= row)
        return batch.column(column)[row - first]

    return cell


def cell_bytes(cell: Callable[[int, str], Any], row: int, column: str, path: Path) -> bytes:
    """The picture in a cell."""
    value = cell(row, column).as_py()
    content = value["bytes"] if isinstance(value, dict) else value
    if content is None:
        raise InputError(f"row {row} of {path} has no {column}: only its path is there")
    return content


def webdataset(tree: Tree) -> Faces:
    """WebDataset: tar archives of `key.jpg`, `key.txt` (a caption a line), `key.json`, `key.mask.png` and so on."""
    for name, path in shards(tree, ".tar"):
        try:
            with tarfile.open(path, "r:") as archive:
                key, sample = "", {}
                for info in archive:
                    if not info.isfile():
                        continue
                    base = info.name.rpartition("/")[2]
                    own, _, kind = base.partition(".")
                    own = info.name[: len(info.name) - len(base)] + own
                    if own != key and sample:
                        yield from sample_face(path, key, sample, split_of(name))
                        sample = {}
                    key = own
                    sample[kind.lower()] = partial(read_part, path, info.name, info.offset_data, info.size)
                if sample:
                    yield from sample_face(path, key, sample, split_of(name))
        except (tarfile.TarError, OSError, EOFError) as error:
            raise InputError(f"{path} is no whole, uncompressed tar archive ({error}): download it again") from error


def read_part(path: Path, name: str, offset: int, size: int) -> bytes:
    """A file of a tar archive."""
    if size > MOST_BYTES:
        raise InputError(f"{name} in {path} is larger than {MOST_BYTES >> 20} MiB: no picture of a face is")
    with path.open("rb") as archive:
        archive.seek(offset)
        content = archive.read(size)
    if len(content) < size:
        raise InputError(f"{name} in {path} is cut short: download the archive again")
    return content


def sample_face(path: Path, key: str, sample: dict[str, Callable[[], bytes]], split: str | None) -> Faces:
    """The face of one sample of a shard."""
    pictures = {suffix.removeprefix(".") for suffix in PICTURES}
    packed = {kind: Packed(f"{key}.{kind} in {path}", read) for kind, read in sample.items()}
    kind = next((kind for kind in packed if kind in pictures or kind.removeprefix("image.") in pictures), None)
    if kind is None:
        yield Skipped(f"{key} in {path.name}", "the sample has no picture")
        return
    files = {"picture": packed[kind]}
    for condition in CONDITIONS:
        found = next((name for name in packed if name.split(".")[0] == condition and "." in name), None)
        if found:
            files[condition] = packed[found]
    try:
        row = parse_json(sample["json"](), f"{key}.json in {path}") if "json" in sample else {}
        lines = sample["txt"]().decode("utf-8-sig").splitlines() if "txt" in sample else []
    except (InputError, UnicodeDecodeError) as error:
        yield Skipped(f"{key} in {path.name}", str(error))
        return
    row = row if isinstance(row, dict) else {}
    if lines and not row.get("text"):
        row["text"] = [line.strip() for line in lines if line.strip()]
    yield from row_or_reason(row, name=key.replace("/", "_"), split=split, **files)
