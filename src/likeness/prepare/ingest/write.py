"""The one writer of ingested faces: every layout's faces become a prepared folder with one geometry.

Pictures that need no change are copied as they are, all others become PNG; masks become palette PNGs with exchanged
sides put right. A face's picture is written after its conditions, each split's metadata last, and `dataset.json` says
what was ingested and how: the same command goes on where it stopped, another one is refused.
"""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from likeness.conditions import CONDITIONS
from likeness.conditions.images import open_image, png_bytes
from likeness.data.ahead import read_ahead
from likeness.data.folder import METADATA, RECORD, column_of, condition_file, line_of
from likeness.files import write_whole, writing_whole
from likeness.prepare.alike import fingerprint, shared_pictures
from likeness.prepare.ingest.contents import CONTENTS, KEPT, Frame, framed, open_face
from likeness.prepare.ingest.face import (
    Face,
    Faces,
    File,
    Skipped,
    json_of,
    lines_of,
    name_of,
    parse_json,
    plain_name,
)
from likeness.prepare.ingest.layouts import rank
from likeness.prepare.ingest.recognise import LAYOUTS, UNKNOWN_TERMS, recognise
from likeness.prepare.ingest.splits import SPLITS, assign, usual_held_out
from likeness.prepare.ingest.tree import Tree, join, open_tree
from likeness.types import InputError

KIND = "likeness ingest"

SKIPPED = "skipped.jsonl"
"""Lists what was left out, with the reason."""

PARTS = {"a mask": column_of("mask"), "a sketch": column_of("sketch")}
PARTS |= {"keypoints": column_of("keypoints"), "captions": "text"}
"""What a face may have, in words -> its column."""

Progress = Callable[[int, int], None]


@dataclass
class Written:
    """What became of one face."""

    split: str
    row: dict[str, Any]
    skipped: list[Skipped] = field(default_factory=list)
    repaired: bool = False
    fingerprint: bytes = b""
    """What its picture is known again by."""
    words: str = ""
    """The file its captions came from, where they lie elsewhere."""


def ingest(
    source: Path,
    out: Path,
    *,
    layout: str = "auto",
    split: str = "auto",
    size: int | None = None,
    crop: bool = False,
    captions: Path | None = None,
    held_out: int | None = None,
    seed: int = 0,
    limit: int | None = None,
    progress: Progress | None = None,
    tell: Callable[[str], None] = lambda line: None,
) -> dict[str, Any]:
    """Bring the faces of `source` into the prepared folder `out`, a folder a split.

    Args:
        source: a folder or a zip archive.
        out: folder to write; run again to go on after an interruption. Where it lies in the source, it is left aside.
        layout: one of `LAYOUTS`, or `auto` to find out.
        split: one of `SPLITS`, or `auto` for the usual one of the layout.
        size: pixels a side of the pictures, 8 to 8192; None leaves them as they are. Conditions keep their size.
        crop: whether to take the middle of pictures that are not square; otherwise they are left out.
        captions: folder or archive with `<name>.txt`, a caption a line, for sources whose captions lie elsewhere.
        held_out: faces kept for measuring by the splits `person` (at least) and `random`; None is 1000, or a tenth of
            a smaller set.
        seed: of these splits.
        limit: faces to take at most, the first ones.
        progress: called as (faces done, faces in all).
        tell: called with each note for the user.

    Returns:
        Faces by split, `repaired` (masks whose sides were exchanged) where there were any, and `skipped`: what was
        left out -> reason.

    Raises:
        InputError: the source has no known layout or several, lacks what the layout or split needs, or nothing in it
            can be used; `out` holds something else, or cannot be written.
    """
    if size is not None and not 8 <= size <= 8192:
        raise InputError(f"a size of {size} is impossible: ask for 8 to 8192 pixels a side")
    if limit is not None and limit < 1:
        raise InputError(f"a limit of {limit} leaves no faces: ask for 1 or more")
    if layout not in ("auto", *LAYOUTS) or split not in ("auto", *SPLITS):
        raise InputError(f"there is no layout {layout} or no split {split}: see `likeness prepare ingest --help`")
    tree = open_tree(source, out)
    if layout == "auto":
        layout = recognise(tree)
        tell(f"{source} looks like {layout}: {LAYOUTS[layout].look}")

    def faces() -> Faces:
        return islice_faces(LAYOUTS[layout].faces(tree), limit)

    if split == "auto":
        split = LAYOUTS[layout].split
        if split == "random" and all(face.identity is not None for face in faces() if isinstance(face, Face)):
            split = "person"
    if held_out is None and (out / RECORD).is_file():  # as it was begun, though the source may have grown
        held_out = json_of(out / RECORD).get("held_out")
    if held_out is None:
        drawn = split in ("person", "random")
        held_out = usual_held_out(sum(isinstance(face, Face) for face in faces())) if drawn else 0
    words = caption_files(captions) if captions else {}
    record = {
        "kind": KIND,
        "layout": layout,
        "source": source.resolve().name,
        "size": size,
        "crop": crop,
        "limit": limit,
        "captions": captions.resolve().name if captions else None,
        "split": split,
        "split_is": SPLITS[split],
        **({"held_out": held_out, "seed": seed} if split in ("person", "random") else {}),
        **licence_of(tree, layout),
    }
    if is_complete(out, record):
        known = json_of(out / RECORD)["faces"]
        tell(f"{out} is ingested already, {sum(known.values())} faces: for new pictures choose another folder")
        left = [parse_json(line, SKIPPED) for line in lines_of(out / SKIPPED)] if (out / SKIPPED).is_file() else []
        return {**known, "skipped": {entry["name"]: entry["reason"] for entry in left}}

    splits = assign(split, (face for face in faces() if isinstance(face, Face)), tree, held_out, seed)
    if not splits:
        left = next((face for face in faces() if isinstance(face, Skipped)), None)
        first = f" ({left.name} was left out: {left.reason})" if left else ""
        raise InputError(f"{source} holds no faces in the layout {layout}{first}")
    tell(f"split {split}: {SPLITS[split]}")
    write_record(out, record)
    counts, skipped, used = write_faces(faces(), splits, out, Frame(size=size, crop=crop), words, progress)
    people, alike = counts.pop("shared people", 0), counts.pop("shared pictures", 0)
    has = ", ".join(f"{counts.pop(part, 0)} with {part}" for part in PARTS)
    names = sorted({name for name in splits if name is not None}, key=rank)
    written = {name: counts.pop(name) for name in names if counts[name]}
    if not written:
        (out / RECORD).unlink(missing_ok=True)  # begun with nothing: the next try may be another
        name, reason = next(iter(skipped.items()), ("", ""))
        raise InputError(f"none of the {len(splits)} faces of {source} can be used; {name}: {reason}")
    tell(f"{sum(written.values())} faces: {has}")
    if unused := sorted({name_of(file) for file in words.values()} - used):
        tell(f"files of captions that were not used: {len(unused)}, such as {unused[0]}")
    if people:
        tell(f"persons in more than one split: {people}; --split person keeps them apart")
    if alike:
        tell(
            f"pictures of train that are in another split, too, or nearly: {alike}; `likeness prepare check` lists them"
        )
    if skipped or (out / SKIPPED).is_file():
        lines = ({"name": name, "reason": reason} for name, reason in skipped.items())
        write_whole(out / SKIPPED, b"".join(line_of(left) for left in lines))
    write_record(out, {**record, "faces": written, "skipped": len(skipped)})
    return {**written, **counts, "skipped": skipped}


def islice_faces(faces: Faces, limit: int | None) -> Faces:
    """The first `limit` faces, and what is left out before them."""
    taken = 0
    for face in faces:
        taken += isinstance(face, Face)
        yield face
        if limit is not None and taken >= limit:
            return


def licence_of(tree: Tree, layout: str) -> dict[str, str]:
    """What the publishers of a layout allow, or what a folder of ours says that was ingested before."""
    found = tree.find(RECORD)
    if LAYOUTS[layout].licence == UNKNOWN_TERMS and found:
        known = json_of(found)
        if isinstance(known, dict) and isinstance(known.get("licence"), str):
            return {"licence": known["licence"], "licence_source": str(known.get("licence_source", ""))}
    return {"licence": LAYOUTS[layout].licence, "licence_source": LAYOUTS[layout].source}


def is_complete(out: Path, record: dict[str, Any]) -> bool:
    """Whether all that is asked for is in `out` already.

    Raises:
        InputError: it is for something else.
    """
    path = out / RECORD
    try:
        if path.is_file():
            found = json_of(path)
            found = found if isinstance(found, dict) else {}
            other = [key for key, value in record.items() if found.get(key) != value]
            if other:
                told = ", ".join(f"{key} {found.get(key)!r}, not {record[key]!r}" for key in other[:3])
                raise InputError(f"{out} was begun with {told}: choose another folder, or remove it")
            return "faces" in found and all((out / split / METADATA).is_file() for split in found["faces"])
        if out.exists() and any(not entry.name.startswith(f".{RECORD}.") for entry in out.iterdir()):
            raise InputError(
                f"{out} is not empty and was not begun by `likeness prepare ingest`: choose another folder"
            )
    except OSError as error:
        raise InputError(f"cannot write {out}: {error.strerror or error}") from error
    return False


def write_record(out: Path, record: dict[str, Any]) -> None:
    write_whole(out / RECORD, json.dumps(record, indent=2, ensure_ascii=False) + "\n")


def caption_files(source: Path) -> dict[str, File]:
    """Name of a face -> its text file: `sub_a` and `a` for sub/a.txt, unless another file is called so, too."""
    tree = open_tree(source)
    whole: dict[str, File] = {}
    ends: dict[str, list[File]] = {}
    for folder in tree.folders:
        for stem, name in tree.pictures(folder, (".txt",)).items():
            file, parts = tree.file(name), join(folder, stem).split("/")
            assert file is not None
            whole["_".join(parts)] = file
            for start in range(1, len(parts)):
                ends.setdefault("_".join(parts[start:]), []).append(file)
    if not whole:
        raise InputError(f"{source} holds no text files: captions are <name>.txt, one a line")
    return {name: files[0] for name, files in ends.items() if len(files) == 1} | whole


def write_faces(
    faces: Faces,
    splits: list[str | None],
    out: Path,
    frame: Frame,
    words: dict[str, File],
    progress: Progress | None,
) -> tuple[Counter[str], dict[str, str], set[str]]:
    """Write all faces and, at the end, each split's metadata; how many of each, what was left out, files of `words`
    that were used.
    """
    counts: Counter[str] = Counter()
    skipped: dict[str, str] = {}
    people: dict[str, str] = {}
    shared: set[str] = set()
    used: set[str] = set()
    prints, held_out = bytearray(), bytearray()
    threads = os.cpu_count() or 1
    done = 0
    with ExitStack() as opened:
        rows: dict[str, BinaryIO] = {}
        work = with_names(faces, splits)
        for written in read_ahead(partial(write_face, out, frame, words), work, depth=4 * threads, threads=threads):
            for left in written.skipped if isinstance(written, Written) else [written]:
                skipped[left.name] = left.reason
            if isinstance(written, Written):
                if written.split not in rows:
                    rows[written.split] = opened.enter_context(writing_whole(out / written.split / METADATA))
                rows[written.split].write(line_of(written.row))
                counts[written.split] += 1
                counts.update(part for part, column in PARTS.items() if column in written.row)
                used.add(written.words)
                counts["repaired"] += written.repaired
                prints += written.fingerprint
                held_out.append(written.split != "train")
                person = written.row.get("identity")
                if person is not None and people.setdefault(person, written.split) != written.split:
                    shared.add(person)
            done += 1
            if progress is not None:
                progress(min(done, len(splits)), len(splits))
    if not counts["repaired"]:
        del counts["repaired"]
    counts["shared people"] = len(shared)
    counts["shared pictures"] = shared_pictures(prints, np.frombuffer(held_out, np.bool_))
    return counts, skipped, used


def with_names(
    faces: Iterable[Face | Skipped], splits: Iterable[str | None]
) -> Iterator[tuple[Face | Skipped, str | None, str]]:
    """Each face with its split and a file name that no other of the split has, be its letters large or small."""
    taken: set[tuple[str | None, str]] = set()
    waiting = iter(splits)
    for face in faces:
        if isinstance(face, Skipped):
            yield face, None, ""
            continue
        split, plain = next(waiting), plain_name(face.name)
        name, again = plain, 2
        while (split, name.casefold()) in taken:
            name, again = f"{plain}-{again}", again + 1
        taken.add((split, name.casefold()))
        yield face, split, name


def write_face(
    out: Path, frame: Frame, words: dict[str, File], item: tuple[Face | Skipped, str | None, str]
) -> Written | Skipped:
    """Write the files of a face that are not there yet, its picture last.

    Raises:
        InputError: a file cannot be written; what cannot be read is returned as `Skipped`.
    """
    face, split, name = item
    if isinstance(face, Skipped):
        return face
    if split is None:
        return Skipped(name, "the split lists it nowhere")
    written, folder, where = Written(split, {}), out / split, f"{split}/{name}"
    stems = [folder / "images" / f"{name}{suffix}" for suffix in KEPT.values()]
    picture = next((path for path in stems if path.is_file()), None)
    targets = {key: folder / condition_file(key, name) for key in CONDITIONS if getattr(face, key) is not None}
    if picture is None or not all(target.is_file() for target in targets.values()):
        try:
            image, box, content, suffix = open_face(face, frame)
        except InputError as error:
            return Skipped(where, str(error))
        for key, target in targets.items():
            if target.is_file():
                continue
            try:
                made, repaired = CONTENTS[key](getattr(face, key), box, image.size)
            except InputError as error:
                written.skipped.append(Skipped(f"{column_of(key)} of {where}", str(error)))
                continue
            written.repaired |= repaired
            write_whole(target, made)
        if picture is None:
            picture = folder / "images" / f"{name}{suffix or '.png'}"
            image = framed(image, box, frame.size)
            write_whole(picture, content if suffix else png_bytes(image))
            written.fingerprint = fingerprint(image)
    written.fingerprint = written.fingerprint or fingerprint(open_image(picture))
    row = {"file_name": f"images/{picture.name}"}
    row |= {column_of(key): condition_file(key, name) for key, target in targets.items() if target.is_file()}
    try:
        elsewhere = words.get(f"{face.split}_{face.name}") or words.get(face.name)
        written.words = name_of(elsewhere) if elsewhere else ""
        captions = lines_of(elsewhere) if elsewhere else face.captions()
        captions = [caption.strip() for caption in captions if caption.strip()]
    except InputError as error:
        captions = []
        written.skipped.append(Skipped(f"captions of {where}", str(error)))
    own = {"text": captions or None, "attributes": face.attributes, "identity": face.identity}
    written.row = {**row, **{key: value for key, value in own.items() if value is not None}, **face.more}
    return written
