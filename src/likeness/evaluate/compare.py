"""Which differences between evaluations of the same faces are significant.

Both have a portrait of every face, so differences are taken face by face, which leaves out how hard a face is. Numbers
of different protocols are refused: their difference would say nothing.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
from scipy import stats

from likeness.evaluate import distances
from likeness.evaluate.config import CEILING, REAL, RESULTS, SCORES
from likeness.evaluate.metrics import METRICS, Metric
from likeness.evaluate.report import BETTER, rounded, table
from likeness.files import write_whole
from likeness.types import InputError

LEVEL = 0.05
"""Chance of calling any difference of a comparison significant where there is none."""

IDENTITY = ("model", "fingerprint", "settings")
"""What is compared, so it may differ."""
FOLLOWING = ("n", "train_n", "extractor")
"""What follows from the faces and from the extractor's hash; pairs are taken of the faces that both have."""
UNKNOWN = ("steps", "guidance_scale", "device", "dtype")
"""Parts of the protocol that images of another method, and evaluations of earlier versions, may lack."""
JUDGES = ("face_parser", "text_image", "landmarker", "inception", "clip_large", "dinov2", "lpips", "topiq")
CALLED = {
    "size": ("resolution", "extractor_hash"),
    "caption": ("caption", "faces"),
    **dict.fromkeys((*JUDGES, "judge", "judge_model"), ("extractor_hash",)),
}
"""Setting -> what the protocol of a number has in its place; the others have their own names there."""


@dataclass(frozen=True)
class Evaluation:
    """A finished evaluation."""

    results: Mapping[str, Any]
    scores: Mapping[str, np.ndarray]
    """`metric/given` -> a value a face [N]; `extractor/given/features` -> [R, N, D]."""


def read_evaluation(folder: Path) -> Evaluation:
    """What `evaluate` left in a folder.

    Raises:
        InputError: it is none, or incomplete.
    """
    try:
        results = json.loads((folder / RESULTS).read_text())
        with np.load(folder / SCORES) as kept:
            return Evaluation(results, dict(kept))
    except (OSError, ValueError) as error:
        raise InputError(f"{folder} holds no finished evaluation: run likeness evaluate --out {folder}") from error


def check_protocols(
    names: Sequence[str], numbers: Sequence[Mapping[str, Any]], allow: Sequence[str], notes: list[str]
) -> None:
    """Refuse numbers of different protocols.

    Args:
        names: of the evaluations.
        numbers: one of each, of the same metric.
        allow: what may differ since it is compared.
        notes: gets what one of them does not tell.

    Raises:
        InputError: a part of the protocol differs; the sentence names it.
    """
    first = numbers[0]["protocol"]
    for name, number in zip(names[1:], numbers[1:], strict=True):
        own = number["protocol"]
        for key in sorted(set(first) | set(own)):
            here, there = first.get(key), own.get(key)
            if here == there or key in IDENTITY or key in FOLLOWING or key in allow:
                continue
            if key in UNKNOWN and None in (here, there):
                notes.append(f"{key} of {names[0] if here is None else name} is not known")
                continue
            raise InputError(
                f"{METRICS[number['metric']].title} of {names[0]} and {name} cannot be compared: {key} is {here} in "
                f"{names[0]} and {there} in {name}; measure both alike, or say --allow {key} if it is what you compare"
            )


def compare_evaluations(evaluations: Mapping[str, Evaluation], allow: Sequence[str] = ()) -> dict[str, Any]:
    """Every metric and set of portraits that all evaluations have, pair by pair.

    Args:
        evaluations: name -> evaluation, at least two.
        allow: settings, or parts of the protocol, that may differ.

    Returns:
        `names`; `values`, each number of each evaluation; `differences`, each with `of` and `minus`, its value, 95 %
        interval, p, and whether it is significant at 5 % over all of them (Holm 1979); `notes`.

    Raises:
        InputError: protocols or faces differ, or there is nothing that all of them have.
    """
    names, notes = list(evaluations), []
    allow = [part for name in allow for part in CALLED.get(name, (name,))]
    rows = [[face["name"] for face in evaluation.results["faces"]] for evaluation in evaluations.values()]
    if "faces" in allow and (other := next((at for at, row in enumerate(rows) if row != rows[0]), None)):
        raise InputError(
            f"{names[0]} and {names[other]} have other faces ({len(rows[0])} and {len(rows[other])} of them), and "
            "differences are taken face by face: measure both on the same"
        )
    by_place = [
        {(n["metric"], n["given"]): n for n in evaluation.results["numbers"] if n["against"] == "own"}
        for evaluation in evaluations.values()
    ]
    shared = [place for place in by_place[0] if place[1] != CEILING and all(place in other for other in by_place)]
    for name, found in zip(names, by_place, strict=True):
        own = sorted({metric for metric, given in found if given != CEILING} - {metric for metric, _ in shared})
        if own:
            notes.append(f"only {name} has {', '.join(own)}")
    values, differences = [], []
    for key, given in shared:
        numbers = [found[key, given] for found in by_place]
        check_protocols(names, numbers, allow, notes)
        values.append({"metric": key, "given": given, "values": dict(zip(names, numbers, strict=True))})
        for first, second in combinations(names, 2):
            pair = evaluations[first], evaluations[second]
            found = difference(METRICS[key], key, given, *pair)
            if found is not None:
                differences.append({"metric": key, "given": given, "of": second, "minus": first, **found})
    if not differences:
        raise InputError(f"{' and '.join(names)} have no metric of the same portraits in common")
    holm(differences)
    return {"names": names, "values": values, "differences": differences, "notes": list(dict.fromkeys(notes))}


def difference(
    metric: Metric, key: str, given: str, first: Evaluation, second: Evaluation, draws: int = 100
) -> dict[str, Any] | None:
    """Second minus first over the faces that both have; None where fewer than two do."""
    if metric.distance is None:
        apart = second.scores[f"{key}/{given}"] - first.scores[f"{key}/{given}"]  # [N]
        apart = apart[~np.isnan(apart)]
        if len(apart) < 2:
            return None
        error = float(apart.std(ddof=1)) / math.sqrt(len(apart))
        return told(float(apart.mean()), error, len(apart), int(np.count_nonzero(apart)))
    name, photographs = f"{metric.extractor}/{given}/features", f"{metric.extractor}/{REAL}/features"
    sets = [(own.scores[name], own.scores[photographs]) for own in (first, second)]  # [R, N, D], [N, D]
    unknown = [np.isnan(np.concatenate([made, real[None]])).any(axis=(0, 2)) for made, real in sets]
    both = np.flatnonzero(~np.any(unknown, axis=0))
    if len(both) < metric.least:
        return None

    def apart_at(rows: np.ndarray) -> float:
        assert metric.distance is not None
        ours, theirs = ([metric.distance(x[rows], real[rows]) for x in made] for made, real in sets)
        return float(np.mean(theirs) - np.mean(ours))

    chosen, factor = distances.parts(len(both), draws)
    error = factor * np.std([apart_at(both[part]) for part in chosen], ddof=1)
    return told(apart_at(both), float(error), len(both), len(both))


def told(value: float, error: float, count: int, apart: int) -> dict[str, Any]:
    """A difference with its 95 % interval and the chance p of one as large where there is none.

    Args:
        value: the difference.
        error: its standard error.
        count: faces that it was taken over; Student's t of count - 1 degrees of freedom allows for few.
        apart: how many of them differ. Were their signs a matter of chance, all would be alike with 2^(1 - apart): p is
            never less, also where the differences show no spread.
    """
    reach = error * float(stats.t.ppf(0.975, count - 1))
    p = 2 * float(stats.t.sf(abs(value) / error, count - 1)) if error > 0 else float(value == 0)
    return {
        "value": value,
        "low": value - reach,
        "high": value + reach,
        "p": max(p, min(1, 2.0 ** (1 - apart))),
        "n": count,
    }


def holm(differences: list[dict[str, Any]]) -> None:
    """Mark what is significant when so many differences are looked at (Holm 1979), and who is better."""
    order = sorted(range(len(differences)), key=lambda index: differences[index]["p"])
    going = True
    for place, index in enumerate(order):
        found = differences[index]
        going = going and found["p"] <= LEVEL / (len(order) - place)
        found["significant"] = going
        gain = found["value"] > 0 if METRICS[found["metric"]].better == "higher" else found["value"] < 0
        found["better"] = (found["of"] if gain else found["minus"]) if going else None


def header_and_rows(found: Mapping[str, Any]) -> tuple[list[str], list[list[str]]]:
    """The comparison as a table: a row for every metric, set and pair."""
    values = {(entry["metric"], entry["given"]): entry["values"] for entry in found["values"]}
    header = ["metric", "from", *found["names"], "difference", "95 % interval", "n", "verdict"]
    rows = []
    for entry in found["differences"]:
        metric, numbers = METRICS[entry["metric"]], values[entry["metric"], entry["given"]]
        pair = "" if len(found["names"]) == 2 else f" ({entry['of']} - {entry['minus']})"
        verdict = f"{entry['better']} is better" if entry["significant"] else "no significant difference"
        rows.append(
            [
                f"{metric.title} {BETTER[metric.better]}",
                entry["given"],
                *(rounded(numbers[name]["value"]) for name in found["names"]),
                f"{rounded(entry['value'], '+')}{pair}",
                f"{rounded(entry['low'], '+')} to {rounded(entry['high'], '+')}",
                str(entry["n"]),
                f"{verdict} (p = {entry['p']:.2g})",
            ]
        )
    return header, rows


EXPLANATION = (
    "Differences face by face (second minus first); their spread is that of the faces, for sets of random parts of "
    "them (Student's t). Significant: at 5 % over all differences of this table together (Holm)."
)


def markdown_of(found: Mapping[str, Any]) -> str:
    """The comparison as Markdown."""
    notes = "\n".join(f"- {note}" for note in found["notes"])
    return "\n\n".join(part for part in (table(*header_and_rows(found)), EXPLANATION, notes) if part) + "\n"


def write_comparison(found: Mapping[str, Any], out: Path) -> None:
    """Write `comparison.json`, `comparison.md` and `comparison.html`."""
    from likeness.evaluate import page

    title = " against ".join(found["names"])
    parts = [f"<h1>{page.escape(title)}</h1>", page.table(*header_and_rows(found)), f"<p>{EXPLANATION}</p>"]
    write_whole(out / "comparison.json", json.dumps(found, indent=1))
    write_whole(out / "comparison.md", f"# {title}\n\n{markdown_of(found)}")
    write_whole(out / "comparison.html", page.document(title, [*parts, page.listing("Notes", found["notes"])]))
