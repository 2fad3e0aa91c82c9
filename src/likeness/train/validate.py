"""Does the model use its condition? The loss on unseen faces with the right condition, another face's, and none."""

from __future__ import annotations

from itertools import islice
from typing import Any

import torch

from likeness.data.sampler import stream
from likeness.data.store import Store
from likeness.objectives import make_objective
from likeness.train.step import loss_of


@torch.no_grad()
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
        torch.tensor(pipeline.config[key], dtype=torch.float32).reshape(-1, 1, 1)
        for key in ("latent_mean", "latent_std")
    )
    row = list(pipeline.transformer.config.condition_names).index(condition)
    having = (sample for sample in map(store.__getitem__, range(len(store))) if condition in sample.conditions)
    samples = list(islice(having, count))
    count = len(samples)
    losses = {"right": 0.0, "shuffled": 0.0, "none": 0.0}
    for number, sample in enumerate(samples):
        noise = stream(seed, number).standard_normal(tuple(sample.latents.shape), dtype="float32")
        time = objective.sample_time(torch.tensor([(number + 0.5) / count]))
        text = pipeline.text_features(list(sample.captions[:1]) or [""])
        other = samples[(number + 1) % count]
        for name, source, index in (("right", sample, row), ("shuffled", other, row), ("none", sample, -1)):
            losses[name] += loss_of(
                pipeline.transformer,
                objective,
                ((sample.latents - mean) / std)[None],
                torch.from_numpy(noise)[None],
                time,
                text,
                ((source.conditions[condition] - mean) / std)[None, None],
                torch.tensor([[index]]),
            ).item()
    return {name: value / count for name, value in losses.items()}
