"""Predictions of `likeness train --plan` against measurements, for networks outside the calibration.

    python benchmarks/plan.py [--precision bf16] [--networks 4]

Time: median of five steps; with one thread (OMP_NUM_THREADS=1) CPU time, which other programs do not affect. Memory:
peak of a separate process minus its memory before it built the network (weights, gradients, AdamW's states,
activations).
"""

from __future__ import annotations

import argparse
import dataclasses
import re
import subprocess
import sys
from pathlib import Path

import torch

from likeness.train.config import TrainRecipe
from likeness.train.plan import (
    GB,
    REFERENCE_SIZES,
    Device,
    measure_device,
    measure_step,
    predict,
    reference_recipe,
)
from likeness.train.trace import trace

NETWORKS = ((256, 6, 8, 32), (320, 4, 5, 64), (512, 8, 8, 16), (768, 6, 12, 8))
"""(width, blocks, heads, images)."""


def checkpointed(recipe: TrainRecipe) -> TrainRecipe:
    return dataclasses.replace(recipe, network=dataclasses.replace(recipe.network, gradient_checkpointing=True))


def measured_memory(arguments: list[str]) -> float:
    """Return the peak of a step in a separate process, above its memory before, in bytes."""
    done = subprocess.run([sys.executable, __file__, "--one", *arguments], capture_output=True, text=True, check=True)
    return float(done.stdout.split()[-1])


def one(width: int, depth: int, heads: int, images: int, precision: str, saving: bool) -> None:
    """Measure in the child process: first a small network, for the memory of libraries, then the given one."""
    measure_step(reference_recipe(64, 2, 2, precision), 2, steps=1)
    before = peak()
    recipe = reference_recipe(width, depth, heads, precision)
    measure_step(checkpointed(recipe) if saving else recipe, images, steps=2)
    print(peak() - before)


def peak() -> float:
    """Return the peak memory of this process in bytes. That of `getrusage` includes the parent's."""
    (kib,) = re.findall(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())
    return 1024.0 * int(kib)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--precision", choices=("bf16", "fp32"), default="bf16")
    parser.add_argument("--networks", type=int, default=len(NETWORKS), help="number of networks")
    parser.add_argument("--one", nargs=6)
    options = parser.parse_args()
    if options.one:
        width, depth, heads, images, precision, saving = options.one
        one(int(width), int(depth), int(heads), int(images), precision, saving == "True")
        return
    device: Device = dataclasses.replace(measure_device(options.precision), base=0.0)
    print(f"{torch.get_num_threads()} threads, {options.precision}: {device.flops / 1e9:.0f} GFLOP/s, ", end="")
    print(f"{device.bandwidth / GB:.1f} GB/s, {device.launch * 1e6:.1f} us per operation")
    print("width x blocks, images       time: predicted, measured, error     memory: predicted, measured, error")
    for saving in (False, True):
        for width, depth, heads, images in NETWORKS[: options.networks]:
            recipe = reference_recipe(width, depth, heads, options.precision)
            recipe = checkpointed(recipe) if saving else recipe
            traced = trace(recipe, images, REFERENCE_SIZES)
            batch = dataclasses.replace(recipe.optimizer, batch=images)
            plan = predict(dataclasses.replace(recipe, optimizer=batch), traced, device, 1, images, REFERENCE_SIZES)
            memory = plan.memory - 4 * traced.trainable * device.overhead  # the measured step has no EMA
            seconds = measure_step(recipe, images)
            found = measured_memory([*map(str, (width, depth, heads, images)), options.precision, str(saving)])
            print(
                f"{width:4d} x {depth}, {images:3d}{' checkpointed' if saving else '':13s} "
                f"{plan.seconds:8.3f} s {seconds:8.3f} s {plan.seconds / seconds - 1:+6.0%}     "
                f"{memory / GB:7.3f} GB {found / GB:7.3f} GB {memory / found - 1:+6.0%}",
                flush=True,
            )


if __name__ == "__main__":
    main()
