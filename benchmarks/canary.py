"""Does the canary keep quiet on healthy runs, and cry within 50 steps about planted faults?

    python benchmarks/canary.py SHARDS [--healthy 20] [--steps 50] [--components FOLDER]

Every run is 50 steps of 16 images of a small network with another seed; the canary looks after 25 and 50. Prints one
line a run and the counts; the exit code is 1 where it was wrong.
"""

from __future__ import annotations

import argparse
import functools
import json
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from likeness.config import build
from likeness.train import loop
from likeness.train.config import TrainRecipe


def recipe(shards: str, components: str | None, seed: int, steps: int) -> TrainRecipe:
    """A network of the debug recipe's size."""
    data = {"shards": [shards], "condition_shares": {"mask": 0.4, "sketch": 0.4, "none": 0.2}}
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
            "canary_every": 16 * steps // 2,
        },
    )


@contextmanager
def planted(name: str, change: Callable[[Any], Callable[..., Any]]) -> Iterator[None]:
    """The loop with one of its functions replaced by a faulty one."""
    real = getattr(loop, name)
    setattr(loop, name, change(real))
    try:
        yield
    finally:
        setattr(loop, name, real)


def cut(real: Any) -> Callable[..., Any]:
    """The condition's latents do not reach the network."""

    def build_deaf(*arguments: Any, **options: Any) -> Any:
        network = real(*arguments, **options)
        network.register_forward_pre_hook(lambda _, given: (*given[:3], torch.zeros_like(given[3]), *given[4:]))
        return network

    return build_deaf


def freeze(real: Any) -> Callable[..., Any]:
    """A block's weights are not trained."""

    def build_frozen(*arguments: Any, **options: Any) -> Any:
        network = real(*arguments, **options)
        network.blocks[1].requires_grad_(False)
        return network

    return build_frozen


def shuffle(real: Any) -> Callable[..., Any]:
    """Every face gets its neighbour's condition."""

    def make_shuffled(*arguments: Any) -> Any:
        batch = real(*arguments)
        return batch._replace(condition_latents=batch.condition_latents.roll(1, dims=0))

    return make_shuffled


FAULTS = {"cut": ("build_network", cut), "frozen": ("build_network", freeze), "shuffled": ("make_batch", shuffle)}


def alarms(given: TrainRecipe) -> list[str]:
    """What the canary cried."""
    with tempfile.TemporaryDirectory() as folder:
        loop.train(given, Path(folder))
        lines = [json.loads(line) for line in (Path(folder) / "metrics.jsonl").read_text().splitlines()]
    return [sentence for line in lines for sentence in line.get("canary", []) if sentence.startswith("ALARM")]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("shards")
    parser.add_argument("--healthy", type=int, default=20)
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--components")
    options = parser.parse_args()
    loop.load_components = functools.cache(loop.load_components)  # the same for all runs
    cried = 0
    for seed in range(options.healthy):
        found = alarms(recipe(options.shards, options.components, seed, options.steps))
        cried += bool(found)
        print(f"healthy {seed}: {found or 'quiet'}", flush=True)
    missed = 0
    for number, (fault, (name, change)) in enumerate(FAULTS.items()):
        with planted(name, change):
            found = alarms(recipe(options.shards, options.components, 100 + number, options.steps))
        missed += not found
        print(f"{fault}: {found or 'MISSED'}", flush=True)
    print(f"{cried} of {options.healthy} healthy runs cried, {missed} of {len(FAULTS)} faults missed")
    sys.exit(bool(cried or missed))


if __name__ == "__main__":
    main()
