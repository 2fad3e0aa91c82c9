"""Files are written atomically, also by several processes at the same time."""

from __future__ import annotations

import pytest

from likeness.files import write_whole, writing_whole
from likeness.types import InputError


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
