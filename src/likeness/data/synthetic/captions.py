"""Write captions of a synthetic face from its attributes with a small grammar.

Each caption states a random subset of the attributes in varied wording and order, so that a model does not learn fixed
templates.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

CAPTION_COUNT = 10
MAXIMUM_WORDS = 60
FACT_COUNTS = (1, 1, 2, 2, 3, 3, 4, 5, 6, 8)
"""Number of facts per caption, in random order."""

NOUNS = {"woman": ("woman", "woman", "lady"), "man": ("man", "man", "gentleman"), "person": ("person",)}
PRONOUNS = {
    "woman": ("She", "has", "wears", "her"),
    "man": ("He", "has", "wears", "him"),
    "person": ("They", "have", "wear", "them"),
}
AGES = {"young": ("young",), "middle-aged": ("middle-aged",), "older": ("older", "elderly")}
MOODS = {
    "neutral": ("calm", "serious"),
    "smile": ("smiling", "gently smiling"),
    "big smile": ("grinning", "broadly smiling"),
    "surprised": ("surprised", "astonished"),
    "sad": ("sad", "frowning"),
}
FACES = {
    "neutral": ("a neutral expression", "a calm expression", "a closed mouth"),
    "smile": ("a gentle smile", "a closed-mouth smile"),
    "big smile": ("a big smile", "a toothy smile", "a wide grin"),
    "surprised": ("an open mouth", "a surprised expression"),
    "sad": ("a sad expression", "the corners of the mouth turned down"),
}
HAIR = {
    "bald": ("a bald head", "no hair"),
    "buzz cut": ("{a} buzz cut", "closely cropped {c} hair", "very short {c} hair"),
    "short": ("short {c} hair", "{c} hair cut short"),
    "side-parted": ("side-parted {c} hair", "short {c} hair with a side parting"),
    "bob": ("{a} bob", "{c} hair cut in a bob"),
    "long straight": ("long straight {c} hair", "straight {c} hair", "long {c} hair"),
    "long wavy": ("long wavy {c} hair", "wavy {c} hair", "long {c} hair"),
    "curly": ("curly {c} hair", "{c} curls"),
    "afro": ("{a} afro", "a big {c} afro"),
    "bun": ("{c} hair in a bun", "{a} bun", "{c} hair tied up in a bun"),
    "ponytail": ("{a} ponytail", "{c} hair in a ponytail"),
    "braids": ("{c} braids", "{c} hair in two braids"),
}
GLASSES = {
    "round": ("round glasses", "glasses with round frames", "glasses"),
    "square": ("square glasses", "glasses with square frames", "glasses"),
    "sunglasses": ("sunglasses", "dark sunglasses"),
}
EARRINGS = {
    "studs": ("stud earrings", "small earrings", "earrings"),
    "hoops": ("hoop earrings", "round hoop earrings", "earrings"),
    "drops": ("drop earrings", "dangling earrings", "earrings"),
}
NECKLACES = {
    "chain": ("a chain necklace", "a thin necklace", "a necklace"),
    "pendant": ("a necklace with a pendant", "a pendant necklace", "a necklace"),
    "beads": ("a bead necklace", "a necklace of beads", "a necklace"),
}
BEARDS = {
    "stubble": ("stubble", "a stubbly chin"),
    "short beard": ("a short beard", "a trimmed beard", "a short beard and a mustache"),
    "full beard": ("a full beard", "a thick beard", "a full beard and a moustache"),
}
CLOTHES = {
    "t-shirt": ("{a} t-shirt", "{a} tee"),
    "v-neck": ("{a} v-neck top", "{a} v-neck shirt"),
    "striped shirt": ("{a} striped shirt", "a striped {c} top"),
    "shirt": ("{a} shirt with a collar", "{a} collared shirt"),
    "turtleneck": ("{a} turtleneck", "{a} turtleneck sweater"),
    "hoodie": ("{a} hoodie", "{a} hooded sweatshirt"),
    "blazer": ("{a} blazer", "{a} jacket over a white shirt"),
    "dress": ("{a} sleeveless dress", "{a} dress"),
}
BACKGROUNDS = {
    "plain": ("a plain {c} background", "a {c} wall"),
    "gradient": ("a gradient background", "a softly shaded background"),
    "bokeh": ("a background of blurred lights", "a bokeh background"),
    "striped": ("a striped background", "a background of stripes"),
    "outdoor": ("green hills under a blue sky", "a landscape with hills and clouds"),
}
OPENINGS = (
    "a drawn portrait of", "a portrait of", "an illustration of", "a drawing of", "an illustrated portrait of",
    "a picture of", "",
)  # fmt: skip
FACT_WEIGHTS = {
    "hair": 3.0, "glasses": 3.0, "hat": 3.0, "beard": 2.5, "expression": 1.5, "face shape": 0.6, "skin": 0.8,
}  # fmt: skip
"""Fact -> relative frequency, 1 by default: distinctive facts are stated more often."""


def article(noun: str) -> str:
    """Prepend "a" or "an"."""
    return f"an {noun}" if noun[0] in "aeiou" else f"a {noun}"


def listed(parts: list[str]) -> str:
    """Join as "x", "x and y" or "x, y and z"."""
    return parts[0] if len(parts) == 1 else f"{', '.join(parts[:-1])} and {parts[-1]}"


def capital(text: str) -> str:
    """Capitalize the first letter."""
    return text[:1].upper() + text[1:]


def pick(options: Sequence[str], random: np.random.Generator) -> str:
    """Choose one option."""
    return options[int(random.integers(len(options)))]


def write_captions(attributes: Mapping[str, str | bool | float], random: np.random.Generator) -> tuple[str, ...]:
    """Write `CAPTION_COUNT` different captions."""
    counts = list(FACT_COUNTS)
    random.shuffle(counts)
    captions: list[str] = []
    while len(captions) < CAPTION_COUNT:
        caption = _caption(attributes, counts[len(captions)], random)
        assert len(caption.split()) < MAXIMUM_WORDS, caption
        if caption not in captions:
            captions.append(caption)
    return tuple(captions)


def _facts(
    attributes: Mapping[str, str | bool | float], random: np.random.Generator
) -> tuple[dict[str, str], dict[str, str]]:
    """What the person has, and what the person wears: fact -> phrase."""
    value = {key: text for key, text in attributes.items() if isinstance(text, str)}

    def say(options: tuple[str, ...], color: str = "") -> str:
        return pick(options, random).replace("{a}", article(color or "a")).replace("{c}", color)

    has: dict[str, str] = {}
    hatless = value["hat"] == "none"
    if value["hair_style"] != "bald" or hatless:
        has["hair"] = say(HAIR[value["hair_style"]], value["hair_color"])
        if not hatless and value["hair_style"] in ("side-parted", "bun"):
            has["hair"] = f"{value['hair_color']} hair"
        if attributes["bangs"] and random.random() < 0.7:
            has["hair"] += say((" and bangs", " and a fringe"))
    if value["eye_color"] != "hidden":
        has["eyes"] = f"{value['eye_color']} eyes"
    has["face shape"] = article(f"{value['face_shape']} face")
    has["skin"] = f"{value['skin_tone']} skin"
    has["expression"] = say(FACES[value["expression"]])
    if value["beard"] != "none":
        has["beard"] = say(BEARDS[value["beard"]])
    elif attributes["mustache"]:
        has["beard"] = say(("a mustache", "a moustache"))
    elif value["presentation"] == "man":
        has["beard"] = say(("a clean-shaven face", "a clean-shaven chin"))
    if attributes["freckles"]:
        has["freckles"] = say(("freckles", "freckled cheeks"))
    if value["age"] == "older":
        has["wrinkles"] = say(("wrinkles", "a lined face"))

    wears = {"clothing": say(CLOTHES[value["clothing"]], value["clothing_color"])}
    if not hatless:
        wears["hat"] = article(f"{value['hat_color']} {value['hat']}")
    for fact, phrases in (("glasses", GLASSES), ("earrings", EARRINGS), ("necklace", NECKLACES)):
        if value[fact] != "none":
            wears[fact] = say(phrases[value[fact]])
    if attributes["makeup"]:
        wears["makeup"] = say(("make-up", "lipstick"))
    return has, wears


def _caption(attributes: Mapping[str, str | bool | float], count: int, random: np.random.Generator) -> str:
    presentation, expression = str(attributes["presentation"]), str(attributes["expression"])
    has, wears = _facts(attributes, random)
    pool = [*has, *wears, "age", "mood", "background", "pose"]
    weight = np.array([FACT_WEIGHTS.get(fact, 1.0) for fact in pool])
    order = random.choice(len(pool), size=min(count, len(pool)), replace=False, p=weight / weight.sum())
    chosen = [pool[position] for position in order]
    if "mood" in chosen and "expression" in chosen:
        chosen.remove("mood")

    subject = pick(NOUNS[presentation], random)
    if "age" in chosen:
        subject = f"{pick(AGES[str(attributes['age'])], random)} {subject}"
    if "mood" in chosen:
        subject = f"{pick(MOODS[expression], random)} {subject}"
    owned = [has[fact] for fact in chosen if fact in has]
    worn = [wears[fact] for fact in chosen if fact in wears]
    pose = str(attributes["pose"]) if "pose" in chosen else ""
    if pose == "frontal":
        pose = pick(("facing the viewer", "looking straight ahead", "seen from the front"), random)
    elif pose:
        pose = pose.replace("turned", pick(("turned", "turned slightly", "facing"), random))
        pose = pose.replace("facing to the", "facing")
    behind = ""
    if "background" in chosen:
        behind = pick(BACKGROUNDS[str(attributes["background"])], random)
        behind = behind.replace("{c}", str(attributes["background_color"])).replace("a orange", "an orange")

    form = random.random()
    if form < 0.12 and count >= 3:
        return ", ".join(part for part in (subject, *owned, *worn, pose, behind) if part)
    opening = pick(OPENINGS, random)
    if form < 0.38 and count >= 4:
        they, have, wear, them = PRONOUNS[presentation]
        sentences = [f"{opening} {article(subject)}{', ' + pose if pose else ''}".strip()]
        if owned:
            sentences.append(f"{they} {have} {listed(owned)}")
        if worn:
            sentences.append(f"{they} {wear} {listed(worn)}")
        if behind:
            verb = "is" if behind.startswith(("a ", "an ")) else "are"
            sentences.append(f"Behind {them} {verb} {behind}")
        return ". ".join(capital(sentence) for sentence in sentences) + "."
    text = f"{opening} {article(subject)}".strip()
    if owned:
        text += f" with {listed(owned)}"
    if worn:
        verb = pick(("wearing", "in"), random) if worn[0] == wears["clothing"] else "wearing"
        text += f"{',' if owned else ''} {verb} {listed(worn)}"
    if pose:
        text += f", {pose}"
    if behind:
        text += f"{',' if pose else ''} {pick(('in front of', 'against', 'before'), random)} {behind}"
    return text if form < 0.62 else capital(text) + "."
