"""A picture's 478 face landmarks, by MediaPipe's FaceLandmarker from its model file.

Landmarks come from the picture at a fixed working size: the detector loses faces that are only 128 pixels wide.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from PIL import Image

from likeness.types import InputError

WORKING_SIDE = 256
"""Pixels of the shorter side that a smaller picture is brought to."""

Landmarker = Callable[[np.ndarray], np.ndarray | None]
"""Picture uint8 RGB [H, W, 3] -> float32 [478, 2], (x, y) where [0, 1] spans the picture; None without a face."""


@contextmanager
def open_landmarker(model: Path) -> Iterator[Landmarker]:
    """The landmarker of a `face_landmarker.task` file, for a `with` block.

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
    options = vision.FaceLandmarkerOptions(base_options=BaseOptions(model_asset_buffer=model.read_bytes()), num_faces=1)
    try:
        detector = vision.FaceLandmarker.create_from_options(options)
    except (RuntimeError, ValueError) as error:
        raise InputError(f"{model} is no model of MediaPipe's FaceLandmarker: {str(error).splitlines()[0]}") from error

    def find(picture: np.ndarray) -> np.ndarray | None:
        height, width = picture.shape[:2]
        if (side := min(height, width)) < WORKING_SIDE:
            size = (round(width * WORKING_SIDE / side), round(height * WORKING_SIDE / side))
            picture = np.array(Image.fromarray(picture).resize(size, Image.Resampling.BICUBIC))
        found = detector.detect(mediapipe.Image(image_format=mediapipe.ImageFormat.SRGB, data=picture)).face_landmarks
        return np.array([[point.x, point.y] for point in found[0]], dtype=np.float32) if found else None

    with detector:
        yield find
