"""Commands for training, and for the conversion of released weights. The fields of a command are its options."""

from __future__ import annotations

import pkgutil
import shlex
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import tyro

from likeness.cli.terminal import PathArgument, print_notes, progress_bar, quiet_libraries
from likeness.config import read_toml
from likeness.types import InputError


@dataclass(frozen=True, kw_only=True)
class Train:
    """Train what a recipe describes. To resume, run the same command again. On several GPUs: torchrun, see launch/."""

    recipe: PathArgument
    """TOML file, or the name of one in recipes/, such as debug; its `kind` is what it trains."""
    overrides: tyro.conf.Positional[tuple[str, ...]] = ()
    """Changes to the recipe, as section.key=value."""
    out: Path | None = None
    """Run folder. Default: runs/<name of the recipe>."""
    plan: bool = False
    """Do not train: predict memory and time, and search settings that fit."""
    compare_sharding: bool = False
    """With --plan: compare the values of `sharding` on 1 to 512 devices."""
    device: str | None = None
    """With --plan: a device such as h200 or rtx-5000-ada. Default: this machine is measured."""
    gpus: int | None = None
    """With --plan: number of devices. Default: 1."""

    def __call__(self) -> None:
        from likeness.config import load_toml
        from likeness.train.config import check, find_recipe

        file = find_recipe(self.recipe)
        recipe_class, train_recipe = trainer_of(file)
        config = load_toml(file, recipe_class, self.overrides)
        quiet_libraries()
        if not self.plan:
            options = {"--compare-sharding": self.compare_sharding, "--device": self.device, "--gpus": self.gpus}
            if given := [name for name, value in options.items() if value is not None and value is not False]:
                raise InputError(f"{given[0]} requires --plan; training uses the accelerators that PyTorch finds")
            run = self.out or Path("runs") / file.stem
            train_recipe(config, run)
            report_model(config, run)
            return
        if config.kind != "transformer":
            raise InputError(f"the recipe {file} has kind = {config.kind!r}; --plan is for transformers")
        if self.compare_sharding and self.gpus is not None:
            raise InputError("--compare-sharding tries 1 to 512 devices: leave --gpus out")
        from likeness.train.plan import describe, describe_shardings

        check(config)
        with progress_bar("Measuring this machine") as advance:
            if self.compare_sharding:
                plan = describe_shardings(config, self.device, advance)
            else:
                plan = describe(config, self.device, 1 if self.gpus is None else self.gpus, advance)
        print(plan)


def report_model(recipe: Any, run: Path) -> None:
    """Print the model of a run, its page, and the command to use it. Only the first of several processes prints."""
    from likeness.parallel import rank_and_world

    if rank_and_world()[0]:
        return
    print(run / "model")
    if (run / "index.html").is_file():
        print_notes([f"curves and previews: {run / 'index.html'}"])
    if recipe.kind in ("transformer", "student") and recipe.data.target == "image":
        print_notes([f'likeness generate "a smiling woman" --model {shlex.quote(str(run / "model"))} --out sample.png'])


@dataclass(frozen=True, kw_only=True)
class Average:
    """Publish a run with another EMA of its weights than the one it was trained with (post-hoc EMA)."""

    run: PathArgument
    """Folder of a run whose recipe has optimizer.posthoc_emas."""
    width: tyro.conf.Positional[float]
    """Relative width of the EMA; a larger one averages over more images."""
    seen: int | None = None
    """Number of training images at which the EMA ends. Default: the last checkpoint."""

    def __call__(self) -> None:
        from likeness.train.ema import posthoc_ema

        quiet_libraries()
        print(posthoc_ema(self.run, self.width, self.seen))


@dataclass(frozen=True, kw_only=True)
class ConvertMMFace:
    """Convert a released MMFace-DiT checkpoint to a pipeline folder."""

    path: PathArgument
    """The checkpoint-<step> folder, or the safetensors file in it."""
    out: PathArgument
    """Folder to write."""
    release: Literal["ddpm-256", "rfm-256", "rfm-512"] | None = None
    """Release of the checkpoint. Default: from its path."""
    text_encoder: Path | None = None
    """Folder of Stable Diffusion 2.1's text encoder and tokenizer."""
    vae: Path | None = None
    """Folder of FLUX.1's autoencoder."""

    def __call__(self) -> None:
        if not self.path.exists():
            raise InputError(f"{self.path} does not exist: pass a released checkpoint-<step> folder or its file")
        from likeness.convert.mmface_release import convert_release

        missing = convert_release(**vars(self))
        print(self.out)
        print_notes([f"missing: {sentence}" for sentence in missing])


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
