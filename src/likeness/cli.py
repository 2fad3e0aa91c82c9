"""The command line. Every heavy import is inside its command, so that `--help` answers at once.

What the user gave wrongly (`InputError`) is one sentence on stderr and exit code 2; anything else is our fault and
keeps its traceback.
"""

from __future__ import annotations

import dataclasses
import os
import secrets
import sys
import tomllib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import tyro

from likeness.types import InputError, PortraitRequest

PathArgument = tyro.conf.Positional[Path]


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
        model: A bundled model, a folder or a hub id.
        steps: Sampling steps; the model's own by default.
        guidance_scale: How strongly the words act, 1 for plainly; the model's own by default.
        seed: Seed of the first portrait, the next ones count up; random by default.
        count: How many portraits.
        size: Pixels, as 128 or 128x160 (width x height).
        out: File to write, or its stem for several; the next free portrait-001 by default.
        format: File format where `out` does not say.
        metadata: Whether the file carries its recipe and the mark of generated media.
        device: Where to compute, such as cuda; the CPU by default.
        dtype: Number format of the computation.
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

    from likeness.pipelines.generate import generate as make
    from likeness.pipelines.generate import resolve
    from likeness.pipelines.load import fingerprint as fingerprint_of
    from likeness.pipelines.record import recipe_of, write_picture

    pipeline = load_pipeline(model, dtype, device)
    request = resolve(request, pipeline)
    seeds = [first + index for index in range(count)]
    with progress_bar("Generating") as advance:
        pictures, notes = make(pipeline, request, seeds, advance)
    tell(notes)
    fingerprint = fingerprint_of(pipeline) if metadata else ""
    for picture, path, own in zip(pictures, paths, seeds, strict=True):
        one = dataclasses.replace(request, seed=own)
        recipe = recipe_of(one, pipeline, model=model, fingerprint=fingerprint) if metadata else None
        write_picture(picture, path, recipe)
        print(f"{path}  seed {own}")


def replay(
    image: PathArgument, *, model: str | None = None, out: Path | None = None, device: str | None = None
) -> None:
    """Make a portrait again from the recipe inside its file, and say whether it is the same to the bit.

    Args:
        image: A picture that likeness made.
        model: The model, where it now lies elsewhere.
        out: Where to write the new picture.
        device: Where to compute.
    """
    import numpy as np

    from likeness.pipelines.record import differences, read_recipe, request_of, write_picture

    recipe, pixels = read_recipe(image)
    request = request_of(recipe)

    from likeness.pipelines.generate import generate as make
    from likeness.pipelines.generate import resolve
    from likeness.pipelines.load import fingerprint as fingerprint_of

    dtype = {"float32": "fp32", "float16": "fp16", "bfloat16": "bf16"}[recipe["environment"]["dtype"]]
    pipeline = load_pipeline(model or recipe["model"], dtype, device)
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

    from likeness.pipelines.catalogue import BUNDLED, bundled_models

    for name in bundled_models():
        index = json.loads((BUNDLED / name / "model_index.json").read_text())
        config = json.loads((BUNDLED / name / "transformer" / "config.json").read_text())
        size = index["defaults"]["size"]
        conditions = ", ".join(c for c in config["condition_names"] if c != "none")
        print(f"{name}  {index['_class_name']}  {size}x{size}  text, {conditions}")


def train(
    recipe: PathArgument,
    overrides: tyro.conf.Positional[tuple[str, ...]] = (),
    *,
    out: Path | None = None,
) -> None:
    """Train what a recipe describes; to resume, run the same command again.

    Args:
        recipe: A TOML file; its `kind` says what it trains.
        overrides: Changes to it, as section.key=value.
        out: Folder of the run; runs/<name of the recipe> by default.
    """
    from likeness.config import load_toml

    kind, train_it = trainer_of(recipe)
    config = load_toml(recipe, kind, (*overrides,))
    quiet_libraries()
    train_it(config, out or Path("runs") / recipe.stem)


def prepare_synthetic(out: PathArgument, *, count: int = 1000, size: int = 128, seed: int = 0) -> None:
    """Draw licence-free faces with masks, sketches, keypoints, attributes and captions.

    Args:
        out: Folder to write; run again to go on after an interruption.
        count: How many faces.
        size: Pixels a side.
        seed: Seed; the same seed draws the same faces.
    """
    from likeness.prepare.synthetic import write_synthetic

    with progress_bar("Drawing") as advance:
        write_synthetic(out, count, size, seed, lambda done: advance(done, count))
    print(out)


def prepare_celeba(source: PathArgument, out: PathArgument, *, size: int = 128, held_out: int = 1000) -> None:
    """Bring CelebA's official layout into a prepared folder: cropped, captioned, sketched, split by person.

    Args:
        source: Folder with img_align_celeba, list_attr_celeba.txt and identity_CelebA.txt.
        out: Folder to write; run again to go on after an interruption.
        size: Pixels a side.
        held_out: Faces kept for measuring, at least.
    """
    from likeness.prepare.celeba import prepare_celeba as ingest

    with progress_bar("Preparing") as advance:
        found = ingest(source, out, size=size, held_out=held_out, progress=advance)
    tell_counts(out, found)


def prepare_celebamask(source: PathArgument, out: PathArgument, *, size: int = 128, held_out: int = 80) -> None:
    """Bring CelebAMask-HQ's pictures and palette masks into a prepared folder, exchanged sides put right.

    Args:
        source: Folder with images and masks, paired by name.
        out: Folder to write; run again to go on after an interruption.
        size: Pixels a side.
        held_out: Pairs kept for measuring.
    """
    from likeness.prepare.celeba import prepare_celebamask as ingest

    with progress_bar("Preparing") as advance:
        found = ingest(source, out, size=size, held_out=held_out, progress=advance)
    tell_counts(out, found)


def prepare_annotate(
    folder: PathArgument, *, parser: Path | None = None, landmarker: Path | None = None, sketches: bool = True
) -> None:
    """Add masks, sketches and keypoints to a prepared folder where it lacks them.

    Args:
        folder: A folder with metadata.jsonl; run again to go on after an interruption.
        parser: Folder of a trained face parser; without it no masks are added.
        landmarker: MediaPipe's face_landmarker.task; without it no keypoints are added.
        sketches: Whether to add sketches.
    """
    from likeness.prepare.annotate import annotate_folder

    quiet_libraries()
    with progress_bar("Annotating") as advance:
        added = annotate_folder(folder, parser=parser, landmarker=landmarker, sketches=sketches, progress=advance)
    print(f"{folder}: " + ", ".join(f"{count} {name} added" for name, count in added.items()))


def prepare_encode(
    folder: PathArgument,
    out: PathArgument,
    *,
    components: Path | None = None,
    size: int = 128,
    views: int = 1,
    precision: Literal["fp32", "bf16"] = "fp32",
) -> None:
    """Encode a prepared folder into training shards.

    Args:
        folder: A folder with metadata.jsonl.
        out: Folder of the shards; run again to go on after an interruption.
        components: Folder with autoencoder and text tower; the bundled ones by default.
        size: Pixels a side.
        views: Versions of each face: the first as it is; more are mirrored in turn, with conditions as another hand
            would have given them.
        precision: Of the computation; bf16 is about three times as fast on a CPU.
    """
    from likeness.pipelines.load import load_components
    from likeness.prepare.encode import encode_folder

    parts = load_components(components) if components else load_components()
    with progress_bar("Encoding") as advance:
        encode_folder(folder, out, parts, size=size, views=views, precision=precision, progress=advance)
    print(out)


def prepare_components(
    autoencoder: PathArgument,
    text: PathArgument,
    out: PathArgument,
    *,
    data: Path,
    face_parser: Path | None = None,
    size: int = 128,
) -> None:
    """Join a trained autoencoder and text tower into the folder a transformer is trained on.

    Args:
        autoencoder: Run folder of an autoencoder.
        text: Run folder of a text tower.
        out: Folder to write.
        data: Prepared folder on which the latents' statistics are measured.
        face_parser: Run folder of a face parser to lay beside them.
        size: Pixels a side.
    """
    from likeness.prepare.components import join_components

    join_components(autoencoder, text, out, data, size=size, face_parser=face_parser)
    print(out)


def prepare_pack(model: PathArgument, out: PathArgument) -> None:
    """Write a published model the way the bundled ones ship: int8 weights, shared parts in a folder beside it.

    Args:
        model: A pipeline folder, such as runs/<name>/model.
        out: Folder to write; its neighbour `common` holds the components.
    """
    from likeness.prepare.pack import pack_model

    pack_model(model, out)
    print(out)


def convert_mmface_release(
    file: PathArgument,
    out: PathArgument,
    *,
    release: Literal["ddpm-256", "rfm-256", "rfm-512"] | None = None,
    text_encoder: Path | None = None,
    vae: Path | None = None,
) -> None:
    """Turn a released MMFace-DiT checkpoint into a folder that likeness loads.

    Args:
        file: The checkpoint-<step> folder, or the safetensors file in it.
        out: Folder to write.
        release: Which release it is, where the path does not tell.
        text_encoder: Folder of Stable Diffusion 2.1's text encoder and tokenizer.
        vae: Folder of FLUX.1's autoencoder.
    """
    from likeness.convert.mmface_release import convert_release

    missing = convert_release(file, out, release=release, text_encoder=text_encoder, vae=vae)
    print(out)
    tell([f"missing: {sentence}" for sentence in missing])


def prepare() -> None:
    """Make training data; `likeness prepare --help` lists its commands."""
    run(GROUPS["prepare"], "likeness prepare", ["--help"])


def convert() -> None:
    """Bring other people's weights in: mmface-release (with its own --help)."""
    run(GROUPS["convert"], "likeness convert", ["--help"])


COMMANDS: dict[str, Callable[..., None]] = {
    "generate": generate,
    "replay": replay,
    "inspect": inspect,
    "models": models,
    "train": train,
    "prepare": prepare,
    "convert": convert,
}

GROUPS: dict[str, dict[str, Callable[..., None]]] = {
    "prepare": {
        "synthetic": prepare_synthetic,
        "celeba": prepare_celeba,
        "celebamask": prepare_celebamask,
        "annotate": prepare_annotate,
        "encode": prepare_encode,
        "components": prepare_components,
        "pack": prepare_pack,
    },
    "convert": {"mmface-release": convert_mmface_release},
}
"""Commands that have commands of their own."""


def run(commands: dict[str, Callable[..., None]], program: str, arguments: list[str]) -> None:
    """Parse the arguments and call the command they name."""
    tyro.extras.subcommand_cli_from_dict(
        commands,
        prog=program,
        description="Portraits from words, semantic masks and sketches.",
        args=arguments,
    )


def main(arguments: list[str] | None = None) -> None:
    """Entry point of `likeness`."""
    given = sys.argv[1:] if arguments is None else arguments
    try:
        if given and given[0] in GROUPS:
            run(GROUPS[given[0]], f"likeness {given[0]}", given[1:] or ["--help"])
        else:
            run(COMMANDS, "likeness", given or ["--help"])
    except InputError as error:
        print(f"likeness: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("likeness: stopped; run the same command again to go on", file=sys.stderr)
        sys.exit(130)
    except BrokenPipeError:  # the reader of our output is gone: `likeness models | head -1`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)


def trainer_of(path: Path) -> tuple[type, Callable[[Any, Path], Any]]:
    """The recipe class and the trainer that a recipe's `kind` names."""
    try:
        kind = tomllib.loads(path.read_text()).get("kind")
    except OSError as error:
        raise InputError(f"cannot read the recipe {path}: {error.strerror or error}") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise InputError(f"{path} is not valid TOML: {error}") from error
    if kind == "transformer":
        from likeness.train.config import TrainRecipe
        from likeness.train.loop import train as train_transformer

        return TrainRecipe, train_transformer
    if kind == "autoencoder":
        from likeness.train.components.autoencoder import AutoencoderRecipe, train_autoencoder

        return AutoencoderRecipe, train_autoencoder
    if kind == "text_image":
        from likeness.train.components.text_image import TextImageRecipe, train_text_image

        return TextImageRecipe, train_text_image
    if kind == "face_parser":
        from likeness.train.components.face_parser import FaceParserRecipe, train_face_parser

        return FaceParserRecipe, train_face_parser
    kinds = '"transformer", "autoencoder", "text_image" or "face_parser"'
    raise InputError(f"{path} says kind = {kind!r}; it must be {kinds}")


def load_pipeline(model: str, dtype: str, device: str | None) -> Any:
    """A pipeline in the wanted number format."""
    import torch

    from likeness.pipelines.load import load

    quiet_libraries()
    formats = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
    return load(model, dtype=formats[dtype], device=device)


def quiet_libraries() -> None:
    """Our own bar and notes are enough: diffusers and transformers speak of errors only."""
    import diffusers.utils.logging
    import transformers.utils.logging

    for library in (diffusers, transformers):
        library.utils.logging.set_verbosity_error()
        library.utils.logging.disable_progress_bar()


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
        out = out if out.suffix else out.with_suffix(f".{suffix}")
        format_of(out)
        paths = [out] if count == 1 else [out.with_stem(f"{out.stem}-{number}") for number in range(1, count + 1)]
    folder = paths[0].resolve().parent
    existing = next(parent for parent in (folder, *folder.parents) if parent.exists())
    if not existing.is_dir() or not os.access(existing, os.W_OK):
        raise InputError(f"cannot write {paths[0]}: {existing} is not a folder that can be written")
    if any(path.is_dir() for path in paths):
        raise InputError(f"cannot write {paths[0]}: it is a folder; name a file")
    return paths


def tell_counts(out: Path, found: dict[str, Any]) -> None:
    """What an ingest did: counts on stdout, every skipped file on stderr."""
    tell([f"skipped {file}: {reason}" for file, reason in found["skipped"].items()])
    counts = ", ".join(f"{value} {name}" for name, value in found.items() if name != "skipped")
    print(f"{out}: {counts}, {len(found['skipped'])} skipped")


def tell(lines: list[str]) -> None:
    """Notes for the user, on stderr, so that stdout holds results only."""
    for line in lines:
        print(line, file=sys.stderr)


@contextmanager
def progress_bar(title: str) -> Iterator[Callable[[int, int], None]]:
    """A bar on stderr, moved by calls with (done, in all)."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    console = Console(stderr=True)
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        task = progress.add_task(title, total=None)
        yield lambda done, total: progress.update(task, completed=done, total=total)


if __name__ == "__main__":
    main()
