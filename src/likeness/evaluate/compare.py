"""Test which differences between evaluations of the same faces are significant.

Differences are paired by face, which removes the difficulty of the face. Measurements with different protocols are
rejected.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Any

import numpy as np

from likeness.evaluate.metrics import METRICS, MIN_SET, SetMetric
from likeness.evaluate.protocol import CEILING, REAL, Protocol
from likeness.evaluate.results import Evaluation, Measurement
from likeness.evaluate.stats import holm, subsets, t_test
from likeness.types import InputError

LEVEL = 0.05
"""Level of significance over all differences of a comparison."""
COMPARED = ("model", "fingerprint", "settings")
"""Facts of a protocol that identify what is compared; they may differ."""
DERIVED = ("n", "train_n", "extractor")
"""Facts that follow from the faces or the hash of the extractor. Pairs use the faces that both evaluations have."""
OPTIONAL = ("steps", "guidance_scale", "device", "dtype")
"""Facts that images of other methods, and evaluations of earlier versions, may lack."""
SETTING_EXTRACTORS = {
    "size": ("sketch",), "face_parser": ("face_parser",), "text_image": ("text_image", "attributes"),
    "landmarker": ("landmarks",), "inception": ("inception",), "resizing": ("inception",),
    "clip_large": ("clip_large",), "dinov2": ("dinov2",), "lpips": ("lpips",), "topiq": ("topiq",), "llm_url": ("llm",),
    "llm_model": ("llm",),
}  # fmt: skip
"""Setting -> the extractors whose `extractor_hash` it changes."""
SETTING_FACTS = {
    **dict.fromkeys(SETTING_EXTRACTORS, ()),
    "size": ("resolution",),
    "caption": ("caption", "faces"),
}
"""Setting -> the other facts that it changes; settings that are not listed have the same name in the facts."""


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
    minimum: int
    """Fewest faces for a verdict."""
    p_corrected: float | None = None
    """p corrected for all differences of the comparison with enough faces (Holm 1979); None without a verdict."""
    significant: bool = False
    """Whether the corrected p is at most 0.05."""
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
    """Compare every metric and condition set that at least two evaluations, by name, all have, pair by pair. `allow`
    names settings, or facts of the protocol, that may differ. Raises `InputError` if other protocols or faces differ,
    or the evaluations have nothing in common.
    """
    names, notes = list(evaluations), []
    known = {fact for evaluation in evaluations.values() for number in evaluation.numbers for fact in number.protocol}
    known |= {*SETTING_FACTS, *(setting.name for setting in dataclasses.fields(Protocol))}
    if unknown := sorted(set(allow) - known):
        raise InputError(f"Unknown part of a protocol {unknown[0]!r} in allow. Available: {', '.join(sorted(known))}")
    facts = {fact for name in allow for fact in SETTING_FACTS.get(name, (name,))}
    if "faces" in facts:
        check_faces(evaluations)
    for name, evaluation in evaluations.items():
        if newer := sorted({number.metric for number in evaluation.numbers} - METRICS.keys()):
            notes.append(f"{name} has {', '.join(newer)}, which this version does not have")
    by_place = [
        {(n.metric, n.given): n for n in evaluation.numbers if n.against == "own" and n.metric in METRICS}
        for evaluation in evaluations.values()
    ]
    shared = [place for place in by_place[0] if place[1] != CEILING and all(place in other for other in by_place)]
    for name, numbers in zip(names, by_place, strict=True):
        only = sorted({metric for metric, given in numbers if given != CEILING} - {metric for metric, _ in shared})
        if only:
            notes.append(f"Only {name} has {', '.join(only)}")
    own = {name: evaluation.notes for name, evaluation in evaluations.items()}
    for note in dict.fromkeys(note for found in own.values() for note in found):
        having = [name for name in names if note in own[name]]
        notes.append(note if len(having) == len(names) else f"{' and '.join(having)}: {note}")
    values: dict[tuple[str, str], dict[str, Measurement]] = {}
    differences: list[Difference] = []
    for metric, given in shared:
        values[metric, given] = {name: by_name[metric, given] for name, by_name in zip(names, by_place, strict=True)}
        extractor = METRICS[metric].extractor
        changed = {"extractor_hash"} if any(extractor in SETTING_EXTRACTORS.get(name, ()) for name in allow) else set()
        notes += check_protocols(values[metric, given], facts | changed)
        for name, number in values[metric, given].items():
            if number.warning:
                notes.append(f"{METRICS[metric].title} of {name}, n = {number.n}: {number.warning}")
        for first, second in combinations(names, 2):
            try:
                test = difference_test(metric, given, evaluations[first], evaluations[second])
            except KeyError as error:
                message = f"{first} or {second} is incomplete, scores.npz has no {error}: run likeness evaluate again"
                raise InputError(message) from error
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


def check_protocols(numbers: Mapping[str, Measurement], allow: Collection[str]) -> list[str]:
    """Check that measurements of the same metric, by the name of the evaluation, have the same protocol except for the
    facts in `allow`; return notes on facts that one of them lacks. Raises `InputError` if a fact differs.
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
        test = t_test(float(differences.mean()), error, len(differences), int(np.count_nonzero(differences)))
        return {**test, "minimum": MIN_SET}
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
    return {
        **t_test(difference(both), float(error), len(both), len(both)),
        "minimum": metric.minimum(sets[0][1].shape[1]),
    }


def mark_significant(differences: Sequence[Difference]) -> list[Difference]:
    """Correct p over the differences with enough faces, mark who is better, and sort: significant ones first, those
    without a verdict last.
    """
    tested = [found for found in differences if found.n >= found.minimum]
    marked = [found for found in differences if found.n < found.minimum]
    for found, p in zip(tested, holm([found.p for found in tested]), strict=True):
        gain = (found.value > 0) == (METRICS[found.metric].better == "higher")
        better = (found.of if gain else found.minus) if p <= LEVEL else None
        marked.append(dataclasses.replace(found, p_corrected=p, significant=p <= LEVEL, better=better))
    return sorted(marked, key=lambda found: (not found.significant, found.p_corrected is None))
