"""Class colours back to classes, also where a smooth resize or JPEG has blended them.

The nearest palette colour of a blended pixel is often a class that is nowhere near (half way between black and hair
lies the lower lip), so blended pixels take a label that occurs beside them on a pixel that still has a palette colour,
and lines of palette colour that are themselves a mixture of their two sides count as blended. Thin true parts may lose
a pixel.
"""

from __future__ import annotations

import numpy as np

TOLERANCE = 12
"""Levels by which every channel may differ from a palette colour: flat areas stay within it in JPEGs of quality 60."""

REACH = 3
"""Pixels on either side in which the two parts of a mixture are looked for: the support of a Lanczos filter."""

SPECK = 4e-5
"""Share of the picture below which a piece of a blended mask is taken for chance: 10 pixels of 512x512."""

UNKNOWN = -1
"""Stands for "no palette colour"."""


def nearest_colours(rgb: np.ndarray, *palettes: np.ndarray) -> list[tuple[np.ndarray, np.ndarray]]:
    """The palette colour nearest to each pixel.

    Args:
        rgb: uint8 [H, W, 3].
        palettes: uint8 [P, 3] each.

    Returns:
        For each palette: int16 [H, W], the row; and int16 [H, W], the largest difference over the channels.
    """
    packed = (rgb[..., 0].astype(np.int32) << 16) | (rgb[..., 1].astype(np.int32) << 8) | rgb[..., 2]
    values, where = distinct(packed)  # [N], [H, W]
    unpacked = np.stack([values >> 16, values >> 8 & 255, values & 255], axis=1).astype(np.int16)  # [N, 3]
    found = []
    for colours in palettes:
        best = np.zeros(len(values), dtype=np.int16)
        distance = np.full(len(values), 256, dtype=np.int16)
        for row, colour in enumerate(colours.astype(np.int16)):
            candidate = np.abs(unpacked - colour).max(axis=1).astype(np.int16)
            best[candidate < distance] = row
            distance = np.minimum(distance, candidate)
        found.append((best[where], distance[where]))
    return found


def distinct(packed: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The distinct values of numbers below 2^24, [N], and which of them each is, [H, W]. In large pictures by a table,
    six times as fast as by sorting.
    """
    if packed.size < 1 << 20:
        values, number = np.unique(packed, return_inverse=True)
        return values, number.reshape(packed.shape)
    seen, number = np.zeros(1 << 24, dtype=bool), np.empty(1 << 24, dtype=np.int32)
    seen[packed] = True
    values = np.flatnonzero(seen)
    number[values] = np.arange(len(values))
    return values, number[packed]


def _mixtures(colours: np.ndarray) -> np.ndarray:
    """bool [P, P, P]: whether colour c lies near the straight line from colour a to colour b, indices [a, b, c]."""
    points = colours.astype(np.float32)
    a, b, c = points[:, None, None], points[None, :, None], points[None, None, :]
    along = ((c - a) * (b - a)).sum(-1) / np.maximum(((b - a) ** 2).sum(-1), 1.0)
    off = np.abs(a + along[..., None] * (b - a) - c).max(-1)
    count = np.arange(len(points))
    different = (count[:, None, None] != count) & (count[None, :, None] != count)
    return different & (off <= 2 * TOLERANCE) & (along > 0.02) & (along < 0.98)


def unblend(near: np.ndarray, colours: np.ndarray, rgb: np.ndarray | None = None) -> np.ndarray:
    """Give blended pixels a label from the clean pixels beside them.

    With `rgb`, that is the one of the nearest colour among the labels within two pixels; without, or farther from
    clean pixels, the label of the nearest one.

    Args:
        near: int16 [H, W], rows of `colours`, `UNKNOWN` where the colour is off the palette.
        colours: uint8 [P, 3].
        rgb: uint8 [H, W, 3], the picture itself.

    Returns:
        int16 [H, W], rows of `colours`, without `UNKNOWN`.

    Raises:
        ValueError: no pixel is left to take labels from.
    """
    from scipy import ndimage

    height, width = near.shape
    solid = np.full(near.shape, UNKNOWN, dtype=np.int16)
    for row in np.unique(near[near != UNKNOWN]):
        solid[ndimage.binary_opening(near == row, np.ones((3, 3)))] = row
    rows, columns = np.nonzero((near != UNKNOWN) & (solid == UNKNOWN))  # thin: real, or a line of mixture
    mixture = _mixtures(colours)
    ghost = np.zeros(len(rows), dtype=bool)
    for down, right in ((0, 1), (1, 0), (1, 1), (1, -1)):
        sides = []
        for sign in (1, -1):
            found = np.full(len(rows), UNKNOWN, dtype=np.int16)
            for step in range(1, REACH + 1):
                y = np.clip(rows + sign * step * down, 0, height - 1)
                x = np.clip(columns + sign * step * right, 0, width - 1)
                found = np.where(found == UNKNOWN, solid[y, x], found)
            sides.append(found)
        both = (sides[0] != UNKNOWN) & (sides[1] != UNKNOWN)
        ghost |= both & mixture[sides[0], sides[1], near[rows, columns]]
    kept = near.copy()
    kept[rows[ghost], columns[ghost]] = UNKNOWN
    # A few pixels of palette colour amid blended ones are chance.
    for row in np.unique(kept[kept != UNKNOWN]):
        components, count = ndimage.label(kept == row, structure=np.ones((3, 3)))
        sizes = np.bincount(components.ravel(), minlength=count + 1)
        kept[(sizes < max(4, SPECK * near.size))[components] & (components > 0)] = UNKNOWN
    if (kept == UNKNOWN).all():
        raise ValueError("no pixel has a palette colour")
    nearest = np.asarray(ndimage.distance_transform_edt(kept == UNKNOWN, return_distances=False, return_indices=True))
    result = kept[nearest[0], nearest[1]]
    if rgb is not None:
        rows, columns = np.nonzero(kept == UNKNOWN)
        pixels, least = rgb[rows, columns].astype(np.float32), np.full(len(rows), np.inf, dtype=np.float32)
        for row in np.unique(kept[kept != UNKNOWN]):
            beside = ndimage.maximum_filter(kept == row, size=5)[rows, columns]
            off = np.where(beside, np.abs(pixels - colours[row]).sum(axis=1), np.inf)
            closer = off < least
            result[rows[closer], columns[closer]] = row
            least = np.minimum(least, off)
    return result


def looks_blended(indices: np.ndarray) -> bool:
    """Whether class numbers were averaged by a smooth resize.

    Across a blended border between the classes a and b the numbers run monotonely through values in between; in a clean
    mask three different classes seldom follow one another. More than 0.25 of the borders being such runs is blended;
    clean masks of 32 to 512 pixels stay below 0.1, blended ones above 0.3.

    Args:
        indices: uint8 [H, W].
    """
    runs = borders = 0
    wide = indices.astype(np.int16)
    for values in (wide, wide.T):
        steps = np.diff(values, axis=1)
        borders += int(np.count_nonzero(steps))
        runs += int(np.count_nonzero(steps[:, 1:] * steps[:, :-1] > 0))
    return borders > 0 and runs / borders > 0.25
