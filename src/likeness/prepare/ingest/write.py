"""Write ingested faces as a prepared folder.

Unchanged images are copied, all others become PNG; masks become palette PNGs with swapped sides fixed. The
image of a face is written after its conditions, the metadata of each split last, and `dataset.json` records what was
ingested: the same command resumes, another one is rejected.
"""

from __future__ import annotations

import os
from collections import Counter, deque
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

from likeness.conditions import CONDITIONS
from likeness.conditions.images import png_bytes
from likeness.data.ahead import read_ahead
from likeness.data.folder import METADATA, RECORD, changing, column_of, line_of, open_record, write_record
from likeness.files import write_whole, writing_whole
from likeness.prepare.ingest.convert import COPIED, convert_condition, crop_and_resize, open_face
from likeness.prepare.ingest.faces import SPLIT_ORDER, Entries, Skipped, SourceFace, with_names
from likeness.prepare.ingest.formats import FORMATS, UNKNOWN_TERMS, detect_format
from likeness.prepare.ingest.source import Source, SourceFile, join, open_source, parse_json
from likeness.prepare.ingest.splits import SPLITS, assign_splits, default_held_out
from likeness.types import InputError

SKIPPED = "skipped.jsonl"
"""File that lists everything that was skipped, with the reason."""

PARTS = {
    "a mask": column_of("mask"),
    "a sketch": column_of("sketch"),
    "keypoints": column_of("keypoints"),
    "captions": "text",
}
"""What a face may have -> its column."""

Report = Callable[[str], None]


@dataclass
class Written:
    """Result of one face."""

    split: str
    row: dict[str, Any] | None = None
    """None if the face was skipped."""
    skipped: list[Skipped] = field(default_factory=list)
    repaired: bool = False
    captions_file: str = ""
    """File of its captions, if they are stored separately."""


@dataclass
class Totals:
    """Results of all faces."""

    splits: Counter[str] = field(default_factory=Counter)
    parts: Counter[str] = field(default_factory=Counter)
    skipped: dict[str, str] = field(default_factory=dict)
    repaired: int = 0
    captions_files: set[str] = field(default_factory=set)

    def add(self, written: Written) -> None:
        self.skipped |= {skipped.name: skipped.reason for skipped in written.skipped}
        if written.row is not None:
            self.splits[written.split] += 1
            self.parts.update(part for part, column in PARTS.items() if column in written.row)
            self.repaired += written.repaired
            self.captions_files.add(written.captions_file)


def ingest(
    source: Path,
    out: Path,
    *,
    format: str = "auto",
    split: str = "auto",
    size: int | None = None,
    crop: bool = False,
    captions: Path | None = None,
    held_out: int | None = None,
    seed: int = 0,
    limit: int | None = None,
    follow_links: bool = False,
    progress: Callable[[int, int], None] = lambda done, total: None,
    report: Report = lambda line: None,
) -> dict[str, Any]:
    """Import the faces of `source` into the prepared folder `out`, with a subfolder per split.

    Args:
        source: a folder or a zip archive.
        out: folder to write. Run again to resume. If it is inside the source, it is ignored there.
        format: one of `FORMATS`, or `auto` to detect it.
        split: one of `SPLITS`, or `auto` for the default of the format, or with `held_out` for a random split.
        size: side length of the images in pixels, 8 to 8192; None keeps it. Conditions keep their size.
        crop: whether to crop the centre of images that are not square; otherwise they are skipped.
        captions: folder or archive with `<name>.txt`, one caption per line, if captions are stored separately.
        held_out: faces held out by the splits `person` (at least) and `random`; default 1000, or a tenth of a smaller
            set.
        seed: random seed of these splits.
        limit: number of faces to import, the first ones.
        follow_links: whether to follow links that lead outside the source.
        progress: called as (faces done, total).
        report: called with each message for the user.

    Returns:
        Faces by split, `repaired` (masks whose sides were swapped) if not 0, and `skipped`: name -> reason.

    Raises:
        InputError: the source matches no or several formats, lacks what the format or split needs, or has no usable
            face; `out` contains something else or cannot be written. TryAgain: another command is writing to it.
    """
    if size is not None and not 8 <= size <= 8192:
        raise InputError(f"size must be between 8 and 8192 pixels, not {size}")
    if limit is not None and limit < 1:
        raise InputError(f"limit must be at least 1, not {limit}")
    for kind, name, known in (("dataset format", format, FORMATS), ("split", split, SPLITS)):
        if name not in ("auto", *known):
            raise InputError(f"unknown {kind} {name!r}. Available: {', '.join(known)}")
    opened = open_source(source, out, follow_links=follow_links)
    if format == "auto":
        format = detect_format(opened)
        report(f"{source} is in the format {format}: {FORMATS[format].files}")

    def entries() -> Entries:
        return first_faces(FORMATS[format].read(opened), limit)

    def faces() -> Iterator[SourceFace]:
        return (face for face in entries() if isinstance(face, SourceFace))

    if split == "auto":
        split = FORMATS[format].split
        if held_out is not None and split != "person":
            split = "random"
        if split == "random" and all(face.identity is not None for face in faces()):
            split = "person"
    randomly = split in ("person", "random")
    if held_out is not None and not randomly:
        raise InputError(
            f"held_out is {held_out}, but the split {split} is fixed: use --split random or omit --held-out"
        )
    if held_out is None and (out / RECORD).is_file():  # keep the value of the first run
        held_out = SourceFile(RECORD, (out / RECORD).read_bytes).json().get("held_out")
    if held_out is None and randomly:
        held_out = default_held_out(sum(1 for _ in faces()))
    texts = caption_files(captions, follow_links) if captions else {}
    arguments = {
        "kind": "likeness ingest",
        "layout": format,
        "source": source.resolve().name,
        "size": size,
        "crop": crop,
        "limit": limit,
        "captions": captions.resolve().name if captions else None,
        "split": split,
        **({"held_out": held_out, "seed": seed} if randomly else {}),
    }
    known = open_record(out, arguments, "ingest").get("faces")
    if known and all((out / split / METADATA).is_file() for split in known):
        report(f"{out} is complete, {sum(known.values())} faces: for new images choose another folder")
        lines = (out / SKIPPED).read_text(encoding="utf-8").splitlines() if (out / SKIPPED).is_file() else []
        skipped = [parse_json(line, SKIPPED) for line in lines]
        return {**known, "skipped": {entry["name"]: entry["reason"] for entry in skipped}}

    splits = assign_splits(split, faces(), opened, held_out or 0, seed)
    if not splits:
        first = next((entry for entry in entries() if isinstance(entry, Skipped)), None)
        reason = f" ({first.name} was skipped: {first.reason})" if first else ""
        raise InputError(f"{source} has no faces in the format {format}{reason}")
    report(f"split {split}: {SPLITS[split]}")
    record = {**arguments, "split_is": SPLITS[split], **licence_of(opened, format)}
    with ExitStack() as locks:
        locks.enter_context(changing(out, ["."]))
        open_record(out, arguments, "ingest")  # again, now that no other process writes it
        write_record(out, record)  # first, so that a run that is killed from here on can be resumed
        locks.enter_context(changing(out, sorted({name for name in splits if name})))
        totals = write_faces(entries(), splits, out, size, crop, texts, progress)
        written = {name: totals.splits[name] for name in SPLIT_ORDER if totals.splits[name]}
        if not written:
            (out / RECORD).unlink(missing_ok=True)  # allow other arguments
            name, reason = next(iter(totals.skipped.items()), ("", ""))
            raise InputError(f"none of the {len(splits)} faces of {source} can be used; {name}: {reason}")
        report_totals(totals, texts, report)
        if totals.skipped or (out / SKIPPED).is_file():
            lines = ({"name": name, "reason": reason} for name, reason in totals.skipped.items())
            write_whole(out / SKIPPED, b"".join(line_of(line) for line in lines))
        if limit is not None:  # what the format would read is not unused
            deque(FORMATS[format].read(opened), maxlen=0)
        unread = report_unused(opened, report)
        write_record(out, {**record, "faces": written, "skipped": len(totals.skipped), "not_read": unread})
    repaired = {"repaired": totals.repaired} if totals.repaired else {}
    return {**written, **repaired, "skipped": totals.skipped}


def report_totals(totals: Totals, texts: dict[str, SourceFile], report: Report) -> None:
    """Report what the faces have, and unused caption files."""
    parts = ", ".join(f"{totals.parts[part]} with {part}" for part in PARTS)
    report(f"{totals.splits.total()} faces: {parts}")
    if unused := sorted({file.name for file in texts.values()} - totals.captions_files):
        report(f"unused caption files: {len(unused)}, such as {unused[0]}")


def report_unused(source: Source, report: Report) -> dict[str, dict[str, Any]]:
    """Report in one line, and return, what was not read of a source by its kind (`Source.unused`)."""
    unused = source.unused()
    if unused:
        kinds = (
            f"{entry['count']} {kind}" + (f" (such as {entry['example']})" if "example" in entry else "")
            for kind, entry in unused.items()
        )
        report(f"not read: {', '.join(kinds)}")
    return unused


def first_faces(entries: Entries, limit: int | None) -> Entries:
    """Yield the first `limit` faces, and everything skipped before them."""
    taken = 0
    for entry in entries:
        taken += isinstance(entry, SourceFace)
        yield entry
        if taken == limit:
            return


def licence_of(source: Source, format: str) -> dict[str, str]:
    """Return the terms of a format's publishers, or those that a prepared folder records."""
    found = source.find(RECORD)
    if FORMATS[format].licence == UNKNOWN_TERMS and found:
        known = found.json()
        if isinstance(known, dict) and isinstance(known.get("licence"), str):
            return {"licence": known["licence"], "licence_source": str(known.get("licence_source", ""))}
    return {"licence": FORMATS[format].licence, "licence_source": FORMATS[format].licence_source}


def caption_files(path: Path, follow_links: bool) -> dict[str, SourceFile]:
    """Return face name -> text file: `sub_a` and, unless ambiguous, `a` for sub/a.txt."""
    source = open_source(path, follow_links=follow_links)
    full: dict[str, SourceFile] = {}
    short: dict[str, list[SourceFile]] = {}
    for folder in source.folders:
        for stem, name in source.texts(folder).items():
            file, parts = source.existing_file(name), join(folder, stem).split("/")
            full["_".join(parts)] = file
            for start in range(1, len(parts)):
                short.setdefault("_".join(parts[start:]), []).append(file)
    if not full:
        raise InputError(f"{path} has no text files: captions are <name>.txt, one per line")
    return {name: files[0] for name, files in short.items() if len(files) == 1} | full


def write_faces(
    entries: Entries,
    splits: list[str | None],
    out: Path,
    size: int | None,
    crop: bool,
    texts: dict[str, SourceFile],
    progress: Callable[[int, int], None],
) -> Totals:
    """Write all faces and, at the end, the metadata of each split."""
    totals = Totals()
    threads = os.cpu_count() or 1
    with ExitStack() as stack:
        metadata: dict[str, BinaryIO] = {}
        results = read_ahead(
            lambda entry: write_entry(*entry, out, size, crop, texts),
            with_names(entries, splits),
            depth=4 * threads,
            threads=threads,
        )
        for done, written in enumerate(results, start=1):
            totals.add(written)
            if written.row is not None:
                if written.split not in metadata:
                    file = stack.enter_context(writing_whole(out / written.split / METADATA))
                    metadata[written.split] = file
                metadata[written.split].write(line_of(written.row))
            progress(min(done, len(splits)), len(splits))
    return totals


def write_entry(
    face: SourceFace | Skipped,
    split: str | None,
    name: str,
    out: Path,
    size: int | None,
    crop: bool,
    texts: dict[str, SourceFile],
) -> Written:
    """Write the missing files of a face, its image last. Unreadable files are skipped.

    Raises:
        InputError: a file cannot be written.
    """
    if isinstance(face, Skipped):
        return Written("", skipped=[face])
    if split is None:
        return Written("", skipped=[Skipped(name, "the split does not list it")])
    written, folder, where = Written(split), out / split, f"{split}/{name}"
    paths = [folder / "images" / f"{name}{suffix}" for suffix in COPIED.values()]
    path = next((path for path in paths if path.is_file()), None)
    files = {key: CONDITIONS[key].file(name) for key in CONDITIONS if key in face.conditions}
    missing = [key for key, file in files.items() if not (folder / file).is_file()]
    if path is None or missing:
        try:
            image, box, content, suffix = open_face(face, size, crop)
        except InputError as error:
            return Written(split, skipped=[Skipped(where, str(error))])
        for key in missing:
            try:
                converted, repaired = convert_condition(key, face.conditions[key], box, image.size)
            except InputError as error:
                written.skipped.append(Skipped(f"{column_of(key)} of {where}", str(error)))
                del files[key]
                continue
            written.repaired |= repaired
            write_whole(folder / files[key], converted)
        if path is None:
            path = folder / "images" / f"{name}{suffix or '.png'}"
            write_whole(path, content if suffix else png_bytes(crop_and_resize(image, box, size)))
    captions: list[str] = []
    try:
        file = texts.get(f"{face.split}_{face.name}") or texts.get(face.name)
        written.captions_file = file.name if file else ""
        captions = [caption.strip() for caption in (file.lines() if file else face.captions()) if caption.strip()]
    except InputError as error:
        written.skipped.append(Skipped(f"captions of {where}", str(error)))
    own = {"text": captions or None, "attributes": face.attributes, "identity": face.identity}
    row = {"file_name": f"images/{path.name}"} | {column_of(key): file for key, file in files.items()}
    written.row = {**row, **{key: value for key, value in own.items() if value is not None}, **face.more}
    return written
