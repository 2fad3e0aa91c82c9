"""Test which differences between evaluations of the same faces are significant.

Differences are paired by face, which removes the difficulty of the face. Measurements with different protocols are
rejected.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Any

import numpy as np

from likeness.evaluate.aggregate import MIN_SET
from likeness.evaluate.metrics import METRICS, SetMetric
from likeness.evaluate.protocol import CEILING, REAL
from likeness.evaluate.results import Evaluation, Measurement
from likeness.evaluate.stats import holm, subsets, t_test
from likeness.types import InputError

COMPARED = ("model", "fingerprint", "settings")
"""Facts of a protocol that identify what is compared; they may differ."""
DERIVED = ("n", "train_n", "extractor")
"""Facts that follow from the faces or the hash of the extractor. Pairs use the faces that both evaluations have."""
OPTIONAL = ("steps", "guidance_scale", "device", "dtype")
"""Facts that images of other methods, and evaluations of earlier versions, may lack."""
EXTRACTOR_SETTINGS = (
    "face_parser", "text_image", "landmarker", "inception", "clip_large", "dinov2", "lpips", "topiq", "llm_url",
    "llm_model",
)  # fmt: skip
SETTING_FACTS = {
    "size": ("resolution", "extractor_hash"),
    "caption": ("caption", "faces"),
    **dict.fromkeys(EXTRACTOR_SETTINGS, ("extractor_hash",)),
}
"""Setting -> the facts that it changes; other settings have the same name in the facts."""


@dataclass(frozen=True, kw_only=True)
class Difference:
    """The difference between two evaluations in one metric and condition set: `of` minus `minus`."""

    metric: str
    given: str
    of: str
    minus: str
    value: float
    low: float
    high: float
    p: float
    n: int
    """Number of faces that both have."""
    significant: bool = False
    """At 5 % over all differences of the comparison (Holm 1979)."""
    better: str | None = None
    """The name of the better one, if significant."""


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """The differences between evaluations."""

    names: list[str]
    values: dict[tuple[str, str], dict[str, Measurement]]
    """(metric, given) -> name -> measurement."""
    differences: list[Difference]
    notes: list[str]

    def to_json(self) -> dict[str, Any]:
        """Return the content of `comparison.json`."""
        content = dataclasses.asdict(self)
        content["values"] = [
            {"metric": metric, "given": given, "values": numbers}
            for (metric, given), numbers in content["values"].items()
        ]
        return content


def compare_evaluations(evaluations: Mapping[str, Evaluation], allow: Sequence[str] = ()) -> Comparison:
    """Compare every metric and condition set that all evaluations have, pair by pair.

    Args:
        evaluations: name -> evaluation, at least two.
        allow: settings, or facts of the protocol, that may differ.

    Raises:
        InputError: protocols or faces differ, or the evaluations have nothing in common.
    """
    names, notes = list(evaluations), []
    allow = [fact for name in allow for fact in SETTING_FACTS.get(name, (name,))]
    if "faces" in allow:
        check_faces(evaluations)
    by_place = [
        {(number.metric, number.given): number for number in evaluation.numbers if number.against == "own"}
        for evaluation in evaluations.values()
    ]
    shared = [place for place in by_place[0] if place[1] != CEILING and all(place in other for other in by_place)]
    for name, numbers in zip(names, by_place, strict=True):
        only = sorted({metric for metric, given in numbers if given != CEILING} - {metric for metric, _ in shared})
        if only:
            notes.append(f"Only {name} has {', '.join(only)}")
    values: dict[tuple[str, str], dict[str, Measurement]] = {}
    differences: list[Difference] = []
    for metric, given in shared:
        values[metric, given] = {name: by_name[metric, given] for name, by_name in zip(names, by_place, strict=True)}
        notes += check_protocols(values[metric, given], allow)
        for first, second in combinations(names, 2):
            test = difference_test(metric, given, evaluations[first], evaluations[second])
            if test is not None:
                differences.append(Difference(metric=metric, given=given, of=second, minus=first, **test))
    if not differences:
        raise InputError(f"{' and '.join(names)} have no metric of the same condition set in common")
    return Comparison(
        names=names, values=values, differences=mark_significant(differences), notes=list(dict.fromkeys(notes))
    )


def check_faces(evaluations: Mapping[str, Evaluation]) -> None:
    """Check that the faces can be paired. Raises `InputError` if not."""
    (first, reference), *others = evaluations.items()
    for name, evaluation in others:
        if evaluation.faces != reference.faces:
            raise InputError(
                f"{first} ({len(reference.faces)} faces) and {name} ({len(evaluation.faces)} faces) have different "
                "faces, but differences are paired by face: evaluate both on the same faces"
            )


def check_protocols(numbers: Mapping[str, Measurement], allow: Sequence[str]) -> list[str]:
    """Check that measurements of the same metric have the same protocol.

    Args:
        numbers: name of the evaluation -> measurement.
        allow: facts that may differ because they are what is compared.

    Returns:
        Notes on facts that one of them lacks.

    Raises:
        InputError: a fact differs.
    """
    (first, reference), *others = numbers.items()
    notes = []
    for name, number in others:
        for fact in sorted(set(reference.protocol) | set(number.protocol)):
            here, there = reference.protocol.get(fact), number.protocol.get(fact)
            if here == there or fact in (*COMPARED, *DERIVED, *allow):
                continue
            if fact not in OPTIONAL or None not in (here, there):
                raise InputError(
                    f"Cannot compare {METRICS[number.metric].title} of {first} and {name}: {fact} is {here} in {first} "
                    f"and {there} in {name}. Evaluate both with the same protocol, or pass --allow {fact} if this is "
                    "what you compare"
                )
            notes.append(f"{fact} of {first if here is None else name} is unknown")
    return notes


def difference_test(
    name: str, given: str, first: Evaluation, second: Evaluation, samples: int = 100
) -> dict[str, Any] | None:
    """Test second minus first over the faces that both have (`stats.t_test`); None if there are too few."""
    metric = METRICS[name]
    if not isinstance(metric, SetMetric):
        differences = second.scores[f"{name}/{given}"] - first.scores[f"{name}/{given}"]  # [N]
        differences = differences[~np.isnan(differences)]
        if len(differences) < 2:
            return None
        error = float(differences.std(ddof=1)) / math.sqrt(len(differences))
        return t_test(float(differences.mean()), error, len(differences), int(np.count_nonzero(differences)))
    distance = metric.distance
    key, real_key = f"{metric.extractor}/{given}/features", f"{metric.extractor}/{REAL}/features"
    sets = [(own.scores[key], own.scores[real_key]) for own in (first, second)]  # [R, N, D], [N, D]
    unknown = [np.isnan(np.concatenate([features, real[None]])).any(axis=(0, 2)) for features, real in sets]
    both = np.flatnonzero(~np.any(unknown, axis=0))
    if len(both) < MIN_SET:
        return None

    def difference(rows: np.ndarray) -> float:
        means = [np.mean([distance(x[rows], real[rows]) for x in features]) for features, real in sets]
        return float(means[1] - means[0])

    chosen, factor = subsets(len(both), samples)
    error = factor * np.std([difference(both[rows]) for rows in chosen], ddof=1)
    return t_test(difference(both), float(error), len(both), len(both))


def mark_significant(differences: Sequence[Difference]) -> list[Difference]:
    """Mark significant differences and who is better."""
    marked = []
    for difference, significant in zip(differences, holm([found.p for found in differences]), strict=True):
        gain = (difference.value > 0) == (METRICS[difference.metric].better == "higher")
        better = (difference.of if gain else difference.minus) if significant else None
        marked.append(dataclasses.replace(difference, significant=significant, better=better))
    return marked
