"""Edit an image with a pipeline of either network: repaint a region, or change the whole image.

The arguments are diffusers': `image`, `mask_image` (white is repainted) and `strength`. No method keeps pixels, since
the autoencoder changes them all: `likeness.prepare.edit` pastes the region into the photograph.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator, Sequence
from typing import Any, TypeVar

import numpy as np
import torch
from PIL import Image

from likeness.conditions.images import check_aspect, read_rgb
from likeness.encoders.latent import spatial_factor, to_tensor
from likeness.objectives.flow import RectifiedFlow
from likeness.pipelines.arguments import number
from likeness.pipelines.editing.base import Editing
from likeness.pipelines.editing.flow_edit import flow_edit
from likeness.pipelines.editing.inpainting import inpainting
from likeness.pipelines.editing.inversion import inversion
from likeness.pipelines.editing.langevin import langevin
from likeness.pipelines.editing.replacement import image_to_image, replacement
from likeness.pipelines.portrait import PortraitOutput
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
"""The method that measures best (`benchmarks/edit.py`)."""


def edit(pipeline: Any, prompt: str = "", *, on_step: OnStep = None, **arguments: Any) -> PortraitOutput:
    """Edit an image.

    Args:
        pipeline: an `MMFacePipeline` or `MDiTFacePipeline`.
        prompt: text prompt of the edited image.
        on_step: called after every step as (steps done, total steps).
        arguments: those of `edit_steps`.

    Returns:
        The images and notes; `requests` is empty.

    Raises:
        InputError: an argument is invalid.
    """
    return last(edit_steps(pipeline, prompt, **arguments), on_step)


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
    prompt: str = "",
    *,
    image: Any,
    mask_image: Any = None,
    strength: float = 1.0,
    method: str = DEFAULT_METHOD,
    source_prompt: str = "",
    source_control_image: Any = None,
    generator: torch.Generator | Sequence[torch.Generator] | None = None,
    output_type: str = "pil",
    **arguments: Any,
) -> Generator[tuple[int, int], None, PortraitOutput]:
    """Edit an image step by step: yields (steps done, total steps) after every step.

    Args:
        pipeline: an `MMFacePipeline` or `MDiTFacePipeline`.
        prompt: text prompt of the edited image.
        image: the image, as a path, PIL image or uint8 array [H, W, 3]; resized to the size of the call.
        mask_image: where to generate: a path, PIL image or array [H, W] of any size, from 128 on (or True) repainted.
            It is enlarged to whole tokens of the network. Default: the whole image.
        strength: fraction of the steps that run, in (0, 1]. Below 1 the edit starts from the noised image.
        method: name in `METHODS`.
        source_prompt: for the methods in `DESCRIBED`, a prompt that describes the given image.
        source_control_image: for the same methods, the conditions of the given image, as `control_image`.
        generator: as in `PortraitPipeline.__call__`.
        output_type: as in `PortraitPipeline.__call__`.
        arguments: further arguments of `PortraitPipeline.__call__`, such as `control_image`.

    Returns:
        The images and notes; `requests` is empty.

    Raises:
        InputError: an argument is invalid.
    """
    if method not in METHODS:
        raise InputError(f"Unknown method {method!r}. {suggestion(method, METHODS)}")
    strength = number(strength, "strength")
    if not 0 < strength <= 1:
        raise InputError(f"strength is {strength:g}; it must be greater than 0 and at most 1")
    if method == "inpainting" and PHOTO not in pipeline.transformer.config.condition_names:
        raise InputError(
            "inpainting requires a network with the condition photo, and this model has none: train one with "
            "recipes/inpaint_mini.toml, or choose the method replacement"
        )
    target = pipeline(prompt, generator=generator, output_type="sampling", **arguments)
    if getattr(target.scheduler, "init_noise_sigma", 1.0) != 1.0:
        name = type(target.scheduler).__name__
        raise InputError(f"{name} scales the noise, which edits do not support: use the scheduler of the checkpoint")
    source = None
    if method in DESCRIBED:
        if not isinstance(target.objective, RectifiedFlow):
            message = f"{method} requires a rectified flow, and this model is a DDPM: choose the method replacement"
            raise InputError(message)
        own = {**arguments, "control_image": source_control_image, "guidance_scale": 1.0, "negative_prompt": None}
        source = pipeline(source_prompt, latents=target.latents, output_type="sampling", **own)
    count, _, *grid = target.latents.shape
    factor = spatial_factor(pipeline.vae)
    pixels = to_tensor([read_image(image, grid[0] * factor, grid[1] * factor)]).to(target.latents.device)
    generators = list(generator) if isinstance(generator, Sequence) else generator
    editing = Editing(
        target=target,
        source=source,
        clean=pipeline.codec.encode(pixels).expand(count, -1, -1, -1),
        region=torch.from_numpy(latent_region(mask_image, grid, pipeline.patch_size)).to(target.latents.device),
        start=target.steps - max(1, int(target.steps * strength)),
        draw=lambda: pipeline.prepare_latents(None, count, target.latents, generators),
    )
    for done, _ in enumerate(METHODS[method](editing), start=1):
        yield done, target.steps - editing.start
    images = pipeline.decode(target.latents, output_type, target.size)
    return PortraitOutput(images=images, notes=target.notes, pipeline=pipeline)


def read_image(image: Any, height: int, width: int) -> np.ndarray:
    """Read an image and resize it, uint8 [height, width, 3]. Raises `InputError` for another aspect ratio."""
    found = read_rgb(Image.fromarray(image) if isinstance(image, np.ndarray) else image, "image")
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
        found = np.asarray(mask if isinstance(mask, np.ndarray) else read_rgb(mask, "mask_image").convert("L"))
        rows, columns = np.nonzero(found if found.dtype == bool else found >= 128)
        tokens = np.zeros((height, width), bool)
        tokens[rows * height // found.shape[0], columns * width // found.shape[1]] = True
        if not tokens.any():
            raise InputError("mask_image is all black: paint white where the image is to change")
    return tokens.repeat(patch, 0).repeat(patch, 1)[None, None]
