"""Write files and folders atomically: to a temporary name in the same folder, then renamed. Lock folders. Read JSON."""

from __future__ import annotations

import contextlib
import ctypes
import glob
import json
import os
import re
import secrets
import shutil
import stat
import sys
import time
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any, BinaryIO

from safetensors import SafetensorError

from likeness.types import InputError, TryAgain

PARTIAL = re.compile(r"\..+\.[0-9a-f]{8}\.partial")
"""Names of unfinished files and folders (`partial_name`)."""

ABANDONED = 3600
"""Age in seconds from which an unfinished file or folder is deleted where several processes write without a lock."""

LOCK = ".lock"
"""File in a folder that a process has locked."""


def write_whole(path: Path, content: bytes | str) -> None:
    """Write a file atomically. Its folder is created if missing.

    Args:
        path: the file.
        content: text is written as UTF-8.

    Raises:
        InputError: the file cannot be written; its former content is unchanged.
    """
    with writing_whole(path) as file:
        file.write(content.encode() if isinstance(content, str) else content)


@contextlib.contextmanager
def writing_whole(path: Path, *, overwrite: bool = True) -> Iterator[BinaryIO]:
    """Open a file to be written in a `with` block; it appears under its name only if the block succeeds.

    Args:
        path: the file; its folder is created if missing.
        overwrite: whether to replace an existing file.

    Raises:
        InputError: the file cannot be written; its former content is unchanged.
        FileExistsError: the file exists, and `overwrite` is False.
    """
    partial = partial_name(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with partial.open("wb") as file:
            yield file
        with contextlib.suppress(FileNotFoundError):
            partial.chmod(stat.S_IMODE(path.stat().st_mode))  # a file that was private stays private
        (os.replace if overwrite else rename_new)(partial, path)
    except OSError as error:
        if not overwrite and isinstance(error, FileExistsError) and os.path.lexists(path):
            raise  # not that the folder is a file
        raise InputError(f"cannot write {path}: {error.strerror or error}") from error
    finally:
        with contextlib.suppress(OSError):
            partial.unlink(missing_ok=True)


def rename_new(source: Path, target: Path) -> None:
    """Rename a file unless the target exists. Of several processes one succeeds, the others raise `FileExistsError`."""
    try:
        os.link(source, target)
    except FileExistsError:
        raise
    except OSError:  # a file system without hard links: reserve the name by an empty file, then replace that
        os.close(os.open(target, os.O_CREAT | os.O_EXCL))
        try:
            os.replace(source, target)
        except BaseException:
            target.unlink(missing_ok=True)
            raise


@contextlib.contextmanager
def writing_folder(folder: Path) -> Iterator[Path]:
    """Write a folder atomically: yields a temporary folder, which takes the place of `folder` if the `with` block
    succeeds. All its files are then on disk, also after a power failure.

    Raises:
        InputError: it is a file, or cannot be written; its former content is unchanged.
    """
    folder = folder.resolve()  # the folder that a symbolic link names, on its file system
    if folder.exists() and not folder.is_dir():
        raise InputError(f"{folder} is not a folder: choose another name")
    partial = partial_name(folder)
    try:
        partial.mkdir(parents=True)
        for other in folder.parent.glob(f".{glob.escape(folder.name)}.*"):
            if PARTIAL.fullmatch(other.name) and time.time() - last_change(other) > ABANDONED:
                shutil.rmtree(other, ignore_errors=True)  # of a process that was killed
        yield partial
        for path in (*partial.rglob("*"), partial):
            sync(path)
        if folder.exists():
            exchange(partial, folder)
        else:
            partial.rename(folder)
        sync(folder.parent)
    except (OSError, SafetensorError) as error:
        raise InputError(f"cannot write {folder}: {getattr(error, 'strerror', None) or error}") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)  # incomplete, or the former content


def last_change(folder: Path) -> float:
    """Return the time of the last change of a folder or of anything in it."""
    times = [time.time()]  # of one that disappears meanwhile
    with contextlib.suppress(OSError):
        times = [path.stat().st_mtime for path in (folder, *folder.rglob("*"))]
    return max(times)


def exchange(one: Path, other: Path) -> None:
    """Exchange the names of two folders, on Linux in one operation (RENAME_EXCHANGE of renameat2)."""
    here = -100  # AT_FDCWD: paths are relative to the current folder
    rename = getattr(ctypes.CDLL(None), "renameat2", None) if os.name == "posix" else None
    if rename is None or rename(here, os.fsencode(one), here, os.fsencode(other), 2):
        aside = partial_name(other)
        other.rename(aside)
        try:
            one.rename(other)
        except BaseException:
            aside.rename(other)
            raise
        aside.rename(one)


def sync(path: Path) -> None:
    """Wait until the content of a file or a folder is on disk; folders only if the system supports it."""
    if path.is_file() or os.name == "posix":
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def partial_name(path: Path) -> Path:
    """Return a temporary name in the folder of `path`, different for every call and process."""
    return path.with_name(f".{path.name}.{secrets.token_hex(4)}.partial")


def is_unfinished(name: str) -> bool:
    """Return whether a file is the lock or an unfinished file of a process."""
    return name == LOCK or PARTIAL.fullmatch(name) is not None


def delete_partials(folder: Path, inner: Collection[str] = (), age: float = 0) -> None:
    """Delete the unfinished files that killed processes left.

    Args:
        folder: the folder, which should be locked unless `age` is given.
        inner: subfolders that are searched recursively.
        age: seconds since the last change.
    """
    for place, folders, names in os.walk(folder):
        if Path(place) == folder:
            folders[:] = set(folders) & set(inner)
        for file in (Path(place, name) for name in names if PARTIAL.fullmatch(name)):
            with contextlib.suppress(FileNotFoundError):
                if not age or time.time() - file.stat().st_mtime > age:
                    file.unlink()


@contextlib.contextmanager
def locked(folder: Path, *, wait: bool = False) -> Iterator[None]:
    """Lock a folder within a `with` block, if the file system supports locks (on Windows, never).

    It is created if it is missing, and removed if it stays empty. The operating system releases the lock when its
    process ends, even if it is killed.

    Args:
        folder: the folder.
        wait: whether to wait until another process releases it.

    Raises:
        TryAgain: another process has locked the folder.
        InputError: the folder cannot be written.
    """
    path, new = folder / LOCK, not folder.exists()
    try:
        while True:
            folder.mkdir(parents=True, exist_ok=True)
            file = os.open(path, os.O_RDWR | os.O_CREAT | getattr(os, "O_NOFOLLOW", 0), 0o644)
            try:
                import fcntl  # not on Windows

                fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
                if os.path.samestat(os.fstat(file), os.lstat(path)):
                    break
            except FileNotFoundError:
                pass  # deleted by the process that had locked it
            except BlockingIOError as error:
                os.close(file)
                raise TryAgain(
                    f"another process is writing to {folder}: wait until it ends, or choose another folder"
                ) from error
            except (ImportError, OSError):
                break  # locks are not supported
            os.close(file)
    except OSError as error:
        raise InputError(f"cannot write {folder}: {error.strerror or error}") from error
    try:
        yield
    finally:
        with contextlib.suppress(OSError):
            path.unlink(missing_ok=True)
            if new:
                folder.rmdir()  # unless something was written
        os.close(file)


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object in UTF-8, with or without byte order mark.

    Raises:
        InputError: the file cannot be read, or contains anything else.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8-sig"))
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror or error}") from error
    except (ValueError, RecursionError) as error:  # of the encoding, or of JSON
        raise InputError(f"{path} is not valid JSON: {first_line(error)}") from error
    if not isinstance(content, dict):
        raise InputError(f"{path} contains a {type(content).__name__}: it must be a JSON object")
    return content


def log_line(text: str) -> None:
    """Print a line to stderr; if that is a log on a full disk, the line is lost."""
    with contextlib.suppress(OSError):
        print(text, file=sys.stderr, flush=True)


def first_line(error: BaseException) -> str:
    """Return the first line of an error's message."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
