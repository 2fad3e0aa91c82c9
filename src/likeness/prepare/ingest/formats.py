"""Dataset formats: how to read and detect each one, and its license.

Every format is one function from the files of a source to its faces. It reads lists, but no images. A format is
detected only if no other one matches.
"""

from __future__ import annotations

import csv
import io
import posixpath
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np

from likeness.conditions import CONDITIONS
from likeness.conditions.base import IMAGE_SUFFIXES
from likeness.data.folder import METADATA, ORIGINALS, clean_row, column_of, parse_row
from likeness.prepare.ingest import celeba
from likeness.prepare.ingest.celeba import (
    HQ_CAPTIONS,
    HQ_IMAGES,
    HQ_MASKS,
    HQ_PARTS,
    HQ_SKETCHES,
    matching_faces,
    unpadded,
)
from likeness.prepare.ingest.faces import SPLIT_ORDER, Entries, Skipped, SourceFace, split_named, with_row
from likeness.prepare.ingest.shards import parquet, webdataset
from likeness.prepare.ingest.source import Source, SourceFile, check_inside, join, parse_json
from likeness.types import InputError

TABLE = "metadata.csv"
"""Metadata of an imagefolder, if it has no `METADATA`."""

FFHQ_FOLDERS = ("images1024x1024", "thumbnails128x128")
FFHQ_COLUMNS = ("photo_url", "author", "license", "license_url")
"""Columns to keep for each image: its license may require attribution."""
FFHQ_KEYS = ("category", "metadata", "image", "face_landmarks", "pixel_size", *FFHQ_COLUMNS)


def ffhq(source: Source) -> Entries:
    """FFHQ: `images1024x1024/00000/00000.png` (or the thumbnails) and optionally `ffhq-dataset-v2.json`.

    The 68 landmarks become keypoints; split, origin and license are kept for each image.
    """
    metadata = read_ffhq(source.find("ffhq-dataset-v2.json", "ffhq-dataset-v1.json"))
    for face in (face for folder in ffhq_folders(source) for face in matching_faces(source, folder)):
        known = metadata.get(unpadded(face.name), {})
        image = known.get("image", {})
        if "face_landmarks" in image:
            points = image["face_landmarks"].astype(float).round(2).tolist()
            points = {"points": points, "size": image.get("pixel_size", [1024, 1024])}
            face = replace(face, conditions={"keypoints": points})
        yield replace(face, split=split_named(known.get("category", "")), more=known.get("metadata", {}))


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

    return parse_json(file.text(), file.name, object_hook=reduce) if file else {}


def face_mogle(source: Source) -> Entries:
    """Face-MoGLE's releases, packed or not: `face/0.jpg`, `mask/0.png`, and `text.json` or `text/0.txt`."""
    listed = source.find("text.json")
    texts = listed.json() if listed else {}
    if not isinstance(texts, dict):
        raise InputError(f"{source.root / 'text.json'} must contain the captions of each image by its file name")
    for face in matching_faces(source, source.folder("face"), source.folder("text"), mask=source.folder("mask")):
        own = texts.get(posixpath.basename(face.image.name)) or texts.get(face.name)
        yield with_row(face, {"text": own}) if own else face


def mmface_dit(source: Source) -> Entries:
    """MMFace-DiT: `train|test/{images,masks,sketches}/0.png` with `Celeb_Captions_Final/0.txt`, and FFHQ.

    FFHQ's part is `images1024x1024`, `FFHQ/Masks_Colored_1024`, `FFHQ/sketches` and `FFHQ_Captions_Final`; the names of
    its faces begin with ffhq_.
    """
    shared = source.folder("Celeb_Captions_Final", "captions", "text")
    for root in mmface_dit_splits(source):
        own = (join(root, name) for name in ("captions", "text"))
        captions = next((folder for folder in own if folder in source.folders), shared)
        images, mask, sketch = (join(root, name) for name in ("images", "masks", "sketches"))
        split = split_named(root.rpartition("/")[2])
        yield from matching_faces(source, images, captions, split=split, mask=mask, sketch=sketch)
    if captions := source.folder("FFHQ_Captions_Final"):
        mask = next((name for name in source.folders if name.split("/")[-1].startswith("Masks_Colored")), None)
        for folder in ffhq_folders(source):
            sketch = source.folder("FFHQ/sketches")
            yield from matching_faces(source, folder, captions, prefix="ffhq_", mask=mask, sketch=sketch)


def mmface_dit_splits(source: Source) -> list[str]:
    """Find folders that are named like a split and contain `images` and `masks` or `sketches`."""
    roots = sorted(folder.removesuffix("/images") for folder in source.folders if folder.endswith("/images"))
    return [
        root
        for root in roots
        if split_named(root.rpartition("/")[2])
        and (join(root, "masks") in source.folders or join(root, "sketches") in source.folders)
        and not table_of(source, root)
    ]


def images_in_folders(source: Source) -> Entries:
    """Images in any folders, with captions, one per line, in a text file of the same name.

    `NAME_mask.png`, `NAME_sketch.png` and `NAME_keypoints.json` next to an image NAME are its conditions.
    """
    for place in sorted(source.folders):
        texts, sidecars = source.texts(place), find_sidecars(source, place)
        others = {path for conditions in sidecars.values() for files in conditions.values() for path in files}
        top, _, rest = place.partition("/")
        split = split_named(top)
        for name in sorted(name for name in source.folders[place] if name.lower().endswith(IMAGE_SUFFIXES)):
            stem = name.rpartition(".")[0]
            if join(place, name) in others:
                continue
            text = source.file(texts.get(stem, ""))
            yield SourceFace(
                name=join(rest if split else place, stem),
                image=source.existing_file(join(place, name)),
                conditions={key: source.existing_file(files[0]) for key, files in sidecars.get(stem, {}).items()},
                captions=text.lines if text else tuple,
                split=split,
            )


def find_sidecars(source: Source, place: str) -> dict[str, dict[str, list[str]]]:
    """Return image stem -> condition -> files such as `folder/NAME_mask.png`, also with `-` or `.`, best first."""
    stems = source.images(place).keys()
    found: dict[str, dict[str, list[str]]] = {}
    for name in sorted(source.folders[place]):
        stem, dot, suffix = name.rpartition(".")
        suffix = f"{dot}{suffix}".lower()
        for key, condition in CONDITIONS.items():
            own, mark = stem[: -len(key) - 1], stem[-len(key) - 1 :].lower()
            if own in stems and mark[1:] == key and mark[0] in "_-." and suffix in (condition.suffix, *IMAGE_SUFFIXES):
                files = found.setdefault(own, {}).setdefault(key, [])
                files.insert(0 if suffix == condition.suffix else len(files), join(place, name))
    return found


def imagefolder(source: Source) -> Entries:
    """Hugging Face's imagefolder: `metadata.jsonl` or .csv next to the images, in the root or in a folder per split.

    Columns are `file_name`, `mask_file_name`, `sketch_file_name`, `keypoints_file_name` (or `keypoints` as a value),
    `text` (a string or a list), `attributes`, `identity`; other columns are kept, other files are ignored.
    """
    for place in metadata_folders(source):
        split = split_named(place.split("/")[-1])
        unknown: set[str] = set()  # file columns of unknown conditions, reported once
        for number, where, row in metadata_rows(source, join(place, table_of(source, place))):
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
                stem = path.rpartition(".")[0].removeprefix("images/")
                yield with_row(SourceFace(name=stem, image=image, split=split, conditions=conditions), row)
            else:
                yield Skipped(join(place, path), f"the image of line {number} does not exist")


def metadata_rows(source: Source, name: str) -> Iterator[tuple[int, str, dict[str, Any]]]:
    """Yield (line number, position for messages, row) of `metadata.jsonl` or `metadata.csv`; empty cells are absent."""
    if name.endswith(".jsonl"):
        for number, line in enumerate(source.lines(name), start=1):
            if line.strip():
                yield number, (where := f"{source.root / name}, line {number}"), parse_row(line, where)
        return
    file = source.existing_file(name)
    reader = csv.DictReader(io.StringIO(file.text(), newline=""), strict=True)
    try:
        for row in reader:
            where = f"{file.name}, line {reader.line_num}"
            values = {column: value for column, value in row.items() if value}
            if None in row or "file_name" not in values:
                raise InputError(f"{where}: every row needs a file_name and no more cells than the header")
            yield reader.line_num, where, clean_row(values)
    except csv.Error as error:
        raise InputError(f"{file.name}, line {reader.line_num} is not valid CSV ({error}): export it again") from error


def table_of(source: Source, folder: str) -> str:
    """Return the name of a folder's metadata, "" if it has none; a CSV file needs a column `file_name`."""
    names = source.folders.get(folder, {})
    if METADATA in names or TABLE not in names:
        return METADATA if METADATA in names else ""
    used, header = names[TABLE], next(iter(source.lines(join(folder, TABLE))), b"")
    names[TABLE] = used  # looking at it is not reading it
    columns = header.decode("utf-8-sig", errors="replace").replace('"', "").strip().split(",")
    return TABLE if "file_name" in columns else ""


def metadata_folders(source: Source) -> list[str]:
    """Find the folders with `metadata.jsonl` or .csv, the root or directly below it, without `ORIGINALS`."""
    found = {folder for folder in source.folders if "/" not in folder and table_of(source, folder)}
    order = lambda folder: (SPLIT_ORDER.index(split_named(folder) or "train"), folder)  # noqa: E731
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
    license: str = UNKNOWN_TERMS
    """Terms of the publishers, as in MODEL_LICENSES.md."""
    license_source: str = ""
    """Where the publishers state them."""


def hq_format(source: Source) -> str | None:
    """Return the format of a source with the folders of CelebA-HQ, with masks or captions unless its own name is used.

    Folders named `images`, `masks` and `text` may be anybody's: only a name proves that the images are CelebA-HQ's.
    """
    captions = source.folder(HQ_CAPTIONS[0]) is not None or HQ_CAPTIONS[1] in source.folders
    if source.folder(HQ_IMAGES[0]) is None:
        masks = source.below(HQ_PARTS) or any(name in source.folders for name in HQ_MASKS)
        images = any(name in source.folders for name in HQ_IMAGES[1:])
        if not (images and (masks or captions)) or table_of(source, ""):
            return None
    words = ("celeba-hq", "celebamask", "celeba_hq", "celebahq", HQ_CAPTIONS[0])
    if not any(word in name.lower() for name in (source.root.name, *source.folders) for word in words):
        return "images_and_masks"
    return "mm_celeba" if captions else "celebamask"


def has_suffix(source: Source, suffix: str | tuple[str, ...]) -> bool:
    return any(name.lower().endswith(suffix) for names in source.folders.values() for name in names)


def has_images(source: Source) -> bool:
    """Whether there are images in the root or in folders named like splits."""
    return any(source.images(folder) for folder in source.folders if folder == "" or split_named(folder))


FORMATS: dict[str, Format] = {
    "celeba": Format(
        read=celeba.celeba,
        matches=lambda source: bool(source.find("list_attr_celeba.txt") and source.folder("img_align_celeba")),
        files="img_align_celeba and list_attr_celeba.txt",
        split="person",
        license="non-commercial research only",
        license_source="the agreement on CelebA's page, mmlab.ie.cuhk.edu.hk/projects/CelebA.html",
    ),
    "celebamask": Format(
        read=celeba.celeba_hq,
        matches=lambda source: hq_format(source) == "celebamask",
        files="CelebA-HQ-img or images, with part masks or whole masks",
        split="random",
        license=HQ_TERMS,
        license_source="README of github.com/switchablenorms/CelebAMask-HQ",
    ),
    "images_and_masks": Format(
        read=partial(celeba.celeba_hq, captions=HQ_CAPTIONS, sketches=HQ_SKETCHES),
        matches=lambda source: hq_format(source) == "images_and_masks",
        files="images, with masks or text of the same names",
        split="random",
    ),
    "mm_celeba": Format(
        read=partial(celeba.celeba_hq, captions=HQ_CAPTIONS, sketches=HQ_SKETCHES),
        matches=lambda source: hq_format(source) == "mm_celeba",
        files="CelebA-HQ-img or images, with celeba-caption or text",
        split="mm_celeba",
        license=HQ_TERMS,
        license_source="README of github.com/IIGROUP/MM-CelebA-HQ-Dataset",
    ),
    "ffhq": Format(
        read=ffhq,
        matches=lambda source: bool(ffhq_folders(source)) and source.folder("FFHQ_Captions_Final") is None,
        files="images1024x1024 or thumbnails128x128",
        license="dataset CC BY-NC-SA 4.0, each image under its own license (in its row); not for face recognition",
        license_source="README of github.com/NVlabs/ffhq-dataset",
    ),
    "face_mogle": Format(
        read=face_mogle,
        matches=lambda source: (
            "face" in source.folders and ("mask" in source.folders or has_suffix(source, "text.json"))
        ),
        files="face with mask or text.json",
        split="face_mogle",
        license=f"derived from CelebA-HQ, FFHQ or FairFace, whose terms apply; of MM-CelebA-HQ: {HQ_TERMS}",
        license_source="README of github.com/XavierJiezou/Face-MoGLE and of the datasets it is derived from",
    ),
    "mmface_dit": Format(
        read=mmface_dit,
        matches=lambda source: bool(mmface_dit_splits(source)) or source.folder("FFHQ_Captions_Final") is not None,
        files="train or test with images and masks or sketches",
        license=f"derived from CelebA-HQ and FFHQ, whose terms apply: {HQ_TERMS}; FFHQ CC BY-NC-SA 4.0",
        license_source="README of the MMFace-DiT code (arXiv 2603.29029) and of the datasets it is derived from",
    ),
    "imagefolder": Format(
        read=imagefolder, matches=lambda source: bool(metadata_folders(source)), files="metadata.jsonl or metadata.csv"
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
    found = found or [name for name in ("folder",) if FORMATS[name].matches(source)]
    if len(found) > 1:
        candidates = " and ".join(f"{name} ({FORMATS[name].files})" for name in found)
        raise InputError(f"{source.root} could be {candidates}: choose one with --format")
    if not found:
        count = sum(len(source.images(folder)) for folder in source.folders)
        hint = f"--format folder imports the {count} images in its folders" if count else "it contains no images"
        hint += "".join(f"; {number} {kind}" for kind, number in source.unlisted.items())
        raise InputError(f"{source.root} has no known dataset format ({', '.join(FORMATS)}): {hint}")
    return found[0]
