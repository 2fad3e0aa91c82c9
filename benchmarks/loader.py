"""Compare the throughput of the loader of shards with that of the training step of `recipes/mmface_mini.toml`, in
images per second, alternating in one run.

    python benchmarks/loader.py SHARDS... [--rounds 3] [network.depth=4 ...]

The loader and the step are those of the training loop. The loader is one thread that reads captions and latents, draws
times and noise, and makes batches. The step is text encoder, network, backward pass, optimizer and EMA.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import time
from pathlib import Path
from typing import Any

import torch

from likeness.config import load_toml
from likeness.data.store import Store
from likeness.encoders.components import load_components
from likeness.models.layers import use_explicit_attention
from likeness.objectives import make_objective
from likeness.parallel import SINGLE_PROCESS
from likeness.train.batches import read_batches
from likeness.train.config import TrainRecipe
from likeness.train.ema import Ema
from likeness.train.losses import denoising_losses
from likeness.train.networks import build_network, with_precision
from likeness.train.optim import make_optimizers
from likeness.train.train_state import TrainState
from likeness.weights.catalog import BUNDLED, COMMON

RECIPE = Path(__file__).parents[1] / "recipes" / "mmface_mini.toml"
READ_AHEAD, BATCHES, STEPS = 6, 20, 3
"""Batches that are read ahead and not counted; batches and steps per round."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sources", nargs="+", help="folders of shards, and overrides of the recipe as key=value")
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    folders = [source for source in options.sources if "=" not in source]
    changes = [f"data.shards={folders}", *(source for source in options.sources if "=" in source)]
    recipe = with_precision(load_toml(RECIPE, TrainRecipe, tuple(changes)), "cpu")
    components, stores = load_components(BUNDLED / COMMON), [Store(folder) for folder in folders]
    torch.manual_seed(0)
    width = components.text_encoder.config.hidden_size
    tokens, channels = components.settings["max_text_tokens"], stores[0][0].latents.shape[0]
    model: Any = build_network(recipe, channels=channels, text_dim=width, pooled_dim=width, text_tokens=tokens)
    use_explicit_attention(model, recipe.precision == "bf16")
    state = TrainState(model=model, optimizers=make_optimizers(model, recipe.optimizer), emas=[Ema(model, 0.1)])
    objective, batch, patch = make_objective(recipe.objective), recipe.optimizer.batch, recipe.network.patch_size
    names, starts = list(model.config.condition_names), range(0, 10**9, batch)
    batches = read_batches(recipe, stores, names, components.settings, SINGLE_PROCESS, starts, batch, patch)

    def step(one: Any) -> None:
        one = one.with_text(components)
        with SINGLE_PROCESS.autocast(recipe.precision):
            loss = denoising_losses(model, objective, one).mean()
        loss.backward()
        state.step(1e-4, recipe.optimizer.max_grad_norm)
        state.count(batch)

    if recipe.compile:
        model.compile(dynamic=False)
    loaded, trained = [], []
    (first,) = next(batches)
    step(first)
    for _ in range(options.rounds):
        for _ in itertools.islice(batches, READ_AHEAD):
            pass
        started = time.perf_counter()
        for _ in itertools.islice(batches, BATCHES):
            pass
        loaded.append(BATCHES * batch / (time.perf_counter() - started))
        time.sleep(1)  # the thread reads ahead and is idle while steps are timed
        started = time.perf_counter()
        for _ in range(STEPS):
            step(first)
        trained.append(STEPS * batch / (time.perf_counter() - started))
    loader, training = statistics.median(loaded), statistics.median(trained)
    faces = sum(len(store) for store in stores)
    form = f"{faces} faces, batch {batch}, {torch.get_num_threads()} threads"
    size = sum(parameter.numel() for parameter in model.parameters())
    print(f"{form}: loader {loader:.0f} images per second, step of {size:,} parameters {training:.1f}")
    print(f"ratio {loader / training:.0f}")


if __name__ == "__main__":
    main()
