"""Prices of this machine: a few small networks are timed, and their counts explain the times by least squares."""

from __future__ import annotations

import dataclasses
import os
import time as clock

import numpy as np
import torch
from scipy.optimize import nnls

from likeness.models.layers import use_explicit_attention
from likeness.objectives import make_objective
from likeness.train.config import DataRecipe, MMFaceNetwork, OptimizerRecipe, TrainRecipe
from likeness.train.devices import Device
from likeness.train.step import loss_of
from likeness.train.trace import Stands, fake_network, trace
from likeness.types import TextFeatures

STANDS = Stands(text_dim=192, pooled_dim=192, text_tokens=32, tower_parameters=0)

CPU_SLACK = 1.25
"""What a CPU's memory takes over what is alive: products' copies in other layouts, and gaps (`benchmarks/plan.py`)."""

REFERENCES = ((64, 2, 2, 16), (128, 4, 4, 16), (192, 8, 6, 16), (256, 4, 8, 4), (192, 4, 6, 64), (384, 6, 8, 8))
"""(width, blocks, heads, images) of the networks that are timed, at 128 px."""


def reference(width: int, depth: int, heads: int, precision: str) -> TrainRecipe:
    """A recipe with a network of this size; nothing else of it matters."""
    return TrainRecipe(
        network=MMFaceNetwork(hidden_size=width, depth=depth, heads=heads),
        data=DataRecipe(shards=(), condition_shares={"mask": 1.0}),
        optimizer=OptimizerRecipe(images=1, batch=1, learning_rate=0.0),
        defaults={"size": 128},
        precision=precision,  # type: ignore[arg-type]
    )


def this_machine(precision: str = "bf16") -> Device:
    """Time the references (about a minute on two cores) and find the prices."""
    rows, times, cuda = [], [], torch.cuda.is_available()
    for width, depth, heads, images in REFERENCES:
        recipe = reference(width, depth, heads, precision)
        traced = trace(recipe, images, STANDS, accelerator=cuda)
        rows.append([traced.flops, traced.moved + 28 * traced.trained, traced.operations])
        times.append(measured_step(recipe, images, STANDS))
    counts, seconds = np.array(rows), np.array(times)
    scale = counts.mean(0)
    prices, _ = nnls(counts / scale / seconds[:, None], np.ones(len(seconds)))  # relative errors
    flop, byte, launch = np.maximum(prices, 1e-6) / scale
    if cuda:
        memory = torch.cuda.get_device_properties(0).total_memory
        device = Device(memory=memory, flops=1 / flop, bandwidth=1 / byte, launch=launch)
        return dataclasses.replace(device, together=torch.cuda.device_count())
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    prices = {"flops": 1 / flop, "bandwidth": 1 / byte, "launch": launch}
    return Device(memory=memory, together=1, link=5e9, slack=CPU_SLACK, accelerator=False, **prices)


def measured_step(recipe: TrainRecipe, micro: int, stands: Stands, steps: int = 5) -> float:
    """Median seconds of a pass and an update of a network with random weights, on this machine. With one thread they
    are the processor's, to which other programs add nothing.
    """
    device = "cuda" if torch.cuda.is_available() else "cpu"
    now = clock.process_time if device == "cpu" and torch.get_num_threads() == 1 else clock.perf_counter
    torch.manual_seed(0)
    network = fake_network(recipe, stands).to(device).train()
    use_explicit_attention(network, device == "cpu" and recipe.precision == "bf16")
    if recipe.network.gradient_checkpointing:
        network.enable_gradient_checkpointing()
    optimizer = torch.optim.AdamW(network.parameters(), fused=True)
    side = recipe.defaults.get("size", 256) // 8
    latents = torch.randn(micro, stands.channels, side, side, device=device)
    text = TextFeatures(
        torch.randn(micro, stands.text_tokens, stands.text_dim, device=device),
        torch.randn(micro, stands.pooled_dim, device=device),
    )
    index = torch.zeros(micro, 1, dtype=torch.long, device=device)
    inputs = (latents, latents, torch.rand(micro, device=device), text, latents[:, None], index)
    times = []
    for _ in range(steps + 1):
        begun = now()
        with torch.autocast(device, torch.bfloat16, enabled=recipe.precision == "bf16"):
            loss = loss_of(network, make_objective({"name": "rectified_flow"}), *inputs)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if device == "cuda":
            torch.cuda.synchronize()
        times.append(now() - begun)
    return sorted(times[1:])[steps // 2]
