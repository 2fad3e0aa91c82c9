"""Measure the service next to the pipeline: overhead, throughput and latency under load.

    python benchmarks/serve.py

Service and pipeline run in turns, so that other load on the machine affects both, and may use the same cores, with one
thread for the network each. No prompt is used twice, so that no cache shortens the service's work. What the service
does in addition counts: recipes, PNG, database, HTTP; its clients are in the process of the benchmark. Other load only
lengthens times, also CPU times: the fastest rounds of both are compared.
"""

from __future__ import annotations

import argparse
import itertools
import os
import statistics
import subprocess
import tempfile
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import requests
from serve_load import CLIENTS, generate, service


def cpu(pid: int | str) -> float:
    """CPU seconds of a process."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def compare(url: str, process: subprocess.Popen, model: str, steps: int, rounds: int) -> dict[str, float]:
    """Overhead of a request, and throughput of 16 clients relative to the pipeline's own batch."""
    import torch

    import likeness

    torch.set_num_threads(1)
    pipeline = likeness.load(model)
    numbers = itertools.count()

    def own(count: int) -> float:
        chosen = [next(numbers) for _ in range(count)]
        start = time.perf_counter()
        generators = [torch.Generator().manual_seed(i) for i in chosen]
        pipeline([f"a smiling woman {i}" for i in chosen], num_inference_steps=steps, generator=generators)
        return time.perf_counter() - start

    def served(seed: int) -> float:
        start = time.perf_counter()
        body = {"prompt": f"a smiling woman {seed}", "seed": seed, "steps": steps}
        generate(url, body).raise_for_status()
        return time.perf_counter() - start

    own(1), served(next(numbers))
    single = [(own(1), served(next(numbers))) for _ in range(5 * rounds)]
    latencies: list[float] = []
    walls, costs, clients = [], [], []
    for _ in range(rounds):
        seeds = [next(numbers) for _ in range(CLIENTS)]
        before = cpu("self")
        alone = own(len(seeds))
        work, before, mine, start = cpu("self") - before, cpu(process.pid), cpu("self"), time.perf_counter()
        with ThreadPoolExecutor(CLIENTS) as pool:
            latencies += pool.map(served, seeds)
        walls.append((alone, time.perf_counter() - start))
        costs.append((work, cpu(process.pid) - before))
        clients.append((cpu("self") - mine) / len(seeds))
    best = lambda pairs: min(one for one, _ in pairs) / min(other for _, other in pairs)  # noqa: E731
    return {
        "one image, pipeline, ms": 1e3 * statistics.median(own for own, _ in single),
        "overhead of a request, ms": 1e3 * statistics.median(served - own for own, served in single),
        "overhead between the fastest, ms": 1e3 * (min(s for _, s in single) - min(o for o, _ in single)),
        f"throughput of {CLIENTS} clients / pipeline's own batch": best(walls),
        "CPU time of the pipeline / of the service": best(costs),
        "CPU time of a client per image, ms": 1e3 * min(clients),
        f"p50 latency with {CLIENTS} clients, s": statistics.median(latencies),
        f"p95 latency with {CLIENTS} clients, s": statistics.quantiles(latencies, n=20)[-1],
        "p95 of /healthz under load, ms": 1e3 * health(url, served, numbers),
    }


def health(url: str, served, numbers) -> float:
    """95th percentile of the seconds of a health check while 16 clients wait for images."""
    seconds: list[float] = []
    stop = threading.Event()

    def watch() -> None:
        while not stop.wait(0.05):
            start = time.perf_counter()
            requests.get(f"{url}/healthz", timeout=60).raise_for_status()
            seconds.append(time.perf_counter() - start)

    watcher = threading.Thread(target=watch)
    watcher.start()
    with ThreadPoolExecutor(CLIENTS) as pool:
        list(pool.map(served, [next(numbers) for _ in range(CLIENTS)]))
    stop.set()
    watcher.join()
    return statistics.quantiles(seconds, n=20)[-1]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="mmface-mini-fast")
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=6)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder, service(options.model, Path(folder) / "data") as (url, process):
        for name, value in compare(url, process, options.model, options.steps, options.rounds).items():
            print(f"{name:56s} {value:10.2f}", flush=True)


if __name__ == "__main__":
    main()
