"""Share one set of base weights between MDiTFace's image and spatial stream.

The modules are separate, so that an adapter can wrap one and not the other; the parameters are the same.

Each module of the spatial stream records the name of its counterpart (`...spatial.attn.to_q`: `...attn.to_q`), so that
pairs are found in wrapped modules, too. State dicts contain shared weights once, under FLUX's name.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import nn

from likeness.types import InputError

NEW = ("condition_embed.", "concat_embedder.")
"""Weights of MDiTFace in addition to those of FLUX and of the spatial stream."""


def image_name(name: str) -> str:
    """Return the image stream's name of a module or weight of the spatial stream; others are unchanged."""
    return name.replace("spatial_embedder", "x_embedder").replace(".spatial.", ".")


def record_counterparts(network: nn.Module) -> None:
    """Record in each module of the spatial stream that has weights the name of its counterpart."""
    for name, module in network.named_modules():
        if image_name(name) != name and next(module.parameters(recurse=False), None) is not None:
            vars(module)["counterpart"] = image_name(name)


def spatial_weights(network: nn.Module) -> dict[str, nn.Parameter]:
    """Map the name of every base weight of the spatial stream to its counterpart in the image stream."""
    modules = {name: module for name, module in network.named_modules() if hasattr(module, "counterpart")}
    return {
        f"{name}.{leaf}": getattr(network.get_submodule(str(module.counterpart)), leaf)
        for name, module in modules.items()
        for leaf, _ in module.named_parameters(recurse=False)
    }


def set_parameter(network: nn.Module, name: str, weight: nn.Parameter) -> None:
    """Replace a parameter."""
    module, _, leaf = name.rpartition(".")
    network.get_submodule(module).register_parameter(leaf, weight)


def tie(network: nn.Module) -> None:
    """Replace every spatial weight by its counterpart."""
    for name, weight in spatial_weights(network).items():
        if network.get_parameter(name) is not weight:
            set_parameter(network, name, weight)


def init_missing(network: nn.Module, missing: Sequence[str]) -> None:
    """Initialize the weights that a checkpoint of plain FLUX lacks: the spatial stream's as the image stream's, all
    others as zero. Raises `InputError` if it lacks a weight of FLUX.
    """
    spatial = spatial_weights(network)
    if absent := sorted(name for name in missing if not (name in spatial or name.startswith(NEW))):
        raise InputError(f"These are not the weights of a FLUX.1 or MDiTFace transformer: {absent[0]} is missing")
    weights = dict(network.named_parameters())
    loaded = weights["x_embedder.bias"]  # a missing weight may be on the meta device, and a matrix may be quantized
    for name in missing:
        value = spatial[name].detach().clone() if name in spatial else loaded.new_zeros(weights[name].shape)
        set_parameter(network, name, nn.Parameter(value))


def save_shared_once(network: nn.Module, state: dict[str, Any], prefix: str, _: Any) -> None:
    """State-dict hook: remove the spatial stream's names of shared weights."""
    for name in spatial_weights(network) if network.tied else ():
        state.pop(prefix + name, None)


def load_shared_once(network: nn.Module, keys: Any) -> None:
    """Loading hook: shared weights are not missing; share them again."""
    if network.tied:
        spatial = spatial_weights(network)
        keys.missing_keys[:] = [name for name in keys.missing_keys if name not in spatial]
        tie(network)
