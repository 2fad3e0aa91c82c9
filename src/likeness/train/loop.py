"""The training loop: build, resume, then for every batch: step, average, report, save, preview.

Progress is counted in images, and every random number is a function of (seed, position): a run that was stopped
anywhere and started again gives the weights of one that never was. "To resume, run the same command again."
"""

from __future__ import annotations

import json
import os
import shutil
import time as clock
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from likeness.config import to_dict
from likeness.data.ahead import read_ahead
from likeness.data.sampler import Sampler
from likeness.data.store import Sample, Store
from likeness.files import write_whole
from likeness.objectives import Objective, make_objective
from likeness.pipelines.adapters import save_adapter
from likeness.pipelines.catalogue import BUNDLED, COMMON
from likeness.pipelines.generate import generate, resolve
from likeness.pipelines.load import Components, load_components
from likeness.pipelines.mditface import MDiTFacePipeline
from likeness.pipelines.mmface import MMFacePipeline
from likeness.train.checkpoint import load_state, save_state
from likeness.train.config import MDiTFaceAdapter, TrainRecipe
from likeness.train.metrics import Reporter
from likeness.train.networks import adapter_of, build_network, condition_names
from likeness.train.optim import Ema, clip_gradients, learning_rate, load_trained, make_optimizers, trained_parameters
from likeness.train.step import Batch, loss_of, make_batch
from likeness.types import InputError, PortraitRequest, TextFeatures

PIPELINE_OF = {"mmface": MMFacePipeline, "mditface": MDiTFacePipeline, "mditface_adapter": MDiTFacePipeline}
"""Network of a recipe -> the pipeline that is published with it."""


def train(recipe: TrainRecipe, run: Path) -> Path:
    """Train, or go on training, in the folder `run`.

    Returns:
        The published pipeline, `run/model`.

    Raises:
        InputError: data, components or an earlier state do not fit the recipe.
    """
    # 1. Build
    run.mkdir(parents=True, exist_ok=True)
    keep_recipe(recipe, run)
    if recipe.threads:
        torch.set_num_threads(recipe.threads)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    base = recipe.network.base if isinstance(recipe.network, MDiTFaceAdapter) else BUNDLED / COMMON
    components = load_components(recipe.data.components or base)
    stores = open_stores(recipe, components)
    try:
        objective = make_objective(recipe.objective)
    except ValueError as error:
        raise InputError(f"the recipe's objective cannot be used: {error}") from error
    torch.manual_seed(recipe.seed)  # initial weights only; every later draw has a stream of its own
    model = build_network(
        recipe,
        channels=stores[0][0].latents.shape[0],
        text_dim=components.text_encoder.config.hidden_size,
        pooled_dim=components.text_encoder.config.hidden_size,
        text_tokens=components.settings["max_text_tokens"],
    )
    if recipe.network.gradient_checkpointing:
        model.enable_gradient_checkpointing()
    model.to(device).train()
    for tower in (components.text_encoder, components.text_encoder_2):
        if tower is not None and not stores[0].tower:
            tower.to(device)
    optimizers = make_optimizers(model, recipe.optimizer)
    ema = Ema(model, recipe.optimizer.ema)

    # 2. Resume
    seen = 0
    if state := load_state(run):
        load_trained(model, state["model"])
        for optimizer, saved in zip(optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
        ema.weights = {name: weight.to(device) for name, weight in state["ema"].items()}
        seen = state["seen"]

    # 3. Train
    if recipe.compile:
        model.compile(dynamic=False)
    total, size = recipe.optimizer.images, recipe.optimizer.batch
    reporter = Reporter(run, total, seen)
    losses: list[torch.Tensor] = []
    norm = torch.zeros(())
    for batch in batches(recipe, stores, model, components, seen):
        rate = learning_rate(
            seen, total, recipe.optimizer.learning_rate, recipe.optimizer.warmup, recipe.optimizer.decay
        )
        for group in (group for optimizer in optimizers for group in optimizer.param_groups):
            group["lr"] = rate
        text = components.text_features(batch.captions) if batch.text is None else batch.text
        text = TextFeatures(*(part.to(device) for part in text))
        clean, noise, uniform, conditions, index = (x.to(device) for x in batch[:5])
        with torch.autocast(device, torch.bfloat16, enabled=recipe.precision == "bf16"):
            times = objective.sample_time(uniform)
            loss = loss_of(model, objective, clean, noise, times, text, conditions, index)
        loss.backward()
        norm = clip_gradients(trained_parameters(model).values(), recipe.optimizer.clip)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        seen += size
        ema.update(model, seen // size)
        losses.append(loss.detach())

        # 4. Report and save
        if crossed(seen, size, recipe.log_every) or seen >= total:
            mean = torch.stack(losses).mean().item()
            if not torch.isfinite(torch.tensor(mean)):
                raise InputError(
                    f"the loss is {mean} after {seen} images: lower the learning rate; the last checkpoint is intact"
                )
            reporter.report(seen, loss=mean, gradient_norm=norm.item(), learning_rate=rate)
            losses.clear()
        if crossed(seen, size, recipe.checkpoint_every) or seen >= total:
            state = {"model": trained_parameters(model), "ema": ema.weights, "seen": seen}
            state["optimizers"] = [optimizer.state_dict() for optimizer in optimizers]
            save_state(run, seen, state, recipe.keep)
            pipeline = publish(recipe, model, ema, components, objective, run)
            adapted = pipeline.transformer is model  # a base in bf16 with parts in float32
            with torch.autocast(device, torch.bfloat16, enabled=adapted):
                preview(recipe, pipeline, run, seen)
            if adapted:
                ema.swap(model)
                model.train()
    return run / "model"


def keep_recipe(recipe: TrainRecipe, run: Path) -> None:
    """Write the resolved recipe beside the results; a run begun with another one is refused."""
    path, values = run / "recipe.json", to_dict(recipe)
    if path.is_file():
        before = json.loads(path.read_text())
        # what changes speed, length or reports may change between starts
        free = ("threads", "compile", "log_every", "checkpoint_every", "keep", "preview", "defaults")
        before["optimizer"] = {**before["optimizer"], "images": recipe.optimizer.images}
        changed = [key for key in values if key not in free and before.get(key) != values[key]]
        if changed and (run / "checkpoints").is_dir():
            raise InputError(f"{run} was begun with another {changed[0]}: choose another folder, or restore the recipe")
    write_whole(path, json.dumps(values, indent=2))


def open_stores(recipe: TrainRecipe, components: Components) -> list[Store]:
    """The recipe's stores, all encoded with these very components."""
    stores = [Store(folder) for folder in recipe.data.shards]
    towers = {store.tower for store in stores}
    if len(towers) > 1:
        raise InputError("some of the recipe's shards have text features and others not, or others: encode all alike")
    if towers != {None} and towers != {components.text_hash()}:
        raise InputError(f"{stores[0].folder} holds text features of another text tower: encode it again")
    for store in stores:
        if store.manifest["codec"] != components.codec_hash:
            raise InputError(f"{store.folder} was encoded with another autoencoder: encode it again")
        for name in condition_names(recipe):
            if name not in store.conditions:
                raise InputError(f"{store.folder} has no {name}, but the recipe's condition_shares ask for it")
    return stores


def batches(recipe: TrainRecipe, stores: list[Store], model: Any, components: Components, seen: int) -> Iterator[Batch]:
    """Batches from image number `seen` to the end, read ahead by a thread."""
    ends = [sum(len(store) for store in stores[: i + 1]) for i in range(len(stores))]
    sampler = Sampler(ends[-1], recipe.seed)
    names = list(model.config.condition_names)
    mean, std = (
        torch.tensor(components.settings[key], dtype=torch.float32).reshape(1, -1, 1, 1)
        for key in ("latent_mean", "latent_std")
    )

    def sample_at(position: int) -> Sample:
        index = sampler[position]
        store = next(i for i, end in enumerate(ends) if index < end)
        return stores[store][index - (ends[store - 1] if store else 0)]

    def make(start: int) -> Batch:
        positions = range(start, start + recipe.optimizer.batch)
        samples = [sample_at(position) for position in positions]
        return make_batch(samples, positions, recipe.data, names, mean, std, recipe.seed)

    starts = range(seen, recipe.optimizer.images, recipe.optimizer.batch)
    return read_ahead(make, starts, depth=4, threads=1)


def publish(recipe: TrainRecipe, model: Any, ema: Ema, components: Components, objective: Objective, run: Path) -> Any:
    """Write the averaged network as `run/model`, a pipeline folder or an adapter's, whole or not at all.

    Returns:
        The pipeline with the averaged network. A base is too large to copy: an adapter's is the very network that is
        trained, and whoever calls has to `swap` the average out again.
    """
    adapted = isinstance(recipe.network, MDiTFaceAdapter)
    if adapted:
        averaged = model.eval()
        ema.swap(model)
    else:
        averaged = type(model).from_config(model.config)
        averaged.load_state_dict({name: value.cpu() for name, value in model.state_dict().items()})
        ema.copy_to(averaged)
        averaged.eval()
    parts = {name: getattr(components, name) for name in ("vae", "text_encoder", "tokenizer")}
    if components.text_encoder_2 is not None:
        parts |= {"text_encoder_2": components.text_encoder_2, "tokenizer_2": components.tokenizer_2}
    pipeline = PIPELINE_OF[recipe.network.name](
        transformer=averaged,
        scheduler=components.scheduler or objective.scheduler(),
        objective=objective.config(),
        defaults=recipe.defaults,
        **parts,
        **components.settings,
    )
    fresh, folder = run / "model.partial", run / "model"
    shutil.rmtree(fresh, ignore_errors=True)
    if adapted:
        save_adapter(model, fresh, adapter_of(recipe))
    else:
        pipeline.save_pretrained(fresh)
    write_whole(fresh / "codec.json", json.dumps({"codec": components.codec_hash}))
    if folder.exists():
        shutil.rmtree(folder)
    os.replace(fresh, folder)
    return pipeline


def preview(recipe: TrainRecipe, pipeline: Any, run: Path, seen: int) -> None:
    """Make the recipe's previews: the same code, so the same pixels, as `likeness generate` on the published model."""
    if not recipe.preview:
        return
    pipeline.set_progress_bar_config(disable=True)
    started = clock.monotonic()
    pictures = []
    for wish in recipe.preview:
        given = {name: getattr(wish, name) for name in ("mask", "sketch", "keypoints") if getattr(wish, name)}
        request = resolve(PortraitRequest(prompt=wish.prompt, control_image=given, seed=wish.seed), pipeline)
        pictures += generate(pipeline, request, [wish.seed])[0]
    sheet = Image.new("RGB", (sum(p.width for p in pictures), max(p.height for p in pictures)))
    left = 0
    for picture in pictures:
        sheet.paste(picture, (left, 0))
        left += picture.width
    folder = run / "previews"
    folder.mkdir(exist_ok=True)
    sheet.save(folder / f"{seen:012d}.png")
    print(f"previews in {folder} ({clock.monotonic() - started:.1f} s)", flush=True)


def crossed(seen: int, batch: int, every: int) -> bool:
    """Whether the last batch passed a multiple of `every`."""
    return seen // every != (seen - batch) // every
