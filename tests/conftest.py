"""Tests import the builders beside them by plain name."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))

from forked_commands import forked_commands


def pytest_configure() -> None:
    """A module's fixtures are made before any test's: the file of a recipe alone would be made with other threads."""
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def programs(tmp_path_factory) -> Iterator[Path]:
    """A folder with the programs `likeness` and `python`, which start at once (`forked_commands`)."""
    with forked_commands(tmp_path_factory.mktemp("programs")) as folder:
        yield folder


@pytest.fixture(scope="session")
def prepared_faces(tmp_path_factory) -> Path:
    """Ten synthetic faces, tiny components and shards (`runs.prepare`), which no test changes."""
    from runs import prepare  # the imports of a training

    return prepare(tmp_path_factory.mktemp("prepared"), 10)


@pytest.fixture(autouse=True)
def _one_thread():
    """Tests run side by side; one thread each is faster than two that wait for one another."""
    torch.set_num_threads(1)
