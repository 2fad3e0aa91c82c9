"""Write ingested faces as a prepared folder.

Images that need no change are copied, all others become PNG; masks become palette PNGs with swapped sides fixed. The
image of a face is written after its conditions, the metadata of each split last, and `dataset.json` records what was
ingested: the same command resumes, another one is rejected.
"""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from likeness.conditions import CONDITIONS
from likeness.conditions.images import open_image, png_bytes
from likeness.data.ahead import read_ahead
from likeness.data.folder import METADATA, RECORD, column_of, condition_file, line_of
from likeness.files import write_whole, writing_whole
from likeness.prepare.ingest.convert import CONVERTERS, COPIED, Geometry, crop_and_resize, open_face
from likeness.prepare.ingest.face import (
    Face,
    Faces,
    File,
    Skipped,
    json_of,
    lines_of,
    name_of,
    parse_json,
    plain_name,
    split_order,
)
from likeness.prepare.ingest.formats import FORMATS, UNKNOWN_TERMS, detect_format
from likeness.prepare.ingest.source import Source, join, open_source
from likeness.prepare.ingest.splits import SPLITS, assign_splits, default_held_out
from likeness.prepare.near_duplicates import count_leaks, image_hash
from likeness.types import InputError

KIND = "likeness ingest"

SKIPPED = "skipped.jsonl"
"""File that lists everything that was skipped, with the reason."""

PARTS = {
    "a mask": column_of("mask"),
    "a sketch": column_of("sketch"),
    "keypoints": column_of("keypoints"),
    "captions": "text",
}
"""What a face may have -> its column."""

Progress = Callable[[int, int], None]


@dataclass
class Written:
    """Result of one face."""

    split: str
    row: dict[str, Any]
    skipped: list[Skipped] = field(default_factory=list)
    repaired: bool = False
    image_hash: bytes = b""
    captions_file: str = ""
    """File of its captions, if they are stored separately."""


@dataclass
class Totals:
    """Results of all faces."""

    splits: Counter[str] = field(default_factory=Counter)
    parts: Counter[str] = field(default_factory=Counter)
    skipped: dict[str, str] = field(default_factory=dict)
    repaired: int = 0
    captions_files: set[str] = field(default_factory=set)
    identities: dict[str, str] = field(default_factory=dict)
    """Identity -> split of its first face."""
    shared_identities: set[str] = field(default_factory=set)
    image_hashes: bytearray = field(default_factory=bytearray)
    held_out: bytearray = field(default_factory=bytearray)

    def add(self, written: Written) -> None:
        self.splits[written.split] += 1
        self.parts.update(part for part, column in PARTS.items() if column in written.row)
        self.repaired += written.repaired
        self.captions_files.add(written.captions_file)
        self.image_hashes += written.image_hash
        self.held_out.append(written.split != "train")
        identity = written.row.get("identity")
        if identity is not None and self.identities.setdefault(identity, written.split) != written.split:
            self.shared_identities.add(identity)


def ingest(
    source: Path,
    out: Path,
    *,
    format: str = "auto",
    split: str = "auto",
    size: int | None = None,
    crop: bool = False,
    captions: Path | None = None,
    held_out: int | None = None,
    seed: int = 0,
    limit: int | None = None,
    progress: Progress | None = None,
    report: Callable[[str], None] = lambda line: None,
) -> dict[str, Any]:
    """Import the faces of `source` into the prepared folder `out`, with a subfolder per split.

    Args:
        source: a folder or a zip archive.
        out: folder to write. Run again to resume. If it is inside the source, it is ignored there.
        format: one of `FORMATS`, or `auto` to detect it.
        split: one of `SPLITS`, or `auto` for the default of the format.
        size: side length of the images in pixels, 8 to 8192; None keeps it. Conditions keep their size.
        crop: whether to crop the centre of images that are not square; otherwise they are skipped.
        captions: folder or archive with `<name>.txt`, one caption per line, if captions are stored separately.
        held_out: faces held out by the splits `person` (at least) and `random`; default 1000, or a tenth of a smaller
            set.
        seed: random seed of these splits.
        limit: number of faces to import, the first ones.
        progress: called as (faces done, total).
        report: called with each message for the user.

    Returns:
        Faces by split, `repaired` (masks whose sides were swapped) if not 0, and `skipped`: name -> reason.

    Raises:
        InputError: the source matches no or several formats, lacks what the format or split needs, or has no usable
            face; `out` contains something else or cannot be written.
    """
    if size is not None and not 8 <= size <= 8192:
        raise InputError(f"size must be between 8 and 8192 pixels, not {size}")
    if limit is not None and limit < 1:
        raise InputError(f"limit must be at least 1, not {limit}")
    if format not in ("auto", *FORMATS):
        raise InputError(f"unknown dataset format {format!r}. Available: {', '.join(FORMATS)}")
    if split not in ("auto", *SPLITS):
        raise InputError(f"unknown split {split!r}. Available: {', '.join(SPLITS)}")
    opened = open_source(source, out)
    if format == "auto":
        format = detect_format(opened)
        report(f"{source} is in the format {format}: {FORMATS[format].files}")

    def faces() -> Faces:
        return first_faces(FORMATS[format].read(opened), limit)

    if split == "auto":
        split = FORMATS[format].split
        if split == "random" and all(face.identity is not None for face in faces() if isinstance(face, Face)):
            split = "person"
    if held_out is None and (out / RECORD).is_file():  # keep the value of the first run
        held_out = json_of(out / RECORD).get("held_out")
    if held_out is None:
        randomly = split in ("person", "random")
        held_out = default_held_out(sum(isinstance(face, Face) for face in faces())) if randomly else 0
    texts = caption_files(captions) if captions else {}
    arguments = {
        "kind": KIND,
        "layout": format,
        "source": source.resolve().name,
        "size": size,
        "crop": crop,
        "limit": limit,
        "captions": captions.resolve().name if captions else None,
        "split": split,
        **({"held_out": held_out, "seed": seed} if split in ("person", "random") else {}),
    }
    record = {**arguments, "split_is": SPLITS[split], **licence_of(opened, format)}
    if is_complete(out, arguments):
        known = json_of(out / RECORD)["faces"]
        report(f"{out} is complete, {sum(known.values())} faces: for new images choose another folder")
        lines = [parse_json(line, SKIPPED) for line in lines_of(out / SKIPPED)] if (out / SKIPPED).is_file() else []
        return {**known, "skipped": {entry["name"]: entry["reason"] for entry in lines}}

    splits = assign_splits(split, (face for face in faces() if isinstance(face, Face)), opened, held_out, seed)
    if not splits:
        first = next((face for face in faces() if isinstance(face, Skipped)), None)
        reason = f" ({first.name} was skipped: {first.reason})" if first else ""
        raise InputError(f"{source} has no faces in the format {format}{reason}")
    report(f"split {split}: {SPLITS[split]}")
    write_record(out, record)
    totals = write_faces(faces(), splits, out, Geometry(size=size, crop=crop), texts, progress)
    written = {name: totals.splits[name] for name in sorted(totals.splits, key=split_order)}
    if not written:
        (out / RECORD).unlink(missing_ok=True)  # allow other arguments
        name, reason = next(iter(totals.skipped.items()), ("", ""))
        raise InputError(f"none of the {len(splits)} faces of {source} can be used; {name}: {reason}")
    report_totals(totals, texts, report)
    if totals.skipped or (out / SKIPPED).is_file():
        lines = ({"name": name, "reason": reason} for name, reason in totals.skipped.items())
        write_whole(out / SKIPPED, b"".join(line_of(line) for line in lines))
    write_record(out, {**record, "faces": written, "skipped": len(totals.skipped)})
    repaired = {"repaired": totals.repaired} if totals.repaired else {}
    return {**written, **repaired, "skipped": totals.skipped}


def report_totals(totals: Totals, texts: dict[str, File], report: Callable[[str], None]) -> None:
    """Report what the faces have, unused caption files, and overlaps between splits."""
    parts = ", ".join(f"{totals.parts[part]} with {part}" for part in PARTS)
    report(f"{totals.splits.total()} faces: {parts}")
    if unused := sorted({name_of(file) for file in texts.values()} - totals.captions_files):
        report(f"unused caption files: {len(unused)}, such as {unused[0]}")
    if totals.shared_identities:
        report(f"identities in more than one split: {len(totals.shared_identities)}; --split person avoids this")
    if leaks := count_leaks(totals.image_hashes, np.frombuffer(totals.held_out, np.bool_)):
        report(f"(nearly) equal images in train and another split: {leaks}; `likeness prepare check` lists them")


def first_faces(faces: Faces, limit: int | None) -> Faces:
    """Yield the first `limit` faces, and everything skipped before them."""
    taken = 0
    for face in faces:
        taken += isinstance(face, Face)
        yield face
        if limit is not None and taken >= limit:
            return


def licence_of(source: Source, format: str) -> dict[str, str]:
    """Return the terms of a format's publishers, or those that a prepared folder records."""
    found = source.find(RECORD)
    if FORMATS[format].licence == UNKNOWN_TERMS and found:
        known = json_of(found)
        if isinstance(known, dict) and isinstance(known.get("licence"), str):
            return {"licence": known["licence"], "licence_source": str(known.get("licence_source", ""))}
    return {"licence": FORMATS[format].licence, "licence_source": FORMATS[format].licence_source}


def is_complete(out: Path, arguments: dict[str, Any]) -> bool:
    """Return whether `out` has been ingested completely with these arguments.

    Raises:
        InputError: it contains something else.
    """
    path = out / RECORD
    try:
        if path.is_file():
            found = json_of(path)
            found = found if isinstance(found, dict) else {}
            other = [key for key, value in arguments.items() if found.get(key) != value]
            if other:
                changes = ", ".join(f"{key} {found.get(key)!r}, not {arguments[key]!r}" for key in other[:3])
                raise InputError(f"{out} was ingested with {changes}: choose another folder or remove it")
            return "faces" in found and all((out / split / METADATA).is_file() for split in found["faces"])
        if out.exists() and any(not entry.name.startswith(f".{RECORD}.") for entry in out.iterdir()):
            raise InputError(f"{out} is not empty and was not written by `likeness prepare ingest`: choose another")
    except OSError as error:
        raise InputError(f"cannot write {out}: {error.strerror or error}") from error
    return False


def write_record(out: Path, record: dict[str, Any]) -> None:
    write_whole(out / RECORD, json.dumps(record, indent=2, ensure_ascii=False) + "\n")


def caption_files(path: Path) -> dict[str, File]:
    """Return face name -> text file: `sub_a` and, unless ambiguous, `a` for sub/a.txt."""
    source = open_source(path)
    full: dict[str, File] = {}
    short: dict[str, list[File]] = {}
    for folder in source.folders:
        for stem, name in source.texts(folder).items():
            file, parts = source.existing_file(name), join(folder, stem).split("/")
            full["_".join(parts)] = file
            for start in range(1, len(parts)):
                short.setdefault("_".join(parts[start:]), []).append(file)
    if not full:
        raise InputError(f"{path} has no text files: captions are <name>.txt, one per line")
    return {name: files[0] for name, files in short.items() if len(files) == 1} | full


def write_faces(
    faces: Faces,
    splits: list[str | None],
    out: Path,
    geometry: Geometry,
    texts: dict[str, File],
    progress: Progress | None,
) -> Totals:
    """Write all faces and, at the end, the metadata of each split."""
    totals = Totals()
    threads = os.cpu_count() or 1
    with ExitStack() as stack:
        metadata: dict[str, BinaryIO] = {}
        items = with_names(faces, splits)
        write = partial(write_face, out, geometry, texts)
        ahead = read_ahead(write, items, depth=4 * threads, threads=threads)
        for done, written in enumerate(ahead, start=1):
            for left in written.skipped if isinstance(written, Written) else [written]:
                totals.skipped[left.name] = left.reason
            if isinstance(written, Written):
                if written.split not in metadata:
                    file = stack.enter_context(writing_whole(out / written.split / METADATA))
                    metadata[written.split] = file
                metadata[written.split].write(line_of(written.row))
                totals.add(written)
            if progress is not None:
                progress(min(done, len(splits)), len(splits))
    return totals


def with_names(
    faces: Iterable[Face | Skipped], splits: Iterable[str | None]
) -> Iterator[tuple[Face | Skipped, str | None, str]]:
    """Yield each face with its split and a file name that is unique in the split, also without regard to case."""
    taken: set[tuple[str | None, str]] = set()
    split_of = iter(splits)
    for face in faces:
        if isinstance(face, Skipped):
            yield face, None, ""
            continue
        split, plain = next(split_of), plain_name(face.name)
        name, number = plain, 2
        while (split, name.casefold()) in taken:
            name, number = f"{plain}-{number}", number + 1
        taken.add((split, name.casefold()))
        yield face, split, name


def write_face(
    out: Path, geometry: Geometry, texts: dict[str, File], item: tuple[Face | Skipped, str | None, str]
) -> Written | Skipped:
    """Write the missing files of a face, its image last. What cannot be read is returned as `Skipped`.

    Raises:
        InputError: a file cannot be written.
    """
    face, split, name = item
    if isinstance(face, Skipped):
        return face
    if split is None:
        return Skipped(name, "the split does not list it")
    written, folder, where = Written(split, {}), out / split, f"{split}/{name}"
    paths = [folder / "images" / f"{name}{suffix}" for suffix in COPIED.values()]
    path = next((path for path in paths if path.is_file()), None)
    targets = {key: folder / condition_file(key, name) for key in CONDITIONS if getattr(face, key) is not None}
    if path is None or not all(target.is_file() for target in targets.values()):
        try:
            image, box, content, suffix = open_face(face, geometry)
        except InputError as error:
            return Skipped(where, str(error))
        for key, target in targets.items():
            if target.is_file():
                continue
            try:
                converted, repaired = CONVERTERS[key](getattr(face, key), box, image.size)
            except InputError as error:
                written.skipped.append(Skipped(f"{column_of(key)} of {where}", str(error)))
                continue
            written.repaired |= repaired
            write_whole(target, converted)
        if path is None:
            path = folder / "images" / f"{name}{suffix or '.png'}"
            image = crop_and_resize(image, box, geometry.size)
            write_whole(path, content if suffix else png_bytes(image))
            written.image_hash = image_hash(image)
    written.image_hash = written.image_hash or image_hash(open_image(path))
    row = {"file_name": f"images/{path.name}"}
    row |= {column_of(key): condition_file(key, name) for key, target in targets.items() if target.is_file()}
    captions = []
    try:
        file = texts.get(f"{face.split}_{face.name}") or texts.get(face.name)
        written.captions_file = name_of(file) if file else ""
        captions = [caption.strip() for caption in (lines_of(file) if file else face.captions()) if caption.strip()]
    except InputError as error:
        written.skipped.append(Skipped(f"captions of {where}", str(error)))
    own = {"text": captions or None, "attributes": face.attributes, "identity": face.identity}
    written.row = {**row, **{key: value for key, value in own.items() if value is not None}, **face.more}
    return written
