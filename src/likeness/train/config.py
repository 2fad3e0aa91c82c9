"""Recipes: the settings that determine a training run, read from one TOML file. Does not import torch."""

from __future__ import annotations

import math
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from operator import attrgetter
from pathlib import Path
from typing import Any, Literal

from likeness.pipelines.sizes import LARGEST_SIDE
from likeness.types import MAX_STEPS, PHOTO, InputError, suggestion

Attention = Literal["holistic", "hard", "decoupled", "concat"]


@dataclass(frozen=True, kw_only=True)
class MMFaceNetwork:
    """An MMFace-DiT. Text and latent sizes follow from the components."""

    name: Literal["mmface"] = "mmface"
    """Architecture."""
    patch_size: int = 2
    """Patch size in latent pixels."""
    hidden_size: int
    """Width."""
    depth: int
    """Number of blocks."""
    heads: int
    """Number of attention heads."""
    mlp_ratio: float = 4.0
    """Hidden width of an MLP, relative to `hidden_size`."""
    text_rope: Literal["sequential", "none"] = "sequential"
    """Rotary positions of text tokens."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass."""


@dataclass(frozen=True, kw_only=True)
class MDiTFaceNetwork:
    """An MDiTFace that is trained from scratch."""

    name: Literal["mditface"]
    """Architecture."""
    hidden_size: int
    """Width."""
    depth: int
    """Number of double-stream blocks."""
    single_depth: int
    """Number of single-stream blocks."""
    heads: int
    """Number of attention heads."""
    attention: Attention = "decoupled"
    """Attention between condition tokens and the others."""
    spatial_stream: Literal["lora", "full"] = "full"
    """`full`: the spatial stream has separate weights; `lora`: those of the image stream, for adapters to change."""
    static_modulation: Literal["text", "constant"] = "text"
    """Input of the modulation in the static pathway."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass."""


@dataclass(frozen=True, kw_only=True)
class AdapterNetwork:
    """A LoRA on a frozen base."""

    base: str
    """The base: a bundled name, a folder or a hub id."""
    rank: int = 8
    """Rank of the LoRA."""
    alpha: int = 8
    """Scale of the LoRA, times its rank."""


@dataclass(frozen=True, kw_only=True)
class MMFaceAdapter(AdapterNetwork):
    """An adapter on a frozen MMFace-DiT, for conditions that the base was trained with."""

    name: Literal["mmface_adapter"]
    """Architecture."""
    targets: Literal["attention", "all"] = "attention"
    """Layers with a LoRA: those of the joint attention, or also MLPs and modulations."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass."""


@dataclass(frozen=True, kw_only=True)
class MDiTFaceAdapter(AdapterNetwork):
    """An MDiTFace adapter on frozen FLUX.1: a LoRA and the condition embeddings."""

    name: Literal["mditface_adapter"]
    """Architecture."""
    attention: Attention = "decoupled"
    """Attention between condition tokens and the others."""
    static_modulation: Literal["text", "constant"] = "text"
    """Input of the modulation in the static pathway."""
    targets: Literal["spatial", "all"] = "spatial"
    """Layers with a LoRA: those of the spatial stream, or of every stream."""
    gradient_checkpointing: bool = True
    """Recompute activations in the backward pass."""


@dataclass(frozen=True, kw_only=True)
class DataRecipe:
    """Training data."""

    shards: tuple[str, ...]
    """Stores written by `likeness prepare encode`."""
    components: str | None = None
    """Folder with autoencoder, text encoder and tokenizer. Default: the bundled ones, or those of an adapter's base."""
    target: str = "image"
    """What the network generates: `image`, or the rendering of a condition such as `mask`."""
    condition_probabilities: dict[str, float]
    """Relative probability of each condition in a sample, by name. `mask+sketch` is a sample with both, for networks
    that accept several; `none` is a sample without conditions; `photo` is the image with a random hole that contains
    the mask, for the editing method `inpainting`. They are normalized to a sum of 1."""
    text_dropout: float = 0.1
    """Probability that a caption is replaced by the empty string."""
    validation: tuple[str, ...] = ()
    """Stores of held-out faces for the diagnostics. Default: the training faces."""
    verify: bool = False
    """Compare all files of the stores with the hashes in their names first."""


@dataclass(frozen=True, kw_only=True)
class OptimizerRecipe:
    """Optimization."""

    name: Literal["adamw", "adamw8bit", "muon"] = "adamw"
    """`adamw8bit`: AdamW with 8-bit states; `muon`: Muon (Jordan et al. 2024) for the matrices of the blocks and AdamW
    for the rest, with one learning rate."""
    images: int
    """Number of training images. All other intervals are in images, too."""
    batch: int
    """Images per optimizer step."""
    learning_rate: float
    """Peak learning rate."""
    warmup: int = 0
    """Images of linear warm-up."""
    decay: Literal["constant", "linear", "cosine"] = "cosine"
    """Decay of the learning rate after the warm-up, to 0 at `images`."""
    betas: tuple[float, float] = (0.9, 0.95)
    """Betas of AdamW."""
    weight_decay: float = 0.01
    """Decoupled weight decay."""
    max_grad_norm: float = 1.0
    """Largest gradient norm; larger gradients are scaled down."""
    ema: float = 0.1
    """Relative width of the power-law EMA of the weights that is published."""
    posthoc_emas: tuple[float, ...] = ()
    """Relative widths of further EMAs. If any, all EMAs are stored at every checkpoint, and `likeness average`
    computes the EMA of another width from them after training (post-hoc EMA)."""


@dataclass(frozen=True, kw_only=True)
class PreviewRecipe:
    """An image generated at every checkpoint, by the same code as `likeness generate`."""

    prompt: str = ""
    """Prompt."""
    mask: str | None = None
    """Path of the mask; `examples/...` is one of the project."""
    sketch: str | None = None
    """Path of the sketch."""
    keypoints: str | None = None
    """Path of the keypoints."""
    seed: int = 0
    """Seed."""


@dataclass(frozen=True, kw_only=True)
class RunRecipe:
    """Settings that transformers and students share."""

    data: DataRecipe
    """Training data."""
    optimizer: OptimizerRecipe
    """Optimization."""
    defaults: dict[str, Any] = field(default_factory=dict)
    """Default arguments of the published pipeline: size, steps, guidance_scale, guidance_interval."""
    preview: tuple[PreviewRecipe, ...] = ()
    """Images to generate at every checkpoint."""
    seed: int = 0
    """Seed of all random numbers."""
    precision: Literal["auto", "bf16", "fp32"] = "auto"
    """Data type of computations; weights and optimizer states are float32. auto: bf16 on a device that multiplies bf16
    matrices itself, else fp32."""
    compile: bool = False
    """Use torch.compile: a slower start, faster steps. On a CPU not with every compiler (docs/training.md)."""
    threads: int | None = None
    """CPU threads. Default: chosen by PyTorch."""
    log_every: int = 4800
    """Images between reports."""
    checkpoint_every: int = 24_000
    """Images between checkpoints."""
    keep_checkpoints: int = 2
    """Number of newest checkpoints to keep."""
    tensorboard: bool = False
    """Write TensorBoard event files."""
    wandb: str | None = None
    """Weights & Biases project to report to; requires wandb."""


@dataclass(frozen=True, kw_only=True)
class TrainRecipe(RunRecipe):
    """Training of a transformer (`likeness.train.loop`)."""

    kind: Literal["transformer"] = "transformer"
    """What the recipe trains."""
    network: MMFaceNetwork | MDiTFaceNetwork | MMFaceAdapter | MDiTFaceAdapter
    """Architecture."""
    objective: dict[str, Any] = field(default_factory=lambda: {"name": "rectified_flow"})
    """Name and fields of the objective (`likeness.objectives`)."""
    init_from: str | None = None
    """Model with the initial weights: a bundled name, a folder or a hub id. Default: random weights."""
    trainable: tuple[str, ...] = ()
    """Prefixes of the names of the trainable parameters, such as "condition_embed". Default: all parameters."""
    sharding: Literal["replicate", "shard", "hybrid"] = "shard"
    """Weights on several processes: replicated, sharded over all, or sharded within each machine."""
    micro_batch: int | None = None
    """Images per forward pass and process. Default: all of a batch. If smaller, gradients are accumulated."""
    alignment_weight: float = 0.0
    """Weight of the alignment to the features of a face parser (`likeness.train.losses.AlignmentLoss`)."""
    face_parser: str = "bundled"
    """The SegFormer of the alignment: "bundled", a folder or a hub id."""
    diagnostics_every: int = 0
    """Images between diagnostics (`likeness.train.diagnostics`). Default: none."""


@dataclass(frozen=True, kw_only=True)
class DiscriminatorRecipe:
    """The discriminator of a student: a copy of the teacher with a small head after some of its blocks."""

    blocks: tuple[int, ...]
    """Blocks of the teacher, counted from 0, whose image tokens the heads read."""
    width: int = 128
    """Width of a head."""
    frozen_images: int
    """Stage 1: images during which the copy of the teacher is frozen and only the heads are trained."""
    learning_rate: float = 1e-5
    """Learning rate of the copy of the teacher in stage 2."""
    head_learning_rate: float = 5e-4
    """Learning rate of the heads."""
    warmup: int = 0
    """Images during which only the heads are trained, before the first update of the student."""
    penalty: float = 1.0
    """Weight of the approximate R1 penalty."""
    penalty_noise: float = 0.1
    """Standard deviation of its noise, in normalized latents."""
    mismatch: float = 0.5
    """Weight of real images with the text and conditions of others, which count as fakes."""
    time_mean: float = 0.0
    """Mean of the normal whose sigmoid is the noise level of the discriminator's inputs."""
    time_std: float = 1.2
    """Standard deviation of that normal."""
    clean_fraction: float = 0.2
    """Fraction of the inputs with almost no noise instead (time 0.02)."""


@dataclass(frozen=True, kw_only=True)
class StudentRecipe(RunRecipe):
    """Adversarial training of a few-step student from a flow model (`likeness.train.student`).

    The optimizer is the student's; every step adds `batch` new images and trains on K x batch samples, one per time.
    Components and default size are the teacher's; other defaults of the pipeline are K steps and no guidance.
    """

    kind: Literal["student"] = "student"
    """What the recipe trains."""
    teacher: str
    """Flow model that initializes student and discriminator: a bundled name, a folder or a hub id."""
    init_from: str | None = None
    """Model with the initial weights of the student, such as an earlier student. Default: the teacher."""
    steps: int = 4
    """Sampling steps K that are trained. A sampler with any divisor of K steps uses trained times only."""
    frozen_learning_rate: float | None = None
    """Learning rate of the student in stage 1. Default: `optimizer.learning_rate`."""
    discriminator: DiscriminatorRecipe
    """Discriminator and its losses."""
    flow_weight: float = 0.1
    """Weight of the teacher's flow-matching loss in the student's loss, which keeps the student close to the data."""
    log_every: int = 480
    checkpoint_every: int = 4800


@dataclass(frozen=True, kw_only=True)
class ComponentRecipe:
    """Settings that the trainings of components share."""

    train: tuple[str, ...]
    """Prepared folders to train on."""
    test: tuple[str, ...]
    """Prepared folders for the measurements."""
    images: int
    """Number of training images."""
    batch: int = 16
    """Images per optimizer step."""
    learning_rate: float = 1e-3
    """Peak learning rate; it decays to 0 along a cosine."""
    warmup: int = 0
    """Images of linear warm-up."""
    ema: float = 0.08
    """Relative width of the power-law EMA of the weights, which is published."""
    checkpoint_every: int = 6400
    """Images between checkpoints."""
    seed: int = 0
    """Seed of all random numbers."""
    compile: bool = True
    """Use torch.compile."""
    threads: int | None = None
    """CPU threads. Default: chosen by PyTorch."""


RESUMABLE_CHANGES = {
    "transformer": "threads compile sharding micro_batch log_every checkpoint_every diagnostics_every keep_checkpoints "
    "preview defaults tensorboard wandb optimizer.images network.gradient_checkpointing data.shards data.validation "
    "data.verify",
    "student": "threads compile log_every checkpoint_every keep_checkpoints preview defaults tensorboard wandb "
    "optimizer.images data.shards data.verify",
    "component": "images test checkpoint_every compile threads retrieval_candidates test_size",
}
"""Keys that may change when a run is resumed: they affect speed, length and reports, not the trained weights. Shards
may have moved; other content is reported.
"""

PIPELINE_DEFAULTS = ("size", "steps", "guidance_scale", "guidance_interval")
"""Keys of `RunRecipe.defaults`."""

MAX_SEED = 2**62
"""Bound of seeds: numbers of images are added to them."""

MAX_EMA_WIDTH = 0.28
"""The plain mean of all weights has the largest relative width of a power-law EMA, 0.289."""


PROJECT = (Path(__file__).parents[3], Path(sys.prefix) / "share" / "likeness")
"""Where `recipes` and `examples` of the project are: in a checkout, and in an installation."""


def find_recipe(name: Path) -> Path:
    """Return the file of a recipe: a path, or the name of a recipe in `recipes/` or of the project, without suffix.

    Raises:
        InputError: there is no such recipe.
    """
    if name.is_file() or name.suffix or len(name.parts) > 1:
        return name  # a missing file is reported when it is read
    folders = [folder / "recipes" for folder in (*reversed(PROJECT), Path())]
    files = {file.stem: file for folder in folders for file in folder.glob("*.toml")}
    if name.name not in files:
        raise InputError(f"Unknown recipe {name.name!r}. {suggestion(name.name, sorted(files))}")
    return files[name.name]


def preview_file(name: str) -> Path:
    """Return a file of a preview: a path, or that of an example of the project, such as `examples/masks/smile.png`."""
    return next((folder / name for folder in (Path(), *PROJECT) if (folder / name).exists()), Path(name))


def check_values(*rows: tuple[str, Any, bool, str]) -> None:
    """Check values of a recipe, given as (key, value, whether it is valid, valid values). Raises `InputError` at the
    first invalid value.
    """
    for name, value, valid, expected in rows:
        if not valid:
            raise InputError(f"the recipe's {name} is {value}: it must be {expected}")


def check_minimum(recipe: Any, minimum: float, *keys: str, exclusive: bool = False) -> None:
    """Check that numbers of a recipe, such as `optimizer.batch`, are finite and at least `minimum`, or above it if
    `exclusive`; None is valid. Raises `InputError` at the first invalid number.
    """
    expected = f"{'above' if exclusive else 'at least'} {minimum}"
    for key in keys:
        if (value := attrgetter(key)(recipe)) is not None:
            valid = value > minimum if exclusive else value >= minimum
            check_values((key, value, valid, expected), (key, value, math.isfinite(value), "finite"))


def check_single_conditions(data: DataRecipe) -> None:
    """Reject combined conditions, which MMFace-DiT does not accept. Raises `InputError`."""
    if combined := [key for key in data.condition_probabilities if "+" in key]:
        raise InputError(f"condition_probabilities has {combined[0]!r}, but MMFace-DiT takes one condition at a time")


def check_component(recipe: ComponentRecipe) -> None:
    """Check the values that all components have. Raises `InputError` if a value is out of range."""
    check_minimum(recipe, 1, "images", "batch", "checkpoint_every", "threads")
    check_minimum(recipe, 0, "seed", "warmup")
    check_minimum(recipe, 0, "learning_rate", exclusive=True)
    check_values(
        ("seed", recipe.seed, recipe.seed < MAX_SEED, f"below {MAX_SEED}"),
        ("ema", recipe.ema, 0 < recipe.ema <= MAX_EMA_WIDTH, f"above 0, at most {MAX_EMA_WIDTH}"),
    )


def check_probabilities(probabilities: Mapping[str, float], key: str) -> None:
    """Check relative probabilities, `key` in the recipe. Raises `InputError` if one is negative or all are 0."""
    total = sum(probabilities.values())
    check_values(
        *((f"{key}.{name}", p, p >= 0 and math.isfinite(p), "at least 0") for name, p in probabilities.items()),
        (f"the sum of {key}", total, total > 0, "above 0"),
    )


def check_defaults(defaults: Mapping[str, Any]) -> None:
    """Check the default arguments of a pipeline. Raises `InputError` if one is unknown or has an invalid value."""
    if unknown := sorted(defaults.keys() - set(PIPELINE_DEFAULTS)):
        known = ", ".join(sorted(PIPELINE_DEFAULTS))
        raise InputError(f"the recipe's defaults: unknown key {unknown[0]!r}; known are {known}")
    number = lambda value: type(value) in (int, float) and math.isfinite(value)  # noqa: E731
    for key, value in defaults.items():
        if key == "guidance_interval":
            two = isinstance(value, (list, tuple)) and len(value) == 2 and all(map(number, value))
            valid, expected = two and 0 <= value[0] <= value[1] <= 1, "two numbers from 0 to 1 in ascending order"
        elif key == "guidance_scale":
            valid, expected = number(value) and value >= 0, "a finite number of at least 0"
        else:
            most = MAX_STEPS if key == "steps" else LARGEST_SIDE
            valid, expected = type(value) is int and 1 <= value <= most, f"a whole number from 1 to {most}"
        check_values((f"defaults.{key}", value, valid, expected))


def check(recipe: RunRecipe) -> None:
    """Check the values of a transformer's or student's recipe. Raises `InputError` if a value is out of range."""
    o, data = recipe.optimizer, recipe.data
    widths = (o.ema, *o.posthoc_emas)
    check_minimum(recipe, 1, "optimizer.batch", "keep_checkpoints", "log_every", "checkpoint_every", "threads")
    check_minimum(recipe, 0, "optimizer.warmup", "optimizer.weight_decay", "seed")
    check_minimum(recipe, 0, "optimizer.learning_rate", exclusive=True)
    check_probabilities(data.condition_probabilities, "data.condition_probabilities")
    check_defaults(recipe.defaults)
    check_values(
        ("seed", recipe.seed, recipe.seed < MAX_SEED, f"below {MAX_SEED}"),
        ("optimizer.images", o.images, o.images >= o.batch, f"at least a batch, {o.batch}"),
        ("optimizer.betas", list(o.betas), all(0 <= beta < 1 for beta in o.betas), "from 0 to below 1"),
        *(("optimizer.ema", w, 0 < w <= MAX_EMA_WIDTH, f"above 0, at most {MAX_EMA_WIDTH}") for w in widths),
        (
            "optimizer.posthoc_emas",
            list(o.posthoc_emas),
            len(set(widths)) == len(widths),
            f"different from each other and from optimizer.ema, {o.ema}",
        ),
        ("optimizer.max_grad_norm", o.max_grad_norm, o.max_grad_norm > 0, "above 0"),
        ("data.text_dropout", data.text_dropout, 0 <= data.text_dropout <= 1, "from 0 to 1"),
        ("data.shards", list(data.shards), bool(data.shards), "one folder of shards or more"),
    )
    if data.target != "image" and PHOTO in condition_names(data):
        raise InputError(f"condition_probabilities has photo, but the network generates {data.target}: leave photo out")
    if isinstance(recipe, TrainRecipe):
        check_minimum(recipe, 0, "diagnostics_every", "alignment_weight")
        check_minimum(recipe, 1, "micro_batch")
        check_network(recipe)
        if recipe.alignment_weight and (isinstance(recipe.network, AdapterNetwork) or data.target != "image"):
            raise InputError("the recipe's alignment_weight needs a whole network that generates images: leave it out")
        if recipe.init_from and isinstance(recipe.network, AdapterNetwork):
            raise InputError(
                "the recipe's init_from needs a whole network, but adapters start from their base: leave it out"
            )
        if o.posthoc_emas and isinstance(recipe.network, AdapterNetwork):
            raise InputError("the recipe's optimizer.posthoc_emas needs a whole network: leave it out")
        frozen_flux = isinstance(recipe.network, MDiTFaceAdapter)
        check_values(("precision", recipe.precision, not frozen_flux or recipe.precision != "fp32", "bf16 on FLUX.1"))
    if isinstance(recipe, StudentRecipe):
        check_student(recipe)


def check_network(recipe: TrainRecipe) -> None:
    """Check the values of a network. Raises `InputError`."""
    n = recipe.network
    sizes = ("patch_size", "hidden_size", "depth", "heads", "rank", "alpha")
    check_minimum(recipe, 1, *(f"network.{name}" for name in sizes if hasattr(n, name)))
    if isinstance(n, MMFaceNetwork):
        check_minimum(recipe, 0, "network.mlp_ratio", exclusive=True)
    if isinstance(n, MDiTFaceNetwork):
        check_minimum(recipe, 0, "network.single_depth")


def check_student(recipe: StudentRecipe) -> None:
    """Check the values that only a student's recipe has. Raises `InputError`."""
    d, data = recipe.discriminator, recipe.data
    steps = recipe.defaults.get("steps", recipe.steps)
    check_minimum(recipe, 1, "steps", "discriminator.width")
    check_minimum(recipe, 0, "flow_weight")
    nested = lambda *keys: (f"discriminator.{key}" for key in keys)  # noqa: E731
    check_minimum(recipe, 0, *nested("frozen_images", "warmup", "penalty", "mismatch"))
    positive = nested("learning_rate", "head_learning_rate", "penalty_noise", "time_std")
    check_minimum(recipe, 0, *positive, "frozen_learning_rate", exclusive=True)
    check_values(
        ("data.components", data.components, data.components is None, "omitted: those of the teacher are used"),
        ("data.validation", list(data.validation), not data.validation, "omitted: it is not used"),
        ("discriminator.blocks", list(d.blocks), len(d.blocks) > 0, "one block or more"),
        ("discriminator.blocks", list(d.blocks), len(set(d.blocks)) == len(d.blocks), "different blocks"),
        ("discriminator.clean_fraction", d.clean_fraction, 0 <= d.clean_fraction <= 1, "from 0 to 1"),
    )
    if recipe.steps % steps:
        divisors = ", ".join(str(n) for n in range(1, recipe.steps + 1) if recipe.steps % n == 0)
        raise InputError(
            f"the recipe's defaults.steps is {steps}, but a student of {recipe.steps} steps is trained for {divisors}"
        )
    if d.mismatch and recipe.optimizer.batch < 2:
        raise InputError("the recipe's optimizer.batch is 1: discriminator.mismatch needs at least 2")


def micro_batch(recipe: TrainRecipe, processes: int) -> int:
    """Return the number of images per forward pass and process. Raises `InputError` if the batch is not a multiple of
    this number times the number of processes.
    """
    batch, micro = recipe.optimizer.batch, recipe.micro_batch or recipe.optimizer.batch // processes
    if micro < 1 or batch % (micro * processes):
        raise InputError(
            f"a batch of {batch} cannot be divided into micro-batches of {max(micro, 1)} on {processes} processes: "
            "change optimizer.batch, micro_batch or the number of processes"
        )
    return micro


def split_key(key: str) -> Sequence[str]:
    """Split a key of `condition_probabilities`: "mask+sketch" has two conditions, "none" has none."""
    return [] if key == "none" else key.split("+")


def condition_names(data: DataRecipe) -> tuple[str, ...]:
    """Return the conditions of a recipe in its order."""
    return tuple(dict.fromkeys(name for key in data.condition_probabilities for name in split_key(key)))


def condition_probability(data: DataRecipe, condition: str) -> float:
    """Return the probability that a sample has a condition. If it is 0, the condition's embedding is not trained."""
    probabilities = data.condition_probabilities
    with_condition = sum(p for key, p in probabilities.items() if condition in split_key(key))
    return with_condition / sum(probabilities.values())
