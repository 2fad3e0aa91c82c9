"""CPU and wall seconds and peak memory of a cold start, in processes of their own, in turns.

    python benchmarks/start.py
    python benchmarks/start.py --rounds 9

Every ratio is to `import diffusers; diffusers.DiffusionPipeline`, what any program built on diffusers pays at least.
CPU seconds are the figure to compare on a machine that does other work.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path


def measure(command: list[str]) -> tuple[float, float, float]:
    """CPU and wall seconds and the largest resident set in MiB of a command."""
    start = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    wall = time.perf_counter() - start
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise subprocess.CalledProcessError(process.returncode, command)
    return usage.ru_utime + usage.ru_stime, wall, usage.ru_maxrss / 1024


def main() -> None:
    """Measure, and print a table."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    base = "import diffusers; diffusers.DiffusionPipeline"
    with tempfile.TemporaryDirectory() as folder:
        image = str(Path(folder) / "face.png")
        commands = {
            base: ["-c", base],
            "import torch": ["-c", "import torch"],
            "likeness.load('mmface-mini')": ["-c", "import likeness; likeness.load('mmface-mini')"],
            "likeness generate (20 steps)": [
                "-m",
                "likeness.cli",
                "generate",
                "a woman",
                "--model",
                "mmface-mini",
                "--steps",
                "20",
                "--out",
                image,
            ],
        }
        for command in commands.values():
            measure([sys.executable, *command])  # fills the file cache
        found: dict[str, list[tuple[float, float, float]]] = {name: [] for name in commands}
        for _ in range(options.rounds):
            for name, command in commands.items():
                found[name].append(measure([sys.executable, *command]))
    medians = {name: [statistics.median(each) for each in zip(*every, strict=True)] for name, every in found.items()}
    print(f"{os.cpu_count()} cores, load average {os.getloadavg()[0]:.1f}, median of {options.rounds}")
    print(f"{'command':52s} {'CPU s':>6s} {'ratio':>6s} {'wall s':>7s} {'ratio':>6s} {'peak MiB':>8s}")
    for name, (cpu, wall, peak) in medians.items():
        ratios = cpu / medians[base][0], wall / medians[base][1]
        print(f"{name:52s} {cpu:6.2f} {ratios[0]:6.2f} {wall:7.2f} {ratios[1]:6.2f} {peak:8.0f}")


if __name__ == "__main__":
    main()
