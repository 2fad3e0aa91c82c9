"""The files of a source by folder. A zip archive counts as the folder that it contains.

Files are read when a face is written, so that listing a million faces costs only their names. Archives are read in
place. An archive next to the folder to which it was unpacked is ignored. Sources are data of others: only regular files
are listed, links out of the source only on request. Everything that is not read is counted by its kind.
"""

from __future__ import annotations

import json
import os
import posixpath
import stat
import zipfile
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from likeness.conditions.base import IMAGE_SUFFIXES
from likeness.data.folder import lines_of
from likeness.types import InputError

MAX_BYTES = 2**28
"""Largest file that is read: no image of a face is larger, but an archive may pretend to be small."""

Member = tuple[zipfile.ZipFile, zipfile.ZipInfo]

HIDDEN, OUTSIDE, SPECIAL = "hidden", "links out of the source (--follow-links reads them)", "not regular files"
"""Kinds of entries that are not listed. `SPECIAL` are pipes, devices, sockets and broken links."""


@dataclass(frozen=True)
class SourceFile:
    """A file in a folder, an archive or a table. Its methods raise `InputError` if it cannot be read."""

    name: str
    """Name for messages."""
    content: Callable[[], bytes]
    path: Path | None = None
    """Path of a file that is neither in an archive nor in a table."""

    @property
    def suffix(self) -> str:
        return posixpath.splitext(self.name)[1].lower()

    def text(self) -> str:
        try:
            return self.content().decode("utf-8-sig")
        except UnicodeDecodeError as error:
            raise InputError(f"{self.name} is not UTF-8 text ({error.reason}): save it as UTF-8") from error

    def lines(self) -> list[str]:
        """Return the lines that are not blank, stripped."""
        return [line.strip() for line in self.text().splitlines() if line.strip()]

    def json(self) -> Any:
        return parse_json(self.text(), self.name)


def parse_json(text: str | bytes, name: str, **options: Any) -> Any:
    """Parse JSON. Raises `InputError` if it is not valid."""
    try:
        return json.loads(text, **options)
    except (ValueError, TypeError, RecursionError) as error:
        raise InputError(f"{name} is not valid JSON ({str(error)[:80]}): export it again") from error


def read_file(path: Path, offset: int = 0, size: int | None = None, name: str = "") -> bytes:
    """Read a file, or `size` bytes of it that are called `name`."""
    try:
        size = path.stat().st_size if size is None else size
        check_bytes(size, name or str(path))
        with path.open("rb") as file:
            file.seek(offset)
            content = file.read(size)
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror or error}") from error
    if len(content) < size:
        raise InputError(f"{name or path} is truncated: download it again")
    return content


def read_member(archive: zipfile.ZipFile, info: zipfile.ZipInfo) -> bytes:
    name = f"{info.filename} in {archive.filename}"
    check_bytes(info.file_size, name)
    try:
        return archive.read(info)
    except RuntimeError as error:  # a password
        raise InputError(f"{name} cannot be read ({error}): unpack the archive first") from error
    except Exception as error:  # zipfile, zlib, bz2 and lzma have many errors
        raise InputError(f"{name} is broken ({error}): download the archive again") from error


def check_bytes(size: int, name: str) -> None:
    """Raise `InputError` if a file has more than `MAX_BYTES`."""
    if size > MAX_BYTES:
        raise InputError(f"{name} is larger than {MAX_BYTES >> 20} MiB, too large for an image of a face")


@dataclass(frozen=True)
class Source:
    """The files of a folder or archive."""

    root: Path
    folders: dict[str, dict[str, bool]] = field(default_factory=dict)
    """Folder ("" is the root, "a/b" a subfolder) -> file names -> whether the file was used."""
    members: dict[str, Member] = field(default_factory=dict)
    """`folder/name` -> member of an archive; other files are real."""
    unlisted: Counter[str] = field(default_factory=Counter)
    """Kind -> number of entries that are not listed."""
    unread: Counter[str] = field(default_factory=Counter)
    """Kind -> number of members of shards that were not read in the last pass."""

    def file(self, name: str) -> SourceFile | None:
        """Return the file `folder/name`, which counts as used, or None if it does not exist."""
        folder, _, base = name.rpartition("/")
        if base not in self.folders.get(folder, {}):
            return None
        self.folders[folder][base] = True
        member, path = self.members.get(name), self.root / name
        return (
            SourceFile(name, partial(read_member, *member))
            if member
            else SourceFile(str(path), partial(read_file, path), path)
        )

    def unused(self) -> dict[str, dict[str, Any]]:
        """Return kind (a suffix, if it is a file) -> `count` and, for files, an `example`, of all that was not used."""
        examples: dict[str, str] = {}
        counts = Counter[str]()
        for folder in sorted(self.folders):
            for name in sorted(name for name, used in self.folders[folder].items() if not used):
                kind = posixpath.splitext(name)[1].lower() or "without suffix"
                counts[kind] += 1
                examples.setdefault(kind, join(folder, name))
        counts += self.unlisted + self.unread
        found = {kind: {"count": count, "example": examples.get(kind)} for kind, count in counts.most_common()}
        return {kind: {key: value for key, value in entry.items() if value} for kind, entry in found.items()}

    def existing_file(self, name: str) -> SourceFile:
        """Return a file that is known to exist."""
        file = self.file(name)
        assert file is not None
        return file

    def find(self, *names: str) -> SourceFile | None:
        """Return the file with one of these names that is nested least, or None."""
        for name in names:
            for folder in sorted(self.folders, key=depth):
                if name in self.folders[folder]:
                    return self.file(join(folder, name))
        return None

    def folder(self, *names: str) -> str | None:
        """Return the folder whose path ends in one of these names, the first name that exists, nested least."""
        found = (
            folder for name in names for folder in sorted(self.folders, key=depth) if f"/{folder}".endswith(f"/{name}")
        )
        return next(found, None)

    def below(self, name: str) -> list[str]:
        """Return the folder with this name that is nested least, and its subfolders, sorted; [] if it does not exist.

        It need not contain files itself.
        """
        tops = [folder.split("/") for folder in self.folders if name in folder.split("/")]
        top = min(("/".join(parts[: parts.index(name) + 1]) for parts in tops), key=depth, default=None)
        return sorted(folder for folder in self.folders if top and f"{folder}/".startswith(f"{top}/"))

    def images(self, folder: str | None, suffixes: tuple[str, ...] = IMAGE_SUFFIXES) -> dict[str, str]:
        """Return stem -> `folder/name` of the images directly in a folder, sorted by name; {} for None."""
        names = [] if folder is None else sorted(self.folders.get(folder, ()))
        return {name.rpartition(".")[0]: join(folder or "", name) for name in names if name.lower().endswith(suffixes)}

    def texts(self, folder: str | None) -> dict[str, str]:
        """Return stem -> `folder/name` of the text files directly in a folder; .txt precedes .caption."""
        return self.images(folder, (".caption",)) | self.images(folder, (".txt",))

    def lines(self, name: str) -> Iterator[bytes]:
        """Return the lines of a file, which may be large."""
        file = self.existing_file(name)
        return iter(file.content().splitlines()) if file.path is None else lines_of(file.path)


def depth(folder: str) -> tuple[int, str]:
    """Sort key of folders, those nested least first."""
    return (folder.count("/") + 1 if folder else 0, folder)


def join(folder: str, name: str) -> str:
    return f"{folder}/{name}" if folder else name


def open_source(path: Path, out: Path | None = None, *, follow_links: bool = False) -> Source:
    """List the files of a folder or zip archive without the folder `out`. `follow_links` also follows those that lead
    outside the folder.

    Raises:
        InputError: the source does not exist, or an archive is broken, has a password, or names files outside itself.
    """
    source = Source(path)
    if path.is_file() and zipfile.is_zipfile(path):
        add_archive(source, path, "")
        return source
    if path.is_file():
        return Source(path.parent, {"": {path.name: False}})
    if not path.is_dir():
        raise InputError(f"{path} does not exist: give the folder or archive with the images")
    for folder, names in walk(path, out, follow_links=follow_links, unlisted=source.unlisted):
        if names:
            source.folders[folder] = dict.fromkeys(names, False)
    paths = (join(folder, name) for folder, names in source.folders.items() for name in names)
    for name in sorted(path for path in paths if path.lower().endswith(".zip")):
        folder = name[: -len(".zip")]
        if not any(f"{known}/".startswith(f"{folder}/") for known in source.folders):
            source.existing_file(name)
            add_archive(source, path / name, folder)
    return source


def walk(
    source: Path, out: Path | None = None, *, follow_links: bool = False, unlisted: Counter[str] | None = None
) -> Iterator[tuple[str, list[str]]]:
    """Yield each folder of `source` ("" is itself) with its regular files, without hidden ones and `out`.

    Links that stay inside are always followed. `unlisted` counts what is left out, by kind.
    """
    root, unlisted = os.path.realpath(source), Counter() if unlisted is None else unlisted
    visited = {os.path.realpath(out)} - {root} if out is not None else set()
    waiting = [""]
    while waiting:
        folder = waiting.pop()
        real = os.path.realpath(source / folder)
        if real in visited:  # `out`, or a link to a folder that was visited
            continue
        visited.add(real)
        names, inner = [], []
        try:
            with os.scandir(source / folder) as entries:
                for entry in entries:
                    target = os.path.realpath(entry.path) if entry.is_symlink() else ""
                    if entry.name.startswith("."):
                        unlisted[HIDDEN] += 1
                    elif target and not follow_links and not f"{target}/".startswith(os.path.join(root, "")):
                        unlisted[OUTSIDE] += 1
                    elif entry.is_dir():
                        inner.append(join(folder, entry.name))
                    elif entry.is_file():
                        names.append(entry.name)
                    else:
                        unlisted[SPECIAL] += 1
        except OSError as error:
            raise InputError(f"{error.filename} cannot be read: {error.strerror or error}") from error
        waiting += sorted(inner, reverse=True)
        yield folder, names


def add_archive(source: Source, path: Path, place: str) -> None:
    """Add an archive's files as if it were unpacked to the folder `place`.

    A folder that contains everything is left out if it has the name of `place`, or if `place` is the root.
    """
    try:
        archive = zipfile.ZipFile(path)
    except (OSError, zipfile.BadZipFile) as error:
        raise InputError(f"{path} is not a readable zip archive ({error}): download it again") from error
    members = {}
    for info in archive.infolist():
        name = check_inside(info.filename, str(path))
        if info.is_dir():
            continue
        if posixpath.basename(name).startswith(".") or "__MACOSX" in name:
            source.unlisted[HIDDEN] += 1
        elif stat.S_IFMT(info.external_attr >> 16) in (0, stat.S_IFREG):
            members[name] = info
        else:
            source.unlisted[SPECIAL] += 1
    tops = {name.partition("/")[0] if "/" in name else "" for name in members}
    top = f"{tops.pop()}/" if len(tops) == 1 else ""
    for name, info in members.items():
        inner = name.removeprefix(top) if not place or top == f"{posixpath.basename(place)}/" else name
        folder, _, base = join(place, inner).rpartition("/")
        source.folders.setdefault(folder, {})[base] = False
        source.members[join(folder, base)] = archive, info


def check_inside(name: str, where: str) -> str:
    """Normalize a path. Raises `InputError` if it points outside its folder or archive."""
    clean = posixpath.normpath(name.replace("\\", "/"))
    if clean.startswith(("../", "/")) or clean == ".." or clean[1:2] == ":":
        raise InputError(f"{where} names {name!r}, which points outside the folder: correct or remove that entry")
    return clean
