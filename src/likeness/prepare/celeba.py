"""CelebA and CelebAMask-HQ in their official layouts to prepared folders, with one geometry for all faces.

The crop (9, 36, 169, 196) of CelebA's aligned 178x218 files frames a face as CelebA-HQ does, within a few pixels.
CelebA is split by person, so that nobody is both learnt from and measured; CelebAMask-HQ gives its hand-made masks,
with exchanged sides put right.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from likeness.annotators.sketch import extract_sketch
from likeness.conditions import CONDITIONS, doctor
from likeness.conditions.pictures import png_bytes
from likeness.data.folder import METADATA, column_of
from likeness.files import write_whole
from likeness.prepare.captions import write_captions
from likeness.types import InputError

CROP = (9, 36, 169, 196)
"""Left, top, right and bottom of the square in CelebA's aligned files that has CelebA-HQ's framing."""

ALIGNED = (178, 218)
"""Width and height of CelebA's aligned files."""

Progress = Callable[[int, int], None]


def prepare_celeba(
    source: Path, out: Path, *, size: int = 128, held_out: int = 1000, seed: int = 0, progress: Progress | None = None
) -> dict[str, Any]:
    """Write `out/train` and `out/test` from CelebA's official layout.

    Args:
        source: folder with `img_align_celeba/`, `list_attr_celeba.txt` and `identity_CelebA.txt`.
        out: folder to write; run again to go on after an interruption.
        size: pixels a side.
        held_out: faces kept for measuring, at least: whole persons, drawn by `seed`.
        seed: seed of the split and of the captions.
        progress: called as (faces done, faces in all).

    Returns:
        Counts of `train`, `test` and `skipped`, and the skipped files with the reason.

    Raises:
        InputError: the layout is not CelebA's, or attributes and identities do not match.
    """
    attributes = read_attributes(source / "list_attr_celeba.txt")
    identities = read_identities(source / "identity_CelebA.txt")
    pictures = sorted((source / "img_align_celeba").glob("*.jpg"))
    if not pictures:
        raise InputError(f"{source / 'img_align_celeba'} holds no .jpg files: give CelebA's official folder")
    known = [path for path in pictures if path.name in attributes and path.name in identities]
    skipped = {p.name: "no attributes or no identity" for p in pictures if p not in set(known)}
    if len(known) <= held_out:
        raise InputError(f"{source} has {len(known)} complete faces; {held_out} are to be held out: ask for fewer")
    test = split_by_person([path.name for path in known], identities, held_out, seed)

    def one(number: int, path: Path) -> tuple[str, dict[str, Any]] | str:
        split = "test" if path.name in test else "train"
        try:
            picture = read_aligned(path, size)
        except (OSError, ValueError) as error:
            return f"{path.name}: {error}"
        name = path.with_suffix(".png").name
        save(out / split / "images" / name, lambda: Image.fromarray(picture))
        save(out / split / "sketches" / name, lambda: Image.fromarray(extract_sketch(picture)))
        rng = np.random.default_rng([seed, int(path.stem) if path.stem.isdigit() else number])
        return split, {
            "file_name": f"images/{name}",
            column_of("sketch"): f"sketches/{name}",
            "text": list(write_captions(attributes[path.name], rng)),
            "attributes": attributes[path.name],
            "identity": identities[path.name],
        }

    found = finish(known, one, out, progress)
    skipped |= dict(line.split(": ", 1) for line in found["failed"])
    return {"train": found["train"], "test": found["test"], "skipped": skipped}


def prepare_celebamask(
    source: Path, out: Path, *, size: int = 128, held_out: int = 80, seed: int = 0, progress: Progress | None = None
) -> dict[str, Any]:
    """Write `out/train` and `out/test` from `images/*.jpg` and `masks/*.png` of CelebAMask-HQ.

    Args:
        source: folder with `images/` and `masks/`, paired by name.
        out: folder to write.
        size: pixels a side of the pictures; masks keep their own size.
        held_out: pairs kept for measuring, drawn by `seed`.
        seed: seed of the split.
        progress: called as (faces done, faces in all).

    Returns:
        Counts of `train`, `test`, `repaired` (masks whose sides were exchanged) and `skipped`.
    """
    masks = sorted((source / "masks").glob("*.png"))
    pairs = [path for path in masks if (source / "images" / f"{path.stem}.jpg").is_file()]
    if len(pairs) <= held_out:
        raise InputError(
            f"{source} has {len(pairs)} pairs of images/*.jpg and masks/*.png; it needs more than {held_out}"
        )
    order = np.random.default_rng(seed).permutation(len(pairs))
    test = {pairs[int(index)].name for index in order[:held_out]}
    repaired: list[str] = []

    def one(number: int, path: Path) -> tuple[str, dict[str, Any]] | str:
        split = "test" if path.name in test else "train"
        try:
            report = doctor.inspect(path, "mask")
            picture = Image.open(source / "images" / f"{path.stem}.jpg").convert("RGB")
            picture = picture.resize((size, size), Image.Resampling.LANCZOS)
        except (OSError, ValueError) as error:
            return f"{path.name}: {error}"
        file = out / split / "masks" / path.name
        file.parent.mkdir(parents=True, exist_ok=True)
        doctor.fix(report, file)
        if not np.array_equal(CONDITIONS["mask"].read(file).raw, report.raw):
            repaired.append(path.name)
        save(out / split / "images" / path.name, lambda: picture)
        return split, {"file_name": f"images/{path.name}", column_of("mask"): f"masks/{path.name}"}

    found = finish(pairs, one, out, progress)
    skipped = dict(line.split(": ", 1) for line in found["failed"])
    return {"train": found["train"], "test": found["test"], "repaired": len(repaired), "skipped": skipped}


def finish(
    paths: list[Path],
    one: Callable[[int, Path], tuple[str, dict[str, Any]] | str],
    out: Path,
    progress: Progress | None,
) -> dict[str, Any]:
    """Prepare all faces by two threads, in order, and write each split's metadata last."""
    rows: dict[str, list[dict[str, Any]]] = {"train": [], "test": []}
    failed: list[str] = []
    try:
        out.mkdir(parents=True, exist_ok=True)
        with ThreadPoolExecutor(2) as pool:
            for done, result in enumerate(pool.map(one, range(len(paths)), paths), start=1):
                if isinstance(result, str):
                    failed.append(result)
                else:
                    rows[result[0]].append(result[1])
                if progress is not None:
                    progress(done, len(paths))
    except OSError as error:
        raise InputError(f"cannot write {out}: {error.strerror or error}") from error
    for split, found in rows.items():
        (out / split).mkdir(exist_ok=True)
        write_whole(out / split / METADATA, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in found))
    return {"train": len(rows["train"]), "test": len(rows["test"]), "failed": failed}


def read_attributes(path: Path) -> dict[str, dict[str, bool]]:
    """CelebA's `list_attr_celeba.txt`: a count, a header of names, then `file 1/-1 ...`."""
    lines = read_lines(path)
    names = lines[1].split() if len(lines) > 1 else []
    if not lines or not lines[0].strip().isdigit() or "Male" not in names:
        raise InputError(f"{path} is not CelebA's attribute list: it must begin with a count and a line of names")
    found = {}
    for number, line in enumerate(lines[2:], start=3):
        file, *values = line.split()
        if len(values) != len(names) or set(values) - {"1", "-1"}:
            raise InputError(f"{path}, line {number}: {len(names)} values of 1 or -1 were expected for {file}")
        found[file] = {name: value == "1" for name, value in zip(names, values, strict=True)}
    return found


def read_identities(path: Path) -> dict[str, str]:
    """CelebA's `identity_CelebA.txt`: `file identity` lines."""
    found = {}
    for number, line in enumerate(read_lines(path), start=1):
        words = line.split()
        if len(words) != 2:
            raise InputError(f"{path}, line {number}: a file and an identity were expected, not {line[:60]!r}")
        found[words[0]] = words[1]
    return found


def read_lines(path: Path) -> list[str]:
    """The lines of a text file that hold anything."""
    try:
        return [line for line in path.read_text().splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path} cannot be read: {getattr(error, 'strerror', None) or error}") from error


def split_by_person(names: Iterable[str], identities: dict[str, str], held_out: int, seed: int) -> set[str]:
    """Files of randomly drawn persons, at least `held_out` of them."""
    by_person: dict[str, list[str]] = {}
    for name in names:
        by_person.setdefault(identities[name], []).append(name)
    persons = sorted(by_person)
    test: set[str] = set()
    for index in np.random.default_rng(seed).permutation(len(persons)):
        if len(test) >= held_out:
            break
        test.update(by_person[persons[int(index)]])
    return test


def read_aligned(path: Path, size: int) -> np.ndarray:
    """An aligned CelebA file, cropped to CelebA-HQ's framing: uint8 [S, S, 3]."""
    with Image.open(path) as image:
        if image.size != ALIGNED:
            raise ValueError(f"it is {image.width}x{image.height}, not CelebA's aligned {ALIGNED[0]}x{ALIGNED[1]}")
        return np.asarray(image.convert("RGB").crop(CROP).resize((size, size), Image.Resampling.LANCZOS))


def save(path: Path, make: Callable[[], Image.Image]) -> None:
    """Make a picture and write it as PNG; one that is there already is left."""
    if not path.is_file():
        write_whole(path, png_bytes(make()))
