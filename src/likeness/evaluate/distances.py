"""Distances between two sets of images, from their features.

All of them depend on the number of images, the Fréchet distance most of all: compare values at the same number only.
n generated and m real images, D features.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

CMMD_SIGMA, CMMD_SCALE = 10.0, 1000.0
"""Kernel width and scale of the distance (Jayasumana et al. 2024, "Rethinking FID", section 5)."""


def frechet(generated: np.ndarray, real: np.ndarray) -> float:
    """Return the Fréchet distance between the Gaussians of two sets (Heusel et al. 2017), features [n, D] and [m, D].

    With A and B the centered features over sqrt(n - 1), tr sqrt(A'A B'B) is the sum of the singular values of A B'.
    This avoids a matrix square root and is exact for fewer images than features, too.
    """
    first, second = _covariance_factor(generated), _covariance_factor(real)
    cross = np.linalg.svd(first @ second.T, compute_uv=False).sum()
    shift = generated.mean(axis=0, dtype=np.float64) - real.mean(axis=0, dtype=np.float64)
    return float(shift @ shift + (first**2).sum() + (second**2).sum() - 2 * cross)


def _covariance_factor(features: np.ndarray) -> np.ndarray:
    """A [min(n, D), D] such that A'A is the covariance."""
    centered = features.astype(np.float64) - features.mean(axis=0, dtype=np.float64)
    centered /= np.sqrt(max(len(features) - 1, 1))
    return np.asarray(np.linalg.qr(centered, mode="r")) if len(centered) > centered.shape[1] else centered


def kernel_distance(generated: np.ndarray, real: np.ndarray) -> float:
    """Return KID (Binkowski et al. 2018): the unbiased squared MMD with the kernel (x'y / D + 1)^3.

    It uses all images; the published mean over subsets of 1000 estimates the same value with more noise. It can be
    negative.
    """
    generated, real = generated.astype(np.float64), real.astype(np.float64)

    def kernel(products: np.ndarray) -> np.ndarray:
        return (products / generated.shape[1] + 1) ** 3

    def within(x: np.ndarray) -> float:
        total = sum(kernel(chunk @ x.T).sum() for chunk in _chunks(x)) - kernel((x**2).sum(axis=1)).sum()
        return total / (len(x) * (len(x) - 1))

    cross = sum(kernel(chunk @ real.T).sum() for chunk in _chunks(generated)) / (len(generated) * len(real))
    return float(within(generated) + within(real) - 2 * cross)


def clip_mmd(generated: np.ndarray, real: np.ndarray) -> float:
    """Return CMMD (Jayasumana et al. 2024): the MMD with a Gaussian kernel of width 10 on unit vectors, times 1000.

    The published estimate includes the distance of each image to itself, which adds a little at small n.
    """
    generated, real = (x.astype(np.float64) / np.linalg.norm(x, axis=1, keepdims=True) for x in (generated, real))

    def mean(x: np.ndarray, y: np.ndarray) -> float:
        total = sum(np.exp(-(_distances(chunk, y) ** 2) / (2 * CMMD_SIGMA**2)).sum() for chunk in _chunks(x))
        return total / (len(x) * len(y))

    return float(CMMD_SCALE * (mean(generated, generated) + mean(real, real) - 2 * mean(generated, real)))


def precision(generated: np.ndarray, real: np.ndarray) -> float:
    """Return the fraction of generated images in the neighborhood of a real one (Kynkäänniemi et al. 2019, equation 1).

    The neighborhood of an image reaches to its third nearest neighbor in the same set.
    """
    radius = _neighbor_distances(real)
    within = [(_distances(chunk, real) <= radius).any(axis=1) for chunk in _chunks(generated)]
    return float(np.concatenate(within).mean())


def recall(generated: np.ndarray, real: np.ndarray) -> float:
    """Return the fraction of real images in the neighborhood of a generated one: `precision` with the sets swapped."""
    return precision(real, generated)


def diversity(generated: np.ndarray, real: np.ndarray | None = None) -> float:
    """Return the mean cosine distance between two images of the set; 0 if all are equal. No face recognizer is used."""
    unit = generated.astype(np.float64) / np.linalg.norm(generated, axis=1, keepdims=True)
    n = len(unit)
    return float(1 - ((unit.sum(axis=0) ** 2).sum() - n) / (n * (n - 1)))


def _distances(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Euclidean distances [n, m]."""
    x, y = x.astype(np.float64), y.astype(np.float64)
    squares = (x**2).sum(axis=1)[:, None] + (y**2).sum(axis=1)[None] - 2 * x @ y.T
    return np.sqrt(np.maximum(squares, 0))


def _neighbor_distances(features: np.ndarray) -> np.ndarray:
    """Distance to the third nearest neighbor, [n]. Index 0 is the image itself."""
    return np.concatenate([np.partition(_distances(rows, features), 3, axis=1)[:, 3] for rows in _chunks(features)])


def _chunks(features: np.ndarray) -> Sequence[np.ndarray]:
    return np.array_split(features, -(-len(features) // 2000))
