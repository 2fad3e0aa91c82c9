"""Train variants of a micro network with equal budgets, and measure them on the same held-out faces.

python benchmarks/ablate.py list
python benchmarks/ablate.py train decoupled concat --shards SHARDS --test TEST --faces FOLDER --seeds 0 1 2
python benchmarks/ablate.py compare concat decoupled --metric pixel_accuracy/mask
python benchmarks/ablate.py collect          # add the runs to ablations.json and ablations/, and compare
python benchmarks/ablate.py costs --shards SHARDS  # time of a training step and of an image, relative to `mmface`
python benchmarks/ablate.py table            # the collected results of all variants

Networks are 128 wide and 6 deep, with 64 image tokens of 128 px. Variants with the same seed see the same images,
captions, noise and times. Measured are the loss of the faces of --test with their own mask, another face's and none,
and images of the first --count faces of --faces, generated with the same seeds. `train` stores every run in a folder
below --out, after those that the variant is based on; the same command resumes a stopped run and skips finished ones.
`compare` pairs two variants by seed and face, and prints the mean difference with its 95 % interval, which includes
the variance between these seeds, and so that of training, and between faces (`interval`). `baselines/` contains other
methods. The channel concatenation of a single stream, the design of many baselines, is the variant `mmface-single`.
"""

from __future__ import annotations

import argparse
import copy
import hashlib
import json
import re
import subprocess
import sys
import time
import tomllib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache, partial
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import torch
from baselines.composed import composed, without_text
from baselines.controlnet import controlnet
from baselines.spade import gan, gan_losses
from condition_losses import condition_losses_by_face
from conflicts import means_by_face, measure_conflicts, read_masks
from scipy import optimize, stats
from torch import Tensor, nn
from training_losses import add_projection, alignment_losses, contrastive_losses, dispersive_losses, record_features

from likeness.annotators.face_parser import load_face_parser
from likeness.cli.terminal import print_error
from likeness.conditions import Reading
from likeness.config import build
from likeness.data.store import Store
from likeness.device import DTYPES, choose_precision
from likeness.encoders.components import load_components
from likeness.evaluate.distances import kernel_distance
from likeness.evaluate.protocol import Protocol
from likeness.evaluate.run import evaluate
from likeness.files import read_json, write_whole, writing_whole
from likeness.models.layers import grid_angles, use_explicit_attention
from likeness.models.mditface import MDiTFaceTransformer
from likeness.models.mmface import MMFaceTransformer
from likeness.objectives import make_objective
from likeness.parallel import SINGLE_PROCESS
from likeness.train.batches import Batch, open_stores, read_batches
from likeness.train.config import MDiTFaceAdapter, MDiTFaceNetwork, MMFaceNetwork, TrainRecipe, check
from likeness.train.ema import Ema
from likeness.train.losses import denoising_losses
from likeness.train.networks import adapter_of, add_new_adapter, build_network
from likeness.train.optim import learning_rate, make_optimizers
from likeness.train.progress import Progress
from likeness.train.publish import Publication, pipeline_of
from likeness.train.run_folder import open_run
from likeness.train.train_state import TrainState
from likeness.types import InputError, TextFeatures, TryAgain
from likeness.weights.catalog import BUNDLED, COMMON
from likeness.weights.hashes import file_hash

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "ablations.json"
"""Committed results of all variants."""

SCORES = ROOT / "benchmarks" / "ablations"
"""Committed values by face of the metrics that a claim compares: VARIANT.npz, seed/metric -> float32 [N]. New runs are
compared with them, so no old run has to be kept.
"""

PRECISION = choose_precision("auto", "cpu")
"""Precision of the training."""

BASE: dict[str, dict[str, Any]] = {
    "objective": {"name": "rectified_flow", "time_sampling": "logit_normal", "sampler": "dpm++"},
    "optimizer": {"name": "muon", "batch": 48, "learning_rate": 1.5e-3, "warmup": 4800, "decay": "linear"},
    "defaults": {"size": 128, "steps": 12, "guidance_scale": 2.0, "guidance_interval": (0.15, 0.85)},
}
"""The recipe of all variants, after that of `mmface-mini`."""

DDPM_INTERVAL = (0.174, 0.985)
"""sigma of a DDPM at the ratios of signal and noise of the flow at its `guidance_interval`."""

MMFACE = {
    "network": {"name": "mmface", "hidden_size": 128, "depth": 6, "heads": 4},
    "data": {"condition_probabilities": {"mask": 0.4, "sketch": 0.4, "none": 0.2}},
}
MDITFACE = {
    "network": {"name": "mditface", "hidden_size": 128, "depth": 2, "single_depth": 4, "heads": 4},
    "data": {"condition_probabilities": {"mask": 0.8, "none": 0.2}},
}
ADAPTER = {
    "network": {"name": "mditface_adapter", "base": "mditface-text", "gradient_checkpointing": False},
    "data": {"condition_probabilities": {"mask": 0.8, "none": 0.2}},
    "optimizer": {**BASE["optimizer"], "name": "adamw", "learning_rate": 1e-3},
}
"""Muon orthogonalizes updates, which suits whole matrices, not the factors of a LoRA."""


# --- Changes of a network that its configuration does not offer


class Positions(nn.Module):
    """A linear layer whose output gets absolute positions, [N, D]."""

    def __init__(self, linear: nn.Module, table: Tensor) -> None:
        super().__init__()
        self.linear = linear
        self.register_buffer("table", table)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x) + self.table


class OpenGates(nn.Module):
    """A modulation layer of `parts` vectors per sample whose every third vector, the gate, is 1."""

    def __init__(self, linear: nn.Linear, parts: int) -> None:
        super().__init__()
        self.linear, self.parts = linear, parts

    def forward(self, x: Tensor) -> Tensor:
        vectors = self.linear(x).unflatten(-1, (self.parts // 3, 3, -1))  # shift, scale, gate
        return torch.cat([vectors[..., :2, :], torch.ones_like(vectors[..., 2:, :])], dim=-2).flatten(-3)


def absolute_positions(network: Any) -> Any:
    """Replace rotary positions by sines and cosines that are added to the image tokens; text tokens have none."""
    config = network.config
    angles = grid_angles(8, 8, config.hidden_size, 100.0)  # [N, D / 2]
    network.patch_embed = Positions(network.patch_embed, torch.cat([angles.cos(), angles.sin()], dim=-1).float())
    rope = network.rope

    def unrotated(*args: Any) -> tuple[Tensor, Tensor]:
        cos, sin = rope(*args)
        return torch.ones_like(cos), torch.zeros_like(sin)

    network.rope = unrotated
    return network


def no_condition_embedding(network: Any) -> Any:
    """All kinds of condition, and none, have the same embedding."""
    network.condition_embed.weight.data.zero_()
    network.condition_embed.requires_grad_(False)
    return network


def single_stream(network: Any) -> Any:
    """Text and image tokens share the matrices of attention and MLP; modulations stay separate."""
    for block in network.blocks:
        attention = block.attention
        attention.text_qkv, attention.text_out = attention.image_qkv, attention.image_out
        block.text_mlp = block.image_mlp
    return network


def open_gates(network: Any) -> Any:
    """x + F(AdaLN(x)) instead of x + gate * F(AdaLN(x))."""
    for block in network.blocks:
        block.modulation = OpenGates(block.modulation, 12)
    return network


def move_positions(network: Any, *, scale: float, offset: Sequence[float]) -> Any:
    """Give condition tokens other positions than the image tokens at the same place."""
    network.spatial_ids = lambda ids: scale * ids + torch.tensor(offset, device=ids.device)
    return network


def swap_ids(network: Any, trained: Any) -> Any:
    """Give masks the condition id of sketches and the reverse, in a trained network."""
    with torch.no_grad():
        trained.condition_embed.weight[:2] = trained.condition_embed.weight[:2].flip(0)
    return trained


def scale_output(network: Any, trained: Any, *, factor: float) -> Any:
    """Multiply the prediction of a trained network."""
    trained.register_forward_hook(lambda module, inputs, output: factor * output)
    return trained


def first_clause(caption: str) -> str:
    """Return a caption up to its first comma, full stop or "and"."""
    return re.split(r"[,.;]| and ", caption)[0]


@dataclass(frozen=True, kw_only=True)
class Variant:
    """A network to train."""

    what: str
    recipe: Mapping[str, Any]
    changes: Mapping[str, Any] = field(default_factory=dict)
    """Table -> keys that replace those of the recipe."""
    bases: tuple[str, ...] = ()
    """Variants that are trained first."""
    edit: Callable[..., Any] = lambda network: network
    """Function of the new network and the trained bases that returns the network. The base of an adapter is part of the
    new network."""
    budget: float = 1.0
    """Training images, relative to --images; 0 for a network that needs no training."""
    losses: Callable[..., Tensor] = denoising_losses
    """Loss of each sample, a function of network, objective and batch."""
    caption: Callable[[str], str] | None = None
    """Changes the captions of the training."""
    progressive: bool = False
    """Train the first half of the images on --small-shards."""
    given: tuple[str, ...] = ("mask",)
    """Condition sets of the evaluation."""


def mmface(what: str, edit: Callable[..., Any] = lambda network: network, **changes: Any) -> Variant:
    return Variant(what=what, recipe=MMFACE, changes=changes, edit=edit, given=("mask", "sketch", "none"))


def mditface(what: str, edit: Callable[..., Any] = lambda network: network, **changes: Any) -> Variant:
    return Variant(what=what, recipe=MDITFACE, changes=changes, edit=edit, given=("mask", "none"))


def adapter(what: str, **network: Any) -> Variant:
    """A LoRA on `mditface-text`; its scale is 1."""
    changes = {"network": {"alpha": network.get("rank", 8), **network}}
    return Variant(what=what, recipe=ADAPTER, changes=changes, bases=("mditface-text",), given=("mask", "none"))


VARIANTS: dict[str, Variant] = {
    # MDiTFace
    "decoupled": mditface("static pathway of <mask, text>, cached: the paper's (d)"),
    "holistic": mditface("mask tokens in every step: (b)", network={"attention": "holistic"}),
    "hard": mditface("static pathway of the mask alone", network={"attention": "hard"}),
    "concat": mditface("mask concatenated along channels", network={"attention": "concat"}),
    "constant": mditface("static pathway modulated without text", network={"static_modulation": "constant"}),
    "shared": mditface("mask and image tokens share matrices", network={"spatial_stream": "lora"}),
    "beside": mditface(
        "mask tokens at positions beside the image", partial(move_positions, scale=1.0, offset=(0, 0, 8))
    ),
    "unplaced": mditface("mask tokens all at position 0", partial(move_positions, scale=0.0, offset=(0, 0, 0))),
    "no-dropout": mditface("never without mask", data={"condition_probabilities": {"mask": 1.0}}),
    "mditface-all": Variant(
        what="mask, sketch and keypoints",
        recipe=MDITFACE,
        changes={"data": {"condition_probabilities": {"mask": 0.3, "sketch": 0.3, "keypoints": 0.2, "none": 0.2}}},
        given=("mask", "sketch", "none"),
    ),
    # Adapters on a base that was trained on text alone
    "mditface-text": Variant(
        what="text only; the base of the LoRAs",
        recipe=MDITFACE,
        changes={"network": {"spatial_stream": "lora"}, "data": {"condition_probabilities": {"none": 1.0}}},
        budget=2.0,
        given=("none",),
    ),
    **{
        f"lora-{targets}-{rank}": adapter(f"LoRA of rank {rank}, {targets} streams", targets=targets, rank=rank)
        for targets in ("spatial", "all")
        for rank in (2, 8, 32)
    },
    "easycontrol": adapter("LoRA of rank 8, condition tokens attend to themselves only, cached", attention="hard"),
    # MMFace-DiT
    "mmface": mmface("dual stream, RoPE, condition embedding, gates, rectified flow"),
    "mmface-absolute": mmface("absolute instead of rotary positions", absolute_positions),
    "mmface-no-embedding": mmface("without condition embedding", no_condition_embedding),
    "mmface-single": mmface("image and text share matrices", single_stream),
    "mmface-open": mmface("without gates", open_gates),
    "mmface-text-none": mmface("text without rotary positions", network={"text_rope": "none"}),
    "mmface-ddpm": mmface(
        "DDPM, noise prediction, min-SNR 5", objective={"name": "ddpm"}, defaults={"guidance_interval": DDPM_INTERVAL}
    ),
    "mmface-ddpm-plain": mmface(
        "DDPM without min-SNR",
        objective={"name": "ddpm", "snr_gamma": None},
        defaults={"guidance_interval": DDPM_INTERVAL},
    ),
    "mmface-short": replace(mmface("captions cut to their first clause in training"), caption=first_clause),
    "mmface-progressive": replace(mmface("first half of the images at 64 px"), progressive=True),
    "mmface-contrastive": replace(mmface("contrastive flow matching"), losses=contrastive_losses),
    "mmface-dispersive": replace(mmface("dispersive loss", record_features), losses=dispersive_losses),
    "mmface-aligned": replace(mmface("features aligned to the face parser's", add_projection), losses=alignment_losses),
    "mmface-swapped": replace(
        mmface("`mmface` with the condition ids of mask and sketch swapped", swap_ids), bases=("mmface",), budget=0
    ),
    "mmface-scaled": replace(
        mmface("`mmface` with its velocity divided by 0.95", partial(scale_output, factor=1 / 0.95)),
        bases=("mmface",),
        budget=0,
    ),
    # Other methods
    "mmface-text": Variant(
        what="text only; the base of ControlNet",
        recipe=MMFACE,
        changes={"data": {"condition_probabilities": {"mask": 0.0, "sketch": 0.0, "none": 1.0}}},
        given=("none",),
    ),
    "mmface-mask": Variant(
        what="mask only, blind to text",
        recipe=MMFACE,
        changes={"data": {"condition_probabilities": {"mask": 0.4, "sketch": 0.0, "none": 0.6}}},
        edit=without_text,
    ),
    "controlnet": replace(mmface("ControlNet on `mmface-text`", controlnet), bases=("mmface-text",)),
    "composed": Variant(
        what="`mmface-text` and `mmface-mask`, composed at sampling",
        recipe=MMFACE,
        bases=("mmface-text", "mmface-mask"),
        edit=composed,
        budget=0,
        given=("mask", "none"),
    ),
    "spade": replace(
        mmface(
            "GAN with SPADE layers, one step",
            gan,
            optimizer={"name": "adamw", "learning_rate": 3e-4, "betas": (0.0, 0.9)},
            defaults={"steps": 1, "guidance_scale": 1.0},
        ),
        losses=gan_losses,
    ),
}

BASES = {base for variant in VARIANTS.values() for base in variant.bases}
"""Variants whose trained networks are stored."""

CONFLICT_FACES = 40
"""Faces whose masks are combined with contradicting prompts (`conflicts.py`)."""

SEEDS = (0, 1, 2)
"""Seeds of a headline claim. A comparison of fewer takes the variance between seeds from other variants."""

SAME = ("images", "count", "faces", "precision")
"""Facts that the results of all seeds of a variant have in common, and those of two variants that are compared."""

METRICS = (
    "pixel_accuracy", "mean_iou", "rare_class_recall", "edge_f_score", "retrieval", "attribute_recall",
    "complete_faces", "kid_text_image",
)  # fmt: skip

KID = "kid_text_image"
"""The metric of sets of images."""

FINGERPRINT_RATE = 0.003
"""Learning rate of the step of a fingerprint: halves the loss, and orthogonalizing in bf16 changes it by 1e-4 only."""


def tables_of(name: str) -> dict[str, Any]:
    """Return what the recipe of a variant sets, by table."""
    variant = VARIANTS[name]
    values: dict[str, Any] = {table: dict(content) for table, content in {**BASE, **variant.recipe}.items()}
    for table, content in variant.changes.items():
        values[table] = (values[table] if table != "objective" else {}) | content
    values["data"].setdefault("text_dropout", 0.1)
    return values


def recipe_of(name: str, seed: int, options: argparse.Namespace) -> TrainRecipe:
    """Return the recipe of a variant."""
    variant, values = VARIANTS[name], tables_of(name)
    values["data"]["shards"] = options.shards
    images = round(options.images * (variant.budget or 1))
    values["optimizer"] |= {"images": images, "warmup": min(values["optimizer"]["warmup"], images // 10)}
    return build(
        TrainRecipe,
        {
            **values,
            "seed": seed,
            "compile": options.compile,
            "threads": 1,
            "checkpoint_every": 24_000,
            "log_every": 4800,
        },
    )


def create(name: str, recipe: TrainRecipe, bases: Sequence[Any], **sizes: int) -> Any:
    """Create the network of a variant, with random weights except for those of its bases."""
    torch.manual_seed(recipe.seed)
    if isinstance(recipe.network, MDiTFaceAdapter):
        frozen = bases[0].to(torch.bfloat16).to(DTYPES[PRECISION])  # rounded, as the weights of FLUX.1
        return add_new_adapter(frozen, adapter_of(recipe))
    return VARIANTS[name].edit(build_network(recipe, **sizes), *bases)


def network_class(recipe: TrainRecipe) -> Any:
    """Return the class of a recipe's network."""
    return MMFaceTransformer if recipe.network.name == "mmface" else MDiTFaceTransformer


def train(name: str, seed: int, options: argparse.Namespace) -> None:
    """Train and measure one variant with one seed, and the variants it is based on first, unless their results exist.

    Raises:
        TryAgain: SIGTERM was received; a checkpoint was saved.
        InputError: a result with another budget or number of faces exists, or the shards do not fit.
    """
    variant, run = VARIANTS[name], options.out / name / f"seed-{seed}"
    result = run / "result.json"
    stored = read_json(result) if result.is_file() else {}
    for key in ("images", "count") if stored else ():
        if stored[key] != getattr(options, key):
            raise InputError(
                f"{run} has a result with {key} = {stored[key]}, not {getattr(options, key)}: change --out"
            )
    if stored and (name not in BASES or (run / "model").is_dir()):
        return
    for base in variant.bases:
        train(base, seed, options)
    print(f"{name}, seed {seed}", flush=True)
    recipe, components = recipe_of(name, seed, options), load_components(BUNDLED / COMMON)
    bases = [
        network_class(recipe).from_pretrained(options.out / base / f"seed-{seed}" / "model") for base in variant.bases
    ]
    model = create(name, recipe, bases, **sizes_of(components, options.shards[0]))
    trainable = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    if variant.budget:
        model = fit(variant, recipe, model, components, run, options)
    model = model.float().eval()
    for part in ("discriminator", "projection"):  # needed in training only
        if hasattr(model, part):
            delattr(model, part)
    run.mkdir(parents=True, exist_ok=True)
    if name in BASES:
        model.save_pretrained(run / "model")
    if not stored:
        facts = {"trainable": trainable if variant.budget else 0}
        facts |= measure(name, assemble(recipe, model, components), run, options)
        write_whole(result, json.dumps(facts, indent=1))


def sizes_of(components: Any, shards: str | Path) -> dict[str, int]:
    """Return the sizes of a network for components and the latents of shards."""
    width = components.text_encoder.config.hidden_size
    return {
        "channels": Store(shards)[0].latents.shape[0],
        "text_dim": width,
        "pooled_dim": width,
        "text_tokens": components.settings["max_text_tokens"],
    }


def assemble(recipe: TrainRecipe, model: Any, components: Any) -> Any:
    """Return the pipeline of a trained network."""
    objective = make_objective(recipe.objective)
    publication = Publication(components=components, objective=objective, defaults=recipe.defaults, previews=())
    return pipeline_of(publication, model)


def fit(
    variant: Variant, recipe: TrainRecipe, model: Any, components: Any, run: Path, options: argparse.Namespace
) -> Any:
    """Train a network, or continue its training, and return a copy with the EMA weights."""
    check(recipe)
    o, objective, names = recipe.optimizer, make_objective(recipe.objective), list(model.config.condition_names)
    use_explicit_attention(model, PRECISION == "bf16")
    state = TrainState(model=model, optimizers=make_optimizers(model, o), emas=[Ema(model, o.ema)])
    with open_run(recipe, run) as signals:
        state.resume(run)
        if recipe.compile:
            model.compile(dynamic=False)
        progress = Progress(run, state, o.images, o.batch, signals, recipe)
        middle = o.images / 2 if variant.progressive else 0
        parts = (options.small_shards, 64, [start for start in progress.starts if start < middle]), (
            recipe.data.shards, 128, [start for start in progress.starts if start >= middle]
        )  # fmt: skip
        if variant.progressive and not options.small_shards:
            raise InputError("This variant needs --small-shards: encode the training faces with --size 64")
        streams = [
            read_batches(
                recipe,
                open_stores(replace(recipe, defaults={**recipe.defaults, "size": size}), shards, components, 2),
                names,
                components.settings,
                SINGLE_PROCESS,
                starts,
                o.batch,
                2,
            )
            for shards, size, starts in parts
            if starts
        ]
        for start, (batch,) in progress.steps(chain.from_iterable(streams)):
            if variant.caption:
                batch = batch._replace(captions=[variant.caption(one) for one in batch.captions], text=None)
            rate = learning_rate(start, o.images, o.learning_rate, o.warmup, o.decay)
            with SINGLE_PROCESS.autocast(PRECISION):
                loss = variant.losses(model, objective, batch.with_text(components)).mean()
            loss.backward()
            norm = state.step(rate, o.max_grad_norm)
            progress.end_step(loss=loss, gradient_norm=norm)
            if progress.due(recipe.log_every):
                progress.report(learning_rate=rate)
            progress.save(recipe.checkpoint_every, keep=1)
    return state.emas[0].averaged_model()


def measure(name: str, pipeline: Any, run: Path, options: argparse.Namespace) -> dict[str, Any]:
    """Measure a network: metric -> mean; values by face go to `loss.npz` and to the evaluation's
    `scores.npz`, those of prompts that contradict the face's mask to `conflict.npz` (`conflict_scores`)."""
    variant, means = VARIANTS[name], {}
    if "mask" in variant.given:
        losses = condition_losses_by_face(pipeline, Store(options.test), "mask", count=options.count)
        np.savez(run / "loss.npz", **losses)
        means |= {f"loss/{kind}": float(values.mean()) for kind, values in losses.items()}
        conflicts = conflict_scores(pipeline, options.faces)
        np.savez(run / "conflict.npz", **conflicts)
        means |= {f"conflict/{kind}": float(values.mean()) for kind, values in conflicts.items() if len(values)}
    protocol = Protocol(given=variant.given, count=options.count, metrics=METRICS)
    results = evaluate(options.faces, run / "evaluation", protocol, pipeline=pipeline, model=name)
    assert results is not None
    means |= {f"{one.metric}/{one.given}": one.value for one in results.numbers if one.against == "own"}
    facts = {
        "images": options.images,
        "count": options.count,
        "faces": results.protocol["faces"],
        "precision": PRECISION,
        "parameters": sum(parameter.numel() for parameter in pipeline.transformer.parameters()),
        "commit": commit(),
        "fingerprint": fingerprint(name),
    }
    return {**facts, "means": means}


def conflict_scores(pipeline: Any, faces: Path) -> dict[str, np.ndarray]:
    """Return scores of images whose prompt contradicts their mask, means by face, [F] each: `text`, how much more often
    they agree with the prompt than those of a neutral one, and `mask`, the accuracy of their pixels against the mask.
    """
    conflicts = measure_conflicts(pipeline, read_masks(faces, CONFLICT_FACES, 128), load_face_parser())
    return {
        "text": means_by_face(conflicts, lambda one: one.text - one.neutral),
        "mask": means_by_face(conflicts, lambda one: one.mask),
    }


def commit() -> str:
    """Return the commit of the code, or "unknown" outside of a repository."""
    found = subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=False)
    return found.stdout.strip() or "unknown"


def fingerprint(name: str) -> dict[str, Any]:
    """Return what changes when a variant does: `losses`, its training loss with random weights on random latents,
    before and after a step of its optimizer, and `settings`, a hash of what its recipe sets, of how it treats captions
    and of the bundled networks that encode and measure. A result is out of date if `is_same_code` denies it.
    """
    variant, draw = VARIANTS[name], partial(torch.randn, generator=torch.Generator().manual_seed(0))
    network, recipe = random_network(name, draw)
    objective = make_objective(recipe.objective)
    text, index = TextFeatures(draw(4, 8, 32), draw(4, 32)), torch.tensor([[0], [0], [-1], [0]])
    latents = {"clean": draw(4, 8, 16, 16), "noise": draw(4, 8, 16, 16), "condition_latents": draw(4, 1, 8, 16, 16)}
    if not network.config.condition_names:
        latents["condition_latents"], index = latents["condition_latents"][:, :0], index[:, :0]
    batch = Batch(**latents, uniform=torch.linspace(0.1, 0.9, 4), condition_index=index, captions=[], text=text)

    def loss() -> Tensor:
        return variant.losses(network, objective, batch).mean()

    losses = [loss()]
    if variant.budget:
        losses[0].backward()
        optimizers = make_optimizers(network, recipe.optimizer)
        TrainState(model=network, optimizers=optimizers, emas=[]).step(FINGERPRINT_RATE, recipe.optimizer.max_grad_norm)
        losses.append(loss())
    caption = "A young woman with red hair, smiling."
    settings = [tables_of(name), variant.budget, variant.caption and variant.caption(caption), variant.progressive]
    content = json.dumps([*settings, variant.given, component_hashes()], sort_keys=True)
    return {
        "losses": [float(f"{one.item():.6g}") for one in losses],
        "settings": hashlib.sha256(content.encode()).hexdigest()[:16],
    }


@cache
def component_hashes() -> list[str]:
    """Return the hashes of the bundled networks that encode and measure."""
    return [file_hash(file) for file in sorted((BUNDLED / COMMON).rglob("*.safetensors"))]


def is_same_code(one: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
    """Return whether two fingerprints are equal, apart from the rounding of different processors."""
    losses = one["losses"], other["losses"]
    return one["settings"] == other["settings"] and len(losses[0]) == len(losses[1]) and np.allclose(*losses, rtol=2e-4)


@torch.no_grad()
def random_network(name: str, draw: Callable[..., Tensor]) -> tuple[Any, TrainRecipe]:
    """Return a smaller network of a variant for latents of 8 channels and text of width 32, and its recipe. Everything
    that the variant and its bases train is random.
    """
    recipe = recipe_of(name, 0, argparse.Namespace(shards=["none"], images=96, compile=False))
    sizes = {"hidden_size": 32, "heads": 2, "depth": 2}
    if recipe.network.name != "mmface":
        sizes["single_depth"] = 2
    bases = [random_network(base, draw)[0] for base in VARIANTS[name].bases]
    if isinstance(recipe.network, (MMFaceNetwork, MDiTFaceNetwork)):
        recipe = replace(recipe, network=replace(recipe.network, **sizes))
    network = create(name, recipe, bases, channels=8, text_dim=32, pooled_dim=32, text_tokens=8).float()
    for parameter in network.parameters():
        if parameter.requires_grad and VARIANTS[name].budget:
            parameter.copy_(0.3 * draw(parameter.shape))
    return network, recipe


# --- Costs, side by side


def costs(options: argparse.Namespace) -> None:
    """Add the CPU time of a training step and of an image of variants, relative to `mmface`, to the committed results.
    Each is the shortest of five, measured in turn with that of `mmface`, not compiled, with random weights.
    """
    torch.set_num_threads(1)  # threads that wait would count
    components = load_components(BUNDLED / COMMON)
    reference = workload("mmface", components, options)
    for name in options.variants or VARIANTS:
        parts = zip(workload(name, components, options), reference, strict=True)
        ratios = [None if own is None else ratio(own, other) for own, other in parts]
        found = {key: round(value, 2) for key, value in zip(("step", "image"), ratios, strict=True) if value}
        print(name, *(f"{key} {value}" for key, value in found.items()), flush=True)
        results = read_results()  # `collect` may have written meanwhile
        results["costs"][name] = found
        write_whole(RESULTS, json.dumps(results, indent=1, sort_keys=True) + "\n")


def workload(
    name: str, components: Any, options: argparse.Namespace
) -> tuple[Callable[[], Any] | None, Callable[[], Any]]:
    """Return functions that run a training step of a variant, None if it has no training, and generate an image."""
    variant, recipe = VARIANTS[name], recipe_of(name, 0, options)
    sizes = sizes_of(components, options.shards[0])
    bases = [create(base, recipe_of(base, 0, options), [], **sizes) for base in variant.bases]
    model = create(name, recipe, bases, **sizes)
    use_explicit_attention(model, PRECISION == "bf16")
    names, objective, o = list(model.config.condition_names), make_objective(recipe.objective), recipe.optimizer
    stores = open_stores(recipe, options.shards, components, 2)
    ((batch,),) = read_batches(recipe, stores, names, components.settings, SINGLE_PROCESS, [0], o.batch, 2)
    state = TrainState(model=model, optimizers=make_optimizers(model, o), emas=[]) if variant.budget else None
    pipeline = assemble(recipe, copy.deepcopy(model).float().eval(), components)
    mask = {"mask": Reading(raw=np.zeros((128, 128), np.uint8), scheme="mask")} if "mask" in variant.given else None

    def step() -> None:
        with SINGLE_PROCESS.autocast(PRECISION):
            variant.losses(model, objective, batch.with_text(components)).mean().backward()
        assert state is not None
        state.step(1e-6, o.max_grad_norm)

    def image() -> Any:
        return pipeline("a person", control_image=mask, generator=torch.Generator().manual_seed(0))

    return step if state else None, image


def ratio(own: Callable[[], Any], other: Callable[[], Any]) -> float:
    """Return the CPU time of a function relative to that of another: the shortest of five, in turn, after one each."""
    times: list[list[float]] = []
    for _ in range(6):
        times.append([])
        for function in (own, other):
            start = time.process_time()
            function()
            times[-1].append(time.process_time() - start)
    return float(np.divide(*np.min(times[1:], axis=0)))


# --- Comparisons and the table


def values_by_face(out: Path, name: str, seed: int, metric: str) -> np.ndarray:
    """Return the values of a metric of one run below `out`, [N]; NaN for a face that has none; of KID, those of
    `kid_by_face`. Raises `InputError` if the run lacks the metric.
    """
    run = out / name / f"seed-{seed}"
    kind, _, given = metric.partition("/")
    if kind in ("loss", "conflict"):
        file, key = run / f"{kind}.npz", given
    else:
        file, key = run / "evaluation" / "scores.npz", f"text_image/{given}/features" if kind == KID else metric
    if not file.is_file() or key not in (values := np.load(file)):
        raise InputError(f"{run} has no {metric}: train the variant first, with faces that this metric can measure")
    return kid_by_face(values[key][0], values["text_image/real/features"]) if kind == KID else values[key]


def kid_by_face(generated: np.ndarray, real: np.ndarray) -> np.ndarray:
    """Return N values whose mean is the KID of two sets of features [N, D] of the same faces, and whose variance over N
    is that of KID between faces: pseudo-values of the jackknife (Tukey 1958), without its correction of the mean.
    """
    kid, count = kernel_distance(generated, real), len(generated)
    without = [kernel_distance(np.delete(generated, face, 0), np.delete(real, face, 0)) for face in range(count)]
    return kid - (count - 1) * (np.array(without) - np.mean(without))


def compare(
    variant: str,
    reference: str,
    metric: str,
    read: Callable[[str, int, str], np.ndarray],
    seeds: Sequence[int],
    between: tuple[float, int] | None = None,
) -> dict[str, Any]:
    """Return the mean of variant minus reference with its 95 % interval, paired by seed and face; `read` returns the
    values by face of a variant, seed and metric, or their mean, [1]; `between` as in `interval`. Raises `InputError`
    if there are fewer than two seeds without `between`.
    """
    if len(seeds) < 2 and between is None:
        raise InputError(f"seeds are {list(seeds)}: an interval needs two or more")
    read_values = [[read(name, seed, metric) for seed in seeds] for name in (variant, reference)]
    if len({len(values) for values in chain(*read_values)}) > 1:  # some are means only
        read_values = [[np.nanmean(values, keepdims=True) for values in both] for both in read_values]
    values = np.array(read_values)  # [2, S, N]
    values = values[:, :, ~np.isnan(values).any(axis=(0, 1))]
    means = values.mean(axis=(1, 2)).tolist()
    return {
        "variant": variant,
        "reference": reference,
        "metric": metric,
        "means": means,
        **interval(values[0] - values[1], between),
    }


def interval(by_face: np.ndarray, between: tuple[float, int] | None = None) -> dict[str, Any]:
    """Return mean, 95 % interval and p-value of paired differences [S, N], S seeds and N faces.

    `between` is the variance of the differences between seeds and its degrees of freedom, by default that of these
    S >= 2 seeds. The variances of both means add up; that between faces is left out if N is 1. The quantiles of
    Student's t are the mean of those with the degrees of freedom of both, weighted by these variances (Cochran and Cox
    1950).
    """
    by_seed, (seeds, faces) = by_face.mean(axis=1), by_face.shape  # [S]
    variance, freedom = between or (by_seed.var(ddof=1), seeds - 1)
    variances = np.array([variance / seeds, by_face.mean(axis=0).var(ddof=1) / faces if faces > 1 else 0.0])
    variances = np.maximum(variances, 1e-24)  # equal differences have none

    def quantile(p: float) -> float:
        """The value of |t| that is exceeded with probability p."""
        return float(np.average(stats.t.isf(p / 2, [freedom, max(faces - 1, 1)]), weights=variances))

    error, value = float(np.sqrt(variances.sum())), float(by_seed.mean())
    reach, least = error * quantile(0.05), 1e-100
    ratio = min(abs(value) / error, quantile(least))
    p = optimize.brentq(lambda p: quantile(p) - ratio, least, 1.0)
    return {
        "value": value,
        "low": value - reach,
        "high": value + reach,
        "p": p,
        "n": faces,
        "by_seed": by_seed.tolist(),
    }


def variance_between_seeds(results: Mapping[str, Any], pair: Sequence[str], metric: str) -> tuple[float, int] | None:
    """Return the variance between seeds of the difference of two variants, and its degrees of freedom: twice the
    residual of the analysis of variance by variant and seed (Fisher 1925). It is computed from the variants of the
    same network as `pair` that were trained with three seeds; None if there are fewer than two, or for a GAN, whose
    trainings differ more. Adapters take that of whole networks.
    """
    if any(is_gan(name) for name in pair):
        return None

    def is_mmface(name: str) -> bool:
        return VARIANTS[name].recipe is MMFACE

    rows = [
        [one["seeds"][str(seed)][metric] for seed in SEEDS]
        for name, one in results["variants"].items()
        if VARIANTS[name].budget and not is_gan(name) and is_mmface(name) == is_mmface(pair[0])
        if all(metric in one["seeds"].get(str(seed), {}) for seed in SEEDS)
    ]
    if len(rows) < 2:
        return None
    values = np.array(rows)  # [V, S]
    residual = values - values.mean(axis=1, keepdims=True) - values.mean(axis=0) + values.mean()
    freedom = (len(rows) - 1) * (len(SEEDS) - 1)
    return 2 * float((residual**2).sum()) / freedom, freedom


def is_gan(name: str) -> bool:
    """Return whether a variant is a GAN."""
    return VARIANTS[name].losses is gan_losses


def read_results() -> dict[str, Any]:
    """Return the committed results: `variants`, `comparisons` and `costs`."""
    return {"variants": {}, "comparisons": {}, "costs": {}} | (read_json(RESULTS) if RESULTS.is_file() else {})


def read_scores(name: str) -> dict[str, np.ndarray]:
    """Return the committed values by face of a variant, seed/metric -> float32 [N]."""
    file = SCORES / f"{name}.npz"
    return dict(np.load(file)) if file.is_file() else {}


def collect(wanted: Sequence[Sequence[str]], out: Path, seeds: Sequence[int]) -> None:
    """Add the finished runs and the wanted comparisons, (variant, reference, metric) each, to the committed results.
    Runs of other code, budget, faces or precision than the committed ones replace these and their comparisons. The
    variance between seeds of a comparison is that of all variants (`variance_between_seeds`), or, with a GAN, that of
    its own two or more seeds. A comparison without committed scores by face pairs the means of the seeds.
    """
    results, metrics = read_results(), {metric for _, _, metric in wanted}
    for name in VARIANTS:
        files = {seed: out / name / f"seed-{seed}" / "result.json" for seed in seeds}
        found = {seed: read_json(file) for seed, file in files.items() if file.is_file()}
        if not found:
            continue
        latest, known, scores = list(found.values())[-1], results["variants"].get(name), read_scores(name)
        for seed, one in found.items():
            if different := difference(one, latest):
                raise InputError(f"the runs of {name} have different {different} (seed {seed}); remove the old ones")
        if known is None or difference(known, latest):
            known, scores = {"seeds": {}, "commits": {}}, {}
        facts = {key: latest[key] for key in (*SAME, "fingerprint", "parameters", "trainable")}
        means = {str(seed): one["means"] for seed, one in found.items()}
        commits = {str(seed): one["commit"] for seed, one in found.items()}
        results["variants"][name] = {
            **facts, "seeds": known["seeds"] | means, "commits": known["commits"] | commits,
        }  # fmt: skip
        for seed, one in found.items():
            for metric in one["means"].keys() & metrics:
                scores[f"{seed}/{metric}"] = values_by_face(out, name, seed, metric).astype(np.float32)
        with writing_whole(SCORES / f"{name}.npz") as file:
            np.savez_compressed(file, **dict(sorted(scores.items())))
    scores_of = {name: read_scores(name) for name in results["variants"]}

    def read(name: str, seed: int, metric: str) -> np.ndarray:
        mean = [results["variants"][name]["seeds"][str(seed)][metric]]
        return scores_of[name].get(f"{seed}/{metric}", np.array(mean))

    results["comparisons"] = {}
    for variant, reference, metric in wanted:
        pair = [results["variants"].get(name) for name in (variant, reference)]
        if None in pair or any(pair[0][key] != pair[1][key] for key in SAME):
            continue
        common = [seed for seed in SEEDS if all(metric in one["seeds"].get(str(seed), {}) for one in pair)]
        between = variance_between_seeds(results, (variant, reference), metric)
        if len(common) > 1 or (common and between):
            found = compare(variant, reference, metric, read, common, between)
            results["comparisons"][key_of((variant, reference), metric)] = found
    write_whole(RESULTS, json.dumps(results, indent=1, sort_keys=True) + "\n")


def key_of(pair: Sequence[str], metric: str) -> str:
    """Return the name of a comparison in the committed results."""
    return " ".join((*pair, metric))


def difference(one: Mapping[str, Any], other: Mapping[str, Any]) -> str:
    """Return the fact in which two results of a variant differ, or an empty string."""
    different = next((key for key in SAME if one[key] != other[key]), "")
    return different or ("" if is_same_code(one["fingerprint"], other["fingerprint"]) else "fingerprint")


COLUMNS = {
    "mask accuracy": ("pixel_accuracy/mask", 1),
    "of text only": ("pixel_accuracy/none", 1),
    "rare classes": ("rare_class_recall/mask", 1),
    "edges F": ("edge_f_score/sketch", 1),
    "retrieval, mask": ("retrieval/mask", 1),
    "retrieval, text only": ("retrieval/none", 1),
    "KID x 1000": ("kid_text_image/mask", 1000),
}  # fmt: skip
"""Column of the table -> metric and factor."""


def table() -> str:
    """Return the collected results as a Markdown table: means over the seeds, with 95 % intervals if there are three or
    more, and the costs. The first row has the scores of photographs.
    """
    results = read_results()
    if "mmface" not in results["variants"]:
        raise InputError("There are no results of mmface: train it, then collect")
    lines = ["| " + " | ".join(["variant", "seeds", *COLUMNS, "parameters", "trained", "step", "image"]) + " |"]
    lines.append("|---" * (lines[0].count("|") - 1) + "|")
    photographs = next(iter(results["variants"]["mmface"]["seeds"].values()))  # equal for all
    ceilings = [
        f"{factor * photographs[metric.partition('/')[0] + '/ceiling']:.3f}" for metric, factor in COLUMNS.values()
    ]
    lines.append("| " + " | ".join(["*photographs*", "", *ceilings, *[""] * 4]) + " |")
    for name, found in results["variants"].items():
        cells = [name, str(len(found["seeds"]))]
        for metric, factor in COLUMNS.values():
            values = factor * np.array([seed[metric] for seed in found["seeds"].values() if metric in seed])
            reach = ""
            if len(values) > 2:
                error = values.std(ddof=1) / np.sqrt(len(values))
                reach = f" ± {error * stats.t.ppf(0.975, len(values) - 1):.3f}"
            cells.append(f"{values.mean():.3f}{reach}" if len(values) else "")
        cells += [f"{found[key] / 1e6:.2f} M" if key in found else "" for key in ("parameters", "trainable")]
        cost = results["costs"].get(name, {})
        cells += [f"{cost[key]:.2f}" if key in cost else "" for key in ("step", "image")]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("list", help="list the variants")
    training = commands.add_parser("train", help="train and measure variants")
    training.add_argument("variants", nargs="+", choices=list(VARIANTS))
    training.add_argument("--shards", nargs="+", required=True, help="shards of the training faces")
    training.add_argument("--small-shards", nargs="+", default=[], help="the training faces at 64 px")
    training.add_argument("--test", required=True, help="shards of held-out faces")
    training.add_argument("--faces", type=Path, required=True, help="prepared folder of held-out faces")
    training.add_argument("--images", type=int, default=48_000, help="training images of each run")
    training.add_argument("--count", type=int, default=200, help="number of held-out faces")
    training.add_argument("--compile", action="store_true", help="use torch.compile")
    timing = commands.add_parser("costs", help="measure the costs of variants, by default of all")
    timing.add_argument("variants", nargs="*", metavar="VARIANT")
    timing.add_argument("--shards", nargs="+", required=True, help="shards of the training faces")
    timing.set_defaults(images=48_000, compile=False)
    commands.add_parser("table", help="print the collected results of all variants")
    comparing = commands.add_parser("compare", help="compare two variants")
    comparing.add_argument("variants", nargs=2, help="variant and reference")
    comparing.add_argument("--metric", default="pixel_accuracy/mask", help="metric/condition set, or loss/right etc.")
    collecting = commands.add_parser("collect", help="add finished runs to the committed results")
    for one in (training, comparing, collecting):
        one.add_argument("--seeds", type=int, nargs="+", default=SEEDS)
        one.add_argument("--out", type=Path, default=Path("runs/ablations"), help="folder of the runs")
    options = parser.parse_args()
    try:
        execute(options)
    except InputError as error:
        print_error(str(error))
        sys.exit(75 if isinstance(error, TryAgain) else 2)


def execute(options: argparse.Namespace) -> None:
    """Run a command."""
    if options.command == "list":
        for name, variant in VARIANTS.items():
            print(f"{name:22} {variant.what}")
    elif options.command == "train":
        for seed in options.seeds:
            for name in options.variants:
                train(name, seed, options)
    elif options.command == "costs":
        costs(options)
    elif options.command == "table":
        print(table())
    elif options.command == "collect":
        claims = tomllib.loads((ROOT / "benchmarks" / "claims.toml").read_text(encoding="utf-8"))
        wanted = [(*claim["pair"], metric) for claim in claims.values() for metric in claim.get("metrics", ())]
        collect(wanted, options.out, options.seeds)
    else:
        variant, reference = options.variants
        found = compare(variant, reference, options.metric, partial(values_by_face, options.out), options.seeds)
        seeds = ", ".join(f"{value:+.4f}" for value in found["by_seed"])
        print(f"{found['variant']} - {found['reference']}, {found['metric']}: {found['value']:+.4f} ", end="")
        print(f"[{found['low']:+.4f}, {found['high']:+.4f}], p = {found['p']:.3f}, by seed {seeds}, {found['n']} faces")


if __name__ == "__main__":
    main()
