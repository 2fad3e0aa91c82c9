"""What every training does around its steps: skip bad batches, report, save checkpoints, stop on SIGTERM.

Progress is counted in images. Values are recorded as tensors and read only for a report or a checkpoint, so that steps
need no host synchronization; a non-finite value is therefore found some steps later, but before anything is saved.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from likeness.files import log_line, write_whole
from likeness.parallel import mean_over_ranks
from likeness.train.checkpoint import save_checkpoint
from likeness.train.metrics import Reporter
from likeness.train.train_state import TrainState
from likeness.types import InputError, TryAgain

B = TypeVar("B")

NON_FINITE = "non_finite.jsonl"
"""Batches with a non-finite loss or gradient; a resumed run skips them."""
MAX_NON_FINITE = 3
"""With more such batches, the data are not the cause."""


class Progress:
    """The steps of a training in the folder `run`: from a state, after resuming, to `images` images, `batch` each.

    `signals` are the SIGTERMs received so far; the training stops after the step in which one arrives. `recipe` may
    request TensorBoard or Weights & Biases. Raises `InputError` if there are too many non-finite batches, or the folder
    cannot be written.
    """

    def __init__(
        self, run: Path, state: TrainState, images: int, batch: int, signals: Sequence[int], recipe: Any = None
    ) -> None:
        skipped = non_finite_batches(run)
        self.run, self.state, self.batch, self.signals = run, state, batch, signals
        self.starts = [start for start in range(state.images_seen, images, batch) if start not in skipped]
        """First image of each step."""
        with state.world.joint_errors():
            total = -(-images // batch) * batch
            self.reporter = Reporter(run, total, state.images_seen, recipe) if state.world.main else None
        if self.reporter and not self.starts:
            log_line(
                f"{run} is finished: it has seen {state.images_seen:,} images. A larger number of images continues the "
                "training; changed defaults and previews take effect with it"
            )
        self.recent: list[tuple[int, Mapping[str, Tensor]]] = []
        self.previous, self.last, self.stopping = state.images_seen, False, False

    def steps(self, batches: Iterable[B]) -> Iterator[tuple[int, B]]:
        """Yield the first image and the batch of every step."""
        for start, batch in zip(self.starts, batches, strict=True):
            self.previous, self.state.images_seen = self.state.images_seen, start
            yield start, batch
        if self.reporter:
            self.reporter.close()

    def end_step(self, **values: Tensor) -> None:
        """Count the images of a step, update the EMAs and record scalar values to report."""
        start = self.state.images_seen
        self.recent.append((start, {name: value.detach() for name, value in values.items()}))
        self.state.count(self.batch)
        self.last = start == self.starts[-1]
        self.stopping = not self.state.world.all_true(not self.signals) and not self.last

    def due(self, every: int) -> bool:
        """Return whether a multiple of `every` images was reached in this step, or training ends with it."""
        return every > 0 and (self.last or self.state.images_seen // every != self.previous // every)

    def report(self, **more: float) -> None:
        """Report the means of the values since the last report, and `more` values. Call on every rank."""
        self.report_values(self.check_finite() | more)
        self.recent.clear()

    def report_values(self, values: Mapping[str, float]) -> None:
        """Report measured values."""
        if self.reporter:
            self.reporter.report(self.state.images_seen, **values)

    def save(self, every: int, state: Any = None, keep: int = 2) -> None:
        """Save a checkpoint if it is due or the training stops, and keep the newest `keep`. If the disk is full,
        training continues with a warning and the next checkpoint tries again. `state` has a method `tensors`, as
        `TrainState`; by default it is the state whose steps these are.

        Raises:
            TryAgain: SIGTERM was received; a checkpoint was saved.
            InputError: the last checkpoint cannot be written.
        """
        seen = self.state.images_seen
        if self.due(every) or self.stopping:
            self.check_finite()
            with self.tolerated_write_errors():
                save_checkpoint(self.run, seen, (state or self.state).tensors(), keep, self.state.world)
        if self.stopping:
            raise TryAgain(f"stopped by SIGTERM after {seen:,} images: run the same command again to resume")

    @contextmanager
    def tolerated_write_errors(self, *, always: bool = False) -> Iterator[None]:
        """Turn an error within a `with` block into a warning, unless the training ends with this step, or `always`."""
        try:
            yield
        except InputError as error:
            if (self.last or self.stopping) and not always:
                raise
            log_line(f"{error}; training continues")

    def check_finite(self) -> dict[str, float]:
        """Return the mean of each value since the last report, over the steps that have it and over all processes.

        Raises:
            TryAgain: on every rank, a value is not finite; the batch is recorded and skipped when resuming.
        """
        world, means = self.state.world, {}
        bad: dict[int, dict[str, str]] = {}
        for name in dict.fromkeys(name for _, values in self.recent for name in values):
            starts = [start for start, values in self.recent if name in values]
            stacked = torch.stack([values[name].float() for _, values in self.recent if name in values])
            stacked = mean_over_ranks(stacked, world)
            means[name] = stacked.mean().item()
            for index in (~stacked.isfinite()).nonzero().flatten().tolist():
                bad.setdefault(starts[index], {})[name] = str(stacked[index].item())
        if not bad:
            return means
        start, path = min(bad), self.run / NON_FINITE
        end = start + self.batch - 1
        with world.joint_errors():
            earlier = path.read_text(encoding="utf-8") if path.is_file() else ""
            if world.main:
                line = json.dumps({"start": start, "positions": [start, end], **bad[start]})
                write_whole(path, f"{earlier}{line}\n")
        found = " and ".join(f"the {name.replace('_', ' ')} is {value}" for name, value in bad[start].items())
        raise TryAgain(
            f"{found} in the batch of images {start} to {end} (recorded in {path}): run the same command again to "
            "resume from the last checkpoint without this batch, or lower the learning rate in a new run"
        )


def non_finite_batches(run: Path) -> set[int]:
    """Return the first images of the batches to skip. Raises `InputError` if there are too many."""
    path = run / NON_FINITE
    lines = path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
    if len(lines) > MAX_NON_FINITE:
        raise InputError(
            f"{path} names {len(lines)} batches with a non-finite loss or gradient: lower the learning rate in a new "
            "run, or delete the file to try these batches again"
        )
    return {json.loads(line)["start"] for line in lines}
