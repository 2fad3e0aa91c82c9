"""The sets of pictures that an evaluation measures: made by a model, or brought by the user.

Pictures of one method are never mixed with those of another: the folder records how its own were made.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from likeness.data.folder import read_folder, read_photo
from likeness.evaluate.config import CEILING, Protocol
from likeness.evaluate.faces import Face
from likeness.evaluate.generate import Report, ceiling_file, make_ceiling, make_portraits, portrait_file
from likeness.files import write_whole
from likeness.pipelines.load import fingerprint as fingerprint_of
from likeness.pipelines.record import settings_hash
from likeness.types import InputError

MADE = "made.json"
"""How the pictures of an evaluation's folder were made."""
PICTURES = {".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff"}


@dataclass(frozen=True, kw_only=True)
class Sets:
    """Which pictures are measured."""

    portraits: dict[str, list[list[Path]]]
    """Given -> round -> files, one a face."""
    ceiling: list[Path]
    """Empty where there is no autoencoder."""
    size: int
    made: dict[str, Any]
    """How the portraits were made: what the protocol of every number says of it."""

    @property
    def compared(self) -> list[str]:
        """The sets that have numbers."""
        return [*self.portraits, *([CEILING] if self.ceiling else [])]


def pictures_in(folder: Path) -> list[Path]:
    """The pictures of a folder.

    Raises:
        InputError: there are none.
    """
    files = sorted(path for path in folder.iterdir() if path.suffix.lower() in PICTURES) if folder.is_dir() else []
    if not files:
        raise InputError(f"{folder} holds no pictures: give the folder of a method's portraits")
    return files


def check_names(files: Sequence[Path], faces: Sequence[Face], folder: Path, protocol: Protocol) -> None:
    """Refuse pictures that do not belong to these faces one by one.

    Raises:
        InputError: two pictures have one name, a picture has no face, or a face has no picture.
    """
    names, images = [file.stem for file in files], files[0].parent
    if len(set(names)) < len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise InputError(f"{images} has two pictures called {twice}: keep one")
    rows = {row["file_name"].stem for row in read_folder(folder)}
    if alien := sorted(set(names) - rows):
        raise InputError(
            f"{len(alien)} of {len(names)} pictures in {images} belong to no face of {folder}, such as {alien[0]}: "
            "a picture must be called like the photograph of its face"
        )
    absent = sorted(rows - set(names))
    if absent and protocol.count is None:
        raise InputError(
            f"{images} has no picture of {len(absent)} of {len(rows)} faces of {folder}, such as {absent[0]}: "
            f"add them, or say count={len(faces)} to measure only those that are there"
        )


def given_pictures(
    files: Sequence[Path],
    faces: Sequence[Face],
    protocol: Protocol,
    pipeline: Any,
    out: Path,
    faults: dict[str, str],
    report: Report,
) -> Sets:
    """The sets of an evaluation of pictures that are there."""
    by_name = {file.stem: file for file in files}
    own = [by_name[face.name] for face in faces]
    size, ceiling = protocol.size or usual_size(own), []
    claim(out, {"pictures": str(own[0].parent.resolve())})
    if pipeline is not None:
        faults |= make_ceiling(pipeline, faces, pipeline.config.defaults["size"], out, report)
        ceiling = [ceiling_file(out, face) for face in faces]
    made = {
        "model": str(own[0].parent),
        "file_format": ", ".join(sorted({file.suffix.lower().lstrip(".") for file in own})),
        **dict.fromkeys(("steps", "guidance_scale", "device", "dtype")),
    }
    return Sets(portraits={protocol.given[0]: [own]}, ceiling=ceiling, size=size, made=made)


def usual_size(files: Sequence[Path]) -> int:
    """The side of the first picture that can be read.

    Raises:
        InputError: none can be, or it is not square.
    """
    for file in files:
        try:
            height, width = read_photo(file).shape[:2]
        except InputError:
            continue
        if height != width:
            raise InputError(f"{file} is {width}x{height}: portraits must be square, crop them or say size=...")
        return height
    raise InputError(f"none of the {len(files)} pictures in {files[0].parent} can be read")


def made_portraits(
    pipeline: Any,
    model: str,
    faces: Sequence[Face],
    protocol: Protocol,
    folder: Path,
    out: Path,
    faults: dict[str, str],
    report: Report,
) -> Sets:
    """Make what a model is measured by."""
    defaults, fingerprint = pipeline.config.defaults, fingerprint_of(pipeline)
    steps = defaults["steps"] if protocol.steps is None else protocol.steps
    guidance = defaults["guidance_scale"] if protocol.guidance_scale is None else protocol.guidance_scale
    made = {
        "model": model,
        "fingerprint": fingerprint[:16],
        "settings": settings_hash(pipeline),
        "file_format": "png",
        "steps": steps,
        "guidance_scale": float(guidance),
        "device": pipeline._execution_device.type,
        "dtype": str(pipeline.transformer.dtype).removeprefix("torch."),
    }
    claim(out, {**made, "model": None, "caption": protocol.caption, "faces": str(folder.resolve())})
    faults |= make_portraits(pipeline, faces, protocol, out, model=model, fingerprint=fingerprint, report=report)
    faults |= make_ceiling(pipeline, faces, defaults["size"], out, report)
    portraits = {
        given: [[portrait_file(out, given, r, face) for face in faces] for r in range(protocol.seeds)]
        for given in protocol.given
    }
    ceiling = [ceiling_file(out, face) for face in faces]
    return Sets(portraits=portraits, ceiling=ceiling, size=protocol.size or defaults["size"], made=made)


def claim(out: Path, made: dict[str, Any]) -> None:
    """Record how the pictures of `out` are made, or refuse to mix them with others.

    Raises:
        InputError: `out` holds pictures that were made otherwise.
    """
    file = out / MADE
    made = {key: value for key, value in made.items() if value is not None}
    if not file.is_file():
        write_whole(file, json.dumps(made, indent=1))
        return
    there = json.loads(file.read_text())
    for key in sorted(set(made) | set(there)):
        if made.get(key) != there.get(key):
            raise InputError(
                f"{out} holds another evaluation: its {key} is {there.get(key)}, now it is {made.get(key)}; "
                "choose another --out"
            )


def training_faces(folder: Path) -> list[Face]:
    """The photographs that a model has learnt from."""
    rows = enumerate(read_folder(folder))
    return [Face(number=number, name=row["file_name"].stem, photo=row["file_name"]) for number, row in rows]
