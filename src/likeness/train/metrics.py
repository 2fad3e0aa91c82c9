"""Reports of a run: JSON lines in `metrics.jsonl`, lines on the terminal, and optionally TensorBoard or Weights &
Biases.
"""

from __future__ import annotations

import json
import resource
import secrets
import sys
import time
from collections.abc import Mapping, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch

from likeness.files import log_line, write_whole
from likeness.types import InputError

METRICS = "metrics.jsonl"


class Reporter:
    """Write reports to a run folder, for `total` training images; lines after `seen` images, which a killed run left,
    are removed. `recipe` may request TensorBoard or Weights & Biases. Raises `InputError` if one of those is not
    installed, or the folder cannot be written.
    """

    def __init__(self, run: Path, total: int, seen: int, recipe: Any = None) -> None:
        self.path, self.total, self.line_ended = run / METRICS, total, True
        lines = read_metrics(run)
        write_whole(self.path, "".join(f"{json.dumps(line)}\n" for line in lines if line["seen"] <= seen))
        self.last_seen, self.last_time, self.speed = seen, time.monotonic(), 0.0
        self.tensorboard: Any = None
        self.wandb: Any = None
        if getattr(recipe, "tensorboard", False):
            try:
                from torch.utils.tensorboard import SummaryWriter
            except ImportError as error:
                raise InputError("tensorboard = true needs TensorBoard: pip install 'likeness[train]'") from error
            self.tensorboard = SummaryWriter(str(run / "tensorboard"), purge_step=seen + 1)
        if project := getattr(recipe, "wandb", None):
            try:
                import wandb  # pyrefly: ignore
            except ImportError as error:
                raise InputError("the recipe's wandb needs Weights & Biases: pip install wandb") from error
            file = run / "wandb_id"  # folders of other runs may have the same name
            if not file.is_file():
                write_whole(file, secrets.token_hex(8))
            self.wandb = wandb.init(
                project=project, name=run.name, id=file.read_text().strip(), dir=str(run), resume="allow"
            )

    def report(self, seen: int, **values: float) -> None:
        """Report `values` after `seen` images, with speed and remaining time."""
        now = time.monotonic()
        if seen > self.last_seen:  # since the last report, so that start-up is not included
            self.speed = (seen - self.last_seen) / max(now - self.last_time, 1e-9)
        self.last_seen, self.last_time = seen, now
        left = timedelta(seconds=int((self.total - seen) / self.speed)) if self.speed else "unknown time"
        memory = peak_memory()
        self.write(seen, {"images_per_second": round(self.speed, 2), "memory_gb": memory, **values})
        numbers = "  ".join(f"{name} {value:.4g}" for name, value in values.items())
        line = f"{seen:>9,}/{self.total:,} images  {numbers}  {self.speed:.1f} images/s  {memory:.2f} GB  {left} left"
        log_line(line)

    def report_diagnostics(
        self, seen: int, values: Mapping[str, float], alarms: Sequence[str], messages: Sequence[str]
    ) -> None:
        """Report the result of the diagnostics."""
        values = {f"diagnostics/{name}": value for name, value in values.items()}
        self.write(seen, {**values, "alarms": list(alarms), "messages": list(messages)})
        for text in (*(f"ALARM: {alarm}" for alarm in alarms), *messages):
            log_line(f"{seen:>9,} diagnostics: {text}")

    def write(self, seen: int, values: Mapping[str, Any]) -> None:
        """Write a line to all targets but the terminal. If the disk is full, the line is lost with a warning."""
        numbers = {name: value for name, value in values.items() if isinstance(value, (int, float))}
        try:
            line = "\n" * (not self.line_ended) + json.dumps({"seen": seen, **values}) + "\n"
            self.line_ended = False  # a full disk may cut the line off; `read_metrics` skips what remains of it
            with self.path.open("a") as file:
                file.write(line)
            self.line_ended = True
            if self.tensorboard:
                for name, value in numbers.items():
                    self.tensorboard.add_scalar(name, value, seen)
                self.tensorboard.flush()
            if self.wandb:
                self.wandb.log(numbers, step=seen)
        except OSError as error:
            reason = error.strerror or error
            log_line(f"cannot write {self.path}: {reason}; training continues")

    def close(self) -> None:
        """End the reports of a run."""
        if self.tensorboard:
            self.tensorboard.close()
        if self.wandb:
            self.wandb.finish()


def read_metrics(run: Path) -> list[dict[str, Any]]:
    """Return the lines of `metrics.jsonl`, if it exists. An incomplete last line of a killed run is skipped."""
    lines = []
    path = run / METRICS
    for text in path.read_text(encoding="utf-8", errors="replace").splitlines() if path.is_file() else ():
        try:
            line = json.loads(text)
        except json.JSONDecodeError:
            continue
        if isinstance(line, dict):
            lines.append(line)
    return lines


def peak_memory() -> float:
    """Return the peak memory of this process so far in 10^9 bytes: of the GPU if there is one, else of the CPU."""
    if torch.cuda.is_available():
        return round(torch.cuda.max_memory_allocated() / 1e9, 3)
    unit = 1 if sys.platform == "darwin" else 1024
    return round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9, 3)
