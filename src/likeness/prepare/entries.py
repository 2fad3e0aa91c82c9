"""Entries of a latent store under their content keys.

Files are never changed once written, so readers and other processes are not affected by a running or killed process.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from likeness.data.store import write_part
from likeness.prepare.content_keys import KeyIndex, parts_of


class Entries:
    """All entries of one kind (`latents` or `text`) in a store, numbered across files in the order of file names."""

    def __init__(self, out: Path, kind: str, only: set[str] | None = None) -> None:
        """`only`: names of the files to include; None includes all."""
        keys = {
            name: part["keys"].numpy() for name, part in parts_of(out, kind, ("keys",)) if only is None or name in only
        }
        self.files = {name: len(part) for name, part in keys.items()}
        """Name -> number of entries."""
        self.index = KeyIndex(list(keys.values()))

    def used_files(self, places: np.ndarray) -> set[str]:
        """Return the files that contain at least one of the entries `places`; -1 means none."""
        ends = np.cumsum(list(self.files.values()))
        used = np.unique(np.searchsorted(ends, places[places >= 0], side="right"))
        names = list(self.files)
        return {names[number] for number in used.tolist()}


class EntryWriter:
    """Writes the new entries of one process; other processes may write theirs at the same time."""

    def __init__(self, out: Path, kind: str, limit: int) -> None:
        """`limit`: bytes per file."""
        self.out, self.kind, self.limit = out, kind, limit
        self.known = Entries(out, kind).index
        self.claimed: set[bytes] = set()
        self.pending: dict[bytes, dict[str, Tensor]] = {}
        self.bytes = 0

    def claim(self, keys: np.ndarray) -> Iterator[int]:
        """Yield the positions of those keys uint8 [N, 16] that are neither stored nor claimed. The caller adds them."""
        for number in np.flatnonzero(self.known.find(keys) < 0):
            key = keys[number].tobytes()
            if key not in self.claimed:
                self.claimed.add(key)
                yield int(number)

    def add(self, key: bytes, **tensors: Tensor) -> None:
        """Add an entry; a file is written once `limit` bytes are pending."""
        self.pending[key] = tensors
        self.bytes += sum(tensor.nbytes for tensor in tensors.values())
        if self.bytes >= self.limit:
            self.flush()

    def flush(self) -> None:
        """Write the pending entries."""
        if not self.pending:
            return
        keys = np.frombuffer(b"".join(self.pending), np.uint8).reshape(-1, 16).copy()
        entries = list(self.pending.values())
        tensors = {name: torch.stack([entry[name] for entry in entries]) for name in entries[0]}
        write_part(self.out, self.kind, {"keys": torch.from_numpy(keys), **tensors})
        self.known.add(keys)
        self.claimed.difference_update(self.pending)
        self.pending, self.bytes = {}, 0
