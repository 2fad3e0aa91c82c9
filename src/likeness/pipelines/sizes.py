"""The image sizes that a model was trained at, and what happens to a request for another one. No torch here.

A network produces faces at the sizes it was trained at and texture at others, so other sizes are rejected. The caller
chooses the alternative: resample an image of a trained size (`upscale`), or generate anyway (`force_size`).
"""

from __future__ import annotations

import math
import operator
import re
from collections.abc import Mapping, Sequence
from typing import Any

from likeness.types import InputError

ANY = "any"
"""Value of `sizes` of a model without preferred sizes, such as FLUX.1."""

SMALLEST_SIDE, LARGEST_SIDE = 8, 4096
"""Smallest and largest side of an image, in pixels; smaller ones are rejected by `likeness.conditions.images`."""


def parse_size(text: str, name: str = "size") -> tuple[int, int]:
    """Parse `128` or `128x160` as (width, height) in pixels. Raises `InputError` for other forms."""
    sides = str(text).lower().split("x")
    if len(sides) > 2 or not all(re.fullmatch(r"0*[1-9][0-9]{0,8}", side) for side in sides):
        raise InputError(f"{name} is {str(text)[:80]!r}; give pixels as 128 or as 128x160 (width x height)")
    return int(sides[0]), int(sides[-1])


def trained_sizes(config: Mapping[str, Any]) -> list[tuple[int, int]]:
    """Return the trained sizes in a pipeline's configuration as (width, height); [] if it generates at any size.

    `sizes` is a list such as [[128, 128], [128, 160]], or "any"; folders written before that field existed were trained
    at their default size, a square. Raises `InputError` for other forms.
    """
    sizes = config.get("sizes")
    if sizes == ANY:
        return []
    if sizes is None:
        sizes = [[config["defaults"]["size"]] * 2]
    try:
        found = [(operator.index(width), operator.index(height)) for width, height in sizes]
    except (TypeError, ValueError) as error:
        raise InputError(f'sizes is {sizes!r}; it must be a list such as [[128, 128]], or "{ANY}"') from error
    if not found or min(map(min, found)) < 1:
        raise InputError(f"sizes is {sizes!r}; it must contain sizes of at least one pixel")
    return found


def format_sizes(sizes: Sequence[tuple[int, int]]) -> str:
    """Write sizes as in `128x128, 128x160`."""
    return ", ".join(f"{width}x{height}" for width, height in sizes)


def generation_size(
    config: Mapping[str, Any], size: tuple[int, int], *, upscale: bool = False, force_size: bool = False
) -> tuple[int, int]:
    """Return the size to generate at for a requested size; both are (width, height) in pixels. With `upscale` it is the
    nearest trained size of that aspect ratio, and the caller resamples the result; `force_size` generates at any size.

    Raises `InputError` if the model was not trained at the size and neither option is given, `upscale` does not apply,
    or a side is not from `SMALLEST_SIDE` to `LARGEST_SIDE`.
    """
    sizes = trained_sizes(config)
    if upscale and force_size:
        raise InputError("upscale and force_size exclude each other: choose one")
    wanted, trained = format_sizes([size]), format_sizes(sizes)
    if min(size) < SMALLEST_SIDE or max(size) > LARGEST_SIDE:
        sides = f"from {SMALLEST_SIDE} to {LARGEST_SIDE} pixels"
        raise InputError(f"Size {wanted} is not supported: both sides must be {sides}")
    if not sizes or size in sizes or force_size:
        return size
    same_aspect = [other for other in sizes if abs(size[0] * other[1] - size[1] * other[0]) < max(other)]
    force = f"force_size (--force-size) to generate at {wanted} with artifacts"
    if not same_aspect:
        raise InputError(
            f"Size {wanted} is not supported: the model was trained at {trained}, none with its aspect ratio. "
            f"Use a trained size, or {force}"
        )
    if not upscale:
        raise InputError(
            f"Size {wanted} is not supported: the model was trained at {trained}. "
            f"Use a trained size, upscale (--upscale) to resample to {wanted}, or {force}"
        )
    return min(same_aspect, key=lambda other: abs(math.log(other[0] * other[1] / (size[0] * size[1]))))
