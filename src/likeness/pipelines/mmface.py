"""Generate face images from text and spatial conditions with MMFace-DiT (arXiv 2603.29029).

The network takes one condition per pass; several are combined in the prediction (`likeness.pipelines.guidance`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import torch
from diffusers import AutoencoderDC, AutoencoderKL, AutoencoderTiny, SchedulerMixin
from transformers import CLIPTextModel, CLIPTokenizer

from likeness.models.mmface import MMFaceTransformer
from likeness.pipelines.guidance import passes
from likeness.pipelines.portrait import PortraitPipeline
from likeness.pipelines.sampling import EncodedBatch, Passes
from likeness.types import InputError, TextFeatures

DEFAULTS: dict[str, Any] = {"size": 256, "steps": 50, "guidance_scale": 7.5, "guidance_interval": (0.0, 1.0)}
"""Default `defaults` of a checkpoint."""


class MMFacePipeline(PortraitPipeline):
    """Generate face images from any subset of text, mask, sketch and keypoints.

    Args:
        transformer: the network.
        vae: the autoencoder that it was trained with; None if a converted folder lacks it.
        text_encoder: the CLIP text model that it was trained with, likewise.
        tokenizer: its tokenizer.
        scheduler: the sampler of the objective.
        objective: configuration of the objective (`likeness.objectives.make_objective`).
        latent_mean: mean of the autoencoder's latents, one number or one per channel.
        latent_std: their standard deviation.
        text_layer: hidden state of the text model that is used as tokens.
        max_text_tokens: length to which captions are padded.
        condition_resize: `exact` never mixes labels; `lanczos` resizes rendered conditions as images, as in the
            training of the released weights.
        defaults: `size`, `steps`, `guidance_scale`, `guidance_interval` of this checkpoint.
        sizes: Sizes it was trained at, (width, height) in pixels, for example [[128, 128]], or "any". Default: the
            square of `defaults["size"]`.
    """

    model_cpu_offload_seq = "text_encoder->transformer->vae"
    _optional_components: ClassVar = ["vae", "text_encoder", "tokenizer"]  # diffusers concatenates lists

    def __init__(
        self,
        transformer: MMFaceTransformer,
        vae: AutoencoderDC | AutoencoderKL | AutoencoderTiny | None,
        text_encoder: CLIPTextModel | None,
        tokenizer: CLIPTokenizer | None,
        scheduler: SchedulerMixin,
        objective: dict[str, Any] | None = None,
        latent_mean: float | list[float] = 0.0,
        latent_std: float | list[float] = 1.0,
        text_layer: int = -2,
        max_text_tokens: int = 77,
        condition_resize: str = "exact",
        defaults: dict[str, Any] | None = None,
        sizes: Sequence[Sequence[int]] | str | None = None,
    ) -> None:
        super().__init__()
        self.register_modules(
            transformer=transformer, vae=vae, text_encoder=text_encoder, tokenizer=tokenizer, scheduler=scheduler
        )
        self.register_settings(
            DEFAULTS,
            objective=objective,
            latent_mean=latent_mean,
            latent_std=latent_std,
            text_layer=text_layer,
            max_text_tokens=max_text_tokens,
            condition_resize=condition_resize,
            defaults=defaults,
            sizes=sizes,
        )

    @property
    def patch_size(self) -> int:
        """Side of the network's patches, in latent pixels."""
        return self.transformer.config.patch_size

    def check_network(self, prompts: Sequence[Any], negatives: Sequence[Any]) -> None:
        """Raise `InputError` if a component is missing, as in a converted folder."""
        needed = self._optional_components if any(isinstance(text, str) for text in prompts) else ("vae",)
        if missing := [name for name in needed if getattr(self, name) is None]:
            raise InputError(
                f"This checkpoint has no {' and no '.join(missing)}: convert it again with --text-encoder and --vae"
            )

    def pass_function(self, batch: EncodedBatch, group: Sequence[int]) -> Callable[[int], Passes]:
        """Return the function from a step to the passes of a group of images."""
        height, width = batch.condition_latents.shape[-2:]
        device = batch.condition_latents.device
        rope = self.transformer.rope(height, width, batch.text.tokens.shape[1], device)

        def passes_at(step: int) -> Passes:
            items, weights, texts, latents, kinds = [], [], [], [], []
            for item in group:
                guidance = batch.guidance[step] if batch.prompts[item] != batch.negatives[item] else 1.0
                for condition, negative, weight in passes(batch.conditions[item], guidance, step / len(batch.guidance)):
                    items.append(item)
                    weights.append(weight)
                    texts.append((batch.negatives if negative else batch.prompts)[item])
                    kinds.append(f"{condition} {'negative' if negative else 'positive'}")
                    latents.append(0 if condition is None else batch.latent_indices[item][condition])
            text, index = torch.tensor(texts, device=device), torch.tensor(latents, device=device)  # [P] each
            arguments = {
                "text": TextFeatures(batch.text.tokens[text], batch.text.pooled[text]),  # [P, L, D], [P, D]
                "condition_latents": batch.condition_latents[index][:, None],  # [P, 1, C, h, w]
                "condition_index": batch.condition_ids[index][:, None],  # [P, 1]
            }
            return Passes(items, weights, arguments, {"rope": rope}, kinds)

        return passes_at
