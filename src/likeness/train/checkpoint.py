"""Training state on disk: written whole or not at all, the newest complete one found again.

A state is one file under `checkpoints/`, written to a temporary name, flushed and renamed: a file under its final
name is complete. "To resume, run the same command again."
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch

from likeness.types import InputError

FOLDER = "checkpoints"


def save_state(run: Path, seen: int, state: dict[str, Any], keep: int = 2) -> Path:
    """Write `state` after `seen` images, then delete all but the newest `keep`.

    Raises:
        InputError: the disk is full or the folder cannot be written; earlier states are untouched.
    """
    folder = run / FOLDER
    path = folder / f"{seen:012d}.pt"
    partial = path.with_suffix(".partial")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with partial.open("wb") as file:
            torch.save(state, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    except (OSError, RuntimeError) as error:  # torch reports a full disk as RuntimeError
        partial.unlink(missing_ok=True)
        raise InputError(f"cannot write the checkpoint {path}: {error}; earlier checkpoints are intact") from error
    for old in states(run)[:-keep]:
        old.unlink()
    return path


def states(run: Path) -> list[Path]:
    """The complete states of a run, oldest first."""
    return sorted((run / FOLDER).glob("*.pt"))


def load_state(run: Path) -> dict[str, Any] | None:
    """The newest state of a run, on the CPU, or None where there is none.

    Raises:
        InputError: the newest state cannot be read.
    """
    found = states(run)
    if not found:
        return None
    try:
        return torch.load(found[-1], map_location="cpu", weights_only=True)
    except Exception as error:
        raise InputError(
            f"the checkpoint {found[-1]} cannot be read ({error}); delete it to resume before it"
        ) from error
