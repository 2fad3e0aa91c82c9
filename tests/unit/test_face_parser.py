"""The face parser: both architectures learn drawn faces, resume to the bit, and see mirrored faces mirrored."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import SegformerForSemanticSegmentation

from likeness.annotators.face_parser import flip_scores, parse_faces
from likeness.conditions import CONDITIONS
from likeness.data.folder import read_folder
from likeness.data.synthetic import draw_face
from likeness.prepare.synthetic import write_synthetic
from likeness.train.checkpoint import load_state
from likeness.train.components import face_parser
from likeness.train.components.face_parser import (
    Examples,
    FaceParserRecipe,
    build,
    confusion_of,
    measure,
    train_face_parser,
)
from likeness.types import InputError


@pytest.fixture(scope="module")
def faces(tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("parser") / "faces"
    write_synthetic(out, 8, 64, seed=0)
    return out / "train"


def recipe(faces: Path, **changes) -> FaceParserRecipe:
    settings = {
        "train": (str(faces),),
        "test": (str(faces),),
        "widths": (8, 16, 24, 32),
        "depths": (1, 1, 1, 1),
        "decoder_width": 16,
        "size": 64,
        "measured_size": 64,
        "images": 32,
        "batch": 8,
        "warmup": 8,
        "learning_rate": 5e-3,
        "checkpoint_every": 16,
        "compile": False,
    }
    return FaceParserRecipe(**{**settings, **changes})


@pytest.mark.parametrize("architecture", ["segformer", "upernet"])
def test_learns(faces, tmp_path, architecture):
    torch.manual_seed(0)
    config = recipe(faces, architecture=architecture, images=640, checkpoint_every=640)
    before = measure(build(config).eval(), read_folder(faces), config)
    train_face_parser(config, tmp_path)
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    measured = next(line for line in lines if "accuracy" in line)
    assert measured["accuracy"] > max(0.5, before["accuracy"] + 0.2)
    assert measured["n"] == 8
    assert (tmp_path / "model" / "config.json").is_file()


def test_resume_is_exact(faces, tmp_path, monkeypatch):
    train_face_parser(recipe(faces), tmp_path / "whole")
    real = face_parser.save_state

    def save_and_die(run, seen, state):
        real(run, seen, state)
        raise KeyboardInterrupt

    monkeypatch.setattr(face_parser, "save_state", save_and_die)
    with pytest.raises(KeyboardInterrupt):
        train_face_parser(recipe(faces), tmp_path / "parts")
    monkeypatch.setattr(face_parser, "save_state", real)
    train_face_parser(recipe(faces), tmp_path / "parts")
    whole, parts = load_state(tmp_path / "whole"), load_state(tmp_path / "parts")
    assert whole.keys() == parts.keys()
    assert all(torch.equal(whole[name], parts[name]) for name in whole)


def test_augmentation_keeps_picture_and_mask_together(faces):
    """Skin pixels of the augmented mask are skin-coloured in the picture: both moved alike."""
    examples = Examples((str(faces),), 64, seed=0)
    assert np.array_equal(examples[5][0], examples[5][0])
    separated = 0
    for position in range(12):
        picture, labels = examples[position]
        assert set(np.unique(labels)) <= set(range(19))
        assert labels.shape == (32, 32)
        labels = labels.repeat(2, axis=0).repeat(2, axis=1)  # the mask comes at half the size
        skin, other = (picture[labels == k].mean(0) for k in (1, 0))
        separated += np.abs(skin - other).max() > 15
    assert separated >= 10


def test_confusion_counts_every_class():
    labels = np.arange(19, dtype=np.uint8).repeat(3)
    assert np.array_equal(confusion_of(labels, labels), 3 * np.eye(19, dtype=np.int64))
    found = np.full_like(labels, 18)
    assert np.array_equal(confusion_of(labels, found)[:, 18], np.full(19, 3))


def test_flip_exchanges_sides():
    labels = draw_face(0, 0, 64).mask
    scores = torch.nn.functional.one_hot(torch.from_numpy(labels).long(), 19).permute(2, 0, 1)[None].float()
    assert np.array_equal(flip_scores(scores).argmax(1)[0].numpy(), CONDITIONS["mask"].flip(labels))


def test_mirrored_average_is_equivariant(faces):
    """With the mirrored look a mirrored face gets exactly the mirrored mask, whatever the network."""
    torch.manual_seed(0)
    network = build(recipe(faces)).eval()
    picture = draw_face(0, 1, 64).image
    (one,) = parse_faces(network, [picture], size=64)
    (other,) = parse_faces(network, [np.ascontiguousarray(picture[:, ::-1])], size=64)
    assert (CONDITIONS["mask"].flip(one) == other).mean() > 0.99


def test_published_model_loads(faces, tmp_path):
    train_face_parser(recipe(faces), tmp_path)
    network = SegformerForSemanticSegmentation.from_pretrained(tmp_path / "model").eval()
    assert network.config.id2label[13] == "hair"
    sizes = (96, 64, 80)
    masks = parse_faces(network, [draw_face(0, 1, size).image for size in sizes], size=64)
    assert [mask.shape for mask in masks] == [(size, size) for size in sizes]


def test_no_masks(tmp_path):
    (tmp_path / "metadata.jsonl").write_text('{"file_name": "a.png"}\n')
    with pytest.raises(InputError, match="has a mask"):
        Examples((str(tmp_path),), 64, seed=0)
