"""Training checkpoints: written atomically, by any number of ranks and read by any other number.

A checkpoint is a folder under `checkpoints/` in torch's distributed checkpoint format (DCP), one file per rank. DCP
writes the file `.metadata` atomically when all ranks are done: a folder without it is incomplete and ignored. Each rank
then writes the SHA-256 of its files, which are compared before a checkpoint is read.
"""

from __future__ import annotations

import importlib
import pickle
import shutil
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint import FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import Metadata, StorageMeta, TensorStorageMetadata

from likeness.files import first_line, sync, write_whole
from likeness.parallel import SINGLE_PROCESS, World
from likeness.types import InputError
from likeness.weights.hashes import file_hash

FOLDER = "checkpoints"
METADATA = ".metadata"
DIGESTS = "SHA256SUMS"

METADATA_TYPES = {
    "torch": ("Size",),
    "torch.serialization": ("_get_layout",),  # the layout of a name
    "torch.distributed.checkpoint.metadata": (
        *("Metadata", "MetadataIndex", "StorageMeta", "TensorStorageMetadata", "BytesStorageMetadata"),
        *("TensorProperties", "ChunkStorageMetadata", "_MEM_FORMAT_ENCODING"),
    ),
    "torch.distributed.checkpoint.filesystem": ("_StorageInfo",),
    "pathlib": ("Path", "PosixPath", "WindowsPath", "PurePosixPath", "PureWindowsPath"),
}
"""Module -> types in a `.metadata` file."""


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
        with world.joint_errors(), write_errors(path):
            write_digests(path, world)
    except InputError:
        if world.main:
            shutil.rmtree(path, ignore_errors=True)
        raise
    if world.main:
        for old in checkpoints(run)[:-keep]:
            shutil.rmtree(old, ignore_errors=True)  # what remains is deleted when the run is resumed


@contextmanager
def write_errors(path: Path) -> Iterator[None]:
    """Turn errors of writing within a `with` block into an `InputError`."""
    try:
        yield
    except (OSError, RuntimeError, CheckpointException) as error:
        raise_interrupt(error)
        raise InputError(
            f"cannot write the checkpoint {path}: {reason_of(error)}; earlier checkpoints are intact"
        ) from error


def checkpoints(run: Path) -> list[Path]:
    """Return the complete checkpoints of a run, oldest first."""
    return sorted(path.parent for path in (run / FOLDER).glob("*/.metadata") if path.parent.name.isdigit())


def delete_incomplete(run: Path) -> None:
    """Delete the incomplete checkpoints that killed processes left in a locked run."""
    for path in (run / FOLDER).glob("*"):
        if path.name.isdigit() and not (path / METADATA).is_file():
            shutil.rmtree(path, ignore_errors=True)


def newest(run: Path) -> Path | None:
    """Return the newest checkpoint of a run, if any."""
    return next(reversed(checkpoints(run)), None)


def checkpoint_entries(path: Path) -> dict[str, TensorStorageMetadata]:
    """Return shape and dtype of every tensor of a checkpoint, by name. Raises `InputError` if it cannot be read."""
    try:
        entries = Reader(path).read_metadata().state_dict_metadata
    except Exception as error:
        raise unreadable(path, error) from error
    return {name: entry for name, entry in entries.items() if isinstance(entry, TensorStorageMetadata)}


def read_into(path: Path, tensors: Mapping[str, Tensor], world: World = SINGLE_PROCESS) -> None:
    """Read a checkpoint into `tensors`; each rank reads its part. Raises `InputError` if it cannot be read, or
    contains other names or shapes.
    """
    stored = checkpoint_entries(path)
    if tensors.keys() != stored.keys() or any(tuple(stored[n].size) != tuple(v.shape) for n, v in tensors.items()):
        differing = sorted(tensors.keys() ^ stored.keys()) or ["a shape"]
        raise InputError(f"the checkpoint {path} is of another network ({differing[0]}): choose another run folder")
    with world.joint_errors():
        check_digests(path, world)
    try:
        with without_warning():
            dcp.load(dict(tensors), storage_reader=Reader(path), no_dist=world.size == 1)
    except (Exception, CheckpointException) as error:
        raise_interrupt(error)
        raise unreadable(path, error) from error


def raise_interrupt(error: BaseException) -> None:
    """Raise the `KeyboardInterrupt` that DCP has wrapped in an error, if there is one."""
    failures = error.failures.values() if isinstance(error, CheckpointException) else ()
    if any(isinstance(inner, KeyboardInterrupt) for inner, _ in failures):
        raise KeyboardInterrupt from error


def unreadable(path: Path, error: BaseException) -> InputError:
    """Return the error for a checkpoint that cannot be read, or not by this number of ranks."""
    return InputError(
        f"the checkpoint {path} cannot be read ({reason_of(error)}); {way_out(path)}. With adamw8bit, the number of "
        "processes can only be doubled or halved"
    )


def way_out(path: Path) -> str:
    """Return how to continue without a checkpoint."""
    earlier = [other for other in checkpoints(path.parent.parent) if other.name < path.name]
    return f"delete it to resume from {earlier[-1].name}" if earlier else "delete it to start again"


def reason_of(error: BaseException) -> str:
    """Return the innermost reason in one line: DCP wraps the errors of ranks."""
    if isinstance(error, CheckpointException):
        return "; ".join(reason_of(inner) for inner, _ in error.failures.values())
    return first_line(error)


class Reader(FileSystemReader):
    """DCP's reader, whose `.metadata` may contain DCP's own types only: unpickling others can run code."""

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        """Read `.metadata`."""
        with (Path(self.path) / METADATA).open("rb") as file:
            metadata = MetadataUnpickler(file).load()
        if not isinstance(metadata, Metadata):
            raise pickle.UnpicklingError(f"{METADATA} contains a {type(metadata).__name__}")
        metadata.storage_meta = metadata.storage_meta or StorageMeta()
        metadata.storage_meta.load_id = self.load_id
        for info in (metadata.storage_data or {}).values():
            if Path(info.relative_path).name != info.relative_path:
                raise pickle.UnpicklingError(f"{METADATA} names the file {info.relative_path!r} outside its folder")
        return metadata


class MetadataUnpickler(pickle.Unpickler):
    """Unpickle the types in `METADATA_TYPES` and dtypes of torch."""

    def find_class(self, module_name: str, global_name: str) -> Any:
        """Return a type; raises `UnpicklingError` for all others."""
        if global_name in METADATA_TYPES.get(module_name, ()):
            return getattr(importlib.import_module(module_name), global_name)
        if module_name == "torch" and isinstance(dtype := getattr(torch, global_name, None), torch.dtype):
            return dtype
        raise pickle.UnpicklingError(f"{METADATA} contains {module_name}.{global_name}, which is not of a checkpoint")


def write_digests(path: Path, world: World) -> None:
    """Write the SHA-256 of this rank's files, in the format of `sha256sum`; the main process includes `.metadata`."""
    files = sorted(path.glob(f"__{world.rank}_*.distcp")) + ([path / METADATA] if world.main else [])
    lines = [f"{file_hash(file)}  {file.name}\n" for file in files]
    write_whole(path / f"{DIGESTS}.{world.rank}", "".join(lines))
    for name in (path / f"{DIGESTS}.{world.rank}", path, path.parent):
        sync(name)


def check_digests(path: Path, world: World) -> None:
    """Compare a checkpoint with its digests; each rank checks some of its files. Raises `InputError` if one differs."""
    lines = [
        line for file in sorted(path.glob(f"{DIGESTS}.*")) for line in file.read_text("utf-8", "replace").splitlines()
    ]
    for line in sorted(lines)[world.rank :: world.size]:
        digest, _, name = line.partition("  ")
        file = path / Path(name).name
        if not file.is_file() or file_hash(file) != digest:
            raise InputError(f"{file} is damaged: its SHA-256 is not the recorded one; {way_out(path)}")


@contextmanager
def without_warning() -> Iterator[None]:
    """Silence DCP's warning about a single process."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        yield
