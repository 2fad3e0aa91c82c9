"""Weights at one byte per value, for the bundled models.

Matrices are stored as int8 with one scale per output channel, other tensors in half precision. Loading converts all of
them, by default to float32: the file is a quarter of the size, the computation is unchanged.
"""

from __future__ import annotations

import importlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights
from diffusers import ConfigMixin
from safetensors.torch import load_file, save_file
from torch import Tensor

from likeness.files import first_line, read_json
from likeness.types import InputError

PACKED = "packed.safetensors"
SCALE = ".scale"


def pack(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return a state dict with each floating-point matrix [O, ...] as int8, and its scales [O] as `<name>.scale`.

    Packing the result of `unpack` again is exact: for every float32 s that is a quotient by 127, (127 s) / 127 is s.
    """
    packed = {}
    for name, value in state.items():
        if not value.is_floating_point():
            packed[name] = value.contiguous()
        elif value.ndim < 2:
            packed[name] = value.to(torch.float16).contiguous()
        else:
            rows = value.float().flatten(1)  # [O, I]
            scale = rows.abs().amax(dim=1).clamp(min=1e-12) / 127  # [O]
            packed[name] = (rows / scale[:, None]).round().to(torch.int8).reshape(value.shape).contiguous()
            packed[name + SCALE] = scale
    return packed


def unpack(packed: Mapping[str, Tensor], dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    """Return the state dict of a packed one, in `dtype`."""
    state = {}
    for name, value in packed.items():
        if value.dtype == torch.int8:
            scale = packed[name + SCALE].reshape(-1, *[1] * (value.ndim - 1))
            state[name] = (value.float() * scale).to(dtype)
        elif not (name.endswith(SCALE) and name.removesuffix(SCALE) in packed):
            state[name] = value.to(dtype) if value.is_floating_point() else value
    return state


def save_packed(model: Any, folder: Path) -> None:
    """Write a diffusers or transformers model as `folder/packed.safetensors` and `folder/config.json`."""
    folder.mkdir(parents=True, exist_ok=True)
    save_file(pack(model.state_dict()), folder / PACKED, metadata={"format": "pt"})
    if isinstance(model, ConfigMixin):
        model.save_config(folder)
    else:
        model.config.save_pretrained(folder)
    path = folder / "config.json"
    config = json.loads(path.read_text())
    config.pop("_name_or_path", None)  # a path on this machine
    path.write_text(json.dumps(config, indent=2) + "\n")


def load_component(folder: Path, library: str, class_name: str, dtype: torch.dtype = torch.float32) -> Any:
    """Load a component from its folder, packed or not.

    Args:
        folder: its folder, with `config.json`.
        library: the module of its class, as in `model_index.json`.
        class_name: its class.
        dtype: dtype of packed weights.

    Raises:
        InputError: the class is from another library, or packed weights cannot be read.
    """
    cls = component_class(library, class_name)
    if not (folder / PACKED).is_file():
        return cls.from_pretrained(folder)
    config = read_json(folder / "config.json")
    try:
        with init_empty_weights(include_buffers=False):
            model = cls(cls.config_class.from_dict(config)) if library == "transformers" else cls.from_config(config)
        model.load_state_dict(unpack(load_file(folder / PACKED), dtype), assign=True)
    except Exception as error:
        raise InputError(f"The weights in {folder} cannot be read: {first_line(error)}") from error
    return model.eval()


def component_class(library: str, class_name: str) -> Any:
    """Return a class of diffusers, transformers or this package, as named in `model_index.json`."""
    if library.split(".")[0] not in ("diffusers", "transformers", "likeness"):
        raise InputError(
            f"Component {library}.{class_name} is not supported: only diffusers, transformers and likeness"
        )
    return getattr(importlib.import_module(library), class_name)
