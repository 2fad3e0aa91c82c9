"""Portraits from words and one or several spatial conditions with MMFace-DiT.

An ordinary diffusers pipeline: names, callbacks, generators, offload and saving work as users know them. On a CPU every
picture runs through the network by itself (with all its guidance passes in one batch), because the bits of a
matrix product depend on its number of rows: so picture k depends on its own request and seed only. On an accelerator
the whole batch runs at once.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar, NamedTuple

import numpy as np
import torch
from diffusers import AutoencoderDC, AutoencoderKL, AutoencoderTiny, DiffusionPipeline, SchedulerMixin
from PIL import Image
from torch import Tensor
from transformers import CLIPTextModel, CLIPTokenizer

from likeness.conditions import CONDITIONS
from likeness.conditions.base import Condition, Reading
from likeness.encoders.latent import LatentCodec, spatial_factor, to_pixels, to_tensor
from likeness.encoders.text import cut_words, encode_text
from likeness.models.mmface import MMFaceTransformer, Modulation
from likeness.objectives import make_objective
from likeness.pipelines.guidance import Control, Pass, passes
from likeness.pipelines.output import PortraitOutput
from likeness.types import InputError, TextFeatures

DEFAULTS: dict[str, Any] = {"size": 256, "steps": 50, "guidance_scale": 7.5, "guidance_interval": (0.0, 1.0)}
"""What a request leaves open, where a checkpoint does not say otherwise."""

MODULATION_ROWS = 512
"""Most samples whose modulations are kept: in the published network this is 0.4 GB in bf16."""


class MMFacePipeline(DiffusionPipeline):
    """Text, mask, sketch and keypoints, in any subset, to portraits.

    Args:
        transformer: the network.
        vae: the autoencoder it was trained on; None where a converted folder lacks it.
        text_encoder: the CLIP text model it was trained with, likewise.
        tokenizer: its tokenizer.
        scheduler: the sampler that inverts the objective.
        objective: configuration of the objective (`likeness.objectives.make_objective`).
        latent_mean: mean of the autoencoder's latents, one number or one a channel.
        latent_std: their standard deviation.
        text_layer: which hidden state of the text model gives the tokens.
        max_text_tokens: length captions are padded to.
        condition_resize: `exact` never blends labels; `lanczos` resizes rendered conditions as pictures, which the
            released weights were trained with.
        defaults: `size`, `steps`, `guidance_scale`, `guidance_interval` of this checkpoint.
    """

    model_cpu_offload_seq = "text_encoder->transformer->vae"
    _optional_components: ClassVar = ["vae", "text_encoder", "tokenizer"]  # diffusers concatenates lists
    _callback_tensor_inputs: ClassVar = ["latents"]

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
    ) -> None:
        super().__init__()
        self.register_modules(
            transformer=transformer, vae=vae, text_encoder=text_encoder, tokenizer=tokenizer, scheduler=scheduler
        )
        self.register_to_config(
            objective=dict(objective or {"name": "rectified_flow"}),
            latent_mean=latent_mean,
            latent_std=latent_std,
            text_layer=text_layer,
            max_text_tokens=max_text_tokens,
            condition_resize=condition_resize,
            defaults={**DEFAULTS, **(defaults or {})},
        )
        self._interrupt = False

    @torch.no_grad()
    def __call__(
        self,
        prompt: str | Sequence[str] = "",
        negative_prompt: str | Sequence[str] = "",
        control_image: Mapping[str, Any] | None = None,
        *,
        height: int | None = None,
        width: int | None = None,
        num_inference_steps: int | None = None,
        guidance_scale: float | None = None,
        guidance_interval: tuple[float, float] | None = None,
        conditioning_scale: float | Mapping[str, float] = 1.0,
        control_guidance_start: float | Mapping[str, float] = 0.0,
        control_guidance_end: float | Mapping[str, float] = 1.0,
        num_images_per_prompt: int = 1,
        generator: torch.Generator | Sequence[torch.Generator] | None = None,
        latents: Tensor | None = None,
        sigmas: Sequence[float] | None = None,
        timesteps: Sequence[int] | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
        callback_on_step_end: Callable[[Any, int, Tensor, dict[str, Any]], dict[str, Any]] | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] = ("latents",),
    ) -> PortraitOutput | tuple[Any, ...]:
        """Make portraits.

        Args:
            prompt: one sentence or one a picture; "" means no text.
            negative_prompt: what to steer away from, likewise.
            control_image: condition name -> a path, image or array (`likeness.conditions`), or a list of them, one a
                prompt, with None where a picture has no such condition.
            height: pixels, a multiple of the autoencoder's factor times the patch size; None: the checkpoint's size.
            width: likewise.
            num_inference_steps: steps of the sampler, at least 1.
            guidance_scale: text guidance g in v = u + g (t - u); 1 switches it off.
            guidance_interval: noise levels between which text guidance acts, 0 (data) to 1 (noise).
            conditioning_scale: strength s_k in v = v_0 + sum_k s_k (v_k - v_0), for all conditions or by name.
            control_guidance_start: fraction of the steps at which a condition begins to act, likewise.
            control_guidance_end: fraction at which it ceases to act, likewise.
            num_images_per_prompt: pictures a prompt; those of one prompt follow one another.
            generator: one a picture, or one for all, from which the pictures draw their noise in turn.
            latents: initial noise [B, C, h, w] instead of drawing it.
            sigmas: the scheduler's noise levels, instead of the objective's.
            timesteps: the scheduler's timesteps, instead of the objective's.
            output_type: `pil`, `np` ([B, H, W, 3] in [0, 1]), `pt` ([B, 3, H, W] in [0, 1]) or `latent`.
            return_dict: whether to return a `PortraitOutput` or a tuple.
            callback_on_step_end: called as (pipeline, step, timestep, {"latents": ...}) after every step; it may return
                other latents, and stops the loop by setting `pipeline._interrupt`.
            callback_on_step_end_tensor_inputs: what the callback is given: `latents`.

        Raises:
            InputError: an argument that cannot be used; the sentence says which and how to mend it.
        """
        # 1. Check what was asked for, and spread it over the pictures
        defaults = self.config.defaults
        height, width = height or defaults["size"], width or defaults["size"]
        steps = defaults["steps"] if num_inference_steps is None else num_inference_steps
        guidance = float(defaults["guidance_scale"] if guidance_scale is None else guidance_scale)
        interval = defaults["guidance_interval"] if guidance_interval is None else guidance_interval
        self.check_inputs(height, width, steps, guidance, output_type, callback_on_step_end_tensor_inputs)
        prompts, negatives, images = spread(prompt, negative_prompt, control_image or {}, num_images_per_prompt)
        controls = self.controls(images, conditioning_scale, control_guidance_start, control_guidance_end)
        self._interrupt = False

        # 2. Encode text and conditions, each distinct one once
        notes: list[str] = []
        texts = list(dict.fromkeys([*prompts, *negatives]))
        features = self.encode_prompts(texts, notes)
        condition_latents, condition_rows, condition_of = self.encode_conditions(images, height, width, notes)

        # 3. Draw the noise and lay out the steps
        factor = spatial_factor(self.vae)
        shape = (self.transformer.config.latent_channels, height // factor, width // factor)
        latents = self.prepare_latents(latents, len(prompts), shape, generator)
        scheduler = copy.deepcopy(self.scheduler)  # its state belongs to this call, so that calls may overlap
        objective = make_objective(self.config.objective)
        if sigmas is not None or timesteps is not None:
            chosen = {"sigmas": list(sigmas)} if sigmas is not None else {"timesteps": list(timesteps or ())}
            scheduler.set_timesteps(**chosen, device=latents.device)
        elif type(scheduler) is type(objective.scheduler()):
            scheduler.set_timesteps(**objective.schedule(steps), device=latents.device)
        else:
            scheduler.set_timesteps(num_inference_steps=steps, device=latents.device)
        latents = latents * getattr(scheduler, "init_noise_sigma", 1.0)
        times = objective.time_of(scheduler.timesteps)  # [steps]
        levels = objective.noise_level(times.cpu()).tolist()

        # 4. Plan the passes of every step, and compute all modulations in one go
        groups = [[item] for item in range(len(prompts))] if latents.device.type == "cpu" else [range(len(prompts))]
        plans = [
            self.plan(group, prompts, negatives, texts, controls, condition_of, guidance, interval, levels)
            for group in groups
        ]
        model_times = objective.model_time(times)
        modulations = [self.modulations(plan, model_times, features, condition_rows) for plan in plans]
        rope = self.transformer.rope(shape[1], shape[2], features.tokens.shape[1], latents.device)

        # 5. Denoise
        dtype = self.transformer.dtype
        with self.progress_bar(total=len(times)) as progress:
            for i, timestep in enumerate(scheduler.timesteps):
                if self._interrupt:
                    continue
                scaled = latents
                if hasattr(scheduler, "scale_model_input"):  # the samplers of variance-exploding models
                    scaled = scheduler.scale_model_input(latents, timestep)
                prediction = torch.zeros_like(latents)
                for plan, modulation in zip(plans, modulations, strict=True):
                    step = plan[i]
                    known = None if modulation is None else modulation.rows(step.first_row, step.first_row + step.rows)
                    output = self.transformer(
                        scaled[step.item].to(dtype),
                        model_times[i].expand(step.rows),
                        TextFeatures(features.tokens[step.text], features.pooled[step.text]),
                        condition_latents[step.condition][:, None],
                        condition_rows[step.condition][:, None],
                        modulation=known,
                        rope=rope,
                    ).float()  # [passes, C, h, w]
                    for row, item in enumerate(step.item.tolist()):
                        prediction[item] += step.weight[row] * output[row]
                latents = scheduler.step(prediction, timestep, latents, return_dict=False)[0]
                if callback_on_step_end is not None:
                    given = {name: {"latents": latents}[name] for name in callback_on_step_end_tensor_inputs}
                    latents = (callback_on_step_end(self, i, timestep, given) or {}).get("latents", latents)
                progress.update()

        # 6. Decode
        images_out = self.decode(latents, output_type)
        self.maybe_free_model_hooks()
        return PortraitOutput(images=images_out, notes=notes) if return_dict else (images_out,)

    def check_inputs(
        self, height: int, width: int, steps: int, guidance: float, output_type: str, tensor_inputs: Sequence[str]
    ) -> None:
        """Refuse what cannot be made, in one sentence."""
        absent = [name for name in self._optional_components if getattr(self, name) is None]
        if absent:
            raise InputError(
                f"this checkpoint has no {' and no '.join(absent)}: convert it again with --text-encoder and --vae"
            )
        unit = spatial_factor(self.vae) * self.transformer.config.patch_size
        if (
            not (isinstance(height, int) and isinstance(width, int))
            or height % unit
            or width % unit
            or min(height, width) < unit
        ):
            near = [max(unit, round(side / unit) * unit) for side in (width, height)]
            raise InputError(
                f"the size {width}x{height} cannot be made: both sides must be multiples of {unit}; "
                f"the nearest is {near[0]}x{near[1]}"
            )
        if not isinstance(steps, int) or steps < 1:
            raise InputError(f"the number of steps is {steps}; it must be a whole number of at least 1")
        if not math.isfinite(guidance) or guidance < 0:
            raise InputError(f"the guidance scale is {guidance}; it must be a finite number of at least 0")
        if output_type not in ("pil", "np", "pt", "latent"):
            raise InputError(f"output_type is {output_type!r}; choose pil, np, pt or latent")
        unknown = set(tensor_inputs) - set(self._callback_tensor_inputs)
        if unknown:
            raise InputError(f"callbacks are given {self._callback_tensor_inputs}, not {sorted(unknown)}")

    def controls(
        self,
        images: Sequence[Mapping[str, Any]],
        scale: float | Mapping[str, float],
        start: float | Mapping[str, float],
        end: float | Mapping[str, float],
    ) -> list[dict[str, Control]]:
        """How each picture's conditions act; refuses names and numbers that cannot be used."""
        rows = list(self.transformer.config.condition_names)
        usable = [name for name in rows if name in CONDITIONS]
        given = {name for image in images for name in image}
        for mapping, what in (
            (scale, "conditioning_scale"),
            (start, "control_guidance_start"),
            (end, "control_guidance_end"),
        ):
            if isinstance(mapping, Mapping) and set(mapping) - given:
                raise InputError(f"{what} names {sorted(set(mapping) - given)[0]!r}, but no such condition is given")
        for name in sorted(given):
            if name not in CONDITIONS:
                raise InputError(f"the condition {name!r} is unknown; this checkpoint takes {', '.join(usable)}")
            if name not in rows:
                raise InputError(f"this checkpoint was not trained with {name}: it takes {', '.join(usable)}")

        def of(values: float | Mapping[str, float], name: str, otherwise: float) -> float:
            return float(values.get(name, otherwise) if isinstance(values, Mapping) else values)

        control = {
            name: Control(scale=of(scale, name, 1.0), start=of(start, name, 0.0), end=of(end, name, 1.0))
            for name in given
        }
        for name, c in control.items():
            if not math.isfinite(c.scale) or c.scale < 0:
                raise InputError(f"the scale of {name} is {c.scale}; it must be a finite number of at least 0")
            if not 0 <= c.start <= c.end <= 1:
                raise InputError(f"{name} acts from {c.start} to {c.end}; both must lie in [0, 1], the start first")
        return [{name: control[name] for name in image} for image in images]

    def encode_prompts(self, texts: Sequence[str], notes: list[str]) -> TextFeatures:
        """Features of distinct texts, tokens [T, L, D]; notes which words did not fit."""
        limit = self.config.max_text_tokens
        for text in texts:
            if cut := cut_words(self.tokenizer, text, limit):
                notes.append(f"the prompt is longer than {limit} tokens; this was cut: {cut!r}")
        features = encode_text(self.tokenizer, self.text_encoder, texts, max_tokens=limit, layer=self.config.text_layer)
        return TextFeatures(*(x.to(self._execution_device, self.transformer.dtype) for x in features))

    def encode_conditions(
        self, images: Sequence[Mapping[str, Any]], height: int, width: int, notes: list[str]
    ) -> tuple[Tensor, Tensor, list[dict[str, int]]]:
        """Latents of all conditions.

        Returns:
            latents [M + 1, C, h, w], of which number 0 is the absent condition (zeros); their rows in the condition
            embedding [M + 1], -1 for absent; and for each picture, condition name -> number.
        """
        pictures: list[np.ndarray] = []
        rows = [-1]
        numbers: dict[tuple[str, int], int] = {}  # (name, id of the source) -> number: a shared source is read once
        of_item: list[dict[str, int]] = []
        names = list(self.transformer.config.condition_names)
        for image in images:
            found = {}
            for name, source in image.items():
                key = (name, id(source))
                if key not in numbers:
                    reading = source
                    if not isinstance(source, Reading):
                        reading = CONDITIONS[name].read(source)
                        notes.extend([f"{name}: {reading.scheme}", *(f"{name}: {note}" for note in reading.notes)])
                    pictures.append(render(CONDITIONS[name], reading.raw, height, width, self.config.condition_resize))
                    rows.append(names.index(name))
                    numbers[key] = len(pictures)
                found[name] = numbers[key]
            of_item.append(found)
        device, dtype = self._execution_device, self.transformer.dtype
        factor = spatial_factor(self.vae)
        absent = torch.zeros(1, self.transformer.config.latent_channels, height // factor, width // factor)
        latents = absent
        if pictures:
            latents = torch.cat([absent, self.codec.encode(to_tensor(pictures).to(device)).cpu()])
        return latents.to(device, dtype), torch.tensor(rows, device=device), of_item

    def prepare_latents(
        self,
        latents: Tensor | None,
        count: int,
        shape: tuple[int, ...],
        generator: torch.Generator | Sequence[torch.Generator] | None,
    ) -> Tensor:
        """Initial noise [B, C, h, w], float32. Each picture draws its own, so that a batch changes nothing."""
        device = self._execution_device
        if latents is not None:
            if tuple(latents.shape) != (count, *shape):
                raise InputError(f"latents have the shape {tuple(latents.shape)}; this call needs {(count, *shape)}")
            return latents.to(device, torch.float32)
        generators = list(generator) if isinstance(generator, Sequence) else [generator] * count
        if len(generators) != count:
            raise InputError(f"{len(generators)} generators for {count} pictures: give one, or one a picture")
        drawn = [
            torch.randn((1, *shape), generator=g, device=g.device if g is not None else "cpu").to(device)
            for g in generators
        ]
        return torch.cat(drawn)

    def plan(
        self,
        group: Sequence[int],
        prompts: Sequence[str],
        negatives: Sequence[str],
        texts: Sequence[str],
        controls: Sequence[Mapping[str, Control]],
        condition_of: Sequence[Mapping[str, int]],
        guidance: float,
        interval: Sequence[float],
        levels: Sequence[float],
    ) -> list[Step]:
        """The passes of every step for one group of pictures that run together."""
        device = self._execution_device
        numbers = {text: number for number, text in enumerate(texts)}
        steps, first_row = [], 0
        for i, level in enumerate(levels):
            found: list[tuple[int, Pass]] = []
            for item in group:
                acts = interval[0] <= level <= interval[1] and prompts[item] != negatives[item]
                found += [(item, p) for p in passes(controls[item], guidance if acts else 1.0, i / len(levels))]
            text_of = [numbers[(negatives if p.negative else prompts)[item]] for item, p in found]
            condition = [0 if p.condition is None else condition_of[item][p.condition] for item, p in found]
            steps.append(
                Step(
                    first_row,
                    len(found),
                    torch.tensor([item for item, _ in found], device=device),
                    torch.tensor(text_of, device=device),
                    torch.tensor(condition, device=device),
                    [p.weight for _, p in found],
                )
            )
            first_row += len(found)
        return steps

    def modulations(
        self, plan: Sequence[Step], model_times: Tensor, features: TextFeatures, condition_rows: Tensor
    ) -> Modulation | None:
        """The modulations of all passes of all steps, in the plan's order, or None where they would be too many."""
        if sum(step.rows for step in plan) > MODULATION_ROWS:
            return None
        time = torch.cat([model_times[i].expand(step.rows) for i, step in enumerate(plan)])  # [rows]
        text, condition = (torch.cat([getattr(step, name) for step in plan]) for name in ("text", "condition"))
        return self.transformer.modulation(time, features.pooled[text], condition_rows[condition][:, None])

    @property
    def codec(self) -> LatentCodec:
        """The autoencoder with this checkpoint's latent statistics."""
        return LatentCodec(self.vae, self.config.latent_mean, self.config.latent_std)

    def decode(self, latents: Tensor, output_type: str = "pil") -> Any:
        """Latents [B, C, h, w] as pictures of the given type."""
        if output_type == "latent":
            return latents
        pictures = self.codec.decode(latents)  # [B, 3, H, W]
        if output_type == "pt":
            return pictures.add(1).div(2).clamp(0, 1)
        if output_type == "np":
            return pictures.add(1).div(2).clamp(0, 1).permute(0, 2, 3, 1).cpu().numpy()
        return [Image.fromarray(picture) for picture in to_pixels(pictures)]


class Step(NamedTuple):
    """The passes of one step for one group of pictures; P of them."""

    first_row: int
    """Position of the first among all passes of the group's plan."""
    rows: int
    """P."""
    item: Tensor
    """Which picture each belongs to, [P]."""
    text: Tensor
    """Which text each reads, [P]."""
    condition: Tensor
    """Which condition each sees, 0 for none, [P]."""
    weight: list[float]
    """Factor of each in its picture's prediction."""


def spread(
    prompt: str | Sequence[str], negative_prompt: str | Sequence[str], control_image: Mapping[str, Any], per_prompt: int
) -> tuple[list[str], list[str], list[dict[str, Any]]]:
    """Prompts, negative prompts and conditions, one a picture.

    A single value serves all pictures; lists must agree in length. Every entry is repeated `per_prompt` times.
    """
    if not isinstance(per_prompt, int) or per_prompt < 1:
        raise InputError(f"num_images_per_prompt is {per_prompt}; it must be a whole number of at least 1")
    columns: dict[str, Any] = {"prompt": prompt, "negative prompt": negative_prompt, **control_image}
    lengths = {name: len(value) for name, value in columns.items() if isinstance(value, (list, tuple))}
    count = max(lengths.values(), default=1)
    for name, length in lengths.items():
        if length not in (1, count):
            longest = next(other for other, size in lengths.items() if size == count)
            raise InputError(
                f"{length} values of {name} do not match {count} of {longest}: "
                "if a batch size is not 1, it must be the same for prompts and conditions"
            )

    def of(value: Any, index: int) -> Any:
        if not isinstance(value, (list, tuple)):
            return value
        return value[index if len(value) > 1 else 0]

    items = [index for index in range(count) for _ in range(per_prompt)]
    prompts, negatives = [of(prompt, i) for i in items], [of(negative_prompt, i) for i in items]
    for text in (*prompts, *negatives):
        if not isinstance(text, str):
            raise InputError(f"a prompt is {text!r}, which is not text")
    images = [{name: of(value, i) for name, value in control_image.items() if of(value, i) is not None} for i in items]
    return prompts, negatives, images


def render(condition: Condition, raw: np.ndarray, height: int, width: int, resize: str) -> np.ndarray:
    """A condition's picture, uint8 [height, width, 3].

    `exact` resizes the raw form, so that labels never blend; `lanczos` resizes the picture and crops its centre.
    """
    if resize == "exact" or condition.raw == "points":
        return condition.render(condition.resize(raw, height, width), height, width)
    picture = Image.fromarray(condition.render(raw, *raw.shape))
    scale = max(height / picture.height, width / picture.width)
    size = max(width, round(picture.width * scale)), max(height, round(picture.height * scale))
    picture = picture.resize(size, Image.Resampling.LANCZOS)
    left, top = (picture.width - width) // 2, (picture.height - height) // 2
    return np.asarray(picture.crop((left, top, left + width, top + height)))
