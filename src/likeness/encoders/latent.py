"""Pictures to normalised latents and back, over any of diffusers' autoencoders.

The autoencoder's scale and shift are data here (`mean`, `std`, one number or one a channel), never constants in code:
released MMFace-DiT weights want FLUX latents without the shift, others with it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor


class LatentCodec:
    """An autoencoder with the statistics that normalise its latents: z = (latent - mean) / std."""

    def __init__(
        self,
        vae: Any,
        mean: float | Sequence[float] = 0.0,
        std: float | Sequence[float] = 1.0,
        *,
        together: bool = False,
    ) -> None:
        """`together`: a batch in one pass on a CPU, too: faster, where bits may depend on what else is in the batch."""
        self.vae, self.together = vae, together
        self.mean = torch.tensor(mean, dtype=torch.float32).reshape(1, -1, 1, 1)  # [1, 1 | C, 1, 1]
        self.std = torch.tensor(std, dtype=torch.float32).reshape(1, -1, 1, 1)

    @torch.no_grad()
    def encode(self, pictures: Tensor) -> Tensor:
        """Pictures in [-1, 1], [B, 3, H, W], to normalised latents, float32 [B, C, H/f, W/f].

        Where the autoencoder gives a distribution its mode is taken: the same picture always has the same latent.
        """
        pictures = pictures.to(self.vae.dtype)
        latents = torch.cat([self._latent(picture) for picture in self._chunks(pictures)]).float()
        return (latents - self.mean.to(latents.device)) / self.std.to(latents.device)

    @torch.no_grad()
    def moments(self, pictures: Tensor) -> tuple[Tensor, Tensor | None]:
        """Pictures in [-1, 1], [B, 3, H, W], to raw latents, not normalised, float32 [B, C, H/f, W/f].

        Returns:
            The mean and the log variance where the autoencoder gives a distribution, else the latent and None.
        """
        found = [self.vae.encode(chunk, return_dict=False)[0] for chunk in self._chunks(pictures.to(self.vae.dtype))]
        if isinstance(found[0], Tensor):
            return torch.cat(found).float(), None
        return torch.cat([each.mean for each in found]).float(), torch.cat([each.logvar for each in found]).float()

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """Normalised latents [B, C, h, w] to pictures, float32 [B, 3, H, W], about [-1, 1], not clamped."""
        latents = latents * self.std.to(latents.device) + self.mean.to(latents.device)
        latents = latents.to(self.vae.dtype)
        return torch.cat([self.vae.decode(latent, return_dict=False)[0] for latent in self._chunks(latents)]).float()

    def _latent(self, pictures: Tensor) -> Tensor:
        encoded = self.vae.encode(pictures, return_dict=False)[0]
        return encoded if isinstance(encoded, Tensor) else encoded.mode()

    def _chunks(self, batch: Tensor) -> Sequence[Tensor]:
        # One picture at a time on a CPU, where a request's bits must not depend on what else is in the batch.
        return batch.split(1) if batch.device.type == "cpu" and not self.together else (batch,)


def spatial_factor(vae: Any) -> int:
    """Pixels a latent pixel stands for, along one side."""
    config = vae.config
    channels = config.get("encoder_block_out_channels") or config["block_out_channels"]
    return 2 ** (len(channels) - 1)


def to_tensor(pictures: Sequence[np.ndarray]) -> Tensor:
    """uint8 pictures [H, W, 3] to [B, 3, H, W] in [-1, 1]."""
    stacked = torch.from_numpy(np.stack([np.ascontiguousarray(picture) for picture in pictures]))
    return stacked.permute(0, 3, 1, 2).contiguous().float().div_(127.5).sub_(1)


def to_pixels(pictures: Tensor) -> np.ndarray:
    """Pictures [B, 3, H, W] in [-1, 1] to uint8 [B, H, W, 3]."""
    scaled = pictures.float().add(1).mul(127.5).round().clamp(0, 255)
    return scaled.to(torch.uint8).permute(0, 2, 3, 1).contiguous().cpu().numpy()


def through(codec: LatentCodec, picture: np.ndarray) -> np.ndarray:
    """A picture, uint8 [S, S, 3], encoded and decoded."""
    return to_pixels(codec.decode(codec.encode(to_tensor([picture]).to(codec.vae.device))))[0]
