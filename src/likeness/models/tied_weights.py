"""Share one set of base weights between MDiTFace's image and spatial stream.

The modules are separate, so that an adapter can wrap one and not the other; the parameters are the same.

Pairs are found by name (`...spatial.attn.to_q` is `...attn.to_q`, `spatial_embedder` is `x_embedder`), since
quantization and adapters replace modules. State dicts contain shared weights once, under FLUX's name.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import nn

from likeness.types import InputError

NEW = ("condition_embed.", "concat_embedder.")
"""Weights of MDiTFace in addition to those of FLUX and of the spatial stream."""

WRAPPED = ".base_layer"
"""Part of the name of a weight whose layer is wrapped."""

ADDED = ".lora_"
"""Part of the name of a weight that a wrapper adds."""


def image_name(name: str) -> str:
    """Return the image stream's name of a weight of the spatial stream; other names are returned unchanged."""
    return name.replace("spatial_embedder", "x_embedder").replace(".spatial.", ".")


def is_spatial(name: str) -> bool:
    """Return whether this is a base weight of the spatial stream."""
    return image_name(name) != name and ADDED not in name


def set_parameter(network: nn.Module, name: str, weight: nn.Parameter) -> None:
    """Replace a parameter."""
    module, _, leaf = name.rpartition(".")
    network.get_submodule(module).register_parameter(leaf, weight)


def tie(network: nn.Module) -> None:
    """Replace every spatial weight by the parameter of its image counterpart, in wrapped layers, too."""
    weights = dict(network.named_parameters(remove_duplicate=False))
    image = {name.replace(WRAPPED, ""): weight for name, weight in weights.items()}
    for name in filter(is_spatial, weights):
        shared = image[image_name(name.replace(WRAPPED, ""))]
        if weights[name] is not shared:
            set_parameter(network, name, shared)


def init_missing(network: nn.Module, missing: Sequence[str]) -> None:
    """Initialize the weights that a checkpoint of plain FLUX lacks: the spatial stream's as the image stream's, all
    others as zero.

    Raises:
        InputError: the checkpoint lacks a weight of FLUX.
    """
    if absent := sorted(name for name in missing if not (is_spatial(name) or name.startswith(NEW))):
        raise InputError(f"These are not the weights of a FLUX.1 or MDiTFace transformer: {absent[0]} is missing")
    weights = dict(network.named_parameters())
    loaded = weights["x_embedder.bias"]  # a missing weight may be on the meta device, and a matrix may be quantized
    for name in missing:
        if is_spatial(name):
            value = weights[image_name(name)].detach().clone()
        else:
            value = loaded.new_zeros(weights[name].shape)
        set_parameter(network, name, nn.Parameter(value))


def save_shared_once(network: nn.Module, state: dict[str, Any], prefix: str, _: Any) -> None:
    """State-dict hook: remove the spatial stream's names of shared weights."""
    for name in [name for name in state if name.startswith(prefix) and network.tied and is_spatial(name)]:
        del state[name]


def load_shared_once(network: nn.Module, keys: Any) -> None:
    """Loading hook: shared weights are not missing; share them again."""
    if network.tied:
        keys.missing_keys[:] = [name for name in keys.missing_keys if not is_spatial(name)]
        tie(network)
