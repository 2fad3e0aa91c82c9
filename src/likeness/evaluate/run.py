"""Run an evaluation: images, extractor outputs, measurements.

The folder of an evaluation contains `pictures/`, `seen/` (the cache of extractor outputs), `scores.npz` and
`results.json`. The same command resumes a stopped evaluation and measures only what is new.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from likeness.config import to_dict
from likeness.evaluate.aggregate import class_scores, measure, nearest_photos
from likeness.evaluate.extractors import EXTRACTORS
from likeness.evaluate.faces import Face, faces_hash, read_faces, read_training_faces
from likeness.evaluate.features import Extractor, MissingError, extract_cached
from likeness.evaluate.images import ImageSets, Progress, find_images, generate_images, image_size, user_images
from likeness.evaluate.metrics import METRICS, PerImageMetric, SetMetric
from likeness.evaluate.protocol import CEILING, REAL, TRAIN, Protocol
from likeness.evaluate.results import Fault, MissingMetric, Results
from likeness.parallel import rank_and_world
from likeness.types import InputError


def evaluate(
    folder: Path,
    out: Path,
    protocol: Protocol,
    *,
    pipeline: Any = None,
    model: str = "",
    images: Path | None = None,
    device: str = "cpu",
    progress: Progress = lambda task, done, total: None,
) -> Results | None:
    """Measure a model, or existing images, on the faces of a prepared folder.

    Args:
        folder: a prepared split.
        out: folder of the evaluation.
        protocol: what is measured and how.
        pipeline: a pipeline of this package. With `images`, only its autoencoder is used, for the ceiling.
        model: the name under which the pipeline was loaded.
        images: folder with the images of any method, each named like the photograph of its face, made from
            `protocol.given[0]`.
        device: device of the extractors.
        progress: called as (task, done, total).

    Returns:
        The results, which are saved in `out`, too; None on all ranks but the first, which only generate images.

    Raises:
        InputError: the folder, the images or the protocol cannot be used, or `out` contains another evaluation.
    """
    if unknown := [name for name in protocol.metrics if name not in METRICS]:
        raise InputError(f"Unknown metric {unknown[0]!r}. Available: {', '.join(METRICS)}")
    if images is not None and (len(protocol.given) > 1 or protocol.seeds > 1):
        raise InputError(
            f"--images requires one condition set, such as given=mask, and seeds=1; given is {protocol.given}"
        )
    files = None if images is None else find_images(images)
    faces, notes = read_faces(folder, protocol, files)
    if files is not None:
        sets = user_images(files, faces, protocol, folder, pipeline, out, progress)
    else:
        sets = generate_images(pipeline, model, faces, protocol, folder, out, progress)
    if rank_and_world()[0]:
        return None
    train = [] if protocol.train is None else read_training_faces(Path(protocol.train))
    if (side := image_size([face.photo for face in faces])) < sets.size:
        notes.append(f"The photographs have {side} px and were enlarged to {sets.size} px for the comparison")
    common = {
        "split": folder.resolve().name,
        "faces": faces_hash(faces),
        "caption": protocol.caption,
        "resolution": sets.size,
        "seeds": protocol.seeds,
        **sets.source,
    }
    results = Results(
        protocol={**common, "n": len(faces)},
        settings=to_dict(protocol),
        faces=[
            {"name": face.name, "caption": face.caption, "photo": str(face.photo)}
            | {name: str(path) for name, path in face.conditions.items()}
            for face in faces
        ],
        images={given: [str(file.resolve()) for file in seeds[0]] for given, seeds in sets.by_condition.items()},
        notes=notes,
    )
    faults = dict(sets.faults)
    for name, create in EXTRACTORS.items():
        if metrics := [metric for metric in protocol.metrics if METRICS[metric].extractor == name]:
            try:
                extractor = create(protocol, sets.size, device)
                try:
                    outputs, unread = extract_sets(extractor, metrics, sets, faces, train, out, progress)
                finally:
                    extractor.close()
            except InputError as error:
                results.missing += [MissingMetric(metric, str(error)) for metric in metrics]
                continue
            faults |= unread
            add_measurements(results, extractor, metrics, outputs, train, common, protocol)
    results.faults = [Fault(file, why) for file, why in faults.items()]
    results.notes = list(dict.fromkeys(results.notes))
    results.save(out)
    return results


def extract_sets(
    extractor: Extractor,
    metrics: Sequence[str],
    sets: ImageSets,
    faces: Sequence[Face],
    train: Sequence[Face],
    out: Path,
    progress: Progress,
) -> tuple[dict[str, list[np.ndarray]], dict[str, str]]:
    """Run an extractor on every set of images that its metrics need.

    Returns:
        Set -> seed -> output [N, ...], and file -> why it could not be read.
    """
    required: dict[str, list[tuple[Sequence[Path], Sequence[Face]]]] = {
        given: [(files, faces) for files in seeds] for given, seeds in sets.by_condition.items()
    }
    if sets.ceiling:
        required[CEILING] = [(sets.ceiling, faces)]
    needed = [METRICS[name] for name in metrics]
    if any(isinstance(metric, SetMetric) for metric in needed):
        required[REAL] = [([face.photo for face in faces], faces)]
    if train and any(isinstance(metric, PerImageMetric) and metric.needs_train for metric in needed):
        required[TRAIN] = [([face.photo for face in train], train)]
    outputs: dict[str, list[np.ndarray]] = {}
    faults: dict[str, str] = {}
    for name, seeds in required.items():
        outputs[name] = []
        report = lambda done, total, name=name: progress(f"{extractor.name} on {name}", done, total)  # noqa: E731
        for seed_index, (files, owners) in enumerate(seeds):
            cache = out / "seen" / name / str(seed_index)
            values, unread = extract_cached(extractor, files, owners, sets.size, cache, report)
            outputs[name].append(values)
            faults |= unread
    return outputs, faults


def add_measurements(
    results: Results,
    extractor: Extractor,
    metrics: Sequence[str],
    outputs: dict[str, list[np.ndarray]],
    train: Sequence[Face],
    common: dict[str, Any],
    protocol: Protocol,
) -> None:
    """Add everything that follows from the outputs of an extractor."""
    results.notes += extractor.notes
    results.extractors[extractor.name] = {"what": extractor.description, "hash": extractor.hash}
    facts = {**common, "extractor": extractor.description, "extractor_hash": extractor.hash}
    train_facts = {"train": faces_hash(train), "train_n": len(train)}
    for name in metrics:
        metric = METRICS[name]
        needs_train = isinstance(metric, PerImageMetric) and metric.needs_train
        try:
            numbers, scores = measure(name, metric, outputs, facts | train_facts if needs_train else facts, protocol)
        except MissingError as error:
            results.missing.append(MissingMetric(name, str(error)))
            continue
        results.numbers += numbers
        results.scores |= scores
    if extractor.name == "text_image" and TRAIN in outputs:
        photos = [str(face.photo) for face in train]
        results.nearest = {
            given: nearest_photos(outputs[given][0], outputs[TRAIN][0], photos) for given in results.images
        }
    if extractor.name == "face_parser":
        compared = [given for given in outputs if given not in (REAL, TRAIN)]
        results.classes = {given: class_scores(outputs[given]) for given in compared}
