"""Train the mini autoencoder: photographs and rendered conditions through 16 channels at an eighth of the size.

The class is diffusers' `AutoencoderDC`: its first convolution has stride 2, so nothing but two thin layers runs at full
resolution, where a CPU spends most of an ordinary autoencoder's time. It is deterministic: there are latents,
not moments. Noise on the latents during training keeps the decoder smooth around them, for the diffusion model's sake.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from diffusers import AutoencoderDC

from likeness.conditions import CONDITIONS
from likeness.conditions.mask.classes import CLASSES, PALETTE
from likeness.data.ahead import read_ahead
from likeness.data.folder import column_of, read_folder, read_photo
from likeness.encoders.latent import LatentCodec, reconstruct
from likeness.train.checkpoint import save_state
from likeness.train.learner import Learner
from likeness.train.metrics import Reporter
from likeness.train.optim import Ema, learning_rate
from likeness.train.run import begun, finite_numbers
from likeness.types import InputError


@dataclass(frozen=True, kw_only=True)
class AutoencoderRecipe:
    """How the autoencoder is built and trained."""

    kind: Literal["autoencoder"] = "autoencoder"
    """What the recipe trains."""
    train: tuple[str, ...]
    """Prepared folders to learn from."""
    test: tuple[str, ...]
    """Prepared folders that are only measured."""
    size: int = 128
    """Pixels a side."""
    encoder_channels: tuple[int, int, int] = (32, 64, 128)
    """Channels at a half, a quarter and an eighth of the size."""
    decoder_channels: tuple[int, int, int] = (48, 96, 192)
    """The same for the decoder, where the quality is made."""
    encoder_layers: tuple[int, int, int] = (2, 2, 2)
    """Residual blocks at each size."""
    decoder_layers: tuple[int, int, int] = (2, 2, 2)
    """Residual blocks at each size."""
    latent_channels: int = 16
    """Channels of the latent."""
    shares: dict[str, float]
    """How often a sample is a photograph ("image") or a rendered condition, by name."""
    images: int
    """Images to see in all."""
    batch: int = 32
    """Images a step."""
    learning_rate: float = 2e-3
    """Peak rate."""
    warmup: int = 3200
    """Images of warm-up."""
    latent_noise: float = 0.05
    """Standard deviation of the noise added to the latents, in units of their own standard deviation."""
    latent_penalty: float = 1e-3
    """Weight of the latents' mean square: it holds their scale near 1."""
    detail: float = 0.5
    """Weight of the L1 distance of horizontal and vertical differences: it keeps edges."""
    ema: float = 0.08
    """Relative width of the weight average."""
    checkpoint_every: int = 6400
    """Images between states on disk."""
    seed: int = 0
    """Seed of every random draw."""
    compile: bool = True
    """Fuse the step with torch.compile: about four times as fast on a CPU, after a minute."""
    threads: int | None = None
    """CPU threads; None leaves torch's choice."""


def build(recipe: AutoencoderRecipe) -> AutoencoderDC:
    """The network of a recipe. A first stage without layers makes the stem go to half the size at once.

    Raises:
        InputError: the last channels are no multiple of the latent's, as the shortcuts between them need.
    """
    for name, channels in (("encoder", recipe.encoder_channels), ("decoder", recipe.decoder_channels)):
        if channels[-1] % recipe.latent_channels:
            raise InputError(
                f"{name}_channels end in {channels[-1]}: choose a multiple of latent_channels, {recipe.latent_channels}"
            )
    return AutoencoderDC(
        latent_channels=recipe.latent_channels,
        encoder_block_out_channels=(recipe.encoder_channels[0] // 2, *recipe.encoder_channels),
        decoder_block_out_channels=(recipe.decoder_channels[0] // 2, *recipe.decoder_channels),
        encoder_layers_per_block=(0, *recipe.encoder_layers),
        decoder_layers_per_block=(0, *recipe.decoder_layers),
    )


class Pictures:
    """Endless training pictures; picture number p depends only on (seed, p)."""

    def __init__(self, folders: tuple[str, ...], shares: dict[str, float], size: int, seed: int) -> None:
        rows = [row for folder in folders for row in read_folder(folder)]
        self.rows: dict[str, list[dict[str, Any]]] = {}
        for kind in shares:
            column = "file_name" if kind == "image" else column_of(kind)
            self.rows[kind] = [row for row in rows if column in row]
            if not self.rows[kind]:
                raise InputError(f"no row of {', '.join(folders)} has {column!r}, but the recipe asks for {kind!r}")
        self.kinds = list(shares)
        self.cumulative = np.cumsum([shares[kind] for kind in self.kinds])
        self.size, self.seed = size, seed

    def __getitem__(self, position: int) -> np.ndarray:
        """Picture number `position`: uint8 [S, S, 3]."""
        rng = np.random.default_rng([self.seed, position])
        kind = self.kinds[int(np.searchsorted(self.cumulative, rng.random() * self.cumulative[-1], side="right"))]
        rows = self.rows[kind]
        row = rows[int(rng.integers(len(rows)))]
        flip = bool(rng.integers(2))
        if kind == "image":
            picture = read_photo(row["file_name"], self.size)
            return np.ascontiguousarray(picture[:, ::-1]) if flip else picture
        condition = CONDITIONS[kind]
        raw = condition.read(row[column_of(kind)]).raw
        if condition.raw == "labels":
            raw = jitter(raw, rng)
        raw = condition.flip(raw) if flip else raw
        return condition.render(condition.resize(raw, self.size, self.size), self.size, self.size)


def jitter(labels: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """A random square crop of at least 80 % of the side: few masks become many."""
    height, width = labels.shape
    side = int(min(height, width) * rng.uniform(0.8, 1.0))
    top, left = int(rng.integers(height - side + 1)), int(rng.integers(width - side + 1))
    return np.ascontiguousarray(labels[top : top + side, left : left + side])


def batches(pictures: Pictures, seen: int, total: int, batch: int) -> Iterator[torch.Tensor]:
    """Batches of the pictures from number `seen` on, in [-1, 1], [B, 3, S, S], read ahead by two threads."""

    def make(start: int) -> torch.Tensor:
        stacked = np.stack([pictures[position] for position in range(start, start + batch)])
        return torch.from_numpy(stacked).permute(0, 3, 1, 2).float().div_(127.5).sub_(1)

    return read_ahead(make, range(seen, total, batch))


def reconstruction_loss(
    model: AutoencoderDC, pictures: torch.Tensor, noise: torch.Tensor, recipe: AutoencoderRecipe
) -> torch.Tensor:
    """L1 on pixels and on their differences, plus a light hold on the latents' scale."""
    latents = model.encode(pictures, return_dict=False)[0]  # [B, C, S/8, S/8]
    noisy = latents + recipe.latent_noise * latents.detach().std() * noise
    output = model.decode(noisy, return_dict=False)[0]  # [B, 3, S, S]
    loss = pixel_loss(output, pictures, recipe.detail)
    return loss + recipe.latent_penalty * latents.float().square().mean()


def pixel_loss(output: torch.Tensor, images: torch.Tensor, detail: float) -> torch.Tensor:
    """L1 and squared distance of the pixels, plus `detail` times the L1 distance of their differences along both axes.

    Args:
        output: reconstructions, [B, 3, S, S].
        images: what they should be, [B, 3, S, S].
        detail: weight of the last term, which preserves edges.
    """
    error = (output - images).float()
    loss = error.abs().mean() + 2 * error.square().mean()
    return loss + detail * (error.diff(dim=2).abs().mean() + error.diff(dim=3).abs().mean())


def train_autoencoder(recipe: AutoencoderRecipe, run: Path) -> None:
    """Train, resuming from `run` where it has a state, and publish the average to `run/model`.

    Raises:
        InputError: another process trains in `run`, it was begun with another recipe, the loss is no number, or a
            folder of the recipe is not as it should be.
    """
    with begun(recipe, run):
        learn(recipe, run)


def learn(recipe: AutoencoderRecipe, run: Path) -> None:
    """The training itself, in a folder that is held."""
    if recipe.threads:
        torch.set_num_threads(recipe.threads)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(recipe.seed)
    model = build(recipe).to(device, memory_format=torch.channels_last)
    optimizer = torch.optim.AdamW(model.parameters(), lr=recipe.learning_rate, betas=(0.9, 0.95), weight_decay=0.01)
    learner = Learner(model=model, optimizers=[optimizer], averages=[Ema(model, recipe.ema)])
    learner.resume(run)
    loss_of = torch.compile(reconstruction_loss) if recipe.compile else reconstruction_loss
    latent_shape = (recipe.batch, recipe.latent_channels, recipe.size // 8, recipe.size // 8)
    reporter = Reporter(run, recipe.images, learner.seen)
    averaged = publish(learner, recipe, run)
    pictures = Pictures(recipe.train, recipe.shares, recipe.size, recipe.seed)
    for batch in batches(pictures, learner.seen, recipe.images, recipe.batch):
        seen = learner.seen
        batch = batch.to(device, memory_format=torch.channels_last)
        noise = torch.randn(latent_shape, generator=torch.Generator().manual_seed(recipe.seed + seen)).to(device)
        with torch.autocast(device, torch.bfloat16):
            loss = loss_of(model, batch, noise, recipe)
        loss.backward()
        rate = learning_rate(seen, recipe.images, recipe.learning_rate, recipe.warmup, "cosine")
        norm = learner.step(rate, clip=1.0)
        learner.count(recipe.batch)
        seen = learner.seen
        report = seen % (recipe.batch * 50) == 0
        keep = seen % recipe.checkpoint_every < recipe.batch or seen >= recipe.images
        if report or keep:
            finite_numbers(seen, loss.item(), norm.item())
        if report:
            reporter.report(seen, loss=loss.item(), gradient_norm=norm.item())
        if keep:
            averaged = publish(learner, recipe, run)
            save_state(run, seen, learner.state())
    if learner.seen >= recipe.images:
        for folder in recipe.test:
            measured = measure(averaged, read_folder(folder), recipe.size)
            reporter.report(learner.seen, **measured)


@torch.no_grad()
def measure(vae: AutoencoderDC, rows: list[dict[str, Any]], size: int) -> dict[str, float]:
    """What survives the autoencoder.

    Args:
        vae: the autoencoder, on the CPU, in float32.
        rows: rows of prepared folders; those with masks measure labels, too.
        size: pixels a side.

    Returns:
        `psnr`: mean over pictures of their peak signal-to-noise ratio in dB, on values rounded to 8 bits;
        `labels`: share of mask pixels whose nearest palette colour after render, encode and decode is their label;
        `labels_<class>`: the same for the pixels of each class, pooled over the masks; and the counts.
    """
    codec = LatentCodec(vae)
    kept, count = np.zeros(len(CLASSES)), np.zeros(len(CLASSES))
    ratios = []
    mask = CONDITIONS["mask"]
    for row in rows:
        picture = read_photo(row["file_name"], size)
        error = reconstruct(codec, picture).astype(np.float64) - picture
        ratios.append(10 * np.log10(255**2 / max((error**2).mean(), 1e-10)))
        if column_of("mask") in row:
            labels = mask.resize(mask.read(row[column_of("mask")]).raw, size, size)
            found = reconstruct(codec, mask.render(labels, size, size)).astype(np.int64)
            nearest = ((found[:, :, None] - PALETTE.astype(np.int64)) ** 2).sum(-1).argmin(-1)  # [S, S]
            count += np.bincount(labels.ravel(), minlength=len(CLASSES))
            kept += np.bincount(labels[nearest == labels], minlength=len(CLASSES))
    measured = {"psnr": float(np.mean(ratios)), "pictures": len(ratios)}
    if count.sum():
        measured["labels"] = float(kept.sum() / count.sum())
        for index in np.flatnonzero(count):
            measured[f"labels_{CLASSES[index]}"] = float(kept[index] / count[index])
    return measured


def publish(learner: Learner, recipe: AutoencoderRecipe, run: Path) -> AutoencoderDC:
    """Write the averaged weights as a diffusers folder, `run/model`, and return that model."""
    averaged = build(recipe)
    averaged.load_state_dict(learner.model.state_dict())
    learner.averages[0].copy_to(averaged)
    averaged.save_pretrained(run / "model")
    return averaged.eval()
