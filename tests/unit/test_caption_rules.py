"""Rules, shortening, facts, refinement and records, on typical answers of models."""

from __future__ import annotations

import numpy as np
import pytest
from drawn import drawn_mask

from likeness.conditions.mask.classes import CLASS_INDEX
from likeness.prepare.caption.models import load_counter
from likeness.prepare.caption.prompts import PROMPTS, describe
from likeness.prepare.caption.records import merge
from likeness.prepare.caption.refine import accept, facts_of, without_contradictions
from likeness.prepare.caption.rules import RULES, filter_answer, pieces_of, shorten

CLEAN = (
    "A young woman with long, wavy brown hair smiles at the camera, wearing small gold earrings.",
    "woman, about thirty, long blond hair, arched eyebrows, blue eyes, full lips, fair skin, smiling, earrings",
    "The man has a short grey beard and a receding hairline. His mouth is closed, and his brows are slightly raised.",
    "An elderly man with a bald head, wrinkles around the eyes, and a five-o'clock shadow.",
    "A middle-aged Asian man wears a V-neck T-shirt and round glasses; soft light falls from the left.",
    "She wears no jewelry. Her hair is pulled back into a low bun, with a few loose strands.",
    "A close-up of a woman with freckles, red hair and green eyes",
)
CHANGED = {
    "The image shows a woman with red hair.": ("picture", "A woman with red hair."),
    "In this image, there is a man with a beard. He is smiling.": ("picture", "A man with a beard. He is smiling."),
    "This is a close-up portrait of a man with glasses.": ("picture", "A close-up portrait of a man with glasses."),
    "A woman with red hair. The overall image has a warm mood.": ("picture", "A woman with red hair."),
    "The background of the image is dark. The woman smiles.": ("picture", "The background is dark. The woman smiles."),
    "**Hair:** *wavy*, with a `fringe` on her face.": ("markup", "Hair: wavy, with a fringe on her face."),
    "- woman\n- long brown hair\n- green eyes\n- smiling": ("markup", "woman, long brown hair, green eyes, smiling"),
    "# Portrait\nA man with a grey beard and blue eyes.": ("markup", "A man with a grey beard and blue eyes."),
    "```text\nwoman, long red hair, green eyes, smiling\n```": ("markup", "woman, long red hair, green eyes, smiling"),
    "```markdown\nA woman with red hair smiles.\n```": ("markup", "A woman with red hair smiles."),
    "Here is a caption: A man with a grey beard.": ("label", "A man with a grey beard."),
    "Sure! Caption: \"A man with a grey beard.\"": ("label", "A man with a grey beard."),
    "A man with a grey beard. I think he is happy.": ("first-person", "A man with a grey beard."),
    "A man with a grey beard. His ears are not visible.": ("unseen", "A man with a grey beard."),
    "woman, red hair, eye color unclear, full lips, smiling": ("unseen", "woman, red hair, full lips, smiling"),
    "A woman with red hair. She looks like Julia Roberts.": ("name", "A woman with red hair."),
    "A woman smiles. A woman smiles. She has red hair.": ("repeated", "A woman smiles. She has red hair."),
    "A woman with red hair. She is wearing a pair of": ("truncated", "A woman with red hair."),
    "A woman with red hair \U0001f60a\ufe0f and a smile.": ("symbols", "A woman with red hair and a smile."),
    "A woman\u2019s face \u2014 red hair, green eyes.": ("symbols", "A woman's face, red hair, green eyes."),
    "<think>Is it a man?</think>\nA man with a beard.": ("thinking", "A man with a beard."),
}  # fmt: skip

DROPPED = {
    "": "empty",
    " \n": "empty",
    "<think>The face is": "thinking",
    "I'm sorry, but I can't help with identifying people.": "refusal",
    "As an AI, I do not see pictures. A woman.": "refusal",
    "I\u2019m unable to describe the person in this picture.": "refusal",
    '{"caption": "a woman with red hair"}': "markup",
    "Brad Pitt with a short beard and blue eyes.": "name",
    "A Young Woman With Red Hair And Green Eyes": "name",
    "Eine junge Frau mit roten Haaren und blauen Augen.": "english",
    "Une jeune femme souriante aux cheveux roux et aux yeux verts.": "english",
    "Νεαρή γυναίκα με κόκκινα μαλλιά.": "english",
    "一位年轻女子,红色头发。": "english",
    "red hair and a smile on her face and a smile on her face and a smile on her face": "repeated",
    "A woman with long brown hair and": "truncated",
    "Smiling woman.": "short",
    "I see her in my mind.": "first-person",
}


@pytest.mark.parametrize("text", CLEAN)
def test_good_captions_are_unchanged(text):
    assert filter_answer(text) == (text, [])


@pytest.mark.parametrize(("text", "wanted"), CHANGED.items())
def test_rules_change(text, wanted):
    filtered, notes = filter_answer(text)
    rule, expected = wanted
    assert filtered == expected
    assert rule in [note.kind for note in notes]
    assert all(note.text for note in notes)


@pytest.mark.parametrize(("text", "rule"), DROPPED.items())
def test_rules_drop(text, rule):
    filtered, notes = filter_answer(text)
    assert filtered == ""
    assert notes[-1].kind == rule


def test_every_rule_is_tested():
    tried = {rule for rule, _ in CHANGED.values()} | set(DROPPED.values())
    assert tried == set(RULES)


def test_unfinished_answers_lose_their_end():
    assert filter_answer("A woman with red hair. She wears a blue", finished=False)[0] == "A woman with red hair."
    assert filter_answer("woman, red hair, green eyes, full li", finished=False)[0] == "woman, red hair, green eyes"
    assert filter_answer("A woman with red hair and gr", finished=False)[1][-1].kind == "truncated"


def test_ten_different_prompts():
    assert len(PROMPTS) == 10
    assert len({describe(name) for name in PROMPTS}) == 10


@pytest.fixture(scope="module")
def count():
    return load_counter()


def test_shorten_after_sentence_phrase_word(count):
    three = "A woman with red hair smiles. " + " ".join(["She has green eyes and a small nose."] * 12)
    short, how = shorten(three, count, 40)
    assert count(short) <= 40 < count(three)
    assert three.startswith(short)
    assert short.endswith("nose.")
    assert how == f"{count(three)} to {count(short)} tokens, cut after a sentence"
    one = "A woman with " + ", ".join(["long wavy red hair", "green eyes", "a small nose", "full lips"] * 8) + "."
    short, how = shorten(one, count, 40)
    assert count(short) <= 40
    assert one.startswith(short + ",")
    assert "phrase" in how
    words = "hair " * 90
    short, how = shorten(words.strip(), count, 40)
    assert set(short.split()) == {"hair"}
    assert "word" in how
    assert shorten("A woman.", count, 40) == ("A woman.", "")
    assert shorten("A" * 500, count, 8)[0] == ""


def test_cuts_end_at_complete_words(count):
    rng = np.random.default_rng(0)
    parts = ["a woman with red hair", "wearing a hat and a scarf", "her five-o'clock look", "in the soft evening light"]
    for _ in range(100):
        text = "".join(parts[int(i)] + (", ", " and ", ". ")[int(rng.integers(3))] for i in rng.integers(4, size=30))
        short, _ = shorten(text.strip(), count, int(rng.integers(12, 77)))
        assert text.startswith(short)
        assert not text[len(short) : len(short) + 1].isalpha()
        assert short.split()[-1] not in ("a", "and", "with", "the")


def test_pieces():
    assert pieces_of("A man. He wears a hat.") == (["A man.", "He wears a hat."], " ")
    assert pieces_of("man, old, hat, beard")[1] == ", "
    assert pieces_of("He is Mr. Smith, 5.5 feet tall.")[0] == ["He is Mr. Smith, 5.5 feet tall."]


def test_facts_list_attributes_parts_and_contradictions():
    row = {"attributes": {"Smiling": True, "Eyeglasses": False, "Young": -1, "Attractive": True, "hair": "red"}}
    facts = facts_of(row, drawn_mask(), "A bald man.")
    assert "It holds: smiling." in facts
    assert "It does not hold: eyeglasses, young." in facts
    assert "Known: hair red." in facts
    assert "attractive" not in facts.lower()
    area = 100 * (drawn_mask() == CLASS_INDEX["hair"]).mean()
    assert f"hair {area:.1f} %" in facts
    assert "Not in the picture: glasses" in facts
    assert 'Contradiction: the caption says "bald"' in facts
    assert facts_of({}, None, "A man.") == "none"


def test_contradictions_of_the_mask_are_removed():
    kept, why = without_contradictions(drawn_mask(), "A man with blue eyes. He is bald. He smiles.")
    assert kept == "A man with blue eyes. He smiles."
    assert why[0].kind == "mask"
    assert why[0].text.startswith('the caption says "bald", but 9.42 %')
    kept, why = without_contradictions(drawn_mask(), "man, bald, blue eyes, glasses, smiling")
    assert kept == "man, blue eyes, smiling"
    assert len(why) == 2
    assert without_contradictions(None, "He is bald.") == ("He is bald.", [])


@pytest.mark.parametrize(
    ("answer", "text", "why"),
    [
        ("A man with blue eyes.", "A man with blue eyes.", "7 to 5 words"),
        ("A bald man with blue eyes.", "A bald man with blue eyes.", None),
        ("<think>hm</think> Caption: A man with blue eyes.", "A man with blue eyes.", "words"),
        ("A man with brown hair and blue eyes.", "A man with brown hair and blue eyes.", "words"),  # from the facts
        ("NONE", "", "nothing is supported by the facts"),
        ("none.", "", "nothing is supported by the facts"),
        ("A man with blue eyes and freckles.", "", 'the answer adds "freckles"'),
        ("A woman with blue eyes.", "", 'the answer adds "woman"'),
        ("I'm sorry, I cannot help with that.", "", "is not a caption (refusal"),
        ("", "", "is not a caption (empty"),
    ],
)  # fmt: skip
def test_refinement_may_remove_but_not_add(answer, text, why):
    caption = "A bald man with blue eyes."
    filtered, notes = accept(answer, caption, "It holds: brown hair.")
    assert filtered == text
    assert (notes == []) if why is None else (why.replace("7", "6") in notes[-1].text)


def used(captions):
    return [caption["text"] for caption in captions if "dropped" not in caption]


def test_record_keeps_captions_of_others_and_removals():
    vlm = [{"text": t, "source": "vlm", "model": "m", "prompt": p} for t, p in (("one", "a"), ("two", "b"))]
    first = merge(["mine"], [], vlm, False)
    assert used(first) == ["mine", "one", "two"]
    assert used(merge(used(first), first, vlm, False)) == used(first)  # a second run changes nothing
    # another model adds, the same model replaces
    other = [{"text": "three", "source": "vlm", "model": "n", "prompt": "a"}]
    assert used(merge(used(first), first, other, False)) == ["mine", "one", "two", "three"]
    again = [caption | {"text": caption["text"] + "!"} for caption in vlm]
    assert used(merge(used(first), first, again, False)) == ["mine", "one!", "two!"]
    # removed and added by hand
    edited = merge(["mine", "two", "yours"], first, vlm, False)
    assert used(edited) == ["mine", "yours", "two"]
    assert [c["dropped"] for c in edited if "dropped" in c] == ["by-hand"]
    assert used(merge(used(edited), edited, vlm, False)) == used(edited)
    # replaced on request, but recorded
    restored = merge(["mine", "two", "yours", "one"], edited, vlm, False)  # the user puts a removed caption back
    assert set(used(restored)) == {"mine", "two", "yours", "one"}
    assert used(merge(used(restored), restored, vlm, False)) == used(restored)

    replaced = merge(used(first), first, other, True)
    assert used(replaced) == ["three"]
    assert {c["text"] for c in replaced} == {"mine", "one", "two", "three"}
    # equal captions
    twins = [caption | {"text": "Same."} for caption in vlm]
    assert used(merge([], [], twins, False)) == ["Same."]
