"""Encode a prepared folder into shards: pictures and rendered conditions through the autoencoder, once.

A shard that exists is complete and is not made again; a store made with another autoencoder, size or data is refused
rather than mixed.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

from likeness.conditions import CONDITIONS
from likeness.data.ahead import read_ahead
from likeness.data.folder import captions_of, column_of, read_folder, read_photo
from likeness.data.store import IMAGE, MANIFEST, PRESENT, write_manifest, write_shard
from likeness.encoders.latent import LatentCodec, spatial_factor, to_tensor
from likeness.files import write_whole
from likeness.pipelines.load import Components, read_json
from likeness.types import InputError

TOGETHER = 16
"""Faces a pass through the autoencoder."""


def encode_folder(
    folder: Path,
    out: Path,
    components: Components,
    *,
    size: int,
    views: int = 1,
    precision: Literal["fp32", "bf16"] = "fp32",
    shard_size: int = 1024,
    progress: Callable[[int, int], None] | None = None,
) -> dict[str, Any]:
    """Write a store of `folder` to `out`.

    Args:
        folder: a prepared folder (`likeness.data.folder`).
        out: the store's folder; run again to go on after an interruption.
        components: autoencoder and its settings.
        size: pixels a side.
        views: versions of each face. View 0 is the face as it is; every odd one is mirrored; in all but view 0 the
            conditions are varied (`likeness.conditions.vary`).
        precision: of the computation; latents are stored as float16. bf16 is about three times as fast on a CPU.
        shard_size: faces a shard, views counted.
        progress: called as (faces done, faces in all), views counted.

    Returns:
        The manifest.

    Raises:
        InputError: a file cannot be read, or `out` was begun with other settings.
    """
    rows = read_folder(folder)
    names = [name for name in CONDITIONS if any(column_of(name) in row for row in rows)]
    if size % spatial_factor(components.vae):
        raise InputError(
            f"the size {size} is not a multiple of the autoencoder's factor {spatial_factor(components.vae)}"
        )
    if views < 1:
        raise InputError(f"views is {views}: every face needs at least one")
    plan = {
        "codec": components.codec_hash,
        "size": size,
        "conditions": names,
        "views": views,
        "precision": precision,
        "count": len(rows) * views,
        "source": hashlib.sha256("\n".join(row["file_name"].name for row in rows).encode()).hexdigest(),
        "shard_size": shard_size,
    }
    begun = out / "plan.json"
    if begun.is_file() and (different := {k for k, v in read_json(begun).items() if plan.get(k) != v}):
        raise InputError(f"{out} was begun with another {sorted(different)[0]}: choose another folder or delete it")
    write_whole(begun, json.dumps(plan, indent=2))
    # Raw latents: the statistics are applied when they are read.
    codec = LatentCodec(components.vae.to(memory_format=torch.channels_last), together=True)
    everything = [(number, row, view) for view in range(views) for number, row in enumerate(rows)]
    shards = []
    for start in range(0, len(everything), shard_size):
        part = everything[start : start + shard_size]
        name = f"shard-{start // shard_size:05d}.safetensors"
        if not (out / name).is_file():
            encoded, present = [], []
            passes = [part[at : at + TOGETHER] for at in range(0, len(part), TOGETHER)]
            for number, (pictures, there) in enumerate(read_ahead(lambda p: view_pictures(p, names, size), passes)):
                given = to_tensor(pictures).to(memory_format=torch.channels_last)  # [B (1 + K), 3, S, S]
                with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
                    latents = codec.encode(given)  # [B (1 + K), C, h, w]
                encoded.append(latents.unflatten(0, (-1, 1 + len(names))).half())  # [B, 1 + K, C, h, w]
                present.append(there)
                if progress is not None:
                    progress(min(start + (number + 1) * TOGETHER, start + len(part)), len(everything))
            latents = torch.cat(encoded)
            tensors = {key: latents[:, column] for column, key in enumerate((IMAGE, *names))}
            tensors[PRESENT] = torch.from_numpy(np.concatenate(present))
            write_shard(out, name, tensors, [list(captions_of(row)) for _, row, _ in part])
        shards.append({"file": name, "count": len(part)})
    manifest = {**plan, "shards": shards}
    write_manifest(out, manifest)
    assert (out / MANIFEST).is_file()
    return manifest


def view_pictures(
    faces: Sequence[tuple[int, dict[str, Any], int]], names: Sequence[str], size: int
) -> tuple[list[np.ndarray], np.ndarray]:
    """What the autoencoder is given of B faces, each (number, row, view).

    Returns:
        B (1 + K) pictures uint8 [S, S, 3], each face followed by its conditions, black where it lacks one; and
        which conditions are present, uint8 [B, K].
    """
    pictures: list[np.ndarray] = []
    present = np.zeros((len(faces), len(names)), dtype=np.uint8)
    for place, (number, row, view) in enumerate(faces):
        mirrored = view % 2 == 1
        photo = read_photo(row["file_name"], size)
        pictures.append(photo[:, ::-1] if mirrored else photo)
        for column, name in enumerate(names):
            if column_of(name) not in row:
                pictures.append(np.zeros((size, size, 3), dtype=np.uint8))
                continue
            condition = CONDITIONS[name]
            raw = condition.resize(condition.read(row[column_of(name)]).raw, size, size)
            if view:
                raw = condition.vary(raw, np.random.default_rng([number, view, column]))
            pictures.append(condition.render(condition.flip(raw) if mirrored else raw, size, size))
            present[place, column] = 1
    return pictures, present
