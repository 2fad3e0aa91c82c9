"""Edit an image with a pipeline of either network: repaint a region, or change the whole image.

The arguments are diffusers': `image`, `mask_image` (white is repainted) and `strength`. No method keeps pixels, since
the autoencoder changes them all: `likeness.prepare.edit` pastes the region into the photograph.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Literal, TypeVar

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from likeness.conditions.images import check_aspect, read_rgb
from likeness.encoders.latent import spatial_factor, to_tensor
from likeness.objectives.flow import RectifiedFlow
from likeness.pipelines.arguments import callback_inputs, changed_latents, embedded, number, per_image
from likeness.pipelines.editing.base import Editing
from likeness.pipelines.editing.flow_edit import flow_edit
from likeness.pipelines.editing.inpainting import inpainting
from likeness.pipelines.editing.inversion import inversion
from likeness.pipelines.editing.langevin import langevin
from likeness.pipelines.editing.replacement import image_to_image, replacement
from likeness.pipelines.output import PortraitOutput, check_latent_size, check_output_type
from likeness.pipelines.portrait import PortraitPipeline
from likeness.types import PHOTO, InputError, suggestion

Result = TypeVar("Result")
OnStep = Callable[[int, int], None] | None

METHODS: dict[str, Callable[[Editing], Iterator[None]]] = {
    "replacement": replacement,
    "image_to_image": image_to_image,
    "langevin": langevin,
    "flow_edit": flow_edit,
    "inversion": inversion,
    "inpainting": inpainting,
}
"""Name -> method, which advances `Editing.target` to its end and yields after every step."""

DESCRIBED = ("flow_edit", "inversion")
"""Methods that need a rectified flow and a description of the given image: `source_prompt`, `source_control_image`."""

DEFAULT_METHOD = "replacement"
"""The method that needs no description of the given image, and also adds what it lacks."""


def last(steps: Generator[tuple[int, int], None, Result], on_step: OnStep = None) -> Result:
    """Run all steps; returns their result."""
    while True:
        try:
            done = next(steps)
        except StopIteration as end:
            return end.value
        if on_step is not None:
            on_step(*done)


@torch.no_grad()
def edit_steps(
    pipeline: Any,
    prompt: str | Sequence[str] = "",
    *,
    image: Any,
    mask_image: Any = None,
    strength: float = 1.0,
    method: str = DEFAULT_METHOD,
    source_prompt: str = "",
    source_control_image: Any = None,
    generator: torch.Generator | Sequence[torch.Generator] | None = None,
    output_type: str = "pil",
    callback_on_step_end: Callable[[Any, int, Tensor, dict[str, Any]], dict[str, Any]] | None = None,
    callback_on_step_end_tensor_inputs: Sequence[str] = ("latents",),
    **arguments: Any,
) -> Generator[tuple[int, int], None, PortraitOutput]:
    """Edit an image step by step: yields (steps done, total steps) after every step.

    Args:
        pipeline: an `MMFacePipeline` or `MDiTFacePipeline`.
        prompt: text prompt of the edited image, or a list.
        image: the image, as a path, PIL image, array [H, W, 3] or tensor [3, H, W], integers in [0, 255] or
            float in [0, 1]; resized to the size of the call. A list or a batch has one per prompt.
        mask_image: where to generate, likewise, of any size from 8x8: from 128 (or 0.5, or True) on repainted. It is
            enlarged to whole tokens of the network. Default: the whole image.
        strength: fraction of the steps that run, in (0, 1]. Below 1 the edit starts from the noised image.
        method: name in `METHODS`.
        source_prompt: for the methods in `DESCRIBED`, a prompt that describes the given image.
        source_control_image: for the same methods, the conditions of the given image, as `control_image`.
        generator: as in `PortraitPipeline.__call__`.
        output_type: as in `PortraitPipeline.__call__`.
        callback_on_step_end: as in `PortraitPipeline.__call__`; steps are counted from the first that runs.
        callback_on_step_end_tensor_inputs: likewise.
        arguments: further arguments of `PortraitPipeline.__call__`, such as `control_image`.

    Returns:
        The images and notes; `requests` is empty.

    Raises:
        InputError: an argument is invalid.
    """
    if not isinstance(method, str) or method not in METHODS:
        raise InputError(f"Unknown method {method!r}. {suggestion(str(method), METHODS)}")
    check_output_type(output_type)
    strength = number(strength, "strength")
    if not 0 < strength <= 1:
        raise InputError(f"strength is {strength:g}; it must be greater than 0 and at most 1")
    if not hasattr(pipeline.vae, "encode"):
        name = type(pipeline.vae).__name__
        raise InputError(f"This model has a {name}, which cannot encode images: edit with a model of face images")
    if method == "inpainting" and PHOTO not in pipeline.transformer.config.condition_names:
        raise InputError(
            "inpainting requires a network with the condition photo, and this model has none: train one with "
            "recipes/inpaint_mini.toml, or choose the method replacement"
        )
    embeds = (arguments.pop(name, None) for name in ("prompt_embeds", "pooled_prompt_embeds"))
    prompt = embedded("prompt", prompt, *embeds)
    rows = per_image({"prompt": prompt, "image": one_by_one(image), "mask_image": one_by_one(mask_image)}, 1)
    generate: Any = partial(PortraitPipeline.__call__, pipeline, output_type="sampling")
    prompts = prompt if len(rows) == 1 else [row["prompt"] for row in rows]
    tensor_inputs = callback_inputs(callback_on_step_end, callback_on_step_end_tensor_inputs)
    target = generate(prompts, generator=generator, callback_on_step_end_tensor_inputs=tensor_inputs, **arguments)
    if getattr(target.scheduler, "init_noise_sigma", 1.0) != 1.0:
        name = type(target.scheduler).__name__
        raise InputError(f"{name} scales the noise, which edits do not support: use the scheduler of the checkpoint")
    source = None
    if method in DESCRIBED:
        if not isinstance(target.objective, RectifiedFlow):
            message = f"{method} requires a rectified flow, and this model is a DDPM: choose the method replacement"
            raise InputError(message)
        own: dict[str, Any] = {
            **arguments,
            "control_image": source_control_image,
            "guidance_scale": 1.0,
            "negative_prompt": None,
            "latents": target.latents,
        }
        given = source_control_image if isinstance(source_control_image, Mapping) else {}
        for name in ("conditioning_scale", "control_guidance_start", "control_guidance_end"):
            if isinstance(own.get(name), Mapping):  # of the conditions of the edited image
                own[name] = {key: value for key, value in own[name].items() if key in given}
        source = generate([source_prompt] * len(rows), **own)
    elif source_prompt or source_control_image is not None:
        target.notes.append(f"source_prompt and source_control_image have no effect with the method {method}")
    count, _, *grid = target.latents.shape
    factor = spatial_factor(pipeline.vae)
    if output_type == "latent":
        check_latent_size(target.size, (grid[1] * factor, grid[0] * factor))
    device, each = target.latents.device, count // len(rows)
    pixels = to_tensor([read_image(row.get("image"), grid[0] * factor, grid[1] * factor) for row in rows]).to(device)
    regions = [latent_region(row.get("mask_image"), grid, pipeline.patch_size) for row in rows]
    generators = list(generator) if isinstance(generator, Sequence) else generator
    editing = Editing(
        target=target,
        source=source,
        clean=pipeline.codec.encode(pixels).repeat_interleave(each, dim=0),
        region=torch.from_numpy(np.concatenate(regions)).to(device).repeat_interleave(each, dim=0),
        start=target.steps - max(1, int(target.steps * strength)),
        draw=lambda: pipeline.prepare_latents(None, count, target.latents, generators),
    )
    call = copy.copy(pipeline)  # components are shared, the state that callbacks see is not
    call._interrupt, call._num_timesteps = False, target.steps - editing.start
    call._guidance_scale = target.guidance_scale
    for i, _ in enumerate(METHODS[method](editing)):
        if callback_on_step_end is not None:
            tensors = dict.fromkeys(tensor_inputs, target.latents)
            timestep = target.scheduler.timesteps[target.step - 1]
            target.latents = changed_latents(callback_on_step_end(call, i, timestep, tensors), target.latents)
            target.guide(call._guidance_scale)
        yield i + 1, call.num_timesteps
        if call.interrupt:
            break
    images = pipeline.decode(target.latents, output_type, target.size)
    return PortraitOutput(images=images, notes=target.notes, pipeline=pipeline)


def one_by_one(images: Any) -> Any:
    """Split a batch of images, a tensor [B, 3, H, W] or an array [B, H, W, 3]."""
    return list(images) if isinstance(images, (Tensor, np.ndarray)) and images.ndim == 4 else images


def read_pixels(image: Any, name: str, background: Literal["white", "black"] = "white") -> Image.Image:
    """Read a path, PIL image, array or tensor, integers in [0, 255] or float in [0, 1]; transparent
    pixels show `background`. Raises `InputError`.
    """
    if isinstance(image, Tensor):
        image = image.movedim(0, -1) if image.ndim == 3 else image  # [H, W, 3]
        image = (image.float() if image.is_floating_point() else image).cpu().numpy()
    if isinstance(image, np.ndarray):
        if image.dtype.kind not in "buif":
            raise InputError(f"{name} has the dtype {image.dtype}; it must be uint8 or float")
        white = 255 if image.dtype.kind in "ui" else 1
        if image.size and not (image.min() >= 0 and image.max() <= white):  # also NaN
            raise InputError(f"{name} has values from {image.min()} to {image.max()}; they must be in [0, {white}]")
        values = image if white == 255 else np.rint(255 * image.astype(np.float32))
        values = values.squeeze(-1) if values.shape[2:] == (1,) else values
        if values.ndim not in (2, 3) or values.shape[2:] not in ((), (3,), (4,)):
            raise InputError(f"{name} has shape {list(image.shape)}; it must be [H, W] or [H, W, 3]")
        image = Image.fromarray(values.astype(np.uint8))
    if not isinstance(image, (str, Path, Image.Image)):
        raise InputError(f"{name} is of type {type(image).__name__}; it must be a path, PIL image, array or tensor")
    return read_rgb(image, name, background=background)


def read_image(image: Any, height: int, width: int) -> np.ndarray:
    """Read an image and resize it, uint8 [height, width, 3]. Raises `InputError` for another aspect ratio."""
    found = read_pixels(image, "image")
    check_aspect((found.height, found.width), (height, width), "image to edit")
    return np.array(found.resize((width, height), Image.Resampling.LANCZOS))


def latent_region(mask: Any, grid: Sequence[int], patch: int) -> np.ndarray:
    """Convert a mask of any size to the latent pixels of all tokens that it touches, bool [1, 1, h, w].

    Raises:
        InputError: the mask is empty.
    """
    height, width = (side // patch for side in grid)
    if mask is None:
        tokens = np.ones((height, width), bool)
    else:
        found = np.asarray(read_pixels(mask, "mask_image", "black").convert("L"))
        rows, columns = overlaps(height, found.shape[0]), overlaps(width, found.shape[1])
        tokens = rows @ (found >= 128) @ columns.T > 0
        if not tokens.any():
            raise InputError("mask_image is all black (below 128, or 0.5): paint white where the image is to change")
    return tokens.repeat(patch, 0).repeat(patch, 1)[None, None]


def overlaps(tokens: int, pixels: int) -> np.ndarray:
    """Return which tokens along a side overlap which pixels of a mask: 1 or 0, float32 [tokens, pixels]."""
    token, pixel = np.arange(tokens)[:, None], np.arange(pixels)
    return ((token * pixels < (pixel + 1) * tokens) & (pixel * tokens < (token + 1) * pixels)).astype(np.float32)
