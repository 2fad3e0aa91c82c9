"""Scores of single images: how well an image matches its conditions. Arrays in, numbers out."""

from __future__ import annotations

import numpy as np
from scipy import ndimage
from torch import Tensor
from torch.nn import functional as F

from likeness.conditions.keypoints import STROKES, part_points
from likeness.conditions.mask.classes import CLASS_INDEX
from likeness.conditions.mask.geometry import broken_rules, measure

RARE_CLASSES = tuple(CLASS_INDEX[name] for name in ("eye_g", "hat", "earring", "necklace"))
"""Glasses, hats, earrings and necklaces, which models omit first."""
MIN_OVERLAP = 0.1
"""Fraction of the pixels of a class in the given mask that must be found for the class to be shown."""

REQUIRED_PARTS: tuple[tuple[str, ...], ...] = (
    ("l_eye", "eye_g"), ("r_eye", "eye_g"), ("nose",), ("u_lip", "mouth", "l_lip"),
)  # fmt: skip
"""The parts of a complete face; one class of each must be present. Glasses replace the eyes behind them."""
MIN_PART = 0.0005
"""Minimum fraction of the image's pixels of a required part, 8 of 128 x 128."""
MAX_NOSE_OFFSET = 0.35
"""Maximum horizontal distance of the nose from the center between the eyes, over the distance between the eyes."""
MAX_EYE_RATIO = 3.0
"""Maximum ratio of the areas of two eyes."""
MIN_SKIN = 0.9
"""Minimum fraction of the skin that is connected."""


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
    """Return the F-score of strokes in two sketches, uint8 [H, W], 0 (stroke) to 255 (background): the harmonic mean of
    precision and recall; 1 if neither has a stroke, 0 if only one has. A stroke pixel matches if the other sketch has
    one within the tolerance, in pixels.
    """
    strokes = [lines < 128 for lines in (given, found)]
    if not strokes[0].any() or not strokes[1].any():
        return float(strokes[0].any() == strokes[1].any())
    near = [np.asarray(ndimage.distance_transform_edt(~stroke)) <= tolerance for stroke in strokes]
    recall, precision = near[1][strokes[0]].mean(), near[0][strokes[1]].mean()
    return float(2 * precision * recall / max(precision + recall, 1e-12))


def keypoint_error(given: np.ndarray, found: np.ndarray) -> float:
    """Return the mean distance of keypoints, (x, y) in [0, 1], [68 | 468 | 478, 2] both, over the distance between the
    eye centers (Sagonas et al. 2013). Of MediaPipe's points the first 468 are compared, without the irises. Between
    iBUG's 68 and MediaPipe's points, only the centers of the common parts are, without the jaw: this error is several
    times smaller.
    """

    def centers(points: np.ndarray) -> dict[str, np.ndarray]:
        parts = (part for part in STROKES if part != "jaw")
        return {part: points[part_points(part, len(points))].mean(axis=0) for part in parts}

    parts, others = centers(given), centers(found)
    eye_distance = max(float(np.linalg.norm(parts["l_eye"] - parts["r_eye"])), 1e-6)
    if (len(given) == 68) == (len(found) == 68):
        return float(np.linalg.norm(given[:468] - found[:468], axis=1).mean() / eye_distance)
    return float(np.mean([np.linalg.norm(parts[part] - others[part]) for part in parts]) / eye_distance)


def is_complete_face(labels: np.ndarray) -> bool:
    """Return whether a label map, uint8 [H, W], shows one complete and nearly symmetric face.

    Eyes, nose and mouth are present, no rule of `conditions.mask.geometry` is broken, the nose is between the eyes, the
    eyes have similar areas, and the skin is connected. Faces in profile fail.
    """
    at, geometry = CLASS_INDEX, measure(labels)
    pixels, center = geometry.pixels, geometry.center
    if any(max(pixels[at[name]] for name in names) < MIN_PART * labels.size for names in REQUIRED_PARTS):
        return False
    if broken_rules(geometry):
        return False
    parts, count = ndimage.label(labels == at["skin"])
    if not count or np.bincount(parts.ravel())[1:].max() < MIN_SKIN * pixels[at["skin"]]:
        return False
    left, right = (at[name] for name in ("l_eye", "r_eye"))
    if not pixels[left] or not pixels[right]:
        return True  # behind glasses
    offset = abs(center[at["nose"], 0] - center[[left, right], 0].mean())
    eye_distance = np.linalg.norm(center[left] - center[right])
    ratio = max(pixels[left], pixels[right]) / min(pixels[left], pixels[right])
    return bool(offset <= MAX_NOSE_OFFSET * eye_distance and ratio <= MAX_EYE_RATIO)


def sharpness(image: np.ndarray) -> float:
    """Return the standard deviation of the Laplacian of the gray values, 0 to 255, of the central 62 % of an image,
    uint8 [H, W, 3]. It depends on the resolution.
    """
    gray = image.astype(np.float32).mean(axis=-1)
    laplacian = ndimage.laplace(gray)
    height, width = gray.shape
    top, left = round(0.19 * height), round(0.19 * width)
    return float(laplacian[top : height - top, left : width - left].std())


def nearest(features: Tensor, others: Tensor) -> tuple[Tensor, Tensor]:
    """Return the cosine similarity [N] and index [N] of the nearest of the others [M, D] for each row of [N, D]."""
    similarity = F.normalize(features.float(), dim=-1) @ F.normalize(others.float(), dim=-1).mT  # [N, M]
    best = similarity.max(dim=1)
    return best.values, best.indices
