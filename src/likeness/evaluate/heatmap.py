"""Tables of numbers as pictures: one cell a value, darker to brighter, with the numbers at its ends beside the scale.

Drawn with Pillow, which is there anyway; a plotting library would be the largest dependency of all for two kinds of
picture.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from PIL import Image, ImageDraw, ImageFont

Panel = Sequence[Sequence[float]]
"""Values [rows][columns]."""

RAMP = ((68, 1, 84), (59, 82, 139), (33, 145, 140), (94, 201, 98), (253, 231, 37))
"""Colours of equal steps in lightness, from low to high."""

CELL, GAP, TEXT = 16, 14, 12
"""Pixels: side of a cell, room between panels, height of letters."""


def heat_maps(
    panels: Sequence[Mapping[str, Panel]], rows: Sequence[str], columns: Sequence[str], across: str
) -> Image.Image:
    """A sheet of panels that share their rows, columns and, line by line, their scale of colours.

    Args:
        panels: lines of panels, each by its title.
        rows: names of the rows.
        columns: names of the columns; the first and the last are written below.
        across: what the columns are.

    Returns:
        RGB, as large as it needs to be.
    """
    font = ImageFont.load_default(TEXT)
    left = GAP + int(max(font.getlength(name) for name in rows)) + 6
    titles = [title for line in panels for title in line]
    wide = max(CELL * len(columns), int(max(map(font.getlength, [*titles, across]))))
    line_height = TEXT + 6 + CELL * len(rows) + TEXT + 6 + GAP
    scale = int(font.getlength("0.0000")) + CELL + 6
    size = left + max(map(len, panels)) * (wide + GAP) + scale + GAP, GAP + len(panels) * line_height + TEXT
    sheet = Image.new("RGB", size, "white")
    draw = ImageDraw.Draw(sheet)

    for number, line in enumerate(panels):
        top = GAP + number * line_height + TEXT + 6
        values = np.concatenate([np.asarray(panel, dtype=float).ravel() for panel in line.values()])
        low, high = float(values.min()), float(values.max())
        for index, name in enumerate(rows):
            draw.text((left - 6, top + CELL * (index + 0.5)), name, "black", font, anchor="rm")
        for place, (title, panel) in enumerate(line.items()):
            x = left + place * (wide + GAP)
            draw.text((x, top - 6), title, "black", font, anchor="ls")
            sheet.paste(cells(np.asarray(panel, dtype=float), low, high), (x, top))
            bottom = top + CELL * len(rows) + 4
            draw.text((x, bottom), columns[0], "black", font, anchor="lt")
            if len(columns) > 1:
                draw.text((x + CELL * len(columns), bottom), columns[-1], "black", font, anchor="rt")
        x = left + len(line) * (wide + GAP)
        ramp = cells(np.linspace(1, 0, CELL * len(rows))[:, None], 0, 1, side=1).resize((CELL, CELL * len(rows)))
        sheet.paste(ramp, (x, top))
        for value, y, anchor in ((high, top, "lt"), (low, top + CELL * len(rows), "lb")):
            draw.text((x + CELL + 4, y), f"{value:.4f}"[:6], "black", font, anchor=anchor)
    draw.text((left, size[1] - TEXT), across, "black", font, anchor="lm")
    return sheet


def cells(values: np.ndarray, low: float, high: float, side: int = CELL) -> Image.Image:
    """Values [rows, columns] as coloured cells."""
    place = (values - low) / (high - low or 1.0) * (len(RAMP) - 1)  # [rows, columns]
    channels = [np.interp(place, range(len(RAMP)), channel) for channel in zip(*RAMP, strict=True)]
    picture = np.stack(channels, axis=-1).round().astype(np.uint8)  # [rows, columns, 3]
    return Image.fromarray(picture.repeat(side, axis=0).repeat(side, axis=1))
