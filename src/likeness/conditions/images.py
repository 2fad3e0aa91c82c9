"""Open and encode image files. Every failure is an `InputError` that names the file."""

from __future__ import annotations

import io
import json
import math
import zipfile
from contextlib import nullcontext, suppress
from pathlib import Path
from typing import IO, Literal

import numpy as np
from PIL import Image, ImageCms, ImageOps, PngImagePlugin, UnidentifiedImageError

from likeness.conditions.base import describe
from likeness.types import InputError

ASPECT_TOLERANCE = 0.01
"""Largest relative difference between the aspect ratios of a condition and its image."""

MADE_BY = "likeness:made_by"
"""PNG text field with the model that made the file. Other programs write `Software` into hand-made files."""

TRANSPARENT = ("RGBA", "LA", "PA", "RGBa", "La")
"""Pillow modes with an alpha channel."""

WIDE = ("I;16", "I;16B", "I;16L", "I;16N", "I", "F")
"""Pillow modes with more than 8 bits per value."""

FORMATS = ("PNG", "JPEG", "WEBP", "AVIF", "BMP", "TIFF", "GIF")
"""Image formats that are read, by their names in Pillow. JPEG includes MPO, the form of phones with several images."""

MINIMUM_SIDE = 8
"""Smallest side of an image in pixels."""

MAX_CONDITION_PIXELS = 4096 * 4096
"""Most pixels of a condition."""

MAX_PIXELS = 64_000_000
"""Most pixels of a photograph. A JPEG may have more, 178 million, because it is decoded at a lower resolution."""

MAX_VALUES = 19 * 1024 * 1024
"""Most values of an array in a file: one-hot masks of 1024 x 1024, or class numbers of 4096 x 4096."""

MAX_HEADER = 4096
"""Bytes in which the header of a .npy file ends."""


def unreadable(text: str) -> InputError:
    """The error for files that cannot be read as images or arrays."""
    return InputError(text, kind="corrupt-file")


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


def open_image(
    source: str | Path | Image.Image | bytes,
    name: str = "",
    *,
    max_pixels: int = MAX_CONDITION_PIXELS,
    exact: bool = False,
) -> Image.Image:
    """Decode an image file completely, in its own mode, and apply its EXIF orientation. See `read_rgb` for photographs.

    The size is checked in the header, before anything is decoded. A JPEG above the bound is decoded at a half, a
    quarter or an eighth of its size. Animations give their first frame.

    Args:
        source: A path, a PIL image, or the content of a file.
        name: Name for error messages. Default: the path.
        max_pixels: Upper bound of its pixels.
        exact: Reject files whose pixels would change: a JPEG at a lower resolution, and more than 8 bits per value.

    Raises `InputError` if the file is missing, empty, truncated, too large, or not an image in one of `FORMATS`.
    """
    name = name or describe(source)
    try:
        if isinstance(source, Image.Image):
            check_pixels(source.width, source.height, name, max_pixels)
            source.load()
            image = source
        else:
            if isinstance(source, bytes):
                file, length = io.BytesIO(source), len(source)
            else:
                file = _regular_file(source, name)
                length = file.stat().st_size
            if not length:
                raise unreadable(f"{name} is empty (0 bytes): save or download it again")
            with Image.open(file, formats=_formats(name)) as image:
                if exact and (image.mode in WIDE or any(";16" in str(tile[3]) for tile in image.tile)):
                    raise unreadable(f"{name} has 16 bits per value, which would be rounded: save it with 8 bits")
                if not exact and image.format in ("JPEG", "MPO") and image.width * image.height > max_pixels:
                    scale = next((n for n in (2, 4, 8) if image.width * image.height <= max_pixels * n * n), 8)
                    image.draft(None, (image.width // scale, image.height // scale))
                check_pixels(image.width, image.height, name, max_pixels)
                image.load()
        with suppress(Exception):
            image.getexif()  # fails once if the block is damaged, which then counts as empty
        upright = ImageOps.exif_transpose(image)
        upright.format = image.format  # masks in JPEG are repaired
    except UnidentifiedImageError as error:
        raise unreadable(f"{name} is not a readable image: save it as PNG (supported: {', '.join(FORMATS)})") from error
    except InputError:
        raise
    except Image.DecompressionBombError as error:  # Pillow's own limit, far above ours
        raise unreadable(_too_large(name, max_pixels)) from error
    except Exception as error:  # decoders of damaged files raise nearly anything
        raise unreadable(f"{name} cannot be read ({error}): it may be truncated, save or download it again") from error
    check_size(upright.width, upright.height, name)
    return upright


def read_rgb(
    source: str | Path | Image.Image | bytes, name: str = "", *, background: Literal["white", "black"] = "white"
) -> Image.Image:
    """Read a photograph (a path, a PIL image, or the content of a file) in any supported form as 8-bit sRGB, mode RGB.
    Errors are those of `open_image`, with `MAX_PIXELS`; `name` replaces the path in them.

    Transparent pixels are composited on `background`, so colors hidden under them never appear. Embedded ICC profiles
    are converted to sRGB, CMYK and 16-bit or float values to 8 bits per channel (`to_8_bit`).
    """
    image = open_image(source, name, max_pixels=MAX_PIXELS)
    profile = image.info.get("icc_profile")
    if image.mode in WIDE:
        image = to_8_bit(image)
    if image.mode == "P":
        image = image.convert("RGBA" if "transparency" in image.info else "RGB")
    if image.mode in TRANSPARENT or "transparency" in image.info:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, background), image).convert("RGB")
    if profile:
        image = _to_srgb(image, profile)
    return image.convert("RGB")


def to_8_bit(image: Image.Image) -> Image.Image:
    """Scale 16-bit integers, or float values, to 8-bit gray. The range is 65535 for 16 bits, and for other modes the
    smallest of 1 (float only), 255 and 65535 that contains all values.
    """
    values = np.nan_to_num(np.asarray(image).astype(np.float32))
    high = float(values.max(initial=0))
    if image.mode.startswith("I;16"):
        white = 65535.0
    else:
        white = next((w for w in ((1.0,) if image.mode == "F" else ()) + (255.0, 65535.0) if high <= w), high)
    return Image.fromarray(np.rint(values.clip(0, white) * (255 / white)).astype(np.uint8))


def _to_srgb(image: Image.Image, profile: bytes) -> Image.Image:
    """Convert from an ICC profile. A profile that is damaged or belongs to another mode is ignored, as viewers do."""
    try:
        source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
        if "sRGB" in ImageCms.getProfileDescription(source):
            return image
        converted = ImageCms.profileToProfile(image, source, ImageCms.createProfile("sRGB"), outputMode="RGB")
    except (ImageCms.PyCMSError, OSError, ValueError):
        return image
    assert converted is not None
    return converted


def _regular_file(source: str | Path, name: str) -> Path:
    path = existing_path(source)
    if path.is_dir():
        raise unreadable(f"{name} is a folder: name one image in it")
    if not path.is_file():
        raise unreadable(f"{name} is not a regular file: pass an image file")
    return path


def _formats(name: str) -> tuple[str, ...]:
    """The formats that may be opened. HEIC needs a plug-in, which is loaded for such files only."""
    if Path(name).suffix.lower() not in (".heic", ".heif"):
        return FORMATS
    try:
        from pillow_heif import register_heif_opener
    except ImportError as error:
        raise unreadable(f"{name} is a HEIC image: pip install 'likeness[heic]', or save it as JPEG") from error
    register_heif_opener()
    return (*FORMATS, "HEIF")


def check_pixels(width: int, height: int, name: str, max_pixels: int) -> None:
    """Raise `InputError` if an image or array has more than `max_pixels` pixels."""
    if width * height > max_pixels:
        raise unreadable(_too_large(f"{name} is {width}x{height}, which", max_pixels))


def _too_large(name: str, max_pixels: int) -> str:
    return f"{name} has too many pixels: at most {max_pixels / 1e6:.0f} million are read, reduce its size"


def load_array(source: Path | IO[bytes], name: str = "") -> np.ndarray:
    """Load the single array of a .npy or .npz file, or of one that is open. Its size is checked in the header. Raises
    `InputError` if the file is invalid, or has several arrays or more than `MAX_VALUES` values.
    """
    name = name or str(source)
    path = _regular_file(source, name) if isinstance(source, Path) else source
    try:
        if not zipfile.is_zipfile(path):
            with path.open("rb") if isinstance(path, Path) else nullcontext(path) as file:
                file.seek(0)
                return _read_array(file, name)
        with zipfile.ZipFile(path) as archive:
            if len(names := archive.namelist()) != 1:
                raise unreadable(f"{name} contains {len(names)} arrays: save exactly one")
            with archive.open(names[0]) as file:
                return _read_array(file, name)
    except InputError:
        raise
    except Exception as error:  # numpy raises errors of zipfile, zlib, tokenize and others
        raise unreadable(f"{name} is not a readable NumPy file ({error}): save it with numpy.save") from error


def _read_array(file: IO[bytes], name: str) -> np.ndarray:
    """Read one array from an open .npy file. Raises `InputError` if its header announces too many values."""
    start = io.BytesIO(file.read(MAX_HEADER))
    version = np.lib.format.read_magic(start)
    read_header = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    shape, _, dtype = read_header(start)
    if min(shape, default=0) < 0 or math.prod(shape) > MAX_VALUES or dtype.itemsize > 16:
        million = f"{MAX_VALUES / 1e6:.0f} million"
        raise unreadable(f"{name} has shape {list(shape)}: at most {million} values are read, reduce its size")
    content = start.getvalue() + file.read(math.prod(shape) * dtype.itemsize)
    return np.load(io.BytesIO(content), allow_pickle=False)


def check_size(width: int, height: int, name: str) -> None:
    """Raise `InputError` if an image is smaller than `MINIMUM_SIDE`."""
    if min(width, height) < MINIMUM_SIDE:
        least = f"{MINIMUM_SIDE}x{MINIMUM_SIDE}"
        raise unreadable(f"{name} is {width}x{height} pixels: too small for a face (minimum: {least})")


def check_aspect(have: tuple[int, int], want: tuple[int, int], name: str) -> None:
    """Raise `InputError` if the aspect ratios of two sizes (height, width) differ by more than 1 % and 1 pixel."""
    (height, width), (high, wide) = have, want
    if high < 1 or wide < 1:
        raise InputError(f"Size {wide}x{high} is invalid: both sides must be at least 1 pixel", kind="wrong-size")
    off = abs(width * high - height * wide)
    if off > ASPECT_TOLERANCE * height * wide and off > max(height, width):
        text = f"the {name} is {width}x{height}, but the image is {wide}x{high}: crop or pad it to that aspect ratio"
        raise InputError(text, kind="wrong-size")


def png_bytes(image: Image.Image, made_by: str = "") -> bytes:
    """Encode an image as PNG. `made_by` is written to the text field `MADE_BY`."""
    buffer, info = io.BytesIO(), PngImagePlugin.PngInfo()
    if made_by:
        info.add_text(MADE_BY, made_by)
    image.save(buffer, "PNG", pnginfo=info)
    return buffer.getvalue()


def made_by(file: Path) -> str | None:
    """Return the annotator that a mask, sketch or keypoints file names."""
    try:
        if file.suffix == ".json":
            document = json.loads(file.read_text(encoding="utf-8"))
            return document.get("made_by") if isinstance(document, dict) else None
        with Image.open(file) as image:
            return image.info.get(MADE_BY)
    except (OSError, ValueError, SyntaxError):
        return None
