"""Rules that remove text other than captions from the answers of vision-language models, and shorten captions.

A rule removes a part of a text or all of it, and returns the reason. The rules run in the order of `RULES`. They
check the form; `refine` checks the facts. Removed parts are complete pieces: sentences, or phrases if the caption is
a list.
"""

from __future__ import annotations

import re
import unicodedata
from bisect import bisect_right
from collections import Counter
from collections.abc import Callable, Iterable
from functools import partial

from likeness.data.synthetic.captions import capital
from likeness.types import Note

SENTENCE_END = re.compile(r"(?<=[.!?])(?<!\b[A-Z]\.)(?<!\b(?:Mr|Ms|Dr|St|vs)\.)(?<!\bMrs\.)\s+(?=[\"'(]?[A-Z0-9])")

WORD = re.compile(r"[^\W\d_]+(?:['-][^\W\d_]+)*")
"""A word, also with hyphens and apostrophes: five-o'clock, woman's."""

DANGLING = frozenset((
    "a", "an", "the", "and", "or", "but", "with", "without", "of", "in", "on", "at", "by", "to", "from", "for",
    "as", "is", "are", "was", "has", "have", "having", "wearing", "wears", "who", "whose", "that", "which",
    "while", "her", "his", "their", "its", "this", "very", "slightly",
))  # fmt: skip
"""A caption cannot end in these."""

PHRASE_END = re.compile(r",\s+|;\s+|\s+(?=(?:and|with|while|wearing|who|against|in front of)\s)")
"""Places where a sentence can be cut."""

Count = Callable[[str], int]
"""Text -> number of tokens, including start and end."""

Filtered = tuple[str, list[Note]]
"""The remaining text, "" if the answer was rejected; and a note of every rule that changed it (`kind`: the rule)."""


def filter_answer(text: str, finished: bool = True) -> Filtered:
    """Run all rules over a model's answer; `finished` as in `Answer`."""
    notes = []
    for name, rule in RULES.items():
        text, reason = rule(text, finished)
        if reason:
            notes.append(Note(name, reason))
        if not text:
            break
    return text, notes


def thinking(text: str, finished: bool) -> tuple[str, str]:
    """Remove the reasoning in <think>."""
    answer = re.sub(r"<think>.*?</think>", "", text, flags=re.DOTALL).rpartition("</think>")[2]
    if "<think>" in answer or not answer.strip():
        return "", "no answer after the reasoning"
    return answer, "reasoning removed" if answer != text else ""


PLAIN = {"\u2018": "'", "\u2019": "'", "\u201c": '"', "\u201d": '"', "\u2013": "-", "\u2026": "...", "\u00a0": " "}
"""Typographic punctuation -> ASCII."""

HIDDEN = ("So", "Sk", "Mn", "Cc", "Cf", "Co", "Cn")
"""Unicode categories of emoji and control characters."""


def symbols(text: str, finished: bool) -> tuple[str, str]:
    """Remove emoji and control characters, but not backticks; replace typographic punctuation by ASCII."""
    plain = unicodedata.normalize("NFC", text).translate(str.maketrans(PLAIN))
    plain = re.sub(r"[ \t]*\u2014[ \t]*", ", ", plain).replace("\r\n", "\n")
    plain = "".join(c for c in plain if c in "\n\t`" or unicodedata.category(c) not in HIDDEN)
    plain = re.sub(r"[ \t]+", " ", plain).strip()
    return plain, "symbols removed or replaced" if plain != text else ""


REFUSALS = re.compile(
    r"\bi'?(?: a)?m (?:very |really |so )?sorry\b|\bi apologi[sz]e\b|\bas an? (?:ai|artificial|language model)\b"
    r"|\bi'?(?: a)?m an? (?:ai|language model)\b|\b(?:can(?:not|'t)|unable to|not able to|won't) "
    r"(?:assist|help|comply|fulfil|provide|identify|describe|process|view|see (?:the|any|an) (?:image|picture|photo))"
    r"|\bagainst (?:my|the|our) (?:policy|policies|guidelines)\b|\bplease (?:provide|upload|share|attach)\b"
    r"|\bno (?:image|picture|photo) (?:was|is|has been|seems)\b"
)


def refusal(text: str, finished: bool) -> tuple[str, str]:
    """Reject refusals."""
    found = REFUSALS.search(text.lower())
    return ("", f'it says "{found[0]}"') if found else (text, "")


def markup(text: str, finished: bool) -> tuple[str, str]:
    """Remove headings, markup and tags; join lines."""
    plain = re.sub(r"^(?:```\w*|#{1,6}\s.*)$", "", text, flags=re.MULTILINE)
    plain = re.sub(r"<[^<>]{1,30}>", " ", plain)
    plain = re.sub(r"!?\[([^\]]*)\]\([^)]*\)", r"\1", plain)
    plain = re.sub(r"^\s*(?:>\s+|[-*•·]\s+|\d{1,2}[.)]\s+)", "", plain, flags=re.MULTILINE)
    plain = re.sub(r"\*+|__+|`+|(?<!\w)_(?=\w)|(?<=\w)_(?!\w)", "", plain)
    lines = [line.strip() for line in plain.splitlines() if line.strip()]
    plain = "".join(line + (" " if line[-1] in ".!?:,;" else ", ") for line in lines).rstrip(" ,")
    if re.search(r"[{}\[\]|<>=\\]|https?:", plain):
        return "", "it is code"
    return plain, "markup removed" if plain != " ".join(text.split()) else ""


LABEL = re.compile(
    r"^(?:(?:sure|certainly|of course|okay|absolutely)\b[^.!:]{0,60}[.!:]\s*|here(?:'s| is| are)\b[^:]{0,60}:\s*"
    r"|(?:the )?(?:refined |corrected |image |visible )?"
    r"(?:captions?|descriptions?|answer|prompt|cues|tags|output)\s*:\s*)",
    re.IGNORECASE,
)


def label(text: str, finished: bool) -> tuple[str, str]:
    """Remove introductions such as "Here is a caption:" and enclosing quotation marks."""
    bare = text
    while (shorter := LABEL.sub("", bare, count=1)) != bare:
        bare = shorter
    while len(bare) > 1 and (bare[0], bare[-1]) in (('"', '"'), ("'", "'")) and bare[0] not in bare[1:-1]:
        bare = bare[1:-1].strip()
    return bare, f'removed "{text[: len(text) - len(bare)].strip()[:40]}"' if bare != text else ""


IMAGE = r"(?:image|picture|photo(?:graph)?|portrait|shot|headshot|close-up)"
LEAD = re.compile(
    rf"^(?:in (?:the|this) {IMAGE},?\s+(?:there (?:is|are)\s+|(?:we|you|one) (?:can )?see\s+)?"
    rf"|(?:the|this) (?:[a-z-]+ )?{IMAGE} "
    r"(?:shows?|depicts|features|displays|presents|captures|portrays|contains|showcases)\s+"
    rf"|(?:this|it) is (?=an? )|(?:the|this) {IMAGE} is (?:of )?(?=an? ))",
    re.IGNORECASE,
)
ASIDE = re.compile(rf",? (?:in|of|from|throughout) (?:the|this) (?:{IMAGE}|frame)\b(?! of)", re.IGNORECASE)
ABOUT = re.compile(rf"\b(?:the|this) (?:overall )?{IMAGE}\b(?! of)", re.IGNORECASE)


def mentions_image(text: str, finished: bool) -> tuple[str, str]:
    """Remove references to the image, such as "The image shows"."""
    pieces, between = pieces_of(text)
    fixed = [ASIDE.sub("", LEAD.sub("", piece)) for piece in pieces]
    if between == " ":
        fixed = [capital(piece) for piece in fixed]
    kept = [piece for piece in fixed if not ABOUT.search(piece)]
    if kept == pieces:
        return text, ""
    return join_pieces(kept, between), "it refers to the image"


def drop_pieces(text: str, fault_of: Callable[[str], str], verb: str = "says") -> tuple[str, str]:
    """Remove the pieces that have a fault, which is quoted in the reason."""
    pieces, between = pieces_of(text)
    faults = [fault_of(piece) for piece in pieces]
    if not any(faults):
        return text, ""
    kept = join_pieces((piece for piece, fault in zip(pieces, faults, strict=True) if not fault), between)
    return kept, f'it {verb} "{next(filter(None, faults))}"'


def match_in(pattern: re.Pattern[str], piece: str) -> str:
    return match[0].strip() if (match := pattern.search(piece)) else ""


FIRST_PERSON = re.compile(r"\bI\b|\b(?:[Mm]y|[Mm]e|[Ww]e|[Oo]ur|us)\b")
UNSEEN = re.compile(
    r"\b(?:not|isn't|aren't|barely) (?:clearly |fully |directly )?(?:visible|shown|discernible|apparent|clear)\b"
    r"|\bunclear\b|\bunknown\b|\bcannot be\b|\bcan't be\b"
    r"|\b(?:hard|difficult|impossible) to (?:say|tell|determine|see)\b"
    r"|\bn/a\b|\bunspecified\b|\bno visible\b|\bnone visible\b",
    re.IGNORECASE,
)


PROPER = frozenset((
    "I", "African", "American", "Arab", "Asian", "Black", "British", "Caucasian", "Chinese", "Christmas",
    "East", "Eastern", "English", "European", "French", "Hispanic", "Indian", "Italian", "Japanese", "Korean",
    "Latin", "Latina", "Latino", "LED", "Mediterranean", "Middle", "Mohawk", "Native", "Nordic", "Santa",
    "South", "Southeast", "White", "U", "V", "T", "Afro",
))  # fmt: skip
"""Capitalised words that are not names of people."""


def name(text: str, finished: bool) -> tuple[str, str]:
    """Remove pieces with names: capitalised words, except for the first word of a piece."""
    terms = WORD.findall(text)
    if len(terms) > 4 and sum(word[0].isupper() for word in terms) > len(terms) / 2:
        return "", "capitalised words may be names"
    return drop_pieces(text, names_in, "names")


def names_in(piece: str) -> str:
    """Return the capitalised words of a piece; the first word counts only if a name follows it."""
    terms = WORD.findall(piece)
    names = [word for word in terms[1:] if word[0].isupper() and re.split(r"[-']", word)[0] not in PROPER]
    return " ".join([*(terms[:1] if names and names[0] == terms[1] else []), *names])


COMMON = frozenset((
    "the", "with", "and", "is", "are", "has", "have", "of", "her", "his", "he", "she", "their", "they",
    "wearing", "wears", "hair", "eyes", "eyebrows", "brows", "face", "woman", "man", "person", "child", "girl",
    "boy", "smile", "smiles", "smiling", "skin", "lips", "mouth", "nose", "cheeks", "chin", "head",
    "background", "light", "lighting", "young", "old", "older", "middle-aged", "adult", "looking", "long",
    "short", "brown", "black", "blond", "blonde", "red", "white", "soft", "beard", "glasses",
))  # fmt: skip


def english(text: str, finished: bool) -> tuple[str, str]:
    """Reject other scripts and languages."""
    foreign = [c for c in text if c.isalpha() and ord(c) > 0x24F]
    if foreign:
        return "", f'"{foreign[0]}" is not a letter of English'
    terms = [word.lower() for word in WORD.findall(text)]
    known = sum(word in COMMON or any(part in COMMON for part in word.split("-")) for word in terms)
    if len(terms) >= 4 and 8 * known < len(terms):
        return "", f"{known} of {len(terms)} words are common in English captions"
    return text, ""


def repeated(text: str, finished: bool) -> tuple[str, str]:
    """Remove repeated pieces; reject loops."""
    pieces, between = pieces_of(text)
    once: dict[str, str] = {}
    for piece in pieces:
        once.setdefault(piece.lower().rstrip(".!?, "), piece)
    left = join_pieces(once.values(), between) if len(once) < len(pieces) else text
    terms = [word.lower() for word in WORD.findall(left)]
    runs = Counter(zip(terms, terms[1:], terms[2:], terms[3:], strict=False)).most_common(1)
    if runs and runs[0][1] > 2:
        return "", f'it says "{" ".join(runs[0][0])}" {runs[0][1]} times'
    return left, f"{len(pieces) - len(once)} of its {len(pieces)} pieces repeat others" if left != text else ""


def truncated(text: str, finished: bool) -> tuple[str, str]:
    """Remove an incomplete last sentence or phrase."""
    pieces, between = pieces_of(text)
    last = WORD.findall(text)[-1:] or [""]
    ended = text.rstrip("\"')")[-1:] in ".!?"
    open_end = last[0].lower() in DANGLING or text[-1:] in ",;:-"
    if ended or (finished and not open_end and (len(pieces) == 1 or between == ", ")):
        return text, ""
    return join_pieces(pieces[:-1], between), f'it is truncated at "{" ".join(pieces[-1].split()[-3:])}"'


MIN_WORDS = 3


def short(text: str, finished: bool) -> tuple[str, str]:
    """Reject very short answers."""
    count = len(WORD.findall(text))
    return (text, "") if count >= MIN_WORDS else ("", f"{count} words")


RULES: dict[str, Callable[[str, bool], tuple[str, str]]] = {
    "empty": lambda text, finished: (text.strip(), "" if text.strip() else "no text"),
    "thinking": thinking,
    "symbols": symbols,
    "refusal": refusal,
    "markup": markup,
    "label": label,
    "picture": mentions_image,
    "first-person": lambda text, finished: drop_pieces(text, partial(match_in, FIRST_PERSON)),
    "unseen": lambda text, finished: drop_pieces(text, partial(match_in, UNSEEN)),
    "english": english,
    "name": name,
    "repeated": repeated,
    "truncated": truncated,
    "short": short,
}
"""Name -> rule, in order of execution: (text, whether the answer ended) -> (remaining text, reason or "")."""


# Pieces and length


def pieces_of(text: str) -> tuple[list[str], str]:
    """Split a text into sentences, or a list such as "woman, red hair" into phrases; returns pieces and separator."""
    sentences = SENTENCE_END.split(text)
    phrases = re.split(r",\s+", text)
    if len(sentences) == 1 and len(phrases) >= 4 and len(text.split()) <= 4 * len(phrases):
        return phrases, ", "
    return sentences, " "


def join_pieces(pieces: Iterable[str], between: str) -> str:
    """Join pieces to a text; sentences begin with a capital."""
    text = between.join(pieces)
    return capital(text) if between == " " else text


def shorten(text: str, count: Count, limit: int) -> tuple[str, str]:
    """Cut a text to at most `limit` tokens after a sentence, else after a phrase, else after a word.

    Returns:
        The text, "" if not even a word fits; and the reason, "" if it was not cut.
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
    return "", f"{long} tokens, and its first word exceeds {limit}"


def without_dangling(text: str) -> str:
    """Remove final words and punctuation that cannot end a caption."""
    terms = text.rstrip(" ,;:-").split()
    while terms and terms[-1].strip(",;:").lower() in DANGLING:
        terms.pop()
    return " ".join(terms).rstrip(" ,;:-")
