"""Paste an edited portrait back into the photo that it was cut from, with the transform that `align` recorded.

Pixels outside the portrait's square do not change; at its border portrait and photo are blended. With `only`, nor do
pixels outside some classes of the mask, so that the background of the photo stays. The photo must be the file that was
aligned: its SHA-256 is compared.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from scipy.ndimage import distance_transform_edt

from likeness.annotators.face_parser import load_face_parser, parse_faces
from likeness.conditions.framing import inverse, move, rescaled
from likeness.conditions.images import MAX_PIXELS, existing_path, open_image, read_rgb
from likeness.conditions.mask.classes import CLASS_INDEX
from likeness.conditions.mask.edits import class_indices
from likeness.conditions.mask.geometry import INSIDE
from likeness.data.folder import each_row, read_photo, splits_of
from likeness.files import write_whole
from likeness.pipelines.formats import format_of
from likeness.pipelines.image_recipe import COMPOSITE, GENERATED, XMP_KEY, encode_image
from likeness.prepare.align import resample
from likeness.types import InputError
from likeness.weights.hashes import file_hash

FEATHER = 0.1
"""Width of the blended border as a fraction of the portrait's side."""

ON_SKIN = (*INSIDE, "eye_g")
"""Classes that are pasted with the skin."""

BAND = 256
"""Rows of the photo that are blended at a time, to bound the memory."""

Box = tuple[float, float, float, float]
"""Left, top, right and bottom in pixels."""


def paste_file(
    portrait: Path,
    aligned: Path,
    photo: Path,
    out: Path,
    *,
    face: str | None = None,
    feather: float = FEATHER,
    only: Sequence[str] = (),
    parser: str = "bundled",
) -> str:
    """Paste a portrait into its photo and write the result. The arguments are the options of `likeness prepare paste`.

    Returns:
        `file_name` of the aligned portrait.

    Raises:
        InputError: a file cannot be read or written, the photo is not one of the folder, or the face is ambiguous.
    """
    kind = format_of(out)
    row = row_of(aligned, photo, portrait, face)
    edited = open_image(portrait)
    original = open_image(photo, max_pixels=MAX_PIXELS, exact=True)
    pixels = read_photo(portrait)
    weight = region_weight(pixels, only, parser, feather / 4) if only else None
    transform = np.array(row["transform"])
    if "transparency" in original.info:
        original = original.convert("RGBA")
    transparent = "A" in original.getbands() and kind != "JPEG"
    base = np.array(read_rgb(original.convert("RGB"))) if transparent else read_photo(photo)
    image = Image.fromarray(paste_portrait(base, pixels, transform, row["size"], feather=feather, weight=weight))
    if transparent:
        image.putalpha(original.getchannel("A"))
    packet = edited.info.get(XMP_KEY) or edited.info.get("xmp") or b""
    packet = packet.decode("utf-8", "replace") if isinstance(packet, bytes) else packet
    mark = COMPOSITE if GENERATED in packet else None  # IPTC's label for generated media
    write_whole(out, encode_image(image, kind, None, mark=mark))
    return f"images/{row['file_name'].name}"


def row_of(aligned: Path, photo: Path, portrait: Path, face: str | None) -> dict[str, Any]:
    """Return `transform`, `size` and `file_name` of the face of a portrait."""
    sha256 = file_hash(existing_path(photo))
    rows = (row for split in splits_of(aligned) for row in each_row(aligned / split))
    rows = [row for row in rows if isinstance(row.get("aligned"), dict)]
    if not rows:
        raise InputError(f"{aligned} has no transforms: give a folder written by `likeness prepare align`")
    rows = [row for row in rows if row["aligned"].get("sha256") == sha256]
    if not rows:
        raise InputError(f"{photo} is not a photo of {aligned}, or has changed: give the original file")
    names = [row["file_name"].name for row in rows]
    if face is not None:
        rows = [row for row in rows if row["file_name"].name == Path(face).name]
    elif len(rows) > 1:
        rows = [row for row in rows if row["file_name"].stem == portrait.stem]
    if len(rows) != 1:
        raise InputError(f"{photo} has several faces: choose one with --face ({', '.join(names)})")
    return {**rows[0]["aligned"], "file_name": rows[0]["file_name"]}


def region_weight(portrait: np.ndarray, only: Sequence[str], parser: str, feather: float) -> np.ndarray:
    """Return the weight of each pixel of a portrait, uint8 [S, S]: 0 outside the classes `only`, rising to 255 inside
    within `feather` of the side. Skin includes what is on it: eyes, glasses, nose, mouth.

    Raises:
        InputError: a class is unknown, or the portrait, uint8 [S, S, 3], shows none.
    """
    classes = class_indices([*only, *(ON_SKIN if CLASS_INDEX["skin"] in class_indices(only) else ())])
    network, size = load_face_parser(parser)
    (labels,) = parse_faces(network, [portrait], size=size)  # [S, S]
    region = np.isin(labels, classes)
    if not region.any():
        raise InputError(f"the portrait shows no {', '.join(only)}: name other classes, or leave --only out")
    return inward(region, feather)


def inward(region: np.ndarray, feather: float) -> np.ndarray:
    """Return uint8 [S, S]: 0 outside a region, bool [S, S], rising to 255 within `feather` of the side inside it."""
    if region.all():  # no edge
        return np.full(region.shape, 255, np.uint8)
    inside = np.asarray(distance_transform_edt(np.pad(region, 1, mode="edge")))[1:-1, 1:-1]
    return np.rint(255 * smoothstep(inside / max(feather * len(region), 1))).astype(np.uint8)


def smoothstep(values: np.ndarray) -> np.ndarray:
    """Return the cubic step from 0 to 1."""
    values = np.clip(values, 0, 1)
    return values * values * (3 - 2 * values)


def paste_portrait(
    photo: np.ndarray,
    portrait: np.ndarray,
    transform: np.ndarray,
    size: int,
    *,
    feather: float = FEATHER,
    weight: np.ndarray | None = None,
) -> np.ndarray:
    """Paste a portrait, uint8 [S, S, 3] of any size S, into a photo, uint8 [H, W, 3].

    Args:
        photo: the photo.
        portrait: the portrait.
        transform: [2, 3], photo -> portrait of `size` pixels.
        size: side length in pixels of the portrait that `transform` refers to.
        feather: width of the blended border as a fraction of the portrait's side, in (0, 0.5].
        weight: uint8 [S, S], 0 where the photo stays. Default: 255 everywhere.

    Returns:
        uint8 [H, W, 3], equal to the photo outside the portrait.

    Raises:
        InputError: the portrait is not square, or the feather is out of range.
    """
    height, width = photo.shape[:2]
    side = len(portrait)
    if portrait.shape[1] != side:
        raise InputError(f"the portrait is {portrait.shape[1]}x{side}: it must be square")
    if not 0 < feather <= 0.5:
        raise InputError(f"feather must be greater than 0 and at most 0.5, not {feather:g}")
    transform = rescaled(transform, size, side)
    rim = 8  # for samples at the portrait's edge
    padded = np.pad(portrait, ((rim, rim), (rim, rim), (0, 0)), mode="edge")
    weights = None if weight is None else np.pad(weight, rim, mode="edge")
    result = photo.copy()

    def resampled(image: np.ndarray, left: int, top: int, right: int, bottom: int) -> np.ndarray:
        """Resample a padded image to a rectangle of the photo."""
        offset = move(np.array([left, top]), transform) + rim
        local = np.concatenate([transform[:, :2], offset[:, None]], axis=1)
        return resample(image, local, right - left, bottom - top)

    margin = 4 + 4 * float(np.hypot(*transform[:, 0]))  # reach of the resampling
    box = box_of(np.ones((side, side), bool) if weight is None else weight > 0, margin)
    for rows, columns, x, y in bands(transform, box, width, height):
        left, top = columns.start, rows.start
        inside = np.minimum(np.minimum(x, side - x), np.minimum(y, side - y)) / (feather * side)
        share = smoothstep(inside)  # [h, w]
        if weights is not None:
            share = share * resampled(weights, left, top, columns.stop, rows.stop)[..., 0] / 255
        x0, y0, x1, y1 = (int(edge) for edge in box_of(share > 0))  # the rest is not resampled
        if x0 == x1:
            continue
        share, own = share[y0:y1, x0:x1], result[rows, columns][y0:y1, x0:x1]
        pasted = resampled(padded, left + x0, top + y0, left + x1, top + y1)
        mixed = (share > 0) & (share < 1)
        blended = own[mixed] + share[mixed, None] * (pasted[mixed].astype(np.float64) - own[mixed])
        np.copyto(own, pasted, where=(share == 1)[..., None])
        own[mixed] = np.rint(blended)
    return result


def box_of(region: np.ndarray, margin: float = 0) -> Box:
    """Return the box around a region, bool [h, w], enlarged by a margin; zeros if the region is empty."""
    ys, xs = np.flatnonzero(region.any(axis=1)), np.flatnonzero(region.any(axis=0))
    if not len(ys):
        return 0, 0, 0, 0
    return xs[0] - margin, ys[0] - margin, xs[-1] + 1 + margin, ys[-1] + 1 + margin


def bands(
    transform: np.ndarray, box: Box, width: int, height: int
) -> Iterator[tuple[slice, slice, np.ndarray, np.ndarray]]:
    """Split the part of a photo around a box of a portrait into bands of rows: yields rows, columns, and coordinates x
    and y of each pixel in the portrait, float64 [h, w] each.
    """
    x0, y0, x1, y1 = box
    corners = move(np.array([[x0, y0], [x1, y0], [x0, y1], [x1, y1]]), inverse(transform))
    left, top = np.clip(np.floor(corners.min(axis=0)).astype(int), 0, [width, height])
    right, bottom = np.clip(np.ceil(corners.max(axis=0)).astype(int), 0, [width, height])
    across = (np.arange(left, right) + 0.5) * transform[:, :1]  # [2, w]
    for start in range(top, bottom, BAND):
        stop = min(start + BAND, bottom)
        down = (np.arange(start, stop) + 0.5) * transform[:, 1:2]  # [2, h]
        x, y = across[:, None] + down[:, :, None] + transform[:, 2, None, None]  # [h, w] each
        yield slice(start, stop), slice(left, right), x, y
