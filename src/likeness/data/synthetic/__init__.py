"""License-free synthetic faces with exact mask, sketch, keypoints, attributes and captions.

They train and test the whole project without photographs. Labels are exact, because they come from the painted shapes.
A face is a pure function of (seed, index).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from likeness.data.synthetic.captions import write_captions
from likeness.data.synthetic.drawing import draw
from likeness.data.synthetic.traits import Traits, describe, sample_traits
from likeness.types import InputError

MINIMUM_SIZE, MAXIMUM_SIZE = 32, 2048


@dataclass(frozen=True, kw_only=True)
class SyntheticFace:
    """A face and its labels."""

    image: np.ndarray
    """uint8 [S, S, 3], RGB."""
    mask: np.ndarray
    """uint8 [S, S], class index 0 to 18 in the order of `likeness.conditions.mask.classes.CLASSES`."""
    sketch: np.ndarray
    """uint8 [S, S], 0 (stroke) to 255 (paper)."""
    keypoints: np.ndarray
    """float32 [68, 2], (x, y) in [0, 1], iBUG order."""
    attributes: dict[str, str | bool | float]
    """Attribute -> value; "none" if it is absent."""
    captions: tuple[str, ...]
    """Ten different captions of less than 60 words."""


def _streams(seed: int, index: int) -> tuple[Traits, np.random.Generator, np.random.Generator]:
    """Return traits and independent random streams of the image and of the captions."""
    if seed < 0 or index < 0:
        raise InputError(f"Seed and index of a synthetic face must be at least 0, not {seed} and {index}")
    first, second, third = np.random.SeedSequence([seed, index]).spawn(3)
    return sample_traits(np.random.default_rng(first)), np.random.default_rng(second), np.random.default_rng(third)


def describe_face(seed: int, index: int) -> tuple[dict[str, str | bool | float], tuple[str, ...]]:
    """Return attributes and captions of `draw_face(seed, index)`, about 100 times as fast, with the same errors."""
    traits, _, caption_stream = _streams(seed, index)
    attributes = describe(traits)
    return attributes, write_captions(attributes, caption_stream)


def draw_face(seed: int, index: int, size: int = 128) -> SyntheticFace:
    """Draw face `index` of the infinite series `seed` at `size` x `size` pixels (32 to 2048).

    The same arguments always give bit-identical results. Another size gives the same face at another resolution. Raises
    `InputError` for a negative seed or index, or a size out of range.
    """
    if not MINIMUM_SIZE <= size <= MAXIMUM_SIZE:
        raise InputError(f"Size {size} is not supported: synthetic faces have {MINIMUM_SIZE} to {MAXIMUM_SIZE} pixels")
    traits, drawing_stream, caption_stream = _streams(seed, index)
    drawing = draw(traits, size, drawing_stream)
    attributes = describe(traits)
    captions = write_captions(attributes, caption_stream)
    return SyntheticFace(**drawing._asdict(), attributes=attributes, captions=captions)
