"""Licence-free drawn faces with pixel-true mask, sketch, keypoints, attributes and captions, made on the spot.

They train and test the whole chain where no photographs may be had. What they lack in realism they make up for in
truth: every label comes from the very shapes that were painted. A face is a pure function of (seed, index).
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
    """One drawn face with all that is known of it."""

    image: np.ndarray
    """uint8 [S, S, 3], RGB."""
    mask: np.ndarray
    """uint8 [S, S], class index 0 to 18 in the order of `likeness.conditions.mask.classes.CLASSES`."""
    sketch: np.ndarray
    """uint8 [S, S], 0 stroke to 255 paper."""
    keypoints: np.ndarray
    """float32 [68, 2], (x, y) in [0, 1], in the iBUG 68 order."""
    attributes: dict[str, str | bool | float]
    """What is to be seen, in words; "none" is the word for what is absent."""
    captions: tuple[str, ...]
    """Ten different true sentences of under sixty words."""


def _streams(seed: int, index: int) -> tuple[Traits, np.random.Generator, np.random.Generator]:
    """Traits, and the streams of the drawing and of the captions, so that none of them disturbs another."""
    if seed < 0 or index < 0:
        raise InputError(f"A drawn face needs a seed and an index of 0 or more, not {seed} and {index}.")
    first, second, third = np.random.SeedSequence([seed, index]).spawn(3)
    return sample_traits(np.random.default_rng(first)), np.random.default_rng(second), np.random.default_rng(third)


def describe_face(seed: int, index: int) -> tuple[dict[str, str | bool | float], tuple[str, ...]]:
    """Attributes and captions of `draw_face(seed, index)` without drawing it; about a hundred times as fast.

    Raises `InputError` for a negative seed or index.
    """
    traits, _, caption_stream = _streams(seed, index)
    attributes = describe(traits)
    return attributes, write_captions(attributes, caption_stream)


def draw_face(seed: int, index: int, size: int = 128) -> SyntheticFace:
    """Face number `index` of the endless series `seed`, `size` x `size` pixels (32 to 2048).

    The same arguments give the same bytes, in any order of calls; another size gives the same face, drawn finer.
    Raises `InputError` for a negative seed or index, or a size out of range.
    """
    if not MINIMUM_SIZE <= size <= MAXIMUM_SIZE:
        raise InputError(f"A drawn face is {MINIMUM_SIZE} to {MAXIMUM_SIZE} pixels wide, not {size}.")
    traits, drawing_stream, caption_stream = _streams(seed, index)
    drawing = draw(traits, size, drawing_stream)
    attributes = describe(traits)
    return SyntheticFace(
        image=drawing.image,
        mask=drawing.mask,
        sketch=drawing.sketch,
        keypoints=drawing.keypoints,
        attributes=attributes,
        captions=write_captions(attributes, caption_stream),
    )
