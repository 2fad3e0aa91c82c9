"""Generate the images of a request: the common path of the command line, previews and evaluation."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from PIL import Image

from likeness.conditions import read_conditions
from likeness.encoders.latent import spatial_factor
from likeness.pipelines.sizes import generation_size
from likeness.types import InputError, PortraitRequest

SEED_LIMIT = 2**63

BATCH = 4
"""Images per batch on an accelerator."""


def resolve(request: PortraitRequest, pipeline: Any) -> PortraitRequest:
    """Complete a request: read its conditions, and set unset fields to the checkpoint's defaults. Raises `InputError`
    if a condition cannot be read, the seed is out of range, or the model was not trained at the size.
    """
    check_seed(request.seed)
    defaults = pipeline.config.defaults
    request, _ = read_conditions(request)
    width, height = (defaults["size"] if side is None else side for side in (request.width, request.height))
    generation_size(pipeline.config, (width, height), upscale=request.upscale, force_size=request.force_size)
    return dataclasses.replace(
        request,
        guidance_scale=float(defaults["guidance_scale"] if request.guidance_scale is None else request.guidance_scale),
        num_inference_steps=defaults["steps"] if request.num_inference_steps is None else request.num_inference_steps,
        height=height,
        width=width,
    )


def check_seed(seed: Any) -> None:
    """Raise `InputError` if a seed is out of range."""
    if not isinstance(seed, int) or not 0 <= seed < SEED_LIMIT:
        raise InputError(f"The seed is {seed}; it must be a whole number from 0 to 2^63 - 1")


def work_of(pipeline: Any, height: int, width: int) -> float:
    """Estimate the work of one pass through the network at an image size, for `likeness.runtime.choose_threads`:
    weights of the network times image tokens, about the multiplications of the pass.
    """
    weights = sum(weight.numel() for weight in pipeline.transformer.parameters())
    return weights * height * width / (spatial_factor(pipeline.vae) * pipeline.patch_size) ** 2


def batches(
    requests: Sequence[PortraitRequest], pipeline: Any, *, single: bool = False
) -> Iterator[tuple[int, Sequence[PortraitRequest]]]:
    """Yield batches of resolved requests, equal but for their seeds, each with the number of images before it. On a
    CPU, or with `single`, a batch is a single image: there, larger ones take as long per image.
    """
    size = 1 if single or pipeline._execution_device.type == "cpu" else BATCH
    for start in range(0, len(requests), size):
        yield start, requests[start : start + size]


def generate(
    pipeline: Any,
    request: PortraitRequest,
    seeds: Sequence[int],
    on_step: Callable[[int, int], None] | None = None,
    encoded: dict[Any, Any] | None = None,
) -> tuple[list[Image.Image], list[str]]:
    """Generate one image per seed of a resolved request, whose own seed is ignored. `on_step` is called after every
    step as (steps done, total steps); `encoded` is the cache of `PortraitPipeline.__call__`. Also return notes on
    truncated words of the prompts.
    """

    def report(pipe: Any, i: int, timestep: torch.Tensor, tensors: dict[str, Any]) -> dict[str, Any]:
        if on_step is not None:
            on_step(i + 1, request.num_inference_steps or i + 1)
        return tensors

    output = pipeline(**call_options(request, seeds), callback_on_step_end=report, encoded=encoded)
    return output.images, output.notes


def call_options(request: PortraitRequest, seeds: Sequence[int]) -> dict[str, Any]:
    """Return the arguments of a pipeline call that generates one image of a resolved request per seed."""
    same_name = ("prompt", "negative_prompt", "height", "width", "upscale", "force_size")
    return {name: getattr(request, name) for name in (*same_name, "num_inference_steps", "guidance_scale")} | {
        "control_image": request.conditions,
        "num_images_per_prompt": len(seeds),
        "generator": [torch.Generator().manual_seed(seed) for seed in seeds],
    }
