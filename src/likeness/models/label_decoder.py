"""Decode the latents of rendered masks to class labels.

The image decoder blends the colors of neighboring classes, and more so if a network generated the latents: between hair
and background lies the color of the lower lip. This decoder chooses one class per pixel, and noise on the latents
during training makes it tolerant. It takes the place of the autoencoder in a pipeline that generates masks.

Shapes: B masks, C latent channels, h and w latent size, H and W pixels.
"""

from __future__ import annotations

import torch
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from torch import Tensor, nn
from torch.nn import functional as F

GROUPS = 8


class ResidualBlock(nn.Module):
    """Two convolutions with a shortcut."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm = nn.GroupNorm(GROUPS, channels)
        self.conv1 = nn.Conv2d(channels, channels, 3, padding=1)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.conv2(F.silu(self.conv1(F.silu(self.norm(x)))))


class LabelDecoder(ModelMixin, ConfigMixin):
    """Latents of rendered masks to labels.

    Args:
        palette: RGB color of each class, 0 to 255.
        latent_channels: channels of the latents, C.
        block_out_channels: channels at the full size, a half, a quarter, ...; multiples of 8. The last are those at the
            size of the latents.
        layers: residual blocks at the size of the latents; every other size but the full one has one.
    """

    @register_to_config
    def __init__(
        self,
        palette: list[list[int]],
        latent_channels: int = 16,
        block_out_channels: tuple[int, ...] = (16, 32, 64, 96),
        layers: int = 4,
    ) -> None:
        super().__init__()
        *larger, width = block_out_channels
        self.conv_in = nn.Conv2d(latent_channels, width, 3, padding=1)
        self.blocks = nn.Sequential(*(ResidualBlock(width) for _ in range(layers)))
        self.stages = nn.ModuleList()
        for channels in reversed(larger):
            conv = nn.Conv2d(width, channels, 3, padding=1)
            last = len(self.stages) == len(larger) - 1
            self.stages.append(conv if last else nn.Sequential(conv, ResidualBlock(channels)))
            width = channels
        self.conv_out = nn.Conv2d(width, len(palette), 3, padding=1)

    def forward(self, latents: Tensor) -> Tensor:
        """Raw latents [B, C, h, w] to logits [B, classes, H, W]."""
        x = self.blocks(self.conv_in(latents))  # [B, D, h, w]
        for stage in self.stages:
            x = stage(F.interpolate(x, scale_factor=2.0, mode="nearest"))  # [B, D', 2 h, 2 w], ...
        return self.conv_out(F.silu(x))  # [B, classes, H, W]

    def decode(self, latents: Tensor, return_dict: bool = False) -> tuple[Tensor]:
        """Raw latents [B, C, h, w] to masks in the colors of the palette, [B, 3, H, W] in [-1, 1], like the `decode` of
        an autoencoder.
        """
        assert not return_dict
        palette = torch.tensor(self.config.palette, dtype=latents.dtype, device=latents.device) / 127.5 - 1
        labels = self.forward(latents).argmax(dim=1)  # [B, H, W]
        return (palette[labels].permute(0, 3, 1, 2),)  # [B, 3, H, W]
