"""The faces of an evaluation: rows of a prepared folder, always the same ones in the same order."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from likeness.conditions import CONDITIONS
from likeness.data.folder import attributes_of, captions_of, column_of, read_folder
from likeness.evaluate.protocol import Protocol, conditions_of
from likeness.types import InputError


@dataclass(frozen=True, kw_only=True)
class Face:
    """One row of a prepared folder."""

    number: int
    """Index of the row, which is also the seed of the first image."""
    name: str
    """Stem of the photograph's file name. Generated images have the same stem."""
    photo: Path
    conditions: Mapping[str, Path] = field(default_factory=dict)
    """Condition -> file, for all conditions of the row."""
    caption: str = ""
    """The prompt."""
    attributes: Mapping[str, Any] = field(default_factory=dict)
    mismatched: Mapping[str, Path] = field(default_factory=dict)
    """The conditions of the next face, for the floor."""

    def to_json(self) -> dict[str, str]:
        """Return what reports show."""
        files = {name: str(path) for name, path in self.conditions.items()}
        return {"name": self.name, "caption": self.caption, "photo": str(self.photo), **files}


def read_faces(folder: Path, protocol: Protocol, photos: Iterable[Path] | None = None) -> tuple[list[Face], list[str]]:
    """Read the faces of a prepared folder that have every condition of the protocol, and a caption unless none has; if
    `photos` are given, only those with the stems of these files. Return them, and one sentence for each kind of row
    that was skipped. Raises `InputError` if the folder cannot be read, two faces have the same name, or none is left.
    """
    required = {name for given in protocol.given for name in conditions_of(given)}
    stems = None if photos is None else {path.stem for path in photos}
    faces: list[Face] = []
    skipped = {"caption": 0, **dict.fromkeys(sorted(required), 0)}
    rows = read_folder(folder)
    captioned = any(map(captions_of, rows))
    for number, row in enumerate(rows):
        name = row["file_name"].stem
        if stems is not None and name not in stems:
            continue
        captions = captions_of(row)
        files = {condition: row[column_of(condition)] for condition in CONDITIONS if column_of(condition) in row}
        lacking = sorted(required - set(files)) + (["caption"] if captioned and not captions else [])
        for column in lacking:
            skipped[column] += 1
        if lacking:
            continue
        captions = captions or [""]
        caption = captions[0] if protocol.caption == "first" else max(captions, key=lambda text: (len(text), text))
        known = {"conditions": files, "caption": caption, "attributes": attributes_of(row)}
        faces.append(Face(number=number, name=name, photo=row["file_name"], **known))
    notes = [f"{count} faces without a {column} were skipped" for column, count in skipped.items() if count]
    if not faces:
        named = "" if stems is None else " named like the images"
        parts = [*(["caption"] if captioned else []), *sorted(required)]
        raise InputError(f"{folder} has no face{named} with {' and '.join(parts) or 'an image'}")
    faces = faces[: protocol.count]
    if protocol.count and len(faces) < protocol.count:
        notes.append(f"{protocol.count} faces were requested, {len(faces)} are available")
    if len({face.name for face in faces}) < len(faces):
        raise InputError(f"{folder} has two images with the same name in different folders: rename one of them")
    following = [*faces[1:], faces[0]]
    return [replace(face, mismatched=other.conditions) for face, other in zip(faces, following, strict=True)], notes


def read_training_faces(folder: Path) -> list[Face]:
    """Read the photographs that a model was trained on."""
    rows = enumerate(read_folder(folder))
    return [Face(number=number, name=row["file_name"].stem, photo=row["file_name"]) for number, row in rows]


def read_condition(files: Mapping[str, Path], name: str, size: int) -> np.ndarray | None:
    """Read a condition and resize it to `size` x `size`. None if the face does not have it. Raises `InputError` if the
    file cannot be read.
    """
    if name not in files:
        return None
    condition = CONDITIONS[name]
    return condition.resize(condition.read(files[name]).raw, size, size)


def faces_hash(faces: Sequence[Face]) -> str:
    """SHA-256 over names, captions, attributes and file sizes: equal for evaluations of the same faces."""
    digest = hashlib.sha256()
    for face in faces:
        files = {"photo": face.photo, **face.conditions}
        sizes = {name: path.stat().st_size if path.is_file() else 0 for name, path in files.items()}
        content = [face.number, face.name, face.caption, *([face.attributes] if face.attributes else []), sizes]
        digest.update(json.dumps(content, sort_keys=True).encode())
    return digest.hexdigest()[:16]
