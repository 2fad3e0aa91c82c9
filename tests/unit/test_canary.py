"""The canary: silent on a healthy run, and loud within 50 steps about faults planted in one."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from builders import save_components
from likeness.data.store import IMAGE, write_manifest, write_part
from likeness.encoders.components import load_components
from likeness.train import canary, loop
from likeness.train.canary import CHANCE, CLEAR, certainty, pairing
from runs import metrics, small

STEPS, FACES = 20, 200


def faces_and_masks() -> tuple[torch.Tensor, torch.Tensor]:
    """Latents [N, 4, 8, 8] of faces and of masks that tell something of them."""
    generator = torch.Generator().manual_seed(0)
    masks = torch.randn(FACES, 4, 8, 8, generator=generator)
    return 0.3 * masks.flip(1) + torch.randn(FACES, 4, 8, 8, generator=generator), masks


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    """Tiny components and a store of such faces."""
    root = tmp_path_factory.mktemp("canary")
    save_components(root / "components")
    faces, masks = faces_and_masks()
    out = root / "shards"
    lines = [json.dumps([f"{number}.png", ["a face"]]).encode() for number in range(FACES)]
    ends = torch.tensor([len(line) for line in lines]).cumsum(0)
    rows = {"lines": torch.frombuffer(bytearray(b"".join(lines)), dtype=torch.uint8), "ends": ends}
    places = torch.stack([torch.arange(FACES), FACES + torch.arange(FACES)], dim=1)  # [N, columns]
    manifest = {
        "codec": load_components(root / "components").codec_hash,
        "columns": [IMAGE, "mask"],
        "conditions": ["mask"],
        "count": FACES,
        "latents": [[write_part(out, "latents", {"latents": torch.cat([faces, masks]).half()}), 2 * FACES]],
        "rows": [[write_part(out, "rows", rows), FACES]],
        "places": write_part(out, "places", {"pictures": places}),
        "text": None,
        "texts": [],
    }
    write_manifest(out, manifest)
    return root


def alarms(root: Path, run: Path) -> list[str]:
    """What the canary cries in a run of `STEPS` steps."""
    optimizer = {"images": 8 * STEPS, "batch": 8}
    every = 8 * STEPS // 2
    steps = {"optimizer": optimizer, "canary_every": every, "checkpoint_every": 8 * STEPS}
    given = small(root, {"mask": 0.9, "none": 0.1}, defaults={"size": 64, "steps": 2}, **steps)
    loop.train(given, run)
    said = [sentence for line in metrics(run) for sentence in line.get("canary", [])]
    assert any(sentence.startswith("mask ") for sentence in said)
    return [sentence for sentence in said if sentence.startswith("ALARM")]


def test_healthy(root, tmp_path):
    assert alarms(root, tmp_path) == []
    looks = [line for line in metrics(tmp_path) if "canary" in line]
    assert [line["seen"] for line in looks] == [80, 160]
    assert {"canary/mask_right", "canary/mask_shuffled", "canary/mask_none", "canary/mask_time_4"} <= looks[0].keys()
    assert looks[-1]["canary/mask_pairs"] > CLEAR


def test_condition_path_cut(root, tmp_path, monkeypatch):
    def deaf(*arguments, **options):
        network = real(*arguments, **options)
        network.register_forward_pre_hook(lambda _, given: (*given[:3], given[3] * 0, *given[4:]))
        return network

    real = loop.build_network
    monkeypatch.setattr(loop, "build_network", deaf)
    assert any("prediction does not depend on the mask" in alarm for alarm in alarms(root, tmp_path))


def test_condition_never_given(root, tmp_path, monkeypatch):
    def without(*arguments):
        batch = real(*arguments)
        return batch._replace(condition_index=torch.full_like(batch.condition_index, -1))

    real = loop.make_batch
    monkeypatch.setattr(loop, "make_batch", without)
    assert any("none had a mask" in alarm for alarm in alarms(root, tmp_path))


def test_what_no_face_has_is_not_looked_for(root, tmp_path, monkeypatch):
    """A condition of share 0 that the shards lack: their faces are not all read at the start."""
    read = {}

    def counted(name, samples, count):
        found = list(samples)
        read[name] = len(found)
        return real(name, found, count)

    real = canary.faces_with
    monkeypatch.setattr(canary, "faces_with", counted)
    shares, optimizer = {"mask": 0.9, "keypoints": 0.0, "none": 0.1}, {"images": 8, "batch": 8}
    loop.train(small(root, shares, defaults={"size": 64, "steps": 2}, optimizer=optimizer, canary_every=8), tmp_path)
    assert read == {"mask": FACES, "keypoints": 0}


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
    assert any("no more to do with their own mask" in alarm for alarm in alarms(root, tmp_path))


def test_pairs_are_told_from_the_latents_alone():
    faces, masks = faces_and_masks()
    assert pairing(masks[:128], faces[:128]) > 4 * CLEAR
    assert max(pairing(masks[:128].roll(shift, dims=0), faces[:128]) for shift in (1, 7, 64)) < CHANCE
    assert certainty(torch.ones(5)) == 0.0
    assert certainty(torch.tensor([0.9, 1.0, 1.1])) == pytest.approx(1 / (0.1 / 3**0.5))
