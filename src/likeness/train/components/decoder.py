"""Fine-tune the decoder of an autoencoder with a perceptual and an adversarial loss, for sharper images.

The encoder is frozen, so that latents, shards and the models trained on them stay valid. An L1 or squared loss alone
averages over the textures that a latent leaves open, which looks soft; the two other losses choose one. Rendered
conditions keep the plain loss: their colors are labels and must survive encoding and decoding.
"""

from __future__ import annotations

import copy
import math
from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F

from likeness.data.ahead import read_ahead
from likeness.data.folder import read_folder
from likeness.data.sampler import stream
from likeness.encoders.latent import LatentCodec, spatial_factor, to_tensor
from likeness.files import first_line, read_json
from likeness.models.patch_discriminator import GROUPS, PatchDiscriminator
from likeness.models.squeezenet import Normalization, SqueezeNetFeatures, perceptual_distance
from likeness.train.checkpoint import save_state
from likeness.train.components.autoencoder import Pictures, measure, pixel_loss
from likeness.train.config import check_values
from likeness.train.learner import Learner
from likeness.train.loop import terminations
from likeness.train.metrics import Reporter
from likeness.train.optim import Ema, learning_rate
from likeness.train.run import begun, finite_numbers
from likeness.types import InputError, TryAgain
from likeness.weights.catalog import BUNDLED, COMMON
from likeness.weights.packed import load_component


@dataclass(frozen=True, kw_only=True)
class DecoderRecipe:
    """How a decoder is fine-tuned."""

    kind: Literal["decoder"] = "decoder"
    """What the recipe trains."""
    train: tuple[str, ...]
    """Prepared folders to train on."""
    test: tuple[str, ...]
    """Prepared folders that are only measured."""
    autoencoder: str | None = None
    """Folder of the autoencoder to start from, packed or not. Default: the bundled one."""
    size: int = 128
    """Pixels per side."""
    shares: dict[str, float]
    """How often a batch consists of photographs ("image"), or else how often a sample is a rendered condition, by name.
    """
    images: int
    """Number of training images."""
    batch: int = 16
    """Images per step."""
    learning_rate: float = 2e-4
    """Peak rate of the decoder; it decays to 0 along a cosine."""
    discriminator_rate: float = 2.0
    """Rate of the discriminator, relative to that of the decoder."""
    betas: tuple[float, float] = (0.5, 0.95)
    """AdamW's betas, for both."""
    clip: float = 1.0
    """Largest gradient norm of the decoder."""
    latent_noise: float = 0.02
    """Standard deviation of the noise added to the latents, relative to each channel's own."""
    detail: float = 0.5
    """Weight of the L1 distance of horizontal and vertical differences, for rendered conditions."""
    perceptual: str | None = None
    """File with the weights of torchvision's SqueezeNet 1.0 (safetensors). Default: no perceptual loss."""
    perceptual_input: Normalization = "torchvision"
    """Input that these weights expect: `torchvision` (RGB, standardized) or `caffe` (BGR, 0 to 255, minus the mean)."""
    perceptual_weight: float = 0.1
    """Weight of the perceptual loss."""
    adversarial_weight: float = 0.1
    """Weight of the adversarial loss."""
    discriminator_channels: tuple[int, int, int] = (48, 96, 160)
    """Channels of the discriminator's hidden layers."""
    discriminator_warmup: int = 3200
    """Images during which the discriminator trains, but the decoder ignores it."""
    gradient_penalty: float = 1.0
    """Weight of the discriminator's gradient penalty."""
    penalty_noise: float = 0.05
    """Standard deviation of the noise with which the penalty estimates the gradient."""
    ema: float = 0.08
    """Relative width of the EMA weights, which are published."""
    checkpoint_every: int = 6400
    """Images between checkpoints."""
    seed: int = 0
    """Seed of every random draw."""
    compile: bool = True
    """Compile the decoder's losses with torch.compile; the discriminator's is faster without, on a CPU."""
    threads: int | None = None
    """CPU threads. Default: chosen by torch."""


class Batch(NamedTuple):
    """The images of one step."""

    photographs: bool
    """Whether they are photographs; else they are rendered conditions."""
    images: Tensor
    """In [-1, 1], [B, 3, S, S]."""


class Critics(NamedTuple):
    """The networks that compare reconstructions with photographs."""

    discriminator: PatchDiscriminator
    """Trainable."""
    perceptual: SqueezeNetFeatures | None
    """Frozen; None disables the perceptual loss."""


def check(recipe: DecoderRecipe) -> None:
    """Check the values that no other check covers.

    Raises:
        InputError: a value is out of range.
    """
    first, *groups = recipe.discriminator_channels
    check_values(
        ("learning_rate", recipe.learning_rate, recipe.learning_rate > 0, "above 0"),
        ("discriminator_rate", recipe.discriminator_rate, recipe.discriminator_rate > 0, "above 0"),
        ("betas", list(recipe.betas), all(0 <= beta < 1 for beta in recipe.betas), "at least 0 and below 1"),
        ("clip", recipe.clip, recipe.clip > 0, "above 0"),
        ("shares", recipe.shares, recipe.shares.get("image", 0) > 0, 'a table with "image" above 0'),
        ("shares", recipe.shares, all(share >= 0 for share in recipe.shares.values()), "at least 0 each"),
        *(
            (name, getattr(recipe, name), getattr(recipe, name) >= 0, "at least 0")
            for name in ("latent_noise", "detail", "perceptual_weight", "adversarial_weight", "gradient_penalty")
        ),
        ("penalty_noise", recipe.penalty_noise, recipe.penalty_noise > 0, "above 0"),
        ("discriminator_warmup", recipe.discriminator_warmup, recipe.discriminator_warmup >= 0, "at least 0"),
        (
            "discriminator_channels",
            list(recipe.discriminator_channels),
            first > 0 and all(width > 0 and width % GROUPS == 0 for width in groups),
            f"above 0, the last two multiples of {GROUPS}",
        ),
    )


def load_autoencoder(folder: str | Path | None) -> Any:
    """The autoencoder of a folder, packed or not, on the CPU; only its decoder is trainable.

    Raises:
        InputError: the folder has no autoencoder of diffusers.
    """
    folder = BUNDLED / COMMON / "vae" if folder is None else Path(folder)
    name = read_json(folder / "config.json").get("_class_name", "")
    if not name.startswith("Autoencoder"):
        raise InputError(f"{folder} does not contain an autoencoder of diffusers: its config.json names {name!r}")
    vae = load_component(folder, "diffusers", name).eval().requires_grad_(False)
    vae.decoder.requires_grad_(True)
    return vae


def load_perceptual(path: str | None, normalization: Normalization) -> SqueezeNetFeatures | None:
    """The network of the perceptual loss, frozen; None without a file.

    Raises:
        InputError: the file is missing or does not contain these weights.
    """
    if path is None:
        return None
    network = SqueezeNetFeatures(normalization)
    try:
        network.load(load_file(path))
    except (OSError, RuntimeError, SafetensorError) as error:
        raise InputError(f"{path} does not contain the weights of SqueezeNet 1.0: {first_line(error)}") from error
    return network.eval().requires_grad_(False)


def batches(recipe: DecoderRecipe, seen: int) -> Iterator[Batch]:
    """Batches from image number `seen` on, read ahead by two threads. A batch depends only on (seed, position)."""
    conditions = {name: share for name, share in recipe.shares.items() if name != "image" and share > 0}
    fraction = recipe.shares["image"] / (recipe.shares["image"] + sum(conditions.values()))
    photographs = Pictures(recipe.train, {"image": 1.0}, recipe.size, recipe.seed)
    rendered = Pictures(recipe.train, conditions, recipe.size, recipe.seed) if conditions else photographs

    def make(start: int) -> Batch:
        chosen = stream(recipe.seed, start).random() < fraction
        source = photographs if chosen else rendered
        return Batch(chosen, to_tensor([source[position] for position in range(start, start + recipe.batch)]))

    return read_ahead(make, range(seen, recipe.images, recipe.batch))


def photograph_loss(
    vae: Any, critics: Critics, latents: Tensor, images: Tensor, weights: Mapping[str, Tensor]
) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """The decoder's loss on photographs: L1, perceptual and adversarial.

    The adversarial loss is relativistic (Jolicoeur-Martineau 2018): a reconstruction should score as high as its
    original. Gradients reach the decoder only.

    Args:
        vae: the autoencoder.
        critics: what compares the images.
        latents: raw latents, [B, C, S / f, S / f].
        images: their photographs, [B, 3, S, S].
        weights: of `perceptual` and `adversarial`, scalars.

    Returns:
        The loss; the reconstructions, detached, [B, 3, S, S]; the terms by name, detached.
    """
    output = vae.decode(latents, return_dict=False)[0]  # [B, 3, S, S]
    terms = {"l1": (output - images).float().abs().mean()}
    loss = terms["l1"]
    if critics.perceptual is not None:
        terms["perceptual"] = perceptual_distance(critics.perceptual(output), critics.perceptual(images))
        loss = loss + weights["perceptual"] * terms["perceptual"]
    frozen = {name: value.detach() for name, value in critics.discriminator.named_parameters()}
    fake, real = (functional_call(critics.discriminator, frozen, (x,)).float() for x in (output, images))
    terms["adversarial"] = F.softplus(real - fake).mean()
    loss = loss + weights["adversarial"] * terms["adversarial"]
    return loss, output.detach(), {name: term.detach() for name, term in terms.items()}


def discriminator_loss(
    discriminator: nn.Module, real: Tensor, fake: Tensor, noise: Tensor, penalty: float, penalty_noise: float
) -> Tensor:
    """The discriminator's loss: relativistic, with a penalty on its gradient.

    The penalty is R1 and R2 of Huang et al. 2024 ("The GAN is dead; long live the GAN!") by finite differences, as Lin
    et al. 2025 ("Diffusion Adversarial Post-Training", equation 4) estimate it: no second derivatives are needed.

    Args:
        discriminator: images to logits.
        real: photographs, [B, 3, S, S].
        fake: their reconstructions, [B, 3, S, S].
        noise: standard normal, [2 B, 3, S, S].
        penalty: its weight.
        penalty_noise: standard deviation of the noise that is added to the images.
    """
    both = torch.cat([real, fake.to(real.dtype)])  # [2 B, 3, S, S]
    logits = discriminator(both).float()  # [2 B, 1, S / 4, S / 4]
    moved = discriminator(both + penalty_noise * noise).float()
    scores_real, scores_fake = logits.chunk(2)
    return F.softplus(scores_fake - scores_real).mean() + 2 * penalty * (moved - logits).square().mean()


def rendered_loss(vae: Any, latents: Tensor, images: Tensor, detail: float) -> Tensor:
    """The decoder's loss on rendered conditions."""
    return pixel_loss(vae.decode(latents, return_dict=False)[0], images, detail)


def train_decoder(recipe: DecoderRecipe, run: Path) -> None:
    """Train, resuming from `run` if it contains a checkpoint, and publish the EMA weights to `run/model`: the whole
    autoencoder, its encoder bit-identical to that of the recipe.

    Raises:
        InputError: another process trains in `run`, it was started with another recipe, the loss is not finite, a value
            or a file of the recipe is invalid.
        TryAgain: SIGTERM was received; a checkpoint was saved.
    """
    check(recipe)
    with begun(recipe, run), terminations() as signals:
        learn(recipe, run, signals)


def learn(recipe: DecoderRecipe, run: Path, signals: list[int]) -> None:
    """The training loop; `signals` collects the SIGTERMs received."""
    if recipe.threads:
        torch.set_num_threads(recipe.threads)
    device = "cuda" if torch.cuda.is_available() else "cpu"

    # 1. Networks
    vae = load_autoencoder(recipe.autoencoder).to(device, memory_format=torch.channels_last)
    if recipe.size % (factor := spatial_factor(vae)):
        raise InputError(f"the recipe's size is {recipe.size}: it must be a multiple of {factor}")
    perceptual = load_perceptual(recipe.perceptual, recipe.perceptual_input)
    torch.manual_seed(recipe.seed)  # initial weights of the discriminator; later draws have their own streams
    discriminator: Any = PatchDiscriminator(recipe.discriminator_channels)
    discriminator.to(device, memory_format=torch.channels_last)
    critics = Critics(discriminator, None if perceptual is None else perceptual.to(device))
    codec = LatentCodec(vae, batched=True)
    groups = [
        {"params": list(vae.decoder.parameters())},
        {"params": list(discriminator.parameters()), "rate_factor": recipe.discriminator_rate},
    ]
    optimizer = torch.optim.AdamW(groups, lr=recipe.learning_rate, betas=recipe.betas, weight_decay=0.0)
    both = nn.ModuleDict({"autoencoder": vae, "discriminator": discriminator})
    learner = Learner(model=both, optimizers=[optimizer], averages=[Ema(vae, recipe.ema)])
    learner.resume(run)
    compiled: Any = torch.compile if recipe.compile else lambda function: function
    on_photographs, on_rendered = compiled(photograph_loss), compiled(rendered_loss)

    # 2. Train
    reporter = Reporter(run, recipe.images, learner.seen)
    averaged = publish(learner, vae, run)
    recent: dict[str, list[Tensor]] = defaultdict(list)  # values of each step since the last report
    for batch in batches(recipe, learner.seen):
        seen = learner.seen
        generator = torch.Generator().manual_seed(recipe.seed + seen)
        images = batch.images.to(device, memory_format=torch.channels_last)
        with torch.autocast(device, torch.bfloat16):
            latents = codec.encode(images)  # [B, C, S / f, S / f]
            noise = torch.randn(latents.shape, generator=generator).to(device)
            latents = latents + recipe.latent_noise * latents.std(dim=(0, 2, 3), keepdim=True) * noise
            if batch.photographs:
                adversarial = recipe.adversarial_weight if seen >= recipe.discriminator_warmup else 0.0
                weights = {"perceptual": recipe.perceptual_weight, "adversarial": adversarial}
                scalars = {name: torch.tensor(value, device=device) for name, value in weights.items()}
                loss, output, terms = on_photographs(vae, critics, latents, images, scalars)
                noise = torch.randn((2 * len(images), *images.shape[1:]), generator=generator).to(device)
                judged = discriminator_loss(
                    discriminator, images, output, noise, recipe.gradient_penalty, recipe.penalty_noise
                )
                terms["discriminator"] = judged.detach()
            else:
                loss = on_rendered(vae, latents, images, recipe.detail)
                judged, terms = torch.zeros((), device=device), {"rendered": loss.detach()}
        (loss + judged).backward()  # the two share no trainable parameter
        norm = nn.utils.clip_grad_norm_(vae.decoder.parameters(), recipe.clip)
        rate = learning_rate(seen, recipe.images, recipe.learning_rate, 0, "cosine")
        learner.step(rate, clip=math.inf)
        learner.count(recipe.batch)

        # 3. Report and save
        for name, value in {**terms, "gradient_norm": norm}.items():
            recent[name].append(value)
        seen = learner.seen
        last = seen >= recipe.images
        stop = bool(signals) and not last
        report = seen % (recipe.batch * 50) == 0
        keep = seen % recipe.checkpoint_every < recipe.batch or last or stop
        if report or keep:
            means = {name: torch.stack(values).mean().item() for name, values in recent.items()}
            finite_numbers(seen, sum(means.values()) - means["gradient_norm"], means["gradient_norm"])
            if report:
                reporter.report(seen, **means)
                recent.clear()
        if keep:
            averaged = publish(learner, vae, run)
            save_state(run, seen, learner.state())
        if stop:
            raise TryAgain(f"SIGTERM after {seen:,} images: run the same command again to resume")
    if learner.seen >= recipe.images:
        for folder in recipe.test:
            reporter.report(learner.seen, **measure(averaged, read_folder(folder), recipe.size))


def publish(learner: Learner, vae: Any, run: Path) -> Any:
    """Write the autoencoder with the EMA weights of its decoder as a diffusers folder, `run/model`, and return it, on
    the CPU.
    """
    averaged = copy.deepcopy(vae).cpu()
    learner.averages[0].copy_to(averaged)
    averaged.save_pretrained(run / "model")
    return averaged.eval()
