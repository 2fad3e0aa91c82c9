"""What a run shows of itself: the averaged network as a folder to use, and portraits made with it."""

from __future__ import annotations

import json
import os
import shutil
import time as clock
from pathlib import Path
from typing import Any

from PIL import Image
from safetensors import SafetensorError
from torch import Tensor

from likeness.conditions import read_conditions
from likeness.encoders.components import Components
from likeness.files import write_whole, writing_whole
from likeness.objectives import Objective
from likeness.parallel import ALONE, World, gather
from likeness.pipelines.adapters import adapter_state, save_adapter
from likeness.pipelines.generate import generate, resolve
from likeness.pipelines.mditface import MDiTFacePipeline
from likeness.pipelines.mmface import MMFacePipeline
from likeness.train.config import MDiTFaceAdapter, TrainRecipe
from likeness.train.learner import Learner
from likeness.train.networks import adapter_of, condition_names
from likeness.types import ConditionInput, InputError, PortraitRequest
from likeness.weights.catalog import CODEC

PIPELINE_OF = {"mmface": MMFacePipeline, "mditface": MDiTFacePipeline, "mditface_adapter": MDiTFacePipeline}
"""Network of a recipe -> the pipeline that is published with it."""


def averaged_pipeline(
    recipe: TrainRecipe, learner: Learner, components: Components, objective: Objective
) -> tuple[Any, dict[str, Tensor]]:
    """The pipeline with the averaged network, and its weights in one piece; every process must ask.

    Returns:
        None and nothing in all processes but the main one. A base is too large to copy: an adapter's pipeline has the
        very network that is trained, in every process, since it is spread over all; whoever calls has to `swap` the
        average out again.
    """
    model: Any = learner.model
    adapted = isinstance(recipe.network, MDiTFaceAdapter)
    if adapted:
        learner.averages[0].swap()
        weights = gather(adapter_state(model), learner.world)
    else:
        weights = gather(model.state_dict() | learner.averages[0].weights, learner.world)
    if not learner.world.main and not adapted:
        return None, {}
    averaged = model if adapted else type(model).from_config(model.config)
    if not adapted:
        averaged.load_state_dict(weights)
    averaged.eval()
    parts = {name: getattr(components, name) for name in ("vae", "text_encoder", "tokenizer")}
    if components.text_encoder_2 is not None:
        parts |= {"text_encoder_2": components.text_encoder_2, "tokenizer_2": components.tokenizer_2}
    pipeline = PIPELINE_OF[recipe.network.name](
        transformer=averaged,
        scheduler=components.scheduler or objective.scheduler(),
        objective=objective.config(),
        defaults=recipe.defaults,
        sizes=[[recipe.defaults["size"]] * 2],  # that of the shards, `loop.open_stores`
        **parts,
        **components.settings,
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline, weights


def publish(recipe: TrainRecipe, pipeline: Any, weights: dict[str, Tensor], components: Components, run: Path) -> None:
    """Write the averaged network as `run/model`, a pipeline folder or an adapter's, whole or not at all.

    Args:
        recipe: the run.
        pipeline: with weights, what `averaged_pipeline` gave the main process.
        weights: of the network, or of the adapter.
        components: what it stands on.
        run: the run folder.

    Raises:
        InputError: it cannot be written; what was there before is untouched.
    """
    fresh, folder = run / "model.partial", run / "model"
    shutil.rmtree(fresh, ignore_errors=True)
    try:
        if isinstance(recipe.network, MDiTFaceAdapter):
            save_adapter(pipeline.transformer, fresh, adapter_of(recipe), weights)
        else:
            pipeline.save_pretrained(fresh)
        write_whole(fresh / CODEC, json.dumps({"codec": components.codec_hash}))
        if folder.exists():
            shutil.rmtree(folder)
        os.replace(fresh, folder)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(fresh, ignore_errors=True)
        raise InputError(f"cannot write {folder}: {error}") from error


def wishes(recipe: TrainRecipe) -> list[PortraitRequest]:
    """The recipe's previews as requests, their conditions read.

    Raises:
        InputError: a condition cannot be read, or the network does not learn it.
    """
    requests = []
    for number, wish in enumerate(recipe.preview, start=1):
        files = {name: file for name in ("mask", "sketch", "keypoints") if (file := getattr(wish, name))}
        unknown = sorted(files.keys() - set(condition_names(recipe)))
        if unknown:
            raise InputError(f"preview {number} has a {unknown[0]}, which the recipe's condition_shares do not name")
        given = {name: ConditionInput(image=file) for name, file in files.items()}
        requests.append(read_conditions(PortraitRequest(prompt=wish.prompt, conditions=given, seed=wish.seed))[0])
    return requests


def preview(recipe: TrainRecipe, pipeline: Any, run: Path, seen: int, world: World = ALONE) -> None:
    """Make the recipe's previews: the same code, so the same pixels, as `likeness generate` on the published model.
    Every process that has a part of the network must ask; the main one writes.

    Raises:
        InputError: they cannot be written.
    """
    if not recipe.preview:
        return
    if world.kind != "cpu":
        pipeline.to(world.device)
    started = clock.monotonic()
    pictures = []
    for request in wishes(recipe):
        pictures += generate(pipeline, resolve(request, pipeline), [request.seed])[0]
    if not world.main:
        return
    sheet = Image.new("RGB", (sum(p.width for p in pictures), max(p.height for p in pictures)))
    left = 0
    for picture in pictures:
        sheet.paste(picture, (left, 0))
        left += picture.width
    folder = run / "previews"
    with writing_whole(folder / f"{seen:012d}.png") as file:
        sheet.save(file, "PNG")
    print(f"previews in {folder} ({clock.monotonic() - started:.1f} s)", flush=True)
