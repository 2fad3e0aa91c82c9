"""Detect 478 face landmarks with MediaPipe's FaceLandmarker.

Images are enlarged to a fixed working size, because the detector misses faces that are only 128 pixels wide. It also
misses faces that are small relative to the image: `find_faces` searches for those in smaller windows.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from PIL import Image

from likeness.files import first_line
from likeness.types import InputError
from likeness.weights.hashes import file_hash

WORKING_SIDE = 256
"""Smallest shorter side of the detector's input in pixels."""

MAX_FACES = 20
"""Largest number of faces per window."""

Landmarker = Callable[[np.ndarray], np.ndarray | None]
"""Image uint8 RGB [H, W, 3] -> float32 [478, 2], (x, y) as fractions of the image size; None without a face."""

FaceFinder = Callable[[np.ndarray], list[np.ndarray]]
"""Image uint8 RGB [H, W, 3] -> landmarks of each face, float32 [478, 2], as fractions of the image size."""


@contextmanager
def open_landmarker(model: Path) -> Iterator[Landmarker]:
    """Open a `face_landmarker.task` file for images of one face, as a context manager (`open_face_finder`)."""
    with open_face_finder(model, max_faces=1) as find:
        yield lambda image: next(iter(find(image)), None)


@contextmanager
def open_face_finder(model: Path, *, max_faces: int = MAX_FACES) -> Iterator[FaceFinder]:
    """Open a `face_landmarker.task` file for images of up to `max_faces` faces, as a context manager.

    It must be closed explicitly: MediaPipe's finalizer deadlocks when the garbage collector calls it. Raises
    `InputError` if MediaPipe is not installed, or the file is not one of its models.
    """
    try:
        os.environ.setdefault("GLOG_minloglevel", "2")  # errors only
        import mediapipe
        from mediapipe.tasks.python import BaseOptions, vision
    except ImportError as error:
        raise InputError("landmarks need MediaPipe: pip install 'likeness[data]'") from error
    if not model.is_file():
        raise InputError(f"{model} does not exist: download MediaPipe's face_landmarker.task (address: docs/data.md)")
    base = BaseOptions(model_asset_buffer=model.read_bytes())
    try:
        with stderr_discarded():
            detector = vision.FaceLandmarker.create_from_options(
                vision.FaceLandmarkerOptions(base_options=base, num_faces=max_faces)
            )
            blank = np.zeros((WORKING_SIDE, WORKING_SIDE, 3), np.uint8)  # the first image logs, too
            detector.detect(mediapipe.Image(image_format=mediapipe.ImageFormat.SRGB, data=blank))
    except (RuntimeError, ValueError) as error:
        raise InputError(f"{model} is not a model of MediaPipe's FaceLandmarker: {first_line(error)}") from error

    def find(image: np.ndarray) -> list[np.ndarray]:
        height, width = image.shape[:2]
        if (side := min(height, width)) < WORKING_SIDE:
            size = (round(width * WORKING_SIDE / side), round(height * WORKING_SIDE / side))
            image = np.array(Image.fromarray(image).resize(size, Image.Resampling.BICUBIC))
        found = detector.detect(mediapipe.Image(image_format=mediapipe.ImageFormat.SRGB, data=image)).face_landmarks
        return [np.array([[point.x, point.y] for point in face], dtype=np.float32) for face in found]

    with detector:
        yield find


@contextmanager
def stderr_discarded() -> Iterator[None]:
    """Discard what C++ libraries write to stderr within a `with` block: TensorFlow Lite has no other setting."""
    sys.stderr.flush()
    saved, null = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, 2)
    try:
        yield
    finally:
        os.dup2(saved, 2)
        os.close(saved)
        os.close(null)


def find_faces(find: FaceFinder, photo: np.ndarray, *, every: bool = False) -> list[np.ndarray]:
    """Find the faces of a photo, uint8 RGB [H, W, 3]: landmarks in its pixels, float64 [478, 2], the largest first.

    `find` detects faces that are large in its input. It searches the photo, then windows of 1/2 and of 1/4 of its
    longer side, which overlap by half, until one size has a face; with `every`, all of them.
    """
    height, width = photo.shape[:2]
    faces: list[np.ndarray] = []
    for division in (1, 2, 4):
        window = -(-max(height, width) // division)
        if (faces and not every) or (division > 1 and window < WORKING_SIDE):
            break
        for top in starts(height, window):
            for left in starts(width, window):
                part = np.ascontiguousarray(photo[top : top + window, left : left + window])
                for fractions in find(part):
                    face = fractions.astype(np.float64) * part.shape[1::-1] + [left, top]
                    if uncut(face, left, top, part.shape, photo.shape) and not any(same(face, own) for own in faces):
                        faces.append(face)
    return sorted(faces, key=lambda face: -float(np.prod(np.ptp(face, axis=0))))


def starts(length: int, window: int) -> list[int]:
    """Return the starts of windows that cover a length and overlap by about half."""
    if window >= length:
        return [0]
    count = -(-2 * (length - window) // window)
    return [round(index * (length - window) / count) for index in range(count + 1)]


def uncut(face: np.ndarray, left: int, top: int, part: tuple[int, ...], photo: tuple[int, ...]) -> bool:
    """Return whether a face is inside its window, except at borders of the photo."""
    (low_x, low_y), (high_x, high_y) = face.min(axis=0), face.max(axis=0)
    height, width = part[:2]
    return (
        (left == 0 or low_x > left)
        and (top == 0 or low_y > top)
        and (left + width >= photo[1] or high_x < left + width)
        and (top + height >= photo[0] or high_y < top + height)
    )


def same(face: np.ndarray, other: np.ndarray) -> bool:
    """Return whether two sets of landmarks are of one face: their centers are less than half a face apart."""
    apart = np.hypot(*(face.mean(axis=0) - other.mean(axis=0)))
    return bool(apart < 0.5 * max(np.ptp(face, axis=0).max(), np.ptp(other, axis=0).max()))


def landmarker_name(model: Path) -> str:
    """Return the name of the landmarker with the start of its file's SHA-256."""
    return f"FaceLandmarker {file_hash(model)[:12]}"
