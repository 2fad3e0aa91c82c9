"""`likeness edit`: change one region of a photograph. The fields of the command are its options."""

from __future__ import annotations

import secrets
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import tyro

from likeness.cli.output import exit_on_sigterm, image_names
from likeness.cli.portraits import ModelOptions, adapt_threads, load_pipeline
from likeness.cli.terminal import PathArgument, print_notes, progress_bar
from likeness.types import InputError, PortraitRequest

if TYPE_CHECKING:
    import numpy as np


@dataclass(frozen=True, kw_only=True)
class Edit(ModelOptions):
    """Change one region of a photograph. All other pixels of the file stay identical."""

    photo: PathArgument
    """The photograph: PNG, JPEG, WebP, ... with 8 bits per value."""
    prompt: tyro.conf.Positional[str] = ""
    """Text prompt for the region, such as "red hair"."""
    out: Path
    """File to write, .png or .webp."""
    mask_edit: str = ""
    """Edits of the face's mask, such as "grow hair 8; remove glasses; paste hat from other.png"."""
    mask: Path | None = None
    """The wanted mask, of the size of the photograph, or square: of the aligned face."""
    region: tuple[str, ...] = ()
    """Classes to generate again, such as hair,hat."""
    region_mask: Path | None = None
    """Image whose white pixels are generated again, of the same sizes as MASK."""
    keep: str = ""
    """Classes whose pixels stay, such as "skin, eyes" or "all but hair"."""
    strength: float | None = None
    """Fraction of the steps that run, greater than 0, at most 1; smaller stays closer to the photograph. Default: 1. On
    its own it changes the whole face (image to image)."""
    method: str | None = None
    """replacement, image_to_image, langevin, flow_edit, inversion or inpainting. Default: if the mask changes,
    inversion, or flow_edit in fewer than 8 steps; else replacement."""
    face: int | None = None
    """Number of the face by size. Default: 1, the largest."""
    landmarker: Path | None = None
    """MediaPipe's face_landmarker.task. Without it the photograph must be an aligned square face."""
    parser: str = "bundled"
    """Face parser: bundled, a folder or a hub id."""
    negative_prompt: str = ""
    """What the region should not show."""
    seed: int | None = None
    """Seed. Default: random."""
    metadata: bool = True
    """Write the recipe and the label for generated media into the file."""

    def __call__(self) -> None:
        from likeness.annotators.face_parser import load_face_parser
        from likeness.annotators.landmarks import open_face_finder
        from likeness.files import write_whole
        from likeness.prepare.edit import Change, edit_photo, lossless_format, open_photo, read_labels
        from likeness.weights.hashes import pipeline_hash

        kind = lossless_format(self.out)
        given = self.mask_edit or self.mask or any(self.region) or self.region_mask or self.strength is not None
        if not given:
            options = "--mask-edit, --mask, --region, --region-mask or --strength"
            raise InputError(f"there is nothing to edit: pass {options}")

        def read(file: str | Path) -> np.ndarray:
            check([Path(file)])
            return read_labels(file)

        check = partial(image_names, str(self.out), "png", 1)  # whether it may be written
        check(filter(None, (self.photo, self.mask, self.region_mask)))
        photo = open_photo(self.photo)
        change = Change(
            mask_edit=self.mask_edit,
            mask=self.mask,
            region=self.region,
            region_mask=self.region_mask,
            keep=self.keep,
            face=self.face,
            whole=self.strength is not None,
        )
        seed = secrets.randbelow(2**31) if self.seed is None else self.seed
        request = PortraitRequest(
            prompt=self.prompt,
            negative_prompt=self.negative_prompt,
            num_inference_steps=self.steps,
            guidance_scale=self.guidance_scale,
            seed=seed,
        )
        with ExitStack() as stack:
            find = None if self.landmarker is None else stack.enter_context(open_face_finder(self.landmarker))
            pipeline = load_pipeline(self.model, self.dtype, self.device, self.base)
            adapt_threads(pipeline)
            stack.enter_context(exit_on_sigterm())
            edited = edit_photo(
                pipeline,
                photo,
                change,
                request,
                kind=kind,
                strength=1.0 if self.strength is None else self.strength,
                method=self.method,
                find=find,
                read=read,
                parser=load_face_parser(self.parser),
                metadata=self.metadata,
                fingerprint=pipeline_hash(pipeline) if self.metadata else "",
                on_step=stack.enter_context(progress_bar("Generating")),
            )
        print_notes(edited.notes)
        write_whole(self.out, edited.content)
        counts = edited.certificate
        share = counts["region_pixels"] / counts["photo_pixels"]
        print(f"{self.out}  seed {seed}  region {share:.1%}, pixels changed outside it: {counts['changed_outside']}")
