"""The scores themselves: arrays in, numbers out, no models and no files.

Each says how a picture keeps to what it was given. What a score is worth shows only beside its ceiling (the same on
real photographs through the autoencoder) and its floor (the same against another face's condition).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from scipy import ndimage
from torch import Tensor
from torch.nn import functional as F

from likeness.conditions.mask.classes import CLASS_INDEX

RARE = tuple(CLASS_INDEX[name] for name in ("eye_g", "hat", "earring", "necklace"))
"""Glasses, hats, earrings and necklaces: what a model leaves out first."""
SHOWN = 0.1
"""Share of a rare class's pixels that must be found where they were asked for, for it to count as shown."""


def pixel_accuracy(given: np.ndarray, found: np.ndarray) -> float:
    """Share of pixels of equal class; labels [H, W], both."""
    return float((given == found).mean())


def counts_of(confusion: np.ndarray) -> np.ndarray:
    """Pixels right, given and found by class, [19, 3], of a confusion [19, 19] (rows: given, columns: found)."""
    return np.stack([confusion.diagonal(), confusion.sum(axis=1), confusion.sum(axis=0)], axis=1)


def accuracy(counts: np.ndarray) -> np.ndarray:
    """Share of pixels of equal class, [N]; counts [N, 19, 3] as `counts_of` gives them."""
    return counts[..., 0].sum(axis=-1) / counts[..., 1].sum(axis=-1)


def class_iou(counts: np.ndarray) -> np.ndarray:
    """Intersection over union by class, [N, 19]; NaN where neither mask has the class. Counts [N, 19, 3]."""
    right, given, found = np.moveaxis(counts, -1, 0)
    union = given + found - right
    return np.divide(right, union, out=np.full(union.shape, np.nan), where=union > 0)


def mean_iou(counts: np.ndarray, absent: float | None = None) -> np.ndarray:
    """Mean intersection over union over the 19 classes of each picture, [N].

    Papers differ in what a class that neither mask has counts for, and the numbers differ by tens of points.

    Args:
        counts: [N, 19, 3].
        absent: what such a class counts for, 1 (as in Face-MoGLE's code) or 0; None leaves it out of the mean.
    """
    values = class_iou(counts)
    return np.nanmean(values if absent is None else np.nan_to_num(values, nan=absent), axis=-1)


def shown(counts: np.ndarray) -> np.ndarray:
    """Whether each class that was given is found where it was, [..., 19]: 1, 0, or NaN where it was not given."""
    right, given, _ = np.moveaxis(counts, -1, 0)
    return np.where(given > 0, (right >= SHOWN * given).astype(float), np.nan)


def rare_class_recall(counts: np.ndarray) -> np.ndarray:
    """Share of the rare classes that were given which the picture shows, [N]; NaN where none was given."""
    return mean_known(shown(counts)[:, RARE])


def mean_known(values: np.ndarray) -> np.ndarray:
    """Mean over the last axis of what is not NaN; NaN where nothing is."""
    known = ~np.isnan(values)
    total, count = np.where(known, values, 0).sum(axis=-1), known.sum(axis=-1)
    return np.divide(total, count, out=np.full(total.shape, np.nan), where=count > 0)


def edge_f_score(given: np.ndarray, found: np.ndarray, *, tolerance: float = 1.5) -> float:
    """F-score of strokes: a stroke pixel counts where the other drawing has one near.

    Args:
        given: lines uint8 [H, W], 0 stroke to 255 paper.
        found: the same.
        tolerance: what is near, in pixels.

    Returns:
        The harmonic mean of precision and recall; 1 where neither has a stroke, 0 where only one has.
    """
    strokes = [lines < 128 for lines in (given, found)]
    if not strokes[0].any() or not strokes[1].any():
        return float(strokes[0].any() == strokes[1].any())
    near = [np.asarray(ndimage.distance_transform_edt(~stroke)) <= tolerance for stroke in strokes]
    recall, precision = near[1][strokes[0]].mean(), near[0][strokes[1]].mean()
    return float(2 * precision * recall / max(precision + recall, 1e-12))


def keypoint_error(given: np.ndarray, found: np.ndarray, strokes: Mapping[str, Any]) -> float:
    """Mean distance of the keypoints in units of the distance between the eyes' centres (Sagonas et al. 2013).

    Of 68 points and 478 only the centres of the parts that both have are compared, jaw left out.

    Args:
        given: (x, y) in [0, 1], [68 | 478, 2].
        found: the same.
        strokes: `conditions.keypoints.STROKES`.
    """

    def centres(points: np.ndarray) -> dict[str, np.ndarray]:
        column = 2 if len(points) == 68 else 3
        return {part: points[list(stroke[column])].mean(axis=0) for part, stroke in strokes.items() if part != "jaw"}

    parts, others = centres(given), centres(found)
    between = max(float(np.linalg.norm(parts["l_eye"] - parts["r_eye"])), 1e-6)
    if len(given) == len(found):
        return float(np.linalg.norm(given - found, axis=1).mean() / between)
    return float(np.mean([np.linalg.norm(parts[part] - others[part]) for part in parts]) / between)


def nearest(pictures: Tensor, others: Tensor) -> tuple[Tensor, Tensor]:
    """The likest of the others [M, D] for each picture [N, D], by features: cosine similarity [N] and number [N]."""
    similarity = F.normalize(pictures.float(), dim=-1) @ F.normalize(others.float(), dim=-1).mT  # [N, M]
    best = similarity.max(dim=1)
    return best.values, best.indices


def interval(values: np.ndarray, *, seed: int = 0, draws: int = 2000) -> tuple[float, float]:
    """The 95 % bootstrap interval of the mean of values [N]."""
    rng = np.random.default_rng(seed)
    means = values[rng.integers(len(values), size=(draws, len(values)))].mean(axis=1)
    low, high = np.percentile(means, (2.5, 97.5))
    return float(low), float(high)
