"""Annotation adds missing conditions, keeps existing ones, and resumes."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from transformers import SegformerConfig, SegformerForSemanticSegmentation

from likeness.annotators.face_parser import MEAN, STD, load_face_parser, parse_faces
from likeness.annotators.u2net import PORTRAIT, U2Net
from likeness.cli import main
from likeness.conditions.images import made_by
from likeness.conditions.mask.classes import FLIP_PAIRS
from likeness.data.folder import read_folder
from likeness.data.synthetic import draw_face
from likeness.prepare.annotate import annotate_folder
from likeness.train.components.face_parser import FaceParserRecipe, build
from likeness.types import InputError
from likeness.weights.hashes import network_name


@pytest.fixture
def folder(tmp_path) -> Path:
    """Three faces; the first has a mask."""
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
    assert (np.array(Image.open(rows[1]["mask_file_name"])) == wanted).mean() > 0.999  # parsed in a batch
    assert Image.open(rows[1]["mask_file_name"]).mode == "P"
    assert Image.open(rows[2]["sketch_file_name"]).mode == "L"


def test_resumes_without_redoing(folder, parser):
    before = (folder / "metadata.jsonl").read_text()
    annotate_folder(folder, parser=parser)
    after = (folder / "metadata.jsonl").read_text()
    assert annotate_folder(folder, parser=parser) == {"mask": 0, "sketch": 0}
    # interrupted before the metadata was written, one file missing
    (folder / "metadata.jsonl").write_text(before)
    (folder / "masks" / "2.png").unlink()
    assert annotate_folder(folder, parser=parser) == {"mask": 1, "sketch": 0}
    assert (folder / "metadata.jsonl").read_text() == after


def test_deleted_files_are_made_again(folder, parser):
    annotate_folder(folder, parser=parser)
    before = (folder / "masks" / "2.png").read_bytes()
    (folder / "masks" / "2.png").unlink()
    assert annotate_folder(folder, parser=parser) == {"mask": 1, "sketch": 0}
    assert (folder / "masks" / "2.png").read_bytes() == before


def test_all_splits_of_a_folder(folder, parser, tmp_path, capsys):
    for split in ("train", "test"):
        shutil.copytree(folder, tmp_path / "splits" / split)
    main(["prepare", "annotate", str(tmp_path / "splits"), "--parser", str(parser)])
    assert "masks added: 4, sketches added: 6" in capsys.readouterr().out
    for split in ("train", "test"):
        rows = read_folder(tmp_path / "splits" / split)
        assert all(row["sketch_file_name"].is_relative_to(tmp_path / "splits" / split) for row in rows)


def test_swapped_sides(tmp_path):
    """A parser of others whose left is the viewer's left is recognized by its masks."""
    network, size = load_face_parser()
    names = network.config.id2label
    for left, right in FLIP_PAIRS:
        names[left], names[right] = names[right], names[left]
    network.save_pretrained(tmp_path / "parser")
    settings = {"size": size, "image_mean": [MEAN] * 3, "image_std": [STD] * 3}
    (tmp_path / "parser" / "preprocessor_config.json").write_text(json.dumps(settings))
    images = sorted((Path(__file__).parents[2] / "examples/faces/images").iterdir())
    shutil.copytree(images[0].parent, tmp_path / "faces" / "images")
    rows = [{"file_name": f"images/{image.name}"} for image in images]
    (tmp_path / "faces" / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(InputError, match=r"left and right of .*parser are swapped: use --swapped-sides"):
        annotate_folder(tmp_path / "faces", parser=tmp_path / "parser", sketches=False)
    annotate_folder(tmp_path / "faces", parser=tmp_path / "parser", sketches=False, swapped_sides=True)
    wanted = parse_faces(load_face_parser()[0], [np.array(Image.open(image)) for image in images], size=size)
    for row, mask in zip(read_folder(tmp_path / "faces"), wanted, strict=True):
        assert (np.array(Image.open(row["mask_file_name"])) == mask).mean() > 0.999


def test_without_parser(folder):
    assert annotate_folder(folder) == {"sketch": 3}
    assert [("mask_file_name" in row) for row in read_folder(folder)] == [True, False, False]


def test_default_parser_depends_on_the_image_size(folder, capsys, monkeypatch):
    main(["prepare", "annotate", str(folder)])
    assert "masks added: 2, sketches added: 3" in capsys.readouterr().out
    rows = read_folder(folder)
    assert [row.get("mask_made_by", "hand").split()[0] for row in rows] == [
        "hand",
        *2 * ["SegformerForSemanticSegmentation"],
    ]
    for row in rows:
        Image.open(row["file_name"]).resize((320, 320)).save(row["file_name"])
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    main(["prepare", "annotate", str(folder)])  # no row lacks a mask: no parser is loaded
    capsys.readouterr()
    main(["prepare", "annotate", str(folder), "--redo", "mask"])  # without the hub, by the bundled parser
    printed = capsys.readouterr()
    assert "masks added: 0" in printed.out  # by the same annotator
    assert "masks by the bundled parser, whose input has 192 pixels" in printed.err
    assert printed.err.count("\n") == 1
    main(["prepare", "annotate", str(folder), "--parser", "none", "--redo", "sketch"])
    assert "sketches added: 0" in capsys.readouterr().out


def other_parser(parser: Path, where: Path) -> Path:
    """The same network with other weights."""
    network = SegformerForSemanticSegmentation.from_pretrained(parser)
    with torch.no_grad():
        network.decode_head.classifier.bias += torch.linspace(-1, 1, 19)
    network.save_pretrained(where)
    return where


def test_annotator_is_recorded(folder, parser):
    annotate_folder(folder, parser=parser)
    name = network_name(load_face_parser(parser)[0])
    rows = read_folder(folder)
    assert ["mask_made_by" in row for row in rows] == [False, True, True]  # the first existed before
    assert {row["mask_made_by"] for row in rows[1:]} == {name}
    assert {row["sketch_made_by"] for row in rows} == {"XDoG 1"}
    assert made_by(rows[1]["mask_file_name"]) == name
    text, messages = (folder / "metadata.jsonl").read_text(), []
    (folder / "metadata.jsonl").write_text(text.replace(name, "other 1", 1))
    annotate_folder(folder, parser=parser, report=messages.append)
    assert messages == [f"mask: 1 by hand, 1 by other 1, 1 by {name}; --redo mask regenerates them with one annotator"]


def test_redo_replaces_files_of_another_annotator(folder, parser, tmp_path):
    annotate_folder(folder, parser=parser, sketches=False)
    other = other_parser(parser, tmp_path / "other")
    old = [row["mask_file_name"].read_bytes() for row in read_folder(folder)]
    # a mask that was edited by hand no longer names its annotator
    hand = Image.open(read_folder(folder)[2]["mask_file_name"])
    hand.load()
    hand.info.clear()
    hand.save(read_folder(folder)[2]["mask_file_name"])
    assert annotate_folder(folder, parser=other, sketches=False) == {"mask": 0}
    assert annotate_folder(folder, parser=other, sketches=False, redo=["mask"]) == {"mask": 1}
    rows = read_folder(folder)
    assert rows[0]["mask_file_name"].read_bytes() == old[0]
    assert rows[1]["mask_file_name"].read_bytes() != old[1]
    assert rows[1]["mask_made_by"] == network_name(load_face_parser(other)[0])
    assert "mask_made_by" not in rows[2]
    assert annotate_folder(folder, parser=other, sketches=False, redo=["mask"]) == {"mask": 0}


def test_interrupted_by_one_annotator_and_continued_by_another(folder, parser, tmp_path):
    """Existing files that no row names are not attributed to the other annotator."""
    before = (folder / "metadata.jsonl").read_text()
    annotate_folder(folder, parser=parser, sketches=False)
    (folder / "metadata.jsonl").write_text(before)  # killed before the metadata was written
    other = other_parser(parser, tmp_path / "other")
    assert annotate_folder(folder, parser=other, sketches=False) == {"mask": 2}
    name = network_name(load_face_parser(other)[0])
    assert [row.get("mask_made_by") for row in read_folder(folder)] == [None, name, name]


def test_hand_made_files_are_kept(folder, parser):
    """An existing file that no row names, saved by a program that writes its own name into it."""
    info = PngInfo()
    info.add_text("Software", "Some Paint 3")
    (folder / "masks").mkdir()
    Image.fromarray(draw_face(0, 1, 64).mask).save(folder / "masks" / "1.png", pnginfo=info)
    own = (folder / "masks" / "1.png").read_bytes()
    assert annotate_folder(folder, parser=parser, sketches=False, redo=["mask"]) == {"mask": 1}
    assert (folder / "masks" / "1.png").read_bytes() == own
    assert "mask_made_by" not in read_folder(folder)[1]


def test_equal_names_in_two_folders(folder):
    rows = [json.loads(line) for line in (folder / "metadata.jsonl").read_text().splitlines()]
    (folder / "more").mkdir()
    Image.fromarray(draw_face(0, 9, 64).image).save(folder / "more" / "1.png")
    rows.append({"file_name": "more/1.png"})
    (folder / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert annotate_folder(folder) == {"sketch": 4}
    found = read_folder(folder)
    assert found[1]["sketch_file_name"].read_bytes() != found[3]["sketch_file_name"].read_bytes()
    Image.fromarray(draw_face(0, 9, 64).image).save(folder / "more" / "1.jpg")
    rows.append({"file_name": "more/1.jpg"})
    (folder / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(InputError, match=r"1\.png and 1\.jpg would share one mask"):
        annotate_folder(folder)
    Image.open(found[0]["sketch_file_name"]).save(folder / "own" / "1.png")
    rows[3]["sketch_file_name"], rows[4]["sketch_file_name"] = "own/0.png", "own/1.png"  # names of their own
    (folder / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert annotate_folder(folder) == {"sketch": 0}


def test_sketches_by_u2net(folder, tmp_path, capsys):
    torch.manual_seed(0)
    torch.save(U2Net(dict.fromkeys(PORTRAIT, (2, 2))).state_dict(), tmp_path / "u2net_portrait.pth")
    annotate_folder(folder)
    main(
        [
            "prepare",
            "annotate",
            str(folder),
            "--sketcher",
            str(tmp_path / "u2net_portrait.pth"),
            "--parser",
            "none",
            "--redo",
            "sketch",
        ]
    )
    assert "sketches added: 3" in capsys.readouterr().out
    rows = read_folder(folder)
    assert all(row["sketch_made_by"].startswith("U2Net ") for row in rows)
    assert Image.open(rows[0]["sketch_file_name"]).size == (64, 64)


def test_mixed_annotators_are_reported(folder, parser, tmp_path, capsys):
    annotate_folder(folder, parser=parser, sketches=False)
    rows = [json.loads(line) for line in (folder / "metadata.jsonl").read_text().splitlines()]
    (folder / rows[2].pop("mask_file_name")).unlink()
    del rows[2]["mask_made_by"]
    (folder / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    main(["prepare", "annotate", str(folder), "--parser", str(other_parser(parser, tmp_path / "other"))])
    printed = capsys.readouterr().err
    assert "mask: 1 by " in printed
    assert "--redo mask regenerates them with one annotator" in printed


def test_rejected_input(folder, parser, tmp_path):
    with pytest.raises(InputError, match=r"config\.json cannot be read"):
        annotate_folder(folder, parser=tmp_path / "faces")
    with pytest.raises(InputError, match="cannot regenerate the mask files without an annotator"):
        annotate_folder(folder, redo=["mask"])
    other = SegformerForSemanticSegmentation(
        SegformerConfig(hidden_sizes=[8, 8, 8, 8], depths=[1, 1, 1, 1], num_attention_heads=[1, 1, 1, 1], num_labels=3)
    )
    other.save_pretrained(tmp_path / "other")
    with pytest.raises(InputError, match="LABEL_0, LABEL_1, LABEL_2"):
        annotate_folder(folder, parser=tmp_path / "other")
    Image.new("RGB", (16, 16)).save(folder / "images" / "1.png")
    with pytest.raises(InputError, match=r"images/1\.png is 16x16 pixels: a sketch needs 32"):
        annotate_folder(folder)
    (folder / "images" / "1.png").write_bytes(b"broken")
    with pytest.raises(InputError, match=r"1\.png is not a readable image"):
        annotate_folder(folder, parser=parser)
