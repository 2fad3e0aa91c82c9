"""Write ingested faces as a prepared folder.

Unchanged images are copied, all others become PNG; masks become palette PNGs with swapped sides fixed. The
image of a face is written after its conditions, the metadata of each split last, and `dataset.json` records what was
ingested: the same command resumes, another one is rejected.
"""

from __future__ import annotations

import os
from collections import Counter, defaultdict, deque
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any, BinaryIO

from likeness.conditions import CONDITIONS
from likeness.conditions.images import png_bytes
from likeness.data.ahead import read_ahead
from likeness.data.folder import METADATA, RECORD, changing, column_of, line_of, lines_of, open_record, write_record
from likeness.files import read_json, write_whole, writing_whole
from likeness.prepare.ingest.convert import COPIED, convert_condition, crop_and_resize, open_face
from likeness.prepare.ingest.faces import AHEAD, SPLIT_ORDER, Entries, Skipped, SourceFace, split_named, unique_name
from likeness.prepare.ingest.formats import FORMATS, UNKNOWN_TERMS, detect_format
from likeness.prepare.ingest.source import Source, join, open_source, parse_json
from likeness.prepare.ingest.splits import SPLITS, check_minimum, default_held_out, named_split, random_split
from likeness.types import InputError, Progress

SKIPPED = "skipped.jsonl"
"""File that lists everything that was skipped, with the reason."""

PARTS = {
    "a mask": "mask_file_name",
    "a sketch": "sketch_file_name",
    "keypoints": "keypoints_file_name",
    "captions": "text",
}
"""What a face may have -> its column."""

Report = Callable[[str], None]


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
    progress: Progress = lambda done, total: None,
    report: Report = lambda line: None,
) -> dict[str, Any]:
    """Import the faces of `source` into the prepared folder `out`, with a subfolder per split.

    The arguments are the options of `likeness prepare ingest`; `report` is called with each message for the user. Run
    it again to resume. An `out` inside the source is ignored there.

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
    check_minimum(held_out=held_out, seed=seed)
    for kind, name, known in (("dataset format", format, FORMATS), ("split", split, SPLITS)):
        if name not in ("auto", *known):
            raise InputError(f"unknown {kind} {name!r}. Available: {', '.join(known)}")
    opened = open_source(source, out, follow_links=follow_links)
    if format == "auto":
        format = detect_format(opened)
        report(f"{source} is in the format {format}: {FORMATS[format].files}")

    texts = open_source(captions, follow_links=follow_links) if captions else None
    files = caption_files(texts) if texts else {}

    def entries() -> Entries:
        taken = 0
        for entry in FORMATS[format].read(opened):
            if isinstance(entry, SourceFace):
                taken += 1
                path = files.get(f"{entry.split}/{entry.name}") or files.get(entry.name)
                entry = replace(entry, captions=texts.existing_file(path).lines) if texts and path else entry
            yield entry
            if taken == limit:
                return

    identities = [entry.identity for entry in entries() if isinstance(entry, SourceFace)]
    if split == "auto":
        split = FORMATS[format].split
        if held_out is not None and split != "person":
            split = "random"
        if split == "random" and None not in identities:
            split = "person"
    randomly = split in ("person", "random")
    if held_out is not None and not randomly:
        fixed = f"held_out is {held_out}, but the split {split} is fixed"
        raise InputError(f"{fixed}: use --split random or omit --held-out")
    if held_out is None and (out / RECORD).is_file():  # keep the value of the first run
        held_out = read_json(out / RECORD).get("held_out")
    if held_out is None and randomly:
        held_out = default_held_out(len(identities))
    arguments = {
        "kind": "likeness ingest",
        "format": format,
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
        lines = lines_of(out / SKIPPED) if (out / SKIPPED).is_file() else ()
        skipped = [parse_json(line, SKIPPED) for line in lines if line.strip()]
        return {**known, "skipped": {entry["name"]: entry["reason"] for entry in skipped}}

    if not identities:
        first = next((entry for entry in entries() if isinstance(entry, Skipped)), None)
        reason = f" ({first.name} was skipped: {first.reason})" if first else f", such as {FORMATS[format].files}"
        raise InputError(f"{source} has no faces in the format {format}{reason}")
    if randomly:
        splits = random_split(split, identities, held_out or 0, seed)
    else:
        splits = named_split(split, (entry for entry in entries() if isinstance(entry, SourceFace)), opened)
    report(f"split {split}: {SPLITS[split]}")
    record = {**arguments, "split_is": SPLITS[split], **license_of(opened, format)}
    with ExitStack() as stack:
        stack.enter_context(changing(out, ["."]))
        open_record(out, arguments, "ingest")  # again, now that no other process writes it
        write_record(out, record)  # first, so that a run that is killed from here on can be resumed
        stack.enter_context(changing(out, sorted({name for name in splits if name})))
        faces, parts, skipped, repaired = write_faces(entries(), splits, out, size, crop, progress)
        written = {name: faces[name] for name in SPLIT_ORDER if faces[name]}
        if not written:
            (out / RECORD).unlink(missing_ok=True)  # allow other arguments
            name, reason = next(iter(skipped.items()), ("", ""))
            raise InputError(f"none of the {len(splits)} faces of {source} can be used; {name}: {reason}")
        report(f"{faces.total()} faces: {', '.join(f'{parts[part]} with {part}' for part in PARTS)}")
        used = texts.folders.items() if texts else ()
        unread = [join(folder, name) for folder, names in used for name, was_read in names.items() if not was_read]
        if unused := sorted(name for name in unread if name.lower().endswith((".txt", ".caption"))):
            report(f"unused caption files: {len(unused)}, such as {unused[0]}")
        if skipped or (out / SKIPPED).is_file():
            lines = (line_of({"name": name, "reason": reason}) for name, reason in skipped.items())
            write_whole(out / SKIPPED, b"".join(lines))
        if limit is not None:  # what the format would read is not unused
            deque(FORMATS[format].read(opened), maxlen=0)
        not_read = opened.unused()
        if not_read:
            kinds = (
                f"{entry['count']} {kind}" + (f" (such as {entry['example']})" if "example" in entry else "")
                for kind, entry in not_read.items()
            )
            report(f"not read: {', '.join(kinds)}")
        write_record(out, {**record, "faces": written, "skipped": len(skipped), "not_read": not_read})
    return {**written, **({"repaired": repaired} if repaired else {}), "skipped": skipped}


def license_of(source: Source, format: str) -> dict[str, str]:
    """Return the terms of a format's publishers, or those that a prepared folder records."""
    found = source.find(RECORD)
    if FORMATS[format].license == UNKNOWN_TERMS and found:
        known = found.json()
        if isinstance(known, dict) and isinstance(known.get("license"), str):
            return {"license": known["license"], "license_source": str(known.get("license_source", ""))}
    return {"license": FORMATS[format].license, "license_source": FORMATS[format].license_source}


def caption_files(source: Source) -> dict[str, str]:
    """Return face name -> text file: `sub/a` and, unless ambiguous, `a` for sub/a.txt."""
    full: dict[str, str] = {}
    short: dict[str, list[str]] = {}
    for folder in source.folders:
        for stem, path in source.texts(folder).items():
            parts = join(folder, stem).split("/")
            full["/".join(parts)] = path
            if len(parts) > 1 and (split := split_named(parts[0])):  # faces have our name of the split
                full.setdefault("/".join((split, *parts[1:])), path)
            for start in range(1, len(parts)):
                short.setdefault("/".join(parts[start:]), []).append(path)
    if not full:
        raise InputError(f"{source.root} has no text files: captions are <name>.txt, one per line")
    return {name: paths[0] for name, paths in short.items() if len(paths) == 1} | full


def write_faces(
    entries: Entries, splits: list[str | None], out: Path, size: int | None, crop: bool, progress: Progress
) -> tuple[Counter[str], Counter[str], dict[str, str], int]:
    """Write all faces and, at the end, the metadata of each split.

    Returns:
        The number of faces by split; by what they have (`PARTS`); what was skipped, with the reason; and the number of
        masks whose sides were swapped.
    """
    faces, parts, repaired, threads = Counter[str](), Counter[str](), 0, os.cpu_count() or 1
    skipped: dict[str, str] = {}
    metadata: dict[str, BinaryIO] = {}
    split_of, taken = iter(splits), defaultdict[str | None, dict[str, int]](dict)

    def assigned() -> Iterator[tuple[SourceFace | Skipped, str]]:
        for face in entries:
            if isinstance(face, SourceFace):
                face = replace(face, split=next(split_of))
                yield face, unique_name(face.name, taken[face.split])
            else:
                yield face, face.name

    with ExitStack() as stack:
        results = read_ahead(
            lambda named: write_entry(*named, out, size, crop), assigned(), depth=AHEAD, threads=threads
        )
        for done, (split, row, lost, swapped) in enumerate(results, start=1):
            skipped |= lost
            if split and row:
                if split not in metadata:
                    metadata[split] = stack.enter_context(writing_whole(out / split / METADATA))
                metadata[split].write(line_of(row))
                faces[split] += 1
                parts.update(part for part, column in PARTS.items() if column in row)
                repaired += swapped
            progress(min(done, len(splits)), len(splits))
    return faces, parts, skipped, repaired


def write_entry(
    face: SourceFace | Skipped, name: str, out: Path, size: int | None, crop: bool
) -> tuple[str | None, dict[str, Any] | None, dict[str, str], bool]:
    """Write the missing files of a face, its image last. Unreadable files are skipped.

    Returns:
        The split, the row (None if the face is skipped), what was skipped with the reason, and whether the sides of the
        mask were swapped.
    """
    if isinstance(face, Skipped):
        return None, None, {name: face.reason}, False
    if (split := face.split) is None:
        return None, None, {name: "the split does not list it"}, False
    folder, where, skipped, swapped = out / split, f"{split}/{name}", {}, False
    paths = [folder / "images" / f"{name}{suffix}" for suffix in COPIED.values()]
    path = next((path for path in paths if path.is_file()), None)
    files = {key: CONDITIONS[key].file(name) for key in CONDITIONS if key in face.conditions}
    missing = [key for key, file in files.items() if not (folder / file).is_file()]
    if path is None or missing:
        try:
            image, box, content, suffix = open_face(face, size, crop)
        except InputError as error:
            return split, None, {where: str(error)}, False
        for key in missing:
            try:
                converted, swapped_now = convert_condition(key, face.conditions[key], box, image.size)
            except InputError as error:
                skipped[f"{column_of(key)} of {where}"] = str(error)
                del files[key]
                continue
            swapped |= swapped_now
            write_whole(folder / files[key], converted)
        if path is None:
            path = folder / "images" / f"{name}{suffix or '.png'}"
            write_whole(path, content if suffix else png_bytes(crop_and_resize(image, box, size)))
    captions: list[str] = []
    try:
        captions = [caption.strip() for caption in face.captions() if caption.strip()]
    except InputError as error:
        skipped[f"captions of {where}"] = str(error)
    own = {"text": captions or None, "attributes": face.attributes, "identity": face.identity}
    row = {"file_name": f"images/{path.name}"} | {column_of(key): file for key, file in files.items()}
    row |= {key: value for key, value in own.items() if value is not None}
    return split, {**row, **face.more}, skipped, swapped
