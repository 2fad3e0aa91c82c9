"""The types of spatial conditions: a reader turns user input into an exact array, a renderer turns it into an image."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from PIL import Image

from likeness.types import Note

Source = str | Path | Image.Image | np.ndarray
"""User input: a path, a PIL image or an array."""

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".jfif", ".png", ".webp", ".avif", ".heic", ".heif", ".bmp", ".tif", ".tiff", ".gif")
ARRAY_SUFFIXES = (".npy", ".npz")


@dataclass(frozen=True, kw_only=True)
class Reading:
    """A condition as read, and the format it was read from."""

    raw: np.ndarray
    """labels: uint8 [H, W], class index; lines: uint8 [H, W], 0 (stroke) to 255 (paper); points: float32 [P, 2],
    (x, y) as fractions of the image size."""
    scheme: str
    """The recognized format, for example "palette PNG, CelebAMask-HQ colors"."""
    notes: tuple[Note, ...] = ()
    """What the reader repaired and what looks wrong."""
    size: tuple[float, float] | None = None
    """(width, height) of the image that the points refer to, if known: it fixes the aspect ratio of their unit."""


@dataclass(frozen=True, kw_only=True)
class Condition:
    """One kind of spatial condition: everything that other packages need to know about it."""

    name: str
    """Key of `CONDITIONS` and API field."""
    raw: Literal["labels", "lines", "points"]
    """Which form `Reading.raw` has."""
    folder: str
    """Folder of its files in a dataset."""
    suffix: str
    """Suffix of its canonical file."""
    input_suffixes: tuple[str, ...]
    """Suffixes of files that may contain it."""
    repairable: frozenset[str] = frozenset()
    """Kinds of notes that rewriting the file in its canonical form resolves."""
    read: Callable[..., Reading]
    """(source, name="") -> reading; `name` replaces the path in error messages. Raises `InputError` with a kind."""
    resize: Callable[[np.ndarray, int, int], np.ndarray]
    """(raw, height, width) -> raw of that size."""
    flip: Callable[[np.ndarray], np.ndarray]
    """Mirror horizontally and swap the classes or points of the person's left and right."""
    augment: Callable[[np.ndarray, np.random.Generator], np.ndarray]
    """Random variation that resembles another annotator's work, for training."""
    render: Callable[[np.ndarray, int, int], np.ndarray]
    """(raw, height, width) -> uint8 RGB [height, width, 3], the image that the autoencoder encodes."""
    encode: Callable[[np.ndarray], bytes]
    """raw -> content of its canonical file."""

    def file(self, stem: str) -> str:
        """Path of its file in a dataset, for an image with this stem."""
        return f"{self.folder}/{stem}{self.suffix}"


def describe(source: Any) -> str:
    """Return the name of `source` for messages: its path, or its type."""
    if isinstance(source, str | os.PathLike):
        return str(source)
    if isinstance(source, dict):
        return "the document"
    return "the array" if isinstance(source, np.ndarray) else "the image"
