"""Distances between sets: values of torch-fidelity on the same features, known values, and their intervals."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from likeness.evaluate import distances
from likeness.evaluate.stats import bootstrap_interval, holm, subset_deviations

HERE = Path(__file__).parent
REFERENCE = json.loads((HERE / "torch_fidelity.json").read_text())["values"]


@pytest.mark.parametrize("width", ["16", "64"])  # 150 images with 16 features; 40 with 64, a rank-deficient covariance
def test_agrees_with_torch_fidelity(width):
    with np.load(HERE / "torch_fidelity.npz") as stored:
        generated, real = stored[f"made_{width}"], stored[f"real_{width}"]
    reference = REFERENCE[width]
    assert distances.frechet(generated, real) == pytest.approx(reference["frechet"], abs=1e-4)
    assert distances.frechet(generated, real) == pytest.approx(reference["scipy sqrtm"], abs=1e-4)
    assert distances.kernel_distance(generated, real) == pytest.approx(reference["kid"], abs=1e-6)
    assert distances.precision(generated, real) == pytest.approx(reference["precision"], abs=1e-6)
    assert distances.recall(generated, real) == pytest.approx(reference["recall"], abs=1e-6)


def normal(seed: int, count: int = 400, width: int = 8) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(count, width)).astype(np.float32)


def test_frechet_of_shift_and_scale():
    features = normal(0)
    shifted = features + np.array([3, 4, 0, 0, 0, 0, 0, 0], np.float32)
    assert distances.frechet(shifted, features) == pytest.approx(25, abs=1e-3)
    variance = np.trace(np.cov(features.T))
    assert distances.frechet(3 * features, features - features.mean(0)) == pytest.approx(
        4 * variance + 9 * (features.mean(0) ** 2).sum(), rel=1e-4
    )
    assert distances.frechet(features, features) == pytest.approx(0, abs=1e-6)


def test_mmd_is_zero_for_equal_distributions():
    near = distances.clip_mmd(normal(0) + 5, normal(1) + 5)
    far = distances.clip_mmd(normal(0) + 5, normal(1) - 5)
    assert 0 <= near < 0.02 * far
    # unit vectors along +u and -u: 1000 (1 + 1 - 2 exp(-4 / 200))
    ones = np.ones((5, 8), np.float32)
    assert distances.clip_mmd(ones, -ones) == pytest.approx(2000 * (1 - np.exp(-0.02)), rel=1e-6)
    values = [distances.kernel_distance(normal(2 * i, 60), normal(2 * i + 1, 60)) for i in range(20)]
    assert abs(np.mean(values)) < 2 * np.std(values) / np.sqrt(20)  # unbiased: the mean is 0
    assert distances.kernel_distance(normal(0), normal(1) + 1) > 20 * np.std(values)


def test_precision_and_recall_separate_quality_from_variety():
    real = np.concatenate([normal(0, 100) - 10, normal(1, 100) + 10])
    one_mode = normal(2, 200) - 10
    assert distances.precision(one_mode, real) > 0.8
    assert distances.recall(one_mode, real) < 0.6
    far = normal(3, 200) + 50
    assert distances.precision(far, real) == distances.recall(far, real) == 0


def test_diversity():
    assert distances.diversity(np.ones((10, 4), np.float32)) == pytest.approx(0, abs=1e-9)
    assert distances.diversity(np.eye(6, dtype=np.float32)) == pytest.approx(1)


def test_subset_deviations_have_the_standard_error():
    """Of the difference of two means, whose standard error also follows from many sets."""
    measure = lambda generated, real: float(generated.mean() - real.mean())  # noqa: E731
    deviations = subset_deviations(measure, normal(0, 300, 1), normal(1, 300, 1), 400)
    assert deviations.mean() == pytest.approx(0, abs=1e-9)
    many = [measure(normal(2 * i, 300, 1), normal(2 * i + 1, 300, 1)) for i in range(5, 205)]
    assert deviations.std() == pytest.approx(np.std(many), rel=0.25)


def test_bootstrap_interval_contains_the_mean_and_shrinks():
    values = np.random.default_rng(1).normal(5, 1, 1000)
    low, high = bootstrap_interval(values)
    assert low < values.mean() < high
    assert 0.08 < high - low < 0.18  # 2 x 1.96 / sqrt(1000)
    few = bootstrap_interval(values[:50])
    assert few[1] - few[0] > 3 * (high - low)


@pytest.mark.parametrize(
    ("p_values", "corrected"),
    [
        ([0.01, 0.04, 0.03, 0.005], [0.03, 0.06, 0.06, 0.02]),  # the example of Holm's step-down procedure
        ([0.03, 0.04], [0.06, 0.06]),  # never less than that of a smaller p
        ([0.02, 0.04], [0.04, 0.04]),
        ([0.9, 0.8], [1, 1]),
    ],
)
def test_holm(p_values, corrected):
    assert holm(p_values) == pytest.approx(corrected)
