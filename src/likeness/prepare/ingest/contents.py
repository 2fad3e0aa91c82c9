"""The files of a face as a prepared folder has them: pictures cropped and resized, conditions canonical.

What needs no change is copied bit for bit, with whatever the file says about itself. Masks and sketches keep their own
size and are only cut where their picture is.
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

KEPT = {"PNG": ".png", "JPEG": ".jpg", "WEBP": ".webp"}
"""Formats that are copied as they are where a picture needs no change -> suffix."""

ORIENTATION = 0x0112
"""EXIF's tag; 1 is upright."""

Box = tuple[int, int, int, int] | None
"""Left, top, right and bottom of the part of a picture to keep; None keeps all."""


@dataclass(frozen=True, kw_only=True)
class Frame:
    """What is done with every picture."""

    size: int | None
    """Pixels a side; None leaves it as it is."""
    crop: bool
    """Whether to take the middle of pictures that are not square."""


def open_face(face: Face, frame: Frame) -> tuple[Image.Image, Box, bytes, str]:
    """The picture, the part of it to keep, and, where it needs no change, its content with the suffix ("" otherwise).

    Raises:
        InputError: it cannot be read, or has a shape that is not asked for.
    """
    content, name = content_of(face.picture), name_of(face.picture)
    image = open_image(content, name)
    width, height = image.size
    if face.canvas is not None and image.size != face.canvas:
        raise InputError(f"{name} is {width}x{height}, not {face.canvas[0]}x{face.canvas[1]} as its layout has it")
    box = face.box
    if box is None and width != height:
        if not frame.crop:
            raise InputError(
                f"{name} is {width}x{height}, not square: --crop takes its middle, `likeness prepare align` its face"
            )
        side, left, top = min(width, height), max(0, width - height) // 2, max(0, height - width) // 2
        box = (left, top, left + side, top + side)
    with Image.open(io.BytesIO(content)) as head:
        plain = head.mode == "RGB" and head.getexif().get(ORIENTATION, 1) == 1 and getattr(head, "n_frames", 1) == 1
        suffix = KEPT.get(head.format or "", "") if plain and box is None and frame.size in (None, width) else ""
    return image, box, content, suffix


def framed(image: Image.Image, box: Box, size: int | None) -> Image.Image:
    """A picture cropped, resized, RGB; pixels only, no profile or comment of the source."""
    image = image.convert("RGB")
    image = image if box is None else image.crop(box)
    if size is not None and image.size != (size, size):
        image = image.resize((size, size), Image.Resampling.LANCZOS)
    return Image.fromarray(np.asarray(image))


def mask_content(source: Any, box: Box, size: tuple[int, int]) -> tuple[bytes, bool]:
    """A mask as palette PNG, and whether its sides had to be exchanged."""
    if isinstance(source, Mapping):
        parts = {index: open_image(content_of(file), name_of(file)) for index, file in source.items()}
        labels = paint_parts(parts, f"the mask of {name_of(next(iter(source.values())))}").raw
    else:
        labels = read_picture("mask", source)
    labels = cut(labels, box, size, "mask")
    right = swap_classes(labels, swapped_pairs(measure(labels)))
    same = None if isinstance(source, Mapping) else unchanged(source, "P", right)
    return same or png_bytes(mask_image(right)), not np.array_equal(right, labels)


def sketch_content(source: Any, box: Box, size: tuple[int, int]) -> tuple[bytes, bool]:
    """A sketch as grey PNG."""
    lines = cut(read_picture("sketch", source), box, size, "sketch")
    return unchanged(source, "L", lines) or png_bytes(Image.fromarray(lines)), False


def keypoints_content(source: Any, box: Box, size: tuple[int, int]) -> tuple[bytes, bool]:
    """Keypoints as JSON: as they are, or as shares of the part that is kept."""
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


CONTENTS: dict[str, Callable[[Any, Box, tuple[int, int]], tuple[bytes, bool]]] = {
    "mask": mask_content,
    "sketch": sketch_content,
    "keypoints": keypoints_content,
}
"""Condition -> (its source, the part of the picture that is kept, size of the picture) -> content of its file, and
whether it was repaired."""


def read_picture(condition: str, file: Any) -> np.ndarray:
    """The raw form of a mask or sketch."""
    if isinstance(file, Path):
        return CONDITIONS[condition].read(file).raw
    return CONDITIONS[condition].read(open_image(content_of(file), name_of(file)), name=name_of(file)).raw


def unchanged(file: Any, mode: str, raw: np.ndarray) -> bytes | None:
    """The content of a mask or sketch, where it is the canonical form of `raw` already; None where it is not."""
    if isinstance(file, Path) and not file.is_file():
        return None
    content = content_of(file)
    try:
        with Image.open(io.BytesIO(content)) as picture:
            if picture.format != "PNG" or picture.mode != mode or not np.array_equal(np.asarray(picture), raw):
                return None
            ours = mode != "P" or (picture.getpalette("RGB") or [])[: PALETTE.size] == PALETTE.ravel().tolist()
            return content if ours else None
    except OSError:  # no picture: an array
        return None


def cut(raw: np.ndarray, box: Box, size: tuple[int, int], name: str) -> np.ndarray:
    """The part of a mask or sketch [H, W] that belongs to the part `box` of a picture of `size` (width, height)."""
    (width, height), (high, wide) = size, raw.shape
    try:
        check_aspect((high, wide), (height, width), name)
    except InputError as error:
        raise InputError(f"the {name} is {wide}x{high}, its picture {width}x{height}") from error
    if box is None:
        return raw
    left, top, side = round(box[0] * wide / width), round(box[1] * high / height), (box[2] - box[0]) * wide / width
    return np.ascontiguousarray(raw[top : top + round(side), left : left + round(side)])
