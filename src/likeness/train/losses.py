"""Losses of a training step, and the features of blocks that some of them read.

B samples, C latent channels, h x w latent size, N image tokens, D width of a network.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from likeness.models.mditface import PATCH, MDiTFaceTransformer
from likeness.models.mditface_blocks import split_streams
from likeness.models.mmface import MMFaceBlock, MMFaceTransformer
from likeness.objectives import Objective
from likeness.train.batches import Batch

TEMPERATURE = 0.5
"""Of the dispersive loss, as in its paper."""


def predict(network: nn.Module, objective: Objective, batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
    """Return prediction and target at x_t of each sample of a batch with text, [B, C, h, w] each, and weight(t) [B]."""
    time = objective.sample_time(batch.uniform)  # [B]
    noisy = objective.corrupt(batch.clean, batch.noise, time)  # [B, C, h, w]
    prediction = network(noisy, objective.model_time(time), batch.text, batch.condition_latents, batch.condition_index)
    return prediction.float(), objective.target(batch.clean, batch.noise, time), objective.weight(time)


def denoising_losses(network: nn.Module, objective: Objective, batch: Batch) -> Tensor:
    """Return weight(t) times the mean squared error at x_t of each sample of a batch with text, float32 [B]."""
    prediction, target, weight = predict(network, objective, batch)
    return weight * (prediction - target).square().mean(dim=(1, 2, 3))


def dispersive_loss(features: Tensor) -> Tensor:
    """Return the dispersive loss of image tokens [B, N, D], a number: InfoNCE without positive pairs, log mean
    exp(-|z_i - z_j|^2 / temperature) over all pairs, where |z|^2 is the mean over a sample's values (Wang and He 2025,
    arXiv 2506.09027). It is 0 if all are equal, and lower the more they differ.
    """
    values = features.float().flatten(1)  # [B, N D]
    distances = torch.cdist(values, values).square() / values.shape[1]  # [B, B]
    return torch.logsumexp(-distances / TEMPERATURE, dim=(0, 1)) - 2 * math.log(len(values))


def blocks_of(network: nn.Module) -> tuple[list[nn.Module], int, int]:
    """Return the blocks of a network in the order of their calls, its width D and its patch size p."""
    if isinstance(network, MMFaceTransformer):
        return list(network.blocks), network.config.hidden_size, network.config.patch_size
    assert isinstance(network, MDiTFaceTransformer)
    blocks = [*network.transformer_blocks, *network.single_transformer_blocks]
    return blocks, network.config.num_attention_heads * network.config.attention_head_dim, PATCH


def block_features(block: nn.Module, inputs: tuple[Any, ...], output: Any) -> tuple[Tensor, Tensor] | None:
    """Return the image tokens [B, N, D] after a block and its conditioning [B, D], given the arguments of a forward
    hook; None if the call has no image tokens (the static pathway of MDiTFace). In MDiTFace's single blocks, the text
    precedes the image in the same stream, so there are L more tokens.
    """
    if isinstance(block, MMFaceBlock):
        return output[0], inputs[2]
    if "image" in inputs[1]:
        return split_streams(output, inputs[1])["image"], inputs[2].conditioning
    return None


class DispersiveLoss:
    """The dispersive loss of a network's last pass, from the image tokens after block n // 4 of n, counted from 0.

    They include the text where it is in the same stream. A forward hook keeps the tokens; create it before the network
    is compiled.
    """

    def __init__(self, network: nn.Module) -> None:
        blocks, _, _ = blocks_of(network)
        self.features: Tensor | None = None
        blocks[len(blocks) // 4].register_forward_hook(self.save)

    def save(self, block: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
        """Forward hook."""
        if found := block_features(block, inputs, output):
            self.features = found[0]

    def __call__(self) -> Tensor:
        """Return the loss, a number, and drop the tokens."""
        assert self.features is not None, "no pass since the last call"
        loss = dispersive_loss(self.features)
        self.features = None
        return loss
