"""Dataset formats: how to read and detect each one, and its licence.

Every format is one function from the files of a source to its faces. It reads lists, but no images. A format is
detected only if no other one matches.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np

from likeness.conditions import CONDITIONS
from likeness.data.folder import METADATA, ORIGINALS, column_of
from likeness.prepare.ingest.celeba import (
    HQ_CAPTIONS,
    HQ_IMAGES,
    HQ_MASKS,
    HQ_PARTS,
    celeba,
    celebamask,
    matching_faces,
    mm_celeba,
)
from likeness.prepare.ingest.face import (
    SPLIT_NAMES,
    Face,
    Faces,
    File,
    Skipped,
    json_of,
    lines_of,
    parse_json,
    split_order,
    text_of,
    with_row,
)
from likeness.prepare.ingest.shards import parquet, webdataset
from likeness.prepare.ingest.source import IMAGES, Source, check_inside, depth, join
from likeness.types import InputError

FFHQ_FOLDERS = ("images1024x1024", "thumbnails128x128")
FFHQ_METADATA = ("ffhq-dataset-v2.json", "ffhq-dataset-v1.json")
FFHQ_COLUMNS = ("photo_url", "author", "license", "license_url")
"""Columns to keep for each image: its licence may require attribution."""


def ffhq(source: Source) -> Faces:
    """FFHQ: `images1024x1024/00000/00000.png` (or the thumbnails) and optionally `ffhq-dataset-v2.json`.

    The 68 landmarks become keypoints; split, origin and licence are kept for each image.
    """
    top = ffhq_folder(source)
    if top is None:
        raise InputError(f"{source.root} has no folder {' or '.join(FFHQ_FOLDERS)}: give FFHQ's official folder")
    metadata = read_ffhq(source.find(*FFHQ_METADATA))
    for folder in source.below(top):
        for stem, path in source.images(folder).items():
            known = metadata.get(stem.lstrip("0") or "0", {})
            points = known.get("points")
            if points is not None:
                points = {"points": points.astype(float).round(2).tolist(), "size": known["size"]}
            yield Face(
                name=stem,
                image=source.existing_file(path),
                keypoints=points,
                split=SPLIT_NAMES.get(known.get("category", "")),
                more=known.get("origin", {}),
            )


def ffhq_folder(source: Source) -> str | None:
    """Find the folder with FFHQ's images, which are in subfolders of a thousand."""
    for name in FFHQ_FOLDERS:
        for folder in sorted(source.folders, key=depth):
            parts = folder.split("/")
            if name in parts:
                return "/".join(parts[: parts.index(name) + 1])
    return None


def read_ffhq(file: File | None) -> dict[str, dict[str, Any]]:
    """Read number -> entry of FFHQ's metadata. Entries are decoded one at a time: all 255 MB would take gigabytes."""
    found: dict[str, dict[str, Any]] = {}
    if file is None:
        return found
    text = text_of(file)
    decode = json.JSONDecoder().raw_decode
    skip_spaces = lambda at: at + len(text[at : at + 80]) - len(text[at : at + 80].lstrip())  # noqa: E731
    try:
        at = skip_spaces(text.index("{") + 1)
        while text[at] != "}":
            number, at = decode(text, at)
            entry, at = decode(text, skip_spaces(text.index(":", at) + 1))
            image, origin = entry.get("image", {}), entry.get("metadata", {})
            points = image.get("face_landmarks")
            found[number] = {
                "category": entry.get("category", ""),
                "origin": {key: origin[key] for key in FFHQ_COLUMNS if key in origin},
                "points": None if points is None else np.array(points, dtype=np.float32).round(2),
                "size": image.get("pixel_size", [1024, 1024]),
            }
            at = skip_spaces(at)
            at = skip_spaces(at + 1) if text[at] == "," else at
    except (ValueError, IndexError, AttributeError, TypeError) as error:
        raise InputError(f"{FFHQ_METADATA[0]} is not FFHQ's metadata ({str(error)[:80]}): download it again") from error
    return found


def face_mogle(source: Source) -> Faces:
    """Face-MoGLE's releases, packed or not: `face/0.jpg`, `mask/0.png`, and `text.json` or `text/0.txt`."""
    images = source.images(source.folder("face"))
    if not images:
        raise InputError(f"{source.root} has no images in a folder face or an archive face.zip")
    listed = source.find("text.json")
    texts = json_of(listed) if listed else {}
    if not isinstance(texts, dict):
        raise InputError(f"{source.root / 'text.json'} must contain the captions of each image by its file name")
    masks, captions = source.images(source.folder("mask"), (".png",)), source.texts(source.folder("text"))
    for face in matching_faces(source, images, masks, {}, captions):
        own = texts.get(images[face.name].rpartition("/")[2]) or texts.get(face.name)
        yield with_row(face, {"text": own}) if own else face


def mmface_dit(source: Source) -> Faces:
    """MMFace-DiT: `train|test/{images,masks,sketches}/0.png` with `Celeb_Captions_Final/0.txt`, and FFHQ.

    FFHQ's part is `images1024x1024`, `FFHQ/Masks_Colored_1024`, `FFHQ/sketches` and `FFHQ_Captions_Final`; the names of
    its faces begin with ffhq_.
    """
    shared = source.texts(source.folder("Celeb_Captions_Final", "captions", "text"))
    for root in mmface_dit_splits(source):
        images, masks, sketches = (source.images(join(root, name)) for name in ("images", "masks", "sketches"))
        captions = source.texts(join(root, "captions")) or source.texts(join(root, "text")) or shared
        split = SPLIT_NAMES[root.rpartition("/")[2]]
        yield from matching_faces(source, images, masks, sketches, captions, split=split)
    top = ffhq_folder(source)
    if top is not None and source.folder("FFHQ_Captions_Final"):
        captions = source.texts(source.folder("FFHQ_Captions_Final"))
        masks = next((name for name in source.folders if name.split("/")[-1].startswith("Masks_Colored")), None)
        masks, sketches = source.images(masks), source.images(source.folder("FFHQ/sketches"))
        for folder in source.below(top):
            yield from matching_faces(source, source.images(folder), masks, sketches, captions, prefix="ffhq_")


def mmface_dit_splits(source: Source) -> list[str]:
    """Find folders that are named like a split and contain `images` and `masks` or `sketches`."""
    return sorted(
        root
        for root in (folder.removesuffix("/images") for folder in source.folders if folder.endswith("/images"))
        if root.rpartition("/")[2] in SPLIT_NAMES
        and (join(root, "masks") in source.folders or join(root, "sketches") in source.folders)
        and METADATA not in source.folders.get(root, {})
    )


def folder(source: Source) -> Faces:
    """Images in any folders, with captions, one per line, in a text file of the same name."""
    for place in sorted(source.folders):
        texts = source.texts(place)
        for name in sorted(source.folders[place]):
            stem = name.rpartition(".")[0]
            if not name.lower().endswith(IMAGES):
                continue
            text = source.file(texts.get(stem, ""))
            top, _, rest = place.partition("/")
            split = SPLIT_NAMES.get(top)
            yield Face(
                name="_".join(part for part in (*(rest if split else place).split("/"), stem) if part),
                image=source.existing_file(join(place, name)),
                captions=partial(lines_of, text) if text else tuple,
                split=split,
            )


def imagefolder(source: Source) -> Faces:
    """Hugging Face's imagefolder: `metadata.jsonl` next to the images, in the root or in a folder per split.

    Columns are `file_name`, `mask_file_name`, `sketch_file_name`, `keypoints_file_name` (or `keypoints` as a value),
    `text` (a string or a list), `attributes`, `identity`; other columns are kept, other files are ignored.
    """
    places = metadata_folders(source)
    if not places:
        raise InputError(f"{source.root} has no {METADATA} and no folder with one")
    for place in places:
        split = SPLIT_NAMES.get(place.split("/")[-1])
        unknown: set[str] = set()
        for number, line in enumerate(source.lines(join(place, METADATA)), start=1):
            if line.strip():
                yield from face_of_line(source, place, number, line, split, unknown)


def metadata_folders(source: Source) -> list[str]:
    """Find the folders with `metadata.jsonl`, the root or directly below it, without `ORIGINALS`."""
    found = [folder for folder, names in source.folders.items() if METADATA in names and "/" not in folder]
    return sorted({*found} - {ORIGINALS}, key=lambda folder: (split_order(SPLIT_NAMES.get(folder, "train")), folder))


def face_of_line(source: Source, place: str, number: int, line: bytes, split: str | None, unknown: set[str]) -> Faces:
    """Yield the face of one line of metadata, and the files that must be skipped.

    Args:
        source: the source.
        place: folder of the metadata.
        number: line number.
        line: the line.
        split: split of the face.
        unknown: unknown file columns, reported once.
    """
    where = f"{source.root / place / METADATA}, line {number}"
    row = parse_json(line, where)
    if not isinstance(row, dict) or not isinstance(row.get("file_name"), str):
        raise InputError(f"{where}: every row needs a file_name")
    conditions: dict[str, Any] = {}
    for column, name in row.items():
        if not column.endswith("_file_name"):
            continue
        condition = column.removesuffix("_file_name")
        if condition not in CONDITIONS:
            if column not in unknown:
                unknown.add(column)
                yield Skipped(f"column {column}", f"unknown condition {condition}")
        elif isinstance(name, str):
            conditions[condition] = source.file(join(place, check_inside(name, where)))
            if conditions[condition] is None:
                yield Skipped(join(place, name), f"{column_of(condition)} of line {number} does not exist")
    name = check_inside(row["file_name"], where)
    image = source.file(join(place, name))
    if image is None:
        yield Skipped(join(place, row["file_name"]), f"the image of line {number} of {METADATA} does not exist")
        return
    stem = name.rpartition(".")[0].removeprefix("images/")
    yield with_row(Face(name=stem.replace("/", "_"), image=image, split=split, **conditions), row)


HQ_TERMS = "non-commercial research only, no redistribution of images or of derived data"
UNKNOWN_TERMS = "not stated by this format: ask the owners of the images"


@dataclass(frozen=True, kw_only=True)
class Format:
    """One dataset format."""

    read: Callable[[Source], Faces]
    matches: Callable[[Source], bool]
    """Whether a source has this format."""
    files: str
    """The files by which it is detected."""
    split: str = "given"
    """Default split, one of `splits.SPLITS`."""
    licence: str = UNKNOWN_TERMS
    """Terms of the publishers, as in MODEL_LICENSES.md."""
    licence_source: str = ""
    """Where the publishers state them."""


def has_hq(source: Source) -> bool:
    """Whether there are CelebA-HQ's images: its own folder, or `images` with masks in the root and no metadata."""
    return source.folder(HQ_IMAGES[0]) is not None or (
        METADATA not in source.folders.get("", {})
        and any(name in source.folders for name in HQ_IMAGES[1:])
        and (
            any(HQ_PARTS in folder.split("/") for folder in source.folders)
            or any(name in source.folders for name in HQ_MASKS)
        )
    )


def has_hq_captions(source: Source) -> bool:
    return source.folder(HQ_CAPTIONS[0]) is not None or HQ_CAPTIONS[1] in source.folders


def has_suffix(source: Source, suffix: str) -> bool:
    return any(name.endswith(suffix) for names in source.folders.values() for name in names)


def has_images(source: Source) -> bool:
    """Whether there are images in the root or in folders named like splits."""
    tops = [names for folder, names in source.folders.items() if folder == "" or folder in SPLIT_NAMES]
    return any(name.lower().endswith(IMAGES) for names in tops for name in names)


FORMATS: dict[str, Format] = {
    "celeba": Format(
        read=celeba,
        matches=lambda source: (
            source.find("list_attr_celeba.txt") is not None and source.folder("img_align_celeba") is not None
        ),
        files="img_align_celeba and list_attr_celeba.txt",
        split="person",
        licence="non-commercial research only",
        licence_source="the agreement on CelebA's page, mmlab.ie.cuhk.edu.hk/projects/CelebA.html",
    ),
    "celebamask": Format(
        read=celebamask,
        matches=lambda source: has_hq(source) and not has_hq_captions(source),
        files="CelebA-HQ-img or images, with part masks or whole masks",
        split="random",
        licence=HQ_TERMS,
        licence_source="README of github.com/switchablenorms/CelebAMask-HQ",
    ),
    "mm_celeba": Format(
        read=mm_celeba,
        matches=lambda source: (
            has_hq_captions(source) and (has_hq(source) or any(name in source.folders for name in HQ_IMAGES[1:]))
        ),
        files="CelebA-HQ-img or images, with celeba-caption or text",
        split="mm_celeba",
        licence=HQ_TERMS,
        licence_source="README of github.com/IIGROUP/MM-CelebA-HQ-Dataset",
    ),
    "ffhq": Format(
        read=ffhq,
        matches=lambda source: ffhq_folder(source) is not None and source.folder("FFHQ_Captions_Final") is None,
        files="images1024x1024 or thumbnails128x128",
        licence="dataset CC BY-NC-SA 4.0, each image under its own licence (in its row); not for face recognition",
        licence_source="README of github.com/NVlabs/ffhq-dataset",
    ),
    "face_mogle": Format(
        read=face_mogle,
        matches=lambda source: (
            "face" in source.folders and ("mask" in source.folders or has_suffix(source, "text.json"))
        ),
        files="face with mask or text.json",
        split="face_mogle",
        licence=f"derived from CelebA-HQ, FFHQ or FairFace, whose terms apply; of MM-CelebA-HQ: {HQ_TERMS}",
        licence_source="README of github.com/XavierJiezou/Face-MoGLE and of the datasets it is derived from",
    ),
    "mmface_dit": Format(
        read=mmface_dit,
        matches=lambda source: bool(mmface_dit_splits(source)) or source.folder("FFHQ_Captions_Final") is not None,
        files="train or test with images and masks or sketches",
        licence=f"derived from CelebA-HQ and FFHQ, whose terms apply: {HQ_TERMS}; FFHQ CC BY-NC-SA 4.0",
        licence_source="README of the MMFace-DiT code (arXiv 2603.29029) and of the datasets it is derived from",
    ),
    "imagefolder": Format(
        read=imagefolder, matches=lambda source: bool(metadata_folders(source)), files="metadata.jsonl"
    ),
    "parquet": Format(read=parquet, matches=lambda source: has_suffix(source, ".parquet"), files="*.parquet"),
    "webdataset": Format(read=webdataset, matches=lambda source: has_suffix(source, ".tar"), files="*.tar"),
    "folder": Format(read=folder, matches=has_images, files="images in the root or in train, validation and test"),
}
"""Name -> format, as in `likeness prepare ingest --format`."""


def detect_format(source: Source) -> str:
    """Return the only format that matches a source; `folder` only if no other one does.

    Raises:
        InputError: none or several formats match.
    """
    found = [name for name, format in FORMATS.items() if name != "folder" and format.matches(source)]
    if not found and FORMATS["folder"].matches(source):
        found = ["folder"]
    if len(found) > 1:
        candidates = " and ".join(f"{name} ({FORMATS[name].files})" for name in found)
        raise InputError(f"{source.root} could be {candidates}: choose one with --format")
    if not found:
        count = sum(name.lower().endswith(IMAGES) for names in source.folders.values() for name in names)
        hint = f"--format folder imports the {count} images in its folders" if count else "it contains no images"
        raise InputError(f"{source.root} has no known dataset format ({', '.join(FORMATS)}): {hint}")
    return found[0]
