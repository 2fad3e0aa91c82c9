"""Which faces are for training and which are kept for measuring: named splits, each with its source.

A score means nothing without the split it was measured on, so that the one used is written into the prepared folder.
Three of CelebA-HQ are in use and differ; the lists themselves are read from the files that come with the data.
"""

from __future__ import annotations

import io
import pickle
from collections.abc import Callable, Iterable

import numpy as np

from likeness.prepare.ingest.celeba import read_mapping, read_pairs
from likeness.prepare.ingest.face import Face, content_of, name_of
from likeness.prepare.ingest.tree import Tree
from likeness.types import InputError

SPLITS: dict[str, str] = {
    "given": "as the source has it; what it does not assign is for training",
    "none": "everything is for training",
    "person": "whole persons drawn at random, so that nobody is both learnt from and measured",
    "random": "faces drawn at random; the same person may be in both",
    "celeba": "CelebA's list_eval_partition.txt (Liu et al. 2015); CelebA-HQ by CelebA-HQ-to-CelebA-mapping.txt",
    "face_mogle": "CelebA-HQ's numbers: 0 to 26999 train, 27000 to 29999 test (Face-MoGLE, arXiv 2509.00428)",
    "mm_celeba": "the two lists of file names of Multi-Modal-CelebA-HQ (TediGAN, arXiv 2012.03308)",
}
"""Name of a split -> what it is, and its source."""

HELD_OUT = 1000
"""Faces that `person` and `random` keep for measuring where the user does not say; of smaller sets a tenth."""

VALIDATION, TEST = 162771, 182638
"""The first files of CelebA that its partition keeps for validation and test: what list_eval_partition.txt says.

CelebAMask-HQ's g_partition.py compares these with numbers that begin at 0, so that a face at either seam may differ."""

PICKLES = {
    "train": ("train/filenames.pickle", "filenames_train.pickle", "train.pickle", "train.pkl"),
    "test": ("test/filenames.pickle", "filenames_test.pickle", "test.pickle", "test.pkl"),
}
"""Names under which the lists of Multi-Modal-CelebA-HQ circulate."""


def assign(split: str, faces: Iterable[Face], tree: Tree, held_out: int, seed: int) -> list[str | None]:
    """The split of each face; None where the named split lists it nowhere.

    Args:
        split: one of `SPLITS`.
        faces: all faces, in order.
        tree: the source, in which the lists lie.
        held_out: faces kept for measuring by `person` (at least) and `random`.
        seed: of what is drawn.

    Raises:
        InputError: the split needs what the source does not have, or more faces than there are.
    """
    if split in ("person", "random"):
        return drawn(split, faces, held_out, seed)
    of = RULES[split](tree)
    return [of(face) for face in faces]


def usual_held_out(faces: int) -> int:
    """How many of some faces are held out where the user does not say."""
    return min(HELD_OUT, max(1, faces // 10)) if faces > 1 else 0


def drawn(split: str, faces: Iterable[Face], held_out: int, seed: int) -> list[str | None]:
    """`person` and `random`."""
    people = [face.identity for face in faces]
    if people and len(people) <= held_out:
        raise InputError(f"{held_out} of {len(people)} complete faces would be held out: ask for fewer by --held-out")
    rng = np.random.default_rng(seed)
    if split == "random":
        test = {int(index) for index in rng.permutation(len(people))[:held_out]}
    else:
        unknown = sum(person is None for person in people)
        if unknown:
            raise InputError(
                f"{unknown} of {len(people)} faces have no identity, which --split person needs: use --split random"
            )
        by_person: dict[str, list[int]] = {}
        for index, person in enumerate(people):
            by_person.setdefault(person or "", []).append(index)
        persons = sorted(by_person)
        test = set()
        for index in rng.permutation(len(persons)):
            if len(test) >= held_out:
                break
            test.update(by_person[persons[int(index)]])
    return ["test" if index in test else "train" for index in range(len(people))]


def number_of(name: str, split: str) -> int:
    """The number that a face is called by."""
    digits = name.removesuffix(".jpg")
    if not digits.isdigit():
        raise InputError(f"{name} is no number of CelebA, by which --split {split} goes: use --split random")
    return int(digits)


def by_partition(tree: Tree) -> Callable[[Face], str | None]:
    """CelebA's partition; of CelebA-HQ by the file of CelebA that a face comes from."""
    listed, originals = read_pairs(tree, "list_eval_partition.txt", "a file and 0, 1 or 2"), read_mapping(tree)
    names = {"0": "train", "1": "validation", "2": "test"}

    def of(face: Face) -> str | None:
        file = face.name + ".jpg"
        if face.canvas is None:  # CelebA-HQ counts its faces anew
            if not originals:
                raise InputError("--split celeba of CelebA-HQ needs CelebA-HQ-to-CelebA-mapping.txt in the source")
            file = originals.get(str(number_of(face.name, "celeba")), "")
        if listed:
            return names.get(listed.get(file, ""))
        number = number_of(file, "celeba") if file else 0
        return "test" if number >= TEST else "validation" if number >= VALIDATION else "train" if number else None

    return of


def by_number(tree: Tree) -> Callable[[Face], str | None]:
    """Face-MoGLE's split of CelebA-HQ."""

    def of(face: Face) -> str | None:
        number = number_of(face.name, "face_mogle")
        return "train" if number < 27000 else "test" if number < 30000 else None

    return of


def by_lists(tree: Tree) -> Callable[[Face], str | None]:
    """Multi-Modal-CelebA-HQ's pickled lists."""
    found: dict[str, str] = {}
    for split, names in PICKLES.items():
        file = next((tree.file(name) for name in names if tree.file(name)), None)
        nested = [tree.file(f"{folder}/filenames.pickle") for folder in tree.folders if folder.endswith(f"/{split}")]
        file = file or next((given for given in nested if given), None)
        if file is None:
            raise InputError(
                f"--split mm_celeba needs {names[0]} in the source: get it with the data set, or use another split"
            )
        for name in read_list(content_of(file), name_of(file)):
            stem = name.rpartition("/")[2].split(".")[0]
            found[stem.lstrip("0") or "0"] = split
    return lambda face: found.get(face.name.lstrip("0") or "0")


RULES: dict[str, Callable[[Tree], Callable[[Face], str | None]]] = {
    "given": lambda tree: lambda face: face.split or "train",
    "none": lambda tree: lambda face: "train",
    "celeba": by_partition,
    "face_mogle": by_number,
    "mm_celeba": by_lists,
}


class ListsOnly(pickle.Unpickler):
    """Reads a pickle of plain lists, strings and numbers: anything that names a class or function is refused."""

    def find_class(self, module: str, name: str) -> None:
        raise pickle.UnpicklingError(f"it names {module}.{name}")

    def persistent_load(self, pid: object) -> None:
        raise pickle.UnpicklingError("it refers to other objects")


def read_list(content: bytes, name: str) -> list[str]:
    """A pickled list of strings. Raises `InputError` where it is, or could be, anything else."""
    try:
        found = ListsOnly(io.BytesIO(content), encoding="latin1").load()
    except Exception as error:  # a broken pickle raises nearly anything
        raise InputError(f"{name} is no plain list of file names ({str(error)[:80]}): do not trust it") from error
    if not isinstance(found, list) or not all(isinstance(entry, str) for entry in found):
        raise InputError(f"{name} is no plain list of file names: do not trust it")
    return found
