"""Annotation adds what is missing, keeps what is there, and goes on where it stopped."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import SegformerConfig, SegformerForSemanticSegmentation

from likeness.annotators.face_parser import parse_faces
from likeness.data.folder import read_folder
from likeness.data.synthetic import draw_face
from likeness.pipelines.load import load_face_parser
from likeness.prepare.annotate import annotate_folder
from likeness.train.components.face_parser import FaceParserRecipe, build
from likeness.types import InputError


@pytest.fixture
def folder(tmp_path) -> Path:
    """Three faces, the first with a mask of its own."""
    root = tmp_path / "faces"
    (root / "images").mkdir(parents=True)
    (root / "own").mkdir()
    rows = []
    for index in range(3):
        face = draw_face(0, index, 64)
        Image.fromarray(face.image).save(root / "images" / f"{index}.png")
        rows.append({"file_name": f"images/{index}.png", "text": ["a face"], "attributes": {"hat": "none"}})
    Image.fromarray(draw_face(0, 0, 64).mask).save(root / "own" / "0.png")
    rows[0]["mask_file_name"] = "own/0.png"
    (root / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return root


@pytest.fixture
def parser(tmp_path) -> Path:
    torch.manual_seed(0)
    settings = {"train": ("x",), "test": ("x",), "widths": (8, 16, 24, 32), "depths": (1, 1, 1, 1), "images": 1}
    network = build(FaceParserRecipe(**settings))
    network.config.image_size = 64
    network.eval().save_pretrained(tmp_path / "parser")
    return tmp_path / "parser"


def test_adds_and_keeps(folder, parser):
    steps = []
    added = annotate_folder(folder, parser=parser, progress=lambda done, total: steps.append((done, total)))
    assert added == {"mask": 2, "sketch": 3}
    assert steps == [(3, 3)]
    rows = read_folder(folder)
    assert rows[0]["mask_file_name"].parent.name == "own"
    assert rows[0]["attributes"] == {"hat": "none"}
    network, size = load_face_parser(parser)
    (wanted,) = parse_faces(network, [np.array(Image.open(rows[1]["file_name"]))], size=size)
    assert (np.array(Image.open(rows[1]["mask_file_name"])) == wanted).mean() > 0.999  # parsed together with another
    assert Image.open(rows[1]["mask_file_name"]).mode == "P"
    assert Image.open(rows[2]["sketch_file_name"]).mode == "L"


def test_goes_on_without_redoing(folder, parser):
    before = (folder / "metadata.jsonl").read_text()
    annotate_folder(folder, parser=parser)
    after = (folder / "metadata.jsonl").read_text()
    assert annotate_folder(folder, parser=parser) == {"mask": 0, "sketch": 0}
    # stopped before the metadata was written, one file missing
    (folder / "metadata.jsonl").write_text(before)
    (folder / "masks" / "2.png").unlink()
    assert annotate_folder(folder, parser=parser) == {"mask": 1, "sketch": 0}
    assert (folder / "metadata.jsonl").read_text() == after


def test_without_parser(folder):
    assert annotate_folder(folder) == {"sketch": 3}
    assert [("mask_file_name" in row) for row in read_folder(folder)] == [True, False, False]


def test_refusals(folder, parser, tmp_path):
    with pytest.raises(InputError, match=r"config\.json cannot be read"):
        annotate_folder(folder, parser=tmp_path / "faces")
    other = SegformerForSemanticSegmentation(
        SegformerConfig(hidden_sizes=[8, 8, 8, 8], depths=[1, 1, 1, 1], num_attention_heads=[1, 1, 1, 1], num_labels=3)
    )
    other.save_pretrained(tmp_path / "other")
    with pytest.raises(InputError, match="not our 19"):
        annotate_folder(folder, parser=tmp_path / "other")
    (folder / "images" / "1.png").write_bytes(b"broken")
    with pytest.raises(InputError, match=r"1\.png is no picture"):
        annotate_folder(folder, parser=parser)
