"""Choose file names that overwrite neither an input nor an image of another process, and write images one by one."""

from __future__ import annotations

import itertools
import os
import signal
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from likeness.files import first_line
from likeness.pipelines.formats import format_of, numbered
from likeness.types import InputError

if TYPE_CHECKING:
    from PIL import Image


MAX_COUNT = 1000
"""Largest `--count`."""


def image_names(
    out: str | None, suffix: str, count: int, inputs: Iterable[Path], stem: str = "portrait"
) -> tuple[Iterator[Path], bool]:
    """Choose the names of images before any work is done, so that a wrong `--out` costs no wait.

    `out` is a folder (one that exists, or any name with a trailing slash; None is the current one), a file, or for
    several images its stem. `suffix` is the default format, `inputs` are the files and folders that the command reads,
    and `stem` is the name of an image in a folder, which a number follows.

    Return the names in order, and whether an existing file is overwritten. In a folder these are all names that are
    free, since other processes may take some in the meantime. Raises `InputError` if the folder cannot be written, the
    file format is unknown, or an input would be overwritten.
    """
    if not out or out.endswith(("/", os.sep)) or os.path.isdir(out):  # False without permission
        folder = Path(out or ".")
        check_writable(folder)
        return free_names(folder, suffix, stem), False
    file = Path(out)
    file = file if file.suffix else file.with_suffix(f".{suffix}")
    format_of(file)
    names = numbered(file, count)
    check_writable(file.parent)
    if folders := [name for name in names if name.is_dir()]:
        raise InputError(f"Cannot write {folders[0]}: it is a folder")
    read = [file for given in inputs for file in (given.iterdir() if given.is_dir() else [given]) if file.exists()]
    for name in filter(Path.exists, names):
        if same := [file for file in read if name.samefile(file)]:
            raise InputError(f"--out would overwrite the input {same[0]}. Choose another name than {name}")
    return iter(names), True


def free_names(folder: Path, suffix: str, stem: str) -> Iterator[Path]:
    """Yield STEM-001, STEM-002, ... without the numbers that the folder already contains in any format."""
    taken = {path.stem for path in folder.glob(f"{stem}-*")}
    stems = (f"{stem}-{number:03d}" for number in itertools.count(1))
    return (folder / f"{name}.{suffix}" for name in stems if name not in taken)


def check_writable(folder: Path) -> None:
    """Reject a folder that cannot be written or created. Raises `InputError`."""
    try:
        folder = folder.resolve()
        existing = next(parent for parent in (folder, *folder.parents) if parent.exists())
    except (OSError, RuntimeError) as error:  # no permission, or a loop of links
        raise InputError(f"Cannot write to {folder}: {first_line(error)}") from error
    if not existing.is_dir() or not os.access(existing, os.W_OK | os.X_OK):
        raise InputError(f"Cannot write to {folder}: {existing} is not a writable folder")


def save_next(names: Iterator[Path], save: Callable[[Path], None]) -> Path:
    """Save a file under the next of the names that is free, and return that."""
    for name in names:
        try:
            save(name)
        except FileExistsError:  # another process was faster
            continue
        return name
    raise AssertionError("fewer names than files")


def save_image(image: Image.Image, recipe: Mapping[str, Any] | None, names: Iterator[Path], overwrite: bool) -> Path:
    """Write an image under the next of the names that is free, and return that."""
    from likeness.pipelines.image_recipe import write_image

    return save_next(names, lambda name: write_image(image, name, recipe, overwrite=overwrite))


@contextmanager
def exit_on_sigterm() -> Iterator[None]:
    """Exit on SIGTERM with code 143 as Python exits on Ctrl-C: temporary files are removed, finished images stay."""
    before = signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
