"""Convert the files of a face for a prepared folder: images cropped and resized, conditions in canonical form.

Files in canonical form are copied byte by byte. Masks and sketches keep their size and are cropped with their image.
"""

from __future__ import annotations

import io
import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
from PIL import Image

from likeness.conditions import CONDITIONS
from likeness.conditions.base import ARRAY_SUFFIXES, Condition
from likeness.conditions.images import check_aspect, open_image, read_rgb
from likeness.conditions.keypoints import TEXT_SUFFIXES
from likeness.conditions.mask import paint_parts, swap_classes
from likeness.conditions.mask.classes import PALETTE
from likeness.conditions.mask.geometry import measure, swapped_pairs
from likeness.files import write_whole
from likeness.prepare.ingest.faces import SourceFace
from likeness.prepare.ingest.source import SourceFile
from likeness.types import InputError

COPIED = {"PNG": ".png", "JPEG": ".jpg", "WEBP": ".webp"}
"""Format of images that are copied if they are unchanged -> suffix."""

ORIENTATION = 0x0112
"""EXIF tag; 1 is upright."""

Box = tuple[int, int, int, int] | None
"""Left, top, right and bottom of the crop; None keeps the whole image."""


def open_face(face: SourceFace, size: int | None, crop: bool) -> tuple[Image.Image, Box, bytes, str]:
    """Read the image of a face. `size` and `crop` are as in `ingest`.

    Returns:
        The image, its crop, its content, and the suffix under which the content can be copied, or "" if it must change.

    Raises:
        InputError: it cannot be read, or has the wrong size.
    """
    content, name = face.image.content(), face.image.name
    image = read_rgb(content, name)
    width, height = image.size
    if face.image_size is not None and image.size != face.image_size:
        expected = "{}x{}".format(*face.image_size)
        raise InputError(f"{name} is {width}x{height}, not {expected} as expected in this dataset format")
    box = face.box
    if box is None and width != height:
        if not crop:
            way = "crop the center with --crop or the face with `likeness prepare align`"
            raise InputError(f"{name} is {width}x{height}, not square: {way}")
        box = center_square(width, height)
    suffix = ""
    if box is None and size in (None, width):
        with Image.open(io.BytesIO(content)) as head:
            plain = head.mode == "RGB" and not {"icc_profile", "transparency"} & head.info.keys()
            try:
                plain = plain and head.getexif().get(ORIENTATION, 1) == 1 and getattr(head, "n_frames", 1) == 1
            except Exception:  # damaged: the image is written again
                plain = False
            suffix = COPIED.get(head.format or "", "") if plain else ""
    return image, box, content, suffix


def center_square(width: int, height: int) -> tuple[int, int, int, int]:
    """Return the largest square in the center, as (left, top, right, bottom)."""
    side, left, top = min(width, height), max(0, width - height) // 2, max(0, height - width) // 2
    return left, top, left + side, top + side


def crop_and_resize(image: Image.Image, box: Box, size: int | None) -> Image.Image:
    """Return an RGB image without metadata of the source."""
    image = image.crop(box)
    if size is not None and image.size != (size, size):
        image = image.resize((size, size), Image.Resampling.LANCZOS)
    return Image.fromarray(np.asarray(image))


def convert_condition(name: str, source: Any, box: Box, size: tuple[int, int]) -> tuple[bytes, bool]:
    """Return the canonical file of a condition, and whether the sides of a mask were swapped.

    `source` is as in `SourceFace.conditions`; `box` is the crop of the image, `size` its (width, height) in pixels.

    Raises:
        InputError: it cannot be read, or has another aspect ratio than the image.
    """
    condition = CONDITIONS[name]
    if isinstance(source, SourceFile) and source.path is None and source.suffix in ARRAY_SUFFIXES + TEXT_SUFFIXES:
        with TemporaryDirectory() as folder:  # its reader needs a file with this suffix
            path = Path(folder) / f"unpacked{source.suffix}"
            write_whole(path, source.content())
            return convert_condition(name, replace(source, path=path), box, size)
    if condition.raw == "points":
        return convert_points(condition, source, box, size), False
    if isinstance(source, Mapping):
        parts = {index: open_image(file.content(), file.name) for index, file in source.items()}
        names = {index: file.name for index, file in source.items()}
        raw = paint_parts(parts, f"the mask of {next(iter(names.values()))}", names).raw
    elif source.path:
        raw = condition.read(source.path, name=source.name).raw
    else:
        raw = condition.read(open_image(source.content(), source.name), name=source.name).raw
    raw = crop_raw(raw, box, size, name)
    fixed = swap_classes(raw, swapped_pairs(measure(raw))) if condition.raw == "labels" else raw
    content = None if isinstance(source, Mapping) else source.content()
    canonical = content is not None and is_canonical(content, condition, fixed)
    return content if canonical else condition.encode(fixed), not np.array_equal(fixed, raw)


def convert_points(condition: Condition, source: Any, box: Box, size: tuple[int, int]) -> bytes:
    """Return keypoints as JSON: unchanged, or in fractions of the crop."""
    document = source if isinstance(source, Mapping) else source.path or source.json()
    name = "" if isinstance(source, Mapping) else source.name
    points = condition.read(dict(document) if isinstance(document, Mapping) else document, name=name).raw
    if box is not None:
        left, top, right, bottom = box
        return condition.encode((points * size - (left, top)) / (right - left, bottom - top))
    if isinstance(document, dict):
        return json.dumps(document).encode()
    return source.content() if source.suffix == ".json" else condition.encode(points)


def is_canonical(content: bytes, condition: Condition, raw: np.ndarray) -> bool:
    """Return whether the content of a mask or sketch is the canonical form of `raw`."""
    mode = "P" if condition.raw == "labels" else "L"
    try:
        with Image.open(io.BytesIO(content)) as image:
            palette = (image.getpalette("RGB") or [])[: PALETTE.size] if mode == "P" else PALETTE.ravel().tolist()
            same = image.format == "PNG" and image.mode == mode and np.array_equal(np.asarray(image), raw)
            return same and palette == PALETTE.ravel().tolist()
    except OSError:  # an array, not an image
        return False


def crop_raw(raw: np.ndarray, box: Box, size: tuple[int, int], name: str) -> np.ndarray:
    """Crop a mask or sketch [H, W] like its image of `size` (width, height)."""
    (width, height), (high, wide) = size, raw.shape
    check_aspect((high, wide), (height, width), name)
    if box is None:
        return raw
    left, top, side = round(box[0] * wide / width), round(box[1] * high / height), (box[2] - box[0]) * wide / width
    return np.ascontiguousarray(raw[top : top + round(side), left : left + round(side)])
