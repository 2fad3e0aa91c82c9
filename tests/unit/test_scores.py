"""Scores on drawings whose answer is known."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from likeness.annotators.face_parser import confusion_of
from likeness.conditions.keypoints import STROKES
from likeness.conditions.mask.classes import CLASS_INDEX
from likeness.data.synthetic import draw_face
from likeness.encoders.text_image import finds
from likeness.evaluate.scores import (
    accuracy,
    class_iou,
    counts_of,
    edge_f_score,
    interval,
    keypoint_error,
    mean_iou,
    nearest,
    pixel_accuracy,
    rare_class_recall,
)


def test_pixel_accuracy():
    labels = np.arange(16).reshape(4, 4)
    other = labels.copy()
    other[0] = 18
    assert pixel_accuracy(labels, labels) == 1
    assert pixel_accuracy(labels, other) == 0.75


def test_three_conventions_for_absent_classes():
    """Half of the skin is taken for hair, and nothing else is there: IoU 1/2, 0, and 17 absent classes."""
    given = np.full((4, 4), CLASS_INDEX["skin"])
    found = given.copy()
    found[:2] = CLASS_INDEX["hair"]
    counts = counts_of(confusion_of(given, found))[None]
    assert accuracy(counts) == 0.5
    iou = class_iou(counts)[0]
    assert (iou[CLASS_INDEX["skin"]], iou[CLASS_INDEX["hair"]]) == (0.5, 0)
    assert np.isnan(iou).sum() == 17
    assert mean_iou(counts) == pytest.approx(0.25)
    assert mean_iou(counts, 1.0) == pytest.approx(17.5 / 19)
    assert mean_iou(counts, 0.0) == pytest.approx(0.5 / 19)


def test_rare_classes_count_where_they_were_asked_for():
    given = np.ones((10, 10), np.int64)
    given[0] = CLASS_INDEX["hat"]
    given[9] = CLASS_INDEX["necklace"]
    found = np.ones((10, 10), np.int64)
    found[0, :2] = CLASS_INDEX["hat"]  # a fifth of it
    found[5] = CLASS_INDEX["necklace"]  # elsewhere
    counts = np.stack([counts_of(confusion_of(given, found)), counts_of(confusion_of(found[5:6], found[5:6]))])
    plain = np.ones((10, 10), np.int64)
    counts = np.concatenate([counts, counts_of(confusion_of(plain, plain))[None]])
    recall = rare_class_recall(counts)
    assert recall[:2].tolist() == [0.5, 1]
    assert np.isnan(recall[2])  # no rare class was asked for


def test_keypoint_error_is_in_eye_distances():
    face = draw_face(0, 0, 128)
    points = face.keypoints.astype(np.float64)
    right, left = (points[list(STROKES[part][2])].mean(axis=0) for part in ("r_eye", "l_eye"))
    between = np.linalg.norm(left - right)
    assert keypoint_error(points, points, STROKES) == 0
    assert keypoint_error(points, points + np.array([0.5 * between, 0]), STROKES) == pytest.approx(0.5)
    many = np.zeros((478, 2))
    for _, _, ibug, mediapipe in STROKES.values():
        many[list(mediapipe)] = points[list(ibug)].mean(axis=0)
    assert keypoint_error(points, many, STROKES) == pytest.approx(0, abs=0.02)  # the same centres


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


def test_finds_and_nearest():
    generator = torch.Generator().manual_seed(0)
    pictures = torch.randn(40, 16, generator=generator)
    assert finds(pictures, 3 * pictures, 10).tolist() == [True] * 40
    assert len(finds(pictures, pictures, 15)) == 30  # what fills no group is left out
    assert finds(pictures, pictures.roll(1, 0), 10).float().mean() <= 0.1
    mixed = pictures.clone()
    mixed[:10] = mixed[:10].roll(1, 0)  # a quarter has another's caption
    assert finds(pictures, mixed, 10).float().mean() == 0.75
    with pytest.raises(ValueError, match="fill no group"):
        finds(pictures, pictures, 50)
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
