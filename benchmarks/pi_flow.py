"""Train pi-Flow from a flow model, as the control of its adversarial student, and measure it.

    python benchmarks/pi_flow.py mmface-mini --shards SHARDS --faces FOLDER --images 60000 --out runs/pi_flow

pi-Flow (Chen et al. 2025, arXiv 2510.14974) with the DX policy: one pass of the student predicts x_0 at `POINTS` times
of a segment between two steps. Without further passes, the policy v(x_t, t) = (x_t - x_0(t)) / t, with x_0(t) linear
between these times, is integrated over the segment in many substeps. It is trained to have the velocity of the guided
teacher at states on its own way through the segment. Run the same command again to resume.

B batch, C latent channels, h x w latent size, P points, S = `SUBSTEPS` / steps substeps of a segment.
"""

from __future__ import annotations

import argparse
import sys
from functools import partial
from pathlib import Path
from typing import Any

import torch
from ablate import Variant, assemble, fit
from torch import Tensor, nn

import likeness
from likeness.cli.terminal import print_error
from likeness.config import build
from likeness.encoders.components import load_components
from likeness.evaluate.protocol import Protocol
from likeness.evaluate.run import evaluate
from likeness.models.mmface import MMFaceTransformer
from likeness.objectives import Objective, make_objective
from likeness.pages import Section, markdown_table
from likeness.train.batches import Batch
from likeness.train.config import TrainRecipe
from likeness.types import InputError, TextFeatures, TryAgain
from likeness.weights.catalog import BUNDLED, COMMON

POINTS = 10
"""Times of a segment, both ends included, at which x_0 is predicted."""

SUBSTEPS = 128
"""Substeps from noise to data."""

METRICS = (
    "pixel_accuracy", "edge_f_score", "retrieval", "complete_faces", "sharpness", "fd_text_image", "recall_text_image",
)  # fmt: skip


def policy_velocity(clean: Tensor, noisy: Tensor, time: Tensor, start: Tensor, steps: int) -> Tensor:
    """Return the policy's velocity, [B, C, h, w].

    Args:
        clean: x_0 at the points of the segment, [B, P, C, h, w].
        noisy: x_t, [B, C, h, w].
        time: t, [B]; above 0.
        start: where the segment starts, [B]; it ends 1 / `steps` below.
        steps: number of segments.
    """
    place = ((start - time) * steps).clamp(0, 1) * (POINTS - 1)  # [B]
    left = place.floor().long().clamp(max=POINTS - 2)  # [B]
    samples, share = torch.arange(len(place)), (place - left)[:, None, None, None]
    x0 = (1 - share) * clean[samples, left] + share * clean[samples, left + 1]  # [B, C, h, w]
    return (noisy - x0) / time[:, None, None, None]


def policy_states(clean: Tensor, noisy: Tensor, start: Tensor, steps: int) -> Tensor:
    """Return the states after 0, 1, ..., S substeps of the policy from x_t, `noisy`, [S + 1, B, C, h, w]."""
    states = [noisy]
    for substep in range(SUBSTEPS // steps):
        velocity = policy_velocity(clean, states[-1], start - substep / SUBSTEPS, start, steps)
        states.append(states[-1] - velocity / SUBSTEPS)
    return torch.stack(states)


def predict_points(network: nn.Module, noisy: Tensor, start: Tensor, objective: Objective, *given: Any) -> Tensor:
    """Return x_0 at the points of the segments that start at x_t, [B, P, C, h, w]; `given` are the other arguments of
    the network, whose output is P velocities, from the segment's start to each x_0.
    """
    velocities = network(noisy, objective.model_time(start), *given).float().unflatten(1, (POINTS, -1))
    return noisy[:, None] - start[:, None, None, None, None] * velocities


def widen(network: Any) -> Any:
    """Repeat a network's last layer for all points; each then predicts what the network did."""
    final = network.final
    network.final = nn.Linear(final.in_features, POINTS * final.out_features)
    with torch.no_grad():
        network.final.weight.copy_(final.weight.repeat(POINTS, 1))
        network.final.bias.copy_(final.bias.repeat(POINTS))
    return network


class PolicyTransformer(MMFaceTransformer):
    """A trained student whose output is the mean velocity of a segment: Euler's method follows the policy. `widen` it,
    and set `steps` and `objective`, before use.
    """

    steps: int
    objective: Objective

    def forward(self, latents: Tensor, time: Tensor, *given: Any, **options: Any) -> Any:
        """As that of `MMFaceTransformer`; `time` is the start of a segment."""
        start = time / self.objective.model_time(torch.ones(()))  # [B], 1 to 1 / steps
        network = partial(super().forward, **options | {"return_dict": None})
        clean = predict_points(network, latents, start, self.objective, *given)  # [B, P, C, h, w]
        return (latents - policy_states(clean, latents, start, self.steps)[-1]) * self.steps


def imitation_losses(
    network: nn.Module,
    objective: Objective,
    batch: Batch,
    *,
    teacher: nn.Module,
    empty: TextFeatures,
    steps: int,
    guidance_scale: float,
    guidance_interval: tuple[float, float],
) -> Tensor:
    """Return the squared difference of the policy's velocity from that of the guided teacher at two states of each
    sample, one in each half of a segment, mean over their values, [B]. The policy starts at noised data; segment and
    states are functions of `batch.uniform`. `empty` are the features of the empty caption, one sample.
    """
    assert batch.text is not None
    substeps = SUBSTEPS // steps
    uniform = batch.uniform.clamp(max=1 - 1e-6)  # rounding to float32 may give 1
    segment = (uniform * steps).floor()  # [B]
    start = 1 - segment / steps  # [B]
    noisy = objective.corrupt(batch.clean, batch.noise, start)  # [B, C, h, w]
    conditions = batch.condition_latents, batch.condition_index
    clean = predict_points(network, noisy, start, objective, batch.text, *conditions)  # [B, P, C, h, w]

    with torch.no_grad():
        all_states = policy_states(clean, noisy, start, steps)  # [S + 1, B, C, h, w]
        first = ((uniform * steps - segment) * substeps / 2).long()  # [B], below S / 2
        samples = torch.arange(len(first))
        states = torch.cat([all_states[first + half, samples] for half in (0, substeps // 2)])  # [2 B, C, h, w]
        times = torch.cat([start - (first + half) / SUBSTEPS for half in (0, substeps // 2)])  # [2 B]
        text = [torch.cat([own, own, *[none.expand_as(own)] * 2]) for own, none in zip(batch.text, empty, strict=True)]
        given = TextFeatures(*text), *(torch.cat([tensor] * 4) for tensor in conditions)
        own, without = teacher(torch.cat([states] * 2), objective.model_time(times.repeat(2)), *given).chunk(2)
        low, high = guidance_interval
        scale = torch.where((times >= low) & (times <= high), guidance_scale, 1.0)[:, None, None, None]
        target = without + scale * (own - without)  # [2 B, C, h, w]

    velocity = policy_velocity(torch.cat([clean] * 2), states, times, start.repeat(2), steps)
    return (velocity - target).square().mean(dim=(1, 2, 3)).unflatten(0, (2, -1)).mean(dim=0)


def student_recipe(options: argparse.Namespace, teacher: Any) -> TrainRecipe:
    """Return the recipe of a pi-Flow student."""
    return build(
        TrainRecipe,
        {
            "network": {key: teacher.transformer.config[key] for key in ("hidden_size", "depth", "heads")},
            "objective": {"name": "rectified_flow", "sampler": "euler"},
            "data": {
                "shards": options.shards,
                "condition_probabilities": {"mask": 0.4, "sketch": 0.25, "keypoints": 0.1, "none": 0.25},
            },
            "optimizer": {
                "name": "adamw",
                "images": options.images,
                "batch": 48,
                "learning_rate": 5e-5,
                "warmup": 1920,
                "decay": "constant",
                "betas": [0.9, 0.95],
                "weight_decay": 0.0,
                "max_grad_norm": 50.0,
            },
            "defaults": {"size": teacher.config.defaults["size"], "steps": options.steps, "guidance_scale": 1.0},
            "compile": options.compile,
            "threads": 1,
            "log_every": 960,
            "checkpoint_every": 4800,
        },
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("teacher", help="flow model: name or folder of an MMFace pipeline")
    parser.add_argument("--shards", nargs="+", required=True)
    parser.add_argument("--faces", type=Path, required=True, help="prepared folder of held-out faces")
    parser.add_argument("--images", type=int, required=True, help="training images")
    parser.add_argument("--steps", type=int, default=4, choices=(1, 2, 4, 8), help="passes per image")
    parser.add_argument("--count", type=int, default=200, help="faces of the evaluation")
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--out", type=Path, required=True)
    parser.set_defaults(small_shards=())
    options = parser.parse_args()
    pipeline, components = likeness.load(options.teacher), load_components(BUNDLED / COMMON)
    recipe, teacher = student_recipe(options, pipeline), pipeline.transformer
    losses = partial(
        imitation_losses,
        teacher=teacher,
        empty=components.text_features([""]),
        steps=options.steps,
        guidance_scale=pipeline.config.defaults["guidance_scale"],
        guidance_interval=tuple(pipeline.config.defaults["guidance_interval"]),
    )
    student: Any = MMFaceTransformer.from_config(teacher.config)
    student.load_state_dict(teacher.state_dict())
    if options.compile:
        teacher.compile(dynamic=False)
    variant = Variant(what="pi-Flow", recipe={}, losses=losses)
    student = fit(variant, recipe, widen(student), components, options.out, options)

    policy: Any = widen(PolicyTransformer.from_config(student.config))
    policy.load_state_dict(student.state_dict())
    sampled = assemble(recipe, policy, components)
    policy.steps, policy.objective = options.steps, make_objective(recipe.objective)
    protocol = Protocol(count=options.count, metrics=METRICS)
    results = evaluate(options.faces, options.out / "evaluation", protocol, pipeline=sampled, model="pi-flow")
    assert results is not None
    rows = [[one.metric, one.given, f"{one.value:.4g}"] for one in results.numbers if one.against == "own"]
    print(markdown_table(Section(header=["metric", "given", "value"], rows=rows)))


if __name__ == "__main__":
    try:
        main()
    except (InputError, TryAgain) as error:
        print_error(str(error))
        sys.exit(75 if isinstance(error, TryAgain) else 2)
