"""Contact sheets of a prepared folder: some rows with their findings, as one PNG or one self-contained HTML file.

Conditions are rendered as the autoencoder receives them, so a sheet shows how their readers understood them.
"""

from __future__ import annotations

import base64
import textwrap
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
from jinja2 import Template
from PIL import Image, ImageDraw, ImageFont, ImageOps

from likeness.conditions import CONDITIONS
from likeness.conditions.images import open_image, png_bytes
from likeness.data.folder import METADATA, column_of, splits_of
from likeness.files import write_whole
from likeness.prepare.check import Checked, CheckedRow, existing_files
from likeness.prepare.findings import Finding, Row, read_rows
from likeness.types import InputError

COLUMNS = {"file_name": "image", **{column_of(name): name for name in CONDITIONS}}
"""Column -> heading, from the left."""

CELL = 160
"""Side length of an image on a sheet, in pixels."""

GAP = 8
"""Pixels between images."""

TEXT = 480
"""Width of the text in a PNG, in pixels."""

BACKGROUND, INK, FAULT, MISSING = "#ffffff", "#222222", "#b00020", "#dddddd"

HTML = Template(
    """<!doctype html><html lang="en"><meta charset="utf-8"><title>Contact sheet</title><style>
body { font: 14px sans-serif; color: {{ ink }}; background: {{ background }} } .fault { color: {{ fault }} }
td, th { text-align: left; vertical-align: top; padding: 4px } p { margin: 0 0 4px }</style><table>
<tr>{% for name in headings %}<th>{{ name }}</th>{% endfor %}</tr>
{% for line in lines %}<tr>
{% for image in line.images %}<td><img alt="" src="data:image/png;base64,{{ encode(image) }}"></td>{% endfor %}
<td><p><b>{{ line.place }}</b></p>
{% for fault in line.faults %}<p class="fault">{{ fault }}</p>{% endfor %}
{% for caption in line.captions %}<p>{{ caption }}</p>{% endfor %}</td></tr>
{% endfor %}</table></html>""",
    autoescape=True,
)


class Line(NamedTuple):
    """One row of a sheet."""

    place: str
    faults: list[str]
    captions: list[str]
    images: list[Image.Image]
    """[CELL x CELL] in the order of `COLUMNS`."""


def write_sheet(folder: Path, checked: Checked, out: Path, count: int = 24) -> None:
    """Write a contact sheet of `count` rows: faulty ones first, of every kind in turn, then others, evenly spaced.

    Args:
        folder: the checked folder.
        checked: result of the check.
        out: file to write, .png or .html.
        count: most rows to show.

    Raises:
        InputError: another suffix, a count below 1, or the file cannot be written.
    """
    check_sheet(out, count)
    folder = folder.resolve()
    lines = [line_of(folder, row, found) for row, found in choose_rows(folder, checked, count)]
    write_whole(out, SHEETS[out.suffix.lower()](lines))


def check_sheet(out: Path, count: int) -> None:
    """Validate the arguments of `write_sheet`, to be called before a long check."""
    if out.suffix.lower() not in SHEETS:
        raise InputError(f"cannot write a contact sheet to {out}: use the suffix {' or '.join(SHEETS)}")
    if count < 1:
        raise InputError(f"--count must be at least 1, not {count}")


def choose_rows(folder: Path, checked: Checked, count: int) -> list[tuple[Row, list[Finding]]]:
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
    picked: dict[tuple[str, int], Row] = {}
    others: list[Row] = []
    rows = (row for split in splits_of(folder) for row in read_rows(folder, split))
    for number, row in enumerate(rows):
        place = row.place[:2]
        if place in faulty:
            picked[place] = row
        elif number in spread and place not in by_row:
            others.append(row)
    chosen = [picked[place] for place in faulty if place in picked] + others
    return [(row, by_row.get(row.place[:2], [])) for row in chosen[:count]]


def line_of(folder: Path, row: Row, findings: list[Finding]) -> Line:
    """Collect text and images of a row; missing images are grey."""
    files = existing_files(CheckedRow(row), folder / row.split)
    images = [image_of(files[column], column) if column in files else None for column in COLUMNS]
    missing = Image.new("RGB", (CELL, CELL), MISSING)
    split, line, name = row.place
    text = row.values.get("text") or []
    return Line(
        printable(f"{f'{split}/{METADATA}'.removeprefix('./')}, line {line}: {name}"),
        [printable(f"{found.kind}: {found.sentence}") for found in findings],
        [printable(str(caption)) for caption in (text if isinstance(text, list) else [text])],
        [ImageOps.pad(image or missing, (CELL, CELL), color=MISSING) for image in images],
    )


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
        return open_image(path).convert("RGB")
    except InputError:
        return None


def printable(text: str) -> str:
    """Replace characters that cannot be encoded, such as lone surrogates."""
    return text.encode(errors="replace").decode()


def png_sheet(lines: list[Line]) -> bytes:
    """Draw the rows one below the other, with their text, cut to fit, at the right."""
    font = ImageFont.load_default(11)
    pitch = CELL + GAP
    sheet = Image.new("RGB", (GAP + len(COLUMNS) * pitch + TEXT, GAP + len(lines) * pitch), BACKGROUND)
    draw = ImageDraw.Draw(sheet)
    for number, line in enumerate(lines):
        top = GAP + number * pitch
        for column, image in enumerate(line.images):
            sheet.paste(image, (GAP + column * pitch, top))
        coloured = [(INK, [line.place]), (FAULT, line.faults), (INK, line.captions)]
        wrapped = [(ink, part) for ink, texts in coloured for text in texts for part in textwrap.wrap(text, 80)]
        for at, (ink, part) in enumerate(wrapped[: CELL // 13]):
            draw.text((GAP + len(COLUMNS) * pitch, top + 13 * at), part, fill=ink, font=font)
    return png_bytes(sheet)


def html_sheet(lines: list[Line]) -> bytes:
    """Render a table with embedded images, without scripts or links."""
    return HTML.render(
        lines=lines,
        headings=[*COLUMNS.values(), "captions"],
        encode=lambda image: base64.b64encode(png_bytes(image)).decode(),
        ink=INK,
        background=BACKGROUND,
        fault=FAULT,
    ).encode()


SHEETS: dict[str, Callable[[list[Line]], bytes]] = {".png": png_sheet, ".html": html_sheet}
"""Suffix -> writer."""
