"""Verify released weights: measure a model under many protocols, and find those that explain the published numbers.

Papers state neither sampling steps and guidance, nor caption, file format and implementation of their metrics, and each
moves a distance such as FID by more than papers differ. So a number is reproduced only together with its protocol.
Images are generated once per combination of steps, guidance and caption, and measured once per file format and
resizing.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from PIL import Image

from likeness.evaluate.faces import read_faces
from likeness.evaluate.images import Progress, Task, generate_images
from likeness.evaluate.metrics import METRICS
from likeness.evaluate.protocol import Protocol
from likeness.evaluate.report import format_measurement, format_number, published_tables, write
from likeness.evaluate.results import Measurement
from likeness.evaluate.run import evaluate
from likeness.files import write_whole, writing_whole
from likeness.pages import Section
from likeness.parallel import rank_and_world
from likeness.types import InputError

JPEG_QUALITY = 95
TOLERANCE = 0.02
"""Relative difference that explains a number, in addition to the interval of the measurement."""

GENERATION = ("steps", "guidance_scale", "caption")
"""Settings that need other images."""
TABLES: dict[str, tuple[str, str]] = {
    "release/mask": ("MMFace-DiT, text and mask", "MMFace-DiT"),
    "release/sketch": ("MMFace-DiT, text and sketch", "MMFace-DiT"),
    "mditface/mask": ("MDiTFace, text and mask, MM-CelebA", "MDiTFace"),
}
"""What is verified and its condition -> title of the table in `published.toml`, and name of the row."""

CONVENTIONS = {"mean_iou": ("mean_iou_absent_0", "mean_iou_absent_1")}
"""Metric -> the same with other conventions, of which papers do not say which they use."""


class Trial(NamedTuple):
    """The measurements of one protocol."""

    settings: dict[str, Any]
    numbers: dict[str, Measurement]
    """Published metric -> measurement."""
    explained: list[str]
    """Metrics whose published value it explains."""
    missing: dict[str, str]
    """Published metric that was not measured -> the reason."""


def published_row(what: str, given: str, objective: str) -> dict[str, float]:
    """Return the published numbers by metric. Raises `InputError` if the papers have none for this condition."""
    if f"{what}/{given}" not in TABLES:
        known = ", ".join(name.partition("/")[2] for name in TABLES if name.startswith(f"{what}/"))
        raise InputError(f"given is {given}: the paper has numbers for {known}")
    title, row_name = TABLES[f"{what}/{given}"]
    row_name += {"ddpm": " (D)", "rectified_flow": " (F)"}[objective] if what == "release" else ""
    table = next(table for table in published_tables() if table["title"] == title)
    row = next(row for row in table["rows"] if row[0] == row_name)
    values = {}
    for column, value in zip(table["columns"], row[1:], strict=True):
        metric, _, percent = column.partition(" ")
        for name in (metric, *CONVENTIONS.get(metric, ())):
            values[name] = float(value) / (100 if percent else 1)
    return values


def verify(
    faces: Path,
    out: Path,
    grid: Mapping[str, Sequence[Any]],
    published: Mapping[str, float],
    protocol: Protocol,
    *,
    pipeline: Any,
    model: str,
    device: str = "cpu",
    progress: Progress = lambda task, done, total: None,
) -> list[Trial]:
    """Measure a model under every protocol of a grid, nearest first.

    Args:
        faces: a prepared folder of held-out faces.
        out: folder for images and measurements; the same call resumes.
        grid: values of steps, guidance_scale, caption, file_format (png or jpg) and resizing; all combinations are
            tried.
        published: metric -> published value.
        protocol: everything else; `given` is one condition.
        pipeline: the model.
        model: its name.
        device: device of the extractors.
        progress: called as (task, done, total).

    Returns:
        The trials, on the first rank; the others only generate images and return none.

    Raises:
        InputError: the folder or the protocol cannot be used.
    """
    if len(protocol.given) != 1 or protocol.seeds != 1:
        values = f"given is {', '.join(protocol.given)} and seeds is {protocol.seeds}"
        raise InputError(f"{values}: verify measures one condition with one seed")
    metrics, trials = tuple(name for name in published if name in METRICS), []
    resized = any(METRICS[name].extractor == "inception" for name in metrics)
    resizings = grid["resizing"][: None if resized else 1]  # the others would give the same numbers
    for values in itertools.product(*(grid[name] for name in GENERATION)):
        how = dict(zip(GENERATION, values, strict=True))
        own = dataclasses.replace(protocol, metrics=metrics, **how)
        folder = out / "-".join(f"{name}={value}" for name, value in how.items())
        task = Task(faces, folder, own, read_faces(faces, own)[0], pipeline, model, progress)
        files = generate_images(task).by_condition[own.given[0]][0]
        if rank_and_world()[0]:
            continue
        files = [file for file in files if file.is_file()]  # faces that lack a caption or a condition have none
        if not files:
            raise InputError(f"{faces} has no face with a caption and a {own.given[0]}, which {model} needs")
        own = dataclasses.replace(own, count=len(files))
        for file_format in grid["file_format"]:
            images = files[0].parent if file_format == "png" else write_jpegs(files, folder / "jpg")
            numbers: dict[str, Measurement] = {}
            for resizing in resizings:  # all metrics with the first, then those that depend on it
                names = tuple(name for name in metrics if not numbers or METRICS[name].extractor == "inception")
                measured = evaluate(
                    faces,
                    folder / f"{file_format}-{resizing}",
                    dataclasses.replace(own, resizing=resizing, metrics=names, steps=None, guidance_scale=None),
                    images=images,
                    device=device,
                    progress=progress,
                )
                assert measured is not None
                own_numbers = [n for n in measured.numbers if n.against == "own" and n.given == own.given[0]]
                numbers = numbers | {number.metric: number for number in own_numbers}
                explained = [name for name, number in numbers.items() if explains(number, published[name])]
                settings = {**how, "file_format": file_format, "resizing": resizing}
                trials.append(Trial(settings, numbers, explained, measured.missing))
    return sorted(trials, key=lambda trial: distance(trial, published))


def write_jpegs(files: Sequence[Path], folder: Path) -> Path:
    """Write images as JPEG files of the same names, unless they exist."""
    for file in files:
        copy = folder / f"{file.stem}.jpg"
        if not copy.is_file() or copy.stat().st_mtime < file.stat().st_mtime:
            with writing_whole(copy) as stream, Image.open(file) as image:
                image.convert("RGB").save(stream, "JPEG", quality=JPEG_QUALITY)
    return folder


def explains(number: Measurement, published: float) -> bool:
    """Return whether a published value is within the interval of a measurement, or 2 % of it."""
    return number.low <= published <= number.high or abs(number.value - published) <= TOLERANCE * abs(published)


def distance(trial: Trial, published: Mapping[str, float]) -> float:
    """Return the mean relative difference from the published numbers."""
    found = [abs(number.value - published[name]) / abs(published[name]) for name, number in trial.numbers.items()]
    return sum(found) / len(found) if found else float("inf")


def verdict(trials: Sequence[Trial], published: Mapping[str, float]) -> list[str]:
    """Return one sentence per published number: which protocols explain it."""
    lines = []
    for metric, value in published.items():
        measured = [trial for trial in trials if metric in trial.numbers]
        explaining = [trial for trial in measured if metric in trial.explained]
        if not measured:
            why = next((trial.missing[metric] for trial in trials if metric in trial.missing), "unknown metric")
            lines.append(f"{metric} {value:g}: not measured: {why}")
        elif len(explaining) == len(measured):
            lines.append(f"{metric} {value:g}: explained by every protocol")
        elif explaining:
            common = {
                name: choice
                for name, choice in explaining[0].settings.items()
                if all(trial.settings[name] == choice for trial in explaining)
                and any(trial.settings[name] != choice for trial in measured)
            }
            needed = ", ".join(f"{name} {choice}" for name, choice in common.items()) or "no setting in particular"
            lines.append(
                f"{metric} {value:g}: explained by {len(explaining)} of {len(measured)} protocols; they share {needed}"
            )
        else:
            values = [trial.numbers[metric].value for trial in measured]
            span = f"{format_number(min(values))} to {format_number(max(values))}"
            extractor = measured[0].numbers[metric].protocol.get("extractor")
            lines.append(
                f"{metric} {value:g}: no protocol explains it; measured {span}"
                + (f" with the {extractor}" if extractor else "")
            )
    return lines


def write_verification(trials: Sequence[Trial], published: Mapping[str, float], out: Path, title: str) -> None:
    """Write `verification.json`, `verification.md` and `verification.html`."""
    names = list(trials[0].settings) if trials else []
    mark: Callable[[Trial, str], str] = lambda trial, name: " *" if name in trial.explained else ""  # noqa: E731
    rows = [
        [str(trial.settings[name]) for name in names]
        + [format_measurement(trial.numbers.get(metric)) + mark(trial, metric) for metric in published]
        for trial in trials
    ]
    header = [*names, *(f"{metric}, published {value:g}" for metric, value in published.items())]
    text = "Nearest first. * explains the published value: within the 95 % interval, or 2 %."
    sections = [
        Section(verdict=verdict(trials, published)),
        Section(title="Protocols", header=header, rows=rows, text=text),
    ]
    write(out / "verification", title, sections)
    content = [
        {**trial.settings, "explained": trial.explained}
        | {name: [number.value, number.low, number.high, number.n] for name, number in trial.numbers.items()}
        for trial in trials
    ]
    write_whole(out / "verification.json", json.dumps({"published": dict(published), "trials": content}, indent=1))
