"""A picture's 478 face landmarks, by MediaPipe's FaceLandmarker from its model file.

Landmarks come from the picture at a fixed working size: the detector loses faces that are only 128 pixels wide. In a
photo it also loses faces that are small beside the photo; `find_faces` looks for those through smaller windows.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from PIL import Image

from likeness.types import InputError

WORKING_SIDE = 256
"""Pixels of the shorter side that a smaller picture is brought to."""

MOST_FACES = 20
"""Faces looked for in one window."""

Landmarker = Callable[[np.ndarray], np.ndarray | None]
"""Picture uint8 RGB [H, W, 3] -> float32 [478, 2], (x, y) where [0, 1] spans the picture; None without a face."""

FaceFinder = Callable[[np.ndarray], list[np.ndarray]]
"""Picture uint8 RGB [H, W, 3] -> the landmarks of each face, float32 [478, 2], where [0, 1] spans the picture."""


@contextmanager
def open_landmarker(model: Path) -> Iterator[Landmarker]:
    """The landmarker of a `face_landmarker.task` file, for pictures of one face, for a `with` block.

    Raises:
        InputError: mediapipe is not installed, or the file is none of its models.
    """
    with open_face_finder(model, most=1) as find:
        yield lambda picture: next(iter(find(picture)), None)


@contextmanager
def open_face_finder(model: Path, *, most: int = MOST_FACES) -> Iterator[FaceFinder]:
    """The landmarker of a `face_landmarker.task` file, for pictures of up to `most` faces, for a `with` block.

    It must be closed: MediaPipe's own finaliser waits for ever where the garbage collector happens to call it.

    Raises:
        InputError: mediapipe is not installed, or the file is none of its models.
    """
    try:
        import mediapipe
        from mediapipe.tasks.python import BaseOptions, vision
    except ImportError as error:
        raise InputError("landmarks need MediaPipe: pip install 'likeness[data]'") from error
    if not model.is_file():
        raise InputError(f"{model} does not exist: give MediaPipe's face_landmarker.task")
    base = BaseOptions(model_asset_buffer=model.read_bytes())
    try:
        detector = vision.FaceLandmarker.create_from_options(
            vision.FaceLandmarkerOptions(base_options=base, num_faces=most)
        )
    except (RuntimeError, ValueError) as error:
        raise InputError(f"{model} is no model of MediaPipe's FaceLandmarker: {str(error).splitlines()[0]}") from error

    def find(picture: np.ndarray) -> list[np.ndarray]:
        height, width = picture.shape[:2]
        if (side := min(height, width)) < WORKING_SIDE:
            size = (round(width * WORKING_SIDE / side), round(height * WORKING_SIDE / side))
            picture = np.array(Image.fromarray(picture).resize(size, Image.Resampling.BICUBIC))
        found = detector.detect(mediapipe.Image(image_format=mediapipe.ImageFormat.SRGB, data=picture)).face_landmarks
        return [np.array([[point.x, point.y] for point in face], dtype=np.float32) for face in found]

    with detector:
        yield find


def find_faces(find: FaceFinder, photo: np.ndarray, *, every: bool = False) -> list[np.ndarray]:
    """The faces of a photo of any size, the largest first.

    First the whole photo is looked at, then windows of half its longer side, then of a quarter, which overlap by half.

    Args:
        find: what finds faces that are large in what it sees.
        photo: uint8 RGB [H, W, 3].
        every: look through all windows, not only until a face is found.

    Returns:
        Landmarks of each face, float64 [478, 2], in pixels of the photo.
    """
    height, width = photo.shape[:2]
    faces: list[np.ndarray] = []
    for division in (1, 2, 4):
        window = -(-max(height, width) // division)
        if (faces and not every) or (division > 1 and window < WORKING_SIDE):
            break
        for top in starts(height, window):
            for left in starts(width, window):
                seen = np.ascontiguousarray(photo[top : top + window, left : left + window])
                for fractions in find(seen):
                    face = fractions.astype(np.float64) * seen.shape[1::-1] + [left, top]
                    if whole(face, left, top, seen.shape, photo.shape) and not any(same(face, own) for own in faces):
                        faces.append(face)
    return sorted(faces, key=lambda face: -float(np.prod(np.ptp(face, axis=0))))


def starts(length: int, window: int) -> list[int]:
    """Where windows begin that cover a length and overlap by about half."""
    if window >= length:
        return [0]
    count = -(-2 * (length - window) // window)
    return [round(index * (length - window) / count) for index in range(count + 1)]


def whole(face: np.ndarray, left: int, top: int, seen: tuple[int, ...], photo: tuple[int, ...]) -> bool:
    """Whether a face is not cut by a border of its window that is no border of the photo."""
    (low_x, low_y), (high_x, high_y) = face.min(axis=0), face.max(axis=0)
    height, width = seen[:2]
    return (
        (left == 0 or low_x > left)
        and (top == 0 or low_y > top)
        and (left + width >= photo[1] or high_x < left + width)
        and (top + height >= photo[0] or high_y < top + height)
    )


def same(face: np.ndarray, other: np.ndarray) -> bool:
    """Whether two sets of landmarks show one face: their centres are less than half a face apart."""
    apart = np.hypot(*(face.mean(axis=0) - other.mean(axis=0)))
    return bool(apart < 0.5 * max(np.ptp(face, axis=0).max(), np.ptp(other, axis=0).max()))


def landmarker_name(model: Path) -> str:
    """What made keypoints: the landmarker and the beginning of its file's SHA-256."""
    return f"FaceLandmarker {hashlib.sha256(model.read_bytes()).hexdigest()[:12]}"
