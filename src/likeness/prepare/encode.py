"""Encode a prepared folder into a latent store: images and rendered conditions through the autoencoder, captions
optionally through the text encoders.

A second run encodes only what is missing. Several processes divide the work and communicate through files only; the
process that finds nothing missing writes the manifest.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from filelock import FileLock

from likeness.conditions import CONDITIONS
from likeness.data.ahead import read_ahead
from likeness.data.folder import METADATA, captions_of, column_of, read_photo, root_of
from likeness.data.store import IMAGE, LOG_VARIANCE, MANIFEST, read_manifest, write_manifest, write_part
from likeness.device import choose_device
from likeness.encoders.components import Components
from likeness.encoders.latent import LatentCodec, spatial_factor, to_tensor
from likeness.prepare.content_keys import FILES, EncodeSettings, FileHashes, each_block, hash_file, write_rows
from likeness.prepare.entries import Entries, EntryWriter
from likeness.types import InputError

PIXELS = 64 * 128 * 128
"""Pixels per batch of the autoencoder."""
CAPTIONS = 32
"""Captions per batch of the text encoders."""
ABANDONED = 3600
"""Age in seconds from which a partial file is deleted."""


class Job(NamedTuple):
    """One image or condition to encode."""

    row: int
    path: Path
    column: str
    """`IMAGE` or the name of a condition."""
    augmentation: int
    source: bytes
    """Hash of the file."""
    keys: tuple[bytes, ...]
    """Key of the entry and, if images have a log variance, key of the log variance."""


def encode_folder(
    folder: Path,
    out: Path,
    components: Components,
    *,
    size: int,
    augmentations: int = 1,
    precision: Literal["fp32", "bf16"] = "fp32",
    text_features: bool = False,
    device: str | None = None,
    share: tuple[int, int] = (0, 1),
    shard_bytes: int = 2**26,
    progress: Callable[[int, int], None] | None = None,
) -> dict[str, int]:
    """Create or update a latent store.

    Args:
        folder: a prepared folder (`likeness.data.folder`); if it has splits, only `train` is encoded.
        out: folder of the store. Run again to resume or after a change.
        components: autoencoder, text encoders and their settings.
        size: side length in pixels.
        augmentations: versions of each face. Version 0 is the original, odd versions are mirrored, and the conditions
            of all versions but 0 are varied (`likeness.conditions.augment`).
        precision: precision of the autoencoder; latents are stored as float16. bf16 is about 3x faster on a CPU.
        text_features: whether to encode captions. Once a store has text features, they are always updated.
        device: device of autoencoder and text encoders, as in `likeness.device.choose_device`.
        share: (rank, world size).
        shard_bytes: bytes per file of latents or text features.
        progress: called as (faces done, total), for images and then for captions.

    Returns:
        `faces`: faces in the store, including augmentations; `encoded` and `captions`: images and captions encoded by
        this process; `missing`: entries that other processes have yet to write. The store is complete if it is 0.

    Raises:
        InputError: a file cannot be read, `out` contains something else, or the device does not exist.
    """
    factor = spatial_factor(components.vae)
    if size % factor:
        raise InputError(f"size {size} is not a multiple of the autoencoder's downsampling factor {factor}")
    if augmentations < 1:
        raise InputError(f"augmentations must be at least 1, not {augmentations}")
    root = root_of(folder)
    vae = components.vae.to(device=choose_device(device), memory_format=torch.channels_last)
    codec = LatentCodec(vae, batched=True)
    trial = torch.zeros(1, 3, 2 * factor, 2 * factor, device=vae.device)
    existing = manifest_of(out)
    recorded = existing.get("codec", "")
    settings = EncodeSettings(
        codec=recorded if recorded and components.same_encoder(recorded) else components.codec_hash,
        moments=codec.moments(trial)[1] is not None,
        size=size,
        precision=precision,
        augmentations=augmentations,
        text=components.text_hash() if text_features or existing.get("text") else None,
    )
    check_compatible(out, existing, settings)
    with (root / METADATA).open("rb") as lines:
        rows = sum(bool(line.strip()) for line in lines)
    report = progress or (lambda done, total: None)
    encoded = encode_images(root, out, codec, settings, share, shard_bytes, lambda done: report(done, rows))
    captions = 0
    if settings.text:
        captions = encode_captions(root, out, components, settings, share, shard_bytes, lambda done: report(done, rows))
    missing = finish(root, out, settings)
    report(rows, rows)
    return {"faces": rows * augmentations, "encoded": encoded, "captions": captions, "missing": missing}


def manifest_of(out: Path) -> dict[str, Any]:
    """Return the manifest of `out`, or {} if there is none."""
    if (out / "plan.json").is_file():  # schema 1
        raise InputError(f"{out} contains shards of another version: delete it and encode again")
    return read_manifest(out) if (out / MANIFEST).is_file() else {}


def check_compatible(out: Path, existing: dict[str, Any], settings: EncodeSettings) -> None:
    """Reject settings under which no existing entry could be reused: they are most likely a mistake."""
    wanted = settings.manifest()
    names = {"codec": "encoder", "size": "size", "precision": "precision", "text": "text encoder"}
    for key, name in names.items():
        if existing.get(key) not in (None, wanted[key]):
            raise InputError(f"{out} was encoded with another {name}: choose another folder or delete it")
    if settings.augmentations < existing.get("views", 1):
        raise InputError(f"{out} has {existing['views']} augmentations, not {settings.augmentations}: use as many")


def encode_images(
    root: Path,
    out: Path,
    codec: LatentCodec,
    settings: EncodeSettings,
    share: tuple[int, int],
    limit: int,
    progress: Callable[[int], None],
) -> int:
    """Encode the missing images and conditions of one rank; returns their number."""
    writer = EntryWriter(out, "latents", limit)
    jobs = missing_images(root, out, settings, share, writer)
    batch_size = max(1, PIXELS // settings.size**2)
    batches = iter(lambda: list(islice(jobs, batch_size)), [])
    device = codec.vae.device
    encoded = 0
    for batch, images in read_ahead(lambda batch: (batch, [image_of(job, settings.size) for job in batch]), batches):
        pixels = to_tensor(images).to(device, memory_format=torch.channels_last)  # [B, 3, S, S]
        with torch.autocast(device.type, torch.bfloat16, enabled=settings.precision == "bf16"):
            mean, log_variance = codec.moments(pixels)  # [B, C, h, w]
        mean = mean.half().cpu()
        log_variance = mean if log_variance is None else log_variance.half().cpu()
        finite = (mean + log_variance).isfinite().flatten(1).all(1).tolist()  # [B]
        for number, job in enumerate(batch):
            if not finite[number]:
                raise InputError(f"{job.path} has a non-finite latent (NaN or Inf): use another precision")
            for key, latents in zip(job.keys, (mean, log_variance), strict=False):
                writer.add(key, latents=latents[number])
        encoded += len(batch)
        progress(batch[-1].row + 1)
    writer.flush()
    return encoded


def missing_images(
    root: Path, out: Path, settings: EncodeSettings, share: tuple[int, int], writer: EntryWriter
) -> Iterator[Job]:
    """Yield the images and conditions of one rank that have no entry yet, each once."""
    hashes = FileHashes(out)
    columns = list(settings.columns)
    rank, world = share
    start = 0
    for number, rows in enumerate(each_block(root)):
        if number % world == rank:
            stamps, sources, _ = hashes.lookup(root, rows)
            write_rows(out, root, rows, stamps, sources)
            keys = settings.keys(sources).swapaxes(0, 1)  # [R, A, C, 16]: the entries of a face are adjacent
            present = np.argwhere(keys.any(-1))
            yielded = set()
            for found in writer.claim(keys[tuple(present.T)]):
                row, augmentation, at = present[found].tolist()
                at = 0 if columns[at] == LOG_VARIANCE else at  # mean and log variance are one job
                if (row, augmentation, at) in yielded:
                    continue
                yielded.add((row, augmentation, at))
                name = "file_name" if at == 0 else column_of(columns[at])
                entries = keys[row, augmentation, at : at + (2 if at == 0 and settings.moments else 1)]
                yield Job(
                    start + row,
                    rows[row][name],
                    columns[at],
                    augmentation,
                    sources[row, FILES.index(name)].tobytes(),
                    tuple(entry.tobytes() for entry in entries),
                )
        start += len(rows)


def image_of(job: Job, size: int) -> np.ndarray:
    """Return the input of the autoencoder, uint8 [S, S, 3].

    Raises:
        InputError: the file cannot be read, or has changed since it was hashed.
    """
    mirrored = job.augmentation % 2 == 1
    if job.column == IMAGE:
        image = read_photo(job.path, size)
        image = image[:, ::-1] if mirrored else image
    else:
        condition = CONDITIONS[job.column]
        raw = condition.resize(condition.read(job.path).raw, size, size)
        if job.augmentation:
            # Seeded by the key: depends on the file's content and the augmentation only, not on other rows.
            raw = condition.augment(raw, np.random.default_rng(int.from_bytes(job.keys[0], "big")))
        image = condition.render(condition.flip(raw) if mirrored else raw, size, size)
    if hash_file(job.path) != job.source:
        raise InputError(f"{job.path} changed while it was being encoded: run the command again")
    return image


def encode_captions(
    root: Path,
    out: Path,
    components: Components,
    settings: EncodeSettings,
    share: tuple[int, int],
    limit: int,
    progress: Callable[[int], None],
) -> int:
    """Encode the missing captions of one rank, including the empty one; returns their number."""
    for encoder in (components.text_encoder, components.text_encoder_2):
        if encoder is not None:
            encoder.to(components.vae.device)
    writer = EntryWriter(out, "text", limit)
    encoded = 0
    captions = missing_captions(root, settings, share, writer)
    for batch in iter(lambda: list(islice(captions, CAPTIONS)), []):
        features = components.text_features([caption for _, caption, _ in batch])
        tokens, pooled = features.tokens.half().cpu(), features.pooled.half().cpu()  # [B, L, D], [B, P]
        for number, (_, caption, key) in enumerate(batch):
            if not (tokens[number].isfinite().all() and pooled[number].isfinite().all()):
                raise InputError(
                    f"the text features of {caption!r} exceed the range of float16: encode without text features"
                )
            writer.add(key, tokens=tokens[number], pooled=pooled[number])
        encoded += len(batch)
        progress(batch[-1][0])
    writer.flush()
    return encoded


def missing_captions(
    root: Path, settings: EncodeSettings, share: tuple[int, int], writer: EntryWriter
) -> Iterator[tuple[int, str, bytes]]:
    """Yield (rows read, caption, key) of captions without an entry. Captions are assigned to ranks by key."""
    rank, world = share
    start = 0
    for rows in each_block(root):
        start += len(rows)
        captions = list(dict.fromkeys(["", *(caption for row in rows for caption in captions_of(row))]))
        keys = settings.caption_keys(captions)
        mine = np.flatnonzero(keys[:, :2].astype(int) @ (256, 1) % world == rank)
        for number in writer.claim(keys[mine]):
            yield start, captions[mine[number]], keys[mine[number]].tobytes()


def finish(root: Path, out: Path, settings: EncodeSettings) -> int:
    """Write the manifest if no entry is missing, and delete unused files. Returns the number of missing entries."""
    while True:
        hashes, unknown = FileHashes(out), 0
        rows, image_keys, captions = [], [], []
        for block in each_block(root):
            stamps, sources, left = hashes.lookup(root, block, read=False)
            unknown += left * settings.augmentations
            if unknown:
                continue  # another process has not reached these files yet
            rows.append((write_rows(out, root, block, stamps, sources), len(block)))
            image_keys.append(settings.keys(sources))
            if settings.text:
                caption_keys = settings.caption_keys([caption for row in block for caption in captions_of(row)])
                captions.append(([len(captions_of(row)) for row in block], caption_keys))
        if unknown:
            return unknown
        keys = np.concatenate(image_keys, axis=1)  # [A, R, C, 16]
        del hashes, image_keys
        try:
            lock = FileLock(out / ".lock").acquire()  # released by the system if the process is killed
        except OSError as error:
            raise InputError(f"cannot write in {out}: {error.strerror or error}") from error
        with lock:
            if not all((out / name).is_file() for name, _ in rows):
                continue  # another process finished in the meantime and deleted them
            return write_store(out, settings, rows, keys, captions)


def write_store(
    out: Path,
    settings: EncodeSettings,
    rows: list[tuple[str, int]],
    keys: np.ndarray,
    captions: list[tuple[list[int], np.ndarray]],
) -> int:
    """Write which entry belongs to which face, then the manifest. Returns the number of missing entries.

    Args:
        out: folder of the store.
        settings: what the keys were made with.
        rows: names and sizes of the `rows-*` files.
        keys: keys of images and conditions, uint8 [A, R, C, 16].
        captions: captions per row and keys of all captions, uint8 [N, 16], of each block of rows.
    """
    empty = settings.caption_keys([""] if settings.text else [])
    text_keys = np.concatenate([empty, *(part for _, part in captions)])  # [1 + N, 16]
    latents, texts = Entries(out, "latents"), Entries(out, "text")
    places, text_places = latents.index.find(keys), texts.index.find(text_keys)  # [A, R, C], [1 + N]
    present = keys.any(-1)  # [A, R, C]
    missing = int((present & (places < 0)).sum()) + int((text_places < 0).sum())
    if missing:
        return missing

    latents = Entries(out, "latents", latents.used_files(places))
    texts = Entries(out, "text", texts.used_files(text_places))
    used = np.flatnonzero(present.any(axis=0).any(axis=0)).tolist()
    columns = [settings.columns[number] for number in used]
    places = latents.index.find(keys[:, :, used]).reshape(-1, len(columns)).astype(np.int32)  # [A R, C]
    text_places = texts.index.find(text_keys).astype(np.int32)
    tensors = {"pictures": torch.from_numpy(places)}
    if settings.text:
        counts = torch.tensor([count for counts, _ in captions for count in counts])
        tensors |= {"captions": torch.from_numpy(text_places[1:]), "caption_ends": counts.cumsum(0)}
    places_file = write_part(out, "places", tensors)
    manifest = {
        **settings.manifest(),
        "count": len(places),
        "columns": columns,
        "conditions": [name for name in columns if name in CONDITIONS],
        "empty_caption": int(text_places[0]) if settings.text else None,
        "places": places_file,
        "latents": list(latents.files.items()),
        "texts": list(texts.files.items()),
        "rows": rows,
    }
    write_manifest(out, manifest)
    delete_unused(out, {places_file, *latents.files, *texts.files, *(name for name, _ in rows)})
    return 0


def delete_unused(out: Path, used: set[str]) -> None:
    """Delete the files that a finished store does not use, and old partial files of killed processes."""
    for file in [*out.glob("*-*.safetensors"), *out.glob(".*.partial")]:
        if file.name not in used and (file.suffix != ".partial" or time.time() - file.stat().st_mtime > ABANDONED):
            file.unlink(missing_ok=True)
