"""Where each caption comes from: `captions.jsonl`, a line a face, from which the `text` of the metadata follows.

A caption is a dict: `text`; `source` (given, grammar or vlm); of models `prompt`, `model`, `raw`, `refiner`, `refined`;
`touched`, what changed it; and `dropped` where it is not used. A run replaces captions of the same source, model and
prompt and leaves others alone. What somebody else wrote into the metadata is kept as `given`; what somebody took out
stays out. That is told by comparing both files, so the metadata must never be the older one.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from likeness.types import InputError

Caption = dict[str, Any]

BY_HAND = "by-hand: taken out of the metadata"
REPLACED = "replaced: left out on request"


def merge(
    current: Sequence[str], previous: Sequence[Caption], fresh: Sequence[Caption], replace: bool
) -> list[Caption]:
    """All captions of a face after a run.

    Args:
        current: what the metadata say.
        previous: what the record says.
        fresh: what this run made.
        replace: whether captions that this run did not make are left out.
    """
    made = {origin(caption) for caption in fresh}
    expected = {caption["text"] for caption in previous if caption.get("dropped", BY_HAND) == BY_HAND}
    taken_out = expected - set(current)
    known = {caption["text"] for caption in (*previous, *fresh)}
    kept = [caption for caption in previous if origin(caption) not in made]
    given = [{"text": text, "source": "given"} for text in dict.fromkeys(current) if text not in known]
    others = [caption | {"dropped": REPLACED} if replace and is_used(caption) else caption for caption in kept + given]
    merged: list[Caption] = []
    said: set[str] = set()
    for caption in sorted(others, key=lambda caption: caption["source"] != "given") + list(fresh):
        if is_used(caption):
            text = caption["text"]
            if text in taken_out:
                caption = caption | {"dropped": BY_HAND}
            elif text.lower() in said:
                caption = caption | {"dropped": "same: as another caption of the face"}
            else:
                said.add(text.lower())
        merged.append(caption)
    return merged


def origin(caption: Caption) -> tuple[str, str, str]:
    """What a caption came from; a new one of the same origin takes its place."""
    return caption["source"], caption.get("model", ""), caption.get("prompt", "")


def is_used(caption: Caption) -> bool:
    """Whether it belongs into the metadata."""
    return "dropped" not in caption


@contextmanager
def open_record(path: Path) -> Iterator[Callable[[str], list[Caption]]]:
    """A function that gives the captions of a face by its `file_name`; none where there is no record.

    Raises:
        InputError: a line is no record.
    """
    if not path.is_file():
        yield lambda name: []
        return
    offsets: dict[str, int] = {}
    with path.open("rb") as file:
        end = 0
        for number, line in enumerate(file, start=1):
            offsets[read(path, number, line)["file_name"]] = end
            end += len(line)

        def find(name: str) -> list[Caption]:
            if name not in offsets:
                return []
            file.seek(offsets[name])
            return json.loads(file.readline())["captions"]

        yield find


def read(path: Path, number: int, line: bytes) -> dict[str, Any]:
    """One line of the record."""
    try:
        record = json.loads(line)
        if isinstance(record["file_name"], str) and all(
            isinstance(caption["text"], str) and isinstance(caption["source"], str) for caption in record["captions"]
        ):
            return record
    except (ValueError, KeyError, TypeError):
        pass
    raise InputError(f"{path}, line {number} is no record of captions: restore or delete that line")
