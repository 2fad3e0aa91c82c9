"""Contact sheets of a prepared folder: some rows with their findings, as one self-contained HTML file.

Conditions are rendered as the autoencoder receives them, so a sheet shows how their readers understood them.
"""

from __future__ import annotations

import base64
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
from jinja2 import Template
from PIL import Image, ImageOps

from likeness.conditions import CONDITIONS
from likeness.conditions.images import png_bytes, read_rgb
from likeness.data.folder import METADATA, column_of, splits_of
from likeness.files import write_whole
from likeness.prepare.check import Checked, CheckedRow, existing_files
from likeness.prepare.findings import Finding, MetadataRow, read_rows
from likeness.types import InputError

COLUMNS = {"file_name": "image", **{column_of(name): name for name in CONDITIONS}}
"""Column -> heading, from the left."""

CELL = 160
"""Side length of an image on a sheet, in pixels."""

MISSING = "#dddddd"
"""Colour of missing images."""

HTML = Template(
    """<!doctype html><html lang="en"><meta charset="utf-8"><title>Contact sheet</title><style>
body { font: 14px sans-serif; color: #222222; background: #ffffff } .fault { color: #b00020 }
td, th { text-align: left; vertical-align: top; padding: 4px } p { margin: 0 0 4px }</style><table>
<tr>{% for name in headings %}<th>{{ name }}</th>{% endfor %}</tr>
{% for line in lines %}<tr>
{% for image in line.images %}<td><img alt="" src="data:image/png;base64,{{ image }}"></td>{% endfor %}
<td><p><b>{{ line.place }}</b></p>
{% for fault in line.faults %}<p class="fault">{{ fault }}</p>{% endfor %}
{% for caption in line.captions %}<p>{{ caption }}</p>{% endfor %}</td></tr>
{% endfor %}</table></html>""",
    autoescape=True,
)


def write_sheet(folder: Path, checked: Checked, out: Path, count: int = 24) -> None:
    """Write a contact sheet of `count` rows: faulty ones first, of every kind in turn, then others, evenly spaced.

    Args:
        folder: the checked folder.
        checked: result of the check.
        out: file to write, .html.
        count: most rows to show.

    Raises:
        InputError: another suffix, a count below 1, or the file cannot be written.
    """
    check_sheet(out, count)
    folder = folder.resolve()
    lines = [describe_row(folder, row, found) for row, found in choose_rows(folder, checked, count)]
    page = HTML.render(lines=lines, headings=[*COLUMNS.values(), "captions"])
    write_whole(out, page.encode(errors="replace"))  # a lone surrogate cannot be encoded


def check_sheet(out: Path, count: int) -> None:
    """Validate the arguments of `write_sheet`, to be called before a long check."""
    if out.suffix.lower() != ".html":
        raise InputError(f"cannot write a contact sheet to {out}: use the suffix .html")
    if count < 1:
        raise InputError(f"--count must be at least 1, not {count}")


def choose_rows(folder: Path, checked: Checked, count: int) -> list[tuple[MetadataRow, list[Finding]]]:
    """Return the rows of a sheet with their findings, faulty rows first."""
    seen: Counter[str] = Counter()
    by_row: dict[tuple[str, int], list[Finding]] = {}
    turns: dict[tuple[str, int], int] = {}  # faulty row -> number of earlier findings of its rarest kind
    for found in checked.findings:
        if found.line:
            place = found.split, found.line
            by_row.setdefault(place, []).append(found)
            turns[place] = min(turns.get(place, seen[found.kind]), seen[found.kind])
            seen[found.kind] += 1
    faulty = sorted(turns, key=lambda place: turns[place])[:count]
    spread = set(np.linspace(0, checked.rows - 1, count).astype(int).tolist())
    rows = (row for split in splits_of(folder) for row in read_rows(folder, split))
    chosen = {}
    for number, row in enumerate(rows):
        place = row.place[:2]
        if place in faulty or (number in spread and place not in by_row):
            chosen[place] = row
    order = [place for place in faulty if place in chosen] + [place for place in chosen if place not in by_row]
    return [(chosen[place], by_row.get(place, [])) for place in order[:count]]


def describe_row(folder: Path, row: MetadataRow, findings: list[Finding]) -> dict[str, Any]:
    """Return place, faults, captions and images of a row for the template; missing images are grey."""
    files = existing_files(CheckedRow(row), folder / row.split)
    images = [image_of(files[column], column) if column in files else None for column in COLUMNS]
    missing = Image.new("RGB", (CELL, CELL), MISSING)
    cells = [ImageOps.pad(image or missing, (CELL, CELL), color=MISSING) for image in images]
    split, line, name = row.place
    text = row.values.get("text") or []
    return {
        "place": f"{f'{split}/{METADATA}'.removeprefix('./')}, line {line}: {name}",
        "faults": [f"{found.kind}: {found.sentence}" for found in findings],
        "captions": text if isinstance(text, list) else [text],
        "images": [base64.b64encode(png_bytes(cell)).decode() for cell in cells],
    }


def image_of(path: Path, column: str) -> Image.Image | None:
    """Render a condition; an image, or a rejected condition, is shown unchanged."""
    try:
        if column != "file_name":
            condition = CONDITIONS[COLUMNS[column]]
            raw = condition.read(path).raw
            height, width = (CELL, CELL) if condition.raw == "points" else raw.shape
            return Image.fromarray(condition.render(raw, height, width))
    except InputError:
        pass
    try:
        return read_rgb(path)
    except InputError:
        return None
