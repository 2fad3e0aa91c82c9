"""Files are written whole or not at all: to a temporary name beside them, then renamed."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from likeness.types import InputError


def write_whole(path: Path, content: bytes | str, *, mark: str = "") -> None:
    """Write a file, making its folder where there is none.

    Args:
        path: the file.
        content: text is written as UTF-8.
        mark: for the temporary name, where several processes may write the same at the same time.

    Raises:
        InputError: it cannot be written; what was there before is untouched.
    """
    partial = path.with_name(f".{path.name}{mark}.partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        partial.write_bytes(content.encode() if isinstance(content, str) else content)
        os.replace(partial, path)
    except OSError as error:
        with contextlib.suppress(OSError):
            partial.unlink(missing_ok=True)
        raise InputError(f"cannot write {path}: {error.strerror or error}") from error


@contextlib.contextmanager
def writing_whole(path: Path) -> Iterator[BinaryIO]:
    """A file that is written bit by bit in a `with` block, and is there only when the block has ended well.

    Raises:
        InputError: it cannot be written; what was there before is untouched.
    """
    partial = path.with_name(f".{path.name}.partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with partial.open("wb") as file:
            yield file
        os.replace(partial, path)
    except BaseException as error:
        with contextlib.suppress(OSError):
            partial.unlink(missing_ok=True)
        if isinstance(error, OSError):
            raise InputError(f"cannot write {path}: {error.strerror or error}") from error
        raise
