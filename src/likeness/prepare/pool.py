"""Entries under their keys: what is in a store's files is not made again, what is new is written in files of a bounded
size, and what nobody needs any more is left out.

Files never change, so a reader, a killed run and other processes at work can do no harm to one another.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from likeness.data.store import read_part, write_part
from likeness.prepare.sources import find, ordered, parts_of

LATENTS, TEXT = ("latents",), ("tokens", "pooled")
"""Tensors of an entry of either kind, beside its key."""


class Pool:
    """The entries of one kind that this process makes; others may make theirs at the same time."""

    def __init__(self, out: Path, kind: str, limit: int, known: np.ndarray | None = None) -> None:
        """`limit`: bytes a file; `known`: keys that are in the store, S16 [N] in order (`Table.strings`)."""
        self.out, self.kind, self.limit = out, kind, limit
        self.known = np.empty(0, "S16") if known is None else known
        self.claimed: set[bytes] = set()
        self.waiting: dict[bytes, dict[str, Tensor]] = {}
        self.bytes = 0
        self.files: dict[str, int] = {}
        """What was written: names and numbers of entries."""

    def claim(self, keys: np.ndarray) -> Iterator[int]:
        """Which of the keys uint8 [N, 16] are neither in the store nor claimed before; whoever asks has to add them."""
        for number in np.flatnonzero(find(self.known, keys) < 0):
            key = keys[number].tobytes()
            if key not in self.claimed:
                self.claimed.add(key)
                yield int(number)

    def add(self, key: bytes, **tensors: Tensor) -> None:
        """An entry; written when enough are waiting."""
        self.waiting[key] = tensors
        self.bytes += sum(tensor.nbytes for tensor in tensors.values())
        if self.bytes >= self.limit:
            self.flush()

    def flush(self) -> None:
        """Write what is waiting."""
        if not self.waiting:
            return
        keys = np.frombuffer(b"".join(self.waiting), np.uint8).reshape(-1, 16).copy()
        entries = list(self.waiting.values())
        tensors = {name: torch.stack([entry[name] for entry in entries]) for name in entries[0]}
        name = write_part(self.out, self.kind, {"keys": torch.from_numpy(keys), **tensors})
        self.files[name] = len(entries)
        _, fresh = ordered(keys)
        self.known = np.insert(self.known, np.searchsorted(self.known, fresh), fresh)
        self.claimed.difference_update(self.waiting)
        self.waiting, self.bytes = {}, 0


class Table:
    """Where every entry of a kind lies: number among all entries of all files, in order of the files' names."""

    def __init__(self, out: Path, kind: str) -> None:
        self.out, self.kind = out, kind
        keys = {name: part["keys"].numpy() for name, part in parts_of(out, kind, ("keys",))}
        self.files = {name: len(part) for name, part in keys.items()}
        self.order, self.strings = ordered(np.concatenate([np.empty((0, 16), np.uint8), *keys.values()]))

    def places(self, keys: np.ndarray) -> np.ndarray:
        """Numbers of the entries of keys uint8 [..., 16], int32 [...]; -1 where there is none."""
        found = find(self.strings, keys)
        return np.where(found < 0, -1, self.order[found] if len(self.order) else -1).astype(np.int32)

    def settle(self, places: np.ndarray, names: tuple[str, ...], limit: int) -> tuple[dict[str, int], np.ndarray]:
        """Keep the files that are needed; what is needed of a file that is mostly not is copied into a new one.

        Args:
            places: numbers of all entries that are needed, in any order; -1 is none.
            names: tensors of an entry.
            limit: bytes a new file.

        Returns:
            The files to keep, with their numbers of entries; and for every old number the new one, int32 [N + 1],
            whose last, -1, stands for none.
        """
        needed = np.zeros(len(self.order), bool)
        needed[places[places >= 0]] = True
        moved = np.full(len(needed) + 1, -1, np.int32)
        files: dict[str, int] = {}
        copies, copied = Pool(self.out, self.kind, limit), []
        start = kept = 0
        for name, count in self.files.items():
            used = np.flatnonzero(needed[start : start + count]).tolist()
            if used and 2 * len(used) >= count:
                files[name] = count
                moved[start : start + count] = kept + np.arange(count)
                kept += count
            elif used:
                part = read_part(self.out / name, ("keys", *names))
                for number in used:
                    copies.add(part["keys"][number].numpy().tobytes(), **{key: part[key][number] for key in names})
                copied += [start + number for number in used]
            start += count
        copies.flush()
        moved[copied] = kept + np.arange(len(copied))
        return {**files, **copies.files}, moved
