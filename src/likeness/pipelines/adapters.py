"""What is trained on top of FLUX.1: MDiTFace's adapter, and the LoRAs of others beside it.

An adapter folder holds `adapter.safetensors` (the LoRA of the spatial stream, the rows of the conditions and, for
`concat`, the new matrix) and `adapter.json` (`Adapter`), which names the base model. A file is compared with the
network key by key before anything is changed, because PEFT would leave out silently what does not fit.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor, nn

from likeness.config import build, to_dict
from likeness.files import first_line, read_json, write_whole
from likeness.models.mditface import MDiTFaceTransformer
from likeness.models.tied_weights import NEW, lora_targets
from likeness.pipelines.sizes import ANY
from likeness.types import InputError
from likeness.weights.catalog import ADAPTER

WEIGHTS = "adapter.safetensors"

NAME = "mditface"
"""PEFT's name of the adapter, for `set_adapters`."""


@dataclass(frozen=True, kw_only=True)
class Adapter:
    """What an adapter folder says of itself, `adapter.json`."""

    base: str
    """The FLUX.1 that it was trained on: a folder or a hub id."""
    condition_names: tuple[str, ...]
    """The conditions it was trained with, in the order of their rows."""
    attention: Literal["holistic", "hard", "decoupled", "concat"] = "decoupled"
    """As in `MDiTFaceTransformer`."""
    static_modulation: Literal["text", "constant"] = "text"
    """Likewise."""
    text_reads_spatial: bool = True
    """Likewise."""
    targets: Literal["spatial", "all"] = "spatial"
    """Which layers the LoRA changes (`likeness.models.tied_weights.lora_targets`)."""
    rank: int = 8
    """Rank of the LoRA."""
    alpha: int = 8
    """Its scale is alpha / rank."""
    defaults: dict[str, Any] = field(default_factory=dict)
    """What the pipeline does where a request is silent: size, steps, guidance_scale, guidance_interval."""

    @property
    def network(self) -> dict[str, Any]:
        """The arguments of `MDiTFaceTransformer` that it decides."""
        names = ("condition_names", "attention", "static_modulation", "text_reads_spatial")
        return {name: getattr(self, name) for name in names}


def read_adapter(folder: Path) -> Adapter:
    """The configuration in an adapter folder.

    Raises:
        InputError: it cannot be read, or has unknown, missing or wrong entries.
    """
    path = folder / ADAPTER
    return build(Adapter, read_json(path), where=str(path))


def add_adapter(transformer: MDiTFaceTransformer, adapter: Adapter) -> None:
    """Put a new adapter on FLUX.1, as training begins with it: conditions of zero rows, a LoRA that changes nothing.

    Raises:
        InputError: the network has an adapter already, or cannot take this one.
    """
    from peft import LoraConfig

    check_network(transformer, adapter)
    old = transformer.condition_embed.weight
    set_conditions(transformer, adapter.network, old.new_zeros(len(adapter.condition_names), old.shape[1]))
    targets = lora_targets(transformer, adapter.targets)
    lora = LoraConfig(r=adapter.rank, lora_alpha=adapter.alpha, init_lora_weights="gaussian", target_modules=targets)
    transformer.add_adapter(lora, adapter_name=NAME)


def save_adapter(
    transformer: MDiTFaceTransformer, folder: Path, adapter: Adapter, state: Mapping[str, Tensor] | None = None
) -> None:
    """Write the adapter of a network.

    Args:
        transformer: a network with the adapter (`add_adapter`, `load_adapter`).
        folder: where.
        adapter: its configuration.
        state: its weights, where the network's own are spread over processes.

    Raises:
        InputError: the network has no adapter, another one than `adapter` says, or the folder cannot be written.
    """
    if NAME not in getattr(transformer, "peft_config", {}):
        raise InputError("the network has no MDiTFace adapter to save")
    state = state or adapter_state(transformer)
    refuse(compare(state, expected(transformer, adapter)), "the network's adapter is not as its configuration says")
    write_whole(folder / WEIGHTS, save({name: value.contiguous().cpu() for name, value in state.items()}))
    write_whole(folder / ADAPTER, json.dumps(to_dict(adapter), indent=2))


def load_adapter(pipeline: Any, folder: str | Path) -> None:
    """Put the adapter of a folder onto a pipeline with its base; `pipeline.set_adapters("mditface", 0.8)` scales it.

    Args:
        pipeline: an `MDiTFacePipeline` whose network is FLUX.1.
        folder: an adapter folder.

    Raises:
        InputError: the folder is broken, or the adapter was trained on another network: every weight that does not fit
            is listed.
    """
    from peft import set_peft_model_state_dict

    folder, transformer = Path(folder), pipeline.transformer
    adapter = read_adapter(folder)
    check_network(transformer, adapter)
    try:
        state = load_file(folder / WEIGHTS)
    except (OSError, SafetensorError) as error:
        raise InputError(f"{folder / WEIGHTS} cannot be read: {error}") from error
    refuse(compare(state, expected(transformer, adapter)), f"the adapter in {folder} does not fit this network")
    add_adapter(transformer, adapter)
    lora = {name: value for name, value in state.items() if not name.startswith(NEW)}
    set_peft_model_state_dict(transformer, lora, adapter_name=NAME)
    with torch.no_grad():
        for name, value in state.items():
            if name.startswith(NEW):
                transformer.get_parameter(name).copy_(value)
    pipeline.register_to_config(defaults={**pipeline.config.defaults, **adapter.defaults})
    if "size" in adapter.defaults:  # FLUX.1 generates at any size, its conditions were trained at this one
        pipeline.register_to_config(sizes=None)


def unload_adapter(pipeline: Any) -> None:
    """Take MDiTFace's adapter off, if there is one: what remains is FLUX.1, which takes words only."""
    transformer = pipeline.transformer
    if NAME not in getattr(transformer, "peft_config", {}):
        return
    transformer.delete_adapters(NAME)
    pipeline.register_to_config(sizes=ANY)
    set_conditions(transformer, {"condition_names": ()}, transformer.condition_embed.weight[:0])


def check_network(transformer: MDiTFaceTransformer, adapter: Adapter) -> None:
    """Refuse to put this adapter on this network."""
    config = transformer.config
    if not transformer.tied:
        raise InputError("this network has a spatial stream of its own: adapters are for FLUX.1")
    if NAME in getattr(transformer, "peft_config", {}):
        raise InputError("the network has an MDiTFace adapter already: unload it first")
    if (config.attention == "concat") != (adapter.attention == "concat"):
        raise InputError(
            f"the adapter's attention is {adapter.attention}, the network was built for {config.attention}: "
            f"load the base with attention={adapter.attention!r}"
        )


def set_conditions(transformer: MDiTFaceTransformer, network: Mapping[str, Any], rows: Tensor) -> None:
    """Give a network these options and condition rows, [conditions, D]."""
    transformer.register_to_config(**network)
    transformer.condition_embed = nn.Embedding.from_pretrained(rows.detach().clone(), freeze=False)


def adapter_state(transformer: MDiTFaceTransformer) -> dict[str, Tensor]:
    """The weights of a network's adapter: its LoRA, and what FLUX.1 lacks."""
    from peft import get_peft_model_state_dict

    lora = get_peft_model_state_dict(transformer, adapter_name=NAME)
    return lora | {name: value for name, value in transformer.state_dict().items() if name.startswith(NEW)}


def expected(transformer: MDiTFaceTransformer, adapter: Adapter) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the weights of such an adapter for this network."""
    shapes: dict[str, tuple[int, ...]] = {}
    for name in lora_targets(transformer, adapter.targets):
        layer = transformer.get_submodule(name)
        shapes[f"{name}.lora_A.weight"] = (adapter.rank, layer.in_features)
        shapes[f"{name}.lora_B.weight"] = (layer.out_features, adapter.rank)
    shapes |= {name: (*value.shape,) for name, value in transformer.state_dict().items() if name.startswith(NEW)}
    shapes["condition_embed.weight"] = (len(adapter.condition_names), transformer.condition_embed.embedding_dim)
    return shapes


def compare(found: Mapping[str, Tensor], wanted: Mapping[str, tuple[int, ...]]) -> dict[str, str]:
    """Which weights do not agree, and why."""
    reasons = {name: "missing" for name in wanted if name not in found}
    for name, value in found.items():
        if name not in wanted:
            reasons[name] = "no such weight"
        elif tuple(value.shape) != wanted[name]:
            reasons[name] = f"shape {tuple(value.shape)}, not {wanted[name]}"
    return reasons


def refuse(reasons: Mapping[str, str], what: str) -> None:
    """Raise `InputError` with one line for every weight, where there are any."""
    if reasons:
        lines = "".join(f"\n  {name}: {reason}" for name, reason in sorted(reasons.items()))
        raise InputError(f"{what}; {len(reasons)} weights are wrong:{lines}")


def load_lora(pipeline: Any, source: Any, name: str | None = None, *, strict: bool = True, **options: Any) -> list[str]:
    """Add a LoRA made for FLUX.1 (`MDiTFacePipeline.load_lora_weights`)."""
    transformer, encoder = pipeline.transformer, pipeline.text_encoder
    what = "the state dict" if isinstance(source, Mapping) else str(source)
    if what.endswith(".safetensors") and not Path(what).is_file():
        raise InputError(f"{what} cannot be read as a LoRA of FLUX.1: there is no such file")
    try:
        state, alphas, metadata = pipeline.lora_state_dict(
            dict(source) if isinstance(source, Mapping) else source,
            return_alphas=True,
            return_lora_metadata=True,
            **options,
        )
    except Exception as error:  # diffusers' and the hub's many ways to say no
        raise InputError(f"{what} cannot be read as a LoRA of FLUX.1: {first_line(error)}") from error
    if not any(key.startswith(("transformer.", "text_encoder.")) for key in state):
        state = {f"transformer.{key}": value for key, value in state.items()}  # as PEFT saves a single network
    reasons = dict(misfits({"transformer": transformer, "text_encoder": encoder}, state))
    fitting = {key: value for key, value in state.items() if key not in reasons}
    if strict or not fitting:
        refuse(reasons, f"{what} was not made for this network")
    before = transformer.active_adapters() if getattr(transformer, "peft_config", {}) else []
    name = name or free_name(pipeline)
    if name in getattr(transformer, "peft_config", {}):
        raise InputError(f"there is a LoRA of the name {name!r} already: choose another adapter_name")
    layers = {key.partition(".lora_")[0] for key in fitting}
    common = {
        "network_alphas": {key: value for key, value in (alphas or {}).items() if key.removesuffix(".alpha") in layers},
        "metadata": metadata,
        "adapter_name": name,
        "_pipeline": pipeline,
    }
    if any(layer.startswith("transformer.") for layer in layers):
        pipeline.load_lora_into_transformer(fitting, transformer=transformer, **common)
        transformer.set_adapter([*before, name])
    if any(layer.startswith("text_encoder.") for layer in layers):
        before = encoder.active_adapters() if getattr(encoder, "peft_config", {}) else []
        pipeline.load_lora_into_text_encoder(fitting, text_encoder=encoder, prefix="text_encoder", **common)
        encoder.set_adapter([*before, name])
    pipeline.loras[name] = {"source": None if isinstance(source, Mapping) else str(source), "strict": strict, **options}
    return [f"{key}: {reason}" for key, reason in sorted(reasons.items())]


def add_loras(pipeline: Any, loras: Sequence[tuple[str, float]], *, strict: bool = True) -> list[str]:
    """Add LoRAs made for FLUX.1 to what acts already.

    Args:
        pipeline: an `MDiTFacePipeline`.
        loras: files, folders or hub ids, each with its strength.
        strict: whether to refuse what fits in part only.

    Returns:
        With `strict=False`, what was left out: one line a weight.

    Raises:
        InputError: the pipeline takes no LoRA, or one cannot be read or does not fit.
    """
    if loras and not hasattr(pipeline, "loras"):
        raise InputError(f"{type(pipeline).__name__} takes no LoRA: {loras[0][0]} would have to be made for FLUX.1")
    left_out, strengths = [], {name: entry["scale"] for name, entry in acting(pipeline).items()}
    for source, scale in loras:
        name = free_name(pipeline)
        left_out += load_lora(pipeline, source, name, strict=strict)
        strengths[name] = scale
    if loras:
        pipeline.set_adapters(list(strengths), list(strengths.values()))
    return left_out


def free_name(pipeline: Any) -> str:
    """The first of lora_1, lora_2, ... that no LoRA has."""
    return next(name for name in (f"lora_{number}" for number in count(1)) if name not in pipeline.loras)


def acting(pipeline: Any) -> dict[str, dict[str, Any]]:
    """What acts on a pipeline's networks beside their own weights, for the recipe: name -> its `scale`, None where
    it differs from layer to layer; and of LoRAs of others, how `load_lora` was called.
    """
    found: dict[str, list[Any]] = {}
    for network in (pipeline.transformer, pipeline.text_encoder):
        for layer in network.modules() if getattr(network, "peft_config", {}) else ():
            for name in layer.active_adapters if hasattr(layer, "lora_A") and not layer.disable_adapters else ():
                layers = found.setdefault(name, [])  # in the order in which they are added up
                if name in layer.scaling:
                    layers.append(layer)
    known = getattr(pipeline, "loras", {})
    return {name: {"scale": strength(layers, name), **known.get(name, {})} for name, layers in found.items()}


def strength(layers: Sequence[Any], name: str) -> float | None:
    """What `set_adapters` was given for a LoRA: the number, round if possible, that gives the scales of all its layers
    again to the bit; None where they differ.
    """
    known = []  # scale = strength * alpha / divisor
    for layer in layers:
        rank = layer.r[name]
        divisor = math.sqrt(rank) if layer.use_rslora.get(name) else rank
        known.append((layer.scaling[name], layer.lora_alpha[name], divisor))
    found = [scale * divisor / alpha for scale, alpha, divisor in known]
    if max(found) - min(found) > 1e-6:
        return None
    near = [
        round(found[0], 6),
        *(y for x in found for y in (x, math.nextafter(x, -math.inf), math.nextafter(x, math.inf))),
    ]
    fits = (x for x in near if all(x * alpha / divisor == scale for scale, alpha, divisor in known))
    return next(fits, found[0])


def act_again(pipeline: Any, recorded: Mapping[str, Mapping[str, Any]]) -> None:
    """Let act what `acting` recorded; the model's own adapter is loaded with it.

    Raises:
        InputError: a LoRA came from no file, or its strengths differed from layer to layer; one cannot be loaded.
    """
    for name, entry in recorded.items():
        options = {key: value for key, value in entry.items() if key not in ("scale", "source")}
        if entry["scale"] is None:
            raise InputError(f"the strength of the LoRA {name!r} differed from layer to layer: no recipe holds that")
        if name == NAME:
            continue
        if entry.get("source") is None:
            raise InputError(f"the LoRA {name!r} was given as numbers, not as a file: it cannot be loaded again")
        if not hasattr(pipeline, "loras"):
            raise InputError(f"the recipe has the LoRA {entry['source']}, but {type(pipeline).__name__} takes none")
        load_lora(pipeline, entry["source"], name, **options)
    if absent := [name for name in recorded if name not in acting(pipeline)]:
        raise InputError(f"the recipe's model has no adapter {absent[0]!r}: it is another one now")
    if recorded:
        pipeline.set_adapters(list(recorded), [entry["scale"] for entry in recorded.values()])


def misfits(networks: Mapping[str, nn.Module], state: Mapping[str, Tensor]) -> Iterator[tuple[str, str]]:
    """Which weights of a LoRA do not fit, and why; a layer's weights fit together or not at all."""
    layers: dict[str, dict[str, Tensor]] = {}
    for key, value in state.items():
        layer, _, leaf = key.partition(".lora_")
        layers.setdefault(layer, {})[leaf] = value
    modules = {f"{part}.{name}": layer for part, net in networks.items() for name, layer in net.named_modules()}
    for layer, weights in layers.items():
        if reason := misfit(modules.get(layer), weights):
            yield from ((f"{layer}.lora_{leaf}" if leaf else layer, reason) for leaf in weights)


def misfit(module: nn.Module | None, weights: Mapping[str, Tensor]) -> str:
    """Why a layer's LoRA does not fit it; the empty string where it does."""
    if not {"A.weight", "B.weight"} <= set(weights) <= {"A.weight", "B.weight", "B.bias"}:
        return "no pair of LoRA matrices"
    if module is None:
        return "no such layer"
    if not hasattr(module, "in_features"):
        return f"the layer is a {type(module).__name__}, not a Linear"
    down, up = weights["A.weight"], weights["B.weight"]  # [rank, in], [out, rank]
    wanted = (module.out_features, module.in_features)
    if (up.shape[0], down.shape[1]) != wanted:
        return f"for a layer {up.shape[0]} x {down.shape[1]}; here it is {wanted[0]} x {wanted[1]}"
    return "" if up.shape[1] == down.shape[0] else f"ranks {down.shape[0]} and {up.shape[1]}"
