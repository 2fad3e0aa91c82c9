"""Does the model use its condition? The loss of faces with the right condition, another face's, and none; at fixed
noise and evenly spread times, so that two looks differ by the weights only.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import islice
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from likeness.data.sampler import stream
from likeness.data.store import Sample, Store
from likeness.objectives import Objective, make_objective
from likeness.train.step import losses_of
from likeness.types import TextFeatures

VARIANTS = ("right", "shuffled", "none")
TOGETHER = 16
"""Faces a pass."""


class Faces(NamedTuple):
    """N faces to measure on, each with its noise, time, text and one condition."""

    clean: Tensor
    """Normalised latents, [N, C, h, w]."""
    noise: Tensor
    time: Tensor
    """[N], evenly spread from data to noise."""
    text: TextFeatures
    """Of each face's first caption."""
    condition: Tensor
    """Normalised latents of the condition, [N, C, h, w]."""


def faces_with(condition: str, samples: Iterable[Sample], count: int) -> list[Sample]:
    """The first `count` of these that have the condition."""
    return list(islice((sample for sample in samples if condition in sample.conditions), count))


def fixed_faces(
    samples: Sequence[Sample],
    condition: str,
    text: TextFeatures,
    objective: Objective,
    mean: Tensor,
    std: Tensor,
    seed: int = 0,
) -> Faces:
    """Faces for `condition_losses`: noise by (seed, number), times at the middles of N equal parts.

    Args:
        samples: N faces that have the condition.
        condition: which.
        text: features of their captions.
        objective: makes the times.
        mean: mean of raw latents, [1, C, 1, 1] or [1, 1, 1, 1].
        std: their standard deviation.
        seed: of the noise.
    """
    clean = torch.stack([sample.latents for sample in samples])  # [N, C, h, w]
    noise = [stream(seed, n).standard_normal(tuple(clean.shape[1:]), dtype="float32") for n in range(len(samples))]
    return Faces(
        (clean - mean) / std,
        torch.stack([torch.from_numpy(one) for one in noise]),
        objective.sample_time((torch.arange(len(samples)) + 0.5) / len(samples)),
        text,
        (torch.stack([sample.conditions[condition] for sample in samples]) - mean) / std,
    )


@torch.no_grad()
def face_losses(network: nn.Module, objective: Objective, faces: Faces, row: int, device: str) -> dict[str, Tensor]:
    """The training loss of each face [N] with its own condition (`right`), the next face's (`shuffled`) and none."""
    losses: dict[str, list[Tensor]] = {name: [] for name in VARIANTS}
    given = {"right": faces.condition, "shuffled": faces.condition.roll(-1, dims=0), "none": faces.condition}
    for start in range(0, len(faces.clean), TOGETHER):
        part = slice(start, start + TOGETHER)
        clean, noise, time = (x[part].to(device) for x in (faces.clean, faces.noise, faces.time))
        text = TextFeatures(faces.text.tokens[part].to(device), faces.text.pooled[part].to(device))
        for name in VARIANTS:
            index = torch.full((len(clean), 1), -1 if name == "none" else row, device=device)
            condition = given[name][part].to(device)[:, None]  # [B, 1, C, h, w]
            losses[name].append(losses_of(network, objective, clean, noise, time, text, condition, index).cpu())
    return {name: torch.cat(parts) for name, parts in losses.items()}


def condition_losses(pipeline: Any, store: Store, condition: str, *, count: int, seed: int = 0) -> dict[str, float]:
    """Mean training loss of `count` faces at fixed noise and evenly spread times.

    Args:
        pipeline: the model.
        store: shards of faces it was not trained on, made with its autoencoder.
        condition: which condition.
        count: how many faces at most, the first ones of the store that have the condition.
        seed: seed of the noise.

    Returns:
        `right`: with the face's own condition; `shuffled`: with the next face's; `none`: without. The same noise,
        times and captions (each face's first) in all three.
    """
    objective = make_objective(pipeline.config.objective)
    mean, std = (
        torch.tensor(pipeline.config[key], dtype=torch.float32).reshape(1, -1, 1, 1)
        for key in ("latent_mean", "latent_std")
    )
    samples = faces_with(condition, (store[index] for index in range(len(store))), count)
    texts = [pipeline.text_features(list(sample.captions[:1]) or [""]) for sample in samples]
    text = TextFeatures(torch.cat([one.tokens for one in texts]), torch.cat([one.pooled for one in texts]))
    faces = fixed_faces(samples, condition, text, objective, mean, std, seed)
    row = list(pipeline.transformer.config.condition_names).index(condition)
    losses = face_losses(pipeline.transformer, objective, faces, row, str(pipeline.device))
    return {name: values.mean().item() for name, values in losses.items()}


def by_time(losses: Tensor, bins: int = 4) -> list[float]:
    """Mean losses of equal parts of the times, from data to noise; `losses` [N] in order of time."""
    return [part.mean().item() for part in losses.tensor_split(min(bins, len(losses)))]
