"""The autoencoder: training, exact resume and measurements; and the checks that all components share."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import AutoencoderDC

from likeness.data.folder import read_folder
from likeness.files import locked
from likeness.prepare.synthetic import write_synthetic
from likeness.train.checkpoint import checkpoints
from likeness.train.components.autoencoder import (
    AutoencoderRecipe,
    TrainingImages,
    build,
    check,
    measure,
    pixel_loss,
    reconstruction_loss,
    train_autoencoder,
)
from likeness.train.components.decoder import DecoderRecipe, train_decoder
from likeness.train.components.face_parser import FaceParserRecipe, train_face_parser
from likeness.train.components.text_image import TextImageRecipe, train_text_image
from likeness.types import InputError
from runs import check_resume, killed_after_checkpoint, load_checkpoint, metrics, sigterm_in_step


@pytest.fixture(scope="module")
def faces(tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("autoencoder") / "faces"
    write_synthetic(out, 6, 32, seed=0)
    return out / "train"


def recipe(faces: Path, **changes) -> AutoencoderRecipe:
    settings = {
        "train": (str(faces),),
        "test": (str(faces),),
        "size": 32,
        "encoder_channels": (8, 16, 32),
        "decoder_channels": (8, 16, 32),
        "encoder_layers": (1, 1, 1),
        "decoder_layers": (1, 1, 1),
        "latent_channels": 4,
        "probabilities": {"image": 0.5, "mask": 0.2, "sketch": 0.2, "keypoints": 0.1},
        "images": 64,
        "batch": 8,
        "warmup": 8,
        "checkpoint_every": 32,
        "compile": False,
    }
    return AutoencoderRecipe(**{**settings, **changes})


def test_learns_and_publishes(faces, tmp_path):
    train_autoencoder(recipe(faces, images=480), tmp_path)
    published = AutoencoderDC.from_pretrained(tmp_path / "model").eval()
    trained = measure(published, read_folder(faces), 32)
    torch.manual_seed(0)
    untrained = measure(build(recipe(faces)).eval(), read_folder(faces), 32)
    assert trained["psnr"] > untrained["psnr"] + 3
    assert trained["labels"] > untrained["labels"]
    assert trained["images"] == 6
    assert metrics(tmp_path)[-1]["psnr"] == pytest.approx(trained["psnr"], abs=1e-3)


def test_losses(faces):
    """L1, twice the squared error, edges, and the scale of the latents, after noise on them."""
    ramp = torch.arange(4.0).expand(1, 1, 4, 4)  # differences of 1 along one axis
    zero = torch.zeros(1, 1, 4, 4)
    assert pixel_loss(ramp, zero, 0.0) == pytest.approx(1.5 + 2 * 3.5)
    assert pixel_loss(ramp, zero, 0.5) == pytest.approx(1.5 + 2 * 3.5 + 0.5)

    model = build(given := recipe(faces, latent_noise=0.0, latent_penalty=0.0, detail=0.0)).eval()
    g = torch.Generator().manual_seed(0)
    images, noise = torch.randn(2, 3, 32, 32, generator=g), torch.randn(2, 4, 4, 4, generator=g)
    with torch.no_grad():
        latents = model.encode(images, return_dict=False)[0]
        decode = lambda x: pixel_loss(model.decode(x, return_dict=False)[0], images, 0.0)  # noqa: E731
        penalized, noised = (dataclasses.replace(given, **{name: 0.5}) for name in ("latent_penalty", "latent_noise"))
        loss = reconstruction_loss(model, images, noise, given)
        torch.testing.assert_close(loss, decode(latents))
        torch.testing.assert_close(
            reconstruction_loss(model, images, noise, penalized), loss + 0.5 * latents.square().mean()
        )
        torch.testing.assert_close(
            reconstruction_loss(model, images, noise, noised), decode(latents + 0.5 * latents.std() * noise)
        )


def test_resume_is_exact(faces, tmp_path):
    interruptions = (killed_after_checkpoint(), sigterm_in_step(2, 48))
    check_resume(lambda run: train_autoencoder(recipe(faces), run), tmp_path, *interruptions)


def test_another_recipe_is_rejected(faces, tmp_path):
    train_autoencoder(recipe(faces, images=8, checkpoint_every=8), tmp_path)
    with pytest.raises(InputError, match="started with another learning_rate"):
        train_autoencoder(recipe(faces, images=16, learning_rate=1e-4), tmp_path)
    train_autoencoder(recipe(faces, images=16), tmp_path)  # the number of images may change
    assert [int(path.name) for path in checkpoints(tmp_path)] == [8, 16]


def test_non_finite_loss(faces, tmp_path):
    """Training stops before anything of it is saved."""
    with pytest.raises(InputError, match=r"is (nan|inf) .*lower the learning rate"):
        train_autoencoder(recipe(faces, learning_rate=1e30, checkpoint_every=8), tmp_path)
    assert all(value.isfinite().all() for value in load_checkpoint(tmp_path).values())


@pytest.mark.parametrize(
    ("train", "given"),
    [
        (train_autoencoder, AutoencoderRecipe(train=("x",), test=("x",), probabilities={"image": 1.0}, images=8)),
        (train_decoder, DecoderRecipe(train=("x",), test=("x",), probabilities={"image": 1.0}, images=8)),
        (train_text_image, TextImageRecipe(train=("x",), test=("x",), images=8)),
        (train_face_parser, FaceParserRecipe(train=("x",), test=("x",), images=8)),
    ],
)
def test_components_are_trained_by_one_process(train, given, tmp_path, monkeypatch):
    with pytest.raises(InputError, match="checkpoint_every is 0: it must be at least 1"):
        train(dataclasses.replace(given, checkpoint_every=0), tmp_path)
    with locked(tmp_path), pytest.raises(InputError, match="another process is writing to"):
        train(given, tmp_path)
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(InputError, match=f"kind '{given.kind}' is trained by one process"):
        train(given, tmp_path)


def test_images_depend_on_their_position_only(faces):
    images, again = (TrainingImages((str(faces),), {"image": 0.5, "mask": 0.5}, 32, seed=3) for _ in range(2))
    assert np.array_equal(images[7], again[7])
    assert len({images[position].tobytes() for position in range(12)}) > 6
    assert all(images[position].shape == (32, 32, 3) for position in range(12))


def test_missing_column_is_rejected(faces):
    with pytest.raises(InputError, match="depth_file_name"):
        TrainingImages((str(faces),), {"image": 0.5, "depth": 0.5}, 32, seed=0)


def test_channels_must_be_a_multiple_of_the_latents(faces):
    with pytest.raises(InputError, match="encoder_channels end in 4: choose a multiple of latent_channels, 8"):
        check(recipe(faces, encoder_channels=(4, 8, 4), latent_channels=8))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"size": 30}, "size is 30: it must be a multiple of 8"),
        ({"probabilities": {}}, "the sum of probabilities is 0"),
        ({"probabilities": {"image": 0.0}}, "the sum of probabilities is 0"),
        ({"probabilities": {"image": 1.0, "mask": -0.5}}, "probabilities.mask is -0.5: it must be at least 0"),
        ({"encoder_channels": (7, 8, 8)}, r"encoder_channels is \[7, 8, 8\]: it must be above 1, each a divisor"),
        ({"encoder_channels": (3, 12, 12)}, r"encoder_channels is \[3, 12, 12\]"),
        ({"decoder_layers": (1, 0, 1)}, r"decoder_layers is \[1, 0, 1\]: it must be at least 1 each"),
        ({"latent_channels": 0}, "latent_channels is 0"),
        ({"ema": 0.0}, "ema is 0.0: it must be above 0, at most 0.28"),
        ({"ema": 0.5}, "ema is 0.5"),
        ({"ema": -0.1}, "ema is -0.1"),
        ({"learning_rate": -1.0}, "learning_rate is -1.0: it must be above 0"),
        ({"warmup": -8}, "warmup is -8: it must be at least 0"),
        ({"threads": -1}, "threads is -1"),
    ],
)
def test_invalid_values(faces, tmp_path, changes, message):
    with pytest.raises(InputError, match=message):
        train_autoencoder(recipe(faces, **changes), tmp_path / "run")
    assert not (tmp_path / "run").exists()
