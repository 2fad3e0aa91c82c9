"""The training of a transformer: build, resume, then for every batch: step, diagnose, report, save.

Progress is counted in images, and every random number is a function of (seed, position): an interrupted and resumed run
gives the weights of an uninterrupted one, and neither the number of processes nor the size of a micro-batch changes the
data of a step. To resume, run the same command again.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from likeness import parallel
from likeness.encoders.components import load_components
from likeness.models.layers import use_explicit_attention
from likeness.objectives import make_objective
from likeness.parallel import World, set_gradient_sync, shard_model
from likeness.train.batches import open_stores, read_batches
from likeness.train.checkpoint import newest
from likeness.train.config import AdapterNetwork, TrainRecipe, check, micro_batch
from likeness.train.diagnostics import Diagnostics
from likeness.train.ema import Ema
from likeness.train.features import ParserFeatures
from likeness.train.losses import AlignmentLoss, blocks_of, denoising_losses
from likeness.train.networks import (
    adapter_of,
    build_network,
    check_same_components,
    freeze_others,
    load_initial_weights,
    with_precision,
)
from likeness.train.optim import learning_rate, make_optimizers
from likeness.train.progress import Progress
from likeness.train.publish import Publication, checkpoint, preview, preview_requests
from likeness.train.run_folder import open_run, record_data, record_frozen
from likeness.train.train_state import TrainState
from likeness.types import PortraitRequest
from likeness.weights.catalog import BUNDLED, COMMON, find_model


def train(recipe: TrainRecipe, run: Path) -> Path:
    """Train, or resume, in the folder `run`; in one process, or as one of the processes that torchrun started. Return
    the published pipeline, `run/model`.

    Raises:
        InputError: data, components, processes or an earlier checkpoint do not fit the recipe.
        TryAgain: another process trains in `run`, a loss or gradient is not finite (the batch is recorded and skipped
            when resuming), or SIGTERM was received (a checkpoint was saved). The same command resumes.
    """
    world = parallel.init_world(recipe.sharding)
    with world.joint_errors():
        check(recipe)
        make_objective(recipe.objective)
        micro_batch(recipe, world.size)
        previews = preview_requests(recipe)
    with open_run(recipe, run, world) as signals:
        train_in(run, recipe, world, previews, signals)
    return run / "model"


def train_in(
    run: Path, recipe: TrainRecipe, world: World, previews: Sequence[PortraitRequest], signals: Sequence[int]
) -> None:
    """Train in a locked folder; stop early if `signals` is not empty."""
    # 1. Build
    recipe = with_precision(recipe, world.device_type)
    with world.joint_errors():
        adapter = adapter_of(recipe) if isinstance(recipe.network, AdapterNetwork) else None
        components = load_components(recipe.data.components or (adapter.base if adapter else BUNDLED / COMMON))
        patch_size = getattr(recipe.network, "patch_size", 2)
        stores = open_stores(recipe, recipe.data.shards, components, patch_size)
        if world.main:
            record_data(stores, run, recipe.data)
        validation = open_stores(recipe, recipe.data.validation, components, patch_size)
        objective = make_objective(recipe.objective)
        torch.manual_seed(recipe.seed)  # for the initial weights; later random numbers have their own generators
        widths = [encoder.config.hidden_size for encoder in components.text_encoders]
        model: Any = build_network(
            recipe,
            channels=stores[0][0].latents.shape[0],
            text_dim=widths[-1],
            pooled_dim=widths[0],
            text_tokens=components.settings["max_text_tokens"],
        )
        if recipe.init_from and (recipe.trainable or not newest(run)):  # a checkpoint contains the trainable weights
            load_initial_weights(model, recipe.init_from, objective, components)
        if adapter:
            check_same_components(find_model(adapter.base), components)
        if newest(run):
            check_same_components(run / "model", components)
        freeze_others(model, recipe.trainable)
        if world.main:
            record_frozen(model, run)
    if recipe.network.gradient_checkpointing:
        model.enable_gradient_checkpointing()
    use_explicit_attention(model, world.device_type == "cpu" and recipe.precision == "bf16")
    alignment = None
    if recipe.alignment_weight:
        features = ParserFeatures(recipe.face_parser, components, stores, run, patch_size, world)
        alignment = AlignmentLoss(model, features)
    model.to(world.device).train()
    shard_model(model, world, recipe.precision)
    if not stores[0].text_hash:  # the shards have no text features
        for encoder in components.text_encoders:
            encoder.to(world.device)
    o = recipe.optimizer
    state = TrainState(
        model=model,
        optimizers=make_optimizers(model, o),
        emas=[Ema(model, width) for width in (o.ema, *o.posthoc_emas)],
        world=world,
    )
    publication = Publication(
        components=components, objective=objective, defaults=recipe.defaults, previews=previews, adapter=adapter
    )

    # 2. Resume
    state.resume(run)
    if recipe.compile and world.mesh is None:
        model.compile(dynamic=False)
    elif recipe.compile:
        for block in blocks_of(model)[0]:  # `compile_repeated_blocks` does not find the classes of sharded blocks
            block.compile(dynamic=False)

    # 3. Train
    progress = Progress(run, state, o.images, o.batch, signals, recipe)
    diagnostics = None
    if recipe.diagnostics_every:
        diagnostics = Diagnostics(recipe, state, components, objective, validation or stores)
    if recipe.init_from and not state.images_seen:  # before the first step, to compare with
        if diagnostics:
            diagnostics.report(progress.reporter)
        preview(progress, publication)
    names, micro = list(model.config.condition_names), micro_batch(recipe, world.size)
    batches = read_batches(recipe, stores, names, components.settings, world, progress.starts, micro, patch_size)
    for start, micro_batches in progress.steps(batches):
        rate = learning_rate(start, o.images, o.learning_rate, o.warmup, o.decay)
        loss, misalignment = torch.zeros(2, device=world.device)
        for number, batch in enumerate(micro_batches, start=1):
            set_gradient_sync(model, world, last=number == len(micro_batches))
            inputs = batch.with_text(components).to(world.device)
            with world.autocast(recipe.precision):
                part = denoising_losses(model, objective, inputs).mean() / len(micro_batches)
                unaligned = alignment(inputs) / len(micro_batches) if alignment else torch.zeros_like(part)
            (part + recipe.alignment_weight * unaligned).backward()
            loss += part.detach()
            misalignment += unaligned.detach()
        if diagnostics:
            diagnostics.watch(micro_batches)
        norm = state.step(rate, o.max_grad_norm)
        progress.end_step(loss=loss, gradient_norm=norm, **({"alignment": misalignment} if alignment else {}))

        # 4. Diagnose, report and save
        if diagnostics and progress.due(recipe.diagnostics_every):
            progress.check_finite()
            diagnostics.report(progress.reporter)
        if progress.due(recipe.log_every):
            progress.report(learning_rate=rate)
        checkpoint(progress, publication, recipe)
