"""Changes of the training loss that promise better images at the same cost; variants of `ablate.py`."""

from __future__ import annotations

import math
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from likeness.annotators.face_parser import load_face_parser
from likeness.encoders.components import load_components
from likeness.encoders.latent import LatentCodec
from likeness.objectives import Objective
from likeness.train.batches import Batch
from likeness.train.features import parser_features
from likeness.train.losses import denoising_losses, predict
from likeness.weights.catalog import BUNDLED, COMMON


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
    dispersion = torch.logsumexp(-distances / temperature, dim=(0, 1)) - 2 * math.log(len(features))
    return losses + weight * dispersion


def add_projection(network: Any) -> Any:
    """`record_features`, and a 3x3 convolution from image tokens to the face parser's features, as `projection`."""
    channels = face_parser().config.hidden_sizes[2]
    network.projection = nn.Conv2d(network.config.hidden_size, channels, 3, padding=1)
    return record_features(network)


def alignment_losses(network: Any, objective: Objective, batch: Batch, weight: float = 0.5) -> Tensor:
    """The loss plus `weight` times one minus the cosine of projected image tokens of the second block and the face
    parser's features of the clean image, mean over tokens, [B] (REPA, Yu et al. 2024, arXiv 2410.06940; convolution and
    spatial normalization: iREPA, Singh et al. 2025, arXiv 2512.10794). Needs `add_projection`.
    """
    losses = denoising_losses(network, objective, batch)  # [B]
    target = features_of(batch.clean)  # [B, F, h, w]
    tokens = network.blocks[1].features  # [B, N, D]
    del network.blocks[1].features  # a network with it could not be copied
    projected = network.projection(tokens.transpose(1, 2).unflatten(2, target.shape[2:]))  # [B, F, h, w]
    return losses + weight * (1 - F.cosine_similarity(projected.float(), target, dim=1).mean(dim=(1, 2)))


def features_of(clean: Tensor) -> Tensor:
    """Return the bundled face parser's features of latents [B, C, H, W], whose missing channels are zero."""
    missing = codec().mean.shape[1] - clean.shape[1]
    return parser_features(face_parser(), codec(), F.pad(clean, (0, 0, 0, 0, 0, missing)))


@cache
def face_parser() -> Any:
    """The bundled face parser."""
    return load_face_parser()[0]


@cache
def codec() -> LatentCodec:
    """The bundled autoencoder."""
    components = load_components(BUNDLED / COMMON)
    settings = components.settings
    return LatentCodec(components.vae, settings["latent_mean"], settings["latent_std"], batched=True)
