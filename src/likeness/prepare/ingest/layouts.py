"""FFHQ, Face-MoGLE, MMFace-DiT, plain folders and Hugging Face's imagefolder.

Each layout is one function from the files of a source to its faces; it opens lists, never pictures.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np

from likeness.conditions import CONDITIONS
from likeness.data.folder import METADATA, column_of
from likeness.prepare.faults import BEFORE
from likeness.prepare.ingest.face import Face, Faces, File, Skipped, face_of_row, json_of, lines_of, parse_json, text_of
from likeness.prepare.ingest.tree import PICTURES, Tree, check_inside, depth, join
from likeness.types import InputError

SPLIT_NAMES = {
    **dict.fromkeys(("train", "training"), "train"),
    **dict.fromkeys(("val", "valid", "validation", "dev"), "validation"),
    **dict.fromkeys(("test", "testing"), "test"),
}
"""Name of a split as sources have it -> ours."""


def rank(split: str) -> int:
    """Sorts splits: train, validation, test."""
    return list(dict.fromkeys(SPLIT_NAMES.values())).index(split)


FFHQ_FOLDERS = ("images1024x1024", "thumbnails128x128")
FFHQ_METADATA = ("ffhq-dataset-v2.json", "ffhq-dataset-v1.json")
FFHQ_COLUMNS = ("photo_url", "author", "license", "license_url")
"""What is kept of the origin of each picture: its licence may ask for credit."""


def ffhq(tree: Tree) -> Faces:
    """FFHQ: `images1024x1024/00000/00000.png` (or the thumbnails) and `ffhq-dataset-v2.json`, where it is there.

    The 68 landmarks of the metadata become keypoints; category, origin and licence stay with each picture.
    """
    top = ffhq_folder(tree)
    if top is None:
        raise InputError(f"{tree.root} has no folder {' or '.join(FFHQ_FOLDERS)}: give FFHQ's official folder")
    metadata = read_ffhq(tree.find(*FFHQ_METADATA))
    for folder in tree.below(top):
        for stem, path in tree.pictures(folder).items():
            known = metadata.get(stem.lstrip("0") or "0", {})
            picture = tree.file(path)
            assert picture is not None
            points = known.get("points")
            yield Face(
                name=stem,
                picture=picture,
                keypoints=None
                if points is None
                else {"points": points.astype(float).round(2).tolist(), "size": known["size"]},
                split=SPLIT_NAMES.get(known.get("category", "")),
                more=known.get("origin", {}),
            )


def ffhq_folder(tree: Tree) -> str | None:
    """The folder that holds FFHQ's pictures, in folders of a thousand."""
    for name in FFHQ_FOLDERS:
        for folder in sorted(tree.folders, key=depth):
            parts = folder.split("/")
            if name in parts:
                return "/".join(parts[: parts.index(name) + 1])
    return None


def read_ffhq(file: File | None) -> dict[str, dict[str, Any]]:
    """Number -> what is kept of FFHQ's metadata. Its 255 MB are decoded bit by bit: whole, they would be gigabytes."""
    found: dict[str, dict[str, Any]] = {}
    if file is None:
        return found
    text = text_of(file)
    decode = json.JSONDecoder().raw_decode
    spaces = lambda at: at + len(text[at : at + 80]) - len(text[at : at + 80].lstrip())  # noqa: E731
    try:
        at = spaces(text.index("{") + 1)
        while text[at] != "}":
            number, at = decode(text, at)
            entry, at = decode(text, spaces(text.index(":", at) + 1))
            image, origin = entry.get("image", {}), entry.get("metadata", {})
            points = image.get("face_landmarks")
            found[number] = {
                "category": entry.get("category", ""),
                "origin": {key: origin[key] for key in FFHQ_COLUMNS if key in origin},
                "points": None if points is None else np.array(points, dtype=np.float32).round(2),
                "size": image.get("pixel_size", [1024, 1024]),
            }
            at = spaces(at)
            at = spaces(at + 1) if text[at] == "," else at
    except (ValueError, IndexError, AttributeError, TypeError) as error:
        raise InputError(f"{FFHQ_METADATA[0]} is not FFHQ's metadata ({str(error)[:80]}): download it again") from error
    return found


def face_mogle(tree: Tree) -> Faces:
    """Face-MoGLE's releases, packed or not: `face/0.jpg`, `mask/0.png`, and `text.json` or `text/0.txt`."""
    folder = tree.folder("face")
    pictures = tree.pictures(folder)
    if not pictures:
        raise InputError(f"{tree.root} has no pictures in a folder face or an archive face.zip")
    found = tree.find("text.json")
    texts = json_of(found) if found else {}
    if not isinstance(texts, dict):
        raise InputError(f"{tree.root / 'text.json'} must hold the captions of each picture by its file name")
    masks, words = tree.pictures(tree.folder("mask"), (".png",)), tree.pictures(tree.folder("text"), (".txt",))
    for stem, path in pictures.items():
        captions = texts.get(path.rpartition("/")[2]) or texts.get(stem)
        listed = {"text": captions} if captions else {}
        picture, text = tree.file(path), tree.file(words.get(stem, ""))
        yield from row_or_reason(
            listed,
            name=stem,
            picture=picture,
            mask=tree.file(masks.get(stem, "")),
            **({"captions": partial(lines_of, text)} if text and not listed else {}),
        )


def row_or_reason(row: dict[str, Any], **files: Any) -> Faces:
    """A face of a row, or why it cannot be one."""
    captions = files.pop("captions", None)
    try:
        face = face_of_row(row, **files)
    except InputError as error:
        yield Skipped(join(files.get("split") or "", files["name"]), str(error))
        return
    yield face if captions is None else replace(face, captions=captions)


def mmface_dit(tree: Tree) -> Faces:
    """MMFace-DiT: `train|test/{images,masks,sketches}/0.png` with `Celeb_Captions_Final/0.txt`, and FFHQ likewise.

    FFHQ's part is `images1024x1024`, `FFHQ/Masks_Colored_1024`, `FFHQ/sketches` and `FFHQ_Captions_Final`; its faces
    are called ffhq_00000.
    """
    roots = mmface_dit_roots(tree)
    words = tree.pictures(tree.folder("Celeb_Captions_Final", "captions", "text"), (".txt",))
    for root in roots:
        yield from beside(tree, root, words, SPLIT_NAMES[root.rpartition("/")[2]])
    top = ffhq_folder(tree)
    if top is not None and tree.folder("FFHQ_Captions_Final"):
        words = tree.pictures(tree.folder("FFHQ_Captions_Final"), (".txt",))
        masks = tree.pictures(next((f for f in tree.folders if f.split("/")[-1].startswith("Masks_Colored")), None))
        sketches = tree.pictures(tree.folder("FFHQ/sketches"))
        for folder in tree.below(top):
            for stem, path in tree.pictures(folder).items():
                yield face_beside(tree, stem, path, masks, sketches, words, None, f"ffhq_{stem}")


def mmface_dit_roots(tree: Tree) -> list[str]:
    """The folders that hold `images` beside `masks` or `sketches` and are called as a split."""
    return sorted(
        root
        for root in (folder.removesuffix("/images") for folder in tree.folders if folder.endswith("/images"))
        if root.rpartition("/")[2] in SPLIT_NAMES
        and (join(root, "masks") in tree.folders or join(root, "sketches") in tree.folders)
        and METADATA not in tree.folders.get(root, {})
    )


def beside(tree: Tree, root: str, words: dict[str, str], split: str | None) -> Iterator[Face]:
    """The pictures of `root/images` with what lies beside them under the same name."""
    masks, sketches = tree.pictures(join(root, "masks")), tree.pictures(join(root, "sketches"))
    own = tree.pictures(join(root, "captions"), (".txt",)) or tree.pictures(join(root, "text"), (".txt",)) or words
    for stem, path in tree.pictures(join(root, "images")).items():
        yield face_beside(tree, stem, path, masks, sketches, own, split, stem)


def face_beside(
    tree: Tree,
    stem: str,
    path: str,
    masks: dict[str, str],
    sketches: dict[str, str],
    words: dict[str, str],
    split: str | None,
    name: str,
) -> Face:
    """A picture with mask, sketch and captions of the same stem."""
    picture, text = tree.file(path), tree.file(words.get(stem, ""))
    assert picture is not None
    captions: Callable[[], Any] = partial(lines_of, text) if text else tuple
    mask, sketch = tree.file(masks.get(stem, "")), tree.file(sketches.get(stem, ""))
    return Face(name=name, picture=picture, mask=mask, sketch=sketch, captions=captions, split=split)


def folder(tree: Tree) -> Faces:
    """Pictures in any folders; captions, one a line, in a text file of the same name beside each."""
    for place in sorted(tree.folders):
        words = tree.pictures(place, (".txt",))
        for path in sorted(tree.folders[place]):
            stem = path.rpartition(".")[0]
            if not path.lower().endswith(PICTURES):
                continue
            picture, text = tree.file(join(place, path)), tree.file(words.get(stem, ""))
            assert picture is not None
            top, _, rest = place.partition("/")
            split = SPLIT_NAMES.get(top)
            yield Face(
                name="_".join(part for part in (*(rest if split else place).split("/"), stem) if part),
                picture=picture,
                captions=partial(lines_of, text) if text else tuple,
                split=split,
            )


def imagefolder(tree: Tree) -> Faces:
    """Hugging Face's imagefolder: `metadata.jsonl` beside the pictures, at the top or in a folder a split.

    Columns are `file_name`, `mask_file_name`, `sketch_file_name`, `keypoints_file_name` (or `keypoints` as a value),
    `text` (a string or a list), `attributes`, `identity`; others are kept as they are, other files left out.
    """
    places = metadata_folders(tree)
    if not places:
        raise InputError(f"{tree.root} has no {METADATA}, nor has a folder in it")
    for place in places:
        split = SPLIT_NAMES.get(place.split("/")[-1])
        told: set[str] = set()
        for number, line in enumerate(tree.lines(join(place, METADATA)), start=1):
            if line.strip():
                yield from face_of_line(tree, place, number, line, split, told)


def metadata_folders(tree: Tree) -> list[str]:
    """The folders with a `metadata.jsonl`: the top, or right below it; not what was kept when the data was mended."""
    found = [folder for folder, names in tree.folders.items() if METADATA in names and "/" not in folder]
    return sorted({*found} - {BEFORE}, key=lambda folder: (rank(SPLIT_NAMES.get(folder, "train")), folder))


def face_of_line(tree: Tree, place: str, number: int, line: bytes, split: str | None, told: set[str]) -> Faces:
    """The face of one line of metadata, and what has to be left out of it."""
    where = f"{tree.root / place / METADATA}, line {number}"
    row = parse_json(line, where)
    if not isinstance(row, dict) or not isinstance(row.get("file_name"), str):
        raise InputError(f"{where}: every row needs a file_name")
    files: dict[str, File | None] = {}
    for column, name in row.items():
        if column != "file_name" and not column.endswith("_file_name"):
            continue
        condition = column.removesuffix("_file_name") if column != "file_name" else "picture"
        if condition not in ("picture", *CONDITIONS):
            if column not in told:
                told.add(column)
                yield Skipped(f"column {column}", f"no condition is called {condition}")
        elif isinstance(name, str):
            files[condition] = tree.file(join(place, check_inside(name, where)))
            if files[condition] is None and condition != "picture":
                yield Skipped(
                    join(place, name), f"{column_of(condition)} of line {number} names it, but it is not there"
                )
    if files["picture"] is None:
        yield Skipped(join(place, row["file_name"]), f"line {number} of {METADATA} names it, but it is not there")
        return
    stem = check_inside(row["file_name"], where).rpartition(".")[0].removeprefix("images/")
    yield from row_or_reason(row, name=stem.replace("/", "_"), split=split, **files)
