"""Open and encode image files. Every failure is an `InputError` that names the file."""

from __future__ import annotations

import io
import warnings
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps, PngImagePlugin, UnidentifiedImageError

from likeness.conditions.base import describe
from likeness.types import InputError

ASPECT_TOLERANCE = 0.01
"""Largest relative difference between the aspect ratios of a condition and its image."""

MADE_BY = "likeness:made_by"
"""PNG text field with the model that made the file. Other programs write `Software` into hand-made files."""

TRANSPARENT = ("RGBA", "LA", "PA", "RGBa", "La")
"""Pillow modes with an alpha channel."""

MINIMUM_SIDE = 8
"""Smallest side of an image in pixels."""


def existing_path(source: str | Path) -> Path:
    """Return `source` as a path. Raises `InputError` if it does not exist."""
    try:
        path = Path(source).expanduser()
        if not path.exists():
            raise InputError(f"{path} does not exist: check the path", kind="missing-file")
    except RuntimeError as error:  # ~user
        raise InputError(f"{source} cannot be opened: unknown user", kind="missing-file") from error
    except OSError as error:  # for example a name that is too long
        text = f"{str(source)[:80]} cannot be opened: {error.strerror or error}"
        raise InputError(text, kind="missing-file") from error
    return path


def open_image(source: str | Path | Image.Image | bytes, name: str = "") -> Image.Image:
    """Decode an image completely and apply its EXIF orientation.

    Args:
        source: A path, a PIL image, or the content of a file.
        name: Name for error messages. Default: the path.

    Raises:
        InputError: The file is missing, empty, truncated, not an image, or exceeds Pillow's decompression limit.
    """
    name = name or describe(source)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            if isinstance(source, Image.Image):
                source.load()
                image = source
            else:
                if isinstance(source, bytes):
                    file, size = io.BytesIO(source), len(source)
                else:
                    file = existing_path(source)
                    size = file.stat().st_size
                    if file.is_dir():
                        raise InputError(f"{name} is a folder: name one image in it", kind="corrupt-file")
                if not size:
                    raise InputError(f"{name} is empty (0 bytes): save or download it again", kind="corrupt-file")
                with Image.open(file) as image:
                    image.load()
            upright = ImageOps.exif_transpose(image)
    except (Image.DecompressionBombWarning, Image.DecompressionBombError) as error:
        text = f"{name} has too many pixels to be opened safely: reduce its size"
        raise InputError(text, kind="corrupt-file") from error
    except UnidentifiedImageError as error:
        raise InputError(f"{name} is not a readable image: save it as PNG", kind="corrupt-file") from error
    except InputError:
        raise
    except (OSError, SyntaxError, ValueError, EOFError) as error:
        text = f"{name} cannot be read ({error}): it may be truncated, save or download it again"
        raise InputError(text, kind="corrupt-file") from error
    check_size(upright.width, upright.height, name)
    return upright


def load_array(path: Path, name: str = "") -> np.ndarray:
    """Load the single array of a .npy or .npz file. Raises `InputError` if the file is invalid or has several."""
    name = name or str(path)
    try:
        loaded = np.load(path, allow_pickle=False)
        if isinstance(loaded, np.ndarray):
            return loaded
        with loaded:
            if len(loaded.files) != 1:
                text = f"{name} contains {len(loaded.files)} arrays: save exactly one"
                raise InputError(text, kind="corrupt-file")
            return loaded[loaded.files[0]]
    except InputError:
        raise
    except Exception as error:  # np.load raises errors of zipfile, zlib, pickle, tokenize and others
        text = f"{name} is not a readable NumPy file ({error}): save it with numpy.save"
        raise InputError(text, kind="corrupt-file") from error


def check_size(width: int, height: int, name: str) -> None:
    """Raise `InputError` if an image is smaller than `MINIMUM_SIDE`."""
    if min(width, height) < MINIMUM_SIDE:
        text = f"{name} is {width}x{height} pixels: too small for a face (minimum: {MINIMUM_SIDE}x{MINIMUM_SIDE})"
        raise InputError(text, kind="corrupt-file")


def check_aspect(have: tuple[int, int], want: tuple[int, int], name: str) -> None:
    """Compare two sizes (height, width).

    Raises:
        InputError: The aspect ratios differ by more than 1 % and by more than the rounding of one pixel.
    """
    (height, width), (high, wide) = have, want
    if high < 1 or wide < 1:
        raise InputError(f"Size {wide}x{high} is invalid: both sides must be at least 1 pixel", kind="wrong-size")
    off = abs(width * high - height * wide)
    if off > ASPECT_TOLERANCE * height * wide and off > max(height, width):
        raise InputError(
            f"the {name} is {width}x{height}, but the image is {wide}x{high}: "
            f"crop or pad the {name} to that aspect ratio",
            kind="wrong-size",
        )


def png_bytes(image: Image.Image, made_by: str = "") -> bytes:
    """Encode an image as PNG. `made_by` is written to the text field `MADE_BY`."""
    buffer, info = io.BytesIO(), PngImagePlugin.PngInfo()
    if made_by:
        info.add_text(MADE_BY, made_by)
    image.save(buffer, "PNG", pnginfo=info)
    return buffer.getvalue()
