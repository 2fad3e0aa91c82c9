"""Make the conditions of one photograph: align it unless it is aligned, then annotate the portrait.

The names are those of the dataset format `folder`, so that the output can be ingested.
"""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path

from PIL import Image

from likeness.annotators.landmarks import landmarker_name, open_face_finder
from likeness.conditions.framing import move
from likeness.conditions.images import png_bytes
from likeness.data.folder import read_photo
from likeness.files import write_whole
from likeness.prepare.align import cut_portrait, face_transform
from likeness.prepare.annotate import keypoints_file, mask_annotator, sketch_annotator
from likeness.types import InputError


def extract(
    photo: Path,
    out: Path,
    *,
    landmarker: Path | None = None,
    size: int = 256,
    parser: str = "bundled",
    device: str | None = None,
) -> dict[str, Path]:
    """Write the portrait, mask, sketch and keypoints of the largest face of a photograph.

    The arguments are the options of `likeness extract`. Without a landmarker there are no keypoints, and the photograph
    must be aligned.

    Returns:
        `image`, `mask`, `sketch` and, with a landmarker, `keypoints` -> file.

    Raises:
        InputError: the photograph cannot be read, is not square and cannot be aligned, has no face, or would be
            overwritten.
    """
    if size < 32:
        raise InputError(f"size must be at least 32 pixels, not {size}")
    pixels = read_photo(photo)
    suffixes = {"image": ".png", "mask": "_mask.png", "sketch": "_sketch.png", "keypoints": "_keypoints.json"}
    files = {name: out / f"{photo.stem}{suffix}" for name, suffix in suffixes.items() if landmarker or name[0] != "k"}
    if files["image"].exists() and files["image"].samefile(photo):
        raise InputError(f"{files['image']} is the photograph itself: choose another folder than {out}")
    contents: dict[str, bytes | None] = {}
    with ExitStack() as stack:
        find = None if landmarker is None else stack.enter_context(open_face_finder(landmarker))
        transform, points, _ = face_transform(pixels, str(photo), find, size)
    pixels = cut_portrait(pixels, transform, size)
    if landmarker is not None and points is not None:
        contents["keypoints"] = keypoints_file(move(points, transform), size, size, landmarker_name(landmarker))
    contents["image"] = png_bytes(Image.fromarray(pixels))
    for name, annotator in (("mask", mask_annotator(parser, device=device)), ("sketch", sketch_annotator(None))):
        (contents[name],) = annotator.annotate([pixels])
    for name, file in files.items():
        content = contents[name]
        assert content is not None
        write_whole(file, content)
    return files
