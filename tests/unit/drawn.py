"""A simple face for the tests: a label map, a sketch and 68 points."""

from __future__ import annotations

import numpy as np
from PIL import Image, ImageDraw

ELLIPSES: tuple[tuple[int, tuple[float, float, float, float]], ...] = (
    # class, (left, top, right, bottom) as fractions of the image, painted in this order
    (13, (0.18, 0.08, 0.82, 0.75)),
    (18, (0.05, 0.86, 0.95, 1.4)),
    (17, (0.38, 0.66, 0.62, 0.98)),
    (9, (0.21, 0.42, 0.29, 0.58)),
    (8, (0.71, 0.42, 0.79, 0.58)),
    (1, (0.25, 0.18, 0.75, 0.85)),
    (7, (0.31, 0.345, 0.45, 0.385)),
    (6, (0.55, 0.345, 0.69, 0.385)),
    (5, (0.33, 0.42, 0.44, 0.47)),
    (4, (0.56, 0.42, 0.67, 0.47)),
    (2, (0.44, 0.44, 0.56, 0.6)),
    (11, (0.4, 0.66, 0.6, 0.7)),
    (12, (0.4, 0.705, 0.6, 0.76)),
    (10, (0.42, 0.685, 0.58, 0.72)),
)


def drawn_mask(size: int = 128) -> np.ndarray:
    """uint8 [size, size], canonical labels of a frontal face: l_ parts are on the viewer's right."""
    image = Image.new("L", (size, size))
    draw = ImageDraw.Draw(image)
    for index, box in ELLIPSES:
        draw.ellipse([side * size for side in box], fill=index)
    return np.array(image)


def drawn_sketch(size: int = 128) -> np.ndarray:
    """uint8 [size, size], dark outlines on white, smooth at the borders."""
    image = Image.new("L", (4 * size, 4 * size), 255)
    draw = ImageDraw.Draw(image)
    for _, box in ELLIPSES:
        draw.ellipse([side * 4 * size for side in box], outline=10, width=size // 12)
    return np.array(image.reduce(4))


def drawn_points() -> np.ndarray:
    """float64 [68, 2] in [0, 1], iBUG order: a frontal face."""

    def ring(center: tuple[float, float], radius: tuple[float, float], degrees: list[float]) -> list[list[float]]:
        turns = np.deg2rad(degrees)
        return [[center[0] + radius[0] * np.cos(a), center[1] - radius[1] * np.sin(a)] for a in turns]

    points = ring((0.5, 0.45), (0.28, 0.42), list(np.linspace(180, 360, 17)))  # jaw
    points += ring((0.37, 0.38), (0.08, 0.04), list(np.linspace(160, 20, 5)))  # brows
    points += ring((0.63, 0.38), (0.08, 0.04), list(np.linspace(160, 20, 5)))
    points += [[0.5, y] for y in np.linspace(0.44, 0.56, 4)]  # nose
    points += [[x, 0.59] for x in np.linspace(0.45, 0.55, 5)]
    points += ring((0.38, 0.45), (0.05, 0.02), [180, 120, 60, 0, -60, -120])  # eyes
    points += ring((0.62, 0.45), (0.05, 0.02), [180, 120, 60, 0, -60, -120])
    points += ring((0.5, 0.71), (0.11, 0.05), [180 - 30 * step for step in range(12)])  # lips
    points += ring((0.5, 0.71), (0.07, 0.02), [180 - 45 * step for step in range(8)])
    return np.array(points)
