"""Prepared folders: one reader of the metadata for all commands, one writer at a time, no files but regular ones."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest

from builders import run, save_components
from likeness.data.folder import read_folder
from likeness.files import locked
from likeness.prepare.synthetic import write_synthetic

SIZE = 32


@pytest.fixture(scope="module")
def prepared(tmp_path_factory) -> Path:
    """Two synthetic faces and tiny components."""
    root = tmp_path_factory.mktemp("prepared")
    write_synthetic(root / "faces", 2, SIZE)
    save_components(root / "components")
    return root


@pytest.fixture
def faces(prepared, tmp_path) -> Path:
    """A copy of the faces without splits, for a test to change."""
    return Path(shutil.copytree(prepared / "faces/train", tmp_path / "faces"))


def commands(prepared: Path, faces: Path, tmp_path: Path) -> dict[str, tuple[object, ...]]:
    """Every command that reads a prepared folder."""
    return {
        "check": ("prepare", "check", faces),
        "encode": ("prepare", "encode", faces, tmp_path / "s", "--components", prepared / "components", "--size", SIZE),
        "ingest": ("prepare", "ingest", faces, tmp_path / "ingested"),
        "export": ("prepare", "export", faces, tmp_path / "exported", "--format", "imagefolder"),
        "annotate": ("prepare", "annotate", faces, "--parser", "none"),
    }


@pytest.mark.parametrize(
    "change",
    [
        lambda text: text.replace("/", "\\\\"),
        lambda text: "\ufeff" + text,
        lambda text: text.replace('"text"', '"score": NaN, "more": {"a": -Infinity}, "mask_made_by": null, "text"'),
        lambda text: text.replace("\n", "\r\n"),
    ],
    ids=["backslashes", "byte order mark", "NaN", "Windows lines"],
)
def test_metadata_of_other_tools(prepared, faces, tmp_path, change):
    path = faces / "metadata.jsonl"
    path.write_bytes(change(path.read_text(encoding="utf-8")).encode())
    for name, command in commands(prepared, faces, tmp_path).items():
        assert run(*command) == 0, name
    plain = read_folder(prepared / "faces")
    for folder, root in ((faces, faces), (tmp_path / "ingested", tmp_path / "ingested/train")):
        text = (root / "metadata.jsonl").read_text(encoding="utf-8")
        assert not [word for word in ("NaN", "Infinity", "\\\\", "\ufeff") if word in text]
        assert [row["text"] for row in read_folder(folder)] == [row["text"] for row in plain]
        assert all(row["mask_file_name"].is_file() and "score" not in row for row in read_folder(folder))


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda root: os.mkfifo(root / "images/pipe.png"), "is not a regular file"),
        (lambda root: (root / "images/pipe.png").symlink_to("/dev/zero"), "points outside the folder"),
        (lambda root: None, "is not valid JSON in UTF-8"),
    ],
    ids=["pipe", "device", "UTF-16"],
)
def test_unusable_metadata(prepared, faces, tmp_path, capsys, build, message):
    """No command blocks or reads without end."""
    path = faces / "metadata.jsonl"
    row = {"file_name": "images/pipe.png"}
    build(faces)
    encoding = "utf-16" if "UTF-8" in message else "utf-8"
    path.write_text(path.read_text(encoding="utf-8") + json.dumps(row) + "\n", encoding=encoding)
    for name, command in commands(prepared, faces, tmp_path).items():
        if name in ("ingest", "export") and encoding == "utf-8":
            continue  # they skip the file
        assert run(*command) == (1 if name == "check" else 2), name
        printed = capsys.readouterr()
        assert message in printed.out + printed.err, name


def test_one_writer_at_a_time(prepared, faces, tmp_path, capsys):
    """A second command that would change a folder fails at once with code 75; unfinished files are deleted."""
    whole = prepared / "faces"
    cases = {
        "annotate": (faces, ("prepare", "annotate", faces, "--parser", "none")),
        "caption": (faces, ("prepare", "caption", faces, "--grammar")),
        "check": (faces, ("prepare", "check", faces, "--apply")),
        "synthetic": (tmp_path / "s", ("prepare", "synthetic", tmp_path / "s", "--count", 1, "--size", SIZE)),
        "ingest": (tmp_path / "i", ("prepare", "ingest", whole, tmp_path / "i")),
        "export": (tmp_path / "e", ("prepare", "export", whole, tmp_path / "e", "--format", "webdataset")),
    }
    for name, (folder, command) in cases.items():
        folder.mkdir(exist_ok=True)
        with locked(folder):
            before = sorted(folder.rglob("*"))
            assert run(*command) == 75, name
            assert f"another process is writing to {folder}" in capsys.readouterr().err
            assert sorted(folder.rglob("*")) == before
        inner = folder / "images" if folder == faces else folder
        left = [inner / f".{name}.png.0123abcd.partial", inner / ".mine.partial"]
        for path in left:
            path.touch()
        if folder != faces:
            left.pop().unlink()  # a new folder must not contain files of others
        assert run(*command) in (0, 1), name
        assert [path.exists() for path in left] == [False, True][: len(left)], name
        assert not list(folder.rglob(".lock"))
