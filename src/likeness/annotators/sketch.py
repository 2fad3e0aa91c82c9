"""Photograph -> pencil sketch without weights: the extended difference of Gaussians (XDoG).

H. Winnemoeller, J. E. Kyprianidis, S. C. Olsen, "XDoG: an eXtended Difference-of-Gaussians compendium including
advanced image stylization", Computers & Graphics 36(6), 2012. The isotropic filter, not the flow-guided one: it needs
a few blurs only, and strokes stay comparable from 128 to 1024 pixels since every length is a share of the picture.
"""

from __future__ import annotations

import numpy as np
from PIL import Image

from likeness.types import InputError

DRAWING = 1
"""Number of this way of drawing: it grows when the same photograph gives other lines."""

REFERENCE = 512
"""Shorter side in pixels for which the lengths below are stated."""


def extract_sketch(image: np.ndarray | Image.Image, strength: float = 1.0, thickness: float = 1.0) -> np.ndarray:
    """Draw a photograph with dark lines on white.

    Args:
        image: uint8 [H, W, 3] or [H, W], or a PIL picture.
        strength: 0.2 to 5, how faint an edge still gives a line.
        thickness: 0.3 to 4, width of the lines; 1 is about 1/128 of the shorter side.

    Returns:
        uint8 [H, W], 0 stroke to 255 paper.

    Raises:
        InputError: another shape or type, or a value out of its range.
    """
    from scipy import ndimage

    if not 0.2 <= strength <= 5 or not 0.3 <= thickness <= 4:
        raise InputError(f"strength {strength} must lie in 0.2 to 5 and thickness {thickness} in 0.3 to 4")
    if isinstance(image, Image.Image):
        image = np.asarray(image.convert("RGB"))
    if image.dtype != np.uint8 or image.ndim not in (2, 3) or (image.ndim == 3 and image.shape[2] != 3):
        raise InputError(f"a photograph is uint8 [H, W, 3], not {image.dtype} {list(image.shape)}")
    if min(image.shape[:2]) < 32:
        raise InputError(f"the photograph is {image.shape[1]}x{image.shape[0]} pixels: at least 32 are needed")
    # Rec. 601 luma, as Pillow's convert("L")
    luma = (image @ np.array([0.299, 0.587, 0.114]) if image.ndim == 3 else image).astype(np.float32) / 255  # [H, W]
    scale = min(luma.shape) / REFERENCE
    # Faces in shade must give lines as strong as faces in the sun: divide by the local contrast, in part.
    mean = ndimage.gaussian_filter(luma, 32 * scale)
    spread = np.sqrt(ndimage.gaussian_filter((luma - mean) ** 2, 32 * scale))
    even = (luma - mean) / (spread + 0.06)
    even = _smooth(even, 2.2 * scale)
    # Equation 1: D = G(sigma) - tau G(k sigma); equation 7 writes it as a sharpened blur, S = (1 + p) G - p G_k.
    # Only the part without the blurred picture itself is wanted, since tones would be drawn as grey areas: tau = 1.
    sigma = max(1.9 * thickness * scale, 0.45)
    edges = ndimage.gaussian_filter(even, sigma) - ndimage.gaussian_filter(even, 1.6 * sigma)
    # Equation 5, the soft threshold: 1 from epsilon on, 1 + tanh(phi (u - epsilon)) below.
    epsilon, phi = -0.03 / strength, 11.0 * strength
    tone = np.where(edges >= epsilon, 1.0, 1.0 + np.tanh(phi * (edges - epsilon)))
    ink = 1 - tone
    return np.rint(255 * (1 - _without_specks(ink, scale))).astype(np.uint8)


def _smooth(values: np.ndarray, sigma: float) -> np.ndarray:
    """An edge-keeping blur: weights fall with the distance and with the difference in value (a bilateral filter)."""
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
    """Remove strokes that are short or faint: connected ink whose summed darkness is under that of a short line."""
    from scipy import ndimage

    strokes, count = ndimage.label(ink > 0.12, structure=np.ones((3, 3)))
    if not count:
        return np.zeros_like(ink)
    index = np.arange(1, count + 1)
    mass = np.asarray(ndimage.sum_labels(ink, strokes, index))
    peak = np.asarray(ndimage.maximum(ink, strokes, index))
    keep = np.concatenate([[False], (mass > 60 * scale**2 + 2.5) & (peak > 0.3)])
    # A soft rim around the strokes that stay belongs to them.
    return np.where(ndimage.binary_dilation(keep[strokes], np.ones((3, 3))), ink, 0)
