"""Files are there whole or not at all, whoever writes them at the same time."""

from __future__ import annotations

import pytest

from likeness.files import write_whole, writing_whole
from likeness.types import InputError


def test_two_writers_of_one_file(tmp_path):
    """Processes of one evaluation do: each finishes its own, and the last one's is there."""
    path = tmp_path / "a.txt"
    with writing_whole(path) as file:
        file.write(b"slow")
        write_whole(path, "quick")
        assert path.read_text() == "quick"
    assert path.read_text() == "slow"
    assert [entry.name for entry in tmp_path.iterdir()] == ["a.txt"]


def test_what_fails_leaves_nothing(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="cannot write"):
        write_whole(tmp_path / "file" / "a.txt", "below a file")
    with pytest.raises(RuntimeError), writing_whole(tmp_path / "b.txt"):
        raise RuntimeError
    assert [entry.name for entry in tmp_path.iterdir()] == ["file"]
