"""Read Parquet files as Hugging Face writes them, and WebDataset shards, in place and in order.

Only Parquet needs pyarrow. A shard is a plain tar archive.
"""

from __future__ import annotations

import tarfile
import threading
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

from likeness.conditions import CONDITIONS
from likeness.prepare.ingest.face import (
    MAX_BYTES,
    SPLIT_NAMES,
    Face,
    Faces,
    Packed,
    Skipped,
    parse_json,
    too_large,
    with_row,
)
from likeness.prepare.ingest.source import IMAGES, Source
from likeness.types import InputError

IMAGE_COLUMNS = ("image", "img", "picture", "jpg", "png")
"""Columns with the image itself; the first that exists is used."""

ROWS = 16
"""Rows of a Parquet file per read."""


def import_parquet() -> Any:
    """Return pyarrow's parquet module. Raises `InputError` if it is not installed."""
    try:
        import pyarrow.parquet
    except ImportError as error:
        raise InputError("Parquet files need pyarrow: pip install 'likeness[data]'") from error
    return pyarrow.parquet


def split_of(path: str) -> str | None:
    """Return the split of a shard, from the first word of its name or from its folder."""
    *folders, name = path.split("/")
    words = [name.split("-")[0].split("_")[0].split(".")[0], *reversed(folders)]
    return next((SPLIT_NAMES[word.lower()] for word in words if word.lower() in SPLIT_NAMES), None)


def shards(source: Source, suffix: str) -> Iterator[tuple[str, Path]]:
    """Yield (name, path) of the files with a suffix, sorted."""
    for folder in sorted(source.folders):
        for name in source.images(folder, (suffix,)).values():
            file = source.file(name)
            if not isinstance(file, Path):
                raise InputError(f"{name} is in an archive: unpack it first")
            yield name, file


def parquet(source: Source) -> Faces:
    """Parquet: `image` {bytes, path}, likewise `mask` and `sketch`, and the columns of `metadata.jsonl`."""
    reader = import_parquet()
    for name, path in shards(source, ".parquet"):
        try:
            yield from parquet_rows(reader, path, split_of(name))
        except (OSError, ValueError) as error:  # the base classes of pyarrow's errors
            if isinstance(error, InputError):
                raise
            raise InputError(f"{path} is not a readable Parquet file ({str(error)[:80]})") from error


def parquet_rows(reader: Any, path: Path, split: str | None) -> Faces:
    """Yield the rows of one file. Images are read when they are needed, a few rows at a time."""
    import pyarrow

    file, images = reader.ParquetFile(path), reader.ParquetFile(path)  # threads read from the second
    is_struct = {  # image columns: {bytes, path}, or bytes
        field.name: pyarrow.types.is_struct(field.type)
        for field in file.schema_arrow
        if pyarrow.types.is_binary(field.type)
        or pyarrow.types.is_large_binary(field.type)
        or (pyarrow.types.is_struct(field.type) and {"bytes", "path"} <= {inner.name for inner in field.type})
    }
    column = next((name for name in (*IMAGE_COLUMNS, *is_struct) if name in is_struct and name not in CONDITIONS), None)
    if column is None:
        raise InputError(f"{path} has no image column: `image` should have bytes and path")
    columns = {"image": column, **{name: name for name in CONDITIONS if name in is_struct}}
    unknown = sorted(set(is_struct) - set(columns.values()))
    if unknown:
        yield Skipped(f"columns {', '.join(unknown)} of {path.name}", "unknown condition")
    values = [name for name in file.schema_arrow.names if name not in is_struct]
    cell = cell_reader(images.iter_batches(ROWS, columns=list(columns.values())))
    paths = [f"{name}.path" for name in columns.values() if is_struct[name]]  # present images, without reading them
    number = 0
    for batch in file.iter_batches(ROWS, columns=values + paths or [column]):
        for row in batch.to_pylist():
            present = {field: row.pop(name, None) if is_struct[name] else {} for field, name in columns.items()}
            known = (present["image"] or {}).get("path")
            stem = known.replace("\\", "/").rpartition("/")[2].rpartition(".")[0] if known else ""
            files: dict[str, Any] = {
                field: Packed(f"{name} of row {number} in {path}", partial(cell_bytes, cell, number, name, path))
                for field, name in columns.items()
                if field == "image" or present[field] is not None
            }
            face = Face(name=stem or f"{path.stem}_{number:06d}", split=split, **files)
            yield with_row(face, row)
            number += 1


def cell_reader(batches: Iterator[Any]) -> Callable[[int, str], Any]:
    """Return a function (row, column) -> value for rows that are read nearly in order: the last batches are cached."""
    lock, cache, start = threading.Lock(), [], 0  # cache: (first row, batch)

    def cell(row: int, column: str) -> Any:
        nonlocal start
        with lock:
            while not cache or row >= cache[-1][0] + len(cache[-1][1]):
                batch = next(batches)
                cache.append((start, batch))
                start += len(batch)
                del cache[:-4]
            first, batch = next((first, batch) for first, batch in reversed(cache) if first <= row)
        return batch.column(column)[row - first]

    return cell


def cell_bytes(cell: Callable[[int, str], Any], row: int, column: str, path: Path) -> bytes:
    """Return the content of the image in a cell."""
    value = cell(row, column).as_py()
    content = value["bytes"] if isinstance(value, dict) else value
    if content is None:
        raise InputError(f"row {row} of {path} has no {column}: it contains only its path")
    return content


def webdataset(source: Source) -> Faces:
    """WebDataset: tar archives of `key.jpg`, `key.txt` (one caption per line), `key.json`, `key.mask.png` and so on."""
    for name, path in shards(source, ".tar"):
        try:
            with tarfile.open(path, "r:") as archive:
                key, sample = "", {}
                for info in archive:
                    if not info.isfile():
                        continue
                    folder, slash, base = info.name.rpartition("/")
                    stem, _, kind = base.partition(".")
                    if folder + slash + stem != key and sample:
                        yield sample_face(path, key, sample, split_of(name))
                        sample = {}
                    key = folder + slash + stem
                    sample[kind.lower()] = partial(read_part, path, info.name, info.offset_data, info.size)
                if sample:
                    yield sample_face(path, key, sample, split_of(name))
        except (tarfile.TarError, OSError, EOFError) as error:
            raise InputError(
                f"{path} is not a complete, uncompressed tar archive ({error}): download it again"
            ) from error


def read_part(path: Path, name: str, offset: int, size: int) -> bytes:
    """Read a file of a tar archive."""
    if size > MAX_BYTES:
        raise too_large(f"{name} in {path}")
    with path.open("rb") as archive:
        archive.seek(offset)
        content = archive.read(size)
    if len(content) < size:
        raise InputError(f"{name} in {path} is truncated: download the archive again")
    return content


def sample_face(path: Path, key: str, sample: dict[str, Callable[[], bytes]], split: str | None) -> Face | Skipped:
    """Return the face of one sample of a shard."""
    packed = {kind: Packed(f"{key}.{kind} in {path}", read) for kind, read in sample.items()}
    kind = next((kind for kind in packed if f".{kind.removeprefix('image.')}" in IMAGES), None)
    if kind is None:
        return Skipped(f"{key} in {path.name}", "the sample has no image")
    files: dict[str, Any] = {"image": packed[kind]}
    for condition in CONDITIONS:
        found = next((name for name in packed if name.split(".")[0] == condition and "." in name), None)
        if found:
            files[condition] = packed[found]
    try:
        row = parse_json(sample["json"](), f"{key}.json in {path}") if "json" in sample else {}
        lines = sample["txt"]().decode("utf-8-sig").splitlines() if "txt" in sample else []
    except (InputError, UnicodeDecodeError) as error:
        return Skipped(f"{key} in {path.name}", str(error))
    row = row if isinstance(row, dict) else {}
    if lines and not row.get("text"):
        row["text"] = [line.strip() for line in lines if line.strip()]
    return with_row(Face(name=key.replace("/", "_"), split=split, **files), row)
