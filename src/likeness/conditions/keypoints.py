"""The keypoints condition: 68 iBUG or 478 MediaPipe face landmarks, drawn as one and the same skeleton.

Points are kept as numbers in [0, 1], so resizing is exact. Both conventions are drawn through the parts that they
share (jaw, brows, nose, eyes, lips), so a model trained on one understands the other; forehead and irises, which 68
points lack, are read and kept but not drawn.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

from likeness.conditions.base import Condition, Reading, Source
from likeness.conditions.pictures import describe, existing_path, load_array, open_picture
from likeness.conditions.vary import vary_points
from likeness.types import InputError, Note

# fmt: off
FLIP_68: tuple[int, ...] = (
    16, 15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0,  # jaw
    26, 25, 24, 23, 22, 21, 20, 19, 18, 17,  # brows
    27, 28, 29, 30, 35, 34, 33, 32, 31,  # nose
    45, 44, 43, 42, 47, 46, 39, 38, 37, 36, 41, 40,  # eyes
    54, 53, 52, 51, 50, 49, 48, 59, 58, 57, 56, 55,  # outer lips
    64, 63, 62, 61, 60, 67, 66, 65,  # inner lips
)
"""Mirrored iBUG points: entry i is the point whose mirror image becomes point i."""

MIRROR_PAIRS_478 = (
    "3-248 7-249 20-250 21-251 22-252 23-253 24-254 25-255 26-256 27-257 28-258 29-259 30-260 31-261 32-262 "
    "33-263 34-264 35-265 36-266 37-267 38-268 39-269 40-270 41-271 42-272 43-273 44-274 45-275 46-276 47-277 "
    "48-278 49-279 50-280 51-281 52-282 53-283 54-284 55-285 56-286 57-287 58-288 59-289 60-290 61-291 62-292 "
    "63-293 64-294 65-295 66-296 67-297 68-298 69-299 70-300 71-301 72-302 73-303 74-304 75-305 76-306 77-307 "
    "78-308 79-309 80-310 81-311 82-312 83-313 84-314 85-315 86-316 87-317 88-318 89-319 90-320 91-321 92-322 "
    "93-323 95-324 96-325 97-326 98-327 99-328 100-329 101-330 102-331 103-332 104-333 105-334 106-335 107-336 "
    "108-337 109-338 110-339 111-340 112-341 113-342 114-343 115-344 116-345 117-346 118-347 119-348 120-349 "
    "121-350 122-351 123-352 124-353 125-354 126-355 127-356 128-357 129-358 130-359 131-360 132-361 133-362 "
    "134-363 135-364 136-365 137-366 138-367 139-368 140-369 141-370 142-371 143-372 144-373 145-374 146-375 "
    "147-376 148-377 149-378 150-379 153-380 154-381 155-382 156-383 157-384 158-385 159-386 160-387 161-388 "
    "162-389 163-390 165-391 166-392 167-393 169-394 170-395 171-396 172-397 173-398 174-399 176-400 177-401 "
    "178-402 179-403 180-404 181-405 182-406 183-407 184-408 185-409 186-410 187-411 188-412 189-413 190-414 "
    "191-415 192-416 193-417 194-418 196-419 198-420 201-421 202-422 203-423 204-424 205-425 206-426 207-427 "
    "208-428 209-429 210-430 211-431 212-432 213-433 214-434 215-435 216-436 217-437 218-438 219-439 220-440 "
    "221-441 222-442 223-443 224-444 225-445 226-446 227-447 228-448 229-449 230-450 231-451 232-452 233-453 "
    "234-454 235-455 236-456 237-457 238-458 239-459 240-460 241-461 242-462 243-463 244-464 245-465 246-466 "
    "247-467 "
    "468-473 469-476 470-475 471-474 472-477"
)
"""Mirrored pairs of the MediaPipe face mesh with irises; unnamed points lie on the midline and mirror into themselves.

Found by laying the published tessellation out in the plane with the face oval on a circle and matching it with its
mirror image: every contour maps onto its counterpart and 2552 of the 2556 edges onto edges (the mesh itself is
asymmetric at four). An iris has its centre first, then its right, top, left and bottom edge.
"""

STROKES: dict[str, tuple[tuple[int, int, int], bool, tuple[int, ...], tuple[int, ...]]] = {
    # part: colour, closed, iBUG points, MediaPipe points; from the viewer's left to the right
    "jaw": ((160, 160, 160), False, tuple(range(17)),
            (127, 234, 93, 132, 58, 172, 136, 150, 149, 176, 148, 152,
             377, 400, 378, 379, 365, 397, 288, 361, 323, 454, 356)),
    "r_brow": ((255, 140, 0), False, tuple(range(17, 22)), (70, 63, 105, 66, 107)),
    "l_brow": ((0, 200, 255), False, tuple(range(22, 27)), (336, 296, 334, 293, 300)),
    "nose bridge": ((0, 220, 0), False, tuple(range(27, 31)), (168, 197, 5, 4)),
    "nose base": ((160, 255, 0), False, tuple(range(31, 36)), (98, 97, 2, 326, 327)),
    "r_eye": ((255, 60, 60), True, tuple(range(36, 42)),
              (33, 246, 161, 160, 159, 158, 157, 173, 133, 155, 154, 153, 145, 144, 163, 7)),
    "l_eye": ((70, 110, 255), True, tuple(range(42, 48)),
              (362, 398, 384, 385, 386, 387, 388, 466, 263, 249, 390, 373, 374, 380, 381, 382)),
    "outer lips": ((255, 0, 200), True, tuple(range(48, 60)),
                   (61, 185, 40, 39, 37, 0, 267, 269, 270, 409, 291, 375, 321, 405, 314, 17, 84, 181, 91, 146)),
    "inner lips": ((255, 190, 220), True, tuple(range(60, 68)),
                   (78, 191, 80, 81, 82, 13, 312, 311, 310, 415, 308, 324, 318, 402, 317, 14, 87, 178, 88, 95)),
}
# fmt: on
"""Part -> how it is drawn; the person's right has warm and the left has cool colours."""


def _permutation_478() -> np.ndarray:
    order = np.arange(478)
    for pair in MIRROR_PAIRS_478.split():
        a, b = map(int, pair.split("-"))
        order[a], order[b] = b, a
    return order


BLANKS = str.maketrans(",;\t", "   ")
"""What may stand between numbers, as blanks."""

FLIPS: dict[int, np.ndarray] = {68: np.array(FLIP_68), 478: _permutation_478()}
"""Number of points -> int [P], the permutation of mirroring."""


def read(source: Source | dict) -> Reading:
    """Points from a file or an array.

    Args:
        source: .json (`{"points": [[x, y], ...], "size": [width, height]}` or a bare list), .npy, .npz, .txt or .csv
            (two or three numbers a line), .pts (iBUG; its size is that of the picture of the same name beside it), or
            an array [P, 2] or [P, 3], of which x and y are used. P is 68 (iBUG) or 478 (MediaPipe); .pts counts pixels
            from 1, all others from 0. A dict is what the .json file would hold.

    Returns:
        raw float32 [P, 2], (x, y); [0, 1] spans the picture.

    Raises:
        InputError: another number of points, pixels without a size, or points that lie outside the picture.
    """
    where = "the document" if isinstance(source, dict) else describe(source)
    size: tuple[float, ...] | None = None
    if isinstance(source, Image.Image):
        raise InputError(
            "keypoints are numbers, no picture: give a .json, .npy, .txt, .pts or .csv file", kind="corrupt-file"
        )
    if isinstance(source, np.ndarray):
        form, values = "array", source
    elif isinstance(source, dict):
        form, values, size = _from_document(source, where)
    else:
        path = existing_path(source)
        if path.is_dir():
            raise InputError(f"{path} is a folder: name one file of keypoints", kind="corrupt-file")
        form, values, size = _load(path)
    points = _as_points(values, where)
    if size is not None:
        if len(size) != 2 or not np.isfinite(size).all() or min(size) < 1:
            raise InputError(
                f"the size in {where} is {list(size)}: it must be [width, height] in pixels", kind="corrupt-file"
            )
        unit = f"pixels of {size[0]:g}x{size[1]:g}"
        # A file may state its size beside points that are fractions already.
        if points.min() >= -0.5 and points.max() <= 1.5 and min(size) > 8:
            unit = "fractions"
        else:
            points = points / np.asarray(size, dtype=np.float64)
    else:
        unit = "fractions"
        if points.max() > 1.5 or points.min() < -0.5:
            raise InputError(
                f"the points of {where} are pixels (up to {points.max():.0f}) of a picture of unknown size: "
                'add "size": [width, height] in a JSON file, divide them by the size, or put the picture beside a .pts',
                kind="corrupt-file",
            )
    inside = ((points >= 0) & (points <= 1)).all(axis=1).mean()
    if inside < 0.5:
        raise InputError(
            f"only {100 * inside:.0f} % of the points of {where} lie within the picture: check the size",
            kind="corrupt-file",
        )
    spread = np.ptp(points, axis=0)
    if spread.min() < 0.02:
        raise InputError(f"the points of {where} lie on one spot or line: they show no face", kind="corrupt-file")
    notes = []
    if inside < 1:
        notes.append(Note("points-outside", f"{round((1 - inside) * len(points))} points lie outside the picture"))
    if _side(points, "l_eye") < _side(points, "r_eye"):
        text = "the person's left eye lies left of the right one in the picture: the sides look exchanged"
        notes.append(Note("swapped-sides", text))
    kind = "iBUG" if len(points) == 68 else "MediaPipe"
    return Reading(
        raw=points.astype(np.float32),
        scheme=f"{len(points)} {kind} points, {form}, {unit}",
        notes=tuple(notes),
        size=None if size is None else (size[0], size[1]),
    )


def _side(points: np.ndarray, part: str) -> float:
    """Mean x of a part."""
    _, _, ibug, mediapipe = STROKES[part]
    return float(points[list(ibug if len(points) == 68 else mediapipe), 0].mean())


def _as_points(values: object, where: str) -> np.ndarray:
    try:
        points = np.asarray(values, dtype=np.float64)
    except (TypeError, ValueError) as error:
        raise InputError(
            f"the points of {where} are no plain numbers: give [[x, y], ...]", kind="corrupt-file"
        ) from error
    if points.ndim == 3 and points.shape[0] == 1:
        points = points[0]
    if points.ndim != 2 or points.shape[1] not in (2, 3):
        raise InputError(
            f"the points of {where} have the shape {list(points.shape)}: give [[x, y], ...]", kind="corrupt-file"
        )
    if len(points) not in FLIPS:
        raise InputError(
            f"{where} has {len(points)} points: give the 68 of iBUG or the 478 of MediaPipe (with irises)",
            kind="corrupt-file",
        )
    points = points[:, :2]
    if not np.isfinite(points).all():
        raise InputError(
            f"{where} has points that are not finite (NaN or infinite): detect them again", kind="corrupt-file"
        )
    return points


def _load(path: Path) -> tuple[str, object, tuple[float, ...] | None]:
    """Form, values and size (None when unknown) of a file."""
    suffix = path.suffix.lower()
    if suffix in (".npy", ".npz"):
        return suffix[1:], load_array(path), None
    if suffix not in (".json", ".txt", ".pts", ".csv"):
        raise InputError(
            f"{path} is no file of keypoints: give a .json, .npy, .txt, .pts or .csv file", kind="corrupt-file"
        )
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path} cannot be read as text ({error}): export it again", kind="corrupt-file") from error
    if suffix == ".json":
        try:
            document = json.loads(text)
        except (json.JSONDecodeError, RecursionError) as error:
            raise InputError(f"{path} is no valid JSON ({error}): export it again", kind="corrupt-file") from error
        return _from_document(document, str(path))
    pts = "{" in text
    body = text[text.index("{") + 1 :].split("}")[0] if pts else text
    rows = [row for row in (line.split() for line in body.translate(BLANKS).splitlines()) if row]
    numbers = []
    for line, row in enumerate(rows):
        try:
            numbers.append([float(cell) for cell in row])
        except ValueError as error:
            if line:  # the first line may be a header
                raise InputError(
                    f"{path} has a line that is no numbers: {' '.join(row)[:40]!r}", kind="corrupt-file"
                ) from error
    # iBUG counts pixels from 1.
    values = [[number - 1 for number in row] for row in numbers] if pts else numbers
    return "iBUG pts" if pts else suffix[1:], values, _size_beside(path) if pts else None


def _size_beside(path: Path) -> tuple[float, ...] | None:
    """(width, height) of the picture of the same name, as iBUG's data have it."""
    for suffix in (".jpg", ".jpeg", ".png", ".JPG", ".PNG"):
        if path.with_suffix(suffix).is_file():
            return open_picture(path.with_suffix(suffix)).size
    return None


def _from_document(document: object, where: str) -> tuple[str, object, tuple[float, ...] | None]:
    if not isinstance(document, dict):
        return "JSON", document, None
    if "points" not in document:
        raise InputError(
            f'{where} has no "points": give {{"points": [[x, y], ...], "size": [width, height]}}', kind="corrupt-file"
        )
    size = document.get("size")
    if size is None:
        return "JSON", document["points"], None
    try:
        return "JSON", document["points"], tuple(float(side) for side in size)
    except (TypeError, ValueError) as error:
        raise InputError(
            f"the size in {where} is {size!r}: it must be [width, height] in pixels", kind="corrupt-file"
        ) from error


def resize(raw: np.ndarray, height: int, width: int) -> np.ndarray:
    """The points unchanged: fractions have no size."""
    return raw


def flip(raw: np.ndarray) -> np.ndarray:
    """Mirror points left to right and renumber them, so that each number keeps its meaning."""
    mirrored = raw[FLIPS[len(raw)]].copy()
    mirrored[:, 0] = 1 - mirrored[:, 0]
    return mirrored


def render(raw: np.ndarray, height: int, width: int) -> np.ndarray:
    """The skeleton in colours on black, uint8 [height, width, 3].

    Drawn at four times the size and averaged, hence smooth and the same everywhere; lines are 1/100 of the shorter
    side wide, at least 1.25 pixels.
    """
    scale = 4
    canvas = Image.new("RGB", (width * scale, height * scale))
    draw = ImageDraw.Draw(canvas)
    thick = max(5, round(min(height, width) * scale / 100))
    pixels = np.nan_to_num(raw.astype(np.float64)).clip(-1, 2) * [width * scale, height * scale]
    for colour, closed, ibug, mediapipe in STROKES.values():
        path = [(float(pixels[i, 0]), float(pixels[i, 1])) for i in (ibug if len(raw) == 68 else mediapipe)]
        draw.line(path + path[:1] if closed else path, fill=colour, width=thick, joint="curve")
        for x, y in path:
            draw.ellipse((x - thick / 2, y - thick / 2, x + thick / 2, y + thick / 2), fill=colour)
    return np.asarray(canvas.reduce(scale))


KEYPOINTS = Condition(
    name="keypoints", raw="points", read=read, resize=resize, flip=flip, vary=vary_points, render=render
)
