"""Losses of a training step, and the features of blocks that some of them read.

B samples, C latent channels, h x w latent size, N image tokens, D width of a network.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from likeness.models.mditface import PATCH, MDiTFaceTransformer
from likeness.models.mditface_blocks import split_streams
from likeness.models.mmface import MMFaceBlock, MMFaceTransformer
from likeness.objectives import Objective
from likeness.train.batches import Batch
from likeness.train.features import ParserFeatures


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


class AlignmentLoss:
    """Aligns a network's image tokens to features of a face parser: one minus the cosine of the tokens after a quarter
    of the blocks, projected, and the features of the clean image, mean over tokens and samples (REPA, Yu et al. 2024,
    arXiv 2410.06940; the convolution and normalized features are those of iREPA, Singh et al. 2025, arXiv 2512.10794).

    The projection, a 3 x 3 convolution, becomes a part of the network, `projection`, which is not published. It runs
    within the network's pass, in a forward hook. Create the loss before the network is sharded or compiled.
    """

    def __init__(self, network: nn.Module, features: ParserFeatures) -> None:
        blocks, width, _ = blocks_of(network)
        number = len(blocks) // 4
        if isinstance(network, MDiTFaceTransformer):  # in single blocks, text is part of the same stream
            number = min(number, len(network.transformer_blocks) - 1)
        self.features, self.projected = features, None
        self.projection = nn.Conv2d(width, features.shape[0], 3, padding=1)
        network.projection = self.projection
        blocks[number].register_forward_hook(self.project)

    def project(self, block: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
        """Forward hook: project the image tokens, in passes with gradients."""
        if torch.is_grad_enabled() and (found := block_features(block, inputs, output)):
            tokens = found[0].transpose(1, 2).unflatten(2, self.features.shape[1:])  # [B, D, h', w']
            self.projected = self.projection(tokens)  # [B, F, h', w']

    def __call__(self, batch: Batch) -> Tensor:
        """Return the loss of the last pass, which must have been of this batch, a number."""
        assert self.projected is not None
        target = self.features(batch.numbers, batch.clean)  # [B, F, h', w']
        cosine = F.cosine_similarity(self.projected.float(), target, dim=1)  # [B, h', w']
        self.projected = None
        return 1 - cosine.mean()
