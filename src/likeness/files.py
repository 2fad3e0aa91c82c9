"""Files are written whole or not at all: to a temporary name beside them, then renamed."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

from likeness.types import InputError


def write_whole(path: Path, content: bytes | str) -> None:
    """Write a file, making its folder where there is none.

    Raises:
        InputError: it cannot be written; what was there before is untouched.
    """
    partial = path.with_name(f".{path.name}.partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        partial.write_bytes(content.encode() if isinstance(content, str) else content)
        os.replace(partial, path)
    except OSError as error:
        with contextlib.suppress(OSError):
            partial.unlink(missing_ok=True)
        raise InputError(f"cannot write {path}: {error.strerror or error}") from error
