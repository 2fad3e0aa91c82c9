"""Ingest: every dataset format through the command line, bad input, interruption, splits and geometry."""

from __future__ import annotations

import datetime
import decimal
import io
import json
import os
import pickle
import shutil
import signal
import subprocess
import sys
import tarfile
import time
import zipfile
from pathlib import Path
from typing import get_args, get_type_hints

import numpy as np
import pytest
import sample_datasets
from drawn import drawn_mask, drawn_points, drawn_sketch
from hostile import bomb
from PIL import Image
from sample_datasets import SIDE, image, pack, put

from builders import run
from likeness.cli import prepare
from likeness.conditions import CONDITIONS
from likeness.conditions.mask import swap_classes
from likeness.conditions.mask.classes import FLIP_PAIRS
from likeness.data.folder import read_folder, read_record
from likeness.prepare.caption.grammar import ATTRIBUTES
from likeness.prepare.check import check_folder
from likeness.prepare.export import WRITERS
from likeness.prepare.ingest import shards
from likeness.prepare.ingest.faces import unique_name
from likeness.prepare.ingest.formats import FORMATS
from likeness.prepare.ingest.splits import SPLITS
from likeness.prepare.ingest.write import ingest
from likeness.types import InputError


def files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def unfinished(out: Path) -> list[Path]:
    """Files that must not exist before a run has finished: metadata and partial files."""
    return [*out.rglob("metadata.jsonl"), *out.rglob("*.partial")]


def pixels(path: Path) -> np.ndarray:
    return np.asarray(Image.open(path).convert("RGB"))


CASES = {
    # dataset, format, arguments, faces by split
    "celeba": (sample_datasets.celeba, "celeba", ("--held-out", 3), {"train": 8, "test": 4}),
    "images_and_masks": (sample_datasets.celebamask, "images_and_masks", ("--held-out", 1), {"train": 3, "test": 1}),
    "celeba_hq": (sample_datasets.celeba_hq, "celebamask", ("--held-out", 1), {"train": 3, "test": 1}),
    "mm_celeba": (sample_datasets.mm_celeba, "mm_celeba", (), {"train": 2, "test": 1}),
    "ffhq": (sample_datasets.ffhq, "ffhq", (), {"train": 2, "validation": 1}),
    "face_mogle": (sample_datasets.face_mogle, "face_mogle", (), {"train": 3, "test": 1}),
    "mmface_dit": (sample_datasets.mmface_dit, "mmface_dit", (), {"train": 3, "test": 1}),
    "folder": (sample_datasets.folder, "folder", (), {"train": 3}),
    "imagefolder": (sample_datasets.imagefolder, "imagefolder", (), {"train": 2, "test": 1}),
    "parquet": (sample_datasets.parquet, "parquet", (), {"train": 20, "test": 2}),
    "webdataset": (sample_datasets.webdataset, "webdataset", (), {"train": 3, "test": 1}),
}


FIRST = {
    "mm_celeba": {"text": ["This is face 0.", "She smiles."]},
    "folder": {"text": ["the first face"]},
    "imagefolder": {"text": ["face 0", "smiling"], "camera": "drawn", "year": 2020, "identity": "0"},
    "parquet": {"text": ["face 0"]},
    "webdataset": {"text": ["face 0"], "url": "drawn"},
}
"""Case -> some columns of the first row of train."""

PACKED = [case for case in CASES if case not in ("parquet", "webdataset")]  # these are only read unpacked


@pytest.mark.parametrize(("case", "packed"), [*((case, False) for case in CASES), *((case, True) for case in PACKED)])
def test_every_format(case, packed, tmp_path, capsys):
    build, format, arguments, counts = CASES[case]
    build(tmp_path / "source")
    source = pack(tmp_path / "source", tmp_path / "source.zip", "some folder/") if packed else tmp_path / "source"
    out = tmp_path / "out"
    assert run("prepare", "ingest", source, out, *arguments) == 0
    printed = capsys.readouterr()
    assert f"is in the format {format}: {FORMATS[format].files}" in printed.err
    assert ", ".join(f"{count} {name}" for name, count in counts.items()) in printed.out
    assert {split: len(read_folder(out / split)) for split in counts} == counts
    assert (sorted(path.name for path in out.iterdir() if path.is_dir())) == sorted(counts)
    record = read_record(out / "train")
    assert f"split {record['split']}: {record['split_is']}" in printed.err
    assert record["format"] == format
    assert record["faces"] == counts
    assert record["license"]
    first = read_folder(out / "train")[0]
    assert first | FIRST.get(case, {}) == first
    for split in counts:
        for row in read_folder(out / split):
            assert Image.open(row["file_name"]).size[0] == Image.open(row["file_name"]).size[1]
            if "mask_file_name" in row:
                assert np.array_equal(np.asarray(Image.open(row["mask_file_name"])), drawn_mask(SIDE))
            if "sketch_file_name" in row:
                assert np.array_equal(np.asarray(Image.open(row["sketch_file_name"])), drawn_sketch(SIDE))
    assert not {found.kind for found in check_folder(out).findings} - {
        "shared-condition"
    }  # all faces have the same mask


def test_command_lists_every_format_and_split():
    hints = get_type_hints(prepare.Ingest)
    assert set(get_args(hints["format"])) == {"auto", *FORMATS}
    assert set(get_args(hints["split"])) == {"auto", *SPLITS}
    assert set(get_args(get_type_hints(prepare.Export)["format"])) == set(WRITERS)


def ingested(tmp_path: Path, build, **options) -> Path:
    build(tmp_path / "source")
    ingest(tmp_path / "source", tmp_path / "out", **options)
    return tmp_path / "out"


def test_celeba_separates_identities_and_crops(tmp_path):
    out = ingested(tmp_path, sample_datasets.celeba, held_out=3, size=32)
    train, test = read_folder(out), read_folder(out / "test")
    assert not {row["identity"] for row in train} & {row["identity"] for row in test}
    row = train[0]
    source = Image.open(tmp_path / "source" / "img_align_celeba" / f"{row['file_name'].stem}.jpg")
    expected = source.crop((9, 36, 169, 196)).resize((32, 32), Image.Resampling.LANCZOS)
    assert np.array_equal(pixels(row["file_name"]), np.asarray(expected))
    assert len(set(row["text"])) == 10
    assert row["attributes"].keys() == set(ATTRIBUTES)


def test_celeba_skips_and_reports(tmp_path, capsys):
    sample_datasets.celeba(tmp_path / "source")
    images = tmp_path / "source" / "img_align_celeba"
    (images / "000001.jpg").write_bytes(b"broken")
    Image.new("RGB", (64, 64)).save(images / "000002.jpg")
    Image.new("RGB", (178, 218)).save(images / "999999.jpg")
    (images / "000003.jpg").write_bytes(b"")
    assert run("prepare", "ingest", tmp_path / "source", tmp_path / "out", "--held-out", 2) == 0
    printed = capsys.readouterr()
    assert "4 skipped" in printed.out
    assert "64x64, not 178x218" in printed.err
    skipped = [json.loads(line) for line in (tmp_path / "out" / "skipped.jsonl").read_text().splitlines()]
    assert {entry["name"].rpartition("/")[2] for entry in skipped} == {"000001", "000002", "000003", "999999.jpg"}
    assert "no attributes or no identity" in printed.err
    assert not list((tmp_path / "out").rglob("*.partial"))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda root: (root / "list_attr_celeba.txt").unlink(), "list_attr_celeba.txt does not exist"),
        (lambda root: put(root, "list_attr_celeba.txt", "1\nHat\na.jpg 1\n"), "not CelebA's attribute list"),
        (lambda root: put(root, "list_attr_celeba.txt", b"\xff\xfe\x00"), "not UTF-8 text"),
        (lambda root: put(root, "identity_CelebA.txt", "000001.jpg\n"), "identity_CelebA.txt, line 1"),
        (lambda root: (root / "identity_CelebA.txt").unlink(), "12 of 12 faces have no identity"),
        (lambda root: [path.unlink() for path in (root / "img_align_celeba").iterdir()], "has no faces"),
        (lambda root: put(root, "list_attr_celeba.txt", sample_datasets.attribute_list(["1.jpg"])), "has no faces"),
    ],
)
def test_celeba_rejected_input(tmp_path, change, message):
    sample_datasets.celeba(tmp_path / "source")
    change(tmp_path / "source")
    with pytest.raises(InputError, match=message):
        ingest(tmp_path / "source", tmp_path / "out", format="celeba", held_out=2)
    assert not (tmp_path / "out").exists()


def test_bad_attribute_line_is_reported(tmp_path):
    sample_datasets.celeba(tmp_path / "source")
    path = tmp_path / "source" / "list_attr_celeba.txt"
    lines = path.read_text().splitlines()
    lines[4] += " 1"
    path.write_text("\n".join(lines))
    with pytest.raises(InputError, match="line 5"):
        ingest(tmp_path / "source", tmp_path / "out", held_out=2)


def test_swapped_sides_are_fixed(tmp_path):
    source = tmp_path / "source"
    sample_datasets.celebamask(source)
    put(source, "masks/1.png", sample_datasets.mask_image(swap_classes(drawn_mask(SIDE), FLIP_PAIRS)))
    found = ingest(source, tmp_path / "out", held_out=1)
    assert found == {"train": 3, "test": 1, "repaired": 1, "skipped": {}}
    for row in [*read_folder(tmp_path / "out"), *read_folder(tmp_path / "out" / "test")]:
        assert np.array_equal(np.asarray(Image.open(row["mask_file_name"])), drawn_mask(SIDE))


def test_celeba_hq_reads_attributes(tmp_path):
    rows = read_folder(ingested(tmp_path, sample_datasets.celeba_hq, split="none"))
    assert [row["file_name"].name for row in rows] == ["0.jpg", "1.jpg", "2.jpg", "3.jpg"]  # copied unchanged
    assert all(len(row["text"]) == 10 and row["attributes"].keys() == set(ATTRIBUTES) for row in rows)


def test_masks_and_captions_with_padded_numbers(tmp_path):
    source, messages = tmp_path / "source", []
    for index in range(2):
        put(source, f"images/{index}.jpg", image(index))
        put(source, f"masks/{index:05d}.png", sample_datasets.mask())
        put(source, f"text/{index:05d}.txt", f"face {index}")
    ingest(source, tmp_path / "out", split="none", report=messages.append)
    rows = read_folder(tmp_path / "out")
    assert [("mask_file_name" in row, row["text"]) for row in rows] == [(True, ["face 0"]), (True, ["face 1"])]
    assert "2 faces: 2 with a mask, 0 with a sketch, 0 with keypoints, 2 with captions" in messages


def test_ffhq_keeps_the_license_of_each_image(tmp_path):
    out = ingested(tmp_path, sample_datasets.ffhq, size=32)
    row = read_folder(out)[1]
    assert (row["license"], row["author"], row["photo_url"]) == ("CC BY 2.0", "A. Nobody", "photo 1")
    assert json.loads(row["keypoints_file_name"].read_text())["size"] == [1024, 1024]
    assert "CC BY-NC-SA 4.0" in read_record(out)["license"]


def test_mmface_dit_reads_both_parts(tmp_path):
    rows = read_folder(ingested(tmp_path, sample_datasets.mmface_dit))
    assert [row["file_name"].stem for row in rows] == ["0", "1", "ffhq_00000"]
    assert [row["text"] for row in rows] == [["face 0"], ["face 1"], ["a face of FFHQ"]]
    assert all("mask_file_name" in row and "sketch_file_name" in row for row in rows)


def test_face_mogle_zip_files(tmp_path):
    sample_datasets.face_mogle(tmp_path / "unpacked")
    source = tmp_path / "source"
    source.mkdir()
    pack(tmp_path / "unpacked" / "face", source / "face.zip", "face/")
    pack(tmp_path / "unpacked" / "mask", source / "mask.zip")
    (tmp_path / "unpacked" / "text.json").rename(source / "text.json")
    found = ingest(source, tmp_path / "out")
    assert found == {"train": 3, "test": 1, "skipped": {}}
    row = read_folder(tmp_path / "out" / "test")[0]
    assert row["text"] == ["face 27000", "smiling"]
    assert row["file_name"].read_bytes() == (tmp_path / "unpacked" / "face" / "27000.jpg").read_bytes()


def test_captions_in_another_folder(tmp_path):
    sample_datasets.folder(tmp_path / "source")
    put(tmp_path / "texts", "deep/1.txt", "the second\n")
    assert run("prepare", "ingest", tmp_path / "source", tmp_path / "out", "--captions", tmp_path / "texts") == 0
    rows = read_folder(tmp_path / "out")
    assert [row.get("text") for row in rows] == [["the first face"], ["the second"], None]


def test_captions_of_images_in_folders(tmp_path):
    """Captions are matched by path if the name is ambiguous; unused files are reported."""
    source, messages = tmp_path / "source", []
    for number, name in enumerate(("train/a", "train/sub/a", "test/a", "test/sub/b")):
        put(source, f"{name}.png", image(number))
        put(tmp_path / "texts", f"{name}.txt", name)
    put(tmp_path / "texts", "train/other.txt", "nobody")
    ingest(source, tmp_path / "out", captions=tmp_path / "texts", report=messages.append)
    texts = {split: [row["text"] for row in read_folder(tmp_path / "out" / split)] for split in ("train", "test")}
    assert texts == {"train": [["train/a"], ["train/sub/a"]], "test": [["test/a"], ["test/sub/b"]]}
    assert messages[-1] == "unused caption files: 1, such as train/other.txt"


def test_captions_of_paths_that_differ_in_a_slash(tmp_path):
    for number, name in enumerate(("sub/a", "sub_a", "sub_b")):
        put(tmp_path / "source", f"{name}.png", image(number))
    for name in ("sub/a", "sub_a", "sub/b"):
        put(tmp_path / "texts", f"{name}.txt", name)
    ingest(tmp_path / "source", tmp_path / "out", format="folder", captions=tmp_path / "texts")
    assert [row.get("text") for row in read_folder(tmp_path / "out")] == [["sub_a"], None, ["sub/a"]]


@pytest.mark.parametrize("split", ["val", "dev", "testing", "Test", "VALIDATION"])
@pytest.mark.parametrize("form", ["folder", "imagefolder"])
def test_splits_with_other_names(tmp_path, split, form):
    for number, name in enumerate(("Train/0", f"{split}/0")):
        put(tmp_path / "source", f"{name}.png", image(number))
        put(tmp_path / "texts", f"{name}.txt", name)
        if form == "imagefolder":
            put(tmp_path / "source", f"{name[:-1]}metadata.jsonl", {"file_name": "0.png"})
    assert run("prepare", "ingest", tmp_path / "source", tmp_path / "out", "--captions", tmp_path / "texts") == 0
    own = "test" if split.lower().startswith("test") else "validation"
    assert [row["text"] for row in read_folder(tmp_path / "out" / own)] == [[f"{split}/0"]]
    assert read_record(tmp_path / "out")["format"] == form


def test_null_is_absent(tmp_path):
    """Null counts as absent, in ingest and in prepared folders."""
    source = tmp_path / "source"
    absent = {"mask_file_name": None, "sketch_file_name": None, "text": None, "identity": None}
    put(source, "metadata.jsonl", json.dumps({"file_name": "0.png", **absent}) + "\n")
    put(source, "0.png", image(0))
    for folder in (source, tmp_path / "out"):
        assert [row.keys() for row in read_folder(folder)] == [{"file_name"}]
        assert check_folder(folder).findings == []
        if folder == source:
            assert ingest(source, tmp_path / "out") == {"train": 1, "skipped": {}}


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"file_name": "0.png", "mask_file_name": 7}, "mask_file_name is 7, which is not a file name"),
        ({"file_name": "0\0.png"}, "which is not a file name"),
        ({"file_name": "../0.png"}, "points outside the folder"),
        ({"file_name": "0.png", "sketch_file_name": "/etc/passwd"}, "points outside the folder"),
        ({"file_name": "0.png", "text": {"caption": "a face"}}, "must be a caption or a list of captions"),
        ({"file_name": "0.png", "text": ["a face", None]}, "must be a caption or a list of captions"),
        ({"file_name": None}, "every row needs a file_name"),
        (["0.png"], "every row needs a file_name"),
    ],
)
def test_rows_that_cannot_be_read(tmp_path, row, message):
    put(tmp_path, "metadata.jsonl", json.dumps({"file_name": "0.png"}) + "\n" + json.dumps(row) + "\n")
    with pytest.raises(InputError, match=f"line 2.*{message}"):
        read_folder(tmp_path)


def test_imagefolder_reports_missing_files(tmp_path):
    source = tmp_path / "source"
    sample_datasets.imagefolder(source)
    lines = [json.loads(line) for line in (source / "train" / "metadata.jsonl").read_text().splitlines()]
    lines[0] |= {"mask_file_name": "masks/none.png", "depth_file_name": "images/0.png"}
    lines += [{"file_name": "images/gone.png"}, {"file_name": "images/1.png", "text": 7}]
    put(source, "train/metadata.jsonl", "".join(json.dumps(line) + "\n" for line in lines))
    found = ingest(source, tmp_path / "out")
    assert found["train"] == 2
    missing = {"train/masks/none.png", "column depth_file_name", "train/images/gone.png"}
    assert found["skipped"].keys() == {*missing, "train/1"}
    assert "must be a caption or a list" in found["skipped"]["train/1"]


@pytest.mark.parametrize("size", [1, 5, 16])
def test_parquet_rows_that_are_read_ahead_stay_available(size):
    import pyarrow as pa

    table = pa.table({"image": list(range(200)), "mask": list(range(200))})
    cell = shards.cell_reader(iter(table.to_batches(max_chunksize=size)))
    for row in range(shards.KEPT, 200):
        assert cell(row, "image") == row
        assert cell(row - shards.KEPT + shards.ROWS, "mask") == row - shards.KEPT + shards.ROWS


def test_parquet_rows_without_a_path(tmp_path):
    rows = read_folder(ingested(tmp_path, sample_datasets.parquet))
    assert [row["file_name"].name for row in rows][:3] == ["0.png", "train-00000-of-00001_000001.png", "2.png"]
    assert ["mask_file_name" in row for row in rows][:2] == [False, True]
    assert [row["text"] for row in rows] == [[f"face {index}"] for index in range(20)]
    for index, row in enumerate(rows):
        assert np.array_equal(pixels(row["file_name"]), np.asarray(image(index)))


# Splits


def test_parquet_columns_of_any_type(tmp_path):
    """Dates and decimals become JSON; bytes other than the image are reported."""
    import pyarrow as pa
    import pyarrow.parquet

    columns = {"image": [sample_datasets.content(image(0))], "day": [datetime.date(2024, 5, 1)]}
    columns |= {"at": [datetime.datetime(2024, 5, 1, 12)], "price": [decimal.Decimal("1.50")], "raw": [[b"\0"]]}
    tmp_path.joinpath("source").mkdir()
    pa.parquet.write_table(pa.table({**columns, "binary": ["a word"]}), tmp_path / "source" / "train.parquet")
    found = ingest(tmp_path / "source", tmp_path / "out")
    assert found == {"train": 1, "skipped": {"columns raw of train.parquet": "unknown condition"}}
    row = read_folder(tmp_path / "out")[0]
    assert (row["day"], row["at"], row["price"], row["binary"]) == ("2024-05-01", "2024-05-01 12:00:00", 1.5, "a word")


@pytest.mark.parametrize("packed", [False, True])
def test_conditions_as_arrays_and_text(tmp_path, packed):
    source = tmp_path / "source"
    put(source, "metadata.jsonl", {"file_name": "0.png"} | {f"{name}_file_name": f"{name}.npy" for name in CONDITIONS})
    put(source, "0.png", image(0))
    for name, raw in {"mask": drawn_mask(SIDE), "sketch": drawn_sketch(SIDE), "keypoints": drawn_points()}.items():
        np.save(source / f"{name}.npy", raw)
    source = pack(source, tmp_path / "source.zip") if packed else source
    assert ingest(source, tmp_path / "out") == {"train": 1, "skipped": {}}
    (row,) = read_folder(tmp_path / "out")
    assert all(f"{name}_file_name" in row for name in CONDITIONS)


def test_celeba_partition_by_list_and_by_threshold(tmp_path):
    sample_datasets.celeba_hq(tmp_path / "source")
    ingest(tmp_path / "source", tmp_path / "one", split="celeba")
    numbers = {"100": 0, "162771": 1, "182637": 1, "182638": 2}
    lines = "".join(f"{int(number):06d}.jpg {part}\n" for number, part in numbers.items())
    put(tmp_path / "source", "Eval/list_eval_partition.txt", lines)
    ingest(tmp_path / "source", tmp_path / "two", split="celeba")
    for out in (tmp_path / "one", tmp_path / "two"):
        found = {
            split: [row["file_name"].stem for row in read_folder(out / split)] for split in read_record(out)["faces"]
        }
        assert found == {"train": ["0"], "validation": ["1", "2"], "test": ["3"]}
        assert "list_eval_partition.txt" in read_record(out / "test")["split_is"]


def test_faces_not_listed_by_a_split_are_skipped(tmp_path):
    sample_datasets.mm_celeba(tmp_path / "source")
    assert ingest(tmp_path / "source", tmp_path / "out")["skipped"] == {"3": "the split does not list it"}


def test_known_identities_are_separated(tmp_path):
    source = tmp_path / "source"
    sample_datasets.celeba_hq(source)
    put(
        source, "identity_CelebA.txt", "".join(f"{file:06d}.jpg {file % 2}\n" for file in (100, 162771, 182637, 182638))
    )
    found = ingest(source, tmp_path / "out", held_out=1)
    assert found == {"train": 2, "test": 2, "skipped": {}}  # two faces per identity
    assert read_record(tmp_path / "out")["split"] == "person"
    identities = [{row["identity"] for row in read_folder(tmp_path / "out" / split)} for split in ("train", "test")]
    assert not set.intersection(*identities)


def test_small_sets_hold_out_a_tenth(tmp_path):
    assert ingest_of(sample_datasets.celeba, tmp_path / "celeba", count=24) == {
        "train": 22,
        "test": 2,
    }  # an identity has two faces
    assert ingest_of(sample_datasets.celebamask, tmp_path / "celebamask", count=4) == {"train": 3, "test": 1}


def ingest_of(build, root: Path, **options) -> dict[str, int]:
    """Faces by split with default arguments."""
    build(root / "source", **options)
    assert run("prepare", "ingest", root / "source", root / "out") == 0
    return read_record(root / "out")["faces"]


def interrupted(done: int, total: int) -> None:
    if done == total:
        raise KeyboardInterrupt


@pytest.mark.parametrize(
    ("split", "message"),
    [
        ("celeba", "needs CelebA-HQ-to-CelebA-mapping.txt"),
        ("mm_celeba", "needs train/filenames.pickle"),
        ("person", "have no identity"),
        ("random", "cannot hold out 50 of 4 complete faces: reduce --held-out"),
        ("none", "held_out is 50, but the split none is fixed"),
    ],
)
def test_splits_that_the_source_does_not_support(tmp_path, split, message):
    sample_datasets.celebamask(tmp_path / "source")
    held_out = {"person": 3, "random": 50, "none": 50}
    with pytest.raises(InputError, match=message):
        ingest(tmp_path / "source", tmp_path / "out", split=split, held_out=held_out.get(split))
    assert not (tmp_path / "out").exists()


class Evil:
    def __reduce__(self):
        return os.system, ("touch stolen",)


@pytest.mark.parametrize(
    "content", [pickle.dumps(Evil()), pickle.dumps([1, 2]), pickle.dumps({"a": "b"}), b"not a pickle"]
)
def test_other_pickles_are_rejected(tmp_path, content, monkeypatch):
    monkeypatch.chdir(tmp_path)
    sample_datasets.mm_celeba(tmp_path / "source")
    put(tmp_path / "source", "train/filenames.pickle", content)
    with pytest.raises(InputError, match="not a plain list of file names"):
        ingest(tmp_path / "source", tmp_path / "out")
    assert not (tmp_path / "stolen").exists()


# Detection


def test_ambiguous_format_is_rejected(tmp_path, capsys):
    sample_datasets.imagefolder(tmp_path / "source")
    sample_datasets.webdataset(tmp_path / "source")
    assert run("prepare", "ingest", tmp_path / "source", tmp_path / "out") == 2
    printed = capsys.readouterr().err
    assert (
        "could be imagefolder (metadata.jsonl or metadata.csv) and webdataset (*.tar): choose one with --format"
        in printed
    )
    assert run("prepare", "ingest", tmp_path / "source", tmp_path / "out", "--format", "webdataset") == 0


def test_prepared_folder_is_not_detected_as_celeba_hq(tmp_path):
    """Aligned and annotated portraits are in the folders images and masks, too."""
    sample_datasets.imagefolder(tmp_path / "source")
    ingest(tmp_path / "source" / "train", tmp_path / "out")
    assert read_record(tmp_path / "out")["format"] == "imagefolder"


def test_nested_images_need_an_explicit_format(tmp_path):
    put(tmp_path / "source", "a/b/1.jpg", image(0))
    put(tmp_path / "source", "a/c/1.jpg", image(1))
    with pytest.raises(InputError, match="--format folder imports the 2 images"):
        ingest(tmp_path / "source", tmp_path / "out")
    ingest(tmp_path / "source", tmp_path / "out", format="folder")
    assert [row["file_name"].name for row in read_folder(tmp_path / "out")] == ["a_b_1.jpg", "a_c_1.jpg"]


# Bad input


def slip(root: Path) -> None:
    root.mkdir()
    with zipfile.ZipFile(root / "face.zip", "w") as archive:
        archive.writestr("../../evil.png", b"")


def one_row(**row: object):
    return lambda root: (put(root, "metadata.jsonl", row), put(root, "0.png", image(0)))


CONTENT = sample_datasets.content(image(0), "JPEG")

BAD = {
    "no source": (lambda root: None, "does not exist"),
    "empty": (lambda root: root.mkdir(), "it contains no images"),
    "zip with outside path": (slip, "points outside the folder"),
    "broken zip": (lambda root: put(root, "face.zip", b"PK\x03\x04 not an archive"), "not a readable zip archive"),
    "metadata with outside path": (one_row(file_name="../secret.png"), "line 1 names '../secret.png', which points"),
    "metadata is absolute": (one_row(file_name="/etc/passwd"), "points outside the folder"),
    "mask with outside path": (one_row(file_name="0.png", mask_file_name="..\\..\\x.png"), "points outside the folder"),
    "no file name": (one_row(text="a face"), "every row needs a file_name"),
    "invalid JSON": (lambda root: put(root, "metadata.jsonl", "{"), "line 1 is not valid JSON"),
    "only a bomb": (lambda root: put(root, "0.png", bomb()), "too many pixels"),
    "only corrupt": (lambda root: put(root, "0.jpg", CONTENT[:500]), "may be truncated"),
    "not square": (lambda root: put(root, "0.jpg", image(0, (64, 80))), "crop the center with --crop"),
    "invalid Parquet": (lambda root: put(root, "0.parquet", b"PAR1 nothing PAR1"), "not a readable Parquet file"),
    "invalid tar": (lambda root: put(root, "0.tar", b"\x1f\x8b nothing"), "not a complete, uncompressed tar archive"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_bad_sources_are_reported(case, tmp_path, capsys):
    build, message = BAD[case]
    build(tmp_path / "source")
    assert run("prepare", "ingest", tmp_path / "source", tmp_path / "out") == 2
    printed = capsys.readouterr().err
    assert message in printed
    assert "Traceback" not in printed
    assert not list(tmp_path.rglob("evil.png"))
    assert not unfinished(tmp_path / "out")


def test_bad_files_are_skipped(tmp_path):
    source = tmp_path / "source"
    sample_datasets.celebamask(source, 6)
    put(source, "images/0.jpg", bomb())
    put(source, "masks/1.png", bomb())
    put(source, "masks/2.png", Image.new("RGB", (SIDE, SIDE), (1, 2, 3)))
    put(source, "masks/3.png", sample_datasets.mask().resize((SIDE, SIDE // 2), Image.Resampling.NEAREST))
    found = ingest(source, tmp_path / "out", split="none")
    assert found["train"] == 5
    assert found["skipped"].keys() == {"train/0", *(f"mask_file_name of train/{index}" for index in (1, 2, 3))}
    assert "the mask is 64x32, but the image is 64x64" in found["skipped"]["mask_file_name of train/3"]
    assert ["mask_file_name" in row for row in read_folder(tmp_path / "out")] == [False, False, False, True, True]


def test_broken_files_in_archives_are_skipped(tmp_path):
    sample_datasets.folder(tmp_path / "unpacked")
    source = pack(tmp_path / "unpacked", tmp_path / "source.zip")
    data = bytearray(source.read_bytes())
    with zipfile.ZipFile(source) as archive:
        at = archive.getinfo("1.jpg").header_offset + 60
    data[at : at + 8] = bytes(8)  # the checksum no longer fits
    source.write_bytes(data)
    found = ingest(source, tmp_path / "out")
    assert found["train"] == 2
    assert "is broken" in found["skipped"]["train/1"]


def test_truncated_shard(tmp_path):
    sample_datasets.webdataset(tmp_path / "source")
    shard = tmp_path / "source" / "train-000000.tar"
    shard.write_bytes(shard.read_bytes()[:5000])
    with pytest.raises(InputError, match=r"train-000000\.tar is not a complete|truncated"):
        ingest(tmp_path / "source", tmp_path / "out")


def test_unwritable_folder(tmp_path, capsys):
    sample_datasets.folder(tmp_path / "source")
    put(tmp_path, "file", "not a folder")
    for out in (tmp_path / "file" / "out", Path("/proc/out")):
        assert run("prepare", "ingest", tmp_path / "source", out) == 2
        assert "cannot write" in capsys.readouterr().err


LIMITED = """
import resource, sys
resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[1]), resource.RLIM_INFINITY))
from likeness.cli import main
main(sys.argv[2:])
"""


@pytest.mark.parametrize("most", [3000, 30000], ids=["image", "metadata"])
def test_full_disk(tmp_path, most):
    """No file can grow beyond `most` bytes, as on a full disk; afterwards the same command resumes."""
    sample_datasets.folder(tmp_path / "source")
    noise = np.random.default_rng(0).integers(0, 256, (SIDE, SIDE, 3), dtype=np.uint8)  # about 12 KB
    put(tmp_path / "source", "1.png", Image.fromarray(noise))
    put(tmp_path / "source", "2.txt", "a very long caption " * 2000)
    out = tmp_path / "out"
    command = ["prepare", "ingest", str(tmp_path / "source"), str(out)]
    done = subprocess.run([sys.executable, "-c", LIMITED, str(most), *command], capture_output=True, text=True)
    assert done.returncode == 2
    assert f"cannot write {out}" in done.stderr
    assert "Traceback" not in done.stderr
    assert not unfinished(out)
    for path in (*out.rglob("*.png"), *out.rglob("*.jpg")):
        Image.open(path).load()  # complete
    assert run(*command) == 0
    assert len(read_folder(out)) == 4


# Resuming


def test_suggested_fix_works(tmp_path, capsys):
    put(tmp_path / "source", "0.jpg", image(0, (64, 80)))
    command = ("prepare", "ingest", tmp_path / "source", tmp_path / "out")
    assert run(*command) == 2
    assert "crop the center with --crop" in capsys.readouterr().err
    assert run(*command, "--crop") == 0
    assert len(read_folder(tmp_path / "out")) == 1


def test_output_inside_the_source_is_ignored(tmp_path, monkeypatch):
    sample_datasets.folder(tmp_path)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(KeyboardInterrupt):
        ingest(Path(), Path("ready"), progress=interrupted)
    assert ingest(Path(), Path("ready")) == {"train": 3, "skipped": {}}


def test_interrupted_run_resumes(tmp_path):
    sample_datasets.imagefolder(tmp_path / "source")
    ingest(tmp_path / "source", tmp_path / "whole", size=32)
    for moment in (1, 2, 3):
        out = tmp_path / f"stopped {moment}"

        def stop(done: int, total: int, moment: int = moment) -> None:
            if done == moment:
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            ingest(tmp_path / "source", out, size=32, progress=stop)
        assert not unfinished(out)
        ingest(tmp_path / "source", out, size=32)
        assert files(out) == files(tmp_path / "whole")


def test_killed_run_resumes(tmp_path):
    sample_datasets.celeba(tmp_path / "source", 24)
    ingest(tmp_path / "source", tmp_path / "whole", held_out=6, size=256)
    out = tmp_path / "out"
    command = ["prepare", "ingest", str(tmp_path / "source"), str(out), "--held-out", "6", "--size", "256"]
    for _ in range(20):  # until it is killed before the end
        shutil.rmtree(out, ignore_errors=True)
        process = subprocess.Popen([sys.executable, "-m", "likeness.cli", *command], stderr=subprocess.DEVNULL)
        while not list(out.glob("*/images/*.png")) and process.poll() is None:
            time.sleep(0.005)
        process.send_signal(signal.SIGKILL)
        process.wait()
        if not list(out.rglob("metadata.jsonl")):
            break
    else:
        pytest.fail("every run finished before it was killed")
    assert run(*command) == 0
    assert {name: data for name, data in files(out).items() if ".partial" not in name} == files(tmp_path / "whole")


def test_complete_folders_are_left_alone(tmp_path, capsys):
    sample_datasets.folder(tmp_path / "source")
    command = ("prepare", "ingest", tmp_path / "source", tmp_path / "out")
    assert run(*command) == 0
    annotated = {"file_name": "images/0.jpg", "mask_file_name": "masks/0.png"}
    put(tmp_path / "out", "train/metadata.jsonl", annotated)  # as if annotated in the meantime
    assert run(*command) == 0
    assert "is complete, 3 faces: for new images choose another folder" in capsys.readouterr().err
    assert json.loads((tmp_path / "out" / "train" / "metadata.jsonl").read_text()) == annotated
    assert run(*command, "--size", 32) == 2
    assert "was written with size None, not 32" in capsys.readouterr().err
    assert run(*command, "--format", "imagefolder") == 2
    assert "was written with format 'folder', not 'imagefolder'" in capsys.readouterr().err
    put(tmp_path / "other", "something.txt", "")
    assert run("prepare", "ingest", tmp_path / "source", tmp_path / "other") == 2
    assert "is not empty" in capsys.readouterr().err


# Geometry and names


def test_crop_includes_conditions(tmp_path):
    source = tmp_path / "source"
    wide = np.pad(drawn_mask(SIDE), ((0, 0), (20, 12)))
    put(source, "0.png", Image.fromarray(np.pad(np.asarray(image(0)), ((0, 0), (20, 12), (0, 0)))))
    put(source, "mask.png", sample_datasets.mask_image(wide.repeat(2, 0).repeat(2, 1)))  # at twice the size
    put(source, "sketch.png", Image.fromarray(np.pad(drawn_sketch(SIDE), ((0, 0), (20, 12)), constant_values=255)))
    points = np.add(sample_datasets.points()["points"], (20, 0))
    put(source, "points.json", {"points": points.tolist(), "size": [SIDE + 32, SIDE]})
    row = {"file_name": "0.png", "mask_file_name": "mask.png", "sketch_file_name": "sketch.png"}
    put(source, "metadata.jsonl", row | {"keypoints_file_name": "points.json"})
    ingest(source, tmp_path / "out", crop=True)
    (row,) = read_folder(tmp_path / "out")
    left = (SIDE + 32 - SIDE) // 2
    assert np.array_equal(pixels(row["file_name"]), pixels(source / "0.png")[:, left : left + SIDE])
    assert np.array_equal(np.asarray(Image.open(row["mask_file_name"]))[::2, ::2], wide[:, left : left + SIDE])
    lines = np.asarray(Image.open(source / "sketch.png"))[:, left : left + SIDE]
    assert np.array_equal(np.asarray(Image.open(row["sketch_file_name"])), lines)
    found = np.array(json.loads(row["keypoints_file_name"].read_text())["points"])
    assert np.allclose(found * SIDE, points - (left, 0), atol=1e-3)


def test_images_are_rotated_and_converted_to_rgb(tmp_path):
    source = tmp_path / "source"
    exif = Image.Exif()
    exif[0x0112] = 6
    source.mkdir()
    image(0).save(source / "turned.jpg", exif=exif, quality=95)
    image(1).convert("L").save(source / "grey.png")
    image(2).save(source / "plain.jpg")
    ingest(source, tmp_path / "out")
    rows = {row["file_name"].stem: row["file_name"] for row in read_folder(tmp_path / "out")}
    assert np.array_equal(pixels(rows["turned"]), np.rot90(pixels(source / "turned.jpg"), -1))
    assert Image.open(rows["grey"]).mode == "RGB"
    assert rows["plain"].read_bytes() == (source / "plain.jpg").read_bytes()


def test_names_are_unique_and_safe(tmp_path):
    source = tmp_path / "source"
    for name in ("a.jpg", "a.png", "A.jpg", "strange ?name*.jpg", "ü.jpg"):
        put(source, name, image(len(name)))
    ingest(source, tmp_path / "out")
    names = [row["file_name"].stem for row in read_folder(tmp_path / "out")]
    assert sorted(names) == ["A", "a-2", "a-3", "strange_name_", "ü"]


def test_digits_that_are_no_numbers(tmp_path):
    put(tmp_path / "source", "images/①.jpg", image(0))
    assert ingest(tmp_path / "source", tmp_path / "out", format="images_and_masks", split="none")["train"] == 1
    with pytest.raises(InputError, match="① is not a CelebA number"):
        ingest(tmp_path / "source", tmp_path / "other", format="images_and_masks", split="face_mogle")


def test_equal_names_take_no_longer_each_time():
    """The number that follows is stored: without it, 100,000 equal names take 5e9 comparisons."""
    taken: dict[str, int] = {}
    names = [unique_name(name, taken) for name in ["a", "a-2", *["A"] * 100_000]]
    assert names[:4] == ["a", "a-2", "A-3", "A-4"]
    assert len(set(names)) == len(names)


def test_equal_names_in_two_splits_are_skipped_separately(tmp_path):
    put(tmp_path / "source", "train/1.jpg", image(1))
    for split in ("train", "test"):
        put(tmp_path / "source", f"{split}/0.jpg", b"broken")
    assert ingest(tmp_path / "source", tmp_path / "out")["skipped"].keys() == {"train/0", "test/0"}


def test_invalid_or_long_names(tmp_path):
    source, latin = tmp_path / "source", os.fsdecode(b"caf\xe9")
    put(source, f"{latin}.png", image(0))
    put(source, f"{latin}s.png", b"broken")
    put(source, "z\x85\u2028.png", b"broken")  # line breaks of Unicode, but not of JSON
    put(source, "脸" * 82 + ".png", image(1))
    put(source, "metadata.jsonl", json.dumps({"file_name": "a.png", "text": "half \ud83d"}))
    put(source, "a.png", image(2))
    (source / "metadata.jsonl").rename(tmp_path / "metadata.jsonl")
    assert run("prepare", "ingest", source, tmp_path / "out") == 0
    names = [row["file_name"].stem for row in read_folder(tmp_path / "out")]
    assert sorted(names) == ["a", "caf_", "脸" * 66]
    (left, other) = (tmp_path / "out/skipped.jsonl").read_text().split("\n")[:-1]
    assert json.loads(left)["name"] == "train/caf_s"
    assert json.loads(other)["name"] == "train/z_"
    assert run("prepare", "ingest", source, tmp_path / "out") == 0  # complete
    assert f"{latin}s.png" in json.loads(left)["reason"]
    (tmp_path / "metadata.jsonl").rename(source / "metadata.jsonl")
    assert run("prepare", "ingest", source, tmp_path / "rows") == 0
    assert [row["text"] for row in read_folder(tmp_path / "rows")] == [["half \ud83d"]]


def test_everything_that_is_not_read_is_reported(tmp_path, capsys):
    """Sidecars belong to their image; what is not read is counted in one line and in dataset.json."""
    source, outside = tmp_path / "source", tmp_path / "outside"
    put(outside, "2.png", image(2))
    for name in ("0.png", "1.png", "unlike_mask.png"):
        put(source, name, image(len(name)))
    put(source, "0_mask.png", sample_datasets.mask())
    put(source, "0-sketch.png", sample_datasets.sketch())
    put(source, "0_keypoints.jpg", image(9))
    put(source, "0_keypoints.json", sample_datasets.points())
    texts = {"0.caption": "zero", "1.txt": "one", "1.caption": "other", "1.json": "{}", "notes.psd": "", "README": ""}
    for name, content in texts.items():
        put(source, name, content)
    for name in ("._0.png", ".DS_Store"):
        put(source, name, b"")
    os.mkfifo(source / "pipe.png")
    (source / "private.png").symlink_to(outside / "2.png")
    (source / "more").symlink_to(outside)
    command = ("prepare", "ingest", source, tmp_path / "out")
    assert run(*command) == 0
    expected = (
        "not read: 2 hidden, 2 links out of the source (--follow-links reads them), 1 .caption (such as 1.caption), "
        "1 .json (such as 1.json), 1 .jpg (such as 0_keypoints.jpg), "
        "1 .psd (such as notes.psd), 1 without suffix (such as README), 1 not regular files"
    )
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("not read")]
    assert sorted(line[10:].split(", ")) == sorted(expected[10:].split(", "))
    found = read_record(tmp_path / "out")["not_read"]
    assert found[".caption"] == {"count": 1, "example": "1.caption"}
    assert found["not regular files"] == {"count": 1}
    rows = {row["file_name"].stem: row for row in read_folder(tmp_path / "out")}
    assert {name: row.get("text") for name, row in rows.items()} == {"0": ["zero"], "1": ["one"], "unlike_mask": None}
    assert {column.removesuffix("_file_name") for column in rows["0"]} == {"file_name", "text", *CONDITIONS}
    assert run(*command[:-1], tmp_path / "all", "--follow-links") == 0
    assert {"private", "2"} <= {row["file_name"].stem.removeprefix("more_") for row in read_folder(tmp_path / "all")}


@pytest.mark.parametrize("name", ["metadata.csv", "train/metadata.csv"])
def test_metadata_as_csv(tmp_path, capsys, name):
    """Hugging Face's imagefolder with a table; a CSV file without file names is not one."""
    source, place = tmp_path / "source", Path(name).parent
    for number in range(2):
        put(source, f"{place}/{number}.png", image(number))
    put(source, f"{place}/m.png", sample_datasets.mask())
    table = (
        '\ufefffile_name,text,mask_file_name,age\r\n0.png,"a man, smiling",m.png,\r\n1.png,une fille à table,,30\r\n'
    )
    put(source, name, table.encode())
    assert run("prepare", "ingest", source, tmp_path / "out") == 0
    rows = read_folder(tmp_path / "out")
    assert [row["text"] for row in rows] == [["a man, smiling"], ["une fille à table"]]
    assert [("mask_file_name" in row, row.get("age")) for row in rows] == [(True, None), (False, "30")]
    put(source, name, table.encode() + b"2.png,a,b,c,d\r\n")
    assert run("prepare", "ingest", source, tmp_path / "bad") == 2
    assert "metadata.csv, line 4: every row needs a file_name" in capsys.readouterr().err
    put(source, name, "a;b\n1;2\n")
    assert run("prepare", "ingest", source, tmp_path / "other") == 0
    assert f"1 .csv (such as {name})" in capsys.readouterr().err


def shard(root: Path, *members: tuple[str, bytes, bytes], size: int | None = None) -> None:
    """Write a tar archive of (name, content, type); `size` replaces the size of the first member."""
    root.mkdir()
    with tarfile.open(root / "train-0.tar", "w") as archive:
        for name, content, kind in members:
            info = tarfile.TarInfo(name)
            info.size, info.type, info.linkname = len(content), kind, "/etc/passwd"
            if size is not None:
                info.size, size = size, None
            archive.addfile(info, io.BytesIO(content) if content else None)


def test_members_of_shards(tmp_path, capsys):
    """Keys end at the first dot of the base name, as in the library; nothing is lost in silence."""
    face, file = sample_datasets.content(image(0)), tarfile.REGTYPE
    members = [
        *(("./._0.png", b"\0" * 60, file), ("./0.png", face, file), ("./._0.txt", b"", file), ("./0.txt", b"a", file)),
        *(("./0.cls", b"3", file), ("./0.depth.png", face, file), ("./1.PNG", face, file), ("1.caption", b"b", file)),
        *(("v1.0.png", face, file), ("v1.0.txt", b"c", file), ("v1.1.png", face, file)),
        *(("2.png", face, file), ("2.png", b"again", file)),
        *(("3.png", b"", tarfile.SYMTYPE), ("4.png", b"", tarfile.CHRTYPE)),
    ]
    shard(tmp_path / "source", *members)
    assert run("prepare", "ingest", tmp_path / "source", tmp_path / "out") == 0
    printed = capsys.readouterr().err
    assert [row.get("text") for row in read_folder(tmp_path / "out")] == [["a"], ["b"], None]
    assert "skipped v1 in train-0.tar: the sample has no image among its files .0.png, .0.txt, .1.png" in printed
    assert "the key of a sample ends at the first dot" in printed
    assert "skipped 2.png in train-0.tar: the sample has two files of this kind" in printed
    assert {"not read: 2 hidden", "2 not regular files", "1 .cls", "1 .depth.png"} <= set(
        next(line for line in printed.splitlines() if line.startswith("not read")).split(", ")
    )


@pytest.mark.parametrize(
    ("name", "size", "message"),
    [
        ("../0.png", None, "names '../0.png', which points outside"),
        ("/0.png", None, "names '/0.png', which points outside"),
        ("a/../../0.png", None, "which points outside"),
        ("0.png", -512, "0.png in .* has a negative size"),
    ],
)
def test_hostile_shards(tmp_path, name, size, message):
    shard(tmp_path / "source", (name, b"", tarfile.REGTYPE), ("1.png", b"", tarfile.REGTYPE), size=size)
    with pytest.raises(InputError, match=message):
        ingest(tmp_path / "source", tmp_path / "out")


def test_extremely_large_cell(tmp_path, monkeypatch):
    pa = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    monkeypatch.setattr(shards, "MAX_BYTES", 2**20)  # instead of 256 MiB, which take long to write
    (tmp_path / "source").mkdir()
    table = pa.table({"image": [{"bytes": bytes(2**20 + 1), "path": "a.png"}]})
    parquet.write_table(table, tmp_path / "source/train.parquet", compression="zstd")
    assert (tmp_path / "source/train.parquet").stat().st_size < 2**16
    with pytest.raises(InputError, match=r"the column image.bytes of .* has 1 MiB in 1 rows"):
        ingest(tmp_path / "source", tmp_path / "out")


def test_limit(tmp_path):
    out = ingested(tmp_path, sample_datasets.celeba, limit=5, held_out=1)
    assert sum(read_record(out)["faces"].values()) == 5
    assert not read_record(out)["not_read"]
    with pytest.raises(InputError, match="limit must be at least 1"):
        ingest(tmp_path / "source", tmp_path / "none", limit=0)


@pytest.mark.parametrize("option", ["held-out", "seed"])
def test_negative_numbers_are_rejected(tmp_path, option, capsys):
    sample_datasets.celeba(tmp_path / "source")
    for command in ("ingest", "shards") if option == "held-out" else ("ingest",):
        assert run("prepare", command, tmp_path / "source", tmp_path / "out", f"--{option}", -3) == 2
        assert f"{option.replace('-', '_')} must be at least 0, not -3" in capsys.readouterr().err
        assert not (tmp_path / "out" / "dataset.json").exists()


def test_own_images_and_masks_are_not_taken_for_celebamask(tmp_path):
    """Folders named images and masks prove nothing: no license of CelebAMask-HQ is recorded, unless a name says so."""
    for name, layout in (("mine", "images_and_masks"), ("CelebAMask-HQ", "celebamask")):
        sample_datasets.celebamask(tmp_path / name)
        ingest(tmp_path / name, tmp_path / f"out-{name}", held_out=1)
        record = json.loads((tmp_path / f"out-{name}" / "dataset.json").read_text())
        assert record["format"] == layout
        assert ("CelebAMask-HQ" in json.dumps(record)) == (layout == "celebamask")
    put(tmp_path / "texts", "images/a.png", image(0))
    put(tmp_path / "texts", "text/a.txt", "a face")
    ingest(tmp_path / "texts", tmp_path / "out-texts", split="none")
    assert "CelebA" not in json.dumps(read_record(tmp_path / "out-texts"))
    assert [row["text"] for row in read_folder(tmp_path / "out-texts")] == [["a face"]]


def test_the_faulty_part_file_is_named(tmp_path):
    sample_datasets.celeba_hq(tmp_path / "source")
    part = next((tmp_path / "source/CelebAMask-HQ-mask-anno/1").glob("00001_hair.png"))
    Image.open(part).resize((16, 16)).save(part)
    out = tmp_path / "out"
    ingest(tmp_path / "source", out, held_out=1)
    (line,) = [json.loads(text) for text in (out / "skipped.jsonl").read_text().splitlines()]
    assert "00001_hair.png is 16x16" in json.dumps(line)
    assert sum(len(read_folder(out / split)) for split in ("train", "test")) == 4  # the face stays
