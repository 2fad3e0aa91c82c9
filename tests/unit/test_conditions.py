"""All conditions: complete definitions; augmentations that are valid and close to the original."""

from __future__ import annotations

import numpy as np
import pytest

from likeness.conditions import CONDITIONS
from likeness.data.synthetic import draw_face
from likeness.types import InputError


@pytest.fixture(scope="module")
def face():
    return draw_face(3, 4, 128)


@pytest.mark.parametrize("name", CONDITIONS)
def test_canonical_files_read_back(face, name, tmp_path):
    condition, raw = CONDITIONS[name], getattr(face, name)
    path = tmp_path / condition.file("000001")
    path.parent.mkdir()
    path.write_bytes(condition.encode(raw))
    np.testing.assert_allclose(condition.read(path).raw, raw, atol=1e-6)
    assert path.suffix in condition.input_suffixes


@pytest.mark.parametrize("name", CONDITIONS)
def test_messages_use_the_given_name(name):
    with pytest.raises(InputError, match="face 7") as caught:
        CONDITIONS[name].read(np.zeros((2, 3, 4, 5)), name="face 7")
    assert caught.value.kind


@pytest.mark.parametrize("name", CONDITIONS)
def test_the_generator_decides(face, name):
    raw, augment = getattr(face, name), CONDITIONS[name].augment
    one, again, other = (augment(raw, np.random.default_rng(seed)) for seed in (1, 1, 2))
    assert one.shape == raw.shape
    assert one.dtype == raw.dtype
    assert np.array_equal(one, again)
    assert not np.array_equal(one, other)


def test_labels_move_only_at_borders(face):
    changed = []
    for seed in range(8):
        augmented = CONDITIONS["mask"].augment(face.mask, np.random.default_rng(seed))
        assert set(np.unique(augmented)) <= set(np.unique(face.mask))
        changed.append((augmented != face.mask).mean())
    assert 0.005 < np.mean(changed) < 0.08


def test_strokes_grow_and_shrink(face):
    ink = 255.0 - face.sketch
    ratios = [
        (255.0 - CONDITIONS["sketch"].augment(face.sketch, np.random.default_rng(seed))).sum() / ink.sum()
        for seed in range(24)
    ]
    assert min(ratios) < 0.9
    assert max(ratios) > 1.3
    assert min(ratios) > 0.4
    assert max(ratios) < 3


def test_points_stay_near(face):
    augmented = CONDITIONS["keypoints"].augment(face.keypoints, np.random.default_rng(0))
    assert 0 < np.abs(augmented - face.keypoints).max() < 0.03
