"""`likeness inspect`: recognize a file, list its problems, and write a repaired file that has none."""

from __future__ import annotations

import json

import numpy as np
import pytest
from drawn import drawn_mask, drawn_points, drawn_sketch
from PIL import Image

from likeness.conditions import CONDITIONS
from likeness.conditions.inspection import fix, format_report, inspect
from likeness.conditions.mask import swap_classes
from likeness.conditions.mask.classes import FLIP_PAIRS, PALETTE
from likeness.types import InputError, Note

FACE = drawn_mask(128)


def saved(path, array) -> str:
    Image.fromarray(array).save(path)
    return str(path)


def test_conditions_are_recognized(tmp_path):
    (tmp_path / "points.json").write_text(json.dumps(drawn_points().tolist()))
    np.save(tmp_path / "points.npy", drawn_points())
    np.save(tmp_path / "mask.npy", FACE)
    kinds = {
        saved(tmp_path / "mask.png", PALETTE[FACE]): "mask",
        saved(tmp_path / "sketch.png", drawn_sketch()): "sketch",
        saved(tmp_path / "inverted.png", 255 - drawn_sketch()): "sketch",
        tmp_path / "points.json": "keypoints",
        tmp_path / "points.npy": "keypoints",
        tmp_path / "mask.npy": "mask",
    }
    for path, kind in kinds.items():
        assert inspect(path).condition == kind
    assert inspect(PALETTE[drawn_mask(478)]).condition == "mask"


def test_report_of_a_valid_mask():
    report = inspect(FACE)
    assert report.problems == ()
    assert report.size == (128, 128)
    table = {name: pixels for name, pixels, _ in report.classes}
    assert table["nose"] == (FACE == 2).sum()
    assert sum(fraction for _, _, fraction in report.classes) == pytest.approx(1)
    text = format_report(report)
    assert "no problems" in text
    assert "index mask" in text


def test_problems():
    def problems_after(change) -> tuple[Note, ...]:
        labels = FACE.copy()
        change(labels)
        return inspect(PALETTE[labels], "mask").problems

    def drop(*classes):
        return lambda labels: labels.__setitem__(np.isin(labels, classes), 1)

    def paint(rows, columns, value):
        return lambda labels: labels.__setitem__((slice(*rows), slice(*columns)), value)

    cases = {
        "no eyes": problems_after(drop(4, 5)),
        "only one eye (r_eye)": problems_after(drop(4)),
        "no mouth": problems_after(drop(10, 11, 12)),
        "no nose": problems_after(drop(2)),
        "hat: only 1 pixel,": problems_after(paint((2, 3), (60, 61), 14)),
        "hair: 1 separate speck under": problems_after(paint((100, 101), (5, 8), 13)),
        "left edge": problems_after(paint((60, 64), (0, 40), 1)),
        "not square": inspect(PALETTE[FACE[:, 8:120]]).problems,
        "not multiples of 8": inspect(PALETTE[FACE[:121, :121]]).problems,
        "sides look swapped": inspect(swap_classes(FACE, FLIP_PAIRS)).problems,
        "blended colors": inspect(np.asarray(Image.fromarray(PALETTE[FACE]).resize((256, 256), 1))).problems,
        "inverted": inspect(255 - drawn_sketch()).problems,
    }
    for sentence, problems in cases.items():
        assert any(sentence in problem.text for problem in problems), (sentence, problems)


def test_fix_writes_a_canonical_mask(tmp_path):
    crossed = swap_classes(drawn_mask(512), FLIP_PAIRS)
    out = fix(inspect(crossed), tmp_path / "fixed.png")
    with Image.open(out) as image:
        assert image.mode == "P"
        np.testing.assert_array_equal(np.asarray(image), drawn_mask(512))
        np.testing.assert_array_equal(np.asarray(image.convert("RGB")), PALETTE[drawn_mask(512)])
    assert inspect(out).problems == ()


def test_fix_restores_a_mask_after_lanczos(tmp_path):
    face = drawn_mask(256)
    blended = Image.fromarray(PALETTE[face]).resize((512, 512), Image.Resampling.LANCZOS)
    out = fix(inspect(blended), tmp_path / "fixed.png")
    restored = CONDITIONS["mask"].read(out).raw
    assert (restored == face.repeat(2, 0).repeat(2, 1)).mean() >= 0.995


def test_fix_writes_sketches_and_points(tmp_path):
    sketch = fix(inspect(255 - drawn_sketch()), tmp_path / "sketch.png")
    np.testing.assert_array_equal(np.asarray(Image.open(sketch)), drawn_sketch())
    points = fix(inspect(drawn_points()), tmp_path / "points.json")
    np.testing.assert_allclose(CONDITIONS["keypoints"].read(points).raw, drawn_points(), atol=1e-5)
    with pytest.raises(InputError, match=r"end in \.json"):
        fix(inspect(drawn_points()), tmp_path / "points.png")


def test_rejected_sources(tmp_path):
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    with pytest.raises(InputError, match=r"as mask: .*photograph.*as sketch: "):
        inspect(noise)
    with pytest.raises(InputError, match=r"^\S*none\.png does not exist"):
        inspect(tmp_path / "none.png")
    with pytest.raises(InputError, match="Available: mask, sketch, keypoints"):
        inspect(FACE, "masc")
