"""What all portrait pipelines do with a request: check, encode, draw noise, denoise, decode.

A family of networks adds how it reads texts and which passes a step needs (`calls`). On a CPU every picture runs
through the network by itself (with all its guidance passes in one batch), because the bits of a matrix product depend
on its number of rows: so picture k depends on its own request and seed only. On an accelerator the whole batch runs at
once.

B pictures, C latent channels, h x w latent size, P passes through the network.
"""

from __future__ import annotations

import copy
import inspect
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import numpy as np
import torch
from diffusers import DiffusionPipeline
from PIL import Image
from torch import Tensor

from likeness.conditions import CONDITIONS
from likeness.conditions.base import Condition, Reading
from likeness.conditions.images import check_aspect
from likeness.encoders.latent import LatentCodec, spatial_factor, to_pixels, to_tensor
from likeness.encoders.text import truncated_text
from likeness.objectives import make_objective
from likeness.objectives.flow import dynamic_shift
from likeness.pipelines.arguments import interval_of, number, own_steps, spread, whole_number
from likeness.pipelines.guidance import Control
from likeness.pipelines.output import PortraitOutput
from likeness.pipelines.sizes import format_sizes, generation_size, trained_sizes
from likeness.types import InputError, TextFeatures


@dataclass(frozen=True, kw_only=True)
class Job:
    """A request, checked and encoded: B pictures in S steps, of T distinct texts and M distinct conditions."""

    prompts: list[int]
    """Which text each picture's prompt is, [B]."""
    negatives: list[int]
    """Which text its negative prompt is, [B]."""
    text: TextFeatures
    """Of the distinct texts, tokens [T, L, D]."""
    controls: list[dict[str, Control]]
    """How each picture's conditions act, [B]."""
    conditions: list[dict[str, int]]
    """Which condition each of them is, 1 to M, [B]."""
    condition_latents: Tensor
    """[M + 1, C, h, w]; number 0 is the absent condition, zeros."""
    condition_rows: Tensor
    """Their rows in the network's condition embedding, [M + 1]; -1 for absent."""
    guidance: list[float]
    """Text guidance g at every step, 1 where it does not act, [S]."""
    times: Tensor
    """What the network embeds at every step, float32 [S]."""


class Call(NamedTuple):
    """The passes through the network that one group of pictures needs at one step; P of them."""

    items: list[int]
    """Which picture each belongs to, [P]."""
    weights: list[float]
    """Factor of each in its picture's prediction, [P]."""
    arguments: dict[str, Any]
    """What the network is given beside latents and times, [P, ...] each."""


class PortraitPipeline(DiffusionPipeline):
    """The base of `MMFacePipeline` and `MDiTFacePipeline`: components `transformer`, `vae`, `text_encoder`,
    `tokenizer` and `scheduler`; settings `objective`, `latent_mean`, `latent_std`, `max_text_tokens`,
    `condition_resize` and `defaults`.
    """

    _callback_tensor_inputs: ClassVar = ["latents"]

    @property
    def patch_size(self) -> int:
        """Side of the network's patches, in latent pixels."""
        raise NotImplementedError

    def check_family(self, negatives: Sequence[str]) -> None:
        """Refuse what this family cannot do with its components and these negative prompts."""
        raise NotImplementedError

    def text_features(self, texts: Sequence[str]) -> TextFeatures:
        """Features of T distinct texts, tokens [T, L, D]."""
        raise NotImplementedError

    def calls(self, job: Job, group: Sequence[int]) -> Iterator[Call]:
        """The passes of these pictures, step by step."""
        raise NotImplementedError

    @torch.no_grad()
    def __call__(
        self,
        prompt: str | Sequence[str] = "",
        negative_prompt: str | Sequence[str] | None = None,
        control_image: Mapping[str, Any] | None = None,
        *,
        height: int | None = None,
        width: int | None = None,
        upscale: bool = False,
        force_size: bool = False,
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
            control_image: condition name -> a path, image, array or tensor (`likeness.conditions`), or a list of them,
                one a prompt, with None where a picture has no such condition.
            height: Pixels. The size must be one that the checkpoint was trained at (`pipeline.config.sizes`). Default:
                the checkpoint's default size.
            width: Pixels, as `height`.
            upscale: Whether to generate at the nearest trained size with the same aspect ratio and resample (Lanczos)
                if the checkpoint was not trained at this size.
            force_size: Whether to generate at this size although the checkpoint was not trained at it. Both sides must
                be multiples of the autoencoder's factor times the patch size.
            num_inference_steps: steps of the sampler, at least 1.
            guidance_scale: text guidance g in v = u + g (t - u); 1 switches it off. A guidance-distilled network is
                given g instead.
            guidance_interval: noise levels between which text guidance acts, 0 (data) to 1 (noise).
            conditioning_scale: strength of the conditions, for all or by name: 1 as trained, 0 absent. MMFace scales
                predictions, s_k in v = v_0 + sum_k s_k (v_k - v_0); MDiTFace adds log s_k to the logits of keys.
            control_guidance_start: fraction of the steps at which a condition begins to act, likewise.
            control_guidance_end: fraction at which it ceases to act, likewise.
            num_images_per_prompt: pictures a prompt; those of one prompt follow one another.
            generator: one a picture, or one for all, from which the pictures draw their noise in turn, also that of
                samplers which add some at every step.
            latents: initial noise [B, C, h, w] instead of drawing it.
            sigmas: the scheduler's noise levels, instead of the objective's.
            timesteps: the scheduler's timesteps, likewise; not both.
            output_type: `pil`, `np` ([B, H, W, 3] in [0, 1]), `pt` ([B, 3, H, W] in [0, 1]) or `latent`.
            return_dict: whether to return a `PortraitOutput` or a tuple.
            callback_on_step_end: called as (pipeline, step, timestep, {"latents": ...}) after every step; it may return
                other latents, and stops the loop by setting `pipeline._interrupt`. Such state on the pipeline, as
                everywhere in diffusers, is of one call at a time.
            callback_on_step_end_tensor_inputs: what the callback is given: `latents`.

        Raises:
            InputError: an argument that cannot be used; the sentence says which and how to mend it.
        """
        # 1. Check what was asked for, and spread it over the pictures
        defaults = self.config.defaults
        height = whole_number(defaults["size"] if height is None else height, "height")
        width = whole_number(defaults["size"] if width is None else width, "width")
        steps = whole_number(
            defaults["steps"] if num_inference_steps is None else num_inference_steps, "num_inference_steps"
        )
        guidance = number(defaults["guidance_scale"] if guidance_scale is None else guidance_scale, "guidance_scale")
        interval = interval_of(defaults["guidance_interval"] if guidance_interval is None else guidance_interval)
        prompts, negatives, images = spread(prompt, negative_prompt, control_image, num_images_per_prompt)
        self.check_family(negatives)
        notes: list[str] = []
        size = width, height  # of the images that are returned
        width, height = generation_size(self.config, size, upscale=upscale, force_size=force_size)
        if force_size and (sizes := trained_sizes(self.config)) and size not in sizes:
            trained = format_sizes(sizes)
            notes.append(f"warning: the model was trained at {trained}, not at {width}x{height}: expect artifacts")
        if (width, height) != size and output_type == "latent":
            raise InputError("latents cannot be upscaled: choose another output_type, or leave upscale out")
        self.check_inputs(height, width, steps, guidance, output_type, callback_on_step_end_tensor_inputs)
        controls = self.controls(images, conditioning_scale, control_guidance_start, control_guidance_end)
        if guidance == 1 or self.transformer.config.get("guidance_embeds"):
            negatives = prompts  # nothing reads them
        self._interrupt = False

        # 2. Encode text and conditions, each distinct one once
        texts = list(dict.fromkeys([*prompts, *negatives]))
        text = self.encode_prompts(texts, prompts, notes)
        condition_latents, condition_rows, conditions = self.encode_conditions(images, height, width, notes)

        # 3. Draw the noise and lay out the steps
        generators = list(generator) if isinstance(generator, Sequence) else generator
        latents = self.prepare_latents(latents, len(prompts), tuple(condition_latents.shape[1:]), generators)
        scheduler = copy.deepcopy(self.scheduler)  # its state belongs to this call
        objective = make_objective(self.config.objective)
        shift = {}
        if scheduler.config.get("use_dynamic_shifting"):
            shift = {"mu": dynamic_shift(latents[0, 0].numel() // self.patch_size**2, scheduler.config)}
        if sigmas is not None or timesteps is not None:
            chosen = own_steps(scheduler, sigmas=sigmas, timesteps=timesteps)
            scheduler.set_timesteps(**chosen, **shift, device=latents.device)
        elif type(scheduler) is type(objective.scheduler()):
            scheduler.set_timesteps(**objective.schedule(steps), **shift, device=latents.device)
        else:
            scheduler.set_timesteps(num_inference_steps=steps, **shift, device=latents.device)
        latents = latents * getattr(scheduler, "init_noise_sigma", 1.0)
        times = objective.time_of(scheduler.timesteps)  # [S]
        levels = objective.noise_level(times.cpu()).tolist()
        self._num_timesteps = len(times)
        noise = {"generator": generators} if "generator" in inspect.signature(scheduler.step).parameters else {}

        # 4. Plan the passes of every group of pictures that run together
        job = Job(
            prompts=[texts.index(text) for text in prompts],
            negatives=[texts.index(text) for text in negatives],
            text=text,
            controls=controls,
            conditions=conditions,
            condition_latents=condition_latents,
            condition_rows=condition_rows,
            guidance=[guidance if interval[0] <= level <= interval[1] else 1.0 for level in levels],
            times=objective.model_time(times),
        )
        streams = [self.calls(job, group) for group in self.groups(len(prompts))]

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
                for call in map(next, streams):
                    time = job.times[i].expand(len(call.items))  # [P]
                    output = self.transformer(scaled[call.items].to(dtype), time, **call.arguments).float()
                    for item, weight, one in zip(call.items, call.weights, output, strict=True):
                        prediction[item] += weight * one
                latents = scheduler.step(prediction, timestep, latents, **noise, return_dict=False)[0]
                if callback_on_step_end is not None:
                    given = {name: {"latents": latents}[name] for name in callback_on_step_end_tensor_inputs}
                    latents = (callback_on_step_end(self, i, timestep, given) or {}).get("latents", latents)
                progress.update()

        # 6. Decode
        images_out = self.decode(latents, output_type, size)
        self.maybe_free_model_hooks()
        return PortraitOutput(images=images_out, notes=notes) if return_dict else (images_out,)

    @property
    def num_timesteps(self) -> int:
        """Steps of the present call, for callbacks."""
        return self._num_timesteps

    @property
    def interrupt(self) -> bool:
        """Whether a callback has stopped the present call."""
        return self._interrupt

    def groups(self, count: int) -> list[range]:
        """Which pictures run together: on a CPU each by itself, so that its bits depend on nothing else."""
        alone = self._execution_device.type == "cpu"
        return [range(item, item + 1) for item in range(count)] if alone else [range(count)]

    def check_inputs(
        self, height: int, width: int, steps: int, guidance: float, output_type: str, tensor_inputs: Sequence[str]
    ) -> None:
        """Refuse what cannot be made, in one sentence."""
        unit = spatial_factor(self.vae) * self.patch_size
        if height % unit or width % unit or min(height, width) < unit:
            near = [max(unit, round(side / unit) * unit) for side in (width, height)]
            raise InputError(
                f"Size {width}x{height} is not supported: both sides must be multiples of {unit}. "
                f"Nearest: {near[0]}x{near[1]}"
            )
        if steps < 1:
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
        usable = ", ".join(name for name in rows if name in CONDITIONS) or "words only"
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
                raise InputError(f"the condition {name!r} is unknown; this checkpoint takes {usable}")
            if name not in rows:
                raise InputError(f"this checkpoint was not trained with {name}: it takes {usable}")

        def of(values: float | Mapping[str, float], name: str, otherwise: float, what: str) -> float:
            return number(values.get(name, otherwise) if isinstance(values, Mapping) else values, what)

        control = {
            name: Control(
                scale=of(scale, name, 1.0, "conditioning_scale"),
                start=of(start, name, 0.0, "control_guidance_start"),
                end=of(end, name, 1.0, "control_guidance_end"),
            )
            for name in given
        }
        for name, c in control.items():
            if not math.isfinite(c.scale) or c.scale < 0:
                raise InputError(f"the scale of {name} is {c.scale}; it must be a finite number of at least 0")
            if not 0 <= c.start <= c.end <= 1:
                raise InputError(f"{name} acts from {c.start} to {c.end}; both must lie in [0, 1], the start first")
        return [{name: control[name] for name in image} for image in images]

    def encode_prompts(self, texts: Sequence[str], prompts: Sequence[str], notes: list[str]) -> TextFeatures:
        """Features of distinct texts, tokens [T, L, D]; notes which words did not fit."""
        limit = self.config.max_text_tokens
        for text in texts:
            if cut := truncated_text(getattr(self, "tokenizer_2", None) or self.tokenizer, text, limit):
                which = "prompt" if text in prompts else "negative prompt"
                notes.append(f"the {which} is longer than {limit} tokens; this was cut: {cut!r}")
        return TextFeatures(*(x.to(self._execution_device, self.transformer.dtype) for x in self.text_features(texts)))

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
                        reading = CONDITIONS[name].read(source.cpu().numpy() if isinstance(source, Tensor) else source)
                        notes.extend([f"{name}: {reading.scheme}", *(f"{name}: {note.text}" for note in reading.notes)])
                    if reading.size is not None:
                        check_aspect(
                            (round(reading.size[1]), round(reading.size[0])), (height, width), f"picture of the {name}"
                        )
                    pictures.append(render(CONDITIONS[name], reading.raw, height, width, self.config.condition_resize))
                    rows.append(names.index(name))
                    numbers[key] = len(pictures)
                found[name] = numbers[key]
            of_item.append(found)
        device, dtype = self._execution_device, self.transformer.dtype
        factor = spatial_factor(self.vae)
        latents = torch.zeros(1, self.vae.config.latent_channels, height // factor, width // factor)
        if pictures:
            latents = torch.cat([latents, self.codec.encode(to_tensor(pictures).to(device)).cpu()])
        return latents.to(device, dtype), torch.tensor(rows, device=device), of_item

    def prepare_latents(
        self,
        latents: Tensor | None,
        count: int,
        shape: tuple[int, ...],
        generator: torch.Generator | list[torch.Generator] | None,
    ) -> Tensor:
        """Initial noise [B, C, h, w], float32. Each picture draws its own, so that a batch changes nothing."""
        device = self._execution_device
        if latents is not None:
            if tuple(latents.shape) != (count, *shape):
                raise InputError(f"latents have the shape {tuple(latents.shape)}; this call needs {(count, *shape)}")
            return latents.to(device, torch.float32)
        generators = generator if isinstance(generator, list) else [generator] * count
        if len(generators) != count:
            raise InputError(f"{len(generators)} generators for {count} pictures: give one, or one a picture")
        drawn = [
            torch.randn((1, *shape), generator=g, device=g.device if g is not None else "cpu").to(device)
            for g in generators
        ]
        return torch.cat(drawn)

    @property
    def codec(self) -> LatentCodec:
        """The autoencoder with this checkpoint's latent statistics."""
        return LatentCodec(self.vae, self.config.latent_mean, self.config.latent_std)

    def decode(self, latents: Tensor, output_type: str = "pil", size: tuple[int, int] | None = None) -> Any:
        """Decode latents [B, C, h, w] to images of the given type, of `size` (width, height) if that differs."""
        if output_type == "latent":
            return latents
        pictures = self.codec.decode(latents)  # [B, 3, H, W]
        if size is not None and size != (pictures.shape[-1], pictures.shape[-2]):
            pictures = resample(pictures, *size)
        if output_type == "pt":
            return pictures.add(1).div(2).clamp(0, 1)
        if output_type == "np":
            return pictures.add(1).div(2).clamp(0, 1).permute(0, 2, 3, 1).cpu().numpy()
        return [Image.fromarray(picture) for picture in to_pixels(pictures)]


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


def resample(images: Tensor, width: int, height: int) -> Tensor:
    """Resample images [B, 3, H, W] in [-1, 1] to [B, 3, height, width] with Pillow's Lanczos filter.

    Values are clamped first, as in the image of the former size, and computed in float32 on the CPU.
    """
    channels = [Image.fromarray(channel) for channel in images.flatten(0, 1).float().clamp(-1, 1).cpu().numpy()]
    resized = [np.asarray(channel.resize((width, height), Image.Resampling.LANCZOS)) for channel in channels]
    return torch.from_numpy(np.stack(resized)).unflatten(0, (-1, 3)).to(images.device)  # [B, 3, height, width]
