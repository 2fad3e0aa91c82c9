"""Measure the service next to the pipeline: overhead, throughput, latency under load, and a mixed load.

    python benchmarks/serve.py                                # the first three
    python benchmarks/serve.py --requests 10000 --steps 1     # also: cancelled, malformed and disconnected requests
    python benchmarks/serve.py --same 3                       # also: 64 concurrent requests equal 64 serial ones

Service and pipeline run in turns, so that other load on the machine affects both. One thread each.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import requests

ROOT = Path(__file__).parents[1]
CLIENTS = 16


@contextmanager
def service(model: str, data: Path):
    """A service in a process of its own; yields its address and process."""
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT / "src")}
    command = [sys.executable, "-m", "likeness.cli", "serve", "--model", model, "--port", "0", "--data", str(data)]
    with (data.parent / "serve.log").open("w") as log:
        process = subprocess.Popen(
            [*command, "--queue", "256", "--keep", "60"], stdout=subprocess.PIPE, stderr=log, text=True, env=environment
        )
    assert process.stdout is not None
    url = process.stdout.readline().split()[-1]
    try:
        while True:
            try:
                if requests.get(f"{url}/readyz", timeout=60).ok:
                    break
            except requests.ConnectionError:
                pass
            time.sleep(0.1)
        yield url, process
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait(120)


def generate(url: str, seed: int, steps: int) -> requests.Response:
    body = {"prompt": f"a smiling woman {seed}", "seed": seed, "steps": steps}
    return requests.post(f"{url}/v1/images/generations", json=body, timeout=600)


def memory(process: subprocess.Popen) -> float:
    """Resident memory of a process in MiB."""
    lines = Path(f"/proc/{process.pid}/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmRSS")) / 1024


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

    def own(count: int) -> float:
        start = time.perf_counter()
        generators = [torch.Generator().manual_seed(i) for i in range(count)]
        prompts = [f"a smiling woman {i}" for i in range(count)]
        pipeline(prompts, num_inference_steps=steps, generator=generators)
        return time.perf_counter() - start

    def served(seed: int) -> float:
        start = time.perf_counter()
        generate(url, seed, steps).raise_for_status()
        return time.perf_counter() - start

    own(1), served(0)
    single: dict[str, list[float]] = {"own": [], "served": []}
    for seed in range(5 * rounds):
        single["own"].append(own(1))
        single["served"].append(served(seed))
    rates, latencies, health, costs = [], [], [], []
    stop = threading.Event()

    def watch() -> None:
        while not stop.wait(0.05):
            start = time.perf_counter()
            requests.get(f"{url}/healthz", timeout=60).raise_for_status()
            health.append(time.perf_counter() - start)

    for number in range(rounds):
        before = cpu("self")
        alone = own(2 * CLIENTS)
        work, before = cpu("self") - before, cpu(process.pid)
        stop.clear()
        watcher = threading.Thread(target=watch)
        watcher.start()
        start = time.perf_counter()
        with ThreadPoolExecutor(CLIENTS) as pool:
            latencies += pool.map(served, range(number, number + 2 * CLIENTS))
        rates.append(alone / (time.perf_counter() - start))
        costs.append(work / (cpu(process.pid) - before))
        stop.set()
        watcher.join()
    return {
        "one image, pipeline, ms": 1e3 * statistics.median(single["own"]),
        "one image, service, ms": 1e3 * statistics.median(single["served"]),
        "overhead, ms": 1e3 * (statistics.median(single["served"]) - statistics.median(single["own"])),
        f"throughput of {CLIENTS} clients / pipeline's own batch": statistics.median(rates),
        "the same in CPU time, which other load affects less": statistics.median(costs),
        f"p50 latency with {CLIENTS} clients, s": statistics.median(latencies),
        f"p95 latency with {CLIENTS} clients, s": statistics.quantiles(latencies, n=20)[-1],
        "p95 of /healthz under load, ms": 1e3 * statistics.quantiles(health, n=20)[-1],
    }


def same(url: str, steps: int) -> bool:
    """Whether 64 concurrent requests give the bytes of 64 serial ones."""
    content = lambda seed: generate(url, seed, 1 + seed % steps).json()["data"][0]["b64_json"]  # noqa: E731
    serial = [content(seed) for seed in range(64)]
    with ThreadPoolExecutor(64) as pool:
        return list(pool.map(content, range(64))) == serial


def mixed(url: str, process: subprocess.Popen, count: int, steps: int) -> dict[str, float]:
    """10 % cancelled, 5 % malformed, 2 % disconnected, the rest complete: counts expected and wrong answers."""
    generator = random.Random(0)
    kinds = generator.choices(["cancel", "malformed", "gone", "plain"], [10, 5, 2, 83], k=count)
    seen: Counter[str] = Counter()

    def send(index: int) -> None:
        kind, id = kinds[index], f"load-{index}"
        address = f"{url}/v1/images/generations"
        body = {"prompt": f"face {index}", "seed": index, "steps": steps + 20 * (kind != "plain")}
        headers = {"x-request-id": id}
        if kind == "malformed":
            ok = requests.post(address, data=b'{"prompt": ', headers=headers, timeout=600).status_code == 400
        elif kind == "gone":
            host, port = url.removeprefix("http://").split(":")
            content = json.dumps(body).encode()
            head = f"POST /v1/images/generations HTTP/1.1\r\nhost: x\r\nx-request-id: {id}\r\n"
            head += f"content-type: application/json\r\ncontent-length: {len(content)}\r\n\r\n"
            with socket.create_connection((host, int(port))) as connection:
                connection.sendall(head.encode() + content)
                time.sleep(0.02)
            ok = True
        elif kind == "cancel":
            with ThreadPoolExecutor(1) as pool:
                answer = pool.submit(requests.post, address, json=body, headers=headers, timeout=600)
                while not answer.done() and not requests.delete(f"{url}/v1/jobs/{id}", timeout=600).ok:
                    time.sleep(0.01)
                ok = answer.result().status_code in (200, 409)
        else:
            ok = requests.post(address, json=body, headers=headers, timeout=600).ok
        seen[f"{kind}, {'as expected' if ok else 'wrong'}"] += 1

    warm = min(count, 200)
    with ThreadPoolExecutor(CLIENTS) as pool:
        list(pool.map(send, range(warm)))
        start = memory(process)
        list(pool.map(send, range(warm, count)))
    time.sleep(2)
    figures = requests.get(f"{url}/metrics", timeout=60).text
    left = [line for line in figures.splitlines() if line.startswith(("likeness_queue_l", "likeness_running"))]
    return {
        **dict(sorted(seen.items())),
        "images left in the engine": sum(float(line.split()[-1]) for line in left),
        f"memory after {warm} requests, MiB": start,
        "memory at the end, MiB": memory(process),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="mmface-mini-fast")
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--requests", type=int, default=0, help="requests of the mixed load")
    parser.add_argument("--same", type=int, default=0, help="repetitions of 64 concurrent against 64 serial requests")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder, service(options.model, Path(folder) / "data") as (url, process):
        found: dict[str, object] = dict(compare(url, process, options.model, options.steps, options.rounds))
        for number in range(options.same):
            found[f"64 concurrent = 64 serial, {number + 1}"] = same(url, options.steps)
        if options.requests:
            found |= mixed(url, process, options.requests, options.steps)
        for name, value in found.items():
            print(f"{name:56s} {value:10.2f}" if isinstance(value, float) else f"{name:56s} {value!s:>10}", flush=True)


if __name__ == "__main__":
    main()
