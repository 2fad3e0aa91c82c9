"""What models answered, by question: an append-only file of lines, so that nothing is asked twice after any end.

A line is written by one call, whole; one that a full disk or a power cut left in half at the end is cut off when the
file is opened again. In memory an answer takes 16 bytes: a million faces with twenty answers fit into 320 MB.
"""

from __future__ import annotations

import json
import os
import threading
from array import array
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from filelock import FileLock, Timeout

from likeness.prepare.caption.models import Answer
from likeness.types import InputError

BEGINNING = b'{"key": "'
"""How every line begins, followed by the 32 digits of its key."""


class Journal:
    """Answers by the key of their question. Made by `open_journal`; safe to use from several threads."""

    def __init__(self, path: Path, descriptor: int):
        self.path, self.added = path, 0
        self._descriptor, self._lock = descriptor, threading.Lock()
        self._fresh: dict[int, int] = {}
        self._keys, self._offsets, self._end = read_index(path, descriptor)

    def find(self, key: str) -> Answer | None:
        """The answer to a question, or None where it was never given."""
        number = int(key[:16], 16)
        with self._lock:
            offset = self._fresh.get(number, -1)
            if offset < 0:
                at = int(np.searchsorted(self._keys, number))
                if at == len(self._keys) or self._keys[at] != number:
                    return None
                offset = int(self._offsets[at])
        line = read_line(self._descriptor, offset)
        try:
            record = json.loads(line)
            return Answer(record["answer"], record["finished"]) if record["key"] == key else None
        except (ValueError, KeyError, TypeError) as error:
            raise InputError(f"{self.path}: the line at byte {offset} is no answer: delete that line") from error

    def add(self, key: str, answer: Answer, **about: Any) -> None:
        """Keep an answer; `about` says for people what it was about.

        Raises:
            InputError: it cannot be written; the file ends where it ended before.
        """
        record = {"key": key, **about, "answer": answer.text, "finished": answer.finished}
        line = (json.dumps(record) + "\n").encode()
        with self._lock:
            try:
                if os.write(self._descriptor, line) != len(line):
                    raise OSError("no space left on device")
            except OSError as error:
                os.ftruncate(self._descriptor, self._end)
                raise InputError(f"cannot write {self.path}: {error.strerror or error}") from error
            self._fresh[int(key[:16], 16)] = self._end
            self._end += len(line)
            self.added += 1


@contextmanager
def open_journal(path: Path) -> Iterator[Journal]:
    """The journal in a file, made where there is none, for this process alone.

    Raises:
        InputError: another process has it open, it cannot be read or written, or a line is none of ours.
    """
    lock = FileLock(path.with_name(f".{path.name}.lock"), timeout=0)
    with ExitStack() as opened:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            opened.enter_context(lock)
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o644)
            opened.callback(os.close, descriptor)
            journal = Journal(path, descriptor)
        except Timeout as error:
            raise InputError(f"another process is writing {path}: wait for it, or stop it") from error
        except OSError as error:
            raise InputError(f"cannot write {path}: {error.strerror or error}") from error
        yield journal


def read_index(path: Path, descriptor: int) -> tuple[np.ndarray, np.ndarray, int]:
    """Keys (their first 64 bits, sorted), the offsets of their lines, and the length of the file without a torn end."""
    keys, offsets, end = array("Q"), array("q"), 0
    with os.fdopen(os.dup(descriptor), "rb") as file:
        file.seek(0)
        for number, line in enumerate(file, start=1):
            if not line.endswith(b"\n"):
                os.ftruncate(descriptor, end)
                break
            try:
                if not line.startswith(BEGINNING):
                    raise ValueError("no key")
                keys.append(int(line[len(BEGINNING) : len(BEGINNING) + 16], 16))
            except ValueError as error:
                raise InputError(f"{path}, line {number} is no answer of a model: delete that line") from error
            offsets.append(end)
            end += len(line)
    order = np.argsort(np.frombuffer(keys, dtype=np.uint64), kind="stable") if keys else np.zeros(0, dtype=np.int64)
    return np.array(keys, dtype=np.uint64)[order], np.array(offsets, dtype=np.int64)[order], end


def read_line(descriptor: int, offset: int) -> bytes:
    """The line that begins at an offset."""
    line = b""
    while b"\n" not in line and (more := os.pread(descriptor, 4096, offset + len(line))):
        line += more
    return line.partition(b"\n")[0]
