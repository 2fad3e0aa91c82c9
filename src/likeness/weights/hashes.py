"""Hashes of weights. Recipes, shards and published models record them."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import numpy as np
import torch

from likeness.types import InputError


def weights_hash(model: torch.nn.Module, without: tuple[str, ...] = ()) -> str:
    """Return the SHA-256 of a model's weights as float32, in the order of their names; `without`: prefixes to leave
    out. Raises `InputError` if they are offloaded to where they cannot be read.
    """
    on_disk = any(getattr(getattr(hook, "group", None), "offload_to_disk_path", None) for hook in hooks_of(model))
    weights = model.state_dict()
    if on_disk or any(value.is_meta for value in weights.values()):
        raise InputError(
            "The weights are offloaded and cannot be read for the recipe of the image: save it without one, "
            "output.images[0].save(...), or offload with load(offload=True)"
        )
    digest = hashlib.sha256()
    for name, value in sorted(weights.items()):
        if name.startswith(without):
            continue
        digest.update(name.encode())
        value = value.dequantize() if hasattr(value, "qdata") else value  # torchao
        digest.update(value.detach().float().cpu().contiguous().numpy().reshape(-1).view(np.uint8))  # no copy
    return digest.hexdigest()


def hooks_of(network: torch.nn.Module) -> list[Any]:
    """Return diffusers' hooks on the modules of a network, such as those of offloading and of caches."""
    registries: list[Any] = [vars(module).get("_diffusers_hook") for module in network.modules()]
    return [hook for registry in registries if registry for hook in registry.hooks.values()]


def encoder_hash(vae: torch.nn.Module) -> str:
    """Return the SHA-256 of the weights of an autoencoder that determine its latents: all but the decoder's."""
    return weights_hash(vae, without=("decoder.", "post_quant_conv."))


def pipeline_hash(pipeline: Any) -> str:
    """Return the SHA-256 of all weights of a pipeline, which identifies a checkpoint. Recipes call it `fingerprint`. It
    includes LoRAs that are loaded, also inactive ones.
    """
    parts = [pipeline.transformer, pipeline.vae, pipeline.text_encoder, getattr(pipeline, "text_encoder_2", None)]
    return hashlib.sha256("".join(weights_hash(part) for part in parts if part is not None).encode()).hexdigest()


def network_name(network: Any) -> str:
    """Return the name by which datasets record a network: its class and the start of its hash."""
    own = getattr(network, "network", network)  # inside a wrapper such as `Translated`
    return f"{type(own).__name__} {weights_hash(network)[:12]}"


def file_hash(path: Path) -> str:
    """Return the SHA-256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
