"""Confidence intervals and tests."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from scipy import stats

MAX_SUBSET = 1000
"""Maximum number of images in a random subset."""


def bootstrap_interval(values: np.ndarray, *, samples: int = 2000) -> tuple[float, float]:
    """Return the 95 % bootstrap interval of the mean of values [N]."""
    rng, count = np.random.default_rng(0), len(values)
    block = max(1, 10_000_000 // count)  # samples at a time, for memory
    sizes = [min(block, samples - start) for start in range(0, samples, block)]
    means = np.concatenate([values[rng.integers(count, size=(size, count))].mean(axis=1) for size in sizes])
    low, high = np.percentile(means, (2.5, 97.5))
    return float(low), float(high)


def subsets(count: int, samples: int) -> tuple[list[np.ndarray], float]:
    """Draw random subsets without replacement.

    The standard deviation of an estimate over subsets of b of n images, times sqrt(b / (n - b)), is its standard error
    at n (delete-d jackknife, Shao and Wu 1989). Here b is n / 2, at most 1000. A bootstrap would put duplicates into a
    set, which distances between sets mistake for similarity.

    Returns:
        The indices of each subset, and the factor sqrt(b / (n - b)).
    """
    rng = np.random.default_rng(0)
    size = min(count // 2, MAX_SUBSET)
    return [rng.permutation(count)[:size] for _ in range(samples)], float(np.sqrt(size / (count - size)))


def subset_deviations(
    distance: Callable[[np.ndarray, np.ndarray], float],
    generated: np.ndarray,
    real: np.ndarray,
    samples: int,
) -> np.ndarray:
    """Return deviations of a distance from its mean over subsets, scaled to the whole set, [samples].

    Row i of both sets belongs to face i.
    """
    chosen, factor = subsets(len(generated), samples)
    values = np.array([distance(generated[rows], real[rows]) for rows in chosen])
    return factor * (values - values.mean())


def t_test(value: float, error: float, count: int, differing: int) -> dict[str, Any]:
    """Test a mean of paired differences with Student's t.

    Args:
        value: the difference.
        error: its standard error.
        count: number of faces; t has count - 1 degrees of freedom.
        differing: number of faces whose values differ. If signs were random, all would agree with probability
            2^(1 - differing): p is never less, even if the differences have no spread.

    Returns:
        `value`, its 95 % interval `low` to `high`, `p`, the probability of such a difference by chance, and `n`.
    """
    reach = error * float(stats.t.ppf(0.975, count - 1))
    p = 2 * float(stats.t.sf(abs(value) / error, count - 1)) if error > 0 else float(value == 0)
    p = max(p, min(1, 2.0 ** (1 - differing)))
    return {"value": value, "low": value - reach, "high": value + reach, "p": p, "n": count}


def holm(p_values: Sequence[float]) -> list[float]:
    """Correct the p-values of several tests (Holm 1979): a corrected value of at most L is significant at the
    family-wise level L.
    """
    corrected, largest = [1.0] * len(p_values), 0.0
    for rank, index in enumerate(sorted(range(len(p_values)), key=p_values.__getitem__)):
        largest = max(largest, min(1.0, p_values[index] * (len(p_values) - rank)))
        corrected[index] = largest
    return corrected
