"""Publish a run: the network with EMA weights as a pipeline folder, and previews generated with it."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from torch import Tensor

from likeness.conditions import CONDITIONS, read_conditions
from likeness.conditions.images import check_aspect
from likeness.encoders.components import Components
from likeness.files import log_line, read_json, write_whole, writing_folder, writing_whole
from likeness.models.mditface import MDiTFaceTransformer
from likeness.objectives import Objective
from likeness.parallel import World, gather, reshard
from likeness.pipelines.adapters import Adapter, MMFaceLora, adapter_state, save_adapter
from likeness.pipelines.generate import check_seed, generate, resolve
from likeness.pipelines.mditface import MDiTFacePipeline
from likeness.pipelines.mmface import MMFacePipeline
from likeness.train.config import RunRecipe, condition_names, preview_file
from likeness.train.ema import store_emas
from likeness.train.progress import Progress
from likeness.train.report import write_report
from likeness.train.train_state import TrainState
from likeness.types import ConditionInput, InputError, PortraitRequest
from likeness.weights.catalog import CODEC, find_model
from likeness.weights.packed import load_component


@dataclass(frozen=True, kw_only=True)
class Publication:
    """Everything of a published pipeline but its weights."""

    components: Components  # autoencoder, text encoder, tokenizer and settings
    objective: Objective  # objective of the network
    defaults: dict[str, Any]  # default arguments of the pipeline, with `size`
    previews: Sequence[PortraitRequest]  # images to generate
    adapter: Adapter | MMFaceLora | None = None  # configuration of an adapter; None if the whole network is trained


def preview_requests(recipe: RunRecipe) -> list[PortraitRequest]:
    """Return the previews of a recipe as requests, with the condition files read. Raises `InputError` if a condition
    cannot be read or is not trained, its aspect ratio is not that of the images, or a seed is out of range.
    """
    requests, side = [], recipe.defaults.get("size")  # a missing size is reported with the shards
    for number, preview in enumerate(recipe.preview, start=1):
        files = {name: file for name in CONDITIONS if (file := getattr(preview, name))}
        if unknown := sorted(files.keys() - set(condition_names(recipe.data))):
            raise InputError(
                f"preview {number} has a {unknown[0]}, which is not in the recipe's condition_probabilities"
            )
        conditions = {name: ConditionInput(image=preview_file(file)) for name, file in files.items()}
        check_seed(preview.seed)
        request, _ = read_conditions(PortraitRequest(prompt=preview.prompt, conditions=conditions, seed=preview.seed))
        for name, condition in request.conditions.items():
            raw, size = condition.image.raw, condition.image.size
            shape = size and size[::-1] if CONDITIONS[name].raw == "points" else raw.shape
            if side and shape:
                check_aspect((round(shape[0]), round(shape[1])), (side, side), f"{name} of preview {number}")
        requests.append(request)
    return requests


def checkpoint(progress: Progress, publication: Publication, recipe: RunRecipe, saved: Any = None) -> None:
    """Publish, generate previews and save a checkpoint if it is due; on SIGTERM in another step, only save it. The
    checkpoint is written after the model is published; it contains `saved`, by default the state of `progress`.

    Raises:
        TryAgain: SIGTERM was received, or a value is not finite.
        InputError: the last checkpoint cannot be written.
    """
    state, run, due = progress.state, progress.run, progress.due(recipe.checkpoint_every)
    if due:
        progress.check_finite()
        with ema_pipeline(state, publication) as (pipeline, weights):
            with progress.tolerated_write_errors(), state.world.joint_errors():
                if state.world.main:
                    publish(publication, pipeline, weights, run)
            with progress.tolerated_write_errors(always=True), state.world.joint_errors():
                if pipeline is not None:
                    write_previews(publication, pipeline, run, state.images_seen, state.world)
        with progress.tolerated_write_errors():
            store_emas(state.emas, run, state.images_seen, state.world)
    progress.save(recipe.checkpoint_every, saved, recipe.keep_checkpoints)
    if due and state.world.main:
        with progress.tolerated_write_errors(always=True):
            write_report(run)


def preview(progress: Progress, publication: Publication) -> None:
    """Generate previews and write the report before the first step. Call on every rank."""
    state, run = progress.state, progress.run
    published = ema_pipeline(state, publication)
    with published as (pipeline, _), progress.tolerated_write_errors(always=True), state.world.joint_errors():
        if pipeline is not None:
            write_previews(publication, pipeline, run, state.images_seen, state.world)
        if state.world.main:
            write_report(run)


def pipeline_of(publication: Publication, transformer: Any) -> Any:
    """Return the pipeline of a network."""
    components, adapter = publication.components, publication.adapter
    parts = {name: getattr(components, name) for name in ("vae", "text_encoder", "tokenizer")}
    if components.text_encoder_2 is not None:
        parts |= {"text_encoder_2": components.text_encoder_2, "tokenizer_2": components.tokenizer_2}
    settings: dict[str, Any] = {"objective": publication.objective.config(), "defaults": publication.defaults}
    parts["scheduler"] = components.scheduler or publication.objective.scheduler()
    if isinstance(adapter, MMFaceLora):  # it is used with the settings of its base
        base = find_model(adapter.base)
        index = read_json(base / "model_index.json")
        settings = {name: index[name] for name in ("objective", "condition_resize")}
        settings["defaults"] = index["defaults"] | publication.defaults
        parts["scheduler"] = load_component(base / "scheduler", *index["scheduler"])
    pipeline_class = MDiTFacePipeline if isinstance(transformer, MDiTFaceTransformer) else MMFacePipeline
    pipeline = pipeline_class(
        transformer=transformer.eval(),
        sizes=[[publication.defaults["size"]] * 2],  # that of the shards (`batches.open_stores`)
        **parts,
        **settings,
        **components.settings,
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@contextmanager
def ema_pipeline(state: TrainState, publication: Publication) -> Iterator[tuple[Any, dict[str, Tensor]]]:
    """The pipeline with the EMA weights, within a `with` block, and the unsharded weights. Enter on every rank.

    A whole network is copied, on the main process only; the others get None. The base of an adapter is too large to
    copy and may be sharded: its pipeline contains the network in training, on every rank, with the EMA weights swapped
    in.
    """
    model: Any = state.model
    ema, world = state.emas[0], state.world
    if publication.adapter is None:
        weights = gather(model.state_dict() | ema.weights, world)
        if not world.main:
            yield None, {}
            return
        averaged = type(model).from_config(model.config)
        averaged.load_state_dict({name: w for name, w in weights.items() if not name.startswith("projection.")})
        yield pipeline_of(publication, averaged), weights
        return
    with ema.applied():
        weights = gather(adapter_state(model), world)
        with world.autocast("bf16" if isinstance(publication.adapter, Adapter) else "fp32"):  # a frozen FLUX.1 is bf16
            try:
                yield pipeline_of(publication, model), weights
            finally:
                reshard(model)
    model.train()


def publish(publication: Publication, pipeline: Any, weights: dict[str, Tensor], run: Path) -> None:
    """Write `run/model`, a pipeline folder or an adapter's folder, atomically. Raises `InputError` if it cannot be
    written; its former content is unchanged.
    """
    with writing_folder(run / "model") as folder:
        if publication.adapter is not None:
            save_adapter(pipeline.transformer, folder, publication.adapter, weights)
        else:
            pipeline.save_pretrained(folder)
        components = publication.components
        hashes = {"codec": components.codec_hash, "text": components.text_hash}
        write_whole(folder / CODEC, json.dumps(hashes))


def write_previews(publication: Publication, pipeline: Any, run: Path, seen: int, world: World) -> None:
    """Generate the previews with the code of `likeness generate` and write them side by side. Call on every rank that
    has a part of the network. Raises `InputError` if they cannot be written.
    """
    if not publication.previews:
        return
    start, images, components = time.monotonic(), [], publication.components
    before = [(part, part.device) for part in (components.vae, *components.text_encoders)]
    if world.device_type != "cpu":
        pipeline.to(world.device)
    try:
        for request in publication.previews:
            images += generate(pipeline, resolve(request, pipeline), [request.seed])[0]
    finally:
        for part, device in before:  # their memory is the training's
            part.to(device)
    if not world.main:
        return
    sheet = Image.fromarray(np.hstack([np.asarray(image) for image in images]))
    folder = run / "previews"
    with writing_whole(folder / f"{seen:012d}.png") as file:
        sheet.save(file, "PNG")
    log_line(f"previews in {folder} ({time.monotonic() - start:.1f} s)")
