"""Run an evaluation: images, extractor outputs, measurements.

The folder of an evaluation contains `pictures/`, `seen/` (the cache of extractor outputs), `scores.npz` and
`results.json`. The same command resumes a stopped evaluation and measures only what is new.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np

from likeness.config import to_dict
from likeness.evaluate.aggregate import class_scores, measure, nearest_photos
from likeness.evaluate.extractors import EXTRACTORS
from likeness.evaluate.faces import Face, faces_hash, read_faces, read_training_faces
from likeness.evaluate.features import Extractor, MissingError, extract_cached, file_digest
from likeness.evaluate.images import (
    ImageSets,
    Progress,
    Task,
    find_images,
    generate_images,
    reconstruct_photos,
    side_of,
    user_images,
)
from likeness.evaluate.metrics import METRICS, Metric, SetMetric
from likeness.evaluate.protocol import BUNDLED, CEILING, NONE, REAL, TRAIN, Protocol
from likeness.evaluate.results import Results
from likeness.files import ABANDONED, delete_partials
from likeness.parallel import rank_and_world
from likeness.types import InputError

BUNDLED_NOTES = {
    "face_parser": "The bundled face parser annotated training masks of the bundled models: set another face_parser=",
    "text_image": "The bundled text-image pair has the text encoder of the bundled models: set another text_image=",
}


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
        values = f"given is {', '.join(protocol.given)} and seeds is {protocol.seeds}"
        raise InputError(f"{values}: --images requires one condition set, such as given=mask, and seeds=1")
    unused = [] if images is None else ["steps", "guidance_scale", "mask_model"]
    unused += [] if NONE in protocol.given else ["mask_model"]
    for name in unused:
        if getattr(protocol, name) is not None:
            why = "--images are finished" if images is not None else f"{NONE} is not in given"
            raise InputError(f"{name} is {getattr(protocol, name)}, but has no effect: {why}")
    files = None if images is None else find_images(images)
    faces, notes = read_faces(folder, protocol, files)
    train = [] if protocol.train is None else read_training_faces(Path(protocol.train))
    side = side_of([face.photo for face in faces])
    task = Task(folder, out, protocol, faces, pipeline, model, progress)
    sets = generate_images(task) if files is None else user_images(task, files)
    ceiling, unread = ([], {}) if pipeline is None else reconstruct_photos(task)
    if rank_and_world()[0]:
        return None
    delete_partials(out, ("pictures", "seen"), age=ABANDONED)
    if side < sets.size:
        notes.append(f"The photographs have {side} px and were enlarged to {sets.size} px for the comparison")
    facts = {
        "split": folder.resolve().name,
        "faces": faces_hash(faces),
        "caption": protocol.caption,
        "resolution": sets.size,
        "seeds": protocol.seeds,
        **sets.source,
        "n": len(faces),
    }
    results = Results(
        protocol=facts,
        settings=to_dict(protocol),
        faces=[face.to_json() for face in faces],
        images={given: [str(file.resolve()) for file in seeds[0]] for given, seeds in sets.by_condition.items()},
        notes=notes,
        faults=sets.faults | unread,
    )
    measured = list(protocol.metrics)
    if not any(face.caption for face in faces):
        measured = [name for name in measured if not METRICS[name].needs_captions]
        reason = f"The faces of {folder} have no captions: `likeness prepare caption` writes them"
        results.missing = {name: reason for name in protocol.metrics if name not in measured}
    digest = cache(file_digest)  # of the same faces for all extractors
    seen = {digest(face.photo) for face in train} - {"-"}  # of unreadable ones
    if leaked := [face.name for face in faces if digest(face.photo) in seen]:
        results.notes.append(f"{len(leaked)} of the photographs are also in {protocol.train}, such as {leaked[0]}")
    for name, create in EXTRACTORS.items():
        if metrics := {key: METRICS[key] for key in measured if METRICS[key].extractor == name}:
            try:
                extractor = create(protocol, sets.size, device)
                try:
                    outputs, unreadable = extract_sets(task, extractor, metrics, sets, ceiling, train, digest)
                finally:
                    extractor.close()
            except InputError as error:
                results.missing |= dict.fromkeys(metrics, str(error))
                continue
            results.faults |= unreadable
            add_measurements(results, extractor, metrics, outputs, train, protocol)
    results.notes = list(dict.fromkeys(results.notes))
    results.save(out)
    return results


def extract_sets(
    task: Task,
    extractor: Extractor,
    metrics: Mapping[str, Metric],
    sets: ImageSets,
    ceiling: Sequence[Path],
    train: Sequence[Face],
    digest: Callable[[Path], str],
) -> tuple[dict[str, list[np.ndarray]], dict[str, str]]:
    """Run an extractor on every set of images that its metrics need.

    Returns:
        Set -> seed -> output [N, ...], and file -> why it could not be read.
    """
    required: dict[str, list[tuple[Sequence[Path], Sequence[Face]]]] = {
        given: [(files, task.faces) for files in seeds] for given, seeds in sets.by_condition.items()
    }
    if ceiling:
        required[CEILING] = [(ceiling, task.faces)]
    if any(isinstance(metric, SetMetric) for metric in metrics.values()):
        required[REAL] = [([face.photo for face in task.faces], task.faces)]
    if train and any(metric.needs_train for metric in metrics.values()):
        required[TRAIN] = [([face.photo for face in train], train)]
    outputs: dict[str, list[np.ndarray]] = {}
    faults: dict[str, str] = {}
    for name, seeds in required.items():
        outputs[name] = []
        for seed_index, (files, faces) in enumerate(seeds):
            folder = task.out / "seen" / name / str(seed_index)
            progress = partial(task.progress, f"{extractor.name} on {name}")
            values, unreadable = extract_cached(extractor, files, faces, sets.size, folder, progress, digest)
            outputs[name].append(values)
            faults |= unreadable
    return outputs, faults


def add_measurements(
    results: Results,
    extractor: Extractor,
    metrics: Mapping[str, Metric],
    outputs: dict[str, list[np.ndarray]],
    train: Sequence[Face],
    protocol: Protocol,
) -> None:
    """Add everything that follows from the outputs of an extractor."""
    if getattr(protocol, extractor.name, None) == BUNDLED:
        results.notes.append(BUNDLED_NOTES[extractor.name])
    results.extractors[extractor.name] = {"what": extractor.description, "hash": extractor.hash}
    facts = {**results.protocol, "extractor": extractor.description, "extractor_hash": extractor.hash}
    for name, metric in metrics.items():
        try:
            own = {"train": faces_hash(train), "train_n": len(train)} if metric.needs_train else {}
            numbers, scores, notes = measure(name, metric, outputs, facts | own, protocol)
        except MissingError as error:
            results.missing[name] = str(error)
            continue
        results.numbers += numbers
        results.scores |= scores
        results.notes += notes
    if extractor.name == "text_image" and TRAIN in outputs:
        photos = [str(face.photo) for face in train]
        for given in results.images:
            results.nearest[given] = nearest_photos(outputs[given][0], outputs[TRAIN][0], photos)
    if extractor.name == "face_parser":
        results.classes = {given: class_scores(outputs[given]) for given in outputs}
