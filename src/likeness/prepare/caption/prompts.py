"""Ten prompts for the vision-language model and one for the model that checks its captions.

Each prompt asks for another aspect of the face, so ten captions of one image differ in wording. Everything is one user
message, since some chat templates have no system role. The image comes first, for servers with a prefix cache.

Changing a text changes the keys of the cached answers.
"""

from __future__ import annotations

MANNER = (
    "Write about the person in this photograph for somebody who will draw the face without having seen it. "
    "Say only what can be seen. Name nobody and guess nobody's identity, profession or story. "
    "Do not judge beauty. Do not speak of the image, the photograph or yourself. "
    "Leave out what is absent, hidden or uncertain. Plain English, no headings, no lists, no markup, at most 50 words."
)
"""Instructions of every prompt."""

PROMPTS: dict[str, str] = {
    "natural": "Describe the face in two or three plain sentences: who it is (man, woman or child), hair, features, "
    "expression, and whatever is worn.",
    "brief": "Describe the face in one sentence of at most twenty words, with what strikes the eye first.",
    "cues": "Give the visible cues as short phrases in lower case, separated by commas, in this order: kind of person, "
    "apparent age, hair, eyebrows, eyes, nose, mouth, skin, facial hair, expression, accessories.",
    "hair": "Describe the hair in one or two sentences that begin with the person: color, length, texture, parting or "
    "fringe, where it falls, and beard or moustache where there is one.",
    "face": "Describe the shape of the face in one or two sentences that begin with the person: outline, forehead, "
    "eyebrows, eyes, nose, cheeks, lips, chin, skin.",
    "expression": "Describe the expression in one or two sentences that begin with the person: mouth open or closed, "
    "teeth, smile or none, brows, direction of the gaze, turn and tilt of the head.",
    "accessories": "Describe in one or two sentences that begin with the person what is worn: glasses, hat, earrings, "
    "necklace, make-up, clothes at the neck. Mention only what is there.",
    "age": "Say in one sentence what kind of person this is and about how old, with the visible signs of it: skin, "
    "lines, hair, fullness of the face.",
    "light": "Describe in one or two sentences that begin with the person how the portrait is lit and framed: where "
    "the light comes from and how soft it is, background and its color, how close the face is.",
    "portrait": "Write the one line a photographer would use to stage this portrait again: the person, hair, look, "
    "what is worn, light and background, as phrases in lower case separated by commas.",
}
"""Name, as in the records -> request."""

REFINEMENT = """Below are a caption of a face and facts that were measured on the same picture. Check the caption:
- Take out every claim that the facts contradict. Where the facts name the right thing, you may put it instead.
- Take out names, guesses about identity, profession or story, and anything that no picture of a face could show.
- Leave claims on which the facts are silent as they are.
- Add nothing else, and keep the wording of the rest.
Answer with the caption only. If nothing of it remains, answer NONE.

Facts:
{facts}

Caption: {caption}"""
"""Prompt of the refiner."""

NOTHING = "NONE"
"""Answer of the refiner if nothing of a caption is supported."""


def describe(name: str) -> str:
    """Return the message to the vision-language model."""
    return f"{MANNER}\n\n{PROMPTS[name]}"


def refine(facts: str, caption: str) -> str:
    """Return the message to the refiner."""
    return REFINEMENT.format(facts=facts, caption=caption)
