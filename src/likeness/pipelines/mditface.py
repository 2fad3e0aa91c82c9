"""Generate face images from text and any number of spatial conditions with MDiTFace (arXiv 2511.12631).

Components are named as in diffusers' FLUX folders, so that FLUX.1-dev and -schnell are base models; a model trained
from scratch has one text encoder. The static pathway runs once per generation, and its cache is read at every step.

P passes through the network, K active conditions.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import torch
from diffusers import AutoencoderDC, AutoencoderKL, AutoencoderTiny, SchedulerMixin
from transformers import CLIPTextModel, CLIPTokenizer, T5EncoderModel, T5TokenizerFast

from likeness.models.mditface import PATCH, MDiTFaceTransformer, select
from likeness.pipelines.portrait import PortraitPipeline
from likeness.pipelines.sampling import EncodedBatch, Passes
from likeness.types import ConditionInput, InputError, TextFeatures

DEFAULTS: dict[str, Any] = {"size": 512, "steps": 28, "guidance_scale": 3.5, "guidance_interval": (0.0, 1.0)}
"""Default `defaults` of a checkpoint."""


class MDiTFacePipeline(PortraitPipeline):
    """Generate face images from any subset of text, mask, sketch and keypoints. LoRAs for FLUX.1 load as in diffusers.

    Arguments are those of `MMFacePipeline`, except:

    Args:
        transformer: the network. If it is guidance-distilled (`guidance_embeds`), it embeds `guidance_scale`, and there
            is no negative prompt; otherwise `guidance_scale` is that of classifier-free guidance.
        text_encoder: a CLIP text model for the pooled vector; if it is the only text encoder, for the tokens, too.
        scheduler: the sampler of the objective. If its configuration has `use_dynamic_shifting`, timesteps shift
            towards noise with the size of the image (`likeness.objectives.flow.dynamic_shift`).
        text_encoder_2: the T5 encoder for the tokens, or None.
        tokenizer_2: its tokenizer.
        latent_mean: mean of the autoencoder's latents, one number or one per channel. Default: its `shift_factor`.
        latent_std: their standard deviation. Default: 1 / `scaling_factor`.

    Raises `InputError` if the transformer is not an `MDiTFaceTransformer`, or a T5 encoder has no tokenizer.
    """

    model_cpu_offload_seq = "text_encoder->text_encoder_2->transformer->vae"
    _optional_components: ClassVar = [
        "text_encoder",
        "tokenizer",
        "text_encoder_2",
        "tokenizer_2",
    ]  # a list in diffusers
    patch_size = PATCH

    def __init__(
        self,
        transformer: MDiTFaceTransformer,
        vae: AutoencoderDC | AutoencoderKL | AutoencoderTiny,
        text_encoder: CLIPTextModel | None,
        tokenizer: CLIPTokenizer | None,
        scheduler: SchedulerMixin,
        text_encoder_2: T5EncoderModel | None = None,
        tokenizer_2: T5TokenizerFast | None = None,
        objective: dict[str, Any] | None = None,
        latent_mean: float | list[float] | None = None,
        latent_std: float | list[float] | None = None,
        text_layer: int = -2,
        max_text_tokens: int = 512,
        condition_resize: str = "exact",
        defaults: dict[str, Any] | None = None,
        sizes: Sequence[Sequence[int]] | str | None = None,
    ) -> None:
        super().__init__()
        if not isinstance(transformer, MDiTFaceTransformer):
            raise InputError(
                f"The transformer is a {type(transformer).__name__}: load FLUX.1 with likeness.load(folder), or pass "
                "transformer=MDiTFaceTransformer.from_pretrained(folder, subfolder='transformer')"
            )
        if (text_encoder_2 is None) != (tokenizer_2 is None):
            raise InputError("text_encoder_2 and tokenizer_2 must both be set or both be None")
        self.register_modules(
            transformer=transformer,
            vae=vae,
            text_encoder=text_encoder,
            tokenizer=tokenizer,
            scheduler=scheduler,
            text_encoder_2=text_encoder_2,
            tokenizer_2=tokenizer_2,
        )
        own_mean, own_std = vae.config.get("shift_factor") or 0.0, 1 / (vae.config.get("scaling_factor") or 1.0)
        self.register_settings(
            DEFAULTS,
            objective=objective,
            latent_mean=own_mean if latent_mean is None else latent_mean,
            latent_std=own_std if latent_std is None else latent_std,
            text_layer=text_layer,
            max_text_tokens=max_text_tokens,
            condition_resize=condition_resize,
            defaults=defaults,
            sizes=sizes,
        )

    def check_network(self, prompts: Sequence[Any], negatives: Sequence[Any]) -> None:
        """Raise `InputError` for negative prompts of a guidance-distilled network."""
        if self.transformer.config.guidance_embeds and any(negatives):
            found = next(filter(None, negatives))
            shown = repr(found) if isinstance(found, str) else "negative_prompt_embeds"
            raise InputError(f"A guidance-distilled network has no negative prompt: leave {shown} out")

    def pass_function(self, batch: EncodedBatch, group: Sequence[int]) -> Callable[[int], Passes]:
        """Return the function from a step to the passes of a group of images: those with prompts, then those with
        negative prompts. In v = u + g (t - u), g = 1 needs only the first and g = 0 only the second.
        """
        config, device, steps = self.transformer.config, batch.times.device, len(batch.guidance)
        distilled = config.guidance_embeds
        guided = [item for item in group if batch.prompts[item] != batch.negatives[item] and not distilled]
        items = [*group, *guided]
        texts = [batch.prompts[item] for item in group] + [batch.negatives[item] for item in guided]
        text = TextFeatures(batch.text.tokens[texts], batch.text.pooled[texts])  # [P, L, T], [P, P']

        # Conditions that are active at some step, in the order of the network's ids
        own = [batch.conditions[item] for item in items]
        active = [{name for row in own for name, c in row.items() if c.is_active(i / steps)} for i in range(steps)]
        names = [name for name in config.condition_names if any(name in at_step for at_step in active)]
        numbers = [[batch.latent_indices[item].get(name, 0) for name in names] for item in items]
        index = torch.tensor(numbers, dtype=torch.long, device=device)  # [P, K]
        latents, ids = batch.condition_latents[index], batch.condition_ids[index]  # [P, K, C, h, w], [P, K]
        cache = None
        if names and config.attention in ("hard", "decoupled"):
            with self.transformer.cache_disabled():
                cache = self.transformer.static_cache(text, latents, ids)

        def strength(condition: ConditionInput | None, progress: float) -> float:
            """Return the scale of an image's condition; 1 if it has none, which `index` says."""
            return 1.0 if condition is None else condition.scale * condition.is_active(progress)

        def passes_at(step: int) -> Passes:
            scale = 1.0 if distilled else batch.guidance[step]
            start = len(group) if scale == 0 and len(guided) == len(group) else 0
            stop = len(group) if scale == 1 else len(items)
            keep = [k for k, name in enumerate(names) if name in active[step]]
            arguments: dict[str, Any] = {
                "text": TextFeatures(*(x[start:stop] for x in text)),
                "condition_latents": latents[start:stop, keep],
                "condition_index": ids[start:stop, keep],
            }
            shared = {"all_present": all(numbers[p][k] for p in range(start, stop) for k in keep)}
            if cache is not None and keep:
                arguments["static_cache"] = select(cache, start, stop, keep, len(names))
            scales = [[strength(own[p].get(names[k]), step / steps) for k in keep] for p in range(start, stop)]
            if any(s != 1 for row in scales for s in row):
                arguments["condition_scale"] = torch.tensor(scales, device=device)  # [P, K]
            if distilled:
                arguments["guidance"] = torch.full((stop - start,), batch.guidance[step], device=device)  # [P]
            weights = [scale if item in guided else 1.0 for item in group] + [1 - scale] * len(guided)
            kinds = [f"{keep} {'positive' if p < len(group) else 'negative'}" for p in range(start, stop)]
            return Passes(items[start:stop], weights[start:stop], arguments, shared, kinds)

        return passes_at

    def enable_sequential_cpu_offload(self, *args: Any, **kwargs: Any) -> None:
        """As in diffusers, but rejected if weights are tied: its hooks look up each weight under one name only."""
        if self.transformer.tied:
            raise InputError(
                "enable_sequential_cpu_offload is not supported, because the image and the spatial stream share their "
                "weights: use enable_group_offload(onload_device, offload_type='leaf_level')"
            )
        super().enable_sequential_cpu_offload(*args, **kwargs)
