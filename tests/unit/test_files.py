"""Files are written atomically, also by several processes at the same time."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import threading

import pytest

from likeness.files import exchange, locked, read_json, write_whole, writing_folder, writing_whole
from likeness.types import InputError, TryAgain


def test_two_writers_of_one_file(tmp_path):
    """The processes of an evaluation do this: the file of the last one to finish remains."""
    path = tmp_path / "a.txt"
    with writing_whole(path) as file:
        file.write(b"slow")
        write_whole(path, "quick")
        assert path.read_text() == "quick"
    assert path.read_text() == "slow"
    assert [entry.name for entry in tmp_path.iterdir()] == ["a.txt"]


def test_failed_writes_leave_no_files(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="cannot write"):
        write_whole(tmp_path / "file" / "a.txt", "below a file")
    with pytest.raises(RuntimeError), writing_whole(tmp_path / "b.txt"):
        raise RuntimeError
    assert [entry.name for entry in tmp_path.iterdir()] == ["file"]


def test_locks_end_with_their_process(tmp_path):
    """A second process fails at once, or waits; a killed one leaves nothing locked."""
    hold = "import sys, time; from pathlib import Path; from likeness.files import locked\n"
    hold += "with locked(Path(sys.argv[1])): print('locked', flush=True); time.sleep(60)"
    with subprocess.Popen([sys.executable, "-c", hold, tmp_path], stdout=subprocess.PIPE) as process:
        assert process.stdout.readline() == b"locked\n"
        with pytest.raises(TryAgain, match="another process is writing to"), locked(tmp_path):
            pass
        threading.Timer(0.2, process.kill).start()
        with locked(tmp_path, wait=True):
            assert process.wait() < 0
    with locked(tmp_path):
        pass
    assert list(tmp_path.iterdir()) == []


def test_private_files_stay_private(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("old")
    path.chmod(0o600)
    write_whole(path, "new")
    assert path.read_text() == "new"
    assert path.stat().st_mode & 0o777 == 0o600


def test_folders_behind_links_are_replaced(tmp_path):
    (tmp_path / "disk").mkdir()
    (tmp_path / "model").symlink_to(tmp_path / "disk" / "model")
    for content in ("first", "second", "third"):
        with writing_folder(tmp_path / "model") as partial:
            (partial / "a.txt").write_text(content)
        assert (tmp_path / "disk" / "model" / "a.txt").read_text() == content
    assert sorted(path.name for path in tmp_path.iterdir()) == ["disk", "model"]
    assert [path.name for path in (tmp_path / "disk").iterdir()] == ["model"]


def test_folders_do_not_replace_files(tmp_path):
    (tmp_path / "model").touch()
    with pytest.raises(InputError, match="model is not a folder"), writing_folder(tmp_path / "model"):
        pass
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_two_writers_of_one_folder(tmp_path):
    """The folder of the last one to finish remains, complete; what a killed process left is deleted."""
    left = tmp_path / ".model.0123abcd.partial"
    left.mkdir()
    os.utime(left, (1e9, 1e9))
    with writing_folder(tmp_path / "model") as slow:
        (slow / "a0").touch()
        with writing_folder(tmp_path / "model") as quick:
            (quick / "b0").touch()
        (slow / "a1").touch()
    assert sorted(path.name for path in (tmp_path / "model").iterdir()) == ["a0", "a1"]
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_folders_are_exchanged_without_the_system_call(tmp_path, monkeypatch):
    """If the second step fails, the former folder has its name again."""
    monkeypatch.setattr("likeness.files.os.name", "other")
    one, other = tmp_path / "one", tmp_path / "other"
    for folder in (one, other):
        folder.mkdir()
        (folder / folder.name).touch()
    exchange(one, other)
    assert [path.name for path in other.iterdir()] == ["one"]
    shutil.rmtree(one)
    with pytest.raises(FileNotFoundError):
        exchange(one, other)
    assert [path.name for path in tmp_path.iterdir()] == ["other"]


def test_json_objects_only(tmp_path):
    path = tmp_path / "a.json"
    path.write_bytes(b"\xef\xbb\xbf" + '{"name": "é"}'.encode())
    assert read_json(path) == {"name": "é"}
    cases = {"not valid JSON": [b"{", b'"\xff"', b"[" * 100_000], "contains a list": [b"[1]"], "contains a int": [b"1"]}
    for message, contents in cases.items():
        for content in contents:
            path.write_bytes(content)
            with pytest.raises(InputError, match=message):
                read_json(path)
    with pytest.raises(InputError, match="cannot be read"):
        read_json(tmp_path / "absent.json")
