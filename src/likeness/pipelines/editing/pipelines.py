"""Image-to-image and inpainting pipelines with diffusers' names and arguments, for both networks.

They are text-to-image pipelines whose call is `edit_steps`. `from_pipe` converts between them and shares all weights.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

from likeness.pipelines.adapters import scaled_loras
from likeness.pipelines.editing import DEFAULT_METHOD, edit_steps, last
from likeness.pipelines.mditface import MDiTFacePipeline
from likeness.pipelines.mmface import MMFacePipeline
from likeness.pipelines.output import PortraitOutput
from likeness.pipelines.portrait import PortraitPipeline


class Inpainting(PortraitPipeline):
    """The call of an inpainting pipeline."""

    @scaled_loras
    def __call__(
        self,
        prompt: str | Sequence[str] = "",
        image: Any = None,
        mask_image: Any = None,
        *,
        strength: float = 1.0,
        method: str = DEFAULT_METHOD,
        return_dict: bool = True,
        attention_kwargs: Any = None,
        **arguments: Any,
    ) -> PortraitOutput:
        """Generate the white region of `mask_image` again. Pixels outside it change, too, by encoding and decoding.

        Args:
            prompt: text prompt of the edited image, or a list.
            image: the image, or a list with one per prompt.
            mask_image: where to generate, white is repainted.
            strength: fraction of the steps that run, in (0, 1].
            method: name in `likeness.pipelines.editing.METHODS`.
            return_dict: whether to return a `PortraitOutput` or the tuple (images,).
            attention_kwargs: {"scale": factor of all LoRAs}.
            arguments: further arguments of `edit_steps` and of the text-to-image pipeline, such as `control_image`,
                `num_inference_steps`, `num_images_per_prompt`, `generator`, `output_type` and `callback_on_step_end`.

        Raises:
            InputError: an argument is invalid.
        """
        steps = edit_steps(
            self, prompt, image=image, mask_image=mask_image, strength=strength, method=method, **arguments
        )
        with self.progress_bar(total=0) as progress:

            def on_step(_: int, total: int) -> None:
                progress.total = total
                progress.update()

            output = last(steps, on_step)
        self.maybe_free_model_hooks()
        return output if return_dict else cast(Any, (output.images,))

    def save_pretrained(self, *args: Any, **kwargs: Any) -> None:
        """Save a folder of the text-to-image pipeline, which all classes of the network load."""
        generation = MMFacePipeline if isinstance(self, MMFacePipeline) else MDiTFacePipeline
        generation.from_pipe(self).save_pretrained(*args, **kwargs)


class ImageToImage(Inpainting):
    """The call of an image-to-image pipeline."""

    def __call__(
        self, prompt: str | Sequence[str] = "", image: Any = None, *, strength: float = 0.6, **arguments: Any
    ) -> PortraitOutput:
        """Change a whole image; the arguments are those of `Inpainting.__call__` without `mask_image`."""
        return super().__call__(prompt, image, strength=strength, **arguments)


class MMFaceInpaintPipeline(Inpainting, MMFacePipeline):
    """Generate a region of an image again with MMFace-DiT."""


class MMFaceImg2ImgPipeline(ImageToImage, MMFacePipeline):
    """Change an image with MMFace-DiT."""


class MDiTFaceInpaintPipeline(Inpainting, MDiTFacePipeline):
    """Generate a region of an image again with MDiTFace."""


class MDiTFaceImg2ImgPipeline(ImageToImage, MDiTFacePipeline):
    """Change an image with MDiTFace."""
