"""File formats of generated images. No torch here."""

from __future__ import annotations

from pathlib import Path

from likeness.types import InputError

FORMATS = {"png": "PNG", "jpg": "JPEG", "jpeg": "JPEG", "webp": "WEBP"}
"""File suffix -> Pillow's format."""


def format_of(path: Path) -> str:
    """Return Pillow's format of a file name. Raises `InputError` if its suffix is not png, jpg, jpeg or webp."""
    suffix = path.suffix.lower().removeprefix(".")
    if suffix not in FORMATS:
        raise InputError(f"{path} must end in {', '.join('.' + s for s in FORMATS)}")
    return FORMATS[suffix]


def numbered(file: Path, count: int) -> list[Path]:
    """Return the names of several images, NAME-1, NAME-2, ..., or the file for one."""
    return [file] if count == 1 else [file.with_stem(f"{file.stem}-{number}") for number in range(1, count + 1)]
