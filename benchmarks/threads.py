"""Seconds per image with torch's default threads and with the settings of `likeness.runtime`, idle and under load.

    python benchmarks/threads.py
    python benchmarks/threads.py --model mditface-mini --sizes 128 256

Three processes load the model and generate in turns, so that a busy moment hits all of them: `default` (torch's
threads, spinning while they wait), `passive` (torch's threads with OMP_WAIT_POLICY=PASSIVE) and `one` (passive, one
thread). `chosen` says which of the last two the command line uses. Under load, `--busy` processes compete. The image
sizes vary the work, so they show from which work on a second thread gains something.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time

from likeness.runtime import SMALL_WORK, THREAD_VARIABLES

PROMPT = "a smiling woman with blond hair"
SETTINGS = {"default": {}, "passive": {"OMP_WAIT_POLICY": "PASSIVE"}, "one": {"OMP_WAIT_POLICY": "PASSIVE"}}


def serve(model: str, setting: str, steps: int) -> None:
    """Generate one image for every size read from stdin, and print its seconds."""
    import torch

    import likeness
    from likeness.pipelines.generate import work_of

    pipeline = likeness.load(model)
    if setting == "one":
        torch.set_num_threads(1)
    for line in sys.stdin:
        size = int(line)
        start, before = time.perf_counter(), time.process_time()
        generator = torch.Generator().manual_seed(0)
        pipeline(PROMPT, height=size, width=size, force_size=True, num_inference_steps=steps, generator=generator)
        found = {
            "wall": time.perf_counter() - start,
            "cpu": time.process_time() - before,
            "work": work_of(pipeline, size, size),
        }
        print(json.dumps(found), flush=True)


def measure(servers: dict[str, subprocess.Popen[str]], size: int, rounds: int) -> dict[str, dict[str, float]]:
    """Median wall and CPU seconds per image of each setting, after one image that is not counted."""
    found: dict[str, list[dict[str, float]]] = {name: [] for name in servers}
    for _ in range(rounds + 1):
        for name, server in servers.items():
            assert server.stdin is not None
            assert server.stdout is not None
            server.stdin.write(f"{size}\n")
            server.stdin.flush()
            found[name].append(json.loads(server.stdout.readline()))
    return {
        name: {key: statistics.median(each[key] for each in every[1:]) for key in every[0]}
        for name, every in found.items()
    }


def main() -> None:
    """Measure, and print a table."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", default="mmface-mini")
    parser.add_argument("--sizes", type=int, nargs="+", default=[128])
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--busy", type=int, default=os.cpu_count(), help="competing processes")
    parser.add_argument("--serve", choices=SETTINGS)
    options = parser.parse_args()
    if options.serve:
        serve(options.model, options.serve, options.steps)
        return
    clean = {name: value for name, value in os.environ.items() if name not in (*THREAD_VARIABLES, "OMP_WAIT_POLICY")}
    command = [sys.executable, __file__, "--model", options.model, "--steps", str(options.steps), "--serve"]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    servers = {name: subprocess.Popen([*command, name], env=clean | own, **pipes) for name, own in SETTINGS.items()}
    busy: list[subprocess.Popen[bytes]] = []
    print(f"{options.model}, {options.steps} steps, {os.cpu_count()} cores, load average {os.getloadavg()[0]:.1f}")
    print("size  competing  chosen   wall: default  passive  one   default / chosen   cpu: default  passive  one")
    try:
        for count in (0, options.busy):
            busy = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(count)]
            for size in options.sizes:
                found = measure(servers, size, options.rounds)
                chosen = "one" if found["one"]["work"] < SMALL_WORK else "passive"
                wall, cpu = ([found[name][key] for name in SETTINGS] for key in ("wall", "cpu"))
                ratio = found["default"]["wall"] / found[chosen]["wall"]
                print(
                    f"{size:4d}  {count:9d}  {chosen:7s}  {wall[0]:13.2f}  {wall[1]:7.2f}  {wall[2]:4.2f}  "
                    f"{ratio:16.2f}   {cpu[0]:12.2f}  {cpu[1]:7.2f}  {cpu[2]:4.2f}",
                    flush=True,
                )
    finally:
        for process in (*servers.values(), *busy):
            process.kill()


if __name__ == "__main__":
    main()
