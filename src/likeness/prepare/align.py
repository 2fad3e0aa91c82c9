"""Align photos of any size: write a prepared folder of square portraits in the framing of CelebA-HQ and FFHQ, with a
subfolder per split.

Each row records the photo's name and SHA-256 and the similarity transform, so that `paste` can paste an edited portrait
back. A portrait's name contains the beginning of its photo's hash, so portraits of equally named photos do not collide.
A copy of a photo is skipped, and a renamed photo keeps its row.
Progress is recorded per photo in `.aligned.jsonl`; the metadata is written last. `dataset.json` records the settings
and which photos are held out, so that photos added later do not change the split.

`extract` makes the conditions of one photograph under the names of the dataset format `folder`.

Outside the photo the portrait shows a reflection that fades into blur and gray, as in FFHQ, because models are trained
on such borders. Unlike in FFHQ, no pixel inside the photo is blurred.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Set
from contextlib import ExitStack, nullcontext, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from scipy import ndimage

from likeness.annotators.landmarks import FaceFinder, find_faces, landmarker_name, open_face_finder, same
from likeness.conditions import CONDITIONS
from likeness.conditions.base import IMAGE_SUFFIXES
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
from likeness.data.folder import (
    METADATA,
    changing,
    column_of,
    known_rows,
    line_of,
    open_record,
    read_photo,
    write_record,
)
from likeness.files import write_whole, writing_whole
from likeness.pipelines.sizes import LARGEST_SIDE
from likeness.prepare.annotate import keypoints_file, made_by_column, mask_annotator, sketch_annotator
from likeness.prepare.ingest.faces import file_stem
from likeness.prepare.ingest.formats import UNKNOWN_TERMS
from likeness.prepare.ingest.source import walk
from likeness.prepare.ingest.splits import SPLITS, check_minimum, default_held_out, random_split
from likeness.types import InputError, Note, Progress
from likeness.weights.hashes import file_hash

JOURNAL = ".aligned.jsonl"
"""Progress: a line per photo."""

REFINE_SIZE = 384
"""Side length in pixels at which landmarks are detected a second time."""

SMALLEST_SIDE = 32
"""Smallest side of portraits in pixels."""

BLURRED, GRAY = 0.1, 0.3
"""Distance from the photo, as a fraction of the portrait's side, at which it is fully blurred and fully gray."""


@dataclass
class Aligned:
    """Result of `align_photos`."""

    splits: Counter[str] = field(default_factory=Counter)
    """Split -> portraits."""
    without: list[str] = field(default_factory=list)
    """Photos without a detected face."""
    unreadable: dict[str, str] = field(default_factory=dict)
    """Photo -> reason."""
    faults: dict[str, list[Note]] = field(default_factory=dict)
    """Portrait -> faults of its geometry."""
    skipped: dict[str, list[Note]] = field(default_factory=dict)
    """Skipped portrait -> faults of its geometry."""
    copies: dict[str, str] = field(default_factory=dict)
    """Skipped photo -> photo with the same content."""


def check_side(size: int) -> None:
    """Check the side of portraits in pixels. Raises `InputError`."""
    if not SMALLEST_SIDE <= size <= LARGEST_SIDE:
        raise InputError(f"size must be from {SMALLEST_SIDE} to {LARGEST_SIDE} pixels, not {size}")


def align_photos(
    photos: Path,
    out: Path,
    landmarker: Path,
    *,
    size: int = 512,
    all_faces: bool = False,
    strict: bool = False,
    held_out: int | None = None,
    follow_links: bool = False,
    progress: Progress = lambda done, total: None,
) -> Aligned:
    """Write the splits `out/train` and `out/test` from a folder of photos, or `out/train` from one photo.

    The arguments are the options of `likeness prepare align`. Run it again to resume or to add photos, which are in
    `train`: existing rows and columns are kept, and what was removed from the metadata stays removed.

    Raises:
        InputError: there are no photos, the landmarker cannot be used, `out` was written with other settings, or
            cannot be written.
    """
    check_side(size)
    files = photo_files(photos, out, follow_links)
    with open_face_finder(landmarker) as find:
        settings = {"size": size, "all_faces": all_faces, "strict": strict, "landmarker": landmarker_name(landmarker)}
        root = photos if photos.is_dir() else photos.parent
        return align_files(files, root, out, find, settings, held_out, progress)


def align_files(
    files: list[Path],
    root: Path,
    out: Path,
    find: FaceFinder,
    settings: dict[str, Any],
    held_out: int | None = None,
    progress: Progress = lambda done, total: None,
) -> Aligned:
    """Align photos below `root` with a face detector; `settings` has `size`, `all_faces`, `strict` and `landmarker`."""
    check_minimum(held_out=held_out)
    aligned = Aligned()
    rows: dict[str, dict[str, str]] = {"train": {}, "test": {}}  # split -> file name -> JSON, which takes less memory
    names = [file.relative_to(root).as_posix() for file in files]
    arguments = {"kind": "likeness align", **settings} | ({} if held_out is None else {"held_out": held_out})
    with ExitStack() as locks:
        locks.enter_context(changing(out, ["."]))
        record: dict[str, Any] = open_record(out, arguments, "align")
        if not record:
            count = default_held_out(len(names)) if held_out is None else held_out
            splits = random_split("random", [None] * len(names), count, 0)
            test = [name for name, split in zip(names, splits, strict=True) if split == "test"]
            record = {**arguments, "held_out": count, "split": "random", "split_is": SPLITS["random"]}
            record |= {"test": test, "license": UNKNOWN_TERMS, "license_source": ""}
        write_record(out, record)
        test = set(record["test"])
        locks.enter_context(changing(out, ["train", *(["test"] if test else [])]))
        known = {split: known_rows(out / split) for split in rows}
        done = open_journal(out, known["train"].keys() | known["test"].keys())
        first = {sha256: name for name, sha256 in reversed(done)}
        counted: set[str] = set()
        for number, (file, name) in enumerate(zip(files, names, strict=True)):
            progress(number, len(files))
            found = align_photo(file, name, out, test, find, done, first, **settings)
            if "unreadable" in found:
                aligned.unreadable[name] = found["unreadable"]
                continue
            if found["sha256"] in counted:
                aligned.copies[name] = found["photo"]
                continue
            counted.add(found["sha256"])
            split = "test" if found["photo"] in test else "train"
            found_rows = {row["file_name"]: json.dumps(row, ensure_ascii=False) for row in found["rows"]}
            rows[split] |= {} if found.get("written") else found_rows
            kept = {Path(file_name).stem for file_name in found_rows}
            aligned.splits[split] += len(kept)
            if not found["faces"]:
                aligned.without.append(name)
            for stem, faults in found.get("faces", {}).items():
                if faults:
                    notes = aligned.faults if stem in kept else aligned.skipped
                    notes[f"{name} ({stem})"] = [Note(*fault) for fault in faults]
        progress(len(files), len(files))
        given = [split for split in rows if rows[split] or known[split]]
        faces = {split: write_metadata(out / split, known[split], rows[split]) for split in given}
        add_to_journal(out, {"written": True})
        write_record(out, {**record, "faces": faces})
    return aligned


def photo_files(photos: Path, out: Path, follow_links: bool = False) -> list[Path]:
    """Return the photos of a folder, sorted, without `out` and hidden files. Raises `InputError` if there are none."""
    if photos.is_file():
        return [photos]
    if not photos.is_dir():
        raise InputError(f"{photos} does not exist: give a folder of photos, or one photo")
    if photos.resolve().is_relative_to(out.resolve()):
        raise InputError(f"{photos} is inside {out}: write to another folder")
    files = [photos / folder / name for folder, names in walk(photos, out, follow_links=follow_links) for name in names]
    files = sorted(path for path in files if path.suffix.lower() in IMAGE_SUFFIXES)
    if not files:
        raise InputError(f"{photos} has no photos ({', '.join(IMAGE_SUFFIXES)})")
    return files


def open_journal(out: Path, present: Set[str]) -> dict[tuple[str, str], str]:
    """Return (photo, SHA-256) -> record as JSON of the photos that are done. A truncated line is ignored.

    Portraits that were written to the metadata, and are not among its file names `present`, have been removed since;
    the record of a photo whose portraits were written has `written`.
    """
    done: dict[tuple[str, str], str] = {}
    written: set[tuple[str, str]] = set()
    with (out / JOURNAL).open(encoding="utf-8") if (out / JOURNAL).is_file() else nullcontext(()) as lines:
        for line in lines:
            with suppress(json.JSONDecodeError):
                record = json.loads(line)
                if "written" in record:
                    written |= done.keys()
                    continue
                done[record["photo"], record["sha256"]] = line
                written.discard((record["photo"], record["sha256"]))
    for key in written:
        record = json.loads(done[key])
        rows = [row for row in record["rows"] if row["file_name"] in present]
        removed = {Path(row["file_name"]).stem for row in record["rows"] if row not in rows}
        faces = {stem: faults for stem, faults in record["faces"].items() if stem not in removed}
        done[key] = json.dumps({**record, "rows": rows, "faces": faces, "written": True})
    return done


def add_to_journal(out: Path, entry: dict[str, Any]) -> None:
    """Append a line to the journal. Raises `InputError` if it cannot be written."""
    try:
        with (out / JOURNAL).open("a", encoding="utf-8") as journal:  # newline first, to end a truncated line
            journal.write("\n" + json.dumps(entry))
    except OSError as error:
        raise InputError(f"cannot write {out / JOURNAL}: {error.strerror or error}") from error


def align_photo(
    file: Path,
    name: str,
    out: Path,
    test: Set[str],
    find: FaceFinder,
    done: dict[tuple[str, str], str],
    first: dict[str, str],
    *,
    size: int,
    all_faces: bool,
    strict: bool,
    landmarker: str,
) -> dict[str, Any]:
    """Write the portraits and keypoints of one photo, unless it is `done`; returns its record with rows and faults.

    `first` is SHA-256 -> first name: a renamed photo, or a copy, keeps name and split. `test` are held-out names.
    """
    try:
        sha256 = file_hash(file)
        name = first.setdefault(sha256, name)
        split = "test" if name in test else "train"
        known = json.loads(done.get((name, sha256), "null"))
        if known and all((out / split / row["file_name"]).is_file() for row in known["rows"]):
            return known
        photo = read_photo(file)
    except (OSError, InputError) as error:  # reported at the end and retried in the next run
        return {"photo": name, "rows": [], "unreadable": str(error)}
    height, width = photo.shape[:2]
    record: dict[str, Any] = {"photo": name, "sha256": sha256, "rows": [], "faces": {}}
    faces = find_faces(find, photo, every=all_faces)
    for number, found in enumerate(faces if all_faces else faces[:1]):
        points = refine_landmarks(find, photo, found)
        stem = f"{file_stem(Path(name).stem)}-{sha256[:8]}" + (f"-{number}" if number else "")
        transform = portrait_transform(points, size)
        own = move(points, transform)  # [478, 2] in pixels of the portrait
        faults = framing_faults(framing_of(points, width, height, size)) + portrait_faults(own / size)
        record["faces"][stem] = faults
        if strict and faults:
            continue
        portrait = cut_portrait(photo, transform, size)
        write_whole(out / split / "images" / f"{stem}.png", png_bytes(Image.fromarray(portrait)))
        write_whole(out / split / CONDITIONS["keypoints"].file(stem), keypoints_file(own, size, size, landmarker))
        aligned = {"photo": name, "sha256": sha256, "width": width, "height": height, "size": size}
        aligned |= {"transform": transform.tolist(), "faults": [fault.text for fault in faults]}
        files = {"file_name": f"images/{stem}.png", column_of("keypoints"): CONDITIONS["keypoints"].file(stem)}
        record["rows"].append({**files, made_by_column("keypoints"): landmarker, "aligned": aligned})
    add_to_journal(out, record)
    done[name, sha256] = json.dumps(record)
    return record


def face_transform(
    photo: np.ndarray, name: str, find: FaceFinder | None, size: int, number: int | None = None
) -> tuple[np.ndarray, np.ndarray | None, list[str]]:
    """Return the transform from a photo, uint8 [H, W, 3], to the portrait of a face, `number` by size (default: the
    largest, 1).

    A photo that is a portrait already keeps its framing; without a detector it must be one.

    Returns:
        The transform [2, 3], the landmarks [478, 2] in pixels of the photo (None without a detector), and notes.

    Raises:
        InputError: there is no such face, or the photo is not square and there is no detector.
    """
    height, width = photo.shape[:2]
    own = np.array([[size / width, 0.0, 0.0], [0.0, size / height, 0.0]])
    if find is None:
        if width != height:
            raise InputError(
                f"{name} is {width}x{height}, not a square portrait: pass --landmarker face_landmarker.task to align it"
            )
        if number not in (None, 1):
            raise InputError(f"face {number} cannot be found without --landmarker face_landmarker.task")
        return own, None, []
    faces = find_faces(find, photo, every=True)
    if not faces:
        raise InputError(f"{name} has no face that can be found: use a larger or more frontal photograph")
    number = 1 if number is None else number
    if not 1 <= number <= len(faces):
        raise InputError(f"{name} has {len(faces)} faces; there is no face {number}")
    points, notes = faces[number - 1], []
    if len(faces) > 1:
        x, y = points.mean(axis=0)
        notes.append(f"{name} has {len(faces)} faces: face {number} by size is used, at ({x:.0f}, {y:.0f})")
    if width == height and not portrait_faults(points / width):
        return own, points, notes
    points = refine_landmarks(find, photo, points)
    faults = framing_faults(framing_of(points, width, height, size))
    notes += [f"the face is {fault.text}; expect artifacts" for fault in faults if fault.kind != "small"]
    return portrait_transform(points, size), points, notes


def refine_landmarks(find: FaceFinder, photo: np.ndarray, points: np.ndarray) -> np.ndarray:
    """Detect the landmarks [478, 2] of a face again in the upright, image-filling portrait, where they are accurate."""
    transform = portrait_transform(points, REFINE_SIZE)
    faces = find(cut_portrait(photo, transform, REFINE_SIZE))
    again = [move(face.astype(np.float64) * REFINE_SIZE, inverse(transform)) for face in faces]
    return next((face for face in again if same(face, points)), points)


def write_metadata(out: Path, known: dict[str, str], rows: dict[str, str]) -> int:
    """Write rows, JSON by `file_name`, after the known ones. Columns added in the meantime are kept. Returns the number
    of rows.
    """
    with writing_whole(out / METADATA) as metadata:
        for name in [*(name for name in known if name not in rows), *rows]:
            metadata.write(line_of({**json.loads(known.get(name, "{}")), **json.loads(rows.get(name, "{}"))}))
    return len(known | rows)


def cut_portrait(photo: np.ndarray, transform: np.ndarray, size: int) -> np.ndarray:
    """Cut the portrait, uint8 [size, size, 3], out of a photo, uint8 [H, W, 3], by the transform [2, 3] to it."""
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
    """Fade pixels outside the photo into blur and gray, by their distance [S, S] in pixels, 0 inside."""
    if not distance.any():
        return portrait
    side = len(portrait)
    values = portrait.astype(np.float32)
    fraction = distance[..., None].astype(np.float32) / side
    blurred, gray = ndimage.gaussian_filter(values, (0.02 * side, 0.02 * side, 0)), np.median(portrait, axis=(0, 1))
    values += (blurred - values) * np.clip(fraction / BLURRED, 0, 1)
    values += (gray.astype(np.float32) - values) * np.clip(fraction / GRAY, 0, 1)
    return np.where(fraction > 0, np.rint(values).clip(0, 255), portrait).astype(np.uint8)


def resample(image: np.ndarray, transform: np.ndarray, width: int, height: int) -> np.ndarray:
    """Resample an image, uint8 [H, W, 3] or [H, W], with antialiasing: point p of the result shows it at transform(p).

    `transform` is a similarity [2, 3]; `width` and `height` are those of the result in pixels.
    """
    scale = float(np.hypot(*transform[:, 0]))  # pixels of the image per pixel of the result
    source = Image.fromarray(image)
    factor = max(1, int(scale / 2))
    if factor > 1:
        source = source.reduce(factor)
    # The remaining factor, below 4, takes several samples per pixel; as floats, since Pillow truncates bytes.
    samples = int(np.clip(np.ceil(scale / factor), 1, 4))
    data = np.concatenate([transform[:, :2] / samples, transform[:, 2:]], axis=1) / factor
    size, data = (width * samples, height * samples), tuple(data.flatten())
    found = []
    for band in source.split():
        moved = band.convert("F").transform(size, Image.Transform.AFFINE, data, Image.Resampling.BICUBIC)
        found.append(np.asarray(moved.reduce(samples) if samples > 1 else moved))
    return np.rint(np.stack(found, axis=-1)).clip(0, 255).astype(np.uint8)


def extract(
    photo: Path,
    out: Path,
    *,
    landmarker: Path | None = None,
    size: int = 256,
    parser: str = "bundled",
    device: str | None = None,
) -> dict[str, Path]:
    """Write the portrait, mask, sketch and keypoints of the largest face of a photograph.

    The arguments are the options of `likeness extract`. Without a landmarker there are no keypoints, and the photograph
    must be aligned.

    Returns:
        `image`, `mask`, `sketch` and, with a landmarker, `keypoints` -> file.

    Raises:
        InputError: the photograph cannot be read, is not square and cannot be aligned, has no face, or would be
            overwritten.
    """
    check_side(size)
    pixels = read_photo(photo)
    suffixes = {"image": ".png", "mask": "_mask.png", "sketch": "_sketch.png", "keypoints": "_keypoints.json"}
    files = {name: out / f"{photo.stem}{suffix}" for name, suffix in suffixes.items()}
    if files["image"].exists() and files["image"].samefile(photo):
        raise InputError(f"{files['image']} is the photograph itself: choose another folder than {out}")
    with ExitStack() as stack:
        find = None if landmarker is None else stack.enter_context(open_face_finder(landmarker))
        transform, points, _ = face_transform(pixels, str(photo), find, size)
    pixels = cut_portrait(pixels, transform, size)
    contents: dict[str, bytes | None] = {"image": png_bytes(Image.fromarray(pixels))}
    for name, annotator in (("mask", mask_annotator(parser, device=device)), ("sketch", sketch_annotator(None))):
        (contents[name],) = annotator.annotate([pixels])
    if landmarker is not None and points is not None:
        contents["keypoints"] = keypoints_file(move(points, transform), size, size, landmarker_name(landmarker))
    for name, content in contents.items():
        assert content is not None
        write_whole(files[name], content)
    return {name: files[name] for name in contents}
