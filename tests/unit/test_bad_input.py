"""Errors around the data commands: one sentence, exit code 2, no partial files, and the same command resumes later."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from chat_server import chat_server, reply_with
from hostile import bomb, full_disk, read_only, snapshot
from PIL import Image

from builders import run, save_components
from likeness.data.store import Store
from likeness.prepare.synthetic import write_synthetic

SIZE = 32

COMMANDS: dict[str, Callable[[Path, Path], tuple]] = {
    "ingest": lambda root, out: ("prepare", "ingest", root / "faces/train/images", out),
    "export imagefolder": lambda root, out: ("prepare", "export", root / "faces", out, "--format", "imagefolder"),
    "export webdataset": lambda root, out: ("prepare", "export", root / "faces", out, "--format", "webdataset"),
    "export parquet": lambda root, out: ("prepare", "export", root / "faces", out, "--format", "parquet"),
    "encode": lambda root, out: ("prepare", "encode", root / "faces", out, *components(root)),
    "encode captions": lambda root, out: (
        "prepare", "encode", root / "faces", out, *components(root), "--text-features",
    ),
    "synthetic": lambda root, out: ("prepare", "synthetic", out, "--count", 2, "--size", SIZE),
    "contact sheet": lambda root, out: ("prepare", "check", root / "faces", "--sheet", out / "sheet.html"),
    "mask": lambda root, out: (
        "mask", "mirror", root / "faces/train/masks/000000.png", "--out", out / "mask.png",
    ),
}  # fmt: skip
"""Commands that write to a separate folder: (input, output) -> arguments."""

IN_PLACE: dict[str, Callable[[Path], tuple]] = {
    "annotate": lambda root: ("prepare", "annotate", root / "faces", "--parser", "none"),
    "caption": lambda root: ("prepare", "caption", root / "faces", "--grammar"),
    "check": lambda root: ("prepare", "check", root / "faces"),
    "check --apply": lambda root: ("prepare", "check", root / "faces", "--apply"),
}
"""Commands that change a prepared folder."""


def components(root: Path) -> tuple:
    return "--components", root / "components", "--size", SIZE


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    """Two synthetic faces with CelebA's attributes, without sketches and with a fault, and tiny components."""
    root = tmp_path_factory.mktemp("made")
    write_synthetic(root / "faces", 2, SIZE, seed=0)
    rows = read_rows(root)
    for row in rows:
        (root / "faces/train" / row.pop("sketch_file_name")).unlink()
    rows[0] |= {"attributes": {"Male": True, "Smiling": True}}
    rows[1] |= {"attributes": {"Male": False, "Young": True}, "text": ["", "a face"]}
    write_rows(root, rows)
    save_components(root / "components")
    return root


@pytest.fixture
def root(made, tmp_path) -> Path:
    return Path(shutil.copytree(made, tmp_path / "root"))


def read_rows(root: Path) -> list[dict]:
    return [json.loads(line) for line in (root / "faces/train/metadata.jsonl").read_text().splitlines()]


def write_rows(root: Path, rows: list[dict]) -> None:
    (root / "faces/train/metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def error_message(capsys) -> str:
    """Return the error message on stderr."""
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("likeness: ")]
    assert len(lines) == 1
    return lines[0]


@pytest.mark.parametrize("name", COMMANDS)
def test_full_disk_or_read_only_folder(root, tmp_path, name, capsys):
    command, before = COMMANDS[name], snapshot(root)
    complete, out, locked = tmp_path / "whole", tmp_path / "out", tmp_path / "locked"
    locked.mkdir()
    with read_only(locked):
        assert run(*command(root, locked / "out")) == 2
        assert str(locked) in error_message(capsys)
        assert run(*command(root, locked)) == 2
        assert str(locked) in error_message(capsys)
    assert snapshot(locked) == {}
    code = run(*command(root, complete))
    assert code in (0, 1)  # 1: check found the fault
    wanted = snapshot(complete)
    sizes = sorted(map(len, wanted.values()))
    for most in (100, sizes[len(sizes) // 2] - 1, sizes[-1] - 1):
        with full_disk(most):
            assert run(*command(root, out)) == 2
        assert f"cannot write {tmp_path}" in error_message(capsys)
        assert snapshot(out).items() <= wanted.items() or name in ("ingest", "synthetic")  # records are written twice
    assert run(*command(root, out)) == code
    assert snapshot(out) == wanted
    (root / "faces" / "fixes.jsonl").unlink(missing_ok=True)
    assert snapshot(root) == before


@pytest.mark.parametrize("name", IN_PLACE)
def test_full_disk_or_read_only_prepared_folder(root, tmp_path, name, capsys):
    command = IN_PLACE[name]
    copy = Path(shutil.copytree(root, tmp_path / "copy"))
    before = snapshot(root)
    with read_only(root / "faces"):
        assert run(*command(root)) == 2
        assert str(root) in error_message(capsys)
    assert snapshot(root) == before
    with full_disk(100):
        assert run(*command(root)) == 2
        assert str(root) in error_message(capsys)
    after = snapshot(root)
    assert {key: after[key] for key in before} == before
    assert not {key for key in after.keys() - before.keys() if "before/" not in key and after[key]}
    code = run(*command(root))
    assert code == run(*command(copy))
    assert snapshot(root) == snapshot(copy)


def test_decompression_bombs(root, tmp_path, capsys):
    """Commands that process images individually skip the bomb; commands that need all images fail."""
    train = root / "faces/train"
    (train / "images/000001.png").write_bytes(bomb())
    (train / "masks/000000.png").write_bytes(bomb())
    rows = read_rows(root)
    before = snapshot(root)
    for name in ("encode", "mask"):
        assert run(*COMMANDS[name](root, tmp_path / "out")) == 2
        assert "too many pixels" in error_message(capsys)
    (tmp_path / "out").mkdir(exist_ok=True)
    assert not {name for name in snapshot(tmp_path / "out") if not name.startswith(("rows-", "latents-"))}
    assert run(*IN_PLACE["annotate"](root)) == 2
    assert "images/000001.png has too many pixels" in error_message(capsys)
    with chat_server(lambda *_: reply_with("A man with red hair and a smile.")) as server:
        assert run("prepare", "caption", root / "faces", "--vlm", server.address, "--prompts", "brief") == 1
        assert not server.requests  # neither the image nor the mask can be read
    assert capsys.readouterr().err.count("has too many pixels") == 2
    for file in ("answers.jsonl", "captions.jsonl", ".answers.jsonl.lock"):
        (train / file).unlink(missing_ok=True)
    write_rows(root, rows)
    assert run("prepare", "check", root / "faces", "--sheet", tmp_path / "sheet.html") == 1
    assert capsys.readouterr().out.count("has too many pixels") == 2
    assert (tmp_path / "sheet.html").is_file()
    (root / "faces" / "fixes.jsonl").unlink()
    assert snapshot(root) == before


@pytest.mark.parametrize("column", ["file_name", "mask_file_name"])
@pytest.mark.parametrize("name", ["../../secret.png", "/etc/hostname", "link.png"])
def test_paths_outside_the_data(root, tmp_path, column, name, capsys):
    Image.new("RGB", (SIZE, SIZE)).save(root / "secret.png")
    (root / "faces/train/link.png").symlink_to(root / "secret.png")
    rows = read_rows(root)
    write_rows(root, [rows[0], rows[1] | {column: name}])
    before = snapshot(root)
    commands = {key: command(root, tmp_path / "out") for key, command in COMMANDS.items() if key.startswith("en")}
    commands |= {key: command(root) for key, command in IN_PLACE.items() if not key.startswith("check")}
    if name != "link.png":  # export follows links to images in other folders
        commands |= {key: command(root, tmp_path / "out") for key, command in COMMANDS.items() if "export" in key}
    for command in commands.values():
        assert run(*command) == 2
        assert "points outside the folder" in error_message(capsys)
    assert not (tmp_path / "out").exists() or not snapshot(tmp_path / "out")
    assert snapshot(root) == before
    assert run(*IN_PLACE["check"](root)) == 1
    assert "points outside the folder" in capsys.readouterr().out


def test_full_disk_during_encoding(root, tmp_path, capsys):
    """The old store is used until the new one is complete."""
    out = tmp_path / "out"
    assert run(*COMMANDS["encode"](root, out)) == 0
    old = snapshot(out)
    Image.new("RGB", (SIZE, SIZE), (9, 99, 200)).save(root / "faces/train/images/000001.png")
    for most in (100, 700):
        with full_disk(most):
            assert run(*COMMANDS["encode"](root, out)) == 2
        assert "cannot write" in error_message(capsys)
        assert old.items() <= snapshot(out).items()
        assert len(Store(out)) == 2
    assert run(*COMMANDS["encode"](root, out)) == 0
    assert len(Store(out)) == 2
