"""Training checkpoints: written atomically, by any number of ranks and read by any other number.

A checkpoint is a folder under `checkpoints/` in torch's distributed checkpoint format (DCP), one file per rank. DCP
writes the file `.metadata` atomically when all ranks are done: a folder without it is incomplete and ignored.
"""

from __future__ import annotations

import shutil
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint import FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from likeness.files import first_line
from likeness.parallel import SINGLE_PROCESS, World
from likeness.types import InputError

FOLDER = "checkpoints"


def save_checkpoint(
    run: Path, seen: int, tensors: Mapping[str, Tensor], keep: int = 2, world: World = SINGLE_PROCESS
) -> None:
    """Write `tensors`, by name, after `seen` images; then delete all but the newest `keep` checkpoints. Raises
    `InputError` if the disk is full or the folder cannot be written; earlier checkpoints are intact.
    """
    path = run / FOLDER / f"{seen:012d}"
    try:
        with world.joint_errors(), write_errors(path):
            if world.main:
                shutil.rmtree(path, ignore_errors=True)  # an incomplete one
                path.mkdir(parents=True)
        with world.joint_errors(), write_errors(path), without_warning():
            dcp.save(dict(tensors), storage_writer=FileSystemWriter(path, sync_files=True), no_dist=world.size == 1)
    except InputError:
        if world.main:
            shutil.rmtree(path, ignore_errors=True)
        raise
    if world.main:
        for old in checkpoints(run)[:-keep]:
            shutil.rmtree(old, ignore_errors=True)  # what remains is deleted with the next one


@contextmanager
def write_errors(path: Path) -> Iterator[None]:
    """Turn errors of writing within a `with` block into an `InputError`."""
    try:
        yield
    except (OSError, RuntimeError, CheckpointException) as error:
        raise InputError(
            f"cannot write the checkpoint {path}: {reason_of(error)}; earlier checkpoints are intact"
        ) from error


def checkpoints(run: Path) -> list[Path]:
    """Return the complete checkpoints of a run, oldest first."""
    return sorted(path.parent for path in (run / FOLDER).glob("*/.metadata") if path.parent.name.isdigit())


def newest(run: Path) -> Path | None:
    """Return the newest checkpoint of a run, if any. Raises `InputError` if the run has checkpoints of an earlier
    version only.
    """
    found = checkpoints(run)
    if not found and any((run / FOLDER).glob("*.pt")):
        raise InputError(f"{run} was started by an earlier version: finish it with that, or choose another folder")
    return found[-1] if found else None


def checkpoint_entries(path: Path) -> dict[str, TensorStorageMetadata]:
    """Return shape and dtype of every tensor of a checkpoint, by name. Raises `InputError` if it cannot be read."""
    try:
        entries = FileSystemReader(path).read_metadata().state_dict_metadata
    except Exception as error:
        raise unreadable(path, error) from error
    return {name: entry for name, entry in entries.items() if isinstance(entry, TensorStorageMetadata)}


def read_into(path: Path, tensors: Mapping[str, Tensor], world: World = SINGLE_PROCESS) -> None:
    """Read a checkpoint into `tensors`; each rank reads its part. Raises `InputError` if it cannot be read."""
    try:
        with without_warning():
            dcp.load(dict(tensors), storage_reader=FileSystemReader(path), no_dist=world.size == 1)
    except (Exception, CheckpointException) as error:
        raise unreadable(path, error) from error


def unreadable(path: Path, error: BaseException) -> InputError:
    """Return the error for a checkpoint that cannot be read, or not by this number of ranks."""
    return InputError(
        f"the checkpoint {path} cannot be read ({reason_of(error)}); delete it to resume from the one before it. With "
        "adamw8bit, the number of processes can only be doubled or halved"
    )


def reason_of(error: BaseException) -> str:
    """Return the innermost reason in one line: DCP wraps the errors of ranks."""
    if isinstance(error, CheckpointException):
        return "; ".join(reason_of(inner) for inner, _ in error.failures.values())
    return first_line(error)


@contextmanager
def without_warning() -> Iterator[None]:
    """Silence DCP's warning about a single process."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        yield
