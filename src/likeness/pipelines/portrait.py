"""The pipeline that both networks share: check, encode, draw noise, plan, denoise, decode.

A subclass adds how texts are encoded and which forward passes a step needs. On a CPU every image runs through the
network individually (with all its guidance passes in one batch), because the rounding of a matrix product depends on
its number of rows: so an image depends only on its own request and seed. On an accelerator the batch runs as one.

B images, C latent channels, h x w latent size, P passes through the network.
"""

from __future__ import annotations

import copy
import inspect
import logging
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, ClassVar, cast

import diffusers
import torch
from diffusers import DiffusionPipeline
from diffusers.image_processor import VaeImageProcessor
from PIL import Image
from torch import Tensor

from likeness.conditions.base import Source
from likeness.encoders.latent import LatentCodec, spatial_factor, to_pixels
from likeness.encoders.text import check_text_settings, encode_text
from likeness.models.caching import check_caches
from likeness.objectives import make_objective
from likeness.objectives.flow import dynamic_shift
from likeness.pipelines.adapters import Loras, active_adapters, scaled_loras
from likeness.pipelines.arguments import (
    callback_inputs,
    changed_latents,
    check_guidance_model,
    check_texts,
    checked_defaults,
    condition_inputs,
    embedded,
    named_conditions,
    noise_interval,
    number,
    per_image,
    seeds_of,
    whole_number,
)
from likeness.pipelines.image_recipe import environment
from likeness.pipelines.inputs import encode_conditions, encode_prompts
from likeness.pipelines.output import PortraitOutput, check_latent_size, check_output_type, resample
from likeness.pipelines.sampling import EncodedBatch, Passes, Sampling, advance
from likeness.pipelines.sizes import format_sizes, generation_size, trained_sizes
from likeness.types import MAX_STEPS, ConditionInput, InputError, PortraitRequest, TextFeatures

log = logging.getLogger(__name__)


class PortraitPipeline(DiffusionPipeline, Loras):
    """The base of `MMFacePipeline` and `MDiTFacePipeline`: components `transformer`, `vae`, `text_encoder`,
    `tokenizer` and `scheduler`; settings `objective`, `latent_mean`, `latent_std`, `max_text_tokens`,
    `text_layer`, `condition_resize`, `sizes` and `defaults`.
    """

    _callback_tensor_inputs: ClassVar = ["latents"]
    _current_timestep: Any = None

    def __init_subclass__(cls) -> None:
        """Add the class where `DiffusionPipeline.from_pretrained` looks for the one that a folder names."""
        super().__init_subclass__()
        vars(diffusers)[cls.__name__] = cls

    def register_settings(
        self,
        known: Mapping[str, Any],
        *,
        objective: Mapping[str, Any] | None,
        defaults: Mapping[str, Any] | None,
        condition_resize: str,
        sizes: Any,
        **settings: Any,
    ) -> None:
        """Check and store the settings of a checkpoint; `known`: `defaults` of the network. Raises `InputError`."""
        if condition_resize not in ("exact", "lanczos"):
            raise InputError(f"condition_resize is {condition_resize!r}; choose exact or lanczos")
        settings |= {"defaults": checked_defaults(defaults or {}, known), "sizes": sizes}
        trained_sizes(settings)
        objective = objective or {"name": "rectified_flow"}
        make_objective(objective)
        check_text_settings(self.text_encoder, settings["text_layer"], settings["max_text_tokens"])
        self.loras: dict[str, dict[str, Any]] = {}  # LoRA -> how it was loaded, for recipes
        self.base_settings: dict[str, Any] = {}  # of the base of an adapter folder
        self.register_to_config(objective=dict(objective), condition_resize=condition_resize, **settings)
        if self.vae is not None:
            _ = self.codec  # checks the latent statistics
            if getattr(self.vae, "_group_offload_block_modules", None) is None:
                # encoding and decoding do not run the autoencoder's `forward`, at which diffusers loads other parts
                parts = [name for name in ("encoder", "decoder") if hasattr(self.vae, name)]
                self.vae._group_offload_block_modules = parts or None

    def save_pretrained(self, *args: Any, **kwargs: Any) -> None:
        """As in diffusers, but rejected while adapters are loaded: the folder could not be loaded again."""
        if any(getattr(network, "peft_config", {}) for network in (self.transformer, self.text_encoder)):
            raise InputError("Adapters are not part of a model folder: use `save_adapter`, or unload them first")
        super().save_pretrained(*args, **kwargs)

    @property
    def patch_size(self) -> int:
        """Side of the network's patches, in latent pixels."""
        raise NotImplementedError

    @property
    def vae_scale_factor(self) -> int:
        """Side of a latent pixel in pixels of the image."""
        return spatial_factor(self.vae)

    @property
    def image_processor(self) -> VaeImageProcessor:
        """Converts images to and from tensors of a size that the network supports, as in diffusers."""
        return VaeImageProcessor(vae_scale_factor=self.vae_scale_factor * self.patch_size)

    def check_network(self, prompts: Sequence[Any], negatives: Sequence[Any]) -> None:
        """Raise `InputError` for requests that the network or its components do not support."""
        raise NotImplementedError

    def text_features(self, texts: Sequence[str]) -> TextFeatures:
        """Encode T distinct texts, tokens [T, L, D]."""
        second: dict[str, Any] = {name: getattr(self, name, None) for name in ("tokenizer_2", "text_encoder_2")}
        options = {"max_tokens": self.config.max_text_tokens, "layer": self.config.text_layer}
        device = self._execution_device  # offloaded weights are elsewhere
        return encode_text(self.tokenizer, self.text_encoder, texts, **options, **second, device=device)

    def pass_function(self, batch: EncodedBatch, group: Sequence[int]) -> Callable[[int], Passes]:
        """Return the function from a step to the passes of a group of images."""
        raise NotImplementedError

    @scaled_loras
    @torch.no_grad()
    def __call__(
        self,
        prompt: str | Sequence[str] = "",
        negative_prompt: str | Sequence[str] | None = None,
        control_image: Mapping[str, Any] | Source | None = None,
        *,
        height: int | None = None,
        width: int | None = None,
        upscale: bool = False,
        force_size: bool = False,
        num_inference_steps: int | None = None,
        guidance_scale: float | None = None,
        guidance_interval: tuple[float, float] | None = None,
        guidance_model: Any = None,
        autoguidance_scale: float = 1.7,
        autoguidance_interval: tuple[float, float] = (0.0, 1.0),
        conditioning_scale: float | Mapping[str, float] = 1.0,
        control_guidance_start: float | Mapping[str, float] = 0.0,
        control_guidance_end: float | Mapping[str, float] = 1.0,
        num_images_per_prompt: int = 1,
        generator: torch.Generator | Sequence[torch.Generator] | None = None,
        latents: Tensor | None = None,
        prompt_embeds: Tensor | None = None,
        negative_prompt_embeds: Tensor | None = None,
        pooled_prompt_embeds: Tensor | None = None,
        negative_pooled_prompt_embeds: Tensor | None = None,
        attention_kwargs: Mapping[str, Any] | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
        callback_on_step_end: Callable[[Any, int, Tensor, dict[str, Any]], dict[str, Any]] | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] = ("latents",),
        encoded: dict[Any, Any] | None = None,
    ) -> PortraitOutput:
        """Generate images. Several threads can call one pipeline, except with `offload`.

        Args:
            prompt: Text prompt, or a list with one per image; "" means no text.
            negative_prompt: What the images should not show, likewise.
            control_image: Condition name -> path, image, array or tensor (`likeness.conditions`), or a list with one
                per prompt, with None for an image without this condition. `ConditionInput` sets its scale, start and
                end, too. A single path, image or array instead of a mapping: its kind is recognized.
            height: Pixels. The size must be one that the checkpoint was trained at (`pipeline.config.sizes`). Default:
                the checkpoint's default size.
            width: Pixels, as `height`.
            upscale: Whether to generate at the nearest trained size with the same aspect ratio and resample (Lanczos)
                if the checkpoint was not trained at this size.
            force_size: Whether to generate at this size although the checkpoint was not trained at it. Both sides must
                be multiples of the autoencoder's factor times the patch size.
            num_inference_steps: Sampling steps, from 1 to 1000.
            guidance_scale: Text guidance g in v = u + g (t - u); 1 disables it. A guidance-distilled network embeds g
                instead.
            guidance_interval: Noise levels between which text guidance acts, 0 (data) to 1 (noise).
            guidance_model: Weaker version of the network, such as an earlier checkpoint's `transformer`, for
                autoguidance (Karras et al. 2024, equation 3): v = v_0 + w (v_1 - v_0), where v_1 is the prediction of
                the network and v_0 that of `guidance_model`. It doubles the number of passes.
            autoguidance_scale: w of autoguidance; 1 disables it.
            autoguidance_interval: Noise levels between which autoguidance acts.
            conditioning_scale: Strength of the conditions, for all or by name: 1 as trained, 0 absent. MMFace scales
                predictions, s_k in v = v_0 + sum_k s_k (v_k - v_0); MDiTFace adds log s_k to the logits of keys.
            control_guidance_start: Fraction of the steps at which a condition starts to act, likewise.
            control_guidance_end: Fraction of the steps at which it stops acting, likewise.
            num_images_per_prompt: Images per prompt; those of a prompt are consecutive.
            generator: One per image, or one for all, from which the images draw their noise in turn. Samplers that add
                noise at every step use it, too.
            latents: Initial noise [B, C, h, w] instead of random noise.
            prompt_embeds: Token embeddings [B, L, D] instead of `prompt`, from `encode_prompt`.
            negative_prompt_embeds: Token embeddings [B, L, D] instead of `negative_prompt`.
            pooled_prompt_embeds: Pooled embeddings [B, P], with `prompt_embeds`.
            negative_pooled_prompt_embeds: Pooled embeddings [B, P], with `negative_prompt_embeds`.
            attention_kwargs: `{"scale": s}` multiplies the scales of all active LoRAs and adapters by s in this call;
                calls of other threads must wait.
            output_type: `pil`, `np` ([B, H, W, 3] in [0, 1]), `pt` ([B, 3, H, W] in [0, 1]) or `latent`; `sampling`
                returns the `Sampling` before its first step, which the caller advances.
            return_dict: Whether to return a `PortraitOutput` or the tuple (images,).
            callback_on_step_end: Called as (pipeline, step, timestep, {"latents": ...}) after every step, with a copy
                of this pipeline for the call. It may return other latents, change the guidance scale of the following
                steps by setting `_guidance_scale` of the copy, and stop the loop by setting `_interrupt`.
            callback_on_step_end_tensor_inputs: Tensors for the callback: `latents`.
            encoded: Cache of encoded texts and conditions. Pass the same dict to several calls of this pipeline to
                encode the same texts and the same condition objects once.

        Raises:
            InputError: An argument is invalid.
        """
        # 1. Check the arguments and distribute them over the images
        defaults = self.config.defaults
        default = lambda value, name: defaults[name] if value is None else value  # noqa: E731
        size = whole_number(default(width, "size"), "width"), whole_number(default(height, "size"), "height")
        steps = whole_number(default(num_inference_steps, "steps"), "num_inference_steps")
        guidance = number(default(guidance_scale, "guidance_scale"), "guidance_scale")
        interval = noise_interval(default(guidance_interval, "guidance_interval"), "guidance_interval")
        auto_interval = noise_interval(autoguidance_interval, "autoguidance_interval")
        auto_scale = number(autoguidance_scale, "autoguidance_scale")
        sources = named_conditions(control_image)
        controls = condition_inputs(
            sources,
            list(self.transformer.config.condition_names),
            scale=conditioning_scale,
            start=control_guidance_start,
            end=control_guidance_end,
        )
        texts_of = {
            "prompt": embedded("prompt", prompt, prompt_embeds, pooled_prompt_embeds),
            "negative prompt": embedded(
                "negative_prompt", negative_prompt, negative_prompt_embeds, negative_pooled_prompt_embeds
            ),
        }
        conditions: list[dict[str, Any]] = per_image({**texts_of, **controls}, num_images_per_prompt)
        prompts, negatives = ([row.pop(name) for row in conditions] for name in texts_of)
        check_texts((*prompts, *negatives))
        self.check_network(prompts, negatives)
        width, height = generation_size(self.config, size, upscale=upscale, force_size=force_size)
        if output_type == "latent":
            check_latent_size(size, (width, height))
        tensor_inputs = callback_inputs(callback_on_step_end, callback_on_step_end_tensor_inputs)
        self.check_inputs(height, width, steps, guidance, output_type, tensor_inputs)
        check_guidance_model(self.transformer, guidance_model, auto_scale)
        check_caches(self.transformer, guidance_model, steps)
        objective = make_objective(self.config.objective)
        objective.check_scheduler(self.scheduler)
        notes: list[str] = []
        if force_size and (sizes := trained_sizes(self.config)) and size not in sizes:
            trained = format_sizes(sizes)
            notes.append(f"warning: the model was trained at {trained}, not at {width}x{height}: expect artifacts")
        each = [one for source in sources.values() for one in (source if isinstance(source, list) else [source])]
        acts = conditioning_scale or 1.0, control_guidance_start, control_guidance_end
        if acts != (1.0, 0.0, 1.0) and all(isinstance(source, ConditionInput) for source in each):
            notes.append(
                "conditioning_scale and control_guidance have no effect without a condition, or on a ConditionInput"
            )
        if guidance_model is None and (auto_scale, auto_interval) != (1.7, (0.0, 1.0)):
            notes.append("autoguidance_scale and autoguidance_interval have no effect without guidance_model")
        if attention_kwargs and not active_adapters(self):
            notes.append("attention_kwargs has no effect without a LoRA")
        if guidance == 1 and any(negatives):
            notes.append("the negative prompt has no effect with guidance_scale 1: choose a larger one")
        seeds = seeds_of(generator, len(prompts))
        embeds = (prompt_embeds, negative_prompt_embeds)
        options = (latents, guidance_interval, guidance_model, callback_on_step_end, attention_kwargs, *embeds)
        written = negatives
        if guidance == 1 or self.transformer.config.get("guidance_embeds"):
            negatives = prompts  # negative prompts have no effect
        call = copy.copy(self)  # components are shared, the state that callbacks see is not
        call._interrupt, call._guidance_scale = False, guidance

        # 2. Encode each distinct text and condition once
        encoded = {} if encoded is None else encoded
        texts = list(dict.fromkeys([*prompts, *negatives]))
        number_of = {text: i for i, text in enumerate(texts)}
        text = encode_prompts(self, texts, prompts, encoded, notes)
        condition_latents, condition_ids, latent_indices = encode_conditions(
            self, conditions, height, width, text.tokens.device, encoded, notes
        )

        # 3. Draw the noise and set the timesteps
        generators = list(generator) if isinstance(generator, Sequence) else generator
        latents = self.prepare_latents(latents, len(prompts), condition_latents, generators)
        scheduler = copy.deepcopy(self.scheduler)  # its state belongs to this call
        schedule = objective.schedule(scheduler, steps)
        if (
            scheduler.config.get("use_dynamic_shifting")
            and "mu" in inspect.signature(scheduler.set_timesteps).parameters
        ):
            schedule["mu"] = dynamic_shift(latents[0, 0].numel() // self.patch_size**2, scheduler.config)
        scheduler.set_timesteps(**schedule, device=latents.device)
        latents = latents * getattr(scheduler, "init_noise_sigma", 1.0)
        times = objective.time_of(scheduler.timesteps)  # [S]
        if scheduler.config.get("use_flow_sigmas"):
            times = scheduler.sigmas[:-1].to(times)  # the timesteps of these schedulers are rounded to integers
        levels = objective.noise_level(times.cpu()).tolist()
        call._num_timesteps = len(times)
        noise = {"generator": generators} if "generator" in inspect.signature(scheduler.step).parameters else {}

        # 4. Plan the passes of every group of images
        batch = EncodedBatch(
            text=text,
            prompts=[number_of[text] for text in prompts],
            negatives=[number_of[text] for text in negatives],
            conditions=conditions,
            latent_indices=latent_indices,
            condition_latents=condition_latents,
            condition_ids=condition_ids,
            guidance=[guidance] * len(levels),
            times=objective.model_time(times),
        )
        sampling = Sampling(
            pipeline=self,
            batch=batch,
            latents=latents,
            scheduler=scheduler,
            step_options=noise,
            pass_functions=[self.pass_function(batch, group) for group in self.groups(len(prompts), latents.device)],
            levels=levels,
            guidance_scale=guidance,
            guidance_interval=interval,
            guidance_model=guidance_model,
            guidance_model_scale=auto_scale,
            guidance_model_interval=auto_interval,
            output_type="pil" if output_type == "sampling" else output_type,
            size=size,
            notes=notes,
            objective=objective,
            times=times,
        )
        sampling.guide(guidance)
        if output_type == "sampling":
            return cast(Any, sampling)

        # 5. Denoise
        with self.progress_bar(total=sampling.steps) as progress:
            while sampling.step < sampling.steps and not call._interrupt:
                advance([sampling])
                if callback_on_step_end is not None:
                    i = sampling.step - 1
                    tensors = dict.fromkeys(tensor_inputs, sampling.latents)
                    changed = callback_on_step_end(call, i, scheduler.timesteps[i], tensors)
                    sampling.latents = changed_latents(changed, sampling.latents)
                    sampling.guide(call._guidance_scale)
                progress.update()

        # 6. Decode
        images = sampling.images()
        self.maybe_free_model_hooks()
        requests = [
            PortraitRequest(
                prompt=prompts[item],
                negative_prompt=written[item],
                seed=seeds[item],
                conditions={
                    name: replace(own, image=encoded[name, id(own.image), height, width].reading)
                    for name, own in conditions[item].items()
                },
                guidance_scale=guidance,
                num_inference_steps=steps,
                width=size[0],
                height=size[1],
                upscale=upscale,
                force_size=force_size,
            )
            for item in (range(len(prompts)) if seeds and all(option is None for option in options) else ())
        ]
        state = {"adapters": active_adapters(self), "environment": environment(self)} if requests else {}
        output = PortraitOutput(images=images, notes=notes, requests=requests, pipeline=call, **state)
        return output if return_dict else cast(Any, (images,))

    @classmethod
    def from_pipe(cls, pipeline: Any, **changes: Any) -> Any:
        """Return a pipeline of this class with the components, settings, LoRAs and offloading of another one. Weights
        are not copied, and converted only with `dtype`.

        Args:
            pipeline: A pipeline of the same network, for text to image or for editing.
            changes: Other components, such as `scheduler`, and `dtype`.

        Raises:
            InputError: The pipeline has another network, or no component of a name.
        """
        if type(pipeline).__init__ is not cls.__init__:
            raise InputError(f"A {cls.__name__} cannot be made from a {type(pipeline).__name__}: the networks differ")
        dtype = changes.pop("dtype", changes.pop("torch_dtype", None))
        if unknown := sorted(set(changes) - set(pipeline.components)):
            raise InputError(f"Unknown component {unknown[0]!r}. Available: {', '.join(pipeline.components)}")
        new = copy.copy(pipeline)
        new.__class__ = cls
        new.register_modules(**changes)
        return new if dtype is None else new.to(dtype=dtype)

    @property
    def num_timesteps(self) -> int:
        """Number of steps of the current call, for callbacks."""
        return self._num_timesteps

    @property
    def current_timestep(self) -> Any:
        """The scheduler's timestep of the current step, for caches."""
        return self._current_timestep

    @property
    def guidance_scale(self) -> float:
        """Text guidance scale of the current call, for callbacks."""
        return self._guidance_scale

    @property
    def do_classifier_free_guidance(self) -> bool:
        """Whether the current call also evaluates the negative prompt, for callbacks."""
        return self._guidance_scale != 1 and not self.transformer.config.get("guidance_embeds")

    @property
    def interrupt(self) -> bool:
        """Whether a callback has stopped the current call."""
        return self._interrupt

    def groups(self, count: int, device: torch.device) -> list[range]:
        """Return which images are batched: none on a CPU, all on an accelerator."""
        if device.type == "cpu":
            return [range(item, item + 1) for item in range(count)]
        return [range(count)]

    def check_inputs(
        self, height: int, width: int, steps: int, guidance: float, output_type: str, tensor_inputs: Sequence[str]
    ) -> None:
        """Raise `InputError` for invalid arguments."""
        unit = spatial_factor(self.vae) * self.patch_size
        if height % unit or width % unit or min(height, width) < unit:
            near = [max(unit, round(side / unit) * unit) for side in (width, height)]
            raise InputError(
                f"Size {width}x{height} is not supported: both sides must be multiples of {unit}. "
                f"Nearest: {near[0]}x{near[1]}"
            )
        if not 1 <= steps <= MAX_STEPS:
            raise InputError(f"The number of steps is {steps}; it must be from 1 to {MAX_STEPS}")
        if not math.isfinite(guidance) or guidance < 0:
            raise InputError(f"The guidance scale is {guidance}; it must be a finite number of at least 0")
        if output_type != "sampling":
            check_output_type(output_type)
        if unknown := sorted(set(tensor_inputs) - set(self._callback_tensor_inputs)):
            raise InputError(
                f"Callbacks receive {', '.join(self._callback_tensor_inputs)}, not {', '.join(unknown)}. "
                "To disable guidance, set pipeline._guidance_scale to 1 in the callback"
            )

    @torch.no_grad()
    def encode_prompt(
        self, prompt: str | Sequence[str] = "", negative_prompt: str | Sequence[str] | None = None
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Encode prompts for several calls, so that the text encoders can be removed from memory.

        Args:
            prompt: Text prompt, or a list of B.
            negative_prompt: What the images should not show, likewise.

        Returns:
            prompt_embeds [B, L, D], negative_prompt_embeds [B, L, D], pooled_prompt_embeds [B, P] and
            negative_pooled_prompt_embeds [B, P], as in diffusers' Stable Diffusion 3. Truncated words are logged.

        Raises:
            InputError: A prompt is no valid text, or the pipeline has no text encoder.
        """
        given = {"prompt": prompt, "negative_prompt": negative_prompt}
        rows = per_image({name: embedded(name, text, None, None) for name, text in given.items()}, 1)
        prompts, negatives = ([row[name] for row in rows] for name in given)
        texts, notes = [*prompts, *negatives], []
        check_texts(texts)
        distinct = list(dict.fromkeys(texts))
        text = encode_prompts(self, distinct, prompts, {}, notes)
        for note in notes:
            log.warning(note)
        columns = (x[[distinct.index(each) for each in texts]].chunk(2) for x in text)  # [2 B, L, D], [2 B, P]
        (tokens, negative_tokens), (pooled, negative_pooled) = columns
        return tokens, negative_tokens, pooled, negative_pooled

    def prepare_latents(
        self,
        latents: Tensor | None,
        count: int,
        conditions: Tensor,
        generator: torch.Generator | list[torch.Generator] | None,
    ) -> Tensor:
        """Draw the initial noise [B, C, h, w], float32, in the shape and on the device of encoded `conditions`; each
        image on its own, so that batches change nothing.
        """
        device, shape = conditions.device, tuple(conditions.shape[1:])
        generators = generator if isinstance(generator, list) else [generator] * count
        if not all(isinstance(each, torch.Generator | None) for each in generators):
            raise InputError(f"generator is {generator!r}; pass torch.Generator().manual_seed(seed), or one per image")
        if len(generators) != count:
            raise InputError(f"{len(generators)} generators for {count} images: pass one, or one per image")
        if latents is not None:
            if not isinstance(latents, Tensor):
                raise InputError(f"latents is of type {type(latents).__name__}; pass a tensor")
            if tuple(latents.shape) != (count, *shape):
                raise InputError(f"latents has shape {tuple(latents.shape)}; this call requires {(count, *shape)}")
            return latents.to(device, torch.float32)
        return torch.cat(
            [
                torch.randn((1, *shape), generator=g, device=g.device if g is not None else "cpu").to(device)
                for g in generators
            ]
        )

    @property
    def codec(self) -> LatentCodec:
        """The autoencoder with this checkpoint's latent statistics."""
        return LatentCodec(self.vae, self.config.latent_mean, self.config.latent_std)

    def decode(self, latents: Tensor, output_type: str = "pil", size: tuple[int, int] | None = None) -> Any:
        """Decode latents [B, C, h, w] to images of a type, resampled to `size` (width, height) if that differs."""
        if not latents.isfinite().all():
            raise InputError("The latents are not finite (NaN or Inf): the model or a LoRA is damaged, or needs fp32")
        if output_type == "latent":
            return latents
        images = self.codec.decode(latents)  # [B, 3, H, W]
        if not images.isfinite().all():
            raise InputError("The images are not finite (NaN or Inf): the autoencoder is damaged, or needs fp32")
        if size is not None and size != (images.shape[-1], images.shape[-2]):
            images = resample(images, *size)
        if output_type == "pil":
            return [Image.fromarray(image) for image in to_pixels(images)]
        images = images.add(1).div(2).clamp(0, 1)
        return images if output_type == "pt" else images.permute(0, 2, 3, 1).cpu().numpy()
