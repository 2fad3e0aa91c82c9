"""The folder of a run: its recipe, and a lock of the operating system, so that one training at a time writes to it."""

from __future__ import annotations

import json
import signal
import threading
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn

from likeness.config import build, to_dict
from likeness.data.store import Store
from likeness.files import delete_partials, locked, log_line, read_json, write_whole
from likeness.parallel import SINGLE_PROCESS, World, rank_and_world
from likeness.train.checkpoint import delete_incomplete, newest
from likeness.train.config import (
    RESUMABLE_CHANGES,
    DataRecipe,
    condition_names,
    condition_probability,
)
from likeness.train.metrics import read_metrics
from likeness.types import PHOTO, InputError
from likeness.weights.hashes import weights_hash


@contextmanager
def open_run(recipe: Any, run: Path, world: World = SINGLE_PROCESS) -> Iterator[list[int]]:
    """Lock the folder of a run and store its recipe within a `with` block, and set the number of threads.

    Yields:
        The SIGTERMs received so far: schedulers announce the time limit by them.

    Raises:
        TryAgain: another process trains in the folder.
        InputError: the folder has another recipe, or it cannot be written.
    """
    with ExitStack() as stack:
        with world.joint_errors():
            if world.main:
                stack.enter_context(locked(run))
                store_recipe(recipe, run)
                delete_partials(run, ("previews", "averages", "checkpoints"))
                delete_incomplete(run)
        if recipe.threads:
            torch.set_num_threads(recipe.threads)
        yield stack.enter_context(collected_sigterms())


def check_single_process(kind: str) -> None:
    """Reject a launch of several processes, which would write the same files. Raises `InputError`."""
    if rank_and_world()[1] > 1:
        raise InputError(f"kind {kind!r} is trained by one process: run `likeness train` without torchrun")


@contextmanager
def collected_sigterms() -> Iterator[list[int]]:
    """Collect the SIGTERMs received within a `with` block. Python passes signals to its main thread only."""
    signals: list[int] = []
    if threading.current_thread() is not threading.main_thread():
        yield signals
        return
    before = signal.signal(signal.SIGTERM, lambda number, _: signals.append(number))
    try:
        yield signals
    finally:
        signal.signal(signal.SIGTERM, before or signal.SIG_DFL)


def store_recipe(recipe: Any, run: Path) -> None:
    """Write `run/recipe.json`, the resolved recipe. Raises `InputError` if the run has checkpoints of another one, has
    seen more images, or is finished and has none.
    """
    path, values, checkpoint = run / "recipe.json", to_dict(recipe), newest(run)
    if checkpoint is None and (run / "model").exists() and is_finished(run):
        raise InputError(
            f"{run} contains a trained model, but its checkpoints are gone: choose another folder, or delete "
            f"{run / 'model'} to train again"
        )
    if path.is_file() and checkpoint is not None:
        length, seen = getattr(recipe, "optimizer", recipe), int(checkpoint.name)
        if seen >= length.images + length.batch:
            raise InputError(
                f"images is {length.images}, but {run} has already seen {seen}: set at least {seen}, or choose another "
                "folder"
            )
        changes = RESUMABLE_CHANGES.get(recipe.kind, RESUMABLE_CHANGES["component"]).split()
        stored = build(type(recipe), read_json(path), where=str(path))
        before, after = fixed_values(to_dict(stored), changes), fixed_values(values, changes)
        if changed := [key for key, value in after.items() if before[key] != value]:
            raise InputError(
                f"{run} was started with another {changed[0]}: choose another folder, or restore the recipe"
            )
    write_whole(path, json.dumps(values, indent=2))


def is_finished(run: Path) -> bool:
    """Return whether a run has reported its last step."""
    lines = read_metrics(run)
    recipe = read_json(run / "recipe.json") if (run / "recipe.json").is_file() else {}
    images = recipe.get("optimizer", recipe).get("images")
    return bool(lines) and images is not None and lines[-1]["seen"] >= images


def record_frozen(model: nn.Module, run: Path) -> None:
    """Write `run/frozen.json`, the hash of the frozen weights, if any. Raises `InputError` if a run is resumed with
    others: checkpoints do not contain them.
    """
    path = run / "frozen.json"
    trained = tuple(name for name, parameter in model.named_parameters() if parameter.requires_grad)
    if all(name in trained for name, _ in model.named_parameters()):
        return
    now = {"weights": weights_hash(model, without=trained)}
    if path.is_file() and newest(run) and read_json(path) != now:
        raise InputError(
            f"{run} was started with other frozen weights: restore the model that the recipe names, or start a new run"
        )
    write_whole(path, json.dumps(now, indent=2))


def record_data(stores: Sequence[Store], run: Path, recipe: DataRecipe) -> None:
    """Write `run/data.json`, the hashes of the shards. Report on stderr if a run is resumed with other shards, or faces
    have no captions or lack a condition of the recipe.
    """
    path = run / "data.json"
    now: list[dict[str, Any]] = [{"faces": len(store), "hash": store.content_hash()} for store in stores]
    before = read_json(path)["shards"] if path.is_file() and newest(run) else now
    if before != now:
        then, faces = (sum(store["faces"] for store in shards) for shards in (before, now))
        message = f"{run} was started with other shards: {then} samples then, {faces} now; training continues"
        log_line(message)
    if uncaptioned := sum(store.uncaptioned() for store in stores):
        total = sum(len(store.rows) for store in stores)
        message = (
            f"{uncaptioned} of {total} faces have no captions: they are trained with empty text. `likeness prepare "
            "caption FOLDER --grammar --attributes bundled` writes captions; encode the folder again afterwards"
        )
        log_line(message)
    for name in condition_names(recipe):
        lacking = 0 if name == PHOTO else sum(store.lacking(name) for store in stores)
        if lacking and condition_probability(recipe, name):
            total = sum(store["faces"] for store in now)
            message = f"{lacking} of {total} samples have no {name}: in its place they are trained without condition"
            log_line(message)
    write_whole(path, json.dumps({"shards": now}, indent=2))


def fixed_values(values: dict[str, Any], changes: Sequence[str]) -> dict[str, Any]:
    """Return the values of a recipe without the keys that may change, such as `optimizer.images`."""
    fixed = {key: dict(value) if isinstance(value, dict) else value for key, value in values.items()}
    for key in changes:
        table, _, name = key.rpartition(".")
        (fixed[table] if table else fixed).pop(name, None)
    return fixed
