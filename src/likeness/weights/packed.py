"""Weights at one byte or half a byte per value, for the bundled models.

Matrices are stored as int8 with one scale per output channel, other tensors in half precision. A model that was trained
from a packed one may be stored as the difference from it, in 4 bits: its weights differ by little more than the error
of 8 bits. Loading converts all to float32 by default: the files are small, the computation is unchanged.
"""

from __future__ import annotations

import importlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights
from diffusers import ConfigMixin
from safetensors.torch import save_file
from torch import Tensor

from likeness.files import first_line, read_json
from likeness.types import InputError
from likeness.weights.files import check_files, opened_weights, read_weights
from likeness.weights.hashes import file_hash

PACKED = "packed.safetensors"
DIFFERENCE = "difference.safetensors"
SCALE = ".scale"

COMPONENT_CLASSES = {
    "likeness.models.mmface": ("MMFaceTransformer",),
    "likeness.models.label_decoder": ("LabelDecoder",),
    "likeness.models.mditface": ("MDiTFaceTransformer",),
    "diffusers": ("AutoencoderDC", "AutoencoderKL", "AutoencoderTiny", "FluxTransformer2DModel"),
    "transformers": (
        *("CLIPModel", "CLIPTextModel", "T5EncoderModel", "SegformerForSemanticSegmentation"),
        *("CLIPTokenizer", "CLIPTokenizerFast", "T5Tokenizer", "T5TokenizerFast"),
        *("PreTrainedTokenizerFast", "TokenizersBackend"),
    ),
}
"""Module -> the classes of components that a model folder may name, in addition to the schedulers of diffusers."""


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


def pack_difference(state: Mapping[str, Tensor], base: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the difference of two state dicts with equal names and shapes, each matrix [O, ...] of I values per row in
    4 bits: uint8 [O, ceil(I / 2)], two values plus 8 per byte, the first in the low bits, and scales [O].
    """
    packed = {}
    for name, value in state.items():
        difference = value.float() - base[name].float()
        if value.ndim < 2:
            packed[name] = difference.to(torch.float16).contiguous()
            continue
        rows = difference.flatten(1)  # [O, I]
        scale = rows.abs().amax(dim=1).clamp(min=1e-12) / 7  # [O]
        codes = (rows / scale[:, None]).round().to(torch.int16) + 8  # 1 to 15
        codes = torch.nn.functional.pad(codes, (0, codes.shape[1] % 2), value=8)
        packed[name] = (codes[:, ::2] + 16 * codes[:, 1::2]).to(torch.uint8).contiguous()
        packed[name + SCALE] = scale
    return packed


def add_difference(
    base: Mapping[str, Tensor], packed: Mapping[str, Tensor], dtype: torch.dtype = torch.float32
) -> dict[str, Tensor]:
    """Return the state dict of which `packed` is the difference from `base`, in `dtype`."""
    state = {}
    for name, value in base.items():
        difference = packed[name]
        if difference.dtype == torch.uint8:
            codes = torch.stack([difference % 16, difference // 16], dim=-1).flatten(1)  # [O, 2 ceil(I / 2)]
            rows = (codes.float() - 8) * packed[name + SCALE][:, None]
            difference = rows[:, : value[0].numel()].reshape(value.shape)
        state[name] = (value.float() + difference.float()).to(dtype)
    return state


def is_packed(folder: Path) -> bool:
    """Return whether the weights in a component's folder are packed."""
    return (folder / PACKED).is_file() or (folder / DIFFERENCE).is_file()


def read_packed(folder: Path, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    """Read a packed state dict. Raises `InputError` if it is a difference from weights that are missing or have
    changed.
    """
    if not (folder / DIFFERENCE).is_file():
        return unpack(read_weights(folder / PACKED), dtype)
    with opened_weights(folder / DIFFERENCE) as file:
        metadata = file.metadata()
    base = folder / metadata["base"]
    if not (base / PACKED).is_file() or file_hash(base / PACKED) != metadata["base_hash"]:
        raise InputError(f"{folder} is the difference from {base.resolve()}, which is missing or has changed")
    return add_difference(read_packed(base), read_weights(folder / DIFFERENCE), dtype)


def save_packed(model: Any, folder: Path, base: Path | None = None) -> None:
    """Write a diffusers or transformers model to a folder, as packed weights and `config.json`. `base`: folder of a
    packed model with the same configuration, to store the difference from it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    (folder / (DIFFERENCE if base is None else PACKED)).unlink(missing_ok=True)  # of a former model
    if base is None:
        save_file(pack(model.state_dict()), folder / PACKED, metadata={"format": "pt"})
    else:
        metadata = {"format": "pt", "base": os.path.relpath(base, folder), "base_hash": file_hash(base / PACKED)}
        difference = pack_difference(model.state_dict(), read_packed(base))
        save_file(difference, folder / DIFFERENCE, metadata=metadata)
    if isinstance(model, ConfigMixin):
        model.save_config(folder)
    else:
        model.config.save_pretrained(folder)
    path = folder / "config.json"
    config = read_json(path)
    config.pop("_name_or_path", None)  # a path on this machine
    path.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def load_component(folder: Path, library: str, class_name: str, dtype: torch.dtype = torch.float32) -> Any:
    """Load a component from its folder in `dtype`, packed or not; `library` and `class_name` are those of
    `model_index.json`. Raises `InputError` if the class is not in `COMPONENT_CLASSES`, or a file cannot be read.
    """
    cls = component_class(library, class_name)
    check_files(folder)
    try:
        if not is_packed(folder):
            is_network = issubclass(cls, torch.nn.Module)
            loaded = cls.from_pretrained(folder, **({"use_safetensors": True} if is_network else {}))  # no pickles
            return loaded.to(dtype) if is_network else loaded
        config = read_json(folder / "config.json")
        with init_empty_weights(include_buffers=False):
            model = cls(cls.config_class.from_dict(config)) if library == "transformers" else cls.from_config(config)
        model.load_state_dict(read_packed(folder, dtype), assign=True)
    except InputError:
        raise
    except Exception as error:
        raise InputError(f"The {class_name} in {folder} cannot be loaded: {first_line(error)}") from error
    return model.eval()


def component_class(library: str, class_name: str) -> Any:
    """Return the class of a component as named in `model_index.json`. Raises `InputError` if it is not in
    `COMPONENT_CLASSES`: a model folder must not choose the code that runs.
    """
    classes = COMPONENT_CLASSES.get(library, ()) if isinstance(library, str) else ()
    scheduler = library == "diffusers" and isinstance(class_name, str) and class_name.endswith("Scheduler")
    if class_name not in classes and not scheduler:
        known = ", ".join(name for names in COMPONENT_CLASSES.values() for name in names)
        raise InputError(f"Component {library}.{class_name} is not supported. Supported: {known} and schedulers")
    found = getattr(importlib.import_module(library), class_name, None)
    if found is None:
        raise InputError(f"Component {library}.{class_name} is not in the installed {library}: update it")
    return found
