"""Fine-tune the decoder of an autoencoder with a perceptual and an adversarial loss, for sharper images.

The encoder is frozen, so that latents, shards and the models trained on them stay valid. An L1 or squared loss alone
averages over the textures that a latent leaves open, which looks soft; the two other losses choose one. Rendered
conditions keep the plain loss: their colors are labels and must survive encoding and decoding.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
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
from likeness.encoders.latent import LatentCodec, spatial_factor
from likeness.files import first_line, read_json
from likeness.models.patch_discriminator import GROUPS, PatchDiscriminator
from likeness.models.squeezenet import Normalization, SqueezeNetFeatures, perceptual_distance
from likeness.train.components import steps
from likeness.train.components.autoencoder import TrainingImages, pixel_loss, report_and_publish
from likeness.train.config import ComponentRecipe, check_minimum, check_probabilities, check_values
from likeness.train.run_folder import record_frozen
from likeness.types import InputError
from likeness.weights.catalog import BUNDLED, COMMON
from likeness.weights.packed import load_component


@dataclass(frozen=True, kw_only=True)
class DecoderRecipe(ComponentRecipe):
    """Fine-tuning of a decoder."""

    kind: Literal["decoder"] = "decoder"
    """What the recipe trains."""
    autoencoder: str | None = None
    """Folder of the autoencoder to start from, packed or not. Default: the bundled one."""
    size: int = 128
    """Image size in pixels."""
    probabilities: dict[str, float]
    """Relative probability of photographs ("image") for a batch, and otherwise of rendered conditions for each sample,
    by name.
    """
    learning_rate: float = 2e-4
    discriminator_rate: float = 2.0
    """Learning rate of the discriminator, relative to that of the decoder."""
    betas: tuple[float, float] = (0.5, 0.95)
    """Betas of AdamW, for both."""
    max_grad_norm: float = 1.0
    """Largest gradient norm of the decoder."""
    latent_noise: float = 0.02
    """Standard deviation of the noise added to the latents, relative to that of each channel."""
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
    """Images during which the discriminator is trained without affecting the decoder."""
    gradient_penalty: float = 1.0
    """Weight of the discriminator's gradient penalty."""
    penalty_noise: float = 0.05
    """Standard deviation of the noise with which the penalty estimates the gradient."""


class Critics(NamedTuple):
    """The networks that compare reconstructions with photographs."""

    discriminator: PatchDiscriminator  # trainable
    perceptual: SqueezeNetFeatures | None  # frozen; None disables the perceptual loss


def check(recipe: DecoderRecipe) -> None:
    """Check the values that only this recipe has. Raises `InputError`."""
    first, *groups = recipe.discriminator_channels
    check_minimum(recipe, 0, "latent_noise", "detail", "perceptual_weight", "adversarial_weight", "gradient_penalty")
    check_minimum(recipe, 0, "discriminator_warmup")
    check_minimum(recipe, 0, "learning_rate", "discriminator_rate", "penalty_noise", exclusive=True)
    check_minimum(recipe, 1, "size")
    p = recipe.probabilities
    check_probabilities(p, "probabilities")
    check_values(
        ("betas", list(recipe.betas), all(0 <= beta < 1 for beta in recipe.betas), "at least 0 and below 1"),
        ("probabilities", p, p.get("image", 0) > 0, 'a table with "image" above 0'),
        ("max_grad_norm", recipe.max_grad_norm, recipe.max_grad_norm > 0, "above 0"),
        (
            "discriminator_channels",
            list(recipe.discriminator_channels),
            first > 0 and all(width > 0 and width % GROUPS == 0 for width in groups),
            f"above 0, the last two multiples of {GROUPS}",
        ),
    )


def load_autoencoder(folder: str | Path | None) -> Any:
    """Load the autoencoder of a folder, packed or not, on the CPU; only its decoder is trainable. Raises `InputError`
    if the folder has no autoencoder of diffusers.
    """
    folder = BUNDLED / COMMON / "vae" if folder is None else Path(folder)
    name = read_json(folder / "config.json").get("_class_name", "")
    if not name.startswith("Autoencoder"):
        raise InputError(f"{folder} does not contain an autoencoder of diffusers: its config.json names {name!r}")
    vae = load_component(folder, "diffusers", name).eval().requires_grad_(False)
    vae.decoder.requires_grad_(True)
    return vae


def load_perceptual(path: str | None, normalization: Normalization) -> SqueezeNetFeatures | None:
    """Load the frozen network of the perceptual loss; None without a file. Raises `InputError` if the file is missing
    or does not contain these weights.
    """
    if path is None:
        return None
    network = SqueezeNetFeatures(normalization)
    try:
        network.load(load_file(path))
    except (OSError, RuntimeError, SafetensorError) as error:
        raise InputError(f"{path} does not contain the weights of SqueezeNet 1.0: {first_line(error)}") from error
    return network.eval().requires_grad_(False)


class DecoderBatches:
    """Batches of either photographs or rendered conditions; a batch depends only on the seed and its first image."""

    def __init__(self, recipe: DecoderRecipe) -> None:
        self.recipe = recipe
        conditions = {name: p for name, p in recipe.probabilities.items() if name != "image" and p > 0}
        photographs = recipe.probabilities["image"]
        self.fraction = photographs / (photographs + sum(conditions.values()))
        self.photographs = TrainingImages(recipe.train, {"image": 1.0}, recipe.size, recipe.seed)
        self.rendered = self.photographs
        if conditions:
            self.rendered = TrainingImages(recipe.train, conditions, recipe.size, recipe.seed)

    def __getitem__(self, start: int) -> tuple[bool, Tensor]:
        """Return whether the batch consists of photographs, and its images in [-1, 1], [B, 3, S, S]."""
        photographs = bool(stream(self.recipe.seed, start).random() < self.fraction)
        return photographs, (self.photographs if photographs else self.rendered).batch(start, self.recipe.batch)


def photograph_loss(
    vae: Any, critics: Critics, latents: Tensor, images: Tensor, weights: Mapping[str, Tensor]
) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """Return the decoder's loss on photographs: L1, perceptual and adversarial.

    The adversarial loss is relativistic (Jolicoeur-Martineau 2018): a reconstruction should score as high as its
    original. Gradients reach the decoder only. `latents` are raw latents of the images, [B, C, S / f, S / f] and
    [B, 3, S, S]; `weights` are scalars of the terms `perceptual` and `adversarial`.

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
    """Return the discriminator's loss on photographs and their reconstructions, [B, 3, S, S] both: relativistic, with a
    gradient penalty, estimated by `noise`, standard normal [2 B, 3, S, S], times `penalty_noise`.

    The penalty is R1 and R2 of Huang et al. 2024 ("The GAN is dead; long live the GAN!") by finite differences, as Lin
    et al. 2025 ("Diffusion Adversarial Post-Training", equation 4) estimate it: no second derivatives are needed.
    """
    both = torch.cat([real, fake.to(real.dtype)])  # [2 B, 3, S, S]
    logits = discriminator(both).float()  # [2 B, 1, S / 4, S / 4]
    moved = discriminator(both + penalty_noise * noise).float()
    scores_real, scores_fake = logits.chunk(2)
    return F.softplus(scores_fake - scores_real).mean() + 2 * penalty * (moved - logits).square().mean()


def rendered_loss(vae: Any, latents: Tensor, images: Tensor, detail: float) -> Tensor:
    """Return the decoder's loss on rendered conditions."""
    return pixel_loss(vae.decode(latents, return_dict=False)[0], images, detail)


def train_decoder(recipe: DecoderRecipe, run: Path) -> None:
    """Train, or resume, in the folder `run`, and publish the autoencoder with EMA weights to `run/model`. Its encoder
    is bit-identical to that of the recipe. Raises as `steps.open_component`.
    """
    check(recipe)
    with steps.open_component(recipe, run) as (world, signals):
        # 1. Networks
        vae = load_autoencoder(recipe.autoencoder).to(world.device, memory_format=torch.channels_last)
        if recipe.size % (factor := spatial_factor(vae)):
            raise InputError(f"the recipe's size is {recipe.size}: it must be a multiple of {factor}")
        record_frozen(vae, run)
        perceptual = load_perceptual(recipe.perceptual, recipe.perceptual_input)
        torch.manual_seed(recipe.seed)  # for the initial weights of the discriminator
        discriminator: Any = PatchDiscriminator(recipe.discriminator_channels)
        discriminator.to(world.device, memory_format=torch.channels_last)
        critics = Critics(discriminator, None if perceptual is None else perceptual.to(world.device))
        codec = LatentCodec(vae, batched=True)
        groups = [
            {"params": list(vae.decoder.parameters())},
            {"params": list(discriminator.parameters()), "rate_factor": recipe.discriminator_rate},
        ]
        optimizer = torch.optim.AdamW(groups, lr=recipe.learning_rate, betas=recipe.betas, weight_decay=0.0)
        both = nn.ModuleDict({"autoencoder": vae, "discriminator": discriminator})
        progress = steps.resume(recipe, run, world, signals, both, [optimizer], published=vae)
        compiled: Any = torch.compile if recipe.compile else lambda function: function
        on_photographs, on_rendered = compiled(photograph_loss), compiled(rendered_loss)

        test = [read_folder(folder) for folder in recipe.test]

        # 2. Train; the discriminator's loss is not compiled, which is faster on a CPU
        batches = read_ahead(DecoderBatches(recipe).__getitem__, progress.starts)
        for start, (photographs, images) in progress.steps(batches):
            generator = torch.Generator().manual_seed(recipe.seed + start)
            images = images.to(world.device, memory_format=torch.channels_last)
            with world.autocast("auto"):
                latents = codec.encode(images)  # [B, C, S / f, S / f]
                noise = torch.randn(latents.shape, generator=generator).to(world.device)
                latents = latents + recipe.latent_noise * latents.std(dim=(0, 2, 3), keepdim=True) * noise
                if photographs:
                    adversarial = recipe.adversarial_weight if start >= recipe.discriminator_warmup else 0.0
                    weights = {"perceptual": recipe.perceptual_weight, "adversarial": adversarial}
                    scalars = {name: torch.tensor(value, device=world.device) for name, value in weights.items()}
                    loss, output, terms = on_photographs(vae, critics, latents, images, scalars)
                    noise = torch.randn((2 * len(images), *images.shape[1:]), generator=generator).to(world.device)
                    terms["discriminator"] = discriminator_loss(
                        discriminator, images, output, noise, recipe.gradient_penalty, recipe.penalty_noise
                    )
                    loss = loss + terms["discriminator"]  # the two have no trainable parameter in common
                else:
                    loss = on_rendered(vae, latents, images, recipe.detail)
                    terms = {"rendered": loss}
            loss.backward()
            norm = nn.utils.clip_grad_norm_(vae.decoder.parameters(), recipe.max_grad_norm)
            steps.optimizer_step(progress, recipe, start, max_norm=math.inf)
            progress.end_step(**terms, gradient_norm=norm)
            report_and_publish(progress, recipe, test)
