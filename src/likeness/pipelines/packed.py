"""Weights at one byte each, for what ships with the package.

Matrices are stored as int8 with one scale an output channel, everything else in half precision, and all of it is
widened to float32 when loaded: the file is a quarter of the size, the computation is unchanged.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from diffusers import ConfigMixin
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

PACKED = "packed.safetensors"
SCALE = ".scale"


def pack(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A state dict with every floating matrix [O, ...] as int8 and its scales [O] under `<name>.scale`.

    Packing the result of `widen` again is exact: for every float32 s that is a quotient by 127, (127 s) / 127 is s.
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


def widen(packed: Mapping[str, Tensor], dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    """The inverse of `pack`, in `dtype`."""
    state = {}
    for name, value in packed.items():
        if name.endswith(SCALE) and name.removesuffix(SCALE) in packed:
            continue
        if value.dtype == torch.int8:
            scale = packed[name + SCALE].reshape(-1, *[1] * (value.ndim - 1))
            state[name] = (value.float() * scale).to(dtype)
        else:
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
    config.pop("_name_or_path", None)  # where it happened to lie on the machine that made it
    path.write_text(json.dumps(config, indent=2) + "\n")


def load_packed(model: nn.Module, folder: Path, dtype: torch.dtype = torch.float32) -> nn.Module:
    """Fill a model built on the meta device from `folder/packed.safetensors`."""
    model.load_state_dict(widen(load_file(folder / PACKED), dtype), strict=True, assign=True)
    return model.eval()
