"""False alarms of the diagnostics in healthy runs, and faults that they miss within 50 steps.

    python benchmarks/diagnostics.py SHARDS [--healthy 20] [--steps 50] [--components FOLDER]

Every run has 50 steps of 16 images with a small network and another seed; the diagnostics run after 25 and 50 steps.
Prints one line per run and the counts; the exit code is 1 after a false alarm or a missed fault.
"""

from __future__ import annotations

import argparse
import functools
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from likeness.config import build
from likeness.train import batches, loop
from likeness.train.config import TrainRecipe
from likeness.train.metrics import read_metrics


def recipe(shards: str, components: str | None, seed: int, steps: int) -> TrainRecipe:
    """A network of the debug recipe's size."""
    data = {"shards": [shards], "condition_probabilities": {"mask": 0.4, "sketch": 0.4, "none": 0.2}}
    return build(
        TrainRecipe,
        {
            "network": {"name": "mmface", "hidden_size": 64, "depth": 2, "heads": 2},
            "data": data | ({"components": components} if components else {}),
            "optimizer": {"images": 16 * steps, "batch": 16, "learning_rate": 2e-3, "warmup": 160},
            "defaults": {"size": 128, "steps": 2},
            "seed": seed,
            "log_every": 16 * steps,
            "checkpoint_every": 16 * steps,
            "diagnostics_every": 16 * steps // 2,
        },
    )


@contextmanager
def fault(module: Any, name: str, change: Callable[[Any], Callable[..., Any]]) -> Iterator[None]:
    """Replace a function of a module by a faulty one within a `with` block."""
    real = getattr(module, name)
    setattr(module, name, change(real))
    try:
        yield
    finally:
        setattr(module, name, real)


def cut(real: Any) -> Callable[..., Any]:
    """The condition's latents do not reach the network."""

    def build_cut(*arguments: Any, **options: Any) -> Any:
        network = real(*arguments, **options)
        network.register_forward_pre_hook(lambda _, inputs: (*inputs[:3], torch.zeros_like(inputs[3]), *inputs[4:]))
        return network

    return build_cut


def freeze(real: Any) -> Callable[..., Any]:
    """A block's weights are not trained."""

    def build_frozen(*arguments: Any, **options: Any) -> Any:
        network = real(*arguments, **options)
        network.blocks[1].requires_grad_(False)
        return network

    return build_frozen


def shuffle(real: Any) -> Callable[..., Any]:
    """Every face gets the condition of another face of its batch."""

    def make_shuffled(*arguments: Any) -> Any:
        batch = real(*arguments)
        return batch._replace(condition_latents=batch.condition_latents.roll(1, dims=0))

    return make_shuffled


FAULTS = {
    "cut": (loop, "build_network", cut),
    "frozen": (loop, "build_network", freeze),
    "shuffled": (batches, "make_batch", shuffle),
}


def alarms(recipe: TrainRecipe) -> list[str]:
    """Train, and return the alarms."""
    with tempfile.TemporaryDirectory() as folder:
        loop.train(recipe, Path(folder))
        return [alarm for line in read_metrics(Path(folder)) for alarm in line.get("alarms", [])]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("shards")
    parser.add_argument("--healthy", type=int, default=20)
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--components")
    options = parser.parse_args()
    loop.load_components = functools.cache(loop.load_components)  # the same for all runs
    false_alarms = 0
    for seed in range(options.healthy):
        found = alarms(recipe(options.shards, options.components, seed, options.steps))
        false_alarms += bool(found)
        print(f"healthy {seed}: {found or 'no alarm'}", flush=True)
    missed = 0
    for number, (name, changed) in enumerate(FAULTS.items()):
        with fault(*changed):
            found = alarms(recipe(options.shards, options.components, 100 + number, options.steps))
        missed += not found
        print(f"{name}: {found or 'MISSED'}", flush=True)
    print(f"{false_alarms} of {options.healthy} healthy runs with alarms, {missed} of {len(FAULTS)} faults missed")
    sys.exit(bool(false_alarms or missed))


if __name__ == "__main__":
    main()
