"""Read Parquet files as Hugging Face writes them, and WebDataset shards, in place and in order.

Only Parquet needs pyarrow. A shard is a plain tar archive.
"""

from __future__ import annotations

import re
import tarfile
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

from likeness.conditions import CONDITIONS
from likeness.conditions.base import IMAGE_SUFFIXES
from likeness.prepare.ingest.faces import AHEAD, Entries, Skipped, SourceFace, split_named, with_row
from likeness.prepare.ingest.source import (
    HIDDEN,
    MAX_BYTES,
    SPECIAL,
    Source,
    SourceFile,
    check_bytes,
    check_inside,
    read_file,
)
from likeness.types import InputError

IMAGE_COLUMNS = ("image", "img", "picture", "jpg", "png")
"""Columns with the image itself; the first that exists is used."""

KEYS = "in WebDataset, the key of a sample ends at the first dot of a name, and its kind begins there"

GROUP_BYTES = 2**32
"""Most bytes of a column of a row group of a Parquet file, which is read in parts."""

ROWS = 16
"""Rows of a Parquet file per read."""

KEPT = AHEAD + ROWS
"""Last rows that may still be asked for."""


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
    parts = [name.split("-")[0].split("_")[0].split(".")[0], *reversed(folders)]
    return next(filter(None, map(split_named, parts)), None)


def shards(source: Source, suffix: str) -> Iterator[tuple[str | None, Path]]:
    """Yield (split, path) of the files with a suffix, sorted."""
    for folder in sorted(source.folders):
        for name in source.images(folder, (suffix,)).values():
            path = source.existing_file(name).path
            if path is None:
                raise InputError(f"{name} is in an archive: unpack it first")
            yield split_of(name), path


def parquet(source: Source) -> Entries:
    """Parquet: `image` {bytes, path}, likewise `mask` and `sketch`, and the columns of `metadata.jsonl`."""
    reader = import_parquet()
    for split, path in shards(source, ".parquet"):
        try:
            yield from parquet_rows(reader, path, split)
        except InputError:
            raise
        except (OSError, ValueError) as error:  # the base classes of pyarrow's errors
            raise InputError(f"{path} is not a readable Parquet file ({str(error)[:80]})") from error


def parquet_rows(reader: Any, path: Path, split: str | None) -> Entries:
    """Yield the rows of one file. Images are read when they are needed, a few rows at a time."""
    from pyarrow import types

    file, images = reader.ParquetFile(path), reader.ParquetFile(path)  # threads read from the second
    for group in map(file.metadata.row_group, range(file.metadata.num_row_groups)):
        for column in map(group.column, range(group.num_columns)):
            if column.total_uncompressed_size > min(GROUP_BYTES, MAX_BYTES * group.num_rows):
                size = f"{column.total_uncompressed_size >> 20} MiB in {group.num_rows} rows"
                where = f"the column {column.path_in_schema} of {path}"
                raise InputError(f"{where} has {size}, too much for images of faces")
    bytes_in = re.compile(r"binary(?!\w*:)")  # a type, not the name of a field
    with_bytes = {field.name: field.type for field in file.schema_arrow if bytes_in.search(str(field.type))}
    is_struct = {  # image columns: {bytes, path}, or bytes
        name: types.is_struct(kind)
        for name, kind in with_bytes.items()
        if types.is_binary(kind)
        or types.is_large_binary(kind)
        or (types.is_struct(kind) and {"bytes", "path"} <= {inner.name for inner in kind})
    }
    image = next((name for name in (*IMAGE_COLUMNS, *is_struct) if name in is_struct and name not in CONDITIONS), None)
    if image is None:
        raise InputError(f"{path} has no image column: `image` should have bytes and path")
    columns = [image, *(name for name in CONDITIONS if name in is_struct)]
    if unknown := sorted(with_bytes.keys() - set(columns)):
        yield Skipped(f"columns {', '.join(unknown)} of {path.name}", "unknown condition")
    cell = cell_reader(images.iter_batches(ROWS, columns=columns))
    values = [name for name in file.schema_arrow.names if name not in with_bytes]
    paths = [f"{name}.path" for name in columns if is_struct[name]]  # present images, without reading them
    batches = file.iter_batches(ROWS, columns=values + paths or [image])
    for number, row in enumerate(row for batch in batches for row in batch.to_pylist()):
        present = {name: row.pop(name, None) if is_struct[name] else {} for name in columns}
        known = (present[image] or {}).get("path") or ""
        stem = known.replace("\\", "/").rpartition("/")[2].rpartition(".")[0]
        files = {
            name: SourceFile(f"{name} of row {number} in {path}", partial(cell_content, cell, number, name, path))
            for name in columns
            if name == image or present[name] is not None
        }
        name = stem or f"{path.stem}_{number:06d}"
        yield with_row(SourceFace(name=name, split=split, image=files.pop(image), conditions=files), row)


def cell_reader(batches: Iterator[Any]) -> Callable[[int, str], Any]:
    """Return a function (row, column) -> value for rows that are read nearly in order: the last `KEPT` are cached."""
    lock, cache, start = threading.Lock(), [], 0  # cache: (first row, batch)

    def cell(row: int, column: str) -> Any:
        nonlocal start
        with lock:
            while not cache or row >= cache[-1][0] + len(cache[-1][1]):
                batch = next(batches)
                cache.append((start, batch))
                start += len(batch)
                while start - (cache[0][0] + len(cache[0][1])) >= KEPT:
                    del cache[0]
            first, batch = next((first, batch) for first, batch in reversed(cache) if first <= row)
        return batch.column(column)[row - first].as_py()

    return cell


def cell_content(cell: Callable[[int, str], Any], row: int, column: str, path: Path) -> bytes:
    """Return the content of the image in a cell."""
    value = cell(row, column)
    content = value["bytes"] if isinstance(value, dict) else value
    if content is None:
        raise InputError(f"row {row} of {path} has no {column}: it contains only its path")
    check_bytes(len(content), f"{column} of row {row} of {path}")
    return content


def webdataset(source: Source) -> Entries:
    """WebDataset: tar archives of `key.jpg`, `key.txt` (one caption per line), `key.json`, `key.mask.png` and so on."""
    source.unread.clear()
    for split, path in shards(source, ".tar"):
        try:
            with tarfile.open(path, "r:") as archive:
                last, sample = "", {}
                for info in archive:
                    if info.size < 0:  # the next member would be this one again
                        raise InputError(f"{info.name} in {path} has a negative size: download the archive again")
                    if info.isdir():
                        continue
                    folder, slash, base = check_inside(info.name, str(path)).rpartition("/")
                    stem, _, kind = base.partition(".")
                    if not stem or not info.isreg() or info.issparse():
                        source.unread[SPECIAL if stem else HIDDEN] += 1
                        continue
                    key, kind = folder + slash + stem, kind.lower()
                    if key != last and sample:
                        yield sample_face(path, last, sample, split, source.unread)
                        sample = {}
                    last = key
                    if kind in sample:
                        yield Skipped(f"{key}.{kind} in {path.name}", f"the sample has two files of this kind: {KEYS}")
                        continue
                    name = f"{key}.{kind} in {path}"
                    sample[kind] = SourceFile(name, partial(read_file, path, info.offset_data, info.size, name))
                if sample:
                    yield sample_face(path, last, sample, split, source.unread)
        except (tarfile.TarError, OSError, EOFError) as error:
            message = f"{path} is not a complete, uncompressed tar archive ({error}): download it again"
            raise InputError(message) from error


def sample_face(
    path: Path, key: str, sample: dict[str, SourceFile], split: str | None, unread: Counter[str]
) -> SourceFace | Skipped:
    """Return the face of one sample of a shard: kind ("jpg", "mask.png") -> file. Other files are counted as unread."""
    name = f"{key} in {path.name}"
    shown = next((kind for kind in sample if f".{kind.removeprefix('image.')}" in IMAGE_SUFFIXES), None)
    if shown is None:
        return Skipped(name, f"the sample has no image among its files .{', .'.join(sample)}: {KEYS}")
    image = sample[shown]
    conditions = {kind.split(".")[0]: file for kind, file in sample.items() if "." in kind}
    text = next((kind for kind in ("txt", "caption") if kind in sample), None)
    known = {shown, text, "json", *(kind for kind in sample if "." in kind and kind.split(".")[0] in CONDITIONS)}
    unread.update(f".{kind}" for kind in sample if kind not in known)
    try:
        row = sample["json"].json() if "json" in sample else {}
        lines = sample[text].lines() if text else []
    except InputError as error:
        return Skipped(name, str(error))
    row = row if isinstance(row, dict) else {}
    if lines and not row.get("text"):
        row["text"] = lines
    conditions = {name: file for name, file in conditions.items() if name in CONDITIONS}
    return with_row(SourceFace(name=key, split=split, image=image, conditions=conditions), row)
