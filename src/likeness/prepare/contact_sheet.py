"""Contact sheets of a prepared folder: some rows with their findings, as one self-contained HTML file.

Conditions are rendered as the autoencoder receives them, so a sheet shows how their readers understood them.
"""

from __future__ import annotations

from collections import Counter
from functools import partial
from pathlib import Path

import numpy as np
from PIL import Image

from likeness.conditions import CONDITIONS
from likeness.conditions.images import read_rgb
from likeness.data.folder import METADATA, column_of, split_inside, splits_of
from likeness.pages import SIDE, Figure, Section, embed, write_page
from likeness.prepare.check import Checked, CheckedRow, existing_files
from likeness.prepare.fix import Finding, MetadataRow, read_rows
from likeness.types import InputError

COLUMNS = {"file_name": "image", **{column_of(name): name for name in CONDITIONS}}
"""Column -> label, from the left."""


def write_sheet(folder: Path, checked: Checked, out: Path, count: int) -> None:
    """Write a contact sheet of `count` rows: faulty ones first, of every kind in turn, then others, evenly spaced.

    `out` and `count` must be valid (`check_sheet`). Raises `InputError` if the file cannot be written.
    """
    folder = folder.resolve()
    figures = [describe_row(folder, row, found) for row, found in choose_rows(folder, checked, count)]
    faults = Counter(found.kind for found in checked.findings)
    verdict = [f"{checked.rows} rows, {len(figures)} shown. {len(checked.findings)} findings."]
    lines = [f"{kind}: {number}" for kind, number in faults.most_common()]
    write_page(out, f"{folder.name}: contact sheet", [Section(verdict=verdict, lines=lines), Section(figures=figures)])


def check_sheet(out: Path, count: int) -> None:
    """Validate the arguments of `write_sheet`, to be called before a long check."""
    if out.suffix.lower() != ".html":
        raise InputError(f"cannot write a contact sheet to {out}: use the suffix .html")
    if count < 1:
        raise InputError(f"--count must be at least 1, not {count}")


def choose_rows(folder: Path, checked: Checked, count: int) -> list[tuple[MetadataRow, list[Finding]]]:
    """Return the rows of a sheet with their findings: rows with findings of every kind in turn, then others."""
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
    chosen = {
        row.place[:2]: row
        for number, row in enumerate(rows)
        if row.place[:2] in faulty or (number in spread and row.place[:2] not in by_row)
    }
    order = [*(place for place in faulty if place in chosen), *(place for place in chosen if place not in by_row)]
    return [(chosen[place], by_row.get(place, [])) for place in order[:count]]


def describe_row(folder: Path, row: MetadataRow, findings: list[Finding]) -> Figure:
    """Return the images of a row with its captions, place and faults; missing images are empty."""
    files = existing_files(CheckedRow(row), split_inside(folder, row.split))
    images = [(name, embed(partial(image_of, files.get(column), column))) for column, name in COLUMNS.items()]
    split, line, name = row.place
    text = row.values.get("text") or []
    return Figure(
        images,
        captions=[str(caption) for caption in (text if isinstance(text, list) else [text])],
        place=f"{f'{split}/{METADATA}'.removeprefix('./')}, line {line}: {name}",
        faults=[f"{found.kind}: {found.sentence}" for found in findings],
    )


def image_of(path: Path | None, column: str) -> Image.Image | np.ndarray:
    """Render a condition; an image, or a rejected condition, is shown unchanged. Raises `InputError`."""
    if path is None:
        raise InputError("the row has no such file")
    try:
        if column != "file_name":
            condition = CONDITIONS[COLUMNS[column]]
            raw = condition.read(path).raw
            return condition.render(raw, *((SIDE, SIDE) if condition.raw == "points" else raw.shape))
    except InputError:
        pass
    return read_rgb(path)
