"""Training state on disk, to continue: written whole or not at all, by any number of ranks and read by any other.

A state is a folder under `checkpoints/` in torch's distributed checkpoint format (DCP), one file a rank. It is written
beside its place, flushed, and renamed when all ranks are done: a folder under its final name is complete. "To resume,
run the same command again."
"""

from __future__ import annotations

import os
import shutil
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint import FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from likeness.parallel import ALONE, World
from likeness.types import InputError

FOLDER = "checkpoints"


def save_state(run: Path, seen: int, state: Mapping[str, Tensor], keep: int = 2, world: World = ALONE) -> Path:
    """Write `state`, tensors by name, after `seen` images; then delete all but the newest `keep`.

    Raises:
        InputError: the disk is full or the folder cannot be written; earlier states are untouched.
    """
    path = run / FOLDER / f"{seen:012d}"
    partial = path.with_suffix(".partial")
    try:
        with world.together(), writing(path):
            if world.main:
                shutil.rmtree(partial, ignore_errors=True)
                partial.mkdir(parents=True)
        with world.together(), writing(path), quiet():
            dcp.save(dict(state), storage_writer=FileSystemWriter(partial, sync_files=True), no_dist=world.size == 1)
        with world.together(), writing(path):
            if world.main:
                shutil.rmtree(path, ignore_errors=True)  # the same state, where a run is repeated
                os.replace(partial, path)
    except InputError:
        if world.main:
            shutil.rmtree(partial, ignore_errors=True)
        raise
    if world.main:
        for old in states(run)[:-keep]:
            shutil.rmtree(old, ignore_errors=True)  # what stays goes with the next one
    return path


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """What cannot be written within a `with` block is one sentence."""
    try:
        yield
    except (OSError, RuntimeError, CheckpointException) as error:
        raise InputError(
            f"cannot write the checkpoint {path}: {reason_of(error)}; earlier checkpoints are intact"
        ) from error


def states(run: Path) -> list[Path]:
    """The complete states of a run, oldest first."""
    return sorted(path for path in (run / FOLDER).glob("*") if path.is_dir() and path.name.isdigit())


def newest(run: Path) -> Path | None:
    """The newest state of a run, or None where there is none.

    Raises:
        InputError: the run has states of an earlier version only.
    """
    found = states(run)
    if not found and any((run / FOLDER).glob("*.pt")):
        raise InputError(f"{run} was begun by an earlier version: finish it with that, or choose another folder")
    return found[-1] if found else None


def entries(path: Path) -> dict[str, TensorStorageMetadata]:
    """What a state holds: shape and type of every tensor, by name.

    Raises:
        InputError: it cannot be read.
    """
    try:
        found = FileSystemReader(path).read_metadata().state_dict_metadata
    except Exception as error:
        raise unreadable(path, error) from error
    return {name: entry for name, entry in found.items() if isinstance(entry, TensorStorageMetadata)}


def read_into(path: Path, state: Mapping[str, Tensor], world: World = ALONE) -> None:
    """Fill the tensors of `state` from the state in `path`, each rank its part.

    Raises:
        InputError: it cannot be read.
    """
    try:
        with quiet():
            dcp.load(dict(state), storage_reader=FileSystemReader(path), no_dist=world.size == 1)
    except (Exception, CheckpointException) as error:
        raise unreadable(path, error) from error


def load_state(run: Path) -> dict[str, Tensor] | None:
    """All tensors of a run's newest state, in one piece on the CPU, or None where there is none.

    Raises:
        InputError: the newest state cannot be read.
    """
    path = newest(run)
    if path is None:
        return None
    state = {name: torch.empty(entry.size, dtype=entry.properties.dtype) for name, entry in entries(path).items()}
    read_into(path, state)
    return state


def unreadable(path: Path, error: BaseException) -> InputError:
    """What to say of a state that is damaged, or cannot be cut for so many ranks."""
    if "block boundary" in reason_of(error):  # torchao's
        return InputError(
            f"the 8-bit states in {path} cannot be cut for so many processes: go on with the number that wrote it, or "
            "a divisor or double of that"
        )
    return InputError(f"the checkpoint {path} cannot be read ({reason_of(error)}); delete it to resume before it")


def reason_of(error: BaseException) -> str:
    """The innermost reason, in one line: DCP wraps what one rank met."""
    if isinstance(error, CheckpointException):
        return "; ".join(f"{reason_of(inner)}" for inner, _ in error.failures.values())
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


@contextmanager
def quiet() -> Iterator[None]:
    """Without torch's remark that a single process is a single process."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        yield
