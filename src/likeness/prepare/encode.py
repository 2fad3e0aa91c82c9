"""Encode a prepared folder into a latent store: images and rendered conditions through the autoencoder, captions
optionally through the text encoders.

The key of an entry is a hash of the bytes of its file and of everything that is done to them. Paths and dates are not
part of it, so moved or reordered files cost nothing, and an existing entry is always up to date. A second run encodes
only what is missing. Several processes divide the work without coordination; the last one writes the manifest.
"""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor

from likeness.conditions import CONDITIONS
from likeness.data.ahead import read_ahead
from likeness.data.folder import captions_of, column_of, each_row, mirrored_caption, read_photo, root_of
from likeness.data.store import (
    IMAGE,
    LOG_VARIANCE,
    MANIFEST,
    PART,
    is_intact,
    read_manifest,
    read_part,
    write_manifest,
    write_part,
)
from likeness.device import choose_device, choose_precision
from likeness.encoders.components import Components
from likeness.encoders.latent import LatentCodec, spatial_factor, to_tensor
from likeness.files import ABANDONED, delete_partials, is_unfinished, locked
from likeness.types import InputError, Progress
from likeness.weights.hashes import file_hash

TRANSFORM = 1
"""Version of the preprocessing. Increase it if the same file leads to other pixels: this changes every key."""
FILES = ("file_name", *(column_of(name) for name in CONDITIONS))
"""File columns of a row, in the order of their hashes in `rows-*`."""
BLOCK = 256
"""Rows per `rows-*` file."""
TICK = 0.05
"""Seconds within which a file may change twice without a change of its time stamp."""
PIXELS = 64 * 128 * 128
"""Pixels per batch of the autoencoder."""
CAPTIONS = 32
"""Captions per batch of the text encoders."""


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
    """Versions of each face. Version 0 is the original, odd ones are mirrored, conditions of all but 0 are varied."""
    text: str | None
    """Hash of the text encoders (`Components.text_hash`); None if captions are not encoded."""

    @property
    def columns(self) -> Sequence[str]:
        """C columns: the image, its log variance if it has one, and all conditions."""
        return (IMAGE, *([LOG_VARIANCE] if self.moments else []), *CONDITIONS)

    def keys(self, hashes: np.ndarray) -> np.ndarray:
        """Return the keys of R faces in A augmentations, uint8 [R, A, C, 16]; 0 if a face lacks the file.

        A key is the exclusive or of the hashes of the file, uint8 [R, F, 16] in the order of `FILES`, and of the
        transform: one operation for all faces.
        """
        file_of = [FILES.index(column_of(name)) if name in CONDITIONS else 0 for name in self.columns]
        files = hashes[:, None, file_of]  # [R, 1, C, 16]
        transforms = [[self.transform(name, number) for name in self.columns] for number in range(self.augmentations)]
        return np.where(files.any(-1, keepdims=True), files ^ np.stack([np.stack(row) for row in transforms]), 0)

    def transform(self, column: str, augmentation: int) -> np.ndarray:
        varied = augmentation if column in CONDITIONS else 0  # images are only mirrored: 0 and 2 are equal
        return digest(TRANSFORM, self.codec, self.precision, self.size, column, augmentation % 2, varied)

    def caption_key(self, caption: str) -> bytes:
        return digest("caption", self.text, caption).tobytes()


class Job(NamedTuple):
    """One image or condition to encode."""

    row: int
    path: Path
    column: str
    """`IMAGE` or the name of a condition."""
    augmentation: int
    source: bytes
    """Hash of the file."""
    keys: Sequence[bytes]
    """Key of the entry and, if images have a log variance, key of the log variance."""


def encode_folder(
    folder: Path,
    out: Path,
    components: Components,
    *,
    size: int,
    augmentations: int = 1,
    precision: Literal["fp32", "bf16", "auto"] = "fp32",
    text_features: bool = False,
    device: str | None = None,
    replace: bool = False,
    process: tuple[int, int] = (0, 1),
    shard_bytes: int = 2**26,
    progress: Progress = lambda done, total: None,
) -> dict[str, int]:
    """Create or update a latent store `out` of a prepared folder; if that has splits, of `train`.

    The other arguments are the options of `likeness prepare encode`. `process` is (rank, world size), `shard_bytes` the
    bytes per file, `progress` is called for images and then for captions. Once a store has text features, they are
    always updated.

    Returns:
        `faces`: faces of the folder; `uncaptioned`: those without captions; `written`: captions of all; `truncated`:
        those that are longer than the text encoder reads; `encoded` and `captions`: images and
        captions encoded by this process; `damaged`: files that did not have their content any more, which were encoded
        again; `removed`: images of the former store that the folder no longer contains; `missing`: entries that other
        processes have yet to write. The store is complete if it is 0.

    Raises:
        InputError: a file cannot be read, `out` contains something else or images that the folder does not contain, or
            the device does not exist.
    """
    check_sizes(components, size, augmentations)
    root = root_of(folder)
    vae = components.vae.to(device=choose_device(device), memory_format=torch.channels_last)
    codec = LatentCodec(vae, batched=True)
    side = 2 * spatial_factor(vae)
    trial = torch.zeros(1, 3, side, side, device=vae.device)
    existing = read_manifest(out) if (out / MANIFEST).is_file() else {}
    names = os.listdir(out) if out.is_dir() and not existing else []
    if other := sorted(name for name in names if not PART.fullmatch(name) and not is_unfinished(name)):
        raise InputError(f"{out} contains {other[0]}, which is not a file of shards: choose a new folder")
    if precision == "auto":
        precision = existing.get("precision") or choose_precision(precision, vae.device.type)
    settings = EncodeSettings(
        codec=components.codec_hash,
        moments=codec.moments(trial)[1] is not None,
        size=size,
        precision=precision,
        augmentations=augmentations,
        text=components.text_hash if text_features or existing.get("text") else None,
    )
    # Reject settings under which no existing entry could be used: they are most likely a mistake.
    names = {"codec": "encoder", "size": "size", "precision": "precision", "text": "text encoder"}
    for key, name in names.items():
        if existing.get(key) not in (None, getattr(settings, key)):
            raise InputError(f"{out} was encoded with another {name}: choose another folder or delete it")
    if augmentations < existing.get("augmentations", 1):
        raise InputError(f"{out} has {existing['augmentations']} augmentations, not {augmentations}: use as many")
    removed = removed_images(root, out, existing) if existing else []
    if removed and not replace:
        raise InputError(
            f"{out} contains {len(removed)} images that {root} does not, such as {', '.join(removed[:3])}: choose "
            "another folder for these faces, or pass --replace to remove those"
        )
    rank, world = process
    files = sorted(file for file in out.glob("*-*.safetensors") if PART.fullmatch(file.name))
    damaged = [file for file in files[rank::world] if not is_intact(file)]
    for file in damaged:
        file.unlink(missing_ok=True)
    captions_per_face, truncated = [], 0
    for rows in each_block(root):
        found = [captions_of(row) for row in rows]
        captions_per_face += map(len, found)
        truncated += components.count_truncated([caption for each in found for caption in each])
    report = lambda done: progress(done, len(captions_per_face))  # noqa: E731
    images, captions = missing_images(root, out, settings, process), 0
    encoded = encode_images(images, codec, settings, EntryWriter(out, "latents", shard_bytes), report)
    if settings.text:
        texts = missing_captions(root, out, settings, process)
        captions = encode_captions(texts, components, EntryWriter(out, "text", shard_bytes), report)
    with locked(out, wait=True):
        missing = finish(root, out, settings)
    report(len(captions_per_face))
    counts = {"encoded": encoded, "captions": captions, "damaged": len(damaged), "missing": missing}
    faces = {"faces": len(captions_per_face), "uncaptioned": captions_per_face.count(0)}
    written = {"written": sum(captions_per_face), "truncated": truncated}
    return {**faces, **written, "removed": 0 if missing else len(removed), **counts}


def check_sizes(components: Components, size: int, augmentations: int) -> None:
    """Check that faces can be encoded at `size` pixels in this number of augmentations. Raises `InputError`."""
    factor = spatial_factor(components.vae)
    if size < factor or size % factor:
        nearest = max(1, round(size / factor)) * factor
        raise InputError(f"size {size} is not supported: it must be a multiple of {factor}. Nearest: {nearest}")
    if augmentations < 1:
        raise InputError(f"augmentations must be at least 1, not {augmentations}")


# Images and conditions


def encode_images(
    jobs: Iterator[Job],
    codec: LatentCodec,
    settings: EncodeSettings,
    writer: EntryWriter,
    report: Callable[[int], None],
) -> int:
    """Encode images and conditions; returns their number."""
    batches = iter(lambda: list(islice(jobs, max(1, PIXELS // settings.size**2))), [])
    device, encoded = codec.vae.device, 0
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
        report(batch[-1].row + 1)
    writer.flush()
    return encoded


def missing_images(root: Path, out: Path, settings: EncodeSettings, process: tuple[int, int]) -> Iterator[Job]:
    """Yield the images and conditions of one rank that have no entry yet, each once."""
    hashes, known = read_hashes(out), {key for _, keys in stored_keys(out, "latents") for key in keys}
    rank, world = process
    for number, rows in islice(enumerate(each_block(root)), rank, None, world):
        stamps, sources = hash_files(root, rows, hashes)
        write_rows(out, root, rows, stamps, sources)
        keys = settings.keys(sources)  # [R, A, C, 16]
        for row, augmentation, at in np.argwhere(keys.any(-1)).tolist():
            column = settings.columns[at]
            if column == LOG_VARIANCE:
                continue  # mean and log variance are one job
            found = keys[row, augmentation, at : at + (2 if column == IMAGE and settings.moments else 1)]
            entries = [key.tobytes() for key in found]
            if known.issuperset(entries):
                continue
            known.update(entries)
            name = "file_name" if column == IMAGE else column_of(column)
            source = sources[row, FILES.index(name)].tobytes()
            yield Job(number * BLOCK + row, rows[row][name], column, augmentation, source, entries)


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
        raw = condition.read(job.path).raw
        try:
            raw = condition.resize(raw, size, size)
        except InputError as error:
            raise InputError(f"{job.path}: {error}", kind=error.kind) from error
        if job.augmentation:
            # Seeded by the key: depends on the file's content and the augmentation only, not on other rows.
            raw = condition.augment(raw, np.random.default_rng(int.from_bytes(job.keys[0], "big")))
        image = condition.render(condition.flip(raw) if mirrored else raw, size, size)
    if hash_file(job.path) != job.source:
        raise InputError(f"{job.path} changed while it was being encoded: run the command again")
    return image


# Captions


def encode_captions(
    captions: Iterator[tuple[int, str, bytes]],
    components: Components,
    writer: EntryWriter,
    report: Callable[[int], None],
) -> int:
    """Encode the output of `missing_captions`; returns the number of captions."""
    for encoder in components.text_encoders:
        encoder.to(components.vae.device)
    encoded = 0
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
        report(batch[-1][0])
    writer.flush()
    return encoded


def missing_captions(
    root: Path, out: Path, settings: EncodeSettings, process: tuple[int, int]
) -> Iterator[tuple[int, str, bytes]]:
    """Yield (rows read, caption, key) of captions without an entry, also the empty one and those of mirrored faces.
    Ranks divide them by key.
    """
    rank, world = process
    known = {key for _, keys in stored_keys(out, "text") for key in keys}
    for number, row in enumerate(each_row(root), start=1):
        captions = captions_of(row)
        mirrored = map(mirrored_caption, captions if settings.augmentations > 1 else ())
        for caption in ("", *captions, *mirrored):
            key = settings.caption_key(caption)
            if int.from_bytes(key[:2], "big") % world == rank and key not in known:
                known.add(key)
                yield number, caption, key


# Files of a store


def removed_images(root: Path, out: Path, manifest: dict[str, Any]) -> list[str]:
    """Return the names of the images of a complete store that the folder does not contain.

    An image of the same name is an edited one, unless the folder has no image of the store: then it is another folder.
    """
    known, present, names = read_hashes(out), set(), set()
    for block in each_block(root):
        rows = [{"file_name": row["file_name"]} for row in block]
        _, sources = hash_files(root, rows, known)
        present.update(split_keys(sources[:, 0]))
        names.update(row["file_name"].relative_to(root).as_posix() for row in rows)
    listed = {name for name, _ in manifest["rows"]}
    stored = []  # name, whether the folder has the image
    for file, part in parts_of(out, "rows", ("lines", "ends", "sources")):
        if file in listed:
            lines, ends = part["lines"].numpy().tobytes(), [0, *part["ends"].tolist()]
            for number, source in enumerate(split_keys(part["sources"].numpy()[:, 0])):
                stored.append((json.loads(lines[ends[number] : ends[number + 1]])[0], source in present))
    same_folder = any(kept for _, kept in stored)
    return [name for name, kept in stored if not kept and not (same_folder and name in names)]


class EntryWriter:
    """Writes entries to files of about `limit` bytes."""

    def __init__(self, out: Path, kind: str, limit: int) -> None:
        self.out, self.kind, self.limit, self.bytes = out, kind, limit, 0
        self.pending: dict[bytes, dict[str, Tensor]] = {}

    def add(self, key: bytes, **tensors: Tensor) -> None:
        self.pending[key] = tensors
        self.bytes += sum(tensor.nbytes for tensor in tensors.values())
        if self.bytes >= self.limit:
            self.flush()

    def flush(self) -> None:
        """Write the pending entries."""
        if self.pending:
            keys = torch.frombuffer(bytearray(b"".join(self.pending)), dtype=torch.uint8).view(-1, 16)
            entries = list(self.pending.values())
            tensors = {name: torch.stack([entry[name] for entry in entries]) for name in entries[0]}
            write_part(self.out, self.kind, {"keys": keys, **tensors})
            self.pending, self.bytes = {}, 0


def stored_keys(out: Path, kind: str) -> Iterator[tuple[str, list[bytes]]]:
    """Yield name and keys of each file of a kind (`latents` or `text`)."""
    for name, part in parts_of(out, kind, ("keys",)):
        yield name, split_keys(part["keys"].numpy())


def split_keys(keys: np.ndarray) -> list[bytes]:
    """Return keys uint8 [..., 16] as bytes."""
    content = np.ascontiguousarray(keys).tobytes()
    return [content[start : start + 16] for start in range(0, len(content), 16)]


def parts_of(out: Path, kind: str, names: Sequence[str]) -> Iterator[tuple[str, dict[str, Tensor]]]:
    """Yield name and tensors of every readable file of a kind, sorted by name. Damaged files count as absent."""
    for file in sorted(out.glob(f"{kind}-*.safetensors")):
        try:
            yield file.name, read_part(file, names)
        except InputError:
            continue


def each_block(folder: Path) -> Iterator[list[dict[str, Any]]]:
    """Yield the rows of a folder, `BLOCK` at a time."""
    rows = each_row(folder)
    return iter(lambda: list(islice(rows, BLOCK)), [])


def read_hashes(out: Path) -> dict[bytes, bytes]:
    """Return stamp (path, size, times) -> content hash of the files of earlier runs."""
    hashes: dict[bytes, bytes] = {}
    for _, part in parts_of(out, "rows", ("stamps", "sources")):
        hashes.update(zip(split_keys(part["stamps"].numpy()), split_keys(part["sources"].numpy()), strict=True))
    return hashes


def hash_files(
    root: Path, rows: Sequence[dict[str, Any]], known: dict[bytes, bytes], *, read: bool = True
) -> tuple[np.ndarray, np.ndarray]:
    """Return stamps and content hashes of the files of R rows, each uint8 [R, F, 16], 0 if a row lacks the file.

    Files without a stamp in `known`, stamp -> hash, are read; if `read` is False, their hash is 0.

    Raises:
        InputError: a file cannot be read.
    """
    stamps = np.zeros((len(rows), len(FILES), 16), np.uint8)
    hashes = np.zeros_like(stamps)
    files = [(place, path) for place in np.ndindex(stamps.shape[:2]) if (path := rows[place[0]].get(FILES[place[1]]))]
    newest = 0.0
    for place, path in files:
        try:
            state = path.stat()
        except OSError as error:
            raise InputError(f"{path} cannot be read: {error.strerror or error}") from error
        newest = max(newest, state.st_ctime)
        # ctime reveals changes by tools that reset mtime.
        name = path.relative_to(root).as_posix()
        stamps[place] = digest(name, state.st_size, state.st_mtime_ns, state.st_ctime_ns)
    if time.time() - newest < TICK:
        time.sleep(TICK)  # a change after this read gets another time stamp
    for place, path in files:
        source = known.get(stamps[place].tobytes()) or (hash_file(path) if read else bytes(16))
        hashes[place] = np.frombuffer(source, np.uint8)
    return stamps, hashes


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


def hash_file(path: Path) -> bytes:
    """Return the first 16 bytes of the SHA-256 of a file."""
    try:
        return bytes.fromhex(file_hash(path))[:16]
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror or error}") from error


def digest(*parts: Any) -> np.ndarray:
    """Hash strings and numbers to uint8 [16]."""
    return np.frombuffer(hashlib.sha256(json.dumps(parts).encode()).digest()[:16], np.uint8)


# Manifest


def finish(root: Path, out: Path, settings: EncodeSettings) -> int:
    """Write the manifest if no entry is missing, and delete unused files. Returns the number of missing entries."""
    hashes, missing = read_hashes(out), 0
    rows, image_keys, counts, caption_keys, mirrored_keys = [], [], [], [], []
    for block in each_block(root):
        stamps, sources = hash_files(root, block, hashes, read=False)
        unknown = np.any(stamps, axis=-1) & ~np.any(sources, axis=-1)  # another process has not reached these files yet
        missing += int(unknown.sum()) * settings.augmentations
        if not missing:
            rows.append((write_rows(out, root, block, stamps, sources), len(block)))
            image_keys.append(settings.keys(sources))  # [R, A, C, 16]
            if settings.text:
                found = [captions_of(row) for row in block]
                captions = [caption for each in found for caption in each]
                counts += map(len, found)
                caption_keys += map(settings.caption_key, captions)
                if settings.augmentations > 1:
                    mirrored_keys += map(settings.caption_key, map(mirrored_caption, captions))
    if missing:
        return missing
    keys = np.concatenate(image_keys).swapaxes(0, 1)  # [A, R, C, 16]: one augmentation after the other
    present = np.any(keys, axis=-1).reshape(-1, keys.shape[2])  # [A R, C]
    used = np.flatnonzero(np.any(present, axis=0)).tolist()
    columns = [settings.columns[number] for number in used]
    latents, places = place_entries(out, "latents", split_keys(keys[:, :, used]))
    empty = [settings.caption_key("")] if settings.text else []
    texts, text_places = place_entries(out, "text", [*empty, *caption_keys, *mirrored_keys])
    missing = int((places[present[:, used].ravel()] < 0).sum() + (text_places < 0).sum())
    if missing:
        return missing
    tensors = {"pictures": torch.from_numpy(places.reshape(-1, len(columns)))}  # [A R, C]
    if settings.text:
        end = len(caption_keys) + 1
        tensors |= {"captions": torch.from_numpy(text_places[1:end]), "caption_ends": torch.tensor(counts).cumsum(0)}
        if settings.augmentations > 1:
            tensors["mirrored_captions"] = torch.from_numpy(text_places[end:])
    places_file = write_part(out, "places", tensors)
    manifest = {
        **asdict(settings),
        "count": len(present),
        "columns": columns,
        "conditions": [name for name in columns if name in CONDITIONS],
        "empty_caption": int(text_places[0]) if settings.text else None,
        "places": places_file,
        "latents": latents,
        "texts": texts,
        "rows": rows,
    }
    write_manifest(out, manifest)
    names = {places_file, *(name for name, _ in [*latents, *texts, *rows])}
    for file in out.iterdir():
        if PART.fullmatch(file.name) and file.name not in names:
            file.unlink(missing_ok=True)
    delete_partials(out, age=ABANDONED)
    return 0


def place_entries(out: Path, kind: str, keys: Sequence[bytes]) -> tuple[list[tuple[str, int]], np.ndarray]:
    """Find N entries by their keys.

    Returns:
        (name, number of entries) of the files that contain at least one of them; and the place of each entry in these
        files, int32 [N], -1 if it is missing.
    """
    wanted, files = set(keys), []
    places: dict[bytes, int] = {}
    start = 0
    for name, stored in stored_keys(out, kind):
        new = {key: start + number for number, key in enumerate(stored) if key in wanted and key not in places}
        if new:
            places |= new
            files.append((name, len(stored)))
            start += len(stored)
    return files, np.array([places.get(key, -1) for key in keys], dtype=np.int32)
