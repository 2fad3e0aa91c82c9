"""The canary: silent on a healthy run, and loud within 50 steps about faults planted in one."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from likeness.data.store import Store
from likeness.train import loop
from likeness.train.canary import CLEAR, certainty, pairing
from runs import metrics, prepare, small

STEPS = 30


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    return prepare(tmp_path_factory.mktemp("canary"), 96)


def alarms(root: Path, run: Path) -> list[str]:
    """What the canary cries in a run of `STEPS` steps."""
    optimizer = {"images": 8 * STEPS, "batch": 8}
    loop.train(
        small(root, {"mask": 0.5, "sketch": 0.4, "none": 0.1}, optimizer=optimizer, canary_every=8 * STEPS // 2), run
    )
    said = [sentence for line in metrics(run) for sentence in line.get("canary", [])]
    assert any(sentence.startswith("mask is ") for sentence in said)
    return [sentence for sentence in said if sentence.startswith("ALARM")]


def test_healthy(root, tmp_path):
    assert alarms(root, tmp_path) == []
    looks = [line for line in metrics(tmp_path) if "canary" in line]
    assert [line["seen"] for line in looks] == [120, 240]
    assert {"canary/mask_right", "canary/mask_shuffled", "canary/mask_none", "canary/mask_time_4"} <= looks[0].keys()
    assert looks[-1]["canary/sketch_pairs"] > CLEAR


def test_condition_path_cut(root, tmp_path, monkeypatch):
    def deaf(*arguments, **options):
        network = real(*arguments, **options)
        network.register_forward_pre_hook(lambda _, given: (*given[:3], given[3] * 0, *given[4:]))
        return network

    real = loop.build_network
    monkeypatch.setattr(loop, "build_network", deaf)
    found = alarms(root, tmp_path)
    assert any("prediction does not depend on the mask" in alarm for alarm in found)
    assert any("prediction does not depend on the sketch" in alarm for alarm in found)


def test_condition_never_given(root, tmp_path, monkeypatch):
    def without(*arguments):
        batch = real(*arguments)
        return batch._replace(condition_index=torch.full_like(batch.condition_index, -1))

    real = loop.make_batch
    monkeypatch.setattr(loop, "make_batch", without)
    assert any("none had a mask" in alarm for alarm in alarms(root, tmp_path))


@pytest.mark.parametrize("how", ["no gradient wanted", "no optimizer"])
def test_frozen_weights(root, tmp_path, monkeypatch, how):
    def freeze(*arguments, **options):
        network = real(*arguments, **options)
        network.blocks[0].attention.requires_grad_(False)
        return network

    def forget(model, recipe):
        (optimizer,) = real(model, recipe)
        group = optimizer.param_groups[0]
        group["params"] = [p for p in group["params"] if p is not model.patch_embed.weight]
        return [optimizer]

    name, fault = {"no gradient wanted": ("build_network", freeze), "no optimizer": ("make_optimizers", forget)}[how]
    real = getattr(loop, name)
    monkeypatch.setattr(loop, name, fault)
    still = {"no gradient wanted": "blocks.0.attention.image_qkv.weight", "no optimizer": "patch_embed.weight"}[how]
    assert any("do not move" in alarm and still in alarm for alarm in alarms(root, tmp_path))


def test_shuffled_pairs(root, tmp_path, monkeypatch):
    def shuffle(*arguments):
        batch = real(*arguments)
        return batch._replace(condition_latents=batch.condition_latents.roll(1, dims=0))

    real = loop.make_batch
    monkeypatch.setattr(loop, "make_batch", shuffle)
    found = alarms(root, tmp_path)
    assert any("no more to do with their own mask" in alarm for alarm in found) or any(
        "no more to do with their own sketch" in alarm for alarm in found
    )


def test_pairs_are_told_from_the_latents_alone(root):
    store = Store(root / "shards")
    samples = [store[index] for index in range(len(store))]
    pictures = torch.stack([sample.latents for sample in samples])
    for name in ("mask", "sketch"):
        conditions = torch.stack([sample.conditions[name] for sample in samples])
        assert pairing(conditions, pictures) > CLEAR
        assert pairing(conditions.roll(7, dims=0), pictures) < CLEAR
    assert certainty(torch.ones(5)) == 0.0
    assert certainty(torch.tensor([0.9, 1.0, 1.1])) == pytest.approx(1 / (0.1 / 3**0.5))
