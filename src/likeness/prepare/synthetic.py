"""Write a dataset of synthetic faces as a prepared folder.

Every file is written atomically, `metadata.jsonl` last. An interrupted run resumes by skipping existing files.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
from PIL import Image

from likeness.conditions.images import png_bytes
from likeness.conditions.mask import mask_image
from likeness.data.folder import RECORD
from likeness.data.synthetic import MAXIMUM_SIZE, MINIMUM_SIZE, SyntheticFace, describe_face, draw_face
from likeness.files import write_whole
from likeness.types import InputError

FOLDERS = {"images": "png", "masks": "png", "sketches": "png", "keypoints": "json"}
"""Folder -> suffix of its files."""


def write_synthetic(
    out: Path, count: int, size: int = 128, seed: int = 0, progress: Callable[[int], None] | None = None
) -> None:
    """Write synthetic faces to `out/train/`, with masks, sketches, keypoints in pixels, ten captions and attributes.

    A folder of the same seed and size is completed; a larger `count` extends it.

    Args:
        out: folder to write.
        count: number of faces, at least 1.
        size: side length in pixels, a multiple of 8 from 32 to 2048.
        seed: random seed, at least 0.
        progress: called with the number of faces done.

    Raises:
        InputError: an argument is out of range, `out` contains anything else, or it cannot be written.
    """
    if count < 1:
        raise InputError(f"count must be at least 1, not {count}")
    if not MINIMUM_SIZE <= size <= MAXIMUM_SIZE or size % 8:
        raise InputError(f"size must be a multiple of 8 from {MINIMUM_SIZE} to {MAXIMUM_SIZE}, not {size}")
    if seed < 0:
        raise InputError(f"seed must be at least 0, not {seed}")
    out = Path(out)
    try:
        create_folders(out, size, seed)
        write_faces(out / "train", count, size, seed, progress)
    except OSError as error:
        raise InputError(f"cannot write {out}: {error.strerror or error}") from error


def create_folders(out: Path, size: int, seed: int) -> None:
    """Create the folders and their record, unless they contain something else."""
    wanted = {"kind": "likeness synthetic faces", "size": size, "seed": seed}
    record = out / RECORD
    if record.exists():
        try:
            found = json.loads(record.read_text(encoding="utf-8"))
        except ValueError:
            found = None
        if found != wanted:
            content = {name: found.get(name) for name in wanted} if isinstance(found, dict) else "something else"
            raise InputError(f"{out} already contains {content}, not {wanted}: choose another folder")
    elif out.is_dir() and any(not path.name.startswith(f".{RECORD}.") for path in out.iterdir()):
        raise InputError(f"{out} is not empty and has no {RECORD} of synthetic faces: choose another folder")
    out.mkdir(parents=True, exist_ok=True)
    if not record.exists():
        # Before the folders, so that an interrupted run can resume.
        write_whole(record, (json.dumps(wanted) + "\n").encode())
    for folder in FOLDERS:
        (out / "train" / folder).mkdir(parents=True, exist_ok=True)


def write_faces(folder: Path, count: int, size: int, seed: int, progress: Callable[[int], None] | None) -> None:
    lines = []
    for index in range(count):
        names = {kind: f"{kind}/{index:06d}.{suffix}" for kind, suffix in FOLDERS.items()}
        if not all((folder / name).is_file() for name in names.values()):
            for kind, content in files_of(draw_face(seed, index, size)).items():
                write_whole(folder / names[kind], content)
        attributes, captions = describe_face(seed, index)
        line = {
            "file_name": names["images"],
            "mask_file_name": names["masks"],
            "sketch_file_name": names["sketches"],
            "keypoints_file_name": names["keypoints"],
            "text": list(captions),
            "attributes": attributes,
        }
        lines.append(json.dumps(line, ensure_ascii=False) + "\n")
        if progress is not None:
            progress(index + 1)
    write_whole(folder / "metadata.jsonl", "".join(lines).encode())


def files_of(face: SyntheticFace) -> dict[str, bytes]:
    """Return folder -> content of a face's file."""
    height, width = face.mask.shape
    points = np.round(face.keypoints.astype(np.float64) * (width, height), 3).tolist()
    return {
        "images": png_bytes(Image.fromarray(face.image)),
        "masks": png_bytes(mask_image(face.mask)),
        "sketches": png_bytes(Image.fromarray(face.sketch)),
        "keypoints": (json.dumps({"points": points, "size": [width, height]}) + "\n").encode(),
    }
