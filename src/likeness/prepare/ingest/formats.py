"""Dataset formats: how to read and detect each one, and its licence.

Every format is one function from the files of a source to its faces. It reads lists, but no images. A format is
detected only if no other one matches.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np

from likeness.conditions import CONDITIONS
from likeness.data.folder import METADATA, ORIGINALS, column_of
from likeness.prepare.ingest import celeba
from likeness.prepare.ingest.celeba import HQ_CAPTIONS, HQ_IMAGES, HQ_MASKS, HQ_PARTS, HQ_SKETCHES, matching_faces
from likeness.prepare.ingest.faces import SPLIT_NAMES, SPLIT_ORDER, Entries, Skipped, SourceFace, with_row
from likeness.prepare.ingest.shards import parquet, webdataset
from likeness.prepare.ingest.source import IMAGES, Source, SourceFile, check_inside, join, parse_json
from likeness.types import InputError

FFHQ_FOLDERS = ("images1024x1024", "thumbnails128x128")
FFHQ_COLUMNS = ("photo_url", "author", "license", "license_url")
"""Columns to keep for each image: its licence may require attribution."""
FFHQ_KEYS = ("category", "metadata", "image", "face_landmarks", "pixel_size", *FFHQ_COLUMNS)


def ffhq(source: Source) -> Entries:
    """FFHQ: `images1024x1024/00000/00000.png` (or the thumbnails) and optionally `ffhq-dataset-v2.json`.

    The 68 landmarks become keypoints; split, origin and licence are kept for each image.
    """
    folders = ffhq_folders(source)
    if not folders:
        raise InputError(f"{source.root} has no folder {' or '.join(FFHQ_FOLDERS)}: give FFHQ's official folder")
    metadata = read_ffhq(source.find("ffhq-dataset-v2.json", "ffhq-dataset-v1.json"))
    for folder in folders:
        for stem, path in source.images(folder).items():
            known = metadata.get(stem.lstrip("0") or "0", {})
            image = known.get("image", {})
            points = image.get("face_landmarks")
            if points is not None:
                points = {
                    "points": points.astype(float).round(2).tolist(),
                    "size": image.get("pixel_size", [1024, 1024]),
                }
            yield SourceFace(
                name=stem,
                image=source.existing_file(path),
                conditions={} if points is None else {"keypoints": points},
                split=SPLIT_NAMES.get(known.get("category", "")),
                more=known.get("metadata", {}),
            )


def ffhq_folders(source: Source) -> list[str]:
    """Find the folders with FFHQ's images, which are in subfolders of a thousand."""
    return next(filter(None, map(source.below, FFHQ_FOLDERS)), [])


def read_ffhq(file: SourceFile | None) -> dict[str, dict[str, Any]]:
    """Read number -> entry of FFHQ's metadata. Entries are reduced while parsing: all 255 MB would take gigabytes."""

    def reduce(entry: dict[str, Any]) -> dict[str, Any]:
        kept = {key: value for key, value in entry.items() if key in FFHQ_KEYS or key.isdigit()}
        if "face_landmarks" in kept:
            kept["face_landmarks"] = np.array(kept["face_landmarks"], dtype=np.float32).round(2)
        return kept

    try:
        return parse_json(file.text(), file.name, object_hook=reduce) if file else {}
    except (ValueError, TypeError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(f"{file.name if file else ''} is not FFHQ's metadata: download it again") from error


def face_mogle(source: Source) -> Entries:
    """Face-MoGLE's releases, packed or not: `face/0.jpg`, `mask/0.png`, and `text.json` or `text/0.txt`."""
    images = source.images(source.folder("face"))
    if not images:
        raise InputError(f"{source.root} has no images in a folder face or an archive face.zip")
    listed = source.find("text.json")
    texts = listed.json() if listed else {}
    if not isinstance(texts, dict):
        raise InputError(f"{source.root / 'text.json'} must contain the captions of each image by its file name")
    masks, captions = source.images(source.folder("mask"), (".png",)), source.texts(source.folder("text"))
    for face in matching_faces(source, images, {"mask": masks}, captions):
        own = texts.get(images[face.name].rpartition("/")[2]) or texts.get(face.name)
        yield with_row(face, {"text": own}) if own else face


def mmface_dit(source: Source) -> Entries:
    """MMFace-DiT: `train|test/{images,masks,sketches}/0.png` with `Celeb_Captions_Final/0.txt`, and FFHQ.

    FFHQ's part is `images1024x1024`, `FFHQ/Masks_Colored_1024`, `FFHQ/sketches` and `FFHQ_Captions_Final`; the names of
    its faces begin with ffhq_.
    """
    shared = source.texts(source.folder("Celeb_Captions_Final", "captions", "text"))
    for root in mmface_dit_splits(source):
        images, masks, sketches = (source.images(join(root, name)) for name in ("images", "masks", "sketches"))
        captions = source.texts(join(root, "captions")) or source.texts(join(root, "text")) or shared
        conditions, split = {"mask": masks, "sketch": sketches}, SPLIT_NAMES[root.rpartition("/")[2]]
        yield from matching_faces(source, images, conditions, captions, split=split)
    if captions := source.texts(source.folder("FFHQ_Captions_Final")):
        masks = next((name for name in source.folders if name.split("/")[-1].startswith("Masks_Colored")), None)
        conditions = {"mask": source.images(masks), "sketch": source.images(source.folder("FFHQ/sketches"))}
        for folder in ffhq_folders(source):
            yield from matching_faces(source, source.images(folder), conditions, captions, prefix="ffhq_")


def mmface_dit_splits(source: Source) -> list[str]:
    """Find folders that are named like a split and contain `images` and `masks` or `sketches`."""
    roots = sorted(folder.removesuffix("/images") for folder in source.folders if folder.endswith("/images"))
    return [
        root
        for root in roots
        if root.rpartition("/")[2] in SPLIT_NAMES
        and (join(root, "masks") in source.folders or join(root, "sketches") in source.folders)
        and METADATA not in source.folders.get(root, {})
    ]


def images_in_folders(source: Source) -> Entries:
    """Images in any folders, with captions, one per line, in a text file of the same name."""
    for place in sorted(source.folders):
        texts = source.texts(place)
        top, _, rest = place.partition("/")
        split = SPLIT_NAMES.get(top)
        prefix = (rest if split else place).replace("/", "_")
        for name in sorted(name for name in source.folders[place] if name.lower().endswith(IMAGES)):
            stem = name.rpartition(".")[0]
            text = source.file(texts.get(stem, ""))
            yield SourceFace(
                name=f"{prefix}_{stem}" if prefix else stem,
                image=source.existing_file(join(place, name)),
                captions=text.lines if text else tuple,
                split=split,
            )


def imagefolder(source: Source) -> Entries:
    """Hugging Face's imagefolder: `metadata.jsonl` next to the images, in the root or in a folder per split.

    Columns are `file_name`, `mask_file_name`, `sketch_file_name`, `keypoints_file_name` (or `keypoints` as a value),
    `text` (a string or a list), `attributes`, `identity`; other columns are kept, other files are ignored.
    """
    places = metadata_folders(source)
    if not places:
        raise InputError(f"{source.root} has no {METADATA} and no folder with one")
    for place in places:
        split = SPLIT_NAMES.get(place.split("/")[-1])
        unknown: set[str] = set()  # file columns of unknown conditions, reported once
        for number, line in enumerate(source.lines(join(place, METADATA)), start=1):
            if not line.strip():
                continue
            where = f"{source.root / place / METADATA}, line {number}"
            row = parse_json(line, where)
            if not isinstance(row, dict) or not isinstance(row.get("file_name"), str):
                raise InputError(f"{where}: every row needs a file_name")
            columns = {column.removesuffix("_file_name") for column in row if column.endswith("_file_name")}
            for name in sorted(columns - CONDITIONS.keys() - unknown):
                unknown.add(name)
                yield Skipped(f"column {column_of(name)}", f"unknown condition {name}")
            conditions: dict[str, Any] = {}
            for name in CONDITIONS:
                if isinstance(path := row.get(column_of(name)), str):
                    if file := source.file(join(place, check_inside(path, where))):
                        conditions[name] = file
                    else:
                        yield Skipped(join(place, path), f"{column_of(name)} of line {number} does not exist")
            path = check_inside(row["file_name"], where)
            if image := source.file(join(place, path)):
                stem = path.rpartition(".")[0].removeprefix("images/").replace("/", "_")
                yield with_row(SourceFace(name=stem, image=image, split=split, conditions=conditions), row)
            else:
                yield Skipped(join(place, path), f"the image of line {number} of {METADATA} does not exist")


def metadata_folders(source: Source) -> list[str]:
    """Find the folders with `metadata.jsonl`, the root or directly below it, without `ORIGINALS`."""
    found = {folder for folder, names in source.folders.items() if METADATA in names and "/" not in folder}
    order = lambda folder: (SPLIT_ORDER.index(SPLIT_NAMES.get(folder, "train")), folder)  # noqa: E731
    return sorted(found - {ORIGINALS}, key=order)


HQ_TERMS = "non-commercial research only, no redistribution of images or of derived data"
UNKNOWN_TERMS = "not stated by this format: ask the owners of the images"


@dataclass(frozen=True, kw_only=True)
class Format:
    """One dataset format."""

    read: Callable[[Source], Entries]
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
        and (bool(source.below(HQ_PARTS)) or any(name in source.folders for name in HQ_MASKS))
    )


def is_named_hq(source: Source) -> bool:
    """Return whether folder names prove that the images are CelebA-HQ's; `images` and `masks` may be anybody's."""
    names = (source.root.name, *source.folders)
    return any(word in name.lower() for name in names for word in ("celeba-hq", "celebamask", "celeba_hq", "celebahq"))


def has_hq_captions(source: Source) -> bool:
    return source.folder(HQ_CAPTIONS[0]) is not None or HQ_CAPTIONS[1] in source.folders


def has_suffix(source: Source, suffix: str | tuple[str, ...]) -> bool:
    return any(name.lower().endswith(suffix) for names in source.folders.values() for name in names)


def has_images(source: Source) -> bool:
    """Whether there are images in the root or in folders named like splits."""
    return any(source.images(folder) for folder in source.folders if folder == "" or folder in SPLIT_NAMES)


FORMATS: dict[str, Format] = {
    "celeba": Format(
        read=celeba.celeba,
        matches=lambda source: bool(source.find("list_attr_celeba.txt") and source.folder("img_align_celeba")),
        files="img_align_celeba and list_attr_celeba.txt",
        split="person",
        licence="non-commercial research only",
        licence_source="the agreement on CelebA's page, mmlab.ie.cuhk.edu.hk/projects/CelebA.html",
    ),
    "celebamask": Format(
        read=celeba.celeba_hq,
        matches=lambda source: has_hq(source) and not has_hq_captions(source) and is_named_hq(source),
        files="CelebA-HQ-img or images, with part masks or whole masks",
        split="random",
        licence=HQ_TERMS,
        licence_source="README of github.com/switchablenorms/CelebAMask-HQ",
    ),
    "images_and_masks": Format(
        read=celeba.celeba_hq,
        matches=lambda source: has_hq(source) and not has_hq_captions(source) and not is_named_hq(source),
        files="images, with whole masks of the same names",
        split="random",
    ),
    "mm_celeba": Format(
        read=partial(celeba.celeba_hq, captions=HQ_CAPTIONS, sketches=HQ_SKETCHES),
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
        matches=lambda source: bool(ffhq_folders(source)) and source.folder("FFHQ_Captions_Final") is None,
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
    "folder": Format(
        read=images_in_folders, matches=has_images, files="images in the root or in train, validation and test"
    ),
}
"""Name -> format, as in `likeness prepare ingest --format`."""


def detect_format(source: Source) -> str:
    """Return the only format that matches a source; `folder` only if no other one does.

    Raises:
        InputError: none or several formats match.
    """
    found = [name for name, format in FORMATS.items() if name != "folder" and format.matches(source)]
    found = found or [name for name in ("folder",) if has_images(source)]
    if len(found) > 1:
        candidates = " and ".join(f"{name} ({FORMATS[name].files})" for name in found)
        raise InputError(f"{source.root} could be {candidates}: choose one with --format")
    if not found:
        count = sum(len(source.images(folder)) for folder in source.folders)
        hint = f"--format folder imports the {count} images in its folders" if count else "it contains no images"
        raise InputError(f"{source.root} has no known dataset format ({', '.join(FORMATS)}): {hint}")
    return found[0]
