"""A conditional GAN of the class of SPADE (Park et al. 2019, arXiv 1903.07291), the anchor of latency.

It differs from the paper's: it generates latents of the shared autoencoder instead of pixels, so that all methods have
the same decoder and training images; text enters by its pooled vector; both networks step at the same time, at one
learning rate; normalization by groups; one discriminator without spectral normalization; an L1 loss of pooled latents
instead of feature matching and perceptual losses.

B batch, C latent channels, h x w latent size, D width, T text width.
"""

from __future__ import annotations

from typing import Any

import torch
from diffusers import CacheMixin, ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F

from likeness.types import TextFeatures


class Spade(nn.Module):
    """Normalization whose scale and shift are convolutions of a map at every place (section 3)."""

    def __init__(self, width: int, channels: int) -> None:
        super().__init__()
        self.norm = nn.GroupNorm(8, width, affine=False)
        self.shared = nn.Conv2d(channels, width, 3, padding=1)
        self.scale_shift = nn.Conv2d(width, 2 * width, 3, padding=1)

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        """x [B, D, H, W], condition [B, channels, h, w] of any size."""
        condition = F.interpolate(condition, x.shape[-2:], mode="nearest")
        scale, shift = self.scale_shift(F.relu(self.shared(condition))).chunk(2, dim=1)  # [B, D, H, W] each
        return self.norm(x) * (1 + scale) + shift


class SpadeBlock(nn.Module):
    """Residual block with two SPADE layers."""

    def __init__(self, width: int, channels: int) -> None:
        super().__init__()
        self.spade_1, self.spade_2 = Spade(width, channels), Spade(width, channels)
        self.conv_1, self.conv_2 = (nn.Conv2d(width, width, 3, padding=1) for _ in range(2))

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        update = self.conv_1(F.leaky_relu(self.spade_1(x, condition), 0.2))
        return x + self.conv_2(F.leaky_relu(self.spade_2(update, condition), 0.2))


class Discriminator(nn.Module):
    """One score per patch of latent and condition, plus a projection of the pooled text (Miyato and Koyama 2018)."""

    def __init__(self, channels: int, condition_channels: int, width: int, text_dim: int) -> None:
        super().__init__()
        self.conv_1 = nn.Conv2d(channels + condition_channels, width, 3, padding=1)
        self.conv_2 = nn.Conv2d(width, width, 4, stride=2, padding=1)
        self.conv_3 = nn.Conv2d(width, width, 4, stride=2, padding=1)
        self.score = nn.Conv2d(width, 1, 3, padding=1)
        self.text = nn.Linear(text_dim, width)

    def forward(self, latents: Tensor, condition: Tensor, pooled: Tensor) -> Tensor:
        x = F.leaky_relu(self.conv_1(torch.cat([latents, condition], dim=1)), 0.2)  # [B, D, h, w]
        x = F.leaky_relu(self.conv_2(x), 0.2)  # [B, D, h / 2, w / 2]
        x = F.leaky_relu(self.conv_3(x), 0.2)  # [B, D, h / 4, w / 4]
        match = (x.mean(dim=(2, 3)) * self.text(pooled)).mean(dim=1)  # [B]
        return self.score(x) + match[:, None, None, None]  # [B, 1, h / 4, w / 4]


class SpadeGan(ModelMixin, CacheMixin, ConfigMixin):
    """Generator and, in training, discriminator, with the interface of a transformer: at time 1 the prediction is
    v = noise - G(noise), so that one Euler step returns G. `gan` creates it.
    """

    @register_to_config
    def __init__(
        self,
        latent_channels: int = 8,
        hidden_size: int = 128,
        text_dim: int = 32,
        condition_names: tuple[str, ...] = ("mask", "none"),
        patch_size: int = 2,
    ) -> None:
        super().__init__()
        channels = latent_channels + len(condition_names)
        self.noise = nn.Conv2d(latent_channels, hidden_size, 1)
        self.text = nn.Linear(text_dim, hidden_size)
        self.blocks = nn.ModuleList(SpadeBlock(hidden_size, channels) for _ in range(5))
        self.out = nn.Conv2d(hidden_size, latent_channels, 3, padding=1)
        self.discriminator = Discriminator(latent_channels, channels, hidden_size, text_dim)

    def rope(self, *sizes: Any) -> None:
        """The pipeline of a transformer computes rotary positions once; a GAN has none."""

    def condition_map(self, latents: Tensor, index: Tensor) -> Tensor:
        """Condition latents, zeros if absent, and their id as maps: [B, C + ids, h, w]."""
        present = (index >= 0).to(latents.dtype)  # [B, 1]
        kind = F.one_hot(index[:, 0].clamp(min=0), len(self.config.condition_names)).to(latents.dtype) * present
        x = latents[:, 0] * present[:, :, None, None]  # [B, C, h, w]
        return torch.cat([x, kind[:, :, None, None].expand(-1, -1, *x.shape[-2:])], dim=1)

    def generate(self, noise: Tensor, pooled: Tensor, condition: Tensor) -> Tensor:
        """Return latents of a face, [B, C, h, w]."""
        x = self.noise(4 * F.avg_pool2d(noise, 4)) + self.text(pooled)[:, :, None, None]  # [B, D, h / 4, w / 4]
        for index, block in enumerate(self.blocks):
            x = block(x, condition)
            if index in (1, 3):
                x = F.interpolate(x, scale_factor=2.0)  # [B, D, h / 2, w / 2], then [B, D, h, w]
        return self.out(F.leaky_relu(x, 0.2))

    def forward(
        self,
        latents: Tensor,
        time: Tensor,
        text: TextFeatures,
        condition_latents: Tensor,
        condition_index: Tensor,
        *,
        rope: None = None,
    ) -> Tensor:
        """Predict noise minus image; `latents` are the noise."""
        condition = self.condition_map(condition_latents, condition_index)
        return latents - self.generate(latents, text.pooled, condition)


def gan(network: Any) -> SpadeGan:
    """Return a GAN for the latents, text and conditions of a new `network`."""
    names = ("latent_channels", "hidden_size", "text_dim", "condition_names", "patch_size")
    return SpadeGan(**{name: network.config[name] for name in names})


def gan_losses(model: SpadeGan, objective: Any, batch: Any) -> Tensor:
    """Return hinge losses of discriminator and generator and the L1 distance of pooled latents, [B].

    Gradients of the generator's loss do not reach the discriminator, nor the reverse, so that one step trains both.
    """
    condition, pooled = model.condition_map(batch.condition_latents, batch.condition_index), batch.text.pooled
    fake, score = model.generate(batch.noise, pooled, condition), model.discriminator
    frozen = {name: parameter.detach() for name, parameter in score.named_parameters()}
    real_loss = F.relu(1 - score(batch.clean, condition, pooled)).mean(dim=(1, 2, 3))  # [B]
    fake_loss = F.relu(1 + score(fake.detach(), condition, pooled)).mean(dim=(1, 2, 3))  # [B]
    generator_loss = -functional_call(score, frozen, (fake, condition, pooled)).mean(dim=(1, 2, 3))  # [B]
    coarse = (F.avg_pool2d(fake, 4) - F.avg_pool2d(batch.clean, 4)).abs().mean(dim=(1, 2, 3))  # [B]
    return real_loss + fake_loss + generator_loss + coarse
