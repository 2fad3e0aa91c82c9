"""Label names of other face parsers for the 19 classes.

Labels are matched by name, never by position: orders differ without notice, names rarely do. Unknown names are
rejected.
"""

from __future__ import annotations

from collections.abc import Sequence

from likeness.conditions.mask.classes import CLASS_INDEX, CLASSES, COUNTERPART, NAMES, plain_name
from likeness.types import InputError

NEEDED = ("background", "skin", "nose", "l_eye", "r_eye", "u_lip", "l_lip", "hair")
"""Classes that every face parser needs."""

PARSER_NAMES = NAMES | {"skin": (*NAMES["skin"], "beard")}
"""Class -> names in face parsers; some label a beard, which is skin here."""

CLASS_OF: dict[str, int] = {name: CLASS_INDEX[own] for own, names in PARSER_NAMES.items() for name in names}
"""Name in other parsers -> class."""


def classes_of(labels: Sequence[str], where: str, *, swapped: bool = False) -> tuple[int, ...]:
    """Return the class of each label of a network, by name. `swapped`: its left is the viewer's left, the person's
    right. Raises `InputError` if a name is unknown, or a class of `NEEDED` is missing; `where` is the name of the
    network.
    """
    known = [plain_name(name) for name in labels]
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
