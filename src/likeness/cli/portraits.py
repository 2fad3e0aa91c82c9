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
from likeness.cli.terminal import PathArgument, progress_bar, quiet_libraries, tell
from likeness.runtime import choose_threads, optional_packages_hidden, set_threads
from likeness.types import DtypeName, InputError, PortraitRequest
from likeness.weights.catalog import BUNDLED, bundled_models

DTYPE_NAMES: dict[str, DtypeName] = {"float32": "fp32", "float16": "fp16", "bfloat16": "bf16"}
"""Number format in a recipe -> `--dtype`."""

MOST_IMAGES = 1000
"""Upper bound of `--count`."""


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
    model: str = "mmface-mini",
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
        sketch: Dark lines on white.
        keypoints: 68 or 478 points (.json, .npy, .csv, .pts).
        mask_scale: Strength of the mask; 0 is the same as no mask.
        sketch_scale: Strength of the sketch.
        keypoints_scale: Strength of the keypoints.
        control_guidance_start: Fraction of the steps at which conditions start to act.
        control_guidance_end: Fraction of the steps at which conditions stop acting.
        model: Bundled model, folder of a model or an adapter, or hub id.
        base: Base model of an adapter. Default: the one that the adapter names.
        lora: LoRAs made for FLUX.1: files, folders or hub ids, each as FILE or FILE=STRENGTH.
        lora_strict: Reject a LoRA that fits only in part.
        steps: Sampling steps. Default: that of the model.
        guidance_scale: Classifier-free guidance scale; 1 disables guidance. Default: that of the model.
        seed: Seed of the first image; each further image uses the next seed. Default: random.
        count: Number of images, at most 1000. Each is written as soon as it is made.
        size: Width x height in pixels, as 128 or 128x160. Default: that of the model, which rejects untrained sizes.
        upscale: If the model was not trained at SIZE, generate at the nearest trained size and resample (Lanczos).
        force_size: Generate at SIZE even if the model was not trained at it. Expect artifacts.
        out: File, its stem for several images, or a folder (with a trailing slash it is created if missing). Default:
            the current folder. In a folder, images get the next free name portrait-001, portrait-002, ...
        format: File format if OUT has no suffix.
        metadata: Write the recipe and the mark of generated media into the file.
        device: Device, for example cuda or cpu; auto takes an accelerator if present.
        dtype: Number format; auto is fp32 on a CPU, bf16 or fp16 on an accelerator.
        quantize: Store the matrices of FLUX.1's transformer in 8 bits.
        offload: Keep only the active part of the model on the accelerator.
    """
    from likeness.pipelines.sizes import parse_size

    width, height = (None, None) if size is None else parse_size(size, "--size")
    if not 1 <= count <= MOST_IMAGES:
        raise InputError(f"--count is {count}; it must be from 1 to {MOST_IMAGES}")
    first = secrets.randbelow(2**31) if seed is None else seed
    given = {"mask": mask, "sketch": sketch, "keypoints": keypoints}
    scales = {"mask": mask_scale, "sketch": sketch_scale, "keypoints": keypoints_scale}
    given = {name: path for name, path in given.items() if path is not None}
    names, overwrite = image_names(out, format, count, given.values())
    request = PortraitRequest(
        prompt=prompt,
        negative_prompt=negative_prompt,
        control_image=given,
        conditioning_scale={name: scales[name] for name in given},
        control_guidance_start=dict.fromkeys(given, control_guidance_start),
        control_guidance_end=dict.fromkeys(given, control_guidance_end),
        guidance_scale=guidance_scale,
        num_inference_steps=steps,
        width=width,
        height=height,
        upscale=upscale,
        force_size=force_size,
        seed=first,
    )
    # Conditions are read before the model is loaded: a wrong file should not cost a wait.
    from likeness.conditions import read_conditions

    request, notes = read_conditions(request)
    tell(notes)
    loras = [parse_lora(text) for text in lora]

    bare = model in bundled_models() and not (loras or quantize)
    with optional_packages_hidden() if bare else nullcontext():
        from likeness.pipelines.adapters import add_loras
        from likeness.pipelines.generate import batches, resolve, work_of
        from likeness.pipelines.generate import generate as make
        from likeness.pipelines.record import recipe_of
        from likeness.weights.hashes import pipeline_hash

        pipeline = load_pipeline(model, dtype, device, base, quantize, offload)
    tell([f"left out of the LoRA: {line}" for line in add_loras(pipeline, loras, strict=lora_strict)])
    requests = [resolve(dataclasses.replace(request, seed=first + index), pipeline) for index in range(count)]
    height, width = requests[0].height, requests[0].width
    assert height
    assert width
    if pipeline._execution_device.type == "cpu":
        choose_threads(work_of(pipeline, height, width))
    fingerprint = pipeline_hash(pipeline) if metadata else ""
    named: dict[str, Any] = {"model": model, "base": base, "quantize": quantize, "fingerprint": fingerprint}
    told: set[str] = set()
    with exit_on_sigterm(), progress_bar("Generating") as advance:
        for done, batch in batches(requests, pipeline):
            pictures, notes = make(
                pipeline,
                batch[0],
                [one.seed for one in batch],
                lambda step, steps, done=done, batch=batch: advance(done * steps + step * len(batch), count * steps),
            )
            tell([note for note in notes if note not in told])
            told.update(notes)
            for picture, one in zip(pictures, batch, strict=True):
                recipe = recipe_of(one, pipeline, **named) if metadata else None
                print(f"{save_image(picture, recipe, names, overwrite)}  seed {one.seed}", flush=True)


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

    from likeness.pipelines.record import differences, read_recipe, request_of

    recipe, pixels = read_recipe(image)
    request = request_of(recipe)
    request = dataclasses.replace(request, force_size=not request.upscale)  # accepted when the image was made
    suffix = image.suffix.removeprefix(".")
    names, overwrite = (iter(()), False) if out is None else image_names(out, suffix, 1, [image])

    from likeness.pipelines.adapters import act_again
    from likeness.pipelines.generate import generate as make
    from likeness.pipelines.generate import resolve
    from likeness.weights.hashes import pipeline_hash

    device = device or ("cpu" if recipe["environment"].get("device") == "cpu" else "auto")
    dtype = DTYPE_NAMES[recipe["environment"]["dtype"]]
    base = base or recipe.get("base")
    pipeline = load_pipeline(model or recipe["model"], dtype, device, base, recipe.get("quantize"), offload)
    act_again(pipeline, recipe.get("adapters", {}))
    threads = recipe["environment"].get("threads")
    if isinstance(threads, int) and 1 <= threads <= (os.cpu_count() or 1):
        set_threads(threads)  # the bits of a matrix product depend on them
    with exit_on_sigterm(), progress_bar("Generating") as advance:
        pictures, _ = make(pipeline, resolve(request, pipeline), [request.seed], advance)
        again = np.asarray(pictures[0])
        if out is not None:
            print(save_image(pictures[0], recipe, names, overwrite))
    circumstances = differences(recipe, pipeline, pipeline_hash(pipeline))
    tell(circumstances)
    if again.shape == pixels.shape and (again == pixels).all():
        print(f"{image}: the same to the bit")
        return
    lossy = image.suffix.lower() in (".jpg", ".jpeg")
    changed = np.abs(again.astype(int) - pixels) if again.shape == pixels.shape else np.array([255])
    reason = "a JPEG's pixels are not exact" if lossy else "see above" if circumstances else "its pixels were changed"
    share = f"{(changed > 0).mean():.1%} of values differ, by {changed.max()} at most"
    raise InputError(f"{image} came out differently: {share} ({reason})")


def inspect(
    file: PathArgument, *, condition: Literal["mask", "sketch", "keypoints"] | None = None, fix: Path | None = None
) -> None:
    """Say what a mask, sketch or keypoints file is: its form, its classes with their shares, its problems.

    Args:
        file: The file, or a folder of part files.
        condition: What it should be taken for; recognised by default.
        fix: Where to write it in canonical form, mended.
    """
    from likeness.conditions import inspection

    report = inspection.inspect(file, condition)
    print(inspection.format_report(report))
    if fix is not None:
        inspection.fix(report, fix)
        print(f"{fix}: written in canonical form")


def models() -> None:
    """List the bundled models with the sizes they were trained at."""
    import json

    from likeness.pipelines.sizes import format_sizes, trained_sizes

    for name in bundled_models():
        index = json.loads((BUNDLED / name / "model_index.json").read_text())
        config = json.loads((BUNDLED / name / "transformer" / "config.json").read_text())
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
    """`style.safetensors` or `style.safetensors=0.6` as (source, strength)."""
    source, _, strength = text.rpartition("=")
    try:
        found = (source, float(strength)) if source else (text, 1.0)
    except ValueError:
        found = (text, 1.0)  # the name itself has the sign
    if not math.isfinite(found[1]):
        raise InputError(f"--lora is {text!r}; give a file, or a file and its strength as FILE=0.6")
    return found
