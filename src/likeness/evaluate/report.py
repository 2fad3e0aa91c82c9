"""Write the reports of evaluations and comparisons, as pages (`likeness.pages`) and as Markdown."""

from __future__ import annotations

import json
import tomllib
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from likeness.conditions import CONDITIONS
from likeness.data.folder import read_photo
from likeness.evaluate.compare import Comparison, Difference
from likeness.evaluate.metrics import METRICS
from likeness.evaluate.protocol import CEILING, conditions_of
from likeness.evaluate.results import ClassScore, Evaluation, Measurement, Results
from likeness.files import write_whole
from likeness.pages import SIDE, Figure, Section, embed, write_markdown, write_page
from likeness.pages.charts import Chart, bar_chart, interval_chart

PUBLISHED = Path(__file__).with_name("published.toml")
ARROW = {"higher": "↑", "lower": "↓"}

SAMPLES, FAILURES = 12, 8
"""Faces in the grid of samples, and in each list of failures."""

MAIN_METRIC = {"mask": "mean_iou", "sketch": "edge_f_score", "keypoints": "keypoint_error"}
"""Condition -> the metric that ranks failures and is reported first; for images from text only, the CLIP score."""

INTERVALS = (
    "In brackets: 95 % interval (bootstrap over faces; for sets, spread over random subsets). Another face's: the same "
    "images compared with the condition or caption of another face (floor). Ceiling: photographs through the "
    "autoencoder."
)
SIGNIFICANCE = (
    "Differences are paired by face (second minus first). Their spread is that of the faces, for sets that of random "
    "subsets (Student's t). p is corrected for all differences of this table with a verdict (Holm); significant: at "
    "most 0.05."
)


def write_report(results: Results, out: Path) -> None:
    """Write `report.md` and `report.html` of an evaluation."""
    protocol = results.protocol
    title = f"{protocol.get('model') or 'images'}: {protocol['n']} faces of {protocol['split']}"
    write(out / "report", title, evaluation_sections(results))


def write_comparison(comparison: Comparison, evaluations: Mapping[str, Evaluation], out: Path) -> None:
    """Write `comparison.json`, `comparison.md` and `comparison.html`."""
    write_whole(out / "comparison.json", json.dumps(comparison.to_json(), indent=1))
    sections = [
        Section(verdict=comparison_verdict(comparison)),
        *compared_samples(evaluations),
        *difference_charts(comparison),
        comparison_table(comparison),
        *optional("Notes", comparison.notes),
    ]
    write(out / "comparison", " and ".join(comparison.names), sections)


def write(stem: Path, title: str, sections: Sequence[Section]) -> None:
    """Write a report as a page and as Markdown."""
    write_page(stem.with_name(f"{stem.name}.html"), title, sections)
    write_markdown(stem.with_name(f"{stem.name}.md"), title, sections)


# --- Numbers


def format_number(value: float, sign: str = "") -> str:
    """Format a number: four decimals below 10, two above, scientific below 5e-4; `sign` is "+" for differences."""
    form = ".1e" if 0 < abs(value) < 5e-4 else ".4f" if abs(value) < 10 else ".2f"
    return f"{value:{sign}{form}}"


def format_measurement(number: Measurement | None) -> str:
    """Format a value with its interval."""
    if number is None:
        return "-"
    interval = f"{format_number(number.low)} to {format_number(number.high)}"
    return f"{format_number(number.value)} ({interval}){' ⚠' if number.warning else ''}"


def numbers_table(results: Results) -> Section:
    """The table of all numbers: one row per metric; a column per condition set, then floor and ceiling."""
    by_place = {(n.metric, n.given, n.against): n for n in results.numbers}
    rows = []
    for name in dict.fromkeys(number.metric for number in results.numbers):
        own = {given: by_place.get((name, given, "own")) for given in (*results.images, CEILING)}
        counts = sorted({number.n for number in own.values() if number})
        n = str(counts[0]) if len(counts) == 1 else f"{counts[0]} to {counts[-1]}"
        floor = next((n for n in results.numbers if n.metric == name and n.against == "another"), None)
        cells = [format_measurement(own[given]) for given in results.images]
        floor_cell = f"{format_measurement(floor)} [{floor.given}]" if floor else "-"
        rows.append([titled(name), n, *cells, floor_cell, format_measurement(own[CEILING])])
    header = ["metric", "n", *(f"from {given}" for given in results.images), "another face's", "ceiling"]
    return Section(title="Metrics", header=header, rows=rows, text=INTERVALS)


def titled(metric: str) -> str:
    """A metric's title with the direction in which it improves."""
    return f"{METRICS[metric].title} {ARROW[METRICS[metric].better]}"


def comparison_table(comparison: Comparison) -> Section:
    """One row per metric, condition set and pair."""
    rows = []
    for found in comparison.differences:
        numbers = comparison.values[found.metric, found.given]
        pair = "" if len(comparison.names) == 2 else f" ({found.of} - {found.minus})"
        verdict = f"{found.better} is better" if found.significant else "no significant difference"
        if found.p_corrected is None:
            verdict = f"no verdict: needs {found.minimum} faces"
        else:
            verdict += f" (p = {found.p_corrected:.2g})"
        rows.append(
            [
                titled(found.metric),
                found.given,
                *(format_number(numbers[name].value) for name in comparison.names),
                f"{format_number(found.value, '+')}{pair}",
                f"{format_number(found.low, '+')} to {format_number(found.high, '+')}",
                str(found.n),
                verdict,
            ]
        )
    header = ["metric", "from", *comparison.names, "difference", "95 % interval", "n", "verdict"]
    return Section(title="Differences", header=header, rows=rows, text=SIGNIFICANCE)


def by_pair(comparison: Comparison) -> dict[tuple[str, str], list[Difference]]:
    """Group the differences by (first, second) source."""
    found: dict[tuple[str, str], list[Difference]] = {}
    for one in comparison.differences:
        found.setdefault((one.minus, one.of), []).append(one)
    return found


def comparison_verdict(comparison: Comparison) -> list[str]:
    """How many differences are significant, pair by pair."""
    verdict = []
    for (first, second), found in by_pair(comparison).items():
        wins = Counter(one.better for one in found if one.better)
        counts = ", ".join(f"{name} is better in {wins[name]}" for name in (first, second))
        verdict.append(f"Of {len(found)} differences, {sum(wins.values())} are significant: {counts}.")
    return verdict


def compared_samples(evaluations: Mapping[str, Evaluation]) -> Iterator[Section]:
    """The first faces that all evaluations have, with the image of each, by condition set."""
    first = next(iter(evaluations.values()))
    shared = [name for name in first.faces if all(name in other.faces for other in evaluations.values())][:SAMPLES]
    for given in [one for one in first.images if all(one in other.images for other in evaluations.values())]:
        figures = []
        for face in shared:
            files = {name: own.images[given][own.faces.index(face)] for name, own in evaluations.items()}
            figures.append(Figure([(name, embed_file(file)) for name, file in files.items()], [face]))
        yield Section(title=f"Images from {given}", figures=figures)


def difference_charts(comparison: Comparison) -> list[Section]:
    """A chart of the differences of each pair, in units of the half width of their intervals."""
    charts = []
    for (first, second), differences in by_pair(comparison).items():
        rows = []
        for found in differences:
            half = (found.high - found.low) / 2
            if half > 0:
                value = found.value / half * (1 if METRICS[found.metric].better == "higher" else -1)
                rows.append((f"{METRICS[found.metric].title}, {found.given}", value, value - 1, value + 1))
        if rows:
            title = f"Left of 0: {first} is better; right: {second}. Unit: half the width of the 95 % interval"
            charts.append(interval_chart(title, rows, (0,)))
    return [Section(title="Charts", charts=charts)] if charts else []


# --- Sections of an evaluation


def evaluation_sections(results: Results) -> list[Section]:
    """All sections of the report of an evaluation."""
    warnings = [f"{METRICS[n.metric].title}, n = {n.n}: {n.warning}" for n in results.numbers if n.warning]
    protocol = [f"{key}: {value}" for key, value in results.protocol.items() if value is not None]
    protocol += [f"{name}: {found['what']}, hash {found['hash']}" for name, found in results.extractors.items()]
    protocol.append("seed of an image: the index of its face, plus 1,000,000 for each further image of the face")
    return [
        Section(verdict=verdict(results)),
        sample_section(results),
        *chart_sections(results),
        numbers_table(results),
        *optional("Warnings", list(dict.fromkeys(warnings))),
        *optional("Not measured", [f"{METRICS[name].title}: {why}" for name, why in results.missing.items()]),
        *optional("Unreadable files", [f"{file}: {why}" for file, why in results.faults.items()]),
        *optional("Notes", results.notes),
        *failure_sections(results),
        *nearest_sections(results),
        *class_sections(results.classes),
        *optional("Protocol", protocol),
        *published_sections(),
    ]


def main_metrics(given: str) -> list[str]:
    """The metrics of what a condition set contains."""
    return [MAIN_METRIC[condition] for condition in conditions_of(given)] or ["clip_score"]


def anchors(results: Results, metric: str, given: str) -> tuple[Measurement | None, Measurement | None]:
    """The floor, of another face's condition or caption, and the ceiling of a metric, if they were measured."""
    own = [n for n in results.numbers if n.metric == metric]
    floor = next((n for n in own if n.given == given and n.against == "another"), None)
    return floor, next((n for n in own if n.given == CEILING), None)


def verdict(results: Results) -> list[str]:
    """The main metrics of each condition set, with floor and ceiling."""
    lines = []
    for number in results.numbers:
        if number.against == "own" and number.given in results.images and number.metric in main_metrics(number.given):
            names = ("another face's", "ceiling")
            found = zip(names, anchors(results, number.metric, number.given), strict=True)
            context = "; ".join(f"{name} {format_number(one.value)}" for name, one in found if one is not None)
            own = f"{METRICS[number.metric].title} {format_number(number.value)}"
            lines.append(f"Images from {number.given}: {own}" + (f" ({context})." if context else "."))
    return lines


def chart_sections(results: Results) -> list[Section]:
    """Metrics between floor and ceiling, and the scores of each class."""
    rows = []
    for number in results.numbers:
        floor, ceiling = anchors(results, number.metric, number.given)
        if number.given not in results.images or number.against != "own" or floor is None or ceiling is None:
            continue
        if span := ceiling.value - floor.value:
            low, value, high = ((x - floor.value) / span for x in (number.low, number.value, number.high))
            rows.append((f"{METRICS[number.metric].title}, {number.given}", value, min(low, high), max(low, high)))
    charts: list[Chart] = []
    if rows:
        title = "Metrics with 95 % intervals: 0 is another face's condition or caption, 1 is the ceiling"
        charts.append(interval_chart(title, rows, (0, 1)))
    for given, scores in results.classes.items():
        if scores:
            bars = {"IoU": [score.iou for score in scores], "shown": [score.shown for score in scores]}
            charts.append(bar_chart(f"Classes, images from {given}", bars, [score.name for score in scores]))
    return [Section(title="Charts", charts=charts)] if charts else []


def optional(title: str, lines: Sequence[str]) -> list[Section]:
    """A section with a list, or nothing if the list is empty."""
    return [Section(title=title, lines=lines)] if lines else []


def class_sections(classes: Mapping[str, Sequence[ClassScore]]) -> Iterator[Section]:
    """The scores of each class, a table per condition set."""
    text = "n: masks that contain the class. IoU: over the pixels of all images. Shown: fraction of images."
    for given, scores in classes.items():
        rows = [[score.name, str(score.n), format_number(score.iou), format_number(score.shown)] for score in scores]
        if rows:
            yield Section(title=f"Classes, {given}", text=text, header=["class", "n", "IoU", "shown"], rows=rows)


def sample_section(results: Results) -> Section:
    """The first faces: conditions, an image of every condition set, photograph."""
    figures = []
    for index, face in enumerate(results.faces[:SAMPLES]):
        images = [(name, embed_condition(face, name)) for name in CONDITIONS if name in face]
        images += [(f"from {given}", embed_file(files[index])) for given, files in results.images.items()]
        images.append(("photograph", embed_file(face["photo"])))
        figures.append(Figure(images, [f"{face['name']}: {face['caption']}"]))
    return Section(title="Samples", figures=figures)


def failure_sections(results: Results) -> Iterator[Section]:
    """For each condition set, the images with the lowest scores, worst first."""
    for given, files in results.images.items():
        for name in main_metrics(given):
            values = results.scores.get(f"{name}/{given}")
            if values is None:
                continue
            order = np.argsort(values if METRICS[name].better == "higher" else -values)
            figures = []
            for row in [int(row) for row in order if not np.isnan(values[row])][:FAILURES]:
                face = results.faces[row]
                images = [(name, embed_condition(face, name)) for name in conditions_of(given) if name in face]
                images += [("image", embed_file(files[row])), ("photograph", embed_file(face["photo"]))]
                caption = f"{format_number(float(values[row]))}, {face['name']}: {face['caption']}"
                figures.append(Figure(images, [caption]))
            yield Section(title=f"Worst images from {given}: {METRICS[name].title}", figures=figures)


def nearest_sections(results: Results) -> Iterator[Section]:
    """The images that are nearest to a training photograph, next to it."""
    for given, neighbors in results.nearest.items():
        figures = []
        for found in neighbors:
            files = {"image": results.images[given][found.row], "training photograph": found.photo}
            images = [(label, embed_file(file)) for label, file in files.items()]
            figures.append(Figure(images, [f"cos {found.cosine:.3f}"]))
        yield Section(title=f"Nearest training photographs, images from {given}", figures=figures)


def published_sections() -> Iterator[Section]:
    """The tables of papers."""
    yield Section(title="Published numbers, with other protocols: not comparable with the numbers above")
    for table in published_tables():
        text = f"Source: {table['source']}. Not stated: {table['unknown']}."
        header = ["method", *table["columns"]]
        yield Section(title=table["title"], level=3, header=header, rows=table["rows"], text=text)


def published_tables() -> list[dict[str, Any]]:
    """Read the tables of papers; floats stay strings, so that they keep their printed digits."""
    return tomllib.loads(PUBLISHED.read_text(encoding="utf-8"), parse_float=str)["table"]


# --- Images as data URLs


def embed_file(file: str | Path) -> str:
    """Embed an image file; "" if it cannot be read."""
    return embed(lambda: read_photo(Path(file)))


def embed_condition(face: Mapping[str, str], name: str) -> str:
    """Embed a condition as the network sees it; "" if it cannot be read."""
    condition = CONDITIONS[name]
    return embed(lambda: condition.render(condition.resize(condition.read(face[name]).raw, SIDE, SIDE), SIDE, SIDE))
