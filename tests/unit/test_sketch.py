"""Sketches: clean ones are unchanged, others normalized with a note, other images rejected."""

from __future__ import annotations

import numpy as np
import pytest
from drawn import drawn_mask, drawn_sketch
from PIL import Image

from likeness.conditions.mask.classes import PALETTE
from likeness.conditions.sketch import flip, read, render, resize
from likeness.types import InputError

LINES = drawn_sketch(128)


@pytest.mark.parametrize("mode", ["L", "RGB", "RGBA", "array", "fractions"])
def test_clean_drawings_are_unchanged(tmp_path, mode):
    source = tmp_path / "sketch.png"
    if mode == "array":
        source = LINES
    elif mode == "fractions":
        source = LINES / 255
    else:
        Image.fromarray(LINES).convert(mode).save(source)
    reading = read(source)
    np.testing.assert_array_equal(reading.raw, LINES)
    assert reading.notes == ()


def test_inverted_drawings():
    for size in (64, 96, 128, 256):
        lines = drawn_sketch(size)
        reading = read(255 - lines)
        np.testing.assert_array_equal(reading.raw, lines)
        assert reading.notes[0].kind == "inverted-sketch"


@pytest.mark.parametrize("kind", ["faint", "grey paper", "shadow", "cream", "faint and inverted"])
def test_poor_drawings_are_cleaned(kind):
    grey = LINES.astype(np.float64)
    shade = np.linspace(0.65, 1, 128)[None] * np.linspace(0.9, 1, 128)[:, None]
    grain = np.random.default_rng(0).normal(0, 2, grey.shape)
    source = {
        "faint": 255 - 0.25 * (255 - grey),
        "grey paper": 0.8 * grey,
        "shadow": grey * shade + grain,
        "cream": (grey * shade + grain)[..., None] * [0.98, 0.93, 0.8],
        "faint and inverted": 0.25 * (255 - grey),
    }[kind]
    reading = read(np.clip(source, 0, 255).astype(np.uint8))
    assert reading.notes[-1].kind == "uneven-paper"
    assert np.median(reading.raw) == 255
    assert ((reading.raw < 128) == (LINES < 128)).mean() > 0.97
    assert (reading.raw[LINES < 20] < 60).mean() > 0.95


def test_transparent_backgrounds_become_white():
    dark = np.dstack([np.zeros((128, 128, 3), np.uint8), 255 - LINES])
    np.testing.assert_array_equal(read(dark).raw, LINES)
    light = np.dstack([np.full((128, 128, 3), 255, np.uint8), 255 - LINES])
    np.testing.assert_array_equal(read(light).raw, LINES)


def test_other_images_are_rejected():
    y, x = np.mgrid[0:128, 0:128] / 128
    photo = np.stack([0.6 + 0.4 * np.sin(5 * x), 0.5 + 0.4 * np.cos(4 * y), 0.5 + 0.4 * np.sin(3 * x + 4 * y)], -1)
    cases = {
        "continuous tones": ("no-sketch", (255 * photo).clip(0, 255).astype(np.uint8)),
        "like a mask": ("no-sketch", PALETTE[drawn_mask()]),
        "like a class mask": ("no-sketch", drawn_mask()),
        "blank": ("blank", np.full((64, 64), 255, np.uint8)),
        "shape": ("no-sketch", np.zeros((3, 4, 5, 6))),
        "fractions must": ("no-sketch", np.full((64, 64), 7.5)),
    }
    for message, (kind, source) in cases.items():
        with pytest.raises(InputError, match=message) as caught:
            read(source)
        assert caught.value.kind == kind, message
    with pytest.raises(InputError, match=r"continuous tones .* `likeness extract"):
        read(cases["continuous tones"][1].mean(axis=2).astype(np.uint8))


def test_thin_lines_stay_dark_when_shrunk():
    sheet = np.full((512, 512), 255, np.uint8)
    sheet[:, 100:102] = 0
    sheet[300:302] = 0
    small = resize(sheet, 128, 128)
    assert small[10, 25] < 30
    assert small[75, 90] < 30
    assert small[50, 60] == 255
    assert resize(LINES, 256, 256).shape == (256, 256)
    with pytest.raises(InputError, match="sketch is 512x512"):
        resize(sheet, 128, 64)


def test_flip_and_render():
    np.testing.assert_array_equal(flip(LINES), LINES[:, ::-1])
    image = render(LINES, 128, 128)
    np.testing.assert_array_equal(image, np.repeat(LINES[..., None], 3, 2))
