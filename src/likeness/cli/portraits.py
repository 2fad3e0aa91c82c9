"""Commands that make portraits, and say what a file or a model is."""

from __future__ import annotations

import dataclasses
import math
import os
import secrets
from contextlib import nullcontext
from pathlib import Path
from typing import Any, Literal

import tyro

from likeness.cli.terminal import PathArgument, progress_bar, quiet_libraries, tell
from likeness.pipelines.catalogue import BUNDLED, bundled_models
from likeness.runtime import choose_threads, optional_packages_hidden, set_threads
from likeness.types import InputError, PortraitRequest


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
    out: Path | None = None,
    format: Literal["png", "jpg", "webp"] = "png",
    metadata: bool = True,
    device: str | None = None,
    dtype: Literal["fp32", "fp16", "bf16"] = "fp32",
    quantize: Literal["int8"] | None = None,
    offload: bool = False,
) -> None:
    """Make portraits from words, a mask, a sketch or keypoints, in any combination.

    Args:
        prompt: What to show; without it and without a condition, any face.
        negative_prompt: What to steer away from.
        mask: Semantic mask; `likeness inspect` says what forms are read.
        sketch: Dark lines on white.
        keypoints: 68 or 478 points (.json, .npy, .csv, .pts).
        mask_scale: Strength of the mask; 0 is the same as leaving it out.
        sketch_scale: Strength of the sketch.
        keypoints_scale: Strength of the keypoints.
        control_guidance_start: Fraction of the steps at which conditions begin to act.
        control_guidance_end: Fraction of the steps at which they cease to act.
        model: A bundled model, a folder of a model or an adapter, or a hub id.
        base: The base model of an adapter, where it is not the one that the adapter names.
        lora: LoRAs made for FLUX.1, files, folders or hub ids, each as FILE or FILE=STRENGTH.
        lora_strict: Whether a LoRA that fits in part only is refused.
        steps: Sampling steps; the model's own by default.
        guidance_scale: How strongly the words act, 1 without guidance; the model's own by default.
        seed: Seed of the first portrait, the next ones count up; random by default.
        count: How many portraits.
        size: Pixels, as 128 or 128x160 (width x height).
        out: File to write, or its stem for several; the next free portrait-001 by default.
        format: File format where `out` does not say.
        metadata: Whether the file carries its recipe and the mark of generated media.
        device: Where to compute, such as cuda; the CPU by default.
        dtype: Number format of the computation.
        quantize: Keep the matrices of FLUX.1's transformer in 8 bits.
        offload: Keep on the accelerator only the part of the model that runs.
    """
    width, height = parse_size(size)
    if count < 1:
        raise InputError(f"--count is {count}; it must be at least 1")
    first = secrets.randbelow(2**31) if seed is None else seed
    paths = output_paths(out, format, count)
    given = {"mask": mask, "sketch": sketch, "keypoints": keypoints}
    scales = {"mask": mask_scale, "sketch": sketch_scale, "keypoints": keypoints_scale}
    given = {name: path for name, path in given.items() if path is not None}
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
        seed=first,
    )
    # Conditions are read before the model is loaded: a wrong file should not cost a wait.
    from likeness.conditions.request import read_conditions

    request, notes = read_conditions(request)
    tell(notes)
    loras = [parse_lora(text) for text in lora]

    bare = model in bundled_models() and not (loras or quantize)
    with optional_packages_hidden() if bare else nullcontext():
        from likeness.pipelines.adapters import add_loras
        from likeness.pipelines.generate import generate as make
        from likeness.pipelines.generate import resolve, work_of
        from likeness.pipelines.load import fingerprint as fingerprint_of
        from likeness.pipelines.record import recipe_of, write_picture

        pipeline = load_pipeline(model, dtype, device, base, quantize, offload)
    tell([f"left out of the LoRA: {line}" for line in add_loras(pipeline, loras, strict=lora_strict)])
    request = resolve(request, pipeline)
    if pipeline._execution_device.type == "cpu":
        choose_threads(work_of(pipeline, request.height, request.width))
    seeds = [first + index for index in range(count)]
    with progress_bar("Generating") as advance:
        pictures, notes = make(pipeline, request, seeds, advance)
    tell(notes)
    fingerprint = fingerprint_of(pipeline) if metadata else ""
    for picture, path, own in zip(pictures, paths, seeds, strict=True):
        one = dataclasses.replace(request, seed=own)
        named = {"model": model, "base": base, "quantize": quantize, "fingerprint": fingerprint}
        write_picture(picture, path, recipe_of(one, pipeline, **named) if metadata else None)
        print(f"{path}  seed {own}")


def replay(
    image: PathArgument,
    *,
    model: str | None = None,
    base: str | None = None,
    out: Path | None = None,
    device: str | None = None,
    offload: bool = False,
) -> None:
    """Make a portrait again from the recipe inside its file, and say whether it is the same to the bit.

    Args:
        image: A picture that likeness made.
        model: The model, where it now lies elsewhere.
        base: The base model of an adapter, likewise.
        out: Where to write the new picture.
        device: Where to compute.
        offload: Keep on the accelerator only the part of the model that runs.
    """
    import numpy as np

    from likeness.pipelines.record import differences, read_recipe, request_of, write_picture

    recipe, pixels = read_recipe(image)
    request = request_of(recipe)

    from likeness.pipelines.adapters import act_again
    from likeness.pipelines.generate import generate as make
    from likeness.pipelines.generate import resolve
    from likeness.pipelines.load import fingerprint as fingerprint_of

    dtype = {"float32": "fp32", "float16": "fp16", "bfloat16": "bf16"}[recipe["environment"]["dtype"]]
    base = base or recipe.get("base")
    pipeline = load_pipeline(model or recipe["model"], dtype, device, base, recipe.get("quantize"), offload)
    act_again(pipeline, recipe.get("adapters", {}))
    threads = recipe["environment"].get("threads")
    if isinstance(threads, int) and 1 <= threads <= (os.cpu_count() or 1):
        set_threads(threads)  # the bits of a matrix product depend on them
    with progress_bar("Generating") as advance:
        pictures, _ = make(pipeline, resolve(request, pipeline), [request.seed], advance)
    again = np.asarray(pictures[0])
    if out is not None:
        write_picture(pictures[0], out, recipe)
        print(out)
    circumstances = differences(recipe, pipeline, fingerprint_of(pipeline))
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
    from likeness.conditions import doctor

    report = doctor.inspect(file, condition)
    print(doctor.format_report(report))
    if fix is not None:
        doctor.fix(report, fix)
        print(f"{fix}: written in canonical form")


def models() -> None:
    """List the models that ship with the package."""
    import json

    for name in bundled_models():
        index = json.loads((BUNDLED / name / "model_index.json").read_text())
        config = json.loads((BUNDLED / name / "transformer" / "config.json").read_text())
        size = index["defaults"]["size"]
        conditions = ", ".join(c for c in config["condition_names"] if c != "none")
        print(f"{name}  {index['_class_name']}  {size}x{size}  text, {conditions}")


def load_pipeline(
    model: str,
    dtype: str,
    device: str | None,
    base: str | None = None,
    quantize: Literal["int8"] | None = None,
    offload: bool = False,
) -> Any:
    """A pipeline in the wanted number format."""
    import torch

    from likeness.pipelines.load import load

    quiet_libraries()
    formats = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
    return load(model, dtype=formats[dtype], device=device, base=base, quantize=quantize, offload=offload)


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


def parse_size(size: str | None) -> tuple[int | None, int | None]:
    """`128` or `128x160` as (width, height)."""
    if size is None:
        return None, None
    sides = size.lower().split("x")
    if len(sides) > 2 or not all(side.isdigit() and int(side) > 0 for side in sides):
        raise InputError(f"--size is {size!r}; give pixels as 128 or as 128x160 (width x height)")
    return int(sides[0]), int(sides[-1])


def output_paths(out: Path | None, suffix: str, count: int) -> list[Path]:
    """The files to write, checked before any work is done."""
    from likeness.pipelines.formats import format_of

    if out is None:
        taken = {path.stem for path in Path().glob("portrait-*")}
        free = (f"portrait-{number:03d}" for number in range(1, 10**6) if f"portrait-{number:03d}" not in taken)
        paths = [Path(f"{next(free)}.{suffix}") for _ in range(count)]
    else:
        if out.is_dir():
            raise InputError(f"cannot write {out}: it is a folder; name a file in it")
        out = out if out.suffix else out.with_suffix(f".{suffix}")
        format_of(out)
        paths = [out] if count == 1 else [out.with_stem(f"{out.stem}-{number}") for number in range(1, count + 1)]
    folder = paths[0].resolve().parent
    existing = next(parent for parent in (folder, *folder.parents) if parent.exists())
    if not existing.is_dir() or not os.access(existing, os.W_OK):
        raise InputError(f"cannot write {paths[0]}: {existing} is not a folder that can be written")
    if folders := [path for path in paths if path.is_dir()]:
        raise InputError(f"cannot write {folders[0]}: it is a folder; name a file")
    return paths
