"""The folder of a run: one recipe, and one training in it at a time. All trainings begin here.

Whoever starts the same command twice by mistake is told so; a lock of the operating system, which lets go however a
process ends, is never left behind.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from likeness.config import build, to_dict
from likeness.files import read_json, write_whole
from likeness.parallel import rank_and_world
from likeness.train.checkpoint import newest
from likeness.types import InputError

LOCK = ".lock"

FREE = ("images", "test", "checkpoint_every", "compile", "threads", "choices", "measured_size")
"""What may differ between the starts of a component's run: its length, what is measured, and how it is computed."""


@contextmanager
def held(run: Path) -> Iterator[None]:
    """Make the folder, and keep other trainings out of it within a `with` block. Where the file system has no locks,
    nobody is kept out.

    Raises:
        InputError: another process trains in it, or it cannot be written.
    """
    try:
        run.mkdir(parents=True, exist_ok=True)
        file = (run / LOCK).open("a")
    except OSError as error:
        raise InputError(f"cannot write {run}: {error.strerror or error}") from error
    with file:
        try:
            import fcntl  # Windows has none

            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise InputError(f"another process trains in {run}: wait for its end, or choose another folder") from error
        except (ImportError, OSError):  # no locks here
            pass
        yield


@contextmanager
def begun(recipe: Any, run: Path) -> Iterator[None]:
    """Hold the folder of a component's run, its recipe kept in it.

    Raises:
        InputError: there are several processes, of which each would write the same files; numbers with which nothing
            can be learnt; the folder is another's.
    """
    if rank_and_world()[1] > 1:
        raise InputError(f"kind {recipe.kind!r} is trained by one process: run `likeness train` without torchrun")
    for name, least in (("images", 1), ("batch", 1), ("checkpoint_every", 1), ("seed", 0)):
        if getattr(recipe, name) < least:
            raise InputError(f"the recipe's {name} is {getattr(recipe, name)}: it must be at least {least}")
    with held(run):
        keep_recipe(recipe, run, FREE)
        yield


def keep_recipe(recipe: Any, run: Path, free: Sequence[str]) -> None:
    """Write the resolved recipe beside the results.

    Args:
        recipe: the run.
        run: its folder.
        free: keys, such as `optimizer.images`, that may differ between the starts of one run.

    Raises:
        InputError: the run was begun with another one.
    """
    path, values = run / "recipe.json", to_dict(recipe)
    if path.is_file() and newest(run):
        before = fixed(to_dict(build(type(recipe), read_json(path), where=str(path))), free)
        changed = [key for key, value in fixed(values, free).items() if before[key] != value]
        if changed:
            raise InputError(f"{run} was begun with another {changed[0]}: choose another folder, or restore the recipe")
    write_whole(path, json.dumps(values, indent=2))


def fixed(values: dict[str, Any], free: Sequence[str]) -> dict[str, Any]:
    """A recipe without its free keys."""
    kept = {key: dict(value) if isinstance(value, dict) else value for key, value in values.items()}
    for key in free:
        table, _, name = key.rpartition(".")
        (kept[table] if table else kept).pop(name, None)
    return kept


def finite_numbers(seen: int, loss: float, norm: float) -> None:
    """Stop before a component that learns nothing any more is published or put away.

    Raises:
        InputError: one of them is no number; what was written before is untouched.
    """
    if not (math.isfinite(loss) and math.isfinite(norm)):
        raise InputError(
            f"after {seen:,} images the loss is {loss} and the gradient norm {norm}: lower the learning rate in a new "
            "run; what was written before is untouched"
        )
