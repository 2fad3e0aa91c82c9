"""What a pipeline returns: images of a type, with notes and the requests that generate them again."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers.utils import BaseOutput
from PIL import Image
from torch import Tensor

from likeness.pipelines.adapters import active_adapters
from likeness.pipelines.formats import numbered
from likeness.pipelines.image_recipe import environment, recipe_of, write_image
from likeness.types import InputError, PortraitRequest
from likeness.weights.hashes import pipeline_hash


@dataclass
class PortraitOutput(BaseOutput):
    """The images of a call, and notes on its inputs."""

    images: Any
    """B images: PIL images, float32 array [B, H, W, 3] in [0, 1], tensor [B, 3, H, W] in [0, 1], or latents."""
    notes: list[str] = field(default_factory=list)
    """The recognized format of each condition, truncated words of a prompt, and arguments without effect; one sentence
    each."""
    requests: list[PortraitRequest] = field(default_factory=list, repr=False)
    """The request of each image with its seed; empty if requests cannot describe the call."""
    pipeline: Any = field(default=None, repr=False)
    """A copy of the pipeline with its scheduler and settings during the call; the networks are shared."""
    adapters: dict[str, Any] = field(default_factory=dict, repr=False)
    """`active_adapters` of the call, if it has requests."""
    environment: dict[str, Any] = field(default_factory=dict, repr=False)
    """`likeness.pipelines.image_recipe.environment` of the call, likewise."""

    def save(self, path: str | Path) -> list[Path]:
        """Write the images with their recipes, as `likeness generate` does; `likeness replay` generates them again.

        `path` is a .png, .jpg or .webp file. Several images are numbered: `face.png` becomes `face-1.png`, ... Return
        the files. Raises `InputError` if the images are no PIL images or have no recipe, the adapters or the dtype of
        the pipeline have changed since the call, or a file cannot be written.
        """
        if not all(isinstance(image, Image.Image) for image in self.images):
            raise InputError("Only PIL images can be saved with a recipe: leave output_type out")
        if not self.requests:
            raise InputError(
                "These images have no recipe: pass generator=[torch.Generator().manual_seed(seed)], one new generator "
                "per image, without latents, guidance_interval, guidance_model, attention_kwargs and callback, or save "
                "images[0] instead; recipes of edits are written by likeness.prepare.edit.edit_photo"
            )
        now = active_adapters(self.pipeline), environment(self.pipeline)["dtype"]
        if now != (self.adapters, self.environment["dtype"]):
            raise InputError(
                "The adapters or the dtype of the pipeline have changed since the call, so its recipe cannot be "
                "written: save the images before the change, or save images[0] instead"
            )
        file, fingerprint = Path(path), pipeline_hash(self.pipeline)
        source = getattr(self.pipeline, "source", {"model": self.pipeline.config.get("_name_or_path") or "unknown"})
        files = numbered(file, len(self.images))
        for image, request, name in zip(self.images, self.requests, files, strict=True):
            recipe = recipe_of(request, self.pipeline, **source, fingerprint=fingerprint, known=self.environment)
            write_image(image, name, recipe)
        return files


def check_output_type(output_type: Any) -> None:
    """Raise `InputError` for an output type that `PortraitPipeline.decode` does not know."""
    if output_type not in ("pil", "np", "pt", "latent"):
        raise InputError(f"output_type is {output_type!r}; choose pil, np, pt or latent")


def check_latent_size(size: tuple[int, int], generated: tuple[int, int]) -> None:
    """Raise `InputError` if images would be resampled from the generated size, which latents cannot be."""
    if generated != size:
        raise InputError("Latents cannot be upscaled: choose another output_type, or leave upscale out")


def resample(images: Tensor, width: int, height: int) -> Tensor:
    """Resample images [B, 3, H, W] in [-1, 1] to [B, 3, height, width] with Pillow's Lanczos filter.

    Values are clamped first and computed in float32 on the CPU.
    """
    channels = [Image.fromarray(channel) for channel in images.flatten(0, 1).float().clamp(-1, 1).cpu().numpy()]
    resized = [np.asarray(channel.resize((width, height), Image.Resampling.LANCZOS)) for channel in channels]
    return torch.from_numpy(np.stack(resized)).unflatten(0, (-1, 3)).to(images.device)  # [B, 3, height, width]
