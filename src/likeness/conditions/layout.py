"""Where the parts of a face lie: the geometry by which a mask's class order and its sides are recognised.

A table of plain rules (brows above eyes, nose wrapped in skin ...) instead of a trained classifier: every verdict can
be explained, and a mask that breaks no rule in one order but many in the others is certain. Rules about classes that
a mask lacks say nothing. All measures are per class, so trying another order is a permutation, not another pass.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from likeness.conditions.classes import CLASS_INDEX, CLASSES, FLIP_PAIRS, ORDERS, order_table

COUNT = len(CLASSES)

ABOVE: tuple[tuple[str, str], ...] = (
    ("l_brow", "l_eye"),
    ("r_brow", "r_eye"),
    ("l_brow", "nose"),
    ("r_brow", "nose"),
    ("l_brow", "u_lip"),
    ("r_brow", "u_lip"),
    ("l_eye", "nose"),
    ("r_eye", "nose"),
    ("l_eye", "u_lip"),
    ("r_eye", "u_lip"),
    ("nose", "u_lip"),
    ("nose", "l_lip"),
    ("nose", "mouth"),
    ("u_lip", "l_lip"),
    ("u_lip", "mouth"),
    ("mouth", "l_lip"),
    ("skin", "neck"),
    ("skin", "cloth"),
    ("nose", "neck"),
    ("l_lip", "neck"),
    ("hair", "cloth"),
    ("hat", "nose"),
    ("hat", "skin"),
    ("eye_g", "u_lip"),
    ("nose", "necklace"),
    ("skin", "necklace"),
    ("l_eye", "earring"),
    ("r_eye", "earring"),
)
"""(upper, lower): the first's centre lies above the second's."""

SMALLER: tuple[tuple[str, str, float], ...] = (
    ("l_eye", "skin", 0.15),
    ("r_eye", "skin", 0.15),
    ("l_brow", "skin", 0.2),
    ("r_brow", "skin", 0.2),
    ("nose", "skin", 0.5),
    ("mouth", "skin", 0.3),
    ("u_lip", "skin", 0.2),
    ("l_lip", "skin", 0.2),
    ("l_ear", "skin", 0.5),
    ("r_ear", "skin", 0.5),
    ("earring", "skin", 0.4),
    ("l_eye", "nose", 1.0),
    ("r_eye", "nose", 1.0),
    ("u_lip", "nose", 1.5),
    ("l_lip", "nose", 1.5),
)
"""(small, large, share): the first has fewer pixels than share times the second."""

HEIGHTS: dict[str, tuple[float, float]] = {
    "nose": (0.15, 0.75),
    "eye_g": (-0.6, 0.7),
    "l_eye": (0.0, 0.65),
    "r_eye": (0.0, 0.65),
    "l_brow": (-0.1, 0.6),
    "r_brow": (-0.1, 0.6),
    "l_ear": (0.1, 0.85),
    "r_ear": (0.1, 0.85),
    "mouth": (0.45, 0.95),
    "u_lip": (0.4, 0.95),
    "l_lip": (0.45, 1.0),
    "hair": (-1.0, 1.0),
    "hat": (-2.0, 0.65),
    "earring": (0.25, 1.3),
    "necklace": (0.65, 2.0),
    "neck": (0.55, 2.0),
    "cloth": (0.6, 3.0),
}
"""Part -> where its centre lies, as a share of the height of the box around the skin (0 its top, 1 its bottom).

The extremes over 800 CelebAMask-HQ masks, widened by about a tenth for masks drawn by hand."""

INSIDE: tuple[str, ...] = ("nose", "l_eye", "r_eye", "l_brow", "r_brow", "mouth", "u_lip", "l_lip")
"""Parts whose centre lies between the left and the right end of the skin."""

LEVEL: tuple[tuple[str, str], ...] = (("l_eye", "r_eye"), ("l_brow", "r_brow"), ("l_ear", "r_ear"))
"""Pairs that lie beside one another: further apart across than along."""

TOUCHES: tuple[tuple[str, tuple[str, ...]], ...] = (
    ("nose", ("skin", "eye_g")),
    ("l_eye", ("skin", "eye_g", "hair", "nose", "l_brow")),
    ("r_eye", ("skin", "eye_g", "hair", "nose", "r_brow")),
    ("l_brow", ("skin", "hair", "eye_g", "hat", "l_eye")),
    ("r_brow", ("skin", "hair", "eye_g", "hat", "r_eye")),
    ("mouth", ("u_lip", "l_lip", "skin")),
    ("u_lip", ("skin", "mouth", "l_lip", "nose")),
    ("l_lip", ("skin", "mouth", "u_lip")),
    ("eye_g", ("skin", "l_eye", "r_eye", "hair", "nose", "l_brow", "r_brow", "l_ear", "r_ear")),
    ("neck", ("skin", "cloth", "hair", "background", "necklace", "earring", "l_ear", "r_ear")),
    ("l_ear", ("skin", "hair", "background", "earring", "neck", "hat", "eye_g")),
    ("r_ear", ("skin", "hair", "background", "earring", "neck", "hat", "eye_g")),
)
"""(part, neighbours): at least 0.6 of the part's outline borders on these."""


@dataclass(frozen=True)
class Layout:
    """Per-class measures of a label map, 19 rows unless `measure` was told otherwise."""

    pixels: np.ndarray
    """int [19], number of pixels."""
    centre: np.ndarray
    """float [19, 2], (x, y) of the mean pixel, in pixels; NaN where the class is absent."""
    box: np.ndarray
    """float [19, 4], (left, top, right, bottom), inclusive; NaN where the class is absent."""
    contact: np.ndarray
    """int [19, 19], number of neighbouring pixel pairs of two classes; symmetric, zero on the diagonal."""

    def permuted(self, table: np.ndarray) -> Layout:
        """The layout of `table[labels]`, for a one-to-one `table`."""
        back = np.argsort(table)
        return Layout(self.pixels[back], self.centre[back], self.box[back], self.contact[back][:, back])


def measure(labels: np.ndarray, count: int = COUNT) -> Layout:
    """The layout of `labels`, uint8 [H, W] with values below `count`."""
    height, width = labels.shape
    wide = labels.astype(np.int32)
    by_row = np.bincount((wide * height + np.arange(height)[:, None]).ravel(), minlength=count * height)
    by_row = by_row.reshape(count, height)
    by_column = np.bincount((wide * width + np.arange(width)).ravel(), minlength=count * width).reshape(count, width)
    pixels = by_row.sum(1)  # [count]
    box = np.full((count, 4), np.nan)
    centre = np.full((count, 2), np.nan)
    for index in np.flatnonzero(pixels):
        columns, rows = np.flatnonzero(by_column[index]), np.flatnonzero(by_row[index])
        box[index] = columns[0], rows[0], columns[-1], rows[-1]
        centre[index] = by_column[index] @ np.arange(width), by_row[index] @ np.arange(height)
        centre[index] /= pixels[index]
    pairs = np.concatenate([(wide[:, 1:] * count + wide[:, :-1]).ravel(), (wide[1:] * count + wide[:-1]).ravel()])
    contact = np.bincount(pairs, minlength=count * count).reshape(count, count)
    contact = contact + contact.T
    np.fill_diagonal(contact, 0)
    return Layout(pixels, centre, box, contact)


def broken_rules(layout: Layout) -> tuple[str, ...]:
    """What in `layout` contradicts a face seen from the front or half profile, a few words each; empty when nothing."""
    at = CLASS_INDEX
    pixels, centre, box = layout.pixels, layout.centre, layout.box
    broken: list[str] = []

    def here(*names: str) -> bool:
        return all(pixels[at[name]] for name in names)

    if not here("skin"):
        broken.append("no skin")
    broken += [f"{a} not above {b}" for a, b in ABOVE if here(a, b) and centre[at[a], 1] >= centre[at[b], 1]]
    broken += [f"{a} too large beside {b}" for a, b, s in SMALLER if here(a, b) and pixels[at[a]] > s * pixels[at[b]]]
    left, top, right, bottom = box[at["skin"]]
    if here("skin"):
        share = (centre[:, 1] - top) / max(bottom - top, 1)
        broken += [f"{n} too high or low" for n, (a, b) in HEIGHTS.items() if here(n) and not a <= share[at[n]] <= b]
        broken += [f"{n} outside the skin" for n in INSIDE if here(n) and not left <= centre[at[n], 0] <= right]
        across = np.abs((centre[:, 0] - left) / max(right - left, 1) - 0.5)
        broken += [f"{n} in the middle of the face" for n in ("l_ear", "r_ear") if here(n) and across[at[n]] < 0.2]
    for a, b in LEVEL:
        if here(a, b) and np.diff(np.abs(centre[at[a]] - centre[at[b]]))[0] > 0:
            broken.append(f"{a} not beside {b}")
    if here("hair", "nose") and box[at["hair"], 1] > centre[at["nose"], 1]:
        broken.append("hair begins below the nose")
    for name, neighbours in TOUCHES:
        if here(name):
            outline = layout.contact[at[name]]
            if outline[[at[other] for other in neighbours]].sum() < 0.6 * outline.sum():
                broken.append(f"{name} borders on other parts than it should")
    return tuple(broken)


def rank_orders(layout: Layout) -> dict[str, tuple[str, ...]]:
    """Order name -> the rules that the labels break when their indices are taken in that order; fewest first."""
    verdicts = {name: broken_rules(layout.permuted(order_table(name))) for name in ORDERS}
    return dict(sorted(verdicts.items(), key=lambda item: len(item[1])))


def exchanged_pairs(layout: Layout) -> tuple[tuple[int, int], ...]:
    """The pairs of `FLIP_PAIRS` that lie on the wrong sides: the person's left belongs on the viewer's right.

    Where only one of a pair is there, it must lie on its own side of the nose, which holds from the front and in
    profile; within 0.15 of the face's width of the nose nothing is concluded.
    """
    exchanged = []
    nose, width = layout.centre[CLASS_INDEX["nose"], 0], np.ptp(layout.box[CLASS_INDEX["skin"], [0, 2]])
    for a, b in FLIP_PAIRS:
        left, right = layout.centre[a, 0], layout.centre[b, 0]
        if layout.pixels[a] and layout.pixels[b]:
            wrong = left < right
        else:  # NaN, where the part, the nose or the skin is absent, compares as False
            wrong = nose - left > 0.15 * width or right - nose > 0.15 * width
        if wrong:
            exchanged.append((a, b))
    return tuple(exchanged)
