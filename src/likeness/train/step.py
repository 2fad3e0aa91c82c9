"""One training step: a batch as a function of its position, and the loss of the network on it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from likeness.data.sampler import stream
from likeness.data.store import Sample
from likeness.objectives import Objective
from likeness.train.config import DataRecipe, parts_of
from likeness.types import TextFeatures


class Batch(NamedTuple):
    """B samples, ready for the network."""

    clean: Tensor
    """Normalised latents x_0, [B, C, h, w]."""
    noise: Tensor
    """Of the same shape."""
    uniform: Tensor
    """Uniform numbers from which the objective makes times, [B]."""
    condition_latents: Tensor
    """[B, K, C, h, w], K the most that one sample may have."""
    condition_index: Tensor
    """[B, K], -1 where absent."""
    captions: list[str]
    """B captions; "" where the text is dropped."""
    text: TextFeatures | None
    """Their features, float32, where the store has them."""


def make_batch(
    samples: Sequence[Sample],
    positions: Sequence[int],
    recipe: DataRecipe,
    condition_names: Sequence[str],
    mean: Tensor,
    std: Tensor,
    seed: int,
) -> Batch:
    """The batch of these samples at these positions of the run.

    Args:
        samples: B faces.
        positions: the run-wide position of each: its random numbers depend on nothing else.
        recipe: shares and dropout.
        condition_names: rows of the network's condition embedding.
        mean: mean of raw latents, [1, C, 1, 1].
        std: their standard deviation.
        seed: the run's seed.
    """
    shares = np.array(list(recipe.condition_shares.values()), dtype=np.float64)
    cumulative = np.cumsum(shares / shares.sum())
    kinds = list(recipe.condition_shares)
    most = max(1 if condition_names else 0, *(len(parts_of(kind)) for kind in kinds))  # K
    clean, noise, uniform, conditions, index, captions, text = [], [], [], [], [], [], []
    for sample, position in zip(samples, positions, strict=True):
        rng = stream(seed, position)
        number = int(rng.integers(len(sample.captions))) if sample.captions else -1
        if rng.random() < recipe.text_dropout:
            number = -1  # the empty caption
        captions.append(sample.captions[number] if number >= 0 else "")
        if sample.text:
            text.append(sample.text[number])
        kind = kinds[min(int(np.searchsorted(cumulative, rng.random(), side="right")), len(kinds) - 1)]
        uniform.append(rng.random())
        noise.append(torch.from_numpy(rng.standard_normal(tuple(sample.latents.shape), dtype=np.float32)))
        # "none", or a condition that this face lacks: trained without; what lies in its place is never read
        given = [name for name in parts_of(kind) if name in sample.conditions]
        absent = most - len(given)
        pictures = [*(sample.conditions[name] for name in given), *[sample.latents] * absent]
        conditions.append(torch.stack(pictures) if most else sample.latents[None][:0])  # [K, C, h, w]
        index.append([*(condition_names.index(name) for name in given), *[-1] * absent])
        latents = sample.latents
        if sample.log_variance is not None:  # another draw from the autoencoder's distribution every time
            drawn = torch.from_numpy(rng.standard_normal(tuple(latents.shape), dtype=np.float32))
            latents = latents + torch.exp(0.5 * sample.log_variance) * drawn
        clean.append(latents)
    assert len(text) in (0, len(samples))
    features = [torch.stack(part).float() for part in zip(*text, strict=True)]  # [B, L, D], [B, P]
    return Batch(
        (torch.stack(clean) - mean) / std,
        torch.stack(noise),
        torch.tensor(uniform, dtype=torch.float32),
        (torch.stack(conditions) - mean[:, None]) / std[:, None],
        torch.tensor(index, dtype=torch.long),
        captions,
        TextFeatures(*features) if features else None,
    )


def losses_of(
    network: nn.Module,
    objective: Objective,
    clean: Tensor,
    noise: Tensor,
    time: Tensor,
    text: TextFeatures,
    condition_latents: Tensor,
    condition_index: Tensor,
) -> Tensor:
    """weight(t) times the mean squared error at x_t of each sample, float32 [B]."""
    noisy = objective.corrupt(clean, noise, time)  # [B, C, h, w]
    prediction = network(noisy, objective.model_time(time), text, condition_latents, condition_index)
    error = (prediction.float() - objective.target(clean, noise, time)).square().mean(dim=(1, 2, 3))  # [B]
    return objective.weight(time) * error


def loss_of(network: nn.Module, objective: Objective, *inputs: Any) -> Tensor:
    """The mean of `losses_of` over the batch: what is made small."""
    return losses_of(network, objective, *inputs).mean()
