"""Data, recipes and interruptions of tiny trainings."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from builders import save_components, tiny_flux_pipeline
from likeness.config import build
from likeness.encoders.components import load_components
from likeness.prepare.encode import encode_folder
from likeness.prepare.synthetic import write_synthetic
from likeness.train import checkpoint, progress
from likeness.train.config import TrainRecipe
from likeness.types import TryAgain

SIZE = 32
RUNS = ("whole", "parts")


def prepare(root: Path, count: int, *, flux: bool = False) -> Path:
    """Write synthetic faces, tiny components and shards; with `flux` also a tiny FLUX.1 and its shards."""
    write_synthetic(root / "faces", count, SIZE, seed=0)
    save_components(root / "components")
    encode_folder(root / "faces", root / "shards", load_components(root / "components"), size=SIZE)
    if flux:
        tiny_flux_pipeline().save_pretrained(root / "flux")
        encode_folder(root / "faces", root / "flux_shards", load_components(root / "flux"), size=SIZE)
    return root


def small_values(root: Path, probabilities: dict[str, float] | None = None, **changes: Any) -> dict[str, Any]:
    """Values of a recipe of 6 steps of 4 images; `optimizer`, `network` and `data` are changed key by key."""
    network = changes.pop("network", {})
    kind = network.get("name", "mmface")
    adapter = kind.endswith("_adapter")
    data: dict[str, Any] = {"shards": [str(root / ("flux_shards" if kind == "mditface_adapter" else "shards"))]}
    data |= {"condition_probabilities": probabilities or {"mask": 0.5, "sketch": 0.3, "none": 0.2}}
    if not adapter:
        data["components"] = str(root / "components")
        network = {"name": "mmface", "hidden_size": 32, "depth": 2, "heads": 2} | network
    return {
        "network": network,
        "data": data | changes.pop("data", {}),
        "optimizer": {"images": 24, "batch": 4, "learning_rate": 1e-3} | changes.pop("optimizer", {}),
        "defaults": {"size": SIZE, "steps": 2},
        "precision": "auto" if kind == "mditface_adapter" else "fp32",  # a frozen FLUX.1 is bf16
        "log_every": 8,
        "checkpoint_every": 8,
    } | changes


def small(root: Path, probabilities: dict[str, float] | None = None, **changes: Any) -> TrainRecipe:
    """The recipe of `small_values`."""
    return build(TrainRecipe, small_values(root, probabilities, **changes))


def metrics(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def weights_of(model: Path) -> dict[str, torch.Tensor]:
    """The weights of a published transformer."""
    return load_file(model / "transformer" / "diffusion_pytorch_model.safetensors")


def load_checkpoint(run: Path, path: Path | None = None) -> dict[str, torch.Tensor]:
    """All tensors of a checkpoint of a run, by default the newest."""
    path = path or checkpoint.newest(run)
    assert path is not None
    entries = checkpoint.checkpoint_entries(path)
    tensors = {name: torch.empty(entry.size, dtype=entry.properties.dtype) for name, entry in entries.items()}
    checkpoint.read_into(path, tensors)
    return tensors


def assert_identical(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    """Bit-identical tensors under the same names."""
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)


@contextmanager
def killed_after_checkpoint(count: int = 1) -> Iterator[None]:
    """Training is killed within the `with` block after this number of checkpoints."""
    saved = []

    def save_and_die(*arguments: Any) -> None:
        checkpoint.save_checkpoint(*arguments)
        saved.append(arguments)
        if len(saved) == count:
            raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(progress, "save_checkpoint", save_and_die)
        with pytest.raises(KeyboardInterrupt):
            yield


@contextmanager
def sigterm_in_step(number: int, images: int) -> Iterator[None]:
    """SIGTERM arrives in a step within the `with` block: training stops after `images` images, with a checkpoint."""
    real, steps = progress.Progress.end_step, []

    def end_step(self: Any, **values: Any) -> None:
        steps.append(values)
        if len(steps) == number:
            os.kill(os.getpid(), signal.SIGTERM)
        real(self, **values)

    message = f"stopped by SIGTERM after {images} images: run the same command again to resume"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(progress.Progress, "end_step", end_step)
        with pytest.raises(TryAgain, match=message):
            yield
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL


def check_resume(train: Callable[[Path], Any], folder: Path, *interruptions: Any) -> dict[str, torch.Tensor]:
    """Check that an interrupted and resumed training is bit-identical to an uninterrupted one; return its tensors.

    Args:
        train: trains in a run folder.
        folder: folder for both runs, `whole` and `parts`.
        interruptions: contexts such as `killed_after_checkpoint()`.
    """
    train(folder / "whole")
    for interruption in interruptions:
        with interruption:
            train(folder / "parts")
    train(folder / "parts")
    whole = load_checkpoint(folder / "whole")
    assert_identical(load_checkpoint(folder / "parts"), whole)
    previews = [[path.read_bytes() for path in sorted((folder / run / "previews").glob("*"))] for run in RUNS]
    assert previews[0] == previews[1]
    models = [sorted((folder / run / "model").rglob("*.safetensors")) for run in RUNS]
    assert len(models[0]) == len(models[1]) > 0
    assert all(one.read_bytes() == other.read_bytes() for one, other in zip(*models, strict=True))
    return whole
