"""Check a prepared folder for faults that would spoil a training, in one pass.

Every file is read once and about 200 bytes per row are stored, so that a million faces fit a laptop. Faults of a mask,
sketch or keypoints file are those that its reader in `likeness.conditions` reports. `fix` applies the fixes.
"""

from __future__ import annotations

import hashlib
import os
from array import array
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path

import numpy as np
from PIL import Image

from likeness.conditions import CONDITIONS
from likeness.conditions.images import check_aspect, read_rgb
from likeness.conditions.keypoints import part_points
from likeness.conditions.mask.classes import CLASS_INDEX
from likeness.conditions.mask.geometry import measure
from likeness.data.ahead import read_ahead
from likeness.data.folder import METADATA, column_of, file_inside, metadata_lines, split_inside, splits_of
from likeness.prepare.fix import FIXES, KINDS, Finding, MetadataRow, fix_captions, read_rows
from likeness.prepare.near_duplicates import first_duplicates, image_hash
from likeness.types import InputError, Progress

SKIN_GAIN = 0.4
"""Fraction of the face that must gain the color of skin when red and blue are swapped, to count as BGR.

Of 20,000 CelebA faces 8, in blue light, exceed it unchanged, and 2.5 % do not reach it as BGR. Reported if most do."""

MAX_DISTANCE = 0.2
"""Mean distance of eyes, nose and lips between keypoints and mask, in face widths, above which they disagree.

MediaPipe's landmarks mostly stay below 0.1. In 20,000 CelebA faces 4 exceed 0.2, all due to wrong parsed masks."""

ROWS_PER_TASK = 16
"""Rows that a thread reads at a time."""

HASHES = np.dtype([("side", "u8"), ("image", "u8", 5), *((name, "u8") for name in ("bgr", "identity", *CONDITIONS))])
"""What is stored of a row to compare it with others: the side of its image in pixels, whether it looks like BGR, and
hashes; 0 if unknown."""


@dataclass
class Checked:
    """Result of a check."""

    rows: int
    findings: list[Finding]
    """Sorted by split and line."""
    state: str
    """Hash of the metadata that was checked, by which a fix list knows it."""


@dataclass
class CheckedRow:
    """What was found in one row and its files."""

    row: MetadataRow
    findings: list[Finding] = field(default_factory=list)
    files: list[Path] = field(default_factory=list)
    """Existing files."""
    hashes: np.ndarray = field(default_factory=lambda: np.zeros((), HASHES))

    def add(self, column: str, kind: str, sentence: str, fix: str | None) -> None:
        """Add a finding, at most one per column and kind."""
        if not any(found.column == column and found.kind == kind for found in self.findings):
            self.findings.append(Finding(*self.row.place, column, kind, sentence, fix))


def check_folder(folder: Path, progress: Progress = lambda done, total: None) -> Checked:
    """Check every row and file of a prepared folder, or of its splits. Nothing is written.

    Raises:
        InputError: the metadata is missing, cannot be read, or it has no rows.
    """
    folder = folder.resolve()
    splits, total, state = splits_of(folder), 0, hashlib.sha256()
    for split in splits:
        for _, line in metadata_lines(folder, split):
            total += 1
            state.update(line)
    if not total:
        raise InputError(f"{folder} has no rows: its {METADATA} is empty")
    rows = (row for split in splits for row in read_rows(folder, split))
    groups = iter(lambda: list(islice(rows, ROWS_PER_TASK)), [])
    places: list[tuple[str, int, str]] = []
    findings, hashes, threads = [], bytearray(), os.cpu_count() or 1
    files, folders = array("Q"), set[tuple[str, Path, str]]()
    for group in read_ahead(
        lambda group: [check_row(folder, row) for row in group], groups, depth=2 * threads, threads=threads
    ):
        for checked in group:
            findings += checked.findings
            places.append(checked.row.place)
            hashes += checked.hashes.tobytes()
            files.extend(map(short_hash, checked.files))
            folders |= {(checked.row.split, path.parent, path.suffix) for path in checked.files}
        progress(len(places), total)
    findings += compare_rows(places, np.frombuffer(hashes, HASHES))
    for split, place, suffix in sorted(folders):
        findings += unlisted_files(split_inside(folder, split), split, place, suffix, files)
    findings.sort(key=lambda found: (splits.index(found.split), found.line))
    return Checked(total, findings, state.hexdigest()[:16])


def short_hash(content: bytes | str | Path) -> int:
    """Hash to 64 bits, never 0."""
    content = content if isinstance(content, bytes) else str(content).encode(errors="surrogateescape")
    return int.from_bytes(hashlib.blake2b(content, digest_size=8).digest()) | 1


# One row


def check_row(folder: Path, row: MetadataRow) -> CheckedRow:
    """Read the files of a row and report the faults of each."""
    checked = CheckedRow(row)
    if row.fault:
        checked.add("", "broken-row", row.fault, "drop-row")
        return checked
    files = existing_files(checked, split_inside(folder, row.split))
    checked.files = list(files.values())
    shape = check_image(checked, files["file_name"]) if "file_name" in files else None
    raw = {
        name: check_condition(checked, name, files[column_of(name)], shape)
        for name in CONDITIONS
        if column_of(name) in files
    }
    labels, points = raw.get("mask"), raw.get("keypoints")
    faulty = {found.column for found in checked.findings} & {column_of("mask"), column_of("keypoints")}
    if labels is not None and points is not None and not faulty:  # swapped sides are distant as well
        distance = distance_of_parts(labels, points)
        if distance > MAX_DISTANCE:
            sentence = f"the keypoints are {distance:.2f} face widths away from the eyes, nose and lips of the mask"
            checked.add(column_of("keypoints"), "misplaced-keypoints", sentence, None)
    if (identity := row.values.get("identity")) not in (None, ""):
        checked.hashes["identity"] = short_hash(str(identity))
    if row.values.get("text") is not None:
        for kind, sentence in fix_captions(row.values["text"], KINDS)[1]:
            checked.add("text", kind, sentence, "captions")
    return checked


def existing_files(checked: CheckedRow, root: Path) -> dict[str, Path]:
    """Return column -> file; report files that do not exist, are not below `root` or not regular."""
    files = {}
    for column, name in checked.row.files.items():
        fix = "drop-row" if column == "file_name" else "drop-file"
        try:
            path = file_inside(root, name, {}, column)
        except InputError as error:
            checked.add(column, "broken-row", str(error), fix)
            continue
        if os.path.exists(path):  # unlike Path.exists, also False if the name is too long
            files[column] = path
        else:
            checked.add(column, "missing-file", f"{name} does not exist", fix)
    return files


def check_image(checked: CheckedRow, path: Path) -> tuple[int, int] | None:
    """Report the faults of an image; returns its (height, width), or None if it cannot be read."""
    try:
        image = read_rgb(path, checked.row.values["file_name"])
    except InputError as error:
        checked.add("file_name", "corrupt-file", str(error), "drop-row")
        return None
    if image.width == image.height:
        checked.hashes["side"] = image.width
    else:
        sentence = f"the image is {image.width}x{image.height}, but training images must be square"
        checked.add("file_name", "wrong-size", sentence, None)
    small = image.resize((32, 32), Image.Resampling.BOX)
    if np.ptp(np.asarray(small), axis=(0, 1)).max() < 16:
        checked.add("file_name", "blank", "the image has one tone only", "drop-row")
        return image.height, image.width
    checked.hashes["image"] = np.frombuffer(image_hash(small), np.uint64)
    face = np.asarray(small, dtype=np.float32)[10:24, 8:24]  # brows to chin of an aligned face
    checked.hashes["bgr"] = skin_fraction(face[..., ::-1]) - skin_fraction(face) > SKIN_GAIN
    return image.height, image.width


def skin_fraction(rgb: np.ndarray) -> float:
    """Return the fraction of pixels with a hue of skin: red above green above blue. float [H, W, 3]."""
    red, green, blue = np.moveaxis(rgb, 2, 0)
    warm = (red - blue > 0.1 * rgb.mean(axis=2)) & (red - green > 0.2 * (red - blue)) & (green >= blue)
    return float(warm.mean())


def check_condition(
    checked: CheckedRow, name: str, path: Path, image_shape: tuple[int, int] | None
) -> np.ndarray | None:
    """Report the faults of a condition; returns its raw form, or None if it cannot be read."""
    column = column_of(name)
    try:
        reading = CONDITIONS[name].read(path, name=checked.row.values[column])
    except InputError as error:
        checked.add(column, error.kind or "corrupt-file", str(error), "drop-file")
        return None
    for note in reading.notes:
        if note.kind in KINDS:
            fix = "rewrite" if note.kind in CONDITIONS[name].repairable else "drop-file"
            checked.add(column, note.kind, note.text, fix)
    if image_shape is not None and name != "keypoints":
        try:
            check_aspect(reading.raw.shape[:2], image_shape, name)
        except InputError as error:
            square = image_shape[0] == image_shape[1]  # otherwise the image may be the one that was cropped
            checked.add(column, "wrong-size", str(error), "drop-file" if square else None)
    checked.hashes[name] = short_hash(reading.raw.tobytes())
    return reading.raw


def distance_of_parts(labels: np.ndarray, points: np.ndarray) -> float:
    """Return the mean distance between eyes, nose and lips of mask and keypoints, in widths of the skin.

    Parts that the mask lacks are ignored; the distance is 0 if it lacks all of them or the skin. Aligned faces differ
    by less than 0.1: this detects keypoints of another crop, scale or axis order, but not those of another face.

    Args:
        labels: uint8 [H, W].
        points: float32 [P, 2], (x, y) in fractions of the image.
    """
    step = max(1, min(labels.shape) // 128)  # enough for centers
    labels = labels[::step, ::step]
    geometry = measure(labels)
    size = labels.shape[::-1]
    skin = np.ptp(geometry.box[CLASS_INDEX["skin"], [0, 2]]) / size[0]
    parts = {"l_eye": ("l_eye",), "r_eye": ("r_eye",), "nose": ("nose bridge", "nose base"), "u_lip": ("outer lips",)}
    offsets = []
    for part, strokes in parts.items():
        index: list[int] = []
        for stroke in strokes:
            index += part_points(stroke, len(points))
        offsets.append(geometry.center[CLASS_INDEX[part]] / size - points[index].mean(axis=0))
    distances = np.linalg.norm(offsets, axis=1)  # [4], NaN if the mask lacks the part
    distances = distances[np.isfinite(distances)]
    return float(distances.mean() / skin) if len(distances) and skin > 0 else 0.0


# All rows


def compare_rows(places: list[tuple[str, int, str]], rows: np.ndarray) -> Iterator[Finding]:
    """Find faults between rows: `places` (split, line, file_name) and `HASHES` of each, held-out splits first."""

    def finding(row: int, column: str, kind: str, sentence: str, fix: str | None = None) -> Finding:
        return Finding(*places[row], column, kind, sentence, fix)

    def image(row: int) -> str:
        split, _, name = places[row]
        return name if split == "." else f"{split}/{name}"

    sides = rows["side"]
    values, counts = np.unique(sides[sides > 0], return_counts=True)
    usual = values[counts.argmax()] if len(values) and 2 * counts.max() > counts.sum() else 0
    for row in np.flatnonzero((sides > 0) & (sides < usual)).tolist():
        yield finding(row, "file_name", "wrong-size", f"its side is {sides[row]} pixels, most have {usual}")
    if 2 * (swapped := np.count_nonzero(rows["bgr"])) > len(rows):
        sentence = f"{swapped} of {len(rows)} faces have the color of skin only with red and blue swapped: save as RGB"
        yield finding(int(rows["bgr"].argmax()), "file_name", "color-order", sentence)
    splits = [split for split, _, _ in places]
    first = first_duplicates(rows["image"].tobytes()).tolist()
    for row, other in enumerate(first):
        if other < row:
            kind = "duplicate" if splits[other] == splits[row] else "leak"
            yield finding(row, "file_name", kind, f"it is the same image as {image(other)}", "drop-row")
    for row, other in first_equal(rows["identity"]):
        if splits[other] != splits[row] and splits[first[row]] == splits[row]:  # otherwise reported as a leak already
            yield finding(row, "identity", "leak", f"it has the identity of {image(other)}", "drop-row")
    for name in CONDITIONS:
        for row, other in first_equal(rows[name]):
            if first[row] == row:  # duplicate images may share their mask
                sentence = f"it has the {name} of {image(other)}: one of the two is wrong"
                yield finding(row, column_of(name), "shared-condition", sentence)


def first_equal(hashes: np.ndarray) -> list[tuple[int, int]]:
    """Return (row, first row with the same hash) of every row that is not the first; 0 means no value."""
    _, firsts, group = np.unique(hashes, return_index=True, return_inverse=True)
    first = firsts[group]
    return [(row, int(first[row])) for row in np.flatnonzero((hashes > 0) & (first < np.arange(len(hashes)))).tolist()]


def unlisted_files(root: Path, split: str, place: Path, suffix: str, listed: array[int]) -> Iterator[Finding]:
    """Find files of a folder that contains listed ones (by the hashes of their paths) with the same suffix."""
    names = sorted(entry.name for entry in os.scandir(place) if not entry.name.startswith("."))
    paths = [place / name for name in names if Path(name).suffix == suffix]
    known = np.isin(np.array([short_hash(path) for path in paths], np.uint64), np.array(listed, np.uint64))
    for path, is_listed in zip(paths, known, strict=True):
        if not is_listed:
            name = path.relative_to(root).as_posix()
            yield Finding(split, 0, name, "", "unlisted-file", f"no row names {name}", None)


def format_findings(checked: Checked) -> str:
    """Format the findings as text: a table of kinds and counts, then the first three of each kind."""
    if not checked.findings:
        return f"rows: {checked.rows}, no faults"
    by_kind = {kind: [found for found in checked.findings if found.kind == kind] for kind in KINDS}
    by_kind = {kind: findings for kind, findings in by_kind.items() if findings}
    fixable = {kind: sum(found.fix is not None for found in findings) for kind, findings in by_kind.items()}
    lines = [f"{'kind':<20}{'count':>8}{'fixable':>10}"]
    lines += [f"{kind:<20}{len(findings):>8}{fixable[kind]:>10}" for kind, findings in by_kind.items()]
    for kind, findings in by_kind.items():
        lines += ["", f"{kind}: {KINDS[kind]}"]
        for found in findings[:3]:
            at = f"{found.split}/{METADATA}".removeprefix("./") + (f", line {found.line}" if found.line else "")
            lines.append(f"  {at}, {found.file_name}: {found.sentence}")
            lines[-1] += f" -> {FIXES[found.fix]}" if found.fix else ""
        if len(findings) > 3:
            lines.append(f"  and {len(findings) - 3} more")
    total = f"rows: {checked.rows}, faults: {len(checked.findings)}, fixable: {sum(fixable.values())}"
    return "\n".join([*lines, "", total])
