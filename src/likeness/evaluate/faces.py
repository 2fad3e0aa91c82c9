"""The faces that an evaluation asks for: rows of a prepared folder, always the same ones in the same order."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from likeness.annotators.face_parser import confusion_of
from likeness.conditions import CONDITIONS
from likeness.data.folder import captions_of, column_of, read_folder
from likeness.evaluate.config import Protocol, conditions_of
from likeness.evaluate.scores import counts_of
from likeness.types import InputError


@dataclass(frozen=True, kw_only=True)
class Face:
    """One face and what is known of it."""

    number: int
    """Its row in the folder, which is also the seed of its first portrait."""
    name: str
    """Stem of its picture's file: what its portraits are called."""
    photo: Path
    """The photograph itself."""
    conditions: Mapping[str, Path] = field(default_factory=dict)
    """Condition -> file, of all that the row has."""
    caption: str = ""
    """What its portraits are made from."""
    attributes: Mapping[str, Any] = field(default_factory=dict)
    """As the row has them."""
    another: Mapping[str, Path] = field(default_factory=dict)
    """The conditions of the next face: what a score must tell this one's from."""


def read_faces(folder: Path, protocol: Protocol, photos: Iterable[Path] | None = None) -> tuple[list[Face], list[str]]:
    """The faces of a prepared folder that have a caption and every condition the protocol asks for.

    Args:
        folder: a prepared split.
        protocol: which and how many.
        photos: where pictures already exist, only the faces whose names these have.

    Returns:
        The faces, and what was left out and why, one sentence each.

    Raises:
        InputError: the folder cannot be read, two faces have one name, or none is left.
    """
    needed = {name for given in protocol.given for name in conditions_of(given)}
    wanted = None if photos is None else {path.stem for path in photos}
    faces: list[Face] = []
    lacking = {"caption": 0, **dict.fromkeys(sorted(needed), 0)}
    for number, row in enumerate(read_folder(folder)):
        name = row["file_name"].stem
        if wanted is not None and name not in wanted:
            continue
        captions = [caption for caption in captions_of(row) if caption.strip()]
        have = {condition: row[column_of(condition)] for condition in CONDITIONS if column_of(condition) in row}
        missing = [] if captions else ["caption"]
        missing += sorted(needed - set(have))
        for column in missing:
            lacking[column] += 1
        if missing:
            continue
        caption = captions[0] if protocol.caption == "first" else max(captions, key=lambda text: (len(text), text))
        known = {"caption": caption, "attributes": row.get("attributes", {})}
        faces.append(Face(number=number, name=name, photo=row["file_name"], conditions=have, **known))
    notes = [f"{count} faces without a {column} were left out" for column, count in lacking.items() if count]
    if not faces:
        asked = "" if wanted is None else " named like the pictures"
        raise InputError(f"{folder} has no face{asked} with a caption and {', '.join(sorted(needed)) or 'a picture'}")
    faces = faces[: protocol.count]
    if protocol.count and len(faces) < protocol.count:
        notes.append(f"{protocol.count} faces were asked for, {len(faces)} are there")
    if len({face.name for face in faces}) < len(faces):
        raise InputError(f"{folder} has two pictures of the same name in different folders: rename one of them")
    following = [*faces[1:], faces[0]]
    return [replace(face, another=other.conditions) for face, other in zip(faces, following, strict=True)], notes


def raw_condition(files: Mapping[str, Path], name: str, size: int) -> np.ndarray | None:
    """The raw form of a condition at `size` x `size`; None where there is none.

    Raises:
        InputError: its file cannot be read.
    """
    if name not in files:
        return None
    condition = CONDITIONS[name]
    return condition.resize(condition.read(files[name]).raw, size, size)


def mask_counts(found: Sequence[np.ndarray], faces: Sequence[Face]) -> np.ndarray:
    """The counts of B masks against those that the faces have, and the next faces': [B, 2, 19, 3]."""
    counts = np.full((len(found), 2, 19, 3), np.nan, dtype=np.float32)
    for row, (labels, face) in enumerate(zip(found, faces, strict=True)):
        for column, files in enumerate((face.conditions, face.another)):
            if (given := raw_condition(files, "mask", len(labels))) is not None:
                counts[row, column] = counts_of(confusion_of(given, labels))
    return counts


def faces_hash(faces: Sequence[Face]) -> str:
    """SHA-256 over names, captions, attributes and file sizes: two evaluations of the same hash asked for the same
    faces.
    """
    digest = hashlib.sha256()
    for face in faces:
        files = {"photo": face.photo, **face.conditions}
        sizes = {name: path.stat().st_size if path.is_file() else 0 for name, path in files.items()}
        told = [face.number, face.name, face.caption, *([face.attributes] if face.attributes else []), sizes]
        digest.update(json.dumps(told, sort_keys=True).encode())
    return digest.hexdigest()[:16]
