"""Mask algebra: grow, shrink, remove, mirror, paste, fill, rename and exchange classes, and interpolate two masks.

Every function takes and gives labels, uint8 [H, W], and never blends or invents a class. One table, `BENEATH`, says
what each class lies on; all edits follow it: what is taken away shows what lies beneath, what is added covers only
what it lies on. That keeps brows, eyes and lips whole while hair or skin moves; `over` names what may be covered as
well. A part that was hidden stays hidden: taking sunglasses off leaves skin, not eyes.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from pathlib import Path

import numpy as np
from scipy import ndimage

from likeness.conditions.classes import CLASS_INDEX, CLASSES, COUNTERPART
from likeness.conditions.layout import INSIDE, exchanged_pairs, measure
from likeness.conditions.mask import flip, resize
from likeness.conditions.mask_schemes import exchange as exchange_classes
from likeness.conditions.pictures import ASPECT_TOLERANCE, mask_picture, png_bytes
from likeness.files import write_whole
from likeness.types import InputError

Names = str | Sequence[str]
"""One class name, or several."""

BENEATH: dict[str, tuple[str, ...]] = {
    "background": (),
    "skin": ("background", "neck"),
    "nose": ("skin",),
    "eye_g": ("background", "skin", "nose", "l_ear", "r_ear", "hair"),
    "l_eye": ("skin", "eye_g"),
    "r_eye": ("skin", "eye_g"),
    "l_brow": ("skin", "eye_g"),
    "r_brow": ("skin", "eye_g"),
    "l_ear": ("background", "neck", "hair"),
    "r_ear": ("background", "neck", "hair"),
    "mouth": ("skin", "u_lip", "l_lip"),
    "u_lip": ("skin",),
    "l_lip": ("skin",),
    "hair": ("background", "skin", "neck", "cloth"),
    "hat": ("background", "skin", "l_ear", "r_ear", "hair"),
    "earring": ("background", "skin", "l_ear", "r_ear", "hair", "neck", "cloth"),
    "necklace": ("neck", "cloth"),
    "neck": ("background",),
    "cloth": ("background", "neck"),
}
"""Class -> what it lies on: what it may cover when it grows or is pasted.

As in CelebAMask-HQ eyes and brows are painted over glasses; ears stand out from the hair behind them. A mouth opens
between the lips and takes from them.
"""

SHOWS: dict[str, tuple[str, ...]] = BENEATH | {"eye_g": ("background", "skin", "l_ear", "r_ear", "hair")}
"""Class -> what shows where it is taken away, the nearest of these: what it lies on, but never more nose.

Half of a lens would else widen the nose: under drawn sunglasses, where the truth is known, 89 % of the pixels would
come out right with the nose and 94 % do without it (tests/unit/test_edits.py; hidden eyes and brows apart).
"""

FLESH_REACH = 0.3
"""How far skin and neck may spread under what is removed, as a share of the height of the box around the skin.

Beyond lies background. Long hair often fills a picture to its edges, and a head without it should not."""

FEATURES: tuple[str, ...] = (*INSIDE, "eye_g", "earring", "necklace")
"""Small or thin parts: what `interpolate` draws last."""


def grow(labels: np.ndarray, classes: Names, radius: float, over: Names = ()) -> np.ndarray:
    """Widen classes where they lie on what is beside them.

    A pixel of a class in `BENEATH` (or in `over`) whose centre is at most `radius` from a pixel of the growing class
    joins it; of several growing classes the nearest takes it, among equals the higher number.

    Args:
        labels: uint8 [H, W].
        classes: what grows.
        radius: pixels.
        over: what may be covered besides, such as brows by hair.

    Raises:
        InputError: a class is unknown or not in the mask, or the radius is negative.
    """
    labels, chosen = checked(labels), present_classes(labels, classes)
    _check_radius(radius)
    result, least = labels.copy(), np.full(labels.shape, np.inf)
    for index in chosen:
        distance = _distance(labels == index)
        wins = _may_cover(index, over, chosen)[labels] & (distance <= radius) & (distance <= least)
        result[wins], least[wins] = index, distance[wins]
    return result


def shrink(labels: np.ndarray, classes: Names, radius: float) -> np.ndarray:
    """Draw classes back from what they lie on.

    The counterpart of `grow`: a pixel whose centre is at most `radius` from one of a class in `SHOWS` takes the
    nearest such class. From what lies on it a class does not draw back: skin leaves no gap around the eyes.

    Args:
        labels: uint8 [H, W].
        classes: what shrinks.
        radius: pixels.

    Raises:
        InputError: a class is unknown or not in the mask, or the radius is negative.
    """
    labels, chosen = checked(labels), present_classes(labels, classes)
    _check_radius(radius)
    result = labels.copy()
    for index in chosen:
        below = [other for other in _shown(index) if other not in chosen]
        nearest, distance = _nearest(labels, below)
        gone = (labels == index) & (distance <= radius)
        result[gone] = nearest[gone]
    return result


def remove(labels: np.ndarray, classes: Names) -> np.ndarray:
    """Take classes away; their pixels take the nearest class that shows there, see `SHOWS`.

    Skin and neck spread no farther than `FLESH_REACH`. Where nothing of `SHOWS` is in the mask the pixels take the
    nearest class of any kind, and background where no class is left. Classes that the mask lacks are no error: they
    are gone already.

    Args:
        labels: uint8 [H, W].
        classes: what to remove, not the background.

    Raises:
        InputError: a class is unknown, or the background.
    """
    labels, chosen = checked(labels), class_indices(classes)
    result = labels.copy()
    left = [index for index in np.unique(labels).tolist() if index not in chosen]
    top, bottom = measure(labels).box[CLASS_INDEX["skin"], [1, 3]]
    for index in chosen:
        gone = labels == index
        if not gone.any():
            continue
        nearest, distance = _nearest(labels, [other for other in _shown(index) if other in left] or left)
        if 0 in _shown(index):
            flesh = np.isin(nearest, (CLASS_INDEX["skin"], CLASS_INDEX["neck"]))
            nearest[flesh & (distance > FLESH_REACH * (bottom - top))] = 0  # NaN, without skin, compares as False
        result[gone] = nearest[gone]
    return result


def mirror(labels: np.ndarray, classes: Names = ()) -> np.ndarray:
    """The mask seen in a mirror, or single classes mirrored about the middle of the face.

    Args:
        labels: uint8 [H, W].
        classes: none for the whole mask: its picture is reversed and the person's left and right exchanged, and doing
            it twice changes nothing. Otherwise each class's mirror image becomes its counterpart: "l_brow" makes the
            right brow like the left one, "hair" changes the side of a parting, both brows exchange shapes.

    Raises:
        InputError: a class is unknown or not in the mask, or the face has too few parts to find its middle.
    """
    labels = checked(labels)
    if not classes:
        return flip(labels)
    chosen = present_classes(labels, classes)
    made = [COUNTERPART.get(index, index) for index in chosen]
    # The middle is where a mirrored face lies on itself; what is to be mirrored has no say in it.
    mirrored = flip(labels)
    factor, source, target = _fit(mirrored, labels, without={*chosen, *made})
    mirrored = _warped(mirrored, labels.shape, factor / abs(factor), source, target)
    return _painted(labels, mirrored, made, over=())


def paste(labels: np.ndarray, other: np.ndarray, classes: Names, over: Names = (), align: bool = False) -> np.ndarray:
    """Replace classes by those of another mask.

    What `labels` has of the classes is removed first; then theirs are painted, only on what they lie on, so that a
    pasted hat leaves the brows and pasted glasses the eyes.

    Args:
        labels: uint8 [H, W].
        other: uint8 [H', W'], of the same shape or scaled to it, unless it is aligned.
        classes: what to paste.
        over: what may be covered besides.
        align: lay the other face on this one, by the centres of the parts inside both faces (a shift, a turn and one
            scale), instead of taking positions as they are.

    Raises:
        InputError: a class is unknown or not in `other`, the shapes do not fit, or the faces cannot be aligned.
    """
    labels, other = checked(labels), checked(other)
    chosen = present_classes(other, classes)
    if align:
        other = _warped(other, labels.shape, *_fit(other, labels))
    return _painted(labels, _same_size(other, labels.shape), chosen, over)


def fill_holes(labels: np.ndarray, classes: Names) -> np.ndarray:
    """Close the holes inside classes.

    A hole is a piece that one class encloses wholly (by the eight neighbours) and that holds nothing but what this
    class lies on: a gap in the hair is closed, a face framed by hair is not, for it has eyes.

    Args:
        labels: uint8 [H, W].
        classes: what to close, one after the other from the lowest number.

    Raises:
        InputError: a class is unknown or not in the mask.
    """
    result = checked(labels).copy()
    for index in present_classes(labels, classes):
        enclosed = ndimage.binary_fill_holes(result == index) & (result != index)
        pieces, _ = ndimage.label(enclosed)
        kept = np.unique(pieces[~_may_cover(index)[result]])  # 0 stands for what is not enclosed
        result[enclosed & ~np.isin(pieces, kept)] = index
    return result


def rename(labels: np.ndarray, old: str, new: str) -> np.ndarray:
    """Every pixel of class `old` becomes `new`, whatever lies beneath.

    Raises:
        InputError: a class is unknown, or `old` is not in the mask.
    """
    labels = checked(labels)
    (index,) = present_classes(labels, old, background=True)
    return np.where(labels == index, class_index(new), labels).astype(np.uint8)


def exchange(labels: np.ndarray, first: str, second: str) -> np.ndarray:
    """Both classes change places.

    Raises:
        InputError: a class is unknown, or neither is in the mask.
    """
    labels, pair = checked(labels), (class_index(first), class_index(second))
    if not np.isin(pair, labels).any():
        raise InputError(f"the mask has neither {first} nor {second}")
    return exchange_classes(labels, (pair,))


def interpolate(first: np.ndarray, second: np.ndarray, t: float) -> np.ndarray:
    """A mask between two: the signed distance to each class's border changes evenly from one mask to the other.

    t = 0 gives `first`, t = 1 `second`, exactly. First the surfaces (background, skin, hair ...) without what lies on
    them: each pixel takes the class of the largest distance, so that a pixel that is the same in both never changes.
    Then the `FEATURES` are drawn on the ground they had; those inside the face travel with their centres, for a brow
    that merely lies elsewhere would else fade on the way. A class that only one mask has grows from its innermost
    pixels. Thin parts that share no pixel and do not travel (a necklace, frames of glasses) do fade.

    Signed distances as shapes: S. Osher and J. Sethian, "Fronts propagating with curvature-dependent speed" (1988).

    Args:
        first: uint8 [H, W].
        second: uint8 [H', W'], of the same shape or scaled to it.
        t: from 0 to 1.

    Raises:
        InputError: t is outside, or the shapes do not fit.
    """
    if not 0 <= t <= 1:  # also refuses NaN
        raise InputError(f"the place between the masks is {t}; it must be from 0 (the first) to 1 (the second)")
    first = checked(first)
    second = _same_size(checked(second), first.shape)
    grounds = remove(first, FEATURES), remove(second, FEATURES)
    surface, most = np.zeros_like(first), np.full(first.shape, -np.inf)
    for index in np.union1d(*grounds).tolist():
        level = _between(grounds[0] == index, grounds[1] == index, t)
        wins = level >= most  # among equals the higher class, which is the one on top
        surface[wins], most[wins] = index, level[wins]
    result, most = surface.copy(), np.zeros(first.shape)
    for index in class_indices(FEATURES):
        regions = first == index, second == index
        if regions[0].any() or regions[1].any():
            level = _between(*regions, t, travels=CLASSES[index] in INSIDE)
            ground = np.union1d(grounds[0][regions[0]], grounds[1][regions[1]])
            wins = (level > most) & np.isin(surface, ground)
            result[wins], most[wins] = index, level[wins]
    return result


def changes(before: np.ndarray, after: np.ndarray) -> str:
    """One line that names each class whose share of the picture has changed, before -> after."""
    shares = [np.bincount(labels.ravel(), minlength=len(CLASSES)) / labels.size for labels in (before, after)]
    told = [
        f"{name} {100 * old:.2f} % -> {100 * new:.2f} %"
        for name, old, new in zip(CLASSES, *shares, strict=True)
        if old != new
    ]
    if not told:
        return "nothing changed" if np.array_equal(before, after) else "places changed, shares did not"
    return ", ".join(told)


def save(labels: np.ndarray, out: Path) -> None:
    """Write labels as a palette PNG, whole or not at all.

    Raises:
        InputError: another ending than .png, nothing but background, or the file cannot be written.
    """
    check_ending(out)
    if not labels.any():
        raise InputError("nothing but background would be left: a mask needs a face")
    write_whole(out, png_bytes(mask_picture(labels)))


def check_ending(out: Path) -> None:
    """Raises `InputError` unless `out` ends in .png."""
    if out.suffix.lower() != ".png":
        raise InputError(f"{out} should end in .png: other formats change class numbers")


def radius_of(amount: str, shape: tuple[int, ...]) -> float:
    """Pixels from what a user says: "4" or "4%" of the shorter side of `shape`, or "5px".

    Raises:
        InputError: no number, less than one pixel (nothing would change), or more than the shorter side.
    """
    words, side = amount.strip().lower(), min(shape)
    try:
        radius = (
            float(words.removesuffix("px")) if words.endswith("px") else float(words.removesuffix("%")) * side / 100
        )
    except ValueError:
        radius = math.nan
    if math.isnan(radius):
        raise InputError(f"the amount is {amount!r}; give per cent of the shorter side as 4 or pixels as 5px")
    if not 1 <= radius <= side:
        raise InputError(f"an amount of {amount} is {radius:g} pixels of this mask: it must be from 1 to {side}")
    return radius


def checked(labels: np.ndarray) -> np.ndarray:
    """`labels` as uint8. Raises `InputError` unless they are whole numbers [H, W] from 0 to 18."""
    if labels.ndim != 2 or not labels.size or not np.issubdtype(labels.dtype, np.integer):
        raise InputError(f"labels are whole numbers [H, W], not {labels.dtype} {list(labels.shape)}")
    if labels.min() < 0 or labels.max() >= len(CLASSES):
        raise InputError(f"the labels go from {labels.min()} to {labels.max()}, but the classes from 0 to 18")
    return labels.astype(np.uint8)


def class_index(name: str) -> int:
    """The class of that name. Raises `InputError` when there is none."""
    if name not in CLASS_INDEX:
        raise InputError(f"{name!r} is no class: choose from {', '.join(CLASSES)}")
    return CLASS_INDEX[name]


def class_indices(classes: Names, *, background: bool = False) -> list[int]:
    """The classes of those names, ascending, each once.

    Raises:
        InputError: there are none, one is unknown, or one is the background where that is no part to edit.
    """
    names = (classes,) if isinstance(classes, str) else classes
    chosen = sorted({class_index(name) for name in names})
    if not chosen:
        raise InputError(f"name at least one class: {', '.join(CLASSES[1:])}")
    if chosen[0] == 0 and not background:
        raise InputError("the background is what shows where no part is: edit the part beside it")
    return chosen


def present_classes(labels: np.ndarray, classes: Names, *, background: bool = False) -> list[int]:
    """As `class_indices`. Raises `InputError` also when `labels` lack one."""
    chosen = class_indices(classes, background=background)
    for index in chosen:
        if not (labels == index).any():
            raise InputError(f"the mask has no {CLASSES[index]}")
    return chosen


def _check_radius(radius: float) -> None:
    if not radius >= 0:  # also refuses NaN
        raise InputError(f"the radius is {radius}; it must be at least 0 pixels")


def _shown(index: int) -> list[int]:
    return [CLASS_INDEX[name] for name in SHOWS[CLASSES[index]]]


def _may_cover(index: int, over: Names = (), spared: Collection[int] = ()) -> np.ndarray:
    """bool [19]: what the class may be painted on."""
    allowed = np.zeros(len(CLASSES), dtype=bool)
    allowed[[CLASS_INDEX[name] for name in BENEATH[CLASSES[index]]]] = True
    if over:
        allowed[class_indices(over, background=True)] = True
    allowed[[*spared, index]] = False
    return allowed


def _distance(region: np.ndarray) -> np.ndarray:
    """float64 [H, W]: pixels to the nearest one of `region`, which has some, between centres; 0 inside."""
    return np.asarray(ndimage.distance_transform_edt(~region))


def _nearest(labels: np.ndarray, candidates: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
    """The nearest class of `candidates` and its distance, [H, W] each; 0 and infinity where `labels` have none.

    Among equals the higher number, so that the answer depends on no order of pixels.
    """
    nearest, least = np.zeros_like(labels), np.full(labels.shape, np.inf)
    for index in sorted(candidates):
        region = labels == index
        if region.any():
            distance = _distance(region)
            wins = distance <= least
            nearest[wins], least[wins] = index, distance[wins]
    return nearest, least


def _signed_distance(region: np.ndarray) -> np.ndarray:
    """float64 [H, W]: pixels to the other side of the border, at least 1 inside, at most -1 outside."""
    if region.all():  # no border in the picture: farther than any
        return np.full(region.shape, float(sum(region.shape)))
    return _distance(~region) - _distance(region)


def _between(begin: np.ndarray, end: np.ndarray, t: float, travels: bool = False) -> np.ndarray:
    """float64 [H, W]: signed distances between those of two regions, of which one may be empty."""
    if not (begin.any() and end.any()):  # sinks until nothing of it is left
        level = _signed_distance(begin | end)
        return level - (t if begin.any() else 1 - t) * level.max()
    levels = [_signed_distance(begin), _signed_distance(end)]
    if travels:
        way = np.argwhere(end).mean(0) - np.argwhere(begin).mean(0)  # (down, right)
        moves = t * way, (t - 1) * way
        levels = [ndimage.shift(d, move, order=1, mode="nearest") for d, move in zip(levels, moves, strict=True)]
    return (1 - t) * levels[0] + t * levels[1]


def _painted(labels: np.ndarray, other: np.ndarray, chosen: Sequence[int], over: Names) -> np.ndarray:
    """`labels` with the classes `chosen` taken from `other`, of the same shape, wherever they may lie."""
    base = remove(labels, [CLASSES[index] for index in chosen])
    result = base.copy()
    for index in chosen:
        result[(other == index) & _may_cover(index, over)[base]] = index
    return result


def _same_size(other: np.ndarray, shape: tuple[int, int]) -> np.ndarray:
    """`other` scaled to `shape`, [H, W]. Raises `InputError` where that would squeeze it."""
    (height, width), (high, wide) = other.shape, shape
    if abs(width * high - height * wide) > ASPECT_TOLERANCE * height * wide:
        raise InputError(f"one mask is {wide}x{high}, the other {width}x{height}: crop or pad them to one shape")
    return resize(other, high, wide)


def _fit(other: np.ndarray, labels: np.ndarray, without: Collection[int] = ()) -> tuple[complex, complex, complex]:
    """The turn and scale that lays the face of `other` on that of `labels`, and the centres of both faces.

    Least squares over the centres of the parts inside the face that both have. Points are complex numbers x + iy in
    heights of their own mask, so that multiplying turns and scales; p goes to factor * (p - source) + target.

    Returns:
        factor, source, target.

    Raises:
        InputError: fewer than three parts in common, or faces that lie too differently for one another.
    """
    # Exchanged sides would turn the face over: for measuring they are put right.
    layouts = [measure(exchange_classes(mask, exchanged_pairs(measure(mask)))) for mask in (other, labels)]
    parts = [CLASS_INDEX[name] for name in INSIDE if CLASS_INDEX[name] not in without]
    parts = [index for index in parts if all(layout.pixels[index] for layout in layouts)]
    if len(parts) < 3:
        raise InputError("too few parts in common to align the faces: eyes, brows, nose, mouth or lips, at least three")
    theirs, ours = (
        (layout.centre[parts] + 0.5) @ np.array([1, 1j]) / mask.shape[0]
        for layout, mask in zip(layouts, (other, labels), strict=True)
    )
    source, target = theirs.mean(), ours.mean()
    factor = np.vdot(theirs - source, ours - target) / np.vdot(theirs - source, theirs - source)
    if not 0.25 < factor.real < 4:  # the real part falls with the turn as well
        raise InputError("the faces lie too differently to be aligned: check the sides and the size of both")
    return complex(factor), complex(source), complex(target)


def _warped(
    labels: np.ndarray, shape: tuple[int, ...], factor: complex, source: complex, target: complex
) -> np.ndarray:
    """Labels moved by p -> factor * (p - source) + target, see `_fit`; beyond their edge they go on as at the edge."""
    rows, columns = np.indices(shape)
    places = ((columns + 0.5) + 1j * (rows + 0.5)) / shape[0]
    origin = ((places - target) / factor + source) * labels.shape[0]
    down, across = (np.floor(part + 1e-9).astype(np.intp) for part in (origin.imag, origin.real))
    return labels[np.clip(down, 0, labels.shape[0] - 1), np.clip(across, 0, labels.shape[1] - 1)]
