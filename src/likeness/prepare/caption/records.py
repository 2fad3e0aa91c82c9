"""Files next to the metadata: a cache of the models' answers (`answers.jsonl`) and all captions (`captions.jsonl`).

Answers are stored immediately under the key of their question, so no question is repeated after an interruption. Each
line is written by one call; a truncated last line is removed when the file is opened.

`captions.jsonl` has one line per face; the `text` of the metadata follows from it. A caption is a dict: `text`;
`source` (given, grammar or vlm); for models `prompt`, `model`, `raw`, `refiner`, `refined`; `touched`, (rule, reason)
of every change; and `dropped`, the rule by which it is not used. A run replaces captions of the same source, model and
prompt. Captions that the user added to the metadata are kept as `given`; captions that the user removed stay removed.
This is detected by comparing both files. The metadata is written first: an older one would make new captions look
removed.
"""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from pathlib import Path
from typing import Any

from likeness.chat import Answer
from likeness.types import InputError

ANSWERS = "answers.jsonl"
CAPTIONS = "captions.jsonl"

Caption = dict[str, Any]

BY_HAND, REPLACED, DUPLICATE = "by-hand", "replaced", "same"
"""Why a caption is dropped: the user removed it, other captions replace it on request, or it equals another one."""

KEY = slice(len(b'{"key": "'), len(b'{"key": "') + 32)
"""Place of the key in every line of the cache."""


class Lines:
    """Offsets of the lines of a file by their key: the captions of a million faces take gigabytes.

    `key_of` returns the key of (number, line), or None for an incomplete last line.
    """

    def __init__(self, path: Path, key_of: Callable[[int, bytes], str | bytes | None]) -> None:
        self.path, self.end = path, 0
        self.offsets: dict[str | bytes, int] = {}
        with path.open("rb") if path.is_file() else nullcontext(()) as lines:
            for number, line in enumerate(lines, start=1):
                if (key := key_of(number, line)) is None:
                    break
                self.offsets[key] = self.end
                self.end += len(line)

    def find(self, key: str | bytes) -> bytes | None:
        """Return the line with a key, or None."""
        if (offset := self.offsets.get(key)) is None:
            return None
        with self.path.open("rb") as file:
            file.seek(offset)
            return file.readline()


class AnswerCache:
    """Answers by the key of their question. Thread-safe. Opened by `open_answers`."""

    def __init__(self, path: Path, descriptor: int):
        def key_of(number: int, line: bytes) -> bytes | None:
            if not line.endswith(b"\n"):
                return None
            if not line.startswith(b'{"key": "'):
                raise InputError(f"{path}, line {number} is not an answer of a model: delete that line")
            return line[KEY]

        self.path, self.added, self._descriptor, self._lock = path, 0, descriptor, threading.Lock()
        self._lines = Lines(path, key_of)
        os.ftruncate(descriptor, self._lines.end)

    def find(self, key: str) -> Answer | None:
        """Return the answer to a question, or None."""
        line = self._lines.find(key.encode())
        try:
            record = None if line is None else json.loads(line)
            return None if record is None else Answer(record["answer"], record["finished"])
        except (ValueError, KeyError, TypeError) as error:
            raise InputError(f"{self.path}: the answer with the key {key} is invalid: delete that line") from error

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
                os.ftruncate(self._descriptor, self._lines.end)
                raise InputError(f"cannot write {self.path}: {error.strerror or error}") from error
            self._lines.offsets[line[KEY]] = self._lines.end
            self._lines.end += len(line)
            self.added += 1


@contextmanager
def open_answers(path: Path) -> Iterator[AnswerCache]:
    """Open or create a cache. Its folder must be locked.

    Raises:
        InputError: it is a link, cannot be read or written, or a line is invalid.
    """
    with ExitStack() as opened:
        try:
            flags = os.O_RDWR | os.O_CREAT | os.O_APPEND | getattr(os, "O_NOFOLLOW", 0)  # links may lead anywhere
            descriptor = os.open(path, flags, 0o644)
            opened.callback(os.close, descriptor)
            answers = AnswerCache(path, descriptor)
        except OSError as error:
            raise InputError(f"cannot write {path}: {error.strerror or error}") from error
        yield answers


def merge(
    current: Sequence[str], previous: Sequence[Caption], fresh: Sequence[Caption], replace: bool
) -> list[Caption]:
    """Return all captions of a face after a run: of the metadata, the record and this run, whose captions alone stay if
    `replace` is set.
    """
    origin = lambda caption: (caption["source"], caption.get("model", ""), caption.get("prompt", ""))  # noqa: E731
    made = {origin(caption) for caption in fresh}
    expected = {caption["text"] for caption in previous if caption.get("dropped", BY_HAND) == BY_HAND}
    removed = expected - set(current)
    known = {caption["text"] for caption in (*previous, *fresh) if is_used(caption)}
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
                caption = caption | {"dropped": DUPLICATE}
            else:
                used.add(text.lower())
        merged.append(caption)
    return merged


def is_used(caption: Caption) -> bool:
    """Return whether a caption belongs in the metadata."""
    return "dropped" not in caption


def captions_record(path: Path) -> Callable[[str], list[Caption]]:
    """Return a function from `file_name` to the captions in the record. Raises `InputError` for an invalid line."""
    lines = Lines(path, lambda number, line: read_captions(path, number, line)[0])
    return lambda name: read_captions(path, 0, line)[1] if (line := lines.find(name)) else []


def read_captions(path: Path, number: int, line: bytes) -> tuple[str, list[Caption]]:
    """Parse one line of the record: `file_name` and captions."""
    try:
        record = json.loads(line)
        name, captions = record["file_name"], record["captions"]
        if isinstance(name, str) and all(isinstance(c["text"], str) and isinstance(c["source"], str) for c in captions):
            return name, captions
    except (ValueError, KeyError, TypeError, AttributeError):
        pass
    raise InputError(f"{path}, line {number} is not a record of captions: restore or delete that line")
