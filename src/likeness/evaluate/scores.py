"""Scores of single images: how well an image matches its conditions. Arrays in, numbers out."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from scipy import ndimage
from torch import Tensor
from torch.nn import functional as F

from likeness.conditions.mask.classes import CLASS_INDEX

RARE_CLASSES = tuple(CLASS_INDEX[name] for name in ("eye_g", "hat", "earring", "necklace"))
"""Glasses, hats, earrings and necklaces, which models omit first."""
MIN_OVERLAP = 0.1
"""Fraction of the pixels of a class in the given mask that must be found for the class to be shown."""


def pixel_accuracy(given: np.ndarray, found: np.ndarray) -> float:
    """Return the fraction of pixels of equal class; labels [H, W], both."""
    return float((given == found).mean())


def class_counts(confusion: np.ndarray) -> np.ndarray:
    """Count correct, given and found pixels per class, [19, 3], from a confusion [given 19, found 19]."""
    return np.stack([confusion.diagonal(), confusion.sum(axis=1), confusion.sum(axis=0)], axis=1)


def accuracy(counts: np.ndarray) -> np.ndarray:
    """Return the fraction of pixels of equal class, [N]; `class_counts` [N, 19, 3]."""
    return counts[..., 0].sum(axis=-1) / counts[..., 1].sum(axis=-1)


def class_iou(counts: np.ndarray) -> np.ndarray:
    """Return the intersection over union per class, [N, 19]; NaN if neither mask has the class. Counts [N, 19, 3]."""
    correct, given, found = np.moveaxis(counts, -1, 0)
    union = given + found - correct
    return np.divide(correct, union, out=np.full(union.shape, np.nan), where=union > 0)


def mean_iou(counts: np.ndarray, absent: float | None = None) -> np.ndarray:
    """Return the mean intersection over union over the 19 classes of each image, [N].

    Papers differ in the value of a class that neither mask has. The results differ by tens of points.

    Args:
        counts: [N, 19, 3].
        absent: value of such a class: 1 (as in Face-MoGLE's code) or 0. None excludes it from the mean.
    """
    values = class_iou(counts)
    return np.nanmean(values if absent is None else np.nan_to_num(values, nan=absent), axis=-1)


def class_shown(counts: np.ndarray) -> np.ndarray:
    """Return whether each given class is found at its place, [..., 19]: 1, 0, or NaN for a class that is not given."""
    correct, given, _ = np.moveaxis(counts, -1, 0)
    return np.where(given > 0, (correct >= MIN_OVERLAP * given).astype(float), np.nan)


def rare_class_recall(counts: np.ndarray) -> np.ndarray:
    """Return the fraction of the given rare classes that the image shows, [N]; NaN if none is given."""
    return nan_mean(class_shown(counts)[:, RARE_CLASSES])


def nan_mean(values: np.ndarray) -> np.ndarray:
    """Return the mean over the last axis without NaN; NaN if there is nothing else. `np.nanmean` would warn."""
    known = ~np.isnan(values)
    total, count = np.where(known, values, 0).sum(axis=-1), known.sum(axis=-1)
    return np.divide(total, count, out=np.full(total.shape, np.nan), where=count > 0)


def edge_f_score(given: np.ndarray, found: np.ndarray, *, tolerance: float = 1.5) -> float:
    """Return the F-score of strokes. A stroke pixel matches if the other sketch has one within the tolerance.

    Args:
        given: uint8 [H, W], 0 (stroke) to 255 (background).
        found: the same.
        tolerance: in pixels.

    Returns:
        The harmonic mean of precision and recall; 1 if neither has a stroke, 0 if only one has.
    """
    strokes = [lines < 128 for lines in (given, found)]
    if not strokes[0].any() or not strokes[1].any():
        return float(strokes[0].any() == strokes[1].any())
    near = [np.asarray(ndimage.distance_transform_edt(~stroke)) <= tolerance for stroke in strokes]
    recall, precision = near[1][strokes[0]].mean(), near[0][strokes[1]].mean()
    return float(2 * precision * recall / max(precision + recall, 1e-12))


def keypoint_error(given: np.ndarray, found: np.ndarray, strokes: Mapping[str, Any]) -> float:
    """Return the mean distance of keypoints over the distance between the eye centers (Sagonas et al. 2013).

    Between 68 and 478 points, only the centers of the common parts are compared, without the jaw.

    Args:
        given: (x, y) in [0, 1], [68 | 478, 2].
        found: the same.
        strokes: `conditions.keypoints.STROKES`.
    """

    def centers(points: np.ndarray) -> dict[str, np.ndarray]:
        column = 2 if len(points) == 68 else 3
        return {part: points[list(stroke[column])].mean(axis=0) for part, stroke in strokes.items() if part != "jaw"}

    parts, others = centers(given), centers(found)
    eye_distance = max(float(np.linalg.norm(parts["l_eye"] - parts["r_eye"])), 1e-6)
    if len(given) == len(found):
        return float(np.linalg.norm(given - found, axis=1).mean() / eye_distance)
    return float(np.mean([np.linalg.norm(parts[part] - others[part]) for part in parts]) / eye_distance)


def nearest(features: Tensor, others: Tensor) -> tuple[Tensor, Tensor]:
    """Return the cosine similarity [N] and index [N] of the nearest of the others [M, D] for each row of [N, D]."""
    similarity = F.normalize(features.float(), dim=-1) @ F.normalize(others.float(), dim=-1).mT  # [N, M]
    best = similarity.max(dim=1)
    return best.values, best.indices
