"""Commands that train models and bring in those of others."""

from __future__ import annotations

import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import tyro

from likeness.cli.terminal import PathArgument, quiet_libraries, tell
from likeness.types import InputError


def train(
    recipe: PathArgument,
    overrides: tyro.conf.Positional[tuple[str, ...]] = (),
    *,
    out: Path | None = None,
    plan: bool = False,
    layouts: bool = False,
    device: str | None = None,
    gpus: int = 1,
) -> None:
    """Train what a recipe describes; to resume, run the same command again. On several GPUs: torchrun, see launch/.

    Args:
        recipe: A TOML file; its `kind` says what it trains.
        overrides: Changes to it, as section.key=value.
        out: Folder of the run; runs/<name of the recipe> by default.
        plan: Do not train: predict memory and time, and say which setting would fit.
        layouts: With --plan: what the layouts on 1 to 512 devices need and send, instead.
        device: With --plan: a device such as h200, rtx-5000-ada; without it this machine is measured.
        gpus: With --plan: how many of them.
    """
    from likeness.config import load_toml

    kind, train_it = trainer_of(recipe)
    config = load_toml(recipe, kind, (*overrides,))
    quiet_libraries()
    if layouts and not plan:
        raise InputError("--layouts is a form of --plan: give both")
    if plan:
        if config.kind != "transformer":
            raise InputError(f"{recipe} trains a component; --plan is for transformers")
        from likeness.train.config import check
        from likeness.train.plan import describe, describe_layouts

        check(config)

        print(describe_layouts(config, device) if layouts else describe(config, device, gpus))
        return
    train_it(config, out or Path("runs") / recipe.stem)


def average(run: PathArgument, width: tyro.conf.Positional[float], *, seen: int | None = None) -> None:
    """Publish a run's weights with another average than the one it was trained with, chosen afterwards.

    Args:
        run: Folder of a run whose recipe has optimizer.ema_choices.
        width: Relative width of the average; larger reaches further back.
        seen: Images at which it ends; the last checkpoint by default.
    """
    from likeness.train.posthoc import average_of

    quiet_libraries()
    print(average_of(run, width, seen))


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
    if kind == "decoder":
        from likeness.train.components.decoder import DecoderRecipe, train_decoder

        return DecoderRecipe, train_decoder
    if kind == "text_image":
        from likeness.train.components.text_image import TextImageRecipe, train_text_image

        return TextImageRecipe, train_text_image
    if kind == "face_parser":
        from likeness.train.components.face_parser import FaceParserRecipe, train_face_parser

        return FaceParserRecipe, train_face_parser
    kinds = '"transformer", "autoencoder", "decoder", "text_image" or "face_parser"'
    raise InputError(f"{path} says kind = {kind!r}; it must be {kinds}")


def mmface_release(
    file: PathArgument,
    out: PathArgument,
    *,
    release: Literal["ddpm-256", "rfm-256", "rfm-512"] | None = None,
    text_encoder: Path | None = None,
    vae: Path | None = None,
    heads: int | None = None,
) -> None:
    """Turn a released MMFace-DiT checkpoint into a folder that likeness loads.

    Args:
        file: The checkpoint-<step> folder, or the safetensors file in it.
        out: Folder to write.
        release: Which release it is, where the path does not tell.
        text_encoder: Folder of Stable Diffusion 2.1's text encoder and tokenizer.
        vae: Folder of FLUX.1's autoencoder.
        heads: Attention heads, where they are not 72 wide, as in every release.
    """
    from likeness.convert.mmface_release import convert_release

    missing = convert_release(file, out, release=release, text_encoder=text_encoder, vae=vae, heads=heads)
    print(out)
    tell([f"missing: {sentence}" for sentence in missing])
