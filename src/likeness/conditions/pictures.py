"""Opening and writing pictures, and the one check of sizes: every failure is one sentence that names the file.

Pictures are loaded whole and turned upright by their EXIF orientation before anything looks at them. A picture that is
too large for Pillow's decompression guard is refused, never merely warned about.
"""

from __future__ import annotations

import io
import os
import warnings
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps, PngImagePlugin, UnidentifiedImageError

from likeness.conditions.base import Source
from likeness.conditions.classes import PALETTE
from likeness.types import InputError

ASPECT_TOLERANCE = 0.01
"""A condition may differ from the portrait's aspect ratio by this share; beyond it, shapes would be squeezed."""

MADE_BY = "likeness:made_by"
"""PNG text field; Software is what other programs write into hand-made files."""

TRANSPARENT = ("RGBA", "LA", "PA", "RGBa", "La")
"""Pillow's modes with an alpha channel."""

LEAST_SIDE = 8
"""Pixels: nothing smaller can hold a face."""


def describe(source: Source | bytes) -> str:
    """How messages call `source`: the file's name, or what it is."""
    if isinstance(source, str | os.PathLike):
        return str(source)
    if isinstance(source, Image.Image | bytes):
        return "the picture"
    return "the array"


def existing_path(source: str | Path) -> Path:
    """`source` as a path that exists. Raises `InputError` when it does not."""
    try:
        path = Path(source).expanduser()
        if not path.exists():
            raise InputError(f"{path} does not exist: check the path", kind="missing-file")
    except RuntimeError as error:  # ~somebody
        raise InputError(f"{source} cannot be opened: there is no such user", kind="missing-file") from error
    except OSError as error:  # such as a name that is too long
        raise InputError(
            f"{str(source)[:80]} cannot be opened: {error.strerror or error}", kind="missing-file"
        ) from error
    return path


def open_picture(source: str | Path | Image.Image | bytes, name: str = "") -> Image.Image:
    """The whole picture, decoded and upright.

    Args:
        source: a path, a PIL picture, or the content of a file.
        name: how messages call it; the path by default.

    Raises:
        InputError: the file is missing, empty, truncated, no picture, or too large to decode safely.
    """
    name = name or describe(source)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            if isinstance(source, Image.Image):
                source.load()
                picture = source
            elif isinstance(source, bytes):
                if not source:
                    raise InputError(f"{name} is empty (0 bytes): save or download it again", kind="corrupt-file")
                with Image.open(io.BytesIO(source)) as opened:
                    opened.load()
                    picture = opened
            else:
                path = existing_path(source)
                if path.is_dir():
                    raise InputError(f"{path} is a folder: name one picture in it", kind="corrupt-file")
                if path.stat().st_size == 0:
                    raise InputError(f"{path} is empty (0 bytes): save or download it again", kind="corrupt-file")
                with Image.open(path) as opened:
                    opened.load()
                    picture = opened
            upright = ImageOps.exif_transpose(picture)
    except (Image.DecompressionBombWarning, Image.DecompressionBombError) as error:
        raise InputError(
            f"{name} has too many pixels to be opened safely: make it smaller", kind="corrupt-file"
        ) from error
    except UnidentifiedImageError as error:
        raise InputError(f"{name} is no picture that can be read: save it as PNG", kind="corrupt-file") from error
    except (OSError, SyntaxError, ValueError, EOFError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(
            f"{name} cannot be read ({error}): it may be truncated, save or download it again", kind="corrupt-file"
        ) from error
    if min(upright.size) < LEAST_SIDE:
        raise InputError(
            f"{name} is {upright.width}x{upright.height} pixels: too small to hold a face", kind="corrupt-file"
        )
    return upright


def load_array(path: Path) -> np.ndarray:
    """The one array of a .npy or .npz file. Raises `InputError` when there is none or there are several."""
    try:
        loaded = np.load(path, allow_pickle=False)
        if isinstance(loaded, np.ndarray):
            return loaded
        with loaded:
            if len(loaded.files) != 1:
                raise InputError(f"{path} holds {len(loaded.files)} arrays: save exactly one", kind="corrupt-file")
            return loaded[loaded.files[0]]
    except InputError:
        raise
    except Exception as error:  # np.load raises many kinds: zipfile, zlib, pickle, tokenizer, end of file
        raise InputError(
            f"{path} is no readable NumPy file ({error}): save it with numpy.save", kind="corrupt-file"
        ) from error


def check_aspect(have: tuple[int, int], want: tuple[int, int], name: str) -> None:
    """Reject sizes of different aspect ratios. Sizes are (height, width).

    Raises:
        InputError: the aspect ratios differ by more than 1 %, beyond the rounding of one pixel.
    """
    (height, width), (high, wide) = have, want
    if high < 1 or wide < 1:
        raise InputError(f"a size of {wide}x{high} pixels is impossible: both must be at least 1", kind="wrong-size")
    off = abs(width * high - height * wide)
    if off > ASPECT_TOLERANCE * height * wide and off > max(height, width):
        raise InputError(
            f"the {name} is {width}x{height}, but the image is {wide}x{high}: "
            f"crop or pad the {name} to that aspect ratio",
            kind="wrong-size",
        )


def mask_picture(labels: np.ndarray) -> Image.Image:
    """Labels as a palette picture: mode P, index = class, in our colours."""
    picture = Image.fromarray(labels)
    picture.putpalette(PALETTE.tobytes())  # turns the picture into mode P without touching the indices
    return picture


def png_bytes(picture: Image.Image, made_by: str = "") -> bytes:
    """A picture as the content of a PNG file; who made it, where that is known, stands in its text field `MADE_BY`."""
    buffer, info = io.BytesIO(), PngImagePlugin.PngInfo()
    if made_by:
        info.add_text(MADE_BY, made_by)
    picture.save(buffer, "PNG", pnginfo=info)
    return buffer.getvalue()
