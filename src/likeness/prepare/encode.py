"""Encode a prepared folder into a store: pictures and rendered conditions through the autoencoder, captions through
the text towers where that is asked for, each once.

Run again after anything changed, it encodes what is not there yet and nothing else. Several processes each take their
share; files are all they have in common, and whoever finds that nothing is missing any more finishes the store.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import asdict
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
from likeness.encoders.latent import LatentCodec, spatial_factor, to_tensor
from likeness.pipelines.load import Components
from likeness.prepare.pool import LATENTS, TEXT, Pool, Table
from likeness.prepare.sources import FILES, Hashes, Plan, each_block, hash_file, write_rows
from likeness.types import InputError

PIXELS = 64 * 128 * 128
"""Pixels a pass through the autoencoder: its memory grows with them."""
CAPTIONS = 32
"""Captions a pass through the text towers."""
ABANDONED = 3600
"""Seconds after which a half-written file belongs to nobody."""


class Job(NamedTuple):
    """A picture that the autoencoder is to be given."""

    row: int
    """Number of its face."""
    path: Path
    column: str
    """`IMAGE` or the name of a condition."""
    view: int
    source: bytes
    """Hash of the file."""
    keys: tuple[bytes, ...]
    """Key of its entry; where pictures have a log variance, that of the log variance, too."""


def encode_folder(
    folder: Path,
    out: Path,
    components: Components,
    *,
    size: int,
    views: int = 1,
    precision: Literal["fp32", "bf16"] = "fp32",
    text_features: bool = False,
    device: str | None = None,
    share: tuple[int, int] = (0, 1),
    shard_bytes: int = 2**26,
    progress: Callable[[int, int], None] | None = None,
) -> dict[str, int]:
    """Bring a store in line with a folder.

    Args:
        folder: a prepared folder (`likeness.data.folder`): of a parent of splits `train` only.
        out: the store's folder; run again to go on after an interruption or a change.
        components: autoencoder, text towers and their settings.
        size: pixels a side.
        views: versions of each face. View 0 is the face as it is; every odd one is mirrored; in all but view 0 the
            conditions are varied (`likeness.conditions.augment`).
        precision: of the autoencoder; latents are stored as float16. bf16 is about three times as fast on a CPU.
        text_features: whether to encode captions, too; a store that has their features keeps having them.
        device: Device of autoencoder and text encoders, as in `likeness.device.choose_device`.
        share: (number of this process, number of processes).
        shard_bytes: bytes of latents or text features a file.
        progress: called as (faces done, faces in all), for pictures and then for captions.

    Returns:
        `faces` of the store, views counted; pictures `encoded` and `captions` encoded by this process; how many
        pictures and captions are still `missing`, because other processes are at work on them: the store is finished
        when there are none.

    Raises:
        InputError: a file cannot be read, `out` holds something else, or there is no such device.
    """
    factor = spatial_factor(components.vae)
    if size % factor:
        raise InputError(f"the size {size} is not a multiple of the autoencoder's factor {factor}")
    if views < 1:
        raise InputError(f"views is {views}: every face needs at least one")
    root = root_of(folder)
    place = choose_device(device)
    trial = torch.zeros(1, 3, 2 * factor, 2 * factor, device=place)
    vae = components.vae.to(device=place, memory_format=torch.channels_last)
    codec = LatentCodec(vae, together=True)
    recorded = begun(out).get("codec", "")
    plan = Plan(
        codec=recorded if recorded and components.same_encoder(recorded) else components.codec_hash,
        moments=codec.moments(trial)[1] is not None,
        size=size,
        precision=precision,
        views=views,
        text=components.text_hash() if text_features or begun(out).get("text") else None,
    )
    refuse_other(out, plan)
    with (root / METADATA).open("rb") as lines:
        rows = sum(bool(line.strip()) for line in lines)
    report = progress or (lambda done, total: None)
    encoded = encode_pictures(root, out, codec, plan, share, shard_bytes, lambda done: report(done, rows))
    captions = 0
    if plan.text:
        captions = encode_captions(root, out, components, plan, share, shard_bytes, lambda done: report(done, rows))
    missing = finish(root, out, plan, shard_bytes)
    report(rows, rows)
    return {"faces": rows * views, "encoded": encoded, "captions": captions, "missing": missing}


def begun(out: Path) -> dict[str, Any]:
    """The manifest of `out`, empty where there is none yet."""
    if (out / "plan.json").is_file():  # what stores of the first schema were begun with
        raise InputError(f"{out} holds shards of another version: delete it and encode again")
    return read_manifest(out) if (out / MANIFEST).is_file() else {}


def refuse_other(out: Path, plan: Plan) -> None:
    """Nothing would be left of a store with another encoder, size, precision or fewer views: that is a slip."""
    before = begun(out)
    names = {"codec": "encoder", "size": "size", "precision": "precision", "text": "text tower"}
    for key, name in names.items():
        if before.get(key) not in (None, getattr(plan, key)):
            raise InputError(f"{out} was made with another {name}: choose another folder or delete it")
    if plan.views < before.get("views", 1):
        raise InputError(f"{out} has {before['views']} views of each face, not {plan.views}: ask for as many")


def encode_pictures(
    root: Path,
    out: Path,
    codec: LatentCodec,
    plan: Plan,
    share: tuple[int, int],
    limit: int,
    progress: Callable[[int], None],
) -> int:
    """Encode the pictures of a share that are not there yet; how many."""
    pool = Pool(out, "latents", limit, Table(out, "latents").strings)
    waiting = missing_pictures(root, out, plan, share, pool)
    together = max(1, PIXELS // plan.size**2)
    passes = iter(lambda: list(islice(waiting, together)), [])
    device = codec.vae.device
    encoded = 0
    for jobs, pictures in read_ahead(lambda jobs: (jobs, [picture_of(job, plan.size) for job in jobs]), passes):
        given = to_tensor(pictures).to(device, memory_format=torch.channels_last)  # [B, 3, S, S]
        with torch.autocast(device.type, torch.bfloat16, enabled=plan.precision == "bf16"):
            mean, log_variance = codec.moments(given)  # [B, C, h, w]
        mean = mean.half().cpu()
        spread = mean if log_variance is None else log_variance.half().cpu()
        finite = (mean + spread).isfinite().flatten(1).all(1).tolist()
        for number, job in enumerate(jobs):
            if not finite[number]:
                raise InputError(f"the autoencoder has no finite latent for {job.path}: try another precision")
            for key, latents in zip(job.keys, (mean, spread), strict=False):
                pool.add(key, latents=latents[number])
        encoded += len(jobs)
        progress(jobs[-1].row + 1)
    pool.flush()
    return encoded


def missing_pictures(root: Path, out: Path, plan: Plan, share: tuple[int, int], pool: Pool) -> Iterator[Job]:
    """The pictures of a share that no file of the store holds, each once."""
    hashes = Hashes(out)
    columns = list(plan.columns)
    start = 0
    for number, rows in enumerate(each_block(root)):
        if number % share[1] == share[0]:
            stamps, sources, _ = hashes.survey(root, rows)
            write_rows(out, root, rows, stamps, sources)
            keys = plan.keys(sources).swapaxes(0, 1)  # [R, V, C, 16]: a face's entries lie together
            wanted = np.argwhere(keys.any(-1))
            taken = set()
            for found in pool.claim(keys[tuple(wanted.T)]):
                row, view, at = wanted[found].tolist()
                at = 0 if columns[at] == LOG_VARIANCE else at  # the picture and its log variance are one job
                if (row, view, at) in taken:
                    continue
                taken.add((row, view, at))
                name = "file_name" if at == 0 else column_of(columns[at])
                entries = keys[row, view, at : at + (2 if at == 0 and plan.moments else 1)]
                made = tuple(entry.tobytes() for entry in entries)
                yield Job(
                    start + row, rows[row][name], columns[at], view, sources[row, FILES.index(name)].tobytes(), made
                )
        start += len(rows)


def picture_of(job: Job, size: int) -> np.ndarray:
    """What the autoencoder is given, uint8 [S, S, 3].

    Raises:
        InputError: the file cannot be read, or is no longer the one that was hashed.
    """
    mirrored = job.view % 2 == 1
    if job.column == IMAGE:
        picture = read_photo(job.path, size)
        picture = picture[:, ::-1] if mirrored else picture
    else:
        condition = CONDITIONS[job.column]
        raw = condition.resize(condition.read(job.path).raw, size, size)
        if job.view:
            # by the key: a function of the file's content and of the view, whatever rows stand before this one
            raw = condition.augment(raw, np.random.default_rng(int.from_bytes(job.keys[0], "big")))
        picture = condition.render(condition.flip(raw) if mirrored else raw, size, size)
    if hash_file(job.path) != job.source:
        raise InputError(f"{job.path} changed while it was being encoded: run the command again")
    return picture


def encode_captions(
    root: Path,
    out: Path,
    components: Components,
    plan: Plan,
    share: tuple[int, int],
    limit: int,
    progress: Callable[[int], None],
) -> int:
    """Encode the captions of a share, and the empty one, that are not there yet; how many."""
    for tower in (components.text_encoder, components.text_encoder_2):
        if tower is not None:
            tower.to(components.vae.device)
    pool = Pool(out, "text", limit, Table(out, "text").strings)
    encoded = 0
    waiting = missing_captions(root, plan, share, pool)
    for part in iter(lambda: list(islice(waiting, CAPTIONS)), []):
        features = components.text_features([caption for _, caption, _ in part])
        tokens, pooled = features.tokens.half().cpu(), features.pooled.half().cpu()  # [B, L, D], [B, P]
        for number, (_, caption, key) in enumerate(part):
            if not (tokens[number].isfinite().all() and pooled[number].isfinite().all()):
                raise InputError(f"the text tower's features of {caption!r} are beyond float16: encode without them")
            pool.add(key, tokens=tokens[number], pooled=pooled[number])
        encoded += len(part)
        progress(part[-1][0])
    pool.flush()
    return encoded


def missing_captions(root: Path, plan: Plan, share: tuple[int, int], pool: Pool) -> Iterator[tuple[int, str, bytes]]:
    """(faces so far, caption, key) of the captions that are this share's, by their keys, and not in the store."""
    start = 0
    for rows in each_block(root):
        start += len(rows)
        captions = list(dict.fromkeys(["", *(caption for row in rows for caption in captions_of(row))]))
        keys = plan.caption_keys(captions)
        mine = np.flatnonzero(keys[:, :2].astype(int) @ (256, 1) % share[1] == share[0])
        for number in pool.claim(keys[mine]):
            yield start, captions[mine[number]], keys[mine[number]].tobytes()


def finish(root: Path, out: Path, plan: Plan, limit: int) -> int:
    """Write the manifest if no entry is missing, and remove what it does not need; returns how many are missing."""
    while True:
        hashes, unread = Hashes(out), 0
        rows, picture_keys, caption_keys, counts = [], [], [plan.caption_keys([""] if plan.text else [])], []
        for block in each_block(root):
            stamps, sources, left = hashes.survey(root, block, read=False)
            unread += left * plan.views
            if unread:
                continue  # what another process has not come to yet, nobody else has to read
            rows.append((write_rows(out, root, block, stamps, sources), len(block)))
            picture_keys.append(plan.keys(sources))
            if plan.text:
                caption_keys.append(plan.caption_keys([caption for row in block for caption in captions_of(row)]))
                counts += [len(captions_of(row)) for row in block]
        if unread:
            return unread
        keys = np.concatenate(picture_keys, axis=1)  # [V, R, C, 16]
        del hashes, picture_keys
        try:
            lock = FileLock(out / ".lock").acquire()  # the system's own: a killed process does not hold it
        except OSError as error:
            raise InputError(f"cannot write in {out}: {error.strerror or error}") from error
        with lock:
            if not all((out / name).is_file() for name, _ in rows):
                continue  # another process has finished meanwhile, and taken them for its own older ones
            return finish_with(out, plan, rows, keys, np.concatenate(caption_keys), counts, limit)


def finish_with(
    out: Path,
    plan: Plan,
    rows: list[tuple[str, int]],
    keys: np.ndarray,
    caption_keys: np.ndarray,
    counts: list[int],
    limit: int,
) -> int:
    """`finish`, given the files of the rows, the keys of pictures [V, R, C, 16] and, where captions are encoded, of the
    empty caption and all others [1 + N, 16], and the numbers of captions of each row.
    """
    latents, texts = Table(out, "latents"), Table(out, "text")
    present, places, told = keys.any(-1), latents.places(keys), texts.places(caption_keys)  # [V, R, C] twice, [1 + N]
    missing = int((present & (places < 0)).sum()) + int((told < 0).sum())
    if missing:
        return missing

    there = np.flatnonzero(present.any(axis=0).any(axis=0)).tolist()
    columns = [plan.columns[number] for number in there]
    places = places[..., there].reshape(-1, len(columns))  # [V R, C]
    latent_files, moved = latents.settle(places, LATENTS, limit)
    text_files, moved_texts = texts.settle(told, TEXT, limit)
    tensors = {"pictures": torch.from_numpy(moved[places])}
    told = moved_texts[told]
    if plan.text:
        tensors |= {"captions": torch.from_numpy(told[1:]), "caption_ends": torch.tensor(counts).cumsum(0)}
    manifest = {
        **asdict(plan),
        "count": len(places),
        "columns": columns,
        "conditions": [name for name in columns if name in CONDITIONS],
        "empty_caption": int(told[0]) if plan.text else None,
        "places": write_part(out, "places", tensors),
        "latents": list(latent_files.items()),
        "texts": list(text_files.items()),
        "rows": rows,
    }
    write_manifest(out, manifest)
    clean(out, {manifest["places"], *latent_files, *text_files, *(name for name, _ in rows)})
    return 0


def clean(out: Path, needed: set[str]) -> None:
    """Remove the files that a finished store does not need, and what killed processes left half-written."""
    for file in [*out.glob("*-*.safetensors"), *out.glob(".*.partial")]:
        state = file.stat()
        if file.name not in needed and (file.suffix != ".partial" or time.time() - state.st_mtime > ABANDONED):
            file.unlink(missing_ok=True)
