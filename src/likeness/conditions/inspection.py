"""Recognize a condition file, list its problems, and write its canonical form.

`fix` repairs only what is certain: sides, blended colors, class order and inversion. It does not invent missing parts.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from likeness.conditions import CONDITIONS
from likeness.conditions.base import Reading, Source, describe
from likeness.conditions.keypoints import FLIPS
from likeness.conditions.mask import swap_classes
from likeness.conditions.mask.classes import CLASSES
from likeness.conditions.mask.formats import side_notes
from likeness.conditions.mask.geometry import SPECK, Geometry, broken_rules, measure, specks, swapped_pairs
from likeness.files import write_whole
from likeness.types import InputError, Note


@dataclass(frozen=True)
class Report:
    """What a file contains."""

    condition: str
    """Key of `CONDITIONS`."""
    scheme: str
    """The recognized format."""
    size: tuple[int, int] | None
    """(width, height) in pixels; None for keypoints."""
    classes: tuple[tuple[str, int, float], ...]
    """(class, pixels, fraction of the pixels) of a mask, by class."""
    problems: tuple[Note, ...]
    raw: np.ndarray
    """As `Reading.raw`: canonical, but with the sides as found."""


def inspect(source: Source, name: str | None = None) -> Report:
    """Recognize anything that a condition reads and find its problems. `name` is its condition; by default all that may
    have this type of source are tried. Raises `InputError` if `name` is unknown, or `source` is not a condition.
    """
    if name is not None and name not in CONDITIONS:
        raise InputError(f"Unknown condition {name!r}. Available: {', '.join(CONDITIONS)}")
    reasons = {}
    for candidate in _candidates(source) if name is None else (name,):
        try:
            return _report(candidate, CONDITIONS[candidate].read(source))
        except InputError as error:
            if name is not None or error.kind == "missing-file":
                raise
            reasons[candidate] = str(error)
    if len(set(reasons.values())) == 1:  # unreadable: the same reason for all
        raise InputError(next(iter(reasons.values())))
    text = "; ".join(f"as {candidate}: {reason}" for candidate, reason in reasons.items())
    raise InputError(f"{describe(source)} is not a known condition ({text})", kind="unknown-condition")


def _candidates(source: Source) -> list[str]:
    if isinstance(source, np.ndarray):
        points = source.ndim == 2 or (source.ndim == 3 and len(source) == 1)
        points = points and source.shape[-1] in (2, 3) and source.shape[-2] in FLIPS
        return ["keypoints"] if points else ["mask", "sketch"]
    if isinstance(source, str | os.PathLike):
        if Path(source).is_dir():
            return ["mask"]
        suffix = Path(source).suffix.lower()
        if found := [name for name in ("keypoints", "mask", "sketch") if suffix in CONDITIONS[name].input_suffixes]:
            return found
    return ["mask", "sketch"]


def _report(name: str, reading: Reading) -> Report:
    raw, notes = reading.raw, list(reading.notes)
    classes: tuple[tuple[str, int, float], ...] = ()
    size = None if name == "keypoints" else (raw.shape[1], raw.shape[0])
    if size is not None:
        notes += _size_problems(*size)
    if name == "mask":
        geometry = measure(raw)
        counts = geometry.pixels
        classes = tuple((CLASSES[i], int(counts[i]), float(counts[i] / raw.size)) for i in np.flatnonzero(counts))
        notes += mask_problems(raw, geometry, specked_classes(raw, geometry))
    if name == "sketch":
        ink = float((raw < 128).mean())
        if ink < 0.005:
            notes.append(Note("little-ink", f"only {100 * ink:.2f} % of the sketch is ink: too few or too thin lines"))
        if ink > 0.35:
            text = f"{100 * ink:.0f} % of the sketch is ink: shaded areas are a weaker condition than lines"
            notes.append(Note("much-ink", text))
    return Report(name, reading.scheme, size, classes, tuple(dict.fromkeys(notes)), raw)


def _size_problems(width: int, height: int) -> list[Note]:
    problems = []
    if width != height:
        problems.append(f"it is not square ({width}x{height}): crop or pad it to the aspect ratio of the image")
    if min(width, height) < 64:
        problems.append(f"it is only {width}x{height} pixels: below 64, small parts such as eyes are lost")
    if width % 8 or height % 8:
        problems.append(f"its sides ({width}x{height}) are not multiples of 8: it will be resized")
    return [Note("size", text) for text in problems]


def few_pixels(labels: np.ndarray) -> float:
    """Return the number of pixels below which a whole class is possibly a mistake."""
    return max(4, SPECK * labels.size / 4)


def specked_classes(labels: np.ndarray, geometry: Geometry) -> dict[int, int]:
    """Return the number of specks of each class that has any, without the background and classes of few pixels."""
    found = np.flatnonzero(geometry.pixels >= few_pixels(labels)).tolist()
    counts = {index: specks(labels, index, geometry.box[index])[1] for index in found if index}
    return {index: count for index, count in counts.items() if count}


def mask_problems(labels: np.ndarray, geometry: Geometry, specks_of: Mapping[int, int]) -> list[Note]:
    """Return what looks wrong in a mask, uint8 [H, W], of which `geometry` is the output of `measure` and `specks_of`
    that of `specked_classes`.
    """
    present = geometry.pixels > 0
    missing, other = [], []
    if not present[1]:
        missing.append("there is no skin, so there is no face")
    if not present[2]:
        missing.append("there is no nose")
    if not present[[3, 4, 5]].any():
        missing.append("there are no eyes")
    elif not present[3] and present[4] != present[5]:
        eye = CLASSES[4 if present[4] else 5]
        missing.append(f"there is only one eye ({eye}): correct in profile only")
    if not present[[10, 11, 12]].any():
        missing.append("there is no mouth and there are no lips")
    left, top, right, _ = geometry.box[1]
    edges = {"left": left == 0, "right": right == labels.shape[1] - 1, "top": top == 0}
    if present[1] and any(edges.values()):
        cut = " and ".join(edge for edge, touches in edges.items() if touches)
        other.append(f"the skin touches the {cut} edge: the face looks cut off")
    for index in np.flatnonzero(present):
        if (pixels := int(geometry.pixels[index])) < few_pixels(labels):
            other.append(f"{CLASSES[index]}: only {pixels} pixel{'s' * (pixels > 1)}, possibly a mistake")
    specked = [
        f"{CLASSES[index]}: {count} separate speck{'s' * (count > 1)} under {100 * SPECK:.2f} % of the image"
        for index, count in specks_of.items()
    ]
    odd = broken_rules(geometry)
    if odd and present[1]:
        other.append(f"unusual geometry for a face: {'; '.join(odd[:3])}")
    by_kind = {"missing-part": missing, "specks": specked, "geometry": other}
    return [*side_notes(geometry), *(Note(kind, text) for kind, texts in by_kind.items() for text in texts)]


def fix(report: Report, out: Path) -> Path:
    """Write the canonical form to `out` and return it: palette PNG, grey PNG or JSON. Swapped sides of a mask are
    corrected; specks and missing parts remain. Raises `InputError` for another suffix, or if it cannot be written.
    """
    out, condition, raw = Path(out), CONDITIONS[report.condition], report.raw
    if out.suffix.lower() != condition.suffix:
        raise InputError(f"{out} must end in {condition.suffix}, the canonical form of {condition.folder}")
    if condition.name == "mask":
        raw = swap_classes(raw, swapped_pairs(measure(raw)))
    write_whole(out, condition.encode(raw))
    return out


def format_report(report: Report) -> str:
    """Format a report as text: the format, the table of classes, the problems."""
    size = f", {report.size[0]}x{report.size[1]}" if report.size else ""
    lines = [f"{report.condition}: {report.scheme}{size}"]
    if report.classes:
        lines += ["", f"{'class':<12}{'pixels':>9}{'fraction':>10}"]
        lines += [f"{name:<12}{pixels:>9}{100 * fraction:>8.2f} %" for name, pixels, fraction in report.classes]
    count = len(report.problems)
    lines += ["", f"{count} problem{'s' * (count != 1)}" if count else "no problems"]
    return "\n".join([*lines, *(f"  - {problem.text}" for problem in report.problems)])
