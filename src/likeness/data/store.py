"""Latent stores: everything that a training step reads of a face, encoded once.

A store is a folder of safetensors files that never change. Each is written atomically and named after its content, and
belongs to the store once `manifest.json`, which is written last, lists it: `latents-*` and `text-*` contain entries,
`rows-*` names, captions and file hashes of some faces, `places-*` the entries of each face. All are memory-mapped.
Latents are stored raw, as float16, and normalized when read, so that statistics may change without encoding again.
"""

from __future__ import annotations

import bisect
import hashlib
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from likeness.data.folder import mirrored_caption
from likeness.files import read_json, write_whole
from likeness.types import InputError, TextFeatures
from likeness.weights.hashes import file_hash

MANIFEST = "manifest.json"
SCHEMA = 2
PART = re.compile(r"(latents|text|rows|places)-[0-9a-f]{16}\.safetensors")
"""Names of the files of a store, which end in a hash of their content."""
IMAGE = "image"
"""Column of the latents of the image; those of conditions are named after the condition."""
LOG_VARIANCE = "image_log_variance"
"""Column next to `IMAGE`, which is then the mean, if the autoencoder returns a distribution."""


@dataclass(frozen=True)
class Sample:
    """One face of a store."""

    latents: Tensor
    """Raw latent of the image, float32 [C, h, w]; the mean if the autoencoder returns a distribution."""
    conditions: dict[str, Tensor]
    """Condition -> raw latent of its rendering, float32 [C, h, w]; only the conditions that the face has."""
    captions: Sequence[str]
    """May be empty. In those of a mirrored face, left and right are swapped."""
    log_variance: Tensor | None = None
    """Log variance of the latent, float32 [C, h, w], if the autoencoder returns a distribution."""
    text: Sequence[TextFeatures] = ()
    """Features of each caption and, last, of the empty one, float16 [L, D] and [P]; () if they are not stored."""


class Store:
    """A complete store, open for reading. Raises `InputError` if it is missing or incomplete, or a file is damaged."""

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        self.manifest = read_manifest(self.folder)
        self.conditions: list[str] = self.manifest["conditions"]
        self.latents = Parts(self.folder, self.manifest["latents"], ("latents",))
        self.rows = Parts(self.folder, self.manifest["rows"], ("lines", "ends"))
        self.text_hash: str | None = self.manifest["text"]
        """Hash of the text encoders of the stored features (`Components.text_hash`)."""
        self.text = Parts(self.folder, self.manifest["texts"], ("tokens", "pooled"))
        self.places = read_part(self.folder / self.manifest["places"])

    def __len__(self) -> int:
        return self.manifest["count"]

    def lacking(self, column: str) -> int:
        """Return the number of samples without an image or condition."""
        columns = self.manifest["columns"]
        return int((self.places["pictures"][:, columns.index(column)] < 0).sum()) if column in columns else len(self)

    def uncaptioned(self) -> int:
        """Return the number of faces without captions, of `len(self.rows)`."""
        ends = [(lines.numpy().tobytes(), stops.tolist()) for lines, stops in self.rows.parts]
        return sum(content.endswith(b"[]]", 0, end) for content, stops in ends for end in stops)

    def content_hash(self) -> str:
        """Hash what a training reads: latents, their order, text features, names and captions."""
        digest = hashlib.sha256(json.dumps([self.manifest[key] for key in ("latents", "texts", "places")]).encode())
        for lines, _ in self.rows.parts:
            digest.update(lines.numpy().tobytes())
        return digest.hexdigest()[:16]

    def verify(self) -> None:
        """Compare every file with the hash in its name. Raises `InputError` if one has changed."""
        parts = [name for key in ("latents", "texts", "rows") for name, _ in self.manifest[key]]
        for name in [*parts, self.manifest["places"]]:
            if not is_intact(self.folder / name):
                raise InputError(f"{self.folder / name} is damaged: run `likeness prepare encode` again")

    def __getitem__(self, index: int) -> Sample:
        row = index % len(self.rows)  # all faces of one augmentation, then those of the next
        places = zip(self.manifest["columns"], self.places["pictures"][index].tolist(), strict=True)
        latents = {name: self.latents[place][0].float() for name, place in places if place >= 0}
        lines, ends, offset = self.rows.find(row)
        start = int(ends[offset - 1]) if offset else 0
        _, captions = json.loads(lines[start : int(ends[offset])].numpy().tobytes())
        mirrored = index // len(self.rows) % 2 == 1
        if mirrored:
            captions = [mirrored_caption(caption) for caption in captions]
        text: Sequence[TextFeatures] = ()
        if self.text_hash:
            end = int(self.places["caption_ends"][row])
            column = self.places["mirrored_captions" if mirrored else "captions"]
            entries = column[end - len(captions) : end].tolist()
            text = [TextFeatures(*self.text[entry]) for entry in (*entries, self.manifest["empty_caption"])]
        conditions = {name: latents[name] for name in self.conditions if name in latents}
        return Sample(latents[IMAGE], conditions, captions, latents.get(LOG_VARIANCE), text)


class Parts:
    """Tensors of several files, concatenated along their first axis. They are read when they are needed. Raises
    `InputError` if a file is missing, damaged, or has another number of entries than the manifest states.
    """

    def __init__(self, folder: Path, files: Sequence[tuple[str, int]], names: Sequence[str]) -> None:
        """`files`: (name, number of entries); `names`: tensors to read of each file."""
        self.parts: list[list[Tensor]] = []
        for file, count in files:
            tensors = read_part(folder / file, names)
            if len(tensors[names[-1]]) != count:
                raise InputError(f"{folder / file} does not have {count} entries: run `likeness prepare encode` again")
            self.parts.append([tensors[name] for name in names])
        self.ends = list(accumulate(count for _, count in files))

    def __len__(self) -> int:
        return self.ends[-1] if self.ends else 0

    def __getitem__(self, index: int) -> Sequence[Tensor]:
        """Return entry `index` of each tensor."""
        *tensors, offset = self.find(index)
        return [tensor[offset] for tensor in tensors]

    def find(self, index: int) -> Sequence[Any]:
        """Return the tensors of the file that contains entry `index`, and its number in that file."""
        number = bisect.bisect_right(self.ends, index)
        return *self.parts[number], index - (self.ends[number - 1] if number else 0)


def read_manifest(folder: Path) -> dict[str, Any]:
    """Return the manifest of a complete store. Raises `InputError` if it is missing or of another version."""
    if not (folder / MANIFEST).is_file():
        raise InputError(f"{folder} has no complete shards ({MANIFEST} is missing): run `likeness prepare encode`")
    manifest = read_json(folder / MANIFEST)
    if manifest.get("schema") != SCHEMA:
        raise InputError(f"{folder} has shards of another version: delete it and run `likeness prepare encode` again")
    return manifest


def read_part(file: Path, names: Sequence[str] | None = None) -> dict[str, Tensor]:
    """Return tensors of a file of a store, memory-mapped; None means all. Raises `InputError` if it cannot be read."""
    try:
        with safe_open(file, framework="pt") as opened:
            return {name: opened.get_tensor(name) for name in (names or opened.keys())}
    except (OSError, SafetensorError) as error:
        raise InputError(f"{file} cannot be read ({error}): run `likeness prepare encode` again") from error


def is_intact(file: Path) -> bool:
    """Return whether a file of a store has the content by which it is named."""
    try:
        return file_hash(file)[:16] == file.stem.rpartition("-")[2]
    except OSError:
        return False


def write_part(folder: Path, kind: str, tensors: dict[str, Tensor]) -> str:
    """Write one file of a store, unless it exists. Returns its name: `kind` and a hash of its content."""
    content = save({name: tensor.contiguous() for name, tensor in tensors.items()})
    name = f"{kind}-{hashlib.sha256(content).hexdigest()[:16]}.safetensors"
    file = folder / name
    if not file.is_file() or file.stat().st_size != len(content):
        write_whole(file, content)
    return name


def write_manifest(folder: Path, manifest: dict[str, Any]) -> None:
    """Complete a store."""
    write_whole(folder / MANIFEST, json.dumps({"schema": SCHEMA, **manifest}, indent=1))
