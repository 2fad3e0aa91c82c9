"""A contact sheet of a prepared folder: what training will see of some rows, side by side, with what was found wrong.

Conditions are drawn as the autoencoder gets them, so that a sheet shows what their readers understood. One PNG to look
at or one HTML file that needs no other, no script and no network.
"""

from __future__ import annotations

import base64
import html
import textwrap
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont, ImageOps

from likeness.conditions import CONDITIONS
from likeness.conditions.images import open_image, png_bytes
from likeness.data.folder import METADATA, column_of
from likeness.files import write_whole
from likeness.prepare.check import Checked, Seen, existing_files
from likeness.prepare.faults import Finding, Row, read_rows, splits_of
from likeness.types import InputError

COLUMNS = ("file_name", *map(column_of, CONDITIONS))
"""The pictures of a line, from the left."""

CELL = 160
"""Pixels a side of a picture on a sheet."""

GAP = 8
"""Pixels between pictures."""

WORDS = 480
"""Pixels that the words beside the pictures take in a PNG."""

PAPER, INK, FAULT, NOTHING = "#ffffff", "#222222", "#b00020", "#dddddd"
"""Colours of ground, words, findings and missing pictures."""

Line = tuple[Row, list[Finding], list[Image.Image]]
"""A row, its findings, and its pictures [CELL x CELL] in the order of `COLUMNS`."""


def write_sheet(folder: Path, checked: Checked, out: Path, count: int = 24) -> None:
    """Write a contact sheet of `count` rows: faulty ones first, every kind in turn, then others from all over.

    Args:
        folder: the folder that was checked.
        checked: what the check found.
        out: file to write, .png or .html.
        count: rows to show, at most.

    Raises:
        InputError: another ending, a count below 1, or the file cannot be written.
    """
    check_sheet(out, count)
    folder = folder.resolve()
    lines = [(row, found, pictures_of(folder / row.split, row)) for row, found in chosen_rows(folder, checked, count)]
    write_whole(out, SHEETS[out.suffix.lower()](lines))


def check_sheet(out: Path, count: int) -> None:
    """Refuse what no sheet can be written to, before a long check is begun."""
    if out.suffix.lower() not in SHEETS:
        raise InputError(f"{out} should end in {' or '.join(SHEETS)}: these are the contact sheets there are")
    if count < 1:
        raise InputError(f"--count is {count}; a contact sheet needs at least 1 row")


def chosen_rows(folder: Path, checked: Checked, count: int) -> list[tuple[Row, list[Finding]]]:
    """The rows of a sheet with their findings, the faulty ones in front."""
    seen: Counter[str] = Counter()
    by_row: dict[tuple[str, int], list[Finding]] = {}
    turns: dict[tuple[str, int], int] = {}  # of a faulty row, how many of its kind came before it
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


def pictures_of(root: Path, row: Row) -> list[Image.Image]:
    """The row's picture and conditions; grey where there is none."""
    files = existing_files(Seen(row), root)
    pictures = [picture_of(files[column], column) if column in files else None for column in COLUMNS]
    nothing = Image.new("RGB", (CELL, CELL), NOTHING)
    return [ImageOps.pad(picture or nothing, (CELL, CELL), color=NOTHING) for picture in pictures]


def picture_of(path: Path, column: str) -> Image.Image | None:
    """A condition as it is drawn for the network; a picture, or what is refused as a condition, as it is."""
    try:
        if column != "file_name":
            condition = CONDITIONS[column.removesuffix("_file_name")]
            raw = condition.read(path).raw
            height, width = (CELL, CELL) if condition.raw == "points" else raw.shape
            return Image.fromarray(condition.render(raw, height, width))
    except InputError:
        pass
    try:
        return open_image(path).convert("RGB")
    except InputError:
        return None


def words_of(row: Row, findings: list[Finding]) -> tuple[str, list[str], list[str]]:
    """Where the row is, what is wrong with it, and its captions."""
    split, line, name = row.place
    text = row.values.get("text") or []
    captions = [str(caption) for caption in (text if isinstance(text, list) else [text])]
    where = f"{split}/{METADATA}".removeprefix("./")
    return f"{where}, line {line}: {name}", [f"{found.kind}: {found.sentence}" for found in findings], captions


def png_sheet(lines: list[Line]) -> bytes:
    """One line below the other, words at the right; they are cut where a line ends."""
    font = ImageFont.load_default(11)
    pitch = CELL + GAP
    sheet = Image.new("RGB", (GAP + len(COLUMNS) * pitch + WORDS, GAP + len(lines) * pitch), PAPER)
    draw = ImageDraw.Draw(sheet)
    for number, (row, findings, pictures) in enumerate(lines):
        top = GAP + number * pitch
        for place, picture in enumerate(pictures):
            sheet.paste(picture, (GAP + place * pitch, top))
        where, faults, captions = words_of(row, findings)
        coloured = [(INK, [where]), (FAULT, faults), (INK, captions)]
        written = [(ink, part) for ink, words in coloured for word in words for part in textwrap.wrap(word, 80)]
        for at, (ink, part) in enumerate(written[: CELL // 13]):
            draw.text((GAP + len(COLUMNS) * pitch, top + 13 * at), printable(part), fill=ink, font=font)
    return png_bytes(sheet)


def html_sheet(lines: list[Line]) -> bytes:
    """One table with its pictures inside."""
    parts = [
        '<!doctype html><html lang="en"><meta charset="utf-8"><title>Contact sheet</title><style>',
        f"body {{ font: 14px sans-serif; color: {INK}; background: {PAPER} }} .fault {{ color: {FAULT} }}",
        "td, th { text-align: left; vertical-align: top; padding: 4px } p { margin: 0 0 4px }</style><table>",
        "<tr>"
        + "".join(f"<th>{column.removesuffix('_file_name')}</th>" for column in (*COLUMNS, "captions"))
        + "</tr>",
    ]
    for row, findings, pictures in lines:
        where, faults, captions = words_of(row, findings)
        cells = [f'<td><img alt="" src="data:image/png;base64,{encoded(picture)}"></td>' for picture in pictures]
        words = [f"<p><b>{html.escape(where)}</b></p>"]
        words += [f'<p class="fault">{html.escape(fault)}</p>' for fault in faults]
        words += [f"<p>{html.escape(caption)}</p>" for caption in captions]
        parts.append(f"<tr>{''.join(cells)}<td>{''.join(words)}</td></tr>")
    return "\n".join([*parts, "</table></html>"]).encode(errors="xmlcharrefreplace")


def encoded(picture: Image.Image) -> str:
    """A picture as text."""
    return base64.b64encode(png_bytes(picture)).decode()


def printable(words: str) -> str:
    """What the font cannot shape, such as half a surrogate pair, as a question mark."""
    return words.encode(errors="replace").decode()


SHEETS: dict[str, Callable[[list[Line]], bytes]] = {".png": png_sheet, ".html": html_sheet}
"""Ending -> how such a sheet is made."""
