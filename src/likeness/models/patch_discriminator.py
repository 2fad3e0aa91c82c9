"""A small patch discriminator (Isola et al. 2017): one score per patch of 26 x 26 pixels.

It scores texture, which the decoder adds; the content of an image is determined by its latents.

Shapes: B images, H and W pixels.
"""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional as F

GROUPS = 8


class PatchDiscriminator(nn.Module):
    """Images to the logits of their patches.

    Args:
        channels: channels at a half and a quarter of the size, and of the last hidden layer; the last two must be
            multiples of 8.
    """

    def __init__(self, channels: tuple[int, int, int] = (48, 96, 160)) -> None:
        super().__init__()
        first, second, third = channels
        self.conv1 = nn.Conv2d(3, first, 4, stride=2, padding=1)
        self.conv2 = nn.Conv2d(first, second, 4, stride=2, padding=1)
        self.norm2 = nn.GroupNorm(GROUPS, second)
        self.conv3 = nn.Conv2d(second, third, 3, padding=1)
        self.norm3 = nn.GroupNorm(GROUPS, third)
        self.out = nn.Conv2d(third, 1, 3, padding=1)

    def forward(self, images: Tensor) -> Tensor:
        """Images in [-1, 1], [B, 3, H, W], to logits [B, 1, H / 4, W / 4]."""
        x = F.leaky_relu(self.conv1(images), 0.2)  # [B, C1, H / 2, W / 2]
        x = F.leaky_relu(self.norm2(self.conv2(x)), 0.2)  # [B, C2, H / 4, W / 4]
        x = F.leaky_relu(self.norm3(self.conv3(x)), 0.2)  # [B, C3, H / 4, W / 4]
        return self.out(x)  # [B, 1, H / 4, W / 4]
