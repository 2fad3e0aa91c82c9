"""Convert the files of a face for a prepared folder: images cropped and resized, conditions in canonical form.

Files that need no change are copied byte by byte. Masks and sketches keep their size and are cropped with their image.
"""

from __future__ import annotations

import io
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from likeness.conditions import CONDITIONS
from likeness.conditions.images import check_aspect, open_image, png_bytes
from likeness.conditions.mask import mask_image, paint_parts, swap_classes
from likeness.conditions.mask.classes import PALETTE
from likeness.conditions.mask.geometry import measure, swapped_pairs
from likeness.prepare.ingest.face import Face, content_of, json_of, name_of
from likeness.types import InputError

COPIED = {"PNG": ".png", "JPEG": ".jpg", "WEBP": ".webp"}
"""Format of images that are copied if they need no change -> suffix."""

ORIENTATION = 0x0112
"""EXIF tag; 1 is upright."""

Box = tuple[int, int, int, int] | None
"""Left, top, right and bottom of the crop; None keeps the whole image."""


@dataclass(frozen=True, kw_only=True)
class Geometry:
    """Size and crop of all images."""

    size: int | None
    """Side length in pixels; None keeps the size."""
    crop: bool
    """Whether to crop the centre of images that are not square."""


def open_face(face: Face, geometry: Geometry) -> tuple[Image.Image, Box, bytes, str]:
    """Read the image of a face.

    Returns:
        The image, its crop, its content, and the suffix under which the content can be copied, or "" if it must change.

    Raises:
        InputError: it cannot be read, or has the wrong size.
    """
    content, name = content_of(face.image), name_of(face.image)
    image = open_image(content, name)
    width, height = image.size
    if face.image_size is not None and image.size != face.image_size:
        expected = "{}x{}".format(*face.image_size)
        raise InputError(f"{name} is {width}x{height}, not {expected} as expected in this dataset format")
    box = face.box
    if box is None and width != height:
        if not geometry.crop:
            raise InputError(
                f"{name} is {width}x{height}, not square: crop the centre with --crop or the face with "
                "`likeness prepare align`"
            )
        side, left, top = min(width, height), max(0, width - height) // 2, max(0, height - width) // 2
        box = (left, top, left + side, top + side)
    with Image.open(io.BytesIO(content)) as head:
        plain = head.mode == "RGB" and head.getexif().get(ORIENTATION, 1) == 1 and getattr(head, "n_frames", 1) == 1
        suffix = COPIED.get(head.format or "", "") if plain and box is None and geometry.size in (None, width) else ""
    return image, box, content, suffix


def crop_and_resize(image: Image.Image, box: Box, size: int | None) -> Image.Image:
    """Return an RGB image without metadata of the source."""
    image = image.convert("RGB")
    image = image if box is None else image.crop(box)
    if size is not None and image.size != (size, size):
        image = image.resize((size, size), Image.Resampling.LANCZOS)
    return Image.fromarray(np.asarray(image))


def convert_mask(source: Any, box: Box, size: tuple[int, int]) -> tuple[bytes, bool]:
    """Return a mask as palette PNG, and whether its sides were swapped."""
    if isinstance(source, Mapping):
        parts = {index: open_image(content_of(file), name_of(file)) for index, file in source.items()}
        labels = paint_parts(parts, f"the mask of {name_of(next(iter(source.values())))}").raw
    else:
        labels = read_image("mask", source)
    labels = crop(labels, box, size, "mask")
    fixed = swap_classes(labels, swapped_pairs(measure(labels)))
    same = None if isinstance(source, Mapping) else unchanged(source, "P", fixed)
    return same or png_bytes(mask_image(fixed)), not np.array_equal(fixed, labels)


def convert_sketch(source: Any, box: Box, size: tuple[int, int]) -> tuple[bytes, bool]:
    """Return a sketch as greyscale PNG."""
    lines = crop(read_image("sketch", source), box, size, "sketch")
    return unchanged(source, "L", lines) or png_bytes(Image.fromarray(lines)), False


def convert_keypoints(source: Any, box: Box, size: tuple[int, int]) -> tuple[bytes, bool]:
    """Return keypoints as JSON: unchanged, or in fractions of the crop."""
    if isinstance(source, Mapping):
        document: Any = dict(source)
    else:
        document = source if isinstance(source, Path) else json_of(source)
    points = CONDITIONS["keypoints"].read(document).raw
    if box is None and isinstance(source, Path) and source.suffix.lower() == ".json":
        return content_of(source), False
    if box is None and isinstance(document, dict):
        return json.dumps(document).encode(), False
    if box is not None:
        left, top, right, bottom = box
        points = (points * size - (left, top)) / (right - left, bottom - top)
    return json.dumps({"points": points.astype(float).round(6).tolist()}).encode(), False


CONVERTERS: dict[str, Callable[[Any, Box, tuple[int, int]], tuple[bytes, bool]]] = {
    "mask": convert_mask,
    "sketch": convert_sketch,
    "keypoints": convert_keypoints,
}
"""Condition -> (its source, crop and size of the image) -> content of its file, and whether it was repaired."""


def read_image(condition: str, file: Any) -> np.ndarray:
    """Read the raw form of a mask or sketch."""
    if isinstance(file, Path):
        return CONDITIONS[condition].read(file).raw
    return CONDITIONS[condition].read(open_image(content_of(file), name_of(file)), name=name_of(file)).raw


def unchanged(file: Any, mode: str, raw: np.ndarray) -> bytes | None:
    """Return the content of a mask or sketch if it is the canonical form of `raw` already."""
    if isinstance(file, Path) and not file.is_file():
        return None
    content = content_of(file)
    try:
        with Image.open(io.BytesIO(content)) as image:
            if image.format != "PNG" or image.mode != mode or not np.array_equal(np.asarray(image), raw):
                return None
            ours = mode != "P" or (image.getpalette("RGB") or [])[: PALETTE.size] == PALETTE.ravel().tolist()
            return content if ours else None
    except OSError:  # an array, not an image
        return None


def crop(raw: np.ndarray, box: Box, size: tuple[int, int], name: str) -> np.ndarray:
    """Crop a mask or sketch [H, W] like its image of `size` (width, height)."""
    (width, height), (high, wide) = size, raw.shape
    check_aspect((high, wide), (height, width), name)
    if box is None:
        return raw
    left, top, side = round(box[0] * wide / width), round(box[1] * high / height), (box[2] - box[0]) * wide / width
    return np.ascontiguousarray(raw[top : top + round(side), left : left + round(side)])
