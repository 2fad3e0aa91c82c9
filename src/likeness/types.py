"""The nouns that every layer shares.

Nothing here computes. A value that crosses a layer boundary is described once, in this file.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

if TYPE_CHECKING:
    import torch


DtypeName = Literal["auto", "fp32", "bf16", "fp16"]
"""Number format of a computation; `auto` depends on the device (`likeness.device.choose_dtype`)."""


class InputError(ValueError):
    """Input cannot be used. The message is one sentence: what is wrong, the offending value, and how to fix it.

    The command line prints it and exits with code 2. Any other exception is a bug and keeps its traceback.

    Args:
        message: the sentence.
        kind: what went wrong, as a short constant such as `wrong-size`, if a caller needs to tell errors apart. No code
            may depend on the text of a message.
    """

    def __init__(self, message: str = "", *, kind: str = "") -> None:
        super().__init__(message)
        self.kind = kind


class Note(NamedTuple):
    """A remark for the user about input that was accepted. Code depends on `kind` only, never on `text`."""

    kind: str
    """What it is about, as a short constant such as `blended-labels`."""
    text: str
    """One sentence."""


class TryAgain(InputError):
    """What the same command, run again, gets past without a change: the command line exits with code 75, by which
    launchers know it (EX_TEMPFAIL of sysexits.h).
    """


class TextFeatures(NamedTuple):
    """What a text encoder says of B captions. A named tuple, so that torch sees the tensors inside."""

    tokens: torch.Tensor
    """Token sequence, [B, L, D]."""
    pooled: torch.Tensor
    """One vector a caption, [B, P]."""


@dataclass(frozen=True, kw_only=True)
class PortraitRequest:
    """One picture to make: the same request for the command line, previews, evaluation and the service.

    The names are those of the pipelines' arguments, which are diffusers' names where diffusers has one.
    """

    prompt: str = ""
    """What to show. The empty string means: no text."""
    negative_prompt: str = ""
    """What to steer away from, when `guidance_scale` is not 1."""
    control_image: Mapping[str, Any] = field(default_factory=dict)
    """Condition name -> path, PIL image or array, as `likeness.conditions` reads it."""
    conditioning_scale: Mapping[str, float] = field(default_factory=dict)
    """Condition name -> strength; 1 where it is not named, 0 means absent."""
    control_guidance_start: Mapping[str, float] = field(default_factory=dict)
    """Condition name -> fraction of the steps at which it begins to act; 0 where it is not named."""
    control_guidance_end: Mapping[str, float] = field(default_factory=dict)
    """Condition name -> fraction of the steps at which it ceases to act; 1 where it is not named."""
    guidance_scale: float | None = None
    """Text guidance g in v = u + g (t - u); 1 means none, None takes the checkpoint's own."""
    num_inference_steps: int | None = None
    """Sampling steps; None takes the checkpoint's own."""
    height: int | None = None
    """Pixels; None takes the checkpoint's own."""
    width: int | None = None
    """Pixels; None takes the checkpoint's own."""
    upscale: bool = False
    """If the model was not trained at this size, generate at the nearest trained size with the same aspect ratio and
    resample."""
    force_size: bool = False
    """Generate at this size even if the model was not trained at it."""
    seed: int = 0
    """Seed of this picture's noise: 0 <= seed < 2**63."""
