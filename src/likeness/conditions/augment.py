"""Random variations of conditions: displaced borders, other stroke widths, inexact points.

Training on them keeps a model from relying on the details of one parser, sketch extractor or landmark detector.
"""

from __future__ import annotations

import numpy as np


def augment_labels(raw: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Displace the borders of labels, uint8 [H, W], by up to about 1/50 of the side. No new label appears."""
    from scipy import ndimage

    return ndimage.map_coordinates(raw, displaced_grid(raw.shape, 0.008, rng), order=0, mode="nearest")


def augment_lines(raw: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Displace lines, uint8 [H, W], and scale their width by about 2/3 to 2."""
    from scipy import ndimage

    ink = 1 - raw.astype(np.float32) / 255
    ink = ndimage.map_coordinates(ink, displaced_grid(raw.shape, 0.005, rng), order=1, mode="nearest")
    width = rng.uniform(-1, 1)
    if width > 0:  # blur to widen, then restore the contrast
        ink = ndimage.gaussian_filter(ink, width * min(raw.shape) / 160) * (1 + 1.5 * width)
    else:  # keep the centers of the strokes
        ink = ink ** (1 - width)
    return np.rint(255 * (1 - np.clip(ink, 0, 1))).astype(np.uint8)


def augment_points(raw: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Add Gaussian noise to points, float32 [P, 2]; its standard deviation is 0.4 % of the side."""
    return raw + rng.normal(0, 0.004, raw.shape).astype(np.float32)


def displaced_grid(shape: tuple[int, ...], amount: float, rng: np.random.Generator) -> np.ndarray:
    """Sampling positions, [2, H, W], with a smooth random displacement.

    Its standard deviation is `amount` times the shorter side; its scale is about 1/10 of the side.
    """
    from scipy import ndimage

    zoom = (shape[0] / 12, shape[1] / 12)
    fields = [
        ndimage.zoom(field, zoom, order=1, grid_mode=True, mode="nearest") for field in rng.standard_normal((2, 12, 12))
    ]
    return np.indices(shape) + amount * min(shape) * np.stack(fields)
