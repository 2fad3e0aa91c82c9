"""Portraits from words and any number of spatial conditions at once with MDiTFace (arXiv 2511.12631).

Components are named as in diffusers' FLUX folders, so that FLUX.1-dev and -schnell are bases; with one text tower it is
the form of a model trained from scratch. What static pathways make of a request is computed once and read at every
step; a condition that begins or ceases to act is taken from or left out of it.

P passes through the network, K conditions that act.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, ClassVar, NamedTuple

import torch
from diffusers import AutoencoderDC, AutoencoderKL, AutoencoderTiny, SchedulerMixin
from diffusers.loaders import FluxLoraLoaderMixin
from diffusers.utils.peft_utils import recurse_remove_peft_layers
from torch import Tensor
from transformers import CLIPTextModel, CLIPTokenizer, T5EncoderModel, T5TokenizerFast

from likeness.encoders.text import encode_text, encode_text_flux
from likeness.models.mditface import PATCH, MDiTFaceTransformer
from likeness.models.static_cache import StaticCache
from likeness.pipelines.adapters import NAME, load_lora, unload_adapter
from likeness.pipelines.arguments import check_settings
from likeness.pipelines.portrait import Call, Job, PortraitPipeline
from likeness.types import InputError, TextFeatures

DEFAULTS: dict[str, Any] = {"size": 512, "steps": 28, "guidance_scale": 3.5, "guidance_interval": (0.0, 1.0)}
"""What a request leaves open, where a checkpoint does not say otherwise."""


class MDiTFacePipeline(PortraitPipeline, FluxLoraLoaderMixin):
    """Text, mask, sketch and keypoints, in any subset, to portraits. LoRAs for FLUX.1 load as in diffusers.

    Args:
        transformer: the network. Where it is guidance-distilled (`guidance_embeds`), `guidance_scale` is the value that
            it embeds, and there is no negative prompt; otherwise it is that of classifier-free guidance.
        vae: the autoencoder it was trained on.
        text_encoder: a CLIP text model, which gives the pooled vector; where it is the only one, the tokens, too.
        tokenizer: its tokenizer.
        scheduler: the sampler that inverts the objective. Where its configuration has `use_dynamic_shifting`, steps
            move towards noise with the size of the picture (`likeness.objectives.flow.dynamic_shift`).
        text_encoder_2: the T5 encoder that gives the tokens, or None.
        tokenizer_2: its tokenizer.
        objective: configuration of the objective (`likeness.objectives.make_objective`).
        latent_mean: mean of the autoencoder's latents, one number or one a channel; None takes its `shift_factor`.
        latent_std: their standard deviation; None takes 1 / `scaling_factor`.
        text_layer: which hidden state of a single text model gives the tokens.
        max_text_tokens: length captions are padded to.
        condition_resize: `exact` never blends labels; `lanczos` resizes rendered conditions as pictures.
        defaults: `size`, `steps`, `guidance_scale`, `guidance_interval` of this checkpoint.
        sizes: Sizes it was trained at, (width, height) in pixels, for example [[128, 128]], or "any". Default: the
            square of `defaults["size"]`.

    Raises:
        InputError: the transformer is not ours, or a T5 encoder comes without its tokenizer.
    """

    model_cpu_offload_seq = "text_encoder->text_encoder_2->transformer->vae"
    _optional_components: ClassVar = ["text_encoder_2", "tokenizer_2"]  # diffusers concatenates lists
    patch_size = PATCH

    def __init__(
        self,
        transformer: MDiTFaceTransformer,
        vae: AutoencoderDC | AutoencoderKL | AutoencoderTiny,
        text_encoder: CLIPTextModel,
        tokenizer: CLIPTokenizer,
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
        check_settings(condition_resize, defaults or {}, DEFAULTS, sizes)
        if not isinstance(transformer, MDiTFaceTransformer):
            raise InputError(
                f"the transformer is a {type(transformer).__name__}: load FLUX.1 with likeness.load(folder), or pass "
                "transformer=MDiTFaceTransformer.from_pretrained(folder, subfolder='transformer')"
            )
        if (text_encoder_2 is None) != (tokenizer_2 is None):
            raise InputError("text_encoder_2 and tokenizer_2 belong together: one of them is missing")
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
        self.register_to_config(
            objective=dict(objective or {"name": "rectified_flow"}),
            latent_mean=own_mean if latent_mean is None else latent_mean,
            latent_std=own_std if latent_std is None else latent_std,
            text_layer=text_layer,
            max_text_tokens=max_text_tokens,
            condition_resize=condition_resize,
            defaults={**DEFAULTS, **(defaults or {})},
            sizes=sizes,
        )
        self.loras: dict[str, dict[str, Any]] = {}  # how each was loaded: a picture's recipe says so

    def check_family(self, negatives: Sequence[str]) -> None:
        """Refuse negative prompts where nothing reads them."""
        if self.transformer.config.guidance_embeds and any(negatives):
            found = next(filter(None, negatives))
            raise InputError(f"a guidance-distilled network reads no negative prompt: leave {found!r} out")

    def text_features(self, texts: Sequence[str]) -> TextFeatures:
        """Features of T distinct texts, tokens [T, L, D]."""
        limit, first = self.config.max_text_tokens, (self.tokenizer, self.text_encoder)
        if self.text_encoder_2 is None:
            return encode_text(*first, texts, max_tokens=limit, layer=self.config.text_layer)
        return encode_text_flux(*first, self.tokenizer_2, self.text_encoder_2, texts, max_tokens=limit)

    def calls(self, job: Job, group: Sequence[int]) -> Iterator[Call]:
        """The passes of these pictures, step by step: all with their prompts, then those with negative prompts. In
        v = u + g (t - u), g = 1 needs the first only and g = 0 the others.
        """
        config, device, steps = self.transformer.config, job.times.device, len(job.guidance)
        distilled = config.guidance_embeds
        guided = [item for item in group if job.prompts[item] != job.negatives[item] and not distilled]
        items = [*group, *guided]
        texts = [job.prompts[item] for item in group] + [job.negatives[item] for item in guided]

        # Conditions that act at some step, in the order of the network's rows
        controls = {name: control for item in group for name, control in job.controls[item].items()}
        acting = [{name for name in controls if controls[name].acts(i / steps)} for i in range(steps)]
        names = [name for name in config.condition_names if any(name in active for active in acting)]
        numbers = [[job.conditions[item].get(name, 0) for name in names] for item in items]
        chosen = torch.tensor(numbers, dtype=torch.long, device=device)  # [P, K]
        request = Request(
            TextFeatures(job.text.tokens[texts], job.text.pooled[texts]),
            job.condition_latents[chosen],  # [P, K, C, h, w]
            job.condition_rows[chosen],  # [P, K]
        )
        static = names and config.attention in ("hard", "decoupled")
        cache = self.transformer.static_cache(*request) if static else None

        # Passes start to stop are what a step needs; arguments are made anew where guidance or a condition switches
        now, arguments = None, {}
        for guidance, active in zip(job.guidance, acting, strict=True):
            scale = 1.0 if distilled else guidance
            start = len(group) if scale == 0 and len(guided) == len(group) else 0
            stop = len(group) if scale == 1 else len(items)
            keep = [index for index, name in enumerate(names) if name in active]
            if now != (start, stop, keep):
                now, arguments = (start, stop, keep), request.part(cache, start, stop, keep)
                strengths = [controls[names[index]].scale for index in keep]
                if any(strength != 1 for strength in strengths):
                    scales = torch.tensor(strengths, device=device).expand(stop - start, -1)  # [P, K]
                    arguments["condition_scale"] = scales
            if distilled:
                arguments["guidance"] = torch.full((stop - start,), guidance, device=device)  # [P]
            weights = [scale if item in guided else 1.0 for item in group] + [1 - scale] * len(guided)
            yield Call(items[start:stop], weights[start:stop], arguments)

    def load_lora_weights(
        self,
        pretrained_model_name_or_path_or_dict: str | Mapping[str, Tensor],
        adapter_name: str | None = None,
        *,
        strict: bool = True,
        **kwargs: Any,
    ) -> list[str]:
        """Add a LoRA made for FLUX.1, a style or a step distillation, to those that act already.

        As in diffusers, and in every format that it reads, but a file that does not fit is refused. It changes text and
        image tokens; spatial tokens keep FLUX.1's weights and the adapter's.

        Args:
            pretrained_model_name_or_path_or_dict: a file, folder, hub id or state dict.
            adapter_name: what to call it in `set_adapters`; chosen where not given.
            strict: whether to refuse what fits in part only.
            **kwargs: where it lies on the hub: `weight_name`, `subfolder`, `revision` and the like.

        Returns:
            With `strict=False`, what was left out: one line a weight, with the reason.

        Raises:
            InputError: it is no LoRA, or does not fit; every weight that does not is listed with the reason.
        """
        return load_lora(self, pretrained_model_name_or_path_or_dict, adapter_name, strict=strict, **kwargs)

    def delete_adapters(self, adapter_names: str | Sequence[str]) -> None:
        """As in diffusers; with MDiTFace's own adapter go its conditions."""
        names = [adapter_names] if isinstance(adapter_names, str) else list(adapter_names)
        if NAME in names:
            unload_adapter(self)
        if others := [name for name in names if name != NAME]:
            super().delete_adapters(others)
            self.loras = {name: entry for name, entry in self.loras.items() if name not in others}
        for network in (self.transformer, self.text_encoder):
            if not getattr(network, "peft_config", {}):
                recurse_remove_peft_layers(network)  # what is left would give the weights other names in a folder

    def unload_lora_weights(self, *args: Any, **kwargs: Any) -> None:
        """Remove all LoRAs; with MDiTFace's own adapter go its conditions."""
        unload_adapter(self)
        super().unload_lora_weights(*args, **kwargs)
        self.loras = {}

    def save_pretrained(self, *args: Any, **kwargs: Any) -> None:
        """As in diffusers, but refused with LoRAs on: the folder could not be read again."""
        if any(getattr(network, "peft_config", {}) for network in (self.transformer, self.text_encoder)):
            raise InputError("LoRAs are no part of a model folder: save an adapter with `save_adapter`, or unload them")
        super().save_pretrained(*args, **kwargs)


class Request(NamedTuple):
    """What P passes read."""

    text: TextFeatures
    """Prompts, tokens [P, L, T]."""
    condition_latents: Tensor
    """[P, K, C, h, w]."""
    condition_index: Tensor
    """[P, K], -1 where absent."""

    def part(self, cache: StaticCache | None, start: int, stop: int, keep: list[int]) -> dict[str, Any]:
        """The network's arguments for passes start <= p < stop and these conditions, from the request's cache if any.

        They are the cache's very own tensors, so that an accelerator need not be asked whether they fit.
        """
        if cache is None or not keep:
            text = TextFeatures(*(x[start:stop] for x in self.text))
            return Request(text, *(x[start:stop, keep] for x in self[1:]))._asdict()
        cache = cache.rows(start, stop)
        if len(keep) < self.condition_index.shape[1]:
            cache = cache.conditions(keep)
        return {**{name: getattr(cache, name) for name in self._fields}, "static_cache": cache}
