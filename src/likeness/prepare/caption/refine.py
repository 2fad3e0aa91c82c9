"""Check captions against facts from attributes and mask, with a second model and with the mask alone.

The model receives the facts as text. It may remove and correct claims; an answer with new claims is rejected. Claims
that the mask contradicts are removed without a model.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from likeness.conditions import CONDITIONS
from likeness.conditions.mask.classes import CLASSES, TITLES
from likeness.conditions.mask.contradictions import contradictions
from likeness.data.folder import column_of
from likeness.prepare.caption.prompts import NOTHING
from likeness.prepare.caption.rules import DANGLING, WORD, Filtered, filter_answer, join_pieces, pieces_of, thinking
from likeness.types import Note

PARTS = TITLES | {"mouth": "inside of the open mouth"}
"""Class -> its name in text, if different."""

SUBJECTIVE = ("Attractive", "Blurry")
"""Attributes that captions do not mention."""

PLAIN = DANGLING | frozenset((
    "he", "she", "they", "it", "him", "them", "be", "been", "being", "no", "not", "nor", "there", "some", "any",
    "appears", "looks", "shows", "person", "face", "man", "woman",
))  # fmt: skip
"""Words without a claim that a shortened sentence may need. Words for the sex are checked by `SEXES`."""

SEXES = (
    frozenset(["man", "men", "guy", "boy", "male", "he", "his", "him"]),
    frozenset(["woman", "women", "lady", "girl", "female", "she", "her"]),
)
STEM = 4
"""Letters that the forms of a word share: smile, smiling."""


def mask_of_row(row: dict[str, Any]) -> np.ndarray | None:
    """Return the mask of a row, uint8 [H, W], canonical; None if it has none.

    Raises:
        InputError: it cannot be read.
    """
    file = row.get(column_of("mask"))
    return None if file is None else CONDITIONS["mask"].read(file).raw


def facts_of(row: dict[str, Any], labels: np.ndarray | None, caption: str) -> str:
    """Return the facts about a caption, one per line: attributes, areas of the parts, contradictions with the mask."""
    lines = []
    attributes = row.get("attributes")
    if isinstance(attributes, dict):
        known = {name.replace("_", " ").lower(): value for name, value in attributes.items() if name not in SUBJECTIVE}
        true = [name for name, value in known.items() if value is True or value == 1]
        false = [name for name, value in known.items() if value is False or value in (0, -1)]
        others = [f"{name} {value}" for name, value in known.items() if isinstance(value, str) and value]
        lines += [f"It holds: {', '.join(true)}."] if true else []
        lines += [f"It does not hold: {', '.join(false)}."] if false else []
        lines += [f"Known: {', '.join(others)}."] if others else []
    if labels is not None:
        areas = np.bincount(labels.ravel(), minlength=len(CLASSES)) / labels.size
        named = [(PARTS.get(part, part), area) for part, area in zip(CLASSES, areas, strict=True)]
        visible = [f"{part} {100 * area:.1f} %" for part, area in named if area]
        lines.append(f"Parts of the picture: {', '.join(visible)}.")
        lines.append(f"Not in the picture: {', '.join(part for part, area in named if not area) or 'none'}.")
        lines += [f"Contradiction: {sentence}." for sentence in contradictions(labels, caption)]
    return "\n".join(lines) or "none"


def accept(answer: str, caption: str, facts: str, finished: bool = True) -> Filtered:
    """Return the refined caption, or "" if the answer must be rejected.

    Args:
        answer: answer of the refiner.
        caption: the original caption.
        facts: the facts, from which corrections may be taken.
        finished: whether the answer ended.
    """
    if thinking(answer, finished)[0].strip().strip(".\"' ").upper() == NOTHING:
        return "", [Note("refined", "nothing is supported by the facts")]
    text, notes = filter_answer(answer, finished)
    if not text:
        return "", [Note("refined", f"the answer is not a caption ({notes[-1].kind}: {notes[-1].text})")]
    known = terms_of(caption) | terms_of(facts)
    stems = {word[:STEM] for word in known if len(word) >= STEM}
    new = [word for word in WORD.findall(text.lower()) if word not in known | PLAIN and word[:STEM] not in stems]
    new += [word for sex in SEXES if not known & sex for word in sorted(terms_of(text) & sex)]
    if new:
        return "", [Note("refined", f'the answer adds "{new[0]}"')]
    same = text == caption
    return text, [] if same else [Note("refined", f"{len(caption.split())} to {len(text.split())} words")]


def terms_of(text: str) -> set[str]:
    """Return every word of a text, in lower case, and the parts of hyphenated ones."""
    terms = {word.lower() for word in WORD.findall(text)}
    return terms | {part for term in terms for part in term.split("-")}


def without_contradictions(labels: np.ndarray | None, caption: str) -> Filtered:
    """Remove the sentences or phrases that the mask contradicts."""
    if labels is None:
        return caption, []
    pieces, between = pieces_of(caption)
    wrong = [contradictions(labels, piece) for piece in pieces]
    if not any(wrong):
        return caption, []
    kept = join_pieces((piece for piece, found in zip(pieces, wrong, strict=True) if not found), between)
    return kept, [Note("mask", str(found[0])) for found in wrong if found]
