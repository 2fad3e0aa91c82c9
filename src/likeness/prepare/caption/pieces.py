"""The pieces of a caption that can be taken out whole: sentences, or phrases where it is a list.

Text comes here with plain marks (straight quotes, hyphens): `rules.symbols` sees to that.
"""

from __future__ import annotations

import re
from bisect import bisect_right
from collections.abc import Callable, Iterable

SENTENCE_END = re.compile(r"(?<=[.!?])(?<!\b[A-Z]\.)(?<!\b(?:Mr|Ms|Dr|St|vs)\.)(?<!\bMrs\.)\s+(?=[\"'(]?[A-Z0-9])")

WORD = re.compile(r"[^\W\d_]+(?:['-][^\W\d_]+)*")
"""A word with what hangs in it: five-o'clock, woman's."""

DANGLING = frozenset((
    "a", "an", "the", "and", "or", "but", "with", "without", "of", "in", "on", "at", "by", "to", "from", "for",
    "as", "is", "are", "was", "has", "have", "having", "wearing", "wears", "who", "whose", "that", "which",
    "while", "her", "his", "their", "its", "this", "very", "slightly",
))  # fmt: skip
"""Words with which no caption ends."""

PHRASE_END = re.compile(r",\s+|;\s+|\s+(?=(?:and|with|while|wearing|who|against|in front of)\s)")
"""Where a sentence can be broken off."""

Count = Callable[[str], int]
"""A text -> its tokens, start and end among them."""


def pieces_of(text: str) -> tuple[list[str], str]:
    """The sentences of a text, or the phrases of a list such as "woman, red hair, smiling"; and what stood between."""
    sentences = SENTENCE_END.split(text)
    phrases = re.split(r",\s+", text)
    if len(sentences) == 1 and len(phrases) >= 4 and len(text.split()) <= 4 * len(phrases):
        return phrases, ", "
    return sentences, " "


def join(pieces: Iterable[str], between: str) -> str:
    """The pieces as one text that begins as a text does."""
    text = between.join(pieces)
    return text[:1].upper() + text[1:] if between == " " else text


def shorten(text: str, count: Count, limit: int) -> tuple[str, str]:
    """The longest beginning of a text with at most `limit` tokens, cut after a sentence, else a phrase, else a word.

    Returns:
        The text, and in a few words what was done; "" where it fitted. The text is "" where not even a word fits.
    """
    long = count(text)
    if long <= limit:
        return text, ""
    pieces, between = pieces_of(text)
    whole = "sentence" if between == " " else "phrase"
    kinds = (
        (whole, [between.join(pieces[:number]) for number in range(1, len(pieces))]),
        ("phrase", [text[: found.start()] for found in PHRASE_END.finditer(text)]),
        ("word", [text[: found.end()] for found in WORD.finditer(text)]),
    )
    for kind, beginnings in kinds:
        for beginning in reversed(beginnings[: bisect_right(beginnings, limit, key=count)]):
            short = beginning if kind == "sentence" else without_dangling(beginning)
            if short and (tokens := count(short)) <= limit:
                return short, f"{long} to {tokens} tokens, cut after a {kind}"
    return "", f"{long} tokens, and not even its first word has {limit}"


def without_dangling(text: str) -> str:
    """A beginning without the words and marks that lead on."""
    words = text.rstrip(" ,;:-").split()
    while words and words[-1].strip(",;:").lower() in DANGLING:
        words.pop()
    return " ".join(words).rstrip(" ,;:-")
