"""Export, and ingest of the export, preserve images, conditions, captions and all other columns."""

from __future__ import annotations

import io
import json
import shutil
import tarfile
from pathlib import Path

import numpy as np
import pyarrow.parquet
import pytest
import sample_datasets
from PIL import Image

from builders import run
from likeness.conditions import CONDITIONS
from likeness.data.folder import read_folder, read_record, root_of
from likeness.data.synthetic import draw_face
from likeness.files import partial_name
from likeness.prepare.check import check_folder
from likeness.prepare.export import WRITERS, export
from likeness.prepare.fix import apply_fixes
from likeness.prepare.ingest.write import ingest
from likeness.types import InputError

FILE_COLUMNS = ("file_name", "mask_file_name", "sketch_file_name")


@pytest.fixture
def folder(tmp_path) -> Path:
    """A prepared folder of two splits; some rows lack some columns."""
    sample_datasets.imagefolder(tmp_path / "source")
    ingest(tmp_path / "source", tmp_path / "folder")
    return tmp_path / "folder"


def contents(folder: Path, split: str) -> list[dict[str, object]]:
    """Rows of a split with the contents of their files."""
    rows = []
    for row in read_folder(folder / split):
        points = json.loads(row.pop("keypoints_file_name").read_text()) if "keypoints_file_name" in row else None
        files = {
            column: (row.pop(column).name, path.read_bytes())
            for column, path in list(row.items())
            if column in FILE_COLUMNS
        }
        rows.append({**row, **files, "keypoints": points})
    return rows


@pytest.mark.parametrize("form", WRITERS)
def test_round_trip(folder, tmp_path, form, capsys):
    assert run("prepare", "export", folder, tmp_path / "out", "--format", form) == 0
    assert capsys.readouterr().out == f"{tmp_path / 'out'}: 2 train, 1 test, 0 skipped\n"
    assert run("prepare", "ingest", tmp_path / "out", tmp_path / "back") == 0
    assert f"is in the format {form}" in capsys.readouterr().err
    for split in ("train", "test"):
        assert contents(tmp_path / "back", split) == contents(folder, split)


@pytest.mark.parametrize("form", WRITERS)
def test_license_and_split_are_kept(tmp_path, form):
    sample_datasets.celebamask(tmp_path / "CelebAMask-HQ")
    ingest(tmp_path / "CelebAMask-HQ", tmp_path / "folder", held_out=1)
    export(tmp_path / "folder", tmp_path / "out", form)
    ingest(tmp_path / "out", tmp_path / "back")
    first, back = read_record(tmp_path / "folder"), read_record(tmp_path / "back")
    assert "no redistribution" in back["license"]
    assert back["license"] == first["license"]
    assert read_record(tmp_path / "out")["split_is"] == first["split_is"]


@pytest.mark.parametrize("form", WRITERS)
def test_interrupted_export_resumes(tmp_path, form):
    sample_datasets.parquet(tmp_path / "source")
    ingest(tmp_path / "source", tmp_path / "folder")
    export(tmp_path / "folder", tmp_path / "whole", form, shard=5)

    def stop(done: int, total: int) -> None:
        if done == 13:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        export(tmp_path / "folder", tmp_path / "out", form, shard=5, progress=stop)
    assert not list((tmp_path / "out").rglob("*.partial"))
    written = [path for path in (tmp_path / "out").rglob("*.*") if path.suffix not in (".json", ".jsonl")]
    before = {path: path.stat().st_mtime_ns for path in written}
    assert before
    killed = [partial_name(tmp_path / "out" / place / "0.png") for place in ("data", "train", "train/images")]
    for path in killed:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"unfinished")
    export(tmp_path / "folder", tmp_path / "out", form, shard=5)
    assert not any(path.exists() for path in killed)
    assert all(path.stat().st_mtime_ns == moment for path, moment in before.items())  # not rewritten
    names = [path.relative_to(tmp_path / "whole") for path in (tmp_path / "whole").rglob("*.*")]
    assert all((tmp_path / "out" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes() for name in names)
    ingest(tmp_path / "out", tmp_path / "back")
    assert contents(tmp_path / "back", "train") == contents(tmp_path / "folder", "train")


def test_arrays_keep_their_suffix(folder, tmp_path):
    """A mask as an array stays one; its content under the name of a PNG could not be read."""
    root = root_of(folder)
    rows = [json.loads(line) for line in (root / "metadata.jsonl").read_text().splitlines()]
    (root / "masks").mkdir(exist_ok=True)
    np.save(root / "masks" / "array.npy", draw_face(0, 0, 64).mask)
    rows[0]["mask_file_name"] = "masks/array.npy"
    (root / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    export(folder, tmp_path / "out", "imagefolder")
    row = next(row for row in read_folder(tmp_path / "out") if row["file_name"].stem == Path(rows[0]["file_name"]).stem)
    assert row["mask_file_name"].suffix == ".npy"
    assert (CONDITIONS["mask"].read(row["mask_file_name"]).raw == draw_face(0, 0, 64).mask).all()


@pytest.mark.parametrize("form", WRITERS)
def test_changed_files_are_not_mixed(folder, tmp_path, form, capsys):
    """An export of files that changed since is rejected: its shards are those of the former files."""
    command = ("prepare", "export", folder, tmp_path / "out", "--format", form)
    assert run(*command) == run(*command) == 0
    Image.new("RGB", (64, 64), "blue").save(read_folder(folder)[0]["file_name"])
    capsys.readouterr()
    assert run(*command) == 2
    assert f"{tmp_path / 'out'} was written with files " in capsys.readouterr().err


@pytest.mark.parametrize("again", ["export", "ingest"])
def test_removed_rows_stay_removed(folder, tmp_path, again):
    train = folder / "train"
    shutil.copyfile(train / "images/0.png", train / "images/2.png")
    with (train / "metadata.jsonl").open("a") as metadata:
        metadata.write(json.dumps({"file_name": "images/2.png"}) + "\n")
    duplicates = [found for found in check_folder(train).findings if found.kind == "duplicate"]
    assert apply_fixes(train, duplicates) == {"drop-row": 1}
    form = ("--format", "imagefolder") if again == "export" else ()
    assert run("prepare", again, train, tmp_path / "out", *form) == 0
    assert len(read_folder(tmp_path / "out")) == len(read_folder(train)) == 2


def test_names_with_points_are_unique(tmp_path):
    rows = [{"file_name": name} for name in ("img.1.png", "img_1.png")]
    for number, row in enumerate(rows):
        sample_datasets.put(tmp_path / "source", row["file_name"], sample_datasets.image(number))
    sample_datasets.put(tmp_path / "source", "metadata.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
    export(tmp_path / "source", tmp_path / "out", "webdataset")
    with tarfile.open(tmp_path / "out" / "train-000000.tar") as archive:
        assert archive.getnames() == ["img_1.png", "img_1.json", "img_1-2.png", "img_1-2.json"]


def put_rows(source: Path, rows: list[dict[str, object]]) -> None:
    """Write a prepared folder with these columns and an image per row."""
    rows = [{"file_name": f"{number}.png", **row} for number, row in enumerate(rows)]
    for number, row in enumerate(rows):
        sample_datasets.put(source, row["file_name"], sample_datasets.image(number))
    sample_datasets.put(source, "metadata.jsonl", "".join(json.dumps(row) + "\n" for row in rows))


@pytest.mark.parametrize(
    "attributes", [[{"Smiling": True}, {"age": 34, "Smiling": False}], [{}, {}], [{}, {"A": True}]]
)
@pytest.mark.parametrize("form", WRITERS)
def test_attributes_of_any_kind(tmp_path, form, attributes):
    """Attributes that are not all true or false are stored as JSON in tables."""
    put_rows(tmp_path / "source", [{"attributes": has} for has in attributes])
    assert run("prepare", "export", tmp_path / "source", tmp_path / "out", "--format", form) == 0
    ingest(tmp_path / "out", tmp_path / "back")
    assert [row["attributes"] for row in read_folder(tmp_path / "back")] == attributes


@pytest.mark.parametrize("form", WRITERS)
def test_columns_of_any_kind(tmp_path, form):
    half = "half \ud83d"  # a lone surrogate
    row = {"id": 2**64, "attributes": "a", "aligned": {"photo": half}, "text": half if form != "parquet" else "a face"}
    put_rows(tmp_path / "source", [row, {"attributes": {"a": True}}])
    assert run("prepare", "export", tmp_path / "source", tmp_path / "out", "--format", form) == 0


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"image": "https://example.com/0.png"}, "'image' of the metadata has the name of an image in Parquet: rename"),
        ({"keypoints": [[1, 2]]}, "the column 'keypoints' cannot be written to Parquet"),
        ({"place": "half \ud83d"}, "the column 'place' cannot be written to Parquet"),
    ],
)
def test_columns_that_parquet_lacks(tmp_path, row, message, capsys):
    put_rows(tmp_path / "source", [row])
    assert run("prepare", "export", tmp_path / "source", tmp_path / "out", "--format", "parquet") == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("form", WRITERS)
def test_splits_of_any_name(folder, tmp_path, form, capsys):
    """Other spellings of a split are known; any other folder is not exported as training data."""
    (folder / "test").rename(folder / "Testing")
    assert export(folder, tmp_path / "out", form)["test"] == 1
    (folder / "Testing").rename(folder / "heldout")
    assert run("prepare", "export", folder, tmp_path / "other", "--format", form) == 2
    assert "heldout is not named like a split: rename it to train, validation or test" in capsys.readouterr().err


def test_webdataset_order(folder, tmp_path):
    export(folder, tmp_path / "out", "webdataset")
    with tarfile.open(tmp_path / "out" / "train-000000.tar") as archive:
        names = archive.getnames()
    assert names[:4] == ["0.png", "0.mask.png", "0.json", "0.txt"]
    assert all(name.startswith("1.") for name in names[4:])  # the files of a sample are adjacent


def test_parquet_has_hugging_face_metadata(folder, tmp_path):
    export(folder, tmp_path / "out", "parquet")
    table = pyarrow.parquet.read_table(tmp_path / "out" / "data" / "train-00000-of-00001.parquet")
    features = json.loads(table.schema.metadata[b"huggingface"])["info"]["features"]
    assert features == {name: {"_type": "Image"} for name in ("image", "mask", "sketch")}
    row = table.to_pylist()[0]
    assert row["image"]["path"] == "0.png"
    assert Image.open(io.BytesIO(row["mask"]["bytes"])).mode == "P"
    assert row["sketch"] is None
    assert row["text"] == ["face 0", "smiling"]
    assert np.shape(row["keypoints"]["points"]) == (68, 2)


def test_rejected_input(folder, tmp_path, capsys):
    assert (
        run("prepare", "export", tmp_path / "source" / "train" / "images", tmp_path / "out", "--format", "parquet") == 2
    )
    assert "has no metadata.jsonl" in capsys.readouterr().err
    export(folder, tmp_path / "out", "parquet")
    assert run("prepare", "export", folder, tmp_path / "out", "--format", "webdataset") == 2
    assert "was written with " in capsys.readouterr().err
    assert run("prepare", "export", folder, folder, "--format", "webdataset") == 2
    assert "was written with " in capsys.readouterr().err
    sample_datasets.put(tmp_path, "file", "not a folder")
    assert run("prepare", "export", folder, tmp_path / "file" / "out", "--format", "webdataset") == 2
    assert "cannot write" in capsys.readouterr().err
    (folder / "train" / "metadata.jsonl").write_text('{"file_name": "../../secret.png"}\n')
    with pytest.raises(InputError, match="points outside the folder"):
        export(folder, tmp_path / "other", "imagefolder")
