"""Photos of any size -> a prepared folder of square portraits in the framing of CelebA-HQ and FFHQ.

Each row keeps where its portrait comes from: the photo's name and SHA-256 and the similarity transform, so that `paste`
can lay an edited portrait back. A portrait's name holds the beginning of its photo's hash: photos of one name do not
meet, and what was annotated for one photo never passes for another's. Work is kept photo by photo in `.aligned.jsonl`;
the metadata is written last.

Where the square reaches beyond the photo, the photo is reflected and grows blurred and grey outwards, as in FFHQ, since
models learnt such borders. Other than there, the blur does not reach into the photo: what is pasted back is the photo.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from scipy import ndimage

from likeness.annotators.landmarks import FaceFinder, find_faces, landmarker_name, open_face_finder, same
from likeness.conditions.framing import (
    beyond,
    framing_faults,
    framing_of,
    inverse,
    move,
    portrait_faults,
    portrait_transform,
)
from likeness.conditions.images import png_bytes
from likeness.data.folder import METADATA, column_of, condition_file, line_of, read_photo
from likeness.files import write_whole, writing_whole
from likeness.prepare.annotate import keypoints_file, made_by_column
from likeness.prepare.ingest.face import plain_name
from likeness.prepare.ingest.tree import PICTURES, walk
from likeness.types import InputError

JOURNAL = ".aligned.jsonl"
"""What is done: a line of settings, then one a photo."""

LOOKED_AT = 384
"""Pixels a side at which a face is looked at a second time."""

BLURRED, GREY = 0.1, 0.3
"""How far beyond the photo, in shares of the portrait's side, reflections are fully blurred and fully the mean tone."""


@dataclass
class Aligned:
    """What became of a pile of photos, by their names."""

    portraits: int = 0
    without: list[str] = field(default_factory=list)
    """Photos in which no face was found."""
    unreadable: dict[str, str] = field(default_factory=dict)
    """Photo -> why it cannot be read."""
    faults: dict[str, list[str]] = field(default_factory=dict)
    """Portrait -> what is off about its geometry."""
    left_out: dict[str, list[str]] = field(default_factory=dict)
    """Portrait -> why it was left out."""


def align_photos(
    photos: Path,
    out: Path,
    landmarker: Path,
    *,
    size: int = 512,
    every: bool = False,
    strict: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> Aligned:
    """Write `out/images`, `out/keypoints` and `out/metadata.jsonl` from a folder of photos, or from one photo.

    Args:
        photos: a folder, searched with all below it, or a file.
        out: folder to write; run again to go on after an interruption or with more photos. Rows and columns that are
            there already stay.
        landmarker: MediaPipe's `face_landmarker.task`.
        size: pixels a side of the portraits.
        every: all faces of a photo, not only the largest.
        strict: leave out faces whose geometry is off.
        progress: called as (photos done, photos in all).

    Raises:
        InputError: there are no photos, the landmarker cannot be used, `out` was written with other settings, or
            cannot be written.
    """
    if size < 32:
        raise InputError(f"portraits of {size} pixels are too small: at least 32 are needed")
    files = photo_files(photos, out)
    with open_face_finder(landmarker) as find:
        settings = {"size": size, "every": every, "strict": strict, "landmarker": landmarker_name(landmarker)}
        return align_files(files, photos if photos.is_dir() else photos.parent, out, find, settings, progress)


def align_files(
    files: list[Path],
    root: Path,
    out: Path,
    find: FaceFinder,
    settings: dict[str, Any],
    progress: Callable[[int, int], None] | None = None,
) -> Aligned:
    """Align photos below `root` by any finder of faces; `settings` has `size`, `every`, `strict` and `landmarker`."""
    aligned = Aligned()
    rows: dict[str, str] = {}  # as JSON: a million rows fit into memory so
    done = open_journal(out, settings)
    for number, file in enumerate(files, start=1):
        record = one_photo(file, file.relative_to(root).as_posix(), out, find, done, **settings)
        rows |= {row["file_name"]: json.dumps(row, ensure_ascii=False) for row in record["rows"]}
        tally(aligned, record)
        if progress is not None:
            progress(number, len(files))
    if rows:
        write_metadata(out, rows)
    return aligned


def photo_files(photos: Path, out: Path) -> list[Path]:
    """The photos of a folder in order of their names, `out` and hidden files left aside; links are followed."""
    if photos.is_file():
        return [photos]
    if not photos.is_dir():
        raise InputError(f"{photos} does not exist: give a folder of photos, or one photo")
    if photos.resolve().is_relative_to(out.resolve()):
        raise InputError(f"{photos} lies in {out}, where portraits would pass for photos: write to another folder")
    files = [photos / folder / name for folder, names in walk(photos, out) for name in names]
    files = sorted(path for path in files if path.suffix.lower() in PICTURES)
    if not files:
        raise InputError(f"{photos} holds no photos ({', '.join(PICTURES)})")
    return files


def open_journal(out: Path, settings: dict[str, Any]) -> dict[tuple[str, str], str]:
    """What is done already: (photo, SHA-256) -> its record as JSON. A line that was cut off is left aside."""
    path = out / JOURNAL
    first: dict[str, Any] = {}
    done: dict[tuple[str, str], str] = {}
    if path.is_file():
        with path.open() as lines:
            for line in lines:
                try:
                    record = json.loads(line)
                except json.JSONDecodeError:
                    continue
                if first:
                    done[record["photo"], record["sha256"]] = line
                first = first or record
    if not first:
        write_whole(path, json.dumps(settings))
        return {}
    if other := [f"{name} {first.get(name)}" for name in settings if first.get(name) != settings[name]]:
        raise InputError(f"{out} was aligned with {', '.join(other)}: keep to that, or choose another folder")
    return done


def one_photo(
    file: Path,
    name: str,
    out: Path,
    find: FaceFinder,
    done: dict[tuple[str, str], str],
    *,
    size: int,
    every: bool,
    strict: bool,
    landmarker: str,
) -> dict[str, Any]:
    """The record of one photo: its rows, and what is to be said of it. Portraits and keypoints are written."""
    try:
        sha256 = hashlib.sha256(file.read_bytes()).hexdigest()
        known = json.loads(done.get((name, sha256), "null"))
        if known and all((out / row["file_name"]).is_file() for row in known["rows"]):
            return known
        photo = read_photo(file)
    except (OSError, InputError) as error:  # said at the end; tried again the next time
        return {"photo": name, "rows": [], "unreadable": str(error)}
    height, width = photo.shape[:2]
    record: dict[str, Any] = {"photo": name, "sha256": sha256, "rows": [], "faces": {}}
    faces = find_faces(find, photo, every=every)
    for number, found in enumerate(faces if every else faces[:1]):
        points = second_look(find, photo, found)
        stem = f"{plain_name(file.stem)}-{sha256[:8]}" + (f"-{number}" if number else "")
        transform = portrait_transform(points, size)
        own = move(points, transform)  # [478, 2] in pixels of the portrait
        notes = framing_faults(framing_of(points, width, height, size)) + portrait_faults(own / size)
        faults = [note.text for note in notes]
        record["faces"][stem] = faults
        if strict and faults:
            continue
        portrait = cut_portrait(photo, transform, size)
        write_whole(out / "images" / f"{stem}.png", png_bytes(Image.fromarray(portrait)))
        write_whole(out / condition_file("keypoints", stem), keypoints_file(own, size, size, landmarker))
        record["rows"].append(
            {
                "file_name": f"images/{stem}.png",
                column_of("keypoints"): condition_file("keypoints", stem),
                made_by_column("keypoints"): landmarker,
                "aligned": {
                    "photo": name,
                    "sha256": sha256,
                    "width": width,
                    "height": height,
                    "size": size,
                    "transform": transform.tolist(),
                    "faults": faults,
                },
            }
        )
    try:
        with (out / JOURNAL).open("a") as journal:  # the newline first: a line that was cut off stays by itself
            journal.write("\n" + json.dumps(record))
    except OSError as error:
        raise InputError(f"cannot write {out / JOURNAL}: {error.strerror or error}") from error
    return record


def second_look(find: FaceFinder, photo: np.ndarray, points: np.ndarray) -> np.ndarray:
    """Landmarks [478, 2] of a face, found again where it stands upright and fills the picture: there they are exact."""
    transform = portrait_transform(points, LOOKED_AT)
    faces = find(cut_portrait(photo, transform, LOOKED_AT))
    again = [move(face.astype(np.float64) * LOOKED_AT, inverse(transform)) for face in faces]
    return next((face for face in again if same(face, points)), points)


def tally(aligned: Aligned, record: dict[str, Any]) -> None:
    """Count one photo's record in."""
    if "unreadable" in record:
        aligned.unreadable[record["photo"]] = record["unreadable"]
        return
    if not record["faces"]:
        aligned.without.append(record["photo"])
    kept = {Path(row["file_name"]).stem for row in record["rows"]}
    aligned.portraits += len(kept)
    for stem, faults in record["faces"].items():
        if faults:
            (aligned.faults if stem in kept else aligned.left_out)[f"{record['photo']} ({stem})"] = faults


def write_metadata(out: Path, rows: dict[str, str]) -> None:
    """The rows, JSON by `file_name`, with the columns that others have added since, after rows of earlier runs."""
    path = out / METADATA
    before: dict[str, str] = {}
    if path.is_file():
        with path.open(encoding="utf-8") as lines:
            before = {json.loads(line)["file_name"]: line for line in lines if line.strip()}
    with writing_whole(path) as metadata:
        for name in [*(name for name in before if name not in rows), *rows]:
            row = {**json.loads(before.get(name, "{}")), **json.loads(rows.get(name, "{}"))}
            metadata.write(line_of(row))


def cut_portrait(photo: np.ndarray, transform: np.ndarray, size: int) -> np.ndarray:
    """The portrait that a transform frames.

    Args:
        photo: uint8 [H, W, 3].
        transform: [2, 3], photo -> portrait.
        size: pixels a side of the portrait.

    Returns:
        uint8 [size, size, 3].
    """
    height, width = photo.shape[:2]
    back = inverse(transform)
    corners = move(np.array([[0, 0], [size, 0], [0, size], [size, size]]), back)
    margin = 8 / np.hypot(*transform[:, 0])
    low, high = np.floor(corners.min(axis=0) - margin).astype(int), np.ceil(corners.max(axis=0) + margin).astype(int)
    x0, y0 = np.clip(low, 0, [width - 2, height - 2])
    x1, y1 = np.clip(high, [x0 + 2, y0 + 2], [width, height])
    pads = ((max(y0 - low[1], 0), max(high[1] - y1, 0)), (max(x0 - low[0], 0), max(high[0] - x1, 0)), (0, 0))
    piece = np.pad(photo[y0:y1, x0:x1], pads, mode="reflect")
    back[:, 2] -= [x0 - pads[1][0], y0 - pads[0][0]]
    portrait = resample(piece, back, size, size)
    return fade(portrait, beyond(transform, size, width, height))


def fade(portrait: np.ndarray, distance: np.ndarray) -> np.ndarray:
    """Blur and grey what lies beyond the photo, more the farther it lies; `distance` [S, S] in pixels, 0 within."""
    if not distance.any():
        return portrait
    side = len(portrait)
    values = portrait.astype(np.float32)
    share = distance[..., None].astype(np.float32) / side
    values += (ndimage.gaussian_filter(values, (0.02 * side, 0.02 * side, 0)) - values) * np.clip(share / BLURRED, 0, 1)
    values += (np.median(portrait, axis=(0, 1)).astype(np.float32) - values) * np.clip(share / GREY, 0, 1)
    return np.where(share > 0, np.rint(values).clip(0, 255), portrait).astype(np.uint8)


def resample(picture: np.ndarray, transform: np.ndarray, width: int, height: int) -> np.ndarray:
    """The picture whose point p shows `picture` at transform(p), smooth where it grows, without moire where it shrinks.

    Args:
        picture: uint8 [H, W, 3].
        transform: [2, 3], similarity from the result to `picture`.
        width, height: of the result.
    """
    shrinks = float(np.hypot(*transform[:, 0]))  # pixels of the picture for one of the result
    image = Image.fromarray(picture)
    whole = max(1, int(shrinks / 2))
    if whole > 1:
        image = image.reduce(whole)
    # What is left, a factor below 4, is taken from several samples a pixel; as floats, since Pillow truncates bytes.
    samples = int(np.clip(np.ceil(shrinks / whole), 1, 4))
    data = np.concatenate([transform[:, :2] / samples, transform[:, 2:]], axis=1) / whole
    size, data = (width * samples, height * samples), tuple(data.flatten())
    found = []
    for band in image.split():
        moved = band.convert("F").transform(size, Image.Transform.AFFINE, data, Image.Resampling.BICUBIC)
        found.append(np.asarray(moved.reduce(samples) if samples > 1 else moved))
    return np.rint(np.stack(found, axis=-1)).clip(0, 255).astype(np.uint8)
