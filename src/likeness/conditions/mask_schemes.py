"""Recognising the form of a mask: class numbers, class colours or one-hot planes, in which order and which palette.

Colours say the class except for left and right, where published palettes contradict one another: there the picture's
geometry decides. Bare numbers may be in another class order: there geometry must be certain, and a mask that fits no
known order is refused rather than guessed.
"""

from __future__ import annotations

import numpy as np

from likeness.conditions.base import Reading
from likeness.conditions.classes import CLASSES, FLIP_PAIRS, ORDERS, PALETTE, PALETTES, order_table
from likeness.conditions.layout import broken_rules, exchanged_pairs, measure, rank_orders
from likeness.conditions.mask_repair import TOLERANCE, UNKNOWN, looks_blended, nearest_colours, unblend
from likeness.types import InputError, Note

UNION = np.unique(np.concatenate(list(PALETTES.values())), axis=0)
"""uint8 [20, 3]: every colour of the four palettes."""

SKIN, NOSE = (int(np.flatnonzero((PALETTE[index] == UNION).all(axis=1))[0]) for index in (1, 2))
"""Rows of `UNION`."""


def _class_of_rows(palette: np.ndarray) -> np.ndarray:
    equal = (UNION[:, None] == palette[None]).all(axis=2)  # [20, 19]
    return np.where(equal.any(axis=1), equal.argmax(axis=1), UNKNOWN).astype(np.int16)


TABLES: dict[str, np.ndarray] = {name: _class_of_rows(palette) for name, palette in PALETTES.items()}
"""Palette name -> int16 [20]: the class of each row of `UNION`, `UNKNOWN` where the palette lacks that colour."""

HOW = "save it as an index PNG (0 to 18, CelebAMask-HQ order) or in the CelebAMask-HQ colours"


def pair_name(pair: tuple[int, int]) -> str:
    """ "eye", "brow" or "ear"."""
    return CLASSES[pair[0]].removeprefix("l_")


def side_notes(labels: np.ndarray) -> tuple[Note, ...]:
    """A note for each pair whose sides look exchanged."""
    layout, notes = measure(labels), []
    for a, b in exchanged_pairs(layout):
        place = f"left of {CLASSES[b]}" if layout.pixels[a] and layout.pixels[b] else "on the viewer's left"
        if not layout.pixels[a]:
            place = "on the viewer's right"
        lies = f"{CLASSES[a if layout.pixels[a] else b]} lies {place} in the picture"
        text = f"{lies}, but l_ is the person's left (the viewer's right): the sides look exchanged"
        notes.append(Note("swapped-sides", text))
    return tuple(notes)


def exchange(labels: np.ndarray, pairs: tuple[tuple[int, int], ...]) -> np.ndarray:
    """`labels` with both classes of each pair exchanged."""
    table = np.arange(256, dtype=np.uint8)
    for a, b in pairs:
        table[a], table[b] = b, a
    return table[labels]


def finish(labels: np.ndarray, scheme: str, notes: tuple[Note, ...], where: str) -> Reading:
    """The reading of canonical labels. Raises `InputError` when they show nothing but background."""
    if not labels.any():
        raise InputError(f"the mask has no face: every pixel of {where} is background (read as {scheme})", kind="blank")
    return Reading(raw=np.ascontiguousarray(labels, dtype=np.uint8), scheme=scheme, notes=notes)


def read_numbers(
    values: np.ndarray, scheme: str, where: str, order: str | None = None, *, coloured: bool = False
) -> Reading:
    """Class numbers [H, W], integers of any type, in one of `ORDERS`.

    The order is `order` where that is given. Otherwise geometry decides: the canonical order stands when it breaks no
    rule of `layout`; another is taken when it breaks at most one and every other order at least four more. `coloured`
    says that a colour table vouches for the canonical order, which then needs no further proof.

    Raises:
        InputError: a value beyond 18, blended numbers, or no order fits for certain.
    """
    low, high = int(values.min()), int(values.max())
    if low < 0 or high >= len(CLASSES):
        raise InputError(
            f"{where} has grey values from {low} to {high}, but a mask has class numbers from 0 to 18: {HOW}",
            kind="off-palette",
        )
    labels = values.astype(np.uint8)
    if not labels.any():
        return finish(labels, scheme, (), where)
    if not coloured and looks_blended(labels):
        raise InputError(
            f"the class numbers of {where} were blended by a smooth resize: resize with nearest instead",
            kind="blended-labels",
        )
    if order is not None:
        if order not in ORDERS:
            raise InputError(f"{order!r} is no known class order: choose from {', '.join(ORDERS)}")
        labels = order_table(order)[labels]
        return finish(labels, f"{scheme}, {order} order as told", side_notes(labels), where)
    ranked = rank_orders(measure(labels))
    present = np.unique(labels)
    best = min(ranked, key=lambda name: (len(ranked[name]), name != "canonical"))
    rivals = [
        len(broken)
        for name, broken in ranked.items()
        if not np.array_equal(order_table(name)[present], order_table(best)[present])
    ]
    broken, margin = len(ranked[best]), min(rivals, default=99) - len(ranked[best])
    if best == "canonical" and (broken == 0 or (broken <= 4 and margin >= 2)):
        unproven = Note("class-order-unproven", "too few parts to prove the class order: taken in the canonical order")
        notes = () if margin or coloured else (unproven,)
        return finish(labels, f"{scheme}, canonical order", notes + side_notes(labels), where)
    if best != "canonical" and broken <= 1 and margin >= 4:
        labels = order_table(best)[labels]
        note = Note("class-order", f"the class numbers are in the {best} order and were brought into the canonical one")
        return finish(labels, f"{scheme}, {best} order", (note, *side_notes(labels)), where)
    if coloured:
        return finish(labels, f"{scheme}, canonical order", side_notes(labels), where)
    odd = "; ".join(ranked["canonical"][:2]) or "several orders fit"
    raise InputError(
        f"the class numbers of {where} fit no known class order for certain ({odd}): {HOW}", kind="off-palette"
    )


def read_palette(indices: np.ndarray, colours: np.ndarray, where: str, order: str | None = None) -> Reading | None:
    """A picture with a colour table: uint8 [H, W] and uint8 [256, 3].

    The table decides where it is a known palette, in any arrangement; another table with indices below 19 is taken to
    be decoration. None when neither holds: the colours may still be a damaged mask.
    """
    used = np.unique(indices)
    if order is None and used[-1] < len(CLASSES):
        for name, palette in PALETTES.items():
            if len(used) > 1 and np.array_equal(colours[used], palette[used]):
                return read_numbers(indices, f"palette PNG, {name} colours", where, coloured=True)
    known = {tuple(colour) for colour in UNION.tolist()}
    if order is None and len(used) > 1 and all(tuple(colour) in known for colour in colours[used].tolist()):
        return read_colours(colours[indices], "palette PNG", where)
    if used[-1] < len(CLASSES):
        return read_numbers(indices, "palette PNG, class by index", where, order)
    return None


def _choose_palette(rows: np.ndarray) -> tuple[str, np.ndarray, tuple[Note, ...]]:
    """The palette of `rows` (int [H, W] of `UNION`), the labels with l_ on the person's left, what was exchanged."""
    layout = measure(rows, len(UNION))
    present = layout.pixels > 0
    middle = next((layout.centre[row, 0] for row in (NOSE, SKIN) if present[row]), rows.shape[1] / 2)
    scores = {}
    for name, table in TABLES.items():
        agree = 0.0
        for weight, pair in zip((3.0, 2.0, 1.0), FLIP_PAIRS, strict=True):
            a, b = (int(np.flatnonzero(table == side)[0]) for side in pair)
            if present[a] and present[b]:
                agree += weight * np.sign(layout.centre[a, 0] - layout.centre[b, 0])
            elif present[a] or present[b]:  # one side alone: on which side of the nose?
                side = layout.centre[a, 0] - middle if present[a] else middle - layout.centre[b, 0]
                agree += 0.2 * weight * np.sign(side)
        scores[name] = (int(layout.pixels[table != UNKNOWN].sum()), float(agree))
    name = max(scores, key=lambda key: scores[key])
    labels = TABLES[name][rows]
    if (labels == UNKNOWN).any():
        labels = unblend(labels, PALETTE)
    labels = labels.astype(np.uint8)
    wrong = exchanged_pairs(measure(labels))
    notes = tuple(
        Note(
            "swapped-sides",
            f"the {name} colours put l_{pair_name(pair)} on the person's right: "
            f"l_ and r_{pair_name(pair)} were exchanged",
        )
        for pair in wrong
    )
    return name, exchange(labels, wrong), notes


def read_colours(rgb: np.ndarray, kind: str, where: str) -> Reading:
    """Class colours, uint8 [H, W, 3], of one of `PALETTES`, in RGB or BGR order, also slightly blended.

    Raises:
        InputError: the colours are no palette's.
    """
    found = []
    coloured = rgb.max(axis=2) > 40
    both = nearest_colours(rgb, UNION, UNION[:, ::-1])
    for channels, (rows, distance) in zip(("RGB", "BGR"), both, strict=True):
        # Black alone proves nothing: a photograph in the dark is black too.
        share = float((distance[coloured] <= TOLERANCE).mean()) if coloured.any() else 1.0
        exact = float((distance == 0).mean())
        found.append((exact == 1.0, share, channels, rows, distance))
    found = [entry for entry in found if entry[0]] or [entry for entry in found if entry[1] >= 0.6]
    readings = []
    for exact, _, channels, rows, distance in found:
        notes: tuple[Note, ...] = ()
        if not exact:
            near = np.where(distance <= TOLERANCE, rows, UNKNOWN)
            colours = UNION if channels == "RGB" else UNION[:, ::-1]
            try:
                rows = unblend(near, colours, rgb)
            except ValueError:
                continue
            changed = float(((near == UNKNOWN) | (near != rows)).mean())
            text = (
                f"{100 * changed:.1f} % of the pixels have blended colours (a smooth resize or JPEG) and took the "
                "class of a clean neighbour"
            )
            notes = (Note("blended-labels", text),)
        name, labels, sides = _choose_palette(rows)
        if channels == "BGR":
            notes = (Note("colour-order", "the channels are in the order BGR and were read as such"), *notes)
        scheme = f"{kind}, {name} colours" + (", BGR" if channels == "BGR" else "")
        readings.append((broken_rules(measure(labels)), labels, scheme, notes + sides, exact))
    readings.sort(key=lambda reading: len(reading[0]))  # stable: RGB first where both fit as well
    if not readings or (not readings[0][4] and len(readings[0][0]) > 5):
        count = len(np.unique(rgb.reshape(-1, 3), axis=0))
        if count > 512:
            raise InputError(
                f"{where} looks like a photograph, no mask ({count} colours): draw a mask or extract one",
                kind="off-palette",
            )
        raise InputError(f"the {count} colours of {where} belong to no known mask palette: {HOW}", kind="off-palette")
    _, labels, scheme, notes, _ = readings[0]
    return finish(labels, scheme, notes, where)


def read_one_hot(planes: np.ndarray, where: str, order: str | None = None) -> Reading:
    """One plane a class, [19, H, W] or [H, W, 19], with exactly one 1 a pixel.

    Raises:
        InputError: values other than 0 and 1 (or 255), or pixels with no class or several.
    """
    axis = 0 if planes.shape[0] == len(CLASSES) else 2
    high = planes.max()
    if high not in (1, 255) or not np.isin(np.unique(planes), (0, high)).all():
        raise InputError(
            f"the {len(CLASSES)} planes of {where} hold scores, not 0 and 1: take the argmax first", kind="off-palette"
        )
    total = (planes == high).sum(axis=axis)
    if (total != 1).any():
        share = 100 * float((total != 1).mean())
        raise InputError(
            f"{share:.1f} % of the pixels of {where} have no class or several: one-hot needs exactly one",
            kind="off-palette",
        )
    form = "[19, H, W]" if axis == 0 else "[H, W, 19]"
    return read_numbers(planes.argmax(axis=axis), f"one-hot {form}", where, order)
