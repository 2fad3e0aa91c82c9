"""Image files in every form that people bring: the same photograph gives the same pixels."""

from __future__ import annotations

import io
import os
import struct
import sys
import zipfile
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageCms

from likeness.conditions.images import MAX_CONDITION_PIXELS, MAX_PIXELS, load_array, open_image, read_rgb
from likeness.conditions.mask import MASK
from likeness.conditions.sketch import SKETCH
from likeness.data.folder import read_folder
from likeness.prepare.ingest.write import ingest
from likeness.types import InputError


def photograph(size: int = 64) -> np.ndarray:
    """Smooth colors, uint8 [size, size, 3]."""
    y, x = np.mgrid[:size, :size] / size
    return np.rint(np.stack([200 * x + 30, 180 * y + 40, 120 + 60 * np.sin(5 * x)], axis=-1)).astype(np.uint8)


def saved(image: Image.Image, file: Path, **options) -> Path:
    image.save(file, **options)
    return file


@pytest.mark.parametrize("suffix", ["png", "jpg", "webp", "avif", "bmp", "tif", "gif"])
def test_formats(tmp_path, suffix):
    expected = photograph().astype(int)
    options = {"quality": 95} if suffix in ("jpg", "webp", "avif") else {}
    found = np.asarray(read_rgb(saved(Image.fromarray(photograph()), tmp_path / f"a.{suffix}", **options)))
    assert np.abs(found - expected).mean() < (0.01 if suffix in ("png", "bmp", "tif") else 8)


def gray_images() -> dict[str, np.ndarray | Image.Image]:
    """The same tones in modes with other ranges."""
    gray = np.asarray(Image.fromarray(photograph()).convert("L"))
    return {
        "16 bit": gray.astype(np.uint16) * 257,
        "float 0 to 1": gray.astype(np.float32) / 255,
        "float 0 to 255": gray.astype(np.float32),
        "32 bit, 0 to 255": gray.astype(np.int32),
        "32 bit, 0 to 65535": gray.astype(np.int32) * 257,
    }


@pytest.mark.parametrize("kind", list(gray_images()))
def test_bit_depths_keep_tones(tmp_path, kind):
    expected = np.asarray(Image.fromarray(photograph()).convert("L")).astype(int)
    image = Image.fromarray(gray_images()[kind])
    for suffix in ("png", "tif") if kind == "16 bit" else ("tif",):
        found = np.asarray(read_rgb(saved(image, tmp_path / f"a.{suffix}")))
        assert np.abs(found - expected[..., None]).max() <= 1


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P", "RGB"])
def test_hidden_colors_become_white(tmp_path, mode):
    """What an editor leaves under alpha 0 never becomes a pixel."""
    alpha = np.full((64, 64), 255, np.uint8)
    alpha[:, :20] = 0
    image = Image.fromarray(np.dstack([photograph(), alpha]))
    options = {}
    if mode == "P":
        image = image.quantize(64)
    elif mode == "LA":
        image = image.convert("LA")
    elif mode == "RGB":  # a transparent color
        pixels = photograph()
        pixels[:, :20] = (255, 0, 255)
        image, options = Image.fromarray(pixels), {"transparency": (255, 0, 255)}
    found = np.asarray(read_rgb(saved(image, tmp_path / "a.png", **options)))
    assert (found[:, :20] == 255).all()
    assert (found[:, 20:] != 255).any()


def test_profiles_are_converted_to_srgb(tmp_path):
    """Linear XYZ-like or Lab profiles change pixels; an sRGB profile or a damaged one does not."""
    srgb = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    image = Image.fromarray(photograph())
    for profile in (srgb, b"not a profile", srgb[:200]):
        found = read_rgb(saved(image, tmp_path / "a.png", icc_profile=profile))
        assert np.array_equal(np.asarray(found), photograph())
    swapped = swap_primaries(srgb)
    found = np.asarray(read_rgb(saved(image, tmp_path / "b.png", icc_profile=swapped))).astype(int)
    expected = photograph()[..., [2, 1, 0]]
    assert np.abs(found - expected).mean() < 3
    assert np.abs(found - photograph()).mean() > 20


def swap_primaries(profile: bytes) -> bytes:
    """The sRGB profile with red and blue swapped and another description: a profile whose effect is known."""
    count = struct.unpack(">I", profile[128:132])[0]
    content = bytearray(profile)
    for index in range(count):
        start = 132 + 12 * index
        if content[start : start + 4] == b"rXYZ":
            content[start : start + 4] = b"bXYZ"
        elif content[start : start + 4] == b"bXYZ":
            content[start : start + 4] = b"rXYZ"
    for text in ("sRGB".encode("utf-16-be"), b"sRGB"):
        content = content.replace(text, "BGRs".encode("utf-16-be") if len(text) == 8 else b"BGRs")
    return bytes(content)


def test_cmyk_and_orientation(tmp_path):
    image = Image.fromarray(photograph())
    found = np.asarray(read_rgb(saved(image.convert("CMYK"), tmp_path / "a.jpg", quality=95))).astype(int)
    assert np.abs(found - photograph()).mean() < 4
    exif = Image.Exif()
    exif[0x0112] = 6  # rotate by 90 degrees
    found = np.asarray(read_rgb(saved(image, tmp_path / "b.png", exif=exif)))
    assert np.array_equal(found, np.rot90(photograph(), -1))


def png_header(width: int, height: int) -> bytes:
    """A PNG that announces a size and has no pixels: decoding it would allocate them."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")


@pytest.mark.parametrize("form", ["JPEG", "PNG", "WEBP"])
def test_a_damaged_exif_block_counts_as_empty(tmp_path, form):
    """Pixels are intact, so the image is; as a photograph, and as a face to ingest."""
    file = tmp_path / "source" / f"0.{form.lower()}"
    file.parent.mkdir()
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3)).astype(np.uint8))
    image.save(file, form, exif=b"Exif\0\0II*\0 no directory", dpi=(72, 72))
    assert read_rgb(file).size == (64, 64)
    ingest(file.parent, tmp_path / "out")
    assert len(read_folder(tmp_path / "out")) == 1


def test_sizes_are_checked_before_decoding(tmp_path):
    for side, read, most in ((9000, read_rgb, MAX_PIXELS), (5000, open_image, MAX_CONDITION_PIXELS)):
        (tmp_path / "a.png").write_bytes(png_header(side, side))
        with pytest.raises(
            InputError, match=f"{side}x{side}, which has too many pixels: at most {most / 1e6:.0f} million"
        ):
            read(tmp_path / "a.png")
    for content in (png_header(40_000, 40_000), png_header(2**31 - 1, 2**31 - 1)):
        with pytest.raises(InputError, match="too many pixels"):
            read_rgb(content, "a.png")
    file = saved(Image.new("RGB", (10_000, 8_000), "gray"), tmp_path / "phone.jpg")
    assert read_rgb(file).size == (5000, 4000)


def test_arrays_are_checked_before_loading(tmp_path):
    huge = np.lib.format.open_memmap(tmp_path / "a.npy", "w+", np.float64, (50_000, 50_000))  # sparse
    del huge
    np.savez_compressed(tmp_path / "b.npz", np.zeros((19, 2048, 2048), np.uint8))
    header = io.BytesIO()
    np.lib.format.write_array_header_1_0(header, {"descr": "|u1", "fortran_order": False, "shape": (-1,)})
    with zipfile.ZipFile(tmp_path / "bomb.npz", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("a.npy", header.getvalue() + bytes(1_000_000))
    for name in ("a.npy", "b.npz", "bomb.npz"):
        with pytest.raises(InputError, match="at most 20 million values"):
            load_array(tmp_path / name)
    labels = np.arange(64, dtype=np.uint8).reshape(8, 8)
    np.save(tmp_path / "c.npy", labels)
    np.savez(tmp_path / "d.npz", labels)
    for name in ("c.npy", "d.npz"):
        assert np.array_equal(load_array(tmp_path / name), labels)
    np.savez(tmp_path / "e.npz", labels, labels)
    with pytest.raises(InputError, match="contains 2 arrays"):
        load_array(tmp_path / "e.npz")
    np.save(tmp_path / "f.npy", np.array([{"a": 1}], dtype=object))
    for content in (b"\x93NUMPY", b"\x93NUMPY\x01\x00\xff\xff", b"PK\x03\x04", b""):
        (tmp_path / "g.npy").write_bytes(content)
        with pytest.raises(InputError, match=r"g\.npy"):
            load_array(tmp_path / "g.npy")
    with pytest.raises(InputError, match=r"f\.npy is not a readable NumPy file"):
        load_array(tmp_path / "f.npy")


def test_only_regular_image_files(tmp_path):
    os.mkfifo(tmp_path / "pipe.png")
    Image.fromarray(photograph()).save(tmp_path / "a.ppm")
    (tmp_path / "a.eps").write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n")
    buffer = io.BytesIO()
    Image.fromarray(photograph()).save(buffer, "PPM")
    for name, text in (("pipe.png", "not a regular file"), ("a.ppm", "supported: PNG"), ("a.eps", "supported: PNG")):
        for read in (read_rgb, MASK.read, SKETCH.read):
            with pytest.raises(InputError, match=text):
                read(tmp_path / name)
    with pytest.raises(InputError, match="not a regular file"):
        read_rgb("/dev/zero")


def test_heic(tmp_path, monkeypatch):
    """HEIC needs a plug-in, which is named if it is missing."""
    pillow_heif = pytest.importorskip("pillow_heif")
    file = tmp_path / "a.heic"
    pillow_heif.from_pillow(Image.fromarray(photograph())).save(file, quality=95)
    assert np.abs(np.asarray(read_rgb(file)).astype(int) - photograph()).mean() < 8
    monkeypatch.setitem(sys.modules, "pillow_heif", None)
    with pytest.raises(InputError, match=r"pip install 'likeness\[heic\]'"):
        read_rgb(file)
