"""How a face lies in its picture: the square that FFHQ's recipe lays around it, and what is off about it, in numbers.

Everything is a function of landmarks alone, 68 or 478 of them, so that whoever has points can ask, whatever found them.
Coordinates are continuous, as Pillow's transforms and MediaPipe's fractions are: a picture W pixels wide spans [0, W]
and the centre of its first pixel lies at 0.5. The recipe is that of T. Karras, S. Laine, T. Aila, "A Style-Based
Generator Architecture for Generative Adversarial Networks", 2019, appendix A of the progressive GAN paper before it:
CelebA-HQ and FFHQ are both framed so.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from likeness.conditions.keypoints import STROKES
from likeness.types import InputError

MOUTH_CORNERS = {68: (48, 54), 478: (61, 291)}
"""Number of points -> which are the corners of the mouth."""

NOSE_AND_SIDES = {68: (30, 0, 16), 478: (4, 234, 454)}
"""Number of points -> tip of the nose, person's right and left side of the face."""

TRAINED = {"left eye": (0.62, 0.482), "right eye": (0.38, 0.482), "mouth": (0.5, 0.733)}
"""Part -> (x, y) in a portrait that spans [0, 1], in the geometry of the data sets: means of MediaPipe's landmarks of
298 CelebA-HQ faces, of which 99 % lie within 0.05 of them."""

PROTRUSION = 1.7
"""How far the tip of the nose stands before the sides of the face, in halves of its width: fitted to the head poses
that MediaPipe finds in 298 faces; the estimated turn is off by 1.0 degrees on average, by over 2.8 in 5 % of them."""

LIMITS = {"misplaced": 0.08, "turned": 35.0, "tilted": 25.0, "small": 1.5, "outside": 0.1}
"""Fault -> the most that passes: share of the side, degrees, degrees, times enlarged, share of the portrait."""


class Anchors(NamedTuple):
    """The three places that frame a face, each float64 (x, y)."""

    left_eye: np.ndarray
    """Middle of the person's left eye, on the viewer's right."""
    right_eye: np.ndarray
    mouth: np.ndarray
    """Middle between its corners."""


class Framing(NamedTuple):
    """How a face lies in a photo."""

    turned: float
    """Degrees that the head is turned about the neck, estimated; positive towards the person's left."""
    tilted: float
    """Degrees between the face's own upright and the photo's, positive clockwise."""
    enlarged: float
    """Pixels of the portrait for one of the photo, a side."""
    outside: float
    """Share of the portrait that lies beyond the photo."""


def anchors_of(points: np.ndarray) -> Anchors:
    """Eyes and mouth of landmarks [68 or 478, 2], in the same coordinates.

    Raises:
        InputError: another number of points.
    """
    if len(points) not in MOUTH_CORNERS:
        raise InputError(f"{len(points)} landmarks cannot be used: give the 68 of iBUG or the 478 of MediaPipe")
    points = np.asarray(points, dtype=np.float64)
    (_, _, *left), (_, _, *right) = STROKES["l_eye"], STROKES["r_eye"]
    which = 0 if len(points) == 68 else 1
    parts = left[which], right[which], MOUTH_CORNERS[len(points)]
    left_eye, right_eye, mouth = (points[list(part)].mean(axis=0) for part in parts)
    return Anchors(left_eye, right_eye, mouth)


def portrait_transform(points: np.ndarray, size: int) -> np.ndarray:
    """The similarity that brings a face into the framing of CelebA-HQ and FFHQ.

    Args:
        points: landmarks [68 or 478, 2] in pixels of the photo.
        size: pixels a side of the portrait.

    Returns:
        float64 [2, 3], photo -> portrait: rotation, scale and shift, without mirroring.

    Raises:
        InputError: the points lie on one spot.
    """
    left_eye, right_eye, mouth = anchors_of(points)
    middle = (left_eye + right_eye) / 2
    across, down = left_eye - right_eye, mouth - middle
    # Across the face: the line of the eyes, and at right angles to the line from eyes to mouth, of which both say half.
    direction = across + np.array([down[1], -down[0]])
    half = max(2.0 * np.hypot(*across), 1.8 * np.hypot(*down))
    length = np.hypot(*direction)
    if not np.isfinite(half + length) or min(half, length) < 1e-6:
        raise InputError("the landmarks lie on one spot: they show no face")
    centre = middle + 0.1 * down
    x, y = direction / length * size / (2 * half)
    rotation = np.array([[x, y], [-y, x]])
    return np.concatenate([rotation, (size / 2 - rotation @ centre)[:, None]], axis=1)  # [2, 2], [2, 1] -> [2, 3]


def move(points: np.ndarray, transform: np.ndarray) -> np.ndarray:
    """Points [..., 2] through a transform [2, 3]."""
    return np.asarray(points) @ transform[:, :2].T + transform[:, 2]


def inverse(transform: np.ndarray) -> np.ndarray:
    """The transform [2, 3] that leads back."""
    back = np.linalg.inv(transform[:, :2])
    return np.concatenate([back, -back @ transform[:, 2:]], axis=1)


def rescaled(transform: np.ndarray, size: int, wanted: int) -> np.ndarray:
    """A transform to portraits of `size` pixels, made one to portraits of `wanted`."""
    return transform * (wanted / size)


def beyond(transform: np.ndarray, size: int, width: int, height: int) -> np.ndarray:
    """How far beyond the photo each pixel of a portrait lies: float64 [size, size], pixels of the portrait, else 0."""
    centres = np.arange(size) + 0.5
    grid = np.stack(np.meshgrid(centres, centres), axis=-1)  # [S, S, 2]
    x, y = np.moveaxis(move(grid, inverse(transform)), -1, 0)
    return np.maximum.reduce([-x, x - width, -y, y - height, np.zeros_like(x)]) * np.hypot(*transform[:, 0])


def framing_of(points: np.ndarray, width: int, height: int, size: int) -> Framing:
    """How a face lies in a photo of `width` x `height` pixels that is to give a portrait of `size`.

    Args:
        points: landmarks [68 or 478, 2] in pixels of the photo.
    """
    transform = portrait_transform(points, size)
    nose, right, left = (move(points[index], transform) for index in NOSE_AND_SIDES[len(points)])
    # Of a head turned by a, the half width is seen times cos a, and the nose leaves the middle by its protrusion sin a.
    half = max(abs(left[0] - right[0]) / 2, 1e-6)
    turned = np.degrees(np.arctan((nose[0] - (left[0] + right[0]) / 2) / (PROTRUSION * half)))
    scale = float(np.hypot(*transform[:, 0]))
    probe = 64
    outside = (beyond(rescaled(transform, size, probe), probe, width, height) > 0).mean()
    return Framing(
        float(turned), float(-np.degrees(np.arctan2(transform[1, 0], transform[0, 0]))), scale, float(outside)
    )


def framing_faults(framing: Framing) -> list[str]:
    """What is off about a face in a photo: one phrase a fault, with its number. Its first word is a key of `LIMITS`."""
    faults = []
    if abs(framing.turned) > LIMITS["turned"]:
        faults.append(f"turned by about {abs(framing.turned):.0f} degrees")
    if abs(framing.tilted) > LIMITS["tilted"]:
        faults.append(f"tilted by {abs(framing.tilted):.0f} degrees")
    if framing.enlarged > LIMITS["small"]:
        faults.append(f"small: enlarged {framing.enlarged:.1f} times")
    if framing.outside > LIMITS["outside"]:
        faults.append(f"outside: {100 * framing.outside:.0f} % of the portrait lies beyond the photo")
    return faults


def misplacement(points: np.ndarray) -> dict[str, float]:
    """How far the parts of a portrait lie from where the data sets have them.

    Args:
        points: landmarks [68 or 478, 2] of a square portrait that spans [0, 1].

    Returns:
        Part -> distance as a share of the portrait's side; the parts are those of `TRAINED`.
    """
    found = anchors_of(points)
    return {part: float(np.hypot(*(own - place))) for own, (part, place) in zip(found, TRAINED.items(), strict=True)}


def portrait_fault(points: np.ndarray) -> str | None:
    """What is off about the framing of a square portrait (landmarks [P, 2] in [0, 1]), in one phrase, or None."""
    part, share = max(misplacement(points).items(), key=lambda item: item[1])
    if share <= LIMITS["misplaced"]:
        return None
    return f"misplaced: the {part} lies {100 * share:.0f} % of the side from where the models learnt it"
