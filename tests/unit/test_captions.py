"""The caption grammar: claims agree with the attributes, captions are varied and short."""

from __future__ import annotations

import re

import numpy as np

from likeness.prepare.caption.grammar import ATTRIBUTES, write_captions

CLAIMS = {
    r"glasses": "Eyeglasses",
    r"\bhat\b": "Wearing_Hat",
    r"earrings": "Wearing_Earrings",
    r"necklace": "Wearing_Necklace",
    r"\btie\b|necktie": "Wearing_Necktie",
    r"lipstick": "Wearing_Lipstick",
    r"make-?up": "Heavy_Makeup",
    r"\bblack\b": "Black_Hair",
    r"blonde?\b|golden|\bfair\b(?! skin)(?=.* hair)": "Blond_Hair",
    r"brown|brunette|chestnut": "Brown_Hair",
    r"gr[ae]y|silver": "Gray_Hair",
    r"straight|sleek": "Straight_Hair",
    r"wavy|curly": "Wavy_Hair",
    r"bald|no hair": "Bald",
    r"bangs|fringe": "Bangs",
    r"goatee": "Goatee",
    r"m(o?)ustache": "Mustache",
    r"sideburns": "Sideburns",
    r"stubble|shadow": "5_o_Clock_Shadow",
    r"\b(man|guy|male|He)\b": "Male",
    r"\byoung\b": "Young",
    r"\bsmiling\b(?<!not smiling)|\bwith a smile|open smile|happy": "Smiling",
    r"open mouth|mouth slightly open|parted|open smile|broadly": "Mouth_Slightly_Open",
    r"pale|fair skin": "Pale_Skin",
    r"rosy|blushing|pink cheeks": "Rosy_Cheeks",
    r"double chin": "Double_Chin",
    r"oval": "Oval_Face",
    r"pointy|pointed": "Pointy_Nose",
    r"receding": "Receding_Hairline",
}
DENIALS = {
    r"\b(woman|lady|She)\b": "Male",
    r"\b(old|elderly|older)\b|mature": "Young",
    r"not smiling|no smile|serious": "Smiling",
    r"closed mouth": "Mouth_Slightly_Open",
    r"a beard|clean-shaven.*beard": "No_Beard",
}


def random_attributes(rng: np.random.Generator) -> dict[str, bool]:
    probability = rng.uniform(0.05, 0.6)
    return {name: bool(rng.random() < probability) for name in ATTRIBUTES}


def test_every_claim_is_true():
    rng = np.random.default_rng(0)
    claims = 0
    for _ in range(300):
        attributes = random_attributes(rng)
        for caption in write_captions(attributes, rng):
            for pattern, name in CLAIMS.items():
                if re.search(pattern, caption):
                    claims += 1
                    assert attributes[name], (caption, name)
            for pattern, name in DENIALS.items():
                if re.search(pattern, caption):
                    claims += 1
                    assert not attributes[name], (caption, name)
            if "clean-shaven" in caption:
                facial = ("5_o_Clock_Shadow", "Goatee", "Mustache", "Sideburns")
                assert attributes["No_Beard"], caption
                assert not any(attributes[name] for name in facial), caption
    assert claims > 5000


def test_the_sex_is_stated_only_if_it_is_known():
    rng = np.random.default_rng(3)
    said = " ".join(" ".join(write_captions({"Smiling": True, "Eyeglasses": False}, rng)) for _ in range(20)).lower()
    assert not {"man", "woman", "guy", "lady", "male", "he", "she"} & set(re.findall(r"[a-z]+", said))


def test_ten_different_short_captions():
    rng = np.random.default_rng(1)
    for attributes in ({}, {"Male": True}, dict.fromkeys(ATTRIBUTES, True), random_attributes(rng)):
        captions = write_captions(attributes, rng)
        assert len(set(captions)) == 10
        assert all(1 <= len(caption.split()) <= 60 for caption in captions)


def test_same_stream_same_captions():
    attributes = random_attributes(np.random.default_rng(2))
    one, other = (write_captions(attributes, np.random.default_rng(5)) for _ in range(2))
    assert one == other


def test_every_objective_attribute_is_mentioned():
    """Every attribute but the subjective `Attractive` and `Blurry` changes the captions."""
    rng_seed = 7
    for name in ATTRIBUTES:
        base = dict.fromkeys(ATTRIBUTES, False) | {"No_Beard": True}
        changed = {**base, name: not base[name]}
        said = [set(write_captions(a, np.random.default_rng(rng_seed))) for a in (base, changed)]
        assert (said[0] == said[1]) == (name in ("Attractive", "Blurry")), name
