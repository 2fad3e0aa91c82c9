"""The names of FLUX.1's original code: of LoRAs, and of checkpoints in a single file.

diffusers' own converter has the width of FLUX.1 built in; this one reads sizes from the network and the file.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

import torch
from diffusers import GGUFQuantizationConfig, ModelMixin
from diffusers.quantizers import DiffusersAutoQuantizer
from torch import Tensor, nn

from likeness.models.tied_weights import image_name, init_missing, record_counterparts, set_parameter, spatial_weights
from likeness.types import InputError
from likeness.weights.files import check_pointer, read_weights

Model = TypeVar("Model", bound=ModelMixin)

QKV, TEXT_QKV = "attn.to_q attn.to_k attn.to_v", "attn.add_q_proj attn.add_k_proj attn.add_v_proj"

ORIGINAL = {
    "double_blocks": {
        "img_attn.qkv": QKV,
        "img_attn.proj": "attn.to_out.0",
        "img_mlp.0": "ff.net.0.proj",
        "img_mlp.2": "ff.net.2",
        "img_mod.lin": "norm1.linear",
        "txt_attn.qkv": TEXT_QKV,
        "txt_attn.proj": "attn.to_add_out",
        "txt_mlp.0": "ff_context.net.0.proj",
        "txt_mlp.2": "ff_context.net.2",
        "txt_mod.lin": "norm1_context.linear",
        "img_attn.norm.query_norm": "attn.norm_q",
        "img_attn.norm.key_norm": "attn.norm_k",
        "txt_attn.norm.query_norm": "attn.norm_added_q",
        "txt_attn.norm.key_norm": "attn.norm_added_k",
        "processor.qkv_lora1": QKV,
        "processor.proj_lora1": "attn.to_out.0",
        "processor.qkv_lora2": TEXT_QKV,
        "processor.proj_lora2": "attn.to_add_out",
    },
    "single_blocks": {
        "linear1": f"{QKV} proj_mlp",
        "linear2": "proj_out",
        "modulation.lin": "norm.linear",
        "norm.query_norm": "attn.norm_q",
        "norm.key_norm": "attn.norm_k",
        "processor.qkv_lora": QKV,
        "processor.proj_lora": "proj_out",
    },
    "": {
        "img_in": "x_embedder",
        "txt_in": "context_embedder",
        "time_in.in_layer": "time_text_embed.timestep_embedder.linear_1",
        "time_in.out_layer": "time_text_embed.timestep_embedder.linear_2",
        "guidance_in.in_layer": "time_text_embed.guidance_embedder.linear_1",
        "guidance_in.out_layer": "time_text_embed.guidance_embedder.linear_2",
        "vector_in.in_layer": "time_text_embed.text_embedder.linear_1",
        "vector_in.out_layer": "time_text_embed.text_embedder.linear_2",
        "final_layer.linear": "proj_out",
        "final_layer.adaLN_modulation.1": "norm_out.linear",
    },
}
"""Layers of the original code and of XLabs' LoRAs, by block -> the layers here whose outputs they concatenate."""

SHIFT_FIRST = "final_layer.adaLN_modulation.1"
"""The layer whose output has shift and scale in the other order."""

PREFIX = "model.diffusion_model."
"""Prefix of the transformer's weights in a file that also contains other components."""


def load_original(cls: type[Model], path: Path, dtype: torch.dtype, head_dim: int, options: dict[str, Any]) -> Model:
    """Load a transformer from a single file in the names of the original code. For the arguments and errors see
    `MDiTFaceTransformer.from_single_file`.
    """
    weights = read_gguf(path) if path.suffix == ".gguf" else read_weights(path)
    weights = {key.removeprefix(PREFIX): x for key, x in weights.items() if key.startswith(PREFIX)} or weights
    with torch.device("meta"):
        model = cls.from_config(original_config(weights, head_dim) | {"condition_names": ()} | options)
    state = from_original(model, weights)
    if any(is_quantized(value) for value in state.values()):
        if not model.tied:
            raise InputError(f"{path} is quantized: spatial_stream must be 'lora', which shares its weights")
        everywhere = state | {name: state[image_name(name)] for name in spatial_weights(model)}
        quantizer = DiffusersAutoQuantizer.from_config(GGUFQuantizationConfig(compute_dtype=dtype))
        quantizer.preprocess_model(model, device_map=None, state_dict=everywhere)  # replaces the layers
        model.hf_quantizer = quantizer  # so that saving is rejected
        record_counterparts(model)
    for name, value in state.items():
        set_parameter(model, name, value if isinstance(value, nn.Parameter) else nn.Parameter(value.to(dtype)))
    model.tie_weights()
    init_missing(model, [name for name, _ in model.named_parameters() if name not in state])
    return model.eval()


def read_gguf(path: Path) -> dict[str, Tensor]:
    """Read a GGUF file: matrices with a quantized type become diffusers' `GGUFParameter`, all others tensors. Raises
    `InputError` if it cannot be read, or the package gguf is missing.
    """
    check_pointer(path)
    try:
        from diffusers.models.model_loading_utils import load_gguf_checkpoint
        from diffusers.quantizers.gguf.utils import dequantize_gguf_tensor

        weights = load_gguf_checkpoint(path)
    except ImportError as error:
        raise InputError("GGUF files require gguf: pip install 'likeness[quantize]'") from error
    except (ValueError, IndexError, OSError) as error:
        raise InputError(f"{path} is not a GGUF file that diffusers can read: {error}") from error
    return {
        name: value if is_quantized(value) and value.quant_type.name != "BF16" else dequantize_gguf_tensor(value)
        for name, value in weights.items()
    }


def is_quantized(value: Tensor) -> bool:
    """Return whether a tensor is a `GGUFParameter`."""
    return hasattr(value, "quant_type")


def shape_of(value: Tensor) -> tuple[int, ...]:
    """Return the shape of a tensor, which a quantized one stores separately."""
    return tuple(getattr(value, "quant_shape", value.shape))


def original_names(transformer: Any) -> dict[str, list[str]]:
    """Return the layers of the original code of FLUX.1 -> those here."""
    found = {name: [target] for name, target in ORIGINAL[""].items()}
    for theirs, ours in (("double_blocks", "transformer_blocks"), ("single_blocks", "single_transformer_blocks")):
        for index in range(len(getattr(transformer, ours))):
            for name, targets in ORIGINAL[theirs].items():
                found[f"{theirs}.{index}.{name}"] = [f"{ours}.{index}.{target}" for target in targets.split()]
    return found


def original_config(weights: Mapping[str, Tensor], head_dim: int) -> dict[str, Any]:
    """Return the sizes of a FLUX.1 from the weights of the original code, with heads of width `head_dim`. Raises
    `InputError` if one of the weights that determine them is missing.
    """
    count = lambda kind: len({key.split(".")[1] for key in weights if key.startswith(f"{kind}.")})  # noqa: E731
    try:
        (width, channels), text, pooled = (
            shape_of(weights[f"{name}.weight"]) for name in ("img_in", "txt_in", "vector_in.in_layer")
        )
    except (KeyError, ValueError) as error:
        raise InputError(f"The file has no transformer of FLUX.1 in the names of the original code: {error}") from error
    return {
        "in_channels": channels,
        "num_layers": count("double_blocks"),
        "num_single_layers": count("single_blocks"),
        "num_attention_heads": width // head_dim,
        "attention_head_dim": head_dim,
        "joint_attention_dim": text[1],
        "pooled_projection_dim": pooled[1],
        "guidance_embeds": any(key.startswith("guidance_in.") for key in weights),
    }


def from_original(transformer: Any, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Convert the weights of the original code to those of a transformer with the same sizes. Raises `InputError` if a
    weight is unknown or has another shape.
    """
    names, found = original_names(transformer), {}
    for key, value in weights.items():
        layer, _, leaf = key.rpartition(".")
        leaf = "weight" if leaf == "scale" else leaf  # of an RMSNorm
        targets = names.get(layer, [])
        modules = [transformer.get_submodule(target) for target in targets]
        own = [weight for module in modules if (weight := getattr(module, leaf, None)) is not None]
        if not own or len(own) < len(targets):
            raise InputError(f"{key} is not a weight of FLUX.1 in the names of the original code")
        shape = (sum(len(weight) for weight in own), *own[0].shape[1:])
        if shape_of(value) != shape:
            raise InputError(f"{key} has shape {shape_of(value)}, not {shape}")
        if layer == SHIFT_FIRST:
            value = torch.cat([*value.chunk(2)][::-1])
        parts = value.split([len(weight) for weight in own])
        found |= {f"{target}.{leaf}": part for target, part in zip(targets, parts, strict=True)}
    return found
