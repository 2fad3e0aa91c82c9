"""The sketch condition: dark lines on white paper.

A clean drawing is returned unchanged, byte for byte. Inverted, faint, photographed or transparent drawings are
converted to that form with a note. Images that are not drawings are rejected, not thresholded.
"""

from __future__ import annotations

import numpy as np
from PIL import Image

from likeness.conditions.augment import augment_lines
from likeness.conditions.base import ARRAY_SUFFIXES, IMAGE_SUFFIXES, Condition, Reading, Source, describe
from likeness.conditions.images import (
    TRANSPARENT,
    WIDE,
    check_aspect,
    check_size,
    existing_path,
    load_array,
    open_image,
    png_bytes,
    to_8_bit,
)
from likeness.conditions.mask.formats import UNION
from likeness.conditions.mask.repair import nearest_colors
from likeness.types import InputError, Note

PAPER = 250
"""Smallest grey level of white paper."""


def no_sketch(text: str) -> InputError:
    """The error for input that is not a sketch."""
    return InputError(text, kind="no-sketch")


def extraction(name: str) -> str:
    """How to get the conditions of a photograph."""
    return f"`likeness extract {name} --out DIR` makes the sketch of a photograph"


def read(source: Source, *, name: str = "") -> Reading:
    """Read a drawing as lines, uint8 [H, W], 0 (stroke) to 255 (paper).

    The source is a path (image, .npy, .npz), a PIL image, or an array [H, W] or [H, W, 3 or 4], uint8, bool or float in
    [0, 1]; `name` replaces the path in messages. Raises `InputError` for a photograph, a mask, or a blank image.
    """
    name = name or describe(source)
    if not isinstance(source, np.ndarray | Image.Image):
        path = existing_path(source)
        if path.suffix.lower() in ARRAY_SUFFIXES:
            source = load_array(path, name)
    pixels = _array_pixels(source, name) if isinstance(source, np.ndarray) else _image_pixels(open_image(source, name))
    notes: list[Note] = []
    scheme = "drawing"
    if pixels.ndim == 3 and pixels.shape[2] == 4:
        pixels, transparent = _on_white(pixels)
        if transparent:
            scheme = "drawing on a transparent background"
            notes.append(Note("transparency", "the transparent background was replaced with white"))
    if pixels.ndim == 3:
        _reject_mask(pixels, name)
        grey = np.asarray(Image.fromarray(pixels).convert("L"))
        colorfulness = np.ptp(pixels.astype(np.int16), axis=2)
    else:
        grey, colorfulness = pixels, np.zeros(pixels.shape, np.int16)
        if grey.max() < 19 and len(np.unique(grey)) > 2:
            raise no_sketch(f"{name} has small numbers like a class mask: pass it as --mask")
    if int(grey.max()) - int(grey.min()) < 16:
        raise InputError(f"the sketch is blank: {name} has a single tone; draw dark lines on white", kind="blank")
    if np.median(grey) < 128:
        grey = 255 - grey
        scheme = "inverted " + scheme
        notes.append(Note("inverted-sketch", "light lines on a dark background were inverted"))
    lines, cleaned = _clean(grey, colorfulness, name)
    if cleaned:
        text = "the paper was made white and the lines dark (uneven light, off-white paper or faint lines)"
        notes.append(Note("uneven-paper", text))
        scheme += ", uneven or faint"
    return Reading(raw=lines, scheme=scheme, notes=tuple(notes))


def _image_pixels(image: Image.Image) -> np.ndarray:
    """uint8 [H, W], [H, W, 3] or [H, W, 4]."""
    if image.mode in WIDE:
        image = to_8_bit(image)
    if image.mode in ("1", "L"):
        return np.asarray(image.convert("L"))
    transparent = image.mode in TRANSPARENT or "transparency" in image.info
    return np.asarray(image.convert("RGBA" if transparent else "RGB"))


def _array_pixels(array: np.ndarray, name: str) -> np.ndarray:
    """uint8 [H, W], [H, W, 3] or [H, W, 4]."""
    if array.ndim == 3 and 1 in (array.shape[0], array.shape[2]):
        array = array[0] if array.shape[0] == 1 else array[..., 0]  # [1, H, W] or [H, W, 1] -> [H, W]
    if array.ndim not in (2, 3) or (array.ndim == 3 and array.shape[2] not in (3, 4)) or not array.size:
        raise no_sketch(f"{name} has shape {list(array.shape)}: a sketch is [H, W], [H, W, 3] or [H, W, 4]")
    check_size(array.shape[1], array.shape[0], name)
    if array.dtype == bool:
        return array.astype(np.uint8) * 255
    if np.issubdtype(array.dtype, np.floating):
        if not np.isfinite(array).all() or array.min() < 0 or array.max() > 1:
            raise no_sketch(f"{name} has values from {array.min()} to {array.max()}: fractions must be in [0, 1]")
        return np.rint(array * 255).astype(np.uint8)
    if not np.issubdtype(array.dtype, np.integer) or array.min() < 0 or array.max() > 255:
        raise no_sketch(f"{name} is not an image: a sketch has integers from 0 to 255 or fractions in [0, 1]")
    return array.astype(np.uint8)


def _on_white(pixels: np.ndarray) -> tuple[np.ndarray, bool]:
    """Composite uint8 [H, W, 4] on white: uint8 [H, W, 3], and whether any pixel was transparent."""
    alpha = pixels[..., 3:].astype(np.float32) / 255
    if (alpha == 1).all():
        return pixels[..., :3], False
    # Light lines on a transparent background would vanish on white: invert them.
    visible = pixels[pixels[..., 3] > 127][:, :3]
    light = len(visible) and np.median(visible) > 160 and (alpha < 0.5).mean() > 0.3
    color = 255 - pixels[..., :3].astype(np.float32) if light else pixels[..., :3].astype(np.float32)
    return np.rint(color * alpha + 255 * (1 - alpha)).astype(np.uint8), True


def _reject_mask(rgb: np.ndarray, name: str) -> None:
    for rows, distance in nearest_colors(rgb, UNION, UNION[:, ::-1]):
        exact = (distance == 0) & (np.ptp(rgb, axis=2) > 0)
        if exact.mean() > 0.1 and len(np.unique(rows[exact])) >= 2:
            raise no_sketch(f"{name} looks like a mask (flat class colors): pass it as --mask")


def _clean(grey: np.ndarray, colorfulness: np.ndarray, name: str) -> tuple[np.ndarray, bool]:
    """Make the paper white and the strokes dark; also return whether that changed anything.

    The paper is estimated as the large-scale upper envelope (a grey closing, then a blur) and divided out. Ink above
    its noise is stretched until its darkest percent is black. Raises `InputError` without paper or ink.
    """
    from scipy import ndimage

    if np.median(grey) >= PAPER and (grey >= PAPER).mean() > 0.5 and np.percentile(grey, 0.5) <= 110:
        if np.mean(colorfulness[grey < 200] > 96) > 0.5 and (grey < 200).mean() > 0.3:
            raise no_sketch(f"{name} is a color image, not a sketch: {extraction(name)}")
        return np.ascontiguousarray(grey), False
    window = max(9, min(grey.shape) // 12)
    # The envelope is smooth and a large closing is slow: close a reduced copy.
    step = max(1, min(grey.shape) // 128)
    padded = np.pad(grey, ((0, -grey.shape[0] % step), (0, -grey.shape[1] % step)), mode="edge").astype(np.float32)
    cells = padded.reshape(padded.shape[0] // step, step, padded.shape[1] // step, step).max(axis=(1, 3))
    size = max(3, window // step)
    paper = ndimage.gaussian_filter(ndimage.grey_closing(cells, size=(size, size)), size / 2)
    low, high = np.percentile(paper, (2, 98))
    zoomed = np.asarray(Image.fromarray(paper).resize(padded.shape[::-1], Image.Resampling.BILINEAR))
    ground = np.maximum(zoomed[: grey.shape[0], : grey.shape[1]], 1)
    ink = np.clip(1 - grey / ground, 0, 1)
    noise = float(np.median(ink)) + 3 * 1.4826 * float(np.median(np.abs(ink - np.median(ink)))) + 0.01
    inked = ink > max(noise, 0.04)
    # A shadow on paper rarely halves the light, and paper grain stays below 0.1. Photographs nearly always exceed one.
    if low < 0.55 * high or noise > 0.18 or inked.mean() > 0.45 or (colorfulness > 60).mean() > 0.15:
        raise no_sketch(f"{name} has continuous tones and is not a sketch: {extraction(name)}")
    if inked.mean() < 0.0005 or ink.max() < 0.06:
        raise InputError(f"the sketch is blank: {name} has no lines; draw dark lines on white", kind="blank")
    dark = float(np.percentile(ink[inked], 95))
    stretched = np.clip((ink - noise) / max(dark - noise, 0.02), 0, 1)
    return np.rint(255 * (1 - stretched)).astype(np.uint8), True


def resize(raw: np.ndarray, height: int, width: int) -> np.ndarray:
    """Resize lines, uint8 [H, W]. Raises `InputError` if the aspect ratio would change by more than 1 %.

    Shrinking averages areas, which fades lines thinner than a cell. The ink is then multiplied by one factor, at most
    the shrinking factor, that restores its 95th percentile over pixels with ink. Enlarging is bicubic.
    """
    check_aspect(raw.shape[:2], (height, width), "sketch")
    if raw.shape == (height, width):
        return raw.copy()
    ratio = max(raw.shape[0] / height, raw.shape[1] / width)
    if ratio <= 1:
        return np.asarray(Image.fromarray(raw).resize((width, height), Image.Resampling.BICUBIC))
    ink = 255 - raw
    small = np.asarray(Image.fromarray(ink).resize((width, height), Image.Resampling.BOX)).astype(np.float32)
    if (ink > 32).any() and (small > 8).any():
        wanted = float(np.percentile(ink[ink > 32], 95))
        small = np.clip(small * np.clip(wanted / np.percentile(small[small > 8], 95), 1, ratio), 0, 255)
    return 255 - np.rint(small).astype(np.uint8)


def flip(raw: np.ndarray) -> np.ndarray:
    """Mirror lines horizontally."""
    return np.ascontiguousarray(raw[:, ::-1])


def render(raw: np.ndarray, height: int, width: int) -> np.ndarray:
    """Render lines as grey with three equal channels, uint8 [height, width, 3]."""
    return np.repeat(resize(raw, height, width)[..., None], 3, axis=2)


SKETCH = Condition(
    name="sketch",
    raw="lines",
    folder="sketches",
    suffix=".png",
    input_suffixes=IMAGE_SUFFIXES + ARRAY_SUFFIXES,
    repairable=frozenset({"inverted-sketch"}),
    read=read,
    resize=resize,
    flip=flip,
    augment=augment_lines,
    render=render,
    encode=lambda raw: png_bytes(Image.fromarray(raw)),
)
