"""Distances between sets: against torch-fidelity's values on the same features, and where the answer is known."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from likeness.evaluate import distances

HERE = Path(__file__).parent
THEIRS = json.loads((HERE / "torch_fidelity.json").read_text())["values"]


@pytest.mark.parametrize("width", ["16", "64"])  # 150 pictures of 16 features; 40 of 64, a covariance without full rank
def test_agrees_with_torch_fidelity(width):
    with np.load(HERE / "torch_fidelity.npz") as kept:
        made, real = kept[f"made_{width}"], kept[f"real_{width}"]
    theirs = THEIRS[width]
    assert distances.frechet(made, real) == pytest.approx(theirs["frechet"], abs=1e-4)
    assert distances.frechet(made, real) == pytest.approx(theirs["scipy sqrtm"], abs=1e-4)
    assert distances.kernel_distance(made, real) == pytest.approx(theirs["kid"], abs=1e-6)
    assert distances.precision(made, real) == pytest.approx(theirs["precision"], abs=1e-6)
    assert distances.recall(made, real) == pytest.approx(theirs["recall"], abs=1e-6)


def normal(seed: int, count: int = 400, width: int = 8) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(count, width)).astype(np.float32)


def test_frechet_of_a_shift_and_of_a_stretch():
    features = normal(0)
    shifted = features + np.array([3, 4, 0, 0, 0, 0, 0, 0], np.float32)
    assert distances.frechet(shifted, features) == pytest.approx(25, abs=1e-3)
    variance = np.trace(np.cov(features.T))
    assert distances.frechet(3 * features, features - features.mean(0)) == pytest.approx(
        4 * variance + 9 * (features.mean(0) ** 2).sum(), rel=1e-4
    )
    assert distances.frechet(features, features) == pytest.approx(0, abs=1e-6)


def test_mmd_is_zero_for_one_distribution_and_grows():
    near = distances.clip_mmd(normal(0) + 5, normal(1) + 5)
    far = distances.clip_mmd(normal(0) + 5, normal(1) - 5)
    assert 0 <= near < 0.02 * far
    # unit vectors along +u and -u: 1000 (1 + 1 - 2 exp(-4 / 200))
    line = np.ones((5, 8), np.float32)
    assert distances.clip_mmd(line, -line) == pytest.approx(2000 * (1 - np.exp(-0.02)), rel=1e-6)
    values = [distances.kernel_distance(normal(2 * i, 60), normal(2 * i + 1, 60)) for i in range(20)]
    assert abs(np.mean(values)) < 2 * np.std(values) / np.sqrt(20)  # unbiased: the mean is 0
    assert distances.kernel_distance(normal(0), normal(1) + 1) > 20 * np.std(values)


def test_precision_and_recall_tell_quality_from_variety():
    real = np.concatenate([normal(0, 100) - 10, normal(1, 100) + 10])
    one_mode = normal(2, 200) - 10
    assert distances.precision(one_mode, real) > 0.8
    assert distances.recall(one_mode, real) < 0.6
    far = normal(3, 200) + 50
    assert distances.precision(far, real) == distances.recall(far, real) == 0


def test_diversity():
    assert distances.diversity(np.ones((10, 4), np.float32)) == pytest.approx(0, abs=1e-9)
    assert distances.diversity(np.eye(6, dtype=np.float32)) == pytest.approx(1)


def test_spread_over_parts_is_the_standard_error():
    """Of the difference of two means, whose standard error also follows from many sets."""
    measure = lambda made, real: float(made.mean() - real.mean())  # noqa: E731
    strays = distances.spread(measure, normal(0, 300, 1), normal(1, 300, 1), 400)
    assert strays.mean() == pytest.approx(0, abs=1e-9)
    many = [measure(normal(2 * i, 300, 1), normal(2 * i + 1, 300, 1)) for i in range(5, 205)]
    assert strays.std() == pytest.approx(np.std(many), rel=0.25)
