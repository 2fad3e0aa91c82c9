"""Training of MDiTFace: from random weights, and as an adapter on a frozen FLUX.1."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
import torch
from PIL import Image

from likeness.models.mditface import MDiTFaceTransformer
from likeness.pipelines.adapters import add_loras
from likeness.pipelines.generate import generate, resolve
from likeness.pipelines.load import load
from likeness.train import loop
from likeness.train.config import TrainRecipe
from likeness.train.plan import component_sizes
from likeness.train.trace import trace
from likeness.types import ConditionInput, InputError, PortraitRequest
from runs import check_resume, killed_after_checkpoint, prepare, small

NETWORK = {"name": "mditface", "hidden_size": 32, "depth": 1, "single_depth": 1, "heads": 2}


@pytest.fixture(scope="module")
def prepared(tmp_path_factory) -> Path:
    """Six synthetic faces, tiny components, a tiny FLUX.1, and shards of the autoencoders of both."""
    return prepare(tmp_path_factory.mktemp("prepared"), 6, flux=True)


def recipe(root: Path, network: dict, **changes) -> TrainRecipe:
    """Four steps of 4 images with up to two conditions, and a preview."""
    preview = [{"prompt": "a face", "mask": str(root / "faces/train/masks/000000.png"), "seed": 5}]
    probabilities = {"mask": 0.4, "mask+sketch": 0.4, "none": 0.2}
    optimizer = {"images": 16, "batch": 4, "learning_rate": 1e-2}
    return small(root, probabilities, network=network, optimizer=optimizer, **{"preview": preview, **changes})


def test_from_random_weights(prepared, tmp_path):
    given = recipe(prepared, NETWORK)
    check_resume(lambda run: loop.train(given, run), tmp_path, killed_after_checkpoint())
    pipeline = load(tmp_path / "whole" / "model")
    assert isinstance(pipeline.transformer, MDiTFaceTransformer)
    assert tuple(pipeline.transformer.config.condition_names) == ("mask", "sketch")
    preview = given.preview[0]
    request = resolve(
        PortraitRequest(prompt=preview.prompt, conditions={"mask": ConditionInput(image=preview.mask)}), pipeline
    )
    (image,), _ = generate(pipeline, request, [preview.seed])
    path = sorted((tmp_path / "whole" / "previews").iterdir())[-1]
    assert image.tobytes() == Image.open(path).convert("RGB").tobytes()
    text_only = resolve(PortraitRequest(prompt=preview.prompt), pipeline)
    assert image.tobytes() != generate(pipeline, text_only, [preview.seed])[0][0].tobytes()


@pytest.fixture(scope="module")
def adapter_recipe(prepared) -> TrainRecipe:
    network = {"name": "mditface_adapter", "base": str(prepared / "flux"), "rank": 2, "alpha": 2}
    return recipe(prepared, network)


def test_the_frozen_flux_has_bf16_only(prepared, adapter_recipe, tmp_path):
    with pytest.raises(InputError, match="precision is fp32: it must be bf16 on FLUX"):
        loop.train(dataclasses.replace(adapter_recipe, precision="fp32"), tmp_path / "run")


def test_adapter_on_flux(prepared, adapter_recipe, tmp_path):
    whole = check_resume(lambda run: loop.train(adapter_recipe, run), tmp_path, killed_after_checkpoint())
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
            assert torch.equal(found, value), name  # the base is unchanged
    condition = str(prepared / "faces/train/masks/000000.png")
    request = resolve(PortraitRequest(prompt="a face", conditions={"mask": ConditionInput(image=condition)}), pipeline)
    with_mask = generate(pipeline, request, [1])[0][0]
    text_only = resolve(PortraitRequest(prompt="a face"), pipeline)
    assert with_mask.tobytes() != generate(pipeline, text_only, [1])[0][0].tobytes()

    # the EMA weights are published; training continues with the weights themselves
    published = dict(pipeline.transformer.named_parameters())
    name = next(name for name in published if "lora_B" in name)
    assert torch.equal(published[name], whole[f"average/0/{name}"])
    assert not torch.equal(published[name], whole[f"model/{name}"])
    network = dataclasses.replace(adapter_recipe.network, rank=4)
    with pytest.raises(InputError, match="started with another network"):
        loop.train(dataclasses.replace(adapter_recipe, network=network), tmp_path / "whole")


def test_diagnostics_identify_faces_by_conditions(adapter_recipe, tmp_path, monkeypatch):
    """The latents of an image are sampled from the autoencoder's distribution and differ every time."""
    created = []

    class Recorded(loop.Diagnostics):
        def __init__(self, *arguments):
            super().__init__(*arguments)
            created.append(self)

    monkeypatch.setattr(loop, "Diagnostics", Recorded)
    loop.train(dataclasses.replace(adapter_recipe, diagnostics_every=16, preview=()), tmp_path)
    assert created[0].occurrences["mask"] > 6 >= len(created[0].pairs["mask"])


def test_base_trained_from_scratch(prepared, tmp_path):
    """Without conditions it is a small FLUX: it accepts text only, and adapters with both kinds of targets."""
    network = {**NETWORK, "spatial_stream": "lora"}
    base = loop.train(recipe(prepared, network, data={"condition_probabilities": {"none": 1.0}}, preview=[]), tmp_path)
    pipeline = load(base)
    assert tuple(pipeline.transformer.config.condition_names) == ()
    assert not any(".spatial." in name for name in pipeline.transformer.state_dict())
    with pytest.raises(InputError):
        pipeline("a face", control_image={"mask": prepared / "faces/train/masks/000000.png"})
    request = resolve(PortraitRequest(prompt="a face"), pipeline)
    images = {"base": generate(pipeline, request, [1])[0][0].tobytes()}
    for targets in ("spatial", "all"):
        lora = {"name": "mditface_adapter", "base": str(base), "rank": 2, "targets": targets}
        shards = {"shards": [str(prepared / "shards")]}
        model = loop.train(recipe(prepared, lora, data=shards), tmp_path / targets)
        assert json.loads((model / "adapter.json").read_text())["targets"] == targets
        adapted = load(model)
        images[targets] = generate(adapted, request, [1])[0][0].tobytes()
        mask = {"mask": ConditionInput(image=str(prepared / "faces/train/masks/000000.png"))}
        with_mask = resolve(PortraitRequest(prompt="a face", conditions=mask), adapted)
        assert images[targets] != generate(adapted, with_mask, [1])[0][0].tobytes()
    assert images["base"] == images["spatial"] != images["all"]


def test_adapter_on_mmface(prepared, tmp_path):
    """The base is unchanged; the published folder acts as `--model` and as `--lora`."""
    shards = {"condition_probabilities": {"mask": 0.5, "sketch": 0.3, "none": 0.2}}
    sampler = {"objective": {"name": "rectified_flow", "sampler": "dpm++"}}
    defaults = {"size": 32, "steps": 3, "guidance_scale": 1.5}
    base = loop.train(recipe(prepared, {}, data=shards, defaults=defaults, **sampler), tmp_path / "base")
    network = {"name": "mmface_adapter", "base": str(base), "rank": 2, "alpha": 4, "targets": "all"}
    given = recipe(prepared, network, data=shards, defaults={"size": 32})
    whole = check_resume(lambda run: loop.train(given, run), tmp_path, killed_after_checkpoint())
    assert all(".lora_" in name for name in whole)
    model = tmp_path / "whole" / "model"
    assert json.loads((model / "adapter.json").read_text()) == {
        "kind": "mmface",
        "base": str(base),
        "targets": "all",
        "rank": 2,
        "alpha": 4,
        "defaults": {"size": 32},
    }
    mask = {"mask": ConditionInput(image=str(prepared / "faces/train/masks/000000.png"))}
    adapted, plain, added = load(model), load(base), load(base)
    add_loras(added, [(str(model), 1.0)])
    request = resolve(PortraitRequest(prompt="a face", conditions=mask), plain)
    images = [generate(pipeline, request, [1])[0][0].tobytes() for pipeline in (plain, adapted, added)]
    assert images[0] != images[1] == images[2]
    preview = given.preview[0]
    request = resolve(dataclasses.replace(request, prompt=preview.prompt), adapted)
    (image,), _ = generate(adapted, request, [preview.seed])  # with sampler, steps and guidance of the base
    shown = Image.open(sorted((tmp_path / "whole" / "previews").iterdir())[-1])
    assert image.tobytes() == shown.convert("RGB").tobytes()
    planned = trace(given, 4, component_sizes(given)).trainable
    assert planned == sum(value.numel() for name, value in whole.items() if name.startswith("model/"))


def test_invalid_adapters(prepared, tmp_path):
    def rejected(message: str, network: dict, **changes) -> None:
        with pytest.raises(InputError, match=message):
            loop.train(recipe(prepared, network, **changes), tmp_path)

    adapter, other = {"name": "mditface_adapter"}, {"shards": [str(prepared / "flux_shards")]}
    rejected("Unknown model", {**adapter, "base": str(prepared / "nowhere")})
    mmface = {"shards": [str(prepared / "shards")], "components": str(prepared / "components")}
    rejected(r"the base of an adapter must be FLUX\.1", {**adapter, "base": "mmface-mini"}, data=mmface)
    rejected("another encoder", NETWORK, data=other)
    adapter, base = {"name": "mmface_adapter", "base": "mmface-mini"}, {"condition_probabilities": {"mask": 1.0}}
    given: dict = {"data": base | {"components": str(prepared / "components")}, "preview": []}
    rejected("must be an MMFace", {**adapter, "base": "mditface-mini"}, **given)
    rejected("objective's name = rectified_flow, not ddpm", adapter, **given, objective={"name": "ddpm"})
    rejected("on the latents of another encoder", adapter, **given)
    given["data"] |= {"condition_probabilities": {"photo": 1.0}}
    rejected("has photo, but mmface-mini was trained with mask, sketch", adapter, **given)
