"""Named splits into training and held-out faces, each with its source.

A score depends on the split it was measured on, so the split is recorded in the prepared folder. Three different splits
of CelebA-HQ are in use; their lists are read from the files that come with the data.
"""

from __future__ import annotations

import io
import pickle
from collections.abc import Callable, Iterable

import numpy as np

from likeness.prepare.ingest.celeba import read_mapping, read_table
from likeness.prepare.ingest.faces import SourceFace
from likeness.prepare.ingest.source import Source, SourceFile
from likeness.types import InputError

SPLITS: dict[str, str] = {
    "given": "the split of the source; unassigned faces are for training",
    "none": "all faces are for training",
    "person": "random identities, so that no identity is in both parts",
    "random": "random faces; an identity may be in both parts",
    "celeba": "CelebA's list_eval_partition.txt (Liu et al. 2015); CelebA-HQ by CelebA-HQ-to-CelebA-mapping.txt",
    "face_mogle": "numbers of CelebA-HQ: 0 to 26999 train, 27000 to 29999 test (Face-MoGLE, arXiv 2509.00428)",
    "mm_celeba": "the two lists of file names of Multi-Modal-CelebA-HQ (TediGAN, arXiv 2012.03308)",
}
"""Name of a split -> description and source."""

HELD_OUT = 1000
"""Faces held out by `person` and `random` by default; a tenth of smaller sets."""

VALIDATION, TEST = 162771, 182638
"""First files of CelebA's validation and test parts, as in list_eval_partition.txt.

CelebAMask-HQ's g_partition.py compares these with numbers from 0, so a face at either boundary may differ."""

PICKLES = {
    "train": ("train/filenames.pickle", "filenames_train.pickle", "train.pickle", "train.pkl"),
    "test": ("test/filenames.pickle", "filenames_test.pickle", "test.pickle", "test.pkl"),
}
"""Names of the lists in copies of Multi-Modal-CelebA-HQ."""

SplitOf = Callable[[SourceFace], str | None]


def named_split(split: str, faces: Iterable[SourceFace], source: Source) -> list[str | None]:
    """Return the split of each face; None if the named split, one of `SPLITS`, does not list it.

    Raises:
        InputError: the source lacks what the split needs.
    """
    rules: dict[str, Callable[[Source], SplitOf]] = {
        "given": lambda source: lambda face: face.split or "train",
        "none": lambda source: lambda face: "train",
        "celeba": by_partition,
        "face_mogle": by_number,
        "mm_celeba": by_lists,
    }
    return [*map(rules[split](source), faces)]


def default_held_out(count: int) -> int:
    """Return how many of `count` faces are held out by default."""
    return min(HELD_OUT, max(1, count // 10)) if count > 1 else 0


def check_minimum(**numbers: int | None) -> None:
    """Raise `InputError` if a number of faces or a seed is below 0."""
    for name, number in numbers.items():
        if number is not None and number < 0:
            raise InputError(f"{name} must be at least 0, not {number}")


def random_split(split: str, identities: list[str | None], held_out: int, seed: int) -> list[str | None]:
    """Assign the splits `person`, with at least `held_out` faces in test, and `random`.

    Raises:
        InputError: there are too few faces, or an identity is missing.
    """
    if identities and len(identities) <= held_out:
        raise InputError(f"cannot hold out {held_out} of {len(identities)} complete faces: reduce --held-out")
    rng = np.random.default_rng(seed)
    test: set[int] = set()
    if split == "random":
        test.update(rng.permutation(len(identities))[:held_out].tolist())
    else:
        if unknown := identities.count(None):
            raise InputError(
                f"{unknown} of {len(identities)} faces have no identity, which --split person needs: use --split random"
            )
        names, person = np.unique(np.array(identities, dtype=str), return_inverse=True)
        for index in rng.permutation(len(names)):
            if len(test) >= held_out:
                break
            test.update(np.flatnonzero(person == index).tolist())
    return ["test" if index in test else "train" for index in range(len(identities))]


def number_of(name: str, split: str) -> int:
    """Return the number in a face's name."""
    digits = name.removesuffix(".jpg")
    if not digits.isdecimal():
        raise InputError(f"{name} is not a CelebA number, which --split {split} needs: use --split random")
    return int(digits)


def by_partition(source: Source) -> SplitOf:
    """CelebA's partition; faces of CelebA-HQ by their file in CelebA."""
    listed = dict(read_table(source, "list_eval_partition.txt", "file, part"))
    originals = read_mapping(source)
    names = {"0": "train", "1": "validation", "2": "test"}

    def split_of(face: SourceFace) -> str | None:
        file = face.name + ".jpg"
        if face.image_size is None:  # CelebA-HQ, with its own numbers
            if not originals:
                raise InputError("--split celeba of CelebA-HQ needs CelebA-HQ-to-CelebA-mapping.txt in the source")
            file = originals.get(str(number_of(face.name, "celeba")), "")
        if listed:
            return names.get(listed.get(file, ""))
        number = number_of(file, "celeba") if file else 0
        return "test" if number >= TEST else "validation" if number >= VALIDATION else "train" if number else None

    return split_of


def by_number(source: Source) -> SplitOf:
    """Face-MoGLE's split of CelebA-HQ."""
    part = lambda number: "train" if number < 27000 else "test" if number < 30000 else None  # noqa: E731
    return lambda face: part(number_of(face.name, "face_mogle"))


def by_lists(source: Source) -> SplitOf:
    """Multi-Modal-CelebA-HQ's pickled lists."""
    found: dict[str, str] = {}
    for split, names in PICKLES.items():
        nested = [f"{folder}/filenames.pickle" for folder in source.folders if folder.endswith(f"/{split}")]
        file = next((file for name in (*names, *nested) if (file := source.file(name))), None)
        if file is None:
            raise InputError(
                f"--split mm_celeba needs {names[0]} in the source: download it with the dataset, or use another split"
            )
        for name in read_list(file):
            stem = name.rpartition("/")[2].split(".")[0]
            found[stem.lstrip("0") or "0"] = split
    return lambda face: found.get(face.name.lstrip("0") or "0")


class ListsOnly(pickle.Unpickler):
    """Reads pickles of plain lists, strings and numbers; rejects references to classes and functions."""

    def find_class(self, module: str, name: str) -> None:
        raise pickle.UnpicklingError(f"it names {module}.{name}")


def read_list(file: SourceFile) -> list[str]:
    """Read a pickled list of strings. Raises `InputError` for any other pickle."""
    reason = "it has other types"
    try:
        found = ListsOnly(io.BytesIO(file.content()), encoding="latin1").load()
        if isinstance(found, list) and all(isinstance(entry, str) for entry in found):
            return found
    except Exception as error:  # a broken pickle raises nearly any error
        reason = str(error)[:80]
    raise InputError(f"{file.name} is not a plain list of file names ({reason}): do not trust it")
