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
    """Widen classes of a mask, such as hair, where they lie on what is beside them.

    Args:
        file: The mask, in any form that is read.
        classes: What grows.
        by: How far: 4 for 4 % of the shorter side, or 5px.
        out: PNG file to write.
        over: What may be covered besides, such as l_brow r_brow by hair.
    """
    from likeness.conditions import edits

    edit_mask(file, out, lambda labels: edits.grow(labels, classes, edits.radius_of(by, labels.shape), over))


def shrink(file: PathArgument, *, classes: ClassNames, by: str, out: Path) -> None:
    """Draw classes of a mask back from what they lie on.

    Args:
        file: The mask.
        classes: What shrinks.
        by: How far: 4 for 4 % of the shorter side, or 5px.
        out: PNG file to write.
    """
    from likeness.conditions import edits

    edit_mask(file, out, lambda labels: edits.shrink(labels, classes, edits.radius_of(by, labels.shape)))


def remove(file: PathArgument, *, classes: ClassNames, out: Path) -> None:
    """Take classes away; what lies beneath shows: skin under glasses, background or skin under hair.

    Args:
        file: The mask.
        classes: What to remove.
        out: PNG file to write.
    """
    from likeness.conditions import edits

    edit_mask(file, out, lambda labels: edits.remove(labels, classes))


def mirror(file: PathArgument, *, out: Path, classes: ClassNames = ()) -> None:
    """Mirror a whole mask, or classes about the middle of the face: l_brow makes the right brow like the left one.

    Args:
        file: The mask.
        out: PNG file to write.
        classes: What to mirror; everything by default.
    """
    from likeness.conditions import edits

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
    """Replace classes by those of another mask.

    Args:
        file: The mask.
        other: The mask to take them from.
        classes: What to take, such as hat.
        out: PNG file to write.
        over: What may be covered besides what they lie on.
        align: Lay the other face on this one, instead of taking positions as they are.
    """
    from likeness.conditions import edits

    theirs = read_mask(other)
    edit_mask(file, out, lambda labels: edits.paste(labels, theirs, classes, over, align))


def fill(file: PathArgument, *, classes: ClassNames, out: Path) -> None:
    """Close the holes inside classes.

    Args:
        file: The mask.
        classes: What to close.
        out: PNG file to write.
    """
    from likeness.conditions import edits

    edit_mask(file, out, lambda labels: edits.fill_holes(labels, classes))


def rename(file: PathArgument, *, old: ClassName, to: str, out: Path) -> None:
    """Make one class another, such as hat to hair.

    Args:
        file: The mask.
        old: The class as it is.
        to: The class to be.
        out: PNG file to write.
    """
    from likeness.conditions import edits

    edit_mask(file, out, lambda labels: edits.rename(labels, old, to))


def exchange(
    file: PathArgument, *, classes: Annotated[tuple[str, str], tyro.conf.arg(name="class")], out: Path
) -> None:
    """Let two classes change places, such as l_eye and r_eye.

    Args:
        file: The mask.
        classes: The two.
        out: PNG file to write.
    """
    from likeness.conditions import edits

    edit_mask(file, out, lambda labels: edits.exchange(labels, *classes))


def interpolate(first: PathArgument, second: PathArgument, *, at: float = 0.5, out: Path) -> None:
    """Make a mask between two.

    Args:
        first: The mask at 0.
        second: The mask at 1.
        at: Where between them.
        out: PNG file to write.
    """
    from likeness.conditions import edits

    end = read_mask(second)
    edit_mask(first, out, lambda labels: edits.interpolate(labels, end, at))


def check(file: PathArgument, caption: tyro.conf.Positional[str]) -> None:
    """Say where a caption contradicts a mask, such as "bald" over hair.

    Args:
        file: The mask.
        caption: The words.
    """
    from likeness.conditions.contradictions import contradictions

    print("\n".join(contradictions(read_mask(file), caption)) or "no contradictions")


def read_mask(file: Path) -> Any:
    """Canonical labels, with notes of what the file was recognised as."""
    from likeness.conditions import CONDITIONS

    reading = CONDITIONS["mask"].read(file)
    tell([f"{file}: {sentence}" for sentence in (reading.scheme, *(note.text for note in reading.notes))])
    return reading.raw


def edit_mask(file: Path, out: Path, edit: Callable[[Any], Any]) -> None:
    """Read a mask, change it, write it, and say what became of each class."""
    from likeness.conditions import edits

    edits.check_ending(out)
    before = read_mask(file)
    after = edit(before)
    edits.save(after, out)
    print(f"{out}: {edits.changes(before, after)}")
