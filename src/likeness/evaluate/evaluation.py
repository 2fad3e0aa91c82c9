"""From a protocol to numbers: portraits, what extractors say of them, and every number with all that it depends on.

The folder of an evaluation holds `pictures/`, `seen/` (the extractors' values), `scores.npz` and `results.json`; run
again, the same command goes on where it stopped and measures only what is new.
"""

from __future__ import annotations

import io
import json
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

from likeness.config import to_dict
from likeness.evaluate.config import CEILING, REAL, RESULTS, SCORES, TRAIN, Protocol
from likeness.evaluate.extractors import EXTRACTORS
from likeness.evaluate.faces import Face, faces_hash, read_faces
from likeness.evaluate.features import Extractor, Missing, observe
from likeness.evaluate.generate import Report
from likeness.evaluate.metrics import METRICS, Metric
from likeness.evaluate.numbers import by_class, likest_photos, numbers_of
from likeness.evaluate.sets import (
    Sets,
    check_names,
    given_pictures,
    made_portraits,
    pictures_in,
    training_faces,
    usual_size,
)
from likeness.files import write_whole
from likeness.parallel import rank_and_world
from likeness.types import InputError

SCHEMA = 1
"""Version of the layout of `results.json`."""


def evaluate(
    folder: Path,
    out: Path,
    protocol: Protocol,
    *,
    pipeline: Any = None,
    model: str = "",
    images: Path | None = None,
    device: str = "cpu",
    report: Report = lambda what, done, total: None,
) -> dict[str, Any] | None:
    """Measure a model, or pictures that are there, on the faces of a prepared folder.

    Args:
        folder: a prepared split.
        out: folder of the evaluation.
        protocol: what is measured and how.
        pipeline: a pipeline of this package; with `images`, only its autoencoder is used, for the ceiling.
        model: the name under which it was loaded.
        images: pictures of any method, each named like the picture of its face, made from `protocol.given[0]`.
        device: where extractors compute.
        report: told about progress.

    Returns:
        What `results.json` holds; None in a process other than the first, which only helps to make portraits.

    Raises:
        InputError: the folder, the pictures or the protocol cannot be used, or `out` holds another evaluation.
    """
    unknown = [name for name in protocol.metrics if name not in METRICS]
    if unknown:
        raise InputError(f"there is no metric {unknown[0]!r}; choose from {', '.join(METRICS)}")
    if images is not None and (len(protocol.given) > 1 or protocol.seeds > 1):
        raise InputError(f"--images holds one set: say given=mask or the like, and seeds=1, not {protocol.given}")
    files = None if images is None else pictures_in(images)
    faces, notes = read_faces(folder, protocol, files)
    faults: dict[str, str] = {}
    if files is not None:
        check_names(files, faces, folder, protocol)
        sets = given_pictures(files, faces, protocol, pipeline, out, faults, report)
    else:
        sets = made_portraits(pipeline, model, faces, protocol, folder, out, faults, report)
    if rank_and_world()[0]:
        return None
    train = [] if protocol.train is None else training_faces(Path(protocol.train))
    common = {
        "split": folder.resolve().name,
        "faces": faces_hash(faces),
        "caption": protocol.caption,
        "resolution": sets.size,
        "seeds": protocol.seeds,
        **sets.made,
    }
    if (side := usual_size([face.photo for face in faces])) < sets.size:
        notes.append(f"the photographs have {side} pixels a side and were enlarged to {sets.size} for comparison")
    learnt = {"train": faces_hash(train), "train_n": len(train)}
    results: dict[str, Any] = {"numbers": [], "missing": [], "classes": {}, "nearest": {}, "extractors": {}}
    kept: dict[str, np.ndarray] = {}
    wanted = {METRICS[name].extractor for name in protocol.metrics}
    for name in (name for name in EXTRACTORS if name in wanted):
        metrics = {key: METRICS[key] for key in protocol.metrics if METRICS[key].extractor == name}
        try:
            extractor = EXTRACTORS[name](protocol, sets.size, device)
            try:
                found = look(extractor, metrics, sets, faces, train, out, faults, report)
            finally:
                extractor.close()
        except InputError as error:
            results["missing"] += [{"metric": key, "why": str(error)} for key in metrics]
            continue
        notes += extractor.notes
        results["extractors"][name] = {"what": extractor.what, "hash": extractor.hash}
        own = {**common, "extractor": extractor.what, "extractor_hash": extractor.hash}
        for key, metric in metrics.items():
            told = own | learnt if metric.reference == TRAIN else own
            try:
                results["numbers"] += numbers_of(key, metric, found, told, protocol, kept)
            except Missing as error:
                results["missing"].append({"metric": key, "why": str(error)})
        if name == "text_image" and TRAIN in found:
            nearest = {given: likest_photos(found[given][0], found[TRAIN][0]) for given in sets.portraits}
            results["nearest"] = {
                given: [[row, str(train[photo].photo), cosine] for row, photo, cosine in likest]
                for given, likest in nearest.items()
            }
        if name == "face_parser":
            results["classes"] = {given: by_class(found[given]) for given in sets.compared}
    results |= {
        "schema": SCHEMA,
        "likeness": version("likeness"),
        "protocol": {**common, "n": len(faces)},
        "asked": to_dict(protocol),
        "faults": [{"file": file, "why": why} for file, why in faults.items()],
        "notes": list(dict.fromkeys(notes)),
        "faces": [told_of(face) for face in faces],
        "portraits": {given: [str(file.resolve()) for file in rounds[0]] for given, rounds in sets.portraits.items()},
    }
    buffer = io.BytesIO()
    np.savez(buffer, **{key: values.astype(np.float32) for key, values in kept.items()})  # pyrefly: ignore
    write_whole(out / SCORES, buffer.getvalue())
    write_whole(out / RESULTS, json.dumps(results, indent=1))
    return results


def told_of(face: Face) -> dict[str, str]:
    """What a report shows of a face."""
    files = {name: str(path) for name, path in face.conditions.items()}
    return {"name": face.name, "caption": face.caption, "photo": str(face.photo), **files}


def look(
    extractor: Extractor,
    metrics: dict[str, Metric],
    sets: Sets,
    faces: Sequence[Face],
    train: Sequence[Face],
    out: Path,
    faults: dict[str, str],
    report: Report,
) -> dict[str, list[np.ndarray]]:
    """The extractor's values of every set that its metrics need: set -> round -> [N, ...]."""
    references = {metric.reference for metric in metrics.values()}
    wanted: dict[str, list[tuple[Sequence[Path], Sequence[Face]]]] = {
        given: [(files, faces) for files in rounds] for given, rounds in sets.portraits.items()
    }
    if sets.ceiling:
        wanted[CEILING] = [(sets.ceiling, faces)]
    if REAL in references:
        wanted[REAL] = [([face.photo for face in faces], faces)]
    if TRAIN in references and train:
        wanted[TRAIN] = [([face.photo for face in train], train)]
    found: dict[str, list[np.ndarray]] = {}
    for name, rounds in wanted.items():
        found[name] = []
        for number, (files, own) in enumerate(rounds):
            store = out / "seen" / name / str(number)
            values, unread = observe(
                extractor, files, own, sets.size, store,
                lambda done, total, name=name: report(f"{extractor.name} on {name}", done, total),
            )  # fmt: skip
            found[name].append(values)
            faults |= unread
    return found
