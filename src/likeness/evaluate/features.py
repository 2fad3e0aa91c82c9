"""Run an extractor on many images and cache its output on disk, so that an evaluation can be resumed.

Images are read in small batches, so memory does not grow with their number. An image that cannot be read gives a row of
NaN and a fault; the others are not affected.
"""

from __future__ import annotations

import hashlib
import io
import json
import zipfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import numpy as np

from likeness.data.ahead import read_ahead
from likeness.data.folder import read_photo
from likeness.evaluate.faces import Face
from likeness.files import write_whole
from likeness.types import InputError
from likeness.weights.hashes import file_hash

CHUNK = 256
"""Images per file of the cache, unless an extractor has another number."""
BATCH = 16
"""Images per call of an extractor."""


class MissingError(InputError):
    """The weights, library, data or service that a metric needs is not available. The message says how to get it."""


Extract = Callable[[Sequence[np.ndarray], Sequence[Face]], np.ndarray]
"""(B images uint8 [S, S, 3], their faces) -> float [B, ...]; NaN if a face lacks something."""


@dataclass(frozen=True, kw_only=True)
class Extractor:
    """Anything that maps images to numbers: a network, an edge detector, a service."""

    name: str
    """What metrics call it."""
    description: str
    """Which network or settings, in a few words."""
    hash: str
    """Shortened SHA-256 of its weights, or of what defines it if it has none."""
    extract: Extract
    chunk: int = CHUNK
    """Images per file of the cache."""
    close: Callable[[], None] = field(default=lambda: None)
    """Called when it is no longer needed."""


def extract_cached(
    extractor: Extractor,
    files: Sequence[Path],
    faces: Sequence[Face],
    size: int,
    cache: Path,
    progress: Callable[[int, int], None],
    digest: Callable[[Path], str],
) -> tuple[np.ndarray, dict[str, str]]:
    """Run an extractor on N images of faces, resized to `size` pixels (Lanczos). The files in the folder `cache` depend
    on the extractor, the images and the faces (`cache_key`); `progress` is called as (done, total), and `digest` is
    `file_digest`, which may be cached.

    Returns:
        The output, float32 [N, ...], NaN where there is none ([N, 1] of NaN if no image could be read); and for each
        file that could not be read, why.

    Raises:
        MissingError: a service does not respond.
    """
    chunks: list[tuple[np.ndarray, np.ndarray]] = []
    faults: dict[str, str] = {}
    for start in range(0, len(files), extractor.chunk):
        chunk, chunk_faces = files[start : start + extractor.chunk], faces[start : start + extractor.chunk]
        file = cache / f"{extractor.name}-{start:06d}-{cache_key(extractor, chunk, chunk_faces, size, digest)}.npz"
        found = read_chunk(file)
        if found is None:
            report = lambda done, start=start: progress(start + done, len(files))  # noqa: E731
            found = extract_chunk(extractor, chunk, chunk_faces, size, report)
            write_chunk(file, found)
        chunks.append((found.rows + start, found.values))
        faults |= found.faults
        progress(start + len(chunk), len(files))
    shape = next((values.shape[1:] for rows, values in chunks if len(rows)), (1,))
    output = np.full((len(files), *shape), np.nan, dtype=np.float32)
    for rows, values in chunks:
        if len(rows):
            output[rows] = values
    return output, faults


class Chunk(NamedTuple):
    """The content of a cache file: the output of some images."""

    rows: np.ndarray
    """int64 [n], the indices of the images with output."""
    values: np.ndarray
    """float32 [n, ...], their output."""
    faults: dict[str, str]
    """File or face -> why it has no output."""


def read_chunk(file: Path) -> Chunk | None:
    """Read a cache file; None if it is missing or damaged."""
    try:
        with np.load(file) as stored:
            return Chunk(stored["rows"], stored["values"], json.loads(str(stored["faults"])))
    except (OSError, ValueError, KeyError, zipfile.BadZipFile):
        return None


def write_chunk(file: Path, chunk: Chunk) -> None:
    """Write a cache file."""
    buffer = io.BytesIO()
    np.savez(buffer, rows=chunk.rows, values=chunk.values, faults=json.dumps(chunk.faults))
    write_whole(file, buffer.getvalue())


def extract_chunk(
    extractor: Extractor, files: Sequence[Path], faces: Sequence[Face], size: int, progress: Callable[[int], None]
) -> Chunk:
    """Run an extractor on the images of a chunk."""
    outputs: dict[int, np.ndarray] = {}
    faults: dict[str, str] = {}

    def extract(batch: Mapping[int, np.ndarray]) -> None:
        found = extractor.extract(list(batch.values()), [faces[row] for row in batch]) if batch else ()
        outputs.update(zip(batch, np.asarray(found, dtype=np.float32), strict=True))

    for start, images in read_batches(files, size):
        batch = {start + i: image for i, image in enumerate(images) if not isinstance(image, str)}
        faults |= {str(files[start + i]): image for i, image in enumerate(images) if isinstance(image, str)}
        try:
            extract(batch)
        except MissingError:
            raise
        except InputError:  # an input of one of the faces, such as its photograph: find out which
            for row, image in batch.items():
                try:
                    extract({row: image})
                except InputError as error:
                    faults[f"{faces[row].name} ({extractor.name})"] = str(error)
        progress(start + len(images))
    values = np.stack(list(outputs.values())) if outputs else np.zeros((0, 1), np.float32)
    return Chunk(np.array(list(outputs), dtype=np.int64), values, faults)


def read_batches(files: Sequence[Path], size: int) -> Iterator[tuple[int, list[np.ndarray | str]]]:
    """Yield batches with the index of their first image, read ahead. An unreadable image is replaced by the reason."""

    def read(start: int) -> tuple[int, list[np.ndarray | str]]:
        images: list[np.ndarray | str] = []
        for file in files[start : start + BATCH]:
            try:
                images.append(read_photo(file, size))
            except InputError as error:
                images.append(str(error))
        return start, images

    return read_ahead(read, range(0, len(files), BATCH))


def file_digest(path: Path) -> str:
    """Return the SHA-256 of a file, "-" if it cannot be read."""
    try:
        return file_hash(path)
    except OSError:
        return "-"


def cache_key(
    extractor: Extractor, files: Sequence[Path], faces: Sequence[Face], size: int, digest: Callable[[Path], str]
) -> str:
    """Hash everything that the output depends on: extractor, contents of the files, faces and size."""
    key = hashlib.sha256(f"{extractor.hash} {size}".encode())
    for file, face in zip(files, faces, strict=True):
        key.update(f"{file.name} {face.name} {face.caption} ".encode(errors="surrogatepass"))
        if face.attributes:
            key.update(json.dumps(face.attributes, sort_keys=True).encode())
        for path in (file, face.photo, *face.conditions.values(), *face.mismatched.values()):
            key.update(f"{digest(path)} ".encode())
    return key.hexdigest()[:12]
