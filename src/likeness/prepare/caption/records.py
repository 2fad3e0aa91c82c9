"""Files next to the metadata: a cache of the models' answers (`answers.jsonl`) and all captions (`captions.jsonl`).

Answers are stored immediately under the key of their question, so no question is repeated after an interruption. Each
line is written by one call; a truncated last line is removed when the file is opened.

`captions.jsonl` has one line per face; the `text` of the metadata follows from it. A caption is a dict: `text`;
`source` (given, grammar or vlm); for models `prompt`, `model`, `raw`, `refiner`, `refined`; `touched`, (rule, reason)
of every change; and `dropped`, the rule by which it is not used. A run replaces captions of the same source, model and
prompt. Captions that the user added to the metadata are kept as `given`; captions that the user removed stay removed.
This is detected by comparing both files, so the metadata must never be older.
"""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
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


class AnswerCache:
    """Answers by the key of their question. Thread-safe. Opened by `open_answers`."""

    def __init__(self, path: Path, descriptor: int):
        self.path, self.added, self.end = path, 0, 0
        self._descriptor, self._lock = descriptor, threading.Lock()
        self._offsets: dict[bytes, int] = {}
        with path.open("rb") as file:
            for number, line in enumerate(file, start=1):
                if not line.endswith(b"\n"):
                    os.ftruncate(descriptor, self.end)
                    break
                if not line.startswith(b'{"key": "'):
                    raise InputError(f"{path}, line {number} is not an answer of a model: delete that line")
                self._offsets[line[KEY]] = self.end
                self.end += len(line)

    def find(self, key: str) -> Answer | None:
        """Return the answer to a question, or None."""
        with self._lock:
            offset = self._offsets.get(key.encode())
        if offset is None:
            return None
        with self.path.open("rb") as file:
            file.seek(offset)
            line = file.readline()
        try:
            record = json.loads(line)
            return Answer(record["answer"], record["finished"])
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
                os.ftruncate(self._descriptor, self.end)
                raise InputError(f"cannot write {self.path}: {error.strerror or error}") from error
            self._offsets[line[KEY]] = self.end
            self.end += len(line)
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
    """Return all captions of a face after a run.

    Args:
        current: captions in the metadata.
        previous: captions in the record.
        fresh: captions of this run.
        replace: whether to drop all captions of other runs.
    """
    origin = lambda caption: (caption["source"], caption.get("model", ""), caption.get("prompt", ""))  # noqa: E731
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
                caption = caption | {"dropped": DUPLICATE}
            else:
                used.add(text.lower())
        merged.append(caption)
    return merged


def is_used(caption: Caption) -> bool:
    """Return whether a caption belongs in the metadata."""
    return "dropped" not in caption


@contextmanager
def open_record(path: Path) -> Iterator[Callable[[str], list[Caption]]]:
    """Open the record and return a function from `file_name` to the captions of a face.

    Raises:
        InputError: a line is invalid.
    """
    with ExitStack() as opened:
        file = opened.enter_context(path.open("rb")) if path.is_file() else None
        offsets: dict[str, int] = {}
        end = 0
        for number, line in enumerate(file or (), start=1):
            name, _ = read_captions(path, number, line)
            offsets[name] = end
            end += len(line)

        def find(name: str) -> list[Caption]:
            if file is None or name not in offsets:
                return []
            file.seek(offsets[name])
            return read_captions(path, 0, file.readline())[1]

        yield find


def read_captions(path: Path, number: int, line: bytes) -> tuple[str, list[Caption]]:
    """Parse one line of the record: `file_name` and captions."""
    try:
        record = json.loads(line)
        name, captions = record["file_name"], record["captions"]
        if isinstance(name, str) and all(isinstance(c["text"], str) and isinstance(c["source"], str) for c in captions):
            for caption in captions:
                if "dropped" in caption:  # earlier versions wrote "rule: reason"
                    caption["dropped"] = caption["dropped"].partition(":")[0]
            return name, captions
    except (ValueError, KeyError, TypeError, AttributeError):
        pass
    raise InputError(f"{path}, line {number} is not a record of captions: restore or delete that line")
