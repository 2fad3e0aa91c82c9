"""Sentences about a drawn face, made from its attributes by a small grammar.

Every caption names another random part of what is true, in other words and another order, so that a model learns the
words and not ten fixed templates. The grammar sees the attributes only: it cannot say what is not recorded.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

CAPTION_COUNT = 10
MAXIMUM_WORDS = 60
FACT_COUNTS = (1, 1, 2, 2, 3, 3, 4, 5, 6, 8)
"""How many facts each of the ten captions tells, before they are shuffled."""

NOUNS = {"woman": ("woman", "woman", "lady"), "man": ("man", "man", "gentleman"), "person": ("person",)}
PRONOUNS = {"woman": ("She", "has", "wears"), "man": ("He", "has", "wears"), "person": ("They", "have", "wear")}
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
    "a drawn portrait of",
    "a portrait of",
    "an illustration of",
    "a drawing of",
    "an illustrated portrait of",
    "a picture of",
    "",
)


def article(words: str) -> str:
    """The words with "a" or "an" before them."""
    return f"an {words}" if words[0] in "aeiou" else f"a {words}"


def listed(parts: list[str]) -> str:
    """ "x", "x and y" or "x, y and z"."""
    return parts[0] if len(parts) == 1 else f"{', '.join(parts[:-1])} and {parts[-1]}"


def write_captions(attributes: Mapping[str, str | bool | float], random: np.random.Generator) -> tuple[str, ...]:
    """Ten different true captions of under sixty words each."""
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
    """What the person has and what they wear: fact -> one wording of it."""
    words = {key: value for key, value in attributes.items() if isinstance(value, str)}

    def say(options: tuple[str, ...], color: str = "") -> str:
        chosen = options[int(random.integers(len(options)))]
        return chosen.replace("{a}", article(color or "a")).replace("{c}", color)

    has: dict[str, str] = {}
    hatless = words["hat"] == "none"
    if words["hair_style"] != "bald" or hatless:
        has["hair"] = say(HAIR[words["hair_style"]], words["hair_color"])
        if not hatless and words["hair_style"] in ("side-parted", "bun"):
            has["hair"] = f"{words['hair_color']} hair"
        if attributes["bangs"] and random.random() < 0.7:
            has["hair"] += say((" and bangs", " and a fringe"))
    if words["eye_color"] != "hidden":
        has["eyes"] = f"{words['eye_color']} eyes"
    has["face shape"] = article(f"{words['face_shape']} face")
    has["skin"] = f"{words['skin_tone']} skin"
    has["expression"] = say(FACES[words["expression"]])
    if words["beard"] != "none":
        has["beard"] = say(BEARDS[words["beard"]])
    elif attributes["mustache"]:
        has["beard"] = say(("a mustache", "a moustache"))
    elif words["presentation"] == "man":
        has["beard"] = say(("a clean-shaven face", "a clean-shaven chin"))
    if attributes["freckles"]:
        has["freckles"] = say(("freckles", "freckled cheeks"))
    if words["age"] == "older":
        has["wrinkles"] = say(("wrinkles", "a lined face"))

    wears = {"clothing": say(CLOTHES[words["clothing"]], words["clothing_color"])}
    if not hatless:
        wears["hat"] = article(f"{words['hat_color']} {words['hat']}")
    if words["glasses"] != "none":
        wears["glasses"] = say(GLASSES[words["glasses"]])
    if words["earrings"] != "none":
        wears["earrings"] = say(EARRINGS[words["earrings"]])
    if words["necklace"] != "none":
        wears["necklace"] = say(NECKLACES[words["necklace"]])
    if attributes["makeup"]:
        wears["makeup"] = say(("make-up", "lipstick"))
    return has, wears


def _caption(attributes: Mapping[str, str | bool | float], count: int, random: np.random.Generator) -> str:
    presentation, expression = str(attributes["presentation"]), str(attributes["expression"])
    has, wears = _facts(attributes, random)
    setting = {"background": BACKGROUNDS[str(attributes["background"])], "pose": ()}
    # What tells one face from another is named more often than what every face has.
    telling = {"hair": 3.0, "glasses": 3.0, "hat": 3.0, "beard": 2.5, "expression": 1.5, "face shape": 0.6, "skin": 0.8}
    pool = [*has, *wears, "age", "mood", *setting]
    weight = np.array([telling.get(fact, 1.0) for fact in pool])
    order = random.choice(len(pool), size=min(count, len(pool)), replace=False, p=weight / weight.sum())
    chosen = [pool[position] for position in order]
    if "mood" in chosen and "expression" in chosen:
        chosen.remove("mood")

    def one(options: tuple[str, ...]) -> str:
        return options[int(random.integers(len(options)))]

    noun = one(NOUNS[presentation])
    adjectives = [one(AGES[str(attributes["age"])])] if "age" in chosen else []
    if "mood" in chosen:
        adjectives.insert(0, one(MOODS[expression]))
    subject = " ".join([*adjectives, noun])
    owned = [has[fact] for fact in chosen if fact in has]
    worn = [wears[fact] for fact in chosen if fact in wears]
    pose = str(attributes["pose"]) if "pose" in chosen else ""
    if pose == "frontal":
        pose = one(("facing the viewer", "looking straight ahead", "seen from the front"))
    elif pose:
        pose = pose.replace("turned", one(("turned", "turned slightly", "facing")))
        pose = pose.replace("facing to the", "facing")
    behind = ""
    if "background" in chosen:
        behind = one(setting["background"]).replace("{c}", str(attributes["background_color"]))
        behind = behind.replace("a orange", "an orange")

    form = random.random()
    if form < 0.12 and count >= 3:
        return ", ".join([subject, *owned, *worn, *([pose] if pose else []), *([behind] if behind else [])])
    opening = one(OPENINGS)
    if form < 0.38 and count >= 4:
        they, have, wear = PRONOUNS[presentation]
        sentences = [f"{opening} {article(subject)}{', ' + pose if pose else ''}".strip()]
        if owned:
            sentences.append(f"{they} {have} {listed(owned)}")
        if worn:
            sentences.append(f"{they} {wear} {listed(worn)}")
        if behind:
            sentences.append(
                f"Behind {'them' if they == 'They' else 'her' if they == 'She' else 'him'} {_is(behind)} {behind}"
            )
        return ". ".join(sentence[0].upper() + sentence[1:] for sentence in sentences) + "."
    text = f"{opening} {article(subject)}".strip()
    if owned:
        text += f" with {listed(owned)}"
    if worn:
        verb = one(("wearing", "in")) if worn[0] == wears["clothing"] else "wearing"
        text += f"{',' if owned else ''} {verb} {listed(worn)}"
    if pose:
        text += f", {pose}"
    if behind:
        text += f"{',' if pose else ''} {one(('in front of', 'against', 'before'))} {behind}"
    return text if form < 0.62 else text[0].upper() + text[1:] + "."


def _is(thing: str) -> str:
    return "is" if thing.startswith(("a ", "an ")) else "are"
