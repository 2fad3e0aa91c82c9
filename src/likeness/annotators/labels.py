"""The names under which other face parsers know our 19 classes.

A checkpoint's label order is never trusted, only its names: orders differ silently, names rarely do. A name that is not
in the table is refused rather than guessed.
"""

from __future__ import annotations

from collections.abc import Sequence

from likeness.conditions.mask.classes import CLASS_INDEX, CLASSES, COUNTERPART
from likeness.types import InputError

NAMES: dict[str, tuple[str, ...]] = {
    # Ours and CelebAMask-HQ's; facer's short ones; LaPa's, iBUG's and Face Synthetics' long ones.
    "background": ("background", "bg"),
    "skin": ("skin", "face", "facial_skin", "face_skin", "beard"),
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
    "hat": ("hat", "headwear"),
    "earring": ("earring", "earrings", "ear_r", "earr"),
    "necklace": ("necklace", "neck_l"),
    "neck": ("neck",),
    "cloth": ("cloth", "clothes", "clothing"),
}
"""Class -> its names elsewhere, in lower case with underscores."""

NEEDED = ("background", "skin", "nose", "l_eye", "r_eye", "u_lip", "l_lip", "hair")
"""Classes without which a network is no face parser."""

CLASS_OF: dict[str, int] = {name: CLASS_INDEX[own] for own, names in NAMES.items() for name in names}
"""Name elsewhere -> our class."""


def classes_of(labels: Sequence[str], where: str, *, exchanged: bool = False) -> tuple[int, ...]:
    """Our class of each label of a network, by its name.

    Args:
        labels: names by the network's own order.
        where: how messages call the network.
        exchanged: its left is the viewer's left, that is the person's right.

    Raises:
        InputError: a name is unknown, or a class that makes a face is missing.
    """
    known = [name.strip().lower().replace("-", "_").replace(" ", "_") for name in labels]
    unknown = [label for label, name in zip(labels, known, strict=True) if name not in CLASS_OF]
    if unknown:
        shown = ", ".join(unknown[:8]) + (", ..." if len(unknown) > 8 else "")
        raise InputError(
            f"{len(unknown)} of the {len(labels)} labels of {where} have names that are no parts of a face: {shown}; "
            "write their meaning into id2label of its config.json, in names such as skin, l_eye, u_lip, hair"
        )
    classes = [CLASS_OF[name] for name in known]
    if missing := [name for name in NEEDED if CLASS_INDEX[name] not in classes]:
        raise InputError(f"{where} has no label for {', '.join(missing)}: it is no face parser")
    if exchanged:
        classes = [COUNTERPART.get(index, index) for index in classes]
    assert all(index < len(CLASSES) for index in classes)
    return tuple(classes)
