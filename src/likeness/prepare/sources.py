"""What a store is made from: the bytes of every file and caption, and what is done to them, as hashes.

The key of an entry is the hash of its file combined with the hash of what is done to it. Names, places and times are
no part of it, so that moving or reordering costs nothing, and a key that is known stands for an entry that is right.
Bytes, not pixels: reading a million files is cheap where decoding them is not, at the price that a picture saved anew
counts as another.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

from likeness.conditions import CONDITIONS
from likeness.data.folder import captions_of, column_of, each_row
from likeness.data.store import IMAGE, LOG_VARIANCE, read_part, write_part
from likeness.types import InputError

TRANSFORM = 1
"""To be raised when the autoencoder is given other pixels of the same file: every key then changes."""
FILES = ("file_name", *(column_of(name) for name in CONDITIONS))
"""File columns of a row, in the order in which their hashes lie in `rows-*`."""
BLOCK = 256
"""Faces whose names, captions and hashes are one file."""
TICK = 0.05
"""Seconds in which a file may change twice and bear the same time."""


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What decides a store, besides the files."""

    codec: str
    """Hash of the encoder (`Components.codec_hash`)."""
    moments: bool
    """Whether it gives a distribution: pictures are then kept as mean and log variance, conditions as the mean."""
    size: int
    """Pixels a side."""
    precision: Literal["fp32", "bf16"]
    """Of the computation."""
    views: int
    """Versions of each face."""
    text: str | None
    """Hash of the text towers (`Components.text_hash`) where captions are encoded, too."""

    @property
    def columns(self) -> Sequence[str]:
        """C columns: the picture, its log variance where there is one, and all conditions."""
        return (IMAGE, *([LOG_VARIANCE] if self.moments else []), *CONDITIONS)

    def keys(self, sources: np.ndarray) -> np.ndarray:
        """Keys of every view and column of R faces, uint8 [V, R, C, 16]; 0 where a face lacks a file.

        Args:
            sources: hashes of their files, uint8 [R, F, 16], as `Hashes.survey` gives them.
        """
        done = b"".join(self._transform(column, view) for view in range(self.views) for column in self.columns)
        transforms = np.frombuffer(done, np.uint8).reshape(self.views, 1, -1, 16)  # [V, 1, C, 16]
        numbers = [0 if column in (IMAGE, LOG_VARIANCE) else FILES.index(column_of(column)) for column in self.columns]
        chosen = sources[:, numbers]  # [R, C, 16]
        # Two independent hashes are combined by exclusive or, which tells as much as hashing both once more.
        return np.where(chosen.any(-1, keepdims=True), chosen ^ transforms, 0).astype(np.uint8)

    def caption_keys(self, captions: Sequence[str]) -> np.ndarray:
        """Keys of captions, uint8 [N, 16]."""
        joined = b"".join(digest("caption", self.text, caption) for caption in captions)
        return np.frombuffer(joined, np.uint8).reshape(-1, 16)

    def _transform(self, column: str, view: int) -> bytes:
        varied = view if column in CONDITIONS else 0  # pictures are mirrored only: views 0 and 2 have the same
        return digest(TRANSFORM, self.codec, self.precision, self.size, column, view % 2, varied)


class Hashes:
    """Hashes of files, each read once: what an earlier run noted of a file holds while its path, size and times do."""

    def __init__(self, out: Path) -> None:
        parts = list(parts_of(out, "rows", ("stamps", "sources")))
        stamps, self.sources = (
            np.concatenate([np.empty((0, 16), np.uint8), *(part[name].numpy().reshape(-1, 16) for _, part in parts)])
            for name in ("stamps", "sources")
        )
        self.order, self.stamps = ordered(stamps)

    def survey(
        self, root: Path, rows: Sequence[dict[str, Any]], *, read: bool = True
    ) -> tuple[np.ndarray, np.ndarray, int]:
        """Stamps (path, size, times) and hashes of the files of R rows, each uint8 [R, F, 16], 0 where there is none.

        Args:
            root: the rows' folder.
            rows: R rows.
            read: whether to read files that no run has noted; else they are only counted, the third result.

        Raises:
            InputError: a file cannot be read.
        """
        stamps = np.zeros((len(rows), len(FILES), 16), np.uint8)
        sources = np.zeros_like(stamps)
        youngest = 0.0
        for place, path in files_of(rows):
            try:
                state = path.stat()
            except OSError as error:
                raise InputError(f"{path} cannot be read: {error.strerror or error}") from error
            youngest = max(youngest, state.st_ctime)
            # the time of change, too: it shows what a tool that sets the time of modification would hide
            name = path.relative_to(root).as_posix()
            stamps[place] = as_key(digest(name, state.st_size, state.st_mtime_ns, state.st_ctime_ns))
        if time.time() - youngest < TICK:
            time.sleep(TICK)  # whoever changes a file after it has been read gives it another time
        noted, unread = find(self.stamps, stamps), 0
        for place, path in files_of(rows):
            if noted[place] >= 0:
                sources[place] = self.sources[self.order[noted[place]]]
            elif read:
                sources[place] = as_key(hash_file(path))
            else:
                unread += 1
        return stamps, sources, unread


def files_of(rows: Sequence[dict[str, Any]]) -> Iterator[tuple[tuple[int, int], Path]]:
    """(row, number of the file column) and path of every file of some rows."""
    for number, row in enumerate(rows):
        for column, name in enumerate(FILES):
            if name in row:
                yield (number, column), row[name]


def each_block(folder: Path) -> Iterator[list[dict[str, Any]]]:
    """The rows of a folder, `BLOCK` at a time."""
    rows = each_row(folder)
    while block := list(islice(rows, BLOCK)):
        yield block


def write_rows(out: Path, root: Path, rows: Sequence[dict[str, Any]], stamps: np.ndarray, sources: np.ndarray) -> str:
    """Write what a store keeps of some rows themselves; returns the file's name."""
    told = [[row["file_name"].relative_to(root).as_posix(), list(captions_of(row))] for row in rows]
    lines = [json.dumps(line, ensure_ascii=False).encode(errors="backslashreplace") for line in told]
    tensors = {
        "lines": torch.frombuffer(bytearray(b"".join(lines)), dtype=torch.uint8),
        "ends": torch.tensor([len(line) for line in lines]).cumsum(0),
        "stamps": torch.from_numpy(stamps),
        "sources": torch.from_numpy(sources),
    }
    return write_part(out, "rows", tensors)


def parts_of(out: Path, kind: str, names: Sequence[str]) -> Iterator[tuple[str, dict[str, torch.Tensor]]]:
    """Name and tensors of every whole file of a kind, in order of the names; what a fault of the disk has damaged
    counts as absent.
    """
    for file in sorted(out.glob(f"{kind}-*.safetensors")):
        try:
            yield file.name, read_part(file, names)
        except InputError:
            continue


def hash_file(path: Path) -> bytes:
    """First 16 bytes of the SHA-256 of a file's bytes."""
    try:
        return hashlib.sha256(path.read_bytes()).digest()[:16]
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror or error}") from error


def digest(*parts: Any) -> bytes:
    """16 bytes that stand for some strings and numbers."""
    return hashlib.sha256(json.dumps(parts).encode()).digest()[:16]


def as_key(content: bytes) -> np.ndarray:
    """16 bytes as uint8 [16]."""
    return np.frombuffer(content, np.uint8)


def ordered(keys: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Keys uint8 [N, 16] in order: their numbers, int64 [N], and themselves as strings, S16 [N], for `find`."""
    strings = np.ascontiguousarray(keys).view("S16").reshape(-1)
    order = np.argsort(strings, kind="stable")
    return order, strings[order]


def find(strings: np.ndarray, keys: np.ndarray) -> np.ndarray:
    """Where keys uint8 [..., 16] stand among ordered ones, int64 [...]; -1 where they do not."""
    wanted = np.ascontiguousarray(keys).view("S16")[..., 0]
    if not len(strings):
        return np.full(wanted.shape, -1)
    places = np.minimum(np.searchsorted(strings, wanted), len(strings) - 1)
    return np.where(strings[places] == wanted, places, -1)
