"""A tiny run's data and recipe, for tests of training."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from builders import save_components, tiny_flux_pipeline
from likeness.config import build
from likeness.encoders.components import load_components
from likeness.prepare.encode import encode_folder
from likeness.prepare.synthetic import write_synthetic
from likeness.train.config import TrainRecipe

SIZE = 32


def prepare(root: Path, count: int, *, flux: bool = False) -> Path:
    """Drawn faces, tiny components and shards below `root`; with `flux` a tiny FLUX.1 and `flux_shards`, too."""
    write_synthetic(root / "faces", count, SIZE, seed=0)
    save_components(root / "components")
    encode_folder(root / "faces", root / "shards", load_components(root / "components"), size=SIZE)
    if flux:
        tiny_flux_pipeline().save_pretrained(root / "flux")
        encode_folder(root / "faces", root / "flux_shards", load_components(root / "flux"), size=SIZE)
    return root


def small(root: Path, shares: dict[str, float] | None = None, **changes: Any) -> TrainRecipe:
    """A recipe of 6 steps of 4 images, float32; `optimizer` and `network` are changed key by key."""
    values: dict[str, Any] = {
        "network": {"name": "mmface", "hidden_size": 32, "depth": 2, "heads": 2} | changes.pop("network", {}),
        "data": {
            "shards": [str(root / "shards")],
            "components": str(root / "components"),
            "condition_shares": shares or {"mask": 0.5, "sketch": 0.3, "none": 0.2},
        },
        "optimizer": {"images": 24, "batch": 4, "learning_rate": 1e-3} | changes.pop("optimizer", {}),
        "defaults": {"size": SIZE, "steps": 2},
        "precision": "fp32",
        "log_every": 8,
        "checkpoint_every": 8,
    }
    return build(TrainRecipe, values | changes)


def metrics(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def weights_of(model: Path) -> dict[str, torch.Tensor]:
    """The weights of a published transformer."""
    from safetensors.torch import load_file

    return load_file(model / "transformer" / "diffusion_pytorch_model.safetensors")
