"""One set of base weights for two streams: MDiTFace's spatial stream repeats the image stream's layers as modules of
its own, so that an adapter wraps one and not the other, but holds the very same parameters.

Sharing is found by name (`...spatial.attn.to_q` is `...attn.to_q`, `spatial_embedder` is `x_embedder`) rather than kept
in a list, since quantisation and adapters exchange modules. State dicts hold what is shared once, under FLUX's name.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

from torch import nn

from likeness.types import InputError

NEW = ("condition_embed.", "concat_embedder.")
"""What MDiTFace has beside FLUX's weights and the spatial stream's."""


def image_name(name: str) -> str:
    """The image stream's name of a weight of the spatial stream; other names stay."""
    return name.replace("spatial_embedder", "x_embedder").replace(".spatial.", ".")


def bare(name: str) -> str:
    """The name of a weight without PEFT's wrapper around its layer."""
    return name.replace(".base_layer", "")


def is_spatial(name: str) -> bool:
    """Whether this is a base weight of the spatial stream; adapters' weights are not."""
    return image_name(name) != name and ".lora_" not in name


def put(network: nn.Module, name: str, weight: nn.Parameter) -> None:
    """Let a module hold this parameter."""
    module, _, leaf = name.rpartition(".")
    network.get_submodule(module).register_parameter(leaf, weight)


def tie(network: nn.Module) -> None:
    """Let every spatial weight be the parameter of its image counterpart, adapters or not."""
    weights = dict(network.named_parameters(remove_duplicate=False))
    image = {bare(name): weight for name, weight in weights.items()}
    for name in filter(is_spatial, weights):
        if weights[name] is not image[image_name(bare(name))]:
            put(network, name, image[image_name(bare(name))])


def begin(network: nn.Module, missing: Sequence[str]) -> None:
    """Give the weights that a checkpoint of plain FLUX lacks their first values: the spatial stream the image stream's,
    everything else zero.

    Raises:
        InputError: the checkpoint lacks a weight of FLUX itself.
    """
    lacking = sorted(name for name in missing if not (is_spatial(name) or name.startswith(NEW)))
    if lacking:
        raise InputError(f"these are not the weights of a FLUX.1 or MDiTFace transformer: {lacking[0]} is missing")
    weights = dict(network.named_parameters())
    on = weights["x_embedder.bias"]  # a missing weight may have no device yet, and a matrix no plain numbers
    for name in missing:
        first = weights[image_name(name)].detach().clone() if is_spatial(name) else on.new_zeros(weights[name].shape)
        put(network, name, nn.Parameter(first))


def save_once(network: nn.Module, state: dict[str, Any], prefix: str, _: Any) -> None:
    """State-dict hook: leave out the spatial stream's names of what is shared."""
    for name in [name for name in state if name.startswith(prefix) and network.tied and is_spatial(name)]:
        del state[name]


def load_once(network: nn.Module, keys: Any) -> None:
    """Loading hook: do not miss what is shared, and share it again."""
    if network.tied:
        keys.missing_keys[:] = [name for name in keys.missing_keys if not is_spatial(name)]
        tie(network)


def lora_targets(transformer: Any, targets: Literal["spatial", "all"] = "spatial") -> list[str]:
    """Exact names of the layers that an adapter changes.

    `spatial`: the spatial stream's, its embedder, and in single blocks those of the static text that goes with it.
    Dynamic text and image tokens are not touched. `concat` has no spatial stream: there they are the image stream's.
    `all`: the same layers of every stream, so that portraits from words alone change, too.

    Which layers the paper takes is not known. These are its relatives' (OminiControl, Face-MoGLE); at rank 8 they give
    the costs in its Table 4.
    """
    concat = transformer.config.attention == "concat"
    # embedder -> layers of a double and of a single block
    double = ("norm1.linear", "attn.to_q", "attn.to_k", "attn.to_v", "attn.to_out.0", "ff.net.2")
    single = ("norm.linear", "attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp", "proj_out")
    text = ("norm1_context.linear", "attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj", "attn.to_add_out")
    streams: dict[str, Sequence[Sequence[str]]] = {}
    if not concat:
        streams["spatial_embedder"] = [[f"spatial.{layer}" for layer in layers] for layers in (double, single)]
    if concat or targets == "all":
        streams["x_embedder"] = double, single
    if targets == "all":
        streams["context_embedder"] = (*text, "ff_context.net.2"), ()  # single blocks have none for text alone
    return [*streams] + [
        f"{blocks}.{index}.{layer}"
        for kind, blocks in enumerate(("transformer_blocks", "single_transformer_blocks"))
        for index in range(len(getattr(transformer, blocks)))
        for layers in streams.values()
        for layer in layers[kind]
    ]
