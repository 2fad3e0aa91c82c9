"""Face geometry of a label map: rules by which class orders and swapped sides are recognized.

A table of rules (brows above eyes, nose surrounded by skin) instead of a trained classifier: each verdict can be
explained. Rules about absent classes do not apply. All measurements are per class, so that another class order is a
permutation of them.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
from scipy import ndimage

from likeness.conditions.mask.classes import CLASS_INDEX, CLASSES, FLIP_PAIRS, ORDERS, order_table

ABOVE: dict[str, str] = {
    "l_brow": "l_eye nose u_lip",
    "r_brow": "r_eye nose u_lip",
    "l_eye": "nose u_lip earring",
    "r_eye": "nose u_lip earring",
    "nose": "u_lip l_lip mouth neck necklace",
    "u_lip": "l_lip mouth",
    "mouth": "l_lip",
    "skin": "neck cloth necklace",
    "l_lip": "neck",
    "hair": "cloth",
    "hat": "nose skin",
    "eye_g": "u_lip",
}
"""Class -> classes whose center is below its own."""

SMALLER: dict[tuple[str, str], float] = {
    ("l_eye", "skin"): 0.15, ("r_eye", "skin"): 0.15, ("l_brow", "skin"): 0.2, ("r_brow", "skin"): 0.2,
    ("nose", "skin"): 0.5, ("mouth", "skin"): 0.3, ("u_lip", "skin"): 0.2, ("l_lip", "skin"): 0.2,
    ("l_ear", "skin"): 0.5, ("r_ear", "skin"): 0.5, ("earring", "skin"): 0.4, ("l_eye", "nose"): 1.0,
    ("r_eye", "nose"): 1.0, ("u_lip", "nose"): 1.5, ("l_lip", "nose"): 1.5,
}  # fmt: skip
"""(small, large) -> largest ratio of their pixel counts."""

HEIGHTS: dict[str, tuple[float, float]] = {
    "nose": (0.15, 0.75), "eye_g": (-0.6, 0.7), "l_eye": (0.0, 0.65), "r_eye": (0.0, 0.65), "l_brow": (-0.1, 0.6),
    "r_brow": (-0.1, 0.6), "l_ear": (0.1, 0.85), "r_ear": (0.1, 0.85), "mouth": (0.45, 0.95), "u_lip": (0.4, 0.95),
    "l_lip": (0.45, 1.0), "hair": (-1.0, 1.0), "hat": (-2.0, 0.65), "earring": (0.25, 1.3), "necklace": (0.65, 2.0),
    "neck": (0.55, 2.0), "cloth": (0.6, 3.0),
}  # fmt: skip
"""Class -> range of its center's height, relative to the bounding box of the skin (0 top, 1 bottom).

The extremes of 800 CelebAMask-HQ masks, widened by about 0.1 for hand-drawn masks."""

INSIDE: tuple[str, ...] = ("nose", "l_eye", "r_eye", "l_brow", "r_brow", "mouth", "u_lip", "l_lip")
"""Classes whose center is between the left and right end of the skin."""

TOUCHES: dict[str, str] = {
    "nose": "skin eye_g",
    "l_eye": "skin eye_g hair nose l_brow",
    "r_eye": "skin eye_g hair nose r_brow",
    "l_brow": "skin hair eye_g hat l_eye",
    "r_brow": "skin hair eye_g hat r_eye",
    "mouth": "u_lip l_lip skin",
    "u_lip": "skin mouth l_lip nose",
    "l_lip": "skin mouth u_lip",
    "eye_g": "skin l_eye r_eye hair nose l_brow r_brow l_ear r_ear",
    "neck": "skin cloth hair background necklace earring l_ear r_ear",
    "l_ear": "skin hair background earring neck hat eye_g",
    "r_ear": "skin hair background earring neck hat eye_g",
}
"""Class -> its neighbors, which make up at least 0.6 of its outline."""

SPECK = 2e-4
"""Fraction of the pixels below which a separate region of a class is a speck."""


def shows_face(labels: np.ndarray) -> bool:
    """Return whether labels contain skin and a class inside it."""
    return all(np.isin(labels, [CLASS_INDEX[name] for name in names]).any() for names in (("skin",), INSIDE))


class Geometry(NamedTuple):
    """Measurements per class; C is 19 unless `measure` was called with another count."""

    pixels: np.ndarray
    """int [C], number of pixels."""
    center: np.ndarray
    """float [C, 2], (x, y) of the mean pixel; NaN if the class is absent."""
    box: np.ndarray
    """float [C, 4], (left, top, right, bottom) in pixels, inclusive; NaN if the class is absent."""
    contact: np.ndarray
    """int [C, C], number of neighboring pixel pairs of two classes; symmetric with a zero diagonal."""

    def permuted(self, table: np.ndarray) -> Geometry:
        """Return the geometry of `table[labels]` for a one-to-one `table`."""
        back = np.argsort(table)
        return Geometry(self.pixels[back], self.center[back], self.box[back], self.contact[back][:, back])


def measure(labels: np.ndarray, count: int = len(CLASSES)) -> Geometry:
    """Measure labels, uint8 [H, W], with values below `count`."""
    (by_row, beside), (by_column, below) = _runs(labels, count), _runs(np.ascontiguousarray(labels.T), count)
    pixels = by_row.sum(1)  # [C]
    box, center = np.full((count, 4), np.nan), np.full((count, 2), np.nan)
    for index in np.flatnonzero(pixels):
        columns, rows = np.flatnonzero(by_column[index]), np.flatnonzero(by_row[index])
        box[index] = columns[0], rows[0], columns[-1], rows[-1]
        center[index] = by_column[index] @ np.arange(labels.shape[1]), by_row[index] @ np.arange(labels.shape[0])
        center[index] /= pixels[index]
    contact = beside + below
    contact = contact + contact.T
    return Geometry(pixels, center, box, contact)


def _runs(labels: np.ndarray, count: int) -> tuple[np.ndarray, np.ndarray]:
    """Return the pixels per class and row, int [C, H], and the neighboring pairs of two classes in a row, int [C, C].

    Runs of one class are counted, of which a mask has far fewer than pixels.
    """
    height, width = labels.shape
    first = np.ones(labels.shape, dtype=bool)
    first[:, 1:] = labels[:, 1:] != labels[:, :-1]
    starts = np.flatnonzero(first)
    values, rows = labels.ravel()[starts].astype(np.intp), starts // width
    by_row = np.zeros((count, height), dtype=np.intp)
    np.add.at(by_row, (values, rows), np.diff(starts, append=labels.size))
    same = np.diff(rows) == 0
    pairs = np.zeros((count, count), dtype=np.intp)
    np.add.at(pairs, (values[1:][same], values[:-1][same]), 1)
    return by_row, pairs


def broken_rules(geometry: Geometry) -> tuple[str, ...]:
    """Return what contradicts a face seen from the front or in half profile, a few words per broken rule."""
    return tuple(_broken_rules(geometry))


def _broken_rules(geometry: Geometry) -> Iterator[str]:
    at = CLASS_INDEX
    pixels, center, box, contact = geometry

    def present(*names: str) -> bool:
        return all(pixels[at[name]] for name in names)

    if not present("skin"):
        yield "no skin"
    for upper, lowers in ABOVE.items():
        for lower in lowers.split():
            if present(upper, lower) and center[at[upper], 1] >= center[at[lower], 1]:
                yield f"{upper} not above {lower}"
    for (small, large), ratio in SMALLER.items():
        if present(small, large) and pixels[at[small]] > ratio * pixels[at[large]]:
            yield f"{small} too large compared with {large}"
    if present("skin"):
        left, top, right, bottom = box[at["skin"]]
        height = (center[:, 1] - top) / max(bottom - top, 1)
        across = np.abs((center[:, 0] - left) / max(right - left, 1) - 0.5)
        for name, (low, high) in HEIGHTS.items():
            if present(name) and not low <= height[at[name]] <= high:
                yield f"{name} too high or low"
        for name in INSIDE:
            if present(name) and not left <= center[at[name], 0] <= right:
                yield f"{name} outside the skin"
        for name in ("l_ear", "r_ear"):
            if present(name) and across[at[name]] < 0.2:
                yield f"{name} in the middle of the face"
    for a, b in FLIP_PAIRS:
        dx, dy = np.abs(center[a] - center[b])
        if dy > dx:  # NaN if one is absent
            yield f"{CLASSES[a]} not level with {CLASSES[b]}"
    if present("hair", "nose") and box[at["hair"], 1] > center[at["nose"], 1]:
        yield "hair starts below the nose"
    for name, neighbors in TOUCHES.items():
        outline = contact[at[name]]
        if present(name) and outline[[at[other] for other in neighbors.split()]].sum() < 0.6 * outline.sum():
            yield f"{name} has unexpected neighbors"


def rank_orders(geometry: Geometry) -> dict[str, tuple[str, ...]]:
    """Return order name -> rules that the labels break when read in that order, fewest first."""
    broken = {name: broken_rules(geometry.permuted(order_table(name))) for name in ORDERS}
    return dict(sorted(broken.items(), key=lambda item: len(item[1])))


def swapped_pairs(geometry: Geometry) -> tuple[tuple[int, int], ...]:
    """Return the pairs of `FLIP_PAIRS` on the wrong sides: the person's left belongs on the viewer's right.

    If only one class of a pair is present, it must be on its own side of the nose, which holds from the front and in
    profile. Within 0.15 of the face's width from the nose it counts as correct.
    """
    swapped = []
    nose, width = geometry.center[CLASS_INDEX["nose"], 0], np.ptp(geometry.box[CLASS_INDEX["skin"], [0, 2]])
    for a, b in FLIP_PAIRS:
        left, right = geometry.center[a, 0], geometry.center[b, 0]
        if geometry.pixels[a] and geometry.pixels[b]:
            wrong = left < right
        else:  # NaN, if the part, the nose or the skin is absent, compares as False
            wrong = nose - left > 0.15 * width or right - nose > 0.15 * width
        if wrong:
            swapped.append((a, b))
    return tuple(swapped)


def specks(labels: np.ndarray, index: int, box: np.ndarray) -> tuple[np.ndarray, int]:
    """Find the specks of a class, given its bounding box: bool [h, w] within the box, and their number."""
    x, y, right, bottom = box.astype(int)
    regions, count = ndimage.label(labels[y : bottom + 1, x : right + 1] == index, structure=np.ones((3, 3)))
    small = np.bincount(regions.ravel()) < SPECK * labels.size
    small[0] = False  # what is not of the class
    if count < 2:
        small[:] = False
    return small[regions], int(small.sum())
