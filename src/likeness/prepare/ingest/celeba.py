"""CelebA, CelebAMask-HQ and Multi-Modal-CelebA-HQ in the layouts in which they are published.

The crop (9, 36, 169, 196) of CelebA's aligned 178x218 files frames a face as CelebA-HQ does, within a few pixels.
Attributes become captions by the grammar of `prepare.caption`, the same ones for the same face in every run.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import numpy as np

from likeness.conditions.mask import PART_NAMES
from likeness.prepare.caption.grammar import write_captions
from likeness.prepare.ingest.face import Face, Faces, File, Skipped, lines_of, name_of
from likeness.prepare.ingest.tree import Tree
from likeness.types import InputError

CROP = (9, 36, 169, 196)
"""Left, top, right and bottom of the square in CelebA's aligned files that has CelebA-HQ's framing."""

ALIGNED = (178, 218)
"""Width and height of CelebA's aligned files."""

HQ_PICTURES = ("CelebA-HQ-img", "image/images", "image", "images")
HQ_PARTS = "CelebAMask-HQ-mask-anno"
HQ_MASKS = ("CelebAMask-HQ-mask", "masks", "label", "labels")
HQ_CAPTIONS = ("celeba-caption", "text")
HQ_SKETCHES = ("sketch/sketch", "sketch", "sketches")
"""Folders of CelebA-HQ's pictures, masks (by part, or whole), captions and sketches, as copies have them."""

SEED = 0
"""Of the captions."""


def celeba(tree: Tree) -> Faces:
    """CelebA: `img_align_celeba/*.jpg`, `list_attr_celeba.txt` and, where it is there, `identity_CelebA.txt`."""
    names, rows = read_attributes(tree.needed("list_attr_celeba.txt"))
    people = read_people(tree)
    pictures = list(tree.pictures(tree.folder("img_align_celeba"), (".jpg", ".png")).values())
    if not pictures:
        raise InputError(f"{tree.root / 'img_align_celeba'} holds no .jpg files: give CelebA's official folder")
    number = 0
    for path in pictures:
        file = path.rpartition("/")[2]
        known = f"{file.rpartition('.')[0]}.jpg"  # the lists name .jpg files also for In-The-Wild's and PNG copies
        if known not in rows or (people and known not in people):
            yield Skipped(file, "no attributes or no identity")
            continue
        picture = tree.file(path)
        assert picture is not None
        attributes = as_attributes(names, rows[known])
        yield Face(
            name=file.rpartition(".")[0],
            picture=picture,
            captions=partial(grammar, attributes, file.rpartition(".")[0], number),
            attributes=attributes,
            identity=people.get(known),
            canvas=ALIGNED,
            box=CROP,
        )
        number += 1


def celebamask(tree: Tree) -> Faces:
    """CelebAMask-HQ: pictures with masks by part (`CelebAMask-HQ-mask-anno/0/00000_skin.png`) or whole, by name."""
    return celeba_hq(tree)


def mm_celeba(tree: Tree) -> Faces:
    """Multi-Modal-CelebA-HQ: CelebAMask-HQ with ten captions (`celeba-caption/0.txt`) and sketches."""
    return celeba_hq(
        tree, tree.pictures(tree.folder(*HQ_CAPTIONS), (".txt",)), tree.pictures(tree.folder(*HQ_SKETCHES))
    )


def celeba_hq(tree: Tree, captions: dict[str, str] | None = None, sketches: dict[str, str] | None = None) -> Faces:
    """CelebA-HQ's pictures with all that a source has about them; what it lacks is left out.

    Attributes are those of `CelebAMask-HQ-attribute-anno.txt`; a person is known where `identity_CelebA.txt` and
    `CelebA-HQ-to-CelebA-mapping.txt` are there.
    """
    folder = tree.folder(*HQ_PICTURES)
    pictures = tree.pictures(folder)
    if not pictures:
        raise InputError(f"{tree.root} has no pictures in {' or '.join(HQ_PICTURES)}")
    parts = read_parts(tree)
    masks = tree.pictures(tree.folder(*HQ_MASKS), (".png",))
    found = tree.find("CelebAMask-HQ-attribute-anno.txt")
    names, rows = read_attributes(found) if found else ((), {})
    people, originals = read_people(tree), read_mapping(tree)
    for number, (stem, path) in enumerate(pictures.items()):
        key = str(int(stem)) if stem.isdigit() else stem
        attributes = as_attributes(names, rows[f"{key}.jpg"]) if f"{key}.jpg" in rows else None
        names_of = dict.fromkeys((stem, key, key.zfill(5)))  # 1, and 00001 in another folder
        mask, sketch, words = (
            tree.file(next((files[name] for name in names_of if name in files), ""))
            for files in (masks, sketches or {}, captions or {})
        )
        picture = tree.file(path)
        assert picture is not None
        yield Face(
            name=stem,
            picture=picture,
            mask=parts.get(key) or mask,
            sketch=sketch,
            captions=partial(lines_of, words) if words else partial(grammar, attributes, stem, number),
            attributes=attributes,
            identity=people.get(originals.get(key, "")),
        )


def grammar(attributes: dict[str, bool] | None, stem: str, number: int) -> Sequence[str]:
    """Ten captions from the attributes, or none where these are not known."""
    if attributes is None:
        return ()
    return write_captions(attributes, np.random.default_rng([SEED, int(stem) if stem.isdigit() else number]))


def read_attributes(file: File) -> tuple[Sequence[str], dict[str, bytes]]:
    """CelebA's `list_attr_celeba.txt`: a count, a header of names, then `file 1/-1 ...`.

    Returns:
        The names, and a byte of 0 or 1 for each by file.
    """
    lines = lines_of(file)
    names = lines[1].split() if len(lines) > 1 else []
    if not lines or not lines[0].isdigit() or "Male" not in names:
        raise InputError(
            f"{name_of(file)} is not CelebA's attribute list: it must begin with a count and a line of names"
        )
    found = {}
    for number, line in enumerate(lines[2:], start=3):
        name, *values = line.split()
        if len(values) != len(names) or set(values) - {"1", "-1"}:
            raise InputError(
                f"{name_of(file)}, line {number}: {len(names)} values of 1 or -1 were expected for {name[:60]}"
            )
        found[name] = bytes(value == "1" for value in values)
    return names, found


def as_attributes(names: Sequence[str], row: bytes) -> dict[str, bool]:
    return dict(zip(names, map(bool, row), strict=True))


def read_people(tree: Tree) -> dict[str, str]:
    """CelebA's `identity_CelebA.txt`, `file identity` lines; empty where there is no such file."""
    return read_pairs(tree, "identity_CelebA.txt", "a file and an identity")


def read_pairs(tree: Tree, base: str, what: str) -> dict[str, str]:
    """Lines of two words; empty where there is no such file."""
    file = tree.find(base)
    found: dict[str, str] = {}
    if file is None:
        return found
    for number, line in enumerate(lines_of(file), start=1):
        words = line.split()
        if len(words) != 2:
            raise InputError(f"{name_of(file)}, line {number}: {what} were expected, not {line[:60]!r}")
        found[words[0]] = words[1]
    return found


def read_mapping(tree: Tree) -> dict[str, str]:
    """`CelebA-HQ-to-CelebA-mapping.txt`: number in CelebA-HQ -> file of CelebA; empty where there is no such file."""
    file = tree.find("CelebA-HQ-to-CelebA-mapping.txt")
    found = {}
    for number, line in enumerate(lines_of(file)[1:] if file else (), start=2):
        words = line.split()
        if len(words) != 3 or not words[0].isdigit():
            raise InputError(
                f"CelebA-HQ-to-CelebA-mapping.txt, line {number}: a number, a number and a file were expected, "
                f"not {line[:60]!r}"
            )
        found[words[0]] = words[2]
    return found


def read_parts(tree: Tree) -> dict[str, dict[int, File]]:
    """Number of a face -> class -> picture of that part, from `CelebAMask-HQ-mask-anno/*/00000_skin.png`."""
    top = next((folder for folder in sorted(tree.folders) if HQ_PARTS in folder.split("/")), None)
    found: dict[str, dict[int, File]] = {}
    if top is None:
        return found
    top = top[: top.index(HQ_PARTS) + len(HQ_PARTS)]
    for folder in tree.below(top):
        for stem, path in tree.pictures(folder, (".png",)).items():
            number, _, part = stem.partition("_")
            file = tree.file(path)
            if number.isdigit() and part in PART_NAMES and file is not None:
                found.setdefault(str(int(number)), {})[PART_NAMES[part]] = file
    return found
