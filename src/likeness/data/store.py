"""Shards: everything a training step reads of a face, encoded once.

A store is a folder of safetensors shards, one JSON file of captions a shard, and a `manifest.json` that is written
last. Latents are raw, as the autoencoder gives them, float16; they are normalised when read, so that
statistics may change without encoding again. Shards are memory-mapped: a million faces open at once.
"""

from __future__ import annotations

import bisect
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from likeness.files import write_whole
from likeness.types import InputError

MANIFEST = "manifest.json"
SCHEMA = 1
IMAGE = "image"
"""Name of the picture's own latents; conditions lie beside it under their names."""
PRESENT = "present"
"""Name of the table of the conditions that each face has, uint8 [N, K]; the latents of the others mean nothing."""


@dataclass(frozen=True)
class Sample:
    """What a store knows of one face."""

    latents: Tensor
    """Raw latent of the picture, float32 [C, h, w]."""
    conditions: dict[str, Tensor]
    """Condition name -> raw latent of its rendering, float32 [C, h, w]; only the conditions that the face has."""
    captions: Sequence[str]
    """Its captions; may be empty."""


class Store:
    """A finished store, open for reading.

    Raises:
        InputError: there is no finished store, or a shard is missing or damaged.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        path = self.folder / MANIFEST
        try:
            self.manifest: dict[str, Any] = json.loads(path.read_text())
        except OSError as error:
            raise InputError(
                f"{folder} holds no shards ({MANIFEST} is missing): run `likeness prepare encode`"
            ) from error
        except json.JSONDecodeError as error:
            raise InputError(f"{path} is not valid JSON: {error}") from error
        self.conditions: list[str] = self.manifest["conditions"]
        self.ends: list[int] = []
        self.shards: list[dict[str, Tensor]] = []
        self.captions: list[list[list[str]]] = []
        for entry in self.manifest["shards"]:
            file = self.folder / entry["file"]
            try:
                with safe_open(file, framework="pt") as opened:
                    shard = {name: opened.get_tensor(name) for name in (IMAGE, PRESENT, *self.conditions)}
                captions = json.loads(file.with_suffix(".json").read_text())
            except (OSError, SafetensorError, json.JSONDecodeError) as error:
                raise InputError(f"the shard {file} cannot be read ({error}): delete it and encode again") from error
            found = len(shard[IMAGE])
            if found != entry["count"] or len(captions) != found:
                raise InputError(f"the shard {file} holds {found} faces, not {entry['count']}: delete it, encode again")
            self.shards.append(shard)
            self.captions.append(captions)
            self.ends.append((self.ends[-1] if self.ends else 0) + found)

    def __len__(self) -> int:
        return self.ends[-1]

    def __getitem__(self, index: int) -> Sample:
        number = bisect.bisect_right(self.ends, index)
        row = index - (self.ends[number - 1] if number else 0)
        shard = self.shards[number]
        present = shard[PRESENT][row].tolist()
        return Sample(
            shard[IMAGE][row].float(),
            {name: shard[name][row].float() for name, there in zip(self.conditions, present, strict=True) if there},
            self.captions[number][row],
        )


def write_shard(folder: Path, name: str, tensors: dict[str, Tensor], captions: list[list[str]]) -> None:
    """Write one shard whole or not at all; its captions first, so that a shard that exists is complete.

    Args:
        folder: the store.
        name: file name of the shard.
        tensors: `IMAGE` and each condition, float16 [N, C, h, w], and `PRESENT`.
        captions: N lists.
    """
    file = folder / name
    write_whole(file.with_suffix(".json"), json.dumps(captions, ensure_ascii=False))
    write_whole(file, save({key: value.contiguous() for key, value in tensors.items()}))


def write_manifest(folder: Path, manifest: dict[str, Any]) -> None:
    """Finish a store."""
    write_whole(folder / MANIFEST, json.dumps({"schema": SCHEMA, **manifest}, indent=2))
