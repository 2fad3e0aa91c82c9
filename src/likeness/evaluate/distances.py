"""Distances between two sets of pictures, from their features: arrays in, numbers out.

All of them depend on how many pictures there are, the Fréchet distance most of all, so they are comparable only at the
same number. n and m pictures, D features.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

MOST = 1000
"""Pictures at most in a random part."""

CMMD_SIGMA, CMMD_SCALE = 10.0, 1000.0
"""Jayasumana et al. 2024, "Rethinking FID", section 5: width of the kernel, and what the distance is multiplied by."""


def frechet(made: np.ndarray, real: np.ndarray) -> float:
    """Fréchet distance between the Gaussians of two sets (Heusel et al. 2017), features [n, D] and [m, D].

    With A and B the centred features over sqrt(n - 1), tr sqrt(A'A B'B) is the sum of the singular values of A B':
    no square root of a matrix, and exact also where there are fewer pictures than features.
    """
    first, second = _factor(made), _factor(real)
    cross = np.linalg.svd(first @ second.T, compute_uv=False).sum()
    apart = made.mean(axis=0, dtype=np.float64) - real.mean(axis=0, dtype=np.float64)
    return float(apart @ apart + (first**2).sum() + (second**2).sum() - 2 * cross)


def _factor(features: np.ndarray) -> np.ndarray:
    """A [min(n, D), D] with A'A the covariance."""
    centred = features.astype(np.float64) - features.mean(axis=0, dtype=np.float64)
    centred /= np.sqrt(max(len(features) - 1, 1))
    return np.asarray(np.linalg.qr(centred, mode="r")) if len(centred) > centred.shape[1] else centred


def kernel_distance(made: np.ndarray, real: np.ndarray) -> float:
    """KID (Binkowski et al. 2018): the squared maximum mean discrepancy of the kernel (x'y / D + 1)^3, unbiased.

    Over all pictures; the published mean over subsets of 1000 estimates the same with more noise. It may be negative.
    """
    made, real = made.astype(np.float64), real.astype(np.float64)

    def kernel(products: np.ndarray) -> np.ndarray:
        return (products / made.shape[1] + 1) ** 3

    def own(x: np.ndarray) -> float:
        total = sum(kernel(chunk @ x.T).sum() for chunk in _chunks(x)) - kernel((x**2).sum(axis=1)).sum()
        return total / (len(x) * (len(x) - 1))

    cross = sum(kernel(chunk @ real.T).sum() for chunk in _chunks(made)) / (len(made) * len(real))
    return float(own(made) + own(real) - 2 * cross)


def clip_mmd(made: np.ndarray, real: np.ndarray) -> float:
    """CMMD (Jayasumana et al. 2024): the same with a Gaussian kernel of width 10 on CLIP's unit vectors, times 1000.

    The published estimate counts each picture's distance to itself, which adds a little at small n.
    """
    made, real = (x.astype(np.float64) / np.linalg.norm(x, axis=1, keepdims=True) for x in (made, real))

    def mean(x: np.ndarray, y: np.ndarray) -> float:
        total = sum(np.exp(-(_apart(chunk, y) ** 2) / (2 * CMMD_SIGMA**2)).sum() for chunk in _chunks(x))
        return total / (len(x) * len(y))

    return float(CMMD_SCALE * (mean(made, made) + mean(real, real) - 2 * mean(made, real)))


def precision(made: np.ndarray, real: np.ndarray, neighbours: int = 3) -> float:
    """Share of the made pictures that lie within reach of a real one (Kynkäänniemi et al. 2019, equation 1).

    A picture's reach is the distance to its k-th nearest of the same set.
    """
    reach = _reach(real, neighbours)
    within = [(_apart(chunk, real) <= reach).any(axis=1) for chunk in _chunks(made)]
    return float(np.concatenate(within).mean())


def recall(made: np.ndarray, real: np.ndarray, neighbours: int = 3) -> float:
    """Share of the real pictures that lie within reach of a made one (the same, with the sets exchanged)."""
    return precision(real, made, neighbours)


def diversity(made: np.ndarray, real: np.ndarray | None = None) -> float:
    """Mean cosine distance between two pictures of the set: 0 where all are alike. No face recogniser looks at them."""
    unit = made.astype(np.float64) / np.linalg.norm(made, axis=1, keepdims=True)
    n = len(unit)
    return float(1 - ((unit.sum(axis=0) ** 2).sum() - n) / (n * (n - 1)))


def _apart(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Euclidean distances [n, m]."""
    x, y = x.astype(np.float64), y.astype(np.float64)
    squares = (x**2).sum(axis=1)[:, None] + (y**2).sum(axis=1)[None] - 2 * x @ y.T
    return np.sqrt(np.maximum(squares, 0))


def _reach(features: np.ndarray, neighbours: int) -> np.ndarray:
    parts = [np.partition(_apart(chunk, features), neighbours, axis=1)[:, neighbours] for chunk in _chunks(features)]
    return np.concatenate(parts)  # the nearest of all is the picture itself, at 0


def _chunks(features: np.ndarray, size: int = 2000) -> Sequence[np.ndarray]:
    return np.array_split(features, max(1, -(-len(features) // size)))


def parts(count: int, draws: int, seed: int = 0) -> tuple[list[np.ndarray], float]:
    """Numbers of a random part of `count` pictures, `draws` times, without repetition, and the spread's factor.

    The spread of an estimate over parts of b of n pictures, times sqrt(b / (n - b)), is its standard error at n (the
    delete-d jackknife, Shao and Wu 1989); b is a half, at most 1000. Drawing with repetition would put every picture
    beside its double, which these distances take for likeness.
    """
    rng = np.random.default_rng(seed)
    size = min(count // 2, MOST)
    return [rng.permutation(count)[:size] for _ in range(draws)], float(np.sqrt(size / (count - size)))


def spread(
    distance: Callable[[np.ndarray, np.ndarray], float], made: np.ndarray, real: np.ndarray, draws: int, seed: int = 0
) -> np.ndarray:
    """How far the distance strays from the truth, [draws], its bias left out; row i of both is face i."""
    chosen, factor = parts(len(made), draws, seed)
    values = np.array([distance(made[part], real[part]) for part in chosen])
    return factor * (values - values.mean())
