"""The face parser: training of both architectures on synthetic faces, exact resume, augmentation and inference."""

from __future__ import annotations

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
from likeness.train.components.face_parser import (
    Examples,
    FaceParserRecipe,
    build,
    class_weights,
    confusion_of,
    measure,
    train_face_parser,
)
from likeness.types import InputError
from runs import check_resume, killed_after_checkpoint, metrics


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
        "test_size": 64,
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
    config = recipe(faces, architecture=architecture, images=400, checkpoint_every=400)
    before = measure(build(config).eval(), read_folder(faces), config)
    train_face_parser(config, tmp_path)
    measured = next(line for line in metrics(tmp_path) if "accuracy" in line)
    assert measured["accuracy"] > max(0.5, before["accuracy"] + 0.2)
    assert measured["n"] == 8
    assert (tmp_path / "model" / "config.json").is_file()


def test_resume_is_exact(faces, tmp_path):
    check_resume(lambda run: train_face_parser(recipe(faces), run), tmp_path, killed_after_checkpoint())
    network = SegformerForSemanticSegmentation.from_pretrained(tmp_path / "parts" / "model").eval()
    assert network.config.id2label[13] == "hair"
    assert network.config.image_size == 64
    sizes = (96, 64, 80)
    masks = parse_faces(network, [draw_face(0, 1, size).image for size in sizes], size=64)
    assert [mask.shape for mask in masks] == [(size, size) for size in sizes]


def test_image_and_mask_are_augmented_alike(faces):
    """Skin pixels of the augmented mask have the color of skin in the image."""
    examples = Examples((str(faces),), 64, seed=0)
    assert np.array_equal(examples[5][0], examples[5][0])
    separated = 0
    for position in range(12):
        image, labels = examples[position]
        assert set(np.unique(labels)) <= set(range(19))
        assert labels.shape == (32, 32)
        labels = labels.repeat(2, axis=0).repeat(2, axis=1)  # the mask has half the size
        skin, other = (image[labels == k].mean(0) for k in (1, 0))
        separated += np.abs(skin - other).max() > 15
    assert separated >= 10


def test_class_weights():
    """The weight of a class falls with a power of its fraction; the mean over the pixels is 1."""
    mask = np.zeros((100, 100), np.uint8)
    mask[:10] = 5
    weights = class_weights([mask], 0.5)
    fractions = torch.full((19,), 1e-4)  # absent classes count as one pixel
    fractions[0], fractions[5] = 0.9001, 0.1001
    torch.testing.assert_close(weights / weights[0], (fractions[0] / fractions).sqrt())
    assert (weights * fractions).sum() == pytest.approx(1)
    assert class_weights([mask], 0.0).unique().numel() == 1


def test_confusion_counts_every_class():
    labels = np.arange(19, dtype=np.uint8).repeat(3)
    assert np.array_equal(confusion_of(labels, labels), 3 * np.eye(19, dtype=np.int64))
    found = np.full_like(labels, 18)
    assert np.array_equal(confusion_of(labels, found)[:, 18], np.full(19, 3))


def test_flip_swaps_sides():
    labels = draw_face(0, 0, 64).mask
    scores = torch.nn.functional.one_hot(torch.from_numpy(labels).long(), 19).permute(2, 0, 1)[None].float()
    assert np.array_equal(flip_scores(scores).argmax(1)[0].numpy(), CONDITIONS["mask"].flip(labels))


def test_inference_is_flip_equivariant(faces):
    """A flipped face gets the flipped mask from any network, since predictions of both are averaged."""
    torch.manual_seed(0)
    network = build(recipe(faces)).eval()
    image = draw_face(0, 1, 64).image
    (one,) = parse_faces(network, [image], size=64)
    (other,) = parse_faces(network, [np.ascontiguousarray(image[:, ::-1])], size=64)
    assert (CONDITIONS["mask"].flip(one) == other).mean() > 0.99


def test_no_masks(tmp_path):
    (tmp_path / "metadata.jsonl").write_text('{"file_name": "a.png"}\n')
    with pytest.raises(InputError, match="mask_file_name"):
        Examples((str(tmp_path),), 64, seed=0)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"size": 0}, "size is 0: it must be at least 32"),
        ({"widths": (8, 16, 24, 100)}, r"widths is \[8, 16, 24, 100\]: it must be above 0, each a multiple"),
        ({"depths": (1, 0, 1, 1)}, r"depths is \[1, 0, 1, 1\]"),
    ],
)
def test_invalid_values(faces, tmp_path, changes, message):
    with pytest.raises(InputError, match=message):
        train_face_parser(recipe(faces, **changes), tmp_path / "run")
    assert not (tmp_path / "run").exists()
