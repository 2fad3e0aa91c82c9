"""The one loop trains MDiTFace, too: from random weights, and as an adapter on a frozen FLUX.1."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
import torch
from PIL import Image

from likeness.config import build
from likeness.data.store import Store
from likeness.models.mditface import MDiTFaceTransformer
from likeness.pipelines.generate import generate, resolve
from likeness.pipelines.load import load
from likeness.train import loop
from likeness.train.checkpoint import load_state
from likeness.train.config import TrainRecipe
from likeness.train.validate import condition_losses
from likeness.types import ConditionInput, InputError, PortraitRequest
from runs import SIZE, prepare

NETWORK = {"name": "mditface", "hidden_size": 32, "depth": 1, "single_depth": 1, "heads": 2}


@pytest.fixture(scope="module")
def prepared(tmp_path_factory) -> Path:
    """Six drawn faces; FLUX.1 and components of a mini, tiny; shards by the autoencoders of both."""
    return prepare(tmp_path_factory.mktemp("prepared"), 6, flux=True)


def recipe(root: Path, network: dict, shards: str, components: str | None, **changes) -> TrainRecipe:
    values = {
        "network": network,
        "data": {
            "shards": [str(root / shards)],
            "condition_shares": {"mask": 0.4, "mask+sketch": 0.4, "none": 0.2},
        },
        "optimizer": {"images": 16, "batch": 4, "learning_rate": 1e-2},
        "defaults": {"size": SIZE, "steps": 2},
        "preview": [{"prompt": "a face", "mask": str(root / "faces/train/masks/000000.png"), "seed": 5}],
        "checkpoint_every": 8,
        **changes,
    }
    if components:
        values["data"]["components"] = str(root / components)
    return build(TrainRecipe, values)


def stop_after_first_save(monkeypatch, given: TrainRecipe, run: Path) -> None:
    real = loop.save_state

    def save_and_die(*arguments):
        real(*arguments)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(loop, "save_state", save_and_die)
        with pytest.raises(KeyboardInterrupt):
            loop.train(given, run)


def test_from_random_weights(prepared, tmp_path, monkeypatch):
    given = recipe(prepared, NETWORK, "shards", "components", precision="fp32")
    loop.train(given, tmp_path / "whole")
    stop_after_first_save(monkeypatch, given, tmp_path / "parts")
    loop.train(given, tmp_path / "parts")
    whole, parts = load_state(tmp_path / "whole"), load_state(tmp_path / "parts")
    assert all(torch.equal(whole[name], parts[name]) for name in whole)
    pipeline = load(tmp_path / "whole" / "model")
    assert isinstance(pipeline.transformer, MDiTFaceTransformer)
    assert tuple(pipeline.transformer.config.condition_names) == ("mask", "sketch")
    wish = given.preview[0]
    request = resolve(
        PortraitRequest(prompt=wish.prompt, conditions={"mask": ConditionInput(image=wish.mask)}), pipeline
    )
    (again,), _ = generate(pipeline, request, [wish.seed])
    preview = sorted((tmp_path / "whole" / "previews").iterdir())[-1]
    assert again.tobytes() == Image.open(preview).convert("RGB").tobytes()
    losses = condition_losses(pipeline, Store(prepared / "shards"), "mask", count=6)
    assert losses["right"] != losses["none"]


@pytest.fixture(scope="module")
def adapter_recipe(prepared) -> TrainRecipe:
    network = {"name": "mditface_adapter", "base": str(prepared / "flux"), "rank": 2, "alpha": 2}
    return recipe(prepared, network, "flux_shards", None)


def test_adapter_on_flux(prepared, adapter_recipe, tmp_path, monkeypatch):
    loop.train(adapter_recipe, tmp_path / "whole")
    stop_after_first_save(monkeypatch, adapter_recipe, tmp_path / "parts")
    loop.train(adapter_recipe, tmp_path / "parts")
    whole, parts = load_state(tmp_path / "whole"), load_state(tmp_path / "parts")
    assert all(torch.equal(whole[name], parts[name]) for name in whole)
    assert all(".lora_" in name or "condition_embed.weight" in name for name in whole)
    assert all(value.dtype == torch.float32 for value in whole.values())
    moved = [name for name, value in whole.items() if "average/" in name and "lora_B" in name and value.abs().max() > 0]
    assert len(moved) > 10

    folder = tmp_path / "whole" / "model"
    assert {path.name for path in folder.iterdir()} == {"adapter.json", "adapter.safetensors", "codec.json"}
    assert json.loads((folder / "adapter.json").read_text())["condition_names"] == ["mask", "sketch"]
    pipeline, base = load(folder), load(prepared / "flux")
    state = pipeline.transformer.state_dict()
    for name, value in base.transformer.state_dict().items():
        if "condition_embed" not in name:
            found = state[name] if name in state else state[name.replace(".weight", ".base_layer.weight")]
            assert torch.equal(found, value), name  # the base is as it was
    condition = str(prepared / "faces/train/masks/000000.png")
    request = resolve(PortraitRequest(prompt="a face", conditions={"mask": ConditionInput(image=condition)}), pipeline)
    with_mask = generate(pipeline, request, [1])[0][0]
    words = resolve(PortraitRequest(prompt="a face"), pipeline)
    assert with_mask.tobytes() != generate(pipeline, words, [1])[0][0].tobytes()


def test_the_canary_keeps_a_face_once(adapter_recipe, tmp_path, monkeypatch):
    """Although its latents are drawn anew from the autoencoder's distribution every time."""
    made = []

    def kept(*arguments):
        made.append(real(*arguments))
        return made[0]

    real = loop.Canary
    monkeypatch.setattr(loop, "Canary", kept)
    loop.train(dataclasses.replace(adapter_recipe, canary_every=16, preview=()), tmp_path)
    assert made[0].given["mask"] > 6 >= len(made[0].pairs["mask"])


def test_adapter_is_the_average(adapter_recipe, tmp_path):
    """What is published is the weight average; training goes on with the weights themselves."""
    loop.train(adapter_recipe, tmp_path)
    state, pipeline = load_state(tmp_path), load(tmp_path / "model")
    published = dict(pipeline.transformer.named_parameters())
    name = next(name for name in published if "lora_B" in name)
    assert torch.equal(published[name], state[f"average/0/{name}"])
    assert not torch.equal(published[name], state[f"model/{name}"])


def test_a_base_of_our_own(prepared, tmp_path):
    """Trained without any condition, it is a small FLUX: it takes text only, and adapters of either reach."""
    shards, words = [str(prepared / "shards")], {"none": 1.0}
    given = {"shards": shards, "components": str(prepared / "components"), "condition_shares": words}
    network = {**NETWORK, "spatial_stream": "lora"}
    whole = recipe(prepared, network, "shards", "components", data=given, preview=[], precision="fp32")
    base = loop.train(whole, tmp_path / "base")
    pipeline = load(base)
    assert tuple(pipeline.transformer.config.condition_names) == ()
    assert not any(".spatial." in name for name in pipeline.transformer.state_dict())
    with pytest.raises(InputError, match="takes text only"):
        pipeline("a face", control_image={"mask": prepared / "faces/train/masks/000000.png"})
    portraits, request = {}, resolve(PortraitRequest(prompt="a face"), pipeline)
    portraits["base"] = generate(pipeline, request, [1])[0][0].tobytes()
    for targets in ("spatial", "all"):
        lora = {"name": "mditface_adapter", "base": str(base), "rank": 2, "targets": targets}
        model = loop.train(recipe(prepared, lora, "shards", None), tmp_path / targets)
        assert json.loads((model / "adapter.json").read_text())["targets"] == targets
        adapted = load(model)
        portraits[targets] = generate(adapted, request, [1])[0][0].tobytes()
        losses = condition_losses(adapted, Store(prepared / "shards"), "mask", count=6)
        assert losses["right"] != losses["none"]
    assert portraits["base"] == portraits["spatial"] != portraits["all"]


def test_refusals(prepared, adapter_recipe, tmp_path):
    wrong = {"name": "mditface_adapter", "base": str(prepared / "nowhere")}
    with pytest.raises(InputError, match="Unknown model"):
        loop.train(recipe(prepared, wrong, "flux_shards", None), tmp_path / "a")
    wrong = {"name": "mditface_adapter", "base": "mmface-mini"}
    with pytest.raises(InputError, match=r"mmface-mini is a MMFacePipeline: the base of an adapter must be FLUX\.1"):
        loop.train(recipe(prepared, wrong, "shards", "components"), tmp_path / "a")
    with pytest.raises(InputError, match="another encoder"):
        loop.train(recipe(prepared, {**NETWORK}, "flux_shards", "components"), tmp_path / "b")
    loop.train(adapter_recipe, tmp_path / "c")
    network = {"name": "mditface_adapter", "base": str(prepared / "flux"), "rank": 4}
    with pytest.raises(InputError, match="begun with another network"):
        loop.train(recipe(prepared, network, "flux_shards", None), tmp_path / "c")
