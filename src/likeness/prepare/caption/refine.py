"""What a checking model made of a caption, held against the caption: it may take away and correct, not invent."""

from __future__ import annotations

from likeness.prepare.caption.pieces import DANGLING, WORD
from likeness.prepare.caption.prompts import NOTHING
from likeness.prepare.caption.rules import Filtered, filter_answer, thinking

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
