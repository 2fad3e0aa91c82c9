"""Write a dataset of synthetic faces as a prepared folder.

Every file is written atomically, `metadata.jsonl` last. An interrupted run resumes by skipping existing files.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
from PIL import Image

from likeness.conditions import CONDITIONS
from likeness.conditions.images import png_bytes
from likeness.data.folder import METADATA, changing, column_of, known_rows, line_of, open_record, write_record
from likeness.data.synthetic import MAXIMUM_SIZE, MINIMUM_SIZE, describe_face, draw_face
from likeness.files import write_whole, writing_whole
from likeness.types import InputError, Progress


def write_synthetic(
    out: Path, count: int, size: int = 128, seed: int = 0, progress: Progress = lambda done, total: None
) -> None:
    """Write synthetic faces to `out/train/`, with masks, sketches, keypoints in pixels, ten captions and attributes.

    A folder of the same seed and size, in pixels, is completed; a larger `count` extends it. Existing rows are kept as
    they are, and removed rows stay removed.

    Raises:
        InputError: an argument is out of range, `out` contains anything else or more faces, or it cannot be written.
    """
    if count < 1:
        raise InputError(f"count must be at least 1, not {count}")
    if not MINIMUM_SIZE <= size <= MAXIMUM_SIZE or size % 8:
        raise InputError(f"size must be a multiple of 8 from {MINIMUM_SIZE} to {MAXIMUM_SIZE}, not {size}")
    if seed < 0:
        raise InputError(f"seed must be at least 0, not {seed}")
    arguments = {"kind": "likeness synthetic faces", "size": size, "seed": seed}
    folder = out / "train"
    with changing(out, ["."]):
        if not (record := open_record(out, arguments, "synthetic")):
            write_record(out, arguments)
        known = known_rows(folder)
        done = max(record.get("faces", {}).get("train", 0), len(known)) if known else 0
        if count < done:
            raise InputError(f"{out} has {done} faces, not {count}: give at least this count, or another folder")
        with changing(out, ["train"]), writing_whole(folder / METADATA) as metadata:
            for row in known.values():
                metadata.write(line_of(json.loads(row)))
            for index in range(count):
                stem = f"{index:06d}"
                files = {"file_name": f"images/{stem}.png"} | {
                    column_of(key): CONDITIONS[key].file(stem) for key in CONDITIONS
                }
                if index < done and files["file_name"] not in known:
                    continue
                if not all((folder / file).is_file() for file in files.values()):
                    face = draw_face(seed, index, size)
                    points = np.round(face.keypoints.astype(np.float64) * size, 3).tolist()
                    contents = {
                        "file_name": png_bytes(Image.fromarray(face.image)),
                        "mask_file_name": CONDITIONS["mask"].encode(face.mask),
                        "sketch_file_name": CONDITIONS["sketch"].encode(face.sketch),
                        "keypoints_file_name": (json.dumps({"points": points, "size": [size, size]}) + "\n").encode(),
                    }
                    for column, content in contents.items():
                        write_whole(folder / files[column], content)
                if files["file_name"] not in known:
                    attributes, captions = describe_face(seed, index)
                    metadata.write(line_of({**files, "text": list(captions), "attributes": attributes}))
                progress(index + 1, count)
        write_record(out, {**arguments, "faces": {"train": count}})
