"""Commands that edit masks: `likeness mask ...`."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import tyro

from likeness.cli.terminal import PathArgument, tell

ClassNames = Annotated[tuple[str, ...], tyro.conf.arg(name="class")]
ClassName = Annotated[str, tyro.conf.arg(name="class")]


def grow(file: PathArgument, *, classes: ClassNames, by: str, out: Path, over: tuple[str, ...] = ()) -> None:
    """Grow classes of a mask, such as hair, over what is beneath them.

    Args:
        file: Mask in any supported format.
        classes: Classes to grow.
        by: Distance: 4 for 4 % of the shorter side, or 5px.
        out: PNG file to write.
        over: Additional classes that may be covered, such as l_brow r_brow by hair.
    """
    from likeness.conditions.mask import edits

    edit_mask(file, out, lambda labels: edits.grow(labels, classes, edits.radius_of(by, labels.shape), over))


def shrink(file: PathArgument, *, classes: ClassNames, by: str, out: Path) -> None:
    """Shrink classes of a mask away from what is beneath them.

    Args:
        file: Mask in any supported format.
        classes: Classes to shrink.
        by: Distance: 4 for 4 % of the shorter side, or 5px.
        out: PNG file to write.
    """
    from likeness.conditions.mask import edits

    edit_mask(file, out, lambda labels: edits.shrink(labels, classes, edits.radius_of(by, labels.shape)))


def remove(file: PathArgument, *, classes: ClassNames, out: Path) -> None:
    """Remove classes and uncover what is beneath: skin under glasses, background or skin under hair.

    Args:
        file: Mask in any supported format.
        classes: Classes to remove.
        out: PNG file to write.
    """
    from likeness.conditions.mask import edits

    edit_mask(file, out, lambda labels: edits.remove(labels, classes))


def mirror(file: PathArgument, *, out: Path, classes: ClassNames = ()) -> None:
    """Mirror a mask, or classes about the midline of the face: l_brow makes the right brow like the left one.

    Args:
        file: Mask in any supported format.
        out: PNG file to write.
        classes: Classes to mirror. Default: the whole mask.
    """
    from likeness.conditions.mask import edits

    edit_mask(file, out, lambda labels: edits.mirror(labels, classes))


def paste(
    file: PathArgument,
    other: PathArgument,
    *,
    classes: ClassNames,
    out: Path,
    over: tuple[str, ...] = (),
    align: bool = False,
) -> None:
    """Replace classes with those of another mask.

    Args:
        file: Mask in any supported format.
        other: Mask that has the classes.
        classes: Classes to paste, such as hat.
        out: PNG file to write.
        over: Additional classes that may be covered.
        align: Align the other face with this one instead of keeping positions.
    """
    from likeness.conditions.mask import edits

    source = read_mask(other)
    edit_mask(file, out, lambda labels: edits.paste(labels, source, classes, over, align))


def fill(file: PathArgument, *, classes: ClassNames, out: Path) -> None:
    """Fill holes inside classes.

    Args:
        file: Mask in any supported format.
        classes: Classes to fill.
        out: PNG file to write.
    """
    from likeness.conditions.mask import edits

    edit_mask(file, out, lambda labels: edits.fill_holes(labels, classes))


def rename(file: PathArgument, *, old: ClassName, to: str, out: Path) -> None:
    """Change one class to another, such as hat to hair.

    Args:
        file: Mask in any supported format.
        old: Class to change.
        to: New class.
        out: PNG file to write.
    """
    from likeness.conditions.mask import edits

    edit_mask(file, out, lambda labels: edits.rename(labels, old, to))


def swap(file: PathArgument, *, classes: Annotated[tuple[str, str], tyro.conf.arg(name="class")], out: Path) -> None:
    """Swap two classes, such as l_eye and r_eye.

    Args:
        file: Mask in any supported format.
        classes: The two classes.
        out: PNG file to write.
    """
    from likeness.conditions.mask import edits

    edit_mask(file, out, lambda labels: edits.swap(labels, *classes))


def interpolate(first: PathArgument, second: PathArgument, *, at: float = 0.5, out: Path) -> None:
    """Interpolate between two masks.

    Args:
        first: Mask at position 0.
        second: Mask at position 1.
        at: Position between them, 0 to 1.
        out: PNG file to write.
    """
    from likeness.conditions.mask import edits

    end = read_mask(second)
    edit_mask(first, out, lambda labels: edits.interpolate(labels, end, at))


def check(file: PathArgument, caption: tyro.conf.Positional[str]) -> None:
    """List contradictions between a caption and a mask, such as "bald" with hair.

    Args:
        file: Mask in any supported format.
        caption: Caption in English.
    """
    from likeness.conditions.mask.contradictions import contradictions

    print("\n".join(contradictions(read_mask(file), caption)) or "no contradictions")


def read_mask(file: Path) -> Any:
    """Return canonical labels and log the recognized format and notes."""
    from likeness.conditions import CONDITIONS

    reading = CONDITIONS["mask"].read(file)
    tell([f"{file}: {text}" for text in (reading.scheme, *(note.text for note in reading.notes))])
    return reading.raw


def edit_mask(file: Path, out: Path, edit: Callable[[Any], Any]) -> None:
    """Read, edit and write a mask, and print how each class changed."""
    from likeness.conditions.mask import edits

    edits.check_suffix(out)
    before = read_mask(file)
    after = edit(before)
    edits.save(after, out)
    print(f"{out}: {edits.changes(before, after)}")
