"""Load a pipeline: a bundled model, a folder or a Hub id.

The weights of the bundled models are packed (`likeness.weights.packed`), and the components that they share are in
`common/`. An adapter folder is loaded together with its base. FLUX.1 alone is an MDiTFace without conditions.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch

from likeness.device import choose_device, choose_dtype
from likeness.encoders.components import FLUX, part_folder
from likeness.files import first_line, read_json
from likeness.pipelines.sizes import ANY
from likeness.runtime import library_imports
from likeness.types import InputError
from likeness.weights.catalog import ADAPTER, DEFAULT, find_model
from likeness.weights.files import check_files
from likeness.weights.packed import component_class, is_packed, load_component

if TYPE_CHECKING:
    from likeness.pipelines.mditface import MDiTFacePipeline
    from likeness.pipelines.mmface import MMFacePipeline

PIPELINES = {
    "MMFacePipeline": "likeness.pipelines.mmface",
    "MDiTFacePipeline": "likeness.pipelines.mditface",
}
"""Pipeline class in `model_index.json` -> its module."""

SCHNELL = {"steps": 4, "guidance_scale": 1.0}
"""Defaults of a FLUX.1 without guidance embedding."""


@contextmanager
def progress_bars_off() -> Iterator[None]:
    """Switch off the progress bars of diffusers and transformers, and restore them afterwards."""
    from diffusers.utils import logging as of_diffusers
    from huggingface_hub import utils as of_hub
    from transformers.utils import logging as of_transformers

    active = [library for library in (of_diffusers, of_transformers) if library.is_progress_bar_enabled()]
    hub_off = of_hub.are_progress_bars_disabled()
    for library in active:
        library.disable_progress_bar()
    try:
        yield
    finally:
        for library in active:
            library.enable_progress_bar()
        if hub_off:
            of_hub.disable_progress_bars()  # transformers has enabled the Hub's, too


@library_imports()
@progress_bars_off()
def load(
    source: str | Path = DEFAULT,
    *,
    dtype: torch.dtype | str = torch.float32,
    device: str | torch.device | None = None,
    base: str | Path | None = None,
    quantize: Literal["int8"] | None = None,
    offload: bool = False,
    torch_dtype: torch.dtype | str | None = None,
) -> MMFacePipeline | MDiTFacePipeline:
    """Load a pipeline.

    As with diffusers' `from_pretrained`, the default is float32 on the CPU, so that images do not depend on the
    machine. `load(device="auto", dtype="auto")` chooses as the command line does.

    Args:
        source: Name of a bundled model, folder of a pipeline, an adapter or a training run, or Hub id (`owner/name`,
            downloaded once).
        dtype: torch's float32, float16 or bfloat16, or a name such as "bf16" or "bfloat16"; "auto" selects float32 on a
            CPU, and on an accelerator bfloat16 if it supports that, else float16.
        device: Device, for example "cuda" or "cpu"; "auto" selects CUDA, MPS or XPU if present, else the CPU. Default:
            the CPU, with `offload` "auto".
        base: Base model of an adapter. Default: the one that the adapter names.
        quantize: Store the matrices of FLUX.1's transformer in 8 bits with one scale per row, dequantized when used
            (torchao): half of bf16's memory, nearly the same images. Requires `likeness[quantize]`.
        offload: Keep only the active part (text encoders, transformer or autoencoder) on the accelerator and the others
            in main memory.
        torch_dtype: Another name of `dtype`, as in earlier versions of diffusers.

    Raises:
        InputError: The dtype or the model is unknown, the folder of the model is broken (the message names the file),
            the device is not available, `offload` without an accelerator, or `quantize` for a model other than FLUX.1
            or without torchao.
    """
    if quantize not in (None, "int8"):
        raise InputError(f"quantize is {quantize!r}; choose int8, or leave it out")
    device = choose_device("auto" if offload and device is None else device)
    if offload and device == "cpu":
        raise InputError("Offload requires an accelerator, but the device is the CPU: leave offload out")
    dtype = choose_dtype(dtype if torch_dtype is None else torch_dtype, device)
    folder = find_model(source)
    if (folder / ADAPTER).is_file():
        from likeness.pipelines.adapters import load_adapter, read_adapter

        adapter = read_adapter(folder)
        pipeline = load_folder(find_model(base or adapter.base), dtype, adapter.network, quantize)
        load_adapter(pipeline, folder)
    elif base is None:
        pipeline = load_folder(folder, dtype, quantize=quantize)
    else:
        raise InputError(f"{folder} is not an adapter: leave the base model {base} out")
    if offload:
        pipeline.enable_model_cpu_offload(device=device)
    elif device != "cpu":
        pipeline.to(device)
    pipeline.set_progress_bar_config(disable=True)
    pipeline.source = {
        "model": str(source),
        "base": None if base is None else str(base),
        "quantize": quantize,
    }  # for recipes
    return pipeline


def load_folder(
    folder: Path,
    dtype: torch.dtype,
    network: dict[str, Any] | None = None,
    quantize: Literal["int8"] | None = None,
) -> MMFacePipeline | MDiTFacePipeline:
    """Load the pipeline of a folder. `network`: options of the transformer that an adapter determines."""
    index = read_json(folder / "model_index.json")
    class_name = index.get("_class_name")
    flux = class_name == FLUX
    name = "MDiTFacePipeline" if flux else class_name
    if not isinstance(name, str) or name not in PIPELINES:
        raise InputError(f"{folder} is a {class_name}. Supported pipelines: {', '.join(PIPELINES)}, {FLUX}")
    if network and name != "MDiTFacePipeline":
        raise InputError(f"{folder} is a {name}: the base of an adapter must be FLUX.1")
    if quantize and not flux:
        raise InputError(f"{folder} is a {name}: only FLUX.1 can be loaded in 8 bits")
    components = {
        part: entry
        for part, entry in index.items()  # among settings, and components that are null
        if not part.startswith("_") and isinstance(entry, list) and len(entry) == 2 and isinstance(entry[0], str)
    }
    for entry in components.values():
        component_class(*entry)
    parts: dict[str, Any] = {}
    for part, entry in components.items():
        path = part_folder(folder, part)
        if not path.is_dir():
            raise InputError(f"{folder} is incomplete: its {part} is missing")
        if path.parent != folder or is_packed(path):
            parts[part] = load_component(path, *entry, dtype=dtype)
        else:
            check_files(path)
    try:
        if flux:
            parts |= flux_parts(folder, dtype, network or {}, quantize)
        pipeline_class = getattr(importlib.import_module(PIPELINES[name]), name)
        options = {"use_safetensors": True, "trust_remote_code": False}  # neither pickles nor code of the folder
        return pipeline_class.from_pretrained(folder, dtype=dtype, **options, **parts)
    except Exception as error:  # of many types: files may contain any values
        raise InputError(f"The {class_name} in {folder} cannot be loaded: {first_line(error)}") from error


def flux_parts(
    folder: Path, dtype: torch.dtype, network: dict[str, Any], quantize: Literal["int8"] | None
) -> dict[str, Any]:
    """Load FLUX.1's transformer, or the GGUF file in its folder, as an MDiTFace without conditions; also return the
    defaults of its pipeline.
    """
    from likeness.models.mditface import MDiTFaceTransformer

    options: dict[str, Any] = {"condition_names": (), **network}
    files = sorted((folder / "transformer").glob("*.gguf"))
    if len(files) > 1:
        raise InputError(f"{folder}/transformer has {', '.join(file.name for file in files)}: keep one GGUF file")
    single = files[0] if files else None
    if single:
        if quantize:
            raise InputError(f"{single} is quantized already: leave quantize out")
        config = read_json(single.parent / "config.json")
        options |= {"attention_head_dim": config["attention_head_dim"], "axes_dims_rope": config["axes_dims_rope"]}
        transformer = MDiTFaceTransformer.from_single_file(single, dtype=dtype, **options)
    else:
        if quantize:
            try:
                from diffusers import TorchAoConfig
                from torchao.quantization import Int8WeightOnlyConfig
            except ImportError as error:
                raise InputError("8-bit weights require torchao: pip install 'likeness[quantize]'") from error
            options["quantization_config"] = TorchAoConfig(Int8WeightOnlyConfig())
        transformer = MDiTFaceTransformer.from_pretrained(
            folder / "transformer", dtype=dtype, use_safetensors=True, **options
        )
    defaults = {} if transformer.config.guidance_embeds else SCHNELL
    return {"transformer": transformer, "defaults": defaults, "sizes": ANY}
