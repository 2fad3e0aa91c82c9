"""The rule filter: what vision-language models write besides captions, each kind by a rule with a name; and the length.

A rule mends a text (takes out a sentence, a heading) or leaves nothing of it, and says why. Rules run in the order of
`RULES`, each on what the one before left. They read form, not truth: truth is the business of `refine` and the masks.
Whatever is taken out is a whole piece: a sentence, or a phrase where the caption is a list.
"""

from __future__ import annotations

import re
import unicodedata
from bisect import bisect_right
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

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

Rule = Callable[[str, bool], tuple[str, str]]
"""(text, whether the model came to its end) -> (text, "" where nothing is left; why, "" where it was untouched)."""


@dataclass
class Filtered:
    """What the rules left of an answer."""

    text: str
    """"" where a rule left nothing."""
    touched: list[str] = field(default_factory=list)
    """"rule: why" of every rule that changed it; the last is the one that left nothing."""


def filter_answer(text: str, finished: bool = True) -> Filtered:
    """Run all rules over a model's answer.

    Args:
        text: as the model gave it.
        finished: whether the model came to its end, rather than to the largest number of tokens.
    """
    filtered = Filtered(text)
    for name, rule in RULES.items():
        filtered.text, why = rule(filtered.text, finished)
        if why:
            filtered.touched.append(f"{name}: {why}")
        if not filtered.text:
            break
    return filtered


def thinking(text: str, finished: bool) -> tuple[str, str]:
    """Models that think aloud: what stands in <think> is no caption."""
    spoken = re.sub(r"<think>.*?</think>", "", text, flags=re.DOTALL).rpartition("</think>")[2]
    if "<think>" in spoken or not spoken.strip():
        return "", "it never came to an answer"
    return spoken, "took out what was thought aloud" if spoken != text else ""


def empty(text: str, finished: bool) -> tuple[str, str]:
    """Nothing was said."""
    return text.strip(), "" if text.strip() else "no words"


PLAIN = {"\u2018": "'", "\u2019": "'", "\u201c": '"', "\u201d": '"', "\u2013": "-", "\u2026": "...", "\u00a0": " "}
"""Typographic marks -> plain ones, which all rules read."""

HIDDEN = ("So", "Sk", "Mn", "Cc", "Cf", "Co", "Cn")
"""Categories of emoji, control characters and the like."""


def symbols(text: str, finished: bool) -> tuple[str, str]:
    """Emoji and control characters go, typographic marks become plain."""
    plain = unicodedata.normalize("NFC", text).translate(str.maketrans(PLAIN))
    plain = re.sub(r"[ \t]*\u2014[ \t]*", ", ", plain).replace("\r\n", "\n")
    plain = "".join(c for c in plain if c in "\n\t" or unicodedata.category(c) not in HIDDEN)
    plain = re.sub(r"[ \t]+", " ", plain).strip()
    return plain, "symbols taken out or made plain" if plain != text else ""


REFUSALS = re.compile(
    r"\bi'?(?: a)?m (?:very |really |so )?sorry\b|\bi apologi[sz]e\b|\bas an? (?:ai|artificial|language model)\b"
    r"|\bi'?(?: a)?m an? (?:ai|language model)\b|\b(?:can(?:not|'t)|unable to|not able to|won't) "
    r"(?:assist|help|comply|fulfil|provide|identify|describe|process|view|see (?:the|any|an) (?:image|picture|photo))"
    r"|\bagainst (?:my|the|our) (?:policy|policies|guidelines)\b|\bplease (?:provide|upload|share|attach)\b"
    r"|\bno (?:image|picture|photo) (?:was|is|has been|seems)\b"
)


def refusal(text: str, finished: bool) -> tuple[str, str]:
    """The model declined."""
    found = REFUSALS.search(text.lower())
    return ("", f'it says "{found[0]}"') if found else (text, "")


def markup(text: str, finished: bool) -> tuple[str, str]:
    """Headings go; of other marks and tags the words stay; lines become one."""
    plain = re.sub(r"^(?:```\w*|#{1,6}\s.*)$", "", text, flags=re.MULTILINE)
    plain = re.sub(r"<[^<>]{1,30}>", " ", plain)
    plain = re.sub(r"!?\[([^\]]*)\]\([^)]*\)", r"\1", plain)
    plain = re.sub(r"^\s*(?:>\s+|[-*•·]\s+|\d{1,2}[.)]\s+)", "", plain, flags=re.MULTILINE)
    plain = re.sub(r"\*+|__+|`+|(?<!\w)_(?=\w)|(?<=\w)_(?!\w)", "", plain)
    lines = [line.strip() for line in plain.splitlines() if line.strip()]
    plain = "".join(line + (" " if line[-1] in ".!?:,;" else ", ") for line in lines).rstrip(" ,")
    if re.search(r"[{}\[\]|<>=\\]|https?:", plain):
        return "", "what is left of it is code"
    return plain, "marks taken out" if plain != " ".join(text.split()) else ""


LABEL = re.compile(
    r"^(?:(?:sure|certainly|of course|okay|absolutely)\b[^.!:]{0,60}[.!:]\s*|here(?:'s| is| are)\b[^:]{0,60}:\s*"
    r"|(?:the )?(?:refined |corrected |image |visible )?"
    r"(?:captions?|descriptions?|answer|prompt|cues|tags|output)\s*:\s*)",
    re.IGNORECASE,
)


def label(text: str, finished: bool) -> tuple[str, str]:
    """A lead-in such as "Here is a caption:", and quotation marks around all of it."""
    bare = text
    while (shorter := LABEL.sub("", bare, count=1)) != bare:
        bare = shorter
    while len(bare) > 1 and (bare[0], bare[-1]) in (('"', '"'), ("'", "'")) and bare[0] not in bare[1:-1]:
        bare = bare[1:-1].strip()
    return bare, f'took out "{text[: len(text) - len(bare)].strip()[:40]}"' if bare != text else ""


PICTURE = r"(?:image|picture|photo(?:graph)?|portrait|shot|headshot|close-up)"
LEAD = re.compile(
    rf"^(?:in (?:the|this) {PICTURE},?\s+(?:there (?:is|are)\s+|(?:we|you|one) (?:can )?see\s+)?"
    rf"|(?:the|this) (?:[a-z-]+ )?{PICTURE} "
    r"(?:shows?|depicts|features|displays|presents|captures|portrays|contains|showcases)\s+"
    rf"|(?:this|it) is (?=an? )|(?:the|this) {PICTURE} is (?:of )?(?=an? ))",
    re.IGNORECASE,
)
ASIDE = re.compile(rf",? (?:in|of|from|throughout) (?:the|this) (?:{PICTURE}|frame)\b(?! of)", re.IGNORECASE)
ABOUT = re.compile(rf"\b(?:the|this) (?:overall )?{PICTURE}\b(?! of)", re.IGNORECASE)


def picture(text: str, finished: bool) -> tuple[str, str]:
    """Talk of the picture instead of what it shows."""
    pieces, between = pieces_of(text)
    mended = [ASIDE.sub("", LEAD.sub("", piece)) for piece in pieces]
    if between == " ":
        mended = [piece[:1].upper() + piece[1:] for piece in mended]
    kept = [piece for piece in mended if not ABOUT.search(piece)]
    if kept == pieces:
        return text, ""
    return join(kept, between), "it speaks of the picture"


def drop_pieces(text: str, pattern: re.Pattern[str]) -> tuple[str, str]:
    """Take out the pieces in which a pattern is found, and say what was found."""
    pieces, between = pieces_of(text)
    found = [match[0].strip() for piece in pieces if (match := pattern.search(piece))]
    if not found:
        return text, ""
    return join((piece for piece in pieces if not pattern.search(piece)), between), f'it says "{found[0]}"'


FIRST_PERSON = re.compile(r"\bI\b|\b(?:[Mm]y|[Mm]e|[Ww]e|[Oo]ur|us)\b")
UNSEEN = re.compile(
    r"\b(?:not|isn't|aren't|barely) (?:clearly |fully |directly )?(?:visible|shown|discernible|apparent|clear)\b"
    r"|\bunclear\b|\bunknown\b|\bcannot be\b|\bcan't be\b"
    r"|\b(?:hard|difficult|impossible) to (?:say|tell|determine|see)\b"
    r"|\bn/a\b|\bunspecified\b|\bno visible\b|\bnone visible\b",
    re.IGNORECASE,
)


def first_person(text: str, finished: bool) -> tuple[str, str]:
    """Sentences in which the model speaks of itself."""
    return drop_pieces(text, FIRST_PERSON)


def unseen(text: str, finished: bool) -> tuple[str, str]:
    """Sentences about what cannot be seen."""
    return drop_pieces(text, UNSEEN)


PROPER = frozenset((
    "I", "African", "American", "Arab", "Asian", "Black", "British", "Caucasian", "Chinese", "Christmas",
    "East", "Eastern", "English", "European", "French", "Hispanic", "Indian", "Italian", "Japanese", "Korean",
    "Latin", "Latina", "Latino", "LED", "Mediterranean", "Middle", "Mohawk", "Native", "Nordic", "Santa",
    "South", "Southeast", "White", "U", "V", "T", "Afro",
))  # fmt: skip
"""Capitalised words that are no names of persons."""


def name(text: str, finished: bool) -> tuple[str, str]:
    """Guessed names: capitalised words inside a piece; a single one at its beginning cannot be told from a word."""
    pieces, between = pieces_of(text)
    words = WORD.findall(text)
    if len(words) > 4 and sum(word[0].isupper() for word in words) > len(words) / 2:
        return "", "it is in capitals, so that names cannot be told from other words"
    found = {piece: names_in(piece) for piece in pieces}
    if not any(found.values()):
        return text, ""
    first = next(names for names in found.values() if names)
    return join((piece for piece in pieces if not found[piece]), between), f'it names "{first}"'


def names_in(piece: str) -> str:
    """The capitalised words after the first of a piece, with the first where it leads to them."""
    words = WORD.findall(piece)
    names = [word for word in words[1:] if word[0].isupper() and re.split(r"[-']", word)[0] not in PROPER]
    return " ".join([*(words[:1] if names and names[0] == words[1] else []), *names])


COMMON = frozenset((
    "the", "with", "and", "is", "are", "has", "have", "of", "her", "his", "he", "she", "their", "they",
    "wearing", "wears", "hair", "eyes", "eyebrows", "brows", "face", "woman", "man", "person", "child", "girl",
    "boy", "smile", "smiles", "smiling", "skin", "lips", "mouth", "nose", "cheeks", "chin", "head",
    "background", "light", "lighting", "young", "old", "older", "middle-aged", "adult", "looking", "long",
    "short", "brown", "black", "blond", "blonde", "red", "white", "soft", "beard", "glasses",
))  # fmt: skip


def english(text: str, finished: bool) -> tuple[str, str]:
    """Another script, or hardly a word that English captions of faces are made of."""
    strange = [c for c in text if c.isalpha() and ord(c) > 0x24F]
    if strange:
        return "", f'it has "{strange[0]}", a letter that English has not'
    words = [word.lower() for word in WORD.findall(text)]
    known = sum(word in COMMON or any(part in COMMON for part in word.split("-")) for word in words)
    if len(words) >= 4 and 8 * known < len(words):
        return "", f"{known} of {len(words)} words are common in English captions"
    return text, ""


def repeated(text: str, finished: bool) -> tuple[str, str]:
    """What is said twice is said once; what goes in a loop is nothing."""
    pieces, between = pieces_of(text)
    once: dict[str, str] = {}
    for piece in pieces:
        once.setdefault(piece.lower().rstrip(".!?, "), piece)
    left = join(once.values(), between) if len(once) < len(pieces) else text
    words = [word.lower() for word in WORD.findall(left)]
    runs = Counter(zip(words, words[1:], words[2:], words[3:], strict=False)).most_common(1)
    if runs and runs[0][1] > 2:
        return "", f'it says "{" ".join(runs[0][0])}" {runs[0][1]} times'
    return left, f"{len(pieces) - len(once)} of its {len(pieces)} pieces repeat others" if left != text else ""


def truncated(text: str, finished: bool) -> tuple[str, str]:
    """An end without an end: the last sentence or phrase goes."""
    pieces, between = pieces_of(text)
    last = WORD.findall(text)[-1:] or [""]
    ended = text.rstrip("\"')")[-1:] in ".!?"
    open_end = last[0].lower() in DANGLING or text[-1:] in ",;:-"
    if ended or (finished and not open_end and (len(pieces) == 1 or between == ", ")):
        return text, ""
    return join(pieces[:-1], between), f'it breaks off at "{" ".join(pieces[-1].split()[-3:])}"'


FEWEST = 3


def short(text: str, finished: bool) -> tuple[str, str]:
    """Too little to be a caption."""
    words = len(WORD.findall(text))
    return (text, "") if words >= FEWEST else ("", f"{words} words")


RULES: dict[str, Rule] = {
    "empty": empty,
    "thinking": thinking,
    "symbols": symbols,
    "refusal": refusal,
    "markup": markup,
    "label": label,
    "picture": picture,
    "first-person": first_person,
    "unseen": unseen,
    "english": english,
    "name": name,
    "repeated": repeated,
    "truncated": truncated,
    "short": short,
}
"""Name -> rule, in the order in which they run."""


# Pieces and length


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
