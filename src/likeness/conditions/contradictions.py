"""Where a caption and a mask contradict one another: "bald" over a mask with 23 % hair.

A literal table of what a mask can tell: parts that must be there or must not, and how far hair reaches. What it cannot
tell (beards, colours, moods) is left alone, and so is a caption that is silent: a false alarm costs more trust than a
missed one. Negations are read as far as they are plain; where words leave it open, nothing is said.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

import numpy as np

from likeness.conditions.classes import CLASS_INDEX
from likeness.conditions.edits import checked
from likeness.conditions.layout import Layout, measure

ONE_PIXEL = 1e-9
"""A share of the picture that a single pixel exceeds."""

WORN = 0.005
"""Share of the picture from which a hat is worn, and hair is to be seen."""

EVERYTHING = (0.0, 1.0)


@dataclass(frozen=True, kw_only=True)
class Claim:
    """What some words say of one class."""

    words: str
    """Regular expression, matched in lower case between word boundaries."""
    part: str
    """The class they are about."""
    said: tuple[float, float] = EVERYTHING
    """Least and largest share of the picture where the words are said."""
    denied: tuple[float, float] = EVERYTHING
    """The same where they are denied: "no hat"."""
    ends: tuple[float, float] | None = None
    """Least and largest height of the part's lowest pixel where the words are said, if any: 0 the top of the box around
    the skin, 1 its bottom."""


STYLED = r"(?:(?!(?:man|woman|person|guy|lady|face|faced|neck|nose|beard|stubble|and|with|or|no)\b)[\w'-]+ ){0,3}"
"""Words between "long" and "hair": colours and textures, not another noun that may be long."""

CLAIMS: tuple[Claim, ...] = (
    # Heads that are bald on top but for a rim of hair have 2 to 6 % in masks of CelebAMask-HQ.
    Claim(
        words=r"(?<!half )(?<!half-)(?<!partly )(?<!partially )bald(?:-headed)?(?! (?:spot|patch|eagle))|hairless"
        r"|shaved head|(?:no|without|without any) hair(?= at all| on (?:the|his|her|their) head| and | or |[.,;!?]|$)",
        part="hair",
        said=(0.0, 0.08),
    ),
    Claim(
        words=rf"long,? {STYLED}hair(?! (?:in a|tied|pulled|pinned|up))", part="hair", said=(WORN, 1), ends=(0.75, 9)
    ),
    Claim(words=rf"short,? {STYLED}hair", part="hair", said=(WORN, 1), ends=(-9, 1.15)),
    Claim(
        words=r"(?<!facial )(?<!body )(?<!chest )(?<!nose )hair(?! (?:clip|band|tie|pin|net))"
        r"|curls|afro|ponytail|pigtails|braids|dreadlocks|bangs",
        part="hair",
        said=(WORN, 1),
    ),
    Claim(
        words=r"hats?(?! stand)|caps?(?! sleeves?)|beanies?|berets?|bonnets?|fedoras?|turbans?|helmets?|headwear",
        part="hat",
        said=(WORN, 1),
        denied=(0, WORN),
    ),
    Claim(
        words=r"(?<!wine )glasses(?! of)|eye-?glasses|sun-?glasses|spectacles",
        part="eye_g",
        said=(0.002, 1),
        denied=(0, 0.002),
    ),
    Claim(words=r"ear-?rings?|ear studs?", part="earring", said=(ONE_PIXEL, 1), denied=(0, 2e-4)),
    Claim(words=r"necklaces?|chokers?", part="necklace", said=(ONE_PIXEL, 1), denied=(0, 2e-4)),
    Claim(
        words=r"open mouth|mouth (?:slightly |wide |half )?open|parted lips|lips parted|toothy (?:smile|grin)",
        part="mouth",
        said=(ONE_PIXEL, 1),
    ),
    Claim(words=r"closed[ -]mouth(?:ed)?|mouth closed|closed lips|lips closed", part="mouth", said=(0, 0.003)),
)
"""The words that are understood; of two that fit, the first."""

SUBJECT = re.compile("|".join(rf"\b(?P<claim{number}>{claim.words})\b" for number, claim in enumerate(CLAIMS)))

ITEM = "\ue000"
"""Stands for each letter of a subject, so that negations can be read around them."""

STOPS = r"and|but|with|wearing|wears|wear|has|have|having|is|are|in|who|while|he|she|they"
"""Words at which a negation ends."""

BETWEEN = rf"(?:(?!(?:{STOPS})\b)[\w'-]+ ){{0,3}}"

DENIAL = re.compile(
    r"(?:\b(?:no|without|lacks|lacking|neither|nor)"
    r"|(?:\bnot|\bnever|\b\w+n['\u2019]t|\bno longer)(?: (?:wearing|wear|wears|have|having|has|with|in))?) "
    rf"{BETWEEN}{ITEM}+"
    rf"(?:(?:, {BETWEEN}{ITEM}+)*,? (?:or|nor) {BETWEEN}{ITEM}+)*"
    rf"(?P<open>(?:,? and {BETWEEN}{ITEM}+)?)"
)
"""A negation with all it denies: "no hat", "not wearing a hat, glasses or earrings".

In "without hat and glasses" the glasses are left open."""


def contradictions(labels: np.ndarray, caption: str) -> tuple[str, ...]:
    """One sentence for each claim of the caption that the mask contradicts, with the measured share.

    Args:
        labels: uint8 [H, W], canonical.
        caption: English; what is not understood is passed over.

    Raises:
        InputError: `labels` are no labels.
    """
    labels = checked(labels)
    layout, text = measure(labels), " ".join(caption.lower().split())
    hidden = SUBJECT.sub(lambda found: ITEM * len(found[0]), text)
    denials = [(denial.start(), denial.end(), denial.start("open")) for denial in DENIAL.finditer(hidden)]
    sentences: dict[str, None] = {}
    for found in SUBJECT.finditer(text):
        assert found.lastgroup is not None
        claim = CLAIMS[int(found.lastgroup.removeprefix("claim"))]
        around = next((span for span in denials if span[0] < found.start() < span[1]), None)
        if around is not None and found.start() >= around[2]:
            continue
        words = found[0] if around is None else text[around[0] : found.end()]
        wrong = _wrong(layout, labels.size, claim, denied=around is not None)
        if wrong:
            sentences[f'the caption says "{words}", but {wrong}'] = None
    return tuple(sentences)


def _wrong(layout: Layout, size: int, claim: Claim, denied: bool) -> str:
    """What the mask has against a claim, or nothing."""
    index = CLASS_INDEX[claim.part]
    share = layout.pixels[index] / size
    least, most = claim.denied if denied else claim.said
    if claim.part == "hair" and layout.pixels[CLASS_INDEX["hat"]] > WORN * size:
        least = 0.0  # it may be under the hat
    if share < least:
        return f"the mask has no {claim.part}" if not share else f"{claim.part} is only {100 * share:.2f} % of the mask"
    if share > most:
        return f"{claim.part} is {100 * share:.2f} % of the mask"
    if denied or claim.ends is None or not share:
        return ""
    top, bottom = layout.box[CLASS_INDEX["skin"], [1, 3]]
    end = (layout.box[index, 3] - top) / max(bottom - top, 1)
    if end < claim.ends[0] or end > claim.ends[1]:  # never where there is no skin: NaN
        place = "above the chin" if end < 1 else "below the chin"
        return f"{claim.part} ({100 * share:.2f} % of the mask) ends {place}, at {100 * end:.0f} % of the face's height"
    return ""
