"""Aggregate extractor outputs into measurements: a mean or a distance, its interval and its warning."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch

from likeness.conditions.mask.classes import CLASSES
from likeness.evaluate import scores
from likeness.evaluate.features import MissingError
from likeness.evaluate.metrics import MIN_SET, Inputs, Metric, PerImageMetric, SetMetric
from likeness.evaluate.protocol import CEILING, REAL, TRAIN, Protocol
from likeness.evaluate.results import ClassScore, Measurement, Neighbor
from likeness.evaluate.stats import bootstrap_interval, subset_deviations

MIN_IMAGES = 2
"""Minimum number of images of a mean."""

NEIGHBORS = 8
"""Images with their nearest training photograph that a report shows."""

Outputs = Mapping[str, Sequence[np.ndarray]]
"""Set of images -> seed -> extractor output [N, ...]."""


def measure(
    name: str, metric: Metric, outputs: Outputs, common: Mapping[str, Any], protocol: Protocol
) -> tuple[list[Measurement], dict[str, np.ndarray], list[str]]:
    """Measure a metric on each condition set and the ceiling, and its floor if it has one, from the output of its
    extractor. `common` is the part of the protocol that all measurements have in common.

    Returns:
        The measurements, what a comparison needs of them (`Results.scores`), and a sentence for each set that could not
        be measured.

    Raises:
        MissingError: no set could be measured: there are too few images or no training photographs, or no face has
            what is measured.
    """
    measurements: list[Measurement] = []
    stored: dict[str, np.ndarray] = {}
    missing: dict[str, str] = {}
    choices = {"choices": protocol.choices} if name == "retrieval" else {}

    def add(given: str, against: str, value: float, interval: Any, n: int, seeds: list[float], bias: str = "") -> None:
        low, high = map(float, interval)
        facts = {**common, "given": given, **choices, "n": n}
        measurements.append(Measurement(name, given, against, value, low, high, n, seeds, bias, facts))

    def measure_given(given: str, by_seed: Sequence[np.ndarray]) -> None:
        if isinstance(metric, SetMetric):
            real = outputs[REAL][0]
            add(given, "own", *measure_set(metric, by_seed, real, protocol))
            stored[f"{metric.extractor}/{given}/features"] = np.stack([metric.features(output) for output in by_seed])
            stored[f"{metric.extractor}/{REAL}/features"] = metric.features(real)
            return
        if metric.needs_train and TRAIN not in outputs:
            raise MissingError("Set train= to the prepared folder that the model was trained on")
        train = outputs[TRAIN][0] if metric.needs_train else None
        inputs = Inputs(protocol.choices, None if train is None else train[readable(train)])
        values = face_values(metric, by_seed, inputs)
        several = by_seed if len(by_seed) > 1 and not metric.across_seeds else ()
        means = [float(scores.nan_mean(face_values(metric, [output], inputs))) for output in several]
        add(given, "own", *measure_mean(values, protocol), means)
        stored[f"{name}/{given}"] = values
        if metric.mismatch and given != CEILING and (not metric.condition or metric.condition in given.split("+")):
            floor = face_values(metric, by_seed, inputs, metric.mismatch)
            add(given, "another", *measure_mean(floor, protocol), [])

    for given, by_seed in outputs.items():
        if given in (REAL, TRAIN) or (given == CEILING and not isinstance(metric, SetMetric) and metric.across_seeds):
            continue
        try:
            measure_given(given, by_seed)
        except MissingError as error:
            missing[given] = str(error)
    if missing and not measurements:
        raise MissingError(next(iter(missing.values())))
    return measurements, stored, [f"{name} of {given} was not measured: {why}" for given, why in missing.items()]


def face_values(
    metric: PerImageMetric,
    by_seed: Sequence[np.ndarray],
    inputs: Inputs,
    mismatch: Callable[[np.ndarray], np.ndarray] | None = None,
) -> np.ndarray:
    """Return the score of each face, the mean over seeds, [N]; NaN if it has none. Raises `MissingError` if there are
    too few images.
    """
    if metric.across_seeds:
        if len(by_seed) < 2:
            raise MissingError("It needs several images per face: set seeds=2 or more")
        return metric.score(np.stack(by_seed), inputs)
    values = np.full((len(by_seed), len(by_seed[0])), np.nan)  # [R, N]
    for seed_index, output in enumerate(by_seed):
        rows = np.flatnonzero(readable(output))
        if not len(rows):
            continue
        try:
            scored = metric.score(mismatch(output[rows]) if mismatch else output[rows], inputs)
        except ValueError as error:  # fewer images than choices
            raise MissingError(f"{error}: set choices= to a smaller number") from error
        values[seed_index, rows[: len(scored)]] = scored
    return scores.nan_mean(values.T)


def readable(output: np.ndarray) -> np.ndarray:
    """Return which images have any extractor output, bool [N]."""
    return np.any(~np.isnan(output.reshape(len(output), -1)), axis=1)


def measure_mean(values: np.ndarray, protocol: Protocol) -> tuple[float, tuple[float, float], int]:
    """Return the mean over faces, its interval, and the number of faces with a value. Raises `MissingError` if there
    are too few.
    """
    known = values[~np.isnan(values)]
    if len(known) < MIN_IMAGES:
        raise MissingError(
            f"Only {len(known)} of {len(values)} images can be scored, at least {MIN_IMAGES} are needed: the faces "
            "lack what is measured, or are too few"
        )
    return float(known.mean()), bootstrap_interval(known, samples=protocol.bootstrap_samples), len(known)


def measure_set(
    metric: SetMetric, by_seed: Sequence[np.ndarray], real: np.ndarray, protocol: Protocol
) -> tuple[float, np.ndarray, int, list[float], str]:
    """Return a distance between sets, the mean over seeds; its interval; the number of images; the value of each seed
    if there are several; its bias. Raises `MissingError` if there are too few images.
    """
    values, deviations, counts = [], [], []
    for output in by_seed:
        both = readable(output) & readable(real)
        if both.sum() < MIN_SET:
            raise MissingError(f"{both.sum()} images are too few to compare sets: at least {MIN_SET} are needed")
        features, photos = metric.features(output[both]), metric.features(real[both])
        values.append(metric.distance(features, photos))
        samples = max(protocol.bootstrap_samples // 20, 20)
        deviations.append(subset_deviations(metric.distance, features, photos, samples))
        counts.append(int(both.sum()))
    low, high = np.percentile(np.mean(deviations, axis=0), (2.5, 97.5)) + np.mean(values)
    interval = np.clip((low, high), *metric.limits)
    bias = metric.bias(min(counts), metric.features(real[:1]).shape[1])
    return float(np.mean(values)), interval, min(counts), values if len(values) > 1 else [], bias


def class_scores(by_seed: Sequence[np.ndarray]) -> list[ClassScore]:
    """Score each class over all images, from the face parser's output of each seed, [N, 3, 19, 3]. Rows of NaN, and
    seeds without a readable image, are skipped.
    """
    known = [output[:, 0] for output in by_seed if readable(output).any()]
    if not known:
        return []
    counts = np.stack(known)  # [R, N, 19, 3]
    iou = scores.class_iou(np.nansum(counts, axis=(0, 1))[None])[0]  # [19]
    shown = scores.nan_mean(np.moveaxis(scores.class_shown(counts), 0, -1))  # [N, 19]
    table = []
    for index, name in enumerate(CLASSES):
        values = shown[~np.isnan(shown[:, index]), index]
        if len(values):
            table.append(ClassScore(name, len(values), float(iou[index]), float(values.mean())))
    return table


def nearest_photos(images: np.ndarray, photos: np.ndarray, files: Sequence[str]) -> list[Neighbor]:
    """Find up to `NEIGHBORS` images that are nearest to a training photograph, nearest first, from the output of the
    text-image pair for the images [N, 2, P] and for the photographs [M, 2, P], whose files are [M].
    """
    rows, known = np.flatnonzero(readable(images)), np.flatnonzero(readable(photos))
    if not len(rows) or not len(known):
        return []
    cosine, index = scores.nearest(torch.from_numpy(images[rows, 0]), torch.from_numpy(photos[known, 0]))
    order = cosine.argsort(descending=True)[:NEIGHBORS].tolist()
    return [Neighbor(int(rows[i]), files[known[index[i]]], float(cosine[i])) for i in order]
