"""Write a trained model in the form of the bundled ones: packed weights, with components in another folder."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

from likeness.encoders.components import load_components
from likeness.files import read_json, write_whole
from likeness.types import InputError
from likeness.weights.catalog import CODEC, COMMON
from likeness.weights.packed import component_class, save_packed


def pack_model(model: Path, out: Path) -> None:
    """Pack a published pipeline into `out`. The folder `common` next to it must contain its components.

    Raises:
        InputError: `model` is not a published run, or was trained with other components.
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
