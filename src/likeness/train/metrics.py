"""What a run says while it goes: one JSON line a report in `metrics.jsonl`, one line on the terminal, and TensorBoard's
or Weights & Biases' pages for those who want them.
"""

from __future__ import annotations

import json
import resource
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from likeness.files import write_whole
from likeness.types import InputError

METRICS = "metrics.jsonl"


class Reporter:
    """Keep numbers and print them with the speed and the time left.

    Args:
        run: the run folder.
        total: images in all.
        seen: images seen by now; lines of later ones, which a killed run left, are taken out: they will come again.
        recipe: a recipe that may ask for TensorBoard or Weights & Biases.

    Raises:
        InputError: one of those is not installed, or the folder cannot be written.
    """

    def __init__(self, run: Path, total: int, seen: int, recipe: Any = None) -> None:
        self.path = run / METRICS
        lines = read_metrics(run) if self.path.is_file() else []
        write_whole(self.path, "".join(f"{json.dumps(line)}\n" for line in lines if line["seen"] <= seen))
        self.total = total
        self.last_seen, self.last_time, self.speed = seen, time.monotonic(), 0.0
        self.board = tensorboard(run, seen) if getattr(recipe, "tensorboard", False) else None
        self.project = weights_and_biases(recipe.wandb, run) if getattr(recipe, "wandb", None) else None

    def report(self, seen: int, **values: float) -> None:
        """Report `values` after `seen` images."""
        now = time.monotonic()
        if seen > self.last_seen:  # since the last report: no start-up inside
            self.speed = (seen - self.last_seen) / max(now - self.last_time, 1e-9)
        self.last_seen, self.last_time = seen, now
        left = clock((self.total - seen) / self.speed) if self.speed else "unknown time"
        memory = peak_memory()
        self.keep(seen, {"images_per_second": round(self.speed, 2), "memory_gb": memory, **values})
        numbers = "  ".join(f"{name} {value:.4g}" for name, value in values.items())
        print(
            f"{seen:>9,}/{self.total:,} images  {numbers}  {self.speed:.1f} images/s  {memory:.2f} GB  {left} left",
            file=sys.stderr,
            flush=True,
        )

    def canary(self, seen: int, values: Mapping[str, float], sentences: Sequence[str]) -> None:
        """Report what the canary found."""
        self.keep(seen, {f"canary/{name}": value for name, value in values.items()} | {"canary": list(sentences)})
        for sentence in sentences:
            print(f"{seen:>9,} canary: {sentence}", file=sys.stderr, flush=True)

    def keep(self, seen: int, values: Mapping[str, Any]) -> None:
        """Write a line everywhere but on the terminal. Where the disk is full it is said and lost: the run goes on."""
        numbers = {name: value for name, value in values.items() if isinstance(value, (int, float))}
        try:
            with self.path.open("a") as file:
                file.write(json.dumps({"seen": seen, **values}) + "\n")
            if self.board:
                for name, value in numbers.items():
                    self.board.add_scalar(name, value, seen)
                self.board.flush()
            if self.project:
                self.project.log(numbers, step=seen)
        except OSError as error:
            print(f"cannot write {self.path}: {error.strerror or error}; training goes on", file=sys.stderr, flush=True)

    def close(self) -> None:
        """The run is over."""
        if self.board:
            self.board.close()
        if self.project:
            self.project.finish()


def read_metrics(run: Path) -> list[dict[str, Any]]:
    """The lines of `metrics.jsonl`; a last one that a killed run left half-written is passed over."""
    lines = []
    for text in (run / METRICS).read_text().splitlines():
        try:
            lines.append(json.loads(text))
        except json.JSONDecodeError:
            continue
    return lines


def tensorboard(run: Path, seen: int) -> Any:
    """TensorBoard's writer, in the run folder."""
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise InputError("tensorboard = true needs TensorBoard: pip install 'likeness[train]'") from error
    return SummaryWriter(str(run / "tensorboard"), purge_step=seen or None)


def weights_and_biases(project: str, run: Path) -> Any:
    """A run at Weights & Biases; its name is the folder's, and so is a resumed one's."""
    try:
        import wandb  # pyrefly: ignore
    except ImportError as error:
        raise InputError("the recipe's wandb needs Weights & Biases: pip install wandb") from error
    return wandb.init(project=project, name=run.name, id=run.name, dir=str(run), resume="allow")


def peak_memory() -> float:
    """The most memory this process had so far, in 10^9 bytes: on the GPU where there is one, else in all."""
    if torch.cuda.is_available():
        return round(torch.cuda.max_memory_allocated() / 1e9, 3)
    return round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9, 3)


def clock(seconds: float) -> str:
    """Seconds as h:mm:ss."""
    minutes, seconds = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}"
