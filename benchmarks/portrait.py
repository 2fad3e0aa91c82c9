"""Measure the time and memory of an image: a cold start of the command line, and an image after loading.

    python benchmarks/portrait.py

Every figure is measured in a process of its own; peak memory is the process's largest resident set.
"""

from __future__ import annotations

import json
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).parents[1]
MASK = ROOT / "examples/masks/smile.png"
PROMPT = "a smiling woman with blond hair"
STEPS, MODEL = 20, "mmface-mini"


def cold(out: Path) -> dict[str, float]:
    """Seconds and peak memory of `likeness generate` from a cold start."""
    command = [
        sys.executable,
        "-m",
        "likeness.cli",
        "generate",
        PROMPT,
        "--model",
        MODEL,
        "--mask",
        str(MASK),
        "--seed",
        "3",
    ]
    start = time.perf_counter()
    subprocess.run([*command, "--steps", str(STEPS), "--out", str(out)], check=True, stdout=subprocess.DEVNULL)
    seconds = time.perf_counter() - start
    peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1024
    return {"cold start, seconds": seconds, "peak memory, MiB": peak}


def warm() -> dict[str, float]:
    """Seconds of a guided image after loading; median of five."""
    import torch

    import likeness

    pipeline = likeness.load(MODEL)
    times = []
    for seed in range(6):
        start = time.perf_counter()
        generator = torch.Generator().manual_seed(seed)
        pipeline(PROMPT, control_image={"mask": MASK}, num_inference_steps=STEPS, generator=generator)
        times.append(time.perf_counter() - start)
    return {f"one image of {STEPS} guided steps, seconds": statistics.median(times[1:])}


if __name__ == "__main__":
    if "--warm" in sys.argv:
        print(json.dumps(warm()))
    else:
        with tempfile.TemporaryDirectory() as folder:
            found = cold(Path(folder) / "face.png")
        done = subprocess.run([sys.executable, __file__, "--warm"], check=True, capture_output=True, text=True)
        for name, value in {**found, **json.loads(done.stdout.splitlines()[-1])}.items():
            print(f"{name:52s} {value:8.2f}")
