"""Masks from text: training on rendered masks, the label decoder, packing, and valid proposals for every seed."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch

from accelerator import accelerator
from builders import run, tiny_pipeline
from likeness.conditions import CONDITIONS
from likeness.conditions.mask import edits
from likeness.conditions.mask.classes import CLASSES, PALETTE
from likeness.data.store import Store
from likeness.encoders.components import load_components
from likeness.encoders.latent import LatentCodec
from likeness.evaluate.protocol import Protocol
from likeness.evaluate.run import evaluate
from likeness.models.label_decoder import LabelDecoder
from likeness.objectives import RectifiedFlow
from likeness.pipelines.image_recipe import read_recipe, request_of
from likeness.pipelines.load import load
from likeness.pipelines.propose import propose_mask
from likeness.prepare.components import pack_model
from likeness.train import loop
from likeness.train.batches import latent_statistics, make_batch
from likeness.train.components.label_decoder import LabelDecoderRecipe, measure, noisy, train_label_decoder
from likeness.train.components.steps import rows_with
from likeness.train.diagnostics import Diagnostics
from likeness.train.networks import build_network
from likeness.train.train_state import TrainState
from likeness.types import InputError
from runs import SIZE, check_resume, killed_after_checkpoint, metrics, prepare, sigterm_in_step, small


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """Synthetic faces, tiny components and shards, a mask model and a label decoder."""
    root = prepare(tmp_path_factory.mktemp("masks"), 6)
    loop.train(mask_recipe(root), root / "run")
    train_label_decoder(decoder_recipe(root, images=480, learning_rate=4e-3), root / "decoder")
    return root


def mask_recipe(root, **data):
    return small(root, {"none": 1.0}, data={"target": "mask"} | data, optimizer={"images": 8})


def decoder_recipe(root, **changes):
    faces = (str(root / "faces"),)
    settings = {"train": faces, "test": faces, "components": str(root / "components"), "size": SIZE, "batch": 4}
    settings |= {"channels": (8, 8, 16, 16), "layers": 1, "images": 64, "warmup": 8, "checkpoint_every": 32}
    return LabelDecoderRecipe(**{**settings, **changes})


def test_target_replaces_the_image(root):
    sample, zero, one = Store(root / "shards")[0], torch.zeros(1), torch.ones(1)
    batch = make_batch([sample], [0], mask_recipe(root).data, ["none"], zero, one, seed=0)
    assert torch.equal(batch.clean[0], sample.conditions["mask"])


def test_diagnostics_measure_the_target(root):
    recipe, parts = small(root, {"sketch": 1.0}, data={"target": "mask"}), load_components(root / "components")
    store, (mean, std) = Store(root / "shards"), latent_statistics(parts.settings)
    model = build_network(recipe, channels=len(store[0].latents), text_dim=32, pooled_dim=32, text_tokens=12)
    state = TrainState(model=model, optimizers=[], emas=[])
    faces = Diagnostics(recipe, state, parts, RectifiedFlow(), [store]).faces["sketch"]
    first = next(sample for sample in (store[index] for index in range(len(store))) if "sketch" in sample.conditions)
    torch.testing.assert_close(faces.clean[:1], (first.conditions["mask"] - mean) / std)


def test_label_decoders_are_measured_on_the_device_of_their_encoder(root):
    recipe, parts = decoder_recipe(root), load_components(root / "components")
    codec = LatentCodec(parts.vae, parts.settings["latent_mean"], parts.settings["latent_std"])
    width = parts.vae.config.latent_channels
    decoder = LabelDecoder(
        palette=PALETTE.tolist(), latent_channels=width, block_out_channels=recipe.channels, layers=recipe.layers
    )
    rows = rows_with("mask_file_name", recipe.test)
    expected = measure(decoder, codec, rows, recipe)
    with accelerator() as device:
        parts.vae.to(device)
        assert measure(decoder, codec, rows, recipe) == expected


@pytest.mark.parametrize("target", ["sketches", "mask+sketch"])
def test_unknown_targets_are_rejected(root, tmp_path, target):
    with pytest.raises(InputError, match=f"6 of 6 samples in .* have no {target}".replace("+", r"\+")):
        loop.train(mask_recipe(root, target=target), tmp_path)


def test_label_decoder_learns(root):
    lines = [line for line in metrics(root / "decoder") if "labels" in line]
    assert lines[-1]["labels"] > max(0.7, lines[0]["labels"])
    assert lines[-1]["labels"] >= lines[-1]["labels_noisy"] - 0.02


def test_label_decoder_resumes_exactly(root, tmp_path):
    interruptions = (killed_after_checkpoint(), sigterm_in_step(2, 40))
    check_resume(lambda folder: train_label_decoder(decoder_recipe(root), folder), tmp_path, *interruptions)


def test_noise_has_the_stated_strength():
    latents = torch.full((400, 2, 4, 4), 10.0)
    found = noisy(latents, 0.5, seed=0)
    assert torch.equal(found[:100], latents[:100])
    means = found[100:].mean(dim=(1, 2, 3))  # 10 (1 - t)
    assert 4.5 < means.min() < 5.6
    assert 9 < means.max() < 10.5
    assert abs(means.mean() - 7.5) < 0.3


def test_decode_returns_palette_colors():
    decoder = LabelDecoder(palette=PALETTE.tolist(), latent_channels=4, block_out_channels=(8, 8), layers=1)
    (images,) = decoder.decode(torch.randn(2, 4, 3, 5))
    assert images.shape == (2, 3, 6, 10)
    colors = ((images.permute(0, 2, 3, 1) + 1) * 127.5).round().to(torch.uint8).reshape(-1, 3).unique(dim=0)
    assert set(map(tuple, colors.tolist())) <= set(map(tuple, PALETTE.tolist()))


@pytest.fixture(scope="module")
def packed(root, tmp_path_factory):
    """The mask model in the form of the bundled ones."""
    folder = tmp_path_factory.mktemp("models")
    (folder / "common").symlink_to(root / "components")
    pack_model(root / "run" / "model", folder / "mask-tiny", label_decoder=root / "decoder")
    return folder / "mask-tiny"


def test_proposals_are_valid_and_depend_on_the_seed_only(packed):
    pipeline = load(packed)
    first, again = (propose_mask(pipeline, "a bald man", seed=5) for _ in range(2))
    assert first.labels.dtype == np.uint8
    assert first.labels.shape == (SIZE, SIZE)
    assert first.labels.max() < len(CLASSES)
    assert (first.labels == again.labels).all()
    assert first.broken == again.broken
    other = propose_mask(pipeline, "a bald man", seed=6)
    assert (first.labels != other.labels).any()


def test_more_candidates_break_fewer_rules(packed):
    pipeline, progress = load(packed), []
    broken = [
        len(propose_mask(pipeline, "a man", 3, candidates=n, on_step=lambda *x: progress.append(x)).broken)
        for n in (1, 2, 5)
    ]
    assert broken == sorted(broken, reverse=True)
    assert progress[-1] == (5, 5)


def test_wrong_models_and_runs_are_rejected(root, tmp_path):
    with pytest.raises(InputError, match="does not generate masks"):
        propose_mask(tiny_pipeline(), "a man", 0)
    (tmp_path / "common").symlink_to(root / "components")
    arguments = ("prepare", "pack", root / "run" / "model", tmp_path / "out", "--label-decoder")
    assert run(*arguments, root / "faces") == 2
    assert run(*arguments, root / "decoder") == 0
    assert json.loads((tmp_path / "out" / "model_index.json").read_text())["vae"][1] == "LabelDecoder"


def test_evaluation_proposes_masks_for_text_only(root, packed, tmp_path, monkeypatch):
    """Of the same prompt and seed, once; the protocol of every number names the mask model."""
    settings = {"given": ("mask", "none"), "mask_model": str(packed), "count": 2, "steps": 1, "metrics": ("ssim",)}
    results = evaluate(root / "faces", tmp_path, Protocol(**settings), pipeline=tiny_pipeline(), model="tiny")
    assert results is not None
    assert results.numbers[0].protocol["mask_model"]
    file = sorted((tmp_path / "pictures" / "none" / "0").glob("*.png"))[1]
    recipe, _ = read_recipe(file)
    found = request_of(recipe).conditions["mask"].image.raw
    assert (found == propose_mask(load(packed), recipe["prompt"], recipe["seed"]).labels).all()
    monkeypatch.setattr("likeness.evaluate.images.add_mask", None)  # a call would fail
    evaluate(root / "faces", tmp_path, Protocol(**settings), pipeline=tiny_pipeline(), model="tiny")


def test_masks_are_evaluated_without_a_ceiling(root, packed, tmp_path):
    protocol = Protocol(given=("none",), count=2, steps=1, metrics=("sharpness",))
    results = evaluate(root / "faces", tmp_path, protocol, pipeline=load(packed), model="masks")
    assert results is not None
    assert [found.given for found in results.numbers] == ["none"]


def test_command_line(packed, tmp_path, capsys):
    """Masks of consecutive seeds; `generate --via-mask` uses the mask of its seed and records it."""
    options = ("a bald man", "--seed", "5")
    assert run("mask", "propose", *options, "--count", "2", "--model", packed, "--out", f"{tmp_path}/") == 0
    masks = [CONDITIONS["mask"].read(tmp_path / f"mask-00{number}.png").raw for number in (1, 2)]
    for seed, labels in zip((5, 6), masks, strict=True):
        assert (propose_mask(load(packed), "a bald man", seed).labels == labels).all()
    assert run("mask", "propose", "a man", "--model", packed, "--out", f"{tmp_path}/") == 0
    assert (tmp_path / "mask-003.png").is_file()
    with pytest.raises(FileExistsError):  # another process was faster
        edits.save(masks[0], tmp_path / "mask-003.png", overwrite=False)
    model = tiny_pipeline()
    model.save_pretrained(tmp_path / "model")
    generate = ("generate", *options, "--steps", "2", "--model", tmp_path / "model", "--out", tmp_path / "face.png")
    assert run(*generate, "--via-mask", "--mask-model", packed) == 0
    recipe, pixels = read_recipe(tmp_path / "face.png")
    assert (request_of(recipe).conditions["mask"].image.raw == masks[0]).all()
    assert run(*generate, "--mask", tmp_path / "mask-001.png") == 0
    assert (read_recipe(tmp_path / "face.png")[1] == pixels).all()
    capsys.readouterr()
    assert run(*generate, "--via-mask", "--mask", tmp_path / "mask-001.png") == 2
    assert "leave --mask out" in capsys.readouterr().err
    assert run("mask", "propose", *options, "--model", packed, "--out", tmp_path / "mask.jpg") == 2
    assert run("mask", "propose", *options, "--model", packed, "--out", f"{tmp_path}/masks.v2/") == 0
    assert (tmp_path / "masks.v2" / "mask-001.png").is_file()
    for seed, count in ((-1, 1), (10**20, 1), (2**63 - 1, 2)):
        capsys.readouterr()
        assert run("mask", "propose", "a man", "--model", packed, "--seed", seed, "--count", count) == 2
        assert "it must be a whole number from 0 to 2^63 - 1" in capsys.readouterr().err
    assert run("mask", "propose", *options, "--model", tmp_path / "model") == 2
