"""Add what a prepared folder lacks: masks by a face parser, sketches by an extractor or U2-Net, keypoints by MediaPipe.

Files that exist are left alone, so that a run goes on where it stopped and hand-made masks stay. Every file made here
says in itself who made it, and so does its row (`mask_made_by`): a change of annotator shows, and what another one made
can be made anew. A file that does not say so counts as hand-made and is never replaced. `metadata.jsonl` is written
last.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from likeness.annotators.face_parser import Translated, parse_faces, sides_swapped
from likeness.annotators.landmarks import Landmarker, landmarker_name, open_landmarker
from likeness.conditions import CONDITIONS
from likeness.conditions.images import MADE_BY, png_bytes
from likeness.conditions.mask import mask_image
from likeness.data.folder import METADATA, column_of, condition_file, each_row, line_of, read_photo
from likeness.device import choose_device
from likeness.files import write_whole, writing_whole
from likeness.pipelines.load import checkpoint_file, load_face_parser, load_sketcher, network_name
from likeness.prepare.faults import splits_of
from likeness.types import InputError

TOGETHER = 16
"""Faces a pass of a parser that sees 192 pixels; one that sees more takes fewer, for the same memory."""

LARGE = 256
"""Pixels a side up to which the bundled parser is good enough."""

HUB_PARSER = "jonathandinu/face-parsing"
"""A SegFormer-B5 for larger portraits."""


class Annotator(NamedTuple):
    """One stage."""

    made_by: str
    """Its name with the hash of its weights."""
    annotate: Callable[[list[np.ndarray]], list[bytes | None]]
    """Pictures uint8 RGB [H, W, 3] -> the contents of their files; None where nothing was found."""


def annotate_folder(
    folder: Path,
    *,
    parser: str | Path | None = None,
    exchanged: bool = False,
    sketches: bool = True,
    sketcher: Path | None = None,
    landmarker: Path | None = None,
    redo: Sequence[str] = (),
    device: str | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> dict[str, int]:
    """Annotate every row of a prepared folder that lacks a mask, a sketch or keypoints.

    Args:
        folder: a directory with `metadata.jsonl`, or the parent of such splits.
        parser: a face parser, as `load_face_parser` finds it; `auto` takes the bundled one up to `LARGE` pixels and
            `HUB_PARSER` beyond, where a row lacks a mask; None adds no masks.
        exchanged: the parser's left is the viewer's left.
        sketches: whether to add sketches.
        sketcher: U2-Net's weights; None draws by the extractor that needs none.
        landmarker: MediaPipe's `face_landmarker.task`; None adds no keypoints.
        redo: conditions of which to make anew what another annotator made.
        device: Device of face parser and U2-Net, as in `likeness.device.choose_device`.
        progress: called as (faces done, faces in all).

    Returns:
        How many of each were made. A face in which no landmarks are found stays without keypoints.

    Raises:
        InputError: a picture or an annotator cannot be read, its sides are exchanged, or a file cannot be written.
    """
    roots = [(folder / split).resolve() for split in splits_of(folder)]
    counts, lack = zip(*map(survey, roots), strict=True)
    made: dict[str, int] = {}
    if parser == "auto":
        parser = usual_parser(next(each_row(roots[0]))["file_name"]) if any(lack) or "mask" in redo else None
    with ExitStack() as opened:
        annotators: dict[str, Annotator] = {}
        if parser is not None:
            annotators["mask"] = mask_annotator(parser, exchanged=exchanged, device=device)
        if sketches:
            annotators["sketch"] = sketch_annotator(sketcher, device=device)
        if landmarker is not None:
            find = opened.enter_context(open_landmarker(landmarker))
            annotators["keypoints"] = keypoints_annotator(find, landmarker_name(landmarker))
        if missing := [name for name in redo if name not in annotators]:
            raise InputError(f"nothing is there to make each {missing[0]} anew: name what makes it, too")
        done = 0
        for root in roots:
            with writing_whole(root / METADATA) as metadata:
                rows = each_row(root)
                while some := list(islice(rows, TOGETHER)):
                    for name, annotator in annotators.items():
                        made[name] = made.get(name, 0) + add_condition(some, name, annotator, root, redo=name in redo)
                    for row in some:
                        metadata.write(line_of({column: relative(value, root) for column, value in row.items()}))
                    done += len(some)
                    if progress is not None:
                        progress(done, sum(counts))
    return made


def survey(root: Path) -> tuple[int, bool]:
    """How many rows there are, and whether one lacks a mask. A million are numbers here, since rows would be gigabytes.

    Raises:
        InputError: two pictures would share a mask, such as a.png and a.jpg.
    """
    taken: dict[int, int] = {}
    count, lacking = 0, False
    for row in each_row(root):
        place = place_of(row, "mask", root)
        if taken.setdefault(hash(place), hash(row["file_name"])) != hash(row["file_name"]):
            other = next(other["file_name"] for other in each_row(root) if place_of(other, "mask", root) == place)
            raise InputError(f"{other} and {row['file_name'].name} would share one mask: rename one of them")
        count, lacking = count + 1, lacking or column_of("mask") not in row
    return count, lacking


def usual_parser(picture: Path) -> str:
    """The parser for pictures of this size.

    Raises:
        InputError: it is on the hub, which cannot be reached.
    """
    if max(read_photo(picture).shape) <= LARGE:
        return "bundled"
    try:
        checkpoint_file(HUB_PARSER, "config.json")
    except InputError as error:
        raise InputError(f"{error}; --parser bundled needs no download, but sees 192 pixels only") from error
    return HUB_PARSER


def add_condition(rows: list[dict[str, Any]], name: str, annotator: Annotator, root: Path, *, redo: bool) -> int:
    """Make the files that rows lack and name them in the rows; how many were made."""
    column, by = column_of(name), made_by_column(name)
    ours = (None, annotator.made_by)
    wanted = [row for row in rows if column not in row or (redo and row.get(by) not in ours)]
    files = [row.get(column, place_of(row, name, root)) for row in wanted]
    fresh = [index for index, file in enumerate(files) if not file.is_file() or maker_of(file) not in ours]
    contents = annotator.annotate([read_photo(wanted[index]["file_name"]) for index in fresh]) if fresh else []
    for index, content in zip(fresh, contents, strict=True):
        if content is not None:
            write_whole(files[index], content)
    for row, file in zip(wanted, files, strict=True):
        if file.is_file():
            row[column] = file
            row.pop(by, None)
            if maker := maker_of(file):
                row[by] = maker
    return sum(content is not None for content in contents)


def place_of(row: dict[str, Any], name: str, root: Path) -> Path:
    """Where a row's condition goes: by its picture's folder, too, so that equal names in two folders do not meet."""
    own = row["file_name"].relative_to(root).with_suffix("")
    return root / condition_file(name, str(own.relative_to("images") if own.is_relative_to("images") else own))


def made_by_column(condition: str) -> str:
    """The column that says who made a condition."""
    return f"{condition}_made_by"


def maker_of(file: Path) -> str | None:
    """Who made a mask, sketch or keypoints file, as far as it says so itself."""
    try:
        if file.suffix == ".json":
            document = json.loads(file.read_text())
            return document.get("made_by") if isinstance(document, dict) else None
        with Image.open(file) as picture:
            return picture.info.get(MADE_BY)
    except (OSError, ValueError, SyntaxError):
        return None


def makers_of(rows: Iterable[dict[str, Any]]) -> dict[str, Counter[str]]:
    """Condition -> who made how many of it; `hand` where nobody says so."""
    makers: dict[str, Counter[str]] = {name: Counter() for name in CONDITIONS}
    for row in rows:
        for name, counts in makers.items():
            if column_of(name) in row:
                counts[row.get(made_by_column(name), "hand")] += 1
    return makers


def mask_annotator(source: str | Path, *, exchanged: bool = False, device: str | None = None) -> Annotator:
    """Palette PNGs by a face parser."""
    network, size = load_face_parser(source, exchanged=exchanged)
    network.to(choose_device(device))
    made_by = network_name(network)
    together = max(1, TOGETHER * 192**2 // size**2)

    def annotate(pictures: list[np.ndarray]) -> list[bytes | None]:
        masks: list[np.ndarray] = []
        for start in range(0, len(pictures), together):
            masks += parse_faces(network, pictures[start : start + together], size=size)
        if isinstance(network, Translated) and sides_swapped(masks):
            raise InputError(
                f"{source} has left and right the {'right' if exchanged else 'other'} way round: "
                f"{'leave out' if exchanged else 'give'} --exchanged, since l_ is the person's left here"
            )
        return [png_bytes(mask_image(mask), made_by) for mask in masks]

    return Annotator(made_by, annotate)


def sketch_annotator(weights: Path | None, *, device: str | None = None) -> Annotator:
    """Grey PNGs, by U2-Net or by the extractor that needs no weights."""
    draw, made_by = load_sketcher(weights, device=device)
    return Annotator(
        made_by, lambda pictures: [png_bytes(Image.fromarray(draw(picture)), made_by) for picture in pictures]
    )


def keypoints_annotator(find: Landmarker, made_by: str) -> Annotator:
    """JSON files of 478 points in pixels by MediaPipe."""

    def annotate(pictures: list[np.ndarray]) -> list[bytes | None]:
        contents: list[bytes | None] = []
        for picture in pictures:
            points, (height, width) = find(picture), picture.shape[:2]
            contents.append(
                None if points is None else keypoints_file(points * [width, height], width, height, made_by)
            )
        return contents

    return Annotator(made_by, annotate)


def keypoints_file(points: np.ndarray, width: int, height: int, made_by: str) -> bytes:
    """The content of a file of keypoints [P, 2] in pixels."""
    document = {"points": np.round(points, 2).tolist(), "size": [width, height], "made_by": made_by}
    return json.dumps(document).encode()


def relative(value: Any, root: Path) -> Any:
    """A file as the metadata names it; anything else as it is."""
    return str(value.relative_to(root)) if isinstance(value, Path) else value
