"""What is this file, what is odd about it, and its repaired canonical form.

`inspect` finds out whether a file is a mask, a sketch or keypoints and lists every problem as one sentence; `fix`
writes the canonical form. Only what is certain is repaired (sides, blended colours, order, inversion); the rest is
left to the eye, because a repair that invents parts of a face is worse than a warning.
"""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image
from scipy import ndimage

from likeness.conditions import CONDITIONS
from likeness.conditions.base import Reading, Source
from likeness.conditions.classes import CLASSES
from likeness.conditions.keypoints import FLIPS
from likeness.conditions.layout import broken_rules, exchanged_pairs, measure
from likeness.conditions.mask_schemes import exchange, side_notes
from likeness.conditions.pictures import describe, mask_picture, png_bytes
from likeness.files import write_whole
from likeness.types import InputError

SPECK = 2e-4
"""Share of the picture below which a separate piece of a class counts as a speck."""


@dataclass(frozen=True)
class Report:
    """What one file holds."""

    condition: str
    """Name in `CONDITIONS`."""
    scheme: str
    """What it was recognised as."""
    size: tuple[int, int] | None
    """(width, height) in pixels; None for keypoints."""
    classes: tuple[tuple[str, int, float], ...]
    """(class, pixels, share of the picture), by class; empty but for masks."""
    problems: tuple[str, ...]
    """One sentence each; empty when all is well."""
    raw: np.ndarray
    """As in `Reading.raw`: canonical, but with the sides as found."""


def inspect(source: Source, name: str | None = None) -> Report:
    """Find out what `source` is and what is wrong with it.

    Args:
        source: anything that a condition reads.
        name: a name in `CONDITIONS`; None tries all, keypoints first by the kind of file, then mask, then sketch.

    Raises:
        InputError: `name` is unknown, or `source` is nothing that is known here; the sentence says why not.
    """
    if name is not None and name not in CONDITIONS:
        raise InputError(f"{name!r} is no condition: choose from {', '.join(CONDITIONS)}")
    reasons = {}
    for candidate in _candidates(source) if name is None else (name,):
        try:
            reading = CONDITIONS[candidate].read(source)
        except InputError as error:
            if name is not None:
                raise
            reasons[candidate] = str(error)
            continue
        return _report(candidate, reading)
    if len(set(reasons.values())) == 1:  # missing or unreadable: the same for all
        raise InputError(next(iter(reasons.values())))
    told = "; ".join(f"as {candidate}: {reason}" for candidate, reason in reasons.items())
    raise InputError(f"{describe(source)} is no condition that is known here ({told})")


def _candidates(source: Source) -> tuple[str, ...]:
    if isinstance(source, np.ndarray):
        points = source.ndim == 2 or (source.ndim == 3 and len(source) == 1)
        points = points and source.shape[-1] in (2, 3) and source.shape[-2] in FLIPS
        return ("keypoints",) if points else ("mask", "sketch")
    if isinstance(source, str | os.PathLike):
        suffix = Path(source).suffix.lower()
        if suffix in (".json", ".txt", ".pts", ".csv"):
            return ("keypoints",)
        if suffix in (".npy", ".npz"):
            return ("keypoints", "mask", "sketch")
        if Path(source).is_dir():
            return ("mask",)
    return ("mask", "sketch")


def _report(name: str, reading: Reading) -> Report:
    raw = reading.raw
    problems = [note.text for note in reading.notes]
    classes: tuple[tuple[str, int, float], ...] = ()
    size = None if name == "keypoints" else (raw.shape[1], raw.shape[0])
    if size is not None:
        problems += _size_problems(size)
    if name == "mask":
        counts = np.bincount(raw.ravel(), minlength=len(CLASSES))
        classes = tuple((CLASSES[i], int(counts[i]), float(counts[i] / raw.size)) for i in np.flatnonzero(counts))
        problems += [problem for problem in _mask_problems(raw) if problem not in problems]
    if name == "sketch":
        ink = float((raw < 128).mean())
        if ink < 0.005:
            problems.append(
                f"only {100 * ink:.2f} % of the sketch is ink: the lines may be too few or too thin to guide"
            )
        if ink > 0.35:
            problems.append(f"{100 * ink:.0f} % of the sketch is ink: shaded areas guide less well than lines")
    return Report(name, reading.scheme, size, classes, tuple(problems), raw)


def _size_problems(size: tuple[int, int]) -> list[str]:
    width, height = size
    problems = []
    if width != height:
        problems.append(f"it is not square ({width}x{height}): crop or pad it to the aspect ratio of the image")
    if min(size) < 64:
        problems.append(f"it is only {width}x{height} pixels: small parts such as eyes are lost below 64")
    if width % 8 or height % 8:
        problems.append(f"its sides ({width}x{height}) are no multiples of 8: it will be resized")
    return problems


def _mask_problems(labels: np.ndarray) -> list[str]:
    layout = measure(labels)
    present = layout.pixels > 0
    problems = [note.text for note in side_notes(labels)]
    if not present[1]:
        problems.append("there is no skin: without it there is no face")
    if not present[2]:
        problems.append("there is no nose")
    if not present[[3, 4, 5]].any():
        problems.append("there are no eyes")
    elif not present[3] and present[4] != present[5]:
        problems.append(f"there is only one eye ({CLASSES[4 if present[4] else 5]}): fine in profile, odd otherwise")
    if not present[[10, 11, 12]].any():
        problems.append("there is no mouth and there are no lips")
    left, top, right, _ = layout.box[1]
    edges = [("left", left == 0), ("right", right == labels.shape[1] - 1), ("top", top == 0)]
    cut = [side for side, touches in edges if touches]
    if present[1] and cut:
        problems.append(f"the skin runs into the {' and '.join(cut)} edge: the face looks cut off")
    for index in np.flatnonzero(present):
        if layout.pixels[index] < max(4, SPECK * labels.size / 4):
            problems.append(f"{CLASSES[index]} has only {layout.pixels[index]} pixels: it may be a slip of the brush")
            continue
        pieces, count = ndimage.label(labels == index, structure=np.ones((3, 3)))
        specks = int((np.bincount(pieces.ravel())[1:] < SPECK * labels.size).sum()) if count > 1 else 0
        if index and specks:
            problems.append(f"{CLASSES[index]} has {specks} separate specks under {100 * SPECK:.2f} % of the picture")
    odd = broken_rules(layout)
    if odd and present[1]:
        problems.append(f"the layout is unusual for a face: {'; '.join(odd[:3])}")
    return problems


def fix(report: Report, out: Path) -> Path:
    """Write the canonical form: palette PNG for masks, grey PNG for sketches, JSON for keypoints.

    Sides that lie exchanged in a mask are put right. Specks and missing parts stay as they are.

    Args:
        report: what `inspect` found.
        out: the file to write, ending in .png (mask, sketch) or .json (keypoints).

    Returns:
        `out`.

    Raises:
        InputError: another ending, or the file cannot be written.
    """
    out = Path(out)
    wanted = ".json" if report.condition == "keypoints" else ".png"
    if out.suffix.lower() != wanted:
        raise InputError(f"{out} should end in {wanted}, the canonical form of a {report.condition} file")
    if report.condition == "keypoints":
        content = json.dumps({"points": [[round(float(x), 6), round(float(y), 6)] for x, y in report.raw]}).encode()
    else:
        raw = report.raw
        if report.condition == "mask":
            raw = exchange(raw, exchanged_pairs(measure(raw)))
        content = png_bytes(mask_picture(raw) if report.condition == "mask" else Image.fromarray(raw))
    write_whole(out, content)
    return out


def format_report(report: Report) -> str:
    """The report as plain text: what it is, the class table, the problems."""
    size = f", {report.size[0]}x{report.size[1]}" if report.size else ""
    lines = [f"{report.condition}: {report.scheme}{size}"]
    if report.classes:
        lines += ["", f"{'class':<12}{'pixels':>9}{'share':>9}"]
        lines += [f"{name:<12}{pixels:>9}{100 * share:>7.2f} %" for name, pixels, share in report.classes]
    lines += [
        "",
        f"{len(report.problems)} problem{'s' * (len(report.problems) != 1)}" if report.problems else "no problems",
    ]
    lines += [f"  - {problem}" for problem in report.problems]
    return "\n".join(lines)
