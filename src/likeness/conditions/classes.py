"""The nineteen classes of a face mask, their colours, and the other colours and orders in which masks circulate.

One canonical order (CelebAMask-HQ's) is used everywhere inside the project; the rest is data for recognition only.
`l_` and `r_` are the person's own left and right, so `l_eye` lies on the viewer's right; in `u_lip` and `l_lip` the
letters mean upper and lower, as in CelebAMask-HQ.
"""

from __future__ import annotations

import numpy as np

CLASSES: tuple[str, ...] = (
    "background",
    "skin",
    "nose",
    "eye_g",
    "l_eye",
    "r_eye",
    "l_brow",
    "r_brow",
    "l_ear",
    "r_ear",
    "mouth",
    "u_lip",
    "l_lip",
    "hair",
    "hat",
    "earring",
    "necklace",
    "neck",
    "cloth",
)
"""Class names by index: the order of CelebAMask-HQ's `g_mask.py`; where parts overlap, the higher index is on top."""

CLASS_INDEX: dict[str, int] = {name: index for index, name in enumerate(CLASSES)}
"""Class name -> index."""

FLIP_PAIRS: tuple[tuple[int, int], ...] = ((4, 5), (6, 7), (8, 9))
"""(person's left, person's right) of eyes, brows and ears: what mirroring a mask exchanges."""

COUNTERPART: dict[int, int] = {a: b for pair in FLIP_PAIRS for a, b in (pair, pair[::-1])}
"""The same both ways."""

PART_ALIASES: dict[str, str] = {"ear_r": "earring", "neck_l": "necklace"}
"""Names of the official part files (`<id>_ear_r.png`) that differ from ours."""

COMMON_COLOURS: dict[int, tuple[int, int, int]] = {
    0: (0, 0, 0),
    1: (204, 0, 0),
    2: (76, 153, 0),
    3: (204, 204, 0),
    10: (102, 204, 0),
    11: (255, 255, 0),
    12: (0, 0, 153),
    13: (0, 0, 204),
    14: (255, 51, 153),
    15: (0, 204, 204),
    16: (0, 51, 0),
    17: (255, 153, 51),
    18: (0, 204, 0),
}
"""Class -> RGB, where all four palettes agree."""

SIDE_COLOURS: dict[str, tuple[tuple[int, int, int], ...]] = {
    # l_eye, r_eye, l_brow, r_brow, l_ear, r_ear: classes 4 to 9
    "CelebAMask-HQ": ((51, 51, 255), (204, 0, 204), (0, 255, 255), (255, 204, 204), (102, 51, 0), (255, 0, 0)),
    "labelcolormap": ((51, 51, 255), (204, 0, 204), (0, 255, 255), (51, 255, 255), (102, 51, 0), (255, 0, 0)),
    "MaskGAN UI": ((204, 0, 204), (51, 51, 255), (0, 255, 255), (51, 255, 255), (255, 0, 0), (102, 51, 0)),
    "Face-MoGLE": ((204, 0, 204), (51, 51, 255), (255, 204, 204), (0, 255, 255), (255, 0, 0), (102, 51, 0)),
}
"""Palette name -> RGB of the classes 4 to 9, in which the palettes differ.

Sources: CelebAMask-HQ `g_color.py`; the same repository's face parser, `utils.labelcolormap`; its MaskGAN demo; the
Face-MoGLE demo. Three of the six differences merely exchange left and right, so colours alone cannot tell them apart.
"""


def _palette(name: str) -> np.ndarray:
    colours = COMMON_COLOURS | dict(enumerate(SIDE_COLOURS[name], start=4))
    palette = np.array([colours[index] for index in range(len(CLASSES))], dtype=np.uint8)  # [19, 3]
    palette.setflags(write=False)
    return palette


PALETTES: dict[str, np.ndarray] = {name: _palette(name) for name in SIDE_COLOURS}
"""Palette name -> uint8 [19, 3]. The names are what `Reading.scheme` says."""

PALETTE: np.ndarray = PALETTES["CelebAMask-HQ"]
"""uint8 [19, 3], the colours in which masks are rendered here: those that the released weights were trained on."""

ORDERS: dict[str, tuple[str, ...]] = {
    "canonical": CLASSES,
    # The list that stands commented out in CelebAMask-HQ's g_mask.py.
    "CelebAMask-HQ list1": (
        "background", "skin", "neck", "hat", "eye_g", "hair", "earring", "necklace", "cloth", "l_eye", "r_eye",
        "l_brow", "r_brow", "nose", "l_ear", "r_ear", "mouth", "u_lip", "l_lip",
    ),
    # zllrunning/face-parsing.PyTorch and what descends from it.
    "BiSeNet": (
        "background", "skin", "l_brow", "r_brow", "l_eye", "r_eye", "eye_g", "l_ear", "r_ear", "earring", "nose",
        "mouth", "u_lip", "l_lip", "neck", "necklace", "cloth", "hair", "hat",
    ),
    # facer's celebm-448 (FaRL) and SegFace, which agree.
    "facer or SegFace": (
        "background", "neck", "skin", "cloth", "r_ear", "l_ear", "r_brow", "l_brow", "r_eye", "l_eye", "nose",
        "mouth", "l_lip", "u_lip", "hair", "eye_g", "hat", "earring", "necklace",
    ),
}  # fmt: skip
"""Order name -> class names by that order's index."""


def order_table(name: str) -> np.ndarray:
    """uint8 [19]: the canonical class of each index of the order `name`, so that `table[labels]` is canonical."""
    return np.array([CLASS_INDEX[part] for part in ORDERS[name]], dtype=np.uint8)
