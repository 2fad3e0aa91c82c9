"""Commands that prepare training data: `likeness prepare ...`."""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import Literal

from likeness.cli.terminal import PathArgument, progress_bar, quiet_libraries, tell, tell_counts
from likeness.types import InputError

Format = Literal[
    "auto",
    "celeba",
    "celebamask",
    "mm_celeba",
    "ffhq",
    "face_mogle",
    "mmface_dit",
    "imagefolder",
    "parquet",
    "webdataset",
    "folder",
]
Split = Literal["auto", "given", "none", "person", "random", "celeba", "face_mogle", "mm_celeba"]


def synthetic(out: PathArgument, *, count: int = 1000, size: int = 128, seed: int = 0) -> None:
    """Draw synthetic faces with masks, sketches, keypoints, attributes and captions.

    Args:
        out: Folder to write. Run again to resume.
        count: Number of faces.
        size: Side length in pixels.
        seed: Random seed.
    """
    from likeness.prepare.synthetic import write_synthetic

    with progress_bar("Drawing") as advance:
        write_synthetic(out, count, size, seed, advance)
    print(out)


def ingest(
    source: PathArgument,
    out: PathArgument,
    *,
    format: Format = "auto",
    split: Split = "auto",
    size: int | None = None,
    crop: bool = False,
    captions: Path | None = None,
    held_out: int | None = None,
    seed: int = 0,
    limit: int | None = None,
) -> None:
    """Import face images in any known dataset format into a prepared folder (docs/data.md lists formats and splits).

    Args:
        source: Folder or zip archive with the images.
        out: Folder to write. Run again to resume.
        format: Dataset format of the source; auto detects it and fails if several match.
        split: Split into training and held-out faces; auto takes the usual one of the format.
        size: Side length of the images in pixels; unchanged by default. Masks and sketches keep their size.
        crop: Crop the centre of images that are not square instead of skipping them.
        captions: Folder or archive with NAME.txt, one caption per line, if captions are stored separately.
        held_out: Faces held out by the splits person (at least) and random: 1000 by default, a tenth of smaller sets.
        seed: Random seed of these splits.
        limit: Maximum number of faces.
    """
    from likeness.prepare.ingest.write import ingest as ingest_faces

    with progress_bar("Ingesting") as advance:
        found = ingest_faces(
            source,
            out,
            format=format,
            split=split,
            size=size,
            crop=crop,
            captions=captions,
            held_out=held_out,
            seed=seed,
            limit=limit,
            progress=advance,
            report=lambda line: tell([line]),
        )
    tell_counts(out, found)
    if found["skipped"]:
        tell([f"{out / 'skipped.jsonl'} lists everything that was skipped"])
    tell([f"`likeness prepare check {out}` checks for duplicates, leaks and other faults"])


def export(folder: PathArgument, out: PathArgument, *, format: Literal["imagefolder", "webdataset", "parquet"]) -> None:
    """Export a prepared folder for other tools: Hugging Face's imagefolder or Parquet, or WebDataset shards.

    Args:
        folder: Folder with metadata.jsonl, or the parent of splits.
        out: Folder to write. Run again to resume.
        format: Format to write.
    """
    from likeness.prepare.export import export as export_faces

    with progress_bar("Exporting") as advance:
        found = export_faces(folder, out, format, progress=advance)
    tell_counts(out, found)


def align(
    photos: PathArgument,
    out: PathArgument,
    *,
    landmarker: Path,
    size: int = 512,
    all_faces: bool = False,
    strict: bool = False,
) -> None:
    """Cut square portraits out of photos, framed as in CelebA-HQ and FFHQ, and record the transform for `paste`.

    Exit code: 1 if a photo cannot be read or has no face, otherwise 0.

    Args:
        photos: Folder of photos, searched recursively, or one photo.
        out: Folder to write. Run again to resume or to add photos.
        landmarker: MediaPipe's face_landmarker.task.
        size: Side length in pixels.
        all_faces: Align all faces of a photo instead of only the largest.
        strict: Skip faces that are turned, tilted, small or cut off instead of only reporting them.
    """
    from likeness.prepare.align import align_photos

    with progress_bar("Aligning") as advance:
        found = align_photos(photos, out, landmarker, size=size, all_faces=all_faces, strict=strict, progress=advance)
    tell([f"{name}: {', '.join(faults)}" for name, faults in found.faults.items()])
    tell([f"{name}: skipped, {', '.join(faults)}" for name, faults in found.skipped.items()])
    tell([f"{name}: no face was found" for name in found.without])
    tell([f"{name}: {reason}" for name, reason in found.unreadable.items()])
    print(
        f"{out}: {found.portraits} portraits, {len(found.faults)} with a note, {len(found.skipped)} skipped, "
        f"{len(found.without)} photos without a face, {len(found.unreadable)} unreadable"
    )
    if found.without or found.unreadable:
        sys.exit(1)


def paste(
    portrait: PathArgument,
    *,
    aligned: Path,
    photo: Path,
    out: Path,
    face: str | None = None,
    feather: float = 0.1,
) -> None:
    """Paste an edited portrait back into the photo that it was cut from. Pixels outside the face do not change.

    Args:
        portrait: Edited portrait, square, of any size.
        aligned: Folder written by `align`.
        photo: The unchanged photo.
        out: File to write; .png and .webp are lossless, .jpg is not.
        face: File name of the aligned portrait, if the photo has several faces.
        feather: Width of the blended border as a fraction of the portrait's side.
    """
    from likeness.prepare.paste import paste_file

    print(f"{out}: {paste_file(portrait, aligned, photo, out, face=face, feather=feather)} pasted into {photo}")


def annotate(
    folder: PathArgument,
    *,
    parser: str = "auto",
    swapped_sides: bool = False,
    sketches: bool = True,
    sketcher: Path | None = None,
    landmarker: Path | None = None,
    redo: tuple[Literal["mask", "sketch", "keypoints"], ...] = (),
    device: str = "auto",
) -> None:
    """Add missing masks, sketches and keypoints to a prepared folder.

    Args:
        folder: Folder with metadata.jsonl, or the parent of splits. Run again to resume.
        parser: Face parser: bundled, a folder or a hub id; none adds no masks. Default: bundled for images of up to 256
            pixels, jonathandinu/face-parsing from the hub for larger ones.
        swapped_sides: The parser's left is the viewer's left.
        sketches: Add sketches.
        sketcher: U2-Net weights, u2net_portrait.pth; an extractor without weights by default.
        landmarker: MediaPipe's face_landmarker.task; no keypoints are added without it.
        redo: Conditions to regenerate if another annotator made them; hand-made files are kept.
        device: Device of face parser and U2-Net, for example cuda or cpu; auto takes an accelerator if present.
    """
    from likeness.data.folder import each_row, splits_of
    from likeness.prepare.annotate import annotate_folder, count_annotators

    quiet_libraries()
    with progress_bar("Annotating") as advance:
        added = annotate_folder(
            folder,
            parser=None if parser == "none" else parser,
            swapped_sides=swapped_sides,
            sketches=sketches,
            sketcher=sketcher,
            landmarker=landmarker,
            redo=redo,
            device=device,
            progress=advance,
        )
    nouns = {"mask": "masks", "sketch": "sketches", "keypoints": "keypoints"}
    print(f"{folder}: " + ", ".join(f"{nouns[name]} added: {count}" for name, count in added.items()))
    rows = (row for split in splits_of(folder) for row in each_row(folder / split))
    for name, annotators in count_annotators(rows).items():
        if len([annotator for annotator in annotators if annotator != "hand"]) > 1:
            counts = ", ".join(f"{count} by {annotator}" for annotator, count in annotators.most_common())
            tell([f"{name}: {counts}; --redo {name} regenerates them with one annotator"])


def check(folder: PathArgument, *, apply: bool = False, sheet: Path | None = None, count: int = 24) -> None:
    """Check a prepared folder for faults and write the fix list fixes.jsonl next to it, or apply the list.

    Exit code: 0 if the folder is clean, 1 if faults remain, 2 if it cannot be checked.

    Args:
        folder: Folder with metadata.jsonl, or the parent of splits.
        apply: First apply the fix list of the last check; originals are kept in before/. Faults whose lines were
            deleted from the list are left alone.
        sheet: Contact sheet to write, .html or .png: faulty rows first, then others.
        count: Maximum number of rows on the sheet.
    """
    from likeness.prepare.check import check_folder, format_findings
    from likeness.prepare.contact_sheet import check_sheet, write_sheet
    from likeness.prepare.findings import FIXES
    from likeness.prepare.fix import FIX_LIST, apply_fixes, write_fixes

    if sheet is not None:
        check_sheet(sheet, count)
    with progress_bar("Checking") as advance:
        if apply:
            if not (folder / FIX_LIST).is_file():
                write_fixes(folder, check_folder(folder, advance).findings)
            tell([f"{number} fixed: {FIXES[fix]}" for fix, number in apply_fixes(folder).items()])
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
    augmentations: int = 1,
    precision: Literal["fp32", "bf16"] = "fp32",
    text_features: bool = False,
    device: str = "auto",
) -> None:
    """Encode a prepared folder into training shards. Run again after a change to encode only what changed.

    With torchrun, the processes divide the work: torchrun --nproc-per-node 2 -m likeness.cli prepare encode ...

    Args:
        folder: Folder with metadata.jsonl, or the parent of splits, of which train is encoded.
        out: Folder of the shards. Run again to resume.
        components: Folder with autoencoder and text encoder; bundled ones by default.
        size: Side length in pixels.
        augmentations: Versions of each face: the original, then alternately mirrored and not, with varied conditions.
        precision: Precision of the autoencoder; bf16 is about 3x faster on a CPU.
        text_features: Also encode the captions, so that training needs no text encoder: useful for large ones.
        device: Device of autoencoder and text encoders, for example cuda or cpu; auto takes an accelerator if present.
    """
    from likeness.data.folder import splits_of
    from likeness.parallel import rank_and_world
    from likeness.pipelines.load import load_components
    from likeness.prepare.encode import encode_folder

    share = rank_and_world()
    splits = splits_of(folder)
    if "train" in splits and len(splits) > 1 and not share[0]:
        others = ", ".join(sorted(set(splits) - {"train"}))
        tell([f"only train is encoded, not {others}: give the folder of another split to encode it"])
    parts = load_components(components) if components else load_components()
    options = {"size": size, "augmentations": augmentations, "precision": precision, "text_features": text_features}
    with progress_bar("Encoding") as advance:
        found = encode_folder(
            folder, out, parts, **options, device=device, share=share, progress=None if share[0] else advance
        )
    summary = f"{out}: {found['faces']} faces, {found['encoded']} images and {found['captions']} captions encoded"
    missing = f", {found['missing']} missing: other processes encode them; otherwise run the command again"
    print(summary + (missing if found["missing"] else ""))


def shards(
    source: PathArgument,
    out: PathArgument,
    *,
    format: Format = "auto",
    split: Split = "auto",
    size: int = 128,
    crop: bool = False,
    held_out: int | None = None,
    limit: int | None = None,
    parser: str = "auto",
    landmarker: Path | None = None,
    components: Path | None = None,
    augmentations: int = 1,
    precision: Literal["fp32", "bf16"] = "fp32",
    device: str = "auto",
) -> None:
    """Convert images in any known dataset format to training shards: ingest, annotate and encode in one command.

    Writes the prepared folder OUT/faces and OUT/shards, and reports the time of each stage.

    Args:
        source: Folder or zip archive with the images.
        out: Folder to write. Run again to resume.
        format: Dataset format of the source; auto detects it and fails if several match.
        split: Split into training and held-out faces; auto takes the usual one of the format.
        size: Side length in pixels.
        crop: Crop the centre of images that are not square instead of skipping them.
        held_out: Faces held out by the splits person (at least) and random: 1000 by default, a tenth of smaller sets.
        limit: Maximum number of faces.
        parser: Face parser, as in `annotate`.
        landmarker: MediaPipe's face_landmarker.task; no keypoints are added without it.
        components: Folder with autoencoder and text encoder; bundled ones by default.
        augmentations: Versions of each face, as in `encode`.
        precision: Precision of the autoencoder; bf16 is about 3x faster on a CPU.
        device: Device of face parser and autoencoder, for example cuda or cpu; auto takes an accelerator if present.
    """
    from likeness.annotators.landmarks import open_landmarker
    from likeness.data.folder import metadata_lines, splits_of
    from likeness.pipelines.load import load_components

    if components is not None:  # fail before hours of work
        load_components(components)
    if landmarker is not None:
        with open_landmarker(landmarker):
            pass
    faces, times = out / "faces", [(time.monotonic(), time.process_time())]

    def report(stage: str, count: int) -> None:
        times.append((time.monotonic(), time.process_time()))
        seconds, processor = (after - before for before, after in zip(*times[-2:], strict=True))
        rate = count / seconds
        tell([f"{stage}: {seconds:.0f} s, {processor:.0f} s of processor time, {rate:.1f} images per second"])

    ingest(source, faces, format=format, split=split, size=size, crop=crop, held_out=held_out, limit=limit)
    counts = {name: sum(1 for _ in metadata_lines(faces, name)) for name in splits_of(faces)}
    if "train" not in counts:
        found = ", ".join(counts)
        raise InputError(f"{faces} has {found} but no split train: use another --split, such as none, and folder")
    report("ingesting", sum(counts.values()))
    annotate(faces, parser=parser, landmarker=landmarker, device=device)
    report("annotating", sum(counts.values()))
    options = {"size": size, "augmentations": augmentations, "precision": precision, "device": device}
    encode(faces, out / "shards", components=components, **options)
    report("encoding", counts["train"])


def components(
    autoencoder: PathArgument,
    text: PathArgument,
    out: PathArgument,
    *,
    data: Path,
    face_parser: Path | None = None,
    size: int = 128,
) -> None:
    """Join a trained autoencoder and text encoder into the components folder of a transformer.

    Args:
        autoencoder: Run folder of an autoencoder or of a decoder.
        text: Run folder of a text encoder.
        out: Folder to write.
        data: Prepared folder on which the latent statistics are measured.
        face_parser: Run folder of a face parser to add.
        size: Side length in pixels.
    """
    from likeness.prepare.components import join_components

    join_components(autoencoder, text, out, data, size=size, face_parser=face_parser)
    print(out)


def decoder(run: PathArgument, components: PathArgument, out: PathArgument) -> None:
    """Write a copy of a components folder with the decoder of a run. Shards and models stay valid.

    Args:
        run: Run folder of a decoder.
        components: Folder with autoencoder and text encoder.
        out: Folder to write.
    """
    from likeness.prepare.components import replace_decoder

    replace_decoder(run, components, out)
    print(out)


def pack(model: PathArgument, out: PathArgument) -> None:
    """Write a published model in the form of the bundled ones: int8 weights, shared components in the folder `common`.

    Args:
        model: Pipeline folder, such as runs/<name>/model.
        out: Folder to write; the folder `common` next to it contains the components.
    """
    from likeness.prepare.pack import pack_model

    pack_model(model, out)
    print(out)
