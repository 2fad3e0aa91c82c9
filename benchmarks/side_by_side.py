"""Time several functions in turns, so that other load on the machine affects all of them."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping

import torch


def median_seconds(
    functions: Mapping[str, Callable[[], object]], rounds: int, *, wall: bool = False
) -> dict[str, float]:
    """Return the median seconds per call of each function, after one warm-up call.

    With one thread this is CPU time, which does not depend on other programs.

    Args:
        functions: name -> function.
        rounds: number of calls of each.
        wall: measure wall time also with one thread, as for a GPU.
    """
    now = time.process_time if torch.get_num_threads() == 1 and not wall else time.perf_counter
    for function in functions.values():
        function()
    times: dict[str, list[float]] = {name: [] for name in functions}
    for _ in range(rounds):
        for name, function in functions.items():
            start = now()
            function()
            times[name].append(now() - start)
    return {name: statistics.median(seconds) for name, seconds in times.items()}
