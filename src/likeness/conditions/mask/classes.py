"""The 19 classes of a face mask, and the palettes and class orders in which masks are published.

The project uses one canonical order, that of CelebAMask-HQ. The other orders and palettes serve recognition only. `l_`
and `r_` are the person's left and right, so `l_eye` is on the viewer's right. In `u_lip` and `l_lip` the letters mean
upper and lower, as in CelebAMask-HQ.
"""

from __future__ import annotations

import numpy as np

CLASSES: tuple[str, ...] = (
    "background", "skin", "nose", "eye_g", "l_eye", "r_eye", "l_brow", "r_brow", "l_ear", "r_ear", "mouth", "u_lip",
    "l_lip", "hair", "hat", "earring", "necklace", "neck", "cloth",
)  # fmt: skip
"""Class names by index, in the order of CelebAMask-HQ's `g_mask.py`: higher indices are painted over lower ones."""

CLASS_INDEX: dict[str, int] = {name: index for index, name in enumerate(CLASSES)}
"""Class name -> index."""

FLIP_PAIRS: tuple[tuple[int, int], ...] = ((4, 5), (6, 7), (8, 9))
"""(person's left, person's right) of eyes, brows and ears: the classes that a horizontal flip swaps."""

COUNTERPART: dict[int, int] = {a: b for pair in FLIP_PAIRS for a, b in (pair, pair[::-1])}
"""Class of `FLIP_PAIRS` -> the other class of its pair."""

TITLES: dict[str, str] = {
    "eye_g": "glasses", "l_eye": "left eye", "r_eye": "right eye", "l_brow": "left eyebrow", "r_brow": "right eyebrow",
    "l_ear": "left ear", "r_ear": "right ear", "u_lip": "upper lip", "l_lip": "lower lip", "cloth": "clothes",
}  # fmt: skip
"""Class -> its name in words; the names of the others are words already."""

COMMON_COLORS: dict[int, tuple[int, int, int]] = {
    0: (0, 0, 0), 1: (204, 0, 0), 2: (76, 153, 0), 3: (204, 204, 0), 10: (102, 204, 0), 11: (255, 255, 0),
    12: (0, 0, 153), 13: (0, 0, 204), 14: (255, 51, 153), 15: (0, 204, 204), 16: (0, 51, 0), 17: (255, 153, 51),
    18: (0, 204, 0),
}  # fmt: skip
"""Class -> RGB, for the classes on which all four palettes agree."""

SIDE_COLORS: dict[str, tuple[tuple[int, int, int], ...]] = {
    # l_eye, r_eye, l_brow, r_brow, l_ear, r_ear: classes 4 to 9
    "CelebAMask-HQ": ((51, 51, 255), (204, 0, 204), (0, 255, 255), (255, 204, 204), (102, 51, 0), (255, 0, 0)),
    "labelcolormap": ((51, 51, 255), (204, 0, 204), (0, 255, 255), (51, 255, 255), (102, 51, 0), (255, 0, 0)),
    "MaskGAN UI": ((204, 0, 204), (51, 51, 255), (0, 255, 255), (51, 255, 255), (255, 0, 0), (102, 51, 0)),
    "Face-MoGLE": ((204, 0, 204), (51, 51, 255), (255, 204, 204), (0, 255, 255), (255, 0, 0), (102, 51, 0)),
}
"""Palette name -> RGB of classes 4 to 9, in which the palettes differ.

Sources: CelebAMask-HQ `g_color.py`; `utils.labelcolormap` of the face parser in that repository; its MaskGAN demo; the
Face-MoGLE demo. Three of the six differences only swap left and right, so colors alone do not identify the palette.
"""


def _palette(name: str) -> np.ndarray:
    colors = COMMON_COLORS | dict(enumerate(SIDE_COLORS[name], start=4))
    palette = np.array([colors[index] for index in range(len(CLASSES))], dtype=np.uint8)  # [19, 3]
    palette.setflags(write=False)
    return palette


PALETTES: dict[str, np.ndarray] = {name: _palette(name) for name in SIDE_COLORS}
"""Palette name, as in `Reading.scheme` -> uint8 [19, 3]."""

PALETTE: np.ndarray = PALETTES["CelebAMask-HQ"]
"""uint8 [19, 3], the colors in which masks are rendered, those that the released weights were trained on."""

ORDERS: dict[str, tuple[str, ...]] = {
    "canonical": CLASSES,
    # The commented-out list in CelebAMask-HQ's g_mask.py.
    "CelebAMask-HQ list1": (
        "background", "skin", "neck", "hat", "eye_g", "hair", "earring", "necklace", "cloth", "l_eye", "r_eye",
        "l_brow", "r_brow", "nose", "l_ear", "r_ear", "mouth", "u_lip", "l_lip",
    ),
    # zllrunning/face-parsing.PyTorch and its derivatives.
    "BiSeNet": (
        "background", "skin", "l_brow", "r_brow", "l_eye", "r_eye", "eye_g", "l_ear", "r_ear", "earring", "nose",
        "mouth", "u_lip", "l_lip", "neck", "necklace", "cloth", "hair", "hat",
    ),
    # facer's celebm-448 (FaRL) and SegFace.
    "facer or SegFace": (
        "background", "neck", "skin", "cloth", "r_ear", "l_ear", "r_brow", "l_brow", "r_eye", "l_eye", "nose",
        "mouth", "l_lip", "u_lip", "hair", "eye_g", "hat", "earring", "necklace",
    ),
}  # fmt: skip
"""Order name -> class names by index in that order."""


NAMES: dict[str, tuple[str, ...]] = {
    "background": ("background", "bg"),
    "skin": ("skin", "face", "facial_skin", "face_skin"),
    "nose": ("nose",),
    "eye_g": ("eye_g", "eyeg", "glasses", "eyeglass", "eyeglasses", "eye_glasses"),
    "l_eye": ("l_eye", "le", "left_eye"),
    "r_eye": ("r_eye", "re", "right_eye"),
    "l_brow": ("l_brow", "lb", "left_brow", "left_eyebrow"),
    "r_brow": ("r_brow", "rb", "right_brow", "right_eyebrow"),
    "l_ear": ("l_ear", "lr", "left_ear"),
    "r_ear": ("r_ear", "rr", "right_ear"),
    "mouth": ("mouth", "imouth", "inner_mouth", "mouth_interior", "teeth"),
    "u_lip": ("u_lip", "ulip", "upper_lip", "top_lip"),
    "l_lip": ("l_lip", "llip", "lower_lip", "bottom_lip"),
    "hair": ("hair",),
    "hat": ("hat", "cap", "headwear"),
    "earring": ("earring", "earrings", "ear_r", "earr"),
    "necklace": ("necklace", "neck_l"),
    "neck": ("neck",),
    "cloth": ("cloth", "clothes", "clothing"),
}
"""Class -> its names in lower case with underscores: here and in CelebAMask-HQ, in facer (short), in LaPa, iBUG and
Face Synthetics (long)."""

GROUPS: dict[str, tuple[str, ...]] = {
    "eyes": ("l_eye", "r_eye"),
    "brows": ("l_brow", "r_brow"),
    "eyebrows": ("l_brow", "r_brow"),
    "ears": ("l_ear", "r_ear"),
    "lips": ("u_lip", "l_lip"),
}
"""Names of several classes."""

ALIASES: dict[str, tuple[str, ...]] = {name: (own,) for own, names in NAMES.items() for name in names} | GROUPS
"""Every name in lower case with underscores -> its classes."""


def plain_name(name: str) -> str:
    """Return a name in lower case with underscores."""
    return name.strip().lower().replace("-", "_").replace(" ", "_")


def order_table(name: str) -> np.ndarray:
    """Return the lookup table of an order, uint8 [19]: `table[labels]` is canonical."""
    return np.array([CLASS_INDEX[part] for part in ORDERS[name]], dtype=np.uint8)
