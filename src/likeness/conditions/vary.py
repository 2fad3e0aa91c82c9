"""The same condition as another hand would have given it: wobbling borders, other stroke widths, points off a bit.

Training on such versions beside the exact ones keeps a model from leaning on the habits of one parser or one sketch
extractor; people paint masks roughly and draw with pens of every width.
"""

from __future__ import annotations

import numpy as np


def vary_labels(raw: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Labels uint8 [H, W] with borders moved by up to about a fiftieth of the side; no label is invented."""
    from scipy import ndimage

    return ndimage.map_coordinates(raw, wobbled_grid(raw.shape, 0.008, rng), order=0, mode="nearest")


def vary_lines(raw: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Lines uint8 [H, W], wobbling, with strokes between two thirds and about twice as wide."""
    from scipy import ndimage

    ink = 1 - raw.astype(np.float32) / 255
    ink = ndimage.map_coordinates(ink, wobbled_grid(raw.shape, 0.005, rng), order=1, mode="nearest")
    width = rng.uniform(-1, 1)
    if width > 0:  # a blur widens, the gain makes it dark again
        ink = ndimage.gaussian_filter(ink, width * min(raw.shape) / 160) * (1 + 1.5 * width)
    else:  # only the cores of the strokes stay
        ink = ink ** (1 - width)
    return np.rint(255 * (1 - np.clip(ink, 0, 1))).astype(np.uint8)


def vary_points(raw: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Points float32 [P, 2], each off by about 0.4 % of the side."""
    return raw + rng.normal(0, 0.004, raw.shape).astype(np.float32)


def wobbled_grid(shape: tuple[int, ...], amount: float, rng: np.random.Generator) -> np.ndarray:
    """Where each pixel is read from, [2, H, W]: its own place plus a smooth displacement.

    The displacement's standard deviation is `amount` of the shorter side; it changes over about a tenth of the side.
    """
    from scipy import ndimage

    side = min(shape)
    coarse = rng.standard_normal((2, 12, 12))
    fields = [
        ndimage.zoom(field, (shape[0] / 12, shape[1] / 12), order=1, grid_mode=True, mode="nearest") for field in coarse
    ]
    return np.indices(shape) + amount * side * np.stack(fields)
