"""Convert class colors to classes, also if a smooth resize or JPEG has blended them.

The nearest palette color of a blended pixel is often an unrelated class: halfway between black and hair is the color
of the lower lip. Blended pixels therefore take a label from a nearby pixel that has a palette color. Thin lines of a
palette color that is a mixture of the colors on both sides count as blended, so that thin parts may lose a pixel.
"""

from __future__ import annotations

import numpy as np

TOLERANCE = 12
"""Largest difference per channel from a palette color: flat areas of JPEGs at quality 60 stay within it."""

REACH = 3
"""Distance in pixels at which the two parts of a mixture are searched: the support of a Lanczos filter."""

SPECK = 4e-5
"""Fraction of the pixels below which a region of a blended mask is considered noise: 10 pixels of 512x512."""

UNKNOWN = -1
"""Label of pixels without a palette color."""


def nearest_colors(rgb: np.ndarray, *palettes: np.ndarray) -> list[tuple[np.ndarray, np.ndarray]]:
    """Find the nearest colors of an image, uint8 [H, W, 3], in palettes, uint8 [P, 3]. For each palette: int16 [H, W],
    the row, and int16 [H, W], the largest difference over the channels.
    """
    packed = (rgb[..., 0].astype(np.int32) << 16) | (rgb[..., 1].astype(np.int32) << 8) | rgb[..., 2]
    values, where = unique_colors(packed)  # [N], [H, W]
    unpacked = np.stack([values >> 16, values >> 8 & 255, values & 255], axis=1).astype(np.int16)  # [N, 3]
    found = []
    for colors in palettes:
        best = np.zeros(len(values), dtype=np.int16)
        distance = np.full(len(values), 256, dtype=np.int16)
        for row, color in enumerate(colors.astype(np.int16)):
            candidate = np.abs(unpacked - color).max(axis=1).astype(np.int16)
            best[candidate < distance] = row
            distance = np.minimum(distance, candidate)
        found.append((best[where], distance[where]))
    return found


def unique_colors(packed: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """`np.unique` with inverse for values below 2^24, [H, W] -> [N], [H, W]; six times as fast for large images."""
    if packed.size < 1 << 20:
        values, inverse = np.unique(packed, return_inverse=True)
        return values, inverse.reshape(packed.shape)
    present, inverse = np.zeros(1 << 24, dtype=bool), np.empty(1 << 24, dtype=np.int32)
    present[packed] = True
    values = np.flatnonzero(present)
    inverse[values] = np.arange(len(values))
    return values, inverse[packed]


def _mixtures(colors: np.ndarray) -> np.ndarray:
    """bool [P, P, P]: whether color c is close to the line segment from color a to color b, indexed [a, b, c]."""
    points = colors.astype(np.float32)
    a, b, c = points[:, None, None], points[None, :, None], points[None, None, :]
    along = ((c - a) * (b - a)).sum(-1) / np.maximum(((b - a) ** 2).sum(-1), 1.0)
    off = np.abs(a + along[..., None] * (b - a) - c).max(-1)
    count = np.arange(len(points))
    different = (count[:, None, None] != count) & (count[None, :, None] != count)
    return different & (off <= 2 * TOLERANCE) & (along > 0.02) & (along < 0.98)


def unblend(near: np.ndarray, colors: np.ndarray, rgb: np.ndarray | None = None) -> np.ndarray:
    """Label blended pixels from clean pixels nearby: rows of `colors`, uint8 [P, 3], where `near`, int16 [H, W], is
    `UNKNOWN`.

    With the image `rgb`, uint8 [H, W, 3], a pixel takes the label of the nearest color among the labels within two
    pixels. Without it, or farther from clean pixels, it takes the label of the nearest clean pixel. Raises `ValueError`
    if no clean pixel remains.
    """
    from scipy import ndimage

    height, width = near.shape
    solid = np.full(near.shape, UNKNOWN, dtype=np.int16)
    for row in np.unique(near[near != UNKNOWN]):
        solid[ndimage.binary_opening(near == row, np.ones((3, 3)))] = row
    rows, columns = np.nonzero((near != UNKNOWN) & (solid == UNKNOWN))  # thin: a part, or a line of mixed colors
    mixture = _mixtures(colors)
    blended = np.zeros(len(rows), dtype=bool)
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
        blended |= both & mixture[sides[0], sides[1], near[rows, columns]]
    kept = near.copy()
    kept[rows[blended], columns[blended]] = UNKNOWN
    # Small regions of a palette color among blended pixels are noise.
    for row in np.unique(kept[kept != UNKNOWN]):
        components, count = ndimage.label(kept == row, structure=np.ones((3, 3)))
        sizes = np.bincount(components.ravel(), minlength=count + 1)
        kept[(sizes < max(4, SPECK * near.size))[components] & (components > 0)] = UNKNOWN
    if (kept == UNKNOWN).all():
        raise ValueError("no pixel has a palette color")
    result = fill_nearest(kept, kept == UNKNOWN)
    if rgb is not None:
        rows, columns = np.nonzero(kept == UNKNOWN)
        pixels, least = rgb[rows, columns].astype(np.float32), np.full(len(rows), np.inf, dtype=np.float32)
        for row in np.unique(kept[kept != UNKNOWN]):
            nearby = ndimage.maximum_filter(kept == row, size=5)[rows, columns]
            off = np.where(nearby, np.abs(pixels - colors[row]).sum(axis=1), np.inf)
            closer = off < least
            result[rows[closer], columns[closer]] = row
            least = np.minimum(least, off)
    return result


def fill_nearest(values: np.ndarray, missing: np.ndarray) -> np.ndarray:
    """Replace the `missing` pixels, bool [H, W], with the values of the nearest other pixels."""
    from scipy import ndimage

    nearest = ndimage.distance_transform_edt(missing, return_distances=False, return_indices=True)
    return values[tuple(np.asarray(nearest))]


def looks_blended(indices: np.ndarray) -> bool:
    """Return whether a smooth resize averaged class numbers, uint8 [H, W].

    Across a blended border between classes a and b the numbers run monotonically through the values in between. In a
    clean mask three different classes seldom follow one another. Of clean masks of 32 to 512 pixels less than 0.1 of
    the borders are such runs, of blended masks more than 0.3.
    """
    runs = borders = 0
    wide = indices.astype(np.int16)
    for values in (wide, wide.T):
        steps = np.diff(values, axis=1)
        borders += int(np.count_nonzero(steps))
        runs += int(np.count_nonzero(steps[:, 1:] * steps[:, :-1] > 0))
    return borders > 0 and runs / borders > 0.25
