"""Normalize and check the arguments of a pipeline call."""

from __future__ import annotations

import math
import operator
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers.callbacks import MultiPipelineCallbacks, PipelineCallback
from PIL import Image
from torch import Tensor

from likeness.conditions import CONDITIONS
from likeness.types import ConditionInput, InputError, TextFeatures


def whole_number(value: Any, name: str) -> int:
    """Convert to int, also from NumPy and PyTorch. Raises `InputError` for other values."""
    try:
        return operator.index(value)
    except TypeError as error:
        raise InputError(f"{name} is {value!r}; it must be a whole number") from error


def number(value: Any, name: str) -> float:
    """Convert to float. Raises `InputError` for values that are not numbers."""
    try:
        return float(value)
    except OverflowError as error:
        raise InputError(f"{name} is too large for a float: pass a smaller number") from error
    except (TypeError, ValueError) as error:
        raise InputError(f"{name} is {value!r}; it must be a number") from error


def noise_interval(value: Any, name: str) -> tuple[float, float]:
    """Convert an interval to two noise levels. Raises `InputError`."""
    try:
        low, high = (float(level) for level in value)
    except (TypeError, ValueError, OverflowError) as error:
        raise InputError(f"{name} is {value!r}; it must be two numbers, such as (0.15, 0.85)") from error
    if not low <= high:
        raise InputError(f"{name} is ({low}, {high}); the lower noise level comes first")
    return low, high


def checked_defaults(given: Any, known: Mapping[str, Any]) -> dict[str, Any]:
    """Return the known defaults of a pipeline, updated by those of a checkpoint or an adapter. Raises `InputError` for
    other names and types.
    """
    if not isinstance(given, Mapping):
        raise InputError(f"defaults is {given!r}; it must be a mapping, such as {{'steps': 4}}")
    if unknown := sorted(set(given) - set(known)):
        raise InputError(f"Unknown default {unknown[0]!r} of the checkpoint. Available: {', '.join(known)}")
    defaults = {**known, **given}
    for name, check in (("size", whole_number), ("steps", whole_number), ("guidance_scale", number)):
        check(defaults[name], name)
    noise_interval(defaults["guidance_interval"], "guidance_interval")
    return defaults


def per_image(arguments: Mapping[str, Any], repeats: int) -> list[dict[str, Any]]:
    """Distribute arguments over the images of a batch. A value is one for all images, or a list with one per image;
    `repeats` images share each. Return name -> value for each image, without names whose value is None.

    Raises `InputError` for lists of different lengths, an empty list, or `repeats` below 1.
    """
    repeats = whole_number(repeats, "num_images_per_prompt")
    if repeats < 1:
        raise InputError(f"num_images_per_prompt is {repeats}; it must be at least 1")
    columns = {name: value if isinstance(value, (list, tuple)) else [value] for name, value in arguments.items()}
    count = max(len(values) for values in columns.values())
    for name, values in columns.items():
        if not values:
            raise InputError(f"The list of {name} is empty: pass one value for all images, or one per image")
        if len(values) not in (1, count):
            longest = next(other for other in columns if len(columns[other]) == count)
            raise InputError(f"{len(values)} values of {name} do not match {count} of {longest}: pass one or {count}")
    rows = [{name: values[i % len(values)] for name, values in columns.items()} for i in range(count)]
    return [{name: value for name, value in row.items() if value is not None} for row in rows for _ in range(repeats)]


def embedded(name: str, text: Any, tokens: Tensor | None, pooled: Tensor | None) -> Any:
    """Return the embeddings of a prompt, tokens [B, L, D] and pooled [B, P], as one `TextFeatures` per image; the text
    or list of texts ("" for None) if there are none. Raises `InputError` if one is missing, their shapes do not match,
    or there is a text, too.
    """
    if tokens is None and pooled is None:
        return ["" if each is None else each for each in text] if isinstance(text, (list, tuple)) else text or ""
    if tokens is None or pooled is None:
        raise InputError(f"{name}_embeds and its pooled embeddings belong together: pass both, from `encode_prompt`")
    if text:
        raise InputError(f"{name} {text!r} and {name}_embeds exclude each other: leave one out")
    if not (isinstance(tokens, Tensor) and isinstance(pooled, Tensor)):
        types = f"{type(tokens).__name__} and {type(pooled).__name__}"
        raise InputError(f"{name}_embeds and its pooled embeddings are of type {types}; pass tensors")
    if tokens.ndim != 3 or pooled.ndim != 2 or len(tokens) != len(pooled):
        shapes = f"{tuple(tokens.shape)} and {tuple(pooled.shape)}"
        raise InputError(f"{name}_embeds and its pooled embeddings have shapes {shapes}, not [B, L, D] and [B, P]")
    return [TextFeatures(*row) for row in zip(tokens.split(1), pooled.split(1), strict=True)]


def check_texts(texts: Iterable[Any]) -> None:
    """Raise `InputError` if a prompt is no text that can be encoded; `TextFeatures` are encoded already."""
    for text in texts:
        if isinstance(text, TextFeatures):
            continue
        if not isinstance(text, str):
            raise InputError(f"A prompt is {text!r}; it must be a string")
        try:
            text.encode()
        except UnicodeEncodeError as error:  # lone surrogates: undecodable bytes of the command line
            raise InputError(f"The prompt {text!r} is not valid UTF-8: check the terminal's encoding") from error


def callback_inputs(callback: Any, given: Sequence[str]) -> Sequence[str]:
    """Return the names of the tensors that a callback receives: a callback object of diffusers names them itself."""
    return callback.tensor_inputs if isinstance(callback, (PipelineCallback, MultiPipelineCallbacks)) else given


def array_of(image: Any) -> Any:
    """Return a tensor as an array, bfloat16 as float32, and any other form of an image as it is."""
    if not isinstance(image, Tensor):
        return image
    return (image.float() if image.is_floating_point() else image).cpu().numpy()


def named_conditions(images: Any) -> Any:
    """Return `control_image` as a mapping; the kind of a single path, image or array is recognized. Raises `InputError`
    if it is not a known condition.
    """
    if images is None:
        return {}
    if isinstance(images, (str, Path, Image.Image, np.ndarray, Tensor)):
        from likeness.conditions.inspection import inspect  # imports scipy

        return {inspect(array_of(images)).condition: images}
    return images


def seeds_of(generator: Any, count: int) -> list[int]:
    """Return the seeds of new CPU generators, one per image; [] for any others, whose noise no seed describes."""
    generators = list(generator) if isinstance(generator, Sequence) else [generator]
    if len({id(own) for own in generators}) != count or not all(isinstance(own, torch.Generator) for own in generators):
        return []
    if any(own.device.type != "cpu" for own in generators):
        return []
    seeds = [own.initial_seed() for own in generators]
    new = (
        torch.equal(own.get_state(), torch.Generator().manual_seed(s).get_state())
        for own, s in zip(generators, seeds, strict=True)
    )
    return seeds if all(new) and max(seeds) < 2**63 else []


def condition_inputs(
    images: Mapping[str, Any],
    trained: Sequence[str],
    *,
    scale: float | Mapping[str, float],
    start: float | Mapping[str, float],
    end: float | Mapping[str, float],
) -> dict[str, Any]:
    """Convert the keyword arguments of a pipeline call to name -> `ConditionInput`, or a list of them and None.

    `images` maps a name to an image, or to a list of images with None where an image of the batch has no such
    condition; a `ConditionInput` instead of an image is returned unchanged. `trained` are the conditions of the
    checkpoint; `scale`, `start` and `end` are those of all conditions, or by name.

    Raises `InputError` if a condition is unknown or was not trained, or a number is invalid.
    """
    if not isinstance(images, Mapping):
        raise InputError(f'control_image is of type {type(images).__name__}; pass a dict such as {{"mask": ...}}')
    usable = ", ".join(name for name in trained if name in CONDITIONS) or "text only"
    for name in images:
        if name not in CONDITIONS:
            raise InputError(f"Unknown condition {name!r}. This checkpoint takes {usable}")
        if name not in trained:
            raise InputError(f"This checkpoint was not trained with {name}: it takes {usable}")
    numbers: dict[str, dict[str, float]] = {name: {} for name in images}
    for field, argument, values, default in (
        ("scale", "conditioning_scale", scale, 1.0),
        ("start", "control_guidance_start", start, 0.0),
        ("end", "control_guidance_end", end, 1.0),
    ):
        by_name = values if isinstance(values, Mapping) else dict.fromkeys(images, values)
        if unused := sorted(set(by_name) - set(images)):
            raise InputError(f"{argument} contains {unused[0]!r}, but control_image does not")
        for name in images:
            numbers[name][field] = number(by_name.get(name, default), argument)

    def convert(name: str, image: Any) -> ConditionInput | None:
        if image is None:
            return None
        if isinstance(image, ConditionInput):
            own = {field: number(getattr(image, field), f"{field} of {name}") for field in numbers[name]}
            condition = replace(image, **own)
        else:
            condition = ConditionInput(image=image, **numbers[name])
        if not math.isfinite(condition.scale) or condition.scale < 0:
            raise InputError(f"The scale of {name} is {condition.scale}; it must be a finite number of at least 0")
        if not 0 <= condition.start <= condition.end <= 1:
            raise InputError(f"{name} acts from {condition.start} to {condition.end}: use 0 <= start <= end <= 1")
        return condition

    return {
        name: [convert(name, image) for image in value] if isinstance(value, (list, tuple)) else convert(name, value)
        for name, value in images.items()
    }


def check_guidance_model(network: Any, guidance_model: Any, scale: float) -> None:
    """Raise `InputError` if a network cannot be used for autoguidance."""
    if not math.isfinite(scale):
        raise InputError(f"autoguidance_scale is {scale}; it must be a finite number")
    if guidance_model is None:
        return
    if not isinstance(guidance_model, type(network)):
        name = type(guidance_model).__name__
        raise InputError(f"guidance_model is a {name}; it must be a {type(network).__name__}")
    ours, theirs = ({k: v for k, v in m.config.items() if k[0] != "_"} for m in (network, guidance_model))
    if different := [name for name, value in ours.items() if theirs.get(name) != value]:
        raise InputError(f"guidance_model has another {different[0]} than the network: both must be equal")


def changed_latents(returned: Mapping[str, Any] | None, latents: Tensor) -> Tensor:
    """Return the latents after a callback, from what it returned. Raises `InputError` if it returned anything else, or
    latents of another shape.
    """
    if others := sorted(set(returned or {}) - {"latents"}):
        raise InputError(f"The callback returned {others[0]}, but it can change only latents")
    changed = (returned or {}).get("latents", latents)
    if changed.shape != latents.shape:
        shapes = f"{tuple(changed.shape)}, not {tuple(latents.shape)}"
        raise InputError(f"The callback returned latents of shape {shapes}")
    return changed
