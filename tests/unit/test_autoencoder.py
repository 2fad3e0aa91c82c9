"""The mini autoencoder's training: learns, resumes to the bit, and measures what it says."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import AutoencoderDC

from likeness.data.folder import read_folder
from likeness.prepare.synthetic import write_synthetic
from likeness.train.checkpoint import load_state, states
from likeness.train.components import autoencoder
from likeness.train.components.autoencoder import AutoencoderRecipe, Pictures, build, measure, train_autoencoder
from likeness.train.components.decoder import DecoderRecipe, train_decoder
from likeness.train.components.face_parser import FaceParserRecipe, train_face_parser
from likeness.train.components.text_image import TextImageRecipe, train_text_image
from likeness.train.run import held
from likeness.types import InputError


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
        "shares": {"image": 0.5, "mask": 0.2, "sketch": 0.2, "keypoints": 0.1},
        "images": 64,
        "batch": 8,
        "warmup": 8,
        "checkpoint_every": 32,
        "compile": False,
    }
    return AutoencoderRecipe(**{**settings, **changes})


def test_learns_and_publishes(faces, tmp_path):
    train_autoencoder(recipe(faces, images=800), tmp_path)
    published = AutoencoderDC.from_pretrained(tmp_path / "model").eval()
    trained = measure(published, read_folder(faces), 32)
    torch.manual_seed(0)
    untrained = measure(build(recipe(faces)).eval(), read_folder(faces), 32)
    assert trained["psnr"] > untrained["psnr"] + 3
    assert trained["labels"] > untrained["labels"]
    assert trained["pictures"] == 6
    reported = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()][-1]
    assert reported["psnr"] == pytest.approx(trained["psnr"], abs=1e-6)


def test_resume_is_exact(faces, tmp_path, monkeypatch):
    train_autoencoder(recipe(faces), tmp_path / "whole")
    real = autoencoder.save_state

    def save_and_die(run, seen, state):
        real(run, seen, state)
        raise KeyboardInterrupt

    monkeypatch.setattr(autoencoder, "save_state", save_and_die)
    with pytest.raises(KeyboardInterrupt):
        train_autoencoder(recipe(faces), tmp_path / "parts")
    monkeypatch.setattr(autoencoder, "save_state", real)
    assert [path.name for path in states(tmp_path / "parts")] == ["000000000032"]
    train_autoencoder(recipe(faces), tmp_path / "parts")
    whole, parts = load_state(tmp_path / "whole"), load_state(tmp_path / "parts")
    assert whole.keys() == parts.keys()
    assert all(torch.equal(whole[name], parts[name]) for name in whole)


def test_another_recipe_is_refused(faces, tmp_path):
    train_autoencoder(recipe(faces, images=8, checkpoint_every=8), tmp_path)
    with pytest.raises(InputError, match="begun with another learning_rate"):
        train_autoencoder(recipe(faces, images=16, learning_rate=1e-4), tmp_path)
    train_autoencoder(recipe(faces, images=16), tmp_path)  # its length is free
    assert [int(path.name) for path in states(tmp_path)] == [8, 16]


def test_a_loss_that_is_no_number(faces, tmp_path):
    """It ends the run before anything is written of it."""
    with pytest.raises(InputError, match=r"the loss is (nan|inf) .*lower the learning rate"):
        train_autoencoder(recipe(faces, learning_rate=1e30, checkpoint_every=8), tmp_path)
    assert all(value.isfinite().all() for value in load_state(tmp_path).values())


@pytest.mark.parametrize(
    ("train", "given"),
    [
        (train_autoencoder, AutoencoderRecipe(train=("x",), test=("x",), shares={"image": 1.0}, images=8)),
        (train_decoder, DecoderRecipe(train=("x",), test=("x",), shares={"image": 1.0}, images=8)),
        (train_text_image, TextImageRecipe(train=("x",), test=("x",), images=8)),
        (train_face_parser, FaceParserRecipe(train=("x",), test=("x",), images=8)),
    ],
)
def test_components_are_trained_one_at_a_time(train, given, tmp_path, monkeypatch):
    with pytest.raises(InputError, match="checkpoint_every is 0: it must be at least 1"):
        train(dataclasses.replace(given, checkpoint_every=0), tmp_path)
    with held(tmp_path), pytest.raises(InputError, match="another process trains in"):
        train(given, tmp_path)
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(InputError, match=f"kind '{given.kind}' is trained by one process"):
        train(given, tmp_path)


def test_pictures_depend_on_their_position_only(faces):
    pictures = Pictures((str(faces),), {"image": 0.5, "mask": 0.5}, 32, seed=3)
    again = Pictures((str(faces),), {"image": 0.5, "mask": 0.5}, 32, seed=3)
    assert np.array_equal(pictures[7], again[7])
    assert len({pictures[position].tobytes() for position in range(12)}) > 6
    assert all(pictures[position].shape == (32, 32, 3) for position in range(12))


def test_missing_column_is_refused(faces):
    with pytest.raises(InputError, match="depth_file_name"):
        Pictures((str(faces),), {"image": 0.5, "depth": 0.5}, 32, seed=0)


def test_channels_that_the_shortcut_cannot_divide_are_refused(faces):
    with pytest.raises(InputError, match="encoder_channels end in 12: choose a multiple of latent_channels, 8"):
        build(recipe(faces, encoder_channels=(4, 8, 12), latent_channels=8))
