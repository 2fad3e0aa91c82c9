"""Read the weight files of a model. An incomplete file is one sentence that names it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from likeness.files import first_line, read_json
from likeness.types import InputError

POINTER = b"version https://git-lfs"
"""Beginning of the file that Git leaves in the place of one that Git LFS has not downloaded."""


@contextmanager
def opened_weights(path: Path) -> Iterator[Any]:
    """Open a safetensors file. Raises `InputError` if it is missing, cut off, damaged, or a pointer of Git LFS."""
    check_pointer(path)
    try:
        with safe_open(path, "pt") as file:
            yield file
    except (OSError, SafetensorError) as error:
        raise InputError(f"{path} cannot be read, download it again: {first_line(error)}") from error


def read_weights(path: Path) -> dict[str, Any]:
    """Read the tensors of a safetensors file. Raises `InputError` as `opened_weights`."""
    with opened_weights(path) as file:
        return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118


def check_files(folder: Path) -> None:
    """Raise `InputError` if a file of a component is a Git LFS pointer, or an incomplete safetensors or JSON file."""
    for path in sorted(folder.rglob("*")):
        if path.suffix == ".safetensors":
            with opened_weights(path):
                pass
        elif path.is_file():
            check_pointer(path)
            if path.suffix == ".json":
                read_json(path)


def check_pointer(path: Path) -> None:
    """Raise `InputError` if a file is a pointer of Git LFS."""
    try:
        with path.open("rb") as file:
            start = file.read(len(POINTER))
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror or error}") from error
    if start == POINTER:
        raise InputError(f"{path} is a pointer of Git LFS, not the file: run `git lfs pull` in its repository")
