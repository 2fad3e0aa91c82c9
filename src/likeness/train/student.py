"""Train a few-step student: a flow model that samples in 1 to K steps, by adversarial post-training in latent space.

The student starts as a copy of the teacher, a flow model. One step estimates x_0 = x_t - t v, and sampling adds fresh
noise in between (`RectifiedFlow.sampler`). The discriminator is another copy of the teacher with small
heads on some of its blocks; it compares noised estimates with noised data under the same text, conditions and noise.

    loss of both   relativistic (Jolicoeur-Martineau 2018, arXiv 1807.00734), softplus(D(fake) - D(real)); one backward
                   pass, whose gradient is reversed where it enters the student (Ganin and Lempitsky 2015, 1409.7495)
    stage 1        the copy of the teacher is frozen, as in latent adversarial diffusion distillation (Sauer et al.
                   2024, arXiv 2403.12015), from which the heads and the noised inputs are taken, too
    stage 2        all weights of the discriminator are trained; R1 on real data is approximated by a finite difference
                   (adversarial post-training, Lin et al. 2025, arXiv 2501.08316, section 3.3)

A batch contains every time: its newest samples start from noise, and the others are at the next time of samples whose
previous estimate the last step made, so that the student is trained on its own outputs at no extra cost. The trade-off
of the method is diversity against well-formed faces; stop on recall and Frechet distance.

n new images a step, K times, B = K n samples, C latent channels, h x w latent size, p patch size, N image tokens
(h / p)(w / p), D width of the teacher, W width of a head, F heads, L text tokens, T text width, P pooled width.
"""

from __future__ import annotations

import copy
import dataclasses
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from likeness.data.sampler import step_stream
from likeness.device import choose_device, choose_precision
from likeness.encoders.components import load_components
from likeness.files import read_json
from likeness.models.layers import modulate, use_explicit_attention
from likeness.objectives import RectifiedFlow, make_objective
from likeness.parallel import World
from likeness.train.batches import Batch, open_stores, read_batches
from likeness.train.checkpoint import checkpoint_entries, newest, read_into
from likeness.train.config import DiscriminatorRecipe, StudentRecipe, check, check_single_conditions, condition_names
from likeness.train.ema import Ema
from likeness.train.losses import block_features, blocks_of
from likeness.train.networks import check_same_components, load_initial_weights
from likeness.train.optim import learning_rate, make_optimizers
from likeness.train.progress import Progress
from likeness.train.publish import Publication, checkpoint, preview_requests
from likeness.train.run_folder import check_single_process, open_run, record_data, record_frozen
from likeness.train.train_state import TrainState
from likeness.types import InputError, TextFeatures
from likeness.weights.catalog import find_model
from likeness.weights.packed import load_component

CLEAN_TIME = 0.02
"""Time of the discriminator's inputs that have almost no noise."""
SUBSET = 8
"""One in `SUBSET` samples is used for the R1 penalty and for the mismatched fakes."""


class Samples(NamedTuple):
    """B samples at their times. The K samples of one image are n apart."""

    previous: Tensor  # the student's last estimate of x_0; data for samples that start from noise, [B, C, h, w]
    clean: Tensor  # data x_0, [B, C, h, w]
    conditions: Tensor  # [B, M, C, h, w], M conditions
    index: Tensor  # condition ids, [B, M], -1 if absent
    tokens: Tensor  # text tokens, [B, L, T]
    pooled: Tensor  # pooled text, [B, P]

    def part(self, samples: slice) -> Samples:
        """Return some of the samples."""
        return Samples(*(tensor[samples] for tensor in self))

    def arguments(self) -> tuple[TextFeatures, Tensor, Tensor]:
        """Return the arguments of a network other than latents and times."""
        return TextFeatures(self.tokens, self.pooled), self.conditions, self.index


def join(*parts: Samples) -> Samples:
    """Concatenate samples."""
    return Samples(*(torch.cat(tensors) for tensors in zip(*parts, strict=True)))


class Head(nn.Module):
    """One logit for every image token: the features of a block, modulated by the network's conditioning, and a 3 x 3
    convolution over the grid of tokens.
    """

    def __init__(self, features: int, width: int) -> None:
        super().__init__()
        self.embed = nn.Linear(features, width)
        self.modulation = nn.Linear(features, 2 * width)
        self.convolution = nn.Conv2d(width, width, 3, padding=1)
        self.output = nn.Linear(width, 1)
        nn.init.zeros_(self.modulation.weight)
        nn.init.zeros_(self.modulation.bias)
        nn.init.normal_(self.output.weight, std=0.02)
        nn.init.zeros_(self.output.bias)

    def forward(self, image: Tensor, conditioning: Tensor, grid: tuple[int, int]) -> Tensor:
        """Image tokens [B, N, D], conditioning [B, D], the grid (h / p, w / p) -> logits [B, N]."""
        shift, scale = self.modulation(conditioning).chunk(2, dim=-1)  # [B, W] each
        x = self.embed(F.layer_norm(image, image.shape[-1:]))  # [B, N, W]
        x = F.silu(modulate(x, shift, scale))
        near = self.convolution(x.transpose(1, 2).unflatten(2, grid))  # [B, W, h / p, w / p]
        x = F.silu(x + near.flatten(2).transpose(1, 2))  # [B, N, W]
        return self.output(x).squeeze(-1)  # [B, N]


class Discriminator(nn.Module):
    """A copy of the teacher, the backbone, with heads on the image tokens after some of its blocks.

    The tokens and the conditioning vector are read by forward hooks, so that networks need no second forward method.
    """

    def __init__(self, teacher: nn.Module, blocks: Sequence[int], width: int) -> None:
        super().__init__()
        self.backbone = copy.deepcopy(teacher)
        layers, features, self.patch = blocks_of(self.backbone)
        self.heads = nn.ModuleList(Head(features, width) for _ in blocks)
        self.features: list[tuple[Tensor, Tensor]] = []
        for index in sorted(blocks):
            layers[index].register_forward_hook(self.save_features)

    def save_features(self, block: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
        """Forward hook: save the image tokens and the conditioning of a block."""
        if found := block_features(block, inputs, output):
            self.features.append(found)

    def forward(
        self, latents: Tensor, time: Tensor, text: TextFeatures, conditions: Tensor, condition_index: Tensor
    ) -> Tensor:
        """Return the logits of x_t, one per head and image token, float32 [B, F, N]; arguments as the backbone's."""
        grid = (latents.shape[-2] // self.patch, latents.shape[-1] // self.patch)
        self.features.clear()
        self.backbone(latents, time, text, conditions, condition_index)
        logits = [
            head(image[:, -math.prod(grid) :], conditioning, grid)  # [B, N]
            for head, (image, conditioning) in zip(self.heads, self.features, strict=True)
        ]
        self.features.clear()
        return torch.stack(logits, dim=1).float()  # [B, F, N]


class Draws(NamedTuple):
    """Random numbers of a step with B samples; functions of (seed, images seen)."""

    noise: Tensor  # noise of the student's inputs, [B, C, h, w]
    time: Tensor  # times of the discriminator's inputs, [B]
    discriminator_noise: Tensor  # their noise, the same for real and fake, [B, C, h, w]
    penalty_noise: Tensor  # unit noise of the R1 penalty, [ceil(B / SUBSET), C, h, w]


def draw(recipe: DiscriminatorRecipe, seed: int, start: int, shape: tuple[int, ...]) -> Draws:
    """Return the random numbers of the step that starts at image `start`; `shape` is [B, C, h, w]."""
    rng = step_stream(seed, start)
    normal = lambda *size: torch.from_numpy(rng.standard_normal(size, dtype="float32"))  # noqa: E731
    time = torch.sigmoid(recipe.time_mean + recipe.time_std * normal(shape[0]))
    clean = torch.from_numpy(rng.random(shape[0])) < recipe.clean_fraction
    return Draws(
        normal(*shape),
        time.masked_fill(clean, CLEAN_TIME),
        normal(*shape),
        normal(math.ceil(shape[0] / SUBSET), *shape[1:]),
    )


def losses_of(
    student: nn.Module,
    discriminator: nn.Module,
    objective: RectifiedFlow,
    recipe: StudentRecipe,
    samples: Samples,
    times: Tensor,
    draws: Draws,
    flow: tuple[Tensor, Tensor],
    update_student: bool,
) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """Compute the losses of a step.

    Args:
        student: predicts v at x_t.
        discriminator: returns logits.
        objective: objective of the teacher.
        recipe: weights of the losses.
        samples: B samples, the first n of which are new.
        times: their times [B].
        draws: random numbers of the step.
        flow: noise [n, C, h, w] and times [n] of the flow-matching loss.
        update_student: whether to compute gradients for the student.

    Returns:
        The sum of all losses, whose backward pass computes the gradients of student and discriminator; the student's
        x_0, without gradient, [B, C, h, w]; scalars to report.
    """
    d, n = recipe.discriminator, len(flow[1])

    # 1. The student estimates x_0 from its previous estimate, noised; and v of noised data
    noisy, time, inputs = objective.corrupt(samples.previous, draws.noise, times), times, samples
    anchored, new = update_student and recipe.flow_weight > 0, samples.part(slice(n))
    if anchored:
        noisy = torch.cat([noisy, objective.corrupt(new.clean, *flow)])  # [B + n, C, h, w]
        time, inputs = torch.cat([times, flow[1]]), join(samples, new)
    with torch.set_grad_enabled(update_student):
        velocity = student(noisy, objective.model_time(time), *inputs.arguments()).float()  # [B + n, C, h, w]
        fake = objective.denoise(noisy[: len(times)], velocity[: len(times)], times)  # [B, C, h, w]
    flow_loss = torch.zeros((), device=times.device)
    if anchored:
        flow_loss = (velocity[len(times) :] - objective.target(new.clean, *flow)).square().mean()

    # 2. Logits of fake and real with the same noise, of some real ones with a little more noise, and of some real ones
    # with the text and conditions of the previous sample
    subset = slice(None, None, SUBSET)
    noised_fake = objective.corrupt(fake, draws.discriminator_noise, draws.time)  # [B, C, h, w]
    noised_real = objective.corrupt(samples.clean, draws.discriminator_noise, draws.time)
    part = noised_real[subset]  # [ceil(B / SUBSET), C, h, w]
    latents = [noised_fake, noised_real, part + d.penalty_noise * draws.penalty_noise]
    levels = [draws.time, draws.time, draws.time[subset]]
    inputs_of = [samples, samples, samples.part(subset)]
    if d.mismatch:
        latents.append(part)
        levels.append(draws.time[subset])
        inputs_of.append(Samples(*(tensor.roll(1, dims=0)[subset] for tensor in samples)))
    logits = discriminator(torch.cat(latents), objective.model_time(torch.cat(levels)), *join(*inputs_of).arguments())
    of_fake, of_real, of_penalty, *of_mismatch = logits.split([len(x) for x in latents])  # [., F, N] each

    # 3. Losses; the gradient that enters the student is that of softplus(D(real) - D(fake)) instead, up to the mean
    # over a sample's tokens of the ratio of the two derivatives
    adversarial = F.softplus(of_fake - of_real).mean()
    penalty = (of_penalty - of_real[subset]).square().mean()
    mismatch = F.softplus(of_mismatch[0] - of_real[subset]).mean() if of_mismatch else torch.zeros_like(penalty)
    if update_student:
        slope = torch.sigmoid((of_fake - of_real).detach()).mean(dim=(1, 2))  # [B]
        ratio = ((1 - slope) / slope.clamp(min=0.05))[:, None, None, None]
        noised_fake.register_hook(lambda gradient: -ratio * gradient)
    loss = adversarial + d.penalty * penalty + d.mismatch * mismatch + recipe.flow_weight * flow_loss

    gap, estimates = (of_real - of_fake).detach(), fake.detach()
    report = {
        "adversarial": adversarial,
        "penalty": penalty,
        "mismatch": mismatch,
        "flow": flow_loss,
        "gap": gap.mean(),
        "accuracy": (gap > 0).float().mean(),
        "accuracy_first": (gap[:n] > 0).float().mean(),
        "accuracy_last": (gap[-n:] > 0).float().mean(),
        "std_first": estimates[:n].std(),
        "std_last": estimates[-n:].std(),
        "error": (estimates - samples.clean).square().mean(),
    }
    return loss, estimates, report


@dataclasses.dataclass(kw_only=True)
class StudentState:
    """What a student's training updates and saves."""

    student: TrainState  # the student with its EMAs; counts the images
    backbone: TrainState  # the discriminator's copy of the teacher
    heads: TrainState  # the discriminator's heads
    frozen_images: int  # images during which the backbone is frozen
    rollout: Samples | None = None  # samples that continue at the next time; None before the first step

    def freeze(self) -> None:
        """Freeze the backbone in stage 1 and unfreeze it in stage 2."""
        self.backbone.model.requires_grad_(self.student.images_seen >= self.frozen_images)

    def tensors(self) -> dict[str, Tensor]:
        """Return every tensor that a resumed run needs, by name."""
        parts = {name: getattr(self, name).tensors() for name in ("student", "backbone", "heads")}
        parts["rollout"] = {} if self.rollout is None else self.rollout._asdict()
        return {f"{part}/{name}": value for part, tensors in parts.items() for name, value in tensors.items()}

    def resume(self, run: Path) -> None:
        """Continue from the newest checkpoint in `run`, if there is one. Raises `InputError` if it cannot be read, or
        is of another network.
        """
        if path := newest(run):
            stored = checkpoint_entries(path)
            self.student.images_seen = int(path.name)
            self.freeze()
            for part in ("student", "backbone", "heads"):
                names = [name.removeprefix(f"{part}/") for name in stored if name.startswith(f"{part}/")]
                getattr(self, part).create_optimizer_states(names)
            if all(f"rollout/{name}" in stored for name in Samples._fields):
                places = (stored[f"rollout/{name}"] for name in Samples._fields)
                empty = (torch.empty(place.size, dtype=place.properties.dtype) for place in places)
                self.rollout = Samples(*(tensor.to(self.student.world.device) for tensor in empty))
            read_into(path, self.tensors(), self.student.world)
        self.freeze()


def train_student(recipe: StudentRecipe, run: Path) -> Path:
    """Train, or resume, in the folder `run`; return the published pipeline, `run/model`.

    Raises:
        InputError: the teacher, data or an earlier checkpoint do not fit the recipe, or there are several processes.
        TryAgain: a non-finite loss or gradient, or SIGTERM, after which a checkpoint is saved: the same command
            resumes; or another process trains in `run`.
    """
    check_single_process(recipe.kind)
    recipe, network, objective = load_teacher(recipe)
    previews = preview_requests(recipe)
    with open_run(recipe, run) as signals:
        components = load_components(find_model(recipe.teacher))
        publication = Publication(
            components=dataclasses.replace(components, scheduler=objective.scheduler()),
            objective=objective,
            defaults=recipe.defaults,
            previews=previews,
        )
        train_in(run, recipe, network, publication, objective, signals)
    return run / "model"


def load_teacher(recipe: StudentRecipe) -> tuple[StudentRecipe, Any, RectifiedFlow]:
    """Load the teacher and check the recipe; return the recipe with all pipeline defaults, the teacher's network, in
    float32, and its objective. Raises `InputError` if the teacher is not a flow model that was trained with this
    package, or the recipe does not fit it.
    """
    check(recipe)
    folder = find_model(recipe.teacher)
    index = read_json(folder / "model_index.json") if (folder / "model_index.json").is_file() else {}
    kind, settings = index.get("_class_name"), index.get("objective") or {"name": "rectified_flow"}
    if kind not in ("MMFacePipeline", "MDiTFacePipeline"):
        raise InputError(f"the teacher {recipe.teacher} is {kind or 'an adapter'}, not an MMFace or MDiTFace pipeline")
    objective = make_objective(settings)
    if not isinstance(objective, RectifiedFlow):
        raise InputError(f"the teacher {recipe.teacher} is not a flow model: its objective is {settings['name']}")
    objective = dataclasses.replace(objective, sampler="renoise")
    network = load_component(folder / "transformer", *index["transformer"]).float()
    if network.config.get("guidance_embeds"):
        raise InputError(f"the teacher {recipe.teacher} is guidance-distilled: it must be a plain flow model")
    if unknown := [name for name in condition_names(recipe.data) if name not in network.config.condition_names]:
        raise InputError(
            f"the teacher {recipe.teacher} was not trained with {unknown[0]}, which is in condition_probabilities"
        )
    if recipe.init_from:
        find_model(recipe.init_from)  # before the run folder is made
    if kind == "MMFacePipeline":
        check_single_conditions(recipe.data)
    blocks = len(blocks_of(network)[0])
    if wrong := [index for index in recipe.discriminator.blocks if not 0 <= index < blocks]:
        raise InputError(f"discriminator.blocks has {wrong[0]}, but the teacher's blocks are 0 to {blocks - 1}")
    defaults = {"size": index["defaults"]["size"], "steps": recipe.steps}
    defaults |= {"guidance_scale": 1.0, "guidance_interval": [0.0, 1.0], **recipe.defaults}
    return dataclasses.replace(recipe, defaults=defaults), network, objective


def train_in(
    run: Path,
    recipe: StudentRecipe,
    student: Any,
    publication: Publication,
    objective: RectifiedFlow,
    signals: Sequence[int],
) -> None:
    """Train in a locked folder; stop early if `signals` is not empty."""
    # 1. Build
    o, d, components = recipe.optimizer, recipe.discriminator, publication.components
    world = World(device=choose_device("auto"))
    recipe = dataclasses.replace(recipe, precision=choose_precision(recipe.precision, world.device_type))
    patch_size = blocks_of(student)[2]
    stores = open_stores(recipe, recipe.data.shards, components, patch_size)
    record_data(stores, run, recipe.data)
    if newest(run):
        check_same_components(run / "model", components)
    torch.manual_seed(recipe.seed)  # initial weights of the heads; later random numbers have their own generators
    use_explicit_attention(student, world.device_type == "cpu" and recipe.precision == "bf16")
    discriminator = Discriminator(student, d.blocks, d.width).to(world.device).train()
    if recipe.init_from and not newest(run):
        load_initial_weights(student, recipe.init_from, objective, components)
    student.to(world.device).train()
    if not stores[0].text_hash:  # the shards have no text features
        for encoder in components.text_encoders:
            encoder.to(world.device)

    def discriminator_state(module: nn.Module, rate: float) -> TrainState:
        adamw = torch.optim.AdamW(module.parameters(), lr=rate, betas=o.betas, weight_decay=0.0, fused=True)
        return TrainState(model=module, optimizers=[adamw], world=world)

    state = TrainState(
        model=student,
        optimizers=make_optimizers(student, o),
        emas=[Ema(student, width) for width in (o.ema, *o.posthoc_emas)],
        world=world,
    )
    states = StudentState(
        student=state,
        backbone=discriminator_state(discriminator.backbone, d.learning_rate),
        heads=discriminator_state(discriminator.heads, d.head_learning_rate),
        frozen_images=d.frozen_images,
    )

    # 2. Resume
    states.resume(run)
    record_frozen(discriminator.backbone, run)
    if recipe.compile:
        student.compile(dynamic=False)
        discriminator.compile(dynamic=False)

    # 3. Train
    sigmas = objective.schedule(objective.scheduler(), recipe.steps)["sigmas"]
    schedule = torch.tensor(sigmas, dtype=torch.float32, device=world.device)  # [K]
    times = schedule.repeat_interleave(o.batch)  # [B]
    continuing = slice(len(times) - o.batch)  # [B - n] samples have another time
    progress = Progress(run, state, o.images, o.batch, signals, recipe)
    names = list(student.config.condition_names)
    batches = read_batches(recipe, stores, names, components.settings, world, progress.starts, o.batch, patch_size)
    for start, (batch,) in progress.steps(batches):
        update_student = start >= d.warmup
        flow_time = objective.sample_time(batch.uniform).to(world.device)
        batch = batch.with_text(components).to(world.device)
        with world.autocast(recipe.precision):
            samples = next_samples(states.rollout, batch, recipe.steps)
            draws = Draws(*(x.to(world.device) for x in draw(d, recipe.seed, start, tuple(samples.clean.shape))))
            flow = batch.noise, flow_time
            loss, estimates, report = losses_of(
                student, discriminator, objective, recipe, samples, times, draws, flow, update_student
            )
        loss.backward()
        report["heads_gradient"] = states.heads.step(d.head_learning_rate, o.max_grad_norm)
        if start >= d.frozen_images:
            report["backbone_gradient"] = states.backbone.step(d.learning_rate, o.max_grad_norm)
        rate = student_rate(recipe, start)
        if update_student:
            report["student_gradient"] = state.step(rate, o.max_grad_norm)
        states.rollout = None
        if recipe.steps > 1:
            states.rollout = samples.part(continuing)._replace(previous=estimates[continuing])
        progress.end_step(loss=loss, **report)
        states.freeze()

        # 4. Report and save
        if progress.due(recipe.log_every):
            progress.report(learning_rate=rate)
        checkpoint(progress, publication, recipe, states)


def next_samples(rollout: Samples | None, batch: Batch, steps: int) -> Samples:
    """Return the samples of a step, [K n]: n new ones, which start from noise, and those that continue. At the first
    step the new ones fill all times, with data in the place of estimates.
    """
    assert batch.text is not None
    new = Samples(batch.clean, batch.clean, batch.condition_latents, batch.condition_index, *batch.text)
    return join(new, *([new] * (steps - 1) if rollout is None else [rollout]))


def student_rate(recipe: StudentRecipe, start: int) -> float:
    """Return the student's learning rate in the step that starts at image `start`. Each stage has its own warm-up; in
    stage 1 the rate is constant after it.
    """
    o, d = recipe.optimizer, recipe.discriminator
    if start < d.frozen_images:
        peak = recipe.frozen_learning_rate or o.learning_rate
        return learning_rate(max(start - d.warmup, 0), o.images, peak, o.warmup, "constant")
    first = max(d.frozen_images, d.warmup)
    return learning_rate(max(start - first, 0), o.images - first, o.learning_rate, o.warmup, o.decay)
