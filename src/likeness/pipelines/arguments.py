"""What callers of a pipeline bring, and what a checkpoint is set to, made plain or refused in one sentence."""

from __future__ import annotations

import inspect
import operator
from collections.abc import Mapping, Sequence
from typing import Any

from likeness.pipelines.sizes import trained_sizes
from likeness.types import InputError


def whole_number(value: Any, name: str) -> int:
    """`value` as an int, NumPy's and PyTorch's, too. Raises `InputError` where it is none."""
    try:
        return operator.index(value)
    except TypeError as error:
        raise InputError(f"{name} is {value!r}; it must be a whole number") from error


def number(value: Any, name: str) -> float:
    """`value` as a float. Raises `InputError` where it is none."""
    try:
        return float(value)
    except (TypeError, ValueError) as error:
        raise InputError(f"{name} is {value!r}; it must be a number") from error


def interval_of(value: Any) -> tuple[float, float]:
    """The noise levels between which guidance acts. Raises `InputError` where they are none."""
    try:
        low, high = (float(level) for level in value)
    except (TypeError, ValueError) as error:
        raise InputError(f"guidance_interval is {value!r}; it must be two numbers, such as (0.15, 0.85)") from error
    if not low <= high:
        raise InputError(f"guidance_interval is ({low}, {high}); the lower noise level comes first")
    return low, high


def own_steps(scheduler: Any, **given: Sequence[float] | None) -> dict[str, list[float]]:
    """A request's own `sigmas` or `timesteps` for `set_timesteps`. Raises `InputError` for both, or what it lacks."""
    chosen = {
        name: [float(x) if name == "sigmas" else int(x) for x in of] for name, of in given.items() if of is not None
    }
    if len(chosen) > 1:
        raise InputError("sigmas and timesteps are both given: they say the same in two ways, leave one out")
    (name,) = chosen
    if name not in inspect.signature(scheduler.set_timesteps).parameters:
        raise InputError(f"{type(scheduler).__name__} takes no {name} of one's own: leave them out")
    return chosen


def spread(
    prompt: str | Sequence[str],
    negative_prompt: str | Sequence[str] | None,
    control_image: Mapping[str, Any] | None,
    per_prompt: int,
) -> tuple[list[str], list[str], list[dict[str, Any]]]:
    """Prompts, negative prompts and conditions, one a picture.

    A single value serves all pictures; lists must agree in length. Every entry is repeated `per_prompt` times.
    """
    per_prompt = whole_number(per_prompt, "num_images_per_prompt")
    if per_prompt < 1:
        raise InputError(f"num_images_per_prompt is {per_prompt}; it must be at least 1")
    negative_prompt, control_image = (
        "" if negative_prompt is None else negative_prompt,
        {} if control_image is None else control_image,
    )
    if not isinstance(control_image, Mapping):
        kind = type(control_image).__name__
        raise InputError(f'control_image is of the type {kind}; it must say what is what, such as {{"mask": ...}}')
    columns: dict[str, Any] = {"prompt": prompt, "negative prompt": negative_prompt, **control_image}
    lengths = {name: len(value) for name, value in columns.items() if isinstance(value, (list, tuple))}
    count = max(lengths.values(), default=1)
    for name, length in lengths.items():
        if not length:
            raise InputError(f"the list of {name} is empty: give one value for all pictures, or one each")
        if length not in (1, count):
            longest = next(other for other, size in lengths.items() if size == count)
            raise InputError(
                f"{length} values of {name} do not match {count} of {longest}: "
                "if a batch size is not 1, it must be the same for prompts and conditions"
            )

    def of(value: Any, index: int) -> Any:
        if not isinstance(value, (list, tuple)):
            return value
        return value[index if len(value) > 1 else 0]

    items = [index for index in range(count) for _ in range(per_prompt)]
    prompts, negatives = [of(prompt, i) for i in items], [of(negative_prompt, i) for i in items]
    for text in (*prompts, *negatives):
        if not isinstance(text, str):
            raise InputError(f"a prompt is {text!r}, which is not text")
    images = [{name: of(value, i) for name, value in control_image.items() if of(value, i) is not None} for i in items]
    return prompts, negatives, images


def check_settings(condition_resize: str, defaults: Mapping[str, Any], known: Mapping[str, Any], sizes: Any) -> None:
    """Reject invalid settings of a checkpoint. Raises `InputError`."""
    if condition_resize not in ("exact", "lanczos"):
        raise InputError(f"condition_resize is {condition_resize!r}; choose exact or lanczos")
    if unknown := [name for name in defaults if name not in known]:
        raise InputError(f"the checkpoint's defaults have an unknown {unknown[0]!r}; there are {', '.join(known)}")
    trained_sizes({"sizes": sizes, "defaults": {**known, **defaults}})
