"""Edit masks: grow, shrink, remove, mirror, paste, fill, rename, swap and interpolate classes.

All edits take and return labels, uint8 [H, W], and never mix or invent classes. They raise `InputError` if a class is
unknown or, except for `remove`, not in the mask.

The table `BENEATH` defines what is under each class, and all edits follow it: a removed class uncovers what is beneath
it, an added class covers only that. Brows, eyes and lips therefore stay complete when hair or skin moves; `over` names
additional classes that may be covered. Hidden parts stay hidden: removing sunglasses uncovers skin, not eyes.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from pathlib import Path

import numpy as np
from scipy import ndimage

from likeness.conditions.images import ASPECT_TOLERANCE, png_bytes
from likeness.conditions.mask import flip, mask_image, resize, swap_classes
from likeness.conditions.mask.classes import ALIASES, CLASS_INDEX, CLASSES, COUNTERPART, plain_name
from likeness.conditions.mask.geometry import INSIDE, measure, specks, swapped_pairs
from likeness.conditions.mask.repair import fill_nearest
from likeness.files import writing_whole
from likeness.types import InputError

Names = str | Sequence[str]
"""Class names, each text one or several, separated by commas or spaces."""

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
"""Class -> the classes beneath it, which it may cover when it grows or is pasted.

As in CelebAMask-HQ, eyes and brows are painted over glasses, and ears over the hair behind them. A mouth opens between
the lips and covers them."""

SHOWS: dict[str, tuple[str, ...]] = BENEATH | {"eye_g": ("background", "skin", "l_ear", "r_ear", "hair")}
"""Class -> the classes that replace it, the nearest first, when it is removed: those beneath it, but never the nose.

Half a lens would otherwise widen the nose: under synthetic sunglasses, for which the truth is known, 89 % of the pixels
are correct with the nose and 94 % without it (tests/unit/test_mask_edits.py; except hidden eyes and brows)."""

FLESH_REACH = 0.3
"""Farthest distance that skin and neck spread under a removed class, relative to the height of the skin.

Beyond it is background: long hair often fills an image to its edges, but the head under it does not."""

FEATURES: tuple[str, ...] = (*INSIDE, "eye_g", "earring", "necklace")
"""Small or thin classes, which `interpolate` paints last."""


def grow(labels: np.ndarray, classes: Names, radius: float, over: Names = ()) -> np.ndarray:
    """Grow classes of labels, uint8 [H, W], over what is beneath them.

    A pixel of a class in `BENEATH` or `over` (for example brows, which hair may cover) joins the nearest growing class
    within `radius`, a distance of at least 0 between pixel centers; on a tie, the class with the higher number.
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
    """Shrink classes away from what is beneath them, the counterpart of `grow`: a pixel within `radius` of a class in
    `SHOWS` takes the nearest of these classes. Skin leaves no gap around the eyes, which are on top of it.
    """
    labels, chosen = checked(labels), present_classes(labels, classes)
    _check_radius(radius)
    result = labels.copy()
    for index in chosen:
        nearest, distance = _nearest(labels, [other for other in _shown(index) if other not in chosen])
        gone = (labels == index) & (distance <= radius)
        result[gone] = nearest[gone]
    return result


def remove(labels: np.ndarray, classes: Names) -> np.ndarray:
    """Replace classes with the nearest class of `SHOWS`.

    Skin and neck spread at most `FLESH_REACH`. If the mask has no class of `SHOWS`, pixels take the nearest class of
    any kind, or background if none remains. Classes that the mask lacks are ignored.
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
    """Mirror the mask, or mirror classes about the midline of the face.

    Without classes, the mask is flipped and the person's left and right are swapped. Otherwise the mirror image of each
    class becomes its counterpart: "l_brow" makes the right brow like the left one, "hair" moves a parting to the other
    side, both brows swap shapes. The mask must then show at least three parts of a face.
    """
    labels = checked(labels)
    if not classes:
        return flip(labels)
    chosen = present_classes(labels, classes)
    made = [COUNTERPART.get(index, index) for index in chosen]
    # Aligning the face with its mirror image gives the midline; the mirrored classes themselves are excluded.
    mirrored = flip(labels)
    factor, source, target = _fit(mirrored, labels, without={*chosen, *made})
    mirrored = _warped(mirrored, labels.shape, factor / abs(factor), source, target)
    return _painted(labels, mirrored, made, over=())


def paste(labels: np.ndarray, other: np.ndarray, classes: Names, over: Names = (), align: bool = False) -> np.ndarray:
    """Replace classes with those of another mask, of the same aspect ratio unless `align`.

    The classes are removed from `labels` first. The others cover only what is beneath them, and `over`: a pasted hat
    leaves the brows and pasted glasses leave the eyes. `align` aligns the other face with this one, by the centers of
    the parts inside both faces (translation, rotation and one scale), of which at least three must be in both masks.
    """
    labels, other = checked(labels), checked(other)
    chosen = present_classes(other, classes)
    if align:
        other = _warped(other, labels.shape, *_fit(other, labels))
    return _painted(labels, _same_size(other, labels.shape), chosen, over)


def fill_holes(labels: np.ndarray, classes: Names) -> np.ndarray:
    """Fill holes inside classes, one class after another.

    A hole is a region that one class encloses completely (8-connected) and that contains only what is beneath the
    class: a gap in the hair is filled, a face framed by hair is not, because it has eyes.
    """
    result = checked(labels).copy()
    for index in present_classes(labels, classes):
        enclosed = ndimage.binary_fill_holes(result == index) & (result != index)
        regions, _ = ndimage.label(enclosed)
        kept = np.unique(regions[~_may_cover(index)[result]])  # 0 is what is not enclosed
        result[enclosed & ~np.isin(regions, kept)] = index
    return result


def clean(labels: np.ndarray, classes: Names) -> np.ndarray:
    """Remove specks: separate regions of classes below 0.02 % of the image take the class of the nearest pixel around.
    Classes without specks stay.
    """
    labels = checked(labels)
    geometry, gone = measure(labels), np.zeros(labels.shape, bool)
    for index in present_classes(labels, classes):
        x, y, right, bottom = geometry.box[index].astype(int)
        gone[y : bottom + 1, x : right + 1] |= specks(labels, index, geometry.box[index])[0]
    return fill_nearest(labels, gone)


def rename(labels: np.ndarray, old: str, new: str) -> np.ndarray:
    """Change every pixel of class `old` to `new`."""
    labels = checked(labels)
    found = present_classes(labels, old, background=True)
    return np.where(np.isin(labels, found), class_index(new), labels).astype(np.uint8)


def swap(labels: np.ndarray, first: str, second: str) -> np.ndarray:
    """Swap two classes, of which one may be absent."""
    labels, pair = checked(labels), (class_index(first), class_index(second))
    if not np.isin(pair, labels).any():
        raise InputError(f"the mask has neither {first} nor {second}: `likeness inspect` lists its classes")
    return swap_classes(labels, (pair,))


def interpolate(first: np.ndarray, second: np.ndarray, t: float) -> np.ndarray:
    """Interpolate the signed distance to each class's border between two masks of the same aspect ratio, at position
    `t`.

    t = 0 returns `first` and t = 1 returns `second`, exactly. Large classes (background, skin, hair ...) come first,
    without what is on top of them: each pixel takes the class with the largest distance, so that a pixel that is equal
    in both never changes. Then `FEATURES` are painted where their ground is. Features inside the face move with their
    centers, since a displaced brow would otherwise vanish midway. A class that only one mask has grows from its
    innermost pixels. Thin classes that do not overlap and do not move (necklaces, frames of glasses) vanish midway.

    Signed distances as shapes: S. Osher and J. Sethian, "Fronts propagating with curvature-dependent speed" (1988).
    """
    if not 0 <= t <= 1:  # also rejects NaN
        raise InputError(f"the position between the masks is {t}: it must be from 0 (the first) to 1 (the second)")
    first = checked(first)
    second = _same_size(checked(second), first.shape)
    grounds = remove(first, FEATURES), remove(second, FEATURES)
    surface, most = np.zeros_like(first), np.full(first.shape, -np.inf)
    for index in np.union1d(*grounds).tolist():
        level = _between(grounds[0] == index, grounds[1] == index, t)
        wins = level >= most  # on a tie the higher class, which is the one on top
        surface[wins], most[wins] = index, level[wins]
    result, most = surface.copy(), np.zeros(first.shape)
    for index in class_indices(FEATURES):
        regions = first == index, second == index
        if regions[0].any() or regions[1].any():
            level = _between(*regions, t, moves=CLASSES[index] in INSIDE)
            ground = np.union1d(grounds[0][regions[0]], grounds[1][regions[1]])
            wins = (level > most) & np.isin(surface, ground)
            result[wins], most[wins] = index, level[wins]
    return result


def changes(before: np.ndarray, after: np.ndarray) -> str:
    """Describe in one line how the fraction of each class changed."""
    fractions = [np.bincount(labels.ravel(), minlength=len(CLASSES)) / labels.size for labels in (before, after)]
    changed = [
        f"{name} {100 * old:.2f} % -> {100 * new:.2f} %"
        for name, old, new in zip(CLASSES, *fractions, strict=True)
        if old != new
    ]
    same = "nothing changed" if np.array_equal(before, after) else "positions changed, areas did not"
    return ", ".join(changed) or same


def save(labels: np.ndarray, out: Path, *, overwrite: bool = True) -> None:
    """Write labels as a palette PNG, atomically. Raises `InputError` if they are all background, and `FileExistsError`
    for an existing file unless `overwrite`.
    """
    check_suffix(out)
    if not labels.any():
        raise InputError("nothing but background would remain: a mask needs a face")
    with writing_whole(out, overwrite=overwrite) as file:
        file.write(png_bytes(mask_image(labels)))


def check_suffix(out: Path) -> None:
    """Raise `InputError` unless `out` ends in .png."""
    if out.suffix.lower() != ".png":
        raise InputError(f"{out} must end in .png: other formats change class numbers")


def radius_of(amount: str, shape: tuple[int, ...]) -> float:
    """Convert "4" or "4%" (of the shorter side of `shape`) or "5px" to pixels, from 1 to the shorter side."""
    number, side = amount.strip().lower(), min(shape)
    try:
        radius = float(number.removesuffix("px") if number.endswith("px") else number.removesuffix("%"))
    except ValueError:
        radius = math.nan
    if not number.endswith("px"):
        radius = radius * side / 100
    if math.isnan(radius):
        raise InputError(f"the amount is {amount!r}: use 4 for 4 % of the shorter side, or 5px for pixels")
    if not 1 <= radius <= side:
        raise InputError(f"an amount of {amount} is {radius:g} pixels of this mask: it must be from 1 to {side}")
    return radius


def checked(labels: np.ndarray) -> np.ndarray:
    """Return `labels` as uint8. Raises `InputError` unless they are integers [H, W] from 0 to 18."""
    if labels.ndim != 2 or not labels.size or not np.issubdtype(labels.dtype, np.integer):
        raise InputError(f"labels must be integers [H, W], not {labels.dtype} {list(labels.shape)}")
    if labels.min() < 0 or labels.max() >= len(CLASSES):
        raise InputError(f"labels must be from 0 to 18, not from {labels.min()} to {labels.max()}")
    return labels.astype(np.uint8)


def class_index(name: str) -> int:
    """Return the class of a name, in any case, or of a synonym. Raises `InputError` unless it is exactly one."""
    found = _named(name)
    if len(found) > 1:
        raise InputError(f"{name!r} names several classes: choose one of {', '.join(CLASSES[i] for i in found)}")
    return found[0]


def class_names(classes: Names) -> list[str]:
    """Split class names at commas and at spaces, except the space of a name such as "left eye"."""
    parts = [part for text in ([classes] if isinstance(classes, str) else classes) for part in text.split(",")]
    return [name for part in parts for name in ([part] if plain_name(part) in ALIASES else part.split())]


def _named(name: str) -> list[int]:
    """The classes of a name."""
    if plain_name(name) not in ALIASES:
        raise InputError(f"Unknown class {name!r}. Available: {', '.join(CLASSES)}")
    return [CLASS_INDEX[own] for own in ALIASES[plain_name(name)]]


def class_indices(classes: Names, *, background: bool = False) -> list[int]:
    """Return the classes of those names in ascending order, without duplicates; `background` allows the background."""
    chosen = sorted({index for name in class_names(classes) for index in _named(name)})
    if not chosen:
        raise InputError(f"name at least one class: {', '.join(CLASSES[1:])}")
    if chosen[0] == 0 and not background:
        raise InputError("the background cannot be edited, since it is what no part covers: edit a part next to it")
    return chosen


def present_classes(labels: np.ndarray, classes: Names, *, background: bool = False) -> list[int]:
    """As `class_indices`, without absent classes. Raises `InputError` if nothing of a name is in `labels`."""
    for name in class_names(classes):
        if not np.isin(_named(name), labels).any():
            present = ", ".join(CLASSES[index] for index in np.unique(labels) if index) or "background only"
            raise InputError(f"the mask has no {name}: it has {present}")
    return [index for index in class_indices(classes, background=background) if index in labels]


def _check_radius(radius: float) -> None:
    if not radius >= 0:  # also rejects NaN
        raise InputError(f"the radius is {radius}: it must be at least 0 pixels")


def _shown(index: int) -> list[int]:
    return [CLASS_INDEX[name] for name in SHOWS[CLASSES[index]]]


def _may_cover(index: int, over: Names = (), spared: Collection[int] = ()) -> np.ndarray:
    """bool [19]: which classes the class may cover."""
    allowed = np.zeros(len(CLASSES), dtype=bool)
    allowed[[CLASS_INDEX[name] for name in BENEATH[CLASSES[index]]]] = True
    if over:
        allowed[class_indices(over, background=True)] = True
    allowed[[*spared, index]] = False
    return allowed


def _distance(region: np.ndarray) -> np.ndarray:
    """float64 [H, W]: distance to the nearest pixel of a non-empty region, between centers; 0 inside."""
    return np.asarray(ndimage.distance_transform_edt(~region))


def _nearest(labels: np.ndarray, candidates: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
    """Nearest class of `candidates` and its distance, [H, W] each; 0 and infinity if there is none.

    On a tie the higher class, so that the result does not depend on the order of pixels.
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
    """float64 [H, W]: distance to the other side of the border, at least 1 inside, at most -1 outside."""
    if region.all():  # no border: farther than any distance
        return np.full(region.shape, float(sum(region.shape)))
    return _distance(~region) - _distance(region)


def _between(begin: np.ndarray, end: np.ndarray, t: float, moves: bool = False) -> np.ndarray:
    """float64 [H, W]: interpolated signed distance of two regions, one of which may be empty."""
    if not (begin.any() and end.any()):  # decreases until the region is empty
        level = _signed_distance(begin | end)
        return level - (t if begin.any() else 1 - t) * level.max()
    levels = [_signed_distance(begin), _signed_distance(end)]
    if moves:
        way = np.argwhere(end).mean(0) - np.argwhere(begin).mean(0)  # (down, right)
        shifts = t * way, (t - 1) * way
        levels = [ndimage.shift(d, shift, order=1, mode="nearest") for d, shift in zip(levels, shifts, strict=True)]
    return (1 - t) * levels[0] + t * levels[1]


def _painted(labels: np.ndarray, other: np.ndarray, chosen: Sequence[int], over: Names) -> np.ndarray:
    """`labels` with the classes `chosen` from `other`, of the same shape."""
    base = remove(labels, [CLASSES[index] for index in chosen])
    result = base.copy()
    for index in chosen:
        result[(other == index) & _may_cover(index, over)[base]] = index
    return result


def _same_size(other: np.ndarray, shape: tuple[int, int]) -> np.ndarray:
    """`other` resized to `shape`, [H, W]. Raises `InputError` if the aspect ratios differ."""
    (height, width), (high, wide) = other.shape, shape
    if abs(width * high - height * wide) > ASPECT_TOLERANCE * height * wide:
        raise InputError(f"one mask is {wide}x{high}, the other {width}x{height}: crop or pad them to one shape")
    return resize(other, high, wide)


def _fit(other: np.ndarray, labels: np.ndarray, without: Collection[int] = ()) -> tuple[complex, complex, complex]:
    """Return the rotation and scale that align the face of `other` with that of `labels`, and both centers: factor,
    source, target of p -> factor * (p - source) + target.

    Least squares over the centers of the parts inside the face that both have. Points are complex numbers x + iy in
    units of the height of their mask, so that a product rotates and scales.
    """
    # Swapped sides would mirror the face: correct them for measuring.
    geometries = [measure(swap_classes(mask, swapped_pairs(measure(mask)))) for mask in (other, labels)]
    parts = [CLASS_INDEX[name] for name in INSIDE if CLASS_INDEX[name] not in without]
    parts = [index for index in parts if all(geometry.pixels[index] for geometry in geometries)]
    if len(parts) < 3:
        raise InputError("too few parts in common: three of eyes, brows, nose, mouth and lips are needed to align")
    theirs, ours = (
        (geometry.center[parts] + 0.5) @ np.array([1, 1j]) / mask.shape[0]
        for geometry, mask in zip(geometries, (other, labels), strict=True)
    )
    source, target = theirs.mean(), ours.mean()
    factor = np.vdot(theirs - source, ours - target) / np.vdot(theirs - source, theirs - source)
    if not 0.25 < factor.real < 4:  # the real part decreases with the rotation, too
        raise InputError("the faces are too different to be aligned: check the sides and the size of both")
    return complex(factor), complex(source), complex(target)


def _warped(
    labels: np.ndarray, shape: tuple[int, ...], factor: complex, source: complex, target: complex
) -> np.ndarray:
    """Labels moved by p -> factor * (p - source) + target, see `_fit`; edge pixels repeat beyond the edge."""
    rows, columns = np.indices(shape)
    places = ((columns + 0.5) + 1j * (rows + 0.5)) / shape[0]
    origin = ((places - target) / factor + source) * labels.shape[0]
    down, across = (np.floor(part + 1e-9).astype(np.intp) for part in (origin.imag, origin.real))
    return labels[np.clip(down, 0, labels.shape[0] - 1), np.clip(across, 0, labels.shape[1] - 1)]
