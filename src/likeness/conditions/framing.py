"""Face framing from landmarks: the square crop of CelebA-HQ and FFHQ, and what deviates from it.

Coordinates are continuous, as in Pillow's transforms: an image W pixels wide spans [0, W], and the center of its first
pixel is at 0.5. The crop is that of T. Karras, S. Laine, T. Aila, "A Style-Based Generator Architecture for Generative
Adversarial Networks" (2019) and of appendix C of T. Karras et al., "Progressive Growing of GANs" (2018).
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from likeness.conditions.keypoints import part_points
from likeness.types import InputError, Note

MOUTH_CORNERS = {68: [48, 54], 468: [61, 291], 478: [61, 291]}
"""Number of points -> corners of the mouth."""

NOSE_AND_SIDES = {68: [30, 0, 16], 468: [4, 234, 454], 478: [4, 234, 454]}
"""Number of points -> tip of the nose, person's right and left side of the face."""

TRAINED = {"left eye": (0.62, 0.482), "right eye": (0.38, 0.482), "mouth": (0.5, 0.733)}
"""Part -> (x, y) as fractions of a portrait in the framing of the training data: mean of MediaPipe's landmarks of 298
CelebA-HQ faces, of which 99 % are within 0.05."""

PROTRUSION = 1.7
"""Distance of the tip of the nose in front of the sides of the face, in halves of its width. Fitted to the head poses
that MediaPipe finds in 298 faces: the estimated yaw is off by 1.0 degrees on average, by over 2.8 for 5 %."""

LIMITS = {"misplaced": 0.08, "turned": 35.0, "tilted": 25.0, "small": 1.5, "outside": 0.1}
"""Kind of fault -> largest value: fraction of the side, degrees, degrees, enlargement, fraction of the area."""


class Anchors(NamedTuple):
    """The three points that frame a face, each float64 (x, y)."""

    left_eye: np.ndarray
    """Center of the person's left eye, on the viewer's right."""
    right_eye: np.ndarray
    mouth: np.ndarray
    """Midpoint of its corners."""


class Framing(NamedTuple):
    """Pose and resolution of a face in a photo."""

    turned: float
    """Estimated yaw in degrees, positive towards the person's left."""
    tilted: float
    """Roll in degrees, positive clockwise."""
    enlarged: float
    """Portrait pixels per photo pixel, along a side."""
    outside: float
    """Fraction of the portrait that is outside the photo."""


def anchors_of(points: np.ndarray) -> Anchors:
    """Compute eyes and mouth of landmarks [68, 468 or 478, 2]. Raises `InputError` for another number of points."""
    count = len(points)
    if count not in MOUTH_CORNERS:
        raise InputError(f"{count} landmarks are not supported: use the 68 of iBUG, or the 468 or 478 of MediaPipe")
    points = np.asarray(points, dtype=np.float64)
    parts = part_points("l_eye", count), part_points("r_eye", count), MOUTH_CORNERS[count]
    return Anchors(*(points[part].mean(axis=0) for part in parts))


def portrait_transform(points: np.ndarray, size: int) -> np.ndarray:
    """Compute the similarity transform, float64 [2, 3], from a photo to the framing of CelebA-HQ and FFHQ, for
    landmarks [68, 468 or 478, 2] in its pixels and a portrait of `size` pixels. Raises `InputError` if all are on one
    spot.
    """
    left_eye, right_eye, mouth = anchors_of(points)
    middle = (left_eye + right_eye) / 2
    across, down = left_eye - right_eye, mouth - middle
    # The horizontal axis averages the line between the eyes and the normal of the line from eyes to mouth.
    direction = across + np.array([down[1], -down[0]])
    half = max(2.0 * np.hypot(*across), 1.8 * np.hypot(*down))
    length = np.hypot(*direction)
    if not np.isfinite(half + length) or min(half, length) < 1e-6:
        raise InputError("the landmarks are all on one spot, not on a face: detect them again")
    center = middle + 0.1 * down
    x, y = direction / length * size / (2 * half)
    rotation = np.array([[x, y], [-y, x]])
    return np.concatenate([rotation, (size / 2 - rotation @ center)[:, None]], axis=1)  # [2, 2], [2, 1] -> [2, 3]


def move(points: np.ndarray, transform: np.ndarray) -> np.ndarray:
    """Apply a transform [2, 3] to points [..., 2]."""
    return np.asarray(points) @ transform[:, :2].T + transform[:, 2]


def inverse(transform: np.ndarray) -> np.ndarray:
    """Invert a transform [2, 3]."""
    back = np.linalg.inv(transform[:, :2])
    return np.concatenate([back, -back @ transform[:, 2:]], axis=1)


def rescaled(transform: np.ndarray, size: int, wanted: int) -> np.ndarray:
    """Convert a transform to portraits of `size` pixels to one to portraits of `wanted` pixels."""
    return transform * (wanted / size)


def beyond(transform: np.ndarray, size: int, width: int, height: int) -> np.ndarray:
    """Compute the distance of each portrait pixel from the photo: float64 [size, size], portrait pixels, 0 inside."""
    centers = np.arange(size) + 0.5
    grid = np.stack(np.meshgrid(centers, centers), axis=-1)  # [S, S, 2]
    x, y = np.moveaxis(move(grid, inverse(transform)), -1, 0)
    return np.maximum.reduce([-x, x - width, -y, y - height, np.zeros_like(x)]) * np.hypot(*transform[:, 0])


def framing_of(points: np.ndarray, width: int, height: int, size: int) -> Framing:
    """Measure landmarks [68, 468 or 478, 2] in pixels of a `width` x `height` photo, for portraits of `size` pixels."""
    transform = portrait_transform(points, size)
    nose, right, left = move(points[NOSE_AND_SIDES[len(points)]], transform)
    # At yaw a, the half width is reduced to cos a, and the nose moves from the middle by its protrusion times sin a.
    half = max(abs(left[0] - right[0]) / 2, 1e-6)
    turned = np.degrees(np.arctan((nose[0] - (left[0] + right[0]) / 2) / (PROTRUSION * half)))
    tilted = -np.degrees(np.arctan2(transform[1, 0], transform[0, 0]))
    probe = 64
    outside = (beyond(rescaled(transform, size, probe), probe, width, height) > 0).mean()
    return Framing(float(turned), float(tilted), float(np.hypot(*transform[:, 0])), float(outside))


def framing_faults(framing: Framing) -> list[Note]:
    """Return what exceeds `LIMITS` in a photo; the kinds are its keys."""
    turned, tilted, enlarged, outside = framing
    faults = {
        "turned": (abs(turned), f"turned by about {abs(turned):.0f} degrees"),
        "tilted": (abs(tilted), f"tilted by {abs(tilted):.0f} degrees"),
        "small": (enlarged, f"small: enlarged {enlarged:.1f} times"),
        "outside": (outside, f"outside: {100 * outside:.0f} % of the portrait is outside the photo"),
    }
    return [Note(kind, text) for kind, (value, text) in faults.items() if value > LIMITS[kind]]


def misplacement(points: np.ndarray) -> dict[str, float]:
    """Compute the distance of each part of `TRAINED` from its place in the training data, as a fraction of the side,
    for landmarks [68, 468 or 478, 2] as fractions of a square portrait.
    """
    found = anchors_of(points)
    return {part: float(np.hypot(*(own - place))) for own, (part, place) in zip(found, TRAINED.items(), strict=True)}


def portrait_faults(points: np.ndarray) -> list[Note]:
    """Return what exceeds `LIMITS` in a square portrait, landmarks [P, 2] as fractions of its side."""
    part, distance = max(misplacement(points).items(), key=lambda item: item[1])
    if distance <= LIMITS["misplaced"]:
        return []
    text = f"misplaced: the {part} is {100 * distance:.0f} % of the side from its place in the training data"
    return [Note("misplaced", text)]
