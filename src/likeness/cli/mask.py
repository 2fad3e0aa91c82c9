"""Commands that edit masks: `likeness mask ...`."""

from __future__ import annotations

import secrets
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import tyro
from tyro.conf import arg

from likeness.cli.output import exit_on_sigterm, image_names
from likeness.cli.terminal import PathArgument, print_notes, progress_bar
from likeness.runtime import optional_packages_hidden
from likeness.types import InputError
from likeness.weights.catalog import MASK_MODEL, bundled_models

Mask = Annotated[PathArgument, arg(help="Mask in any supported format.")]
Out = Annotated[Path, arg(help="PNG file to write.")]
ClassName = Annotated[str, arg(name="class", help="Class to change.")]
ClassNames = Annotated[tuple[str, ...], arg(name="class", help="Classes to edit, such as hair.")]
Pair = Annotated[tuple[str, str], arg(name="class", help="The two classes.")]
Distance = Annotated[str, arg(help="Distance: 4 for 4 % of the shorter side, or 5px.")]
Over = Annotated[tuple[str, ...], arg(help="Additional classes that may be covered, such as l_brow r_brow by hair.")]


def grow(file: Mask, *, classes: ClassNames, by: Distance, out: Out, over: Over = ()) -> None:
    """Grow classes of a mask over what is beneath them."""
    edit_mask(file, out, lambda edits, mask: edits.grow(mask, classes, edits.radius_of(by, mask.shape), over))


def shrink(file: Mask, *, classes: ClassNames, by: Distance, out: Out) -> None:
    """Shrink classes of a mask away from what is beneath them."""
    edit_mask(file, out, lambda edits, mask: edits.shrink(mask, classes, edits.radius_of(by, mask.shape)))


def remove(file: Mask, *, classes: ClassNames, out: Out) -> None:
    """Remove classes and uncover what is beneath: skin under glasses, background or skin under hair."""
    edit_mask(file, out, lambda edits, mask: edits.remove(mask, classes))


def mirror(file: Mask, *, out: Out, classes: ClassNames = ()) -> None:
    """Mirror a mask (default), or classes about the midline of the face: l_brow makes r_brow like itself."""
    edit_mask(file, out, lambda edits, mask: edits.mirror(mask, classes))


def paste(file: Mask, other: Mask, *, classes: ClassNames, out: Out, over: Over = (), align: bool = False) -> None:
    """Replace classes with those of another mask.

    Args:
        align: Align the other face with this one instead of keeping positions.
    """
    source = read_mask(other)
    edit_mask(file, out, lambda edits, mask: edits.paste(mask, source, classes, over, align))


def fill(file: Mask, *, classes: ClassNames, out: Out) -> None:
    """Fill holes inside classes."""
    edit_mask(file, out, lambda edits, mask: edits.fill_holes(mask, classes))


def rename(file: Mask, *, old: ClassName, to: str, out: Out) -> None:
    """Change one class to another, such as hat to hair.

    Args:
        to: New class.
    """
    edit_mask(file, out, lambda edits, mask: edits.rename(mask, old, to))


def swap(file: Mask, *, classes: Pair, out: Out) -> None:
    """Swap two classes, such as l_eye and r_eye."""
    edit_mask(file, out, lambda edits, mask: edits.swap(mask, *classes))


def interpolate(first: Mask, second: Mask, *, at: float = 0.5, out: Out) -> None:
    """Interpolate between two masks.

    Args:
        at: Position from 0 (the first mask) to 1 (the second).
    """
    end = read_mask(second)
    edit_mask(first, out, lambda edits, mask: edits.interpolate(mask, end, at))


@dataclass(frozen=True, kw_only=True)
class Propose:
    """Generate masks from text, such as "an old man with a beard and a hat". Each is the best of several candidates."""

    prompt: tyro.conf.Positional[str] = ""
    """Description of the face. Without one: any face."""
    count: int = 1
    """Number of masks."""
    seed: int | None = None
    """Seed of the first mask; each further mask uses the next seed. Default: random."""
    candidates: int = 4
    """Largest number of candidates for a mask; the first that breaks no rule of geometry or of the prompt is chosen."""
    out: str | None = None
    """PNG file, its stem for several masks, or a folder, where masks get the next free name mask-001, ... Default: the
    current folder."""
    model: str = MASK_MODEL
    """Bundled model, folder or hub id of a model that generates masks."""
    device: str = "auto"
    """Device, for example cuda or cpu; auto takes an accelerator if present."""

    def __call__(self) -> None:
        from likeness.cli.portraits import load_pipeline
        from likeness.conditions.mask import edits

        if self.count < 1:
            raise InputError(f"--count is {self.count}; it must be at least 1")
        names, _ = image_names(self.out, "png", self.count, [], stem="mask")
        first = secrets.randbelow(2**31) if self.seed is None else self.seed
        if self.out is not None and Path(self.out).suffix:
            edits.check_suffix(Path(self.out))
        with optional_packages_hidden() if self.model in bundled_models() else nullcontext():
            from likeness.pipelines.propose import propose_mask

            pipeline = load_pipeline(self.model, "auto", self.device)
        with exit_on_sigterm(), progress_bar("Generating") as advance:
            for number, name in zip(range(self.count), names, strict=False):
                step = lambda done, all, number=number: advance(number * all + done, self.count * all)  # noqa: E731
                found = propose_mask(pipeline, self.prompt, first + number, candidates=self.candidates, on_step=step)
                edits.save(found.labels, name)
                print(f"{name}  seed {first + number}{'  breaks: ' * bool(found.broken)}{'; '.join(found.broken)}")


def check(file: Mask, caption: tyro.conf.Positional[str]) -> None:
    """List contradictions between a caption and a mask, such as "bald" with hair.

    Args:
        caption: Caption in English.
    """
    from likeness.conditions.mask.contradictions import contradictions

    print("\n".join(contradictions(read_mask(file), caption)) or "no contradictions")


def read_mask(file: Path) -> Any:
    """Return canonical labels and log the recognized format and notes."""
    from likeness.conditions import CONDITIONS

    reading = CONDITIONS["mask"].read(file)
    print_notes([f"{file}: {text}" for text in (reading.scheme, *(note.text for note in reading.notes))])
    return reading.raw


def edit_mask(file: Path, out: Path, edit: Callable[[Any, Any], Any]) -> None:
    """Read, edit and write a mask, and print how each class changed.

    Args:
        edit: (module `likeness.conditions.mask.edits`, labels) -> labels.
    """
    from likeness.conditions.mask import edits

    edits.check_suffix(out)
    before = read_mask(file)
    after = edit(edits, before)
    edits.save(after, out)
    print(f"{out}: {edits.changes(before, after)}")
