"""Stores: everything a training step reads of a face, encoded once.

A store is a folder of safetensors files that never change. Each is named after what it holds and written whole, and
belongs to the store once `manifest.json`, which is written last, lists it: `latents-*` and `text-*` hold entries under
the hash of what they were made from, `rows-*` names, captions and file hashes of some faces, `places-*` which entry is
whose. All are memory-mapped: a million faces open at once. Latents are raw, float16; they are normalised when read, so
that statistics may change without encoding again.
"""

from __future__ import annotations

import bisect
import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from likeness.files import write_whole
from likeness.types import InputError, TextFeatures

MANIFEST = "manifest.json"
SCHEMA = 2
IMAGE = "image"
"""Column of the picture's own latents; conditions lie beside it under their names."""
LOG_VARIANCE = "image_log_variance"
"""Column that stands beside `IMAGE`, which is then the mean, where the autoencoder gives a distribution."""


@dataclass(frozen=True)
class Sample:
    """What a store knows of one face."""

    latents: Tensor
    """Raw latent of the picture, float32 [C, h, w]; the mean where the autoencoder gives a distribution."""
    conditions: dict[str, Tensor]
    """Condition name -> raw latent of its rendering, float32 [C, h, w]; only the conditions that the face has."""
    captions: Sequence[str]
    """Its captions; may be empty."""
    log_variance: Tensor | None = None
    """Log variance of the latent, float32 [C, h, w], where the autoencoder gives a distribution."""
    text: Sequence[TextFeatures] = ()
    """Features of each caption and, last, of the empty one, float16 [L, D] and [P]; () where the store has none."""


class Store:
    """A finished store, open for reading.

    Raises:
        InputError: there is no finished store, or one of its files is missing or damaged.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        self.manifest = read_manifest(self.folder)
        self.conditions: list[str] = self.manifest["conditions"]
        columns = self.manifest["columns"]
        self.latents = Joined(self.folder, self.manifest["latents"], ("latents",))
        self.rows = Joined(self.folder, self.manifest["rows"], ("lines", "ends"))
        self.tower: str | None = self.manifest["text"]
        """Hash of the text towers whose features it holds (`Components.text_hash`)."""
        self.text = Joined(self.folder, self.manifest["texts"], ("tokens", "pooled"))
        self.places = read_part(self.folder / self.manifest["places"])
        self.columns = [(name, columns.index(name)) for name in columns]

    def __len__(self) -> int:
        return self.manifest["count"]

    def __getitem__(self, index: int) -> Sample:
        row = index % len(self.rows)  # one view of all faces comes after the other
        places = self.places["pictures"][index].tolist()
        latents = {name: self.latents[places[at]][0].float() for name, at in self.columns if places[at] >= 0}
        lines, ends, offset = self.rows.find(row)
        _, captions = read_line(lines, ends, offset)
        return Sample(
            latents[IMAGE],
            {name: latents[name] for name in self.conditions if name in latents},
            captions,
            latents.get(LOG_VARIANCE),
            self._text(row, len(captions)) if self.tower else (),
        )

    def _text(self, row: int, count: int) -> Sequence[TextFeatures]:
        end = int(self.places["caption_ends"][row])
        places = self.places["captions"][end - count : end].tolist()
        return [TextFeatures(*self.text[place]) for place in (*places, self.manifest["empty_caption"])]


class Joined:
    """Tensors of several files as one along their first axis; nothing is read before it is asked for.

    Raises:
        InputError: a file is missing, damaged, or holds another number of entries than the manifest says.
    """

    def __init__(self, folder: Path, files: Sequence[tuple[str, int]], names: Sequence[str]) -> None:
        """`files`: their names and numbers of entries; `names`: the tensors wanted of each."""
        self.parts: list[list[Tensor]] = []
        for file, count in files:
            tensors = read_part(folder / file, names)
            if len(tensors[names[-1]]) != count:
                raise InputError(f"{folder / file} holds not {count} entries: run `likeness prepare encode` again")
            self.parts.append([tensors[name] for name in names])
        self.ends = list(accumulate(count for _, count in files))

    def __len__(self) -> int:
        return self.ends[-1] if self.ends else 0

    def __getitem__(self, index: int) -> Sequence[Tensor]:
        """Entry `index` of each tensor."""
        *tensors, offset = self.find(index)
        return [tensor[offset] for tensor in tensors]

    def find(self, index: int) -> Sequence[Any]:
        """The tensors of the file that holds entry `index`, and its number in that file."""
        number = bisect.bisect_right(self.ends, index)
        return *self.parts[number], index - (self.ends[number - 1] if number else 0)


def read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest of a finished store.

    Raises:
        InputError: there is none that can be used.
    """
    path = folder / MANIFEST
    try:
        manifest = json.loads(path.read_text())
    except OSError as error:
        raise InputError(f"{folder} holds no shards ({MANIFEST} is missing): run `likeness prepare encode`") from error
    except json.JSONDecodeError as error:
        raise InputError(f"{path} is not valid JSON: {error}") from error
    if manifest.get("schema") != SCHEMA:
        raise InputError(f"{folder} holds shards of another version: delete it and run `likeness prepare encode` again")
    return manifest


def read_line(lines: Tensor, ends: Tensor, offset: int) -> tuple[str, list[str]]:
    """File name and captions of one face, from a `rows-*` file: JSON, uint8, and where each line ends."""
    start = int(ends[offset - 1]) if offset else 0
    name, captions = json.loads(lines[start : int(ends[offset])].numpy().tobytes())
    return name, captions


def read_part(file: Path, names: Sequence[str] | None = None) -> dict[str, Tensor]:
    """Tensors of one file of a store, memory-mapped; all, or those named.

    Raises:
        InputError: it cannot be read.
    """
    try:
        with safe_open(file, framework="pt") as opened:
            return {name: opened.get_tensor(name) for name in (opened.keys() if names is None else names)}
    except (OSError, SafetensorError) as error:
        raise InputError(f"{file} cannot be read ({error}): run `likeness prepare encode` again") from error


def write_part(folder: Path, kind: str, tensors: dict[str, Tensor]) -> str:
    """Write one file of a store, whole or not at all, unless it is there.

    Returns:
        Its name: `kind` and a hash of its content.
    """
    content = save({name: tensor.contiguous() for name, tensor in tensors.items()})
    name = f"{kind}-{hashlib.sha256(content).hexdigest()[:16]}.safetensors"
    file = folder / name
    if not file.is_file() or file.stat().st_size != len(content):
        write_whole(file, content)
    return name


def write_manifest(folder: Path, manifest: dict[str, Any]) -> None:
    """Finish a store."""
    write_whole(folder / MANIFEST, json.dumps({"schema": SCHEMA, **manifest}, indent=1))
