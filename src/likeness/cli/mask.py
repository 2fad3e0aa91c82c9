"""Commands that edit masks: `likeness mask ...`. The fields of a command are its options."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import tyro
from tyro.conf import arg

from likeness.cli.terminal import PathArgument, print_notes


@dataclass(frozen=True, kw_only=True)
class Edit:
    """Edit a mask."""

    file: PathArgument
    """Mask in any supported format."""
    out: Path
    """PNG file to write."""

    def __call__(self) -> None:
        from likeness.conditions.mask import edits

        edits.check_suffix(self.out)
        before = read_mask(self.file)
        after = self.edit(edits, before)
        edits.save(after, self.out)
        print(f"{self.out}: {edits.changes(before, after)}")

    def edit(self, edits: Any, mask: Any) -> Any:
        """Return the edited labels, made with the module `likeness.conditions.mask.edits`."""
        raise NotImplementedError


@dataclass(frozen=True, kw_only=True)
class EditClasses(Edit):
    """Edit classes of a mask."""

    classes: Annotated[tuple[str, ...], arg(name="class")]
    """Classes to edit, such as hair."""


@dataclass(frozen=True, kw_only=True)
class Grow(EditClasses):
    """Grow classes of a mask over what is beneath them."""

    by: str
    """Distance: 4 for 4 % of the shorter side, or 5px."""
    over: tuple[str, ...] = ()
    """Additional classes that may be covered, such as l_brow r_brow by hair."""

    def edit(self, edits: Any, mask: Any) -> Any:
        return edits.grow(mask, self.classes, edits.radius_of(self.by, mask.shape), self.over)


@dataclass(frozen=True, kw_only=True)
class Shrink(EditClasses):
    """Shrink classes of a mask away from what is beneath them."""

    by: str
    """Distance: 4 for 4 % of the shorter side, or 5px."""

    def edit(self, edits: Any, mask: Any) -> Any:
        return edits.shrink(mask, self.classes, edits.radius_of(self.by, mask.shape))


@dataclass(frozen=True, kw_only=True)
class Remove(EditClasses):
    """Remove classes and uncover what is beneath: skin under glasses, background or skin under hair."""

    def edit(self, edits: Any, mask: Any) -> Any:
        return edits.remove(mask, self.classes)


@dataclass(frozen=True, kw_only=True)
class Mirror(EditClasses):
    """Mirror a mask (default), or classes about the midline of the face: l_brow makes r_brow like itself."""

    classes: Annotated[tuple[str, ...], arg(name="class")] = ()
    """Classes to mirror, such as l_brow."""

    def edit(self, edits: Any, mask: Any) -> Any:
        return edits.mirror(mask, self.classes)


@dataclass(frozen=True, kw_only=True)
class Paste(EditClasses):
    """Replace classes with those of another mask."""

    other: PathArgument
    """The other mask, in any supported format."""
    over: tuple[str, ...] = ()
    """Additional classes that may be covered, such as l_brow r_brow by hair."""
    align: bool = False
    """Align the other face with this one instead of keeping positions."""

    def edit(self, edits: Any, mask: Any) -> Any:
        return edits.paste(mask, read_mask(self.other), self.classes, self.over, self.align)


@dataclass(frozen=True, kw_only=True)
class Fill(EditClasses):
    """Fill holes inside classes."""

    def edit(self, edits: Any, mask: Any) -> Any:
        return edits.fill_holes(mask, self.classes)


@dataclass(frozen=True, kw_only=True)
class Rename(Edit):
    """Change one class to another, such as hat to hair."""

    old: Annotated[str, arg(name="class")]
    """Class to change."""
    to: str
    """New class."""

    def edit(self, edits: Any, mask: Any) -> Any:
        return edits.rename(mask, self.old, self.to)


@dataclass(frozen=True, kw_only=True)
class Swap(Edit):
    """Swap two classes, such as l_eye and r_eye."""

    classes: Annotated[tuple[str, str], arg(name="class")]
    """The two classes."""

    def edit(self, edits: Any, mask: Any) -> Any:
        return edits.swap(mask, *self.classes)


@dataclass(frozen=True, kw_only=True)
class Interpolate(Edit):
    """Interpolate between two masks."""

    second: PathArgument
    """The other mask, in any supported format."""
    at: float = 0.5
    """Position from 0 (the first mask) to 1 (the second)."""

    def edit(self, edits: Any, mask: Any) -> Any:
        return edits.interpolate(mask, read_mask(self.second), self.at)


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
