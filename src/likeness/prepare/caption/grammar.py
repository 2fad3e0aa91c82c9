"""Captions from CelebA's forty attributes: varied in wording and form, and consistent with the attributes.

A caption states a random subset of the attributes, so that a model learns them individually and combined. Only known
attributes are stated. The subjective `Attractive` and `Blurry` are not used.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from likeness.data.synthetic.captions import article, capital, listed, pick

CAPTIONS = 10
"""Captions per face."""

ATTRIBUTES: tuple[str, ...] = (
    "5_o_Clock_Shadow", "Arched_Eyebrows", "Attractive", "Bags_Under_Eyes", "Bald", "Bangs", "Big_Lips", "Big_Nose",
    "Black_Hair", "Blond_Hair", "Blurry", "Brown_Hair", "Bushy_Eyebrows", "Chubby", "Double_Chin", "Eyeglasses",
    "Goatee", "Gray_Hair", "Heavy_Makeup", "High_Cheekbones", "Male", "Mouth_Slightly_Open", "Mustache", "Narrow_Eyes",
    "No_Beard", "Oval_Face", "Pale_Skin", "Pointy_Nose", "Receding_Hairline", "Rosy_Cheeks", "Sideburns", "Smiling",
    "Straight_Hair", "Wavy_Hair", "Wearing_Earrings", "Wearing_Hat", "Wearing_Lipstick", "Wearing_Necklace",
    "Wearing_Necktie", "Young",
)  # fmt: skip
"""The forty attributes in the order of `list_attr_celeba.txt`."""

HAS: dict[str, Sequence[str]] = {
    "5_o_Clock_Shadow": ("stubble", "a five o'clock shadow", "a hint of stubble"),
    "Arched_Eyebrows": ("arched eyebrows", "arched brows", "high curved eyebrows"),
    "Bags_Under_Eyes": ("bags under the eyes", "tired eyes with bags below", "puffy lower eyelids"),
    "Big_Lips": ("full lips", "big lips", "plump lips"),
    "Big_Nose": ("a big nose", "a large nose", "a prominent nose"),
    "Bushy_Eyebrows": ("bushy eyebrows", "thick brows", "heavy eyebrows"),
    "Chubby": ("a chubby face", "full cheeks", "a plump face"),
    "Double_Chin": ("a double chin",),
    "Goatee": ("a goatee", "a goatee beard"),
    "High_Cheekbones": ("high cheekbones", "pronounced cheekbones"),
    "Mustache": ("a mustache", "a moustache"),
    "Narrow_Eyes": ("narrow eyes", "narrowed eyes"),
    "Oval_Face": ("an oval face", "an oval-shaped face"),
    "Pale_Skin": ("pale skin", "a pale complexion", "very fair skin"),
    "Pointy_Nose": ("a pointy nose", "a pointed nose"),
    "Receding_Hairline": ("a receding hairline", "a high receding hairline"),
    "Rosy_Cheeks": ("rosy cheeks", "blushing cheeks", "pink cheeks"),
    "Sideburns": ("sideburns", "long sideburns"),
}
"""Attribute -> phrases after "has"."""

WEARS: dict[str, Sequence[str]] = {
    "Eyeglasses": ("glasses", "eyeglasses", "a pair of glasses"),
    "Wearing_Hat": ("a hat", "a hat on the head"),
    "Wearing_Earrings": ("earrings", "a pair of earrings"),
    "Wearing_Necklace": ("a necklace",),
    "Wearing_Necktie": ("a necktie", "a tie"),
    "Wearing_Lipstick": ("lipstick",),
    "Heavy_Makeup": ("heavy makeup", "a lot of makeup", "strong make-up"),
}
"""Attribute -> phrases after "wearing"."""

COLORS: dict[str, Sequence[str]] = {
    "Black_Hair": ("black", "dark black", "jet-black"),
    "Blond_Hair": ("blond", "blonde", "fair", "golden"),
    "Brown_Hair": ("brown", "brunette", "chestnut"),
    "Gray_Hair": ("grey", "gray", "silver"),
}
"""Attribute -> hair colors."""

TEXTURES: dict[str, Sequence[str]] = {"Straight_Hair": ("straight", "sleek"), "Wavy_Hair": ("wavy", "curly", "wavy")}
"""Attribute -> hair textures."""

KINDS = ("a photo of", "a portrait of", "a close-up of", "a picture of", "a headshot of", "the face of")
"""Beginnings of a caption."""


@dataclass
class Phrases:
    """Phrases about one face by their place in a sentence; each entry is one fact."""

    noun: str
    adjectives: list[str] = field(default_factory=list)
    has: list[str] = field(default_factory=list)
    wears: list[str] = field(default_factory=list)
    expression: str = ""


def write_captions(attributes: Mapping[str, bool], rng: np.random.Generator) -> tuple[str, ...]:
    """Write ten different captions of at most about 40 words.

    Args:
        attributes: name -> whether the face has it; names of `ATTRIBUTES`.
        rng: chooses facts, phrases and forms.
    """
    captions: dict[str, None] = {}
    while len(captions) < CAPTIONS:
        captions[compose(draw_traits(attributes, rng), rng)] = None
    return tuple(captions)


def draw_traits(attributes: Mapping[str, bool], rng: np.random.Generator) -> Phrases:
    """Choose phrases for all attributes of a face."""

    has = lambda name: attributes.get(name, False)  # noqa: E731
    nouns = {True: ("man", "man", "man", "guy", "male person"), False: ("woman", "woman", "woman", "lady"), None: ()}
    traits = Phrases(pick((*nouns[attributes.get("Male")], "person"), rng))
    if has("Young"):
        traits.adjectives.append("young")
    elif "Young" in attributes:
        traits.adjectives.append(pick(("old", "elderly", "older") if has("Gray_Hair") else ("older", "mature"), rng))
    traits.has += [pick(phrases, rng) for name, phrases in HAS.items() if has(name)]
    traits.wears += [pick(phrases, rng) for name, phrases in WEARS.items() if has(name)]

    if has("Bald"):
        traits.has.append(pick(("a bald head", "no hair on the head"), rng))
    else:
        colors = [pick(phrases, rng) for name, phrases in COLORS.items() if has(name)]
        textures = [pick(phrases, rng) for name, phrases in TEXTURES.items() if has(name)]
        adjectives = [pick(found, rng) for found in (textures, colors) if found]
        if adjectives:
            traits.has.append(" ".join([*adjectives, "hair"]))
        if has("Bangs"):
            traits.has.append(pick(("bangs", "a fringe", "hair falling over the forehead"), rng))

    facial_hair = any(has(name) for name in ("5_o_Clock_Shadow", "Goatee", "Mustache", "Sideburns"))
    if "No_Beard" in attributes and not has("No_Beard"):
        traits.has.append(pick(("a beard", "a beard on the chin"), rng))
    elif has("Male") and has("No_Beard") and not facial_hair:
        traits.adjectives.append("clean-shaven")

    if has("Smiling"):
        traits.expression = pick(("smiling", "with a smile", "with a happy expression"), rng)
        if has("Mouth_Slightly_Open"):
            traits.expression = pick(("smiling with an open mouth", "with an open smile", "smiling broadly"), rng)
    elif has("Mouth_Slightly_Open"):
        traits.expression = pick(("with parted lips", "with the mouth slightly open"), rng)
    elif "Smiling" in attributes:
        traits.expression = pick(("not smiling", "with a serious look", "with a closed mouth and no smile"), rng)
    return traits


def compose(traits: Phrases, rng: np.random.Generator) -> str:
    """Write one or more sentences about a random subset of the traits."""

    def some(facts: list[str], most: int) -> list[str]:
        count = min(len(facts), int(rng.integers(0, most + 1)))
        return [facts[int(i)] for i in rng.permutation(len(facts))[:count]]

    adjectives = some(traits.adjectives, 1)
    has, wears = some(traits.has, 4), some(traits.wears, 3)
    expression = traits.expression if traits.expression and rng.random() < 0.6 else ""
    if not (adjectives or has or wears or expression):
        has = traits.has[:1]
    noun = " ".join([*adjectives, traits.noun])
    person = article(noun)
    he = traits.noun in ("man", "guy", "male person")
    they_have, they_are = ("They have", "They are")
    if traits.noun != "person":
        they_have, they_are = ("He has", "He is") if he else ("She has", "She is")

    form = int(rng.integers(4))
    if form == 0:  # tags
        facts = [*has, *(f"wearing {worn}" for worn in wears), *([expression] if expression else [])]
        return ", ".join([noun, *facts])
    if form == 1:  # a few sentences
        parts = [f"{capital(pick(KINDS, rng))} {person}{', ' + expression if expression else ''}."]
        if has:
            parts.append(f"{they_have} {listed(has)}.")
        if wears:
            parts.append(f"{they_are} wearing {listed(wears)}.")
        return " ".join(parts)
    start = person if form == 2 else f"{pick(KINDS, rng)} {person}"
    sentence = start + (f" with {listed(has)}" if has else "")
    sentence += f"{',' if has else ''} wearing {listed(wears)}" if wears else ""
    sentence += f", {expression}" if expression else ""
    return capital(sentence) + "." if rng.random() < 0.5 else sentence
