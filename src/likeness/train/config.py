"""The recipe of a training run: everything that decides the weights, in one TOML file. No torch here."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from likeness.types import InputError


@dataclass(frozen=True, kw_only=True)
class MMFaceNetwork:
    """Size of an MMFace-DiT; what its autoencoder and text tower decide is not repeated here."""

    name: Literal["mmface"] = "mmface"
    """Which network."""
    patch_size: int = 2
    """Side of a patch in latent pixels."""
    hidden_size: int
    """Width."""
    depth: int
    """Blocks."""
    heads: int
    """Attention heads."""
    mlp_ratio: float = 4.0
    """Width of an MLP over the network's."""
    text_rope: Literal["sequential", "none"] = "sequential"
    """Rotary positions of text tokens."""
    gradient_checkpointing: bool = False
    """Compute activations twice instead of keeping them."""


@dataclass(frozen=True, kw_only=True)
class MDiTFaceNetwork:
    """Size and form of an MDiTFace that is trained from scratch."""

    name: Literal["mditface"]
    """Which network."""
    hidden_size: int
    """Width."""
    depth: int
    """Double blocks."""
    single_depth: int
    """Single blocks."""
    heads: int
    """Attention heads."""
    attention: Literal["holistic", "hard", "decoupled", "concat"] = "decoupled"
    """How spatial tokens meet the others."""
    spatial_stream: Literal["lora", "full"] = "full"
    """`full`: the spatial stream has weights of its own; `lora`: those of the image stream, and takes an adapter."""
    static_modulation: Literal["text", "constant"] = "text"
    """What modulates the static pathway."""
    gradient_checkpointing: bool = False
    """Compute activations twice instead of keeping them."""


@dataclass(frozen=True, kw_only=True)
class MDiTFaceAdapter:
    """An MDiTFace adapter on FLUX.1: a LoRA and the conditions' rows; the base stays frozen."""

    name: Literal["mditface_adapter"]
    """Which network."""
    base: str
    """FLUX.1: a folder or a hub id."""
    attention: Literal["holistic", "hard", "decoupled", "concat"] = "decoupled"
    """How spatial tokens meet the others."""
    static_modulation: Literal["text", "constant"] = "text"
    """What modulates the static pathway."""
    targets: Literal["spatial", "all"] = "spatial"
    """Which layers the LoRA changes: the spatial stream's, or those of every stream."""
    rank: int = 8
    """Rank of the LoRA."""
    alpha: int = 8
    """Its scale is alpha / rank."""
    gradient_checkpointing: bool = True
    """Compute activations twice instead of keeping them."""


@dataclass(frozen=True, kw_only=True)
class DataRecipe:
    """What is learnt from."""

    shards: tuple[str, ...]
    """Stores written by `likeness prepare encode`."""
    components: str | None = None
    """Folder with autoencoder, text tower and tokenizer; None takes the bundled ones, or those of an adapter's base."""
    condition_shares: dict[str, float]
    """How often a sample has each condition, by name; `mask+sketch` is both at once, where the network takes several;
    `none` is a sample without. They need not sum to 1."""
    text_dropout: float = 0.1
    """How often the caption is replaced by the empty string."""
    validation: tuple[str, ...] = ()
    """Stores of other faces, which the canary measures; without any it takes faces of the training itself."""


@dataclass(frozen=True, kw_only=True)
class OptimizerRecipe:
    """How it is learnt."""

    name: Literal["adamw", "adamw8bit", "muon"] = "adamw"
    """`adamw8bit`: AdamW whose states take a byte a number; `muon`: Muon (Jordan et al. 2024) for the matrices of the
    blocks, AdamW for all else; both take the same rate."""
    images: int
    """Images to see in all; every other count of progress is in images, too."""
    batch: int
    """Images an optimizer step."""
    learning_rate: float
    """Peak rate."""
    warmup: int = 0
    """Images over which the rate rises."""
    decay: Literal["constant", "linear", "cosine"] = "cosine"
    """How it falls afterwards, to 0 at `images`."""
    betas: tuple[float, float] = (0.9, 0.95)
    """AdamW's averages."""
    weight_decay: float = 0.01
    """Decay of the weights a unit of the rate."""
    clip: float = 1.0
    """Largest gradient norm."""
    ema: float = 0.1
    """Relative width of the power-law weight average that is published."""
    ema_choices: tuple[float, ...] = ()
    """Widths of further averages. With any, all averages are kept at every checkpoint, and `likeness average` makes one
    of whatever width from them afterwards."""


@dataclass(frozen=True, kw_only=True)
class PreviewRecipe:
    """One portrait made again at every checkpoint, by the same code as `likeness generate`."""

    prompt: str = ""
    """Its prompt."""
    mask: str | None = None
    """Path of its mask."""
    sketch: str | None = None
    """Path of its sketch."""
    keypoints: str | None = None
    """Path of its keypoints."""
    seed: int = 0
    """Its seed."""


@dataclass(frozen=True, kw_only=True)
class TrainRecipe:
    """A whole run."""

    kind: Literal["transformer"] = "transformer"
    """What the recipe trains."""
    network: MMFaceNetwork | MDiTFaceNetwork | MDiTFaceAdapter
    objective: dict[str, Any] = field(default_factory=lambda: {"name": "rectified_flow"})
    """Name and fields of the objective (`likeness.objectives`)."""
    data: DataRecipe
    optimizer: OptimizerRecipe
    defaults: dict[str, Any] = field(default_factory=dict)
    """What the published pipeline does where a request is silent: size, steps, guidance_scale, guidance_interval."""
    preview: tuple[PreviewRecipe, ...] = ()
    """Portraits to make at every checkpoint."""
    start: str | None = None
    """A model to go on from: a bundled name, a folder or a hub id; None begins with random weights."""
    trained: tuple[str, ...] = ()
    """Beginnings of the names of the parameters to train, such as "condition_embed"; empty trains all."""
    seed: int = 0
    """Seed of every random draw."""
    precision: Literal["bf16", "fp32"] = "bf16"
    """Number format of the computation; weights and optimizer states are always float32."""
    compile: bool = False
    """Fuse the network with torch.compile: a minute at the start, faster steps after."""
    threads: int | None = None
    """CPU threads; None leaves torch's choice."""
    layout: Literal["replicate", "shard", "hybrid"] = "shard"
    """How weights lie on several processes: whole on each, spread over all, or spread within each machine."""
    micro_batch: int | None = None
    """Images that a process computes at once; None takes its whole share of a batch, fewer adds gradients up."""
    log_every: int = 4800
    """Images between reports."""
    checkpoint_every: int = 24_000
    """Images between checkpoints."""
    canary_every: int = 0
    """Images between looks at whether it learns (`likeness.train.canary`); 0 never looks."""
    keep: int = 2
    """Checkpoints kept."""
    tensorboard: bool = False
    """Write TensorBoard's event files, too."""
    wandb: str | None = None
    """Project at Weights & Biases to report to, where it is installed and set up."""


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
    """Rate of the copy of the teacher in stage 2."""
    head_learning_rate: float = 5e-4
    """Rate of the heads."""
    warmup: int = 0
    """Images during which only the heads are trained, before the first update of the student."""
    penalty: float = 1.0
    """Weight of the approximate R1 penalty."""
    penalty_noise: float = 0.1
    """Standard deviation of its noise, in normalised latents."""
    mismatch: float = 0.5
    """Weight of real images with the text and conditions of others, which count as fakes."""
    time_mean: float = 0.0
    """Mean of the normal whose sigmoid is the noise level of the discriminator's inputs."""
    time_std: float = 1.2
    """Standard deviation of that normal."""
    clean_fraction: float = 0.2
    """Fraction of the inputs with almost no noise instead (time 0.02)."""


@dataclass(frozen=True, kw_only=True)
class StudentRecipe:
    """Adversarial training of a few-step student from a flow model (`likeness.train.student`)."""

    kind: Literal["student"] = "student"
    """What the recipe trains."""
    teacher: str
    """The flow model that the student and the discriminator start from: a bundled name, a folder or a hub id."""
    steps: int = 4
    """Sampling steps K that are trained. A sampler with any divisor of K steps uses trained times only."""
    data: DataRecipe
    """Training data. The components are the teacher's."""
    optimizer: OptimizerRecipe
    """Of the student. Every step adds `batch` new images and trains on K x batch samples, one for each time."""
    frozen_learning_rate: float | None = None
    """Rate of the student in stage 1; None takes `optimizer.learning_rate`."""
    discriminator: DiscriminatorRecipe
    """The discriminator and its losses."""
    flow_weight: float = 0.1
    """Weight of the teacher's own loss (flow matching) in the student's, which keeps it near the data."""
    defaults: dict[str, Any] = field(default_factory=dict)
    """Default settings of the published pipeline. Otherwise: the teacher's size, K steps, no guidance."""
    preview: tuple[PreviewRecipe, ...] = ()
    """Images to generate at every checkpoint."""
    seed: int = 0
    """Seed of every random draw."""
    precision: Literal["bf16", "fp32"] = "bf16"
    """Number format of the computation; weights and optimizer states are always float32."""
    compile: bool = False
    """Use torch.compile for student and discriminator: minutes at the start, faster steps after."""
    threads: int | None = None
    """CPU threads. Default: PyTorch's."""
    log_every: int = 480
    """Images between reports."""
    checkpoint_every: int = 4800
    """Images between checkpoints."""
    keep: int = 2
    """Checkpoints kept."""
    tensorboard: bool = False
    """Write TensorBoard event files."""
    wandb: str | None = None
    """Project at Weights & Biases to report to."""


FREE = ("threads", "compile", "layout", "micro_batch", "log_every", "checkpoint_every", "canary_every", "keep")
FREE += ("preview", "defaults", "tensorboard", "wandb", "optimizer.images", "network.gradient_checkpointing")
"""What changes speed, length or reports and may differ between the starts of one run."""

FREE_STUDENT = ("threads", "compile", "log_every", "checkpoint_every", "keep", "preview", "defaults", "tensorboard")
FREE_STUDENT += ("wandb", "optimizer.images")
"""The same for a student."""

DEFAULTS = ("size", "steps", "guidance_scale", "guidance_interval")
"""Keys of `TrainRecipe.defaults`."""

WIDEST = 0.28
"""No power-law average has a relative width above 0.289: that is the plain mean of all weights."""


def check_values(*rows: tuple[str, Any, bool, str]) -> None:
    """Check values of a recipe, given as (key, value, whether it is valid, what is valid).

    Raises:
        InputError: at the first invalid value.
    """
    for name, value, good, wanted in rows:
        if not good:
            raise InputError(f"the recipe's {name} is {value}: it must be {wanted}")


def check_single_conditions(data: DataRecipe) -> None:
    """Reject combined conditions, which MMFace-DiT does not take. Raises `InputError`."""
    if several := [share for share in data.condition_shares if "+" in share]:
        raise InputError(f"condition_shares has {several[0]!r}, but MMFace-DiT takes one condition at a time")


def check(recipe: TrainRecipe) -> None:
    """Refuse numbers with which nothing can be learnt.

    Raises:
        InputError: at the first of them.
    """
    o, shares = recipe.optimizer, recipe.data.condition_shares
    check_values(
        ("optimizer.batch", o.batch, o.batch >= 1, "at least 1"),
        ("optimizer.images", o.images, o.images >= o.batch, f"at least a batch, {o.batch}"),
        ("optimizer.learning_rate", o.learning_rate, o.learning_rate > 0, "above 0"),
        ("optimizer.clip", o.clip, o.clip > 0, "above 0"),
        ("optimizer.warmup", o.warmup, o.warmup >= 0, "at least 0"),
        ("optimizer.weight_decay", o.weight_decay, o.weight_decay >= 0, "at least 0"),
        ("optimizer.betas", list(o.betas), all(0 <= beta < 1 for beta in o.betas), "from 0 to below 1"),
        *(("optimizer.ema", w, 0 < w <= WIDEST, f"above 0, at most {WIDEST}") for w in (o.ema, *o.ema_choices)),
        ("data.text_dropout", recipe.data.text_dropout, 0 <= recipe.data.text_dropout <= 1, "from 0 to 1"),
        *((f"data.condition_shares.{name}", share, share >= 0, "at least 0") for name, share in shares.items()),
        ("the sum of data.condition_shares", sum(shares.values()), sum(shares.values()) > 0, "above 0"),
        ("data.shards", list(recipe.data.shards), bool(recipe.data.shards), "one folder of shards or more"),
        ("keep", recipe.keep, recipe.keep >= 1, "at least 1"),
        ("log_every", recipe.log_every, recipe.log_every >= 1, "at least 1"),
        ("checkpoint_every", recipe.checkpoint_every, recipe.checkpoint_every >= 1, "at least 1"),
        ("canary_every", recipe.canary_every, recipe.canary_every >= 0, "at least 0"),
        ("seed", recipe.seed, recipe.seed >= 0, "at least 0"),
    )
    if unknown := sorted(recipe.defaults.keys() - set(DEFAULTS)):
        raise InputError(f"the recipe's defaults: unknown key {unknown[0]!r}; known are {', '.join(sorted(DEFAULTS))}")


def check_student(recipe: StudentRecipe) -> None:
    """Check the values that `check` does not know.

    Raises:
        InputError: at the first value that is out of range.
    """
    d, steps = recipe.discriminator, recipe.defaults.get("steps", recipe.steps)
    check_values(
        ("steps", recipe.steps, recipe.steps >= 1, "at least 1"),
        ("defaults.steps", steps, isinstance(steps, int) and steps >= 1, "a whole number of at least 1"),
        ("flow_weight", recipe.flow_weight, recipe.flow_weight >= 0, "at least 0"),
        ("frozen_learning_rate", recipe.frozen_learning_rate, (recipe.frozen_learning_rate or 1) > 0, "above 0"),
        ("data.components", recipe.data.components, recipe.data.components is None, "left out: the teacher decides"),
        ("data.validation", list(recipe.data.validation), not recipe.data.validation, "left out: nothing reads it"),
        ("discriminator.blocks", list(d.blocks), len(d.blocks) > 0, "one block or more"),
        ("discriminator.blocks", list(d.blocks), len(set(d.blocks)) == len(d.blocks), "different blocks"),
        ("discriminator.width", d.width, d.width >= 1, "at least 1"),
        ("discriminator.frozen_images", d.frozen_images, d.frozen_images >= 0, "at least 0"),
        ("discriminator.warmup", d.warmup, d.warmup >= 0, "at least 0"),
        ("discriminator.learning_rate", d.learning_rate, d.learning_rate > 0, "above 0"),
        ("discriminator.head_learning_rate", d.head_learning_rate, d.head_learning_rate > 0, "above 0"),
        ("discriminator.penalty", d.penalty, d.penalty >= 0, "at least 0"),
        ("discriminator.penalty_noise", d.penalty_noise, d.penalty_noise > 0, "above 0"),
        ("discriminator.mismatch", d.mismatch, d.mismatch >= 0, "at least 0"),
        ("discriminator.time_std", d.time_std, d.time_std > 0, "above 0"),
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
    """Images that a process computes at once.

    Raises:
        InputError: they do not divide the batch.
    """
    batch, micro = recipe.optimizer.batch, recipe.micro_batch or recipe.optimizer.batch // processes
    if micro < 1 or batch % (micro * processes):
        raise InputError(
            f"a batch of {batch} cannot be cut into parts of {max(micro, 1)} for {processes} processes: "
            "change optimizer.batch, micro_batch or their number"
        )
    return micro


def parts_of(share: str) -> Sequence[str]:
    """The conditions of one entry of `condition_shares`: "mask+sketch" has two, "none" has none."""
    return [] if share == "none" else share.split("+")
