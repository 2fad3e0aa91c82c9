"""A prepared folder as other tools take it: Hugging Face's imagefolder or Parquet, or WebDataset shards.

Pictures, masks and sketches are copied bit for bit; keypoints become values of their row, since none of the three has
files that are no pictures. Files are written whole and existing ones are left: a run goes on where it stopped.
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
from likeness.prepare.ingest.layouts import imagefolder, metadata_folders
from likeness.prepare.ingest.tables import import_parquet
from likeness.prepare.ingest.tree import Tree, join, open_tree
from likeness.prepare.ingest.write import with_names
from likeness.types import InputError

KIND = "likeness export"

SHARD = 1000
"""Faces a shard."""

GROUP = 16
"""Rows that are held and read together in a Parquet file."""

PICTURES = ("mask", "sketch")
"""Conditions whose files are pictures."""

Named = tuple[Face, str]


class Shards(NamedTuple):
    """How many faces a split has, and how many go into one shard."""

    faces: int
    size: int


Progress = Callable[[int, int], None]


def export(
    folder: Path, out: Path, form: str, *, shard: int = SHARD, progress: Progress | None = None
) -> dict[str, Any]:
    """Write a prepared folder as `imagefolder`, `webdataset` or `parquet`.

    Args:
        folder: a directory with `metadata.jsonl`, or the parent of such splits.
        out: folder to write; run again to go on after an interruption.
        form: one of `FORMS`.
        shard: faces a shard.
        progress: called as (faces done, faces in all).

    Returns:
        Faces by split, and `skipped`: what the metadata names but is not there -> reason.

    Raises:
        InputError: there is no metadata, a row is broken, or `out` holds something else or cannot be written.
    """
    tree = open_tree(folder)
    if not metadata_folders(tree):
        raise InputError(
            f"{folder} has no {METADATA}, nor has a folder in it: `likeness prepare ingest PICTURES OUT` writes one"
        )
    skipped: dict[str, str] = {}
    counts: Counter[str] = Counter()
    for face in imagefolder(tree):
        if isinstance(face, Skipped):
            skipped[face.name] = face.reason
        else:
            counts[face.split or "train"] += 1
    found = tree.find(RECORD)
    known = json_of(found) if found else {}
    known = known if isinstance(known, dict) else {}
    inherited = {key: value for key, value in known.items() if key in ("licence", "licence_source", "split_is")}
    record = {
        "kind": KIND,
        "format": form,
        "shard": shard,
        "metadata": metadata_hash(tree),
        **inherited,
        "faces": dict(counts),
    }
    if (out / RECORD).is_file():
        if json_of(out / RECORD) != record:
            raise InputError(f"{out} holds another export: choose another folder, or remove it")
    elif out.exists() and any(out.iterdir()):
        raise InputError(f"{out} is not empty and was not begun by `likeness prepare export`: choose another folder")
    write_whole(out / RECORD, json.dumps(record, indent=2, ensure_ascii=False) + "\n")
    columns = columns_of(imagefolder(tree)) if form == "parquet" else {}
    done = 0
    for split, faces in splits_of(tree, form):
        for _ in FORMS[form](out, split, faces, Shards(counts[split], shard), columns):
            done += 1
            if progress is not None:
                progress(done, sum(counts.values()))
    return {**counts, "skipped": skipped}


def splits_of(tree: Tree, form: str) -> Iterator[tuple[str, Iterator[Named]]]:
    """Each split with its faces and their names."""
    faces = (face for face in imagefolder(tree) if isinstance(face, Face))
    if form == "webdataset":  # a key ends at the first point
        faces = (replace(face, name=face.name.replace(".", "_")) for face in faces)
    for split, group in groupby(faces, key=lambda face: face.split or "train"):
        yield split, ((face, name) for face, _, name in with_names(group, repeat(split)) if isinstance(face, Face))


def metadata_hash(tree: Tree) -> str:
    """Of all lines of all metadata."""
    digest = hashlib.sha256()
    for place in metadata_folders(tree):
        for line in tree.lines(join(place, METADATA)):
            digest.update(line)
    return digest.hexdigest()


def row_of(face: Face) -> dict[str, Any]:
    """The columns of a face that are no pictures."""
    captions = list(face.captions())
    own = {"text": captions or None, "attributes": face.attributes, "identity": face.identity}
    own["keypoints"] = None if face.keypoints is None else points_of(face.keypoints)
    return {**{key: value for key, value in own.items() if value is not None}, **face.more}


def points_of(source: Any) -> Mapping[str, Any]:
    """Keypoints as {"points": ..., "size": ...}; the file as it is, where it has that form."""
    if isinstance(source, Mapping):
        return source
    document = json_of(source) if source.suffix.lower() == ".json" else None
    if isinstance(document, dict) and "points" in document:
        return {key: document[key] for key in ("points", "size") if document.get(key) is not None}
    return {"points": CONDITIONS["keypoints"].read(source).raw.round(6).tolist()}


def pictures_of(face: Face) -> dict[str, tuple[str, bytes]]:
    """Column without `file_name` ("" is the picture itself) -> (suffix, content)."""
    files = {"": face.picture, **{key: getattr(face, key) for key in PICTURES if getattr(face, key) is not None}}
    return {key: (file.name.rpartition(".")[2].lower(), content_of(file)) for key, file in files.items()}


def to_imagefolder(out: Path, split: str, faces: Iterator[Named], shards: Shards, columns: Columns) -> Iterator[None]:
    """`<split>/metadata.jsonl` with `images/`, `masks/` and `sketches/` beside it."""
    with writing_whole(out / split / METADATA) as metadata:
        for face, name in faces:
            row = {}
            for key, (suffix, content) in pictures_of(face).items():
                file = condition_file(key, name) if key else f"images/{name}.{suffix}"
                row[column_of(key) if key else "file_name"] = file
                if not (out / split / file).is_file():
                    write_whole(out / split / file, content)
            metadata.write(line_of({**row, **row_of(face)}))
            yield


def to_webdataset(out: Path, split: str, faces: Iterator[Named], shards: Shards, columns: Columns) -> Iterator[None]:
    """`<split>-000000.tar`, each with `key.png`, `key.mask.png`, `key.sketch.png`, `key.json` and `key.txt`."""
    for number, shard in enumerate(in_groups(faces, shards.size)):
        path = out / f"{split}-{number:06d}.tar"
        if path.is_file():
            yield from (None for _ in shard)
            continue
        with writing_whole(path) as file, tarfile.open(fileobj=file, mode="w") as archive:
            for face, key in shard:
                row = row_of(face)
                for kind, (suffix, content) in pictures_of(face).items():
                    add_file(archive, f"{key}.{kind}.{suffix}" if kind else f"{key}.{suffix}", content)
                add_file(archive, f"{key}.json", json.dumps(row, ensure_ascii=False).encode())
                if "text" in row:
                    add_file(archive, f"{key}.txt", "\n".join(row["text"]).encode())
                yield


def add_file(archive: tarfile.TarFile, name: str, content: bytes) -> None:
    """Add a file without date or owner: the same data make the same archive."""
    info = tarfile.TarInfo(name)
    info.size = len(content)
    archive.addfile(info, io.BytesIO(content))


def to_parquet(out: Path, split: str, faces: Iterator[Named], shards: Shards, columns: Columns) -> Iterator[None]:
    """`data/<split>-00000-of-00001.parquet`: pictures as {bytes, path}, which `datasets` decodes."""
    import_parquet()
    import pyarrow as pa
    import pyarrow.parquet as pq

    schema = schema_of(pa, columns)
    of = -(-shards.faces // shards.size)
    for number, shard in enumerate(in_groups(faces, shards.size)):
        path = out / "data" / f"{split}-{number:05d}-of-{of:05d}.parquet"
        if path.is_file():
            yield from (None for _ in shard)
            continue
        with writing_whole(path) as file, pq.ParquetWriter(file, schema) as writer:
            for group in in_groups(shard, GROUP):
                rows = [parquet_row(face, name, columns) for face, name in group]
                writer.write_table(pa.Table.from_pylist(rows, schema))
                yield from (None for _ in rows)


def parquet_row(face: Face, name: str, columns: Columns) -> dict[str, Any]:
    """A row whose values are of the types of the schema."""
    row = row_of(face)
    texts = {key for key in columns if columns[key] == "json"}
    row = {
        key: json.dumps(value, ensure_ascii=False) if key in texts and value is not None else value
        for key, value in row.items()
    }
    for key, (suffix, content) in pictures_of(face).items():
        row[key or "image"] = {"bytes": content, "path": f"{name}.{suffix}"}
    return row


Columns = dict[str, Any]
"""Column -> its type, a key of the `types` in `schema_of`, or the names of attributes."""


def columns_of(faces: Iterable[Face | Skipped]) -> Columns:
    """The columns that a folder has, over all its rows."""
    columns: Columns = {"image": "picture"}
    for face in faces:
        if isinstance(face, Skipped):
            continue
        columns |= {key: "picture" for key in PICTURES if getattr(face, key) is not None}
        if face.captions():
            columns["text"] = "captions"
        if face.keypoints is not None:
            columns["keypoints"] = "points"
        if face.identity is not None:
            columns["identity"] = "text"
        if face.attributes:
            known, values = columns.get("attributes", {}), face.attributes.values()
            plain = known != "json" and all(isinstance(value, bool) for value in values)
            columns["attributes"] = known | dict.fromkeys(face.attributes) if plain else "json"
        for key, value in face.more.items():
            kind = KINDS.get(type(value), "json")
            columns[key] = kind if columns.get(key, kind) == kind else "json"
    return columns


KINDS = {str: "text", bool: "truth", int: "whole", float: "number"}


def schema_of(pa: Any, columns: Columns) -> Any:
    """The schema of a Parquet file, with the note by which `datasets` knows the pictures."""
    types = {
        "picture": pa.struct([("bytes", pa.binary()), ("path", pa.string())]),
        "captions": pa.list_(pa.string()),
        "points": pa.struct([("points", pa.list_(pa.list_(pa.float64()))), ("size", pa.list_(pa.float64()))]),
        "text": pa.string(),
        "json": pa.string(),
        "truth": pa.bool_(),
        "whole": pa.int64(),
        "number": pa.float64(),
    }
    fields = [
        (name, pa.struct([(key, pa.bool_()) for key in kind]) if isinstance(kind, dict) else types[kind])
        for name, kind in columns.items()
    ]
    features = {name: {"_type": "Image"} for name, kind in columns.items() if kind == "picture"}
    return pa.schema(fields, metadata={"huggingface": json.dumps({"info": {"features": features}})})


def in_groups(faces: Iterator[Named], size: int) -> Iterator[Iterator[Named]]:
    """Groups of `size` faces, each to be gone through before the next."""
    for first in faces:
        yield chain([first], islice(faces, size - 1))


FORMS: dict[str, Callable[[Path, str, Iterator[Named], Shards, Columns], Iterator[None]]] = {
    "imagefolder": to_imagefolder,
    "webdataset": to_webdataset,
    "parquet": to_parquet,
}
"""Name -> (folder, split, its faces, their shards, columns) -> a step a face."""
