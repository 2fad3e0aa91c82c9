"""Extract a sketch from a photograph without weights: extended difference of Gaussians (XDoG).

H. Winnemoeller, J. E. Kyprianidis, S. C. Olsen, "XDoG: an eXtended Difference-of-Gaussians compendium including
advanced image stylization", Computers & Graphics 36(6), 2012. This is the isotropic filter, not the flow-guided one: it
needs only a few blurs. All lengths are fractions of the image size, so that results are comparable from 128 to 1024 px.
"""

from __future__ import annotations

import numpy as np
from PIL import Image

from likeness.types import InputError

DRAWING = 1
"""Version of the algorithm: incremented when the same photograph gives other lines."""

REFERENCE = 512
"""Shorter side in pixels that the lengths below refer to."""


def extract_sketch(image: np.ndarray | Image.Image) -> np.ndarray:
    """Draw a photograph, uint8 [H, W, 3] or [H, W] or a PIL image: uint8 [H, W], 0 (stroke) to 255 (paper).

    Lines are about 1/128 of the shorter side wide. Raises `InputError` for another shape or type, or a side below 32.
    """
    from scipy import ndimage

    if isinstance(image, Image.Image):
        image = np.asarray(image.convert("RGB"))
    if image.dtype != np.uint8 or image.ndim not in (2, 3) or (image.ndim == 3 and image.shape[2] != 3):
        raise InputError(f"a photograph must be uint8 [H, W, 3], not {image.dtype} {list(image.shape)}")
    if min(image.shape[:2]) < 32:
        raise InputError(f"the photograph is {image.shape[1]}x{image.shape[0]} pixels: both sides must be at least 32")
    # Rec. 601 luma, as Pillow's convert("L")
    luma = (image @ np.array([0.299, 0.587, 0.114]) if image.ndim == 3 else image).astype(np.float32) / 255  # [H, W]
    scale = min(luma.shape) / REFERENCE
    # Divide by part of the local contrast, so that shaded faces give equally strong lines.
    mean = ndimage.gaussian_filter(luma, 32 * scale)
    spread = np.sqrt(ndimage.gaussian_filter((luma - mean) ** 2, 32 * scale))
    even = (luma - mean) / (spread + 0.06)
    even = _smooth(even, 2.2 * scale)
    # Equation 1: D = G(sigma) - tau G(k sigma); equation 7 writes it as a sharpened blur, S = (1 + p) G - p G_k.
    # tau = 1 removes the blurred image itself, which would render tones as grey areas.
    sigma = max(1.9 * scale, 0.45)
    edges = ndimage.gaussian_filter(even, sigma) - ndimage.gaussian_filter(even, 1.6 * sigma)
    # Equation 5, the soft threshold: 1 from epsilon on, 1 + tanh(phi (u - epsilon)) below.
    epsilon, phi = -0.03, 11.0
    tone = np.where(edges >= epsilon, 1.0, 1.0 + np.tanh(phi * (edges - epsilon)))
    ink = 1 - tone
    return np.rint(255 * (1 - _without_specks(ink, scale))).astype(np.uint8)


def _smooth(values: np.ndarray, sigma: float) -> np.ndarray:
    """Bilateral filter: weights decrease with the distance and with the difference in value."""
    radius = max(1, round(2 * sigma))
    if sigma < 0.6:
        sigma, radius = 0.6, 1
    padded = np.pad(values, radius, mode="reflect")
    total = np.zeros_like(values)
    weights = np.zeros_like(values)
    height, width = values.shape
    for y in range(-radius, radius + 1):
        for x in range(-radius, radius + 1):
            other = padded[radius + y : radius + y + height, radius + x : radius + x + width]
            weight = np.exp(-(x * x + y * y) / (2 * sigma**2) - (other - values) ** 2 / (2 * 0.25**2))
            total += weight * other
            weights += weight
    return total / weights


def _without_specks(ink: np.ndarray, scale: float) -> np.ndarray:
    """Remove short or faint strokes: connected ink whose summed darkness is below that of a short line."""
    from scipy import ndimage

    strokes, count = ndimage.label(ink > 0.12, structure=np.ones((3, 3)))
    if not count:
        return np.zeros_like(ink)
    index = np.arange(1, count + 1)
    mass = np.asarray(ndimage.sum_labels(ink, strokes, index))
    peak = np.asarray(ndimage.maximum(ink, strokes, index))
    keep = np.concatenate([[False], (mass > 60 * scale**2 + 2.5) & (peak > 0.3)])
    # Keep the soft border of the remaining strokes.
    return np.where(ndimage.binary_dilation(keep[strokes], np.ones((3, 3))), ink, 0)
