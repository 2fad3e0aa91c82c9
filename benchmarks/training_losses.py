"""Changes of the training loss that promise better images at the same cost; variants of `ablate.py`."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from likeness.objectives import Objective
from likeness.train.batches import Batch, denoising_losses, predict


def contrastive_losses(network: nn.Module, objective: Objective, batch: Batch, weight: float = 0.05) -> Tensor:
    """Contrastive flow matching: minus `weight` times the distance to the target of another sample, [B] (Stoica et al.
    2025, arXiv 2506.05350).
    """
    prediction, target, weights = predict(network, objective, batch)
    own = (prediction - target).square().mean(dim=(1, 2, 3))  # [B]
    other = (prediction - target.roll(1, dims=0)).square().mean(dim=(1, 2, 3))  # [B]
    return weights * (own - weight * other)


def record_features(network: Any) -> Any:
    """Let the second block keep its image tokens [B, N, D] of the last pass in `features`."""

    def keep(block: nn.Module, _: Any, output: tuple[Tensor, Tensor]) -> None:
        block.features = output[0]

    network.blocks[1].register_forward_hook(keep)
    return network


def dispersive_losses(
    network: Any, objective: Objective, batch: Batch, weight: float = 0.5, temperature: float = 0.5
) -> Tensor:
    """The loss plus `weight` times the dispersive loss of the second block's image tokens, [B]: InfoNCE without
    positive pairs, log mean exp(-|z_i - z_j|^2 / temperature), where |z|^2 is the mean over a sample's values (Wang
    and He 2025, arXiv 2506.09027). Needs `record_features`.
    """
    losses = denoising_losses(network, objective, batch)  # [B]
    features = network.blocks[1].features.float().flatten(1)  # [B, N D]
    del network.blocks[1].features  # a network with it could not be copied
    distances = torch.cdist(features, features).square() / features.shape[1]  # [B, B]
    dispersion = torch.logsumexp(-distances / temperature, dim=(0, 1)) - 2 * torch.log(torch.tensor(len(features)))
    return losses + weight * dispersion
