"""Loss of faces with their own condition, another face's, and none, at fixed noise and evenly spread times."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn

from likeness.data.sampler import stream
from likeness.data.store import Sample, Store
from likeness.objectives import Objective, make_objective
from likeness.train.batches import Batch, latent_statistics
from likeness.train.losses import denoising_losses
from likeness.types import TextFeatures

PASS = 16
"""Faces per forward pass."""


def faces_with(condition: str, samples: Iterable[Sample], count: int) -> list[Sample]:
    """Return the first `count` samples that have a condition."""
    return list(islice((sample for sample in samples if condition in sample.conditions), count))


def fixed_faces(
    samples: Sequence[Sample],
    condition: str,
    text: TextFeatures,
    condition_id: int,
    mean: Tensor,
    std: Tensor,
    seed: int,
) -> Batch:
    """Return the batch of N faces for `face_losses`, with noise by (seed, number) and times at the middles of N equal
    parts, from data to noise.

    Args:
        samples: N faces that have the condition.
        condition: name of the condition.
        text: features of their first captions.
        condition_id: id of the condition in the network.
        mean: mean of raw latents, [1, C, 1, 1].
        std: their standard deviation.
        seed: seed of the noise.
    """
    clean = torch.stack([sample.latents for sample in samples])  # [N, C, h, w]
    noise = [stream(seed, n).standard_normal(tuple(clean.shape[1:]), dtype="float32") for n in range(len(samples))]
    conditions = torch.stack([sample.conditions[condition] for sample in samples])  # [N, C, h, w]
    return Batch(
        clean=(clean - mean) / std,
        noise=torch.stack([torch.from_numpy(one) for one in noise]),
        uniform=(torch.arange(len(samples)) + 0.5) / len(samples),
        condition_latents=((conditions - mean) / std)[:, None],  # [N, 1, C, h, w]
        condition_index=torch.full((len(samples), 1), condition_id),
        captions=[],
        text=text,
    )


@torch.no_grad()
def face_losses(network: nn.Module, objective: Objective, faces: Batch, device: str) -> dict[str, Tensor]:
    """Return the training loss of each face [N] with its own condition (`right`), the next face's (`shuffled`) and
    none.
    """
    variants = {
        "right": faces,
        "shuffled": faces._replace(condition_latents=faces.condition_latents.roll(-1, dims=0)),
        "none": faces._replace(condition_index=torch.full_like(faces.condition_index, -1)),
    }
    parts = [slice(start, start + PASS) for start in range(0, len(faces.clean), PASS)]
    return {
        name: torch.cat([denoising_losses(network, objective, batch.part(part).to(device)).cpu() for part in parts])
        for name, batch in variants.items()
    }


def condition_losses(pipeline: Any, store: Store, condition: str, *, count: int, seed: int = 0) -> dict[str, float]:
    """Return the mean training loss of faces at fixed noise and evenly spread times.

    Args:
        pipeline: the model.
        store: shards of held-out faces, made with the model's autoencoder.
        condition: name of the condition.
        count: maximum number of faces, the first ones of the store that have the condition.
        seed: seed of the noise.

    Returns:
        `right`: with the face's own condition; `shuffled`: with the next face's; `none`: without. Noise, times and
        captions (each face's first) are the same in all three.
    """
    samples = faces_with(condition, (store[index] for index in range(len(store))), count)
    texts = [pipeline.text_features(list(sample.captions[:1]) or [""]) for sample in samples]
    text = TextFeatures(torch.cat([one.tokens for one in texts]), torch.cat([one.pooled for one in texts]))
    condition_id = list(pipeline.transformer.config.condition_names).index(condition)
    faces = fixed_faces(samples, condition, text, condition_id, *latent_statistics(pipeline.config), seed)
    objective = make_objective(pipeline.config.objective)
    losses = face_losses(pipeline.transformer, objective, faces, str(pipeline.device))
    return {name: values.mean().item() for name, values in losses.items()}
