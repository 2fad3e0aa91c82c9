"""Train a decoder from the latents of rendered masks to labels (`likeness.models.label_decoder`).

The encoder is frozen. Noise on the latents, of random strength and coarseness, imitates the errors of a network that
generates latents: the decoder then returns the most plausible mask instead of a mixture of colors.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from likeness.conditions import CONDITIONS
from likeness.conditions.mask.classes import PALETTE
from likeness.data.ahead import read_ahead
from likeness.data.folder import column_of
from likeness.data.sampler import stream
from likeness.encoders.components import load_components
from likeness.encoders.latent import LatentCodec, spatial_factor, to_tensor
from likeness.models.label_decoder import GROUPS, LabelDecoder
from likeness.train.components import steps
from likeness.train.components.autoencoder import random_crop
from likeness.train.config import ComponentRecipe, check_minimum, check_values
from likeness.train.run_folder import record_frozen
from likeness.weights.catalog import BUNDLED, COMMON


@dataclass(frozen=True, kw_only=True)
class LabelDecoderRecipe(ComponentRecipe):
    """Architecture and training of a label decoder."""

    kind: Literal["label_decoder"] = "label_decoder"
    """What the recipe trains."""
    components: str | None = None
    """Folder with the autoencoder whose latents are decoded. Default: the bundled one."""
    size: int = 128
    """Mask size in pixels."""
    channels: tuple[int, ...] = (16, 32, 64, 96)
    """Channels at the full size, a half, a quarter, ... down to the size of the latents; multiples of 8."""
    layers: int = 4
    """Residual blocks at the size of the latents."""
    latent_noise: float = 0.6
    """Largest t in (1 - t) z + t noise, of which the decoder sees normalized latents z."""
    warmup: int = 1600
    compile: bool = False
    """Use torch.compile."""


class Masks:
    """An endless sequence of augmented labels; number p depends only on (seed, p)."""

    def __init__(self, folders: Sequence[str], size: int, seed: int) -> None:
        self.rows, self.size, self.seed = steps.rows_with(column_of("mask"), folders), size, seed

    def __getitem__(self, position: int) -> np.ndarray:
        """Return labels number `position`, uint8 [S, S]."""
        rng, mask = stream(self.seed, position), CONDITIONS["mask"]
        labels = mask.read(self.rows[int(rng.integers(len(self.rows)))][column_of("mask")]).raw
        labels = random_crop(labels, rng)
        return mask.resize(mask.flip(labels) if rng.integers(2) else labels, self.size, self.size)

    def batch(self, start: int, size: int) -> tuple[Tensor, Tensor]:
        """Return rendered masks in [-1, 1], [B, 3, S, S], and their labels, int64 [B, S, S]."""
        labels = np.stack([self[position] for position in range(start, start + size)])
        return to_tensor(list(PALETTE[labels])), torch.from_numpy(labels).long()


def noisy(latents: Tensor, strongest: float, seed: int) -> Tensor:
    """Return (1 - t) z + t noise for normalized latents z, [B, C, h, w].

    t is uniform from 0 to `strongest`, and 0 for a quarter of the batch. The noise is a random mixture of white noise
    and of noise at half the resolution.
    """
    count, channels, height, width = latents.shape
    generator = torch.Generator().manual_seed(seed)
    white = torch.randn(latents.shape, generator=generator)
    coarse = torch.randn((count, channels, -(-height // 2), -(-width // 2)), generator=generator)
    coarse = F.interpolate(coarse, size=(height, width), mode="bilinear")
    t, share = torch.rand((2, count, 1, 1, 1), generator=generator)
    t = t * strongest
    t[: count // 4] = 0
    noise = (1 - share) * white + share * coarse
    return (1 - t.to(latents.device)) * latents + (t * noise).to(latents.device)


@torch.no_grad()
def measure(
    decoder: Any, codec: LatentCodec, rows: list[dict[str, Any]], recipe: LabelDecoderRecipe
) -> dict[str, float]:
    """Return the fraction of correct pixels of masks from their latents (`labels`), and of those with noise of half the
    largest strength (`labels_noisy`).
    """
    right = np.zeros(2)
    for number, row in enumerate(rows):
        labels = steps.read_labels(row, recipe.size)
        latents = codec.encode(to_tensor([PALETTE[labels]]).to(codec.vae.device)).cpu()  # [1, C, h, w]
        t = recipe.latent_noise / 2
        noise = torch.randn(latents.shape, generator=torch.Generator().manual_seed(number))
        both = torch.cat([latents, (1 - t) * latents + t * noise]) * codec.std + codec.mean
        right += (decoder(both).argmax(1).numpy() == labels).mean(axis=(1, 2))
    return {"labels": right[0] / len(rows), "labels_noisy": right[1] / len(rows), "n": len(rows)}


def train_label_decoder(recipe: LabelDecoderRecipe, run: Path) -> None:
    """Train, or resume, in the folder `run`, and publish the EMA weights to `run/model`. Raises as
    `steps.open_component`.
    """
    check_minimum(recipe, 1, "size")
    check_minimum(recipe, 0, "layers", "latent_noise")
    valid = all(width > 0 and width % GROUPS == 0 for width in recipe.channels)
    check_values(("channels", list(recipe.channels), valid, f"multiples of {GROUPS}"))
    with steps.open_component(recipe, run) as (world, signals):
        masks, test = Masks(recipe.train, recipe.size, recipe.seed), steps.rows_with(column_of("mask"), recipe.test)
        components = load_components(recipe.components or BUNDLED / COMMON)
        record_frozen(components.vae.requires_grad_(False), run)
        factor = spatial_factor(components.vae)
        right_length = 2 ** (len(recipe.channels) - 1) == factor
        check_values(
            ("size", recipe.size, recipe.size % factor == 0, f"a multiple of {factor}"),
            ("channels", list(recipe.channels), right_length, f"{factor} = 2^(length - 1)"),
        )
        settings = components.settings["latent_mean"], components.settings["latent_std"]
        components.vae.to(world.device)
        codec, exact = (LatentCodec(components.vae, *settings, batched=batched) for batched in (True, False))
        torch.manual_seed(recipe.seed)
        decoder: Any = LabelDecoder(
            palette=PALETTE.tolist(),
            latent_channels=components.vae.config.latent_channels,
            block_out_channels=recipe.channels,
            layers=recipe.layers,
        )
        decoder.to(world.device)
        optimizer = torch.optim.AdamW(decoder.parameters(), lr=recipe.learning_rate, weight_decay=1e-4)
        progress = steps.resume(recipe, run, world, signals, decoder, [optimizer])
        forward = torch.compile(decoder) if recipe.compile else decoder
        batches = read_ahead(lambda start: masks.batch(start, recipe.batch), progress.starts)
        for start, (images, labels) in progress.steps(batches):
            with world.autocast("auto"):
                latents = noisy(codec.encode(images.to(world.device)), recipe.latent_noise, recipe.seed + start)
                logits = forward(latents * codec.std.to(world.device) + codec.mean.to(world.device))
            loss = F.cross_entropy(logits.float(), labels.to(world.device))
            loss.backward()
            progress.end_step(loss=loss, gradient_norm=steps.optimizer_step(progress, recipe, start))
            steps.publish(progress, recipe, lambda published: [measure(published, exact, test, recipe)])
