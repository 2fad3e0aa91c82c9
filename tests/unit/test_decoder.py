"""Decoder fine-tuning: only the decoder changes, training resumes exactly, and shards and models stay valid."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import AutoencoderDC
from safetensors.torch import save_file
from torch.nn import functional as F

from builders import run, save_components
from likeness.data.folder import read_folder
from likeness.encoders.components import load_components
from likeness.models.patch_discriminator import PatchDiscriminator
from likeness.models.squeezenet import SqueezeNetFeatures, perceptual_distance
from likeness.prepare.components import replace_decoder
from likeness.prepare.encode import encode_folder
from likeness.prepare.synthetic import write_synthetic
from likeness.train import loop
from likeness.train.checkpoint import checkpoints
from likeness.train.components import autoencoder
from likeness.train.components.autoencoder import measure
from likeness.train.components.decoder import (
    Critics,
    DecoderBatches,
    DecoderRecipe,
    discriminator_loss,
    load_autoencoder,
    load_perceptual,
    photograph_loss,
    train_decoder,
)
from likeness.types import InputError
from likeness.weights.hashes import encoder_hash, weights_hash
from likeness.weights.packed import pack, unpack
from runs import check_resume, killed_after_checkpoint, load_checkpoint, metrics, prepare, sigterm_in_step, small

SIZE = 32


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    """Synthetic faces, a tiny autoencoder and random SqueezeNet weights."""
    root = tmp_path_factory.mktemp("decoder")
    write_synthetic(root / "faces", 6, SIZE, seed=0)
    torch.manual_seed(0)
    tiny = autoencoder.AutoencoderRecipe(
        train=(),
        test=(),
        encoder_channels=(8, 16, 32),
        decoder_channels=(8, 16, 32),
        encoder_layers=(1, 1, 1),
        decoder_layers=(1, 1, 1),
        latent_channels=4,
        probabilities={},
        images=1,
    )
    autoencoder.build(tiny).save_pretrained(root / "autoencoder")
    later = {"features.12.squeeze.weight": torch.zeros(64, 512, 1, 1), "classifier.1.bias": torch.zeros(1000)}
    save_file(SqueezeNetFeatures().state_dict() | later, root / "squeezenet.safetensors")
    return root


def recipe(root: Path, **changes) -> DecoderRecipe:
    settings = {
        "train": (str(root / "faces"),),
        "test": (str(root / "faces"),),
        "autoencoder": str(root / "autoencoder"),
        "size": SIZE,
        "probabilities": {"image": 0.6, "mask": 0.2, "sketch": 0.1, "keypoints": 0.1},
        "images": 64,
        "batch": 4,
        "perceptual": str(root / "squeezenet.safetensors"),
        "discriminator_channels": (8, 8, 16),
        "discriminator_warmup": 16,
        "checkpoint_every": 32,
        "compile": False,
    }
    return DecoderRecipe(**{**settings, **changes})


def test_only_the_decoder_changes(root, tmp_path):
    train_decoder(recipe(root, perceptual=None), tmp_path)
    assert not any("perceptual" in line for line in metrics(tmp_path))
    before = AutoencoderDC.from_pretrained(root / "autoencoder")
    after = AutoencoderDC.from_pretrained(tmp_path / "model")
    old, new = before.state_dict(), after.state_dict()
    changed = {name for name in old if not torch.equal(old[name], new[name])}
    assert changed == {name for name, _ in before.named_parameters() if name.startswith("decoder.")}
    assert encoder_hash(before) == encoder_hash(after)
    assert weights_hash(before) != weights_hash(after)
    assert not any("autoencoder.encoder" in name for name in load_checkpoint(tmp_path))


def test_learns(root, tmp_path):
    given = recipe(root, images=600, batch=8, learning_rate=4e-3, checkpoint_every=600)
    before = measure(load_autoencoder(given.autoencoder), read_folder(root / "faces"), SIZE)
    train_decoder(given, tmp_path)
    lines = metrics(tmp_path)
    assert lines[-1]["psnr"] > before["psnr"] + 3
    assert lines[-1]["labels"] > before["labels"] + 0.1
    assert "perceptual" in lines[0]
    assert lines[1]["l1"] < 0.9 * lines[0]["l1"]
    assert lines[1]["rendered"] < 0.9 * lines[0]["rendered"]


def test_resume_is_exact(root, tmp_path):
    interruptions = (killed_after_checkpoint(), sigterm_in_step(2, 40))
    check_resume(lambda run: train_decoder(recipe(root), run), tmp_path, *interruptions)
    assert [int(path.name) for path in checkpoints(tmp_path / "parts")] == [40, 64]


def test_an_encoder_that_changed_meanwhile_is_rejected(root, tmp_path):
    shutil.copytree(root / "autoencoder", tmp_path / "autoencoder")
    given = recipe(root, autoencoder=str(tmp_path / "autoencoder"), images=32)
    train_decoder(given, tmp_path / "run")
    vae = AutoencoderDC.from_pretrained(tmp_path / "autoencoder")
    with torch.no_grad():
        next(vae.encoder.parameters()).mul_(1.1)
    vae.save_pretrained(tmp_path / "autoencoder")
    with pytest.raises(InputError, match="started with other frozen weights"):
        train_decoder(dataclasses.replace(given, images=64), tmp_path / "run")


def test_a_missing_test_folder_is_found_before_the_training(root, tmp_path):
    with pytest.raises(InputError, match="typo"):
        train_decoder(recipe(root, test=(str(tmp_path / "typo"),)), tmp_path / "run")
    assert not (tmp_path / "run" / "checkpoints").exists()


def test_discriminator_sees_photographs_only(root, tmp_path):
    """Without photographs it is not trained."""
    train_decoder(recipe(root, probabilities={"image": 1e-12, "mask": 1.0}), tmp_path)
    torch.manual_seed(0)
    fresh, trained = PatchDiscriminator((8, 8, 16)).state_dict(), load_checkpoint(tmp_path)
    assert all(torch.equal(trained[f"model/discriminator.{name}"], value) for name, value in fresh.items())
    assert not any(name.startswith("optimizer") and "discriminator" in name for name in trained)


def test_discriminator_is_ignored_at_first(root, tmp_path):
    """The decoder's first step after `discriminator_warmup` images differs."""
    given = {"images": 12, "perceptual": None, "probabilities": {"image": 1.0}, "checkpoint_every": 12}
    runs = {
        "none": {"adversarial_weight": 0.0},
        "late": {"discriminator_warmup": 12},
        "last": {"discriminator_warmup": 8},
    }
    weights = {}
    for name, changes in runs.items():
        train_decoder(recipe(root, **given, **changes), tmp_path / name)
        stored = load_checkpoint(tmp_path / name)
        weights[name] = torch.cat([v.flatten() for key, v in stored.items() if key.startswith("model/autoencoder.")])
    assert torch.equal(weights["none"], weights["late"])
    assert not torch.equal(weights["none"], weights["last"])


def test_weights_of_the_losses(root, tmp_path):
    """`perceptual_weight` changes the decoder, `gradient_penalty` the discriminator."""
    given = {"images": 4, "probabilities": {"image": 1.0}, "checkpoint_every": 4}
    runs = {"same": {}, "perceptual": {"perceptual_weight": 0.0}, "penalty": {"gradient_penalty": 0.0}}
    stored = {}
    for name, changes in runs.items():
        train_decoder(recipe(root, **given, **changes), tmp_path / name)
        weights = load_checkpoint(tmp_path / name)
        stored[name] = {
            part: torch.cat([v.flatten() for key, v in weights.items() if key.startswith(f"model/{part}.")])
            for part in ("autoencoder", "discriminator")
        }
    equal = {
        name: [part for part, values in stored["same"].items() if torch.equal(stored[name][part], values)]
        for name in ("perceptual", "penalty")
    }
    assert equal == {"perceptual": ["discriminator"], "penalty": ["autoencoder"]}


def test_batches_are_of_one_kind(root):
    starts = range(0, 400, 4)
    kinds = lambda probabilities: [  # noqa: E731
        DecoderBatches(recipe(root, probabilities=probabilities))[start][0] for start in starts
    ]
    assert 0.55 < np.mean(kinds({"image": 0.7, "mask": 0.3})) < 0.85
    assert not any(kinds({"image": 1e-12, "sketch": 1.0}))
    assert all(kinds({"image": 1.0}))
    first, second = (DecoderBatches(recipe(root))[8][1] for _ in range(2))
    assert torch.equal(first, second)


def test_gradients_reach_the_decoder_only(root):
    vae = load_autoencoder(root / "autoencoder")
    discriminator = PatchDiscriminator((8, 8, 16))
    critics = Critics(discriminator, load_perceptual(str(root / "squeezenet.safetensors"), "torchvision"))
    g = torch.Generator().manual_seed(0)
    images = torch.rand(2, 3, SIZE, SIZE, generator=g)
    weights = {"perceptual": torch.tensor(0.5), "adversarial": torch.tensor(0.25)}
    latents = vae.encode(images, return_dict=False)[0]
    loss, output, terms = photograph_loss(vae, critics, latents, images, weights)
    loss.backward()
    assert all(parameter.grad is None for parameter in discriminator.parameters())
    assert all((parameter.grad is None) != name.startswith("decoder.") for name, parameter in vae.named_parameters())
    with torch.no_grad():
        assert torch.allclose(output, vae.decode(latents, return_dict=False)[0], atol=1e-6)
        torch.testing.assert_close(terms["l1"], (output - images).abs().mean())
        adversarial = F.softplus(discriminator(images) - discriminator(output)).mean()
        torch.testing.assert_close(terms["adversarial"], adversarial)
    torch.testing.assert_close(loss, terms["l1"] + 0.5 * terms["perceptual"] + 0.25 * terms["adversarial"])


def test_loss_of_a_linear_discriminator():
    """The gradient is constant, so that the penalty has a closed form."""
    g = torch.Generator().manual_seed(0)
    real, fake, noise = torch.rand(2, 3, 8, 8, generator=g), torch.rand(2, 3, 8, 8, generator=g), None
    noise = torch.randn(4, 3, 8, 8, generator=g)
    kernel = torch.randn(1, 3, 1, 1, generator=g)
    linear = lambda x: F.conv2d(x, kernel)  # noqa: E731
    wanted = F.softplus(linear(fake) - linear(real)).mean()
    parts = linear(noise).square().split(2)
    wanted = wanted + 3.0 * 0.1**2 * (parts[0].mean() + parts[1].mean())
    torch.testing.assert_close(discriminator_loss(linear, real, fake, noise, 3.0, 0.1), wanted)


def test_perceptual_network_reads_both_normalizations():
    """A first convolution with reversed and scaled channels turns one into the other."""
    torch.manual_seed(0)
    ours, caffe = SqueezeNetFeatures(), SqueezeNetFeatures("caffe")
    weights = ours.state_dict()
    first = weights["features.0.weight"] / ours.std  # [96, 3, 7, 7]
    moved = (first * (ours.mean - caffe.mean.flip(1))).sum(dim=(1, 2, 3))
    scaled = {"features.0.weight": first.flip(1), "features.0.bias": weights["features.0.bias"] - moved}
    caffe.load(weights | scaled)
    images = torch.rand(2, 3, 64, 64) * 2 - 1
    features, others = ours(images), caffe(images)
    assert [tuple(x.shape[1:]) for x in features] == [(96, 29, 29), (128, 14, 14), (256, 7, 7), (512, 7, 7)]
    for one, other in zip(features, others, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-4)


def test_perceptual_distance():
    a = [torch.tensor([[3.0, 0.0], [4.0, 1.0]]).reshape(1, 2, 1, 2), torch.ones(1, 2, 1, 1)]
    b = [torch.tensor([[0.0, 0.0], [2.0, 7.0]]).reshape(1, 2, 1, 2), torch.tensor([1.0, 0.0]).reshape(1, 2, 1, 1)]
    # (0.6, 0.8) to (0, 1) and (0, 1) to (0, 1), averaged; (1, 1) / sqrt(2) to (1, 0)
    wanted = (0.36 + 0.04) / 2 + 2 - 2**0.5
    assert perceptual_distance(a, b).item() == pytest.approx(wanted, abs=1e-6)
    assert perceptual_distance(a, a).item() == 0


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"probabilities": {"mask": 1.0}}, 'probabilities is .*a table with "image" above 0'),
        ({"probabilities": {"image": 1.0, "mask": -0.5}}, "probabilities.mask is -0.5: it must be at least 0"),
        ({"probabilities": {"image": 1.0, "depth": 0.5}}, "depth_file_name"),
        ({"learning_rate": 0.0}, "learning_rate is 0.0: it must be above 0"),
        ({"betas": (0.5, 1.0)}, r"betas is \[0.5, 1.0\]: it must be at least 0 and below 1"),
        ({"adversarial_weight": -1.0}, "adversarial_weight is -1.0: it must be at least 0"),
        ({"penalty_noise": 0.0}, "penalty_noise is 0.0: it must be above 0"),
        ({"discriminator_channels": (8, 12, 16)}, "discriminator_channels is .*multiples of 8"),
        ({"size": 0}, "size is 0: it must be at least 1"),
        ({"size": 36}, "size is 36: it must be a multiple of 8"),
        ({"images": 0}, "images is 0: it must be at least 1"),
        ({"autoencoder": "nowhere"}, r"nowhere/config\.json cannot be read"),
        ({"perceptual": "nowhere.safetensors"}, "nowhere.safetensors does not contain the weights of SqueezeNet 1.0"),
        ({"learning_rate": 1e30, "checkpoint_every": 4}, "is (nan|inf) .*lower the learning rate"),
    ],
)
def test_bad_recipes_are_rejected(root, tmp_path, changes, message):
    with pytest.raises(InputError, match=message):
        train_decoder(recipe(root, **changes), tmp_path)


def test_other_weights_are_rejected(root, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"_class_name": "UNet2DModel"}))
    with pytest.raises(InputError, match=r"does not contain an autoencoder of diffusers: .* 'UNet2DModel'"):
        load_autoencoder(tmp_path)
    save_file({"features.0.weight": torch.zeros(96, 3, 3, 3)}, tmp_path / "other.safetensors")
    with pytest.raises(InputError, match=r"other\.safetensors does not contain the weights of SqueezeNet"):
        load_perceptual(str(tmp_path / "other.safetensors"), "torchvision")


# Components with a new decoder


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> Path:
    """Faces, components and shards of a tiny family (`runs.prepare`), a model and a decoder trained on them, and
    `new`: the components with that decoder.
    """
    root = prepare(tmp_path_factory.mktemp("finished"), 6)
    loop.train(small(root, optimizer={"images": 4}), root / "model_run")
    given = DecoderRecipe(
        train=(str(root / "faces"),),
        test=(),
        autoencoder=str(root / "components" / "vae"),
        size=SIZE,
        probabilities={"image": 0.7, "mask": 0.3},
        images=16,
        batch=4,
        compile=False,
    )
    train_decoder(given, root / "decoder_run")
    assert run("prepare", "decoder", root / "decoder_run", root / "components", root / "new") == 0
    return root


def test_new_decoder_leaves_all_else(finished):
    old, new = (load_components(finished / name) for name in ("components", "new"))
    assert new.codec_hash == old.codec_hash == encoder_hash(old.vae)
    assert new.settings == old.settings
    assert new.text_hash == old.text_hash
    assert weights_hash(new.vae) != weights_hash(old.vae)
    published = AutoencoderDC.from_pretrained(finished / "decoder_run" / "model")
    assert weights_hash(new.vae) == weights_hash(published)


def test_shards_and_models_stay_valid(finished, tmp_path):
    old, new = load_components(finished / "components"), load_components(finished / "new")
    encode = lambda parts: encode_folder(finished / "faces", tmp_path / "shards", parts, size=SIZE)["encoded"]  # noqa: E731
    assert encode(old) > 0

    given = small(finished, optimizer={"images": 8}, init_from=str(finished / "model_run" / "model"))
    moved = {"shards": (str(tmp_path / "shards"),), "components": str(finished / "new")}
    loop.train(dataclasses.replace(given, data=dataclasses.replace(given.data, **moved)), tmp_path / "run")
    assert json.loads((tmp_path / "run" / "model" / "codec.json").read_text())["codec"] == old.codec_hash
    assert encode(new) == 0


def test_shards_of_another_encoder_are_rejected(finished, tmp_path):
    shutil.copytree(finished / "new", tmp_path / "components")
    vae = load_components(finished / "new").vae
    with torch.no_grad():
        vae.encoder.conv_out.weight.mul_(1.01)
    vae.save_pretrained(tmp_path / "components" / "vae")
    other = load_components(tmp_path / "components")
    given = small(finished)
    given = dataclasses.replace(given, data=dataclasses.replace(given.data, components=str(tmp_path / "components")))
    with pytest.raises(InputError, match="shards was encoded with another encoder: encode it again"):
        loop.train(given, tmp_path / "run")
    with pytest.raises(InputError, match="encoded with another encoder: choose another folder"):
        encode_folder(finished / "faces", finished / "shards", other, size=SIZE)
    with pytest.raises(InputError, match=r"the encoder of .*decoder_run is not that of"):
        replace_decoder(finished / "decoder_run", tmp_path / "components", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_models_with_other_statistics_are_rejected(finished, tmp_path):
    shutil.copytree(finished / "components", tmp_path / "components")
    path = tmp_path / "components" / "components.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "latent_std": [1.0, 1.0, 1.0, 1.5]}))
    given = small(finished, init_from=str(finished / "model_run" / "model"))
    given = dataclasses.replace(given, data=dataclasses.replace(given.data, components=str(tmp_path / "components")))
    with pytest.raises(InputError, match="another latent_std than that of the components"):
        loop.train(given, tmp_path / "run")


def test_bundled_models_match_the_bundled_encoder():
    from likeness.weights.catalog import BUNDLED, bundled_models

    common = load_components(BUNDLED / "common")
    for name in bundled_models():
        assert json.loads((BUNDLED / name / "codec.json").read_text())["codec"] == common.codec_hash


def test_packing_again_is_exact(finished):
    """So that components with packed weights keep their encoder through a decoder's run."""
    once = unpack(pack(load_components(finished / "components").vae.state_dict()))
    again = unpack(pack(once))
    assert all(torch.equal(once[name], again[name]) for name in once)


def test_replacing_needs_runs_and_a_new_folder(finished, tmp_path):
    with pytest.raises(InputError, match="new exists: choose another folder"):
        replace_decoder(finished / "decoder_run", finished / "components", finished / "new")
    with pytest.raises(InputError, match="has no published model: train it first"):
        replace_decoder(tmp_path, finished / "components", tmp_path / "out")
    save_components(tmp_path / "parts")
    (tmp_path / "parts" / "components.json").unlink()
    with pytest.raises(InputError, match=r"components\.json cannot be read"):
        replace_decoder(finished / "decoder_run", tmp_path / "parts", tmp_path / "out")
