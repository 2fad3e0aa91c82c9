"""Sample the traits of a synthetic face and derive its attributes.

Lengths are relative to the head, so that a face looks the same at every size. Only combinations without contradictions
are sampled (no earring on a covered ear): every attribute is visible.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

HAIR_COLORS = {
    "black": (30, 27, 32), "dark brown": (62, 42, 33), "brown": (104, 68, 44), "auburn": (126, 54, 34),
    "blond": (218, 178, 108), "grey": (150, 150, 154), "white": (226, 224, 220), "red": (190, 80, 34),
    "blue": (58, 98, 184), "pink": (228, 118, 164),
}  # fmt: skip
EYE_COLORS = {
    "brown": (98, 58, 32), "dark brown": (58, 36, 26), "hazel": (142, 104, 48), "green": (70, 132, 84),
    "blue": (66, 124, 190), "grey": (120, 136, 148),
}  # fmt: skip
SKIN_ANCHORS = (
    (253, 230, 214), (246, 212, 186), (232, 186, 148), (208, 154, 112), (170, 116, 78), (126, 82, 56), (86, 56, 42),
)  # fmt: skip
SKIN_TONES = ("pale", "fair", "light", "tan", "brown", "dark brown", "deep brown")
CLOTH_COLORS = {
    "red": (192, 52, 50), "blue": (52, 92, 168), "navy": (38, 50, 88), "green": (62, 124, 82),
    "yellow": (232, 186, 66), "orange": (226, 124, 54), "purple": (112, 74, 146), "pink": (230, 146, 166),
    "white": (238, 236, 232), "grey": (128, 132, 138), "black": (44, 44, 50), "teal": (42, 130, 134),
    "beige": (212, 190, 158),
}  # fmt: skip
BACKGROUND_COLORS = {
    "grey": (176, 180, 186), "white": (240, 240, 238), "blue": (120, 168, 214), "green": (138, 184, 146),
    "yellow": (244, 216, 130), "orange": (240, 176, 118), "pink": (240, 186, 192), "purple": (170, 148, 202),
    "teal": (106, 178, 178), "beige": (226, 210, 186), "brown": (150, 122, 100), "dark": (66, 70, 82),
}  # fmt: skip
STYLES = {
    "bald": (0.13, 0, 0.006), "buzz cut": (0.13, 0, 0.008), "short": (0.3, 0, 0.06), "side-parted": (0.26, 0, 0.04),
    "bob": (0, 0.2, 0), "long straight": (0, 0.22, 0.03), "long wavy": (0, 0.22, 0.03), "curly": (0, 0, 0.12),
    "afro": (0, 0, 0.08), "bun": (0, 0.11, 0.02), "ponytail": (0, 0.12, 0.01), "braids": (0, 0.07, 0),
}  # fmt: skip
"""Hair style -> weight for men, additional weight for women, weight for all."""
CLOTHES = {
    "t-shirt": 0.2, "v-neck": 0.12, "striped shirt": 0.1, "shirt": 0.16, "turtleneck": 0.1, "hoodie": 0.12,
    "blazer": 0.12, "dress": 0.14,
}  # fmt: skip
TIED = ("bun", "ponytail", "braids")
LONG = ("bob", "long straight", "long wavy")
OPEN_NECK = ("t-shirt", "v-neck", "striped shirt", "dress", "shirt")


@dataclass(frozen=True, kw_only=True)
class Traits:
    """One face. Colors are RGB in 0..1, angles in radians, lengths in half face widths unless stated otherwise."""

    presentation: str
    age: str
    face_shape: str
    skin_tone: str
    skin: tuple[float, float, float]
    hair_color: str
    hair: tuple[float, float, float]
    hair_style: str
    hair_length: float
    """End of loose hair, below the eyes."""
    hair_volume: float
    part: float
    """Position of the parting, -1 to 1."""
    bangs: bool
    tucked: bool
    """Whether loose hair is behind the ears."""
    eye_color: str
    eye: tuple[float, float, float]
    eye_size: float
    eye_slant: float
    brow_width: float
    brow_arch: float
    nose_width: float
    nose_length: float
    lip_fullness: float
    mouth_width: float
    jaw_width: float
    glasses: str
    glasses_color: tuple[float, float, float]
    hat: str
    hat_color: str
    earrings: str
    necklace: str
    jewel: tuple[float, float, float]
    expression: str
    beard: str
    mustache: bool
    freckles: bool
    makeup: bool
    lip: tuple[float, float, float]
    shadow_color: tuple[float, float, float]
    """Eye shadow, used with make-up."""
    clothing: str
    clothing_color: str
    background: str
    background_color: str
    background_second: tuple[float, float, float]
    yaw: float
    """-1 (to the viewer's left) to 1 (to the viewer's right)."""
    roll: float
    scale: float
    """Half face width as a fraction of the image."""
    shift: tuple[float, float]
    """Displacement of the head as a fraction of the image."""
    light_side: float
    """-1 (light from the viewer's left) or 1 (from the right)."""


def sample_traits(random: np.random.Generator) -> Traits:
    """Sample a consistent face."""

    def pick(options: dict[str, float]) -> str:
        weight = np.array(list(options.values()))
        return str(random.choice(list(options), p=weight / weight.sum()))

    def chance(probability: float) -> bool:
        return bool(random.random() < probability)

    def between(low: float, high: float) -> float:
        return float(random.uniform(low, high))

    def tinted(color: tuple[int, int, int], amount: float = 0.035) -> tuple[float, float, float]:
        shade = np.array(color) / 255 * (1 + random.normal(0, amount) + random.normal(0, amount / 2, 3))
        red, green, blue = np.clip(shade, 0.02, 0.99).tolist()
        return red, green, blue

    presentation = pick({"woman": 0.46, "man": 0.44, "person": 0.10})
    feminine = {"woman": 1.0, "man": 0.0, "person": 0.5}[presentation]
    age = pick({"young": 0.5, "middle-aged": 0.3, "older": 0.2})

    tone = between(0, 1) ** 1.1 * (len(SKIN_ANCHORS) - 1)
    lower = min(int(tone), len(SKIN_ANCHORS) - 2)
    anchors = np.array(SKIN_ANCHORS, dtype=np.float64)
    skin = anchors[lower] + (tone - lower) * (anchors[lower + 1] - anchors[lower])
    red, green, blue = (np.clip(skin + random.normal(0, 3, 3), 0, 255) / 255).tolist()

    natural = {"black": 0.2, "dark brown": 0.2, "brown": 0.17, "auburn": 0.08, "blond": 0.17, "red": 0.08}
    aged = {"young": 0.01, "middle-aged": 0.12, "older": 2.2}[age]
    dyed = 0.06 if age == "older" else 0.04
    hair_color = pick({**natural, "grey": aged * 0.6, "white": aged * 0.4 + 0.01, "blue": dyed, "pink": dyed})

    weights = {style: man * (1 - feminine) + woman * feminine + base for style, (man, woman, base) in STYLES.items()}
    hair_style = pick(weights)
    bangs = hair_style in (*LONG, *TIED, "short") and chance(0.3 if hair_style != "short" else 0.4)
    tucked = hair_style in LONG and chance(0.45)
    hat = pick({"none": 0.82, "beanie": 0.08, "cap": 0.06, "wide-brimmed hat": 0.06})
    if hat != "none" and hair_style in ("afro", "bun"):
        hair_style = "curly" if hair_style == "afro" else "ponytail"
    bangs = bangs and hat == "none"
    part = between(-0.45, 0.45)
    if hair_style == "side-parted":
        part = float(np.copysign(max(abs(part), 0.25), part))
    ears_shown = hair_style not in LONG or tucked

    wears_makeup = chance(0.5 * feminine)
    smooth_chin = feminine == 1.0 or (feminine == 0.5 and chance(0.7))
    beard = "none" if smooth_chin else pick({"none": 0.52, "stubble": 0.16, "short beard": 0.16, "full beard": 0.16})
    mustache = not smooth_chin and (beard in ("short beard", "full beard") or (beard == "none" and chance(0.2)))
    expression = pick({"neutral": 0.28, "smile": 0.27, "big smile": 0.23, "surprised": 0.11, "sad": 0.11})
    clothing = pick(CLOTHES | {"dress": CLOTHES["dress"] * feminine})
    warm_lip = np.array([red, green, blue]) * np.array([0.86, 0.62, 0.62]) + np.array([0.08, 0.0, 0.02])
    lip_red, lip_green, lip_blue = np.clip(warm_lip, 0, 1).tolist()
    paints = ((188, 38, 56), (206, 66, 96), (150, 36, 66), (214, 92, 84), (176, 70, 110))
    lip = tinted(paints[int(random.integers(len(paints)))]) if wears_makeup else (lip_red, lip_green, lip_blue)
    shadows = ((124, 84, 140), (164, 100, 80), (84, 110, 150), (180, 104, 130), (96, 84, 80))
    jewels = ((238, 196, 92), (222, 226, 232), (214, 70, 90), (72, 164, 150), (246, 240, 226))
    frames = ((36, 34, 40), (104, 62, 38), (190, 150, 70), (150, 40, 48), (50, 70, 120), (170, 174, 182))
    backdrop, second = (str(name) for name in random.choice(list(BACKGROUND_COLORS), 2, replace=False))
    return Traits(
        presentation=presentation,
        age=age,
        face_shape=pick({"oval": 0.32, "round": 0.2, "square": 0.18, "long": 0.15, "heart-shaped": 0.15}),
        skin_tone=SKIN_TONES[int(min(round(tone), len(SKIN_TONES) - 1))],
        skin=(red, green, blue),
        hair_color=hair_color,
        hair=tinted(HAIR_COLORS[hair_color], 0.06),
        hair_style=hair_style,
        hair_length=between(0.95, 1.4) if hair_style == "bob" else between(1.9, 2.6),
        hair_volume=between(0.08, 0.22),
        part=part,
        bangs=bangs,
        tucked=tucked,
        eye_color=(eye_color := pick({"brown": 3, "dark brown": 2, "hazel": 1.2, "green": 1.3, "blue": 2, "grey": 1})),
        eye=tinted(EYE_COLORS[eye_color], 0.05),
        eye_size=between(0.92, 1.18) + 0.05 * feminine,
        eye_slant=between(-0.025, 0.045),
        brow_width=between(0.07, 0.10) + 0.025 * (1 - feminine),
        brow_arch=between(0.03, 0.13),
        nose_width=between(0.85, 1.25),
        nose_length=between(0.54, 0.66),
        lip_fullness=between(0.75, 1.25) + 0.15 * feminine,
        mouth_width=between(0.30, 0.38),
        jaw_width=between(0.96, 1.05) - 0.03 * feminine,
        glasses=pick({"none": 0.74, "round": 0.1, "square": 0.09, "sunglasses": 0.06}),
        glasses_color=tinted(frames[int(random.integers(len(frames)))]),
        hat=hat,
        hat_color=str(random.choice(list(CLOTH_COLORS))),
        earrings=pick({"studs": 1, "hoops": 1, "drops": 1}) if ears_shown and chance(0.08 + 0.5 * feminine) else "none",
        necklace=pick({"chain": 1, "pendant": 1.2, "beads": 1})
        if clothing in OPEN_NECK and chance(0.08 + 0.5 * feminine)
        else "none",
        jewel=tinted(jewels[int(random.integers(len(jewels)))]),
        expression=expression,
        beard=beard,
        mustache=mustache,
        freckles=tone < 3.4 and chance(0.2),
        makeup=wears_makeup,
        lip=lip,
        shadow_color=tinted(shadows[int(random.integers(len(shadows)))]),
        clothing=clothing,
        clothing_color=str(random.choice(list(CLOTH_COLORS))),
        background=pick({"plain": 0.25, "gradient": 0.25, "bokeh": 0.2, "striped": 0.15, "outdoor": 0.15}),
        background_color=backdrop,
        background_second=tinted(BACKGROUND_COLORS[second]),
        yaw=float(np.clip(random.normal(0, 0.45), -1, 1)),
        roll=float(np.clip(random.normal(0, 0.05), -0.13, 0.13)),
        scale=between(0.222, 0.25),
        shift=(between(-0.02, 0.02), between(-0.015, 0.015)),
        light_side=-1.0 if chance(0.5) else 1.0,
    )


ATTRIBUTES = (
    "presentation", "age", "face_shape", "skin_tone", "hair_color", "hair_style", "bangs", "eye_color", "glasses",
    "hat", "hat_color", "earrings", "necklace", "expression", "beard", "mustache", "freckles", "makeup", "clothing",
    "clothing_color", "background", "background_color",
)  # fmt: skip
"""Traits that are attributes, in the order of the metadata."""


def describe(traits: Traits) -> dict[str, str | bool | float]:
    """Return the attributes of a face: words, flags and two angles in degrees."""
    attributes = {name: getattr(traits, name) for name in ATTRIBUTES}
    if traits.hair_style == "bald":
        attributes["hair_color"] = "none"
    if traits.glasses == "sunglasses":
        attributes["eye_color"] = "hidden"
    if traits.hat == "none":
        attributes["hat_color"] = "none"
    if traits.background == "outdoor":
        attributes["background_color"] = "natural"
    pose = "frontal" if abs(traits.yaw) < 0.35 else ("turned to the left" if traits.yaw < 0 else "turned to the right")
    angles = {"yaw_degrees": round(traits.yaw * 22, 1), "roll_degrees": round(float(np.degrees(traits.roll)), 1)}
    return attributes | {"pose": pose} | angles
