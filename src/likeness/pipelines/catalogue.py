"""The models that ship with the package. No torch here: listing them is instant."""

from __future__ import annotations

from pathlib import Path

BUNDLED = Path(__file__).parent.parent / "bundled"
"""Folder of the shipped models."""

COMMON = "common"
"""Its subfolder with what they share: autoencoder, text tower, tokenizer."""

ADAPTER = "adapter.json"
"""What makes a folder an adapter, which stands on a base model elsewhere (`likeness.pipelines.adapters`)."""

COMPONENTS = "components.json"
"""File in a components folder: the classes of its parts, the latents' statistics and the text settings."""

CODEC = "codec.json"
"""File in a published model: SHA-256 of the encoder whose latents it was trained on."""

DEFAULT = "mmface-mini"
"""What is loaded where no model is named."""


def bundled_models() -> list[str]:
    """Names of the models that ship with the package."""
    return sorted(index.parent.name for index in BUNDLED.glob("*/model_index.json"))
