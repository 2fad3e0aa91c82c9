"""Export a prepared folder to Hugging Face's imagefolder or Parquet, or to WebDataset shards.

Images, masks and sketches are copied byte by byte. Keypoints become values of their row, because these formats have no
files other than images. Existing shards are kept, so an interrupted export can be resumed.
"""

from __future__ import annotations

import hashlib
import io
import json
import tarfile
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import replace
from itertools import chain, groupby, islice
from pathlib import Path
from typing import Any

from likeness.conditions import CONDITIONS
from likeness.data.folder import (
    HOW_TO_PREPARE,
    METADATA,
    changing,
    column_of,
    line_of,
    open_record,
    read_record,
    write_record,
)
from likeness.files import write_whole, writing_whole
from likeness.prepare.ingest.faces import Skipped, SourceFace, with_names
from likeness.prepare.ingest.formats import imagefolder, metadata_folders, table_of
from likeness.prepare.ingest.shards import import_parquet
from likeness.prepare.ingest.source import Source, join, open_source
from likeness.types import InputError, Progress

SHARD = 1000
"""Faces per shard."""

ROWS = 16
"""Rows of a Parquet file that are in memory at a time."""

IMAGES = ("mask", "sketch")
"""Conditions whose files are images."""

Named = Iterator[tuple[SourceFace, str]]
"""Faces and their names, unique in a split."""


def export(
    folder: Path,
    out: Path,
    format: str,
    *,
    shard: int = SHARD,
    progress: Progress = lambda done, total: None,
) -> dict[str, Any]:
    """Write a prepared folder in one of the formats `WRITERS`, `shard` faces per file. Run again to resume.

    Returns:
        Faces by split, and `skipped`: missing file -> reason.

    Raises:
        InputError: the metadata is missing, a row is broken, or `out` contains something else or cannot be written.
    """
    source = open_source(folder)
    if not metadata_folders(source):
        raise InputError(f"{folder} has no {METADATA} and no splits: {HOW_TO_PREPARE}")
    skipped: dict[str, str] = {}
    counts: Counter[str] = Counter()
    for entry in imagefolder(source):
        if isinstance(entry, Skipped):
            skipped[entry.name] = entry.reason
        else:
            counts[entry.split or "train"] += 1
    known = read_record(folder)
    arguments = {"kind": "likeness export", "format": format, "shard": shard, "metadata": metadata_hash(source)}
    columns = columns_of(imagefolder(source)) if format == "parquet" else {}
    template, write = WRITERS[format]
    done = 0

    def reported(faces: Named) -> Named:
        nonlocal done
        for face in faces:
            yield face
            done += 1
            progress(done, sum(counts.values()))

    with changing(out, ["."]):
        open_record(out, arguments, "export")
        kept = {key: known[key] for key in ("licence", "licence_source", "split_is") if key in known}
        write_record(out, {**arguments, **kept, "faces": dict(counts)})
        for split, faces in faces_by_split(source, format):
            size = counts[split] if format == "imagefolder" else shard
            for number, group in enumerate(in_groups(reported(faces), size)):
                path = out / template.format(split=split, number=number, count=-(-counts[split] // size))
                if not path.is_file():
                    write(path, group, columns)
                deque(group, maxlen=0)  # consume the faces of an existing shard
    return {**counts, "skipped": skipped}


def faces_by_split(source: Source, format: str) -> Iterator[tuple[str, Named]]:
    """Yield each split with its faces and their names."""
    faces = (entry for entry in imagefolder(source) if isinstance(entry, SourceFace))
    faces = (replace(face, split=face.split or "train") for face in faces)
    if format == "webdataset":  # a key ends at the first point
        faces = (replace(face, name=face.name.replace(".", "_")) for face in faces)
    named = ((face, name) for face, name in with_names(faces) if isinstance(face, SourceFace))
    return groupby(named, key=lambda pair: pair[0].split or "train")


def in_groups(faces: Named, size: int) -> Iterator[Named]:
    """Yield groups of `size` faces; each must be consumed before the next."""
    for first in faces:
        yield chain([first], islice(faces, size - 1))


def metadata_hash(source: Source) -> str:
    """Hash all lines of all metadata."""
    digest = hashlib.sha256()
    for place in metadata_folders(source):
        for line in source.lines(join(place, table_of(source, place))):
            digest.update(line)
    return digest.hexdigest()


def row_of(face: SourceFace) -> dict[str, Any]:
    """Return the columns of a face that are not images."""
    own = {"text": list(face.captions()) or None, "attributes": face.attributes, "identity": face.identity}
    own["keypoints"] = points_of(face.conditions["keypoints"]) if "keypoints" in face.conditions else None
    return {**{key: value for key, value in own.items() if value is not None}, **face.more}


def points_of(source: Any) -> Mapping[str, Any]:
    """Return keypoints as {"points": ..., "size": ...}, unchanged if the file has that form."""
    if isinstance(source, Mapping):
        return source
    document = source.json() if source.suffix == ".json" else None
    if isinstance(document, dict) and "points" in document:
        return {key: document[key] for key in ("points", "size") if document.get(key) is not None}
    return {"points": CONDITIONS["keypoints"].read(source.path).raw.round(6).tolist()}


def images_of(face: SourceFace) -> dict[str, tuple[str, bytes]]:
    """Return condition ("" for the image itself) -> (suffix, content)."""
    files = {"": face.image, **{key: face.conditions[key] for key in IMAGES if key in face.conditions}}
    return {key: (file.suffix, file.content()) for key, file in files.items()}


Columns = dict[str, Any]
"""Column of Parquet -> its type, a key of `types` in `schema_of`, or the names of attributes."""


def write_imagefolder(path: Path, faces: Named, columns: Columns) -> None:
    """Write `<split>/metadata.jsonl` with `images/`, `masks/` and `sketches/`."""
    with writing_whole(path) as metadata:
        for face, name in faces:
            row = {}
            for key, (suffix, content) in images_of(face).items():
                file = CONDITIONS[key].file(name) if key else f"images/{name}{suffix}"
                row[column_of(key) if key else "file_name"] = file
                if not (path.parent / file).is_file():
                    write_whole(path.parent / file, content)
            metadata.write(line_of({**row, **row_of(face)}))


def write_webdataset(path: Path, faces: Named, columns: Columns) -> None:
    """Write a tar archive of `key.png`, `key.mask.png`, `key.sketch.png`, `key.json` and `key.txt`."""
    with writing_whole(path) as file, tarfile.open(fileobj=file, mode="w") as archive:
        for face, key in faces:
            row = row_of(face)
            images = images_of(face).items()
            files = {f"{key}.{kind}".rstrip(".") + suffix: content for kind, (suffix, content) in images}
            files[f"{key}.json"] = json.dumps(row, ensure_ascii=False).encode()
            if "text" in row:
                files[f"{key}.txt"] = "\n".join(row["text"]).encode()
            for name, content in files.items():
                info = tarfile.TarInfo(name)  # without date or owner, so that equal data lead to equal archives
                info.size = len(content)
                archive.addfile(info, io.BytesIO(content))


def write_parquet(path: Path, faces: Named, columns: Columns) -> None:
    """Write a Parquet file with images as {bytes, path}, which `datasets` decodes."""
    import_parquet()
    import pyarrow as pa
    import pyarrow.parquet as pq

    schema = schema_of(pa, columns)
    with writing_whole(path) as file, pq.ParquetWriter(file, schema) as writer:
        for group in in_groups(faces, ROWS):
            rows = [parquet_row(face, name, columns) for face, name in group]
            writer.write_table(pa.Table.from_pylist(rows, schema))


def parquet_row(face: SourceFace, name: str, columns: Columns) -> dict[str, Any]:
    """Return a row whose values have the types of the schema."""
    row = {
        key: json.dumps(value, ensure_ascii=False) if columns[key] == "json" else value
        for key, value in row_of(face).items()
    }
    images = images_of(face).items()
    return row | {key or "image": {"bytes": content, "path": f"{name}{suffix}"} for key, (suffix, content) in images}


def columns_of(entries: Iterable[SourceFace | Skipped]) -> Columns:
    """Return the columns of a folder over all its rows."""
    columns: Columns = {"image": "image"}
    own = {"text": "captions", "keypoints": "points", "identity": "str"}
    for face in entries:
        if isinstance(face, Skipped):
            continue
        columns |= {key: "image" for key in IMAGES if key in face.conditions}
        for key, value in row_of(face).items():
            kind = own.get(key) or (type(value).__name__ if type(value) in (str, bool, int, float) else "json")
            flags = key == "attributes" and all(type(flag) is bool for flag in value.values())
            if flags and columns.get(key) != "json":
                kind = columns.get(key, {}) | dict.fromkeys(value)
            elif columns.get(key, kind) != kind:
                kind = "json"
            columns[key] = kind
    return columns


def schema_of(pa: Any, columns: Columns) -> Any:
    """Return the schema of a Parquet file, with the metadata by which `datasets` recognises images."""
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


WRITERS: dict[str, tuple[str, Callable[[Path, Named, Columns], None]]] = {
    "imagefolder": ("{split}/metadata.jsonl", write_imagefolder),
    "webdataset": ("{split}-{number:06d}.tar", write_webdataset),
    "parquet": ("data/{split}-{number:05d}-of-{count:05d}.parquet", write_parquet),
}
"""Format -> name of a shard, and its writer: (path, faces, columns)."""
