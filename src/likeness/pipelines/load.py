"""From a name to a pipeline: a bundled model, a folder, or a hub id.

The bundled models are ordinary pipeline folders in two respects more frugal: their weights are packed
(`likeness.pipelines.packed`), and what they share lies once in `common/`. An adapter folder is loaded with its base;
FLUX.1 by itself is an MDiTFace that takes words only.
"""

from __future__ import annotations

import hashlib
import importlib
import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

from likeness.annotators.face_parser import Translated, translated
from likeness.annotators.labels import classes_of
from likeness.annotators.sketch import DRAWING, extract_sketch
from likeness.annotators.u2net import draw_sketch, load_u2net
from likeness.conditions.mask.classes import CLASSES
from likeness.device import choose_device, choose_dtype
from likeness.encoders.text import encode_text, encode_text_flux
from likeness.files import first_line, read_json
from likeness.pipelines.catalogue import ADAPTER, BUNDLED, COMMON, COMPONENTS, DEFAULT, bundled_models
from likeness.pipelines.packed import PACKED, load_packed
from likeness.pipelines.sizes import ANY
from likeness.runtime import library_imports
from likeness.types import DtypeName, InputError, TextFeatures

PIPELINES = {
    "MMFacePipeline": "likeness.pipelines.mmface",
    "MDiTFacePipeline": "likeness.pipelines.mditface",
}
"""Pipeline class, as `model_index.json` names it -> its module."""

FLUX = "FluxPipeline"
"""What FLUX.1's folders name; its components are those of `MDiTFacePipeline`."""

PROCESSOR = "preprocessor_config.json"
"""What says how a checkpoint of transformers wants its pictures."""

PARSER_EXAMPLE = "jonathandinu/face-parsing"
"""A face parser on the hub that sees 512 pixels: what our own is too small for."""

Sketcher = Callable[[np.ndarray], np.ndarray]
"""Portrait uint8 RGB [H, W, 3] -> dark lines on white, uint8 [H, W]."""

SCHNELL = {"steps": 4, "guidance_scale": 1.0}
"""What a FLUX.1 that embeds no guidance value is made for."""


@library_imports()
def load(
    source: str | Path = DEFAULT,
    *,
    dtype: torch.dtype | DtypeName = torch.float32,
    device: str | None = None,
    base: str | Path | None = None,
    quantize: Literal["int8"] | None = None,
    offload: bool = False,
) -> Any:
    """Load a pipeline.

    Like diffusers' `from_pretrained`, it stays on the CPU in float32 unless told otherwise, so that images do not
    depend on the machine; `load(device="auto", dtype="auto")` chooses as the command line does.

    Args:
        source: Name of a bundled model, folder of a pipeline or an adapter, or hub id (`owner/name`, downloaded once).
        dtype: float32, float16 or bfloat16; "auto" takes float32 on a CPU, and on an accelerator bfloat16 if it
            supports that, else float16.
        device: Device, for example "cuda" or "cpu"; "auto" takes CUDA, MPS or XPU if present, else the CPU. Default:
            the CPU, with `offload` "auto".
        base: Base model of an adapter. Default: the one that the adapter names.
        quantize: Store the matrices of FLUX.1's transformer in 8 bits with one scale per row, dequantized when used
            (torchao): half of bf16's memory, nearly the same images. Requires `likeness[quantize]`.
        offload: Keep only the active part (text encoders, transformer or autoencoder) on the accelerator and the others
            in main memory.

    Raises:
        InputError: The model is unknown or its folder is broken (the message names the file), the device is not
            available, `offload` without an accelerator, or `quantize` for a model other than FLUX.1 or without torchao.
    """
    device = choose_device("auto" if offload and device is None else device)
    if offload and device == "cpu":
        raise InputError("Offload requires an accelerator, but the device is the CPU: leave offload out")
    dtype = choose_dtype(dtype, device)
    folder = find(source)
    if (folder / ADAPTER).is_file():
        from likeness.pipelines.adapters import load_adapter, read_adapter

        adapter = read_adapter(folder)
        with library_bars_off():
            pipeline = load_folder(find(base or adapter.base), dtype, adapter.network, quantize)
        load_adapter(pipeline, folder)
    elif base is None:
        with library_bars_off():
            pipeline = load_folder(folder, dtype, {}, quantize)
    else:
        raise InputError(f"{folder} is no adapter, so it takes no base model such as {base}")
    if offload:
        pipeline.enable_model_cpu_offload(device=device)
    elif device != "cpu":
        pipeline.to(device)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@contextmanager
def library_bars_off() -> Iterator[None]:
    """Switch the progress bars of diffusers and transformers off, and afterwards as they were."""
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
            of_hub.disable_progress_bars()  # transformers has enabled the hub's, too


def load_folder(
    folder: Path, dtype: torch.dtype, network: dict[str, Any], quantize: Literal["int8"] | None = None
) -> Any:
    """The pipeline of a folder. `network`: where an adapter comes onto it, the network's options that this decides."""
    index = read_json(folder / "model_index.json")
    name = index.get("_class_name")
    ours = "MDiTFacePipeline" if name == FLUX else name
    if network and ours != "MDiTFacePipeline":
        raise InputError(f"{folder} is a {name}: the base of an adapter must be FLUX.1")
    if ours not in PIPELINES:
        raise InputError(f"{folder} is a {name}, not one of {', '.join(PIPELINES)}: likeness cannot run it")
    if quantize and name != FLUX:
        raise InputError(f"{folder} is a {name}: only FLUX.1 is loaded in 8 bits")
    pipeline_class = getattr(importlib.import_module(PIPELINES[ours]), ours)
    parts: dict[str, Any] = {}
    for part, entry in index.items():
        if part.startswith("_") or not isinstance(entry, list) or len(entry) != 2 or entry[0] is None:
            continue
        if not isinstance(entry[0], str):
            continue  # a setting that happens to be a list of two
        where = folder / part if (folder / part).is_dir() else folder.parent / COMMON / part
        if not where.is_dir():
            raise InputError(f"{folder} is incomplete: its {part} is missing")
        if (where / PACKED).is_file():
            parts[part] = load_component(where, *entry, dtype=dtype)
        elif where.parent != folder:  # a shared part without weights: a tokenizer
            parts[part] = component_class(*entry).from_pretrained(where)
    try:
        if name == FLUX:
            parts |= begin_from_flux(folder, dtype, network, quantize)
        return pipeline_class.from_pretrained(folder, dtype=dtype, **parts)
    except (OSError, ValueError, RuntimeError, KeyError) as error:
        raise InputError(f"the {name} in {folder} cannot be loaded: {first_line(error)}") from error


def begin_from_flux(
    folder: Path, dtype: torch.dtype, network: dict[str, Any], quantize: Literal["int8"] | None = None
) -> dict[str, Any]:
    """FLUX.1's transformer as an MDiTFace that knows no condition yet, and what it does where a request is silent."""
    from likeness.models.mditface import MDiTFaceTransformer

    options = {"condition_names": (), **network, **({"quantization_config": int8_weights()} if quantize else {})}
    transformer = MDiTFaceTransformer.from_pretrained(folder / "transformer", dtype=dtype, **options)
    defaults = {} if transformer.config.guidance_embeds else SCHNELL
    return {"transformer": transformer, "defaults": defaults, "sizes": ANY}


def int8_weights() -> Any:
    """What tells diffusers to keep matrices in 8 bits."""
    try:
        from diffusers import TorchAoConfig
        from torchao.quantization import Int8WeightOnlyConfig
    except ImportError as error:
        raise InputError("8-bit weights need torchao: pip install 'likeness[quantize]'") from error
    return TorchAoConfig(Int8WeightOnlyConfig())


def find(source: str | Path) -> Path:
    """The folder of a model: bundled, local, or downloaded from the hub."""
    if (BUNDLED / str(source) / "model_index.json").is_file():
        return BUNDLED / str(source)
    path = Path(source)
    if (path / "model_index.json").is_file() or (path / ADAPTER).is_file():
        return path
    if path.exists():
        raise InputError(f"{path} is no model folder: it has no model_index.json")
    parts = str(source).split("/")
    if len(parts) != 2 or not all(parts) or str(source).startswith((".", "/", "~")):
        raise InputError(f"there is no model {source}; bundled are {', '.join(bundled_models()) or 'none'}")
    from huggingface_hub import snapshot_download

    try:
        # not what repositories hold beside the pipeline, such as FLUX.1's weights a second time
        return Path(snapshot_download(str(source), allow_patterns=["*.json", "*/*", "adapter.safetensors"]))
    except Exception as error:  # the hub's many ways to say no: offline, gated, absent
        raise InputError(
            f"the model {source} is neither here nor on the hub ({first_line(error)}): give the folder it is in"
        ) from error


def load_component(folder: Path, library: str, class_name: str, dtype: torch.dtype = torch.float32) -> Any:
    """One packed component: its class from `model_index.json`, its shape from `config.json`."""
    cls = component_class(library, class_name)
    config = read_json(folder / "config.json")
    try:
        with torch.device("meta"):
            model = cls(cls.config_class.from_dict(config)) if library == "transformers" else cls.from_config(config)
        model = load_packed(model, folder, dtype)
    except Exception as error:
        raise InputError(f"the weights in {folder} cannot be read: {first_line(error)}") from error
    materialise_buffers(model)
    return model


def load_part(folder: Path, library: str, class_name: str) -> Any:
    """One component from a folder of its own, packed or not; a tokenizer, too."""
    if (folder / PACKED).is_file():
        return load_component(folder, library, class_name)
    return component_class(library, class_name).from_pretrained(folder)


def materialise_buffers(model: torch.nn.Module) -> None:
    """Buffers that are not saved (position numbers) have no values on the meta device: count them out again."""
    for module in model.modules():
        for name, buffer in module.named_buffers(recurse=False):
            if buffer.is_meta:
                if name != "position_ids":
                    raise InputError(f"{type(module).__name__} has the buffer {name!r}, which no file holds")
                setattr(module, name, torch.arange(buffer.shape[-1]).expand(buffer.shape).clone())


def component_class(library: str, class_name: str) -> Any:
    """A class of diffusers, transformers or this package, as `model_index.json` names it."""
    if library.split(".")[0] not in ("diffusers", "transformers", "likeness"):
        raise InputError(
            f"the model asks for {library}.{class_name}; only diffusers, transformers and likeness are run"
        )
    return getattr(importlib.import_module(library), class_name)


@dataclass(frozen=True, kw_only=True)
class Components:
    """What a transformer stands on: the frozen autoencoder and text towers, and the settings that belong to them."""

    vae: Any
    text_encoder: Any
    tokenizer: Any
    text_encoder_2: Any = None
    """T5, where the base is FLUX.1."""
    tokenizer_2: Any = None
    scheduler: Any = None
    """FLUX.1's own sampler."""
    settings: dict[str, Any]
    """Fields of the pipeline: latent_mean, latent_std, text_layer, max_text_tokens."""
    codec_hash: str
    """SHA-256 of the encoder's weights (`encoder_hash`). Shards and models record it."""
    encoder_of: tuple[str, ...] = ()
    """SHA-256 of the weights of whole autoencoders with this encoder. Earlier versions recorded this hash instead."""

    def same_encoder(self, recorded: str) -> bool:
        """Whether the hash in a store or in a model's `codec.json` is of this encoder. Raw latents depend on nothing
        else, so the decoder may differ.
        """
        return recorded in (self.codec_hash, *self.encoder_of) or recorded == weights_hash(self.vae)

    def text_hash(self) -> str:
        """SHA-256 over text towers, vocabularies and settings: stored features of another one are refused. It reads
        all weights, so it is computed only where features are stored.
        """
        towers = [weights_hash(tower) for tower in (self.text_encoder, self.text_encoder_2) if tower is not None]
        words = [sorted(t.get_vocab().items()) for t in (self.tokenizer, self.tokenizer_2) if t is not None]
        settings = [self.settings.get(key) for key in ("max_text_tokens", "text_layer")]
        return hashlib.sha256(json.dumps([towers, words, settings]).encode()).hexdigest()

    def text_features(self, captions: Sequence[str]) -> TextFeatures:
        """Features of B captions, all in one pass, on the towers' device."""
        first, limit = (self.tokenizer, self.text_encoder), self.settings["max_text_tokens"]
        if self.text_encoder_2 is None:
            return encode_text(*first, captions, max_tokens=limit, layer=self.settings["text_layer"], together=True)
        second = (self.tokenizer_2, self.text_encoder_2)
        return encode_text_flux(*first, *second, captions, max_tokens=limit, together=True)


def load_components(folder: str | Path = BUNDLED / COMMON) -> Components:
    """Autoencoder, text towers and tokenizers of a pipeline folder (FLUX.1's, too), or of `common/`.

    Raises:
        InputError: a part is missing or broken.
    """
    folder = find(folder) if not Path(folder).is_dir() else Path(folder)
    common = folder / COMPONENTS
    index = read_json(common if common.is_file() else folder / "model_index.json")
    parts: dict[str, Any] = {}
    encoder_of: tuple[str, ...] = ()
    flux = index.get("_class_name") == FLUX
    second = ("text_encoder_2", "tokenizer_2") if flux or (index.get("text_encoder_2") or [None])[0] else ()
    for part in ("vae", "text_encoder", "tokenizer", *second, *(("scheduler",) if flux else ())):
        where = folder / part if (folder / part).is_dir() else folder.parent / COMMON / part
        if not where.is_dir() or not index.get(part):
            raise InputError(f"{folder} has no {part}")
        parts[part] = load_part(where, *index[part])
        if part == "vae" and (where.parent / COMPONENTS).is_file():
            encoder_of = tuple(read_json(where.parent / COMPONENTS).get("encoder_of", ()))
    if flux:
        config = parts["vae"].config
        settings = {"latent_mean": config["shift_factor"], "latent_std": 1 / config["scaling_factor"]}
        settings |= {"max_text_tokens": 512}
    else:
        settings = {key: index[key] for key in ("latent_mean", "latent_std", "text_layer", "max_text_tokens")}
    return Components(**parts, settings=settings, codec_hash=encoder_hash(parts["vae"]), encoder_of=encoder_of)


def load_face_parser(source: str | Path = "bundled", *, exchanged: bool = False) -> tuple[Any, int]:
    """A face parser that takes our input and answers in our 19 classes, and the pixels a side that it sees.

    Args:
        source: `bundled`, a folder, packed or not, or a hub id (`owner/name`). Any of transformers' semantic
            segmentation networks will do: its labels are read by their names, its pictures are normalised as its
            `preprocessor_config.json` says. Without that file it must be one of ours.
        exchanged: its left is the viewer's left.

    Raises:
        InputError: it cannot be read, its labels are no parts of a face, or it does not see whole square portraits.
    """
    from transformers import AutoModelForSemanticSegmentation

    folder = BUNDLED / COMMON / "face_parser" if str(source) == "bundled" else Path(source)
    config = read_json(checkpoint_file(source, "config.json") if not folder.is_dir() else folder / "config.json")
    if (folder / PACKED).is_file():
        network = load_component(folder, "transformers", config["architectures"][0])
    else:
        try:
            network = AutoModelForSemanticSegmentation.from_pretrained(
                folder if folder.is_dir() else str(source)
            ).eval()
        except (OSError, ValueError) as error:
            raise InputError(f"{source} holds no semantic segmentation network: {first_line(error)}") from error
    labels = tuple(network.config.id2label[index] for index in range(network.config.num_labels))
    classes = classes_of(labels, str(source), swapped=exchanged)
    settings = checkpoint_file(source, PROCESSOR) if not folder.is_dir() else folder / PROCESSOR
    if settings.is_file():
        return translated(network, classes, read_json(settings), str(source))
    size = getattr(network.config, "image_size", None)
    if labels != CLASSES or not isinstance(size, int):
        raise InputError(
            f"{source} has no {PROCESSOR}, which says how its pictures are normalised, and is none of our parsers: "
            "save the network's image processor beside it"
        )
    return network, size


def checkpoint_file(source: str | Path, name: str) -> Path:
    """One file of a checkpoint on the hub, downloaded once; where the hub has no such file, a path that is not there.

    Raises:
        InputError: there is no such checkpoint, neither here nor on the hub.
    """
    parts = str(source).split("/")
    if len(parts) != 2 or not all(parts) or str(source).startswith((".", "/", "~")) or Path(source).exists():
        raise InputError(f"{source} is no folder of a checkpoint: give one, or a hub id such as {PARSER_EXAMPLE}")
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import RemoteEntryNotFoundError

    try:
        return Path(hf_hub_download(str(source), name))
    except RemoteEntryNotFoundError:
        return Path(str(source)) / name
    except Exception as error:  # the hub's many ways to say no: offline, gated, absent
        raise InputError(f"{source} is neither here nor on the hub: {first_line(error)}") from error


def load_sketcher(weights: Path | None = None, *, device: str | None = None) -> tuple[Sketcher, str]:
    """Load a sketch extractor.

    Args:
        weights: Weights of U2-Net, as `likeness.annotators.u2net` reads them. Default: XDoG, which needs none.
        device: Device of U2-Net, as in `choose_device`.

    Returns:
        The extractor, and the name under which its sketches are recorded.

    Raises:
        InputError: The weights cannot be used, or the device is not available.
    """
    place = choose_device(device)
    if weights is None:
        return extract_sketch, f"XDoG {DRAWING}"
    network = load_u2net(weights).to(place)
    return lambda picture: draw_sketch(network, picture), network_name(network)


def network_name(network: torch.nn.Module) -> str:
    """The name under which what a network made is recorded: its class and the beginning of its weights' hash."""
    own = network.network if isinstance(network, Translated) else network
    return f"{type(own).__name__} {weights_hash(network)[:12]}"


def load_text_image(folder: Path) -> tuple[Any, Any]:
    """A text-image pair: its `CLIPModel` and tokenizer, from a folder with `clip`, packed or not, and `tokenizer`.

    Raises:
        InputError: a part is missing or broken.
    """
    from transformers import AutoTokenizer

    try:
        return load_part(folder / "clip", "transformers", "CLIPModel"), AutoTokenizer.from_pretrained(
            folder / "tokenizer"
        )
    except (OSError, ValueError) as error:
        raise InputError(f"{folder} holds no text-image pair (clip and tokenizer): {first_line(error)}") from error


def fingerprint(pipeline: Any) -> str:
    """SHA-256 over all weights of a pipeline: what makes two checkpoints the same, wherever they lie."""
    parts = [pipeline.transformer, pipeline.vae, pipeline.text_encoder, getattr(pipeline, "text_encoder_2", None)]
    return hashlib.sha256("".join(weights_hash(part) for part in parts if part is not None).encode()).hexdigest()


def encoder_hash(vae: torch.nn.Module) -> str:
    """SHA-256 over the weights of an autoencoder on which its latents depend: all but the decoder's."""
    return weights_hash(vae, without=("decoder.", "post_quant_conv."))


def weights_hash(model: torch.nn.Module, without: tuple[str, ...] = ()) -> str:
    """SHA-256 over a model's weights, in order of their names.

    Args:
        model: the model.
        without: prefixes of the names of weights that are left out.
    """
    digest = hashlib.sha256()
    for name, value in sorted(model.state_dict().items()):
        if name.startswith(without):
            continue
        digest.update(name.encode())
        value = value.dequantize() if hasattr(value, "qdata") else value  # torchao's
        digest.update(value.detach().float().cpu().contiguous().numpy().reshape(-1).view(np.uint8))  # not copied
    return digest.hexdigest()
