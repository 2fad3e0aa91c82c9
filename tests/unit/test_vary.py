"""Varied conditions stay what they are: near the original, valid, and a function of the generator."""

from __future__ import annotations

import numpy as np
import pytest

from likeness.conditions import CONDITIONS
from likeness.data.synthetic import draw_face


@pytest.fixture(scope="module")
def face():
    return draw_face(3, 4, 128)


def raw_of(face, name: str) -> np.ndarray:
    return {"mask": face.mask, "sketch": face.sketch, "keypoints": face.keypoints}[name]


@pytest.mark.parametrize("name", list(CONDITIONS))
def test_same_generator_same_version(face, name):
    raw, vary = raw_of(face, name), CONDITIONS[name].vary
    one, again, other = (vary(raw, np.random.default_rng(seed)) for seed in (1, 1, 2))
    assert one.shape == raw.shape
    assert one.dtype == raw.dtype
    assert np.array_equal(one, again)
    assert not np.array_equal(one, other)


def test_labels_move_only_at_borders(face):
    changed = []
    for seed in range(8):
        varied = CONDITIONS["mask"].vary(face.mask, np.random.default_rng(seed))
        assert set(np.unique(varied)) <= set(np.unique(face.mask))
        changed.append((varied != face.mask).mean())
    assert 0.005 < np.mean(changed) < 0.08


def test_strokes_grow_and_shrink(face):
    ink = 255.0 - face.sketch
    ratios = [
        (255.0 - CONDITIONS["sketch"].vary(face.sketch, np.random.default_rng(seed))).sum() / ink.sum()
        for seed in range(24)
    ]
    assert min(ratios) < 0.9
    assert max(ratios) > 1.3
    assert min(ratios) > 0.4
    assert max(ratios) < 3


def test_points_stay_near(face):
    varied = CONDITIONS["keypoints"].vary(face.keypoints, np.random.default_rng(0))
    assert 0 < np.abs(varied - face.keypoints).max() < 0.03
