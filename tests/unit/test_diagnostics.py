"""The diagnostics: no alarm in a healthy run, alarms within 20 steps of a run with a fault."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from builders import save_components
from likeness.data.store import IMAGE, write_manifest, write_part
from likeness.encoders.components import load_components
from likeness.train import batches, diagnostics, loop
from likeness.train.diagnostics import PAIRED, USED, pairing, standard_errors, verdict_of
from runs import metrics, small

STEPS, FACES = 20, 200


def faces_and_masks() -> tuple[torch.Tensor, torch.Tensor]:
    """Latents [N, 4, 8, 8] of faces and of masks that are correlated with them."""
    generator = torch.Generator().manual_seed(0)
    masks = torch.randn(FACES, 4, 8, 8, generator=generator)
    return 0.3 * masks.flip(1) + torch.randn(FACES, 4, 8, 8, generator=generator), masks


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    """Tiny components and a store of such faces."""
    root = tmp_path_factory.mktemp("diagnostics")
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
    """Alarms of a run of `STEPS` steps."""
    optimizer, images = {"images": 8 * STEPS, "batch": 8}, 8 * STEPS
    intervals = {"diagnostics_every": images // 2, "checkpoint_every": images}
    recipe = small(
        root, {"mask": 0.9, "none": 0.1}, defaults={"size": 64, "steps": 2}, optimizer=optimizer, **intervals
    )
    loop.train(recipe, run)
    lines = [line for line in metrics(run) if "alarms" in line]
    assert any(message.startswith("mask ") for line in lines for message in line["messages"])
    return [alarm for line in lines for alarm in line["alarms"]]


def test_healthy(root, tmp_path):
    assert alarms(root, tmp_path) == []
    lines = [line for line in metrics(tmp_path) if "alarms" in line]
    assert [line["seen"] for line in lines] == [80, 160]
    names = {f"diagnostics/mask_{name}" for name in ("right", "shuffled", "none", "time_4")}
    assert names <= lines[0].keys()
    assert lines[-1]["diagnostics/mask_pairs"] > USED


def test_condition_is_ignored(root, tmp_path, monkeypatch):
    def ignore_condition(*arguments, **options):
        network = real(*arguments, **options)
        network.register_forward_pre_hook(lambda _, inputs: (*inputs[:3], inputs[3] * 0, *inputs[4:]))
        return network

    real = loop.build_network
    monkeypatch.setattr(loop, "build_network", ignore_condition)
    assert any("prediction does not depend on the mask" in alarm for alarm in alarms(root, tmp_path))


def test_condition_never_occurs(root, tmp_path, monkeypatch):
    def without(*arguments):
        batch = real(*arguments)
        return batch._replace(condition_index=torch.full_like(batch.condition_index, -1))

    real = batches.make_batch
    monkeypatch.setattr(batches, "make_batch", without)
    assert any("samples had a mask" in alarm for alarm in alarms(root, tmp_path))


def test_missing_conditions_are_not_searched(root, tmp_path, monkeypatch):
    """Faces are not read for a condition that the shards lack."""
    read = {}

    def counted(name, samples, count):
        found = list(samples)
        read[name] = len(found)
        return real(name, found, count)

    real = diagnostics.faces_with
    monkeypatch.setattr(diagnostics, "faces_with", counted)
    probabilities, optimizer = {"mask": 0.9, "keypoints": 0.0, "none": 0.1}, {"images": 8, "batch": 8}
    loop.train(
        small(root, probabilities, defaults={"size": 64, "steps": 2}, optimizer=optimizer, diagnostics_every=8),
        tmp_path,
    )
    assert read == {"mask": FACES, "keypoints": 0}


@pytest.mark.parametrize("how", ["no gradient", "no optimizer"])
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

    name, fault = {"no gradient": ("build_network", freeze), "no optimizer": ("make_optimizers", forget)}[how]
    real = getattr(loop, name)
    monkeypatch.setattr(loop, name, fault)
    weight = {"no gradient": "blocks.0.attention.image_qkv.weight", "no optimizer": "patch_embed.weight"}[how]
    assert any("do not change" in alarm and weight in alarm for alarm in alarms(root, tmp_path))


def test_shuffled_pairs(root, tmp_path, monkeypatch):
    def shuffle(*arguments):
        batch = real(*arguments)
        return batch._replace(condition_latents=batch.condition_latents.roll(1, dims=0))

    real = batches.make_batch
    monkeypatch.setattr(batches, "make_batch", shuffle)
    assert any("no closer to their own mask" in alarm for alarm in alarms(root, tmp_path))


def test_verdicts_do_not_alternate():
    """A verdict holds until the value is clearly on the other side."""
    verdicts = [0]
    for gain in (3.9, 4.1, 3.9, 4.1, 2.1, 1.9, 3.9, -3.9, -4.1, -2.1, -1.9, 0.0):
        verdicts.append(verdict_of(gain, verdicts[-1]))
    assert verdicts[1:] == [0, 1, 1, 1, 1, 0, 0, 0, -1, -1, 0, 0]


def test_pairing():
    faces, masks = faces_and_masks()
    assert pairing(masks[:128], faces[:128]) > 4 * USED
    assert max(pairing(masks[:128].roll(shift, dims=0), faces[:128]) for shift in (1, 7, 64)) < PAIRED
    assert standard_errors(torch.ones(5)) == 0.0
    assert standard_errors(torch.tensor([0.9, 1.0, 1.1])) == pytest.approx(1 / (0.1 / 3**0.5))
