"""LoRA files: where they are, and which layers of the network their keys name.

Training tools name the same layers differently: as diffusers, as the original code of FLUX.1, with dots or underscores.
Every key is looked up under its own name and is either used or reported with the reason. The converters of diffusers
would drop keys that they do not know, such as those of T5 or DoRA.

r is the rank of a LoRA; A [r, in] and B [out, r] are its matrices.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from likeness.files import first_line, read_json
from likeness.models.original_flux import SHIFT_FIRST, original_names
from likeness.types import InputError
from likeness.weights.catalog import is_hub_id
from likeness.weights.files import opened_weights, read_weights

METADATA = "lora_adapter_metadata"
"""Key of diffusers in the header of a file: the options of `LoraConfig` as JSON."""

CONFIG = "adapter_config.json"
"""PEFT's configuration, next to the weights."""

SCALES = ("lora_alpha", "alpha_pattern", "use_rslora")
"""Options of `LoraConfig` that a file's configuration determines; the others follow from its weights."""

USUAL_NAMES = ("pytorch_lora_weights.safetensors", "adapter_model.safetensors")
"""Names of weights that diffusers and PEFT write."""

PREFIXES = {
    "transformer": ("", "transformer.", "base_model.model.", "diffusion_model.", "lora_unet_", "lora_transformer_"),
    "text_encoder": ("text_encoder.", "lora_te1_", "lora_te_", "text_encoders.clip_l.transformer."),
}
"""Part of the pipeline -> what the keys of its layers begin with."""

LEAF = re.compile(
    r"(?P<layer>.+?)\.(?:(?:lora_|lora\.|lora_linear_layer\.)?(?P<matrix>A|B|down|up)(?:\.default)?\.(?P<kind>weight|bias)"
    r"|(?P<other>alpha|dora_scale|lora_magnitude_vector.*|[^.]+))"
)
"""A key: its layer, and which of its weights it is."""


class Lora(NamedTuple):
    """A LoRA, matched with a pipeline."""

    state: dict[str, Tensor]
    """`<part>.<layer>.lora_A.weight`, `lora_B.weight` and possibly `lora_B.bias`, of layers of the pipeline."""
    config: dict[str, Any]
    """`<part>.<option>` for PEFT's `LoraConfig`."""
    reasons: dict[str, str]
    """Keys that do not match, with the reason."""


def read_lora(source: str | Path, weight_name: str | None, subfolder: str | None, **hub: Any) -> tuple[dict, dict]:
    """Return the weights of a LoRA and the `<part>.<option>` of `LoraConfig` that it was saved with.

    `source` is a file, folder or Hub id, `weight_name` the file in it if there are several, `subfolder` a folder in it;
    `hub` are arguments of `huggingface_hub.hf_hub_download`, such as `revision` and `token`. Raises `InputError` if it
    does not exist or cannot be read.
    """
    path, config = Path(source), {}
    if not path.exists():
        if path.suffix == ".safetensors" or not is_hub_id(source):
            raise InputError(f"{source} does not exist: pass a LoRA file, its folder, or a Hub id such as owner/name")
        path = download(str(source), weight_name, subfolder, **hub)
    elif path.is_dir():
        folder = path / (subfolder or "")
        path = folder / (weight_name or choose([file.name for file in folder.glob("*.safetensors")], source))
    if path.suffix != ".safetensors":
        raise InputError(f"The LoRA {path} is not a .safetensors file: convert it, because other formats can run code")
    with opened_weights(path) as file:
        metadata = (file.metadata() or {}).get(METADATA, "{}")
    try:
        config = json.loads(metadata)
    except (ValueError, RecursionError):
        config = None
    if not isinstance(config, dict):
        raise InputError(f"The metadata of the LoRA {path} are {metadata[:80]!r}; they must be a mapping")
    if (path.parent / CONFIG).is_file() and path.name == USUAL_NAMES[1]:
        config = {f"transformer.{name}": value for name, value in read_json(path.parent / CONFIG).items()}
    for name, value in config.items():
        numbers = {"lora_alpha": [value], "alpha_pattern": [*value.values()] if isinstance(value, dict) else [value]}
        for number in numbers.get(name.rpartition(".")[2], []):
            if not isinstance(number, int | float) or not 0 < abs(number) <= sys.float_info.max:
                raise InputError(f"{name} of the LoRA {path} is {value!r}; it must be a finite number other than 0")
        for pattern in value if name.endswith("alpha_pattern") and isinstance(value, dict) else ():
            try:
                re.compile(pattern)
            except re.error as error:
                message = f"{name} of the LoRA {path} has {pattern!r}, which is not a regular expression: {error}"
                raise InputError(message) from error
    return read_weights(path), config


def choose(names: Sequence[str], source: Any) -> str:
    """Return the file of a folder that contains the weights. Raises `InputError` if it is not clear which."""
    found = [name for name in USUAL_NAMES if name in names] or sorted(names)
    if len(found) != 1:
        raise InputError(f"{source} has {', '.join(found) or 'no .safetensors file'}: pass one .safetensors file")
    return found[0]


def download(repository: str, weight_name: str | None, subfolder: str | None, **hub: Any) -> Path:
    """Download the weights of a LoRA and its configuration. Raises `InputError` if they are not available."""
    from huggingface_hub import hf_hub_download, list_repo_files

    folder = f"{subfolder}/" if subfolder else ""
    try:
        if weight_name is None:
            where = {name: hub[name] for name in ("revision", "token") if name in hub}
            files = [name for name in list_repo_files(repository, **where) if name.startswith(folder)]
            names = [name.removeprefix(folder) for name in files]
            weight_name = choose([n for n in names if n.endswith(".safetensors") and "/" not in n], repository)
            if CONFIG in names:
                hf_hub_download(repository, folder + CONFIG, **hub)
        return Path(hf_hub_download(repository, folder + weight_name, **hub))
    except InputError:
        raise
    except Exception as error:  # of many types: offline, gated, missing
        raise InputError(f"{repository} is neither a file nor available on the Hub: {first_line(error)}") from error


def match(networks: Mapping[str, nn.Module], weights: Mapping[str, Tensor], config: Mapping[str, Any]) -> Lora:
    """Match a LoRA (`read_lora`) with the networks of a pipeline's parts. The keys of a layer match only together."""
    names = layer_names(networks)
    modules = {f"{part}.{name}": module for part, net in networks.items() for name, module in net.named_modules()}
    layers: dict[str, dict[str, str]] = {}  # layer -> which of its weights -> key
    for key in weights:
        found = LEAF.fullmatch(key)
        layer, leaf = (found["layer"], leaf_of(found)) if found else (key, "")
        layers.setdefault(layer, {})[leaf] = key
    state: dict[str, Tensor] = {}
    reasons: dict[str, str] = {}
    for layer, keys in layers.items():
        targets = names.get(flat(layer), [])
        values = {leaf: weights[key] for leaf, key in keys.items()}
        reason = mismatch([modules[target] for target in targets], values)
        if not reason and any(f"{target}.lora_A.weight" in state for target in targets):
            reason = f"repeats {', '.join(targets)}"
        if not reason and "alpha" in values and f"{targets[0].partition('.')[0]}.lora_alpha" in config:
            reason = "alpha is also in the metadata of the file"
        if reason:
            reasons |= dict.fromkeys(keys.values(), reason)
        else:
            state |= split(targets, modules, values, swap=flat(layer).endswith(flat(SHIFT_FIRST)))
    found = [options(part, state, config) for part in networks]
    return Lora(state, {name: value for each in found for name, value in each.items()}, reasons)


def leaf_of(found: re.Match[str]) -> str:
    """Return A, B, bias (of B), alpha, or the end of a key that is none of them."""
    if found["other"]:
        return found["other"]
    matrix = {"down": "A", "up": "B"}.get(found["matrix"], found["matrix"])
    return matrix if found["kind"] == "weight" else "bias" if matrix == "B" else "A.bias"


def flat(name: str) -> str:
    """Return the name of a layer with underscores, as kohya's scripts write it."""
    return name.replace(".", "_")


def layer_names(networks: Mapping[str, nn.Module]) -> dict[str, list[str]]:
    """Return the names of layers in files, with underscores -> the layers `<part>.<name>` that they concatenate."""
    found: dict[str, list[str]] = {}
    for part, network in networks.items():
        own = {name: [name] for name, _ in network.named_modules() if name}
        if hasattr(network, "single_transformer_blocks"):
            own |= original_names(network)
        for name, layers in own.items():
            inner = name.removeprefix("text_model.")  # transformers 5 has removed this level
            spelled = [inner, f"text_model.{inner}"] if part == "text_encoder" else [name]
            for prefix in PREFIXES[part]:
                for written in spelled:
                    found[flat(prefix + written)] = [f"{part}.{layer}" for layer in layers]
    return found


def mismatch(modules: Sequence[Any], weights: Mapping[str, Tensor]) -> str:
    """Return why the LoRA of a layer does not match the modules that it names; "" if it does."""
    if any("dora" in leaf or "magnitude" in leaf for leaf in weights):
        return "DoRA magnitudes are not supported"
    if not {"A", "B"} <= set(weights) <= {"A", "B", "bias", "alpha"}:
        return "not a pair of LoRA matrices"
    if not modules:
        return "unknown layer"
    for module in modules:
        if not hasattr(module, "in_features"):
            return f"the layer is a {type(module).__name__}, not a Linear"
    down, up = weights["A"], weights["B"]  # [r, in], [out, r]
    if down.ndim != 2 or up.ndim != 2 or any(weights[leaf].numel() != 1 for leaf in weights if leaf == "alpha"):
        return "not matrices"
    out, inner = sum(module.out_features for module in modules), modules[0].in_features
    if (up.shape[0], down.shape[1]) != (out, inner):
        return f"for a layer of {up.shape[0]} x {down.shape[1]}; this one is {out} x {inner}"
    if up.shape[1] != down.shape[0] or not len(down):
        return f"ranks {down.shape[0]} and {up.shape[1]}"
    if "bias" in weights and tuple(weights["bias"].shape) != (out,):
        return f"a bias of shape {tuple(weights['bias'].shape)}, not {(out,)}"
    return "" if all(value.float().isfinite().all() for value in weights.values()) else "not finite (NaN or Inf)"


def split(
    targets: Sequence[str], modules: Mapping[str, Any], weights: Mapping[str, Tensor], *, swap: bool
) -> dict[str, Tensor]:
    """Return the LoRA of a layer as those of the modules whose outputs it concatenates, with its alpha / r applied."""
    down, up, bias = weights["A"], weights["B"], weights.get("bias")
    if "alpha" in weights:
        small, large = float(weights["alpha"]) / len(down), 1.0
        bias = None if bias is None else bias * small
        while abs(small) * 2 < large:  # both matrices in the range of half precision, as diffusers does
            small, large = small * 2, large / 2
        down, up = down * small, up * large
    rows = [modules[target].out_features for target in targets]
    if swap:
        up = torch.cat(up.chunk(2)[::-1])
        bias = None if bias is None else torch.cat(bias.chunk(2)[::-1])
    state = {}
    for index, target in enumerate(targets):
        state[f"{target}.lora_A.weight"] = down
        state[f"{target}.lora_B.weight"] = up.split(rows)[index].contiguous()  # [out, r]
        if bias is not None:
            state[f"{target}.lora_B.bias"] = bias.split(rows)[index].contiguous()
    return state


def options(part: str, state: Mapping[str, Tensor], config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the `<part>.<option>` of `LoraConfig` for the layers of a part. Ranks are those of the matrices, scales
    those of the file's configuration or 1.
    """
    down = ".lora_A.weight"
    own = {key.removeprefix(f"{part}."): value for key, value in state.items() if key.startswith(f"{part}.")}
    ranks = {key.removesuffix(down): len(value) for key, value in own.items() if key.endswith(down)}
    if not ranks:
        return {}
    rank = next(iter(ranks.values()))
    pattern = {f"^{re.escape(layer)}": r for layer, r in ranks.items()}  # ^: not the end of a longer name
    known = {name: config[f"{part}.{name}"] for name in SCALES if f"{part}.{name}" in config}
    found = {
        "r": rank,
        "rank_pattern": pattern,
        "target_modules": "|".join(map(re.escape, ranks)),
        "lora_bias": any(key.endswith(".bias") for key in own),
        **(known or {"lora_alpha": rank, "alpha_pattern": pattern}),
    }
    return {f"{part}.{name}": value for name, value in found.items()}
