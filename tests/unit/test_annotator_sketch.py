"""The sketch extractor: lines at edges, white elsewhere, comparable at all sizes."""

from __future__ import annotations

import numpy as np
import pytest
from drawn import drawn_mask
from PIL import Image
from scipy import ndimage

from likeness.annotators.sketch import extract_sketch
from likeness.conditions import CONDITIONS
from likeness.types import InputError

TONES = np.array([40, 200, 180, 60, 90, 90, 100, 100, 190, 190, 80, 150, 150, 70, 60, 120, 120, 185, 110], np.uint8)


def photo(size: int) -> np.ndarray:
    """A shaded face with grain, uint8 [size, size, 3]."""
    tones = Image.fromarray(TONES[drawn_mask(512)]).resize((size, size), Image.Resampling.LANCZOS)
    grain = np.random.default_rng(0).normal(0, 3, (size, size))
    shade = np.linspace(0.8, 1.1, size)[None]
    grey = ndimage.gaussian_filter(np.asarray(tones) * shade, size / 400) + grain
    return np.repeat(grey.clip(0, 255).astype(np.uint8)[..., None], 3, axis=2)


def test_lines_are_at_edges_and_paper_is_white():
    sketch = extract_sketch(photo(256))
    labels = drawn_mask(256)
    edges = ndimage.morphological_gradient(labels, size=3) > 0
    distance = ndimage.distance_transform_edt(~edges)
    ink = sketch < 128
    assert 0.02 < ink.mean() < 0.2
    assert (distance[ink] <= 5).mean() > 0.95
    assert (sketch == 255).mean() > 0.7
    assert ndimage.binary_dilation(ink, iterations=4)[edges].mean() > 0.6


def test_sizes_are_comparable():
    ink = {size: (extract_sketch(photo(size)) < 128).mean() for size in (128, 256, 512)}
    assert max(ink.values()) < 1.6 * min(ink.values())


def test_the_reader_accepts_the_result_unchanged():
    sketch = extract_sketch(Image.fromarray(photo(256)))
    reading = CONDITIONS["sketch"].read(sketch)
    np.testing.assert_array_equal(reading.raw, sketch)
    assert reading.notes == ()


def test_a_flat_image_gives_no_lines():
    assert (extract_sketch(np.full((64, 64, 3), 128, np.uint8)) == 255).all()


def test_invalid_input_is_rejected():
    with pytest.raises(InputError, match="uint8"):
        extract_sketch(photo(64) / 255)
    with pytest.raises(InputError, match="at least 32"):
        extract_sketch(photo(64)[:16])
