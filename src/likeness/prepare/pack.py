"""Write a trained model in the form of the bundled ones: packed weights, with components in another folder."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

from likeness.encoders.components import load_components
from likeness.files import first_line, read_json, write_whole
from likeness.models.label_decoder import LabelDecoder
from likeness.types import InputError
from likeness.weights.catalog import CODEC, COMMON
from likeness.weights.packed import PACKED, component_class, save_packed


def pack_model(model: Path, out: Path, base: Path | None = None, label_decoder: Path | None = None) -> None:
    """Pack a published pipeline into `out`. The folder `common` next to it must contain its components.

    With `base`, a packed pipeline that the model was trained from, only the difference is stored, in 4 bits.
    `label_decoder` is the run folder of the label decoder with which the packed pipeline decodes latents.

    Raises:
        InputError: `model` is not a published run, or was trained with other components, or `base` has another network,
            or `label_decoder` is not the run folder of a label decoder.
    """
    index = read_json(model / "model_index.json")
    common = load_components(out.parent / COMMON)
    if not common.same_encoder(read_json(model / CODEC)["codec"]):
        raise InputError(f"{model} was trained on the latents of another encoder than that of {out.parent / COMMON}")
    transformer = component_class(*index["transformer"]).from_pretrained(model / "transformer")
    if base is not None:
        check_base(base, model)
    save_packed(transformer, out / "transformer", None if base is None else base / "transformer")
    shutil.copytree(model / "scheduler", out / "scheduler", dirs_exist_ok=True)
    shutil.copy(model / CODEC, out / CODEC)
    if label_decoder is not None:
        index["vae"] = [LabelDecoder.__module__, LabelDecoder.__name__]
        try:
            save_packed(LabelDecoder.from_pretrained(label_decoder / "model"), out / "vae")
        except (OSError, TypeError) as error:
            raise InputError(
                f"{label_decoder} is not the run folder of a label decoder: {first_line(error)}"
            ) from error
    write_whole(out / "model_index.json", json.dumps(index, indent=2))


def check_base(base: Path, model: Path) -> None:
    """Check that a base is a packed pipeline, no difference itself, and has the network of the model. Raises
    `InputError`.
    """
    if not (base / "transformer" / PACKED).is_file():
        raise InputError(f"{base} has no {PACKED}: the base must be a packed model that is not a difference itself")
    found, wanted = (read_json(folder / "transformer" / "config.json") for folder in (base, model))
    if differing := [name for name in wanted if not name.startswith("_") and found.get(name) != wanted[name]]:
        raise InputError(f"{base} has another network than {model}: {differing[0]} differs")
