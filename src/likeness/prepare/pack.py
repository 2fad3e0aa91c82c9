"""Write a trained model the way the bundled ones ship: packed weights, and shared parts left to a folder beside it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

from likeness.files import read_json, write_whole
from likeness.pipelines.catalogue import CODEC, COMMON
from likeness.pipelines.load import component_class, load_components
from likeness.pipelines.packed import save_packed
from likeness.types import InputError


def pack_model(model: Path, out: Path) -> None:
    """Pack a published pipeline into `out`, whose neighbour `common` must hold the components it was trained on.

    Raises:
        InputError: `model` is no published run, or was trained on other components.
    """
    index = read_json(model / "model_index.json")
    common = load_components(out.parent / COMMON)
    if not common.same_encoder(read_json(model / CODEC)["codec"]):
        raise InputError(f"{model} was trained on the latents of another encoder than that of {out.parent / COMMON}")
    transformer = component_class(*index["transformer"]).from_pretrained(model / "transformer")
    save_packed(transformer, out / "transformer")
    shutil.copytree(model / "scheduler", out / "scheduler", dirs_exist_ok=True)
    shutil.copy(model / CODEC, out / CODEC)
    write_whole(out / "model_index.json", json.dumps(index, indent=2))
