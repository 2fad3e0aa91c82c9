"""Types that all layers share: errors, notes, text features and requests."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

if TYPE_CHECKING:
    import torch


DtypeName = Literal["auto", "fp32", "bf16", "fp16"]
"""Dtype of a computation; `auto` depends on the device (`likeness.device.choose_dtype`)."""


PHOTO = "photo"
"""Condition of networks that fill holes: latents of the photograph outside a region, inside it those of the mask, or
zeros. It is computed (`likeness.pipelines.editing.inpainting`), never read from a file."""


Progress = Callable[[int, int], None]
"""Called as (items done, total)."""

MAX_STEPS = 1000
"""Largest number of sampling steps: that of the training of DDPM."""


class InputError(ValueError):
    """Invalid user input. The command line prints the message and exits with code 2; other exceptions are bugs.

    Args:
        message: what is wrong, the offending value, and how to fix it.
        kind: short constant such as `wrong-size`, if a caller distinguishes errors. No code may depend on the message.
    """

    def __init__(self, message: str = "", *, kind: str = "") -> None:
        super().__init__(message)
        self.kind = kind


def suggestion(name: str, known: Collection[str]) -> str:
    """Return the end of a message about an unknown name: the nearest known one, and all."""
    near = difflib.get_close_matches(name.lower(), known, n=1)
    return f"{f'Did you mean {near[0]}? ' if near else ''}Available: {', '.join(known)}"


class Note(NamedTuple):
    """A note for the user about accepted input. Code depends on `kind` only, never on `text`."""

    kind: str
    """Short constant such as `blended-labels`."""
    text: str
    """One sentence."""


class TryAgain(InputError):
    """An error that does not recur when the same command runs again. The command line exits with code 75, EX_TEMPFAIL
    of sysexits.h, by which launchers recognize it.
    """


class TextFeatures(NamedTuple):
    """Output of a text encoder for B captions. A named tuple, so that torch finds the tensors inside."""

    tokens: torch.Tensor
    """Token features, [B, L, D]."""
    pooled: torch.Tensor
    """Pooled vectors, [B, P]."""


@dataclass(frozen=True, kw_only=True)
class ConditionInput:
    """A condition as requested: its image and how it acts."""

    image: Any
    """A path, PIL image, array or tensor as `likeness.conditions` reads it, or a `Reading`."""
    scale: float = 1.0
    """Strength: 1 as trained, 0 is the same as no condition."""
    start: float = 0.0
    """Fraction of the steps at which it starts to act."""
    end: float = 1.0
    """Fraction of the steps at which it stops acting."""

    def is_active(self, progress: float) -> bool:
        """Return whether it acts when this fraction of the steps is done, 0 <= progress < 1."""
        return self.scale != 0 and self.start <= progress < self.end


@dataclass(frozen=True, kw_only=True)
class PortraitRequest:
    """An image to generate: the request of the command line, previews and evaluation.

    The names are those of the pipelines' arguments, which are diffusers' names if diffusers has one.
    """

    prompt: str = ""
    """Text prompt; "" means no text."""
    negative_prompt: str = ""
    """What the image should not show, if `guidance_scale` is not 1."""
    conditions: Mapping[str, ConditionInput] = field(default_factory=dict)
    """Condition name -> input."""
    guidance_scale: float | None = None
    """Text guidance g in v = u + g (t - u); 1 disables it. Default: that of the checkpoint."""
    num_inference_steps: int | None = None
    """Sampling steps. Default: that of the checkpoint."""
    height: int | None = None
    """Pixels. Default: that of the checkpoint."""
    width: int | None = None
    """Pixels. Default: that of the checkpoint."""
    upscale: bool = False
    """If the model was not trained at this size, generate at the nearest trained size with the same aspect ratio and
    resample."""
    force_size: bool = False
    """Generate at this size even if the model was not trained at it."""
    seed: int = 0
    """Seed of the noise, 0 <= seed < 2**63."""
