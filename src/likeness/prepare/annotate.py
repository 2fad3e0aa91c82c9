"""Add what a prepared folder lacks: masks by a face parser, sketches by the extractor that needs no weights, landmarks.

Files that exist are left alone, so that a run goes on where it stopped and hand-made masks stay; `metadata.jsonl` is
written last and names what was added.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from likeness.annotators.face_parser import parse_faces
from likeness.annotators.landmarks import Landmarker, open_landmarker
from likeness.annotators.sketch import extract_sketch
from likeness.conditions.pictures import mask_picture, png_bytes
from likeness.data.folder import METADATA, column_of, read_folder, read_photo
from likeness.files import write_whole
from likeness.pipelines.load import load_face_parser

TOGETHER = 16
"""Faces a pass."""

FILES = {"mask": "masks/{}.png", "sketch": "sketches/{}.png", "keypoints": "keypoints/{}.json"}
"""Condition -> where its files go."""

Annotator = Callable[[list[np.ndarray]], list[bytes | None]]
"""Pictures uint8 RGB [H, W, 3] -> the contents of their files; None where nothing was found."""


def annotate_folder(
    folder: Path,
    *,
    parser: Path | None = None,
    landmarker: Path | None = None,
    sketches: bool = True,
    progress: Callable[[int, int], None] | None = None,
) -> dict[str, int]:
    """Annotate every row of a prepared folder that lacks a mask, a sketch or keypoints.

    Args:
        folder: a directory with `metadata.jsonl`, or its parent with a `train` split.
        parser: folder of a trained face parser; None adds no masks.
        landmarker: MediaPipe's `face_landmarker.task`; None adds no keypoints.
        sketches: whether to add sketches.
        progress: called as (faces done, faces in all).

    Returns:
        How many of each were added. A face in which no landmarks are found stays without keypoints.

    Raises:
        InputError: a picture, the parser or the landmarker cannot be read, or a file cannot be written.
    """
    rows = read_folder(folder)
    root = folder.resolve() if (folder / METADATA).is_file() else (folder / "train").resolve()
    added: dict[str, int] = {}
    with ExitStack() as opened:
        annotators: dict[str, Annotator] = {}
        if parser is not None:
            annotators["mask"] = mask_annotator(parser)
        if sketches:
            annotators["sketch"] = lambda pictures: [png_bytes(Image.fromarray(extract_sketch(p))) for p in pictures]
        if landmarker is not None:
            annotators["keypoints"] = keypoints_annotator(opened.enter_context(open_landmarker(landmarker)))
        for start in range(0, len(rows), TOGETHER):
            for name, annotate in annotators.items():
                added[name] = added.get(name, 0) + add_condition(rows[start : start + TOGETHER], name, annotate, root)
            if progress is not None:
                progress(min(start + TOGETHER, len(rows)), len(rows))
    lines = [json.dumps({k: relative(v, root) for k, v in row.items()}, ensure_ascii=False) + "\n" for row in rows]
    write_whole(root / METADATA, "".join(lines))
    return added


def add_condition(rows: list[dict[str, Any]], name: str, annotate: Annotator, root: Path) -> int:
    """Make the files that rows lack and name them in the rows; how many were made."""
    lacking = [row for row in rows if column_of(name) not in row]
    files = [root / FILES[name].format(row["file_name"].stem) for row in lacking]
    fresh = [(row, file) for row, file in zip(lacking, files, strict=True) if not file.is_file()]
    contents = annotate([read_photo(row["file_name"]) for row, _ in fresh]) if fresh else []
    for (_, file), content in zip(fresh, contents, strict=True):
        if content is not None:
            write_whole(file, content)
    for row, file in zip(lacking, files, strict=True):
        if file.is_file():
            row[column_of(name)] = file
    return sum(content is not None for content in contents)


def mask_annotator(folder: Path) -> Annotator:
    """Palette PNGs by the face parser in `folder`."""
    network, size = load_face_parser(folder)
    return lambda pictures: [png_bytes(mask_picture(mask)) for mask in parse_faces(network, pictures, size=size)]


def keypoints_annotator(find: Landmarker) -> Annotator:
    """JSON files of 478 points in pixels by MediaPipe."""

    def annotate(pictures: list[np.ndarray]) -> list[bytes | None]:
        contents: list[bytes | None] = []
        for picture in pictures:
            points, size = find(picture), [picture.shape[1], picture.shape[0]]
            wanted = points is not None and {"points": np.round(points * size, 2).tolist(), "size": size}
            contents.append(json.dumps(wanted).encode() if wanted else None)
        return contents

    return annotate


def relative(value: Any, root: Path) -> Any:
    """A file as the metadata names it; anything else as it is."""
    return str(value.relative_to(root)) if isinstance(value, Path) else value
