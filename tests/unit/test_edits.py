"""Mask algebra: exact on small masks, and on drawn faces always labels, never more than what was asked for."""

from __future__ import annotations

import dataclasses
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from drawn import drawn_mask
from PIL import Image
from scipy import ndimage

from builders import run
from likeness.conditions import edits
from likeness.conditions.classes import CLASS_INDEX, CLASSES
from likeness.conditions.edits import BENEATH, SHOWS
from likeness.conditions.mask import flip, read, resize
from likeness.data.synthetic import draw_face
from likeness.data.synthetic.drawing import draw
from likeness.data.synthetic.traits import sample_traits
from likeness.types import InputError

FACES = [draw_face(3, index, 96).mask for index in range(8)]


def labels(*rows: list[int]) -> np.ndarray:
    return np.array(rows, dtype=np.uint8)


def symmetric_face(size: int = 96) -> np.ndarray:
    """Equal to its mirror image."""
    face = drawn_mask(size)
    face[:, size // 2 :] = flip(face)[:, size // 2 :]
    np.testing.assert_array_equal(flip(face), face)
    return face


def shares(mask: np.ndarray, name: str) -> int:
    return int((mask == CLASS_INDEX[name]).sum())


def test_the_tables_order_all_classes_from_the_back():
    assert set(BENEATH) == set(SHOWS) == set(CLASSES)
    drawn: list[str] = []
    while len(drawn) < len(CLASSES):  # each class after all that it lies on: possible only without a circle
        ready = [name for name in CLASSES if name not in drawn and set(BENEATH[name]) <= set(drawn)]
        assert ready, f"{set(CLASSES) - set(drawn)} lie on one another"
        drawn += ready
    assert all(set(SHOWS[name]) <= set(BENEATH[name]) for name in CLASSES)


def test_growing_covers_what_lies_beneath_and_nothing_else():
    row = labels([0, 0, 13, 1, 6, 1, 1])
    assert edits.grow(row, "hair", 1).tolist() == [[0, 13, 13, 13, 6, 1, 1]]
    assert edits.grow(row, "hair", 2).tolist() == [[13, 13, 13, 13, 6, 1, 1]]
    assert edits.grow(row, "hair", 3).tolist() == [[13, 13, 13, 13, 6, 13, 1]]
    assert edits.grow(row, "hair", 2, over="l_brow").tolist() == [[13, 13, 13, 13, 13, 1, 1]]
    assert edits.grow(row, "skin", 9).tolist() == [[1, 1, 13, 1, 6, 1, 1]]
    assert edits.grow(row, "hair", 0).tolist() == row.tolist()


def test_growing_is_round():
    dot = np.zeros((5, 5), np.uint8)
    dot[2, 2] = 13
    down, across = np.indices(dot.shape) - 2
    for radius in (1, 1.5, 2, 2.4):
        np.testing.assert_array_equal(edits.grow(dot, "hair", radius) == 13, down**2 + across**2 <= radius**2)


def test_two_growing_classes_share_by_nearness():
    assert edits.grow(labels([11, 1, 1, 12]), ("u_lip", "l_lip"), 3).tolist() == [[11, 11, 12, 12]]
    assert edits.grow(labels([11, 1, 12]), ("l_lip", "u_lip"), 3).tolist() == [[11, 12, 12]]
    assert edits.grow(labels([12, 10, 10]), ("mouth", "l_lip"), 3).tolist() == [[12, 10, 10]]


def test_shrinking_draws_back_from_what_lies_beneath_only():
    row = labels([0, 13, 13, 13, 13, 13, 1])
    assert edits.shrink(row, "hair", 1).tolist() == [[0, 0, 13, 13, 13, 1, 1]]
    assert edits.shrink(row, "hair", 2).tolist() == [[0, 0, 0, 13, 1, 1, 1]]
    assert edits.shrink(row, "hair", 3).tolist() == [[0, 0, 0, 1, 1, 1, 1]]  # as near to both: the higher
    assert edits.shrink(labels([0, 1, 1, 4, 1, 1, 0]), "skin", 1).tolist() == [[0, 0, 1, 4, 1, 0, 0]]
    assert edits.shrink(labels([1, 12, 10, 10, 10, 11, 1]), "mouth", 1).tolist() == [[1, 12, 12, 10, 11, 11, 1]]


@pytest.mark.parametrize("name", ["hair", "skin", "cloth", "nose"])
def test_growing_and_shrinking_again_nearly_restores(name):
    for face in FACES:
        grown = edits.grow(face, name, 3)
        again = edits.shrink(grown, name, 3)
        assert shares(grown, name) > 1.03 * shares(face, name)
        assert (grown == CLASS_INDEX[name])[face == CLASS_INDEX[name]].all()
        assert (again != face).mean() < 0.012
        assert shares(edits.shrink(face, name, 3), name) < shares(face, name)


def test_what_is_removed_shows_what_lies_beneath():
    assert edits.remove(labels([13, 6, 6, 13], [1, 1, 1, 1]), "l_brow").tolist() == [[13, 1, 1, 13], [1, 1, 1, 1]]
    tall = labels(*[[2, 3, 3, 3, 1]] * 12)
    np.testing.assert_array_equal(edits.remove(tall, "eye_g"), [[2, 1, 1, 1, 1]] * 12)  # the nose grows no wings
    assert edits.remove(labels([1, 12, 10, 10, 11, 1]), "mouth").tolist() == [[1, 12, 12, 11, 11, 1]]
    assert edits.remove(labels([1, 12, 10, 10, 11, 1]), ("mouth", "u_lip", "l_lip")).tolist() == [[1] * 6]
    tall = labels(*[[0, 0, 13, 13, 13, 1, 1]] * 12)
    np.testing.assert_array_equal(edits.remove(tall, "hair"), [[0, 0, 0, 1, 1, 1, 1]] * 12)
    assert edits.remove(labels([14, 14, 13, 13]), ("hair", "hat")).tolist() == [[0, 0, 0, 0]]
    assert edits.remove(labels([2, 16, 16, 14]), "necklace").tolist() == [[2, 2, 14, 14]]  # nothing of its own there
    assert edits.remove(labels([0, 1]), "hat").tolist() == [[0, 1]]


def test_a_head_without_its_hair_does_not_fill_the_picture():
    mask = np.full((11, 20), 13, np.uint8)
    mask[:, :3] = 1  # 11 pixels high: skin spreads 3 pixels
    bald = edits.remove(mask, "hair")
    np.testing.assert_array_equal(bald, np.where(np.arange(20) < 6, 1, 0) * np.ones((11, 1), int))


def test_removing_glasses_agrees_with_the_face_drawn_without_them(monkeypatch):
    """Also the figures in the docstring of `SHOWS`."""

    def right() -> float:
        found = []
        for index in range(10):
            traits = dataclasses.replace(sample_traits(np.random.default_rng(index)), glasses="square", hat="none")
            worn, bare = (
                draw(dataclasses.replace(traits, glasses=kind), 96, np.random.default_rng(0)).mask
                for kind in ("sunglasses", "none")
            )
            under = (worn == CLASS_INDEX["eye_g"]) & ~np.isin(bare, (4, 5, 6, 7))  # hidden eyes are lost
            found.append((edits.remove(worn, "eye_g") == bare)[under].mean())
        return float(np.mean(found))

    assert right() == pytest.approx(0.94, abs=0.006)
    monkeypatch.setitem(edits.SHOWS, "eye_g", BENEATH["eye_g"])
    assert right() == pytest.approx(0.89, abs=0.006)


def test_a_mirrored_mask_exchanges_sides_and_twice_is_the_same():
    np.testing.assert_array_equal(edits.mirror(labels([4, 0, 13])), labels([13, 0, 5]))
    for face in FACES:
        np.testing.assert_array_equal(edits.mirror(edits.mirror(face)), face)


def test_a_brow_makes_the_other_like_itself():
    face = symmetric_face()
    changed = edits.grow(face, "l_brow", 1.5)
    assert shares(changed, "l_brow") > shares(changed, "r_brow")
    both = edits.mirror(changed, "l_brow")
    np.testing.assert_array_equal(both, edits.grow(face, ("l_brow", "r_brow"), 1.5))
    np.testing.assert_array_equal(edits.mirror(changed, ("l_brow", "r_brow")), flip(changed))


def test_what_is_mirrored_does_not_move_the_middle():
    face = symmetric_face(256)
    raised = edits.paste(face, np.roll(face, -12, axis=0), "l_brow")
    assert shares(raised, "l_brow") == shares(face, "l_brow")
    result = edits.mirror(raised, "l_brow")
    np.testing.assert_array_equal(result == CLASS_INDEX["l_brow"], raised == CLASS_INDEX["l_brow"])
    np.testing.assert_array_equal(result == CLASS_INDEX["r_brow"], flip(raised) == CLASS_INDEX["r_brow"])


def test_hair_is_mirrored_about_the_face_not_the_picture():
    face = symmetric_face()
    face[20:50, 8:20][face[20:50, 8:20] == 0] = 13  # a strand on the viewer's left
    moved = np.roll(face, 5, axis=1)
    result = edits.mirror(moved, "hair")
    np.testing.assert_array_equal(result == 13, np.roll(flip(face), 5, axis=1) == 13)
    features = np.isin(moved, range(2, 13))
    np.testing.assert_array_equal(result[features], moved[features])


def test_a_tilted_face_is_mirrored_about_its_own_axis():
    face = symmetric_face(256)
    tilted = ndimage.rotate(edits.remove(face, "r_brow"), 12, reshape=False, order=0, mode="nearest")
    expected = ndimage.rotate(face, 12, reshape=False, order=0, mode="nearest")
    brow = edits.mirror(tilted, "l_brow") == CLASS_INDEX["r_brow"]
    true = expected == CLASS_INDEX["r_brow"]
    assert (brow & true).sum() / (brow | true).sum() > 0.7


def test_pasting_a_mask_into_itself_changes_nothing():
    for face in FACES:
        for index in np.unique(face)[1:]:
            for align in (False, True):
                np.testing.assert_array_equal(edits.paste(face, face, CLASSES[index], align=align), face)


def test_pasting_replaces_and_spares_what_lies_on_top():
    row, other = labels([0, 13, 1, 6, 1, 0]), labels([14, 14, 14, 14, 1, 13])
    assert edits.paste(row, other, "hat").tolist() == [[14, 14, 14, 6, 1, 0]]
    assert edits.paste(row, other, "hat", over=("l_brow",)).tolist() == [[14, 14, 14, 14, 1, 0]]
    assert edits.paste(row, other, ("hair", "hat")).tolist() == [[14, 14, 14, 6, 1, 13]]
    row, other = labels(*[[0, 13, 1, 6, 1, 0]] * 12), labels(*[[14, 14, 14, 14, 1, 13]] * 12)
    np.testing.assert_array_equal(edits.paste(row, other, "hair"), [[0, 1, 1, 6, 1, 13]] * 12)  # its own hair is gone


def test_pasting_aligns_faces_of_other_places_and_sizes():
    face = edits.remove(FACES[1], "hat")
    hatted = face.copy()
    hatted[5:30, 25:70] = np.where(np.isin(face[5:30, 25:70], (0, 1, 13)), 14, face[5:30, 25:70])
    expected = edits.paste(face, hatted, "hat")
    assert shares(expected, "hat") == shares(hatted, "hat")
    large = np.roll(hatted, (4, -7), (0, 1)).repeat(2, 0).repeat(2, 1)
    np.testing.assert_array_equal(edits.paste(face, large, "hat", align=True), expected)
    assert (edits.paste(face, large, "hat") == expected).mean() < 0.97
    crossed = edits.exchange(hatted, "l_eye", "r_eye")  # wrong sides do not turn the face over
    np.testing.assert_array_equal(edits.paste(face, crossed, "hat", align=True), expected)


def test_holes_are_closed_and_faces_are_not():
    ring = np.zeros((7, 7), np.uint8)
    ring[1:6, 1:6] = 13
    ring[2:5, 2:5] = [[0, 1, 13], [13, 13, 13], [17, 13, 6]]
    closed = ring.copy()
    closed[2, 2:4] = closed[4, 2] = 13  # the brow is on top
    np.testing.assert_array_equal(edits.fill_holes(ring, "hair"), closed)
    ring[2:5, 2:5] = [[1, 1, 1], [1, 4, 1], [1, 1, 1]]
    np.testing.assert_array_equal(edits.fill_holes(ring, "hair"), ring)
    ring[0, 3] = ring[1, 3] = 0
    ring[2:5, 2:5] = 0  # open to the outside
    np.testing.assert_array_equal(edits.fill_holes(ring, "hair"), ring)


def test_classes_are_renamed_and_exchanged():
    row = labels([0, 14, 13, 4, 5, 5])
    assert edits.rename(row, "hat", "hair").tolist() == [[0, 13, 13, 4, 5, 5]]
    assert edits.exchange(row, "l_eye", "r_eye").tolist() == [[0, 14, 13, 5, 4, 4]]
    assert edits.exchange(row, "hat", "cloth").tolist() == [[0, 18, 13, 4, 5, 5]]


def test_interpolation_begins_and_ends_exactly():
    for first, second in pairwise(FACES):
        np.testing.assert_array_equal(edits.interpolate(first, second, 0), first)
        np.testing.assert_array_equal(edits.interpolate(first, second, 1), second)
    large = draw_face(3, 1, 192).mask
    np.testing.assert_array_equal(edits.interpolate(FACES[0], large, 1), resize(large, 96, 96))
    whole, part = labels([1, 1, 1, 1]), labels([1, 1, 0, 0])
    np.testing.assert_array_equal(edits.interpolate(whole, part, 0), whole)
    np.testing.assert_array_equal(edits.interpolate(whole, part, 1), part)
    only_parts = labels([3, 3, 4, 4]), labels([3, 4, 4, 4])
    for t in (0, 1):
        np.testing.assert_array_equal(edits.interpolate(*only_parts, t), only_parts[t])


def test_half_way_the_border_is_half_way():
    first, second = labels([0, 0, 0, 0, 0, 13, 13, 13, 13]), labels([0, 13, 13, 13, 13, 13, 13, 13, 13])
    assert edits.interpolate(first, second, 0.5).tolist() == [[0, 0, 0, 13, 13, 13, 13, 13, 13]]
    assert edits.interpolate(first, second, 0.75).tolist() == [[0, 0, 13, 13, 13, 13, 13, 13, 13]]


def test_a_moved_feature_travels_whole():
    first, second = (np.ones((20, 20), np.uint8) for _ in range(2))
    first[2:4, 3:9] = second[14:16, 7:13] = 6
    middle = np.ones((20, 20), np.uint8)
    middle[8:10, 5:11] = 6
    np.testing.assert_array_equal(edits.interpolate(first, second, 0.5), middle)
    for one, other in pairwise(FACES):
        for t in (0.25, 0.5, 0.75):
            between = edits.interpolate(one, other, t)
            for name in ("l_brow", "r_brow", "l_eye", "r_eye", "nose", "u_lip", "l_lip"):
                least = min(shares(one, name), shares(other, name))
                assert shares(between, name) >= 0.4 * least, (name, t)


def test_a_brow_appears_as_the_fringe_gives_way():
    fringe, brow = np.ones((12, 12), np.uint8), np.ones((12, 12), np.uint8)
    fringe[:11] = brow[:3] = 13
    brow[5:7, 3:9] = 6
    assert not (edits.interpolate(fringe, brow, 0.55) == 6).any()
    late = edits.interpolate(fringe, brow, 0.95)
    assert (late[5:7, 3:9] == 6).all()


def test_areas_change_monotonely():
    times = np.linspace(0, 1, 7)
    for face in FACES[:4]:
        grown = edits.grow(face, "hair", 8)
        areas = [shares(edits.interpolate(face, grown, t), "hair") for t in times]
        assert areas == sorted(areas)
        assert areas[0] < areas[3] < areas[-1]
        without = edits.remove(face, "cloth")
        areas = [shares(edits.interpolate(face, without, t), "cloth") for t in times]
        assert areas == sorted(areas, reverse=True)
        assert areas[-1] == 0 < areas[3] < areas[0]


def test_a_surface_that_is_the_same_in_both_stays():
    first, second = FACES[0], FACES[2]
    plain = [edits.remove(face, edits.FEATURES) for face in (first, second)]
    left, reached = plain[0] == plain[1], plain[0] == plain[1]
    for t in np.linspace(0, 1, 6):
        between = edits.interpolate(*plain, t)
        assert (between == plain[0])[plain[0] == plain[1]].all()
        now = between == plain[1]
        assert now[reached].all()  # a pixel that has arrived stays
        reached = reached | now
        left = left | (between != plain[0])
    assert reached.all()


EVERY = {
    "grow": lambda face, name: edits.grow(face, name, 3),
    "shrink": lambda face, name: edits.shrink(face, name, 3),
    "remove": edits.remove,
    "fill": edits.fill_holes,
    "mirror": lambda face, name: edits.mirror(face, name),
    "paste": lambda face, name: edits.paste(FACES[1], face, name),
}


@pytest.mark.parametrize("edit", EVERY)
def test_labels_stay_labels_and_the_input_is_untouched(edit):
    for face in FACES[:3]:
        before = face.copy()
        for index in np.unique(face)[1:].tolist():
            result = EVERY[edit](face, CLASSES[index])
            assert result.dtype == np.uint8
            assert result.shape == face.shape
            assert set(np.unique(result)) <= set(np.unique(face)) | set(np.unique(FACES[1]))
            if edit == "remove":
                assert not (result == index).any()
                np.testing.assert_array_equal(result[face != index], face[face != index])
        np.testing.assert_array_equal(face, before)


def test_removing_every_class_leaves_background():
    for face in FACES[:3]:
        rest = face
        for name in CLASSES[1:]:
            rest = edits.remove(rest, name)
        assert rest.dtype == np.uint8
        assert not rest.any()
        assert not edits.remove(face, CLASSES[1:]).any()


@pytest.mark.parametrize("edit", ["grow", "shrink", "remove"])
def test_left_and_right_are_treated_alike(edit):
    for face in FACES[:4]:
        for name in ("hair", "skin", "neck"):
            np.testing.assert_array_equal(EVERY[edit](flip(face), name), flip(EVERY[edit](face, name)))


def test_amounts():
    assert edits.radius_of("4", (200, 100)) == 4
    assert edits.radius_of(" 2.5% ", (200, 200)) == 5
    assert edits.radius_of("5PX", (512, 512)) == 5
    refused = {
        "": "give per cent",
        "px": "give",
        "four": "'four'",
        "nan": "'nan'",
        "0": "0 pixels",
        "-3": "-3 pixels",
        "0.5": "0.5 pixels",
        "101": "101 pixels",
        "inf": "inf pixels",
    }
    for amount, words in refused.items():
        with pytest.raises(InputError, match=words):
            edits.radius_of(amount, (100, 100))


def test_bad_input_is_refused_in_one_sentence():
    face, row = FACES[0], labels([0, 1, 13])
    cases = {
        "'hear' is no class": lambda: edits.grow(face, "hear", 3),
        "the mask has no hat": lambda: edits.grow(row, "hat", 3),
        "mask has no cloth": lambda: edits.shrink(row, ("hair", "cloth"), 3),
        "radius is -1": lambda: edits.grow(row, "hair", -1),
        "radius is nan": lambda: edits.shrink(row, "hair", float("nan")),
        "edit the part beside it": lambda: edits.remove(row, "background"),
        "at least one class": lambda: edits.remove(row, ()),
        "no earring": lambda: edits.paste(face, row, "earring"),
        "one mask is 96x96, the other 3x1": lambda: edits.paste(face, row, "hair"),
        "too few parts": lambda: edits.paste(face, row, "hair", align=True),
        "lie too differently": lambda: edits.paste(face, face[::-1], "hair", align=True),
        "too few parts in common": lambda: edits.mirror(row, "hair"),
        "has no necklace": lambda: edits.rename(row, "necklace", "hat"),
        "'hood' is no class": lambda: edits.rename(row, "hair", "hood"),
        "neither hat nor cloth": lambda: edits.exchange(row, "hat", "cloth"),
        "between the masks is 1.5": lambda: edits.interpolate(face, face, 1.5),
        "between the masks is nan": lambda: edits.interpolate(face, face, float("nan")),
        "not float64": lambda: edits.remove(face / 2, "hair"),
        r"\[96, 96, 1\]": lambda: edits.remove(face[..., None], "hair"),
        "from 0 to 19": lambda: edits.remove(labels([0, 19]), "hair"),
        "from -1 to 3": lambda: edits.remove(np.array([[-1, 3]]), "hair"),
    }
    for sentence, edit in cases.items():
        with pytest.raises(InputError, match=sentence) as caught:
            edit()
        assert "\n" not in str(caught.value)


def test_what_changed_is_told():
    assert edits.changes(labels([0, 13, 13, 1]), labels([0, 0, 13, 1])) == (
        "background 25.00 % -> 50.00 %, hair 50.00 % -> 25.00 %"
    )
    assert edits.changes(FACES[0], FACES[0]) == "nothing changed"
    assert edits.changes(labels([0, 13]), labels([13, 0])) == "places changed, shares did not"


# The command line


@pytest.fixture
def files(tmp_path) -> tuple[Path, Path]:
    for number, name in ((1, "first.png"), (2, "second.png")):
        edits.save(FACES[number], tmp_path / name)
    return tmp_path / "first.png", tmp_path / "second.png"


def test_every_command_writes_what_its_function_gives(files, tmp_path, capsys):
    first, second = files
    out = tmp_path / "made" / "out.png"
    one, two = FACES[1], FACES[2]
    cases = [
        (["grow", first, "--class", "hair", "--by", "4"], edits.grow(one, "hair", 3.84)),
        (["grow", first, "--class", "hair", "skin", "--by", "5px"], edits.grow(one, ("hair", "skin"), 5)),
        (["grow", first, "--class", "hair", "--by", "9", "--over", "l_brow"], edits.grow(one, "hair", 8.64, "l_brow")),
        (["shrink", first, "--class", "skin", "--by", "3px"], edits.shrink(one, "skin", 3)),
        (["remove", first, "--class", "hair", "cloth"], edits.remove(one, ("hair", "cloth"))),
        (["mirror", first], flip(one)),
        (["mirror", first, "--class", "l_brow"], edits.mirror(one, "l_brow")),
        (["paste", first, second, "--class", "hair"], edits.paste(one, two, "hair")),
        (["paste", first, second, "--class", "hair", "--align"], edits.paste(one, two, "hair", align=True)),
        (["fill", first, "--class", "hair"], edits.fill_holes(one, "hair")),
        (["rename", first, "--class", "hair", "--to", "hat"], edits.rename(one, "hair", "hat")),
        (["exchange", first, "--class", "l_eye", "r_eye"], edits.exchange(one, "l_eye", "r_eye")),
        (["interpolate", first, second, "--at", "0.3"], edits.interpolate(one, two, 0.3)),
    ]
    for arguments, expected in cases:
        assert run("mask", *arguments, "--out", out) == 0, arguments
        told = capsys.readouterr()
        assert told.out == f"{out}: {edits.changes(one, expected)}\n"
        assert "palette PNG" in told.err
        with Image.open(out) as picture:
            assert picture.mode == "P"
            np.testing.assert_array_equal(np.asarray(picture), expected)
        np.testing.assert_array_equal(read(out).raw, expected)  # no doubt about sides or order
    np.testing.assert_array_equal(read(first).raw, one)  # the input is as it was
    assert run("mask", "remove", first, "--class", "hair", "--out", first) == 0
    np.testing.assert_array_equal(read(first).raw, edits.remove(one, "hair"))


def test_bad_commands_write_nothing(files, tmp_path, capsys):
    first, second = files
    edits.save(FACES[2][:, 8:], tmp_path / "narrow.png")
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    out = ["--out", tmp_path / "out.png"]
    everything = list(CLASSES[1:])
    cases = {
        "'hear' is no class": ["grow", first, "--class", "hear", "--by", "4", *out],
        "the amount is 'much'": ["grow", first, "--class", "hair", "--by", "much", *out],
        "0.096 pixels": ["shrink", first, "--class", "hair", "--by", "0.1", *out],
        "does not exist": ["remove", tmp_path / "none.png", "--class", "hair", *out],
        "end in .png": ["remove", first, "--class", "hair", "--out", tmp_path / "out.jpg"],
        "nothing but background": ["remove", first, "--class", *everything, *out],
        "cannot write": ["remove", first, "--class", "hair", "--out", second / "out.png"],
        "at least one class": ["remove", first, "--class", *out],
        "crop or pad": ["paste", first, tmp_path / "narrow.png", "--class", "hair", *out],
        "between the masks is 7": ["interpolate", first, second, "--at", "7", *out],
    }
    for words, arguments in cases.items():
        assert run("mask", *arguments) == 2, arguments
        last = capsys.readouterr().err.strip().splitlines()[-1]
        assert last.startswith("likeness: ")
        assert words in last
        assert {path: path.read_bytes() for path in tmp_path.iterdir()} == before
    assert run("mask", "remove", first, "--class", "hair") == 2  # --out is required


@pytest.mark.parametrize("command", ["", "grow", "paste", "interpolate", "check"])
def test_help(command, capsys):
    assert run("mask", *command.split(), "--help") == 0
    assert "likeness mask" in capsys.readouterr().out
