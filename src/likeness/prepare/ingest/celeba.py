"""Read CelebA, CelebAMask-HQ and Multi-Modal-CelebA-HQ in their published formats.

The crop (9, 36, 169, 196) of CelebA's aligned 178x218 files has the framing of CelebA-HQ within a few pixels.
Attributes become captions by the grammar of `prepare.caption`; the same face gets the same captions in every run.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace

import numpy as np

from likeness.conditions.mask import PART_NAMES
from likeness.prepare.caption.grammar import write_captions
from likeness.prepare.ingest.faces import Entries, Skipped, SourceFace
from likeness.prepare.ingest.source import Source, SourceFile
from likeness.types import InputError

CROP = (9, 36, 169, 196)
"""Left, top, right and bottom of the square in CelebA's aligned files with the framing of CelebA-HQ."""

ALIGNED = (178, 218)
"""Width and height of CelebA's aligned files."""

HQ_IMAGES = ("CelebA-HQ-img", "image/images", "image", "images")
HQ_PARTS = "CelebAMask-HQ-mask-anno"
HQ_MASKS = ("CelebAMask-HQ-mask", "masks", "label", "labels")
HQ_CAPTIONS = ("celeba-caption", "text")
HQ_SKETCHES = ("sketch/sketch", "sketch", "sketches")
"""Folders of images, part masks, whole masks, captions and sketches in copies of CelebA-HQ."""

SEED = 0
"""Seed of the captions."""


def celeba(source: Source) -> Entries:
    """CelebA: `img_align_celeba/*.jpg`, `list_attr_celeba.txt` and optionally `identity_CelebA.txt`."""
    listed = source.find("list_attr_celeba.txt")
    if listed is None:
        raise InputError(f"{source.root / 'list_attr_celeba.txt'} does not exist: give CelebA's official folder")
    (names, rows), identities, number = read_attributes(listed), read_identities(source), 0
    for face in matching_faces(source, source.folder("img_align_celeba")):
        file = f"{face.name}.jpg"  # the lists also name .jpg for In-The-Wild and PNG copies
        if file not in rows or (identities and file not in identities):
            yield Skipped(face.image.name.rpartition("/")[2], "no attributes or no identity")
            continue
        face = replace(face, identity=identities.get(file), image_size=ALIGNED, box=CROP)
        yield with_attributes(face, names, rows[file], number)
        number += 1


def celeba_hq(source: Source, captions: Sequence[str] = (), sketches: Sequence[str] = ()) -> Entries:
    """CelebAMask-HQ: images with part masks (`CelebAMask-HQ-mask-anno/0/00000_skin.png`) or whole masks.

    Attributes are read from `CelebAMask-HQ-attribute-anno.txt`; identities need `identity_CelebA.txt` and
    `CelebA-HQ-to-CelebA-mapping.txt`. Without captions, they are written from the attributes.

    Args:
        source: the files.
        captions: possible folders of captions, one per line (`celeba-caption/0.txt`).
        sketches: possible folders of sketches.
    """
    mask, sketch, text = (source.folder(*names) for names in (HQ_MASKS, sketches, captions))
    listed, parts = source.find("CelebAMask-HQ-attribute-anno.txt"), read_parts(source)
    names, rows = read_attributes(listed) if listed else ((), {})
    identities, originals = read_identities(source), read_mapping(source)
    faces = matching_faces(source, source.folder(*HQ_IMAGES), text, mask=mask, sketch=sketch)
    written = bool(source.texts(text))
    for number, face in enumerate(faces):
        key = unpadded(face.name)
        if key in parts:
            face = replace(face, conditions={**face.conditions, "mask": parts[key]})
        face = replace(face, identity=identities.get(originals.get(key, "")))
        values = rows.get(f"{key}.jpg")
        yield with_attributes(face, names, values, number, written=written) if values else face


def matching_faces(
    source: Source,
    images: str | None,
    captions: str | None = None,
    *,
    split: str | None = None,
    prefix: str = "",
    **conditions: str | None,
) -> Iterator[SourceFace]:
    """Yield a face per image with the conditions and the caption file of the same stem; 1 and 00001 are the same.

    Args:
        source: the files.
        images: folder of the images.
        captions: folder of text files with one caption per line.
        split: split of the faces.
        prefix: prefix of their names.
        conditions: condition -> folder.
    """

    def match(files: Mapping[str, str], stem: str) -> SourceFile | None:
        names = (stem, unpadded(stem), unpadded(stem).zfill(5))
        return next((source.file(files[name]) for name in names if name in files), None)

    texts = source.texts(captions)
    files = {name: source.images(folder) for name, folder in conditions.items()}
    for stem, path in source.images(images).items():
        found = {name: match(paths, stem) for name, paths in files.items()}
        text = match(texts, stem)
        yield SourceFace(
            name=prefix + stem,
            image=source.existing_file(path),
            conditions={name: file for name, file in found.items() if file},
            captions=text.lines if text else tuple,
            split=split,
        )


def with_attributes(
    face: SourceFace, names: Sequence[str], values: bytes, number: int, *, written: bool = False
) -> SourceFace:
    """Return a face with attributes and, unless it has `written` captions, ten from them, the same in every run."""
    attributes = dict(zip(names, map(bool, values), strict=True))
    seed = int(face.name) if face.name.isdecimal() else number
    captions = lambda: write_captions(attributes, np.random.default_rng([SEED, seed]))  # noqa: E731
    return replace(face, attributes=attributes, captions=face.captions if written else captions)


def unpadded(stem: str) -> str:
    """Remove leading zeros of a number."""
    return str(int(stem)) if stem.isdecimal() else stem


def read_attributes(file: SourceFile) -> tuple[Sequence[str], dict[str, bytes]]:
    """Read CelebA's `list_attr_celeba.txt`: a count, a header of names, then `file 1/-1 ...`.

    Returns:
        The names; and file -> a byte of 0 or 1 per name.
    """
    lines = file.lines()
    names = lines[1].split() if len(lines) > 1 else []
    if "Male" not in names or not lines[0].isdecimal():
        raise InputError(f"{file.name} is not CelebA's attribute list: it must begin with a count and a header")
    found = {}
    for number, line in enumerate(lines[2:], start=3):
        name, *values = line.split()
        if len(values) != len(names) or set(values) - {"1", "-1"}:
            raise InputError(f"{file.name}, line {number}: expected {len(names)} values of 1 or -1 of {name[:60]}")
        found[name] = bytes(value == "1" for value in values)
    return names, found


def read_table(source: Source, name: str, columns: str, *, header: bool = False) -> list[list[str]]:
    """Read a text file of `columns` (names separated by ", ") separated by spaces; [] if the file does not exist."""
    file = source.find(name)
    rows = [line.split() for line in file.lines()[header:]] if file else []
    for number, values in enumerate(rows, start=1 + header):
        if len(values) != len(columns.split(", ")):
            raise InputError(f"{name}, line {number}: expected {columns}, not {' '.join(values)[:60]!r}")
    return rows


def read_identities(source: Source) -> dict[str, str]:
    """Read CelebA's `identity_CelebA.txt`; {} if it does not exist."""
    return dict(read_table(source, "identity_CelebA.txt", "file, identity"))


def read_mapping(source: Source) -> dict[str, str]:
    """Read `CelebA-HQ-to-CelebA-mapping.txt`: number in CelebA-HQ -> file of CelebA; {} if it does not exist."""
    rows = read_table(source, "CelebA-HQ-to-CelebA-mapping.txt", "number, number, file", header=True)
    return {number: file for number, _, file in rows}


def read_parts(source: Source) -> dict[str, dict[int, SourceFile]]:
    """Find face number -> class -> image of that part, in `CelebAMask-HQ-mask-anno/*/00000_skin.png`."""
    found: dict[str, dict[int, SourceFile]] = {}
    for folder in source.below(HQ_PARTS):
        for stem, path in source.images(folder, (".png",)).items():
            number, _, part = stem.partition("_")
            if number.isdecimal() and part in PART_NAMES:
                found.setdefault(unpadded(number), {})[PART_NAMES[part]] = source.existing_file(path)
    return found
