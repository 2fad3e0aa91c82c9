"""Several edits of a mask as one line of text: "grow hair 8; remove glasses; paste hat from other.png".

| command | example |
|---|---|
| `grow CLASSES BY`, `shrink CLASSES BY` | `grow hair 8 over brows`: 8 % of the shorter side; `shrink skin 3px` |
| `remove CLASSES`, `fill CLASSES` | `remove eye_g earring` |
| `mirror CLASSES` | `mirror l_brow` |
| `paste CLASSES from FILE` | `paste hat from "other face.png"`; the faces are aligned |
| `rename CLASS to CLASS`, `swap CLASS CLASS` | `rename hat to hair` |
"""

from __future__ import annotations

import shlex
from collections.abc import Callable, Mapping, Sequence

import numpy as np

from likeness.conditions.mask import edits
from likeness.types import InputError, suggestion

Words = Mapping[str, Sequence[str]]
"""The words of a command: "" -> those after its name, `over`, `from` or `to` -> those after this word."""

KEYWORDS = ("over", "from", "to")


def apply_commands(labels: np.ndarray, text: str, read: Callable[[str], np.ndarray]) -> np.ndarray:
    """Apply commands to a mask, in order.

    Args:
        labels: uint8 [H, W].
        text: commands, separated by semicolons.
        read: returns the labels of the mask file that `paste` names.

    Raises:
        InputError: a command is unknown or cannot be applied.
    """
    for command in filter(str.strip, text.split(";")):
        try:
            name, *rest = shlex.split(command)
        except ValueError as error:
            raise InputError(f"{command.strip()!r} has an open quote: close it") from error
        if name not in COMMANDS:
            raise InputError(f"Unknown edit {name!r}. {suggestion(name, COMMANDS)}")
        words: dict[str, list[str]] = {"": []}
        key = ""
        for word in rest:
            if word in KEYWORDS:
                key = word
            words.setdefault(key, []).extend([] if word in KEYWORDS else [word.rstrip(",")])
        form, edit = COMMANDS[name]
        needed = {word for word in form.split() if word in KEYWORDS}
        if set(words) - {"", "over"} != needed or len(words[""]) < len(form.split(" ", 1)[0].split("+")):
            raise InputError(f"{command.strip()!r} is incomplete: write {name} {form.replace('+', ' ')}")
        labels = edit(labels, words, read)
    return labels


def _radius(labels: np.ndarray, words: Words) -> float:
    return edits.radius_of(words[""][-1], labels.shape)


COMMANDS: dict[str, tuple[str, Callable[[np.ndarray, Words, Callable[[str], np.ndarray]], np.ndarray]]] = {
    "grow": ("CLASSES+BY", lambda m, w, _: edits.grow(m, w[""][:-1], _radius(m, w), w.get("over", ()))),
    "shrink": ("CLASSES+BY", lambda m, w, _: edits.shrink(m, w[""][:-1], _radius(m, w))),
    "remove": ("CLASSES", lambda m, w, _: edits.remove(m, w[""])),
    "fill": ("CLASSES", lambda m, w, _: edits.fill_holes(m, w[""])),
    "mirror": ("CLASSES", lambda m, w, _: edits.mirror(m, w[""])),
    "paste": (
        "CLASSES from FILE",
        lambda m, w, read: edits.paste(m, read(" ".join(w["from"])), w[""], w.get("over", ()), align=True),
    ),
    "rename": ("CLASS to CLASS", lambda m, w, _: edits.rename(m, w[""][0], " ".join(w["to"]))),
    "swap": ("CLASS+CLASS", lambda m, w, _: edits.swap(m, w[""][0], w[""][1])),
}
"""Name -> form of its arguments, and function."""
