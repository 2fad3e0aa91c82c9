"""Scores on drawings whose answer is known."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from likeness.data.synthetic import draw_face
from likeness.evaluate.scores import edge_f_score, interval, nearest, pixel_accuracy, retrieval


def test_pixel_accuracy():
    labels = np.arange(16).reshape(4, 4)
    other = labels.copy()
    other[0] = 18
    assert pixel_accuracy(labels, labels) == 1
    assert pixel_accuracy(labels, other) == 0.75


def line(column: int) -> np.ndarray:
    lines = np.full((32, 32), 255, np.uint8)
    lines[:, column] = 0
    return lines


def test_edges_count_where_they_are_near():
    blank = np.full((32, 32), 255, np.uint8)
    assert edge_f_score(line(10), line(10)) == 1
    assert edge_f_score(line(10), line(11)) == 1
    assert edge_f_score(line(10), line(12)) == 0
    assert edge_f_score(line(10), line(12), tolerance=2) == 1
    both = np.minimum(line(10), line(20))
    assert edge_f_score(line(10), both) == pytest.approx(2 / 3)  # recall 1, precision 1/2
    assert edge_f_score(both, line(10)) == pytest.approx(2 / 3)
    assert edge_f_score(blank, blank) == 1
    assert edge_f_score(blank, line(3)) == edge_f_score(line(3), blank) == 0


def test_edges_tell_faces_apart():
    sketches = [draw_face(0, index, 128).sketch for index in range(4)]
    for index, sketch in enumerate(sketches):
        assert edge_f_score(sketch, sketches[(index + 1) % 4]) < 0.6


def test_retrieval_and_nearest():
    generator = torch.Generator().manual_seed(0)
    pictures = torch.randn(40, 16, generator=generator)
    assert retrieval(pictures, 3 * pictures, 10) == 1
    assert retrieval(pictures, pictures.roll(1, 0), 10) <= 0.1
    mixed = pictures.clone()
    mixed[:10] = mixed[:10].roll(1, 0)  # a quarter has another's caption
    assert retrieval(pictures, mixed, 10) == 0.75
    with pytest.raises(ValueError, match="fill no group"):
        retrieval(pictures, pictures, 50)
    similarity, index = nearest(pictures[:5] * 2, pictures)
    assert torch.equal(index, torch.arange(5))
    assert torch.allclose(similarity, torch.ones(5))


def test_interval_holds_the_mean_and_shrinks():
    values = np.random.default_rng(1).normal(5, 1, 1000)
    low, high = interval(values)
    assert low < values.mean() < high
    assert 0.08 < high - low < 0.18  # 2 x 1.96 / sqrt(1000)
    few = interval(values[:50])
    assert few[1] - few[0] > 3 * (high - low)
