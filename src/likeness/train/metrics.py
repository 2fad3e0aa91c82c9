"""What a run says while it goes: one JSON line a report in `metrics.jsonl`, and one line on the terminal."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path


class Reporter:
    """Append numbers to `metrics.jsonl` and print them with the speed and the time left."""

    def __init__(self, run: Path, total: int, seen: int) -> None:
        self.file = (run / "metrics.jsonl").open("a")
        self.total = total
        self.last_seen, self.last_time, self.speed = seen, time.monotonic(), 0.0

    def report(self, seen: int, **values: float) -> None:
        """Report `values` after `seen` images."""
        now = time.monotonic()
        if seen > self.last_seen:  # since the last report: no start-up inside
            self.speed = (seen - self.last_seen) / max(now - self.last_time, 1e-9)
        self.last_seen, self.last_time = seen, now
        left = clock((self.total - seen) / self.speed) if self.speed else "unknown time"
        self.file.write(json.dumps({"seen": seen, "images_per_second": round(self.speed, 2), **values}) + "\n")
        self.file.flush()
        numbers = "  ".join(f"{name} {value:.4g}" for name, value in values.items())
        print(
            f"{seen:>9,}/{self.total:,} images  {numbers}  {self.speed:.1f} images/s  {left} left",
            file=sys.stderr,
            flush=True,
        )


def clock(seconds: float) -> str:
    """Seconds as h:mm:ss."""
    minutes, seconds = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}"
