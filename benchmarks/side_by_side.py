"""The one clock of the benchmarks: several functions in turns, so that a busy moment hits all of them."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping

import torch


def median_seconds(functions: Mapping[str, Callable[[], object]], rounds: int) -> dict[str, float]:
    """Median seconds of each function over the rounds, after one that is not counted. With one thread they are the
    processor's, to which other programs add nothing.
    """
    now = time.process_time if torch.get_num_threads() == 1 else time.perf_counter
    for function in functions.values():
        function()
    times: dict[str, list[float]] = {name: [] for name in functions}
    for _ in range(rounds):
        for name, function in functions.items():
            start = now()
            function()
            times[name].append(now() - start)
    return {name: statistics.median(found) for name, found in times.items()}
