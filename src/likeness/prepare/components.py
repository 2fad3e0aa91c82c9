"""Join the components of a transformer into one folder: autoencoder, text encoder, tokenizer and latent statistics, and
optionally the image encoder and the face parser for annotation and evaluation.

The statistics are measured once on real images. Latents are normalized with them in training and sampling. `pack_model`
writes a trained model with packed weights, as the bundled ones.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import torch
from transformers import AutoTokenizer

from likeness.annotators.face_parser import load_face_parser
from likeness.data.folder import read_folder, read_photo
from likeness.encoders.components import load_components
from likeness.encoders.latent import LatentCodec, spatial_factor, to_tensor
from likeness.encoders.text_image import load_attribute_head, save_attribute_head
from likeness.files import first_line, read_json, write_whole, writing_folder
from likeness.models.label_decoder import LabelDecoder
from likeness.types import InputError
from likeness.weights.catalog import CODEC, COMMON, COMPONENTS
from likeness.weights.hashes import encoder_hash
from likeness.weights.packed import PACKED, load_component, save_packed

MEASURED_IMAGES = 1024
"""Most images on which the statistics are measured, evenly spaced."""

TEXT_LAYER = -2
"""Hidden state of the text encoder that is used as tokens."""


def join_components(
    autoencoder: Path,
    text: Path,
    out: Path,
    data: Path,
    *,
    size: int,
    face_parser: Path | None = None,
) -> None:
    """Write `out` with packed weights (`likeness.weights.packed`) of published runs.

    Args:
        autoencoder: run folder of an autoencoder or of a decoder.
        text: run folder of a text encoder; its image encoder and attribute head are included.
        out: folder to write; former components are replaced.
        data: prepared folder on which the statistics are measured.
        size: side length in pixels.
        face_parser: run folder of a face parser to include.

    Raises:
        InputError: a run has not published its model, the data cannot be read, or `out` contains something else.
    """
    check_replaceable(out, COMPONENTS)
    for run in (autoencoder, text, *([face_parser] if face_parser else [])):
        if not (run / "model").is_dir():
            raise InputError(f"{run} has no published model: finish its training first")
    vae = load_component(autoencoder / "model", "diffusers", "AutoencoderDC")
    encoder = load_component(text / "model" / "text_encoder", "transformers", "CLIPTextModel")
    clip = load_component(text / "model" / "clip", "transformers", "CLIPModel")
    tokenizer = AutoTokenizer.from_pretrained(text / "model" / "tokenizer", trust_remote_code=False)
    rows = read_folder(data)
    if size < 1 or size % spatial_factor(vae):
        raise InputError(f"size {size} is not supported: it must be a multiple of {spatial_factor(vae)}")
    with writing_folder(out) as partial:
        save_packed(vae, partial / "vae")
        save_packed(encoder, partial / "text_encoder")
        tokenizer.save_pretrained(partial / "tokenizer")
        save_packed(clip, partial / "clip")
        if (head := load_attribute_head(text / "model")) is not None:
            save_attribute_head(head, partial)
        if face_parser:
            save_packed(load_face_parser(face_parser / "model")[0], partial / "face_parser")

        # Measure with the packed weights, because these are used later.
        codec = LatentCodec(load_component(partial / "vae", "diffusers", "AutoencoderDC"))
        chosen = [rows[at] for at in np.linspace(0, len(rows) - 1, min(len(rows), MEASURED_IMAGES)).astype(int)]
        latents = torch.cat([codec.encode(to_tensor([read_photo(row["file_name"], size)])) for row in chosen])
        components = {
            "vae": ["diffusers", "AutoencoderDC"],
            "text_encoder": ["transformers", "CLIPTextModel"],
            "tokenizer": ["transformers", type(tokenizer).__name__],
            "latent_mean": [round(value, 5) for value in latents.mean(dim=(0, 2, 3)).tolist()],
            "latent_std": [round(value, 5) for value in latents.std(dim=(0, 2, 3)).tolist()],
            "text_layer": TEXT_LAYER,
            "max_text_tokens": tokenizer.model_max_length,
            "measured_on": len(chosen),
        }
        write_whole(partial / COMPONENTS, json.dumps(components, indent=2))


def check_replaceable(out: Path, file: str) -> None:
    """Raise `InputError` if the folder `out` is not empty and does not contain `file`."""
    if out.is_dir() and any(out.iterdir()) and not (out / file).is_file():
        raise InputError(f"{out} contains other files, but no {file}: choose another folder")


def replace_decoder(run: Path, components: Path, out: Path) -> None:
    """Write `out`, a copy of a components folder with the decoder of a decoder run. The encoder and the latent
    statistics are unchanged, so shards and models of `components` remain valid.

    Raises:
        InputError: `out` exists, the run has not published its model, or its encoder is not that of `components`.
    """
    if out.exists():
        raise InputError(f"{out} exists: choose another folder")
    if not (run / "model").is_dir():
        raise InputError(f"{run} has no published model: train it first")
    index = read_json(components / COMPONENTS)
    parts = load_components(components)
    vae = load_component(run / "model", *index["vae"])
    if encoder_hash(vae) != parts.codec_hash:
        raise InputError(f"the encoder of {run} is not that of {components}: train the decoder from {components}/vae")
    without_vae = lambda folder, _: ["vae"] if Path(folder) == components else []  # noqa: E731
    with writing_folder(out) as partial:
        shutil.copytree(components, partial, ignore=without_vae, dirs_exist_ok=True)
        if (components / "vae" / PACKED).is_file():
            save_packed(vae, partial / "vae")
        else:
            vae.save_pretrained(partial / "vae")
        assert load_components(partial).codec_hash == parts.codec_hash


def pack_model(model: Path, out: Path, base: Path | None = None, label_decoder: Path | None = None) -> None:
    """Pack a published pipeline into `out`; a former pipeline is replaced. The folder `common` next to it must contain
    its components.

    With `base`, a packed pipeline that the model was trained from, only the difference is stored, in 4 bits.
    `label_decoder` is the run folder of the label decoder with which the packed pipeline decodes latents.

    Raises:
        InputError: `model` is not a published run, or was trained with other components, or `base` has another network,
            or is `out`, or `label_decoder` is not the run folder of a label decoder, or `out` contains something else.
    """
    check_replaceable(out, "model_index.json")
    index = read_json(model / "model_index.json")
    common = load_components(out.parent / COMMON)
    recorded = read_json(model / CODEC)
    if recorded["codec"] != common.codec_hash:
        raise InputError(f"{model} was trained on the latents of another encoder than that of {out.parent / COMMON}")
    if recorded.get("text", common.text_hash) != common.text_hash:
        raise InputError(f"{model} was trained with another text encoder than that of {out.parent / COMMON}")
    transformer = load_component(model / "transformer", *index["transformer"])
    if base is not None:
        if base.resolve() == out.resolve():
            raise InputError(f"{out} is the base: choose another folder, because the model is stored as a difference")
        check_base(base, model)
    with writing_folder(out) as partial:
        save_packed(transformer, partial / "transformer", None if base is None else base / "transformer")
        shutil.copytree(model / "scheduler", partial / "scheduler")
        shutil.copy(model / CODEC, partial / CODEC)
        if label_decoder is not None:
            index["vae"] = [LabelDecoder.__module__, LabelDecoder.__name__]
            try:
                save_packed(LabelDecoder.from_pretrained(label_decoder / "model"), partial / "vae")
            except (OSError, TypeError) as error:
                raise InputError(
                    f"{label_decoder} is not the run folder of a label decoder: {first_line(error)}"
                ) from error
        write_whole(partial / "model_index.json", json.dumps(index, indent=2))


def check_base(base: Path, model: Path) -> None:
    """Check that a base is a packed pipeline, no difference itself, and has the network of the model. Raises
    `InputError`.
    """
    if not (base / "transformer" / PACKED).is_file():
        raise InputError(f"{base} has no {PACKED}: the base must be a packed model that is not a difference itself")
    found, wanted = (read_json(folder / "transformer" / "config.json") for folder in (base, model))
    if differing := [name for name in wanted if not name.startswith("_") and found.get(name) != wanted[name]]:
        raise InputError(f"{base} has another network than {model}: {differing[0]} differs")
