"""The files of a source by folder, zip archives standing for the folders they hold.

Archives are read where they are and never unpacked, so that no name in one can lead out of anywhere; such names are
refused all the same. An archive beside the folder it was unpacked to is passed over.
"""

from __future__ import annotations

import os
import posixpath
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from likeness.prepare.ingest.face import MOST_BYTES, File, Packed, content_of
from likeness.types import InputError

PICTURES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff")
"""Suffixes of pictures."""

Member = tuple[zipfile.ZipFile, zipfile.ZipInfo]


@dataclass(frozen=True)
class Tree:
    """What a source holds."""

    root: Path
    folders: dict[str, dict[str, Member | None]]
    """Folder ("" is the root, "a/b" one below) -> names of its files -> where in an archive; None for a real file."""

    def file(self, name: str) -> File | None:
        """The file `folder/name`; None where there is none."""
        folder, _, base = name.rpartition("/")
        if base not in self.folders.get(folder, {}):
            return None
        member = self.folders[folder][base]
        return self.root / name if member is None else Packed(name, partial(read_member, member))

    def needed(self, *bases: str) -> File:
        """The shallowest file of one of these names. Raises `InputError` where there is none."""
        found = self.find(*bases)
        if found is None:
            raise InputError(f"{self.root / bases[0]} cannot be read: there is no such file")
        return found

    def find(self, *bases: str) -> File | None:
        """The shallowest file of one of these names; None where there is none."""
        for base in bases:
            for folder in sorted(self.folders, key=depth):
                if base in self.folders[folder]:
                    return self.file(join(folder, base))
        return None

    def folder(self, *names: str) -> str | None:
        """The shallowest folder with files whose path ends in one of these names, the first that there is."""
        for name in names:
            for folder in sorted(self.folders, key=depth):
                if f"/{folder}".endswith(f"/{name}"):
                    return folder
        return None

    def below(self, folder: str) -> list[str]:
        """The folders with files in `folder`, itself among them, sorted."""
        return sorted(name for name in self.folders if name == folder or f"{name}/".startswith(f"{folder}/"))

    def pictures(self, folder: str | None, suffixes: tuple[str, ...] = PICTURES) -> dict[str, str]:
        """Stem -> `folder/name` of the pictures (or other files) right in a folder, sorted by name."""
        if folder is None:
            return {}
        names = sorted(name for name in self.folders.get(folder, {}) if name.lower().endswith(suffixes))
        return {name.rpartition(".")[0]: join(folder, name) for name in names}

    def lines(self, name: str) -> Iterator[bytes]:
        """The lines of a file, read one by one."""
        file = self.file(name)
        assert file is not None
        if isinstance(file, Packed):
            yield from content_of(file).splitlines()
            return
        try:
            with file.open("rb") as lines:
                yield from lines
        except OSError as error:
            raise InputError(f"{file} cannot be read: {error.strerror or error}") from error


def depth(folder: str) -> tuple[int, str]:
    """Sorts folders, the shallowest first."""
    return (folder.count("/") + 1 if folder else 0, folder)


def join(folder: str, name: str) -> str:
    return f"{folder}/{name}" if folder else name


def open_tree(source: Path, out: Path | None = None) -> Tree:
    """What a folder, or a zip archive, holds.

    Args:
        source: the folder or archive.
        out: a folder to leave aside, since what is written there is not of the source.

    Raises:
        InputError: there is no such source, or an archive is broken, has a password, or names files outside itself.
    """
    if source.is_file() and zipfile.is_zipfile(source):
        folders: dict[str, dict[str, Member | None]] = {}
        add_archive(folders, source, "")
        tops = {folder.split("/")[0] for folder in folders}
        if len(tops) == 1 and "" not in tops:  # everything lies in one folder of the archive
            (top,) = tops
            folders = {folder[len(top) :].removeprefix("/"): names for folder, names in folders.items()}
        return Tree(source, folders)
    if source.is_file():
        return Tree(source.parent, {"": {source.name: None}})
    if not source.is_dir():
        raise InputError(f"{source} does not exist: give the folder or archive that holds the pictures")
    folders, archives = {}, []
    for folder, names in walk(source, out):
        archives += [join(folder, name) for name in names if name.lower().endswith(".zip")]
        if names:
            folders[folder] = dict.fromkeys(names)
    for name in sorted(archives):
        folder = name[: -len(".zip")]
        if not any(known == folder or known.startswith(f"{folder}/") for known in folders):
            add_archive(folders, source / name, folder)
    return Tree(source, folders)


def walk(source: Path, out: Path | None = None) -> Iterator[tuple[str, list[str]]]:
    """Each folder in `source` ("" is itself) with its files; links are followed, hidden files and `out` left aside."""
    seen = {os.path.realpath(out)} - {os.path.realpath(source)} if out is not None else set()
    for place, inner, names in os.walk(source, followlinks=True, onerror=refuse_folder):
        real = os.path.realpath(place)
        inner[:] = [] if real in seen else sorted(name for name in inner if not name.startswith("."))
        if real in seen:  # `out`, or a link to a folder further up
            continue
        seen.add(real)
        folder = Path(place).relative_to(source).as_posix().removeprefix(".")
        yield folder, [name for name in names if not name.startswith(".")]


def refuse_folder(error: OSError) -> None:
    raise InputError(f"{error.filename} cannot be read: {error.strerror or error}") from error


def add_archive(folders: dict[str, dict[str, Member | None]], path: Path, place: str) -> None:
    """Add an archive's files as if it had been unpacked to the folder `place`."""
    try:
        archive = zipfile.ZipFile(path)
    except (OSError, zipfile.BadZipFile) as error:
        raise InputError(f"{path} is no zip archive that can be read ({error}): download it again") from error
    own = posixpath.basename(place)
    files = [info for info in archive.infolist() if not info.is_dir()]
    for info in files:
        check_inside(info.filename, str(path))
    alone = bool(own) and all(info.filename.startswith(f"{own}/") for info in files)  # face.zip holds face/...
    for info in files:
        folder, _, base = join(place, info.filename[len(own) + 1 :] if alone else info.filename).rpartition("/")
        if not base.startswith(".") and "__MACOSX" not in folder:
            folders.setdefault(folder, {})[base] = (archive, info)


def check_inside(name: str, where: str) -> str:
    """`name` without detours. Raises `InputError` where it leads out of the folder or archive it stands in."""
    clean = posixpath.normpath(name.replace("\\", "/"))
    if clean.startswith(("../", "/")) or clean == ".." or (len(clean) > 1 and clean[1] == ":"):
        raise InputError(f"{where} names {name!r}, which points outside the folder: correct or remove that entry")
    return clean


def read_member(member: Member) -> bytes:
    """A file of an archive. Raises `InputError` where it is broken, too large, or has a password."""
    archive, info = member
    name = f"{info.filename} in {archive.filename}"
    if info.file_size > MOST_BYTES:
        raise InputError(f"{name} is larger than {MOST_BYTES >> 20} MiB: no picture of a face is")
    try:
        return archive.read(info)
    except RuntimeError as error:  # a password
        raise InputError(f"{name} cannot be read ({error}): unpack the archive first") from error
    except (zipfile.BadZipFile, EOFError, NotImplementedError, OSError, ValueError) as error:
        raise InputError(f"{name} is broken ({error}): download the archive again") from error
    except Exception as error:  # zlib, bz2 and lzma have errors of their own
        raise InputError(f"{name} cannot be unpacked ({error}): download the archive again") from error
