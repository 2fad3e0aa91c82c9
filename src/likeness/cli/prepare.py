"""Commands that make training data: `likeness prepare ...`."""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import Literal

from likeness.cli.terminal import PathArgument, progress_bar, quiet_libraries, tell, tell_counts
from likeness.types import InputError

Layout = Literal[
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


def ingest(
    source: PathArgument,
    out: PathArgument,
    *,
    layout: Layout = "auto",
    split: Split = "auto",
    size: int | None = None,
    crop: bool = False,
    captions: Path | None = None,
    held_out: int | None = None,
    seed: int = 0,
    limit: int | None = None,
) -> None:
    """Bring face pictures in any known layout into a prepared folder (docs/data.md lists layouts and splits).

    Args:
        source: Folder or zip archive with the pictures.
        out: Folder to write; run again to go on after an interruption.
        layout: How the source lies; auto finds out, and names them where several fit.
        split: What is kept for measuring; auto takes the usual one of the layout.
        size: Pixels a side of the pictures; as they are by default. Masks and sketches keep their size.
        crop: Take the middle of pictures that are not square, instead of leaving them out.
        captions: Folder or archive with NAME.txt, a caption a line, where captions lie elsewhere.
        held_out: Faces kept for measuring by the splits person (at least) and random: 1000 by default, of smaller sets
            a tenth.
        seed: Seed of these splits.
        limit: Faces to take at most.
    """
    from likeness.prepare.ingest.write import ingest as ingest_faces

    with progress_bar("Ingesting") as advance:
        found = ingest_faces(
            source,
            out,
            layout=layout,
            split=split,
            size=size,
            crop=crop,
            captions=captions,
            held_out=held_out,
            seed=seed,
            limit=limit,
            progress=advance,
            tell=lambda line: tell([line]),
        )
    tell_counts(out, found)
    if found["skipped"]:
        tell([f"{out / 'skipped.jsonl'} lists all that was left out"])
    tell([f"`likeness prepare check {out}` looks for duplicates, leaks and other faults"])


def export(folder: PathArgument, out: PathArgument, *, format: Literal["imagefolder", "webdataset", "parquet"]) -> None:
    """Write a prepared folder for other tools: Hugging Face's imagefolder or Parquet, or WebDataset shards.

    Args:
        folder: A folder with metadata.jsonl, or the parent of such splits.
        out: Folder to write; run again to go on after an interruption.
        format: What to write.
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
    every: bool = False,
    strict: bool = False,
) -> None:
    """Cut square portraits out of photos, framed as CelebA-HQ and FFHQ are, and keep the way back for `paste`.

    Exit code: 0, or 1 where a photo cannot be read or has no face.

    Args:
        photos: A folder of photos, searched with all below it, or one photo.
        out: Folder to write; run again to go on after an interruption or with more photos.
        landmarker: MediaPipe's face_landmarker.task.
        size: Pixels a side.
        every: All faces of a photo, not only the largest.
        strict: Leave out faces that are turned, tilted, small or cut off, instead of only naming them.
    """
    from likeness.prepare.align import align_photos

    with progress_bar("Aligning") as advance:
        found = align_photos(photos, out, landmarker, size=size, every=every, strict=strict, progress=advance)
    tell([f"{name}: {', '.join(faults)}" for name, faults in found.faults.items()])
    tell([f"{name}: left out, {', '.join(faults)}" for name, faults in found.left_out.items()])
    tell([f"{name}: no face was found" for name in found.without])
    tell([f"{name}: {reason}" for name, reason in found.unreadable.items()])
    print(
        f"{out}: {found.portraits} portraits, {len(found.faults)} with a note, {len(found.left_out)} left out, "
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
    """Lay an edited portrait back into the photo that it was cut from; beyond it no pixel changes.

    Args:
        portrait: The edited portrait, square, of any size.
        aligned: The folder that `align` wrote.
        photo: The photo, as it was then.
        out: File to write: .png and .webp keep every pixel, .jpg rounds them all.
        face: Where the photo has several faces: file name of the portrait as it was aligned.
        feather: Width of the border in which both are mixed, as a share of the portrait's side.
    """
    from likeness.prepare.paste import paste_file

    print(f"{out}: {paste_file(portrait, aligned, photo, out, face=face, feather=feather)} laid into {photo}")


def annotate(
    folder: PathArgument,
    *,
    parser: str = "auto",
    exchanged: bool = False,
    sketches: bool = True,
    sketcher: Path | None = None,
    landmarker: Path | None = None,
    redo: tuple[Literal["mask", "sketch", "keypoints"], ...] = (),
    device: str = "auto",
) -> None:
    """Add masks, sketches and keypoints to a prepared folder where it lacks them.

    Args:
        folder: A folder with metadata.jsonl, or the parent of such splits; run again to go on after an interruption.
        parser: Face parser: bundled, a folder, or a hub id; none adds no masks. By default the bundled one for pictures
            of up to 256 pixels, and jonathandinu/face-parsing from the hub for larger ones.
        exchanged: Whether the parser's left is the viewer's left.
        sketches: Whether to add sketches.
        sketcher: U2-Net's weights, u2net_portrait.pth; without them an extractor that needs none draws.
        landmarker: MediaPipe's face_landmarker.task; without it no keypoints are added.
        redo: Conditions to make anew where another annotator made them; hand-made files stay.
        device: Device of face parser and U2-Net, for example cuda or cpu; auto takes an accelerator if present.
    """
    from likeness.data.folder import each_row
    from likeness.prepare.annotate import annotate_folder, makers_of
    from likeness.prepare.faults import splits_of

    quiet_libraries()
    with progress_bar("Annotating") as advance:
        made = annotate_folder(
            folder,
            parser=None if parser == "none" else parser,
            exchanged=exchanged,
            sketches=sketches,
            sketcher=sketcher,
            landmarker=landmarker,
            redo=redo,
            device=device,
            progress=advance,
        )
    nouns = {"mask": "masks", "sketch": "sketches", "keypoints": "keypoints"}
    print(f"{folder}: " + ", ".join(f"{nouns[name]} added: {count}" for name, count in made.items()))
    rows = (row for split in splits_of(folder) for row in each_row(folder / split))
    for name, makers in makers_of(rows).items():
        if len([maker for maker in makers if maker != "hand"]) > 1:
            counts = ", ".join(f"{count} by {maker}" for maker, count in makers.most_common())
            tell([f"{name}: {counts}; --redo {name} makes them anew by one"])


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
    text_features: bool = False,
    device: str = "auto",
    why: Path | None = None,
) -> None:
    """Encode a prepared folder into training shards; run again after a change, it encodes what changed.

    Under torchrun every process takes its share: torchrun --nproc-per-node 2 -m likeness.cli prepare encode ...

    Args:
        folder: A folder with metadata.jsonl, or the parent of splits, of which train is encoded.
        out: Folder of the shards; run again to go on after an interruption.
        components: Folder with autoencoder and text tower; the bundled ones by default.
        size: Pixels a side.
        views: Versions of each face: the first as it is; more are mirrored in turn, with conditions as another hand
            would have given them.
        precision: Precision of the autoencoder; bf16 is about three times as fast on a CPU.
        text_features: Encode the captions, too, so that training does not need to: for large text towers.
        device: Device of autoencoder and text encoders, for example cuda or cpu; auto takes an accelerator if present.
        why: Encode nothing, but say why this picture or condition would be encoded again.
    """
    if why is not None:
        from likeness.prepare.why import why as reasons

        print("\n".join(reasons(folder, out, why)))
        return
    from likeness.parallel import rank_and_world
    from likeness.pipelines.load import load_components
    from likeness.prepare.encode import encode_folder
    from likeness.prepare.faults import splits_of

    share = rank_and_world()
    splits = splits_of(folder)
    if "train" in splits and len(splits) > 1 and not share[0]:
        others = ", ".join(sorted(set(splits) - {"train"}))
        tell([f"train is encoded, not {others}: to encode that, give its own folder"])
    parts = load_components(components) if components else load_components()
    options = {"size": size, "views": views, "precision": precision, "text_features": text_features}
    with progress_bar("Encoding") as advance:
        found = encode_folder(
            folder, out, parts, **options, device=device, share=share, progress=None if share[0] else advance
        )
    told = f"{out}: {found['faces']} faces, {found['encoded']} pictures and {found['captions']} captions encoded now"
    left = f", {found['missing']} still missing: other processes encode them, or run the command again"
    print(told + (left if found["missing"] else ""))


def shards(
    source: PathArgument,
    out: PathArgument,
    *,
    layout: Layout = "auto",
    split: Split = "auto",
    size: int = 128,
    crop: bool = False,
    held_out: int | None = None,
    limit: int | None = None,
    parser: str = "auto",
    landmarker: Path | None = None,
    components: Path | None = None,
    views: int = 1,
    precision: Literal["fp32", "bf16"] = "fp32",
    device: str = "auto",
) -> None:
    """From pictures in any known layout to training shards in one go: ingest, annotate and encode.

    Writes OUT/faces, the prepared folder, and OUT/shards; says how long each stage took.

    Args:
        source: Folder or zip archive with the pictures.
        out: Folder to write; run again to go on after an interruption.
        layout: How the source lies; auto finds out, and names them where several fit.
        split: What is kept for measuring; auto takes the usual one of the layout.
        size: Pixels a side.
        crop: Take the middle of pictures that are not square, instead of leaving them out.
        held_out: Faces kept for measuring by the splits person (at least) and random: 1000 by default, of smaller sets
            a tenth.
        limit: Faces to take at most.
        parser: Face parser, as `annotate` takes it.
        landmarker: MediaPipe's face_landmarker.task; without it no keypoints are added.
        components: Folder with autoencoder and text tower; the bundled ones by default.
        views: Versions of each face, as `encode` makes them.
        precision: Precision of the autoencoder; bf16 is about three times as fast on a CPU.
        device: Device of face parser and autoencoder, for example cuda or cpu; auto takes an accelerator if present.
    """
    from likeness.annotators.landmarks import open_landmarker
    from likeness.pipelines.load import load_components
    from likeness.prepare.faults import metadata_lines, splits_of

    if components is not None:  # what is wrong with these two is told before hours of work
        load_components(components)
    if landmarker is not None:
        with open_landmarker(landmarker):
            pass
    faces, ended = out / "faces", [(time.monotonic(), time.process_time())]

    def say(stage: str, count: int) -> None:
        ended.append((time.monotonic(), time.process_time()))
        seconds, busy = (after - before for before, after in zip(*ended[-2:], strict=True))
        tell([f"{stage}: {seconds:.0f} s, {busy:.0f} s of processor time, {count / seconds:.1f} images a second"])

    ingest(source, faces, layout=layout, split=split, size=size, crop=crop, held_out=held_out, limit=limit)
    counts = {name: sum(1 for _ in metadata_lines(faces, name)) for name in splits_of(faces)}
    if "train" not in counts:
        told = f"{faces} has {', '.join(counts)} but no train"
        raise InputError(f"{told}: choose another --split, such as none, and another folder")
    say("ingesting", sum(counts.values()))
    annotate(faces, parser=parser, landmarker=landmarker, device=device)
    say("annotating", sum(counts.values()))
    options = {"size": size, "views": views, "precision": precision, "device": device}
    encode(faces, out / "shards", components=components, **options)
    say("encoding", counts["train"])


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
        autoencoder: Run folder of an autoencoder, or of a decoder.
        text: Run folder of a text tower.
        out: Folder to write.
        data: Prepared folder on which the latents' statistics are measured.
        face_parser: Run folder of a face parser to lay beside them.
        size: Pixels a side.
    """
    from likeness.prepare.components import join_components

    join_components(autoencoder, text, out, data, size=size, face_parser=face_parser)
    print(out)


def decoder(run: PathArgument, components: PathArgument, out: PathArgument) -> None:
    """Write a copy of a components folder with the decoder of a run. Shards and models stay valid.

    Args:
        run: Run folder of a decoder.
        components: Folder with autoencoder and text tower.
        out: Folder to write.
    """
    from likeness.prepare.components import replace_decoder

    replace_decoder(run, components, out)
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
