"""The engine of the service: one thread that advances all images, one step at a time.

Images enter and leave between two steps, whatever their prompt, conditions, steps, guidance and seed. On an accelerator
the next `batch` images advance together. On a CPU they take turns, one image per step: rounding depends on the size of
a matrix product, and an image must not depend on what else is generated.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
from PIL import Image

from likeness.pipelines.generate import call_options, resolve
from likeness.pipelines.inputs import EncodedCondition
from likeness.pipelines.output import PortraitOutput
from likeness.pipelines.sampling import Sampling, advance
from likeness.types import InputError, PortraitRequest, TextFeatures

ACTIVE = 8
"""Smallest number of images in progress at a time: they take turns, so that few steps do not wait for many."""

CACHE = 64 * 2**20
"""Bytes of encoded texts and conditions that requests share."""

BATCHES = (1, 2, 4, 8, 16, 32)
"""Batch sizes that `measure_batch` tries."""

log = logging.getLogger(__name__)


class Full(Exception):
    """The queue has no space for the images of a request."""


class Closed(Exception):
    """The engine is shutting down."""


class Event(NamedTuple):
    """What happened to a task. The engine's thread reports it."""

    kind: Literal["started", "preview", "image", "cancelled", "failed"]
    image: Image.Image | None = None
    """The image, or a preview of it."""
    index: int = 0
    """Number of a preview."""
    notes: Sequence[str] = ()
    """Notes on the prompts, with an image."""
    error: Exception | None = None
    """Why the task failed; `InputError` if the request is the reason."""


@dataclass(eq=False, kw_only=True)
class Task:
    """One image."""

    request: PortraitRequest
    """Output of `resolve`."""
    report: Callable[[Event], None]
    """Called in the engine's thread; must return immediately."""
    previews: int = 0
    """Number of previews, fewer if there are fewer steps."""
    edit: Generator[tuple[int, int], None, PortraitOutput] | None = None
    """The steps of an edit (`likeness.prepare.edit.region_steps`); None to generate the image."""
    progress: tuple[int, int] = (0, 0)
    """Steps of the edit that are done, and total steps; 0 before the first one."""
    sampling: Sampling | None = None
    """State of a generation, from the start until it ends."""
    cancelled: bool = False
    """Set by `Engine.cancel`."""

    @property
    def steps(self) -> tuple[int, int]:
        """Steps done and total steps."""
        done, total = self.progress if self.sampling is None else (self.sampling.step, self.sampling.steps)
        return done, total or self.request.num_inference_steps or 1

    def preview_at(self, step: int) -> int | None:
        """Return the number of the preview after a step, or None. They are spread evenly; the last step has none."""
        total = self.steps[1]
        steps = sorted({round(total * (i + 1) / (self.previews + 1)) for i in range(self.previews)} - {0, total})
        return steps.index(step) if step in steps else None


class Engine:
    """The queue and the thread.

    Args:
        pipeline: the pipeline, of which the engine is the only user.
        batch: images per batch.
        queue: largest number of waiting images.
        on_step: called after every step as (seconds, images in it).
    """

    def __init__(
        self,
        pipeline: Any,
        *,
        batch: int = 1,
        queue: int = 64,
        on_step: Callable[[float, int], None] = lambda seconds, images: None,
    ) -> None:
        self.pipeline, self.batch, self.queue, self.on_step = pipeline, batch, queue, on_step
        self.waiting: deque[Task] = deque()
        self.running: deque[Task] = deque()
        self.encoded: dict[Any, TextFeatures | EncodedCondition] = {}
        """Encoded texts and conditions of the last requests, oldest first."""
        self.open = True
        self.seconds_per_image = 0.0
        """Time of an image, for estimates; 0 before the first one."""
        self.changed = threading.Condition()
        self.thread = threading.Thread(target=self._work, name="likeness-engine", daemon=True)

    def start(self) -> None:
        """Start the thread, unless the engine was closed before."""
        with self.changed:
            if self.open:
                self.thread.start()

    def submit(self, tasks: Sequence[Task]) -> None:
        """Queue the tasks of a request: all or none.

        Raises:
            Full: the queue has no space for them.
            Closed: the engine is shutting down.
        """
        with self.changed:
            if not self.open:
                raise Closed
            if len(self.waiting) + len(tasks) > self.queue:
                raise Full
            self.waiting.extend(tasks)
            self.changed.notify()

    def cancel(self, tasks: Sequence[Task]) -> None:
        """Stop tasks before their next step. Those that are complete stay so."""
        with self.changed:
            for task in tasks:
                task.cancelled = True
            self.changed.notify()

    def position(self, task: Task) -> int | None:
        """Return how many images wait before a task, or None if it does not wait."""
        with self.changed:
            return self.waiting.index(task) if task in self.waiting else None

    def seconds_until_free(self) -> int:
        """Estimate when the queue has space again, in whole seconds."""
        return max(1, round((len(self.waiting) + len(self.running)) * self.seconds_per_image / 2))

    def close(self) -> None:
        """Accept nothing more, cancel what was accepted, and wait until the thread ends."""
        with self.changed:
            self.open = False
            for task in (*self.waiting, *self.running):
                task.cancelled = True
            self.changed.notify()
        if self.thread.is_alive():
            self.thread.join()
        for task in self.waiting:  # the thread was never started
            self._report(task, Event("cancelled"))
        self.waiting.clear()

    def _work(self) -> None:
        while tasks := self._next():
            self._advance(tasks)

    def _next(self) -> list[Task]:
        """Wait for the next tasks to advance; none if the engine is closed and everything is complete."""
        with self.changed:
            while True:
                for tasks in (self.waiting, self.running):
                    for task in [task for task in tasks if task.cancelled]:
                        tasks.remove(task)
                        self._report(task, Event("cancelled"))
                while self.waiting and len(self.running) < max(ACTIVE, self.batch):
                    self.running.append(self.waiting.popleft())
                if self.running and self.running[0].edit is not None:
                    return [self.running[0]]
                if self.running:
                    return [task for task in self.running if task.edit is None][: self.batch]
                if not self.open:
                    return []
                self.changed.wait()

    def _advance(self, tasks: Sequence[Task]) -> None:
        """Run one step of some tasks, which then wait for their next turn; an edit is on its own."""
        if tasks[0].edit is not None:
            self._attempt(tasks, lambda: self._edit(tasks[0]))
            return
        ready = [task for task in tasks if self._attempt([task], lambda task=task: self._begin(task))]
        start = time.perf_counter()
        samplings = [task.sampling for task in ready if task.sampling is not None]
        if not ready or not self._attempt(ready, lambda: advance(samplings, together=self.batch > 1)):
            return
        seconds = time.perf_counter() - start
        self.on_step(seconds, len(ready))
        image = seconds / len(ready) * ready[0].steps[1]
        self.seconds_per_image = 0.9 * (self.seconds_per_image or image) + 0.1 * image
        for task in ready:
            self._attempt([task], lambda task=task: self._after(task))

    def _begin(self, task: Task) -> None:
        """Encode the request of a task at its first step."""
        if task.sampling is None:
            task.sampling = sampling_of(self.pipeline, task.request, self.encoded)
            while sum(map(size_of, self.encoded.values())) > CACHE:
                del self.encoded[next(iter(self.encoded))]
            self._report(task, Event("started"))

    def _after(self, task: Task) -> None:
        """Decode the image or a preview if this is the step for it, and let the next task take its turn."""
        assert task.sampling is not None
        step, steps = task.steps
        index = task.preview_at(step)
        if index is not None and not task.cancelled:
            self._report(task, Event("preview", task.sampling.images(preview=True)[0], index))
        images = task.sampling.images() if step == steps else []
        self._turn(task, images, task.sampling.notes)

    def _edit(self, task: Task) -> None:
        """Run one step of an edit, or decode its image after the last one."""
        assert task.edit is not None
        if task.progress == (0, 0):
            self._report(task, Event("started"))
        start, images, notes = time.perf_counter(), [], []
        try:
            task.progress = next(task.edit)
        except StopIteration as end:
            images, notes = end.value.images, end.value.notes
        self.on_step(time.perf_counter() - start, 1)
        self._turn(task, images, notes)

    def _turn(self, task: Task, images: Sequence[Image.Image], notes: Sequence[str]) -> None:
        """Report the image of a task that is complete, or let the next task take its turn."""
        with self.changed:
            self.running.remove(task)
            if not images:
                self.running.append(task)
        if images:
            task.sampling = task.edit = None
            self._report(task, Event("image", images[0], notes=notes))

    def _attempt(self, tasks: Sequence[Task], work: Callable[[], None]) -> bool:
        """Work on tasks; if that fails, they fail and the engine goes on. Returns whether it succeeded."""
        try:
            work()
        except Exception as error:  # also out of memory: other requests must not suffer
            if not isinstance(error, InputError):
                log.exception("An image failed")
            with self.changed:
                for task in tasks:
                    self.running.remove(task)
            for task in tasks:
                task.sampling = task.edit = None
                self._report(task, Event("failed", error=error))
            return False
        return True

    def _report(self, task: Task, event: Event) -> None:
        """Report an event; a receiver that fails, such as a closed event loop, does not stop the engine."""
        try:
            task.report(event)
        except Exception:
            log.exception("An event could not be reported")


def sampling_of(pipeline: Any, request: PortraitRequest, encoded: dict[Any, Any] | None = None) -> Sampling:
    """Return the prepared call for the image of a resolved request."""
    return pipeline(**call_options(request, [request.seed]), encoded=encoded, output_type="sampling")


def size_of(entry: TextFeatures | EncodedCondition) -> int:
    """Return the bytes of an entry of the cache."""
    if isinstance(entry, TextFeatures):
        return entry.tokens.nbytes + entry.pooled.nbytes
    return entry.latent.nbytes + entry.reading.raw.nbytes


def warm_up(pipeline: Any) -> float:
    """Generate an image of the default size; returns its seconds. Also shows that the model works.

    Raises:
        InputError: it does not.
    """
    start = time.perf_counter()
    sampling = sampling_of(pipeline, resolve(PortraitRequest(prompt="a face"), pipeline))
    while sampling.step < sampling.steps:
        advance([sampling])
    sampling.images()
    return time.perf_counter() - start


def measure_batch(pipeline: Any, *, deterministic: bool = False) -> int:
    """Measure the useful batch size: the largest that makes a step at least 10 % faster per image than the one before.

    On a CPU, and if results must not depend on the batch, it is 1.
    """
    best, rate = 1, 0.0
    if deterministic or pipeline._execution_device.type == "cpu":
        return best
    request = resolve(PortraitRequest(prompt="a face", num_inference_steps=4), pipeline)
    for size in BATCHES:
        try:
            samplings = [sampling_of(pipeline, request) for _ in range(size)]
            advance(samplings, together=True)  # compiles kernels
            torch.accelerator.synchronize()
            start = time.perf_counter()
            for _ in range(3):
                advance(samplings, together=True)
            torch.accelerator.synchronize()
        except torch.OutOfMemoryError:
            break
        now = 3 * size / (time.perf_counter() - start)
        if now < 1.1 * rate:
            break
        best, rate = size, now
    return best
