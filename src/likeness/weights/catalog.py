"""Find the folder of a model: bundled, local or on the Hugging Face Hub. No torch here, so listing models is fast."""

from __future__ import annotations

from pathlib import Path

from likeness.files import first_line
from likeness.types import InputError, suggestion

BUNDLED = Path(__file__).parent.parent / "bundled"
"""Folder of the bundled models."""

COMMON = "common"
"""Its subfolder with the components that they share: autoencoder, text encoder, tokenizer."""

ADAPTER = "adapter.json"
"""Configuration file of an adapter folder (`likeness.pipelines.adapters`)."""

COMPONENTS = "components.json"
"""File in a components folder: the classes of its parts, latent statistics and text settings."""

CODEC = "codec.json"
"""File in a published model: SHA-256 of the encoder whose latents it was trained on."""

DEFAULT = "mmface-mini-fast"
"""The default model."""

MASK_MODEL = "mask-mini"
"""The default model of masks from text."""


def bundled_models() -> list[str]:
    """Return the names of the bundled models."""
    return sorted(index.parent.name for index in BUNDLED.glob("*/model_index.json"))


def find_model(source: str | Path) -> Path:
    """Return the folder of a pipeline or an adapter, which a training run contains; a model on the Hub is downloaded
    once. Raises `InputError` if the model does not exist, or the Hub cannot be reached.
    """
    path = Path(source)
    for folder in (BUNDLED / path, path, path / "model"):  # the last of a training run
        if (folder / "model_index.json").is_file() or (folder / ADAPTER).is_file():
            return folder
    if path.exists():
        raise InputError(f"{path} is not a model folder: it has no model_index.json")
    if not is_hub_id(source):
        raise InputError(f"Unknown model {str(source)!r}. {suggestion(str(source), bundled_models())}")
    from huggingface_hub import snapshot_download

    try:
        # without files next to the pipeline, such as the second copy of FLUX.1's weights
        return Path(snapshot_download(str(source), allow_patterns=["*.json", "*/*", "adapter.safetensors"]))
    except Exception as error:  # of many types: offline, gated, missing
        raise InputError(f"Model {source} is neither a folder nor available on the Hub: {first_line(error)}") from error


def checkpoint_file(source: str | Path, name: str) -> Path:
    """Return the path of one file of a checkpoint: a local folder, or a Hub repository, whose file is downloaded once.
    The path of a file that the checkpoint lacks does not exist. Raises `InputError` if the checkpoint does not exist,
    or the Hub cannot be reached.
    """
    if Path(source).is_dir():
        return Path(source) / name
    if not is_hub_id(source) or Path(source).exists():
        raise InputError(f"{source} is not a checkpoint folder: pass one, or a Hub id such as owner/name")
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import RemoteEntryNotFoundError

    try:
        return Path(hf_hub_download(str(source), name))
    except RemoteEntryNotFoundError:
        return Path(source) / name
    except Exception as error:  # of many types: offline, gated, missing
        raise InputError(f"{source} is neither a folder nor available on the Hub: {first_line(error)}") from error


def is_hub_id(source: str | Path) -> bool:
    """Return whether the text has the form owner/name."""
    parts = str(source).split("/")
    return len(parts) == 2 and all(parts) and not str(source).startswith((".", "~"))
