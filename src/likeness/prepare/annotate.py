"""Add what a prepared folder lacks: masks by a face parser, sketches by the extractor that needs no weights.

Files that exist are left alone, so that a run goes on where it stopped and hand-made masks stay; `metadata.jsonl` is
written last and names what was added.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from likeness.annotators.face_parser import parse_face
from likeness.annotators.sketch import extract_sketch
from likeness.conditions.classes import CLASSES
from likeness.conditions.pictures import mask_picture, png_bytes
from likeness.data.folder import METADATA, column_of, read_folder
from likeness.files import write_whole
from likeness.types import InputError


def annotate_folder(
    folder: Path,
    *,
    parser: Path | None = None,
    sketches: bool = True,
    progress: Callable[[int, int], None] | None = None,
) -> dict[str, int]:
    """Annotate every row of a prepared folder that lacks a mask or a sketch.

    Args:
        folder: a directory with `metadata.jsonl`, or its parent with a `train` split.
        parser: folder of a trained face parser; None adds no masks.
        sketches: whether to add sketches.
        progress: called as (faces done, faces in all).

    Returns:
        How many masks and sketches were added.

    Raises:
        InputError: a picture or the parser cannot be read, or a file cannot be written.
    """
    rows = read_folder(folder)
    root = folder.resolve() if (folder / METADATA).is_file() else (folder / "train").resolve()
    makers: dict[str, Callable[[np.ndarray], Image.Image]] = {}
    if parser is not None:
        network, size = load_parser(parser)
        makers["mask"] = lambda picture: mask_picture(parse_face(network, picture, size=size))
    if sketches:
        makers["sketch"] = lambda picture: Image.fromarray(extract_sketch(picture))
    added = dict.fromkeys(makers, 0)
    for done, row in enumerate(rows, start=1):
        for name, make in makers.items():
            if column_of(name) in row:
                continue
            file = root / {"mask": "masks", "sketch": "sketches"}[name] / row["file_name"].with_suffix(".png").name
            if not file.is_file():
                write_whole(file, png_bytes(make(read_rgb(row["file_name"]))))
                added[name] += 1
            row[column_of(name)] = file
        if progress is not None:
            progress(done, len(rows))
    lines = [json.dumps({k: relative(v, root) for k, v in row.items()}, ensure_ascii=False) + "\n" for row in rows]
    write_whole(root / METADATA, "".join(lines))
    return added


def load_parser(folder: Path) -> tuple[Any, int]:
    """A face parser of transformers and the size it sees.

    Raises:
        InputError: it cannot be read, or its classes are not ours.
    """
    from transformers import AutoModelForSemanticSegmentation

    try:
        network = AutoModelForSemanticSegmentation.from_pretrained(folder).eval()
    except (OSError, ValueError) as error:
        raise InputError(f"{folder} holds no segmentation network: {str(error).splitlines()[0]}") from error
    labels = tuple(network.config.id2label[index] for index in range(network.config.num_labels))
    if labels != CLASSES:
        raise InputError(f"the classes of {folder} are {', '.join(labels[:4])} ..., not our 19 in order")
    size = getattr(network.config, "image_size", None)
    if not isinstance(size, int):
        raise InputError(f"{folder / 'config.json'} does not say image_size, the pixels a side that the network sees")
    return network, size


def read_rgb(path: Path) -> np.ndarray:
    """A picture as uint8 [H, W, 3]."""
    try:
        with Image.open(path) as image:
            return np.array(image.convert("RGB"))
    except (OSError, Image.DecompressionBombError) as error:
        raise InputError(f"{path} cannot be read as a picture: {error}") from error


def relative(value: Any, root: Path) -> Any:
    """A file as the metadata names it; anything else as it is."""
    return str(value.relative_to(root)) if isinstance(value, Path) else value
