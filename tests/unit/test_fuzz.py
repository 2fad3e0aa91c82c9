"""Damaged files: every reader either succeeds or raises `InputError`, within bounded time and memory."""

from __future__ import annotations

import io
import json
import random
import resource
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from drawn import drawn_mask, drawn_points
from PIL import Image

from likeness.conditions import CONDITIONS
from likeness.conditions.images import read_rgb
from likeness.types import InputError

MUTATIONS = 2000
"""Damaged files over all readers."""
MOST_SECONDS, MOST_BYTES = 60.0, 2**30
"""Upper bounds for one file: time, and growth of the resident memory over all of them."""


def encoded(image: Image.Image, kind: str, **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def array_file(save: Callable, array: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    save(buffer, array)
    return buffer.getvalue()


def valid_files() -> dict[str, bytes]:
    """Name -> content of a small valid file of each kind."""
    labels, points = drawn_mask(64), drawn_points()
    mask = Image.fromarray(CONDITIONS["mask"].render(labels, 64, 64))
    rows, pixels = ("\n".join(f"{x:.4f} {y:.4f}" for x, y in points * side) for side in (1, 64))
    return {
        "points.png": CONDITIONS["mask"].encode(labels),  # gives points.pts its size
        **{f"a.{kind.lower()}": encoded(mask, kind) for kind in ("PNG", "JPEG", "WEBP", "AVIF", "BMP", "TIFF", "GIF")},
        "labels.npy": array_file(np.save, labels),
        "labels.npz": array_file(np.savez_compressed, labels),
        "points.json": CONDITIONS["keypoints"].encode(points),
        "pose.json": json.dumps({"people": [{"face_keypoints_2d": [1.0] * 210}], "canvas_width": 9}).encode(),
        "points.pts": f"version: 1\nn_points: 68\n{{\n{pixels}\n}}\n".encode(),
        "points.csv": rows.replace(" ", ",").encode(),
        "points.txt": rows.encode(),
    }


def damage(content: bytes, rng: random.Random) -> bytes:
    """Flip bits, cut, overwrite, insert or repeat a part."""
    data = bytearray(content)
    at = rng.randrange(len(data))
    how = rng.choice(("flip", "cut", "zeros", "insert", "header", "repeat"))
    if how == "flip":
        for _ in range(rng.choice((1, 3, 20))):
            data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    elif how == "cut":
        del data[at:]
    elif how == "zeros":
        data[at : at + 40] = bytes(rng.randrange(1, 60))
    elif how == "insert":
        data[at:at] = rng.randbytes(rng.randrange(1, 32))
    elif how == "header":
        for _ in range(rng.choice((1, 2, 4))):
            data[rng.randrange(min(len(data), 64))] = rng.randrange(256)
    else:
        data += data[at:]
    return bytes(data)


@pytest.mark.parametrize("part", range(4))
def test_damaged_files(tmp_path, part):
    rng = random.Random(part)
    files, readers = valid_files(), [read_rgb, *(condition.read for condition in CONDITIONS.values())]
    before, failures = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, []
    for _ in range(MUTATIONS // (4 * len(readers))):
        name = rng.choice(list(files))
        (tmp_path / name).write_bytes(damage(files[name], rng))
        for read in readers:
            start = time.process_time()
            try:
                read(tmp_path / name)
            except InputError:
                pass
            except Exception as error:
                failures.append((name, read.__module__, repr(error)))
            if time.process_time() - start > MOST_SECONDS:
                failures.append((name, read.__module__, "too slow"))
    assert not failures
    assert 1024 * (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) < MOST_BYTES


def test_valid_files_are_read(tmp_path):
    """Each undamaged file is accepted by a reader, so that damage is what is tested."""
    for name, content in valid_files().items():
        (tmp_path / name).write_bytes(content)
        readers = (read_rgb, *(condition.read for condition in CONDITIONS.values()))
        assert name == "pose.json" or any(reads(read, tmp_path / name) for read in readers), name


def reads(read: Callable, file: Path) -> bool:
    try:
        read(file)
    except InputError:
        return False
    return True
