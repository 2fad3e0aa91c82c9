"""The mask condition: one class per pixel. Resizing takes the majority class of each cell and never mixes classes."""

from __future__ import annotations

import numpy as np
from PIL import Image

from likeness.conditions.augment import augment_labels
from likeness.conditions.base import ARRAY_SUFFIXES, IMAGE_SUFFIXES, Condition
from likeness.conditions.images import check_aspect, png_bytes
from likeness.conditions.mask.classes import FLIP_PAIRS, PALETTE
from likeness.conditions.mask.formats import PART_NAMES, paint_parts, read, swap_classes

__all__ = ["MASK", "PART_NAMES", "flip", "mask_image", "paint_parts", "read", "render", "resize", "swap_classes"]


def _overlap(source: int, target: int) -> np.ndarray:
    """float32 [target, source]: overlap of each source pixel with each target cell, in source pixels."""
    scale = source / target
    cell, pixel = np.arange(target)[:, None], np.arange(source)[None]
    overlap = np.minimum((cell + 1) * scale, pixel + 1) - np.maximum(cell * scale, pixel)
    return np.clip(overlap, 0, 1).astype(np.float32)


def resize(raw: np.ndarray, height: int, width: int) -> np.ndarray:
    """Resize labels, uint8 [H, W], without mixing classes.

    Enlarging takes the nearest pixel. Shrinking gives each cell the class that covers most of it, so that thin parts
    keep their place. On a tie, the class at the cell's center wins, then the higher class, which is the one on top.
    Raises `InputError` if the aspect ratio would change by more than 1 %.
    """
    check_aspect(raw.shape[:2], (height, width), "mask")
    if raw.shape == (height, width):
        return raw.copy()
    rows = ((np.arange(height) + 0.5) * raw.shape[0] / height).astype(np.intp)
    columns = ((np.arange(width) + 0.5) * raw.shape[1] / width).astype(np.intp)
    center = raw[rows[:, None], columns]  # [height, width]
    if height >= raw.shape[0] and width >= raw.shape[1]:
        return center
    down, across = _overlap(raw.shape[0], height), _overlap(raw.shape[1], width)
    area = down.sum(1).mean() * across.sum(1).mean()  # source pixels per cell
    result, most = np.zeros_like(center), np.full(center.shape, -1.0, dtype=np.float32)
    for index in np.unique(raw):
        cover = down @ (raw == index).astype(np.float32) @ across.T  # [height, width]
        cover += np.where(center == index, 2e-3 * area, 0).astype(np.float32)
        wins = cover >= most - 1e-3 * area
        result[wins] = index
        most = np.maximum(most, cover)
    return result


def flip(raw: np.ndarray) -> np.ndarray:
    """Mirror labels horizontally and swap the person's left and right eye, brow and ear."""
    return swap_classes(np.ascontiguousarray(raw[:, ::-1]), FLIP_PAIRS)


def render(raw: np.ndarray, height: int, width: int) -> np.ndarray:
    """Render labels in the CelebAMask-HQ colors, uint8 [height, width, 3]."""
    return PALETTE[resize(raw, height, width)]


def mask_image(labels: np.ndarray) -> Image.Image:
    """Convert labels to a palette image (mode P): index = class, in the CelebAMask-HQ colors."""
    image = Image.fromarray(labels)
    image.putpalette(PALETTE.tobytes())  # sets mode P and keeps the indices
    return image


MASK = Condition(
    name="mask",
    raw="labels",
    folder="masks",
    suffix=".png",
    input_suffixes=IMAGE_SUFFIXES + ARRAY_SUFFIXES,
    repairable=frozenset({"color-order", "blended-labels", "class-order", "swapped-sides"}),
    read=read,
    resize=resize,
    flip=flip,
    augment=augment_labels,
    render=render,
    encode=lambda raw: png_bytes(mask_image(raw)),
)
