"""The mask condition: one class a pixel, recognised in every form in which face masks circulate.

`read` turns a path, picture, array or folder of part files into canonical labels and says what it took it for; nothing
is guessed in silence. Resizing takes the majority of each cell and never averages class numbers.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from PIL import Image

from likeness.conditions.base import Condition, Reading, Source
from likeness.conditions.classes import CLASS_INDEX, CLASSES, FLIP_PAIRS, PALETTE, PART_ALIASES
from likeness.conditions.mask_schemes import (
    HOW,
    exchange,
    finish,
    read_colours,
    read_numbers,
    read_one_hot,
    read_palette,
    side_notes,
)
from likeness.conditions.pictures import (
    LEAST_SIDE,
    TRANSPARENT,
    check_aspect,
    describe,
    existing_path,
    load_array,
    open_picture,
)
from likeness.conditions.vary import vary_labels
from likeness.types import InputError, Note

PART_NAMES: dict[str, int] = {
    **{name: index for name, index in CLASS_INDEX.items() if index},
    **{alias: CLASS_INDEX[name] for alias, name in PART_ALIASES.items()},
}
"""Last word of a part file's name -> class."""


def read(source: Source, *, order: str | None = None) -> Reading:
    """Canonical labels from what a user brings.

    Args:
        source: a path (picture, .npy, .npz, or a folder of part files), a PIL picture, or an array: class numbers
            [H, W], colours [H, W, 3 or 4], or one-hot [19, H, W] or [H, W, 19].
        order: name of the class order (see `classes.ORDERS`) where class numbers alone do not tell.

    Returns:
        raw uint8 [H, W], values 0 to 18.

    Raises:
        InputError: what was found instead of a mask, and what to do.
    """
    where = describe(source)
    if isinstance(source, np.ndarray):
        return _read_array(source, where, order)
    if isinstance(source, str | os.PathLike):
        path = existing_path(source)
        if path.is_dir():
            return _read_parts(path)
        if path.suffix.lower() in (".npy", ".npz"):
            return _read_array(load_array(path), where, order)
        return _read_picture(open_picture(path), where, order, jpeg=path.suffix.lower() in (".jpg", ".jpeg", ".jfif"))
    return _read_picture(open_picture(source), where, order, jpeg=source.format == "JPEG")


def _read_picture(picture: Image.Image, where: str, order: str | None, jpeg: bool) -> Reading:
    if picture.mode == "P":
        table = np.zeros((256, 3), dtype=np.uint8)
        colours = np.array(picture.getpalette("RGB") or [], dtype=np.uint8).reshape(-1, 3)[:256]
        table[: len(colours)] = colours
        reading = read_palette(np.asarray(picture), table, where, order)
        return (
            reading if reading is not None else read_colours(np.asarray(picture.convert("RGB")), "palette PNG", where)
        )
    if picture.mode == "1":
        raise InputError(
            f"{where} is black and white: a mask needs a class for every pixel; is it a sketch (--sketch)?",
            kind="off-palette",
        )
    if picture.mode == "LA" and picture.getchannel(1).getextrema() == (255, 255):
        picture = picture.getchannel(0)
    if picture.mode in ("L", "I", "I;16", "I;16B", "I;16L"):
        values = np.asarray(picture)
        if jpeg and 0 < values.max() < 2 * len(CLASSES):
            raise InputError(
                f"{where} holds class numbers in a JPEG, which changes them: save it as PNG", kind="off-palette"
            )
        return _read_array(values, where, order)
    if picture.mode in TRANSPARENT:
        return _read_array(np.asarray(picture.convert("RGBA")), where, order)
    return _read_array(np.asarray(picture.convert("RGB")), where, order)


def _read_array(array: np.ndarray, where: str, order: str | None) -> Reading:
    if array.size == 0 or array.ndim not in (2, 3):
        raise InputError(
            f"{where} has the shape {list(array.shape)}: a mask is [H, W], [H, W, 3] or one-hot [19, H, W]",
            kind="off-palette",
        )
    if array.dtype == bool:
        array = array.astype(np.uint8)
    if not np.issubdtype(array.dtype, np.number) or np.iscomplexobj(array):
        raise InputError(f"{where} holds {array.dtype} values: a mask needs whole numbers", kind="off-palette")
    if np.issubdtype(array.dtype, np.floating):
        if not np.isfinite(array).all() or (array != np.round(array)).any():
            raise InputError(
                f"{where} holds fractions: a mask needs whole class numbers, so take the argmax first",
                kind="off-palette",
            )
        array = array.astype(np.int64)
    if array.ndim == 3 and 1 in (array.shape[0], array.shape[2]):
        array = array[0] if array.shape[0] == 1 else array[..., 0]
    planes = array.ndim == 3 and len(CLASSES) in (array.shape[0], array.shape[2])
    if array.ndim == 3 and not planes and array.shape[2] not in (3, 4) and array.shape[0] in (3, 4):
        array = array.transpose(1, 2, 0)  # [3, H, W] -> [H, W, 3]
    sides = array.shape[1:] if planes and array.shape[0] == len(CLASSES) else array.shape[:2]
    if min(sides) < LEAST_SIDE:
        raise InputError(f"{where} is {sides[1]}x{sides[0]} pixels: too small to hold a face", kind="corrupt-file")
    if array.ndim == 2:
        _refuse_sketch(array, where)
        return read_numbers(array, "index mask", where, order)
    if planes:
        return read_one_hot(array, where, order)
    if array.shape[2] not in (3, 4):
        raise InputError(
            f"{where} has the shape {list(array.shape)}: a mask has 1, 3, 4 or {len(CLASSES)} channels",
            kind="off-palette",
        )
    if array.min() < 0 or array.max() > 255:
        raise InputError(
            f"{where} has colours from {array.min()} to {array.max()}: they must lie within 0 and 255",
            kind="off-palette",
        )
    rgb, kind, notes = array[..., :3].astype(np.uint8), "RGB", ()
    if array.shape[2] == 4:
        kind, alpha = "RGBA", array[..., 3]
        if not np.isin(np.unique(alpha), (0, 255)).all():
            raise InputError(f"{where} is partly transparent: flatten it without smoothing first", kind="off-palette")
        if not alpha.any():
            raise InputError(f"the mask has no face: {where} is fully transparent", kind="blank")
        if not alpha.all():
            rgb = np.where(alpha[..., None] > 0, rgb, 0).astype(np.uint8)
            notes = (Note("transparency", "transparent pixels were read as background"),)
    if np.array_equal(rgb[..., 0], rgb[..., 1]) and np.array_equal(rgb[..., 1], rgb[..., 2]):
        _refuse_sketch(rgb[..., 0], where)
        reading = read_numbers(rgb[..., 0], f"index mask stored as {kind}", where, order)
    else:
        reading = read_colours(rgb, kind, where)
    return Reading(raw=reading.raw, scheme=reading.scheme, notes=notes + reading.notes)


def _refuse_sketch(values: np.ndarray, where: str) -> None:
    if values.max() > 200 and np.median(values) > 200:
        raise InputError(
            f"{where} is mostly white, like a drawing: give it as --sketch; for a mask, {HOW}", kind="off-palette"
        )


def _read_parts(folder: Path) -> Reading:
    """A folder of `<id>_<part>.png` files of one face."""
    parts: dict[str, dict[int, Path]] = {}
    strangers = 0
    for path in sorted(folder.iterdir()):
        if path.suffix.lower() not in (".png", ".jpg", ".jpeg", ".bmp"):
            continue
        name = next((n for n in PART_NAMES if path.stem == n or path.stem.endswith("_" + n)), None)
        if name is None:
            strangers += 1
            continue
        person = path.stem[: -len(name)].rstrip("_")
        parts.setdefault(person, {})[PART_NAMES[name]] = path
    if not parts:
        raise InputError(
            f"{folder} holds no part files such as 00000_skin.png: name a mask picture or such a folder",
            kind="off-palette",
        )
    if len(parts) > 1:
        raise InputError(
            f"{folder} holds the parts of {len(parts)} faces: move those of one face into their own folder",
            kind="off-palette",
        )
    ((_, files),) = parts.items()
    reading = paint_parts(files, str(folder))
    if strangers:
        note = Note("other-files", f"{strangers} pictures in the folder are no parts of a face and were left out")
        return Reading(raw=reading.raw, scheme=reading.scheme, notes=(note, *reading.notes))
    return reading


def paint_parts(files: Mapping[int, Path | Image.Image], where: str) -> Reading:
    """One face from pictures of its parts, painted in canonical order: later classes overwrite earlier.

    Args:
        files: class -> where the part is, not black.
        where: how messages call the whole.

    Raises:
        InputError: a part cannot be read or has another size than its fellows, or no part is painted.
    """
    labels: np.ndarray | None = None
    for index, path in sorted(files.items()):
        picture = open_picture(path)
        if picture.mode in TRANSPARENT or "transparency" in picture.info:
            picture = picture.convert("RGBA")
            picture = Image.alpha_composite(Image.new("RGBA", picture.size, (0, 0, 0, 255)), picture)
        values = np.asarray(picture.convert("L"))
        if 1 < values.max() <= 127:
            raise InputError(
                f"{describe(path)} paints nothing: its values reach {values.max()}, a part is white on black",
                kind="blank",
            )
        painted = values > (127 if values.max() > 1 else 0)
        if labels is None:
            labels = np.zeros(values.shape, dtype=np.uint8)
        if painted.shape != labels.shape:
            have, want = painted.shape[::-1], labels.shape[::-1]
            raise InputError(
                f"{describe(path)} is {have[0]}x{have[1]} but its fellow parts are {want[0]}x{want[1]}",
                kind="wrong-size",
            )
        labels[painted] = index
    assert labels is not None
    return finish(labels, f"folder of {len(files)} part files", side_notes(labels), where)


def _overlap(source: int, target: int) -> np.ndarray:
    """float32 [target, source]: how much of each source pixel lies in each target cell, in source pixels."""
    scale = source / target
    cell, pixel = np.arange(target)[:, None], np.arange(source)[None]
    overlap = np.minimum((cell + 1) * scale, pixel + 1) - np.maximum(cell * scale, pixel)
    return np.clip(overlap, 0, 1).astype(np.float32)


def resize(raw: np.ndarray, height: int, width: int) -> np.ndarray:
    """Labels at another size; no label is ever blended into another.

    Growing takes the nearest pixel. Shrinking gives each cell the class that covers most of it, so that thin parts
    neither shift nor turn into specks; among equals the class at the cell's centre wins, then the higher class, which
    is the one on top.

    Args:
        raw: uint8 [H, W].

    Raises:
        InputError: the aspect ratio would change by more than 1 %.
    """
    check_aspect(raw.shape[:2], (height, width), "mask")
    if raw.shape == (height, width):
        return raw.copy()
    rows = ((np.arange(height) + 0.5) * raw.shape[0] / height).astype(np.intp)
    columns = ((np.arange(width) + 0.5) * raw.shape[1] / width).astype(np.intp)
    centre = raw[rows[:, None], columns]  # [height, width]
    if height >= raw.shape[0] and width >= raw.shape[1]:
        return centre
    down, across = _overlap(raw.shape[0], height), _overlap(raw.shape[1], width)
    area = down.sum(1).mean() * across.sum(1).mean()  # source pixels in a cell
    result, most = np.zeros_like(centre), np.full(centre.shape, -1.0, dtype=np.float32)
    for index in np.unique(raw):
        cover = down @ (raw == index).astype(np.float32) @ across.T  # [height, width]
        cover += np.where(centre == index, 2e-3 * area, 0).astype(np.float32)
        wins = cover >= most - 1e-3 * area
        result[wins] = index
        most = np.maximum(most, cover)
    return result


def flip(raw: np.ndarray) -> np.ndarray:
    """Mirror labels left to right; the person's left and right eye, brow and ear change places."""
    return exchange(np.ascontiguousarray(raw[:, ::-1]), FLIP_PAIRS)


def render(raw: np.ndarray, height: int, width: int) -> np.ndarray:
    """Labels in the CelebAMask-HQ colours, uint8 [height, width, 3]."""
    return PALETTE[resize(raw, height, width)]


MASK = Condition(name="mask", raw="labels", read=read, resize=resize, flip=flip, vary=vary_labels, render=render)
