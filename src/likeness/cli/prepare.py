"""Commands that prepare training data: `likeness prepare ...`. The fields of a command are its options."""

from __future__ import annotations

import operator
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Literal

from likeness.cli.terminal import PathArgument, print_counts, print_notes, printable, progress_bar, quiet_libraries
from likeness.types import InputError

# fmt: off
Format = Literal[
    "auto", "celeba", "celebamask", "images_and_masks", "mm_celeba", "ffhq", "face_mogle", "mmface_dit", "imagefolder",
    "parquet", "webdataset", "folder",
]
# fmt: on
Split = Literal["auto", "given", "none", "person", "random", "celeba", "face_mogle", "mm_celeba"]


@dataclass(frozen=True, kw_only=True)
class ImportOptions:
    """Options of `ingest` and `shards`."""

    source: PathArgument
    """Folder or zip archive with the images."""
    out: PathArgument
    """Folder to write. Run again to resume."""
    format: Format = "auto"
    """Dataset format of the source; auto detects it and fails if several match."""
    split: Split = "auto"
    """Split into training and held-out faces; auto takes the usual one of the format, or random with held_out."""
    crop: bool = False
    """Crop the center of images that are not square instead of skipping them."""
    held_out: int | None = None
    """Faces held out by the splits person (at least) and random. Default: a tenth of the faces, at most 1000."""
    limit: int | None = None
    """Maximum number of faces."""
    follow_links: bool = False
    """Also read links that lead outside the source."""


@dataclass(frozen=True, kw_only=True)
class EncodeOptions:
    """Options of `encode` and `shards`."""

    components: Path | None = None
    """Folder with autoencoder and text encoder; bundled ones by default."""
    size: int = 128
    """Side length in pixels."""
    augmentations: int = 1
    """Versions of each face: the original, then alternately mirrored and not, with varied conditions."""
    precision: Literal["fp32", "bf16", "auto"] = "fp32"
    """Precision of the autoencoder; auto is bf16 where it is faster, or that of the existing shards."""
    device: str = "auto"
    """Device of the networks, for example cuda or cpu; auto takes an accelerator if present."""


@dataclass(frozen=True, kw_only=True)
class Synthetic:
    """Draw synthetic faces with masks, sketches, keypoints, attributes and captions."""

    out: PathArgument
    """Folder to write. Run again to resume, or with a larger count to add faces; existing rows are kept."""
    count: int = 1000
    """Number of faces."""
    size: int = 128
    """Side length in pixels."""
    seed: int = 0
    """Random seed."""

    def __call__(self) -> None:
        from likeness.prepare.synthetic import write_synthetic

        with progress_bar("Drawing") as advance:
            write_synthetic(**vars(self), progress=advance)
        print(self.out)


@dataclass(frozen=True, kw_only=True)
class Ingest(ImportOptions):
    """Import face images in any known dataset format into a prepared folder (docs/data.md lists formats and splits)."""

    size: int | None = None
    """Side length of the images in pixels; unchanged by default. Masks and sketches keep their size."""
    captions: Path | None = None
    """Folder or archive with NAME.txt, one caption per line, if captions are stored separately."""
    seed: int = 0
    """Random seed of the splits person and random."""

    def __call__(self) -> None:
        from likeness.prepare.ingest.write import ingest

        with progress_bar("Ingesting") as advance:
            found = ingest(**vars(self), progress=advance, report=lambda line: print_notes([line]))
        print_counts(self.out, found)
        if found["skipped"]:
            print_notes([f"{self.out / 'skipped.jsonl'} lists everything that was skipped"])
        print_notes([f"`likeness prepare check {self.out}` checks for duplicates, leaks and other faults"])


@dataclass(frozen=True, kw_only=True)
class Export:
    """Export a prepared folder for other tools: Hugging Face's imagefolder or Parquet, or WebDataset shards."""

    folder: PathArgument
    """Folder with metadata.jsonl, or the parent of splits."""
    out: PathArgument
    """Folder to write. Run again to resume."""
    format: Literal["imagefolder", "webdataset", "parquet"]
    """Format to write."""

    def __call__(self) -> None:
        from likeness.prepare.export import export

        with progress_bar("Exporting") as advance:
            print_counts(self.out, export(**vars(self), progress=advance))


@dataclass(frozen=True, kw_only=True)
class Align:
    """Cut square portraits out of photos, framed as in CelebA-HQ and FFHQ, into a prepared folder with splits.

    The folder records the transform of each portrait for `paste`.

    Exit code: 1 if a photo cannot be read or has no face, otherwise 0.
    """

    photos: PathArgument
    """Folder of photos, searched recursively, or one photo."""
    out: PathArgument
    """Folder to write. Run again to resume or to add photos."""
    landmarker: Path
    """MediaPipe's face_landmarker.task."""
    size: int = 512
    """Side length in pixels."""
    all_faces: bool = False
    """Align all faces of a photo instead of only the largest."""
    strict: bool = False
    """Skip faces that are turned, tilted, small or cut off instead of only reporting them."""
    held_out: int | None = None
    """Photos held out in the split test. Default: a tenth of the photos, at most 1000."""
    follow_links: bool = False
    """Also read links that lead outside the folder of photos."""

    def __call__(self) -> None:
        if not self.align():
            sys.exit(1)

    def align(self) -> bool:
        """Align and report; returns whether every photo has a portrait or was skipped for its geometry."""
        from likeness.prepare.align import align_photos

        with progress_bar("Aligning") as advance:
            found = align_photos(**vars(self), progress=advance)
        for kept, faults in ((True, found.faults), (False, found.skipped)):
            groups: dict[str, list[str]] = {}
            for name, notes in faults.items():
                for note in notes:
                    groups.setdefault(note.kind, []).append(f"{name} {note.text}")
            what = "portrait" if kept else "skipped portrait"
            print_notes([summary(what, kind, group) for kind, group in groups.items()])
        unreadable = [f"{name} ({reason})" for name, reason in found.unreadable.items()]
        copies = [f"{name} (of {original})" for name, original in found.copies.items()]
        for what, photos in (
            ("without a face", found.without),
            ("unreadable", unreadable),
            ("skipped as copies", copies),
        ):
            print_notes([summary("photo", what, photos)] * bool(photos))
        splits = ", ".join(f"{number} {split}" for split, number in found.splits.items())
        print(
            f"{self.out}: {found.splits.total()} portraits{f' ({splits})' if splits else ''}, {len(found.faults)} with "
            f"a note, {len(found.skipped)} skipped, {len(found.without)} photos without a face, "
            f"{len(found.unreadable)} unreadable"
        )
        return not (found.without or found.unreadable)


def summary(noun: str, what: str, names: list[str]) -> str:
    """Return one line on what names have in common, with the first of them."""
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return f"{len(names)} {noun}{'s' * (len(names) != 1)} {what}: {'; '.join(names[:3])}{more}"


@dataclass(frozen=True, kw_only=True)
class Paste:
    """Paste an edited portrait back into the photo that it was cut from. Pixels outside the face do not change."""

    portrait: PathArgument
    """Edited portrait, square, of any size."""
    aligned: Path
    """Folder written by `align`."""
    photo: Path
    """The unchanged photo."""
    out: Path
    """File to write; .png and .webp are lossless, .jpg is not."""
    face: str | None = None
    """File name of the aligned portrait, if the photo has several faces."""
    feather: float = 0.1
    """Width of the blended border as a fraction of the portrait's side, above 0 and at most 0.5."""
    only: tuple[str, ...] = ()
    """Classes to paste, such as hair,hat,skin; a face parser finds them. Default: the whole portrait."""
    parser: str = "bundled"
    """Face parser for --only: bundled, a folder or a hub id."""

    def __call__(self) -> None:
        from likeness.cli.output import image_names
        from likeness.prepare.paste import paste_file

        image_names(str(self.out), "png", 1, (self.portrait, self.photo))  # rejects an input as output
        print(printable(f"{self.out}: {paste_file(**vars(self))} pasted into {self.photo}"))


@dataclass(frozen=True, kw_only=True)
class Extract:
    """Make the mask, sketch and keypoints of one photograph. It is aligned first unless it is already.

    Writes NAME.png (the portrait), NAME_mask.png, NAME_sketch.png and NAME_keypoints.json.
    """

    photo: PathArgument
    """The photograph; its largest face is used."""
    out: Path
    """Folder to write."""
    landmarker: Path | None = None
    """MediaPipe's face_landmarker.task. Without it there are no keypoints, and the photograph must be aligned."""
    size: int = 256
    """Side length in pixels."""
    parser: str = "bundled"
    """Face parser: bundled, a folder or a hub id."""
    device: str = "auto"
    """Device of the face parser, for example cuda or cpu; auto takes an accelerator if present."""

    def __call__(self) -> None:
        from likeness.prepare.align import extract

        quiet_libraries()
        for file in extract(**vars(self)).values():
            print(file)


@dataclass(frozen=True, kw_only=True)
class Annotate:
    """Add missing masks, sketches and keypoints to a prepared folder."""

    folder: PathArgument
    """Folder with metadata.jsonl, or the parent of splits. Run again to resume."""
    parser: str = "auto"
    """Face parser: bundled, a folder or a hub id; none adds no masks. Default: bundled for images of up to 256 pixels,
    for larger ones jonathandinu/face-parsing from the hub if it is available, else bundled."""
    swapped_sides: bool = False
    """The parser's left is the viewer's left."""
    sketches: bool = True
    """Add sketches."""
    sketcher: Path | None = None
    """U2-Net weights, u2net_portrait.pth; an extractor without weights by default."""
    landmarker: Path | None = None
    """MediaPipe's face_landmarker.task; no keypoints are added without it."""
    redo: tuple[Literal["mask", "sketch", "keypoints"], ...] = ()
    """Conditions to regenerate if another annotator made them; hand-made files are kept."""
    device: str = "auto"
    """Device of face parser and U2-Net, for example cuda or cpu; auto takes an accelerator if present."""

    def __call__(self) -> None:
        from likeness.conditions import CONDITIONS
        from likeness.prepare.annotate import annotate_folder

        quiet_libraries()
        options = vars(self) | {"parser": None if self.parser == "none" else self.parser}
        with progress_bar("Annotating") as advance:
            added = annotate_folder(**options, progress=advance, report=lambda line: print_notes([line]))
        counts = (f"{CONDITIONS[name].folder} added: {count}" for name, count in added.items())
        print(f"{self.folder}: {', '.join(counts)}")


@dataclass(frozen=True, kw_only=True)
class Check:
    """Check a prepared folder for faults and write the fix list fixes.jsonl next to it, or apply the list.

    Exit code: 0 if the folder is clean, 1 if faults remain, 2 if it cannot be checked.
    """

    folder: PathArgument
    """Folder with metadata.jsonl, or the parent of splits."""
    apply: bool = False
    """First apply the fix list of the last check, or all fixes if there is no list; originals are kept in before/.
    Faults whose lines were deleted from the list are left alone."""
    sheet: Path | None = None
    """Contact sheet to write, .html: faulty rows first, then others."""
    count: int = 24
    """Maximum number of rows on the sheet."""

    def __call__(self) -> None:
        if not self.check():
            sys.exit(1)

    def check(self) -> bool:
        """Check and report; returns whether the folder is clean."""
        from likeness.data.folder import changing, splits_of
        from likeness.prepare.check import check_folder, format_findings
        from likeness.prepare.contact_sheet import check_sheet, write_sheet
        from likeness.prepare.fix import FIX_LIST, FIXES, apply_fixes, selected_fixes, write_fixes

        if self.sheet is not None:
            check_sheet(self.sheet, self.count)
        with progress_bar("Checking") as advance:
            if self.apply:
                with changing(self.folder, splits_of(self.folder)):
                    checked = check_folder(self.folder, advance)
                    fixes = selected_fixes(self.folder, checked.findings, checked.state, current=True)
                    write_fixes(self.folder, fixes, checked.state)  # what the list excludes stays excluded
                    fixed = apply_fixes(self.folder, fixes)
                print_notes([f"{number} fixed: {FIXES[fix]}" for fix, number in fixed.items()])
            checked = check_folder(self.folder, advance)
        selected = selected_fixes(self.folder, checked.findings, checked.state)
        if excluded := sum(found.fix is not new.fix for found, new in zip(checked.findings, selected, strict=True)):
            print_notes([f"{FIX_LIST} excludes {excluded} fixes: delete it and check again to include them"])
        checked.findings = selected
        print(printable(format_findings(checked)))
        write_fixes(self.folder, checked.findings, checked.state)
        if self.sheet is not None:
            write_sheet(self.folder, checked, self.sheet, self.count)
            print(self.sheet)
        return not checked.findings


@dataclass(frozen=True, kw_only=True)
class Encode(EncodeOptions):
    """Encode a prepared folder into training shards. Run again after a change to encode only what changed.

    With torchrun, the processes divide the work: torchrun --nproc-per-node 2 -m likeness.cli prepare encode ...
    """

    folder: PathArgument
    """Folder with metadata.jsonl, or the parent of splits, of which train is encoded."""
    out: PathArgument
    """Folder of the shards. Run again to resume."""
    text_features: bool = False
    """Also encode the captions, so that training needs no text encoder: useful for large ones."""
    replace: bool = False
    """Remove images of existing shards in OUT that the folder does not contain."""

    def __call__(self) -> None:
        from likeness.data.folder import splits_of
        from likeness.encoders.components import load_components
        from likeness.parallel import rank_and_world
        from likeness.prepare.encode import encode_folder
        from likeness.weights.catalog import BUNDLED, COMMON

        quiet_libraries()
        process = rank_and_world()
        others = sorted(set(splits := splits_of(self.folder)) - {"train"})
        if "train" in splits and others and not process[0]:
            print_notes([f"only train is encoded, not {', '.join(others)}: give the folder of a split to encode it"])
        components = load_components(self.components or BUNDLED / COMMON)
        with progress_bar("Encoding") as advance:
            progress = (lambda done, total: None) if process[0] else advance
            options = vars(self) | {"components": components, "process": process}
            found = encode_folder(**options, progress=progress)
        faces = f"{found['faces']} faces" + (f" x {self.augmentations} augmentations" * (self.augmentations > 1))
        texts = f", {found['captions']} captions encoded now" * (self.text_features or found["captions"] > 0)
        missing = f", {found['missing']} missing: other processes encode them; otherwise run the command again"
        encoded = f"{found['encoded']} images and conditions encoded now"
        print(f"{self.out}: {faces}, {encoded}{texts}{missing if found['missing'] else ''}")
        if found["uncaptioned"] and not process[0]:
            command = f"likeness prepare caption {self.folder} --grammar --attributes bundled"
            uncaptioned = f"{found['uncaptioned']} of {found['faces']} faces have no captions"
            print_notes([f"{uncaptioned}: they are trained with empty text. `{command}` writes captions"])
        if found["truncated"] and not process[0]:
            limit = components.settings["max_text_tokens"]
            truncated = f"{found['truncated']} of {found['written']} captions are longer than {limit} tokens"
            print_notes([f"{truncated}, the most that the text encoder reads: training ignores the rest of each"])
        if found["damaged"]:
            print_notes([f"{found['damaged']} files of {self.out} were damaged and have been encoded again"])
        if found["removed"]:
            print_notes([f"{found['removed']} images of the former shards have been removed"])


@dataclass(frozen=True, kw_only=True)
class Shards(ImportOptions, EncodeOptions):
    """Convert images in any known dataset format, or photos of any size, to training shards in one command.

    Stages: ingest or align, annotate, caption faces without captions, check, encode. Writes the prepared folder
    OUT/faces, the shards of train in OUT/shards and those of other splits next to it, and reports the time of each
    stage. Finished stages are not repeated.
    """

    align: bool = False
    """SOURCE is a folder of photos of any size: cut the faces out (as `align` does) instead of ingesting."""
    parser: str = "auto"
    """Face parser, as in `annotate`."""
    landmarker: Path | None = None
    """MediaPipe's face_landmarker.task; no keypoints are added without it."""
    captioner: Literal["bundled", "none"] = "bundled"
    """Captions of faces that have none: written from attributes that the bundled model predicts, or none."""

    def __call__(self) -> None:
        from likeness.annotators.landmarks import open_landmarker
        from likeness.cli.caption import Caption
        from likeness.data.folder import captions_of, each_row, splits_of
        from likeness.encoders.components import load_components
        from likeness.prepare.encode import check_sizes
        from likeness.weights.catalog import BUNDLED, COMMON

        only_ingest = {field.name for field in fields(Ingest)} - {field.name for field in fields(Align)} - {"source"}
        ignored = [
            field.name
            for field in fields(ImportOptions)
            if field.name in only_ingest and getattr(self, field.name) != field.default
        ]
        if self.align and ignored:
            raise InputError(f"--{ignored[0]} has no effect on photos that --align cuts: leave it out")
        if self.align and self.landmarker is None:
            raise InputError("--align finds faces with MediaPipe: pass its model as --landmarker face_landmarker.task")
        components = load_components(self.components or BUNDLED / COMMON)
        check_sizes(components, self.size, self.augmentations)  # before hours of work
        if self.landmarker is not None:
            with open_landmarker(self.landmarker):
                pass

        faces = self.out / "faces"

        def run(stage: str, command: Any, start: Callable[[Any], Any] = operator.call, **values: Any) -> None:
            """Run a stage with the options that it shares with this command, and report its time."""
            options = {field.name: getattr(self, field.name, field.default) for field in fields(command)}
            started = time.monotonic(), time.process_time()
            start(command(**options | values))
            seconds, processor = time.monotonic() - started[0], time.process_time() - started[1]
            print_notes([f"{stage}: {seconds:.0f} s, {processor:.0f} s of processor time"])

        if self.align:
            run("aligning", Align, Align.align, photos=self.source, out=faces)
        else:
            run("ingesting", Ingest, out=faces)
        if "train" not in (splits := splits_of(faces)):
            raise InputError(f"{faces} has {', '.join(splits)} but no split train: use another --split, such as none")
        run("annotating", Annotate, folder=faces)
        rows = (row for split in splits for row in each_row(faces / split))
        if self.captioner == "bundled" and not all(map(captions_of, rows)):
            options = {"grammar": True, "attributes": "bundled", "only_uncaptioned": True}
            run("captioning", Caption, Caption.caption, folder=faces, **options)
        run("checking", Check, Check.check, folder=faces)
        for split in splits:
            out = self.out / ("shards" if split == "train" else f"{split}_shards")
            run(f"encoding {split}", Encode, folder=faces / split, out=out, replace=True)


@dataclass(frozen=True, kw_only=True)
class JoinComponents:
    """Join a trained autoencoder and text encoder into the components folder of a transformer."""

    autoencoder: PathArgument
    """Run folder of an autoencoder or of a decoder."""
    text: PathArgument
    """Run folder of a text encoder."""
    out: PathArgument
    """Folder to write."""
    data: Path
    """Prepared folder on which the latent statistics are measured."""
    face_parser: Path | None = None
    """Run folder of a face parser to add."""
    size: int = 128
    """Side length in pixels."""

    def __call__(self) -> None:
        from likeness.prepare.components import join_components

        join_components(**vars(self))
        print(self.out)


@dataclass(frozen=True, kw_only=True)
class ReplaceDecoder:
    """Write a copy of a components folder with the decoder of a run. Shards and models stay valid."""

    run: PathArgument
    """Run folder of a decoder."""
    components: PathArgument
    """Folder with autoencoder and text encoder."""
    out: PathArgument
    """Folder to write."""

    def __call__(self) -> None:
        from likeness.prepare.components import replace_decoder

        replace_decoder(**vars(self))
        print(self.out)


@dataclass(frozen=True, kw_only=True)
class Pack:
    """Write a published model in the form of the bundled ones: int8 weights, components in the folder `common`."""

    model: PathArgument
    """Pipeline folder, such as runs/<name>/model."""
    out: PathArgument
    """Folder to write; the folder `common` next to it contains the components."""
    base: Path | None = None
    """Packed model that this one was trained from, such as a teacher: stores the difference, in 4 bits."""
    label_decoder: Path | None = None
    """Run folder of a label decoder: the packed model then generates masks, not images of them."""

    def __call__(self) -> None:
        from likeness.prepare.components import pack_model

        pack_model(**vars(self))
        print(self.out)
