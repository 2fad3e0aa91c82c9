"""Tests import the builders beside them by plain name."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))


def pytest_configure() -> None:
    """A module's fixtures are made before any test's: the file of a recipe alone would be made with other threads."""
    torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _one_thread():
    """Tests run side by side; one thread each is faster than two that wait for one another."""
    torch.set_num_threads(1)
