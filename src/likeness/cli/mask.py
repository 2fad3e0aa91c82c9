"""Commands that edit masks: `likeness mask ...`. The fields of a command are its options."""

from __future__ import annotations

import secrets
from contextlib import nullcontext
from dataclasses import dataclass, fields
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import tyro
from tyro.conf import arg

from likeness.cli.output import MAX_COUNT, exit_on_sigterm, image_names, save_next
from likeness.cli.terminal import PathArgument, print_notes, progress_bar
from likeness.runtime import optional_packages_hidden
from likeness.types import InputError
from likeness.weights.catalog import MASK_MODEL, bundled_models


@dataclass(frozen=True, kw_only=True)
class Edit:
    """Edit a mask. A subclass has the name and the options of an operation in `likeness.conditions.mask.commands`."""

    file: PathArgument
    """Mask in any supported format."""
    out: Path
    """PNG file to write."""

    def __call__(self) -> None:
        from likeness.conditions.mask import edits
        from likeness.conditions.mask.commands import OPERATIONS

        edits.check_suffix(self.out)
        before = read_mask(self.file)
        options = {field.name: getattr(self, field.name) for field in fields(self)}
        del options["file"], options["out"]
        if "other" in options:
            options["other"] = read_mask(options["other"])
        after = OPERATIONS[type(self).__name__.lower()](before, **options)
        edits.save(after, self.out)
        print(f"{self.out}: {edits.changes(before, after)}")


@dataclass(frozen=True, kw_only=True)
class EditClasses(Edit):
    """Edit classes of a mask."""

    classes: Annotated[tuple[str, ...], arg(name="class")]
    """Classes to edit, such as hair,hat."""


@dataclass(frozen=True, kw_only=True)
class Grow(EditClasses):
    """Grow classes of a mask over what is beneath them."""

    by: str
    """Distance: 4 for 4 % of the shorter side, or 5px."""
    over: tuple[str, ...] = ()
    """Additional classes that may be covered, such as l_brow,r_brow by hair."""


@dataclass(frozen=True, kw_only=True)
class Shrink(EditClasses):
    """Shrink classes of a mask away from what is beneath them."""

    by: str
    """Distance: 4 for 4 % of the shorter side, or 5px."""


@dataclass(frozen=True, kw_only=True)
class Remove(EditClasses):
    """Remove classes and uncover what is beneath: skin under glasses, background or skin under hair."""


@dataclass(frozen=True, kw_only=True)
class Mirror(EditClasses):
    """Mirror a mask (default), or classes about the midline of the face: l_brow makes r_brow like itself."""

    classes: Annotated[tuple[str, ...], arg(name="class")] = ()
    """Classes to mirror, such as l_brow."""


@dataclass(frozen=True, kw_only=True)
class Paste(EditClasses):
    """Replace classes with those of another mask."""

    other: PathArgument
    """The other mask, in any supported format."""
    over: tuple[str, ...] = ()
    """Additional classes that may be covered, such as l_brow,r_brow by hair."""
    align: bool = False
    """Align the other face with this one instead of keeping positions."""


@dataclass(frozen=True, kw_only=True)
class Fill(EditClasses):
    """Fill holes inside classes."""


@dataclass(frozen=True, kw_only=True)
class Clean(EditClasses):
    """Remove specks of classes: separate regions below 0.02 % of the image."""


@dataclass(frozen=True, kw_only=True)
class Rename(Edit):
    """Change one class to another, such as hat to hair."""

    old: Annotated[str, arg(name="class")]
    """Class to change."""
    to: str
    """New class."""


@dataclass(frozen=True, kw_only=True)
class Swap(Edit):
    """Swap two classes."""

    classes: Annotated[tuple[str, ...], arg(name="class")]
    """The two classes, such as l_eye,r_eye."""


@dataclass(frozen=True, kw_only=True)
class Interpolate(Edit):
    """Interpolate between two masks."""

    other: PathArgument
    """The other mask, in any supported format."""
    at: float = 0.5
    """Position from 0 (the first mask) to 1 (the second)."""


MAX_CANDIDATES = 100
"""Largest `--candidates`."""


@dataclass(frozen=True, kw_only=True)
class Propose:
    """Generate masks from text, such as "an old man with a beard and a hat". Each is the best of several candidates."""

    prompt: tyro.conf.Positional[str] = ""
    """Description of the face. Without one: any face."""
    count: int = 1
    """Number of masks, at most 1000."""
    seed: int | None = None
    """Seed of the first mask; each further mask uses the next seed. Default: random."""
    candidates: int = 4
    """Candidates for a mask, from 1 to 100: the first that breaks no rule of geometry or of the prompt is taken."""
    out: str | None = None
    """PNG file, its stem for several masks, or a folder, where masks get the next free name mask-001, ... Default: the
    current folder."""
    model: str = MASK_MODEL
    """Bundled model, folder or hub id of a model that generates masks."""
    device: str = "auto"
    """Device, for example cuda or cpu; auto takes an accelerator if present."""

    def __call__(self) -> None:
        from likeness.cli.portraits import adapt_threads, load_pipeline
        from likeness.conditions.mask import edits

        for name, value, most in (("count", self.count, MAX_COUNT), ("candidates", self.candidates, MAX_CANDIDATES)):
            if not 1 <= value <= most:
                raise InputError(f"--{name} is {value}; it must be from 1 to {most}")
        names, overwrite = image_names(self.out, "png", self.count, [], stem="mask")
        first = secrets.randbelow(2**31) if self.seed is None else self.seed
        if overwrite and self.out is not None and Path(self.out).suffix:
            edits.check_suffix(Path(self.out))
        from likeness.pipelines.generate import check_seed
        from likeness.pipelines.propose import propose_mask  # imports scipy

        for seed in (first, first + self.count - 1):
            check_seed(seed)

        with optional_packages_hidden() if self.model in bundled_models() else nullcontext():
            pipeline = load_pipeline(self.model, "auto", self.device)
        adapt_threads(pipeline)
        with exit_on_sigterm(), progress_bar("Generating") as advance:
            for number in range(self.count):
                step = lambda done, all, number=number: advance(number * all + done, self.count * all)  # noqa: E731
                found = propose_mask(pipeline, self.prompt, first + number, candidates=self.candidates, on_step=step)
                name = save_next(names, partial(edits.save, found.labels, overwrite=overwrite))
                print(f"{name}  seed {first + number}{'  breaks: ' * bool(found.broken)}{'; '.join(found.broken)}")


@dataclass(frozen=True, kw_only=True)
class Check:
    """List contradictions between a caption and a mask, such as "bald" with hair."""

    file: PathArgument
    """Mask in any supported format."""
    caption: tyro.conf.Positional[str]
    """Caption in English."""

    def __call__(self) -> None:
        from likeness.conditions.mask.contradictions import contradictions

        print("\n".join(contradictions(read_mask(self.file), self.caption)) or "no contradictions")


def read_mask(file: Path) -> Any:
    """Return canonical labels and log the recognized format and notes."""
    from likeness.conditions import CONDITIONS

    reading = CONDITIONS["mask"].read(file)
    print_notes([f"{file}: {text}" for text in (reading.scheme, *(note.text for note in reading.notes))])
    return reading.raw
