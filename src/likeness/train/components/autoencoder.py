"""Train an autoencoder for photographs and rendered conditions, with 16 channels at an eighth of the size.

The class is diffusers' `AutoencoderDC`: its first convolution has stride 2, so that only two thin layers run at full
resolution, where a usual autoencoder spends most of a CPU's time. It is deterministic: latents have no distribution.
Noise on the latents during training keeps the decoder smooth around them, as the diffusion model needs.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from diffusers import AutoencoderDC
from torch import Tensor

from likeness.conditions import CONDITIONS
from likeness.conditions.mask.classes import CLASSES, PALETTE
from likeness.data.ahead import read_ahead
from likeness.data.folder import column_of, read_folder, read_photo
from likeness.encoders.latent import LatentCodec, reconstruct, to_tensor
from likeness.train.components import steps
from likeness.train.config import ComponentRecipe, check_minimum, check_probabilities, check_values
from likeness.train.progress import Progress
from likeness.types import InputError


@dataclass(frozen=True, kw_only=True)
class AutoencoderRecipe(ComponentRecipe):
    """Architecture and training of an autoencoder."""

    kind: Literal["autoencoder"] = "autoencoder"
    """What the recipe trains."""
    size: int = 128
    """Image size in pixels."""
    encoder_channels: tuple[int, int, int] = (32, 64, 128)
    """Channels of the encoder at a half, a quarter and an eighth of the size."""
    decoder_channels: tuple[int, int, int] = (48, 96, 192)
    """Channels of the decoder, which determines the quality."""
    encoder_layers: tuple[int, int, int] = (2, 2, 2)
    """Residual blocks at each size."""
    decoder_layers: tuple[int, int, int] = (2, 2, 2)
    """Residual blocks at each size."""
    latent_channels: int = 16
    """Channels of the latent."""
    probabilities: dict[str, float]
    """Relative probability of a photograph ("image") or a rendered condition, by name."""
    batch: int = 32
    learning_rate: float = 2e-3
    warmup: int = 3200
    latent_noise: float = 0.05
    """Standard deviation of the noise added to the latents, relative to theirs."""
    latent_penalty: float = 1e-3
    """Weight of the mean square of the latents, which keeps their scale near 1."""
    detail: float = 0.5
    """Weight of the L1 distance of horizontal and vertical differences, which preserves edges."""


def check(recipe: AutoencoderRecipe) -> None:
    """Check the values that only this recipe has. Raises `InputError`."""
    check_minimum(recipe, 1, "latent_channels")
    check_minimum(recipe, 0, "latent_noise", "latent_penalty", "detail")
    check_values(("size", recipe.size, recipe.size >= 8 and recipe.size % 8 == 0, "a multiple of 8"))
    check_probabilities(recipe.probabilities, "probabilities")
    for part in ("encoder", "decoder"):
        layers, channels = list(getattr(recipe, f"{part}_layers")), list(getattr(recipe, f"{part}_channels"))
        stages = (channels[0] // 2, *channels)  # the stem is the first
        fit = min(stages) > 0 and all(4 * one % other == 0 for one, other in itertools.pairwise(stages))
        check_values(
            (f"{part}_layers", layers, min(layers) >= 1, "at least 1 each"),
            (f"{part}_channels", channels, fit, "above 1, each a divisor of 4 times the previous one"),
        )
        if channels[-1] % recipe.latent_channels:  # for the shortcuts between them
            raise InputError(
                f"{part}_channels end in {channels[-1]}: choose a multiple of latent_channels, {recipe.latent_channels}"
            )


def build(recipe: AutoencoderRecipe) -> AutoencoderDC:
    """Create the network. A first stage without layers lets the stem reduce to half the size."""
    return AutoencoderDC(
        latent_channels=recipe.latent_channels,
        encoder_block_out_channels=(recipe.encoder_channels[0] // 2, *recipe.encoder_channels),
        decoder_block_out_channels=(recipe.decoder_channels[0] // 2, *recipe.decoder_channels),
        encoder_layers_per_block=(0, *recipe.encoder_layers),
        decoder_layers_per_block=(0, *recipe.decoder_layers),
    )


class TrainingImages:
    """An endless sequence of photographs and rendered conditions; image number p depends only on (seed, p)."""

    def __init__(self, folders: Sequence[str], probabilities: dict[str, float], size: int, seed: int) -> None:
        columns = {kind: "file_name" if kind == "image" else column_of(kind) for kind in probabilities}
        self.rows = {kind: steps.rows_with(column, folders) for kind, column in columns.items()}
        self.kinds = list(probabilities)
        self.cumulative = np.cumsum([probabilities[kind] for kind in self.kinds])
        self.size, self.seed = size, seed

    def __getitem__(self, position: int) -> np.ndarray:
        """Return image number `position`, uint8 [S, S, 3]."""
        rng = np.random.default_rng([self.seed, position])
        kind = self.kinds[int(np.searchsorted(self.cumulative, rng.random() * self.cumulative[-1], side="right"))]
        rows = self.rows[kind]
        row = rows[int(rng.integers(len(rows)))]
        flip = bool(rng.integers(2))
        if kind == "image":
            image = read_photo(row["file_name"], self.size)
            return np.ascontiguousarray(image[:, ::-1]) if flip else image
        condition = CONDITIONS[kind]
        raw = condition.read(row[column_of(kind)]).raw
        if condition.raw == "labels":
            raw = random_crop(raw, rng)
        raw = condition.flip(raw) if flip else raw
        return condition.render(condition.resize(raw, self.size, self.size), self.size, self.size)

    def batch(self, start: int, size: int) -> Tensor:
        """Return images number `start` to `start + size - 1`, in [-1, 1], [B, 3, S, S]."""
        return to_tensor([self[position] for position in range(start, start + size)])


def random_crop(labels: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Return a random square crop of at least 80 % of the side, for more variety in few masks."""
    height, width = labels.shape
    side = int(min(height, width) * rng.uniform(0.8, 1.0))
    top, left = int(rng.integers(height - side + 1)), int(rng.integers(width - side + 1))
    return np.ascontiguousarray(labels[top : top + side, left : left + side])


def reconstruction_loss(model: AutoencoderDC, images: Tensor, noise: Tensor, recipe: AutoencoderRecipe) -> Tensor:
    """Return the loss of pixels after noise on the latents, plus a penalty on the scale of the latents."""
    latents = model.encode(images, return_dict=False)[0]  # [B, C, S / 8, S / 8]
    noisy = latents + recipe.latent_noise * latents.detach().std() * noise
    output = model.decode(noisy, return_dict=False)[0]  # [B, 3, S, S]
    return pixel_loss(output, images, recipe.detail) + recipe.latent_penalty * latents.float().square().mean()


def pixel_loss(output: Tensor, images: Tensor, detail: float) -> Tensor:
    """Return L1 and squared distance of reconstructions and originals, [B, 3, S, S] both, plus `detail` times the L1
    distance of their differences along both axes, which preserves edges.
    """
    error = (output - images).float()
    loss = error.abs().mean() + 2 * error.square().mean()
    return loss + detail * (error.diff(dim=2).abs().mean() + error.diff(dim=3).abs().mean())


def train_autoencoder(recipe: AutoencoderRecipe, run: Path) -> None:
    """Train, or resume, in the folder `run`, and publish the EMA weights to `run/model`. Raises as
    `steps.open_component`.
    """
    check(recipe)
    with steps.open_component(recipe, run) as (world, signals):
        torch.manual_seed(recipe.seed)
        model: Any = build(recipe).to(world.device, memory_format=torch.channels_last)
        optimizer = torch.optim.AdamW(model.parameters(), lr=recipe.learning_rate, betas=(0.9, 0.95), weight_decay=0.01)
        progress = steps.resume(recipe, run, world, signals, model, [optimizer])
        loss_of = torch.compile(reconstruction_loss) if recipe.compile else reconstruction_loss
        latent_shape = (recipe.batch, recipe.latent_channels, recipe.size // 8, recipe.size // 8)
        images = TrainingImages(recipe.train, recipe.probabilities, recipe.size, recipe.seed)
        test = [read_folder(folder) for folder in recipe.test]
        batches = read_ahead(lambda start: images.batch(start, recipe.batch), progress.starts)
        for start, batch in progress.steps(batches):
            batch = batch.to(world.device, memory_format=torch.channels_last)
            noise = torch.randn(latent_shape, generator=torch.Generator().manual_seed(recipe.seed + start))
            with world.autocast("auto"):
                loss = loss_of(model, batch, noise.to(world.device), recipe)
            loss.backward()
            progress.end_step(loss=loss, gradient_norm=steps.optimizer_step(progress, recipe, start))
            report_and_publish(progress, recipe, test)


def report_and_publish(progress: Progress, recipe: Any, test: Sequence[list[dict[str, Any]]]) -> None:
    """Report, publish and save as `steps.publish`; after the last step, measure the autoencoder on the rows of the test
    folders of the recipe.
    """
    measured = test if progress.last else ()
    steps.publish(progress, recipe, lambda vae: (measure(vae, rows, recipe.size) for rows in measured))


@torch.no_grad()
def measure(vae: AutoencoderDC, rows: list[dict[str, Any]], size: int) -> dict[str, float]:
    """Measure the reconstruction of photographs and, for rows with masks, labels at `size` pixels. The autoencoder is
    on the CPU, in float32.

    Returns:
        `psnr`: mean peak signal-to-noise ratio in dB, on values rounded to 8 bits; `labels`: fraction of mask pixels
        whose nearest palette color after rendering, encoding and decoding is that of their label; `labels_<class>`: the
        same for each class, pooled over the masks; `images`: number of images.
    """
    codec = LatentCodec(vae)
    correct, count = np.zeros(len(CLASSES)), np.zeros(len(CLASSES))
    ratios, mask = [], CONDITIONS["mask"]
    for row in rows:
        image = read_photo(row["file_name"], size)
        error = reconstruct(codec, image).astype(np.float64) - image
        ratios.append(10 * np.log10(255**2 / max((error**2).mean(), 1e-10)))
        if column_of("mask") in row:
            labels = steps.read_labels(row, size)
            decoded = reconstruct(codec, mask.render(labels, size, size)).astype(np.int64)
            nearest = ((decoded[:, :, None] - PALETTE.astype(np.int64)) ** 2).sum(-1).argmin(-1)  # [S, S]
            count += np.bincount(labels.ravel(), minlength=len(CLASSES))
            correct += np.bincount(labels[nearest == labels], minlength=len(CLASSES))
    measured = {"psnr": float(np.mean(ratios)), "images": len(ratios)}
    if count.sum():
        measured["labels"] = float(correct.sum() / count.sum())
        for index in np.flatnonzero(count):
            measured[f"labels_{CLASSES[index]}"] = float(correct[index] / count[index])
    return measured
