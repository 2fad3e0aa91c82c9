"""Predictions before a run: counts that can be worked out by hand, layouts, settings that fit, and refusals."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from likeness.cli import main
from likeness.config import load_toml
from likeness.train.calibrate import STANDS, reference
from likeness.train.config import TrainRecipe
from likeness.train.devices import DEVICES
from likeness.train.plan import fitting, layouts, predict
from likeness.train.trace import FLUX_STANDS, Meter, Stands, trace, trace_blocks

RECIPES = Path(__file__).parents[2] / "recipes"


def test_meter_counts():
    """A product of known size: its operations, what it moves, and what is alive at its most."""
    with FakeTensorMode(), Meter() as meter:
        a = torch.empty(64, 128)
        b = torch.empty(128, 32)
        c = a @ b
        meter.moved = meter.operations = 0
        view = c.reshape(32, 64)
        assert meter.operations == 0  # a view costs nothing
        d = view.relu()
        assert meter.flops == 2 * 64 * 128 * 32
        assert meter.moved == 2 * 4 * 64 * 32
        assert meter.alive == 4 * (64 * 128 + 128 * 32 + 2 * 64 * 32)
        del a, b, c, view, d
    assert meter.peak == 4 * (64 * 128 + 128 * 32 + 2 * 64 * 32)
    assert meter.alive == 0


def test_trace():
    recipe = reference(64, 2, 2, "fp32")
    one, four = trace(recipe, 1, STANDS), trace(recipe, 4, STANDS)
    assert one.parameters == 4 * one.trained
    assert four.flops == pytest.approx(4 * one.flops, rel=0.1)
    assert four.operations == pytest.approx(one.operations, rel=0.05)
    saving = dataclasses.replace(recipe, network=dataclasses.replace(recipe.network, gradient_checkpointing=True))
    again = trace(saving, 4, STANDS)
    assert again.alive < four.alive
    assert 1.1 < again.flops / four.flops < 4 / 3 + 0.01  # forward twice: at most a third more


def test_attention_on_an_accelerator():
    """There it is fused, also in bf16, where a CPU in training writes it out: less is moved."""
    recipe = reference(64, 2, 2, "bf16")
    cpu, gpu = (trace(recipe, 4, STANDS, accelerator=accelerator) for accelerator in (False, True))
    assert gpu.moved < cpu.moved
    assert gpu.trained == cpu.trained
    assert trace(recipe, 4, STANDS) == cpu


def test_blocks_follow_from_few():
    """Two and three blocks say what six cost."""
    recipe = reference(64, 6, 2, "bf16")
    short, whole = trace(recipe, 2, STANDS), trace_blocks(recipe, 2, STANDS, [6])
    for name in ("parameters", "trained", "gradients", "block", "flops", "operations", "moved"):
        assert getattr(short, name) == getattr(whole, name), name
    assert short.alive == pytest.approx(whole.alive, rel=0.02)


def test_layouts_trade_memory_for_communication():
    recipe = load_toml(RECIPES / "debug.toml", TrainRecipe)
    device = DEVICES["h200"]
    plans = {(gpus, layout): plan for gpus, layout, plan in layouts(recipe, device, STANDS, (1, 8, 64))}
    assert plans[1, "replicate"].communicated == 0
    alone, repeated, spread = plans[1, "replicate"], plans[8, "replicate"], plans[8, "shard"]
    assert repeated.memory == pytest.approx(alone.memory)
    assert spread.memory < repeated.memory
    weights = trace(recipe, 16, STANDS).gradients
    assert repeated.communicated == pytest.approx(2 * 7 / 8 * weights)
    assert plans[8, "hybrid"] == spread  # one machine
    assert plans[64, "hybrid"].seconds < plans[64, "shard"].seconds  # between machines an eighth of the gradients goes


def test_what_would_fit():
    """The first setting that fits ends the search; where the device is too small, every one is tried."""
    recipe = load_toml(RECIPES / "debug.toml", TrainRecipe)
    (only,) = fitting(recipe, DEVICES["h200"], 1, STANDS)
    assert only[0] == "as it is"
    assert only[2]
    tried = fitting(recipe, dataclasses.replace(DEVICES["h200"], memory=1.0), 1, STANDS)
    assert not any(fits for _, _, fits in tried)
    assert "micro_batch=1 optimizer.name=adamw8bit" in tried[-1][0]
    needs = [plan.memory for _, plan, _ in tried]
    assert needs == sorted(needs, reverse=True)
    frugal = fitting(recipe, dataclasses.replace(DEVICES["h200"], memory=needs[1] + 1), 1, STANDS)
    assert [(setting, fits) for setting, _, fits in frugal] == [
        ("as it is", False),
        ("network.gradient_checkpointing=true", True),
    ]


def test_batch_is_made_of_passes():
    recipe = load_toml(RECIPES / "debug.toml", TrainRecipe)
    whole = predict(recipe, trace(recipe, 16, STANDS), DEVICES["h200"], 1, 16, STANDS)
    parts = predict(recipe, trace(recipe, 4, STANDS), DEVICES["h200"], 1, 4, STANDS)
    assert parts.memory < whole.memory
    assert parts.seconds > whole.seconds


def test_command(capsys):
    main(["train", str(RECIPES / "debug.toml"), "--plan", "--device", "rtx-4090", "--gpus", "2"])
    out = capsys.readouterr().out
    assert "364,224 of them trained" in out
    assert "as it is" in out
    main(["train", str(RECIPES / "debug.toml"), "--plan", "--layouts", "--device", "h200", "optimizer.batch=8"])
    told = capsys.readouterr().out.splitlines()
    assert "8 images on each, 8 in a machine" in told[0]
    assert told[2] == "| devices | replicate | shard | hybrid |"
    assert [line.split()[1] for line in told[4:]] == ["1", "8", "16", "64", "512"]
    with pytest.raises(SystemExit, match="2"):
        main(["train", str(RECIPES / "debug.toml"), "--layouts"])
    assert "--layouts is a form of --plan" in capsys.readouterr().err
    for arguments, words in (
        (["--device", "abacus"], "no data sheet of 'abacus'"),
        (["--gpus", "5"], "among 5 devices"),
        (["--layouts", "--device", "abacus"], "no data sheet of 'abacus'"),
        (["micro_batch=3"], "a batch of 16 cannot be cut into parts of 3 for 1 processes"),
        (["--layouts", "micro_batch=3"], "a batch of 16 cannot be cut into parts of 3"),
        (["objective.name=abacus"], "Unknown objective 'abacus'"),
    ):
        with pytest.raises(SystemExit, match="2"):
            main(["train", str(RECIPES / "debug.toml"), "--plan", "--device", "h100", *arguments])
        assert words in capsys.readouterr().err


def test_adapter_without_its_base():
    """The base in bf16, frozen; the adapter's weights in float32, and gradients for them alone."""
    recipe = load_toml(RECIPES / "mditface_lora_512.toml", TrainRecipe)
    traced = trace(recipe, 1, FLUX_STANDS, accelerator=True)
    assert traced.trained == 28_975_616 + 3072
    # Of the last block's spatial tokens only keys and values are read: nothing reaches its query, MLP and output.
    unread = (3072 + 3072) * 8 + (3072 + 12288) * 8 + (15360 + 3072) * 8
    assert traced.gradients == 4 * (traced.trained - unread)
    assert traced.parameters == pytest.approx(2 * 11.9e9, rel=0.02)


def test_published_size_without_its_components():
    """Nothing has to be at hand to plan the published network."""
    recipe = load_toml(RECIPES / "mmface_256_rfm.toml", TrainRecipe)
    traced = trace(recipe, 1, Stands())
    assert traced.trained == 1_345_299_776
    assert traced.parameters == 4 * traced.trained
