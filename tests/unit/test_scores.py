"""Scores with known values."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from likeness.annotators.face_parser import confusion_of
from likeness.conditions.keypoints import STROKES
from likeness.conditions.mask.classes import CLASS_INDEX
from likeness.data.synthetic import draw_face
from likeness.encoders.text_image import retrieved
from likeness.evaluate.scores import (
    accuracy,
    class_counts,
    class_iou,
    edge_f_score,
    is_complete_face,
    keypoint_error,
    mean_iou,
    nearest,
    pixel_accuracy,
    rare_class_recall,
    sharpness,
)


def test_pixel_accuracy():
    labels = np.arange(16).reshape(4, 4)
    other = labels.copy()
    other[0] = 18
    assert pixel_accuracy(labels, labels) == 1
    assert pixel_accuracy(labels, other) == 0.75


def test_three_conventions_for_absent_classes():
    """Half of the skin is found as hair, the only other class: IoU 1/2, 0, and 17 absent classes."""
    given = np.full((4, 4), CLASS_INDEX["skin"])
    found = given.copy()
    found[:2] = CLASS_INDEX["hair"]
    counts = class_counts(confusion_of(given, found))[None]
    assert accuracy(counts) == 0.5
    iou = class_iou(counts)[0]
    assert (iou[CLASS_INDEX["skin"]], iou[CLASS_INDEX["hair"]]) == (0.5, 0)
    assert np.isnan(iou).sum() == 17
    assert mean_iou(counts) == pytest.approx(0.25)
    assert mean_iou(counts, 1.0) == pytest.approx(17.5 / 19)
    assert mean_iou(counts, 0.0) == pytest.approx(0.5 / 19)


def test_rare_class_recall():
    given = np.ones((10, 10), np.int64)
    given[0] = CLASS_INDEX["hat"]
    given[9] = CLASS_INDEX["necklace"]
    found = np.ones((10, 10), np.int64)
    found[0, :2] = CLASS_INDEX["hat"]  # a fifth of the hat
    found[5] = CLASS_INDEX["necklace"]  # elsewhere
    counts = np.stack([class_counts(confusion_of(given, found)), class_counts(confusion_of(found[5:6], found[5:6]))])
    plain = np.ones((10, 10), np.int64)
    counts = np.concatenate([counts, class_counts(confusion_of(plain, plain))[None]])
    recall = rare_class_recall(counts)
    assert recall[:2].tolist() == [0.5, 1]
    assert np.isnan(recall[2])  # no rare class is given


def test_keypoint_error_is_relative_to_the_eye_distance():
    face = draw_face(0, 0, 128)
    points = face.keypoints.astype(np.float64)
    right, left = (points[list(STROKES[part][2])].mean(axis=0) for part in ("r_eye", "l_eye"))
    eye_distance = np.linalg.norm(left - right)
    assert keypoint_error(points, points) == 0
    assert keypoint_error(points, points + np.array([0.5 * eye_distance, 0])) == pytest.approx(0.5)
    many = np.zeros((478, 2))
    for _, _, ibug, mediapipe in STROKES.values():
        many[list(mediapipe)] = points[list(ibug)].mean(axis=0)
    assert keypoint_error(points, many) == pytest.approx(0, abs=0.02)  # the same centers
    noisy = many + np.random.default_rng(0).normal(0, 0.02, many.shape)
    assert keypoint_error(many[:468], noisy) == keypoint_error(many, noisy)  # irises do not count


def line(column: int) -> np.ndarray:
    lines = np.full((32, 32), 255, np.uint8)
    lines[:, column] = 0
    return lines


def test_edge_f_score_with_tolerance():
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


def test_edge_f_score_of_different_faces():
    sketches = [draw_face(0, index, 128).sketch for index in range(4)]
    for index, sketch in enumerate(sketches):
        assert edge_f_score(sketch, sketches[(index + 1) % 4]) < 0.6


def test_retrieval_and_nearest():
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(40, 16, generator=generator)
    assert retrieved(images, 3 * images, 10).tolist() == [True] * 40
    assert len(retrieved(images, images, 15)) == 30  # an incomplete group is skipped
    assert retrieved(images, images.roll(1, 0), 10).float().mean() <= 0.1
    mixed = images.clone()
    mixed[:10] = mixed[:10].roll(1, 0)  # a quarter has wrong captions
    assert retrieved(images, mixed, 10).float().mean() == 0.75
    with pytest.raises(ValueError, match="fewer than one group"):
        retrieved(images, images, 50)
    similarity, index = nearest(images[:5] * 2, images)
    assert torch.equal(index, torch.arange(5))
    assert torch.allclose(similarity, torch.ones(5))


def test_complete_faces():
    """Drawn faces are complete; without a part, with a part elsewhere, or with torn skin they are not."""
    at = CLASS_INDEX
    faces = [draw_face(0, index, 128).mask for index in range(20)]
    complete = [labels for labels in faces if is_complete_face(labels)]
    assert len(complete) >= 10
    for labels in complete:
        if (labels == at["eye_g"]).any():
            continue
        no_eye, no_mouth, moved, torn = labels.copy(), labels.copy(), labels.copy(), labels.copy()
        no_eye[labels == at["l_eye"]] = at["skin"]
        no_mouth[np.isin(labels, [at[name] for name in ("u_lip", "mouth", "l_lip")])] = at["skin"]
        moved[labels == at["nose"]] = at["skin"]
        moved[:12, :12] = at["nose"]
        rows = np.flatnonzero((labels == at["skin"]).any(axis=1))
        torn[rows[len(rows) // 2] :][:4] = at["hair"]
        for broken in (no_eye, no_mouth, moved, torn):
            assert not is_complete_face(broken)
        assert is_complete_face(labels[:, ::-1])  # sides do not matter


def test_sharpness():
    """A checkerboard of 0 and 255 has the largest value; blurring lowers it; the border does not matter."""
    board = (255 * (np.indices((64, 64)).sum(axis=0) % 2)).astype(np.uint8)[..., None].repeat(3, axis=2)
    assert sharpness(board) == pytest.approx(1020)  # the Laplacian of each pixel is 4 * 255 in absolute value
    flat = board.copy()
    flat[11:-11, 11:-11] = 128
    assert sharpness(flat) < 1
