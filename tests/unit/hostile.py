"""Simulated failures: a full disk, a read-only folder, a decompression bomb."""

from __future__ import annotations

import ctypes
import resource
import struct
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

CAP_DAC_OVERRIDE = 1
"""Capability with which root ignores file permissions."""


@contextmanager
def full_disk(most: int) -> Iterator[None]:
    """Limit files to `most` bytes, so that writing fails as on a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (most, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@contextmanager
def read_only(folder: Path) -> Iterator[None]:
    """Make a folder read-only recursively, also for root."""
    places = [folder, *(path for path in folder.rglob("*") if path.is_dir())]
    modes = [path.stat().st_mode for path in places]
    for path in places:
        path.chmod(0o555)
    before = set_override(False)
    try:
        yield
    finally:
        set_override(before)
        for path, mode in zip(places, modes, strict=True):
            path.chmod(mode)


def set_override(wanted: bool) -> bool:
    """Remove or restore `CAP_DAC_OVERRIDE` of this thread and its children; returns the previous state."""
    libc = ctypes.CDLL(None, use_errno=True)
    header = struct.pack("=Ii", 0x20080522, 0)  # version 3, this thread
    sets = ctypes.create_string_buffer(24)  # effective, permitted, inheritable: twice 32 bits each
    if libc.capget(header, sets):
        raise OSError(ctypes.get_errno(), "capget")
    effective, *others = struct.unpack("=6I", sets.raw)
    had, bit = bool(effective >> CAP_DAC_OVERRIDE & 1), 1 << CAP_DAC_OVERRIDE
    if had != wanted and libc.capset(header, struct.pack("=6I", effective ^ bit, *others)):
        raise OSError(ctypes.get_errno(), "capset")
    return had


def bomb(side: int = 30000) -> bytes:
    """Return a small PNG file with a very large image size."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(bytes(1000))) + chunk(b"IEND", b"")
    )


def snapshot(folder: Path) -> dict[str, bytes]:
    """Return every file of a folder with its content; partial files must not exist."""
    files = {str(path.relative_to(folder)): path for path in sorted(folder.rglob("*")) if path.is_file()}
    assert not [name for name in files if name.endswith(".partial")]
    return {name: path.read_bytes() for name, path in files.items() if not name.endswith(".lock")}
