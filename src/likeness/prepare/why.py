"""Why a file would be encoded again: the same keys as those of `prepare.encode`, told in words."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path

import numpy as np

from likeness.data.folder import METADATA, each_row, root_of
from likeness.data.store import IMAGE, read_line, read_manifest, read_part
from likeness.prepare.pool import Table
from likeness.prepare.sources import FILES, Hashes, Plan
from likeness.types import InputError


def why(folder: Path, out: Path, file: Path) -> list[str]:
    """One sentence for every use of a picture or condition file in a prepared folder.

    Args:
        folder: the prepared folder.
        out: its store.
        file: a file that the folder's metadata names.

    Raises:
        InputError: there is no store, or no row names the file.
    """
    manifest = read_manifest(out)
    plan = Plan(**{field.name: manifest[field.name] for field in fields(Plan)})
    root, path = root_of(folder), file.resolve()
    uses = [
        (number, column, row)
        for number, row in enumerate(each_row(root), start=1)
        for column, name in enumerate(FILES)
        if row.get(name) == path
    ]
    if not uses:
        raise InputError(f"no row of {root / METADATA} names {file}")
    rows = [row for _, _, row in uses]
    _, sources, _ = Hashes(out).survey(root, rows)
    keys = plan.keys(sources)  # [V, U, C, 16]
    known = Table(out, "latents").places(keys) >= 0
    before = sources_before(out, manifest, {row["file_name"].relative_to(root).as_posix() for row in rows})
    told = []
    for use, (number, column, row) in enumerate(uses):
        kind = FILES[column].removesuffix("file_name").rstrip("_") or IMAGE
        face = row["file_name"].relative_to(root).as_posix()
        left = int((~known[:, use, list(plan.columns).index(kind)]).sum())
        past = before.get(face)
        if not left:
            reason = "nothing to encode: its content is in the store"
        elif past is None:
            reason = "the store has no face of that name, nor this content under another"
        elif not past[column].any():
            reason = f"the face had no {kind} when it was encoded"
        elif (past[column] != sources[use, column]).any():
            reason = "its content is not what was encoded"
        else:
            reason = "its content is what was encoded, but files of the store are missing or damaged"
        told.append(f"row {number}, {kind} of {face}: " + (f"{left} to encode: " if left else "") + reason)
    return told


def sources_before(out: Path, manifest: dict, names: set[str]) -> dict[str, np.ndarray]:
    """Hashes of the files of some faces when the store was finished, name -> uint8 [F, 16]."""
    found = {}
    for file, count in manifest["rows"]:
        part = read_part(out / file)
        for number in range(count):
            name, _ = read_line(part["lines"], part["ends"], number)
            if name in names:
                found[name] = part["sources"][number].numpy()
    return found
