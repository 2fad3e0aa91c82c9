"""From what extractors say to numbers: a mean or a distance, its interval, its warning and its protocol."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from likeness.conditions.mask.classes import CLASSES
from likeness.evaluate import distances, scores
from likeness.evaluate.config import CEILING, REAL, TRAIN, Protocol
from likeness.evaluate.features import Missing
from likeness.evaluate.metrics import Metric


def numbers_of(
    key: str,
    metric: Metric,
    found: dict[str, list[np.ndarray]],
    common: dict[str, Any],
    protocol: Protocol,
    kept: dict[str, np.ndarray],
) -> list[dict[str, Any]]:
    """The numbers of a metric: each set of portraits, the floor where there is one, and the ceiling.

    Args:
        key: its name.
        metric: it.
        found: what its extractor said, set -> round -> [N, ...].
        common: the protocol's part that all numbers share.
        protocol: the protocol.
        kept: gets what a later comparison needs.

    Raises:
        Missing: there are too few pictures, or none has what is measured.
    """
    if metric.reference == TRAIN and TRAIN not in found:
        raise Missing("set train= to the prepared folder that the model has learnt from")
    reference = found[metric.reference][0] if metric.reference else None
    numbers = []
    for given, rounds in found.items():
        if given in (REAL, TRAIN) or (given == CEILING and not metric.ceiling):
            continue
        told = {"metric": key, "given": given, "against": "own"}
        own = {**common, "given": given}
        if key == "retrieval":
            own["choices"] = protocol.choices
        if metric.distance is not None:
            assert reference is not None
            numbers.append(told | set_number(metric, rounds, reference, own, protocol))
            name = f"{metric.extractor}/{given}/features"
            kept[name] = np.stack([metric.features(values) for values in rounds])
            kept[f"{metric.extractor}/{REAL}/features"] = metric.features(reference)
            continue
        values = per_face(metric, rounds, reference, protocol)
        kept[f"{key}/{given}"] = values
        numbers.append(told | mean_number(values, rounds, metric, own, protocol, reference))
        measured = not metric.condition or metric.condition in given.split("+")
        if metric.another is not None and given != CEILING and measured:
            values = per_face(metric, rounds, reference, protocol, another=True)
            floor = mean_number(values, rounds, metric, own, protocol, reference)
            numbers.append({**told, "against": "another"} | {**floor, "by_seed": []})
    return numbers


def per_face(
    metric: Metric,
    rounds: Sequence[np.ndarray],
    reference: np.ndarray | None,
    protocol: Protocol,
    another: bool = False,
) -> np.ndarray:
    """A value a face, the mean over the rounds, [N]; NaN where there is none.

    Raises:
        Missing: what is measured is not there.
    """
    if metric.rounds is not None:
        if len(rounds) < 2:
            raise Missing("it needs several portraits of each face: say seeds=2 or more")
        return metric.rounds(np.stack(rounds))
    assert metric.values is not None
    if reference is not None:
        reference = reference[readable(reference)]
    everything = np.full((len(rounds), len(rounds[0])), np.nan)
    for number, found in enumerate(rounds):
        rows = np.flatnonzero(readable(found))
        if not len(rows):
            continue
        chosen = metric.another(found[rows]) if another and metric.another else found[rows]
        try:
            values = metric.values(chosen, reference, protocol)
        except ValueError as error:  # fewer pictures than choices
            raise Missing(f"{error}: set choices= to fewer") from error
        everything[number, rows[: len(values)]] = values
    return scores.mean_known(everything.T)


def readable(found: np.ndarray) -> np.ndarray:
    """Of which pictures the extractor could say anything, bool [N]."""
    return np.any(~np.isnan(found.reshape(len(found), -1)), axis=1)


def mean_number(
    values: np.ndarray,
    rounds: Sequence[np.ndarray],
    metric: Metric,
    own: dict[str, Any],
    protocol: Protocol,
    reference: np.ndarray | None,
) -> dict[str, Any]:
    """The mean over faces, its interval, and its protocol."""
    known = values[~np.isnan(values)]
    if len(known) < metric.least:
        what = f"only {len(known)} of {len(values)} pictures can be scored"
        raise Missing(f"{what}, at least {metric.least} are needed: the faces lack what is measured, or are too few")
    low, high = scores.interval(known, draws=protocol.draws)
    by_seed = []
    if len(rounds) > 1 and metric.rounds is None:
        each = (per_face(metric, [one], reference, protocol) for one in rounds)
        by_seed = [float(np.nanmean(one)) for one in each]
    number = {"value": float(known.mean()), "low": low, "high": high, "n": len(known), "by_seed": by_seed}
    return {**number, "warning": "", "protocol": {**own, "n": len(known)}}


def set_number(
    metric: Metric, rounds: Sequence[np.ndarray], reference: np.ndarray, own: dict[str, Any], protocol: Protocol
) -> dict[str, Any]:
    """A distance between sets, the mean over rounds, its interval, and its protocol."""
    assert metric.distance is not None
    by_seed, strays, counts = [], [], []
    for found in rounds:
        both = readable(found) & readable(reference)
        if both.sum() < metric.least:
            raise Missing(f"{both.sum()} pictures are too few to tell sets apart: at least {metric.least} are needed")
        made, real = metric.features(found[both]), metric.features(reference[both])
        by_seed.append(metric.distance(made, real))
        strays.append(distances.spread(metric.distance, made, real, max(protocol.draws // 20, 20)))
        counts.append(int(both.sum()))
    low, high = np.percentile(np.mean(strays, axis=0), (2.5, 97.5)) + np.mean(by_seed)
    low, high = np.clip((low, high), *metric.limits)
    number = {"value": float(np.mean(by_seed)), "low": float(low), "high": float(high), "n": min(counts)}
    warning = metric.bias(min(counts), metric.features(reference[:1]).shape[1])
    seeds = by_seed if len(rounds) > 1 else []
    return {**number, "by_seed": seeds, "warning": warning, "protocol": {**own, "n": min(counts)}}


def by_class(rounds: Sequence[np.ndarray]) -> list[dict[str, Any]]:
    """Each class over all pictures: intersection over union of the pooled pixels, and how often it is shown.

    Args:
        rounds: what the face parser said in each round, [N, 2, 19, 3]; rows of NaN are left out, and so is a round of
            which no picture could be read.

    Returns:
        `class`; `n`, masks that have it; `iou`; `shown`, the mean over faces of the share of their portraits, with its
        interval.
    """
    known = [found[:, 0] for found in rounds if readable(found).any()]
    if not known:
        return []
    counts = np.stack(known)  # [R, N, 19, 3]
    iou = scores.class_iou(np.nansum(counts, axis=(0, 1))[None])[0]  # [19]
    shown = scores.mean_known(np.moveaxis(scores.shown(counts), 0, -1))  # [N, 19]
    table = []
    for index, name in enumerate(CLASSES):
        found = shown[~np.isnan(shown[:, index]), index]
        if not len(found):
            continue
        low, high = scores.interval(found, draws=500)
        recall = {"shown": float(found.mean()), "low": low, "high": high}
        table.append({"class": name, "n": len(found), "iou": float(iou[index]), **recall})
    return table


def likest_photos(portraits: np.ndarray, photos: np.ndarray, count: int = 8) -> list[tuple[int, int, float]]:
    """The portraits that are nearest to a training photograph, the nearest first: (portrait, photograph, cosine).

    Args:
        portraits: what the text-image pair said of them, [N, 2, P].
        photos: the same of the photographs, [M, 2, P].
        count: how many.
    """
    rows, known = np.flatnonzero(readable(portraits)), np.flatnonzero(readable(photos))
    if not len(rows) or not len(known):
        return []
    cosine, index = scores.nearest(torch.from_numpy(portraits[rows, 0]), torch.from_numpy(photos[known, 0]))
    order = cosine.argsort(descending=True)[:count].tolist()
    return [(int(rows[place]), int(known[index[place]]), float(cosine[place])) for place in order]
