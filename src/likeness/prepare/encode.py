"""Encode a prepared folder into shards: pictures and rendered conditions through the autoencoder, once.

A shard that exists is complete and is not made again; a store made with another autoencoder, size or data is refused
rather than mixed.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from likeness.conditions import CONDITIONS
from likeness.data.folder import captions_of, column_of, read_folder
from likeness.data.store import IMAGE, MANIFEST, write_manifest, write_shard
from likeness.encoders.latent import LatentCodec, spatial_factor, to_tensor
from likeness.files import write_whole
from likeness.pipelines.load import Components, read_json
from likeness.types import InputError


def encode_folder(
    folder: Path,
    out: Path,
    components: Components,
    *,
    size: int,
    shard_size: int = 1024,
    progress: Callable[[int, int], None] | None = None,
) -> dict[str, Any]:
    """Write a store of `folder` to `out`.

    Args:
        folder: a prepared folder (`likeness.data.folder`).
        out: the store's folder; run again to go on after an interruption.
        components: autoencoder and its settings.
        size: pixels a side.
        shard_size: faces a shard.
        progress: called as (faces done, faces in all).

    Returns:
        The manifest.

    Raises:
        InputError: a file cannot be read, or `out` was begun with other settings.
    """
    rows = read_folder(folder)
    names = [name for name in CONDITIONS if all(column_of(name) in row for row in rows)]
    if size % spatial_factor(components.vae):
        raise InputError(
            f"the size {size} is not a multiple of the autoencoder's factor {spatial_factor(components.vae)}"
        )
    plan = {
        "codec": components.codec_hash,
        "size": size,
        "conditions": names,
        "count": len(rows),
        "source": hashlib.sha256("\n".join(row["file_name"].name for row in rows).encode()).hexdigest(),
        "shard_size": shard_size,
    }
    begun = out / "plan.json"
    if begun.is_file() and (different := {k for k, v in read_json(begun).items() if plan.get(k) != v}):
        raise InputError(f"{out} was begun with another {sorted(different)[0]}: choose another folder or delete it")
    write_whole(begun, json.dumps(plan, indent=2))
    codec = LatentCodec(components.vae)  # raw latents: the statistics are applied when they are read
    shards = []
    for start in range(0, len(rows), shard_size):
        part = rows[start : start + shard_size]
        name = f"shard-{start // shard_size:05d}.safetensors"
        if not (out / name).is_file():
            latents: dict[str, list[torch.Tensor]] = {key: [] for key in (IMAGE, *names)}
            for number, row in enumerate(part):
                pictures = [read_picture(row["file_name"], size), *(rendered(row, name, size) for name in names)]
                encoded = codec.encode(to_tensor(pictures))  # [1 + conditions, C, h, w]
                for key, latent in zip(latents, encoded, strict=True):
                    latents[key].append(latent)
                if progress is not None:
                    progress(start + number + 1, len(rows))
            stacked = {key: torch.stack(values) for key, values in latents.items()}
            write_shard(out, name, stacked, [list(captions_of(row)) for row in part])
        shards.append({"file": name, "count": len(part)})
    manifest = {**plan, "shards": shards}
    write_manifest(out, manifest)
    assert (out / MANIFEST).is_file()
    return manifest


def rendered(row: dict[str, Any], name: str, size: int) -> np.ndarray:
    """A row's condition as its picture, uint8 [S, S, 3]."""
    condition = CONDITIONS[name]
    raw = condition.read(row[column_of(name)]).raw
    return condition.render(condition.resize(raw, size, size), size, size)


def read_picture(path: Path, size: int) -> np.ndarray:
    """A photograph, uint8 [S, S, 3], reduced where it is larger.

    Raises:
        InputError: it cannot be read, or is not square.
    """
    try:
        image = Image.open(path).convert("RGB")
    except (OSError, Image.DecompressionBombError) as error:
        raise InputError(f"{path} cannot be read as a picture: {error}") from error
    if image.width != image.height:
        raise InputError(f"{path} is {image.width}x{image.height}; training pictures must be square: crop it")
    return np.asarray(image if image.width == size else image.resize((size, size), Image.Resampling.LANCZOS))
