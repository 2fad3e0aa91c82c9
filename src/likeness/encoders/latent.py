"""Encode images to normalized latents and decode them, with any autoencoder of diffusers.

Mean and standard deviation are arguments (one number, or one per channel), not constants of the autoencoder: the
released MMFace-DiT weights use FLUX latents without the shift, others with it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from likeness.types import InputError


class LatentCodec:
    """An autoencoder with the statistics that normalize its latents: z = (latent - mean) / std.

    Args:
        vae: the autoencoder.
        mean: of the latents, one number or one per channel.
        std: of the latents, likewise.
        batched: one pass for a whole batch also on a CPU: faster, but rounding then depends on the batch.

    Raises:
        InputError: mean or std are not finite numbers, of another count than 1 or C, or std is not positive.
    """

    def __init__(
        self,
        vae: Any,
        mean: float | Sequence[float] = 0.0,
        std: float | Sequence[float] = 1.0,
        *,
        batched: bool = False,
    ) -> None:
        self.vae, self.batched = vae, batched
        self.mean, self.std = statistic(vae, "latent_mean", mean), statistic(vae, "latent_std", std)
        if not (self.std > 0).all():
            raise InputError(f"latent_std is {std!r}; all values must be greater than 0")

    def encode(self, images: Tensor) -> Tensor:
        """Encode images in [-1, 1], [B, 3, H, W], to normalized latents, float32 [B, C, H/f, W/f].

        A latent distribution is replaced by its mode, its mean.
        """
        latents, _ = self.moments(images)
        return (latents - self.mean.to(latents.device)) / self.std.to(latents.device)

    @torch.no_grad()
    def moments(self, images: Tensor) -> tuple[Tensor, Tensor | None]:
        """Encode images in [-1, 1], [B, 3, H, W], to raw latents, float32 [B, C, H/f, W/f]: the mean and the log
        variance of a latent distribution, or else the latent and None.
        """
        found = [self.vae.encode(chunk, return_dict=False)[0] for chunk in self._chunks(images.to(self.vae.dtype))]
        if isinstance(found[0], Tensor):
            return torch.cat(found).float(), None
        return torch.cat([each.mean for each in found]).float(), torch.cat([each.logvar for each in found]).float()

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """Decode normalized latents [B, C, h, w] to images, float32 [B, 3, H, W], about [-1, 1], not clamped."""
        latents = latents * self.std.to(latents.device) + self.mean.to(latents.device)
        chunks = self._chunks(latents.to(self.vae.dtype))
        return torch.cat([self.vae.decode(chunk, return_dict=False)[0] for chunk in chunks]).float()

    def _chunks(self, batch: Tensor) -> Sequence[Tensor]:
        # One image at a time on a CPU, so that the images of a batch are independent.
        return batch.split(1) if batch.device.type == "cpu" and not self.batched else (batch,)


def statistic(vae: Any, name: str, value: Any) -> Tensor:
    """Return one number, or one per channel of an autoencoder, as float32 [1, 1 | C, 1, 1]. Raises `InputError`."""
    channels = vae.config.latent_channels
    try:
        found = torch.tensor(value, dtype=torch.float32).reshape(1, -1, 1, 1)
    except (TypeError, ValueError, RuntimeError, OverflowError) as error:
        raise InputError(f"{name} is {value!r}; it must be a number or a list of {channels} numbers") from error
    if found.numel() not in (1, channels) or not found.isfinite().all():
        raise InputError(f"{name} is {value!r}; it must be a finite number or a list of {channels} finite numbers")
    return found


def spatial_factor(vae: Any) -> int:
    """Return the side of a latent pixel in pixels of the image."""
    config = vae.config
    channels = config.get("encoder_block_out_channels") or config["block_out_channels"]
    return 2 ** (len(channels) - 1)


def to_tensor(images: Sequence[np.ndarray]) -> Tensor:
    """Convert uint8 images [H, W, 3] to [B, 3, H, W] in [-1, 1]."""
    stacked = torch.from_numpy(np.stack(images))
    return stacked.permute(0, 3, 1, 2).contiguous().float().div_(127.5).sub_(1)


def to_pixels(images: Tensor) -> np.ndarray:
    """Convert images [B, 3, H, W] in [-1, 1] to uint8 [B, H, W, 3]."""
    scaled = images.float().add(1).mul(127.5).round().clamp(0, 255)
    return scaled.to(torch.uint8).permute(0, 2, 3, 1).contiguous().cpu().numpy()


def reconstruct(codec: LatentCodec, image: np.ndarray) -> np.ndarray:
    """Encode and decode an image, uint8 [S, S, 3]."""
    return to_pixels(codec.decode(codec.encode(to_tensor([image]).to(codec.vae.device))))[0]
