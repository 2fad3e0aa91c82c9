"""The refinement: a caption is held against the facts, attributes and mask, by a second model and by the mask itself.

The model is told the facts as text; what it makes of a caption is held against both, since it may take away and
correct, but not invent. What the mask alone contradicts goes without asking anybody.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from likeness.conditions import CONDITIONS
from likeness.conditions.mask.classes import CLASSES
from likeness.conditions.mask.contradictions import contradictions
from likeness.data.folder import column_of
from likeness.prepare.caption.prompts import NOTHING
from likeness.prepare.caption.rules import DANGLING, WORD, Filtered, filter_answer, join, pieces_of, thinking

PARTS: dict[str, str] = {
    "eye_g": "glasses",
    "l_eye": "left eye",
    "r_eye": "right eye",
    "l_brow": "left eyebrow",
    "r_brow": "right eyebrow",
    "l_ear": "left ear",
    "r_ear": "right ear",
    "mouth": "inside of the open mouth",
    "u_lip": "upper lip",
    "l_lip": "lower lip",
    "cloth": "clothes",
}
"""Class -> its name in words, where that is another."""

JUDGEMENTS = ("Attractive", "Blurry")
"""Attributes of which captions do not speak."""

PLAIN = DANGLING | frozenset((
    "he", "she", "they", "it", "him", "them", "be", "been", "being", "no", "not", "nor", "there", "some", "any",
    "appears", "looks", "shows", "person", "face", "man", "woman",
))  # fmt: skip
"""Words that a shortened sentence may need and that claim nothing of their own; who it is, is checked by `SEXES`."""

SEXES = (
    frozenset(["man", "men", "guy", "boy", "male", "he", "his", "him"]),
    frozenset(["woman", "women", "lady", "girl", "female", "she", "her"]),
)
STEM = 4
"""Letters that two forms of a word share: smile, smiling."""


def read_labels(row: dict[str, Any]) -> np.ndarray | None:
    """The mask of a row, uint8 [H, W], canonical; None where it has none.

    Raises:
        InputError: it cannot be read.
    """
    file = row.get(column_of("mask"))
    return None if file is None else CONDITIONS["mask"].read(file).raw


def facts_of(row: dict[str, Any], labels: np.ndarray | None, caption: str) -> str:
    """The facts about a caption, a line each: attributes, parts of the mask with their shares, contradictions found."""
    lines = []
    attributes = row.get("attributes")
    if isinstance(attributes, dict):
        known = {name.replace("_", " ").lower(): value for name, value in attributes.items() if name not in JUDGEMENTS}
        holds = [name for name, value in known.items() if value is True or value == 1]
        not_so = [name for name, value in known.items() if value is False or value in (0, -1)]
        others = [f"{name} {value}" for name, value in known.items() if isinstance(value, str) and value]
        lines += [f"It holds: {', '.join(holds)}."] if holds else []
        lines += [f"It does not hold: {', '.join(not_so)}."] if not_so else []
        lines += [f"Known: {', '.join(others)}."] if others else []
    if labels is not None:
        shares = np.bincount(labels.ravel(), minlength=len(CLASSES)) / labels.size
        named = [(PARTS.get(part, part), share) for part, share in zip(CLASSES, shares, strict=True)]
        seen = [f"{part} {100 * share:.1f} %" for part, share in named if share]
        lines.append(f"Parts of the picture: {', '.join(seen)}.")
        lines.append(f"Not in the picture: {', '.join(part for part, share in named if not share) or 'none'}.")
        lines += [f"Contradiction: {sentence}." for sentence in contradictions(labels, caption)]
    return "\n".join(lines) or "none"


def accept(answer: str, caption: str, facts: str, finished: bool = True) -> Filtered:
    """The checked caption, or nothing where the answer cannot be trusted.

    Args:
        answer: what the checking model said.
        caption: what it was given.
        facts: what it was told besides; their words may come in as corrections.
        finished: whether it came to its end.
    """
    spoken = thinking(answer, finished)[0].strip()
    if spoken.strip(".\"' ").upper() == NOTHING:
        return Filtered("", ["refined: nothing of it is supported"])
    filtered = filter_answer(answer, finished)
    if not filtered.text:
        return Filtered("", [f"refined: its check gave no caption ({filtered.touched[-1]})"])
    known = words_of(caption) | words_of(facts)
    stems = {word[:STEM] for word in known if len(word) >= STEM}
    new = [
        word for word in WORD.findall(filtered.text.lower()) if word not in known | PLAIN and word[:STEM] not in stems
    ]
    turned = [sex for sex in SEXES if words_of(filtered.text) & sex and not known & sex]
    if new or turned:
        return Filtered(
            "", [f'refined: its check brought in "{new[0] if new else sorted(turned[0] & words_of(filtered.text))[0]}"']
        )
    if filtered.text == caption:
        return Filtered(caption)
    return Filtered(filtered.text, [f"refined: {len(caption.split())} to {len(filtered.text.split())} words"])


def words_of(text: str) -> set[str]:
    """The words of a text, and the parts of those with hyphens."""
    words = {word.lower() for word in WORD.findall(text)}
    return words | {part for word in words for part in word.split("-")}


def without_contradictions(labels: np.ndarray | None, caption: str) -> tuple[str, list[str]]:
    """A caption without the sentences or phrases that its mask contradicts, and why each was taken out."""
    if labels is None:
        return caption, []
    pieces, between = pieces_of(caption)
    wrong = [contradictions(labels, piece) for piece in pieces]
    if not any(wrong):
        return caption, []
    kept = join((piece for piece, found in zip(pieces, wrong, strict=True) if not found), between)
    return kept, [f"mask: {found[0]}" for found in wrong if found]
