"""One pass over a prepared folder finds what would spoil a training run.

Every file is read once and only numbers are kept of it, some 200 bytes a row, so that a million faces fit a laptop.
What is wrong with a mask, sketch or keypoints file is for the readers of `likeness.conditions` to say; here their
sentences are sorted into kinds. `mend` writes the fix list and carries it out.
"""

from __future__ import annotations

import hashlib
import os
from array import array
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path

import numpy as np
from PIL import Image

from likeness.conditions import CONDITIONS
from likeness.conditions.images import check_aspect, open_image
from likeness.conditions.keypoints import STROKES
from likeness.conditions.mask.classes import CLASS_INDEX
from likeness.conditions.mask.geometry import measure
from likeness.data.ahead import read_ahead
from likeness.data.folder import METADATA, column_of
from likeness.prepare.alike import NO_PRINT, fingerprint, first_alike
from likeness.prepare.faults import KINDS, MENDING, Finding, Row, metadata_lines, read_rows, splits_of
from likeness.prepare.mend import mend_captions
from likeness.types import InputError

SKIN_GAIN = 0.4
"""Share of the face that must take on the colour of skin when red and blue change places, for it to pass for BGR.

Of 20,000 CelebA faces 8 in blue light reach it as they are, and 2.5 % do not reach it as BGR."""

ASTRAY = 0.2
"""Mean distance of eyes, nose and lips between keypoints and mask, in widths of the skin, above which they disagree.

MediaPipe's landmarks mostly stay below 0.1, of hand-made and of parsed masks; in 20,000 CelebA faces 4 exceed 0.2, all
with a mask that the parser got wrong."""

TOGETHER = 16
"""Rows that a thread reads at a time."""


@dataclass
class Seen:
    """What reading the files of one row has shown."""

    row: Row
    findings: list[Finding] = field(default_factory=list)
    files: list[Path] = field(default_factory=list)
    """Those that are there."""
    side: int = 0
    """The picture's side in pixels; 0 where it is not square or cannot be read."""
    fingerprint: bytes = NO_PRINT
    contents: dict[str, int] = field(default_factory=dict)
    """Condition -> hash of its raw form."""

    def tell(self, column: str, kind: str, sentence: str, fix: str | None) -> None:
        """Add a finding, once for a column and kind."""
        if not any(found.column == column and found.kind == kind for found in self.findings):
            self.findings.append(Finding(*self.row.place, column, kind, sentence, fix))


@dataclass
class Memory:
    """What is kept of all rows, in the order in which they were read: held-out splits first, `train` last."""

    places: list[tuple[str, int, str]] = field(default_factory=list)
    """(split, line, file_name)."""
    sides: array[int] = field(default_factory=lambda: array("L"))
    fingerprints: bytearray = field(default_factory=bytearray)
    people: array[int] = field(default_factory=lambda: array("Q"))
    """Hash of the identity; 0 where it is not known."""
    contents: dict[str, array[int]] = field(default_factory=lambda: {name: array("Q") for name in CONDITIONS})
    """Condition -> hashes of the raw forms; 0 where there is none."""
    files: array[int] = field(default_factory=lambda: array("Q"))
    """Hashes of the paths."""
    folders: set[tuple[str, Path, str]] = field(default_factory=set)
    """(split, folder, suffix) of all files."""


@dataclass(frozen=True)
class Checked:
    """What a pass has found."""

    rows: int
    findings: list[Finding]
    """By split and line."""


def check_folder(folder: Path, progress: Callable[[int, int], None] | None = None) -> Checked:
    """Look at every row and file of a prepared folder once; nothing is written.

    Args:
        folder: a directory with `metadata.jsonl`, or the parent of splits that have one.
        progress: called as (rows done, rows in all).

    Raises:
        InputError: there is no metadata, it cannot be read, or it has no rows.
    """
    folder = folder.resolve()
    splits = splits_of(folder)
    total = sum(1 for split in splits for _ in metadata_lines(folder, split))
    if not total:
        raise InputError(f"{folder} has no rows: its {METADATA} is empty")
    rows = (row for split in splits for row in read_rows(folder, split))
    groups = iter(lambda: list(islice(rows, TOGETHER)), [])
    memory, findings, threads = Memory(), [], os.cpu_count() or 1
    for group in read_ahead(
        lambda group: [examine(folder, row) for row in group], groups, depth=2 * threads, threads=threads
    ):
        for seen in group:
            findings += seen.findings
            remember(memory, seen)
        if progress is not None:
            progress(len(memory.places), total)
    first = first_alike(memory.fingerprints)
    findings += small_pictures(memory) + repeated_pictures(memory, first) + shared_people(memory, first)
    findings += shared_conditions(memory, first) + unlisted_files(memory, folder)
    findings.sort(key=lambda found: (splits.index(found.split), found.line))
    return Checked(total, findings)


def remember(memory: Memory, seen: Seen) -> None:
    """Keep of a row what the comparison of all rows needs."""
    person = seen.row.values.get("identity")
    memory.places.append(seen.row.place)
    memory.sides.append(seen.side)
    memory.fingerprints += seen.fingerprint
    memory.people.append(0 if person in (None, "") else short_hash(str(person)))
    for name, hashes in memory.contents.items():
        hashes.append(seen.contents.get(name, 0))
    memory.files.extend(short_hash(path) for path in seen.files)
    memory.folders |= {(seen.row.split, path.parent, path.suffix) for path in seen.files}


def short_hash(content: bytes | str | Path) -> int:
    """64 bits, never 0."""
    content = content if isinstance(content, bytes) else str(content).encode(errors="surrogateescape")
    return int.from_bytes(hashlib.blake2b(content, digest_size=8).digest()) | 1


# One row


def examine(folder: Path, row: Row) -> Seen:
    """Read the files of a row and say what is wrong with each."""
    seen = Seen(row)
    if row.fault:
        seen.tell("", "broken-row", row.fault, "drop-row")
        return seen
    files = existing_files(seen, folder / row.split)
    seen.files = list(files.values())
    shape = examine_picture(seen, files["file_name"]) if "file_name" in files else None
    raw = {
        name: examine_condition(seen, name, files[column_of(name)], shape)
        for name in CONDITIONS
        if column_of(name) in files
    }
    labels, points = raw.get("mask"), raw.get("keypoints")
    faulty = {found.column for found in seen.findings} & {column_of("mask"), column_of("keypoints")}
    if labels is not None and points is not None and not faulty:  # exchanged sides lie apart as well
        off = distance_of_parts(labels, points)
        if off > ASTRAY:
            sentence = f"the keypoints lie {off:.2f} widths of the face away from the eyes, nose and lips of the mask"
            seen.tell(column_of("keypoints"), "misplaced-keypoints", sentence, None)
    if row.values.get("text") is not None:
        for kind, sentence in mend_captions(row.values["text"], KINDS)[1]:
            seen.tell("text", kind, sentence, "captions")
    return seen


def existing_files(seen: Seen, root: Path) -> dict[str, Path]:
    """Column -> file; what is not there or not below `root` is told."""
    files = {}
    for column, name in seen.row.files.items():
        fix = "drop-row" if column == "file_name" else "drop-file"
        try:
            path = Path(os.path.normpath(root / name))
            inside = Path(os.path.realpath(path)).is_relative_to(os.path.realpath(root))
        except (TypeError, ValueError):  # no string, or one that no file system takes
            seen.tell(column, "broken-row", f"{column} is {name!r}, which names no file", fix)
            continue
        if not inside:
            seen.tell(column, "broken-row", f"{column} {name!r} points outside the folder", fix)
        elif not os.path.exists(path):  # unlike Path.exists also False where a name is too long
            seen.tell(column, "missing-file", f"{name} is not there", fix)
        else:
            files[column] = path
    return files


def examine_picture(seen: Seen, path: Path) -> tuple[int, int] | None:
    """(height, width) of the picture; None where it cannot be read."""
    try:
        picture = open_image(path).convert("RGB")
    except InputError as error:
        seen.tell("file_name", "corrupt-file", str(error).replace(str(path), seen.row.values["file_name"]), "drop-row")
        return None
    if picture.width == picture.height:
        seen.side = picture.width
    else:
        sentence = f"the picture is {picture.width}x{picture.height}, but training pictures must be square"
        seen.tell("file_name", "wrong-size", sentence, None)
    small = picture.resize((32, 32), Image.Resampling.BOX)
    if np.ptp(np.asarray(small), axis=(0, 1)).max() < 16:
        seen.tell("file_name", "blank", "the picture is all of one tone", "drop-row")
        return picture.height, picture.width
    seen.fingerprint = fingerprint(small)
    face = np.asarray(small, dtype=np.float32)[10:24, 8:24]  # from the brows to the chin where faces are aligned
    if skin_share(face[..., ::-1]) - skin_share(face) > SKIN_GAIN:
        sentence = "the face has the colour of skin once red and blue change places: BGR, or blue light"
        seen.tell("file_name", "colour-order", sentence, None)
    return picture.height, picture.width


def skin_share(rgb: np.ndarray) -> float:
    """Share of the pixels with the hue of skin of any shade: red, then green, then blue. float [H, W, 3]."""
    red, green, blue = np.moveaxis(rgb, 2, 0)
    warm = (red - blue > 0.1 * rgb.mean(axis=2)) & (red - green > 0.2 * (red - blue)) & (green >= blue)
    return float(warm.mean())


def examine_condition(seen: Seen, name: str, path: Path, shape: tuple[int, int] | None) -> np.ndarray | None:
    """The raw form of a condition; None where it cannot be read. `shape` is (height, width) of the picture."""
    column = column_of(name)
    try:
        reading = CONDITIONS[name].read(path, name=seen.row.values[column])
    except InputError as error:
        seen.tell(column, error.kind or "corrupt-file", str(error), "drop-file")
        return None
    for note in reading.notes:
        if note.kind in KINDS:
            # Keypoints may be misnumbered or mirrored: which of both, a rewrite could only guess.
            fix = "rewrite" if note.kind in CONDITIONS[name].repairable else "drop-file"
            seen.tell(column, note.kind, note.text, fix)
    if shape is not None and name != "keypoints":
        try:
            check_aspect(reading.raw.shape[:2], shape, name)
        except InputError:
            (height, width), (high, wide) = reading.raw.shape[:2], shape
            fix = "drop-file" if high == wide else None  # otherwise it may be the picture that was cropped
            seen.tell(column, "wrong-size", f"the {name} is {width}x{height}, its picture {wide}x{high}", fix)
    seen.contents[name] = short_hash(reading.raw.tobytes())
    return reading.raw


def distance_of_parts(labels: np.ndarray, points: np.ndarray) -> float:
    """Mean distance between the eyes, nose and lips of mask and keypoints, in widths of the skin.

    Parts that the mask lacks are left out; 0 where it lacks all of them or the skin. Aligned faces differ by less than
    0.1, so keypoints of another face are not found out: those of another crop, scale or order of axes are.

    Args:
        labels: uint8 [H, W].
        points: float32 [P, 2], (x, y), where [0, 1] spans the picture.
    """
    step = max(1, min(labels.shape) // 128)  # centres need no finer look
    labels = labels[::step, ::step]
    layout = measure(labels)
    size = labels.shape[::-1]
    skin = np.ptp(layout.box[CLASS_INDEX["skin"], [0, 2]]) / size[0]
    parts = {"l_eye": ("l_eye",), "r_eye": ("r_eye",), "nose": ("nose bridge", "nose base"), "u_lip": ("outer lips",)}
    away = []
    for part, strokes in parts.items():
        index: list[int] = []
        for stroke in strokes:
            _, _, ibug, mediapipe = STROKES[stroke]
            index += ibug if len(points) == 68 else mediapipe
        away.append(layout.centre[CLASS_INDEX[part]] / size - points[index].mean(axis=0))
    distances = np.linalg.norm(away, axis=1)  # [4], NaN where the mask lacks the part
    distances = distances[np.isfinite(distances)]
    return float(distances.mean() / skin) if len(distances) and skin > 0 else 0.0


# All rows


def picture_of(memory: Memory, row: int) -> str:
    """How sentences call the picture of row number `row`."""
    split, _, name = memory.places[row]
    return name if split == "." else f"{split}/{name}"


def small_pictures(memory: Memory) -> list[Finding]:
    """Pictures that are smaller than the size that most have, where most have one."""
    sides = np.array(memory.sides)
    values, counts = np.unique(sides[sides > 0], return_counts=True)
    if not len(values) or 2 * counts.max() <= counts.sum():
        return []
    usual = values[counts.argmax()]
    return [
        Finding(
            *memory.places[row], "file_name", "wrong-size", f"its side is {sides[row]} pixels, most have {usual}", None
        )
        for row in np.flatnonzero((sides > 0) & (sides < usual)).tolist()
    ]


def repeated_pictures(memory: Memory, first: np.ndarray) -> list[Finding]:
    """Duplicates within a split, and leaks from an earlier one; the first is kept."""
    found = []
    for row in np.flatnonzero(first < np.arange(len(first))).tolist():
        other = int(first[row])
        kind = "duplicate" if memory.places[other][0] == memory.places[row][0] else "leak"
        sentence = f"it shows the same picture as {picture_of(memory, other)}"
        found.append(Finding(*memory.places[row], "file_name", kind, sentence, "drop-row"))
    return found


def shared_people(memory: Memory, first: np.ndarray) -> list[Finding]:
    """Rows whose person is in an earlier split; those whose picture leaks are told already."""
    people = np.array(memory.people, dtype=np.uint64)
    _, firsts, group = np.unique(people, return_index=True, return_inverse=True)
    splits = [split for split, _, _ in memory.places]
    found = []
    for row, other in enumerate(firsts[group].tolist()):
        if people[row] and splits[other] != splits[row] and splits[first[row]] == splits[row]:
            sentence = f"its identity is that of {picture_of(memory, other)}"
            found.append(Finding(*memory.places[row], "identity", "leak", sentence, "drop-row"))
    return found


def shared_conditions(memory: Memory, first: np.ndarray) -> list[Finding]:
    """Conditions that an earlier row with another picture has as well."""
    found = []
    for name, hashes in memory.contents.items():
        contents = np.array(hashes, dtype=np.uint64)
        _, firsts, group = np.unique(contents, return_index=True, return_inverse=True)
        for row, other in enumerate(firsts[group].tolist()):
            if contents[row] and other < row and first[row] == row:  # the same picture may have the same mask
                sentence = f"it has the {name} of {picture_of(memory, other)}: one of the two is wrong"
                found.append(Finding(*memory.places[row], column_of(name), "shared-condition", sentence, None))
    return found


def unlisted_files(memory: Memory, folder: Path) -> list[Finding]:
    """Files that lie beside listed ones and have their suffix, but which no row names."""
    listed = np.sort(np.array(memory.files, dtype=np.uint64))
    found = []
    for split, place, suffix in sorted(memory.folders):
        names = [entry.name for entry in os.scandir(place) if not entry.name.startswith(".")]
        paths = [place / name for name in sorted(names) if Path(name).suffix == suffix]
        hashes = np.array([short_hash(path) for path in paths], dtype=np.uint64)
        for index in np.flatnonzero(~np.isin(hashes, listed)).tolist():
            name = paths[index].relative_to(folder / split).as_posix()
            found.append(Finding(split, 0, name, "", "unlisted-file", f"no row names {name}", None))
    return found


def format_findings(checked: Checked, examples: int = 3) -> str:
    """The findings as plain text: a line a kind with its counts, then the first examples of each."""
    if not checked.findings:
        return f"rows: {checked.rows}, no faults"
    by_kind = {kind: [found for found in checked.findings if found.kind == kind] for kind in KINDS}
    by_kind = {kind: findings for kind, findings in by_kind.items() if findings}
    mendable = {kind: sum(found.fix is not None for found in findings) for kind, findings in by_kind.items()}
    lines = [f"{'kind':<20}{'count':>8}{'mendable':>10}"]
    lines += [f"{kind:<20}{len(findings):>8}{mendable[kind]:>10}" for kind, findings in by_kind.items()]
    for kind, findings in by_kind.items():
        lines += ["", f"{kind}: {KINDS[kind]}"]
        for found in findings[:examples]:
            at = f"{found.split}/{METADATA}".removeprefix("./") + (f", line {found.line}" if found.line else "")
            lines.append(f"  {at}, {found.file_name}: {found.sentence}")
            lines[-1] += f" -> {MENDING[found.fix]}" if found.fix else ""
        if len(findings) > examples:
            lines.append(f"  and {len(findings) - examples} more")
    total = f"rows: {checked.rows}, faults: {len(checked.findings)}, mendable: {sum(mendable.values())}"
    return "\n".join([*lines, "", total])
