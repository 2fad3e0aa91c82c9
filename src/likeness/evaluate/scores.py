"""The scores themselves: arrays in, numbers out, no models and no files.

Each says how a picture keeps to what it was given. What a score is worth shows only beside its ceiling (the same on
real photographs through the autoencoder) and its floor (the same against another face's condition).
"""

from __future__ import annotations

import numpy as np
import torch
from scipy import ndimage
from torch import Tensor
from torch.nn import functional as F


def pixel_accuracy(given: np.ndarray, found: np.ndarray) -> float:
    """Share of pixels of equal class; labels [H, W], both."""
    return float((given == found).mean())


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


def retrieval(pictures: Tensor, captions: Tensor, choices: int) -> float:
    """How often a picture's own caption is the likest among `choices` captions.

    Args:
        pictures: their features [N, D], of any length.
        captions: features of their captions [N, D], in the same order.
        choices: size of the groups, taken in order; what does not fill a group is left out. Chance is 1 / choices.
    """
    count = len(pictures) // choices * choices
    if not count:
        raise ValueError(f"{len(pictures)} pictures fill no group of {choices}")
    picture, caption = (
        F.normalize(x[:count].float(), dim=-1).unflatten(0, (-1, choices)) for x in (pictures, captions)
    )
    right = torch.arange(choices)
    return ((picture @ caption.mT).argmax(dim=2).cpu() == right).float().mean().item()  # [G, C, C] -> [G, C]


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
