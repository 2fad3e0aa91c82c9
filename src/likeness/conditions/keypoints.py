"""The keypoints condition: 68 iBUG or 478 MediaPipe face landmarks (468 without irises), rendered as one skeleton.

Points are fractions of the image size, so that resizing is exact. Both conventions are rendered through the parts that
they share (jaw, brows, nose, eyes, lips): a model trained on one also accepts the other. Forehead and irises, which the
68 points lack, are kept but not rendered.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw

from likeness.conditions.augment import augment_points
from likeness.conditions.base import ARRAY_SUFFIXES, Condition, Reading, Source, describe
from likeness.conditions.images import existing_path, load_array, open_image, unreadable
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
"""iBUG: entry i is the point whose mirror image becomes point i."""

MIDLINE_478 = (0, 1, 2, 4, 5, 6, *range(8, 20), 94, 151, 152, 164, 168, 175, 195, 197, 199, 200)
"""MediaPipe's face mesh: points on the midline. The other points below 248 mirror, in order, into 248 to 467.

Found by mapping the published tessellation to the plane with the face oval on a circle and matching it with its mirror
image: all contours and 2552 of 2556 edges map onto one another (the mesh is asymmetric at four)."""

IRIS_PAIRS_478 = ((468, 473), (469, 476), (470, 475), (471, 474), (472, 477))
"""Mirrored pairs of the irises: center, then right, top, left and bottom edge."""

STROKES: dict[str, tuple[tuple[int, int, int], bool, tuple[int, ...], tuple[int, ...]]] = {
    # part: color, closed, iBUG points, MediaPipe points; from the viewer's left to the right
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
"""Part -> how it is rendered. The person's right has warm colors, the left cool ones."""

TEXT_SUFFIXES = (".json", ".txt", ".pts", ".csv")


def _permutation_478() -> np.ndarray:
    order = np.arange(478)
    right = np.setdiff1d(np.arange(248), MIDLINE_478)
    for a, b in (*zip(right, range(248, 468), strict=True), *IRIS_PAIRS_478):
        order[a], order[b] = b, a
    return order


FLIPS: dict[int, np.ndarray] = {68: np.array(FLIP_68), 468: _permutation_478()[:468], 478: _permutation_478()}
"""Number of points -> int [P], the permutation of a horizontal flip."""


def part_points(part: str, count: int) -> list[int]:
    """Return the indices of a part of `STROKES` among `count` points (68, 468 or 478)."""
    _, _, ibug, mediapipe = STROKES[part]
    return list(ibug if count == 68 else mediapipe)


def read(source: Source | dict, *, name: str = "") -> Reading:
    """Read keypoints as fractions of the image size, (x, y), float32 [P, 2]. `name` replaces the path in error
    messages.

    P is 68 (iBUG), 478 or 468 (MediaPipe with and without irises). The source is a .json file (`{"points": [[x, y],
    ...], "size": [width, height]}`, a bare list, or the output of OpenPose or DWPose), .npy, .npz, .txt or .csv (two or
    three numbers per line), .pts (iBUG; the size is read from the image of the same name in the same folder), an array
    [P, 2] or [P, 3] of which x and y are used, or a dict with the content of a .json file. Pixels count from 1 in .pts
    and from 0 elsewhere.

    Raises `InputError` for another number of points, undetected points, pixels without a size, or points outside the
    image.
    """
    name = name or describe(source)
    if isinstance(source, Image.Image):
        raise unreadable(f"{name} is not a set of points: keypoints are a .json, .npy, .txt, .pts or .csv file")
    if isinstance(source, np.ndarray):
        form, values, size = "array", source, None
    elif isinstance(source, dict):
        form, values, size = _from_document(source, name)
    else:
        form, values, size = _load(existing_path(source), name)
    points = _as_points(values, name)
    if undetected := int(np.isin(points, (0, -1)).all(axis=1).sum()):  # -1 in .pts, which count from 1
        text = (
            f"{undetected} of the {len(points)} points of {name} are (0, 0), which detectors write for points they "
            "did not find: detect them in a frontal photograph"
        )
        raise InputError(text, kind="undetected-points")
    # A file may state its size next to points that are already fractions.
    fractions = bool(points.min() >= -0.5 and points.max() <= 1.5)
    unit = "fractions"
    if size is not None:
        if len(size) != 2 or not np.isfinite(size).all() or min(size) < 1:
            raise unreadable(f"the size in {name} is {list(size)}: it must be [width, height] in pixels")
        if not fractions or min(size) <= 8:
            unit = f"pixels of {size[0]:g}x{size[1]:g}"
            points = points / np.asarray(size, dtype=np.float64)
    elif not fractions:
        raise unreadable(
            f"the points of {name} are pixels (up to {points.max():.0f}) of an image of unknown size: add "
            '"size": [width, height] to a JSON file, divide them by the size, or place the image next to a .pts file'
        )
    inside = ((points >= 0) & (points <= 1)).all(axis=1).mean()
    if inside < 0.5:
        raise unreadable(f"only {100 * inside:.0f} % of the points of {name} are within the image: check the size")
    if np.ptp(points, axis=0).min() < 0.02:
        raise unreadable(f"the points of {name} are all on one spot or line, not on a face: detect them again")
    notes = []
    if inside < 1:
        notes.append(Note("points-outside", f"{round((1 - inside) * len(points))} points are outside the image"))
    left, right, lips = (
        points[part_points(part, len(points))].mean(axis=0) for part in ("l_eye", "r_eye", "outer lips")
    )
    down = lips - (left + right) / 2
    if abs(down[0]) > 2 * abs(down[1]):
        text = "the mouth is beside the eyes: the points look like (y, x), or the photograph is rotated"
        notes.append(Note("axis-order", text))
    elif left[0] < right[0]:
        text = "the person's left eye is left of the right one in the image: the sides look swapped"
        notes.append(Note("swapped-sides", text))
    return Reading(
        raw=points.astype(np.float32),
        scheme=f"{len(points)} {'iBUG' if len(points) == 68 else 'MediaPipe'} points, {form}, {unit}",
        notes=tuple(notes),
        size=None if size is None else (size[0], size[1]),
    )


def _as_points(values: Any, name: str) -> np.ndarray:
    """float64 [P, 2], P 68 or 478."""
    try:
        points = np.asarray(values, dtype=np.float64)
    except (TypeError, ValueError, OverflowError) as error:
        raise unreadable(f"the points of {name} are not plain numbers: use [[x, y], ...]") from error
    if points.ndim == 3 and points.shape[0] == 1:
        points = points[0]  # [1, P, 2] -> [P, 2]
    if points.ndim != 2 or points.shape[1] not in (2, 3):
        raise unreadable(f"the points of {name} have shape {list(points.shape)}: use [[x, y], ...]")
    if len(points) not in FLIPS:
        raise unreadable(f"{name} has {len(points)} points: use the 68 of iBUG, or the 478 or 468 of MediaPipe")
    if not np.isfinite(points[:, :2]).all():
        raise unreadable(f"{name} has points that are not finite (NaN or Inf): detect them again")
    return points[:, :2]


Loaded = tuple[str, Any, tuple[float, ...] | None]
"""Format, values, and size if known."""


def _load(path: Path, name: str) -> Loaded:
    suffix = path.suffix.lower()
    if path.is_dir():
        raise unreadable(f"{name} is a folder: name one keypoints file in it")
    if suffix in ARRAY_SUFFIXES:
        return suffix[1:], load_array(path, name), None
    if suffix not in TEXT_SUFFIXES:
        raise unreadable(f"{name} is not a keypoints file: use a .json, .npy, .txt, .pts or .csv file")
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise unreadable(f"{name} cannot be read as text ({error}): export it again") from error
    if suffix == ".json":
        try:
            document = json.loads(text, parse_int=float)  # integers may be too large for floats
        except (json.JSONDecodeError, RecursionError) as error:
            raise unreadable(f"{name} is not valid JSON ({error}): export it again") from error
        return _from_document(document, name)
    pts = "{" in text
    body = text[text.index("{") + 1 :].split("}")[0] if pts else text
    rows = [row for row in (line.split() for line in body.replace(",", " ").replace(";", " ").splitlines()) if row]
    numbers = []
    for line, row in enumerate(rows):
        try:
            numbers.append([float(cell) - pts for cell in row])  # .pts counts pixels from 1
        except ValueError as error:
            if line:  # the first line may be a header
                shown = " ".join(row)[:40]
                raise unreadable(f"{name} has the line {shown!r}: expected two or three numbers") from error
    if not pts:
        return suffix[1:], numbers, None
    images = (path.with_suffix(ending) for ending in (".jpg", ".jpeg", ".png", ".JPG", ".PNG"))
    image = next((image for image in images if image.is_file()), None)
    return "iBUG pts", numbers, None if image is None else open_image(image).size


def _from_document(document: Any, name: str) -> Loaded:
    if isinstance(document, list) and len(document) == 1 and isinstance(document[0], dict):
        (document,) = document  # a list of frames
    if not isinstance(document, dict):
        return "JSON", document, None
    if "people" in document:
        return _from_openpose(document, name)
    if "points" not in document:
        raise unreadable(f'{name} has no "points": use {{"points": [[x, y], ...], "size": [width, height]}}')
    size = document.get("size")
    return "JSON", document["points"], None if size is None else _size_of(size, name)


def _from_openpose(document: dict[str, Any], name: str) -> Loaded:
    """The face of OpenPose's or DWPose's output: 68 or 70 (x, y, confidence), the last two being pupils."""
    people = document["people"] if isinstance(document["people"], list) else []
    faces = [
        person["face_keypoints_2d"] for person in people if isinstance(person, dict) and person.get("face_keypoints_2d")
    ]
    if len(faces) != 1:
        raise unreadable(f"{name} has the faces of {len(faces)} people in OpenPose's format: it must have exactly one")
    try:
        values = np.asarray(faces[0], dtype=np.float64).reshape(-1, 3)
    except (TypeError, ValueError, OverflowError) as error:
        raise unreadable(f"the face_keypoints_2d of {name} are not triples of x, y and confidence") from error
    points = np.where(values[:, 2:] > 0, values[:, :2], 0)  # confidence 0: undetected
    if len(points) == 70:
        points = points[:68]
    width, height = document.get("canvas_width"), document.get("canvas_height")
    known = all(isinstance(side, int | float) for side in (width, height))
    return "OpenPose JSON", points, _size_of([width, height], name) if known else None


def _size_of(size: Any, name: str) -> tuple[float, ...]:
    try:
        return tuple(float(side) for side in size)
    except (TypeError, ValueError, OverflowError) as error:
        raise unreadable(f"the size in {name} is {size!r}: it must be [width, height] in pixels") from error


def flip(raw: np.ndarray) -> np.ndarray:
    """Mirror points horizontally and renumber them, so that each number keeps its meaning."""
    mirrored = raw[FLIPS[len(raw)]].copy()
    mirrored[:, 0] = 1 - mirrored[:, 0]
    return mirrored


def render(raw: np.ndarray, height: int, width: int) -> np.ndarray:
    """Render the skeleton in colors on black, uint8 [height, width, 3].

    Rendered at four times the size and averaged. Lines are 1/100 of the shorter side wide, at least 1.25 pixels.
    """
    scale = 4
    canvas = Image.new("RGB", (width * scale, height * scale))
    draw = ImageDraw.Draw(canvas)
    thick = max(5, round(min(height, width) * scale / 100))
    pixels = np.nan_to_num(raw.astype(np.float64)).clip(-1, 2) * [width * scale, height * scale]
    for part, (color, closed, _, _) in STROKES.items():
        path = [(float(x), float(y)) for x, y in pixels[part_points(part, len(raw))]]
        draw.line(path + path[:1] if closed else path, fill=color, width=thick, joint="curve")
        for x, y in path:
            draw.ellipse((x - thick / 2, y - thick / 2, x + thick / 2, y + thick / 2), fill=color)
    return np.asarray(canvas.reduce(scale))


def encode(raw: np.ndarray) -> bytes:
    """Encode points as JSON, rounded to six decimals."""
    return json.dumps({"points": raw.astype(float).round(6).tolist()}).encode()


KEYPOINTS = Condition(
    name="keypoints",
    raw="points",
    folder="keypoints",
    suffix=".json",
    input_suffixes=TEXT_SUFFIXES + ARRAY_SUFFIXES,
    read=read,
    resize=lambda raw, height, width: raw,  # fractions do not depend on the size
    flip=flip,
    augment=augment_points,
    render=render,
    encode=encode,
)
