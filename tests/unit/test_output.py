"""Output names: folders, protected inputs, concurrent processes, and the files of an interrupted command."""

from __future__ import annotations

import errno
import multiprocessing
import os
import signal
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from PIL import Image

from builders import run, tiny_pipeline
from likeness.cli import main
from likeness.cli.output import image_names, save_image
from likeness.data.synthetic import draw_face
from likeness.files import writing_whole
from likeness.pipelines.generate import batches
from likeness.types import InputError, PortraitRequest

DEADLINE = 300
"""Seconds after which a process counts as hung."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("output")
    tiny_pipeline().save_pretrained(root / "model")
    face = draw_face(0, 0, 64)
    Image.fromarray(face.mask).save(root / "mask.png")
    Image.fromarray(face.sketch).save(root / "sketch.png")
    return root


def start(folder: Path, *arguments: object, stderr: int | None = None) -> multiprocessing.Process:
    """A command in a process of its own: a fork, so that torch is not imported again.

    It writes to the files `out` and `err` in `folder`, unless `stderr` is given.
    """
    words = [str(word) for word in ("generate", "a woman", "--model", folder / "model", *arguments)]

    def child() -> None:
        signal.signal(signal.SIGINT, signal.default_int_handler)
        os.environ["TOKENIZERS_PARALLELISM"] = "false"  # tokenizers warn of forks
        sys.stdout = (folder / "out").open("a", buffering=1)
        sys.stderr = (folder / "err").open("a", buffering=1) if stderr is None else os.fdopen(stderr, "w", buffering=1)
        main(words)

    (folder / "out").write_text("")
    (folder / "err").write_text("")
    process = multiprocessing.get_context("fork").Process(target=child)
    process.start()
    return process


def names_in(folder: Path) -> list[str]:
    """All files, hidden ones, too."""
    return sorted(path.name for path in folder.iterdir())


def test_folders(folder, tmp_path, capsys):
    given = ("generate", "--model", folder / "model", "--format", "webp", "--seed", 1)
    for _ in range(2):
        assert run(*given, "--out", f"{tmp_path}/a/b/", "--count", 2) == 0
    assert names_in(tmp_path / "a" / "b") == [f"portrait-00{number}.webp" for number in (1, 2, 3, 4)]
    assert capsys.readouterr().out.splitlines()[-1] == f"{tmp_path}/a/b/portrait-004.webp  seed 2"
    (tmp_path / "c").mkdir()
    assert run(*given, "--out", tmp_path / "c") == 0
    assert names_in(tmp_path / "c") == ["portrait-001.webp"]
    (tmp_path / "c" / "portrait-002.png").write_bytes(b"another format")
    assert run(*given, "--out", tmp_path / "c") == 0
    assert names_in(tmp_path / "c") == ["portrait-001.webp", "portrait-002.png", "portrait-003.webp"]
    replay = ("replay", tmp_path / "c" / "portrait-001.webp", "--model", folder / "model")
    assert run(*replay, "--out", f"{tmp_path}/again/") == 0
    assert names_in(tmp_path / "again") == ["portrait-001.webp"]
    assert run(*given, "--out", f"{folder}/mask.png/") == 2
    assert "is not a writable folder" in capsys.readouterr().err
    (tmp_path / "c" / "portrait-001.webp").rename(tmp_path / "c" / "noext")
    for out in ("new", "d/"):
        assert run("replay", tmp_path / "c" / "noext", "--model", folder / "model", "--out", f"{tmp_path}/{out}") == 0
    assert (tmp_path / "new.png").is_file()
    assert names_in(tmp_path / "d") == ["portrait-001.png"]


def test_unreachable_folders(tmp_path):
    """Without permission to enter, and a loop of links."""
    (tmp_path / "closed").mkdir()
    (tmp_path / "one").symlink_to("other")
    (tmp_path / "other").symlink_to("one")
    (tmp_path / "closed").chmod(0)
    user = os.geteuid()
    if user == 0:
        os.seteuid(65534)  # nobody
    try:
        for out in ("closed/sub/x.png", "closed/x.png", "closed/", "one/x.png", "one/"):
            with pytest.raises(InputError, match="Cannot write to"):
                image_names(f"{tmp_path}/{out}", "png", 1, [])
    finally:
        os.seteuid(user)
        (tmp_path / "closed").chmod(0o755)


def test_a_file_is_written_again(folder, tmp_path):
    for _ in range(2):
        assert run("generate", "--model", folder / "model", "--out", tmp_path / "face.jpg") == 0
    assert names_in(tmp_path) == ["face.jpg"]


@pytest.mark.parametrize(
    "spelling", ["mask.png", "./sub/../mask.png", "link.png", "hard.png", "mask", "parts/hair.png"]
)
def test_inputs_are_not_overwritten(folder, tmp_path, monkeypatch, capsys, spelling):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "sub").mkdir()
    (tmp_path / "parts").mkdir()
    original = (folder / "mask.png").read_bytes()
    (tmp_path / "mask.png").write_bytes(original)
    (tmp_path / "link.png").symlink_to("mask.png")
    os.link("mask.png", "hard.png")
    os.link("mask.png", "parts/hair.png")
    with pytest.raises(InputError, match="--out would overwrite the input"):
        image_names(spelling, "png", 1, [Path("parts" if "parts" in spelling else "mask.png")])
    if "parts" not in spelling:
        assert run("generate", "--model", folder / "model", "--mask", "mask.png", "--out", spelling) == 2
        assert "--out would overwrite the input mask.png" in capsys.readouterr().err
    assert (tmp_path / "mask.png").read_bytes() == original


def test_numbered_names_and_replays_spare_inputs_too(folder, tmp_path, capsys):
    (tmp_path / "a-2.png").write_bytes((folder / "mask.png").read_bytes())
    given = ("generate", "--model", folder / "model", "--mask", tmp_path / "a-2.png")
    assert run(*given, "--count", 2, "--out", tmp_path / "a.png") == 2
    assert "would overwrite the input" in capsys.readouterr().err
    assert run(*given, "--out", tmp_path / "b.png") == 0
    assert run("replay", tmp_path / "b.png", "--model", folder / "model", "--out", tmp_path / "b.png") == 2
    assert "would overwrite the input" in capsys.readouterr().err


@pytest.mark.parametrize("links", [True, False])
def test_a_name_is_taken_once(tmp_path, monkeypatch, links):
    """Two commands that have seen the same empty folder, also on a file system without hard links."""

    def no_links(*arguments, **options):
        raise OSError(errno.EPERM, "no hard links here")

    if not links:
        monkeypatch.setattr(os, "link", no_links)
    image = Image.new("RGB", (8, 8))
    one, other = (image_names(f"{tmp_path}/", "png", 2, []) for _ in range(2))
    saved = [save_image(image, None, *names).name for names in (one, other, other, one)]
    assert saved == names_in(tmp_path) == [f"portrait-00{number}.png" for number in (1, 2, 3, 4)]


@pytest.mark.parametrize("overwrite", [True, False])
def test_nothing_is_left_of_a_file_that_failed(tmp_path, overwrite):

    def fail(error: type[BaseException]) -> None:
        with writing_whole(tmp_path / "a", overwrite=overwrite) as file:
            file.write(b"half")
            raise error

    for error in (KeyboardInterrupt, SystemExit, RuntimeError):
        with pytest.raises(error):
            fail(error)
    assert names_in(tmp_path) == []
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(InputError), writing_whole(tmp_path / "file" / "a", overwrite=overwrite):
        pass


def test_images_are_made_one_by_one_on_a_cpu_and_in_batches_elsewhere():
    requests = [PortraitRequest(seed=seed) for seed in range(10)]
    for device, sizes in (("cpu", [1] * 10), ("cuda", [4, 4, 2])):
        found = list(batches(requests, SimpleNamespace(_execution_device=torch.device(device))))
        assert [len(batch) for _, batch in found] == sizes
        assert [done for done, _ in found] == [sum(sizes[:number]) for number in range(len(sizes))]
        assert [one for _, batch in found for one in batch] == requests


def printed_names(folder: Path) -> list[str]:
    """The files that commands reported."""
    return [Path(line.split("  seed ")[0]).name for line in (folder / "out").read_text().splitlines()]


def test_two_processes_at_once(folder, tmp_path):
    both = [start(folder, "--count", 5, "--out", f"{tmp_path}/out/") for _ in range(2)]
    for process in both:
        process.join(DEADLINE)
        assert process.exitcode == 0, (folder / "err").read_text()
    assert sorted(printed_names(folder)) == names_in(tmp_path / "out")
    assert names_in(tmp_path / "out") == [f"portrait-{number:03d}.png" for number in range(1, 11)]


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_stopped_command_keeps_what_is_finished(folder, tmp_path, number, code):
    """With more images than can be made until the signal is sent."""
    process = start(folder, "--count", 1000, "--steps", 100, "--out", f"{tmp_path}/out/")
    end = time.monotonic() + DEADLINE
    try:
        while not list(tmp_path.glob("out/*.png")):
            assert process.exitcode is None, (folder / "err").read_text()
            assert time.monotonic() < end
            time.sleep(0.05)
        assert process.pid
        os.kill(process.pid, number)
        process.join(DEADLINE)
    finally:
        process.kill()
    assert process.exitcode == code
    err = (folder / "err").read_text()
    assert err.strip() == ("likeness: stopped" if number == signal.SIGINT else "")
    found = names_in(tmp_path / "out")
    assert 1 <= len(found) < 1000
    assert printed_names(folder) in (found, found[:-1])  # the signal may come between an image and its line
    for name in found:
        Image.open(tmp_path / "out" / name).load()


def test_results_go_to_stdout_although_a_bar_is_shown(folder, tmp_path):
    pty = pytest.importorskip("pty")
    terminal, own = pty.openpty()
    process = start(folder, "--count", 2, "--seed", 3, "--out", tmp_path / "a.png", stderr=own)
    os.close(own)
    shown: list[bytes] = []

    def read() -> None:
        try:
            while part := os.read(terminal, 1024):
                shown.append(part)
        except OSError:  # how Linux says that the other end is closed
            pass

    reader = threading.Thread(target=read)
    reader.start()
    process.join(DEADLINE)
    reader.join(DEADLINE)
    os.close(terminal)
    assert process.exitcode == 0
    assert (folder / "out").read_text() == f"{tmp_path}/a-1.png  seed 3\n{tmp_path}/a-2.png  seed 4\n"
    assert b"Generating" in b"".join(shown)
