"""The sketch condition: dark lines on white paper.

A clean drawing passes through untouched, byte for byte. Inverted, faint, photographed or transparent drawings are
brought to that form and a note says so; pictures that are no drawings are refused with a sentence, not thresholded.
"""

from __future__ import annotations

import os

import numpy as np
from PIL import Image

from likeness.conditions.base import Condition, Reading, Source
from likeness.conditions.mask_repair import nearest_colours
from likeness.conditions.mask_schemes import UNION
from likeness.conditions.pictures import (
    LEAST_SIDE,
    TRANSPARENT,
    check_aspect,
    describe,
    existing_path,
    load_array,
    open_picture,
)
from likeness.conditions.vary import vary_lines
from likeness.types import InputError, Note

PAPER = 250
"""Grey level from which paper counts as white."""


def read(source: Source) -> Reading:
    """Lines from a drawing.

    Args:
        source: a path (picture, .npy, .npz), a PIL picture, or an array [H, W] or [H, W, 3 or 4], uint8, bool or float
            in [0, 1].

    Returns:
        raw uint8 [H, W], 0 stroke to 255 paper.

    Raises:
        InputError: a photograph, a mask, a blank sheet, or an unreadable file.
    """
    where = describe(source)
    if isinstance(source, str | os.PathLike):
        path = existing_path(source)
        if path.suffix.lower() in (".npy", ".npz"):
            source = load_array(path)
    pixels = _array_pixels(source, where) if isinstance(source, np.ndarray) else _picture_pixels(open_picture(source))
    notes: list[Note] = []
    scheme = "drawing"
    if pixels.ndim == 3 and pixels.shape[2] == 4:
        pixels, transparent = _on_white(pixels)
        if transparent:
            scheme = "drawing on a transparent ground"
            notes.append(Note("transparency", "the transparent ground was laid on white"))
    if pixels.ndim == 3:
        _refuse_mask(pixels, where)
        grey = np.asarray(Image.fromarray(pixels).convert("L"))
        colourful = np.ptp(pixels.astype(np.int16), axis=2)
    else:
        grey, colourful = pixels, np.zeros(pixels.shape, np.int16)
        if grey.max() < 19 and len(np.unique(grey)) > 2:
            raise InputError(f"{where} holds small numbers like a class mask: give it as --mask", kind="no-sketch")
    if int(grey.max()) - int(grey.min()) < 16:
        raise InputError(f"the sketch is blank: all of {where} is one tone; draw dark lines on white", kind="blank")
    if np.median(grey) < 128:
        grey = 255 - grey
        scheme = "inverted " + scheme
        notes.append(Note("inverted-sketch", "light lines on a dark ground were inverted"))
    lines, changed = _clean(grey, colourful, where)
    if changed:
        notes.append(Note("faint-sketch", changed))
        scheme += ", uneven or faint"
    return Reading(raw=lines, scheme=scheme, notes=tuple(notes))


def _picture_pixels(picture: Image.Image) -> np.ndarray:
    """uint8 [H, W], [H, W, 3] or [H, W, 4]."""
    if picture.mode in ("I;16", "I;16B", "I;16L", "I"):
        values = np.asarray(picture).astype(np.float64)
        return (values / (257.0 if values.max() > 255 else 1.0)).clip(0, 255).astype(np.uint8)
    if picture.mode in ("1", "L"):
        return np.asarray(picture.convert("L"))
    if picture.mode in TRANSPARENT or "transparency" in picture.info:
        return np.asarray(picture.convert("RGBA"))
    return np.asarray(picture.convert("RGB"))


def _array_pixels(array: np.ndarray, where: str) -> np.ndarray:
    if array.ndim == 3 and 1 in (array.shape[0], array.shape[2]):
        array = array[0] if array.shape[0] == 1 else array[..., 0]
    if array.ndim not in (2, 3) or (array.ndim == 3 and array.shape[2] not in (3, 4)) or not array.size:
        raise InputError(
            f"{where} has the shape {list(array.shape)}: a sketch is [H, W], [H, W, 3] or [H, W, 4]", kind="no-sketch"
        )
    if min(array.shape[:2]) < LEAST_SIDE:
        raise InputError(
            f"{where} is {array.shape[1]}x{array.shape[0]} pixels: too small to hold a face", kind="corrupt-file"
        )
    if array.dtype == bool:
        return array.astype(np.uint8) * 255
    if np.issubdtype(array.dtype, np.floating):
        if not np.isfinite(array).all() or array.min() < 0 or array.max() > 1:
            raise InputError(
                f"{where} has values from {array.min()} to {array.max()}: fractions must lie in [0, 1]",
                kind="no-sketch",
            )
        return np.rint(array * 255).astype(np.uint8)
    if not np.issubdtype(array.dtype, np.integer) or array.min() < 0 or array.max() > 255:
        raise InputError(
            f"{where} is no picture: a sketch has whole numbers from 0 to 255 or fractions in [0, 1]", kind="no-sketch"
        )
    return array.astype(np.uint8)


def _on_white(pixels: np.ndarray) -> tuple[np.ndarray, bool]:
    alpha = pixels[..., 3:].astype(np.float32) / 255
    if (alpha == 1).all():
        return pixels[..., :3], False
    # Light lines on nothing would vanish on white; on nothing they can only have been meant to be seen.
    visible = pixels[pixels[..., 3] > 127][:, :3]
    light = len(visible) and np.median(visible) > 160 and (alpha < 0.5).mean() > 0.3
    colour = 255 - pixels[..., :3].astype(np.float32) if light else pixels[..., :3].astype(np.float32)
    return np.rint(colour * alpha + 255 * (1 - alpha)).astype(np.uint8), True


def _refuse_mask(rgb: np.ndarray, where: str) -> None:
    for rows, distance in nearest_colours(rgb, UNION, UNION[:, ::-1]):
        exact = (distance == 0) & (np.ptp(rgb, axis=2) > 0)
        if exact.mean() > 0.1 and len(np.unique(rows[exact])) >= 2:
            raise InputError(f"{where} looks like a mask (flat class colours): give it as --mask", kind="no-sketch")


def _clean(grey: np.ndarray, colourful: np.ndarray, where: str) -> tuple[np.ndarray, str]:
    """White paper and dark strokes, and a sentence on what that took; "" where nothing was changed.

    Paper is estimated as the large-scale upper envelope (a grey closing, then a blur) and divided out; ink beyond the
    noise of the paper is stretched until its darkest percent is black.

    Raises:
        InputError: the envelope is no sheet of paper, or nothing is drawn on it.
    """
    from scipy import ndimage

    if np.median(grey) >= PAPER and (grey >= PAPER).mean() > 0.5 and np.percentile(grey, 0.5) <= 110:
        if np.mean(colourful[grey < 200] > 96) > 0.5 and (grey < 200).mean() > 0.3:
            raise InputError(
                f"{where} is a coloured picture, no sketch: extract a sketch from it first", kind="no-sketch"
            )
        return np.ascontiguousarray(grey), ""
    window = max(9, min(grey.shape) // 12)
    # Closing on a small copy: the envelope is smooth, and a large window over every pixel is slow.
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
    # A shadow over paper seldom takes half the light, and the grain of paper stays under a tenth; of photographs, one
    # or the other is nearly always untrue.
    photo = low < 0.55 * high or noise > 0.18 or inked.mean() > 0.45 or (colourful > 60).mean() > 0.15
    if photo:
        raise InputError(
            f"{where} is a picture with continuous tones, no sketch: extract a sketch from it first, or see what it is "
            "with `likeness inspect`",
            kind="no-sketch",
        )
    if inked.mean() < 0.0005 or ink.max() < 0.06:
        raise InputError(f"the sketch is blank: nothing is drawn on {where}; draw dark lines on white", kind="blank")
    dark = float(np.percentile(ink[inked], 95))
    stretched = np.clip((ink - noise) / max(dark - noise, 0.02), 0, 1)
    sentence = "the paper was made white and the lines dark (uneven light, off-white paper or faint lines)"
    return np.rint(255 * (1 - stretched)).astype(np.uint8), sentence


def resize(raw: np.ndarray, height: int, width: int) -> np.ndarray:
    """Lines at another size.

    Shrinking averages areas, which fades lines thinner than a cell; the ink is then strengthened by one factor until
    its 95th percentile (over pixels with any stroke) is what it was, and never more than the shrinking itself divided
    it by. Growing interpolates bicubically.

    Args:
        raw: uint8 [H, W].

    Raises:
        InputError: the aspect ratio would change by more than 1 %.
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
        gain = np.clip(wanted / np.percentile(small[small > 8], 95), 1, ratio)
        small = np.clip(small * gain, 0, 255)
    return 255 - np.rint(small).astype(np.uint8)


def flip(raw: np.ndarray) -> np.ndarray:
    """Mirror lines left to right."""
    return np.ascontiguousarray(raw[:, ::-1])


def render(raw: np.ndarray, height: int, width: int) -> np.ndarray:
    """Lines as a grey picture in three equal channels, uint8 [height, width, 3]."""
    return np.repeat(resize(raw, height, width)[..., None], 3, axis=2)


SKETCH = Condition(name="sketch", raw="lines", read=read, resize=resize, flip=flip, vary=vary_lines, render=render)
