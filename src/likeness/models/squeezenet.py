"""The convolutional part of SqueezeNet 1.0 (Iandola et al. 2016), as a feature extractor for perceptual distances.

Parameter names are torchvision's, so that its weights load. Only the layers up to `fire9` (torchvision's `features.10`)
are built: a decoder is trained on edges and textures, and later layers describe whole objects.

Shapes: B images, H and W pixels, C channels.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

Normalization = Literal["torchvision", "caffe"]

TAPS = (1, 4, 7, 10)
"""Layers whose outputs are compared, by their number in `features`: one or two at each resolution."""


class Fire(nn.Module):
    """A 1x1 convolution that squeezes the channels, then a 1x1 and a 3x3 convolution that expand them."""

    def __init__(self, channels: int, squeezed: int, expanded: int) -> None:
        super().__init__()
        self.squeeze = nn.Conv2d(channels, squeezed, 1)
        self.expand1x1 = nn.Conv2d(squeezed, expanded, 1)
        self.expand3x3 = nn.Conv2d(squeezed, expanded, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.squeeze(x))  # [B, squeezed, h, w]
        return F.relu(torch.cat([self.expand1x1(x), self.expand3x3(x)], dim=1))  # [B, 2 expanded, h, w]


class SqueezeNetFeatures(nn.Module):
    """Images to the outputs of four layers.

    Args:
        normalization: input that the weights expect. `torchvision`: RGB in [0, 1], standardized by ImageNet's mean and
            standard deviation. `caffe`: BGR in [0, 255] minus ImageNet's mean.
    """

    def __init__(self, normalization: Normalization = "torchvision") -> None:
        super().__init__()
        pool = {"kernel_size": 3, "stride": 2, "ceil_mode": True}
        self.features = nn.Sequential(
            nn.Conv2d(3, 96, 7, stride=2),
            nn.ReLU(),
            nn.MaxPool2d(**pool),
            Fire(96, 16, 64),
            Fire(128, 16, 64),
            Fire(128, 32, 128),
            nn.MaxPool2d(**pool),
            Fire(256, 32, 128),
            Fire(256, 48, 192),
            Fire(384, 48, 192),
            Fire(384, 64, 256),
        )
        caffe = normalization == "caffe"
        self.reverse = caffe
        mean = (104.0, 117.0, 123.0) if caffe else (123.675, 116.28, 103.53)
        std = (1.0, 1.0, 1.0) if caffe else (58.395, 57.12, 57.375)
        self.register_buffer("mean", torch.tensor(mean).reshape(1, 3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(std).reshape(1, 3, 1, 1), persistent=False)

    def forward(self, images: Tensor) -> list[Tensor]:
        """Images in [-1, 1], [B, 3, H, W], to features [B, C, h, w], h and w about H / 2, 4, 8 and 8."""
        x = (images + 1) * 127.5
        x = ((x.flip(1) if self.reverse else x) - self.mean) / self.std
        outputs = []
        for number, layer in enumerate(self.features):
            x = layer(x)
            if number in TAPS:
                outputs.append(x)
        return outputs

    def load(self, weights: Mapping[str, Tensor]) -> None:
        """Load torchvision's weights without later layers. Raises `RuntimeError` if one is missing or has another
        shape.
        """
        names = self.state_dict().keys()
        self.load_state_dict({name: value.float() for name, value in weights.items() if name in names})


def perceptual_distance(features: list[Tensor], others: list[Tensor]) -> Tensor:
    """Squared distance of two outputs of `SqueezeNetFeatures`, normalized along their channels, summed over layers,
    averaged over positions. This is LPIPS (Zhang et al. 2018, equation 1) with all channel weights equal to 1.
    """
    unit = lambda x: F.normalize(x.float(), dim=1)  # noqa: E731
    distances = [(unit(a) - unit(b)).square().sum(dim=1).mean() for a, b in zip(features, others, strict=True)]
    return torch.stack(distances).sum()
