"""Writes a data set of drawn faces: a folder like that of any real data set, so that nothing else needs to know.

Every file is written under another name and then renamed, and `metadata.jsonl` comes last: what is there is whole, and
a run that was interrupted goes on where it stopped by skipping the faces whose files exist.
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
    """Write the faces 0 to `count` - 1 of the series `seed`, `size` x `size` pixels, into `out/train/`.

    `metadata.jsonl` has a line a face: file_name, mask_file_name, sketch_file_name, keypoints_file_name (all relative
    to `out/train/`), text (ten captions) and attributes. Masks are palette PNGs whose index is the class; keypoints are
    {"points": [[x, y], ...], "size": [width, height]} in pixels. `progress` is told how many faces are done.

    A folder of the same seed and size is completed; a larger `count` extends it. Raises `InputError` if count is below
    1, if size is out of 32 to 2048 or no multiple of 8, if seed is negative, if `out` holds anything else, or if it
    cannot be written.
    """
    if count < 1:
        raise InputError(f"The number of faces is {count}, but it has to be 1 or more.")
    if not MINIMUM_SIZE <= size <= MAXIMUM_SIZE or size % 8:
        raise InputError(f"The size is {size}, but it has to be a multiple of 8 from {MINIMUM_SIZE} to {MAXIMUM_SIZE}.")
    if seed < 0:
        raise InputError(f"The seed is {seed}, but it has to be 0 or more.")
    out = Path(out)
    try:
        _claim(out, size, seed)
        _write_faces(out / "train", count, size, seed, progress)
    except OSError as error:
        raise InputError(f"Cannot write to {out}: {error.strerror or error}.") from error


def _claim(out: Path, size: int, seed: int) -> None:
    """Make the folders and record what they are for, unless they are already for something else."""
    wanted = {"kind": "likeness synthetic faces", "size": size, "seed": seed}
    record = out / RECORD
    if record.exists():
        try:
            found = json.loads(record.read_text(encoding="utf-8"))
        except ValueError:
            found = None
        if found != wanted:
            held = {name: found.get(name) for name in wanted} if isinstance(found, dict) else "something else"
            raise InputError(f"{out} already holds {held}, not {wanted}; choose another folder.")
    elif out.is_dir() and any(not path.name.startswith(f".{RECORD}.") for path in out.iterdir()):
        raise InputError(f"{out} is not empty and holds no {RECORD} of drawn faces; choose another folder.")
    out.mkdir(parents=True, exist_ok=True)
    if not record.exists():
        # Before the folders: a run that is stopped right here can still go on later.
        write_whole(record, (json.dumps(wanted) + "\n").encode())
    for folder in FOLDERS:
        (out / "train" / folder).mkdir(parents=True, exist_ok=True)


def _write_faces(folder: Path, count: int, size: int, seed: int, progress: Callable[[int], None] | None) -> None:
    lines = []
    for index in range(count):
        names = {kind: f"{kind}/{index:06d}.{suffix}" for kind, suffix in FOLDERS.items()}
        if not all((folder / name).is_file() for name in names.values()):
            for kind, content in _files(draw_face(seed, index, size)).items():
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


def _files(face: SyntheticFace) -> dict[str, bytes]:
    """Content of a face's files, by folder."""
    height, width = face.mask.shape
    points = np.round(face.keypoints.astype(np.float64) * (width, height), 3).tolist()
    return {
        "images": png_bytes(Image.fromarray(face.image)),
        "masks": png_bytes(mask_image(face.mask)),
        "sketches": png_bytes(Image.fromarray(face.sketch)),
        "keypoints": (json.dumps({"points": points, "size": [width, height]}) + "\n").encode(),
    }
