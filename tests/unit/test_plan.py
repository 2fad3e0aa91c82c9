"""`likeness train --plan`: counts that can be computed by hand, shardings, settings that fit, and invalid options."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from builders import tiny_pipeline
from likeness.cli import main
from likeness.config import load_toml
from likeness.train.config import MMFaceAdapter, TrainRecipe
from likeness.train.plan import DEVICES, REFERENCE_SIZES, compare_shardings, predict, reference_recipe, search
from likeness.train.trace import FLUX_SIZES, ComponentSizes, Meter, block_counts, trace, trace_blocks

RECIPES = Path(__file__).parents[2] / "recipes"


def test_meter_counts():
    """A product of known size: its FLOPs, bytes moved and peak of live bytes."""
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
        assert meter.live == 4 * (64 * 128 + 128 * 32 + 2 * 64 * 32)
        del a, b, c, view, d
    assert meter.peak == 4 * (64 * 128 + 128 * 32 + 2 * 64 * 32)
    assert meter.live == 0


def test_trace():
    recipe = reference_recipe(64, 2, 2, "fp32")
    one, four = trace(recipe, 1, REFERENCE_SIZES), trace(recipe, 4, REFERENCE_SIZES)
    assert one.parameters == 4 * one.trainable
    assert four.flops == pytest.approx(4 * one.flops, rel=0.1)
    assert four.operations == pytest.approx(one.operations, rel=0.05)
    saving = dataclasses.replace(recipe, network=dataclasses.replace(recipe.network, gradient_checkpointing=True))
    again = trace(saving, 4, REFERENCE_SIZES)
    assert again.live < four.live
    assert 1.1 < again.flops / four.flops < 4 / 3 + 0.01  # forward twice: at most a third more


def test_attention_on_an_accelerator():
    """It is fused in bf16 training on an accelerator but not on a CPU: fewer bytes are moved."""
    recipe = reference_recipe(64, 2, 2, "bf16")
    cpu, gpu = (trace(recipe, 4, REFERENCE_SIZES, accelerator=accelerator) for accelerator in (False, True))
    assert gpu.moved < cpu.moved
    assert gpu.trainable == cpu.trainable
    assert trace(recipe, 4, REFERENCE_SIZES) == cpu


def test_extrapolation_of_blocks():
    """Six blocks, from two and three."""
    recipe = reference_recipe(64, 6, 2, "bf16")
    short, whole = trace(recipe, 2, REFERENCE_SIZES), trace_blocks(recipe, 2, REFERENCE_SIZES, [6])
    for name in ("parameters", "trainable", "gradients", "block", "flops", "operations", "moved"):
        assert getattr(short, name) == getattr(whole, name), name
    assert short.live == pytest.approx(whole.live, rel=0.02)


def test_shardings_trade_memory_for_communication():
    recipe = load_toml(RECIPES / "debug.toml", TrainRecipe)
    plans = compare_shardings(recipe, DEVICES["h200"], REFERENCE_SIZES, (1, 8, 64))
    one, replicated, sharded = plans[1, "replicate"], plans[8, "replicate"], plans[8, "shard"]
    assert one == plans[1, "shard"] == plans[1, "hybrid"]
    assert one.communicated == 0
    assert replicated.memory == pytest.approx(one.memory)
    assert sharded.memory < replicated.memory
    gradients = trace(recipe, 16, REFERENCE_SIZES).gradients
    assert replicated.communicated == pytest.approx(2 * 7 / 8 * gradients)
    assert plans[8, "hybrid"] == sharded  # one machine
    assert plans[64, "hybrid"].seconds < plans[64, "shard"].seconds  # an eighth of the gradients between machines


def test_search_for_settings_that_fit():
    """It stops at the first setting that fits; if none does, all are tried."""
    recipe, h200 = load_toml(RECIPES / "debug.toml", TrainRecipe), DEVICES["h200"]
    ((setting, _, fits),) = search(recipe, h200, 1, REFERENCE_SIZES)
    assert (setting, fits) == ("unchanged", True)
    tried = list(search(recipe, dataclasses.replace(h200, memory=1.0), 1, REFERENCE_SIZES))
    assert not any(fits for _, _, fits in tried)
    assert "micro_batch=1 optimizer.name=adamw8bit" in tried[-1][0]
    memory = [plan.memory for _, plan, _ in tried]
    assert memory == sorted(memory, reverse=True)
    found = search(recipe, dataclasses.replace(h200, memory=memory[1] + 1), 1, REFERENCE_SIZES)
    assert [(setting, fits) for setting, _, fits in found] == [
        ("unchanged", False),
        ("network.gradient_checkpointing=true", True),
    ]


def test_micro_batches():
    recipe = load_toml(RECIPES / "debug.toml", TrainRecipe)
    one, four = (
        predict(recipe, trace(recipe, micro, REFERENCE_SIZES), DEVICES["h200"], 1, micro, REFERENCE_SIZES)
        for micro in (16, 4)
    )
    assert four.memory < one.memory
    assert four.seconds > one.seconds


def test_command(capsys):
    command = ["train", str(RECIPES / "debug.toml"), "--plan"]
    main([*command, "--device", "rtx-4090", "--gpus", "2"])
    out = capsys.readouterr().out
    assert "364,224 trainable" in out
    assert "unchanged" in out
    assert out.splitlines()[-1].startswith("512 images, about ")
    assert "alignment_weight" not in out
    main([*command, "--device", "rtx-4090", "alignment_weight=0.5"])
    assert "the face parser of alignment_weight is not included" in capsys.readouterr().out
    main(command)  # the device that PyTorch finds
    default = capsys.readouterr().out
    assert "364,224 trainable" in default
    main([*command, "--compare-sharding", "--device", "h200", "optimizer.batch=8"])
    lines = capsys.readouterr().out.splitlines()
    assert "8 images per device, 8 devices per machine" in lines[0]
    assert lines[2] == "| devices | replicate | shard | hybrid |"
    assert [line.split()[1] for line in lines[4:]] == ["1", "8", "16", "64", "512"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--compare-sharding"], "--compare-sharding requires --plan"),
        (["--device", "cpu"], "--device requires --plan; training uses the accelerators that PyTorch finds"),
        (["--gpus", "2"], "--gpus requires --plan"),
        (["--plan", "--compare-sharding", "--gpus", "2"], "tries 1 to 512 devices: leave --gpus out"),
        (["--plan", "--device", "abacus"], "Unknown device 'abacus'"),
        (["--plan", "--device", "h100", "--gpus", "5"], "among 5 devices"),
        (["--plan", "--compare-sharding", "--device", "abacus"], "Unknown device 'abacus'"),
        (["--plan", "--device", "h100", "micro_batch=3"], "a batch of 16 cannot be divided into micro-batches of 3"),
        (["--plan", "--compare-sharding", "--device", "h100", "micro_batch=3"], "cannot be divided into micro-batches"),
        (["--plan", "--device", "h100", "defaults.size=136"], "defaults.size is 136"),
        (["--plan", "--device", "h100", "network.patch_size=3"], "cannot be divided into patches of 3"),
        (["--plan", "--device", "h100", "objective.name=abacus"], "Unknown objective 'abacus'"),
    ],
)
def test_invalid_options(capsys, options, message):
    with pytest.raises(SystemExit, match="2"):
        main(["train", str(RECIPES / "debug.toml"), *options])
    assert message in capsys.readouterr().err


def test_adapter_without_its_base():
    """The base is in bf16 and frozen; the adapter's weights are in float32, and only they have gradients."""
    recipe = load_toml(RECIPES / "mditface_lora_512.toml", TrainRecipe)
    traced = trace(recipe, 1, FLUX_SIZES, accelerator=True)
    assert traced.trainable == 28_975_616 + 3072
    # of the last block's spatial tokens only keys and values are used: query, MLP and output have no gradient
    unread = (3072 + 3072) * 8 + (3072 + 12288) * 8 + (15360 + 3072) * 8
    assert traced.gradients == 4 * (traced.trainable - unread)
    assert traced.parameters == pytest.approx(2 * 11.9e9, rel=0.02)


def test_adapter_on_a_training_run(tmp_path):
    """Its base is the model in the run folder."""
    tiny_pipeline().save_pretrained(tmp_path / "model")
    depth = tiny_pipeline().transformer.config.depth
    recipe = load_toml(RECIPES / "debug.toml", TrainRecipe)
    for base in (tmp_path, tmp_path / "model"):
        assert block_counts(
            dataclasses.replace(recipe, network=MMFaceAdapter(name="mmface_adapter", base=str(base)))
        ) == [depth]


def test_published_size_without_its_components():
    """A plan of the published network needs no files."""
    recipe = load_toml(RECIPES / "mmface_256_rfm.toml", TrainRecipe)
    traced = trace(recipe, 1, ComponentSizes())
    assert traced.trainable == 1_345_299_776
    assert traced.parameters == 4 * traced.trainable
