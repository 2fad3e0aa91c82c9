"""Commands for training, and for the conversion of released weights."""

from __future__ import annotations

import pkgutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import tyro

from likeness.cli.terminal import PathArgument, print_notes, quiet_libraries
from likeness.config import read_toml
from likeness.types import InputError


def train(
    recipe: PathArgument,
    overrides: tyro.conf.Positional[tuple[str, ...]] = (),
    *,
    out: Path | None = None,
    plan: bool = False,
    compare_sharding: bool = False,
    device: str | None = None,
    gpus: int = 1,
) -> None:
    """Train what a recipe describes. To resume, run the same command again. On several GPUs: torchrun, see launch/.

    Args:
        recipe: TOML file; its `kind` is what it trains.
        overrides: Changes to the recipe, as section.key=value.
        out: Run folder. Default: runs/<name of the recipe>.
        plan: Do not train: predict memory and time, and search settings that fit.
        compare_sharding: With --plan: compare the values of `sharding` on 1 to 512 devices.
        device: With --plan: a device such as h200 or rtx-5000-ada. Default: this machine is measured.
        gpus: With --plan: number of devices.
    """
    from likeness.train.config import check, load_recipe

    recipe_class, train_recipe = trainer_of(recipe)
    config = load_recipe(recipe, recipe_class, (*overrides,))
    quiet_libraries()
    if compare_sharding and not plan:
        raise InputError("--compare-sharding requires --plan")
    if not plan:
        train_recipe(config, out or Path("runs") / recipe.stem)
        return
    if config.kind != "transformer":
        raise InputError(f"the recipe {recipe} has kind = {config.kind!r}; --plan is for transformers")
    from likeness.train.plan import describe, describe_shardings

    check(config)
    print(describe_shardings(config, device) if compare_sharding else describe(config, device, gpus))


def average(run: PathArgument, width: tyro.conf.Positional[float], *, seen: int | None = None) -> None:
    """Publish a run with another EMA of its weights than the one it was trained with (post-hoc EMA).

    Args:
        run: Folder of a run whose recipe has optimizer.posthoc_emas.
        width: Relative width of the EMA; a larger one averages over more images.
        seen: Number of training images at which the EMA ends. Default: the last checkpoint.
    """
    from likeness.train.ema import posthoc_ema

    quiet_libraries()
    print(posthoc_ema(run, width, seen))


TRAINERS = {
    "transformer": ("config.TrainRecipe", "loop.train"),
    "student": ("config.StudentRecipe", "student.train_student"),
    "autoencoder": ("components.autoencoder.AutoencoderRecipe", "components.autoencoder.train_autoencoder"),
    "decoder": ("components.decoder.DecoderRecipe", "components.decoder.train_decoder"),
    "label_decoder": ("components.label_decoder.LabelDecoderRecipe", "components.label_decoder.train_label_decoder"),
    "text_image": ("components.text_image.TextImageRecipe", "components.text_image.train_text_image"),
    "face_parser": ("components.face_parser.FaceParserRecipe", "components.face_parser.train_face_parser"),
}
"""Kind of a recipe -> its class and its trainer, in `likeness.train`, imported when used."""


def trainer_of(path: Path) -> tuple[type, Callable[[Any, Path], Any]]:
    """Return the recipe class and the trainer of a recipe's `kind`."""
    kind = read_toml(path).get("kind")
    if kind not in TRAINERS:
        raise InputError(f"the recipe {path} has kind = {kind!r}. Available: {', '.join(TRAINERS)}")
    recipe_class, train_recipe = (pkgutil.resolve_name(f"likeness.train.{name}") for name in TRAINERS[kind])
    return recipe_class, train_recipe


def mmface_release(
    file: PathArgument,
    out: PathArgument,
    *,
    release: Literal["ddpm-256", "rfm-256", "rfm-512"] | None = None,
    text_encoder: Path | None = None,
    vae: Path | None = None,
    heads: int | None = None,
) -> None:
    """Convert a released MMFace-DiT checkpoint to a pipeline folder.

    Args:
        file: The checkpoint-<step> folder, or the safetensors file in it.
        out: Folder to write.
        release: Release of the checkpoint. Default: from its path.
        text_encoder: Folder of Stable Diffusion 2.1's text encoder and tokenizer.
        vae: Folder of FLUX.1's autoencoder.
        heads: Number of attention heads, if they are not 72 wide as in all releases.
    """
    from likeness.convert.mmface_release import convert_release

    missing = convert_release(file, out, release=release, text_encoder=text_encoder, vae=vae, heads=heads)
    print(out)
    print_notes([f"missing: {sentence}" for sentence in missing])
