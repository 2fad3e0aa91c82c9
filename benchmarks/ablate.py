"""Train variants of a micro network with equal budgets, and measure them on the same held-out faces.

python benchmarks/ablate.py list
python benchmarks/ablate.py train decoupled concat --shards SHARDS --test SHARDS --faces FOLDER --seeds 0 1 2
python benchmarks/ablate.py compare concat decoupled --metric pixel_accuracy/mask
python benchmarks/ablate.py collect          # write ablations.json with every comparison of claims.toml

Networks are 128 wide and 6 deep, with 64 image tokens of 128 px. Variants with the same seed see the same images,
captions, noise and times. Measured are the loss of the faces of --test with their own mask, another face's and none,
and images of the first --count faces of --faces, generated with the same seeds. `train` stores every run in a folder
below --out; the same command resumes a stopped run and skips finished ones. `compare` pairs two variants by seed and
face, and prints the mean difference with its 95 % interval: Student's t over the seeds, whose variance includes that of
training, plus the variance between faces.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import tomllib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from condition_losses import condition_losses_by_face
from conflicts import measure_conflicts, read_masks
from scipy import stats
from torch import Tensor, nn

from likeness.annotators.face_parser import load_face_parser
from likeness.config import build
from likeness.data.store import Store
from likeness.encoders.components import load_components
from likeness.evaluate.protocol import Protocol
from likeness.evaluate.run import evaluate
from likeness.files import read_json, write_whole
from likeness.models.layers import grid_angles, use_explicit_attention
from likeness.objectives import make_objective
from likeness.parallel import SINGLE_PROCESS
from likeness.pipelines.mditface import MDiTFacePipeline
from likeness.pipelines.mmface import MMFacePipeline
from likeness.train.batches import Batch, denoising_losses, open_stores, read_batches
from likeness.train.config import TrainRecipe, check
from likeness.train.ema import Ema
from likeness.train.networks import build_network
from likeness.train.optim import learning_rate, make_optimizers
from likeness.train.progress import Progress
from likeness.train.run_folder import open_run
from likeness.train.train_state import TrainState
from likeness.types import TextFeatures
from likeness.weights.catalog import BUNDLED, COMMON

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "ablations.json"
"""Committed results of all variants."""

BASE: dict[str, dict[str, Any]] = {
    "objective": {"name": "rectified_flow", "time_sampling": "logit_normal", "sampler": "dpm++"},
    "optimizer": {"name": "muon", "batch": 48, "learning_rate": 1.5e-3, "warmup": 4800, "decay": "linear"},
    "defaults": {"size": 128, "steps": 12, "guidance_scale": 2.0, "guidance_interval": (0.15, 0.85)},
}
"""The recipe of all variants, after that of `mmface-mini`."""

MMFACE = {
    "network": {"name": "mmface", "hidden_size": 128, "depth": 6, "heads": 4},
    "data": {"condition_probabilities": {"mask": 0.4, "sketch": 0.4, "none": 0.2}},
}
MDITFACE = {
    "network": {"name": "mditface", "hidden_size": 128, "depth": 2, "single_depth": 4, "heads": 4},
    "data": {"condition_probabilities": {"mask": 0.8, "none": 0.2}},
}


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


def absolute_positions(network: Any) -> None:
    """Replace rotary positions by sines and cosines that are added to the image tokens; text tokens have none."""
    config = network.config
    angles = grid_angles(8, 8, config.hidden_size, 100.0)  # [N, D / 2]
    network.patch_embed = Positions(network.patch_embed, torch.cat([angles.cos(), angles.sin()], dim=-1).float())
    rope = network.rope

    def unrotated(*args: Any) -> tuple[Tensor, Tensor]:
        cos, sin = rope(*args)
        return torch.ones_like(cos), torch.zeros_like(sin)

    network.rope = unrotated


def no_condition_embedding(network: Any) -> None:
    """All kinds of condition, and none, have the same embedding."""
    network.condition_embed.weight.data.zero_()
    network.condition_embed.requires_grad_(False)


def single_stream(network: Any) -> None:
    """Text and image tokens share the matrices of attention and MLP; modulations stay separate."""
    for block in network.blocks:
        attention = block.attention
        attention.text_qkv, attention.text_out = attention.image_qkv, attention.image_out
        block.text_mlp = block.image_mlp


def open_gates(network: Any) -> None:
    """x + F(AdaLN(x)) instead of x + gate * F(AdaLN(x))."""
    for block in network.blocks:
        block.modulation = OpenGates(block.modulation, 12)


def move_positions(network: Any, *, scale: float, offset: Sequence[float]) -> None:
    """Give condition tokens other positions than the image tokens at the same place."""
    network.spatial_ids = lambda ids: scale * ids + torch.tensor(offset, device=ids.device)


@dataclass(frozen=True, kw_only=True)
class Variant:
    """A network to train."""

    what: str
    recipe: Mapping[str, Any]
    changes: Mapping[str, Any] = field(default_factory=dict)
    """Table -> keys that replace those of the recipe."""
    edit: Callable[[Any], None] = lambda network: None
    """Changes the new network."""
    given: tuple[str, ...] = ("mask",)
    """Condition sets of the evaluation."""


def mmface(what: str, edit: Callable[[Any], None] = lambda network: None, **changes: Any) -> Variant:
    return Variant(what=what, recipe=MMFACE, changes=changes, edit=edit, given=("mask", "sketch", "none"))


def mditface(what: str, edit: Callable[[Any], None] = lambda network: None, **changes: Any) -> Variant:
    return Variant(what=what, recipe=MDITFACE, changes=changes, edit=edit, given=("mask", "none"))


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
    "no-dropout": mditface(
        "always mask and text", data={"condition_probabilities": {"mask": 1.0}, "text_dropout": 0.0}
    ),
    "mditface-all": Variant(
        what="mask, sketch and keypoints",
        recipe=MDITFACE,
        changes={"data": {"condition_probabilities": {"mask": 0.3, "sketch": 0.3, "keypoints": 0.2, "none": 0.2}}},
        given=("mask", "sketch", "none"),
    ),
    # MMFace-DiT
    "mmface": mmface("dual stream, RoPE, condition embedding, gates, rectified flow"),
    "mmface-absolute": mmface("absolute instead of rotary positions", absolute_positions),
    "mmface-no-embedding": mmface("without condition embedding", no_condition_embedding),
    "mmface-single": mmface("image and text share matrices", single_stream),
    "mmface-open": mmface("without gates", open_gates),
    "mmface-text-none": mmface("text without rotary positions", network={"text_rope": "none"}),
    "mmface-ddpm": mmface("DDPM, noise prediction, min-SNR 5", objective={"name": "ddpm"}),
    "mmface-ddpm-plain": mmface("DDPM without min-SNR", objective={"name": "ddpm", "snr_gamma": None}),
}

CONFLICT_FACES = 40
"""Faces whose masks are combined with contradicting prompts (`conflicts.py`)."""

METRICS = (
    "pixel_accuracy", "mean_iou", "rare_class_recall", "edge_f_score", "retrieval", "attribute_recall",
    "complete_faces", "kid_text_image",
)  # fmt: skip


def recipe_of(name: str, seed: int, options: argparse.Namespace) -> TrainRecipe:
    """Return the recipe of a variant."""
    variant = VARIANTS[name]
    values: dict[str, Any] = {table: dict(content) for table, content in {**BASE, **variant.recipe}.items()}
    for table, content in variant.changes.items():
        values[table] = (values[table] if table != "objective" else {}) | content
    values["data"] |= {"shards": options.shards, "text_dropout": values["data"].get("text_dropout", 0.1)}
    values["optimizer"] |= {"images": options.images}
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


def create(name: str, recipe: TrainRecipe, **sizes: int) -> Any:
    """Create the network of a variant with random weights."""
    torch.manual_seed(recipe.seed)
    network = build_network(recipe, **sizes)
    VARIANTS[name].edit(network)
    return network


def train(name: str, seed: int, options: argparse.Namespace) -> None:
    """Train and measure one variant with one seed, unless its result exists."""
    run = options.out / name / f"seed-{seed}"
    if (run / "result.json").is_file():
        return
    print(f"{name}, seed {seed}", flush=True)
    recipe = recipe_of(name, seed, options)
    check(recipe)
    components, objective = load_components(BUNDLED / COMMON), make_objective(recipe.objective)
    stores, o = open_stores(recipe, recipe.data.shards, components, 2), recipe.optimizer
    width = components.text_encoder.config.hidden_size
    sizes = {"channels": stores[0][0].latents.shape[0], "text_dim": width, "pooled_dim": width}
    sizes |= {"text_tokens": components.settings["max_text_tokens"]}
    model = create(name, recipe, **sizes)
    use_explicit_attention(model)
    state = TrainState(model=model, optimizers=make_optimizers(model, o), emas=[Ema(model, o.ema)])
    with open_run(recipe, run) as signals:
        state.resume(run)
        if recipe.compile:
            model.compile(dynamic=False)
        progress = Progress(run, state, o.images, o.batch, signals, recipe)
        names = list(model.config.condition_names)
        settings = components.settings
        batches = read_batches(recipe, stores, names, settings, SINGLE_PROCESS, progress.starts, o.batch, 2)
        for start, (batch,) in progress.steps(batches):
            rate = learning_rate(start, o.images, o.learning_rate, o.warmup, o.decay)
            with torch.autocast("cpu", torch.bfloat16):
                loss = denoising_losses(model, objective, batch.with_text(components)).mean()
            loss.backward()
            norm = state.step(rate, o.max_grad_norm)
            progress.end_step(loss=loss, gradient_norm=norm)
            if progress.due(recipe.log_every):
                progress.report(learning_rate=rate)
            progress.save(recipe.checkpoint_every, keep=1)
        averaged = create(name, recipe, **sizes)
        averaged.load_state_dict(model.state_dict() | state.emas[0].weights, strict=False)
        pipeline = pipeline_of(averaged.eval(), recipe, components)
        write_whole(run / "result.json", json.dumps(measure(name, pipeline, run, options), indent=1))


def pipeline_of(network: Any, recipe: TrainRecipe, components: Any) -> Any:
    """Return the pipeline of a trained network."""
    pipeline_class = MMFacePipeline if recipe.network.name == "mmface" else MDiTFacePipeline
    objective = make_objective(recipe.objective)
    pipeline = pipeline_class(
        transformer=network,
        vae=components.vae,
        text_encoder=components.text_encoder,
        tokenizer=components.tokenizer,
        scheduler=objective.scheduler(),
        objective=objective.config(),
        defaults=recipe.defaults,
        sizes=[[128, 128]],
        **components.settings,
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def measure(name: str, pipeline: Any, run: Path, options: argparse.Namespace) -> dict[str, Any]:
    """Measure a network: metric -> mean; values by face go to `loss.npz` and to the evaluation's
    `scores.npz`, those by pair of a mask and a prompt that contradicts it to `conflict.npz`."""
    variant = VARIANTS[name]
    losses = condition_losses_by_face(pipeline, Store(options.test), variant.given[0], count=options.count)
    np.savez(run / "loss.npz", **losses)
    means = {f"loss/{kind}": float(values.mean()) for kind, values in losses.items()}
    conflicts = measure_conflicts(pipeline, read_masks(options.faces, CONFLICT_FACES, 128), load_face_parser())
    by_pair = {"text": np.array([one.text for one in conflicts]), "mask": np.array([one.mask for one in conflicts])}
    np.savez(run / "conflict.npz", **by_pair)
    means |= {f"conflict/{kind}": float(values.mean()) for kind, values in by_pair.items()}
    protocol = Protocol(given=variant.given, count=options.count, metrics=METRICS)
    results = evaluate(options.faces, run / "evaluation", protocol, pipeline=pipeline, model=name)
    assert results is not None
    means |= {f"{one.metric}/{one.given}": one.value for one in results.numbers if one.against == "own"}
    parameters = sum(parameter.numel() for parameter in pipeline.transformer.parameters())
    facts = {"images": options.images, "count": options.count, "parameters": parameters, "commit": commit()}
    return {**facts, "fingerprint": fingerprint(name), "means": means}


def commit() -> str:
    """Return the commit of the code, or "unknown" outside of a repository."""
    found = subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=False)
    return found.stdout.strip() or "unknown"


@torch.no_grad()
def fingerprint(name: str) -> float:
    """Return the loss of a variant with random weights on random latents: it changes when what the variant computes
    does. A result is out of date if its fingerprint differs.
    """
    recipe = recipe_of(name, 0, argparse.Namespace(shards=["none"], images=96, compile=False))
    sizes = {"hidden_size": 32, "heads": 2, "depth": 2} | (
        {} if recipe.network.name == "mmface" else {"single_depth": 2}
    )
    recipe = replace(recipe, network=replace(recipe.network, **sizes))  # a smaller one of the same kind
    network = create(name, recipe, channels=8, text_dim=32, pooled_dim=32, text_tokens=8)
    objective, draw = make_objective(recipe.objective), partial(torch.randn, generator=torch.Generator().manual_seed(0))
    for parameter in network.parameters():
        if parameter.requires_grad:
            parameter.copy_(0.3 * draw(parameter.shape))
    text, index = TextFeatures(draw(4, 8, 32), draw(4, 32)), torch.tensor([[0], [0], [-1], [0]])
    latents = {"clean": draw(4, 8, 16, 16), "noise": draw(4, 8, 16, 16), "condition_latents": draw(4, 1, 8, 16, 16)}
    batch = Batch(**latents, uniform=torch.linspace(0.1, 0.9, 4), condition_index=index, captions=[], text=text)
    return float(f"{denoising_losses(network, objective, batch).mean():.5g}")


# --- Comparisons


def values_by_face(run: Path, metric: str) -> np.ndarray:
    """Return the values of a metric of one run, [N]; NaN for a face that has none."""
    kind, _, given = metric.partition("/")
    if kind in ("loss", "conflict"):
        return np.load(run / f"{kind}.npz")[given]
    return np.load(run / "evaluation" / "scores.npz")[metric]


def compare(variant: str, reference: str, metric: str, out: Path, seeds: Sequence[int]) -> dict[str, Any]:
    """Return the mean of variant minus reference with its 95 % interval, paired by seed and face."""
    values = np.array(
        [[values_by_face(out / name / f"seed-{seed}", metric) for seed in seeds] for name in (variant, reference)]
    )  # [2, S, N]
    values = values[:, :, ~np.isnan(values).any(axis=(0, 1))]
    means = values.mean(axis=(1, 2)).tolist()
    return {
        "variant": variant,
        "reference": reference,
        "metric": metric,
        "means": means,
        **interval(values[0] - values[1]),
    }


def interval(by_face: np.ndarray) -> dict[str, Any]:
    """Return mean, 95 % interval and p-value of paired differences [S, N] of S >= 2 seeds and N faces."""
    by_seed = by_face.mean(axis=1)  # [S]
    seeds, faces = by_face.shape
    variance = by_seed.var(ddof=1) / seeds + by_face.mean(axis=0).var(ddof=1) / faces
    error, value = float(np.sqrt(variance)), float(by_seed.mean())
    reach = error * float(stats.t.ppf(0.975, seeds - 1))
    p = 2 * float(stats.t.sf(abs(value) / max(error, 1e-12), seeds - 1))
    return {
        "value": value,
        "low": value - reach,
        "high": value + reach,
        "p": p,
        "n": faces,
        "by_seed": by_seed.tolist(),
    }


def read_results() -> dict[str, Any]:
    """Return the committed results: `variants` and `comparisons`."""
    return read_json(RESULTS) if RESULTS.is_file() else {"variants": {}, "comparisons": {}}


def collect(wanted: Sequence[Sequence[str]], out: Path, seeds: Sequence[int]) -> None:
    """Add the finished runs and the wanted comparisons, (variant, reference, metric) each, to the committed results."""
    results = read_results()
    for name in VARIANTS:
        files = {seed: out / name / f"seed-{seed}" / "result.json" for seed in seeds}
        found = {seed: read_json(file) for seed, file in files.items() if file.is_file()}
        if found:
            first = next(iter(found.values()))
            facts = {key: first[key] for key in ("images", "count", "parameters", "commit", "fingerprint")}
            results["variants"][name] = {**facts, "seeds": {str(seed): one["means"] for seed, one in found.items()}}
    for variant, reference, metric in wanted:
        runs = [out / name / f"seed-{seed}" / "result.json" for name in (variant, reference) for seed in seeds]
        if all(run.is_file() for run in runs):
            found = compare(variant, reference, metric, out, seeds)
            found["images"] = results["variants"][variant]["images"]
            results["comparisons"][" ".join((variant, reference, metric))] = found
    write_whole(RESULTS, json.dumps(results, indent=1, sort_keys=True) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("list", help="list the variants")
    training = commands.add_parser("train", help="train and measure variants")
    training.add_argument("variants", nargs="+", choices=list(VARIANTS))
    training.add_argument("--shards", nargs="+", required=True, help="shards of the training faces")
    training.add_argument("--test", required=True, help="shards of held-out faces")
    training.add_argument("--faces", type=Path, required=True, help="prepared folder of held-out faces")
    training.add_argument("--images", type=int, default=96_000, help="training images of each run")
    training.add_argument("--count", type=int, default=200, help="number of held-out faces")
    training.add_argument("--compile", action="store_true", help="use torch.compile")
    comparing = commands.add_parser("compare", help="compare two variants")
    comparing.add_argument("variants", nargs=2, help="variant and reference")
    comparing.add_argument("--metric", default="pixel_accuracy/mask", help="metric/condition set, or loss/right etc.")
    collecting = commands.add_parser("collect", help="add finished runs to the committed results")
    for one in (training, comparing, collecting):
        one.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
        one.add_argument("--out", type=Path, default=Path("runs/ablations"), help="folder of the runs")
    options = parser.parse_args()
    if options.command == "list":
        for name, variant in VARIANTS.items():
            print(f"{name:22} {variant.what}")
    elif options.command == "train":
        for seed in options.seeds:
            for name in options.variants:
                train(name, seed, options)
    elif options.command == "collect":
        claims = tomllib.loads((ROOT / "benchmarks" / "claims.toml").read_text(encoding="utf-8"))
        wanted = [claim["compare"] for claim in claims.values() if "compare" in claim]
        collect(wanted, options.out, options.seeds)
    else:
        found = compare(*options.variants, options.metric, options.out, options.seeds)
        seeds = ", ".join(f"{value:+.4f}" for value in found["by_seed"])
        print(f"{found['variant']} - {found['reference']}, {found['metric']}: {found['value']:+.4f} ", end="")
        print(f"[{found['low']:+.4f}, {found['high']:+.4f}], p = {found['p']:.3f}, by seed {seeds}, {found['n']} faces")


if __name__ == "__main__":
    main()
