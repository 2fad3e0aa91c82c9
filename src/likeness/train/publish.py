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

from likeness.files import write_whole
from likeness.objectives import Objective
from likeness.parallel import gather
from likeness.pipelines.adapters import adapter_state, save_adapter
from likeness.pipelines.generate import generate, resolve
from likeness.pipelines.load import Components
from likeness.pipelines.mditface import MDiTFacePipeline
from likeness.pipelines.mmface import MMFacePipeline
from likeness.train.config import MDiTFaceAdapter, TrainRecipe
from likeness.train.learner import Learner
from likeness.train.networks import adapter_of
from likeness.types import InputError, PortraitRequest

PIPELINE_OF = {"mmface": MMFacePipeline, "mditface": MDiTFacePipeline, "mditface_adapter": MDiTFacePipeline}
"""Network of a recipe -> the pipeline that is published with it."""


def publish(recipe: TrainRecipe, learner: Learner, components: Components, objective: Objective, run: Path) -> Any:
    """Write the averaged network as `run/model`, a pipeline folder or an adapter's, whole or not at all. Every process
    must ask; the main one writes.

    Returns:
        The pipeline with the averaged network, None in other processes. A base is too large to copy: an adapter's is
        the very network that is trained, and whoever calls has to `swap` the average out again.
    """
    model: Any = learner.model
    fresh, folder = run / "model.partial", run / "model"
    adapted = isinstance(recipe.network, MDiTFaceAdapter)
    if adapted:
        learner.averages[0].swap()
        weights = gather(adapter_state(model), learner.world)
    else:
        weights = gather(model.state_dict() | learner.averages[0].weights, learner.world)
    if not learner.world.main:
        return None
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
        **parts,
        **components.settings,
    )
    shutil.rmtree(fresh, ignore_errors=True)
    try:
        if adapted:
            save_adapter(model, fresh, adapter_of(recipe), weights)
        else:
            pipeline.save_pretrained(fresh)
        write_whole(fresh / "codec.json", json.dumps({"codec": components.codec_hash}))
        if folder.exists():
            shutil.rmtree(folder)
        os.replace(fresh, folder)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(fresh, ignore_errors=True)
        raise InputError(f"cannot write {folder}: {error}") from error
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
