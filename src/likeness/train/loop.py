"""The training loop: build, resume, then for every batch: step, average, look, save.

Progress is counted in images, and every random number is a function of (seed, position): a run that was stopped
anywhere and started again gives the weights of one that never was, and neither the number of processes nor the size of
a micro-batch changes what is learnt from. "To resume, run the same command again."
"""

from __future__ import annotations

import json
import signal
import sys
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from likeness import parallel
from likeness.data.ahead import read_ahead
from likeness.data.sampler import Sampler
from likeness.data.store import Sample, Store
from likeness.encoders.latent import spatial_factor
from likeness.files import write_whole
from likeness.objectives import Objective, make_objective
from likeness.parallel import World, mean_over_ranks, shard_model, spread_again, synchronise
from likeness.pipelines.catalogue import BUNDLED, COMMON
from likeness.pipelines.load import Components, load_components
from likeness.train.canary import Canary
from likeness.train.checkpoint import newest, save_state
from likeness.train.config import FREE, MDiTFaceAdapter, TrainRecipe, check, micro_batch
from likeness.train.learner import Learner
from likeness.train.metrics import Reporter
from likeness.train.networks import build_network, choose_trained, condition_names, same_codec, share_of, start_from
from likeness.train.optim import Ema, learning_rate, make_optimizers
from likeness.train.page import write_page
from likeness.train.posthoc import keep_averages
from likeness.train.publish import averaged_pipeline, preview, publish, wishes
from likeness.train.run import held, keep_recipe
from likeness.train.step import Batch, loss_of, make_batch
from likeness.types import InputError, TextFeatures, TryAgain

NON_FINITE = "non_finite.jsonl"
"""The batches whose loss or gradient was not a number; a run that goes on passes them over."""
MOST_NON_FINITE = 3
"""With more such batches it is not the data."""


def train(recipe: TrainRecipe, run: Path) -> Path:
    """Train, or go on training, in the folder `run`; by itself, or as one of the processes that torchrun started.

    Returns:
        The published pipeline, `run/model`.

    Raises:
        InputError: data, components, processes or an earlier state do not fit the recipe, or another process trains in
            `run`.
        TryAgain: a loss or gradient is no number: the batch is recorded, and the same command goes on from the last
            checkpoint without it. Or the process was told to terminate: a state is written, and the same command goes
            on from there.
    """
    world = parallel.begin(recipe.layout)
    with ExitStack() as stack:
        with world.together():
            check(recipe)
            micro_batch(recipe, world.size)  # before anything is written, as are the previews' files
            wishes(recipe)
            if world.main:
                stack.enter_context(held(run))
                keep_recipe(recipe, run, FREE)
        return learn(recipe, run, world, stack.enter_context(terminations()))


def learn(recipe: TrainRecipe, run: Path, world: World, told: Sequence[int]) -> Path:
    """The training itself, in a folder that is held; it ends early when `told` is no longer empty."""
    # 1. Build
    with world.together():
        if recipe.threads:
            torch.set_num_threads(recipe.threads)
        base = recipe.network.base if isinstance(recipe.network, MDiTFaceAdapter) else BUNDLED / COMMON
        components = load_components(recipe.data.components or base)
        stores = open_stores(recipe, recipe.data.shards, components)
        unseen = open_stores(recipe, recipe.data.validation, components)
        objective = make_objective(recipe.objective)
        torch.manual_seed(recipe.seed)  # initial weights only; every later draw has a stream of its own
        model: Any = build_network(
            recipe,
            channels=stores[0][0].latents.shape[0],
            text_dim=components.text_encoder.config.hidden_size,
            pooled_dim=components.text_encoder.config.hidden_size,
            text_tokens=components.settings["max_text_tokens"],
        )
        start_from(model, recipe, components)
        if newest(run):
            same_codec(run / "model", components)
        choose_trained(model, recipe)
    if recipe.network.gradient_checkpointing:
        model.enable_gradient_checkpointing()
    model.to(world.device).train()
    shard_model(model, world, recipe.precision)
    for tower in (components.text_encoder, components.text_encoder_2):
        if tower is not None and not stores[0].text_hash:
            tower.to(world.device)
    learner = Learner(
        model=model,
        optimizers=make_optimizers(model, recipe.optimizer),
        averages=[Ema(model, width) for width in (recipe.optimizer.ema, *recipe.optimizer.ema_choices)],
        world=world,
    )

    # 2. Resume
    learner.resume(run)
    if recipe.compile and world.mesh is None:
        model.compile(dynamic=False)
    elif recipe.compile:
        model.compile_repeated_blocks(dynamic=False)

    # 3. Train
    total, size = recipe.optimizer.images, recipe.optimizer.batch
    passed_over = non_finite_batches(run)
    starts = [start for start in range(learner.seen, total, size) if start not in passed_over]
    with world.together():
        reporter = Reporter(run, total, learner.seen, recipe) if world.main else None
    canary = Canary(recipe, learner, components, objective, unseen or stores) if recipe.canary_every else None
    recent: list[tuple[int, Tensor, Tensor]] = []  # start, loss and gradient norm of each step since the last report
    for start, batches in zip(starts, read_batches(recipe, stores, model, components, world, starts), strict=True):
        before, learner.seen = learner.seen, start
        rate = learning_rate(
            start, total, recipe.optimizer.learning_rate, recipe.optimizer.warmup, recipe.optimizer.decay
        )
        loss = torch.zeros((), device=world.device)
        for number, batch in enumerate(batches, start=1):
            synchronise(model, world, last=number == len(batches))
            text = components.text_features(batch.captions) if batch.text is None else batch.text
            text = TextFeatures(*(part.to(world.device) for part in text))
            clean, noise, uniform, conditions, index = (x.to(world.device) for x in batch[:5])
            with torch.autocast(world.kind, torch.bfloat16, enabled=recipe.precision == "bf16"):
                times = objective.sample_time(uniform)
                part = loss_of(model, objective, clean, noise, times, text, conditions, index) / len(batches)
            part.backward()
            loss += part.detach()
        if canary:
            canary.watch(batches)
        norm = learner.step(rate, recipe.optimizer.clip)
        learner.count(size)
        recent.append((start, loss, norm))

        # 4. Look, report and save
        seen, last = learner.seen, start == starts[-1]
        stop = not world.agree(not told) and not last
        look, report, keep = (
            every > 0 and (last or seen // every != before // every)
            for every in (recipe.canary_every, recipe.log_every, recipe.checkpoint_every)
        )
        if not (look or report or keep or stop):
            continue
        mean, gradient = finite(recent, run, size, world)
        if canary and look:
            values, sentences = canary.look()
            if reporter:
                reporter.canary(seen, values, sentences)
        if report:
            if reporter:
                reporter.report(seen, loss=mean, gradient_norm=gradient, learning_rate=rate)
            recent.clear()
        if keep:
            save(recipe, learner, components, objective, run, last)
        elif stop:  # its end is near: what is published can wait
            save_state(run, seen, learner.state(), recipe.keep, world)
        if stop:
            raise TryAgain(f"told to end after {seen:,} images: run the same command again to go on")
    if reporter:
        reporter.close()
    return run / "model"


def save(
    recipe: TrainRecipe,
    learner: Learner,
    components: Components,
    objective: Objective,
    run: Path,
    last: bool,
    state: Mapping[str, Tensor] | None = None,
) -> None:
    """Publish, preview, and write a state, in this order: whoever finds a state finds what it published. Where the disk
    is full the run goes on, and the next checkpoint tries again; the last one must succeed. `state` replaces the
    learner's own, for trainings that have more to save.
    """
    adapted = isinstance(recipe.network, MDiTFaceAdapter)
    pipeline, weights = averaged_pipeline(recipe, learner, components, objective)
    try:
        with learner.world.together():
            if learner.world.main:
                publish(recipe, pipeline, weights, components, run)
        with learner.world.together(), torch.autocast(learner.world.kind, torch.bfloat16, enabled=adapted):
            if pipeline:
                preview(recipe, pipeline, run, learner.seen, learner.world)
    except InputError as error:
        go_on(error, last)
    finally:
        if adapted:
            spread_again(learner.model)
            learner.averages[0].swap()
            learner.model.train()
    try:
        keep_averages(learner, run)
        save_state(run, learner.seen, learner.state() if state is None else state, recipe.keep, learner.world)
        if learner.world.main:
            write_page(run)
    except InputError as error:
        go_on(error, last)


def go_on(error: InputError, last: bool) -> None:
    """Say what could not be written, and go on; at the end of a run, stop."""
    if last:
        raise error
    print(f"{error}; training goes on", file=sys.stderr, flush=True)


@contextmanager
def terminations() -> Iterator[list[int]]:
    """The SIGTERMs that come within a `with` block: so schedulers announce the end. Python hands them to its main
    thread only; in another one none are seen.
    """
    told: list[int] = []
    if threading.current_thread() is not threading.main_thread():
        yield told
        return
    before = signal.signal(signal.SIGTERM, lambda number, _: told.append(number))
    try:
        yield told
    finally:
        signal.signal(signal.SIGTERM, before or signal.SIG_DFL)


def open_stores(recipe: TrainRecipe, folders: Sequence[str], components: Components) -> list[Store]:
    """These stores, all encoded with these very components, at the size that will be published."""
    stores = [Store(folder) for folder in folders]
    towers = {store.text_hash for store in stores}
    if len(towers) > 1:
        raise InputError("some of the recipe's shards have text features and others not, or others: encode all alike")
    if towers - {None} and towers != {components.text_hash()}:
        raise InputError(f"{stores[0].folder} has text features of another text encoder: encode it again")
    if empty := [store.folder for store in stores if not len(store)]:
        raise InputError(f"{empty[0]} holds no face: encode a folder that has some")
    sizes, patch = {tuple(store[0].latents.shape) for store in stores}, getattr(recipe.network, "patch_size", 2)
    if len(sizes) > 1:
        raise InputError(f"the recipe's shards differ in size ({sorted(sizes)}, channels first): encode all alike")
    if any(side % patch for _, *sides in sizes for side in sides):
        raise InputError(f"latents of {sorted(sizes)[0]}, channels first, cannot be cut into patches of {patch}")
    factor, size = spatial_factor(components.vae), recipe.defaults.get("size")
    if other := {factor * side for _, *sides in sizes for side in sides} - {size}:
        raise InputError(
            f"{stores[0].folder} holds faces of {other.pop()} px, but the recipe's defaults.size is "
            f"{'not given' if size is None else size}: the two must be the same"
        )
    for store in stores:
        if not components.same_encoder(store.manifest["codec"]):
            raise InputError(f"{store.folder} was encoded with another encoder: encode it again")
        for name in condition_names(recipe):
            if name not in store.conditions and share_of(recipe, name):
                raise InputError(f"{store.folder} has no {name}, but the recipe's condition_shares ask for it")
    return stores


def read_batches(
    recipe: TrainRecipe, stores: list[Store], model: Any, components: Components, world: World, starts: Sequence[int]
) -> Iterator[list[Batch]]:
    """For each step, which begins with the image number in `starts`, this process's micro-batches, read ahead by a
    thread. Position p of a step goes to micro-batch p // m, and micro-batches to processes in turn.
    """
    ends = [sum(len(store) for store in stores[: i + 1]) for i in range(len(stores))]
    sampler = Sampler(ends[-1], recipe.seed)
    names = list(model.config.condition_names)
    mean, std = (
        torch.tensor(components.settings[key], dtype=torch.float32).reshape(1, -1, 1, 1)
        for key in ("latent_mean", "latent_std")
    )
    micro = micro_batch(recipe, world.size)

    def sample_at(position: int) -> Sample:
        index = sampler[position]
        store = next(i for i, end in enumerate(ends) if index < end)
        return stores[store][index - (ends[store - 1] if store else 0)]

    def make(start: int) -> list[Batch]:
        made = []
        for first in range(start + world.rank * micro, start + recipe.optimizer.batch, world.size * micro):
            positions = range(first, first + micro)
            samples = [sample_at(position) for position in positions]
            made.append(make_batch(samples, positions, recipe.data, names, mean, std, recipe.seed))
        return made

    return read_ahead(make, starts, depth=4, threads=1)


def finite(recent: Sequence[tuple[int, Tensor, Tensor]], run: Path, batch: int, world: World) -> tuple[float, float]:
    """The mean loss of these steps and their last gradient norm, over all processes.

    Raises:
        TryAgain: in every process alike, one of them is not finite; the batch is recorded first.
    """
    losses = mean_over_ranks(torch.stack([loss for _, loss, _ in recent]), world)
    norms = torch.stack([norm for _, _, norm in recent])
    good = (losses.isfinite() & norms.isfinite()).tolist()
    if all(good):
        return losses.mean().item(), norms[-1].item()
    number = good.index(False)
    start, loss, norm = recent[number][0], losses[number].item(), norms[number].item()
    with world.together():
        line = {"start": start, "positions": [start, start + batch - 1], "loss": str(loss), "gradient_norm": str(norm)}
        earlier = (run / NON_FINITE).read_text() if (run / NON_FINITE).is_file() else ""
        if world.main:
            write_whole(run / NON_FINITE, earlier + json.dumps(line) + "\n")
    raise TryAgain(
        f"the loss is {loss} and the gradient norm {norm} in the batch of images {start} to {start + batch - 1} "
        f"(recorded in {run / NON_FINITE}): run the same command again to go on from the last checkpoint without it, "
        "or lower the learning rate"
    )


def non_finite_batches(run: Path) -> set[int]:
    """Where the batches begin that are passed over.

    Raises:
        InputError: there are too many.
    """
    path = run / NON_FINITE
    lines = path.read_text().splitlines() if path.is_file() else []
    if len(lines) > MOST_NON_FINITE:
        raise InputError(
            f"{path} names {len(lines)} batches whose loss or gradient is not finite: lower the learning rate in a new "
            "run, or delete the file to try them again"
        )
    return {json.loads(line)["start"] for line in lines}
