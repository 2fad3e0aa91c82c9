"""Commands that generate images, and describe files and models."""

from __future__ import annotations

import dataclasses
import math
import os
import secrets
from contextlib import nullcontext
from pathlib import Path
from typing import Any, Literal

import tyro

from likeness.cli.output import exit_on_sigterm, image_names, save_image
from likeness.cli.terminal import PathArgument, print_notes, progress_bar, quiet_libraries
from likeness.files import read_json
from likeness.pipelines.sizes import format_sizes, parse_size, trained_sizes
from likeness.runtime import choose_threads, optional_packages_hidden, set_threads
from likeness.types import ConditionInput, DtypeName, InputError, PortraitRequest
from likeness.weights.catalog import BUNDLED, DEFAULT, MASK_MODEL, bundled_models

DTYPE_NAMES: dict[str, DtypeName] = {"float32": "fp32", "float16": "fp16", "bfloat16": "bf16"}
"""Dtype in a recipe -> `--dtype`."""

MAX_COUNT = 1000
"""Largest `--count`."""


def generate(
    prompt: tyro.conf.Positional[str] = "",
    *,
    negative_prompt: str = "",
    mask: Path | None = None,
    sketch: Path | None = None,
    keypoints: Path | None = None,
    mask_scale: float = 1.0,
    sketch_scale: float = 1.0,
    keypoints_scale: float = 1.0,
    control_guidance_start: float = 0.0,
    control_guidance_end: float = 1.0,
    via_mask: bool = False,
    mask_model: str = MASK_MODEL,
    model: str = DEFAULT,
    base: str | None = None,
    lora: tuple[str, ...] = (),
    lora_strict: bool = True,
    steps: int | None = None,
    guidance_scale: float | None = None,
    seed: int | None = None,
    count: int = 1,
    size: str | None = None,
    upscale: bool = False,
    force_size: bool = False,
    out: str | None = None,
    format: Literal["png", "jpg", "webp"] = "png",
    metadata: bool = True,
    device: str = "auto",
    dtype: DtypeName = "auto",
    quantize: Literal["int8"] | None = None,
    offload: bool = False,
) -> None:
    """Generate face images from text, a mask, a sketch or keypoints, in any combination.

    Args:
        prompt: Text prompt. Without a prompt and a condition: any face.
        negative_prompt: What the image should not show.
        mask: Semantic mask; `likeness inspect` lists the supported forms.
        sketch: Sketch, dark lines on white.
        keypoints: 68 or 478 points (.json, .npy, .csv, .pts).
        mask_scale: Strength of the mask; 0 is the same as no mask.
        sketch_scale: Strength of the sketch.
        keypoints_scale: Strength of the keypoints.
        control_guidance_start: Fraction of the steps at which conditions start to act.
        control_guidance_end: Fraction of the steps at which conditions stop acting.
        via_mask: Generate a mask from the prompt first (as `likeness mask propose` does), then the image from both.
        mask_model: Model that generates this mask.
        model: Bundled model, folder of a model or an adapter, or hub id.
        base: Base model of an adapter. Default: the one that the adapter names.
        lora: LoRAs made for FLUX.1: files, folders or hub ids, each as FILE or FILE=STRENGTH.
        lora_strict: Reject a LoRA that matches the network only in part.
        steps: Sampling steps. Default: that of the model.
        guidance_scale: Classifier-free guidance scale; 1 disables guidance. Default: that of the model.
        seed: Seed of the first image; each further image uses the next seed. Default: random.
        count: Number of images, at most 1000. Each is written as soon as it is generated.
        size: Width x height in pixels, as 128 or 128x160. Default: that of the model, which rejects untrained sizes.
        upscale: If the model was not trained at SIZE, generate at the nearest trained size and resample (Lanczos).
        force_size: Generate at SIZE even if the model was not trained at it. Expect artifacts.
        out: File, its stem for several images, or a folder (with a trailing slash it is created if missing). Default:
            the current folder. In a folder, images get the next free name portrait-001, portrait-002, ...
        format: File format if OUT has no suffix.
        metadata: Write the recipe and the mark of generated media into the file.
        device: Device, for example cuda or cpu; auto takes an accelerator if present.
        dtype: Dtype; auto is fp32 on a CPU, bf16 or fp16 on an accelerator.
        quantize: Store the matrices of FLUX.1's transformer in 8 bits.
        offload: Keep only the active part of the model on the accelerator.
    """
    width, height = (None, None) if size is None else parse_size(size, "--size")
    if not 1 <= count <= MAX_COUNT:
        raise InputError(f"--count is {count}; it must be from 1 to {MAX_COUNT}")
    if via_mask and mask is not None:
        raise InputError("--via-mask generates a mask: leave --mask out")
    first = secrets.randbelow(2**31) if seed is None else seed
    files = {"mask": (mask, mask_scale), "sketch": (sketch, sketch_scale), "keypoints": (keypoints, keypoints_scale)}
    interval = {"start": control_guidance_start, "end": control_guidance_end}
    conditions = {
        name: ConditionInput(image=file, scale=scale, **interval)
        for name, (file, scale) in files.items()
        if file is not None
    }
    names, overwrite = image_names(out, format, count, [condition.image for condition in conditions.values()])
    request = PortraitRequest(
        prompt=prompt,
        negative_prompt=negative_prompt,
        conditions=conditions,
        guidance_scale=guidance_scale,
        num_inference_steps=steps,
        width=width,
        height=height,
        upscale=upscale,
        force_size=force_size,
        seed=first,
    )
    # Read conditions before loading the model, so that invalid files are reported at once
    from likeness.conditions import read_conditions

    request, notes = read_conditions(request)
    print_notes(notes)
    loras = [parse_lora(text) for text in lora]

    core_only = model in bundled_models() and not (loras or quantize)
    with optional_packages_hidden() if core_only else nullcontext():
        from likeness.pipelines.adapters import add_loras
        from likeness.pipelines.generate import batches, resolve, work_of
        from likeness.pipelines.generate import generate as generate_images
        from likeness.pipelines.image_recipe import recipe_of
        from likeness.pipelines.propose import add_mask
        from likeness.weights.hashes import pipeline_hash

        pipeline = load_pipeline(model, dtype, device, base, quantize, offload)
        mask_pipeline = load_pipeline(mask_model, dtype, device) if via_mask else None
    print_notes([f"left out of the LoRA: {line}" for line in add_loras(pipeline, loras, strict=lora_strict)])
    requests = [resolve(dataclasses.replace(request, seed=first + index), pipeline) for index in range(count)]
    height, width = requests[0].height, requests[0].width
    assert height
    assert width
    if pipeline._execution_device.type == "cpu":
        choose_threads(work_of(pipeline, height, width))
    fingerprint = pipeline_hash(pipeline) if metadata else ""
    source: dict[str, Any] = {"model": model, "base": base, "quantize": quantize, "fingerprint": fingerprint}
    encoded: dict[Any, Any] = {}
    reported: set[str] = set()
    with exit_on_sigterm(), progress_bar("Generating") as advance:
        for done, batch in batches(requests, pipeline, single=via_mask):
            if mask_pipeline is not None:
                batch = [add_mask(one, mask_pipeline) for one in batch]
            images, notes = generate_images(
                pipeline,
                batch[0],
                [one.seed for one in batch],
                lambda step, steps, done=done, batch=batch: advance(done * steps + step * len(batch), count * steps),
                encoded,
            )
            print_notes([note for note in notes if note not in reported])
            reported.update(notes)
            for image, one in zip(images, batch, strict=True):
                recipe = recipe_of(one, pipeline, **source) if metadata else None
                print(f"{save_image(image, recipe, names, overwrite)}  seed {one.seed}", flush=True)


def replay(
    image: PathArgument,
    *,
    model: str | None = None,
    base: str | None = None,
    out: str | None = None,
    device: str | None = None,
    offload: bool = False,
) -> None:
    """Generate an image again from the recipe in its file, and report whether it is bit-identical.

    Args:
        image: An image that likeness generated.
        model: The model, if it is stored elsewhere now.
        base: The base model of an adapter, if it is stored elsewhere now.
        out: File or folder to write the new image to.
        device: Device, for example cuda or cpu. Default: the CPU if the image was generated there, else automatic.
        offload: Keep only the active part of the model on the accelerator.
    """
    import numpy as np

    from likeness.pipelines.image_recipe import differences, read_recipe, request_of

    recipe, pixels = read_recipe(image)
    request = request_of(recipe)
    request = dataclasses.replace(request, force_size=not request.upscale)  # accepted when the image was generated
    suffix = image.suffix.removeprefix(".")
    names, overwrite = (iter(()), False) if out is None else image_names(out, suffix, 1, [image])

    from likeness.pipelines.adapters import restore_adapters
    from likeness.pipelines.generate import generate as generate_images
    from likeness.pipelines.generate import resolve
    from likeness.weights.hashes import pipeline_hash

    environment = recipe["environment"]
    device = device or ("cpu" if environment.get("device") == "cpu" else "auto")
    dtype = DTYPE_NAMES[environment["dtype"]]
    base = base or recipe.get("base")
    pipeline = load_pipeline(model or recipe["model"], dtype, device, base, recipe.get("quantize"), offload)
    restore_adapters(pipeline, recipe.get("adapters", {}))
    threads = environment.get("threads")
    if isinstance(threads, int) and 1 <= threads <= (os.cpu_count() or 1):
        set_threads(threads)  # the rounding of matrix products depends on them
    with exit_on_sigterm(), progress_bar("Generating") as advance:
        images, _ = generate_images(pipeline, resolve(request, pipeline), [request.seed], advance)
        again = np.asarray(images[0])
        if out is not None:
            print(save_image(images[0], recipe, names, overwrite))
    changes = differences(recipe, pipeline, pipeline_hash(pipeline))
    print_notes(changes)
    if again.shape == pixels.shape and (again == pixels).all():
        print(f"{image}: bit-identical")
        return
    lossy = image.suffix.lower() in (".jpg", ".jpeg")
    changed = np.abs(again.astype(int) - pixels) if again.shape == pixels.shape else np.array([255])
    reason = "JPEG is lossy" if lossy else "see above" if changes else "its pixels were modified"
    fraction = f"{(changed > 0).mean():.1%} of values differ, by at most {changed.max()}"
    raise InputError(f"{image} is not reproduced: {fraction} ({reason})")


def inspect(
    file: PathArgument, *, condition: Literal["mask", "sketch", "keypoints"] | None = None, fix: Path | None = None
) -> None:
    """Report the format, classes and problems of a mask, sketch or keypoints file.

    Args:
        file: File, or folder of part files.
        condition: Kind of the file. Default: recognized.
        fix: File to write in canonical form, with problems repaired.
    """
    from likeness.conditions import inspection

    report = inspection.inspect(file, condition)
    print(inspection.format_report(report))
    if fix is not None:
        inspection.fix(report, fix)
        print(f"{fix}: written in canonical form")


def models() -> None:
    """List the bundled models with the sizes they were trained at."""
    for name in bundled_models():
        index = read_json(BUNDLED / name / "model_index.json")
        config = read_json(BUNDLED / name / "transformer" / "config.json")
        conditions = ", ".join(c for c in config["condition_names"] if c != "none")
        print(f"{name}  {index['_class_name']}  {format_sizes(trained_sizes(index))}  text, {conditions}")


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


def parse_lora(text: str) -> tuple[str, float]:
    """Parse `style.safetensors` or `style.safetensors=0.6` as (source, strength)."""
    source, _, strength = text.rpartition("=")
    try:
        lora = (source, float(strength)) if source else (text, 1.0)
    except ValueError:
        lora = (text, 1.0)  # the name contains "="
    if not math.isfinite(lora[1]):
        raise InputError(f"--lora is {text!r}; pass a file, or a file and its strength as FILE=0.6")
    return lora
