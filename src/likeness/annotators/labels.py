"""Label names of other face parsers for the 19 classes.

Labels are matched by name, never by position: orders differ without notice, names rarely do. Unknown names are
rejected.
"""

from __future__ import annotations

from collections.abc import Sequence

from likeness.conditions.mask.classes import CLASS_INDEX, CLASSES, COUNTERPART
from likeness.types import InputError

NAMES: dict[str, tuple[str, ...]] = {
    # This project, CelebAMask-HQ; facer (short); LaPa, iBUG, Face Synthetics (long).
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
"""Class -> names in other parsers, in lower case with underscores."""

NEEDED = ("background", "skin", "nose", "l_eye", "r_eye", "u_lip", "l_lip", "hair")
"""Classes that every face parser needs."""

CLASS_OF: dict[str, int] = {name: CLASS_INDEX[own] for own, names in NAMES.items() for name in names}
"""Name in other parsers -> class."""


def classes_of(labels: Sequence[str], where: str, *, swapped: bool = False) -> tuple[int, ...]:
    """Return the class of each label of a network.

    Args:
        labels: Names in the order of the network.
        where: Name of the network for error messages.
        swapped: Its left is the viewer's left, the person's right.

    Raises:
        InputError: A name is unknown, or a class of `NEEDED` is missing.
    """
    known = [name.strip().lower().replace("-", "_").replace(" ", "_") for name in labels]
    unknown = [label for label, name in zip(labels, known, strict=True) if name not in CLASS_OF]
    if unknown:
        shown = ", ".join(unknown[:8]) + (", ..." if len(unknown) > 8 else "")
        raise InputError(
            f"{len(unknown)} of the {len(labels)} labels of {where} are not parts of a face: {shown}. "
            "Name them in id2label of its config.json, for example skin, l_eye, u_lip, hair"
        )
    classes = [CLASS_OF[name] for name in known]
    if missing := [name for name in NEEDED if CLASS_INDEX[name] not in classes]:
        raise InputError(f"{where} has no label for {', '.join(missing)}: it is not a face parser")
    if swapped:
        classes = [COUNTERPART.get(index, index) for index in classes]
    assert all(index < len(CLASSES) for index in classes)
    return tuple(classes)
