"""What an extractor says of many pictures, kept on disk: a stopped evaluation goes on, and a comparison reads it again.

Pictures are read and looked at in small groups, so that thousands need no more memory than a few. One that cannot be
read leaves a row of NaN and a sentence; the others are not disturbed.
"""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import numpy as np

from likeness.data.ahead import read_ahead
from likeness.data.folder import read_photo
from likeness.evaluate.faces import Face
from likeness.files import write_whole
from likeness.types import InputError

CHUNK = 256
"""Pictures in one file of the store."""
BATCH = 16
"""Pictures that an extractor sees at once."""


class Missing(InputError):
    """The weights or the library of a metric are not there; the sentence says what to install or to give."""


Look = Callable[[Sequence[np.ndarray], Sequence[Face]], np.ndarray]
"""B pictures uint8 [S, S, 3] and whom they should show -> float [B, ...]; NaN where a face lacks something."""


@dataclass(frozen=True, kw_only=True)
class Extractor:
    """Something that looks at pictures: a network, a drawing of edges, a service."""

    name: str
    """What metrics call it."""
    what: str
    """Which one it is, in a few words."""
    hash: str
    """SHA-256 of its weights, or of what else makes it what it is, shortened."""
    look: Look
    close: Callable[[], None] = field(default=lambda: None)
    """Called when it is done."""
    notes: tuple[str, ...] = ()
    """What to keep in mind about its numbers, one sentence each."""


class Observed(NamedTuple):
    """What an extractor said of N pictures."""

    values: np.ndarray
    """float32 [N, ...], NaN where it could say nothing."""
    faults: dict[str, str]
    """File -> why it could not be read."""


def observe(
    extractor: Extractor,
    files: Sequence[Path],
    faces: Sequence[Face],
    size: int,
    store: Path,
    report: Callable[[int, int], None],
) -> Observed:
    """Let an extractor look at the pictures of faces.

    Args:
        extractor: it.
        files: the pictures, [N].
        faces: whom they should show, [N].
        size: pixels a side to which they are brought (Lanczos).
        store: folder where the answers are kept; those of other files or extractors are not taken for these.
        report: told as (done, in all).

    Returns:
        The values; all NaN, [N, 1], where no picture could be read.

    Raises:
        Missing: a service that the extractor asks does not answer.
    """
    found: list[tuple[np.ndarray, np.ndarray]] = []
    faults: dict[str, str] = {}
    for start in range(0, len(files), CHUNK):
        chunk, own = files[start : start + CHUNK], faces[start : start + CHUNK]
        kept = store / f"{extractor.name}-{start:06d}-{key_of(extractor, chunk, own, size)}.npz"
        if not kept.is_file():
            write_whole(kept, look_at(extractor, chunk, own, size, lambda n, at=start: report(at + n, len(files))))
        with np.load(kept) as stored:
            found.append((stored["rows"] + start, stored["values"]))
            faults |= json.loads(str(stored["faults"]))
        report(start + len(chunk), len(files))
    shape = next((values.shape[1:] for rows, values in found if len(rows)), (1,))
    everything = np.full((len(files), *shape), np.nan, dtype=np.float32)
    for rows, values in found:
        if len(rows):
            everything[rows] = values
    return Observed(everything, faults)


def look_at(
    extractor: Extractor, files: Sequence[Path], faces: Sequence[Face], size: int, report: Callable[[int], None]
) -> bytes:
    """One chunk as the content of its file: the rows that could be read, their values, and the faults."""
    rows: list[int] = []
    values: list[np.ndarray] = []
    faults: dict[str, str] = {}
    for at, pictures in pictures_of(files, size):
        ready = [(at + i, picture) for i, picture in enumerate(pictures) if not isinstance(picture, str)]
        faults |= {str(files[at + i]): picture for i, picture in enumerate(pictures) if isinstance(picture, str)}
        if ready:
            try:
                seen = extractor.look([picture for _, picture in ready], [faces[row] for row, _ in ready])
                rows += [row for row, _ in ready]
                values += list(np.asarray(seen, dtype=np.float32))
            except Missing:
                raise
            except InputError:  # something else of one of the faces: find out which
                for row, picture in ready:
                    try:
                        values += list(np.asarray(extractor.look([picture], [faces[row]]), dtype=np.float32))
                        rows.append(row)
                    except InputError as error:
                        faults[f"{faces[row].name} ({extractor.name})"] = str(error)
        report(at + len(pictures))
    buffer = io.BytesIO()
    stacked = np.stack(values) if values else np.zeros((0, 1), np.float32)
    np.savez(buffer, rows=np.array(rows, dtype=np.int64), values=stacked, faults=json.dumps(faults))
    return buffer.getvalue()


def pictures_of(files: Sequence[Path], size: int) -> Iterator[tuple[int, list[np.ndarray | str]]]:
    """Batches of pictures with the number of the first, read ahead; instead of one that cannot be read, why."""

    def read(start: int) -> tuple[int, list[np.ndarray | str]]:
        pictures: list[np.ndarray | str] = []
        for file in files[start : start + BATCH]:
            try:
                pictures.append(read_photo(file, size))
            except InputError as error:
                pictures.append(str(error))
        return start, pictures

    return read_ahead(read, range(0, len(files), BATCH))


def key_of(extractor: Extractor, files: Sequence[Path], faces: Sequence[Face], size: int) -> str:
    """Hash of all that the answers depend on: the extractor, the files as they are now, the faces and the size."""
    digest = hashlib.sha256(f"{extractor.hash} {size}".encode())
    for file, face in zip(files, faces, strict=True):
        digest.update(f"{file.name} {face.name} {face.caption} ".encode())
        if face.attributes:
            digest.update(json.dumps(face.attributes, sort_keys=True).encode())
        for path in (file, face.photo, *face.conditions.values(), *face.another.values()):
            stat = path.stat() if path.is_file() else None
            digest.update(f"{stat.st_size} {stat.st_mtime_ns} ".encode() if stat else b"- ")
    return digest.hexdigest()[:12]
