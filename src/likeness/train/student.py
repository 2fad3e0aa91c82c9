"""Train a few-step student: a flow model that samples in 1 to K steps, by adversarial post-training in latent space.

The student starts as a copy of the teacher, a flow model. One step estimates x_0 = x_t - t v, and sampling adds fresh
noise in between (`RectifiedFlow.renoising_scheduler`). The discriminator is another copy of the teacher with small
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
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.nn import functional as F

from likeness import parallel
from likeness.data.sampler import step_stream
from likeness.files import read_json
from likeness.models.layers import modulate
from likeness.models.mditface import PATCH, MDiTFaceTransformer
from likeness.models.mmface import MMFaceTransformer
from likeness.objectives import RectifiedFlow, make_objective
from likeness.pipelines.load import Components, find, load_components, load_part
from likeness.train.checkpoint import entries, newest, save_state
from likeness.train.config import (
    FREE_STUDENT,
    DiscriminatorRecipe,
    MDiTFaceNetwork,
    MMFaceNetwork,
    StudentRecipe,
    TrainRecipe,
    check,
    check_single_conditions,
    check_student,
)
from likeness.train.learner import Learner, fill
from likeness.train.loop import finite, non_finite_batches, open_stores, read_batches, save, terminations
from likeness.train.metrics import Reporter
from likeness.train.networks import condition_names
from likeness.train.optim import Ema, learning_rate, make_optimizers
from likeness.train.publish import wishes
from likeness.train.run import held, keep_recipe
from likeness.train.step import Batch
from likeness.types import InputError, TextFeatures, TryAgain

CLEAN_TIME = 0.02
"""Time of the discriminator's inputs that have almost no noise."""
PART = 8
"""One in so many samples takes part in the R1 penalty, and one in so many in the mismatched fakes."""


class Samples(NamedTuple):
    """B samples at their times. Every K samples of one image follow one another at a distance of n."""

    previous: Tensor
    """The student's last estimate of x_0; data for samples that start from noise, [B, C, h, w]."""
    clean: Tensor
    """Data x_0, [B, C, h, w]."""
    conditions: Tensor
    """[B, M, C, h, w], M conditions."""
    index: Tensor
    """Their rows, [B, M], -1 where absent."""
    tokens: Tensor
    """Text tokens, [B, L, T]."""
    pooled: Tensor
    """Pooled text, [B, P]."""

    def rows(self, chosen: slice | Tensor) -> Samples:
        """A part of the samples."""
        return Samples(*(part[chosen] for part in self))

    def arguments(self) -> tuple[TextFeatures, Tensor, Tensor]:
        """What a network takes in addition to latents and times."""
        return TextFeatures(self.tokens, self.pooled), self.conditions, self.index


def join(*parts: Samples) -> Samples:
    """Samples one after another."""
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

    The tokens and the conditioning vector are read by forward hooks, so networks need no second way through.
    """

    def __init__(self, teacher: nn.Module, blocks: Sequence[int], width: int) -> None:
        super().__init__()
        self.backbone = copy.deepcopy(teacher)
        layers, features, self.patch = blocks_of(self.backbone)
        self.heads = nn.ModuleList(Head(features, width) for _ in blocks)
        self.read: list[tuple[Tensor, Tensor]] = []
        for index in sorted(blocks):
            layers[index].register_forward_hook(self.keep)

    def keep(self, block: nn.Module, given: tuple[Any, ...], output: tuple[Any, ...]) -> None:
        """Keep the image tokens and the conditioning of a block's call, unless it has no image tokens (the static
        pathway of MDiTFace). In MDiTFace's single blocks, the text precedes the image in the same tensor.
        """
        streams = output[0]
        if not isinstance(streams, dict):
            self.read.append((streams, given[2]))
        elif "image" in streams:
            self.read.append((streams["image"], given[1].conditioning))

    def forward(
        self, latents: Tensor, time: Tensor, text: TextFeatures, conditions: Tensor, condition_index: Tensor
    ) -> Tensor:
        """Logits of x_t, one for every head and image token, float32 [B, F, N]; arguments as the backbone's."""
        grid = (latents.shape[-2] // self.patch, latents.shape[-1] // self.patch)
        self.read.clear()
        self.backbone(latents, time, text, conditions, condition_index)
        logits = [
            head(image[:, -math.prod(grid) :], conditioning, grid)  # [B, N]
            for head, (image, conditioning) in zip(self.heads, self.read, strict=True)
        ]
        self.read.clear()
        return torch.stack(logits, dim=1).float()  # [B, F, N]


def blocks_of(network: nn.Module) -> tuple[list[nn.Module], int, int]:
    """The blocks of a network in the order of their calls, its width D and the side p of its patches."""
    if isinstance(network, MMFaceTransformer):
        return list(network.blocks), network.config.hidden_size, network.config.patch_size
    assert isinstance(network, MDiTFaceTransformer)
    blocks = [*network.transformer_blocks, *network.single_transformer_blocks]
    return blocks, network.config.num_attention_heads * network.config.attention_head_dim, PATCH


class Draws(NamedTuple):
    """The random numbers of a step, for B samples; functions of (seed, images seen)."""

    noise: Tensor
    """Noise of the student's inputs, [B, C, h, w]."""
    time: Tensor
    """Times of the discriminator's inputs, [B]."""
    discriminator_noise: Tensor
    """Their noise, the same for real and fake, [B, C, h, w]."""
    penalty_noise: Tensor
    """Unit noise of the R1 penalty, [ceil(B / PART), C, h, w]."""


def draw(recipe: DiscriminatorRecipe, seed: int, start: int, shape: tuple[int, ...]) -> Draws:
    """Draw for the step that begins at image `start`; `shape` is [B, C, h, w]."""
    rng = step_stream(seed, start)
    normal = lambda *size: torch.from_numpy(rng.standard_normal(size, dtype="float32"))  # noqa: E731
    time = torch.sigmoid(recipe.time_mean + recipe.time_std * normal(shape[0]))
    clean = torch.from_numpy(rng.random(shape[0])) < recipe.clean_fraction
    return Draws(
        normal(*shape),
        time.masked_fill(clean, CLEAN_TIME),
        normal(*shape),
        normal(math.ceil(shape[0] / PART), *shape[1:]),
    )


class Result(NamedTuple):
    """What a step gives."""

    loss: Tensor
    """Sum of all losses, of which the backward pass makes the gradients of student and discriminator."""
    estimates: Tensor
    """The student's x_0, without gradient, [B, C, h, w]."""
    report: dict[str, Tensor]
    """Numbers to report, one each."""


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
) -> Result:
    """All losses of a step.

    Args:
        student: v at x_t.
        discriminator: logits.
        objective: the teacher's.
        recipe: weights of the losses.
        samples: B of them; the first n are new.
        times: their times [B].
        draws: the random numbers of the step.
        flow: noise [n, C, h, w] and times [n] of the flow-matching loss.
        update_student: whether gradients for the student are wanted.
    """
    d, n = recipe.discriminator, len(flow[1])

    # 1. The student estimates x_0 from its previous estimate, noised; and v of noised data
    noisy, time, inputs = objective.corrupt(samples.previous, draws.noise, times), times, samples
    anchored, new = update_student and recipe.flow_weight > 0, samples.rows(slice(n))
    if anchored:
        noisy = torch.cat([noisy, objective.corrupt(new.clean, *flow)])  # [B + n, C, h, w]
        time, inputs = torch.cat([times, flow[1]]), join(samples, new)
    with torch.set_grad_enabled(update_student):
        velocity = student(noisy, objective.model_time(time), *inputs.arguments()).float()  # [B + n, C, h, w]
        fake = objective.denoise(noisy[: len(times)], velocity[: len(times)], times)  # [B, C, h, w]
    flow_loss = torch.zeros((), device=times.device)
    if anchored:
        flow_loss = (velocity[len(times) :] - objective.target(new.clean, *flow)).square().mean()

    # 2. The discriminator sees fake and real with the same noise, some of the real ones with a little more of it, and
    # some of the real ones with the text and conditions of their neighbours
    some = slice(None, None, PART)
    noised_fake = objective.corrupt(fake, draws.discriminator_noise, draws.time)  # [B, C, h, w]
    noised_real = objective.corrupt(samples.clean, draws.discriminator_noise, draws.time)
    part = noised_real[some]  # [ceil(B / PART), C, h, w]
    given = [noised_fake, noised_real, part + d.penalty_noise * draws.penalty_noise]
    at = [draws.time, draws.time, draws.time[some]]
    asked = [samples, samples, samples.rows(some)]
    if d.mismatch:
        given.append(part)
        at.append(draws.time[some])
        asked.append(Samples(*(tensor.roll(1, dims=0)[some] for tensor in samples)))
    logits = discriminator(torch.cat(given), objective.model_time(torch.cat(at)), *join(*asked).arguments())
    of_fake, of_real, of_penalty, *of_mismatch = logits.split([len(x) for x in given])  # [., F, N] each

    # 3. Losses; the gradient that enters the student is that of softplus(D(real) - D(fake)) instead, up to the mean
    # over a sample's tokens of the ratio of the two derivatives
    adversarial = F.softplus(of_fake - of_real).mean()
    penalty = (of_penalty - of_real[some]).square().mean()
    mismatch = F.softplus(of_mismatch[0] - of_real[some]).mean() if of_mismatch else torch.zeros_like(penalty)
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
    return Result(loss, estimates, {name: value.detach() for name, value in report.items()})


@dataclasses.dataclass(kw_only=True)
class Trainer:
    """What a student's training updates and saves."""

    student: Learner
    """The student with its averages; counts the images."""
    backbone: Learner
    """The discriminator's copy of the teacher."""
    heads: Learner
    """The discriminator's heads."""
    frozen_images: int
    """Images during which the backbone is frozen."""
    rollout: Samples | None = None
    """The samples that continue at the next time, with the student's estimates; none before the first step."""

    def freeze(self) -> None:
        """Freeze the backbone in stage 1 and release it in stage 2."""
        self.backbone.model.requires_grad_(self.student.seen >= self.frozen_images)

    def state(self) -> dict[str, Tensor]:
        """Every tensor that a resumed run needs, by name."""
        state = {}
        for prefix in ("student", "backbone", "heads"):
            state |= {f"{prefix}/{name}": value for name, value in getattr(self, prefix).state().items()}
        rollout = {} if self.rollout is None else self.rollout._asdict()
        return state | {f"rollout/{name}": value for name, value in rollout.items()}

    def resume(self, run: Path) -> None:
        """Continue from the newest checkpoint in `run`, if there is one.

        Raises:
            InputError: it cannot be read, or is of another network.
        """
        path = newest(run)
        if path is not None:
            found = entries(path)
            self.student.seen = int(path.name)
            self.freeze()
            for prefix in ("student", "backbone", "heads"):
                getattr(self, prefix).make_room(part_of(found, prefix))
            rollout = part_of(found, "rollout")
            if rollout.keys() == set(Samples._fields):
                device = next(self.student.model.parameters()).device
                places = (rollout[name] for name in Samples._fields)
                self.rollout = Samples(
                    *(torch.empty(place.size, dtype=place.properties.dtype, device=device) for place in places)
                )
            fill(self.state(), path, found, self.student.world)
        self.freeze()


def part_of(found: Mapping[str, TensorStorageMetadata], prefix: str) -> dict[str, TensorStorageMetadata]:
    """The entries below a prefix, without it."""
    start = f"{prefix}/"
    return {name.removeprefix(start): entry for name, entry in found.items() if name.startswith(start)}


def train_student(recipe: StudentRecipe, run: Path) -> Path:
    """Train, or resume, in the folder `run`.

    Returns:
        The published pipeline, `run/model`.

    Raises:
        InputError: the teacher, data or an earlier checkpoint do not fit the recipe, there are several processes, or
            another process trains in `run`.
        TryAgain: a non-finite loss or gradient, or SIGTERM, after which a checkpoint is saved: the same command
            continues.
    """
    if parallel.rank_and_world()[1] > 1:
        raise InputError("kind 'student' is trained by one process: run `likeness train` without torchrun")
    with ExitStack() as stack:
        training, network, components, objective = begin(recipe)
        stack.enter_context(held(run))
        keep_recipe(recipe, run, FREE_STUDENT)
        return learn(recipe, training, network, components, objective, run, stack.enter_context(terminations()))


def begin(recipe: StudentRecipe) -> tuple[TrainRecipe, Any, Components, RectifiedFlow]:
    """Read the teacher and check the recipe.

    Returns:
        The recipe in the form of a transformer's, for what all trainings share; the teacher's network, in float32;
        its components, with the sampler of few-step models; its objective.

    Raises:
        InputError: the teacher is not a flow model that was trained here, or the recipe does not fit it.
    """
    check_student(recipe)
    folder = find(recipe.teacher)
    index = read_json(folder / "model_index.json") if (folder / "model_index.json").is_file() else {}
    kind, settings = index.get("_class_name"), index.get("objective") or {"name": "rectified_flow"}
    if kind not in ("MMFacePipeline", "MDiTFacePipeline"):
        raise InputError(f"the teacher {recipe.teacher} is {kind or 'an adapter'}, not an MMFace or MDiTFace pipeline")
    objective = make_objective(settings)
    if not isinstance(objective, RectifiedFlow):
        raise InputError(f"the teacher {recipe.teacher} is not a flow model: its objective is {settings['name']}")
    network = load_part(folder / "transformer", *index["transformer"]).float()
    if network.config.get("guidance_embeds"):
        raise InputError(f"the teacher {recipe.teacher} is guidance-distilled: it must be a plain flow model")
    components = dataclasses.replace(load_components(folder), scheduler=objective.renoising_scheduler())
    defaults = {"steps": recipe.steps, "guidance_scale": 1.0, "guidance_interval": [0.0, 1.0], **recipe.defaults}
    training = TrainRecipe(
        network=sizes_of(network),
        objective=objective.config(),
        data=recipe.data,
        optimizer=recipe.optimizer,
        defaults={"size": index["defaults"]["size"], **defaults},
        preview=recipe.preview,
        start=recipe.teacher,
        seed=recipe.seed,
        precision=recipe.precision,
        threads=recipe.threads,
        log_every=recipe.log_every,
        checkpoint_every=recipe.checkpoint_every,
        keep=recipe.keep,
    )
    check(training)
    if unknown := [name for name in condition_names(training) if name not in network.config.condition_names]:
        raise InputError(f"the teacher {recipe.teacher} was not trained with {unknown[0]}, which condition_shares has")
    if kind == "MMFacePipeline":
        check_single_conditions(recipe.data)
    layers, _, _ = blocks_of(network)
    if wrong := [index for index in recipe.discriminator.blocks if not 0 <= index < len(layers)]:
        raise InputError(f"discriminator.blocks has {wrong[0]}, but the teacher's blocks are 0 to {len(layers) - 1}")
    wishes(training)
    return training, network, components, objective


def sizes_of(network: Any) -> MMFaceNetwork | MDiTFaceNetwork:
    """A network in the words of a recipe."""
    c = network.config
    if isinstance(network, MMFaceTransformer):
        return MMFaceNetwork(patch_size=c.patch_size, hidden_size=c.hidden_size, depth=c.depth, heads=c.heads)
    return MDiTFaceNetwork(
        name="mditface",
        hidden_size=c.num_attention_heads * c.attention_head_dim,
        depth=c.num_layers,
        single_depth=c.num_single_layers,
        heads=c.num_attention_heads,
    )


def learn(
    recipe: StudentRecipe,
    training: TrainRecipe,
    network: Any,
    components: Components,
    objective: RectifiedFlow,
    run: Path,
    told: Sequence[int],
) -> Path:
    """The training itself, in a folder that is locked; it ends early when `told` is no longer empty."""
    # 1. Build
    if recipe.threads:
        torch.set_num_threads(recipe.threads)
    o, d = recipe.optimizer, recipe.discriminator
    world = parallel.World(device="cuda" if torch.cuda.is_available() else "cpu")
    stores = open_stores(training, recipe.data.shards, components)
    torch.manual_seed(recipe.seed)  # initial weights of the heads only; every later draw has its own stream
    discriminator = Discriminator(network, d.blocks, d.width).to(world.device).train()
    student = network.to(world.device).train()
    if not stores[0].text_hash:
        components.text_encoder.to(world.device)
    adamw = lambda module, rate: torch.optim.AdamW(  # noqa: E731
        module.parameters(), lr=rate, betas=o.betas, weight_decay=0.0, fused=True
    )
    trainer = Trainer(
        student=Learner(
            model=student,
            optimizers=make_optimizers(student, o),
            averages=[Ema(student, width) for width in (o.ema, *o.ema_choices)],
            world=world,
        ),
        backbone=Learner(
            model=discriminator.backbone, optimizers=[adamw(discriminator.backbone, d.learning_rate)], averages=[]
        ),
        heads=Learner(
            model=discriminator.heads, optimizers=[adamw(discriminator.heads, d.head_learning_rate)], averages=[]
        ),
        frozen_images=d.frozen_images,
    )
    learner = trainer.student

    # 2. Resume
    trainer.resume(run)
    if recipe.compile:
        student.compile(dynamic=False)
        discriminator.compile(dynamic=False)

    # 3. Train
    passed_over = non_finite_batches(run)
    starts = [start for start in range(learner.seen, o.images, o.batch) if start not in passed_over]
    schedule = torch.tensor(objective.schedule(recipe.steps)["sigmas"], dtype=torch.float32, device=world.device)  # [K]
    times = schedule.repeat_interleave(o.batch)  # [B]
    reporter = Reporter(run, o.images, learner.seen, recipe)
    recent: list[tuple[int, Tensor, Tensor]] = []  # start, loss and gradient norm of each step since the last report
    reports: list[dict[str, Tensor]] = []
    for start, (batch,) in zip(starts, read_batches(training, stores, student, components, world, starts), strict=True):
        before, learner.seen = learner.seen, start
        update_student = start >= d.warmup
        with torch.autocast(world.kind, torch.bfloat16, enabled=recipe.precision == "bf16"):
            samples = next_samples(trainer.rollout, batch, components, recipe.steps, world.device)
            draws = Draws(*(x.to(world.device) for x in draw(d, recipe.seed, start, tuple(samples.clean.shape))))
            flow = batch.noise.to(world.device), objective.sample_time(batch.uniform.to(world.device))
            loss, estimates, report = losses_of(
                student, discriminator, objective, recipe, samples, times, draws, flow, update_student
            )
        loss.backward()
        report["heads_gradient"] = trainer.heads.step(d.head_learning_rate, o.clip)
        if start >= d.frozen_images:
            report["backbone_gradient"] = trainer.backbone.step(d.learning_rate, o.clip)
        rate = student_rate(recipe, start)
        if update_student:
            report["student_gradient"] = learner.step(rate, o.clip)
        continuing = samples.rows(slice(len(times) - o.batch))  # [B - n] samples have another time
        trainer.rollout = continuing._replace(previous=estimates[: len(times) - o.batch]) if recipe.steps > 1 else None
        learner.count(o.batch)
        trainer.freeze()
        norms = [report[name] for name in report if name.endswith("_gradient")]
        recent.append((start, loss.detach(), torch.stack(norms).norm()))
        reports.append(report)

        # 4. Report and save
        seen, last = learner.seen, start == starts[-1]
        stop = bool(told) and not last
        report_now, keep_now = (
            last or seen // every != before // every for every in (recipe.log_every, recipe.checkpoint_every)
        )
        if not (report_now or keep_now or stop):
            continue
        finite(recent, run, o.batch, world)
        if report_now:
            reporter.report(seen, **mean_of(reports), learning_rate=rate)
            recent.clear()
            reports.clear()
        if keep_now:
            save(training, learner, components, objective, run, last, trainer.state())
        elif stop:  # little time is left: publishing can wait
            save_state(run, seen, trainer.state(), recipe.keep)
        if stop:
            raise TryAgain(f"stopped by SIGTERM after {seen:,} images: run the same command again to continue")
    reporter.close()
    return run / "model"


def next_samples(rollout: Samples | None, batch: Batch, components: Components, steps: int, device: str) -> Samples:
    """The samples of a step: n new ones, which start from noise, and those that continue. At the first step the new
    ones take all places, with data in the place of estimates.
    """
    with torch.no_grad():
        text = components.text_features(batch.captions) if batch.text is None else batch.text
    parts = (batch.clean, batch.clean, batch.condition_latents, batch.condition_index, *text)
    new = Samples(*(x.to(device) for x in parts))
    continuing = [new] * (steps - 1) if rollout is None else [rollout]
    return join(new, *continuing)  # [K n]


def student_rate(recipe: StudentRecipe, start: int) -> float:
    """The student's learning rate in the step that begins at image `start`. Each stage has a warm-up of its own; in
    stage 1 the rate is constant.
    """
    o, d = recipe.optimizer, recipe.discriminator
    if start < d.frozen_images:
        peak = recipe.frozen_learning_rate or o.learning_rate
        return learning_rate(max(start - d.warmup, 0), o.images, peak, o.warmup, "constant")
    begun = max(d.frozen_images, d.warmup)
    return learning_rate(max(start - begun, 0), o.images - begun, o.learning_rate, o.warmup, o.decay)


def mean_of(reports: Sequence[Mapping[str, Tensor]]) -> dict[str, float]:
    """The mean of each number over the steps that have it."""
    names = dict.fromkeys(name for report in reports for name in report)
    columns = {name: [report[name].float() for report in reports if name in report] for name in names}
    return {name: torch.stack(values).mean().item() for name, values in columns.items()}
