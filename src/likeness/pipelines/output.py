"""What a pipeline returns."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from diffusers.utils import BaseOutput


@dataclass
class PortraitOutput(BaseOutput):
    """Portraits, and what is worth knowing of how their inputs were read."""

    images: Any
    """B pictures: PIL images, float32 array [B, H, W, 3] in [0, 1], tensor [B, 3, H, W] in [0, 1], or latents."""
    notes: list[str] = field(default_factory=list)
    """What each condition was recognised as, and which words of a prompt did not fit; one sentence each."""
