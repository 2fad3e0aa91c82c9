"""Several edits of a mask as one line of text: "grow hair 8; remove glasses; paste hat from other.png".

| command | example |
|---|---|
| `grow CLASSES BY`, `shrink CLASSES BY` | `grow hair 8 over brows`: 8 % of the shorter side; `shrink skin 3px` |
| `remove CLASSES`, `fill CLASSES`, `clean CLASSES` | `remove eye_g earring`, `remove hair,hat` |
| `mirror CLASSES` | `mirror l_brow` |
| `paste CLASSES from FILE` | `paste hat from "other face.png"`; the faces are aligned |
| `rename CLASS to CLASS`, `swap CLASS CLASS` | `rename hat to hair` |
"""

from __future__ import annotations

import shlex
from collections.abc import Callable, Mapping, Sequence
from inspect import signature
from typing import Any

import numpy as np

from likeness.conditions.mask import edits
from likeness.types import InputError, suggestion

Words = Mapping[str, Sequence[str]]
"""The words of a command: "" -> those after its name, `over`, `from` or `to` -> those after this word."""

Fields = Callable[[Words, Callable[[str], np.ndarray]], dict[str, Any]]

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
        if name not in FORMS:
            raise InputError(f"Unknown edit {name!r}. {suggestion(name, FORMS)}")
        words: dict[str, list[str]] = {"": []}
        key = ""
        for word in rest:
            if word in KEYWORDS:
                key = word
            parts = word.split(",") if key in ("", "over") else [word.rstrip(",")]
            words.setdefault(key, []).extend([] if word in KEYWORDS else filter(None, parts))
        form, fields = FORMS[name]
        needed = {word for word in form.split() if word in KEYWORDS}
        optional = {"over"} & set(signature(OPERATIONS[name]).parameters)
        more = len(words[""]) - len(form.split(" ", 1)[0].split("+"))
        whole = set(words) - {"", *optional} == needed and all(words.values()) and more >= 0
        if not whole or (more and "CLASSES" not in form):
            raise InputError(f"{command.strip()!r} cannot be read: write {name} {form.replace('+', ' ')}")
        over = {"over": words["over"]} if "over" in words else {}
        labels = OPERATIONS[name](labels, **fields(words, read), **over)
    return labels


def pair(classes: Sequence[str]) -> list[str]:
    """Return the names of two classes. Raises `InputError` for another number."""
    if len(names := edits.class_names(classes)) != 2:
        raise InputError(f"swap requires two classes, not {len(names)}")
    return names


OPERATIONS: dict[str, Callable[..., np.ndarray]] = {
    "grow": lambda mask, classes, by, over=(): edits.grow(mask, classes, edits.radius_of(by, mask.shape), over),
    "shrink": lambda mask, classes, by: edits.shrink(mask, classes, edits.radius_of(by, mask.shape)),
    "remove": edits.remove,
    "mirror": edits.mirror,
    "paste": edits.paste,
    "fill": edits.fill_holes,
    "clean": edits.clean,
    "rename": lambda mask, old, to: edits.rename(mask, old, to),
    "swap": lambda mask, classes: edits.swap(mask, *pair(classes)),
    "interpolate": lambda mask, other, at=0.5: edits.interpolate(mask, other, at),
}
"""Name -> operation of `likeness mask`, of commands and of the service: labels and named options to labels."""

CLASSES: Fields = lambda words, read: {"classes": words[""]}  # noqa: E731
AMOUNT: Fields = lambda words, read: {"classes": words[""][:-1], "by": words[""][-1]}  # noqa: E731

FORMS: dict[str, tuple[str, Fields]] = {
    "grow": ("CLASSES+BY", AMOUNT),
    "shrink": ("CLASSES+BY", AMOUNT),
    "remove": ("CLASSES", CLASSES),
    "fill": ("CLASSES", CLASSES),
    "clean": ("CLASSES", CLASSES),
    "mirror": ("CLASSES", CLASSES),
    "paste": (
        "CLASSES from FILE",
        lambda words, read: {"classes": words[""], "other": read(" ".join(words["from"])), "align": True},
    ),
    "rename": ("CLASS to CLASS", lambda words, read: {"old": words[""][0], "to": " ".join(words["to"])}),
    "swap": ("CLASS+CLASS", CLASSES),
}
"""Command -> form of its arguments, and function from its words to the options of the operation."""
