"""Files next to the metadata: a cache of the models' answers (`answers.jsonl`) and all captions (`captions.jsonl`).

Answers are stored immediately under the key of their question, so no question is repeated after an interruption. Each
line is written by one call; a truncated last line is removed when the file is opened. In memory an answer takes 16
bytes: a million faces with twenty answers take 320 MB.

`captions.jsonl` has one line per face; the `text` of the metadata follows from it. A caption is a dict: `text`;
`source` (given, grammar or vlm); for models `prompt`, `model`, `raw`, `refiner`, `refined`; `touched`, the rules that
changed it; and `dropped`, the reason, if it is not used. A run replaces captions of the same source, model and
prompt. Captions that the user added to the metadata are kept as `given`; captions that the user removed stay removed.
This is detected by comparing both files, so the metadata must never be older.
"""

from __future__ import annotations

import json
import os
import threading
from array import array
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from filelock import FileLock, Timeout

from likeness.prepare.caption.models import Answer
from likeness.types import InputError

ANSWERS = "answers.jsonl"
CAPTIONS = "captions.jsonl"

Caption = dict[str, Any]

BY_HAND = "by-hand: taken out of the metadata"
REPLACED = "replaced: left out on request"

BEGINNING = b'{"key": "'
"""Beginning of every line, before the 32 digits of its key."""


# Answers


class Journal:
    """Answers by the key of their question. Thread-safe. Opened by `open_journal`."""

    def __init__(self, path: Path, descriptor: int):
        self.path, self.added = path, 0
        self._descriptor, self._lock = descriptor, threading.Lock()
        self._fresh: dict[int, int] = {}
        self._keys, self._offsets, self._end = read_index(path, descriptor)

    def find(self, key: str) -> Answer | None:
        """Return the answer to a question, or None."""
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
            raise InputError(f"{self.path}: the line at byte {offset} is not an answer: delete that line") from error

    def add(self, key: str, answer: Answer, **about: Any) -> None:
        """Store an answer; `about` is information for the user.

        Raises:
            InputError: it cannot be written; the file is unchanged.
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
    """Open or create a journal for this process only.

    Raises:
        InputError: another process has opened it, it cannot be read or written, or a line is invalid.
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
            raise InputError(f"another process is writing {path}: wait for it or stop it") from error
        except OSError as error:
            raise InputError(f"cannot write {path}: {error.strerror or error}") from error
        yield journal


def read_index(path: Path, descriptor: int) -> tuple[np.ndarray, np.ndarray, int]:
    """Return keys (their first 64 bits, sorted), offsets of their lines, and file size without a truncated line."""
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
                raise InputError(f"{path}, line {number} is not an answer of a model: delete that line") from error
            offsets.append(end)
            end += len(line)
    order = np.argsort(np.frombuffer(keys, dtype=np.uint64), kind="stable") if keys else np.zeros(0, dtype=np.int64)
    return np.array(keys, dtype=np.uint64)[order], np.array(offsets, dtype=np.int64)[order], end


def read_line(descriptor: int, offset: int) -> bytes:
    """Read the line at an offset."""
    line = b""
    while b"\n" not in line and (more := os.pread(descriptor, 4096, offset + len(line))):
        line += more
    return line.partition(b"\n")[0]


# Captions


def merge(
    current: Sequence[str], previous: Sequence[Caption], fresh: Sequence[Caption], replace: bool
) -> list[Caption]:
    """Return all captions of a face after a run.

    Args:
        current: captions in the metadata.
        previous: captions in the record.
        fresh: captions of this run.
        replace: whether to drop all captions of other runs.
    """
    made = {origin(caption) for caption in fresh}
    expected = {caption["text"] for caption in previous if caption.get("dropped", BY_HAND) == BY_HAND}
    removed = expected - set(current)
    known = {caption["text"] for caption in (*previous, *fresh)}
    kept = [caption for caption in previous if origin(caption) not in made]
    given = [{"text": text, "source": "given"} for text in dict.fromkeys(current) if text not in known]
    others = [caption | {"dropped": REPLACED} if replace and is_used(caption) else caption for caption in kept + given]
    merged: list[Caption] = []
    used: set[str] = set()
    for caption in sorted(others, key=lambda caption: caption["source"] != "given") + list(fresh):
        if is_used(caption):
            text = caption["text"]
            if text in removed:
                caption = caption | {"dropped": BY_HAND}
            elif text.lower() in used:
                caption = caption | {"dropped": "same: as another caption of the face"}
            else:
                used.add(text.lower())
        merged.append(caption)
    return merged


def origin(caption: Caption) -> tuple[str, str, str]:
    """Return the origin of a caption; a new caption of the same origin replaces it."""
    return caption["source"], caption.get("model", ""), caption.get("prompt", "")


def is_used(caption: Caption) -> bool:
    """Return whether a caption belongs in the metadata."""
    return "dropped" not in caption


@contextmanager
def open_record(path: Path) -> Iterator[Callable[[str], list[Caption]]]:
    """Open the record and return a function from `file_name` to the captions of a face.

    Raises:
        InputError: a line is invalid.
    """
    if not path.is_file():
        yield lambda name: []
        return
    offsets: dict[str, int] = {}
    with path.open("rb") as file:
        end = 0
        for number, line in enumerate(file, start=1):
            offsets[read_captions(path, number, line)["file_name"]] = end
            end += len(line)

        def find(name: str) -> list[Caption]:
            if name not in offsets:
                return []
            file.seek(offsets[name])
            return json.loads(file.readline())["captions"]

        yield find


def read_captions(path: Path, number: int, line: bytes) -> dict[str, Any]:
    """Parse one line of the record."""
    try:
        record = json.loads(line)
        if isinstance(record["file_name"], str) and all(
            isinstance(caption["text"], str) and isinstance(caption["source"], str) for caption in record["captions"]
        ):
            return record
    except (ValueError, KeyError, TypeError):
        pass
    raise InputError(f"{path}, line {number} is not a record of captions: restore or delete that line")
