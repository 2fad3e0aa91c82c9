"""Jobs in progress: the images of one request from the queue to their files. All methods run in the event loop."""

from __future__ import annotations

import asyncio
import dataclasses
import logging
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from PIL import Image

from likeness.serve.engine import Engine, Event, Task
from likeness.serve.errors import FINAL, ApiError
from likeness.serve.schema import Generation, PhotoEdit
from likeness.serve.service import Service
from likeness.types import InputError, PortraitRequest

if TYPE_CHECKING:
    from likeness.prepare.edit import Photo, Plan

log = logging.getLogger(__name__)

SHARE = 0.5
"""Seconds between the reports of a replica to the others."""


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


class Jobs:
    """The jobs in progress.

    Args:
        engine: generates images.
        service: encodes and stores them, in its pool of one thread, so that files and events stay in order.
        counted: called as (kind of event) for metrics.
    """

    def __init__(self, engine: Engine, service: Service, counted: Callable[[str], None]) -> None:
        self.engine, self.service, self.store, self.counted = engine, service, service.store, counted
        self.live: dict[str, Job] = {}
        self.closing = ""
        """Why jobs are interrupted; empty while the service runs."""
        self.background: set[asyncio.Task[None]] = set()

    async def in_pool(self, work: Callable[..., Any], *arguments: Any) -> Any:
        """Run blocking work in the pool."""
        return await asyncio.get_running_loop().run_in_executor(self.service.pool, work, *arguments)

    def start(self, job: Job) -> None:
        """Queue a job that the store has.

        Raises:
            Full: the queue has no space.
            Closed: the service is shutting down.
        """
        loop = asyncio.get_running_loop()

        def task(index: int) -> Task:
            def report(event: Event) -> None:
                loop.call_soon_threadsafe(self._receive, job, index, event)

            request = dataclasses.replace(job.request, seed=job.seed(index))
            edit = self.service.edit_steps(job, request)
            return Task(request=request, report=report, previews=job.body.partial_images or 0, edit=edit)

        job.tasks = [task(index) for index in range(job.body.n)]
        job.open = len(job.tasks)
        self.engine.submit(job.tasks)
        self.live[job.id] = job

    def cancel(self, job: Job) -> None:
        """Stop a job before the next step of its images."""
        self.engine.cancel(job.tasks)

    async def share(self) -> None:
        """Report the jobs to the other replicas, if there are any, and cancel those that a client asked them to."""
        while self.store.replica:
            await asyncio.sleep(SHARE)
            if self.live:
                now = {id: (job.state, job.progress) for id, job in self.live.items()}
                try:
                    cancelled = await asyncio.to_thread(self.store.share, now)
                except Exception:
                    log.exception("Jobs could not be reported to other replicas")
                    continue
                for id in cancelled:
                    if id in self.live:
                        self.cancel(self.live[id])

    def _receive(self, job: Job, index: int, event: Event) -> None:
        """Handle an event of the engine."""
        if event.kind == "started":
            job.state = "running"
            return
        task = asyncio.get_running_loop().create_task(self._handle(job, index, event))
        self.background.add(task)  # the loop itself keeps weak references only
        task.add_done_callback(self.background.discard)

    async def _handle(self, job: Job, index: int, event: Event) -> None:
        if event.kind == "preview":
            assert event.image is not None
            _, content = await self.in_pool(self.service.save, job, index, event.image, True)
            job.events.put_nowait({"kind": "partial_image", "b64_json": content, "index": index, "number": event.index})
            return
        if event.kind == "image":
            assert event.image is not None
            job.notes += [note for note in event.notes if note not in job.notes]
            try:
                content = await self.in_pool(self._keep, job, index, event.image)
                job.events.put_nowait({"kind": "completed", "b64_json": content, "index": index})
            except Exception as error:  # such as a full disk
                log.exception("Image %d of the job %s could not be stored", index, job.id)
                event = Event("failed", error=error)
        self.counted(event.kind)
        if event.kind == "failed" and job.error is None:
            job.error = failure(event.error)
            self.engine.cancel(job.tasks)
        job.open -= 1
        if not job.open:
            await self._end(job)

    def _keep(self, job: Job, index: int, image: Image.Image) -> str:
        """Store an image, and with the last one that the job is complete; returns its content. Runs in the pool."""
        job.files[index], job.contents[index] = self.service.save(job, index, image, False)
        if len(job.files) == len(job.tasks):
            files = [job.files[index] for index in sorted(job.files)]
            if not self.store.finish(job.id, "completed", response=response_of(job), files=files):
                message = "Another replica gave the job up, because this one was silent: send the request again"
                raise ApiError(503, message, code="interrupted")
        return job.contents[index]

    async def _end(self, job: Job) -> None:
        """Record the final state of a job, then report it."""
        if job.error is None and len(job.files) == len(job.tasks):
            state = "completed"
        elif job.error is not None:
            state = "failed"
        else:
            state = "interrupted" if self.closing else "cancelled"
            if self.closing:
                job.error = ApiError(503, self.closing, code=state)
            else:
                job.error = ApiError(409, "The job was cancelled", code=state, headers=FINAL)
        try:
            if job.error is not None:
                error = job.error.error
                await self.in_pool(self.store.discard, job.id)
                await self.in_pool(lambda: self.store.finish(job.id, state, error=error))
            job.state = state
        except Exception:  # the database is gone: never report what is not stored
            log.exception("The end of the job %s could not be stored", job.id)
            job.state, job.error = "failed", ApiError(500, "The job could not be stored", code="internal_error")
        del self.live[job.id]
        job.tasks.clear()
        job.events.put_nowait(None)
        job.ended.set()

    async def close(self, timeout: float) -> None:
        """Wait for the jobs in progress, at most `timeout` seconds; interrupt the rest."""
        waits = [asyncio.create_task(job.ended.wait()) for job in self.live.values()]
        if waits:
            await asyncio.wait(waits, timeout=timeout)
        self.closing = self.closing or "The service is shutting down: send the request again"
        await asyncio.to_thread(self.engine.close)
        while self.live:
            await asyncio.sleep(0.01)  # their last events are being stored


def failure(error: Exception | None) -> ApiError:
    """Return the response to a request of which an image failed."""
    if isinstance(error, ApiError):
        return error
    if isinstance(error, InputError):
        return ApiError(400, str(error), code="generation_failed")
    return ApiError(500, "The image could not be generated: the log has the reason", code="generation_failed")
