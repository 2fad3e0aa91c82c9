"""What the trainings of all components share: the run, the optimizer step, and publishing. Losses are their own."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from likeness.conditions import CONDITIONS
from likeness.data.folder import captions_of, column_of, read_folder
from likeness.device import choose_device
from likeness.files import writing_folder
from likeness.parallel import World
from likeness.train.config import ComponentRecipe, check_component
from likeness.train.ema import Ema
from likeness.train.optim import learning_rate
from likeness.train.progress import Progress
from likeness.train.run_folder import check_single_process, open_run
from likeness.train.train_state import TrainState
from likeness.types import InputError


@contextmanager
def open_component(recipe: Any, run: Path) -> Iterator[tuple[World, list[int]]]:
    """Check the settings that all components have and open their run (`open_run`); yields the device as a `World`, and
    the SIGTERMs received so far.

    Raises:
        InputError: a setting is invalid, there are several processes, or the run has another recipe.
        TryAgain: another process trains in the folder; by the steps of the training, a loss or gradient is not finite,
            or SIGTERM was received and a checkpoint saved: the same command resumes.
    """
    check_single_process(recipe.kind)
    check_component(recipe)
    with open_run(recipe, run) as signals:
        yield World(device=choose_device("auto")), signals


def resume(
    recipe: ComponentRecipe,
    run: Path,
    world: World,
    signals: Sequence[int],
    model: nn.Module,
    optimizers: Sequence[torch.optim.Optimizer],
    published: nn.Module | None = None,
) -> Progress:
    """Resume the training of `model` from the newest checkpoint of `run`, if there is one, and return its steps. The
    EMA is that of `published`, by default the whole model.
    """
    ema = Ema(model if published is None else published, recipe.ema)
    state = TrainState(model=model, optimizers=optimizers, emas=[ema], world=world)
    state.resume(run)
    return Progress(run, state, recipe.images, recipe.batch, signals)


def optimizer_step(progress: Progress, recipe: ComponentRecipe, start: int, max_norm: float = 1.0) -> Tensor:
    """Take the optimizer step that starts at image `start`, with gradients clipped to `max_norm`; return their norm."""
    rate = learning_rate(start, recipe.images, recipe.learning_rate, recipe.warmup)
    return progress.state.step(rate, max_norm)


def publish(
    progress: Progress,
    recipe: ComponentRecipe,
    measure: Callable[[Any], Iterable[dict[str, float]]],
    save: Callable[[Any, Path], Any] = lambda component, folder: component.save_pretrained(folder),
    steps: int = 50,
) -> None:
    """Report, publish the EMA weights of a component to `run/model`, save a checkpoint, and measure them, each if due.

    Args:
        progress: the steps of the training.
        recipe: the recipe.
        measure: maps the published component to values to report.
        save: writes the published component to a folder.
        steps: steps between reports.
    """
    if progress.due(steps * recipe.batch):
        progress.report()
    published = None
    if progress.due(recipe.checkpoint_every):
        progress.check_finite()
        published = progress.state.emas[0].averaged_model()
        with progress.tolerated_write_errors(), writing_folder(progress.run / "model") as folder:
            save(published, folder)
    progress.save(recipe.checkpoint_every)
    if published is not None:  # after the checkpoint: a test image may be unreadable
        for values in measure(published):
            progress.report_values(values)


def rows_with(column: str, folders: Sequence[str]) -> list[dict[str, Any]]:
    """Return the rows of prepared folders that have a column. Raises `InputError` if a folder cannot be read, or no row
    has the column.
    """
    given = captions_of if column == "text" else lambda row: row.get(column)  # captions may be blank
    rows = [row for folder in folders for row in read_folder(folder) if given(row)]
    if not rows:
        raise InputError(f"no row of {', '.join(folders) or 'no folder'} has {column!r}, which the recipe requires")
    return rows


def read_labels(row: dict[str, Any], size: int) -> np.ndarray:
    """Read the mask of a row, resized: labels uint8 [size, size]."""
    mask = CONDITIONS["mask"]
    return mask.resize(mask.read(row[column_of("mask")]).raw, size, size)
