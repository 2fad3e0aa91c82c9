"""Commands that make training data: `likeness prepare ...`."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Literal

from likeness.cli.terminal import PathArgument, progress_bar, quiet_libraries, tell, tell_counts


def synthetic(out: PathArgument, *, count: int = 1000, size: int = 128, seed: int = 0) -> None:
    """Draw licence-free faces with masks, sketches, keypoints, attributes and captions.

    Args:
        out: Folder to write; run again to go on after an interruption.
        count: How many faces.
        size: Pixels a side.
        seed: Seed; the same seed draws the same faces.
    """
    from likeness.prepare.synthetic import write_synthetic

    with progress_bar("Drawing") as advance:
        write_synthetic(out, count, size, seed, lambda done: advance(done, count))
    print(out)


def celeba(source: PathArgument, out: PathArgument, *, size: int = 128, held_out: int = 1000) -> None:
    """Bring CelebA's official layout into a prepared folder: cropped, captioned, sketched, split by person.

    Args:
        source: Folder with img_align_celeba, list_attr_celeba.txt and identity_CelebA.txt.
        out: Folder to write; run again to go on after an interruption.
        size: Pixels a side.
        held_out: Faces kept for measuring, at least.
    """
    from likeness.prepare.celeba import prepare_celeba as ingest

    with progress_bar("Preparing") as advance:
        found = ingest(source, out, size=size, held_out=held_out, progress=advance)
    tell_counts(out, found)


def celebamask(source: PathArgument, out: PathArgument, *, size: int = 128, held_out: int = 80) -> None:
    """Bring CelebAMask-HQ's pictures and palette masks into a prepared folder, exchanged sides put right.

    Args:
        source: Folder with images and masks, paired by name.
        out: Folder to write; run again to go on after an interruption.
        size: Pixels a side.
        held_out: Pairs kept for measuring.
    """
    from likeness.prepare.celeba import prepare_celebamask as ingest

    with progress_bar("Preparing") as advance:
        found = ingest(source, out, size=size, held_out=held_out, progress=advance)
    tell_counts(out, found)


def annotate(
    folder: PathArgument, *, parser: Path | None = None, landmarker: Path | None = None, sketches: bool = True
) -> None:
    """Add masks, sketches and keypoints to a prepared folder where it lacks them.

    Args:
        folder: A folder with metadata.jsonl; run again to go on after an interruption.
        parser: Folder of a trained face parser; without it no masks are added.
        landmarker: MediaPipe's face_landmarker.task; without it no keypoints are added.
        sketches: Whether to add sketches.
    """
    from likeness.prepare.annotate import annotate_folder

    quiet_libraries()
    with progress_bar("Annotating") as advance:
        added = annotate_folder(folder, parser=parser, landmarker=landmarker, sketches=sketches, progress=advance)
    print(f"{folder}: " + ", ".join(f"{count} {name} added" for name, count in added.items()))


def check(folder: PathArgument, *, apply: bool = False, sheet: Path | None = None, count: int = 24) -> None:
    """Find what is wrong with a prepared folder and write the fix list fixes.jsonl beside it; mend it on request.

    Exit code: 0 when the folder is clean, 1 when faults remain, 2 when it cannot be checked.

    Args:
        folder: A folder with metadata.jsonl, or the parent of such splits.
        apply: First carry out the fix list that the last check wrote; originals are kept in before/. Lines deleted from
            the list are left as they are.
        sheet: Contact sheet to write, .html or .png: faulty rows first, then others.
        count: How many rows the sheet shows.
    """
    from likeness.prepare.check import check_folder, format_findings
    from likeness.prepare.contact import check_sheet, write_sheet
    from likeness.prepare.mend import FIXES, MENDING, apply_fixes, write_fixes

    if sheet is not None:
        check_sheet(sheet, count)
    with progress_bar("Checking") as advance:
        if apply:
            if not (folder / FIXES).is_file():
                write_fixes(folder, check_folder(folder, advance).findings)
            mended = apply_fixes(folder)
            tell([f"{number} mended: {MENDING[fix]}" for fix, number in mended.items()])
        checked = check_folder(folder, advance)
    print(format_findings(checked))
    write_fixes(folder, checked.findings)
    if sheet is not None:
        write_sheet(folder, checked, sheet, count)
        print(sheet)
    if checked.findings:
        sys.exit(1)


def encode(
    folder: PathArgument,
    out: PathArgument,
    *,
    components: Path | None = None,
    size: int = 128,
    views: int = 1,
    precision: Literal["fp32", "bf16"] = "fp32",
) -> None:
    """Encode a prepared folder into training shards.

    Args:
        folder: A folder with metadata.jsonl.
        out: Folder of the shards; run again to go on after an interruption.
        components: Folder with autoencoder and text tower; the bundled ones by default.
        size: Pixels a side.
        views: Versions of each face: the first as it is; more are mirrored in turn, with conditions as another hand
            would have given them.
        precision: Of the computation; bf16 is about three times as fast on a CPU.
    """
    from likeness.pipelines.load import load_components
    from likeness.prepare.encode import encode_folder

    parts = load_components(components) if components else load_components()
    with progress_bar("Encoding") as advance:
        encode_folder(folder, out, parts, size=size, views=views, precision=precision, progress=advance)
    print(out)


def components(
    autoencoder: PathArgument,
    text: PathArgument,
    out: PathArgument,
    *,
    data: Path,
    face_parser: Path | None = None,
    size: int = 128,
) -> None:
    """Join a trained autoencoder and text tower into the folder a transformer is trained on.

    Args:
        autoencoder: Run folder of an autoencoder.
        text: Run folder of a text tower.
        out: Folder to write.
        data: Prepared folder on which the latents' statistics are measured.
        face_parser: Run folder of a face parser to lay beside them.
        size: Pixels a side.
    """
    from likeness.prepare.components import join_components

    join_components(autoencoder, text, out, data, size=size, face_parser=face_parser)
    print(out)


def pack(model: PathArgument, out: PathArgument) -> None:
    """Write a published model the way the bundled ones ship: int8 weights, shared parts in a folder beside it.

    Args:
        model: A pipeline folder, such as runs/<name>/model.
        out: Folder to write; its neighbour `common` holds the components.
    """
    from likeness.prepare.pack import pack_model

    pack_model(model, out)
    print(out)
