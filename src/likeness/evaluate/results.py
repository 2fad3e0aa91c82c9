"""The results of an evaluation and the files that store them: `results.json` and `scores.npz`.

Field names are the keys of `results.json`.
"""

from __future__ import annotations

import dataclasses
import io
import json
import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from likeness.files import write_whole
from likeness.types import InputError

RESULTS, SCORES = "results.json", "scores.npz"


@dataclass(frozen=True)
class Measurement:
    """One number with its 95 % interval and its protocol."""

    metric: str
    given: str
    """Condition set, or "ceiling"."""
    against: str
    """"own": the condition or caption of the same face. "another": that of the next face, which gives the floor."""
    value: float
    low: float
    high: float
    n: int
    """Number of faces."""
    by_seed: list[float]
    """The value for each seed; empty if there is one seed."""
    warning: str
    """A known bias at this number of images, or ""."""
    protocol: dict[str, Any]


@dataclass(frozen=True)
class ClassScore:
    """The scores of one class over all images of a condition set."""

    name: str
    n: int
    """Masks that contain the class."""
    iou: float
    """Intersection over union of the pixels of all images."""
    shown: float
    """Mean over faces of the fraction of their images that show the class."""


class Neighbor(NamedTuple):
    """An image and its nearest training photograph."""

    row: int
    """Index of the face."""
    photo: str
    cosine: float


@dataclass(kw_only=True)
class Results:
    """Everything that an evaluation measured. Mappings by `given` have a key for each condition set."""

    protocol: dict[str, Any]
    """What all measurements have in common."""
    settings: dict[str, Any]
    """The `Protocol` as requested."""
    faces: list[dict[str, str]]
    """Name, caption, photograph and condition files of each face."""
    images: dict[str, list[str]]
    """Given -> image files of the first seed, one per face."""
    numbers: list[Measurement] = field(default_factory=list)
    missing: dict[str, str] = field(default_factory=dict)
    """Metric -> why it could not be measured."""
    classes: dict[str, list[ClassScore]] = field(default_factory=dict)
    nearest: dict[str, list[Neighbor]] = field(default_factory=dict)
    extractors: dict[str, dict[str, str]] = field(default_factory=dict)
    """Name -> `what` it is and the `hash` of its weights."""
    faults: dict[str, str] = field(default_factory=dict)
    """File -> why it could not be read."""
    notes: list[str] = field(default_factory=list)
    scores: dict[str, np.ndarray] = field(default_factory=dict)
    """`metric/given` -> one value per face [N]; `extractor/given/features` -> [R, N, D]."""

    def to_json(self) -> dict[str, Any]:
        """Return the content of `results.json`."""
        content = {name: value for name, value in dataclasses.asdict(self).items() if name != "scores"}
        content["missing"] = [{"metric": metric, "why": why} for metric, why in self.missing.items()]
        content["faults"] = [{"file": file, "why": why} for file, why in self.faults.items()]
        return {**content, "likeness": version("likeness")}

    def save(self, folder: Path) -> None:
        """Write `results.json` and `scores.npz`."""
        buffer = io.BytesIO()
        np.savez(buffer, **{key: values.astype(np.float32) for key, values in self.scores.items()})  # pyrefly: ignore
        write_whole(folder / SCORES, buffer.getvalue())
        write_whole(folder / RESULTS, json.dumps(self.to_json(), indent=1))


@dataclass(frozen=True)
class Evaluation:
    """What a comparison reads of a finished evaluation."""

    numbers: list[Measurement]
    faces: list[str]
    """Names."""
    scores: Mapping[str, np.ndarray]
    """As in `Results`."""
    images: Mapping[str, Sequence[str]] = field(default_factory=dict)
    """As in `Results`."""
    notes: list[str] = field(default_factory=list)
    """What could not be read or measured, and other notes."""


def read_evaluation(folder: Path) -> Evaluation:
    """Read a finished evaluation. Raises `InputError` if the folder does not contain one."""
    try:
        content = json.loads((folder / RESULTS).read_text(encoding="utf-8"))
        numbers = [Measurement(**entry) for entry in content["numbers"]]
        with np.load(folder / SCORES) as scores:
            notes = [f"Not read: {fault['file']}: {fault['why']}" for fault in content["faults"]]
            notes += [f"Not measured: {entry['metric']}: {entry['why']}" for entry in content["missing"]]
            notes += content["notes"]
            faces = [face["name"] for face in content["faces"]]
            return Evaluation(numbers, faces, dict(scores), images=content["images"], notes=notes)
    except (OSError, ValueError, KeyError, TypeError, zipfile.BadZipFile) as error:
        raise InputError(
            f"{folder} does not contain a finished evaluation: run likeness evaluate --out {folder}"
        ) from error
