"""Masks in all published formats are recognized, and ambiguous ones rejected."""

from __future__ import annotations

import numpy as np
import pytest
from drawn import drawn_mask
from PIL import Image

from likeness.conditions.mask import flip, read, render, resize, swap_classes
from likeness.conditions.mask.classes import (
    CLASS_INDEX,
    CLASSES,
    FLIP_PAIRS,
    ORDERS,
    PALETTE,
    PALETTES,
    order_table,
)
from likeness.conditions.mask.repair import unique_colors
from likeness.types import InputError

FACE = drawn_mask(128)
CROSSED = swap_classes(FACE, FLIP_PAIRS)


def test_published_classes():
    assert len(CLASSES) == 19
    assert CLASSES[4] == "l_eye"
    assert CLASSES[17] == "neck"
    assert tuple(PALETTE[4]) == (51, 51, 255)
    assert tuple(PALETTES["MaskGAN UI"][4]) == (204, 0, 204)
    assert all(sorted(order) == sorted(CLASSES) for order in ORDERS.values())
    # SegFace's table as its users publish it
    segface = [0, 17, 1, 18, 9, 8, 7, 6, 5, 4, 2, 10, 12, 11, 13, 3, 14, 15, 16]
    assert order_table("facer or SegFace").tolist() == segface


@pytest.mark.parametrize("name", PALETTES)
@pytest.mark.parametrize("form", ["palette", "adaptive", "RGB", "BGR", "RGBA", "array"])
def test_palettes_and_formats(tmp_path, name, form):
    rgb, path = PALETTES[name][FACE], tmp_path / "mask.png"
    if form == "palette":
        image = Image.fromarray(FACE)
        image.putpalette(PALETTES[name].ravel().tolist())
    elif form == "adaptive":  # another arrangement of the color table
        image = Image.fromarray(rgb).quantize(32, dither=Image.Dither.NONE)
    else:
        image = Image.fromarray(rgb[..., ::-1] if form == "BGR" else rgb)
    if form == "RGBA":
        image = image.convert("RGBA")
    image.save(path)
    reading = read(rgb if form == "array" else path)
    np.testing.assert_array_equal(reading.raw, FACE)
    assert name in reading.scheme
    assert ("BGR" in reading.scheme) == (form == "BGR")


@pytest.mark.parametrize("name", PALETTES)
def test_geometry_decides_between_palettes_with_swapped_sides(name):
    reading = read(PALETTES[name][CROSSED])
    np.testing.assert_array_equal(reading.raw, FACE)


def test_one_swapped_pair_is_corrected_with_a_note():
    reading = read(PALETTE[swap_classes(FACE, ((4, 5),))])
    np.testing.assert_array_equal(reading.raw, FACE)
    assert "swapped-sides" in [note.kind for note in reading.notes]


def test_numbers_keep_their_sides_with_a_note():
    reading = read(CROSSED)
    np.testing.assert_array_equal(reading.raw, CROSSED)
    assert [note.kind for note in reading.notes] == ["swapped-sides"] * 3
    assert not read(FACE).notes


def test_a_single_ear_is_on_its_side_of_the_nose():
    one_ear = np.where(FACE == 8, 0, FACE).astype(np.uint8)  # the person's right one, on the viewer's left
    crossed = swap_classes(one_ear, FLIP_PAIRS)
    for palette in PALETTES.values():
        np.testing.assert_array_equal(read(palette[crossed]).raw, one_ear)
    assert any("l_ear is on the viewer's left" in note.text for note in read(crossed).notes)
    assert not read(one_ear).notes


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("form", ["png", "npy", "npz", "one-hot first", "one-hot last", "grey RGB", "float"])
def test_class_numbers_in_every_order(tmp_path, order, form):
    numbers = np.argsort(order_table(order))[FACE].astype(np.uint8)
    planes = np.eye(19, dtype=np.uint8)[numbers]
    source = tmp_path / f"mask.{form}"
    if form == "png":
        Image.fromarray(numbers).save(source)
    elif form == "npy":
        np.save(source, numbers.astype(np.int64))
    elif form == "npz":
        np.savez(source, mask=planes)
    else:
        source = {
            "one-hot first": planes.transpose(2, 0, 1),
            "one-hot last": planes.astype(bool),
            "grey RGB": np.repeat(numbers[..., None], 3, axis=2),
            "float": numbers.astype(np.float32),
        }[form]
    reading = read(source)
    np.testing.assert_array_equal(reading.raw, FACE)
    assert order in reading.scheme


def test_unknown_orders_are_rejected():
    generator = np.random.default_rng(7)
    rejected = 0
    for _ in range(40):
        numbers = np.concatenate([[0], 1 + generator.permutation(18)])[FACE]
        try:
            reading = read(numbers)
        except InputError:
            rejected += 1
            continue
        np.testing.assert_array_equal(reading.raw, FACE)
    assert rejected >= 38


def test_part_files(tmp_path):
    official = {CLASSES.index("earring"): "ear_r", CLASSES.index("necklace"): "neck_l"}
    face = FACE.copy()
    face[60:66, 30:34] = 15
    skin = np.isin(face, range(1, 13))  # the official part files overlap
    for index in range(1, 19):
        part = skin if index == 1 else face == index
        if part.any():
            file = tmp_path / f"00012_{official.get(index, CLASSES[index])}.png"
            Image.fromarray((part * 255).astype(np.uint8)).convert("RGB").save(file)
    reading = read(tmp_path)
    np.testing.assert_array_equal(reading.raw, face)
    assert "part files" in reading.scheme
    hair = (face == CLASSES.index("hair")).astype(np.uint8)  # white, transparent where there is no hair
    Image.fromarray(np.dstack([np.full((*face.shape, 3), 255, np.uint8), 255 * hair])).save(tmp_path / "00012_hair.png")
    np.testing.assert_array_equal(read(tmp_path).raw, face)
    Image.fromarray(13 * hair).save(tmp_path / "00012_hair.png")
    with pytest.raises(InputError, match=r"00012_hair\.png is empty: its largest value is 13"):
        read(tmp_path)
    Image.fromarray(np.zeros((128, 128), np.uint8)).save(tmp_path / "00013_skin.png")
    with pytest.raises(InputError, match="parts of 2 faces"):
        read(tmp_path)


def test_transparent_pixels_of_grey_masks_are_background():
    alpha = np.where(CLASSES.index("hair") == FACE, 0, 255).astype(np.uint8)
    reading = read(Image.merge("LA", [Image.fromarray(FACE), Image.fromarray(alpha)]))
    np.testing.assert_array_equal(reading.raw, np.where(alpha, FACE, 0))
    assert reading.notes[0].kind == "transparency"


def test_unique_colors_of_large_images():
    packed = np.random.default_rng(0).integers(0, 1 << 24, (1024, 1024)).astype(np.int32)
    packed[:1000] = 7
    values, which = unique_colors(packed)
    np.testing.assert_array_equal(values[which], packed)
    np.testing.assert_array_equal(values, np.unique(packed))


@pytest.mark.parametrize("damage", ["bilinear", "bicubic", "lanczos", "jpeg"])
def test_blended_masks_are_repaired_and_flagged(tmp_path, damage):
    face = drawn_mask(512)
    image = Image.fromarray(PALETTE[face])
    if damage == "jpeg":
        path, truth = tmp_path / "mask.jpg", face
        image.save(path, quality=85)
    else:
        path, truth = tmp_path / "mask.png", resize(face, 256, 256)
        image.resize((256, 256), Image.Resampling[damage.upper()]).save(path)
    reading = read(path)
    assert reading.notes[0].kind == "blended-labels"
    assert (reading.raw == truth).mean() >= 0.995
    assert set(np.unique(reading.raw)) == set(np.unique(truth))  # no new classes


def test_rejected_sources(tmp_path):
    generator = np.random.default_rng(0)
    noise = generator.integers(0, 256, (64, 64, 3), dtype=np.uint8)
    (tmp_path / "empty.png").touch()
    (tmp_path / "text.png").write_text("not an image")
    Image.fromarray(FACE).save(tmp_path / "whole.png")
    (tmp_path / "cut.png").write_bytes((tmp_path / "whole.png").read_bytes()[:200])
    Image.fromarray(FACE).save(tmp_path / "numbers.jpg")
    (tmp_path / "folder").mkdir()
    blended = np.asarray(Image.fromarray(drawn_mask(512)).resize((256, 256), Image.Resampling.BILINEAR))
    two_colors = np.array([[9, 120, 33], [240, 10, 90]], np.uint8)[(FACE > 0).astype(int)]
    cases = {
        "photograph, not a mask": ("off-palette", noise),
        "gray values from": ("off-palette", FACE * 10),
        "match no known mask palette": ("off-palette", two_colors),
        "no face": ("blank", np.zeros((64, 64), np.uint8)),
        "mostly white": ("off-palette", np.full((64, 64), 255, np.uint8)),
        "blended by a smooth resize": ("blended-labels", blended),
        "JPEG": ("off-palette", tmp_path / "numbers.jpg"),
        "0 bytes": ("corrupt-file", tmp_path / "empty.png"),
        "not a readable image": ("corrupt-file", tmp_path / "text.png"),
        "truncated": ("corrupt-file", tmp_path / "cut.png"),
        "does not exist": ("missing-file", tmp_path / "none.png"),
        "no part files": ("off-palette", tmp_path / "folder"),
        "fractional": ("off-palette", np.full((64, 64), 0.5)),
        "no class or several": ("off-palette", np.zeros((19, 64, 64), np.uint8) + (np.arange(19) < 2)[:, None, None]),
        "partly transparent": ("off-palette", np.dstack([PALETTE[FACE], np.full(FACE.shape, 100, np.uint8)])),
        "too small": ("corrupt-file", np.ones((4, 4), np.uint8)),
        "shape": ("off-palette", np.ones((2, 3, 4, 5))),
    }
    for message, (kind, source) in cases.items():
        with pytest.raises(InputError, match=message) as caught:
            read(source)
        assert caught.value.kind == kind, message
        assert "\n" not in str(caught.value)


def test_exif_orientation_is_applied(tmp_path):
    image = Image.fromarray(FACE).rotate(90, expand=True)
    exif = Image.Exif()
    exif[0x0112] = 6  # rotate by 90 degrees clockwise
    image.save(tmp_path / "mask.png", exif=exif)
    np.testing.assert_array_equal(read(tmp_path / "mask.png").raw, FACE)


def test_resize_takes_the_majority():
    small = resize(drawn_mask(512), 64, 64)
    assert set(np.unique(small)) <= set(np.unique(FACE))
    checks = np.array([[1, 1, 2, 2], [1, 2, 2, 1], [5, 5, 0, 13], [5, 5, 13, 0]], np.uint8)
    # three of four; three of four; all; a tie of 0 and 13, which the center pixel decides
    assert resize(checks, 2, 2).tolist() == [[1, 2], [5, 0]]
    np.testing.assert_array_equal(resize(FACE, 256, 256), FACE.repeat(2, 0).repeat(2, 1))
    np.testing.assert_array_equal(resize(resize(FACE, 256, 256), 128, 128), FACE)
    uneven = resize(FACE, 100, 100)
    assert abs(np.argwhere(uneven == 2).mean() / 100 - np.argwhere(FACE == 2).mean() / 128) < 0.005
    with pytest.raises(InputError, match=r"128x128, but the image is 128x96: crop or pad"):
        resize(FACE, 96, 128)


def test_flip_swaps_sides_and_is_its_own_inverse():
    mirrored = flip(FACE)
    assert CLASSES[mirrored[57, 78]] == "l_eye"
    np.testing.assert_array_equal(flip(mirrored), FACE)
    assert not read(mirrored).notes


def test_one_class_alone_is_read_by_its_color():
    for index in range(1, len(CLASSES)):
        image = Image.fromarray(np.full((16, 16), index, np.uint8))
        image.putpalette(PALETTE.ravel().tolist())
        assert (read(image).raw == index).all()


def test_render_reads_back_exactly():
    for size in (64, 128, 200):
        image = render(FACE, size, size)
        assert image.shape == (size, size, 3)
        np.testing.assert_array_equal(read(image).raw, resize(FACE, size, size))


def test_ignored_pixels_take_the_nearest_class():
    """255 means ignore in many data sets, usually at the borders of classes."""
    border = FACE.copy()
    border[1:][FACE[1:] != FACE[:-1]] = 255
    reading = read(border)
    assert [note.kind for note in reading.notes] == ["ignored-pixels"]
    assert (reading.raw == FACE).mean() > 0.95
    assert np.array_equal(reading.raw[border != 255], FACE[border != 255])
    for palette in (PALETTE, 255 - PALETTE):  # of CelebAMask-HQ, and any other
        image = Image.fromarray(border)
        image.putpalette(palette.astype(np.uint8).tobytes())
        assert np.array_equal(read(image).raw, reading.raw)
    mostly = FACE.copy()
    mostly[: len(FACE) // 2] = 255
    with pytest.raises(InputError, match=r"is 255 \(ignored\)"):
        read(mostly)


def test_forms_of_files(tmp_path):
    """The content tells a JPEG from a PNG; on demand, large files keep their resolution."""
    Image.fromarray(FACE).save(tmp_path / "numbers.jpg", format="PNG")
    assert np.array_equal(read(tmp_path / "numbers.jpg").raw, FACE)
    large = resize(FACE, 4096, 4096)
    Image.fromarray(large).save(tmp_path / "large.png")
    assert read(tmp_path / "large.png").raw.shape == (2048, 2048)
    assert np.array_equal(read(tmp_path / "large.png", full=True).raw, large)


def test_foreign_class_numbers_are_rejected():
    """A face in the numbering of Face Synthetics, which shares the first three classes with the canonical order."""
    numbers = {"r_eye": 3, "l_eye": 4, "r_brow": 5, "l_brow": 6, "r_ear": 7, "l_ear": 8, "mouth": 9, "u_lip": 10}
    numbers |= {"l_lip": 11, "neck": 12, "cloth": 15, "eye_g": 16, "hat": 17}
    table = np.arange(len(CLASSES), dtype=np.uint8)
    for name, number in numbers.items():
        table[CLASS_INDEX[name]] = number
    with pytest.raises(InputError, match="do not clearly fit a known class order"):
        read(table[FACE])
