"""Face framing: the published crop, recovered transforms, and measured faults."""

from __future__ import annotations

import numpy as np
import pytest
from drawn import drawn_points

from likeness.conditions.framing import (
    LIMITS,
    PROTRUSION,
    TRAINED,
    anchors_of,
    beyond,
    framing_faults,
    framing_of,
    inverse,
    misplacement,
    move,
    portrait_faults,
    portrait_transform,
)
from likeness.conditions.keypoints import STROKES
from likeness.types import InputError, Note


def face_of(right_eye, left_eye, mouth, count: int = 68, turned: float = 0.0) -> np.ndarray:
    """Landmarks of a face with given eyes and mouth, its nose where a head turned by `turned` degrees has it."""
    right_eye, left_eye, mouth = (np.array(place, dtype=np.float64) for place in (right_eye, left_eye, mouth))
    which = 2 if count == 68 else 3
    corners, nose, sides = ((48, 54), 30, (0, 16)) if count == 68 else ((61, 291), 4, (234, 454))
    center = (right_eye + left_eye + mouth) / 3
    across = (left_eye - right_eye) / np.hypot(*(left_eye - right_eye))
    points = np.tile(center, (count, 1))
    for part, place in (("r_eye", right_eye), ("l_eye", left_eye)):
        contour = list(STROKES[part][which])
        ring = np.linspace(0, 2 * np.pi, len(contour), endpoint=False)
        points[contour] = place + 3 * np.stack([np.cos(ring), np.sin(ring)], axis=-1)
    angle, half = np.radians(turned), 100.0
    points[list(corners)] = mouth + np.outer([-20, 20], across)
    points[list(sides)] = center + np.outer([-half * np.cos(angle), half * np.cos(angle)], across)
    points[nose] = center + PROTRUSION * half * np.sin(angle) * across
    return points


@pytest.mark.parametrize("count", [68, 478])
def test_published_crop(count):
    # eyes 200 apart, 200 above the mouth: half a side is max(2 * 200, 1.8 * 200), the center 0.1 * 200 below the eyes
    points = face_of((400, 500), (600, 500), (500, 700), count)
    assert np.allclose(portrait_transform(points, 800), [[1, 0, -100], [0, 1, -120]])
    # a long face: the distance to the mouth decides, 1.8 * 300
    points = face_of((400, 500), (600, 500), (500, 800), count)
    assert np.allclose(portrait_transform(points, 1080), [[1, 0, 40], [0, 1, 10]])


@pytest.mark.parametrize("count", [68, 478])
def test_recovered_transforms(count):
    rng = np.random.default_rng(0)
    points = face_of((180, 230), (330, 235), (258, 375), count)
    own = portrait_transform(points, 512)
    corners = np.array([[0, 0], [512, 0], [0, 512], [512, 512]])
    for _ in range(50):
        angle, scale, shift = rng.uniform(-np.pi, np.pi), np.exp(rng.uniform(-2, 2)), rng.uniform(-500, 3000, 2)
        rotation = scale * np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
        into_photo = np.concatenate([rotation, shift[:, None]], axis=1)
        found = portrait_transform(move(points, into_photo), 512)
        assert np.allclose(move(move(corners, into_photo), found), move(corners, own), atol=1e-6)
        assert np.allclose(move(move(corners, found), inverse(found)), corners, atol=1e-6)
        # landmarks that are off by half a pixel of the portrait each
        noisy = move(points + rng.normal(0, 0.5, points.shape), into_photo)
        noisy_corners = move(move(corners, into_photo), portrait_transform(noisy, 512))
        assert np.hypot(*(noisy_corners - move(corners, own)).T).mean() < 4


def test_a_recovered_transform_is_within_a_pixel():
    """The many points of a contour average their errors: 0.5 pixels each leave the face within one pixel."""
    rng = np.random.default_rng(1)
    points = face_of((180, 230), (330, 235), (258, 375), 478)
    inner = np.array([[128, 128], [384, 128], [256, 256], [128, 384], [384, 384]])
    own = portrait_transform(points, 512)
    off = []
    for _ in range(200):
        found = portrait_transform(points + rng.normal(0, 0.5, points.shape), 512)
        off.append(np.hypot(*(move(inner, found) - move(inner, own)).T))
    assert np.mean(off) < 1


@pytest.mark.parametrize("turned", [-50, -20, 0, 35, 60])
def test_turned_heads(turned):
    points = face_of((400, 500), (600, 500), (500, 700), turned=turned)
    assert framing_of(points, 1000, 1000, 512).turned == pytest.approx(turned, abs=0.1)


def test_framing_faults():
    points = face_of((400, 500), (600, 500), (500, 700))
    assert framing_faults(framing_of(points, 1000, 1000, 512)) == []
    angle = np.radians(30)
    clockwise = np.array([[np.cos(angle), np.sin(angle)], [-np.sin(angle), np.cos(angle)]])  # y is down
    tilted = (points - 500) @ clockwise + 500
    framing = framing_of(tilted, 1000, 1000, 512)
    assert framing.tilted == pytest.approx(30)
    assert framing_faults(framing) == [Note("tilted", "tilted by 30 degrees")]
    small = framing_faults(framing_of(points / 4, 250, 250, 512))
    assert small == [Note("small", "small: enlarged 2.6 times")]
    # the square spans 100 to 900 across and 120 to 920 down: half of it is outside a photo that ends at x = 500
    cut = framing_faults(framing_of(points, 500, 1000, 512))
    assert cut == [Note("outside", "outside: 50 % of the portrait is outside the photo")]
    turned = framing_faults(framing_of(face_of((400, 500), (600, 500), (500, 700), turned=60), 1000, 1000, 512))
    assert turned == [Note("turned", "turned by about 60 degrees")]


def test_distance_beyond_the_photo():
    distance = beyond(np.array([[2.0, 0, 0], [0, 2.0, 0]]), 8, 3, 8)  # enlarged twice, the photo ends at portrait x = 6
    assert np.allclose(distance[0], [0, 0, 0, 0, 0, 0, 0.5, 1.5])


def test_portrait_faults():
    assert portrait_faults(drawn_points()) == []
    as_trained = face_of(TRAINED["right eye"], TRAINED["left eye"], TRAINED["mouth"])
    # only the rings of the eyes and the corners of the mouth matter, and their middles are exact
    assert max(misplacement(as_trained).values()) < 1e-9
    low = drawn_points() + np.array([0, 0.15])
    (note,) = portrait_faults(low)
    assert note.kind == "misplaced"
    assert "% of the side from its place in the training data" in note.text
    assert max(misplacement(low).values()) > LIMITS["misplaced"]
    smaller = (drawn_points() - 0.5) * 0.6 + 0.5
    assert portrait_faults(smaller)


def test_rejected_landmarks():
    with pytest.raises(InputError, match="5 landmarks are not supported: use the 68 of iBUG, or the 468 or 478"):
        anchors_of(np.zeros((5, 2)))
    with pytest.raises(InputError, match="on one spot"):
        portrait_transform(np.full((68, 2), 7.0), 512)
