"""What a condition is: a name, a way to read what users bring, and a way to draw it for the autoencoder.

A condition's raw form is an exact array (labels, lines or points); the picture that the network sees is rendered
from it, at the size of the portrait, so that nothing is ever blended on the way.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
from PIL import Image

from likeness.types import Note

Source = str | Path | Image.Image | np.ndarray
"""What users bring: a path, a PIL image or an array."""


@dataclass(frozen=True, kw_only=True)
class Reading:
    """What was read, and what it was recognised as."""

    raw: np.ndarray
    """labels: uint8 [H, W], class index; lines: uint8 [H, W], 0 stroke to 255 paper; points: float32 [P, 2], (x, y),
    where [0, 1] spans the picture."""
    scheme: str
    """The form that was recognised, in a few words: "palette PNG, CelebAMask-HQ colours"."""
    notes: tuple[Note, ...] = ()
    """What was changed or looks odd."""
    size: tuple[float, float] | None = None
    """(width, height) of the picture that points were found in, where it is known: fractions of a wide picture are no
    fractions of a square one."""


@dataclass(frozen=True, kw_only=True)
class Condition:
    """One kind of spatial condition."""

    name: str
    """Command-line flag, API field and dataset column: all the same word."""
    raw: Literal["labels", "lines", "points"]
    """Which of the three raw forms `Reading.raw` has."""
    read: Callable[[Source], Reading]
    """What a user brings -> its raw form. Raises `InputError` with one sentence that says why not."""
    resize: Callable[[np.ndarray, int, int], np.ndarray]
    """(raw, height, width) -> raw of that size; labels are never blended."""
    flip: Callable[[np.ndarray], np.ndarray]
    """Mirror left to right, exchanging the classes or points of the person's left and right."""
    vary: Callable[[np.ndarray, np.random.Generator], np.ndarray]
    """The same, as another hand would have given it: training sees such versions beside the exact ones."""
    render: Callable[[np.ndarray, int, int], np.ndarray]
    """(raw, height, width) -> uint8 RGB [height, width, 3]: the picture that the autoencoder encodes."""
