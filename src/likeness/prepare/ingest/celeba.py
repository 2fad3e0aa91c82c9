"""Read CelebA, CelebAMask-HQ and Multi-Modal-CelebA-HQ as they are published.

The crop (9, 36, 169, 196) of CelebA's aligned 178x218 files has the framing of CelebA-HQ within a few pixels.
Attributes become captions by the grammar of `prepare.caption`; the same face gets the same captions in every run.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial

import numpy as np

from likeness.conditions.mask import PART_NAMES
from likeness.prepare.caption.grammar import write_captions
from likeness.prepare.ingest.face import Face, Faces, File, Skipped, lines_of, name_of
from likeness.prepare.ingest.source import Source
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


def celeba(source: Source) -> Faces:
    """CelebA: `img_align_celeba/*.jpg`, `list_attr_celeba.txt` and optionally `identity_CelebA.txt`."""
    listed = source.find("list_attr_celeba.txt")
    if listed is None:
        raise InputError(f"{source.root / 'list_attr_celeba.txt'} does not exist: give CelebA's official folder")
    names, rows = read_attributes(listed)
    identities = read_identities(source)
    images = list(source.images(source.folder("img_align_celeba"), (".jpg", ".png")).values())
    if not images:
        raise InputError(f"{source.root / 'img_align_celeba'} has no .jpg files: give CelebA's official folder")
    number = 0
    for path in images:
        file = path.rpartition("/")[2]
        stem = file.rpartition(".")[0]
        known = f"{stem}.jpg"  # the lists also name .jpg for In-The-Wild and PNG copies
        if known not in rows or (identities and known not in identities):
            yield Skipped(file, "no attributes or no identity")
            continue
        attributes = as_attributes(names, rows[known])
        yield Face(
            name=stem,
            image=source.existing_file(path),
            captions=partial(grammar_captions, attributes, stem, number),
            attributes=attributes,
            identity=identities.get(known),
            image_size=ALIGNED,
            box=CROP,
        )
        number += 1


def celebamask(source: Source) -> Faces:
    """CelebAMask-HQ: images with part masks (`CelebAMask-HQ-mask-anno/0/00000_skin.png`) or whole masks."""
    return celeba_hq(source, {}, {})


def mm_celeba(source: Source) -> Faces:
    """Multi-Modal-CelebA-HQ: CelebAMask-HQ with ten captions (`celeba-caption/0.txt`) and sketches."""
    captions = source.texts(source.folder(*HQ_CAPTIONS))
    return celeba_hq(source, captions, source.images(source.folder(*HQ_SKETCHES)))


def celeba_hq(source: Source, captions: dict[str, str], sketches: dict[str, str]) -> Faces:
    """Yield the faces of CelebA-HQ with everything that the source has about them.

    Attributes are read from `CelebAMask-HQ-attribute-anno.txt`; identities need `identity_CelebA.txt` and
    `CelebA-HQ-to-CelebA-mapping.txt`.
    """
    images = source.images(source.folder(*HQ_IMAGES))
    if not images:
        raise InputError(f"{source.root} has no images in {' or '.join(HQ_IMAGES)}")
    parts = read_parts(source)
    masks = source.images(source.folder(*HQ_MASKS), (".png",))
    listed = source.find("CelebAMask-HQ-attribute-anno.txt")
    names, rows = read_attributes(listed) if listed else ((), {})
    identities, originals = read_identities(source), read_mapping(source)
    for number, face in enumerate(matching_faces(source, images, masks, sketches, captions)):
        key = str(int(face.name)) if face.name.isdigit() else face.name
        attributes = as_attributes(names, rows[f"{key}.jpg"]) if f"{key}.jpg" in rows else None
        if attributes is not None and not captions:
            face = replace(face, captions=partial(grammar_captions, attributes, face.name, number))
        identity = identities.get(originals.get(key, ""))
        yield replace(face, mask=parts.get(key) or face.mask, attributes=attributes, identity=identity)


def matching_faces(
    source: Source,
    images: dict[str, str],
    masks: dict[str, str],
    sketches: dict[str, str],
    captions: dict[str, str],
    *,
    split: str | None = None,
    prefix: str = "",
) -> Iterator[Face]:
    """Yield a face per image with the mask, sketch and caption file of the same stem; 1 and 00001 are the same.

    Args:
        source: the source.
        images: stem -> file; likewise `masks`, `sketches` and `captions` (one per line).
        masks: see `images`.
        sketches: see `images`.
        captions: see `images`.
        split: split of the faces.
        prefix: prefix of their names.
    """
    for stem, path in images.items():
        number = str(int(stem)) if stem.isdigit() else stem
        mask, sketch, text = (
            next((source.file(files[name]) for name in (stem, number, number.zfill(5)) if name in files), None)
            for files in (masks, sketches, captions)
        )
        yield Face(
            name=prefix + stem,
            image=source.existing_file(path),
            mask=mask,
            sketch=sketch,
            captions=partial(lines_of, text) if text else tuple,
            split=split,
        )


def grammar_captions(attributes: dict[str, bool], stem: str, number: int) -> Sequence[str]:
    """Write ten captions from the attributes."""
    return write_captions(attributes, np.random.default_rng([SEED, int(stem) if stem.isdigit() else number]))


def read_attributes(file: File) -> tuple[Sequence[str], dict[str, bytes]]:
    """Read CelebA's `list_attr_celeba.txt`: a count, a header of names, then `file 1/-1 ...`.

    Returns:
        The names; and file -> a byte of 0 or 1 per name.
    """
    lines = lines_of(file)
    names = lines[1].split() if len(lines) > 1 else []
    if not lines or not lines[0].isdigit() or "Male" not in names:
        raise InputError(f"{name_of(file)} is not CelebA's attribute list: it must begin with a count and a header")
    found = {}
    for number, line in enumerate(lines[2:], start=3):
        name, *values = line.split()
        if len(values) != len(names) or set(values) - {"1", "-1"}:
            raise InputError(f"{name_of(file)}, line {number}: expected {len(names)} values of 1 or -1 of {name[:60]}")
        found[name] = bytes(value == "1" for value in values)
    return names, found


def as_attributes(names: Sequence[str], row: bytes) -> dict[str, bool]:
    return dict(zip(names, map(bool, row), strict=True))


def read_table(source: Source, name: str, columns: str, *, header: bool = False) -> list[list[str]]:
    """Read a text file of columns separated by spaces; [] if there is no such file.

    Args:
        source: the source.
        name: name of the file.
        columns: names of the columns, for messages.
        header: whether the first line is a header.
    """
    file = source.find(name)
    rows = []
    for number, line in enumerate(lines_of(file) if file else (), start=1):
        values = line.split()
        if header and number == 1:
            continue
        if len(values) != len(columns.split(", ")):
            raise InputError(f"{name_of(file or source.root)}, line {number}: expected {columns}, not {line[:60]!r}")
        rows.append(values)
    return rows


def read_identities(source: Source) -> dict[str, str]:
    """Read CelebA's `identity_CelebA.txt`; {} if there is no such file."""
    return dict(read_table(source, "identity_CelebA.txt", "file, identity"))


def read_mapping(source: Source) -> dict[str, str]:
    """Read `CelebA-HQ-to-CelebA-mapping.txt`: number in CelebA-HQ -> file of CelebA; {} if there is no such file."""
    rows = read_table(source, "CelebA-HQ-to-CelebA-mapping.txt", "number, number, file", header=True)
    return {number: file for number, _, file in rows}


def read_parts(source: Source) -> dict[str, dict[int, File]]:
    """Find face number -> class -> image of that part, in `CelebAMask-HQ-mask-anno/*/00000_skin.png`."""
    top = next((folder for folder in sorted(source.folders) if HQ_PARTS in folder.split("/")), None)
    found: dict[str, dict[int, File]] = {}
    if top is None:
        return found
    for folder in source.below(top[: top.index(HQ_PARTS) + len(HQ_PARTS)]):
        for stem, path in source.images(folder, (".png",)).items():
            number, _, part = stem.partition("_")
            if number.isdigit() and part in PART_NAMES:
                found.setdefault(str(int(number)), {})[PART_NAMES[part]] = source.existing_file(path)
    return found
