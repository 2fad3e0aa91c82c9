"""Export a prepared folder to Hugging Face's imagefolder or Parquet, or to WebDataset shards.

Images, masks and sketches are copied byte by byte. Keypoints become values of their row, because these formats have no
files other than images. Existing files are kept, so an interrupted export can be resumed.
"""

from __future__ import annotations

import hashlib
import io
import json
import tarfile
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import replace
from itertools import chain, groupby, islice, repeat
from pathlib import Path
from typing import Any, NamedTuple

from likeness.conditions import CONDITIONS
from likeness.data.folder import METADATA, RECORD, column_of, condition_file, line_of
from likeness.files import write_whole, writing_whole
from likeness.prepare.ingest.face import Face, Skipped, content_of, json_of
from likeness.prepare.ingest.formats import imagefolder, metadata_folders
from likeness.prepare.ingest.shards import import_parquet
from likeness.prepare.ingest.source import Source, join, open_source
from likeness.prepare.ingest.write import with_names
from likeness.types import InputError

KIND = "likeness export"

SHARD = 1000
"""Faces per shard."""

GROUP = 16
"""Rows of a Parquet file that are in memory at a time."""

IMAGES = ("mask", "sketch")
"""Conditions whose files are images."""

Named = tuple[Face, str]


class Shards(NamedTuple):
    """Sizes of one split."""

    faces: int
    size: int
    """Faces per shard."""


Progress = Callable[[int, int], None]


def export(
    folder: Path, out: Path, format: str, *, shard: int = SHARD, progress: Progress | None = None
) -> dict[str, Any]:
    """Write a prepared folder as `imagefolder`, `webdataset` or `parquet`.

    Args:
        folder: a directory with `metadata.jsonl`, or the parent of splits.
        out: folder to write. Run again to resume.
        format: one of `WRITERS`.
        shard: faces per shard.
        progress: called as (faces done, total).

    Returns:
        Faces by split, and `skipped`: missing file -> reason.

    Raises:
        InputError: there is no metadata, a row is broken, or `out` contains something else or cannot be written.
    """
    source = open_source(folder)
    if not metadata_folders(source):
        raise InputError(
            f"{folder} has no {METADATA} and no splits: `likeness prepare ingest IMAGES OUT` writes a prepared folder"
        )
    skipped: dict[str, str] = {}
    counts: Counter[str] = Counter()
    for face in imagefolder(source):
        if isinstance(face, Skipped):
            skipped[face.name] = face.reason
        else:
            counts[face.split or "train"] += 1
    found = source.find(RECORD)
    known = json_of(found) if found else {}
    known = known if isinstance(known, dict) else {}
    record = {
        "kind": KIND,
        "format": format,
        "shard": shard,
        "metadata": metadata_hash(source),
        **{key: value for key, value in known.items() if key in ("licence", "licence_source", "split_is")},
        "faces": dict(counts),
    }
    if (out / RECORD).is_file():
        if json_of(out / RECORD) != record:
            raise InputError(f"{out} contains another export: choose another folder or remove it")
    elif out.exists() and any(out.iterdir()):
        raise InputError(f"{out} is not empty and was not written by `likeness prepare export`: choose another folder")
    write_whole(out / RECORD, json.dumps(record, indent=2, ensure_ascii=False) + "\n")
    columns = columns_of(imagefolder(source)) if format == "parquet" else {}
    done = 0
    for split, faces in faces_by_split(source, format):
        for _ in WRITERS[format](out, split, faces, Shards(counts[split], shard), columns):
            done += 1
            if progress is not None:
                progress(done, sum(counts.values()))
    return {**counts, "skipped": skipped}


def faces_by_split(source: Source, format: str) -> Iterator[tuple[str, Iterator[Named]]]:
    """Yield each split with its faces and their names."""
    faces = (face for face in imagefolder(source) if isinstance(face, Face))
    if format == "webdataset":  # a key ends at the first point
        faces = (replace(face, name=face.name.replace(".", "_")) for face in faces)
    for split, group in groupby(faces, key=lambda face: face.split or "train"):
        yield split, ((face, name) for face, _, name in with_names(group, repeat(split)) if isinstance(face, Face))


def metadata_hash(source: Source) -> str:
    """Hash all lines of all metadata."""
    digest = hashlib.sha256()
    for place in metadata_folders(source):
        for line in source.lines(join(place, METADATA)):
            digest.update(line)
    return digest.hexdigest()


def row_of(face: Face) -> dict[str, Any]:
    """Return the columns of a face that are not images."""
    own = {"text": list(face.captions()) or None, "attributes": face.attributes, "identity": face.identity}
    own["keypoints"] = None if face.keypoints is None else points_of(face.keypoints)
    return {**{key: value for key, value in own.items() if value is not None}, **face.more}


def points_of(source: Any) -> Mapping[str, Any]:
    """Return keypoints as {"points": ..., "size": ...}, unchanged if the file has that form."""
    if isinstance(source, Mapping):
        return source
    document = json_of(source) if source.suffix.lower() == ".json" else None
    if isinstance(document, dict) and "points" in document:
        return {key: document[key] for key in ("points", "size") if document.get(key) is not None}
    return {"points": CONDITIONS["keypoints"].read(source).raw.round(6).tolist()}


def images_of(face: Face) -> dict[str, tuple[str, bytes]]:
    """Return condition ("" for the image itself) -> (suffix, content)."""
    files = {"": face.image, **{key: getattr(face, key) for key in IMAGES if getattr(face, key) is not None}}
    return {key: (file.name.rpartition(".")[2].lower(), content_of(file)) for key, file in files.items()}


def write_imagefolder(
    out: Path, split: str, faces: Iterator[Named], shards: Shards, columns: Columns
) -> Iterator[None]:
    """Write `<split>/metadata.jsonl` with `images/`, `masks/` and `sketches/`."""
    with writing_whole(out / split / METADATA) as metadata:
        for face, name in faces:
            row = {}
            for key, (suffix, content) in images_of(face).items():
                file = condition_file(key, name) if key else f"images/{name}.{suffix}"
                row[column_of(key) if key else "file_name"] = file
                if not (out / split / file).is_file():
                    write_whole(out / split / file, content)
            metadata.write(line_of({**row, **row_of(face)}))
            yield


def write_webdataset(out: Path, split: str, faces: Iterator[Named], shards: Shards, columns: Columns) -> Iterator[None]:
    """Write `<split>-000000.tar`, each with `key.png`, `key.mask.png`, `key.sketch.png`, `key.json` and `key.txt`."""
    for path, shard in missing_shards(faces, shards, lambda number: out / f"{split}-{number:06d}.tar"):
        if path is None:
            yield from (None for _ in shard)
            continue
        with writing_whole(path) as file, tarfile.open(fileobj=file, mode="w") as archive:
            for face, key in shard:
                row = row_of(face)
                for kind, (suffix, content) in images_of(face).items():
                    add_file(archive, f"{key}.{kind}.{suffix}" if kind else f"{key}.{suffix}", content)
                add_file(archive, f"{key}.json", json.dumps(row, ensure_ascii=False).encode())
                if "text" in row:
                    add_file(archive, f"{key}.txt", "\n".join(row["text"]).encode())
                yield


def add_file(archive: tarfile.TarFile, name: str, content: bytes) -> None:
    """Add a file without date or owner, so that equal data lead to equal archives."""
    info = tarfile.TarInfo(name)
    info.size = len(content)
    archive.addfile(info, io.BytesIO(content))


def write_parquet(out: Path, split: str, faces: Iterator[Named], shards: Shards, columns: Columns) -> Iterator[None]:
    """Write `data/<split>-00000-of-00001.parquet`, with images as {bytes, path}, which `datasets` decodes."""
    import_parquet()
    import pyarrow as pa
    import pyarrow.parquet as pq

    schema = schema_of(pa, columns)
    count = -(-shards.faces // shards.size)
    path_of = lambda number: out / "data" / f"{split}-{number:05d}-of-{count:05d}.parquet"  # noqa: E731
    for path, shard in missing_shards(faces, shards, path_of):
        if path is None:
            yield from (None for _ in shard)
            continue
        with writing_whole(path) as file, pq.ParquetWriter(file, schema) as writer:
            for group in in_groups(shard, GROUP):
                rows = [parquet_row(face, name, columns) for face, name in group]
                writer.write_table(pa.Table.from_pylist(rows, schema))
                yield from (None for _ in rows)


def parquet_row(face: Face, name: str, columns: Columns) -> dict[str, Any]:
    """Return a row whose values have the types of the schema."""
    row = {
        key: json.dumps(value, ensure_ascii=False) if columns.get(key) == "json" and value is not None else value
        for key, value in row_of(face).items()
    }
    for key, (suffix, content) in images_of(face).items():
        row[key or "image"] = {"bytes": content, "path": f"{name}.{suffix}"}
    return row


Columns = dict[str, Any]
"""Column -> its type, a key of `types` in `schema_of`, or the names of attributes."""


def columns_of(faces: Iterable[Face | Skipped]) -> Columns:
    """Return the columns of a folder over all its rows."""
    columns: Columns = {"image": "image"}
    for face in faces:
        if isinstance(face, Skipped):
            continue
        columns |= {key: "image" for key in IMAGES if getattr(face, key) is not None}
        if face.captions():
            columns["text"] = "captions"
        if face.keypoints is not None:
            columns["keypoints"] = "points"
        if face.identity is not None:
            columns["identity"] = "str"
        if face.attributes:
            known, values = columns.get("attributes", {}), face.attributes.values()
            boolean = known != "json" and all(isinstance(value, bool) for value in values)
            columns["attributes"] = known | dict.fromkeys(face.attributes) if boolean else "json"
        for key, value in face.more.items():
            kind = type(value).__name__ if type(value) in (str, bool, int, float) else "json"
            columns[key] = kind if columns.get(key, kind) == kind else "json"
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


def missing_shards(
    faces: Iterator[Named], shards: Shards, path_of: Callable[[int], Path]
) -> Iterator[tuple[Path | None, Iterator[Named]]]:
    """Yield the faces of each shard with its path, or None if the shard exists."""
    for number, shard in enumerate(in_groups(faces, shards.size)):
        path = path_of(number)
        yield None if path.is_file() else path, shard


def in_groups(faces: Iterator[Named], size: int) -> Iterator[Iterator[Named]]:
    """Yield groups of `size` faces; each must be consumed before the next."""
    for first in faces:
        yield chain([first], islice(faces, size - 1))


WRITERS: dict[str, Callable[[Path, str, Iterator[Named], Shards, Columns], Iterator[None]]] = {
    "imagefolder": write_imagefolder,
    "webdataset": write_webdataset,
    "parquet": write_parquet,
}
"""Name -> (folder, split, its faces, their shards, columns) -> one step per face."""
