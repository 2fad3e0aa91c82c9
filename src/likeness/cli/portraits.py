"""Commands that generate images, and describe files and models. The fields of a command are its options."""

from __future__ import annotations

import dataclasses
import itertools
import math
import os
import secrets
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import tyro

from likeness.cli.output import MAX_COUNT, exit_on_sigterm, image_names, save_image
from likeness.cli.terminal import PathArgument, print_notes, progress_bar, quiet_libraries
from likeness.files import read_json
from likeness.pipelines.formats import FORMATS, format_of
from likeness.pipelines.sizes import format_sizes, parse_size, trained_sizes
from likeness.runtime import choose_threads, optional_packages_hidden, set_threads
from likeness.types import ConditionInput, DtypeName, InputError, PortraitRequest
from likeness.weights.catalog import BUNDLED, DEFAULT, MASK_MODEL, bundled_models


@dataclass(frozen=True, kw_only=True)
class ModelOptions:
    """Options of commands that generate images with a model."""

    model: str = DEFAULT
    """Bundled model, folder of a model, an adapter or a training run, or hub id."""
    base: str | None = None
    """Base model of an adapter. Default: the one that the adapter names."""
    steps: int | None = None
    """Sampling steps, 1 to 1000. Default: that of the model."""
    guidance_scale: float | None = None
    """Classifier-free guidance scale; 1 disables guidance. Default: that of the model."""
    device: str = "auto"
    """Device, for example cuda or cpu; auto takes an accelerator if present."""
    dtype: DtypeName = "auto"
    """Dtype; auto is fp32 on a CPU, bf16 or fp16 on an accelerator."""


@dataclass(frozen=True, kw_only=True)
class RequestOptions(ModelOptions):
    """Options of commands that generate from a prompt and conditions."""

    prompt: tyro.conf.Positional[str] = ""
    """Text prompt. Without a prompt and a condition: any face."""
    negative_prompt: str = ""
    """What the image should not show."""
    mask: Path | None = None
    """Semantic mask: index or palette PNG, color image, one-hot array, or folder of part files (docs/masks.md)."""
    sketch: Path | None = None
    """Sketch, dark lines on white."""
    keypoints: Path | None = None
    """68 (iBUG), 468 or 478 (MediaPipe) points (.json, .npy, .npz, .csv, .txt, .pts)."""
    size: str | None = None
    """Width x height in pixels, as 128 or 128x160. Default: that of the model, which rejects untrained sizes."""
    force_size: bool = False
    """Generate at SIZE even if the model was not trained at it. Expect artifacts."""

    def files(self) -> dict[str, Path]:
        """Return the files of the conditions."""
        files = {"mask": self.mask, "sketch": self.sketch, "keypoints": self.keypoints}
        return {name: file for name, file in files.items() if file is not None}

    def request(
        self, conditions: dict[str, ConditionInput], seed: int, *, upscale: bool = False
    ) -> tuple[PortraitRequest, list[str]]:
        """Return the request with its conditions read, and notes on them. Call it before the model is loaded.

        Raises:
            InputError: the size or a condition is invalid.
        """
        from likeness.conditions import read_conditions

        width, height = (None, None) if self.size is None else parse_size(self.size, "--size")
        request = PortraitRequest(
            prompt=self.prompt,
            negative_prompt=self.negative_prompt,
            conditions=conditions,
            guidance_scale=self.guidance_scale,
            num_inference_steps=self.steps,
            width=width,
            height=height,
            upscale=upscale,
            force_size=self.force_size,
            seed=seed,
        )
        return read_conditions(request)


@dataclass(frozen=True, kw_only=True)
class Generate(RequestOptions):
    """Generate face images from text, a mask, a sketch or keypoints, in any combination."""

    seed: int | None = None
    """Seed of the first image; each further image uses the next seed. Default: random."""
    mask_scale: float = 1.0
    """Strength of the mask; 0 is the same as no mask."""
    sketch_scale: float = 1.0
    """Strength of the sketch."""
    keypoints_scale: float = 1.0
    """Strength of the keypoints."""
    control_guidance_start: float = 0.0
    """Fraction of the steps at which conditions start to act."""
    control_guidance_end: float = 1.0
    """Fraction of the steps at which conditions stop acting."""
    via_mask: bool = False
    """Generate a mask from the prompt first (as `likeness mask propose` does), then the image from both."""
    mask_model: str = MASK_MODEL
    """Model that generates this mask."""
    lora: tuple[str, ...] = ()
    """LoRAs made for the network of the model: files, folders or hub ids, each as FILE or FILE=STRENGTH."""
    lora_strict: bool = True
    """Reject a LoRA that matches the network only in part."""
    count: int = 1
    """Number of images, at most 1000. Each is written as soon as it is generated."""
    upscale: bool = False
    """If the model was not trained at SIZE, generate at the nearest trained size and resample (Lanczos) to at
    most 4096 pixels per side."""
    out: str | None = None
    """File, its stem for several images, or a folder (with a trailing slash it is created if missing). Default: the
    current folder. In a folder, images get the next free name portrait-001, portrait-002, ..."""
    format: Literal["png", "jpg", "webp"] = "png"
    """File format if OUT has no suffix."""
    metadata: bool = True
    """Write the recipe and the label for generated media into the file."""
    quantize: Literal["int8"] | None = None
    """Store the matrices of FLUX.1's transformer in 8 bits."""
    offload: bool = False
    """Keep only the active part of the model on the accelerator."""

    def __call__(self) -> None:
        if not 1 <= self.count <= MAX_COUNT:
            raise InputError(f"--count is {self.count}; it must be from 1 to {MAX_COUNT}")
        if self.via_mask and self.mask is not None:
            raise InputError("--via-mask generates a mask: leave --mask out")
        if self.quantize and self.model in bundled_models():
            raise InputError(f"--quantize is for FLUX.1, and {self.model} is not: leave --quantize out")
        files = self.files()
        names, overwrite = image_names(self.out, self.format, self.count, files.values())
        first = secrets.randbelow(2**31) if self.seed is None else self.seed
        interval = {"start": self.control_guidance_start, "end": self.control_guidance_end}
        conditions = {
            name: ConditionInput(image=file, scale=getattr(self, f"{name}_scale"), **interval)
            for name, file in files.items()
        }
        request, notes = self.request(conditions, first, upscale=self.upscale)
        print_notes([*notes, *self.idle_options()])
        loras = [parse_lora(text) for text in self.lora]

        models = {self.model, *([self.mask_model] if self.via_mask else [])}
        core_only = models <= set(bundled_models()) and not (loras or self.quantize)
        with progress_bar(f"Loading {self.model}"), optional_packages_hidden() if core_only else nullcontext():
            from likeness.pipelines.adapters import add_loras
            from likeness.pipelines.arguments import check_texts
            from likeness.pipelines.generate import batches, resolve
            from likeness.pipelines.generate import generate as generate_images
            from likeness.pipelines.image_recipe import check_fits, recipe_of
            from likeness.weights.hashes import pipeline_hash

            pipeline = load_pipeline(self.model, self.dtype, self.device, self.base, self.quantize, self.offload)
            mask_pipeline = load_pipeline(self.mask_model, self.dtype, self.device) if self.via_mask else None
        print_notes([f"left out of the LoRA: {line}" for line in add_loras(pipeline, loras, strict=self.lora_strict)])
        requests = [resolve(dataclasses.replace(request, seed=first + index), pipeline) for index in range(self.count)]
        units = (requests[0].num_inference_steps or 0) + 1  # of an image: its steps, and decoding with saving
        total = self.count * units
        size = () if self.upscale else (requests[0].height, requests[0].width)  # upscaled from a trained size
        adapt_threads(pipeline, *size)
        fingerprint = pipeline_hash(pipeline) if self.metadata else ""
        check_texts((request.prompt, request.negative_prompt))
        if self.metadata:
            first_name = next(names)
            names = itertools.chain([first_name], names)
            check_fits(
                recipe_of(requests[0], pipeline, **pipeline.source, fingerprint=fingerprint), format_of(first_name)
            )
        encoded: dict[Any, Any] = {}
        reported: set[str] = set()
        with exit_on_sigterm(), progress_bar("Generating") as advance:
            for done, batch in batches(requests, pipeline, single=self.via_mask):
                if mask_pipeline is not None:
                    from likeness.pipelines.propose import add_mask  # imports scipy

                    acts = {"scale": self.mask_scale, **interval}
                    batch = [add_mask(one, mask_pipeline, acts) for one in batch]
                images, notes = generate_images(
                    pipeline,
                    batch[0],
                    [one.seed for one in batch],
                    lambda step, steps, done=done, batch=batch: advance(done * units + step * len(batch), total),
                    encoded,
                )
                print_notes([note for note in notes if note not in reported])
                reported.update(notes)
                for image, one in zip(images, batch, strict=True):
                    recipe = None
                    if self.metadata:
                        recipe = recipe_of(one, pipeline, **pipeline.source, fingerprint=fingerprint)
                    print(f"{save_image(image, recipe, names, overwrite)}  seed {one.seed}", flush=True)
                advance((done + len(batch)) * units, total)

    def idle_options(self) -> list[str]:
        """One note for each option that has no effect, because another one is missing."""
        given = {*self.files(), *(["mask"] if self.via_mask else [])}
        idle = {f"{name}_scale": f"--{name}" for name in ("mask", "sketch", "keypoints") if name not in given}
        if not given:
            idle |= dict.fromkeys(("control_guidance_start", "control_guidance_end"), "a condition")
        if not self.via_mask:
            idle["mask_model"] = "--via-mask"
        if not self.lora:
            idle["lora_strict"] = "--lora"
        defaults = {field.name: field.default for field in dataclasses.fields(self)}
        return [
            f"--{name.replace('_', '-')} has no effect without {needed}"
            for name, needed in idle.items()
            if getattr(self, name) != defaults[name]
        ]


@dataclass(frozen=True, kw_only=True)
class Replay:
    """Generate an image again from the recipe in its file, and report whether it is bit-identical.

    Bundled models are loaded by the name in the recipe. Pass any other model or LoRA with --model, --base and --lora.
    """

    image: PathArgument
    """An image that likeness generated or edited."""
    photo: Path | None = None
    """The photograph, if the image is an edited one."""
    model: str | None = None
    """The model of the recipe, if it is not bundled."""
    base: str | None = None
    """The base model of an adapter, if the recipe has one."""
    lora: tuple[str, ...] = ()
    """The LoRAs of the recipe, in its order."""
    out: str | None = None
    """File or folder to write the new image to."""
    device: str | None = None
    """Device, for example cuda or cpu. Default: the CPU if the image was generated there, else automatic."""
    offload: bool = False
    """Keep only the active part of the model on the accelerator."""

    def __call__(self) -> None:
        import numpy as np
        from PIL import Image

        from likeness.pipelines.image_recipe import DTYPES, confirmed, differences, read_recipe, recipe_of, request_of

        recipe, pixels = read_recipe(self.image)
        request = request_of(recipe)
        model, base, adapters = confirmed(recipe, self.model, self.base, self.lora)
        request = dataclasses.replace(request, force_size=not request.upscale)  # accepted when the image was generated
        suffix = self.image.suffix.lower().removeprefix(".")
        names, overwrite = iter(()), False
        if self.out is not None:
            suffix = suffix if suffix in FORMATS else "png"
            names, overwrite = image_names(self.out, suffix, 1, filter(None, (self.image, self.photo)))
        edited = bool(recipe.get("edit"))
        if edited and self.photo is None:
            raise InputError(f"{self.image} is an edited photograph: pass the original with --photo FILE")
        if self.photo is not None and not edited:
            raise InputError(f"{self.image} is not an edited photograph: leave --photo out")
        photo = None
        if self.photo is not None:
            from likeness.prepare.edit import open_photo

            photo = open_photo(self.photo)

        from likeness.pipelines.adapters import restore_adapters
        from likeness.pipelines.generate import generate, resolve
        from likeness.weights.hashes import pipeline_hash

        environment = recipe["environment"]
        device = self.device or ("cpu" if environment.get("device") == "cpu" else "auto")
        dtype, quantize = DTYPES[environment["dtype"]], recipe.get("quantize")
        pipeline = load_pipeline(model, dtype, device, base, quantize, self.offload)
        restore_adapters(pipeline, adapters)
        threads = environment.get("threads")
        if type(threads) is int and 1 <= threads <= (os.cpu_count() or 1):
            set_threads(threads)  # the rounding of matrix products depends on them
        with exit_on_sigterm(), progress_bar("Generating") as advance:
            request, fingerprint = resolve(request, pipeline), pipeline_hash(pipeline)
            if photo is not None:
                from likeness.prepare.edit import replay_edit

                again = replay_edit(pipeline, recipe, request, photo, fingerprint=fingerprint, on_step=advance)
                image, own = again.image, again.recipe
            else:
                (image,), _ = generate(pipeline, request, [request.seed], advance)
                own = recipe_of(request, pipeline, model=model, base=base, quantize=quantize, fingerprint=fingerprint)
            values, pixels = (np.asarray(each.convert("RGBA")) for each in (image, Image.fromarray(pixels)))
            if self.out is not None:
                print(save_image(image, own, names, overwrite))
        changes = differences(recipe, pipeline, fingerprint)
        print_notes(changes)
        if values.shape == pixels.shape and (values == pixels).all():
            print(f"{self.image}: bit-identical")
            return
        changed = np.abs(values.astype(int) - pixels) if values.shape == pixels.shape else np.array([[255]])
        modified = "its pixels were modified" + (", or it is a lossy WebP" if suffix == "webp" else "")
        reason = "JPEG is lossy" if suffix in ("jpg", "jpeg") else "see above" if changes else modified
        fraction = f"{(changed > 0).any(-1).mean():.1%} of pixels differ, by at most {changed.max()}"
        raise InputError(f"{self.image} is not reproduced: {fraction} ({reason})")


@dataclass(frozen=True, kw_only=True)
class Inspect:
    """Report the format, classes and problems of a mask, sketch or keypoints file."""

    file: PathArgument
    """File, or folder of part files."""
    condition: Literal["mask", "sketch", "keypoints"] | None = None
    """Kind of the file. Default: recognized."""
    fix: Path | None = None
    """File to write in canonical form, with problems repaired."""

    def __call__(self) -> None:
        from likeness.conditions import inspection

        report = inspection.inspect(self.file, self.condition)
        print(inspection.format_report(report))
        if self.fix is not None:
            inspection.fix(report, self.fix)
            print(f"{self.fix}: written in canonical form")


@dataclass(frozen=True, kw_only=True)
class Models:
    """List the bundled models with the sizes they were trained at."""

    def __call__(self) -> None:
        for name in bundled_models():
            index = read_json(BUNDLED / name / "model_index.json")
            config = read_json(BUNDLED / name / "transformer" / "config.json")
            inputs = ", ".join(["text", *(c for c in config["condition_names"] if c != "none")])
            output = "  (generates masks)" if index["vae"][1] == "LabelDecoder" else ""
            print(f"{name}  {index['_class_name']}  {format_sizes(trained_sizes(index))}  {inputs}{output}")


def load_pipeline(
    model: str,
    dtype: DtypeName,
    device: str,
    base: str | None = None,
    quantize: Literal["int8"] | None = None,
    offload: bool = False,
) -> Any:
    """Load a pipeline for a command."""
    from likeness.pipelines.load import load

    quiet_libraries()
    return load(model, dtype=dtype, device=device, base=base, quantize=quantize, offload=offload)


def adapt_threads(pipeline: Any, height: int | None = None, width: int | None = None) -> None:
    """Choose the number of CPU threads for images of a size. Default: the model's."""
    from likeness.pipelines.generate import work_of

    if pipeline._execution_device.type == "cpu":
        size = pipeline.config.defaults["size"]
        choose_threads(work_of(pipeline, height or size, width or size))


def parse_lora(text: str) -> tuple[str, float]:
    """Parse `style.safetensors` or `style.safetensors=0.6` as (source, strength)."""
    source, _, strength = text.rpartition("=")
    try:
        lora = (source, float(strength)) if source and not Path(text).exists() else (text, 1.0)
    except ValueError:
        lora = (text, 1.0)  # the name contains "="
    if not math.isfinite(lora[1]):
        raise InputError(f"--lora is {text!r}; pass a file, or a file and its strength as FILE=0.6")
    return lora
