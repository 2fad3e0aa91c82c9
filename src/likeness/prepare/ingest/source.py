"""The files of a source by folder. A zip archive counts as the folder that it contains.

Archives are read in place and never unpacked. Names in them that point outside the archive are rejected nevertheless.
An archive next to the folder to which it was unpacked is ignored.
"""

from __future__ import annotations

import os
import posixpath
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from likeness.prepare.ingest.face import MAX_BYTES, File, Packed, content_of, too_large
from likeness.types import InputError

IMAGES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff")
"""Suffixes of images."""

Member = tuple[zipfile.ZipFile, zipfile.ZipInfo]


@dataclass(frozen=True)
class Source:
    """The files of a folder or archive."""

    root: Path
    folders: dict[str, dict[str, Member | None]]
    """Folder ("" is the root, "a/b" a subfolder) -> file names -> member of an archive; None for a real file."""

    def file(self, name: str) -> File | None:
        """Return the file `folder/name`, or None if there is none."""
        folder, _, base = name.rpartition("/")
        if base not in self.folders.get(folder, {}):
            return None
        member = self.folders[folder][base]
        return self.root / name if member is None else Packed(name, partial(read_member, member))

    def existing_file(self, name: str) -> File:
        """Return a file that is known to exist."""
        file = self.file(name)
        assert file is not None
        return file

    def find(self, *names: str) -> File | None:
        """Return the file with one of these names that is nested least, or None."""
        for name in names:
            for folder in sorted(self.folders, key=depth):
                if name in self.folders[folder]:
                    return self.file(join(folder, name))
        return None

    def folder(self, *names: str) -> str | None:
        """Return the folder whose path ends in one of these names, the first name that exists, nested least."""
        for name in names:
            for folder in sorted(self.folders, key=depth):
                if f"/{folder}".endswith(f"/{name}"):
                    return folder
        return None

    def below(self, folder: str) -> list[str]:
        """Return `folder` and its subfolders, sorted."""
        return sorted(name for name in self.folders if name == folder or f"{name}/".startswith(f"{folder}/"))

    def images(self, folder: str | None, suffixes: tuple[str, ...] = IMAGES) -> dict[str, str]:
        """Return stem -> `folder/name` of the images (or other files) directly in a folder, sorted by name."""
        names = sorted(name for name in self.folders.get(folder or "", {}) if name.lower().endswith(suffixes))
        return {} if folder is None else {name.rpartition(".")[0]: join(folder, name) for name in names}

    def texts(self, folder: str | None) -> dict[str, str]:
        """Return stem -> `folder/name` of the text files directly in a folder."""
        return self.images(folder, (".txt",))

    def lines(self, name: str) -> Iterator[bytes]:
        """Yield the lines of a file."""
        file = self.existing_file(name)
        if isinstance(file, Packed):
            yield from content_of(file).splitlines()
            return
        try:
            with file.open("rb") as lines:
                yield from lines
        except OSError as error:
            raise InputError(f"{file} cannot be read: {error.strerror or error}") from error


def depth(folder: str) -> tuple[int, str]:
    """Sort key of folders, those nested least first."""
    return (folder.count("/") + 1 if folder else 0, folder)


def join(folder: str, name: str) -> str:
    return f"{folder}/{name}" if folder else name


def open_source(path: Path, out: Path | None = None) -> Source:
    """List the files of a folder or zip archive.

    Args:
        path: the folder or archive.
        out: a folder to ignore, because it is written.

    Raises:
        InputError: the source does not exist, or an archive is broken, has a password, or names files outside itself.
    """
    if path.is_file() and zipfile.is_zipfile(path):
        folders: dict[str, dict[str, Member | None]] = {}
        add_archive(folders, path, "")
        tops = {folder.split("/")[0] for folder in folders}
        if len(tops) == 1 and "" not in tops:  # one folder contains everything
            (top,) = tops
            folders = {folder[len(top) :].removeprefix("/"): names for folder, names in folders.items()}
        return Source(path, folders)
    if path.is_file():
        return Source(path.parent, {"": {path.name: None}})
    if not path.is_dir():
        raise InputError(f"{path} does not exist: give the folder or archive with the images")
    folders, archives = {}, []
    for folder, names in walk(path, out):
        archives += [join(folder, name) for name in names if name.lower().endswith(".zip")]
        if names:
            folders[folder] = dict.fromkeys(names)
    for name in sorted(archives):
        folder = name[: -len(".zip")]
        if not any(known == folder or known.startswith(f"{folder}/") for known in folders):
            add_archive(folders, path / name, folder)
    return Source(path, folders)


def walk(source: Path, out: Path | None = None) -> Iterator[tuple[str, list[str]]]:
    """Yield each folder of `source` ("" is itself) with its files. Follows links; ignores hidden files and `out`."""
    seen = {os.path.realpath(out)} - {os.path.realpath(source)} if out is not None else set()
    for place, inner, names in os.walk(source, followlinks=True, onerror=raise_unreadable):
        real = os.path.realpath(place)
        inner[:] = [] if real in seen else sorted(name for name in inner if not name.startswith("."))
        if real in seen:  # `out`, or a link to a parent folder
            continue
        seen.add(real)
        folder = Path(place).relative_to(source).as_posix().removeprefix(".")
        yield folder, [name for name in names if not name.startswith(".")]


def raise_unreadable(error: OSError) -> None:
    raise InputError(f"{error.filename} cannot be read: {error.strerror or error}") from error


def add_archive(folders: dict[str, dict[str, Member | None]], path: Path, place: str) -> None:
    """Add an archive's files as if it were unpacked to the folder `place`."""
    try:
        archive = zipfile.ZipFile(path)
    except (OSError, zipfile.BadZipFile) as error:
        raise InputError(f"{path} is not a readable zip archive ({error}): download it again") from error
    own = posixpath.basename(place)
    files = [info for info in archive.infolist() if not info.is_dir()]
    for info in files:
        check_inside(info.filename, str(path))
    nested = bool(own) and all(info.filename.startswith(f"{own}/") for info in files)  # face.zip contains face/...
    for info in files:
        folder, _, base = join(place, info.filename[len(own) + 1 :] if nested else info.filename).rpartition("/")
        if not base.startswith(".") and "__MACOSX" not in folder:
            folders.setdefault(folder, {})[base] = (archive, info)


def check_inside(name: str, where: str) -> str:
    """Normalize a path. Raises `InputError` if it points outside its folder or archive."""
    clean = posixpath.normpath(name.replace("\\", "/"))
    if clean.startswith(("../", "/")) or clean == ".." or (len(clean) > 1 and clean[1] == ":"):
        raise InputError(f"{where} names {name!r}, which points outside the folder: correct or remove that entry")
    return clean


def read_member(member: Member) -> bytes:
    """Read a file of an archive. Raises `InputError` if it is broken, too large, or has a password."""
    archive, info = member
    name = f"{info.filename} in {archive.filename}"
    if info.file_size > MAX_BYTES:
        raise too_large(name)
    try:
        return archive.read(info)
    except RuntimeError as error:  # a password
        raise InputError(f"{name} cannot be read ({error}): unpack the archive first") from error
    except Exception as error:  # zipfile, zlib, bz2 and lzma have many errors
        raise InputError(f"{name} is broken ({error}): download the archive again") from error
