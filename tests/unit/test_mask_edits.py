"""Mask edits: exact on small masks, valid on synthetic faces."""

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
from likeness.conditions.mask import edits, flip, read, resize
from likeness.conditions.mask.classes import CLASS_INDEX, CLASSES
from likeness.conditions.mask.commands import apply_commands
from likeness.conditions.mask.edits import BENEATH, SHOWS
from likeness.data.synthetic import draw_face
from likeness.data.synthetic.drawing import draw
from likeness.data.synthetic.traits import sample_traits
from likeness.prepare.edit import changeable
from likeness.types import InputError

FACES = [draw_face(3, index, 96).mask for index in range(8)]


def labels(*rows: list[int]) -> np.ndarray:
    return np.array(rows, dtype=np.uint8)


def symmetric_face(size: int = 96) -> np.ndarray:
    """A face that equals its mirror image."""
    face = drawn_mask(size)
    face[:, size // 2 :] = flip(face)[:, size // 2 :]
    np.testing.assert_array_equal(flip(face), face)
    return face


def pixels(mask: np.ndarray, name: str) -> int:
    return int((mask == CLASS_INDEX[name]).sum())


def test_tables_order_the_classes():
    assert set(BENEATH) == set(SHOWS) == set(CLASSES)
    painted: list[str] = []
    while len(painted) < len(CLASSES):  # each class after all beneath it: possible only without a cycle
        ready = [name for name in CLASSES if name not in painted and set(BENEATH[name]) <= set(painted)]
        assert ready, f"cycle: {set(CLASSES) - set(painted)}"
        painted += ready
    assert all(set(SHOWS[name]) <= set(BENEATH[name]) for name in CLASSES)


def test_grow_covers_only_what_is_beneath():
    row = labels([0, 0, 13, 1, 6, 1, 1])
    assert edits.grow(row, "hair", 1).tolist() == [[0, 13, 13, 13, 6, 1, 1]]
    assert edits.grow(row, "hair", 2).tolist() == [[13, 13, 13, 13, 6, 1, 1]]
    assert edits.grow(row, "hair", 3).tolist() == [[13, 13, 13, 13, 6, 13, 1]]
    assert edits.grow(row, "hair", 2, over="l_brow").tolist() == [[13, 13, 13, 13, 13, 1, 1]]
    assert edits.grow(row, "skin", 9).tolist() == [[1, 1, 13, 1, 6, 1, 1]]
    assert edits.grow(row, "hair", 0).tolist() == row.tolist()


def test_grow_is_isotropic():
    dot = np.zeros((5, 5), np.uint8)
    dot[2, 2] = 13
    down, across = np.indices(dot.shape) - 2
    for radius in (1, 1.5, 2, 2.4):
        np.testing.assert_array_equal(edits.grow(dot, "hair", radius) == 13, down**2 + across**2 <= radius**2)


def test_growing_classes_compete_by_distance():
    assert edits.grow(labels([11, 1, 1, 12]), ("u_lip", "l_lip"), 3).tolist() == [[11, 11, 12, 12]]
    assert edits.grow(labels([11, 1, 12]), ("l_lip", "u_lip"), 3).tolist() == [[11, 12, 12]]
    assert edits.grow(labels([12, 10, 10]), ("mouth", "l_lip"), 3).tolist() == [[12, 10, 10]]


def test_shrink_uncovers_only_what_is_beneath():
    row = labels([0, 13, 13, 13, 13, 13, 1])
    assert edits.shrink(row, "hair", 1).tolist() == [[0, 0, 13, 13, 13, 1, 1]]
    assert edits.shrink(row, "hair", 2).tolist() == [[0, 0, 0, 13, 1, 1, 1]]
    assert edits.shrink(row, "hair", 3).tolist() == [[0, 0, 0, 1, 1, 1, 1]]  # equal distances: the higher class
    assert edits.shrink(labels([0, 1, 1, 4, 1, 1, 0]), "skin", 1).tolist() == [[0, 0, 1, 4, 1, 0, 0]]
    assert edits.shrink(labels([1, 12, 10, 10, 10, 11, 1]), "mouth", 1).tolist() == [[1, 12, 12, 10, 11, 11, 1]]


@pytest.mark.parametrize("name", ["hair", "skin", "cloth", "nose"])
def test_shrink_nearly_inverts_grow(name):
    for face in FACES:
        grown = edits.grow(face, name, 3)
        again = edits.shrink(grown, name, 3)
        assert pixels(grown, name) > 1.03 * pixels(face, name)
        assert (grown == CLASS_INDEX[name])[face == CLASS_INDEX[name]].all()
        assert (again != face).mean() < 0.012
        assert pixels(edits.shrink(face, name, 3), name) < pixels(face, name)


def test_remove_uncovers_what_is_beneath():
    assert edits.remove(labels([13, 6, 6, 13], [1, 1, 1, 1]), "l_brow").tolist() == [[13, 1, 1, 13], [1, 1, 1, 1]]
    tall = labels(*[[2, 3, 3, 3, 1]] * 12)
    np.testing.assert_array_equal(edits.remove(tall, "eye_g"), [[2, 1, 1, 1, 1]] * 12)  # the nose does not grow
    assert edits.remove(labels([1, 12, 10, 10, 11, 1]), "mouth").tolist() == [[1, 12, 12, 11, 11, 1]]
    assert edits.remove(labels([1, 12, 10, 10, 11, 1]), ("mouth", "u_lip", "l_lip")).tolist() == [[1] * 6]
    tall = labels(*[[0, 0, 13, 13, 13, 1, 1]] * 12)
    np.testing.assert_array_equal(edits.remove(tall, "hair"), [[0, 0, 0, 1, 1, 1, 1]] * 12)
    assert edits.remove(labels([14, 14, 13, 13]), ("hair", "hat")).tolist() == [[0, 0, 0, 0]]
    assert edits.remove(labels([2, 16, 16, 14]), "necklace").tolist() == [[2, 2, 14, 14]]  # nothing of `SHOWS` there
    assert edits.remove(labels([0, 1]), "hat").tolist() == [[0, 1]]


def test_skin_spreads_by_a_limited_distance():
    mask = np.full((11, 20), 13, np.uint8)
    mask[:, :3] = 1  # 11 pixels high: skin spreads by 3 pixels
    bald = edits.remove(mask, "hair")
    np.testing.assert_array_equal(bald, np.where(np.arange(20) < 6, 1, 0) * np.ones((11, 1), int))


def test_removed_glasses_agree_with_the_face_without_them(monkeypatch):
    """The docstring of `SHOWS` has these numbers."""

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


def test_mirror_swaps_sides_and_is_its_own_inverse():
    np.testing.assert_array_equal(edits.mirror(labels([4, 0, 13])), labels([13, 0, 5]))
    for face in FACES:
        np.testing.assert_array_equal(edits.mirror(edits.mirror(face)), face)


def test_mirror_copies_a_brow():
    face = symmetric_face()
    changed = edits.grow(face, "l_brow", 1.5)
    assert pixels(changed, "l_brow") > pixels(changed, "r_brow")
    both = edits.mirror(changed, "l_brow")
    np.testing.assert_array_equal(both, edits.grow(face, ("l_brow", "r_brow"), 1.5))
    np.testing.assert_array_equal(edits.mirror(changed, ("l_brow", "r_brow")), flip(changed))


def test_mirrored_classes_do_not_move_the_midline():
    face = symmetric_face(256)
    raised = edits.paste(face, np.roll(face, -12, axis=0), "l_brow")
    assert pixels(raised, "l_brow") == pixels(face, "l_brow")
    result = edits.mirror(raised, "l_brow")
    np.testing.assert_array_equal(result == CLASS_INDEX["l_brow"], raised == CLASS_INDEX["l_brow"])
    np.testing.assert_array_equal(result == CLASS_INDEX["r_brow"], flip(raised) == CLASS_INDEX["r_brow"])


def test_mirror_uses_the_midline_of_the_face():
    face = symmetric_face()
    face[20:50, 8:20][face[20:50, 8:20] == 0] = 13  # a strand on the viewer's left
    moved = np.roll(face, 5, axis=1)
    result = edits.mirror(moved, "hair")
    np.testing.assert_array_equal(result == 13, np.roll(flip(face), 5, axis=1) == 13)
    features = np.isin(moved, range(2, 13))
    np.testing.assert_array_equal(result[features], moved[features])


def test_mirror_of_a_rotated_face():
    face = symmetric_face(256)
    tilted = ndimage.rotate(edits.remove(face, "r_brow"), 12, reshape=False, order=0, mode="nearest")
    expected = ndimage.rotate(face, 12, reshape=False, order=0, mode="nearest")
    brow = edits.mirror(tilted, "l_brow") == CLASS_INDEX["r_brow"]
    true = expected == CLASS_INDEX["r_brow"]
    assert (brow & true).sum() / (brow | true).sum() > 0.7


def test_paste_into_itself_changes_nothing():
    for face in FACES:
        for index in np.unique(face)[1:]:
            for align in (False, True):
                np.testing.assert_array_equal(edits.paste(face, face, CLASSES[index], align=align), face)


def test_paste_covers_only_what_is_beneath():
    row, other = labels([0, 13, 1, 6, 1, 0]), labels([14, 14, 14, 14, 1, 13])
    assert edits.paste(row, other, "hat").tolist() == [[14, 14, 14, 6, 1, 0]]
    assert edits.paste(row, other, "hat", over=("l_brow",)).tolist() == [[14, 14, 14, 14, 1, 0]]
    assert edits.paste(row, other, ("hair", "hat")).tolist() == [[14, 14, 14, 6, 1, 13]]
    row, other = labels(*[[0, 13, 1, 6, 1, 0]] * 12), labels(*[[14, 14, 14, 14, 1, 13]] * 12)
    np.testing.assert_array_equal(edits.paste(row, other, "hair"), [[0, 1, 1, 6, 1, 13]] * 12)


def test_paste_aligns_faces():
    face = edits.remove(FACES[1], "hat")
    hatted = face.copy()
    hatted[5:30, 25:70] = np.where(np.isin(face[5:30, 25:70], (0, 1, 13)), 14, face[5:30, 25:70])
    expected = edits.paste(face, hatted, "hat")
    assert pixels(expected, "hat") == pixels(hatted, "hat")
    large = np.roll(hatted, (4, -7), (0, 1)).repeat(2, 0).repeat(2, 1)
    np.testing.assert_array_equal(edits.paste(face, large, "hat", align=True), expected)
    assert (edits.paste(face, large, "hat") == expected).mean() < 0.97
    crossed = edits.swap(hatted, "l_eye", "r_eye")  # swapped sides do not mirror the face
    np.testing.assert_array_equal(edits.paste(face, crossed, "hat", align=True), expected)


def test_fill_holes():
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


def test_clean():
    face = np.ones((100, 100), np.uint8)
    face[:30] = 13
    face[50, 50] = face[60, 60:62] = 13  # one pixel, and two: 2 pixels are 0.02 % of the image
    cleaned = face.copy()
    cleaned[50, 50] = 1
    np.testing.assert_array_equal(edits.clean(face, "hair"), cleaned)
    np.testing.assert_array_equal(edits.clean(face, "skin"), face)
    lonely = np.where(face == 13, 1, face)
    lonely[50, 50] = 13  # all that there is of the class
    np.testing.assert_array_equal(edits.clean(lonely, "hair"), lonely)
    with pytest.raises(InputError, match="no hat"):
        edits.clean(face, "hat")


def test_rename_and_swap():
    row = labels([0, 14, 13, 4, 5, 5])
    assert edits.rename(row, "hat", "hair").tolist() == [[0, 13, 13, 4, 5, 5]]
    assert edits.swap(row, "l_eye", "r_eye").tolist() == [[0, 14, 13, 5, 4, 4]]
    assert edits.swap(row, "hat", "cloth").tolist() == [[0, 18, 13, 4, 5, 5]]


def test_interpolation_is_exact_at_both_ends():
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


def test_interpolated_borders_move_evenly():
    first, second = labels([0, 0, 0, 0, 0, 13, 13, 13, 13]), labels([0, 13, 13, 13, 13, 13, 13, 13, 13])
    assert edits.interpolate(first, second, 0.5).tolist() == [[0, 0, 0, 13, 13, 13, 13, 13, 13]]
    assert edits.interpolate(first, second, 0.75).tolist() == [[0, 0, 13, 13, 13, 13, 13, 13, 13]]


def test_interpolated_features_move():
    first, second = (np.ones((20, 20), np.uint8) for _ in range(2))
    first[2:4, 3:9] = second[14:16, 7:13] = 6
    middle = np.ones((20, 20), np.uint8)
    middle[8:10, 5:11] = 6
    np.testing.assert_array_equal(edits.interpolate(first, second, 0.5), middle)
    for one, other in pairwise(FACES):
        for t in (0.25, 0.5, 0.75):
            between = edits.interpolate(one, other, t)
            for name in ("l_brow", "r_brow", "l_eye", "r_eye", "nose", "u_lip", "l_lip"):
                least = min(pixels(one, name), pixels(other, name))
                assert pixels(between, name) >= 0.4 * least, (name, t)


def test_features_appear_with_their_ground():
    fringe, brow = np.ones((12, 12), np.uint8), np.ones((12, 12), np.uint8)
    fringe[:11] = brow[:3] = 13
    brow[5:7, 3:9] = 6
    assert not (edits.interpolate(fringe, brow, 0.55) == 6).any()
    late = edits.interpolate(fringe, brow, 0.95)
    assert (late[5:7, 3:9] == 6).all()


def test_interpolated_areas_change_monotonically():
    times = np.linspace(0, 1, 7)
    for face in FACES[:4]:
        grown = edits.grow(face, "hair", 8)
        areas = [pixels(edits.interpolate(face, grown, t), "hair") for t in times]
        assert areas == sorted(areas)
        assert areas[0] < areas[3] < areas[-1]
        without = edits.remove(face, "cloth")
        areas = [pixels(edits.interpolate(face, without, t), "cloth") for t in times]
        assert areas == sorted(areas, reverse=True)
        assert areas[-1] == 0 < areas[3] < areas[0]


def test_equal_pixels_never_change():
    first, second = FACES[0], FACES[2]
    plain = [edits.remove(face, edits.FEATURES) for face in (first, second)]
    left, reached = plain[0] == plain[1], plain[0] == plain[1]
    for t in np.linspace(0, 1, 6):
        between = edits.interpolate(*plain, t)
        assert (between == plain[0])[plain[0] == plain[1]].all()
        now = between == plain[1]
        assert now[reached].all()  # final pixels do not change again
        reached = reached | now
        left = left | (between != plain[0])
    assert reached.all()


EVERY = {
    "grow": lambda face, name: edits.grow(face, name, 3),
    "shrink": lambda face, name: edits.shrink(face, name, 3),
    "remove": edits.remove,
    "fill": edits.fill_holes,
    "clean": edits.clean,
    "mirror": lambda face, name: edits.mirror(face, name),
    "paste": lambda face, name: edits.paste(FACES[1], face, name),
}


@pytest.mark.parametrize("edit", EVERY)
def test_results_are_labels_and_the_input_is_unchanged(edit):
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


def test_removing_all_classes_leaves_background():
    for face in FACES[:3]:
        rest = face
        for name in CLASSES[1:]:
            rest = edits.remove(rest, name)
        assert rest.dtype == np.uint8
        assert not rest.any()
        assert not edits.remove(face, CLASSES[1:]).any()


@pytest.mark.parametrize("edit", ["grow", "shrink", "remove"])
def test_edits_commute_with_flip(edit):
    for face in FACES[:4]:
        for name in ("hair", "skin", "neck"):
            np.testing.assert_array_equal(EVERY[edit](flip(face), name), flip(EVERY[edit](face, name)))


def test_amounts():
    assert edits.radius_of("4", (200, 100)) == 4
    assert edits.radius_of(" 2.5% ", (200, 200)) == 5
    assert edits.radius_of("5PX", (512, 512)) == 5
    rejected = {
        "": "use 4 for 4 %",
        "px": "use",
        "four": "'four'",
        "nan": "'nan'",
        "0": "0 pixels",
        "-3": "-3 pixels",
        "0.5": "0.5 pixels",
        "101": "101 pixels",
        "inf": "inf pixels",
    }
    for amount, message in rejected.items():
        with pytest.raises(InputError, match=message):
            edits.radius_of(amount, (100, 100))


def test_invalid_input_is_rejected():
    face, row = FACES[0], labels([0, 1, 13])
    cases = {
        "Unknown class 'hear'": lambda: edits.grow(face, "hear", 3),
        "the mask has no hat": lambda: edits.grow(row, "hat", 3),
        "mask has no cloth": lambda: edits.shrink(row, ("hair", "cloth"), 3),
        "radius is -1": lambda: edits.grow(row, "hair", -1),
        "radius is nan": lambda: edits.shrink(row, "hair", float("nan")),
        "background cannot be edited": lambda: edits.remove(row, "background"),
        "at least one class": lambda: edits.remove(row, ()),
        "no earring": lambda: edits.paste(face, row, "earring"),
        "one mask is 96x96, the other 3x1": lambda: edits.paste(face, row, "hair"),
        "too few parts": lambda: edits.paste(face, row, "hair", align=True),
        "too different to be aligned": lambda: edits.paste(face, face[::-1], "hair", align=True),
        "too few parts in common": lambda: edits.mirror(row, "hair"),
        "has no necklace": lambda: edits.rename(row, "necklace", "hat"),
        "Unknown class 'hood'": lambda: edits.rename(row, "hair", "hood"),
        "neither hat nor cloth": lambda: edits.swap(row, "hat", "cloth"),
        "position between the masks is 1.5": lambda: edits.interpolate(face, face, 1.5),
        "position between the masks is nan": lambda: edits.interpolate(face, face, float("nan")),
        "not float64": lambda: edits.remove(face / 2, "hair"),
        r"\[96, 96, 1\]": lambda: edits.remove(face[..., None], "hair"),
        "not from 0 to 19": lambda: edits.remove(labels([0, 19]), "hair"),
        "not from -1 to 3": lambda: edits.remove(np.array([[-1, 3]]), "hair"),
    }
    for sentence, edit in cases.items():
        with pytest.raises(InputError, match=sentence) as caught:
            edit()
        assert "\n" not in str(caught.value)


def test_changes():
    assert edits.changes(labels([0, 13, 13, 1]), labels([0, 0, 13, 1])) == (
        "background 25.00 % -> 50.00 %, hair 50.00 % -> 25.00 %"
    )
    assert edits.changes(FACES[0], FACES[0]) == "nothing changed"
    assert edits.changes(labels([0, 13]), labels([13, 0])) == "positions changed, areas did not"


def test_lists_of_classes():
    """Commas and spaces separate classes everywhere; the space of a name does not."""
    face = FACES[1]
    wanted = edits.remove(face, ("hair", "cloth", "l_eye"))
    for names in ("hair,cloth,left eye", "hair cloth l_eye", ("hair, cloth", "left eye"), ("hair", "", "cloth l_eye,")):
        np.testing.assert_array_equal(edits.remove(face, names), wanted)
    wanted = edits.grow(edits.swap(face, "l_eye", "r_eye"), ("hair", "cloth"), 5, ("l_brow", "skin"))
    for text in (
        "swap l_eye,r_eye; grow hair,cloth 5px over l_brow,skin",
        "swap l_eye r_eye; grow hair, cloth 5px over l_brow skin",
    ):
        np.testing.assert_array_equal(apply_commands(face, text, lambda file: FACES[2]), wanted)
    kept = changeable("skin, left eye", face, face)
    np.testing.assert_array_equal(changeable("skin l_eye", face, face), kept)


# The command line


@pytest.fixture
def files(tmp_path) -> tuple[Path, Path]:
    for number, name in ((1, "first.png"), (2, "second.png")):
        edits.save(FACES[number], tmp_path / name)
    return tmp_path / "first.png", tmp_path / "second.png"


def test_commands(files, tmp_path, capsys):
    first, second = files
    out = tmp_path / "made" / "out.png"
    one, two = FACES[1], FACES[2]
    cases = [
        (["grow", first, "--class", "hair", "--by", "4"], edits.grow(one, "hair", 3.84)),
        (["grow", first, "--class", "hair", "skin", "--by", "5px"], edits.grow(one, ("hair", "skin"), 5)),
        (["grow", first, "--class", "hair", "--by", "9", "--over", "l_brow"], edits.grow(one, "hair", 8.64, "l_brow")),
        (["shrink", first, "--class", "skin", "--by", "3px"], edits.shrink(one, "skin", 3)),
        (["remove", first, "--class", "hair", "cloth"], edits.remove(one, ("hair", "cloth"))),
        (["remove", first, "--class", "hair,cloth"], edits.remove(one, ("hair", "cloth"))),
        (["mirror", first], flip(one)),
        (["mirror", first, "--class", "l_brow"], edits.mirror(one, "l_brow")),
        (["paste", first, second, "--class", "hair"], edits.paste(one, two, "hair")),
        (["paste", first, second, "--class", "hair", "--align"], edits.paste(one, two, "hair", align=True)),
        (["fill", first, "--class", "hair"], edits.fill_holes(one, "hair")),
        (["remove", first, "--class", "Upper Lip", "EYES"], edits.remove(one, ("u_lip", "l_eye", "r_eye"))),
        (
            ["rename", first, "--class", "eyes", "--to", "skin"],
            edits.rename(edits.rename(one, "l_eye", "skin"), "r_eye", "skin"),
        ),
        (["rename", first, "--class", "clothes", "--to", "glasses"], edits.rename(one, "cloth", "eye_g")),
        (["rename", first, "--class", "hair", "--to", "hat"], edits.rename(one, "hair", "hat")),
        (["swap", first, "--class", "l_eye", "r_eye"], edits.swap(one, "l_eye", "r_eye")),
        (["swap", first, "--class", "l_eye,r_eye"], edits.swap(one, "l_eye", "r_eye")),
        (["interpolate", first, second, "--at", "0.3"], edits.interpolate(one, two, 0.3)),
    ]
    for arguments, expected in cases:
        assert run("mask", *arguments, "--out", out) == 0, arguments
        output = capsys.readouterr()
        assert output.out == f"{out}: {edits.changes(one, expected)}\n"
        assert "palette PNG" in output.err
        with Image.open(out) as image:
            assert image.mode == "P"
            np.testing.assert_array_equal(np.asarray(image), expected)
        np.testing.assert_array_equal(read(out).raw, expected)  # sides and order are recognized
    np.testing.assert_array_equal(read(first).raw, one)  # the input is unchanged
    assert run("mask", "remove", first, "--class", "hair", "--out", first) == 0
    np.testing.assert_array_equal(read(first).raw, edits.remove(one, "hair"))


def test_rejected_commands_write_nothing(files, tmp_path, capsys):
    first, second = files
    edits.save(FACES[2][:, 8:], tmp_path / "narrow.png")
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    out = ["--out", tmp_path / "out.png"]
    everything = list(CLASSES[1:])
    cases = {
        "Unknown class 'hear'": ["grow", first, "--class", "hear", "--by", "4", *out],
        "'eyes' names several classes: choose one of l_eye": ["rename", first, "--class", "hair", "--to", "eyes", *out],
        "the amount is 'much'": ["grow", first, "--class", "hair", "--by", "much", *out],
        "0.096 pixels": ["shrink", first, "--class", "hair", "--by", "0.1", *out],
        "does not exist": ["remove", tmp_path / "none.png", "--class", "hair", *out],
        "must end in .png": ["remove", first, "--class", "hair", "--out", tmp_path / "out.jpg"],
        "nothing but background": ["remove", first, "--class", *everything, *out],
        "cannot write": ["remove", first, "--class", "hair", "--out", second / "out.png"],
        "at least one class": ["remove", first, "--class", *out],
        "crop or pad": ["paste", first, tmp_path / "narrow.png", "--class", "hair", *out],
        "swap requires two classes, not 3": ["swap", first, "--class", "hair,eyes", "cloth", *out],
        "position between the masks is 7": ["interpolate", first, second, "--at", "7", *out],
    }
    for message, arguments in cases.items():
        assert run("mask", *arguments) == 2, arguments
        last = capsys.readouterr().err.strip().splitlines()[-1]
        assert last.startswith("likeness: ")
        assert message in last
        assert {path: path.read_bytes() for path in tmp_path.iterdir()} == before
    assert run("mask", "remove", first, "--class", "hair") == 2  # --out is required


@pytest.mark.parametrize("command", ["", "grow", "paste", "interpolate", "check"])
def test_help(command, capsys):
    assert run("mask", *command.split(), "--help") == 0
    assert "likeness mask" in capsys.readouterr().out
