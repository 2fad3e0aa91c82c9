"""A request in progress, and the response to it."""

from __future__ import annotations

import asyncio
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from likeness.serve.engine import Task
from likeness.serve.errors import ApiError
from likeness.serve.schema import Generation, PhotoEdit
from likeness.types import PortraitRequest

if TYPE_CHECKING:
    from likeness.prepare.edit import Photo, Plan


@dataclass(eq=False, kw_only=True)
class Job:
    """A request in progress."""

    id: str
    body: Generation | PhotoEdit
    request: PortraitRequest
    """Of its first image."""
    notes: list[str]
    edit: tuple[Photo, Plan] | None = None
    """What is edited, for a `PhotoEdit`."""
    certificates: dict[int, dict[str, int]] = field(default_factory=dict)
    """Image -> changed pixels, for a `PhotoEdit` (`likeness.prepare.edit.Edited`)."""
    created: float = field(default_factory=time.time)
    tasks: list[Task] = field(default_factory=list)
    files: dict[int, str] = field(default_factory=dict)
    """Image -> name of its file."""
    contents: dict[int, str] = field(default_factory=dict)
    """Image -> base64 of its file."""
    open: int = 0
    """Images that are neither stored nor failed nor cancelled."""
    state: str = "queued"
    error: ApiError | None = None
    events: asyncio.Queue[dict[str, Any] | None] = field(default_factory=asyncio.Queue)
    """Previews and completed images for a stream; None at the end."""
    ended: asyncio.Event = field(default_factory=asyncio.Event)

    def seed(self, index: int) -> int:
        """Return the seed of an image."""
        return self.request.seed + index

    @property
    def progress(self) -> float:
        """Fraction of its steps that are done."""
        steps = [task.steps for task in self.tasks]
        done = sum(total if i in self.files else step for i, (step, total) in enumerate(steps))
        return done / max(1, sum(total for _, total in steps))

    @property
    def size(self) -> str:
        """Size of the images."""
        request = self.request
        width, height = (request.width, request.height) if self.edit is None else self.edit[0].image.size
        return f"{width}x{height}"


def response_of(job: Job) -> dict[str, Any]:
    """Return the response of a completed job without its images."""
    return {
        "created": int(job.created),
        "background": "opaque",
        "quality": "auto",
        "output_format": job.body.output_format,
        "size": job.size,
        "id": job.id,
        "seeds": [job.seed(index) for index in range(job.body.n)],
        "notes": job.notes,
        **({"certificates": [job.certificates[index] for index in sorted(job.certificates)]} if job.edit else {}),
    }
