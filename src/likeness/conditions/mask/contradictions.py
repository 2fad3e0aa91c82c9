"""Find contradictions between a caption and a mask: "bald" with 23 % hair.

A table of what a mask can show: parts that must be present or absent, and how far hair reaches. Everything else
(beards, colors, moods) is ignored, and so is a caption that does not mention a part: a false alarm costs more trust
than a missed contradiction. Ambiguous negations are ignored.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from likeness.conditions.mask.classes import CLASS_INDEX
from likeness.conditions.mask.edits import checked
from likeness.conditions.mask.geometry import Geometry, measure

ONE_PIXEL = 1e-9
"""A fraction of the image that a single pixel exceeds."""

WORN = 0.005
"""Smallest fraction of the image of a hat that is worn, and of visible hair."""

ANY = (0.0, 1.0)


@dataclass(frozen=True, kw_only=True)
class Claim:
    """What a phrase states about one class."""

    phrase: str
    """Regular expression, matched in lower case between word boundaries."""
    part: str
    """The class that it is about."""
    stated: tuple[float, float] = ANY
    """Range of the class's fraction of the image if the phrase is stated."""
    denied: tuple[float, float] = ANY
    """Range if it is denied, as in "no hat"."""
    ends: tuple[float, float] | None = None
    """Range of the height of the class's lowest pixel if stated: 0 at the top of the skin, 1 at its lower end."""


class Contradiction(NamedTuple):
    """A claim of a caption that a mask contradicts."""

    text: str
    """One sentence with the measured fraction."""
    part: str
    """The class that it is about."""
    excess: bool
    """Whether the mask has more of it than the claim allows."""


STYLED = r"(?:(?!(?:man|woman|person|guy|lady|face|faced|neck|nose|beard|stubble|and|with|or|no)\b)[\w'-]+ ){0,3}"
"""Words between "long" and "hair": colors and textures, but no other noun that may be long."""

PARTLY = ("half ", "half-", "partly ", "partially ", "almost ", "nearly ", "mostly ", "going ")
"""What may not precede "bald"."""

FULLY = "".join(f"(?<!{words})" for words in PARTLY)

CLAIMS: tuple[Claim, ...] = (
    # Bald heads with a rim of hair have 2 to 6 % hair in masks of CelebAMask-HQ.
    Claim(
        phrase=rf"{FULLY}bald(?:-headed)?(?! (?:spot|patch|eagle))|hairless"
        r"|shaved head|(?:no|without|without any) hair(?= at all| on (?:the|his|her|their) head| and | or |[.,;!?]|$)",
        part="hair",
        stated=(0.0, 0.08),
    ),
    Claim(
        phrase=rf"long,? {STYLED}hair(?! (?:in a|tied|pulled|pinned|up))", part="hair", stated=(WORN, 1), ends=(0.75, 9)
    ),
    Claim(phrase=rf"short,? {STYLED}hair", part="hair", stated=(WORN, 1), ends=(-9, 1.15)),
    Claim(
        phrase=r"(?<!facial )(?<!body )(?<!chest )(?<!nose )hair(?! (?:clip|band|tie|pin|net))"
        r"|curls|afro|ponytail|pigtails|braids|dreadlocks|bangs",
        part="hair",
        stated=(WORN, 1),
    ),
    Claim(
        phrase=r"hats?(?! stand)|caps?(?! sleeves?)|beanies?|berets?|bonnets?|fedoras?|turbans?|helmets?|headwear",
        part="hat",
        stated=(WORN, 1),
        denied=(0, WORN),
    ),
    Claim(
        phrase=r"(?<!wine )glasses(?! of)|eye-?glasses|sun-?glasses|spectacles",
        part="eye_g",
        stated=(0.002, 1),
        denied=(0, 0.002),
    ),
    Claim(phrase=r"ear-?rings?|ear studs?", part="earring", stated=(ONE_PIXEL, 1), denied=(0, 2e-4)),
    Claim(phrase=r"necklaces?|chokers?", part="necklace", stated=(ONE_PIXEL, 1), denied=(0, 2e-4)),
    Claim(
        phrase=r"open mouth|mouth (?:slightly |wide |half )?open|parted lips|lips parted|toothy (?:smile|grin)",
        part="mouth",
        stated=(ONE_PIXEL, 1),
    ),
    Claim(phrase=r"closed[ -]mouth(?:ed)?|mouth closed|closed lips|lips closed", part="mouth", stated=(0, 0.003)),
)
"""The phrases that are recognized. If several match, the first applies."""

SUBJECT = re.compile("|".join(rf"\b(?P<claim{number}>{claim.phrase})\b" for number, claim in enumerate(CLAIMS)))

ITEM = "\ue000"
"""Replaces each letter of a subject before negations are matched."""

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
"""A negation with all its subjects: "no hat", "not wearing a hat, glasses or earrings".

The group `open` is ambiguous: the glasses in "without hat and glasses"."""


def contradictions(labels: np.ndarray, caption: str) -> tuple[str, ...]:
    """Return one sentence per claim of the caption that labels, uint8 [H, W], contradict (`find_contradictions`).
    Raises `InputError` if `labels` are not class numbers.
    """
    return tuple(found.text for found in find_contradictions(measure(checked(labels)), caption))


def find_contradictions(geometry: Geometry, caption: str) -> tuple[Contradiction, ...]:
    """Return the claims of an English caption that a mask contradicts; unknown phrases are ignored. `geometry` is the
    output of `measure`.
    """
    size, text = int(geometry.pixels.sum()), " ".join(caption.lower().split())
    hidden = SUBJECT.sub(lambda found: ITEM * len(found[0]), text)
    denials = list(DENIAL.finditer(hidden))
    contradicted: dict[Contradiction, None] = {}
    for found in SUBJECT.finditer(text):
        assert found.lastgroup is not None
        claim = CLAIMS[int(found.lastgroup.removeprefix("claim"))]
        denial = next((match for match in denials if match.start() < found.start() < match.end()), None)
        if denial is not None and found.start() >= denial.start("open"):
            continue
        phrase = found[0] if denial is None else text[denial.start() : found.end()]
        if wrong := _contradiction(geometry, size, claim, denied=denial is not None):
            most = (claim.stated if denial is None else claim.denied)[1]
            excess = bool(geometry.pixels[CLASS_INDEX[claim.part]] > most * size)
            contradicted[Contradiction(f'the caption says "{phrase}", but {wrong}', claim.part, excess)] = None
    return tuple(contradicted)


def _contradiction(geometry: Geometry, size: int, claim: Claim, denied: bool) -> str:
    """Return what contradicts a claim, or an empty string."""
    index = CLASS_INDEX[claim.part]
    fraction = geometry.pixels[index] / size
    least, most = claim.denied if denied else claim.stated
    if claim.part == "hair" and geometry.pixels[CLASS_INDEX["hat"]] > WORN * size:
        least = 0.0  # it may be under the hat
    if fraction < least and not fraction:
        return f"the mask has no {claim.part}"
    if fraction < least:
        return f"only {100 * fraction:.2f} % of the mask is {claim.part}"
    if fraction > most:
        return f"{100 * fraction:.2f} % of the mask is {claim.part}"
    if denied or claim.ends is None or not fraction:
        return ""
    top, bottom = geometry.box[CLASS_INDEX["skin"], [1, 3]]
    end = (geometry.box[index, 3] - top) / max(bottom - top, 1)
    if not (end < claim.ends[0] or end > claim.ends[1]):  # also without skin: NaN
        return ""
    place = "above the chin" if end < 1 else "below the chin"
    return f"{claim.part} ({100 * fraction:.2f} % of the mask) ends {place}, at {100 * end:.0f} % of the face's height"
