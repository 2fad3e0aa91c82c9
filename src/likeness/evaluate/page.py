"""The report of an evaluation: tables in Markdown, and one HTML page that needs no other file, with bars and portraits
beside what they were made from.

Plain HTML with inline SVG and pictures inside the page; no script, nothing from the network.
"""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from likeness.conditions import CONDITIONS
from likeness.data.folder import read_photo
from likeness.evaluate.config import SCORES, conditions_of
from likeness.evaluate.metrics import METRICS
from likeness.evaluate.report import (
    header_of,
    markdown,
    protocol_lines,
    published_tables,
    rounded,
    rows_of,
    warnings_of,
)
from likeness.files import write_whole
from likeness.types import InputError

SIDE = 96
"""Pixels of a picture in the page."""
SAMPLES, FAILURES = 12, 8
"""Faces in the grid of samples, and in each row of failures."""

CHIEF = {"mask": "mean_iou", "sketch": "edge_f_score", "keypoints": "keypoint_error"}
"""Condition -> the metric that says which portraits failed it; words are judged by the CLIP score."""

STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; margin: 2rem auto; max-width: 76rem; padding: 0 1rem; color: #1c1c1c }
table { border-collapse: collapse; margin: 1rem 0; font-variant-numeric: tabular-nums }
th, td { text-align: left; padding: .3rem .7rem; border-bottom: 1px solid #ddd; vertical-align: top }
th { font-weight: 600 } td { font-size: 14px } td:not(:first-child) { white-space: nowrap }
h2 { margin-top: 2.5rem } .quiet { color: #666; font-size: 13px }
.grid { display: flex; flex-wrap: wrap; gap: .8rem } figure { margin: 0; width: min-content }
figure > div { display: flex; gap: 2px } figcaption { font-size: 12px; color: #444; line-height: 1.3 }
img { width: 96px; height: 96px; display: block; background: #eee }
"""


def write_report(results: Mapping[str, Any], out: Path) -> None:
    """Write `report.md` and `report.html` beside the results."""
    write_whole(out / "report.md", markdown(results))
    write_whole(out / "report.html", page_of(results, out))


def page_of(results: Mapping[str, Any], out: Path) -> str:
    """The page of an evaluation; `out` holds its scores."""
    protocol = results["protocol"]
    title = f"{protocol.get('model') or 'pictures'}: {protocol['n']} faces of {protocol['split']}"
    parts = [
        f"<h1>{escape(title)}</h1>",
        table(header_of(results), rows_of(results)),
        '<p class="quiet">In brackets the 95 % interval: bootstrap over faces; for sets, the spread over random '
        "parts. Another face's: the same portraits held against the condition or caption of another face. Ceiling: "
        "the photographs themselves through the autoencoder.</p>",
        listing("Warnings", warnings_of(results)),
        listing("Not measured", [f"{METRICS[m['metric']].title}: {m['why']}" for m in results["missing"]]),
        listing("Not read", [f"{fault['file']}: {fault['why']}" for fault in results["faults"]]),
        listing("Notes", results["notes"]),
        classes(results),
        samples(results),
        failures(results, out),
        nearest(results),
        listing("Protocol", protocol_lines(results)),
        published(),
    ]
    return document(title, parts)


def document(title: str, parts: Sequence[str]) -> str:
    """Parts as a page."""
    head = f'<meta charset="utf-8"><title>{escape(title)}</title><style>{STYLE}</style>'
    return f"<!doctype html><html lang='en'><head>{head}</head><body>" + "\n".join(parts) + "</body></html>\n"


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table of escaped texts."""
    heads = "".join(f"<th>{escape(str(value))}</th>" for value in header)
    body = "".join("<tr>" + "".join(f"<td>{escape(str(value))}</td>" for value in row) + "</tr>" for row in rows)
    return f"<table><thead><tr>{heads}</tr></thead><tbody>{body}</tbody></table>"


def listing(title: str, lines: Sequence[str]) -> str:
    """A headed list; nothing where it is empty."""
    if not lines:
        return ""
    return f"<h2>{title}</h2><ul>" + "".join(f"<li>{escape(line)}</li>" for line in lines) + "</ul>"


def classes(results: Mapping[str, Any]) -> str:
    """A group of bars for every class: how well each set of portraits and the ceiling keep to it."""
    found = results["classes"]
    if not found or not any(found.values()):
        return ""
    names = list(dict.fromkeys(entry["class"] for entries in found.values() for entry in entries))
    values = {given: {entry["class"]: entry for entry in entries} for given, entries in found.items()}
    legend = "".join(
        f'<span style="color:{colour(number)}">■</span> {escape(given)} &nbsp; ' for number, given in enumerate(values)
    )
    text = "Intersection over union by class, pixels pooled over the faces (n: masks that have it)."
    return f'<h2>Classes</h2><p class="quiet">{text}</p><p>{legend}</p>{bars(names, values)}'


def colour(number: int) -> str:
    """The colour of a set: told apart also without colour vision."""
    return ("#0072b2", "#e69f00", "#999999", "#009e73", "#cc79a7", "#56b4e9")[number % 6]


def bars(names: Sequence[str], values: Mapping[str, Mapping[str, Mapping[str, Any]]]) -> str:
    """Horizontal bars of IoU in SVG: a group a class, a bar a set."""
    thick, left, width = 9, 130, 520
    group = thick * len(values) + 8
    shapes = []
    for row, name in enumerate(names):
        top = row * group
        count = max(found[name]["n"] for found in values.values() if name in found)
        label = f"{escape(name)} ({count})"
        shapes.append(f'<text x="{left - 8}" y="{top + group / 2}" text-anchor="end" font-size="12">{label}</text>')
        for number, found in enumerate(values.values()):
            if name in found:
                iou, y = found[name]["iou"], top + number * thick
                shape = f'<rect x="{left}" y="{y}" width="{iou * width:.1f}" height="{thick - 1}"'
                shapes.append(f'{shape} fill="{colour(number)}"><title>{iou:.3f}</title></rect>')
                shapes.append(f'<text x="{left + iou * width + 4:.1f}" y="{y + 8}" font-size="9">{iou:.2f}</text>')
    size = f'width="{left + width + 40}" height="{group * len(names)}"'
    return f'<svg xmlns="http://www.w3.org/2000/svg" {size} font-family="system-ui">' + "".join(shapes) + "</svg>"


def samples(results: Mapping[str, Any]) -> str:
    """The first faces: conditions, portraits of every set, photograph."""
    figures = []
    for index, face in enumerate(results["faces"][:SAMPLES]):
        shown = [condition_picture(face, name) for name in CONDITIONS if name in face]
        shown += [picture(files[index]) for files in results["portraits"].values()]
        figures.append(figure([*shown, picture(face["photo"])], f"{face['name']}: {face['caption']}"))
    order = ", ".join([*CONDITIONS, *(f"portrait from {given}" for given in results["portraits"]), "photograph"])
    return f'<h2>Samples</h2><p class="quiet">{order}</p><div class="grid">{"".join(figures)}</div>'


def failures(results: Mapping[str, Any], out: Path) -> str:
    """For each set, the portraits with the worst scores, worst first."""
    parts = []
    with np.load(out / SCORES) as kept:
        for given, files in results["portraits"].items():
            for key in [CHIEF[name] for name in conditions_of(given)] or ["clip_score"]:
                if f"{key}/{given}" not in kept:
                    continue
                values = kept[f"{key}/{given}"]
                signed = values if METRICS[key].better == "higher" else -values
                order = [int(row) for row in np.argsort(signed) if not np.isnan(values[row])][:FAILURES]
                figures = [failure(results["faces"][row], given, files[row], float(values[row])) for row in order]
                parts.append(f"<h3>from {escape(given)}: {escape(METRICS[key].title)}</h3>")
                parts.append(f'<div class="grid">{"".join(figures)}</div>')
    return "<h2>Failures, the worst first</h2>" + "".join(parts) if parts else ""


def nearest(results: Mapping[str, Any]) -> str:
    """The portraits that are likest to a training photograph, beside it."""
    parts = []
    for given, likest in results["nearest"].items():
        files = results["portraits"][given]
        figures = [figure([picture(files[row]), picture(photo)], f"cosine {cos:.3f}") for row, photo, cos in likest]
        parts.append(f'<h3>from {escape(given)}</h3><div class="grid">{"".join(figures)}</div>')
    return "<h2>Nearest training photographs, the likest first</h2>" + "".join(parts) if parts else ""


def failure(face: Mapping[str, str], given: str, file: str, value: float) -> str:
    """What one portrait was made from, it, and the photograph."""
    shown = [condition_picture(face, name) for name in conditions_of(given) if name in face]
    told = f"{rounded(value)}, {face['name']}: {face['caption']}"
    return figure([*shown, picture(file), picture(face["photo"])], told)


def figure(pictures: Sequence[str], caption: str) -> str:
    """Pictures in a row with a caption."""
    return f"<figure><div>{''.join(pictures)}</div><figcaption>{escape(caption)}</figcaption></figure>"


def picture(file: str | Path) -> str:
    """A file as a picture inside the page; an empty place where it cannot be read."""
    try:
        return embedded(read_photo(Path(file)))
    except InputError:
        return '<img alt="cannot be read">'


def condition_picture(face: Mapping[str, str], name: str) -> str:
    """A condition as the network sees it."""
    condition = CONDITIONS[name]
    try:
        raw = condition.read(face[name]).raw
        return embedded(condition.render(condition.resize(raw, SIDE, SIDE), SIDE, SIDE))
    except InputError:
        return '<img alt="cannot be read">'


def embedded(pixels: np.ndarray) -> str:
    """uint8 [H, W, 3] as an image element."""
    image, buffer = Image.fromarray(pixels), io.BytesIO()
    image.thumbnail((SIDE, SIDE))
    image.save(buffer, "WEBP", quality=85)
    return f'<img src="data:image/webp;base64,{base64.b64encode(buffer.getvalue()).decode()}" alt="">'


def published() -> str:
    """The papers' tables."""
    parts = ["<h2>Published, under other protocols: not comparable with the numbers above</h2>"]
    for entry in published_tables():
        parts.append(f"<h3>{escape(entry['title'])}</h3>" + table(["method", *entry["columns"]], entry["rows"]))
        parts.append(f'<p class="quiet">Source: {escape(entry["source"])}. Not stated: {escape(entry["unknown"])}.</p>')
    return "".join(parts)
