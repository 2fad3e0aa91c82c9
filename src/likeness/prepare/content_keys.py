"""Content keys: an entry of a latent store is named after a hash of what it was made from.

A key combines the hash of the file's bytes with the hash of everything that is done to it. Paths and dates are not part
of a key, so moving or reordering files costs nothing, and an existing entry is always up to date. Hashing bytes needs
no decoding, but a file that was saved again with equal pixels counts as changed.
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
"""Version of the preprocessing. Increase it if the same file leads to other pixels: this changes every key."""
FILES = ("file_name", *(column_of(name) for name in CONDITIONS))
"""File columns of a row, in the order of their hashes in `rows-*`."""
BLOCK = 256
"""Rows per `rows-*` file."""
TICK = 0.05
"""Seconds within which a file may change twice without a change of its time stamp."""


@dataclass(frozen=True, kw_only=True)
class EncodeSettings:
    """Everything that determines the entries, except for the files."""

    codec: str
    """Hash of the encoder of the autoencoder (`Components.codec_hash`)."""
    moments: bool
    """Whether the autoencoder returns a distribution: images then have a mean and a log variance, conditions a mean."""
    size: int
    """Side length in pixels."""
    precision: Literal["fp32", "bf16"]
    """Precision of the autoencoder."""
    augmentations: int
    """Versions of each face."""
    text: str | None
    """Hash of the text encoders (`Components.text_hash`); None if captions are not encoded."""

    @property
    def columns(self) -> Sequence[str]:
        """C columns: the image, its log variance if there is one, and all conditions."""
        return (IMAGE, *([LOG_VARIANCE] if self.moments else []), *CONDITIONS)

    def keys(self, hashes: np.ndarray) -> np.ndarray:
        """Return the keys of A augmentations of R faces, uint8 [A, R, C, 16]; 0 if a face has no such file.

        Args:
            hashes: file hashes, uint8 [R, F, 16], from `FileHashes.lookup`.
        """
        transforms = [
            self._transform(column, number) for number in range(self.augmentations) for column in self.columns
        ]
        transform = np.frombuffer(b"".join(transforms), np.uint8).reshape(
            self.augmentations, 1, -1, 16
        )  # [A, 1, C, 16]
        file_of = [0 if column in (IMAGE, LOG_VARIANCE) else FILES.index(column_of(column)) for column in self.columns]
        chosen = hashes[:, file_of]  # [R, C, 16]
        return np.where(chosen.any(-1, keepdims=True), chosen ^ transform, 0).astype(np.uint8)

    def caption_keys(self, captions: Sequence[str]) -> np.ndarray:
        """Return the keys of N captions, uint8 [N, 16]."""
        joined = b"".join(digest("caption", self.text, caption) for caption in captions)
        return np.frombuffer(joined, np.uint8).reshape(-1, 16)

    def _transform(self, column: str, augmentation: int) -> bytes:
        varied = augmentation if column in CONDITIONS else 0  # images are only mirrored: 0 and 2 are equal
        return digest(TRANSFORM, self.codec, self.precision, self.size, column, augmentation % 2, varied)

    def manifest(self) -> dict[str, Any]:
        """Return the settings as the manifest names them."""
        values = {name: getattr(self, name) for name in ("codec", "moments", "size", "precision", "text")}
        return values | {"views": self.augmentations}


class KeyIndex:
    """N keys of 16 bytes, found by binary search: 24 bytes per key, a quarter of a dict."""

    def __init__(self, keys: Sequence[np.ndarray] = ()) -> None:
        """`keys`: parts of uint8 [..., 16], concatenated."""
        strings = as_strings(np.concatenate([np.empty((0, 16), np.uint8), *(part.reshape(-1, 16) for part in keys)]))
        self.order = np.argsort(strings, kind="stable")
        self.sorted = strings[self.order]

    def find(self, keys: np.ndarray) -> np.ndarray:
        """Return the positions of keys uint8 [..., 16] among the N keys, int64 [...]; -1 if absent."""
        wanted = as_strings(keys)
        if not len(self.sorted):
            return np.full(wanted.shape, -1)
        places = np.minimum(np.searchsorted(self.sorted, wanted), len(self.sorted) - 1)
        return np.where(self.sorted[places] == wanted, self.order[places], -1)

    def add(self, keys: np.ndarray) -> None:
        """Append keys uint8 [M, 16]."""
        strings = as_strings(keys)
        numbers = np.argsort(strings, kind="stable")
        places = np.searchsorted(self.sorted, strings[numbers])
        self.order = np.insert(self.order, places, numbers + len(self.order))
        self.sorted = np.insert(self.sorted, places, strings[numbers])


class FileHashes:
    """Content hashes of files. Files whose path, size and times are unchanged since an earlier run are not read."""

    def __init__(self, out: Path) -> None:
        parts = list(parts_of(out, "rows", ("stamps", "sources")))
        self.hashes = np.concatenate(
            [np.empty((0, 16), np.uint8), *(part["sources"].numpy().reshape(-1, 16) for _, part in parts)]
        )
        self.index = KeyIndex([part["stamps"].numpy() for _, part in parts])

    def lookup(
        self, root: Path, rows: Sequence[dict[str, Any]], *, read: bool = True
    ) -> tuple[np.ndarray, np.ndarray, int]:
        """Return stamps (path, size, times) and content hashes of the files of R rows, and the number of unknown files.

        Args:
            root: folder of the rows.
            rows: R rows.
            read: whether to read unknown files; otherwise they are only counted.

        Returns:
            Stamps and hashes, each uint8 [R, F, 16], 0 if there is no file; and the count.

        Raises:
            InputError: a file cannot be read.
        """
        stamps = np.zeros((len(rows), len(FILES), 16), np.uint8)
        hashes = np.zeros_like(stamps)
        newest = 0.0
        for place, path in files_of(rows):
            try:
                state = path.stat()
            except OSError as error:
                raise InputError(f"{path} cannot be read: {error.strerror or error}") from error
            newest = max(newest, state.st_ctime)
            # ctime reveals changes by tools that reset mtime.
            name = path.relative_to(root).as_posix()
            stamps[place] = as_key(digest(name, state.st_size, state.st_mtime_ns, state.st_ctime_ns))
        if time.time() - newest < TICK:
            time.sleep(TICK)  # a change after this read gets another time stamp
        known, unknown = self.index.find(stamps), 0
        for place, path in files_of(rows):
            if known[place] >= 0:
                hashes[place] = self.hashes[known[place]]
            elif read:
                hashes[place] = as_key(hash_file(path))
            else:
                unknown += 1
        return stamps, hashes, unknown


def files_of(rows: Sequence[dict[str, Any]]) -> Iterator[tuple[tuple[int, int], Path]]:
    """Yield (row number, column number) and path of every file of some rows."""
    for number, row in enumerate(rows):
        for column, name in enumerate(FILES):
            if name in row:
                yield (number, column), row[name]


def each_block(folder: Path) -> Iterator[list[dict[str, Any]]]:
    """Yield the rows of a folder, `BLOCK` at a time."""
    rows = each_row(folder)
    while block := list(islice(rows, BLOCK)):
        yield block


def write_rows(out: Path, root: Path, rows: Sequence[dict[str, Any]], stamps: np.ndarray, hashes: np.ndarray) -> str:
    """Write names, captions, stamps and hashes of some rows; returns the file's name."""
    values = [[row["file_name"].relative_to(root).as_posix(), list(captions_of(row))] for row in rows]
    lines = [json.dumps(value, ensure_ascii=False).encode(errors="backslashreplace") for value in values]
    tensors = {
        "lines": torch.frombuffer(bytearray(b"".join(lines)), dtype=torch.uint8),
        "ends": torch.tensor([len(line) for line in lines]).cumsum(0),
        "stamps": torch.from_numpy(stamps),
        "sources": torch.from_numpy(hashes),
    }
    return write_part(out, "rows", tensors)


def parts_of(out: Path, kind: str, names: Sequence[str]) -> Iterator[tuple[str, dict[str, torch.Tensor]]]:
    """Yield name and tensors of every readable file of a kind, sorted by name. Damaged files count as absent."""
    for file in sorted(out.glob(f"{kind}-*.safetensors")):
        try:
            yield file.name, read_part(file, names)
        except InputError:
            continue


def hash_file(path: Path) -> bytes:
    """Return the first 16 bytes of the SHA-256 of a file."""
    try:
        return hashlib.sha256(path.read_bytes()).digest()[:16]
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror or error}") from error


def digest(*parts: Any) -> bytes:
    """Hash strings and numbers to 16 bytes."""
    return hashlib.sha256(json.dumps(parts).encode()).digest()[:16]


def as_key(content: bytes) -> np.ndarray:
    """16 bytes as uint8 [16]."""
    return np.frombuffer(content, np.uint8)


def as_strings(keys: np.ndarray) -> np.ndarray:
    """Keys uint8 [..., 16] as sortable strings, S16 [...]."""
    return np.ascontiguousarray(keys).view("S16")[..., 0]
