"""Files are written whole or not at all, to a temporary name beside them, then renamed; what cannot be read is one
sentence.
"""

from __future__ import annotations

import contextlib
import json
import os
import secrets
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

from likeness.types import InputError


def write_whole(path: Path, content: bytes | str) -> None:
    """Write a file, making its folder where there is none.

    Args:
        path: the file.
        content: text is written as UTF-8.

    Raises:
        InputError: it cannot be written; what was there before is untouched.
    """
    partial = partial_name(path)
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
    partial = partial_name(path)
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


def partial_name(path: Path) -> Path:
    """A name beside `path` that no other process takes: several may write the same file at the same time."""
    return path.with_name(f".{path.name}.{secrets.token_hex(4)}.partial")


def read_json(path: Path) -> dict[str, Any]:
    """A JSON file, or one sentence about why not."""
    try:
        return json.loads(path.read_text())
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror or error}") from error
    except json.JSONDecodeError as error:
        raise InputError(f"{path} is not valid JSON: {error}") from error


def first_line(error: BaseException) -> str:
    """The first line of an error's message."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
