"""Read masks: recognize class numbers, class colors, one-hot planes and part files, their class order and palette.

Colors identify the class except for left and right, on which the published palettes contradict one another: the
geometry of the face decides. Class numbers may be in another order: a mask that does not clearly fit one known order is
rejected rather than guessed.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from PIL import Image

from likeness.conditions.base import ARRAY_SUFFIXES, Reading, Source, describe
from likeness.conditions.images import (
    MINIMUM_SIDE,
    TRANSPARENT,
    WIDE,
    check_size,
    existing_path,
    load_array,
    open_image,
)
from likeness.conditions.mask.classes import (
    CLASS_INDEX,
    CLASSES,
    FLIP_PAIRS,
    PALETTE,
    PALETTES,
    order_table,
)
from likeness.conditions.mask.geometry import Geometry, broken_rules, measure, rank_orders, swapped_pairs
from likeness.conditions.mask.repair import TOLERANCE, UNKNOWN, fill_nearest, looks_blended, nearest_colors, unblend
from likeness.types import InputError, Note

UNION = np.unique(np.concatenate(list(PALETTES.values())), axis=0)
"""uint8 [20, 3], every color of the four palettes."""

PART_NAMES: dict[str, int] = {
    **{name: index for name, index in CLASS_INDEX.items() if index},
    "ear_r": CLASS_INDEX["earring"],
    "neck_l": CLASS_INDEX["necklace"],
}
"""End of a part file's name, as in CelebAMask-HQ's `<id>_ear_r.png` -> class."""

IGNORE = 255
"""Class number for pixels without a class in many data sets."""

MAX_SIDE = 2048
"""Images of twice this side or more are read at a fraction of their resolution, which saves time."""

MAX_IGNORED = 0.25
"""Largest fraction of ignored pixels."""

HOW = "save it as an index PNG (0 to 18, CelebAMask-HQ order) or in the CelebAMask-HQ colors"


def _class_of_rows(palette: np.ndarray) -> np.ndarray:
    equal = (UNION[:, None] == palette[None]).all(axis=2)  # [20, 19]
    return np.where(equal.any(axis=1), equal.argmax(axis=1), UNKNOWN).astype(np.int16)


TABLES: dict[str, np.ndarray] = {name: _class_of_rows(palette) for name, palette in PALETTES.items()}
"""Palette name -> int16 [20], the class of each row of `UNION`, `UNKNOWN` if the palette lacks that color."""


def off_palette(text: str) -> InputError:
    """The error for input that is not a mask in a known format."""
    return InputError(text, kind="off-palette")


def swap_classes(labels: np.ndarray, pairs: tuple[tuple[int, int], ...]) -> np.ndarray:
    """Swap both classes of each pair in `labels`, uint8 [H, W]."""
    table = np.arange(256, dtype=np.uint8)
    for a, b in pairs:
        table[a], table[b] = b, a
    return table[labels]


def side_notes(geometry: Geometry) -> tuple[Note, ...]:
    """Return a note for each of `swapped_pairs`."""
    notes = []
    for a, b in swapped_pairs(geometry):
        if geometry.pixels[a] and geometry.pixels[b]:
            name, place = CLASSES[a], f"left of {CLASSES[b]}"
        elif geometry.pixels[a]:
            name, place = CLASSES[a], "on the viewer's left"
        else:
            name, place = CLASSES[b], "on the viewer's right"
        text = f"{name} is {place}: the sides look swapped (the person's left is on the viewer's right)"
        notes.append(Note("swapped-sides", text))
    return tuple(notes)


def read(source: Source, *, name: str = "", full: bool = False) -> Reading:
    """Read a mask as canonical class numbers 0 to 18, uint8 [H, W].

    The source is a path (image, .npy, .npz, or a folder of part files), a PIL image, or an array: class numbers [H, W],
    colors [H, W, 3 or 4], or one-hot [19, H, W] or [H, W, 19]; `name` replaces the path in error messages. `full` reads
    images of any size at their full resolution. Raises `InputError` if it is not a mask in a known format.
    """
    name = name or describe(source)
    if isinstance(source, np.ndarray):
        return _read_array(source, name)
    if isinstance(source, Image.Image):
        return _read_image(open_image(source, name), name, full)
    path = existing_path(source)
    if path.is_dir():
        return _read_folder(path)
    if path.suffix.lower() in ARRAY_SUFFIXES:
        return _read_array(load_array(path, name), name)
    return _read_image(open_image(path, name), name, full)


def _read_image(image: Image.Image, name: str, full: bool) -> Reading:
    jpeg = image.format in ("JPEG", "MPO")
    step = 1 if full else min(max(image.size) // MAX_SIDE, min(image.size) // MINIMUM_SIDE)
    if step > 1:  # every step-th pixel: classes stay as they are
        image = image.resize((image.width // step, image.height // step), Image.Resampling.NEAREST)
    if image.mode == "P":
        colors = np.zeros((256, 3), dtype=np.uint8)
        used = np.array(image.getpalette("RGB") or [], dtype=np.uint8).reshape(-1, 3)[:256]
        colors[: len(used)] = used
        return _read_palette(np.asarray(image), colors, name)
    if image.mode == "1":
        raise off_palette(f"{name} is black and white: a mask needs a class per pixel; pass a sketch as --sketch")
    if image.mode == "LA" and image.getchannel(1).getextrema() == (255, 255):
        image = image.getchannel(0)
    if image.mode == "L" or image.mode in WIDE:
        values = np.asarray(image)
        if jpeg and 0 < values.max() < 2 * len(CLASSES):
            raise off_palette(f"{name} has class numbers in a JPEG, which changes them: save it as PNG")
        return _read_array(values, name)
    return _read_array(np.asarray(image.convert("RGBA" if image.mode in TRANSPARENT else "RGB")), name)


def _read_array(array: np.ndarray, name: str) -> Reading:
    count = len(CLASSES)
    if array.size == 0 or array.ndim not in (2, 3):
        raise off_palette(f"{name} has shape {list(array.shape)}: a mask is [H, W], [H, W, 3] or one-hot [19, H, W]")
    if array.dtype == bool:
        array = array.astype(np.uint8)
    if not np.issubdtype(array.dtype, np.number) or np.iscomplexobj(array):
        raise off_palette(f"{name} has {array.dtype} values: a mask needs integers")
    if np.issubdtype(array.dtype, np.floating):
        if not np.isfinite(array).all() or (array != np.round(array)).any():
            raise off_palette(f"{name} has fractional values: a mask needs integer classes, take the argmax first")
        array = array.astype(np.int64)
    if array.ndim == 3 and 1 in (array.shape[0], array.shape[2]):
        array = array[0] if array.shape[0] == 1 else array[..., 0]  # [1, H, W] or [H, W, 1] -> [H, W]
    one_hot = array.ndim == 3 and count in (array.shape[0], array.shape[2])
    if array.ndim == 3 and not one_hot and array.shape[2] not in (3, 4) and array.shape[0] in (3, 4):
        array = array.transpose(1, 2, 0)  # [3, H, W] -> [H, W, 3]
    height, width = array.shape[1:] if one_hot and array.shape[0] == count else array.shape[:2]
    check_size(width, height, name)
    if array.ndim == 2:
        _reject_sketch(array, name)
        return _read_numbers(array, "index mask", name)
    if one_hot:
        return _read_one_hot(array, name)
    if array.shape[2] not in (3, 4):
        raise off_palette(f"{name} has shape {list(array.shape)}: a mask has 1, 3, 4 or {count} channels")
    if array.min() < 0 or array.max() > 255:
        raise off_palette(f"{name} has colors from {array.min()} to {array.max()}: the range is 0 to 255")
    rgb, mode, notes = array[..., :3].astype(np.uint8), "RGB", ()
    if array.shape[2] == 4:
        mode, alpha = "RGBA", array[..., 3]
        if not np.isin(np.unique(alpha), (0, 255)).all():
            raise off_palette(f"{name} is partly transparent: flatten it without smoothing first")
        if not alpha.any():
            raise InputError(f"the mask has no face: {name} is fully transparent", kind="blank")
        if not alpha.all():
            rgb = np.where(alpha[..., None] > 0, rgb, 0).astype(np.uint8)
            notes = (Note("transparency", "transparent pixels were read as background"),)
    if np.array_equal(rgb[..., 0], rgb[..., 1]) and np.array_equal(rgb[..., 1], rgb[..., 2]):
        _reject_sketch(rgb[..., 0], name)
        reading = _read_numbers(rgb[..., 0], f"index mask stored as {mode}", name)
    else:
        reading = _read_colors(rgb, mode, name)
    return dataclasses.replace(reading, notes=notes + reading.notes)


def _reject_sketch(values: np.ndarray, name: str) -> None:
    if values.max() > 200 and np.median(values) > 200:
        raise off_palette(f"{name} is mostly white, like a drawing: pass it as --sketch; for a mask, {HOW}")


def _finish(labels: np.ndarray, scheme: str, notes: tuple[Note, ...], name: str) -> Reading:
    if not labels.any():
        raise InputError(f"the mask has no face: all of {name} is background (read as {scheme})", kind="blank")
    return Reading(raw=np.ascontiguousarray(labels, dtype=np.uint8), scheme=scheme, notes=notes)


def _read_numbers(values: np.ndarray, scheme: str, name: str, *, colored: bool = False) -> Reading:
    """Read class numbers, integers [H, W], in one of `ORDERS`.

    The geometry decides. The canonical order is accepted if it breaks at most one rule of `mask.geometry`; another
    order if it breaks none and every other order at least four. Of 800 masks of CelebAMask-HQ, 0.5 % break more.
    `colored`: a color table confirms the canonical order.
    """
    if (ignored := values == IGNORE).any() and not ignored.all():
        fraction = float(ignored.mean())
        if fraction > MAX_IGNORED:
            raise off_palette(f"{100 * fraction:.0f} % of {name} is {IGNORE} (ignored): give each pixel a class")
        reading = _read_numbers(fill_nearest(values, ignored), scheme, name, colored=colored)
        text = f"{100 * fraction:.1f} % of the pixels are {IGNORE} (ignore) and took the class of the nearest pixel"
        return dataclasses.replace(reading, notes=(Note("ignored-pixels", text), *reading.notes))
    low, high = int(values.min()), int(values.max())
    if low < 0 or high >= len(CLASSES):
        raise off_palette(f"{name} has gray values from {low} to {high}, but a mask has class numbers 0 to 18: {HOW}")
    labels = values.astype(np.uint8)
    if not labels.any():
        return _finish(labels, scheme, (), name)
    if not colored and looks_blended(labels):
        text = f"the class numbers of {name} were blended by a smooth resize: resize with nearest instead"
        raise InputError(text, kind="blended-labels")
    geometry = measure(labels)
    ranked = rank_orders(geometry)
    present = np.unique(labels)
    best = min(ranked, key=lambda key: (len(ranked[key]), key != "canonical"))
    rivals = [
        len(rules)
        for key, rules in ranked.items()
        if not np.array_equal(order_table(key)[present], order_table(best)[present])
    ]
    broken, margin = len(ranked[best]), min(rivals, default=99) - len(ranked[best])
    notes: tuple[Note, ...] = ()
    if best == "canonical" and (broken == 0 or (broken == 1 and margin >= 2)):
        if not margin and not colored:
            notes = (Note("unproven-order", "too few parts to identify the class order: read in the canonical order"),)
    elif best != "canonical" and not broken and margin >= 4:
        table = order_table(best)
        text = f"the class numbers are in {best} order and were converted to the canonical order"
        notes = (Note("class-order", text), *side_notes(geometry.permuted(table)))
        return _finish(table[labels], f"{scheme}, {best} order", notes, name)
    elif not colored:
        odd = "; ".join(ranked["canonical"][:2]) or "several orders fit"
        raise off_palette(f"the class numbers of {name} do not clearly fit a known class order ({odd}): {HOW}")
    return _finish(labels, f"{scheme}, canonical order", notes + side_notes(geometry), name)


def _read_palette(indices: np.ndarray, colors: np.ndarray, name: str) -> Reading:
    """Read an image with a color table: uint8 [H, W] and uint8 [256, 3].

    A known palette, in any arrangement, identifies the classes. With another table, indices below 19 are class numbers.
    """
    every = np.unique(indices)
    used = every[every != IGNORE] if (every != IGNORE).any() else every
    for palette_name, palette in PALETTES.items():
        if 0 < used[-1] < len(CLASSES) and np.array_equal(colors[used], palette[used]):
            return _read_numbers(indices, f"palette PNG, {palette_name} colors", name, colored=True)
    if len(every) > 1 and (colors[every][:, None] == UNION).all(axis=2).any(axis=1).all():
        return _read_colors(colors[indices], "palette PNG", name)
    if used[-1] < len(CLASSES):
        return _read_numbers(indices, "palette PNG, class by index", name)
    return _read_colors(colors[indices], "palette PNG", name)  # possibly a damaged mask


def _choose_palette(rows: np.ndarray) -> tuple[str, np.ndarray, tuple[Note, ...]]:
    """Return the palette of `rows` (int [H, W] of `UNION`), the labels with correct sides, and what was swapped."""
    geometry = measure(rows, len(UNION))
    present = geometry.pixels > 0
    nose, skin = (int(np.flatnonzero(TABLES["CelebAMask-HQ"] == CLASS_INDEX[part])[0]) for part in ("nose", "skin"))
    middle = next((geometry.center[row, 0] for row in (nose, skin) if present[row]), rows.shape[1] / 2)
    scores = {}
    for name, table in TABLES.items():
        agree = 0.0
        for weight, pair in zip((3.0, 2.0, 1.0), FLIP_PAIRS, strict=True):
            a, b = (int(np.flatnonzero(table == side)[0]) for side in pair)
            if present[a] and present[b]:
                agree += weight * np.sign(geometry.center[a, 0] - geometry.center[b, 0])
            elif present[a] or present[b]:  # one side only: on which side of the nose?
                side = geometry.center[a, 0] - middle if present[a] else middle - geometry.center[b, 0]
                agree += 0.2 * weight * np.sign(side)
        scores[name] = (int(geometry.pixels[table != UNKNOWN].sum()), float(agree))
    name = max(scores, key=lambda key: scores[key])
    labels = TABLES[name][rows]
    if (labels == UNKNOWN).any():
        labels = unblend(labels, PALETTE)
    labels = labels.astype(np.uint8)
    wrong = swapped_pairs(measure(labels))
    texts = (
        f"the {name} colors put {CLASSES[a]} on the person's right: {CLASSES[a]} and {CLASSES[b]} were swapped"
        for a, b in wrong
    )
    return name, swap_classes(labels, wrong), tuple(Note("swapped-sides", text) for text in texts)


def _read_colors(rgb: np.ndarray, mode: str, name: str) -> Reading:
    """Read class colors, uint8 [H, W, 3], of one of `PALETTES`, in RGB or BGR order, also if slightly blended."""
    found = []
    colored = rgb.max(axis=2) > 40  # black alone proves nothing: dark photographs have it too
    palettes = {"RGB": UNION, "BGR": UNION[:, ::-1]}
    for channels, (rows, distance) in zip(palettes, nearest_colors(rgb, *palettes.values()), strict=True):
        near = float((distance[colored] <= TOLERANCE).mean()) if colored.any() else 1.0
        found.append((bool((distance == 0).all()), near, channels, rows, distance))
    found = [entry for entry in found if entry[0]] or [entry for entry in found if entry[1] >= 0.6]
    readings = []
    for exact, _, channels, rows, distance in found:
        notes: tuple[Note, ...] = ()
        if not exact:
            near = np.where(distance <= TOLERANCE, rows, UNKNOWN)
            try:
                rows = unblend(near, palettes[channels], rgb)
            except ValueError:
                continue
            changed = 100 * float(((near == UNKNOWN) | (near != rows)).mean())
            text = (
                f"{changed:.1f} % of the pixels have blended colors (smooth resize or JPEG) and took the class of a "
                "clean neighbor"
            )
            notes = (Note("blended-labels", text),)
        palette, labels, sides = _choose_palette(rows)
        scheme = f"{mode}, {palette} colors"
        if channels == "BGR":
            notes = (Note("color-order", "the channels are in BGR order and were converted to RGB"), *notes)
            scheme += ", BGR"
        readings.append((len(broken_rules(measure(labels))), exact, labels, scheme, notes + sides))
    readings.sort(key=lambda reading: reading[0])  # stable: RGB first if both fit equally well
    if not readings or (not readings[0][1] and readings[0][0] > 5):
        count = len(np.unique(rgb.reshape(-1, 3), axis=0))
        if count > 512:
            raise off_palette(
                f"{name} looks like a photograph, not a mask ({count} colors): `likeness extract {name} --out DIR` "
                "makes its mask, sketch and keypoints"
            )
        raise off_palette(f"the {count} colors of {name} match no known mask palette: {HOW}")
    return _finish(*readings[0][2:], name)


def _read_one_hot(planes: np.ndarray, name: str) -> Reading:
    """Read one plane per class, [19, H, W] or [H, W, 19], with exactly one 1 (or 255) per pixel."""
    axis, form = (0, "[19, H, W]") if planes.shape[0] == len(CLASSES) else (2, "[H, W, 19]")
    high = planes.max()
    if high not in (1, 255) or not np.isin(np.unique(planes), (0, high)).all():
        raise off_palette(f"the {len(CLASSES)} planes of {name} have scores, not 0 and 1: take the argmax first")
    wrong = 100 * float(((planes == high).sum(axis=axis) != 1).mean())
    if wrong:
        raise off_palette(f"{wrong:.1f} % of the pixels of {name} have no class or several: one-hot needs exactly one")
    return _read_numbers(planes.argmax(axis=axis), f"one-hot {form}", name)


def _read_folder(folder: Path) -> Reading:
    """Read a folder of `<id>_<part>.png` files of one face."""
    faces: dict[str, dict[int, Path]] = {}
    others = 0
    for path in sorted(folder.iterdir()):
        if path.suffix.lower() not in (".png", ".jpg", ".jpeg", ".bmp"):
            continue
        stem = path.stem.lower()
        part = next((name for name in PART_NAMES if stem == name or stem.endswith("_" + name)), None)
        if part is None:
            others += 1
        else:
            faces.setdefault(stem[: -len(part)].rstrip("_"), {})[PART_NAMES[part]] = path
    if not faces:
        raise off_palette(f"{folder} has no part files such as 00000_skin.png: pass a mask image or such a folder")
    if len(faces) > 1:
        raise off_palette(f"{folder} has the parts of {len(faces)} faces: move those of one face into another folder")
    (files,) = faces.values()
    reading = paint_parts(files, str(folder))
    if others:
        note = Note("other-files", f"{others} images in the folder are not parts of a face and were ignored")
        reading = dataclasses.replace(reading, notes=(note, *reading.notes))
    return reading


def paint_parts(
    files: Mapping[int, Path | Image.Image], name: str, part_names: Mapping[int, str] | None = None
) -> Reading:
    """Paint a mask from images of its parts, white (or opaque) on black, in canonical order: higher classes overwrite
    lower ones. `name` and `part_names` (default: the paths) are those of error messages.

    Raises `InputError` if a part cannot be read, is empty or has another size, or there is none.
    """
    labels: np.ndarray | None = None
    for index, file in sorted(files.items()):
        part_name = describe(file) if part_names is None else part_names[index]
        image = open_image(file, part_name)
        if image.mode in TRANSPARENT or "transparency" in image.info:
            image = image.convert("RGBA")
            image = Image.alpha_composite(Image.new("RGBA", image.size, (0, 0, 0, 255)), image)
        values = np.asarray(image.convert("L"))
        if 1 < values.max() <= 127:
            text = f"{part_name} is empty: its largest value is {values.max()}, but a part is white on black"
            raise InputError(text, kind="blank")
        if labels is None:
            labels = np.zeros(values.shape, dtype=np.uint8)
        if values.shape != labels.shape:
            (height, width), (high, wide) = values.shape, labels.shape
            text = f"{part_name} is {width}x{height}, but the other parts are {wide}x{high}: resize it"
            raise InputError(text, kind="wrong-size")
        labels[values > (127 if values.max() > 1 else 0)] = index
    assert labels is not None
    return _finish(labels, f"folder of {len(files)} part files", side_notes(measure(labels)), name)
