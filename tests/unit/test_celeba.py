"""CelebA and CelebAMask-HQ ingests, on drawn faces laid out as the official folders are."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from likeness.conditions.classes import FLIP_PAIRS
from likeness.conditions.mask_schemes import exchange
from likeness.data.folder import read_folder
from likeness.data.synthetic import draw_face
from likeness.prepare.captions import ATTRIBUTES
from likeness.prepare.celeba import prepare_celeba, prepare_celebamask, read_attributes
from likeness.types import InputError

COUNT = 12


@pytest.fixture
def celeba(tmp_path) -> Path:
    """Twelve faces of six persons."""
    root = tmp_path / "celeba"
    (root / "img_align_celeba").mkdir(parents=True)
    rng = np.random.default_rng(0)
    rows, people = [], []
    for index in range(COUNT):
        name = f"{index + 1:06d}.jpg"
        face = Image.fromarray(draw_face(0, index, 64).image).resize((178, 218))
        face.save(root / "img_align_celeba" / name)
        rows.append(f"{name} " + " ".join(rng.choice(["1", "-1"], len(ATTRIBUTES))))
        people.append(f"{name} {index // 2}")
    (root / "list_attr_celeba.txt").write_text("\n".join([str(COUNT), " ".join(ATTRIBUTES), *rows]) + "\n")
    (root / "identity_CelebA.txt").write_text("\n".join(people) + "\n")
    return root


def files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def test_celeba(celeba, tmp_path):
    out = tmp_path / "out"
    steps = []
    found = prepare_celeba(celeba, out, size=32, held_out=3, progress=lambda done, total: steps.append((done, total)))
    assert found == {"train": 8, "test": 4, "skipped": {}}  # whole persons: two faces each
    assert steps[-1] == (COUNT, COUNT)
    train, test = read_folder(out), read_folder(out / "test")
    assert not {row["identity"] for row in train} & {row["identity"] for row in test}
    row = train[0]
    assert Image.open(row["file_name"]).size == (32, 32)
    assert Image.open(row["sketch_file_name"]).mode == "L"
    assert len(row["text"]) == 10
    assert row["attributes"].keys() == set(ATTRIBUTES)


def test_celeba_resumes_and_repeats(celeba, tmp_path):
    prepare_celeba(celeba, tmp_path / "one", size=32, held_out=3)
    prepare_celeba(celeba, tmp_path / "two", size=32, held_out=3)
    whole = files(tmp_path / "one")
    assert files(tmp_path / "two") == whole
    next((tmp_path / "two" / "train" / "images").iterdir()).unlink()
    (tmp_path / "two" / "train" / "metadata.jsonl").unlink()
    prepare_celeba(celeba, tmp_path / "two", size=32, held_out=3)
    assert files(tmp_path / "two") == whole


def test_celeba_skips_and_reports(celeba, tmp_path):
    pictures = celeba / "img_align_celeba"
    (pictures / "000001.jpg").write_bytes(b"broken")
    Image.new("RGB", (64, 64)).save(pictures / "000002.jpg")
    Image.new("RGB", (178, 218)).save(pictures / "999999.jpg")
    found = prepare_celeba(celeba, tmp_path / "out", size=32, held_out=2)
    assert found["skipped"].keys() == {"000001.jpg", "000002.jpg", "999999.jpg"}
    assert "64x64" in found["skipped"]["000002.jpg"]
    assert "no attributes" in found["skipped"]["999999.jpg"]
    assert found["train"] + found["test"] == COUNT - 2
    assert not list((tmp_path / "out").rglob("*.partial"))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda root: (root / "list_attr_celeba.txt").unlink(), "list_attr_celeba.txt cannot be read"),
        (lambda root: (root / "list_attr_celeba.txt").write_text("1\nHat\na.jpg 1\n"), "not CelebA's attribute list"),
        (lambda root: (root / "identity_CelebA.txt").write_text("000001.jpg\n"), "identity_CelebA.txt, line 1"),
        (lambda root: [p.unlink() for p in (root / "img_align_celeba").iterdir()], "holds no .jpg"),
    ],
)
def test_celeba_refusals(celeba, tmp_path, change, words):
    change(celeba)
    with pytest.raises(InputError, match=words):
        prepare_celeba(celeba, tmp_path / "out", held_out=2)


def test_bad_attribute_line_is_named(celeba):
    path = celeba / "list_attr_celeba.txt"
    lines = path.read_text().splitlines()
    lines[4] += " 1"
    path.write_text("\n".join(lines))
    with pytest.raises(InputError, match="line 5"):
        read_attributes(path)


def test_too_many_held_out(celeba, tmp_path):
    with pytest.raises(InputError, match="ask for fewer"):
        prepare_celeba(celeba, tmp_path / "out", held_out=50)


def test_celebamask_repairs_sides(tmp_path):
    source = tmp_path / "celebamask"
    (source / "images").mkdir(parents=True)
    (source / "masks").mkdir()
    exchanged = []
    index = 0
    while len(list((source / "masks").iterdir())) < 6:
        face = draw_face(0, index, 128)
        index += 1
        if not {4, 5} <= set(np.unique(face.mask)):
            continue
        labels = face.mask
        if len(exchanged) < 2:
            labels = exchange(face.mask, FLIP_PAIRS)
            exchanged.append(index)
        Image.fromarray(face.image).save(source / "images" / f"{index}.jpg")
        Image.fromarray(labels).save(source / "masks" / f"{index}.png")
    found = prepare_celebamask(source, tmp_path / "out", size=32, held_out=2)
    assert found == {"train": 4, "test": 2, "repaired": 2, "skipped": {}}
    for row in [*read_folder(tmp_path / "out"), *read_folder(tmp_path / "out" / "test")]:
        labels = np.asarray(Image.open(row["mask_file_name"]))
        left, right = (np.nonzero(labels == label)[1].mean() for label in (4, 5))
        assert left > right  # the person's left is on the viewer's right
    text = (tmp_path / "out" / "train" / "metadata.jsonl").read_text()
    assert all("mask_file_name" in json.loads(line) for line in text.splitlines())
