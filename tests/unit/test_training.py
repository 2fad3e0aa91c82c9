"""Shards, order of samples, batches and the loop: exact, resumable, and refusing what does not fit."""

from __future__ import annotations

import json
import os
import shutil
import signal
from pathlib import Path

import numpy as np
import pytest
import torch

from builders import save_components, tiny_transformer
from likeness.config import load_toml
from likeness.data.sampler import Sampler
from likeness.data.store import Sample, Store
from likeness.encoders.components import load_components
from likeness.pipelines.generate import generate, resolve
from likeness.pipelines.load import load
from likeness.prepare.encode import encode_folder
from likeness.prepare.synthetic import write_synthetic
from likeness.train import loop
from likeness.train.checkpoint import load_state, save_state, states
from likeness.train.config import DataRecipe, TrainRecipe
from likeness.train.optim import Ema, learning_rate, make_optimizers, power_of
from likeness.train.step import make_batch
from likeness.train.validate import condition_losses
from likeness.types import ConditionInput, InputError, PortraitRequest, TryAgain

SIZE = 32


@pytest.fixture(scope="module")
def prepared(tmp_path_factory) -> Path:
    """Ten drawn faces, tiny components, and their store."""
    root = tmp_path_factory.mktemp("prepared")
    write_synthetic(root / "faces", 10, SIZE, seed=0)
    save_components(root / "components")
    encode_folder(root / "faces", root / "shards", load_components(root / "components"), size=SIZE)
    return root


def recipe(root: Path, images: int = 24, **changes: str) -> TrainRecipe:
    text = f"""
        kind = "transformer"
        precision = "fp32"
        log_every = 8
        checkpoint_every = 12
        [network]
        hidden_size = 32
        depth = 2
        heads = 2
        [data]
        shards = ["{root}/shards"]
        components = "{root}/components"
        condition_shares = {{ mask = 0.5, sketch = 0.3, none = 0.2 }}
        [optimizer]
        images = {images}
        batch = 4
        learning_rate = 1e-3
        [defaults]
        size = {SIZE}
        steps = 2
        guidance_scale = 2.0
        [[preview]]
        prompt = "a face"
        mask = "{root}/faces/train/masks/000000.png"
        seed = 5
    """
    path = root / "recipe.toml"
    path.write_text(text)
    return load_toml(path, TrainRecipe, tuple(f"{key}={value}" for key, value in changes.items()))


def weights(run: Path) -> dict[str, torch.Tensor]:
    state = load_state(run)
    assert state is not None
    return state


def test_sampler_sees_every_face_once_an_epoch():
    sampler = Sampler(7, seed=1)
    epochs = [[sampler[p] for p in range(start, start + 7)] for start in (0, 7, 14)]
    assert all(sorted(epoch) == list(range(7)) for epoch in epochs)
    assert epochs[0] != epochs[1]
    assert Sampler(7, seed=1)[16] == epochs[2][2]


def test_batch_depends_on_positions_only():
    """A sample's draws are the same in any batch, on any rank."""
    samples = [
        Sample(torch.full((4, 4, 4), float(i)), {"mask": torch.ones(4, 4, 4)}, [f"caption {k}" for k in range(5)])
        for i in range(6)
    ]
    data = DataRecipe(shards=(), condition_shares={"mask": 0.5, "none": 0.5})
    one, zero = torch.ones(1), torch.zeros(1)
    whole = make_batch(samples, range(10, 16), data, ["mask", "none"], zero, one, seed=3)
    part = make_batch(samples[4:], range(14, 16), data, ["mask", "none"], zero, one, seed=3)
    assert torch.equal(whole.noise[4:], part.noise)
    assert torch.equal(whole.uniform[4:], part.uniform)
    assert torch.equal(whole.condition_index[4:], part.condition_index)
    assert whole.captions[4:] == part.captions


def test_shares_and_dropout_are_what_the_recipe_says():
    """Text is dropped once, not twice: 10 % of 10,000 samples, and conditions in their shares."""
    sample = Sample(torch.zeros(1, 1, 1), {"mask": torch.zeros(1, 1, 1), "sketch": torch.zeros(1, 1, 1)}, ["words"])
    data = DataRecipe(shards=(), condition_shares={"mask": 0.45, "sketch": 0.35, "none": 0.2}, text_dropout=0.1)
    n, one, zero = 10_000, torch.ones(1), torch.zeros(1)
    batch = make_batch([sample] * n, range(n), data, ["mask", "sketch", "none"], zero, one, seed=0)
    assert abs(batch.captions.count("") / n - 0.1) < 0.01
    index = batch.condition_index[:, 0]
    for row, share in ((0, 0.45), (1, 0.35), (-1, 0.2)):
        assert abs((index == row).float().mean().item() - share) < 0.015
    assert abs(batch.uniform.mean().item() - 0.5) < 0.01
    assert abs(batch.noise.std().item() - 1) < 0.03


def test_several_conditions_at_once():
    conditions = {name: torch.full((2, 4, 4), float(value)) for value, name in enumerate(("mask", "sketch"), start=1)}
    both, lacking = Sample(torch.zeros(2, 4, 4), conditions, []), Sample(torch.zeros(2, 4, 4), {}, [])
    data = DataRecipe(shards=(), condition_shares={"mask+sketch": 1.0})
    mean, std = torch.full((1, 2, 1, 1), 1.0), torch.full((1, 2, 1, 1), 2.0)
    batch = make_batch([both, lacking], [0, 1], data, ["sketch", "mask"], mean, std, seed=0)
    assert batch.condition_index.tolist() == [[1, 0], [-1, -1]]
    assert batch.condition_latents.shape == (2, 2, 2, 4, 4)
    assert batch.condition_latents[0].mean(dim=(1, 2, 3)).tolist() == [0.0, 0.5]
    assert (batch.clean == -0.5).all()


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_stopped_and_resumed_is_never_stopped(prepared, tmp_path, monkeypatch, name):
    """Killed after a checkpoint and started again: bit-identical weights, average, and previews."""
    given = recipe(prepared, **{"optimizer.name": f'"{name}"'})
    loop.train(given, tmp_path / "whole")
    real = loop.save_state

    def save_and_die(*arguments):
        real(*arguments)
        raise KeyboardInterrupt

    monkeypatch.setattr(loop, "save_state", save_and_die)
    with pytest.raises(KeyboardInterrupt):
        loop.train(given, tmp_path / "parts")
    assert [path.name for path in states(tmp_path / "parts")] == ["000000000012"]
    monkeypatch.setattr(loop, "save_state", real)
    loop.train(given, tmp_path / "parts")
    whole, parts = weights(tmp_path / "whole"), weights(tmp_path / "parts")
    assert whole.keys() == parts.keys()
    assert all(torch.equal(whole[name], parts[name]) for name in whole)
    previews = [sorted((tmp_path / name / "previews").iterdir())[-1].read_bytes() for name in ("whole", "parts")]
    assert previews[0] == previews[1]


def test_told_to_end(prepared, tmp_path, monkeypatch):
    """SIGTERM within a step: a state is written after it, and the same command goes on to what it would have been."""
    loop.train(recipe(prepared), tmp_path / "whole")
    steps = []

    def told_in_the_fourth(*arguments):
        steps.append(len(steps) + 1)
        if steps[-1] == 4:
            os.kill(os.getpid(), signal.SIGTERM)
        return real(*arguments)

    real = loop.loss_of
    monkeypatch.setattr(loop, "loss_of", told_in_the_fourth)
    with pytest.raises(TryAgain, match="told to end after 16 images: run the same command again to go on"):
        loop.train(recipe(prepared), tmp_path / "parts")
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
    assert [int(path.name) for path in states(tmp_path / "parts")] == [12, 16]
    loop.train(recipe(prepared), tmp_path / "parts")
    whole, parts = weights(tmp_path / "whole"), weights(tmp_path / "parts")
    assert all(torch.equal(whole[name], parts[name]) for name in whole)


def test_muon_takes_the_matrices_of_the_blocks(prepared):
    network = tiny_transformer()
    adamw, muon = make_optimizers(network, recipe(prepared, **{"optimizer.name": '"muon"'}).optimizer)
    names = {parameter: name for name, parameter in network.named_parameters()}
    taken = {names[parameter] for group in muon.param_groups for parameter in group["params"]}
    left = {names[parameter] for group in adamw.param_groups for parameter in group["params"]}
    assert taken | left == set(names.values())
    assert not taken & left
    assert "blocks.0.attention.image_qkv.weight" in taken
    assert {"patch_embed.weight", "blocks.0.modulation.weight", "final.weight", "text_embed.weight"} <= left
    (alone,) = make_optimizers(network, recipe(prepared).optimizer)
    assert sum(len(group["params"]) for group in alone.param_groups) == len(names)


def test_preview_is_what_generate_makes(prepared, tmp_path):
    """The published folder, loaded afresh, gives the preview's pixels."""
    from PIL import Image

    config = recipe(prepared)
    model = loop.train(config, tmp_path)
    wish = config.preview[0]
    pipeline = load(model)
    assert pipeline.config.sizes == [[32, 32]]  # those of the shards
    request = resolve(
        PortraitRequest(prompt=wish.prompt, conditions={"mask": ConditionInput(image=wish.mask)}, seed=5), pipeline
    )
    picture = generate(pipeline, request, [5])[0][0]
    preview = Image.open(sorted((tmp_path / "previews").iterdir())[-1])
    assert np.array_equal(np.asarray(preview), np.asarray(picture))


def test_training_learns(prepared, tmp_path):
    loop.train(recipe(prepared, images=480, log_every="48", checkpoint_every="480"), tmp_path)
    losses = [json.loads(line)["loss"] for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert losses[-1] < 0.9 * losses[0]


def test_run_of_another_recipe_is_refused(prepared, tmp_path):
    loop.train(recipe(prepared, images=4), tmp_path)
    with pytest.raises(InputError, match="another network"):
        loop.train(recipe(prepared, images=4, **{"network.depth": "3"}), tmp_path)


def test_shards_of_another_autoencoder_are_refused(prepared, tmp_path):
    copy = tmp_path / "shards"
    copy.mkdir()
    for file in (prepared / "shards").iterdir():
        (copy / file.name).write_bytes(file.read_bytes())
    manifest = json.loads((copy / "manifest.json").read_text())
    (copy / "manifest.json").write_text(json.dumps({**manifest, "codec": "0" * 64}))
    with pytest.raises(InputError, match="another encoder"):
        loop.train(recipe(prepared, **{"data.shards": f'["{copy}"]'}), tmp_path / "run")


def test_text_features_of_the_shards(prepared, tmp_path):
    """Stored features train as the tower itself does; those of another tower, or of a part of the data, are refused."""
    parts, out = load_components(prepared / "components"), tmp_path / "shards"
    encode_folder(prepared / "faces", out, parts, size=SIZE, text_features=True)
    of = lambda *stores: recipe(prepared, images=8, **{"data.shards": json.dumps([str(s) for s in stores])})  # noqa: E731
    loop.train(of(out), tmp_path / "stored")
    loop.train(of(prepared / "shards"), tmp_path / "fresh")
    told = [json.loads((tmp_path / run / "metrics.jsonl").read_text())["loss"] for run in ("stored", "fresh")]
    assert told[0] == pytest.approx(told[1], rel=1e-3)
    with pytest.raises(InputError, match="encode all alike"):
        loop.train(of(out, prepared / "shards"), tmp_path / "mixed")
    manifest = json.loads((out / "manifest.json").read_text())
    (out / "manifest.json").write_text(json.dumps({**manifest, "text": "0" * 64}))
    with pytest.raises(InputError, match="another text encoder"):
        loop.train(of(out), tmp_path / "other")
    with pytest.raises(InputError, match="another text encoder"):
        encode_folder(prepared / "faces", out, parts, size=SIZE)


def test_condition_without_data_is_refused(prepared, tmp_path):
    shares = "{ mask = 0.5, depth = 0.5 }"
    with pytest.raises(InputError, match="has no depth"):
        loop.train(recipe(prepared, **{"data.condition_shares": shares}), tmp_path)


def test_checkpoints_are_whole_and_few(tmp_path):
    for seen in (10, 20, 30):
        save_state(tmp_path, seen, {"weight": torch.full((3,), float(seen))}, keep=2)
    assert [path.name for path in states(tmp_path)] == ["000000000020", "000000000030"]
    # what a killed process leaves is not taken for a state
    shutil.copytree(states(tmp_path)[-1], tmp_path / "checkpoints" / "000000000040.partial")
    assert load_state(tmp_path)["weight"].tolist() == [30.0] * 3
    broken = tmp_path / "checkpoints" / "000000000050"
    shutil.copytree(states(tmp_path)[-1], broken)
    data = broken / "__0_0.distcp"
    data.write_bytes(data.read_bytes()[:20])
    with pytest.raises(InputError, match="000000000050"):
        load_state(tmp_path)


def test_learning_rate():
    rate = lambda seen, decay: learning_rate(seen, 100, 1.0, 10, decay)  # noqa: E731
    assert rate(0, "cosine") == pytest.approx(0.1)
    assert rate(10, "cosine") == 1.0
    assert rate(55, "cosine") == pytest.approx(0.5)
    assert rate(55, "linear") == pytest.approx(0.5)
    assert rate(100, "linear") == pytest.approx(0.0)
    assert rate(99, "constant") == 1.0


def test_power_law_average():
    """Against the definition: the average at step n weighs step t by t^gamma, normalised; its width is as asked."""
    model = torch.nn.Linear(1, 1, bias=False)
    ema = Ema(model, relative_width=0.1)
    assert power_of(0.1) == pytest.approx(6.94, abs=0.01)
    values = torch.randn(200, generator=torch.Generator().manual_seed(0))
    for step, value in enumerate(values, start=1):
        with torch.no_grad():
            model.weight.fill_(value)
        ema.update(step)
    steps = torch.arange(1, 201, dtype=torch.float64)
    share = steps**ema.gamma / (steps**ema.gamma).sum()
    assert ema.weights["weight"].item() == pytest.approx((share * values).sum().item(), abs=0.02)


def test_condition_losses(prepared, tmp_path):
    """A network that cannot see its condition has the same loss with any; one that can has not."""
    pipeline = load(loop.train(recipe(prepared, images=240, checkpoint_every="240"), tmp_path))
    store = Store(prepared / "shards")
    losses = condition_losses(pipeline, store, "mask", count=6)
    assert losses == condition_losses(pipeline, store, "mask", count=6)
    assert len(set(losses.values())) == 3
    with torch.no_grad():
        weight = pipeline.transformer.patch_embed.weight
        weight[:, weight.shape[1] // 2 :] = 0  # the condition's half of a patch
        pipeline.transformer.condition_embed.weight.zero_()
    blind = condition_losses(pipeline, store, "mask", count=6)
    assert len(set(blind.values())) == 1
