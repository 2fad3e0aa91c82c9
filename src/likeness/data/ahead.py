"""Read data in background threads while the network computes."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from typing import TypeVar

S = TypeVar("S")
T = TypeVar("T")


def read_ahead(make: Callable[[S], T], starts: Iterable[S], *, depth: int = 3, threads: int = 2) -> Generator[T]:
    """Yield `make(start)` for every start, in order; up to `depth` results are computed ahead by `threads` threads."""
    waiting = iter(starts)
    with ThreadPoolExecutor(threads) as pool:
        ahead = [pool.submit(make, start) for start in islice(waiting, depth)]
        while ahead:
            ready = ahead.pop(0).result()
            ahead += [pool.submit(make, start) for start in islice(waiting, 1)]
            yield ready
