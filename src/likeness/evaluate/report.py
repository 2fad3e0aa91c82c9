"""Write reports of evaluations and comparisons: Markdown, and one HTML page without scripts or external files.

A report is a list of sections, which the templates in `templates/` render.
"""

from __future__ import annotations

import base64
import io
import json
import tomllib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jinja2 import Environment, PackageLoader, select_autoescape
from PIL import Image

from likeness.conditions import CONDITIONS
from likeness.data.folder import read_photo
from likeness.evaluate.compare import Comparison
from likeness.evaluate.metrics import METRICS
from likeness.evaluate.protocol import CEILING, conditions_of
from likeness.evaluate.results import ClassScore, Measurement, Results
from likeness.files import write_whole
from likeness.types import InputError

PUBLISHED = Path(__file__).with_name("published.toml")
ARROW = {"higher": "↑", "lower": "↓"}

THUMBNAIL = 96
"""Side of an image in the page, in pixels."""
SAMPLES, FAILURES = 12, 8
"""Faces in the grid of samples, and in each list of failures."""

FAILURE_METRIC = {"mask": "mean_iou", "sketch": "edge_f_score", "keypoints": "keypoint_error"}
"""Condition -> the metric that ranks failures; for images from text only, the CLIP score."""

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


class Figure(NamedTuple):
    """Images with a caption; each image is a data URL, or "" if it cannot be read."""

    images: Sequence[str]
    caption: str


@dataclass(frozen=True, kw_only=True)
class Section:
    """A part of a report. Markdown omits figures."""

    title: str = ""
    level: int = 2
    text: str = ""
    lines: Sequence[str] = ()
    header: Sequence[str] = ()
    rows: Sequence[Sequence[str]] = ()
    bars: Sequence[str] = ()
    """Columns whose values, from 0 to 1, are drawn as bars in HTML."""
    heat: tuple[float, float] | None = None
    """Range of the values, to color the cells in HTML; None for no color."""
    figures: Sequence[Figure] = ()


def render(template: str, title: str, sections: Iterable[Section]) -> str:
    """Render `report.html.jinja` or `report.md.jinja`."""
    environment = Environment(
        loader=PackageLoader("likeness.evaluate"),
        autoescape=select_autoescape(("html.jinja",)),
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template(template).render(title=title, sections=list(sections))


def write(out: Path, name: str, title: str, sections: Sequence[Section]) -> None:
    """Write a report as Markdown and HTML."""
    write_whole(out / f"{name}.md", render("report.md.jinja", title, sections))
    write_whole(out / f"{name}.html", render("report.html.jinja", title, sections))


def write_report(results: Results, out: Path) -> None:
    """Write `report.md` and `report.html` of an evaluation."""
    protocol = results.protocol
    title = f"{protocol.get('model') or 'images'}: {protocol['n']} faces of {protocol['split']}"
    write(out, "report", title, evaluation_sections(results))


def write_comparison(comparison: Comparison, out: Path) -> None:
    """Write `comparison.json`, `comparison.md` and `comparison.html`."""
    write_whole(out / "comparison.json", json.dumps(comparison.to_json(), indent=1))
    sections = [comparison_table(comparison), *optional("Notes", comparison.notes)]
    write(out, "comparison", " and ".join(comparison.names), sections)


def markdown_table(table: Section) -> str:
    """Render a section without a title as Markdown."""
    return render("report.md.jinja", "", [table]).strip()


# --- Numbers


def format_number(value: float, sign: str = "") -> str:
    """Format a number: four decimals below 10, two above, scientific below 5e-4 (KID).

    Args:
        value: the number.
        sign: "+" for differences.
    """
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
    return Section(header=header, rows=rows)


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
    return Section(header=header, rows=rows, text=SIGNIFICANCE)


# --- Sections of an evaluation


def evaluation_sections(results: Results) -> list[Section]:
    """All sections of the report of an evaluation."""
    numbers = numbers_table(results)
    warnings = [f"{METRICS[n.metric].title}, n = {n.n}: {n.warning}" for n in results.numbers if n.warning]
    protocol = [f"{key}: {value}" for key, value in results.protocol.items() if value is not None]
    protocol += [f"{name}: {found['what']}, hash {found['hash']}" for name, found in results.extractors.items()]
    protocol.append("seed of an image: the index of its face, plus 1,000,000 for each further image of the face")
    return [
        Section(header=numbers.header, rows=numbers.rows, text=INTERVALS),
        *optional("Warnings", list(dict.fromkeys(warnings))),
        *optional("Not measured", [f"{METRICS[entry.metric].title}: {entry.why}" for entry in results.missing]),
        *optional("Unreadable files", [f"{fault.file}: {fault.why}" for fault in results.faults]),
        *optional("Notes", results.notes),
        *class_sections(results.classes),
        sample_section(results),
        *failure_sections(results),
        *nearest_sections(results),
        *optional("Protocol", protocol),
        *published_sections(),
    ]


def optional(title: str, lines: Sequence[str]) -> list[Section]:
    """A section with a list, or nothing if the list is empty."""
    return [Section(title=title, lines=lines)] if lines else []


def class_sections(classes: Mapping[str, Sequence[ClassScore]]) -> list[Section]:
    """The scores of each class, a table per condition set."""
    return [
        Section(
            title=f"Classes, {given}",
            text="n: masks that contain the class. IoU: over the pixels of all images. Shown: fraction of images.",
            header=["class", "n", "IoU", "shown"],
            rows=[[score.name, str(score.n), format_number(score.iou), format_number(score.shown)] for score in scores],
            bars=("IoU", "shown"),
        )
        for given, scores in classes.items()
        if scores
    ]


def sample_section(results: Results) -> Section:
    """The first faces: conditions, an image of every condition set, photograph."""
    figures = []
    for index, face in enumerate(results.faces[:SAMPLES]):
        images = [embed_condition(face, name) for name in CONDITIONS if name in face]
        images += [embed_file(files[index]) for files in results.images.values()]
        figures.append(Figure([*images, embed_file(face["photo"])], f"{face['name']}: {face['caption']}"))
    order = ", ".join([*CONDITIONS, *(f"image from {given}" for given in results.images), "photograph"])
    return Section(title="Samples", text=order, figures=figures)


def failure_sections(results: Results) -> list[Section]:
    """For each condition set, the images with the lowest scores, worst first."""
    sections = []
    for given, files in results.images.items():
        for name in [FAILURE_METRIC[condition] for condition in conditions_of(given)] or ["clip_score"]:
            values = results.scores.get(f"{name}/{given}")
            if values is None:
                continue
            order = np.argsort(values if METRICS[name].better == "higher" else -values)
            figures = []
            for row in [int(row) for row in order if not np.isnan(values[row])][:FAILURES]:
                face = results.faces[row]
                images = [embed_condition(face, name) for name in conditions_of(given) if name in face]
                caption = f"{format_number(float(values[row]))}, {face['name']}: {face['caption']}"
                figures.append(Figure([*images, embed_file(files[row]), embed_file(face["photo"])], caption))
            title = f"Worst images from {given}: {METRICS[name].title}"
            sections.append(Section(title=title, figures=figures))
    return sections


def nearest_sections(results: Results) -> list[Section]:
    """The images that are nearest to a training photograph, next to it."""
    sections = []
    for given, neighbors in results.nearest.items():
        pairs = [(results.images[given][found.row], found.photo) for found in neighbors]
        captions = [f"cos {found.cosine:.3f}" for found in neighbors]
        figures = [Figure(list(map(embed_file, pair)), text) for pair, text in zip(pairs, captions, strict=True)]
        sections.append(Section(title=f"Nearest training photographs, images from {given}", figures=figures))
    return sections


def published_sections() -> list[Section]:
    """The tables of papers."""
    sections = [Section(title="Published numbers, with other protocols: not comparable with the numbers above")]
    for table in published_tables():
        text = f"Source: {table['source']}. Not stated: {table['unknown']}."
        header = ["method", *table["columns"]]
        sections.append(Section(title=table["title"], level=3, header=header, rows=table["rows"], text=text))
    return sections


def published_tables() -> list[dict[str, Any]]:
    """Read the tables of papers; floats stay strings, so that they keep their printed digits."""
    return tomllib.loads(PUBLISHED.read_text(encoding="utf-8"), parse_float=str)["table"]


# --- Images as data URLs


def embed_file(file: str | Path) -> str:
    """Embed an image file; "" if it cannot be read."""
    return embed(lambda: read_photo(Path(file)))


def embed_condition(face: Mapping[str, str], name: str) -> str:
    """Embed a condition as the network sees it; "" if it cannot be read."""
    condition, size = CONDITIONS[name], (THUMBNAIL, THUMBNAIL)
    return embed(lambda: condition.render(condition.resize(condition.read(face[name]).raw, *size), *size))


def embed(read: Callable[[], np.ndarray]) -> str:
    """Encode uint8 [H, W, 3] as a data URL."""
    try:
        image, buffer = Image.fromarray(read()), io.BytesIO()
    except InputError:
        return ""
    image.thumbnail((THUMBNAIL, THUMBNAIL))
    image.save(buffer, "WEBP", quality=85)
    return f"data:image/webp;base64,{base64.b64encode(buffer.getvalue()).decode()}"
