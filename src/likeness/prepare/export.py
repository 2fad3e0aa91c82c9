"""Export a prepared folder to Hugging Face's imagefolder or Parquet, or to WebDataset shards.

Images, masks and sketches are copied byte by byte. Keypoints become values of their row, because these formats have no
files other than images. Existing shards are kept, so an interrupted export of unchanged files can be resumed.
"""

from __future__ import annotations

import hashlib
import io
import json
import tarfile
from collections import Counter, defaultdict, deque
from collections.abc import Callable, Iterator
from itertools import chain, groupby, islice
from pathlib import Path
from typing import Any

from likeness.conditions import CONDITIONS
from likeness.data.folder import (
    captions_of,
    changing,
    column_of,
    each_row,
    is_file_column,
    line_of,
    metadata_lines,
    open_record,
    read_record,
    splits_of,
    write_record,
)
from likeness.files import delete_partials, write_whole, writing_whole
from likeness.prepare.ingest.faces import SPLIT_ORDER, split_named, unique_name
from likeness.prepare.ingest.shards import import_parquet
from likeness.prepare.ingest.source import parse_json, read_file
from likeness.types import InputError, Progress

SHARD = 1000
"""Faces per shard."""

ROWS = 16
"""Rows of a Parquet file that are in memory at a time."""

IMAGES = ("mask", "sketch")
"""Conditions whose files are images."""

Face = tuple[str, str, dict[str, Path], dict[str, Any]]
"""Split, name, image files by condition ("image" is the image itself), and all other columns."""

Columns = dict[str, Any]
"""Column of Parquet -> its type, a key of `types` in `schema_of`, or the names of attributes."""


def export(
    folder: Path, out: Path, format: str, *, shard: int = SHARD, progress: Progress = lambda done, total: None
) -> dict[str, Any]:
    """Write a prepared folder in one of the formats `WRITERS`, `shard` faces per file. Run again to resume.

    Returns:
        Faces by split, and `skipped`: missing file -> reason.

    Raises:
        InputError: the metadata is missing, a row is broken, or `out` contains something else, an export of other files
            included, or cannot be written.
    """
    skipped: dict[str, str] = {}
    counts, metadata, files = Counter[str](), hashlib.sha256(), hashlib.sha256()
    for split, name, images, columns in faces_of(folder, format, skipped):
        counts[split] += 1
        states = [(key, path.stat().st_size, path.stat().st_mtime_ns) for key, path in images.items()]
        files.update(json.dumps([split, name, states, columns.get("keypoints")]).encode())
    for split in splits_of(folder):
        for _, line in metadata_lines(folder, split):
            metadata.update(line)
    arguments = {"kind": "likeness export", "format": format, "shard": shard, "metadata": metadata.hexdigest()}
    arguments["files"] = files.hexdigest()
    known = read_record(folder)
    columns = columns_of(faces_of(folder, format, {})) if format == "parquet" else {}
    template, write = WRITERS[format]
    done = 0

    def reported(faces: Iterator[Face]) -> Iterator[Face]:
        nonlocal done
        for face in faces:
            yield face
            done += 1
            progress(done, counts.total())

    with changing(out, ["."]):
        delete_partials(out, [*SPLIT_ORDER, "data"])
        open_record(out, arguments, "export")
        kept = {key: known[key] for key in ("license", "license_source", "split_is") if key in known}
        write_record(out, {**arguments, **kept, "faces": dict(counts)})
        for split, faces in groupby(faces_of(folder, format, {}), key=lambda face: face[0]):
            size = counts[split] if format == "imagefolder" else shard
            for number, group in enumerate(in_groups(reported(faces), size)):
                path = out / template.format(split=split, number=number, count=-(-counts[split] // size))
                if not path.is_file():
                    write(path, group, columns)
                deque(group, maxlen=0)  # consume the faces of an existing shard
    return {**counts, "skipped": skipped}


def faces_of(folder: Path, format: str, skipped: dict[str, str]) -> Iterator[Face]:
    """Yield the faces of a prepared folder with unique names, `train` first; add what is left out to `skipped`."""
    splits = splits_of(folder)
    if unknown := [split for split in splits if split != "." and not split_named(split)]:
        raise InputError(f"{folder / unknown[0]} is not named like a split: rename it to train, validation or test")
    names = {split: split_named(split) or "train" for split in splits}
    taken = defaultdict[str, dict[str, int]](dict)
    for split in sorted(names, key=lambda split: SPLIT_ORDER.index(names[split])):
        root = (folder / split).resolve()
        for row in each_row(root):
            files = {column: path for column, path in row.items() if is_file_column(column)}
            missing = {column: path for column, path in files.items() if not path.is_file()}
            skipped |= {str(path): f"{column} does not exist" for column, path in missing.items()}
            unknown = files.keys() - {"file_name", *map(column_of, CONDITIONS)}
            skipped |= {f"column {column}": "unknown condition" for column in sorted(unknown)}
            if "file_name" in missing:
                continue
            stem = row["file_name"].relative_to(root).with_suffix("").as_posix().removeprefix("images/")
            stem = stem.replace(".", "_") if format == "webdataset" else stem  # a key ends at the first point
            images = {"image": row["file_name"]}
            images |= {key: path for key in IMAGES if (path := files.get(column_of(key))) and path.is_file()}
            captions, points = list(captions_of(row)), files.get(column_of("keypoints"))
            columns: dict[str, Any] = {"text": captions} if captions else {}
            columns |= {key: value for key, value in row.items() if key not in files and key != "text"}
            if "identity" in columns:
                columns["identity"] = str(columns["identity"])
            if points is not None and points.is_file():
                columns["keypoints"] = points_of(points)
            yield names[split], unique_name(stem, taken[names[split]]), images, columns


def in_groups(faces: Iterator[Face], size: int) -> Iterator[Iterator[Face]]:
    """Yield groups of `size` faces; each must be consumed before the next."""
    for first in faces:
        yield chain([first], islice(faces, size - 1))


def points_of(file: Path) -> dict[str, Any]:
    """Return keypoints as {"points": ..., "size": ...}, unchanged if the file has that form."""
    document = parse_json(read_file(file), str(file)) if file.suffix == ".json" else None
    if isinstance(document, dict) and "points" in document:
        return {key: document[key] for key in ("points", "size") if document.get(key) is not None}
    return {"points": CONDITIONS["keypoints"].read(file).raw.round(6).tolist()}


def write_imagefolder(path: Path, faces: Iterator[Face], columns: Columns) -> None:
    """Write `<split>/metadata.jsonl` with `images/`, `masks/` and `sketches/`."""
    with writing_whole(path) as metadata:
        for _, name, images, row in faces:
            files = {}
            for key, source in images.items():
                place = "images" if key == "image" else CONDITIONS[key].folder
                file = f"{place}/{name}{source.suffix.lower()}"
                files["file_name" if key == "image" else column_of(key)] = file
                if not (path.parent / file).is_file():
                    write_whole(path.parent / file, read_file(source))
            metadata.write(line_of({**files, **row}))


def write_webdataset(path: Path, faces: Iterator[Face], columns: Columns) -> None:
    """Write a tar archive of `key.png`, `key.mask.png`, `key.sketch.png`, `key.json` and `key.txt`."""
    with writing_whole(path) as file, tarfile.open(fileobj=file, mode="w") as archive:
        for _, key, images, row in faces:
            kinds = {name: "" if name == "image" else f".{name}" for name in images}
            files = {f"{key}{kinds[name]}{image.suffix.lower()}": read_file(image) for name, image in images.items()}
            files[f"{key}.json"] = json.dumps(row).encode()
            if "text" in row:
                files[f"{key}.txt"] = "\n".join(row["text"]).encode(errors="replace")
            for name, content in files.items():
                info = tarfile.TarInfo(name)  # without date or owner, so that equal data lead to equal archives
                info.size = len(content)
                archive.addfile(info, io.BytesIO(content))


def write_parquet(path: Path, faces: Iterator[Face], columns: Columns) -> None:
    """Write a Parquet file with images as {bytes, path}, which `datasets` decodes."""
    import_parquet()
    import pyarrow as pa
    import pyarrow.parquet as pq

    schema = schema_of(pa, columns)
    with writing_whole(path) as file, pq.ParquetWriter(file, schema) as writer:
        for group in in_groups(faces, ROWS):
            rows = []
            for _, name, images, row in group:
                as_json = {key: json.dumps(row[key]) for key in row if columns[key] == "json"}
                cells = {
                    key: {"bytes": read_file(image), "path": f"{name}{image.suffix.lower()}"}
                    for key, image in images.items()
                }
                rows.append(row | as_json | cells)
            writer.write_table(pa.Table.from_arrays([array_of(pa, field, rows) for field in schema], schema=schema))


def array_of(pa: Any, field: Any, rows: list[dict[str, Any]]) -> Any:
    """Return a column of some rows. Raises `InputError` if its values do not have the type of the field."""
    try:
        return pa.array([row.get(field.name) for row in rows], field.type)
    except (TypeError, ValueError) as error:
        message = f"the column {field.name!r} cannot be written to Parquet ({error}): correct it in the metadata"
        raise InputError(message) from error


def columns_of(faces: Iterator[Face]) -> Columns:
    """Return the columns of a folder over all its rows."""
    columns: Columns = {"image": "image"}
    own = {"text": "captions", "keypoints": "points", "identity": "str"}
    for *_, images, row in faces:
        columns |= dict.fromkeys(images, "image")
        for key, value in row.items():
            if key in ("image", *IMAGES):
                raise InputError(f"the column {key!r} of the metadata has the name of an image in Parquet: rename it")
            simple = type(value) in (str, bool, float) or (type(value) is int and -(2**63) <= value < 2**63)
            kind = own.get(key) or (type(value).__name__ if simple else "json")
            flags = key == "attributes" and isinstance(value, dict) and all(type(v) is bool for v in value.values())
            if flags and isinstance(known := columns.get(key, {}), dict):
                kind = known | dict.fromkeys(value)
            elif columns.get(key, kind) != kind:
                kind = "json"
            columns[key] = kind
    return {key: kind or "json" for key, kind in columns.items()}  # Parquet has no struct without fields


def schema_of(pa: Any, columns: Columns) -> Any:
    """Return the schema of a Parquet file, with the metadata by which `datasets` recognizes images."""
    types = {
        "image": pa.struct([("bytes", pa.binary()), ("path", pa.string())]),
        "captions": pa.list_(pa.string()),
        "points": pa.struct([("points", pa.list_(pa.list_(pa.float64()))), ("size", pa.list_(pa.float64()))]),
        "json": pa.string(),
        "str": pa.string(),
        "bool": pa.bool_(),
        "int": pa.int64(),
        "float": pa.float64(),
    }
    fields = [
        (name, pa.struct([(key, pa.bool_()) for key in kind]) if isinstance(kind, dict) else types[kind])
        for name, kind in columns.items()
    ]
    features = {name: {"_type": "Image"} for name, kind in columns.items() if kind == "image"}
    return pa.schema(fields, metadata={"huggingface": json.dumps({"info": {"features": features}})})


WRITERS: dict[str, tuple[str, Callable[[Path, Iterator[Face], Columns], None]]] = {
    "imagefolder": ("{split}/metadata.jsonl", write_imagefolder),
    "webdataset": ("{split}-{number:06d}.tar", write_webdataset),
    "parquet": ("data/{split}-{number:05d}-of-{count:05d}.parquet", write_parquet),
}
"""Format -> name of a shard, and its writer: (path, faces, columns)."""
