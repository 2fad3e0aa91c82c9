"""The frozen components of a transformer: autoencoder, text encoders, tokenizers and their settings."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from likeness.encoders.latent import LatentCodec
from likeness.encoders.text import check_text_settings, encode_text
from likeness.files import read_json
from likeness.types import InputError, TextFeatures
from likeness.weights.catalog import COMMON, COMPONENTS, find_model
from likeness.weights.hashes import encoder_hash, weights_hash
from likeness.weights.packed import load_component

FLUX = "FluxPipeline"
"""Pipeline class in the `model_index.json` of FLUX.1; its components are those of `MDiTFacePipeline`."""

EXAMPLE = '["diffusers", "AutoencoderKL"]'
"""A component in `components.json`."""


@dataclass(frozen=True, kw_only=True)
class Components:
    """Autoencoder, text encoders and tokenizers of a transformer, with their settings."""

    vae: Any
    text_encoder: Any
    tokenizer: Any
    text_encoder_2: Any = None
    """T5, if the base is FLUX.1."""
    tokenizer_2: Any = None
    scheduler: Any = None
    """FLUX.1's sampler."""
    settings: dict[str, Any]
    """Settings of the pipeline: latent_mean, latent_std, text_layer, max_text_tokens."""
    codec_hash: str
    """SHA-256 of the encoder's weights (`encoder_hash`), on which latents depend. Shards and models record it."""

    @property
    def text_encoders(self) -> list[Any]:
        """The text encoders: the first encodes pooled text, the last the tokens."""
        return [encoder for encoder in (self.text_encoder, self.text_encoder_2) if encoder is not None]

    @cached_property
    def text_hash(self) -> str:
        """The SHA-256 of text encoders, vocabularies and settings, which models and stored text features record. It is
        computed once: for large encoders it takes seconds.
        """
        encoders = [weights_hash(encoder) for encoder in self.text_encoders]
        vocabularies = [sorted(t.get_vocab().items()) for t in (self.tokenizer, self.tokenizer_2) if t is not None]
        settings = [self.settings.get(key) for key in ("max_text_tokens", "text_layer")]
        return hashlib.sha256(json.dumps([encoders, vocabularies, settings]).encode()).hexdigest()

    def count_truncated(self, captions: Sequence[str]) -> int:
        """Count the captions that are longer than `max_text_tokens`, start and end tokens included."""
        tokenizer = self.tokenizer if self.tokenizer_2 is None else self.tokenizer_2
        encoded = tokenizer(list(captions), verbose=False).input_ids if captions else ()
        return sum(len(ids) > self.settings["max_text_tokens"] for ids in encoded)

    def text_features(self, captions: Sequence[str]) -> TextFeatures:
        """Encode B captions in one batch, on the device of the text encoders."""
        return encode_text(
            self.tokenizer,
            self.text_encoder,
            captions,
            max_tokens=self.settings["max_text_tokens"],
            layer=self.settings.get("text_layer", -2),
            tokenizer_2=self.tokenizer_2,
            text_encoder_2=self.text_encoder_2,
            batched=True,
        )


def load_components(source: str | Path) -> Components:
    """Load the components of a pipeline folder, FLUX.1's included, or of a components folder such as `common/`. Raises
    `InputError` if one is missing or cannot be read.
    """
    folder = Path(source) if (Path(source) / COMPONENTS).is_file() else find_model(source)
    index = read_json(folder / (COMPONENTS if (folder / COMPONENTS).is_file() else "model_index.json"))
    names = ["vae", "text_encoder", "tokenizer"]
    flux = index.get("_class_name") == FLUX
    if flux or (index.get("text_encoder_2") or [None])[0]:
        names += ["text_encoder_2", "tokenizer_2"]
    if flux:
        names += ["scheduler"]
    parts: dict[str, Any] = {}
    for name in names:
        if not (part := part_folder(folder, name)).is_dir() or not index.get(name):
            raise InputError(f"{folder} has no {name}")
        if not isinstance(index[name], list) or [type(value) for value in index[name]] != [str, str]:
            raise InputError(
                f"{folder} has {name} = {index[name]!r}; it must be a library and a class, such as {EXAMPLE}"
            )
        parts[name] = load_component(part, *index[name])
    config = parts["vae"].config
    if flux:
        settings = {"latent_mean": config["shift_factor"], "latent_std": 1 / config["scaling_factor"]}
        settings |= {"max_text_tokens": 512}
    else:
        names = ["latent_mean", "latent_std", "text_layer", "max_text_tokens"]
        if missing := [name for name in names if name not in index]:
            raise InputError(f"{folder} has no {missing[0]}: it is not a model of likeness or FLUX.1")
        settings = {name: index[name] for name in names}
        check_text_settings(parts["text_encoder"], settings["text_layer"], settings["max_text_tokens"])
    LatentCodec(parts["vae"], settings["latent_mean"], settings["latent_std"])  # checks the statistics
    return Components(**parts, settings=settings, codec_hash=encoder_hash(parts["vae"]))


def part_folder(folder: Path, name: str) -> Path:
    """Return the folder of a component: in the model's folder, or else in `common` next to it."""
    return folder / name if (folder / name).is_dir() else folder.parent / COMMON / name
