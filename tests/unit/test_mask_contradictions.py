"""Contradictions between captions and masks, and no false alarm on true captions."""

from __future__ import annotations

import numpy as np
import pytest
from drawn import drawn_mask

from builders import run
from likeness.conditions.mask.classes import CLASS_INDEX
from likeness.conditions.mask.contradictions import contradictions
from likeness.conditions.mask.edits import remove, save
from likeness.data.synthetic import draw_face
from likeness.types import InputError


def plain() -> np.ndarray:
    """A frontal face with hair to the cheeks and an open mouth, without accessories."""
    return drawn_mask(100)


def dressed() -> np.ndarray:
    """The same with glasses, hat, earring and necklace."""
    mask = plain()
    for name, rows, columns in (
        ("eye_g", (40, 50), (31, 69)),
        ("hat", (5, 20), (20, 80)),
        ("earring", (59, 62), (20, 23)),
        ("necklace", (88, 90), (40, 60)),
    ):
        mask[slice(*rows), slice(*columns)] = CLASS_INDEX[name]
    return mask


def bald() -> np.ndarray:
    return remove(plain(), "hair")


ON_PLAIN = {
    "a bald man": 'says "bald", but 9.94 % of the mask is hair',
    "A man with a BALD head": '"bald", but 9.94 %',
    "a woman with no hair": '"no hair", but 9.94 %',
    "a man with no hair and brown eyes": '"no hair", but 9.94 %',
    "a man, without any hair, smiling": '"without any hair", but 9.94 %',
    "no hair on the head": '"no hair", but 9.94 %',
    "a man wearing a hat": '"hat", but the mask has no hat',
    "a woman in a red baseball cap.": '"cap", but the mask has no hat',
    "a young man with glasses": '"glasses", but the mask has no eye_g',
    "wearing sunglasses": '"sunglasses", but the mask has no eye_g',
    "a lady wearing earrings": '"earrings", but the mask has no earring',
    "one small earring": '"earring", but the mask has no earring',
    "a necklace of beads": '"necklace", but the mask has no necklace',
    "a closed mouth": '"closed mouth", but 0.64 % of the mask is mouth',
    "not young, wearing a hat": '"hat", but',
    "not smiling, with a hat": '"hat", but',
    "not smiling and wearing a hat": '"hat", but',
    "no beard but glasses": '"glasses", but',
    "with no beard and glasses": '"glasses", but',
    "no beard, glasses": '"glasses", but',
    "no earrings but a hat": '"hat", but',
    "no hat, glasses": '"glasses", but',
    "a woman with long wavy black hair": '"long wavy black hair", but hair (9.94 % of the mask) ends above the chin',
    "long, straight hair": '"long, straight hair", but hair',
}
"""Caption -> expected contradiction for `plain`."""

FINE_ON_PLAIN = (
    "",
    "a portrait",
    "a balding man",
    "a partly bald man",
    "an almost bald man",
    "a man who is going bald",
    "a man with a bald spot",
    "a woman with brown hair",
    "not bald",
    "no hat",
    "a man without glasses or a hat",
    "she is not wearing a hat, glasses or earrings",
    "he isn't wearing any dark glasses",
    "she doesn\u2019t wear a necklace",
    "no longer wears glasses",
    "neither hat nor glasses",
    "lacks earrings",
    "without hat and glasses",
    "no visible hat",
    "what a chat with that captain",
    "a glass of wine, two glasses of beer and wine glasses",
    "a kneecap and cap sleeves",
    "no facial hair",
    "no hair on the chin",
    "no hair covering the ears",
    "a beard and a long face, brown hair",
    "a short beard and brown hair",
    "a long neck with short hair",
    "long hair tied back",
    "an open mouth",
    "hair clip",
)
"""Captions that `plain` does not contradict, or that are ambiguous."""

ON_DRESSED = {
    "no hat": '"no hat", but 9.00 % of the mask is hat',
    "without a hat": '"without a hat", but 9.00 %',
    "a man without glasses": '"without glasses", but 3.',
    "he is not wearing any glasses": '"not wearing any glasses", but 3.',
    "she isn't wearing earrings": '"isn\'t wearing earrings", but 0.09 % of the mask is earring',
    "she never wears a necklace": '"never wears a necklace", but 0.40 % of the mask is necklace',
    "no glasses": '"no glasses", but 3.',
}
"""Caption -> expected contradiction for `dressed`."""


@pytest.mark.parametrize("caption", ON_PLAIN)
def test_contradictions_of_a_plain_face(caption):
    (sentence,) = contradictions(plain(), caption)
    assert sentence.startswith("the caption says ")
    assert ON_PLAIN[caption] in sentence


@pytest.mark.parametrize("caption", FINE_ON_PLAIN)
def test_no_false_alarm_on_a_plain_face(caption):
    assert contradictions(plain(), caption) == ()


@pytest.mark.parametrize("caption", ON_DRESSED)
def test_contradictions_of_a_dressed_face(caption):
    (sentence,) = contradictions(dressed(), caption)
    assert ON_DRESSED[caption] in sentence


def test_negated_lists():
    parts = ("hat", "eye_g", "earring")
    for caption in ("no hat, glasses or earrings", "without a hat, dark glasses, or any earrings"):
        found = contradictions(dressed(), caption)
        assert len(found) == 3
        assert all(sentence.endswith(f"of the mask is {part}") for part, sentence in zip(parts, found, strict=True))
    assert len(contradictions(dressed(), "neither a hat nor glasses")) == 2
    assert len(contradictions(dressed(), "no hat and glasses")) == 1  # the glasses are ambiguous
    assert contradictions(dressed(), "a hat, glasses, earrings and a necklace") == ()


def test_a_bald_head():
    assert contradictions(bald(), "a bald man") == ()
    assert contradictions(bald(), "a man with no hair") == ()
    for caption in ("brown hair", "a ponytail", "long blond hair", "short hair"):
        (sentence,) = contradictions(bald(), caption)
        assert sentence.endswith("but the mask has no hair")
    rim = plain()
    rim[rim == 13] = 0
    rim[40:60, 20:24] = rim[40:60, 76:80] = 13  # 1.6 %
    assert contradictions(rim, "bald") == ()
    rim[30:32, 40:44] = 14  # too small for a hat that could hide the hair
    assert contradictions(remove(rim, "hair"), "brown hair")
    hat = remove(dressed(), "hair")
    assert contradictions(hat, "a woman with brown hair and a hat, glasses") == ()


def test_how_far_hair_reaches():
    long = plain()
    long[60:97, 20:26] = CLASS_INDEX["hair"]
    assert contradictions(long, "long hair") == ()
    (sentence,) = contradictions(long, "a man with short brown hair")
    assert "ends below the chin, at 116" in sentence
    assert contradictions(plain(), "a man with short brown hair") == ()


def test_contradictions_are_reported_once():
    found = contradictions(plain(), "A bald man wearing a hat. The hat is red, and he has glasses.")
    assert [sentence.split('"')[1] for sentence in found] == ["bald", "hat", "glasses"]


def test_captions_of_synthetic_faces():
    faces = [draw_face(21, index, 64) for index in range(30)]
    for face in faces:
        for caption in face.captions:
            assert contradictions(face.mask, caption) == (), caption
    worn = {"hat": "hat", "glasses": "eye_g", "earrings": "earring", "necklace": "necklace"}
    for face in faces:
        for attribute, part in worn.items():
            there = face.attributes[attribute] != "none"
            assert len(contradictions(face.mask, f"a person with {attribute}")) == (not there)
            assert len(contradictions(face.mask, f"a person without {attribute}")) == there
            if there:
                assert contradictions(remove(face.mask, part), f"wearing {attribute}")
        if face.attributes["hat"] == "none":
            thin = face.attributes["hair_style"] in ("bald", "buzz cut", "short", "side-parted", "bun")
            assert thin or contradictions(face.mask, "a bald person")


def test_invalid_labels_are_rejected():
    with pytest.raises(InputError, match="from 0 to 18"):
        contradictions(np.full((9, 9), 77, np.uint8), "bald")


def test_the_command(tmp_path, capsys):
    save(plain(), tmp_path / "mask.png")
    assert run("mask", "check", tmp_path / "mask.png", "a bald man with a hat") == 0
    assert capsys.readouterr().out.splitlines() == [
        'the caption says "bald", but 9.94 % of the mask is hair',
        'the caption says "hat", but the mask has no hat',
    ]
    assert run("mask", "check", tmp_path / "mask.png", "a woman with brown hair") == 0
    assert capsys.readouterr().out == "no contradictions\n"
    assert run("mask", "check", tmp_path / "none.png", "bald") == 2
    assert "does not exist" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["mask.png"]
