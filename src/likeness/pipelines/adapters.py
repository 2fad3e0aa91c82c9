"""Adapters: those that this project trains on a frozen base, and LoRAs from anywhere.

An adapter folder contains `adapter.json`, which names the base model, and `adapter.safetensors`: on an MMFace a LoRA,
on FLUX.1 the LoRA of the spatial stream, the condition embedding and, for `concat`, its embedder. The weights of a file
are compared with those of the network, because PEFT silently ignores weights that do not match.
"""

from __future__ import annotations

import functools
import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path
from typing import Any, Literal

import torch
from diffusers.loaders import FluxLoraLoaderMixin
from diffusers.utils.peft_utils import recurse_remove_peft_layers
from safetensors.torch import save
from torch import Tensor, nn

from likeness.config import build, to_dict
from likeness.files import read_json, write_whole
from likeness.models.mditface import MDiTFaceTransformer
from likeness.models.tied_weights import NEW
from likeness.pipelines.arguments import checked_defaults, number
from likeness.pipelines.lora_files import METADATA, match, read_lora
from likeness.pipelines.sizes import trained_sizes
from likeness.types import InputError
from likeness.weights.catalog import ADAPTER
from likeness.weights.files import read_weights

WEIGHTS = "adapter.safetensors"

NAME, MMFACE_NAME = "mditface", "mmface"
"""PEFT's names of the adapters of adapter folders, for `set_adapters`."""


@dataclass(frozen=True, kw_only=True)
class AdapterOptions:
    """What the configurations of all adapters contain."""

    rank: int = 8
    """Rank of the LoRA."""
    alpha: int = 8
    """Its scale is alpha / rank."""
    defaults: dict[str, Any] = field(default_factory=dict)
    """Defaults of the pipeline: size, steps, guidance_scale, guidance_interval."""


@dataclass(frozen=True, kw_only=True)
class MMFaceLora(AdapterOptions):
    """The configuration of an adapter on an MMFace, `adapter.json`."""

    kind: Literal["mmface"] = "mmface"
    """Distinguishes it from those on FLUX.1."""
    base: str
    """The model that it was trained on: a bundled name, a folder or a Hub id."""
    targets: Literal["attention", "all"] = "attention"
    """Layers that the LoRA changes (`lora_targets`)."""

    @property
    def network(self) -> dict[str, Any]:
        """The arguments of the network that it determines: none."""
        return {}


@dataclass(frozen=True, kw_only=True)
class Adapter(AdapterOptions):
    """The configuration of an adapter on FLUX.1, `adapter.json`."""

    base: str
    """The FLUX.1 that it was trained on: a folder or a Hub id."""
    condition_names: tuple[str, ...]
    """The conditions that it was trained with, in the order of their ids."""
    attention: Literal["holistic", "hard", "decoupled", "concat"] = "decoupled"
    """As in `MDiTFaceTransformer`."""
    static_modulation: Literal["text", "constant"] = "text"
    """Likewise."""
    text_reads_spatial: bool = True
    """Likewise."""
    targets: Literal["spatial", "all"] = "spatial"
    """Layers that the LoRA changes (`lora_targets`)."""

    @property
    def network(self) -> dict[str, Any]:
        """The arguments of `MDiTFaceTransformer` that it determines."""
        names = ("condition_names", "attention", "static_modulation", "text_reads_spatial")
        return {name: getattr(self, name) for name in names}


def read_adapter(folder: Path) -> Adapter | MMFaceLora:
    """Read the configuration of an adapter folder. Raises `InputError` if it is missing or has invalid entries."""
    path = folder / ADAPTER
    values = read_json(path)
    adapter = build(MMFaceLora if "kind" in values else Adapter, values, where=str(path))
    if adapter.rank < 1 or adapter.alpha == 0:
        given = f"rank is {adapter.rank} and alpha {adapter.alpha}"
        raise InputError(f"{path}: {given}; the rank must be at least 1, and alpha must not be 0")
    return adapter


def own_name(transformer: nn.Module) -> str:
    """Return PEFT's name of the adapter of an adapter folder on this network."""
    return NAME if isinstance(transformer, MDiTFaceTransformer) else MMFACE_NAME


def new_weights(transformer: nn.Module) -> tuple[str, ...]:
    """Return the prefixes of the weights that an adapter contains in addition to its LoRA."""
    return NEW if isinstance(transformer, MDiTFaceTransformer) else ()


def lora_targets(transformer: Any, targets: Literal["spatial", "attention", "all"] = "spatial") -> list[str]:
    """Return the names of the layers that an adapter changes.

    On an MMFace: `attention`: those of the joint attention; `all`: also the MLPs and modulations.

    On FLUX.1: `spatial`: those of the spatial stream with its embedder; in single blocks the static text shares them.
    Dynamic text and image tokens are not changed. `concat` has no spatial stream: there they are those of the image
    stream. `all`: the same layers of every stream, so that images from text alone change, too.

    The paper does not list the layers. These are those of related work (OminiControl, Face-MoGLE); at rank 8 they give
    the costs of the paper's Table 4.
    """
    if not isinstance(transformer, MDiTFaceTransformer):
        layers = ("attention.",) if targets == "attention" else ("attention.", "image_mlp.", "text_mlp.", "modulation")
        linear = [name for name, module in transformer.blocks.named_modules() if isinstance(module, nn.Linear)]
        return [f"blocks.{name}" for name in linear if name.partition(".")[2].startswith(layers)]
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


def add_adapter(transformer: Any, adapter: Adapter | MMFaceLora) -> None:
    """Add a new adapter, as at the start of training: a LoRA without effect, on FLUX.1 a condition embedding of zeros.
    Raises `InputError` if the network has an adapter already, or does not support this one.
    """
    from peft import LoraConfig

    check_network(transformer, adapter)
    if isinstance(adapter, Adapter):
        old = transformer.condition_embed.weight
        set_conditions(transformer, adapter.network, old.new_zeros(len(adapter.condition_names), old.shape[1]))
    targets = lora_targets(transformer, adapter.targets)
    lora = LoraConfig(r=adapter.rank, lora_alpha=adapter.alpha, init_lora_weights="gaussian", target_modules=targets)
    transformer.add_adapter(lora, adapter_name=own_name(transformer))


def save_adapter(
    transformer: Any, folder: Path, adapter: Adapter | MMFaceLora, state: Mapping[str, Tensor] | None = None
) -> None:
    """Write the adapter of a network and its configuration to a folder. `state`: its weights, if those of the network
    are sharded. Raises `InputError` if the network has no adapter, or the folder cannot be written.
    """
    if own_name(transformer) not in getattr(transformer, "peft_config", {}):
        raise InputError("The network has no adapter to save")
    state = state or adapter_state(transformer)
    scale = json.dumps({"transformer.lora_alpha": adapter.alpha})  # for `--lora`, which reads the weights only
    write_whole(
        folder / WEIGHTS,
        save({name: value.contiguous().cpu() for name, value in state.items()}, {METADATA: scale}),
    )
    write_whole(folder / ADAPTER, json.dumps(to_dict(adapter), indent=2))


def load_adapter(pipeline: Any, folder: str | Path) -> None:
    """Load an adapter folder into a pipeline whose network is its base. Raises `InputError` if it cannot be read, or
    was trained on another network; every weight that does not match is listed.
    """
    from peft import set_peft_model_state_dict

    folder, transformer = Path(folder), pipeline.transformer
    adapter = read_adapter(folder)
    check_network(transformer, adapter)
    defaults = checked_defaults(adapter.defaults, pipeline.config.defaults)
    state = read_weights(folder / WEIGHTS)
    pipeline.base_settings = {name: pipeline.config[name] for name in ("sizes", "defaults")}
    add_adapter(transformer, adapter)
    shapes = {name: tuple(value.shape) for name, value in adapter_state(transformer).items()}
    reasons = {name: "missing" for name in shapes if name not in state}
    for name, value in state.items():
        if name not in shapes:
            reasons[name] = "unknown weight"
        elif tuple(value.shape) != shapes[name]:
            reasons[name] = f"shape {tuple(value.shape)}, not {shapes[name]}"
        elif not value.isfinite().all():
            reasons[name] = "not finite (NaN or Inf)"
    if reasons:
        unload_adapter(pipeline)
        reject(reasons, f"The adapter in {folder} does not match this network")
    lora = {name: value for name, value in state.items() if not name.startswith(new_weights(transformer))}
    set_peft_model_state_dict(transformer, lora, adapter_name=own_name(transformer))
    with torch.no_grad():
        for name in state.keys() - lora.keys():
            transformer.get_parameter(name).copy_(state[name])
    if (size := adapter.defaults.get("size")) and (size, size) not in trained_sizes(pipeline.config):
        pipeline.register_to_config(sizes=None)  # FLUX.1 supports any size, but its conditions were trained at this one
    pipeline.register_to_config(defaults=defaults)


def unload_adapter(pipeline: Any) -> None:
    """Remove the adapter of an adapter folder, if there is one: FLUX.1 without conditions, or the MMFace, remains, with
    its own sizes and defaults.
    """
    transformer = pipeline.transformer
    if (name := own_name(transformer)) in getattr(transformer, "peft_config", {}):
        transformer.delete_adapters(name)
        pipeline.register_to_config(**pipeline.base_settings)
        if name == NAME:
            set_conditions(transformer, {"condition_names": ()}, transformer.condition_embed.weight[:0])


def check_network(transformer: Any, adapter: Adapter | MMFaceLora) -> None:
    """Raise `InputError` if this network does not support this adapter."""
    if isinstance(transformer, MDiTFaceTransformer) != isinstance(adapter, Adapter):
        kind = "FLUX.1" if isinstance(adapter, Adapter) else "an MMFace"
        raise InputError(f"The adapter is for {kind}, but the network is a {type(transformer).__name__}")
    if own_name(transformer) in getattr(transformer, "peft_config", {}):
        raise InputError("The network has an adapter already: unload it first")
    if not isinstance(adapter, Adapter):
        return
    if not transformer.tied:
        raise InputError("This network has separate weights for its spatial stream: adapters are for FLUX.1")
    attention = transformer.config.attention
    if (attention == "concat") != (adapter.attention == "concat"):
        raise InputError(
            f"The adapter has {adapter.attention} attention, the network {attention}: "
            f"load the base with attention={adapter.attention!r}"
        )


def set_conditions(transformer: MDiTFaceTransformer, network: Mapping[str, Any], embedding: Tensor) -> None:
    """Set these options and this condition embedding, [conditions, D]."""
    transformer.register_to_config(**network)
    transformer.condition_embed = nn.Embedding.from_pretrained(embedding.detach().clone(), freeze=False)


def adapter_state(transformer: Any) -> dict[str, Tensor]:
    """Return the weights of a network's adapter: its LoRA, and those that FLUX.1 lacks."""
    from peft import get_peft_model_state_dict

    lora, new = get_peft_model_state_dict(transformer, adapter_name=own_name(transformer)), new_weights(transformer)
    return lora | {name: value for name, value in transformer.state_dict().items() if name.startswith(new)}


def reject(reasons: Mapping[str, str], message: str) -> None:
    """Raise `InputError` with one line per weight, if there are any."""
    if reasons:
        lines = "".join(f"\n  {name}: {reason}" for name, reason in sorted(reasons.items()))
        raise InputError(f"{message}; {len(reasons)} weights do not match:{lines}")


# --- LoRAs from anywhere


def load_lora(
    pipeline: Any,
    source: Any,
    name: str | None = None,
    *,
    strict: bool = True,
    weight_name: str | None = None,
    subfolder: str | None = None,
    revision: str | None = None,
    **hub: Any,
) -> list[str]:
    """Add a LoRA (`PortraitPipeline.load_lora_weights`)."""
    transformer, encoder = pipeline.transformer, pipeline.text_encoder
    given = {"weight_name": weight_name, "subfolder": subfolder, "revision": revision}
    location = {key: value for key, value in given.items() if value is not None}
    is_state = isinstance(source, Mapping)
    what = "the state dict" if is_state else str(source)
    hub |= {"revision": revision} if revision else {}
    weights, config = (source, {}) if is_state else read_lora(source, weight_name, subfolder, **hub)
    if not weights:
        raise InputError(f"{what} is not a LoRA: it contains no weights")
    networks = {"transformer": transformer} | ({} if encoder is None else {"text_encoder": encoder})
    lora = match(networks, weights, config)
    if strict or not lora.state:
        reject(lora.reasons, f"{what} was not made for this network")
    name = name or free_name(pipeline)
    if name in loaded_names(pipeline):
        raise InputError(f"An adapter named {name!r} exists already: choose another adapter_name")
    if "." in name:
        raise InputError(f"adapter_name is {name!r}; it must not contain a dot")
    common = {"network_alphas": None, "metadata": lora.config, "adapter_name": name, "_pipeline": pipeline}
    for part, network in networks.items():
        if not any(key.startswith(f"{part}.") for key in lora.state):
            continue
        before = network.active_adapters() if getattr(network, "peft_config", {}) else []
        if part == "transformer":
            pipeline.load_lora_into_transformer(lora.state, transformer=transformer, **common)
        else:
            pipeline.load_lora_into_text_encoder(lora.state, text_encoder=encoder, prefix=part, **common)
        network.set_adapter([*before, name])
    pipeline.loras[name] = {"source": None if is_state else str(source), "strict": strict, **location}
    return [f"{key}: {reason}" for key, reason in sorted(lora.reasons.items())]


def add_loras(pipeline: Any, loras: Sequence[tuple[str, float]], *, strict: bool = True) -> list[str]:
    """Add LoRAs (files, folders or Hub ids, each with its strength) to the active adapters of a pipeline. With
    `strict=False`, return one line per weight that was left out.

    Raises `InputError` if one cannot be read or does not match.
    """
    left_out, strengths = [], {name: entry["scale"] for name, entry in active_adapters(pipeline).items()}
    for source, scale in loras:
        name = free_name(pipeline)
        left_out += load_lora(pipeline, source, name, strict=strict)
        strengths[name] = scale
    if loras:
        pipeline.set_adapters(list(strengths), list(strengths.values()))
    return left_out


def free_name(pipeline: Any) -> str:
    """Return the first unused name of lora_1, lora_2, ..."""
    return next(name for name in (f"lora_{number}" for number in count(1)) if name not in loaded_names(pipeline))


def loaded_names(pipeline: Any) -> set[str]:
    """Return the names of all loaded adapters, active or not; pipelines that share networks share them."""
    networks = pipeline.transformer, pipeline.text_encoder
    return {name for network in networks for name in getattr(network, "peft_config", {})}


def scaled_loras(call: Callable[..., Any]) -> Callable[..., Any]:
    """Multiply the scales of all active adapters by `attention_kwargs["scale"]` during a call of a pipeline, as in
    diffusers' Flux; afterwards they are as before.
    """

    @functools.wraps(call)
    def scaled(pipeline: Any, *args: Any, **kwargs: Any) -> Any:
        options: Any = kwargs.get("attention_kwargs") or {}
        if not isinstance(options, Mapping) or options.keys() - {"scale"}:
            raise InputError(f'attention_kwargs is {options!r}; pass {{"scale": s}}, the factor of all LoRAs')
        scale = number(options.get("scale", 1.0), "attention_kwargs['scale']")
        if scale != 1 and kwargs.get("output_type") == "sampling":
            raise InputError("attention_kwargs acts within a call: with output_type='sampling', use set_adapters")
        networks = (pipeline.transformer, pipeline.text_encoder) if scale != 1 else ()
        layers = [layer for network in networks if network for layer in network.modules() if hasattr(layer, "lora_A")]
        before = [dict(layer.scaling) for layer in layers]
        try:
            for layer in layers:
                layer.scaling.update({name: scale * value for name, value in layer.scaling.items()})
            return call(pipeline, *args, **kwargs)
        finally:
            for layer, own in zip(layers, before, strict=True):
                layer.scaling.update(own)

    return scaled


class Loras(FluxLoraLoaderMixin):
    """The methods of a pipeline that load and remove LoRAs; `loras`: LoRA -> how it was loaded, for recipes;
    `base_settings`: `sizes` and `defaults` of the base of an adapter folder.
    """

    transformer: Any
    text_encoder: Any
    loras: dict[str, dict[str, Any]]
    base_settings: dict[str, Any]

    def load_lora_weights(
        self,
        pretrained_model_name_or_path_or_dict: str | Mapping[str, Tensor],
        adapter_name: str | None = None,
        *,
        strict: bool = True,
        **kwargs: Any,
    ) -> list[str]:
        """Add a LoRA, for example a style or a step distillation, to the active adapters.

        A file in the names of diffusers, PEFT, kohya, XLabs or the original code; one that does not match is rejected.
        On FLUX.1 it changes text and image tokens; spatial tokens use FLUX.1's weights and the MDiTFace adapter.

        Args:
            pretrained_model_name_or_path_or_dict: a file, folder, Hub id or state dict.
            adapter_name: its name for `set_adapters`. Default: `lora_1`, `lora_2`, ...
            strict: whether to reject a LoRA that matches in part only.
            **kwargs: `weight_name` and `subfolder` in the folder or repository, `revision`, and further arguments of
                `huggingface_hub.hf_hub_download`, such as `token`. Recipes record the first three only.

        Returns:
            With `strict=False`, one line per weight that was left out, with the reason.

        Raises:
            InputError: it is not a LoRA, or does not match; every weight that does not is listed with the reason.
        """
        return load_lora(self, pretrained_model_name_or_path_or_dict, adapter_name, strict=strict, **kwargs)

    def delete_adapters(self, adapter_names: str | Sequence[str]) -> None:
        """As in diffusers. Without its own adapter, FLUX.1 has no conditions."""
        names = [adapter_names] if isinstance(adapter_names, str) else list(adapter_names)
        if (own := own_name(self.transformer)) in names:
            unload_adapter(self)
        if others := [name for name in names if name != own]:
            super().delete_adapters(others)
            for name in others:
                self.loras.pop(name, None)  # in place: pipelines that share the networks share it
        for network in (self.transformer, self.text_encoder):
            if network is not None and not getattr(network, "peft_config", {}):
                recurse_remove_peft_layers(network)  # remaining wrappers would rename the weights in a saved folder

    def unload_lora_weights(self, *args: Any, **kwargs: Any) -> None:
        """Remove all LoRAs and the adapter of an adapter folder."""
        unload_adapter(self)
        super().unload_lora_weights(*args, **kwargs)
        self.loras.clear()


# --- Recipes


def active_adapters(pipeline: Any) -> dict[str, dict[str, Any]]:
    """Return the active adapters of a pipeline, for the recipe: name -> `scale`, None if it differs between layers; for
    LoRAs also the arguments of `load_lora`.
    """
    layers: dict[str, list[Any]] = {}
    for network in (pipeline.transformer, pipeline.text_encoder):
        for layer in network.modules() if getattr(network, "peft_config", {}) else ():
            for name in layer.active_adapters if hasattr(layer, "lora_A") and not layer.disable_adapters else ():
                own = layers.setdefault(name, [])  # in the order of summation
                if name in layer.scaling:
                    own.append(layer)
    return {name: {"scale": strength(own, name), **pipeline.loras.get(name, {})} for name, own in layers.items()}


def strength(layers: Sequence[Any], name: str) -> float | None:
    """Return the argument of `set_adapters` that reproduces the scales of all layers of a LoRA bit for bit, a round
    number if possible; None if they differ.
    """
    known = []  # scale = strength * alpha / divisor
    for layer in layers:
        rank = layer.r[name]
        divisor = math.sqrt(rank) if layer.use_rslora.get(name) else rank
        known.append((layer.scaling[name], layer.lora_alpha[name], divisor))
    found = [scale * divisor / alpha for scale, alpha, divisor in known]
    if max(found) - min(found) > 1e-6:
        return None
    neighbors = [y for x in found for y in (x, math.nextafter(x, -math.inf), math.nextafter(x, math.inf))]
    exact = (
        x
        for x in (round(found[0], 6), *neighbors)
        if all(x * alpha / divisor == scale for scale, alpha, divisor in known)
    )
    return next(exact, found[0])


def restore_adapters(pipeline: Any, recorded: Mapping[str, Mapping[str, Any]]) -> None:
    """Activate the adapters of a recipe (`active_adapters`), and no others; an adapter folder is loaded with the model.
    Raises `InputError` if a LoRA was not loaded from a file, its strength differed between layers, or it cannot be
    loaded.
    """
    for name, entry in recorded.items():
        options = {key: value for key, value in entry.items() if key not in ("scale", "source")}
        if entry["scale"] is None:
            raise InputError(f"The strength of the LoRA {name!r} differed between layers, which recipes do not record")
        if name == own_name(pipeline.transformer):
            continue
        if entry.get("source") is None:
            raise InputError(f"The LoRA {name!r} was loaded from a state dict, not from a file")
        load_lora(pipeline, entry["source"], name, **options)
    if missing := sorted(recorded.keys() - active_adapters(pipeline).keys()):
        raise InputError(f"The model of the recipe has no adapter {missing[0]!r}: it is another model now")
    if recorded:
        pipeline.set_adapters(list(recorded), [entry["scale"] for entry in recorded.values()])
    elif active_adapters(pipeline):
        pipeline.disable_lora()
