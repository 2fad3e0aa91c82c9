"""Predict memory and time of an optimizer step of a recipe before training, and search settings that fit a device.

Time is linear in the counts of `likeness.train.trace`: FLOPs, bytes and operations. The rates come from the data sheet
of a device, or from a least-squares fit to the measured steps of a few small networks on this machine.
"""

from __future__ import annotations

import dataclasses
import os
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any, NamedTuple, get_args

import numpy as np
import torch
from scipy.optimize import nnls

from likeness.encoders.components import load_components
from likeness.models.layers import use_explicit_attention
from likeness.objectives import make_objective
from likeness.parallel import Sharding
from likeness.train.config import (
    AdapterNetwork,
    DataRecipe,
    MDiTFaceAdapter,
    MMFaceNetwork,
    OptimizerRecipe,
    TrainRecipe,
    micro_batch,
)
from likeness.train.losses import denoising_losses
from likeness.train.networks import with_precision
from likeness.train.trace import FLUX_SIZES, ComponentSizes, Trace, block_counts, random_batch, random_network, trace
from likeness.types import InputError, Progress
from likeness.weights.catalog import BUNDLED, COMMON, bundled_models

GB = 1e9
SHARDINGS = get_args(Sharding)
COUNTS = (1, 8, 16, 64, 512)
"""Numbers of devices for which shardings are compared."""
STATE_BYTES = {"adamw": 8.0, "adamw8bit": 2.03, "muon": 8.0}
"""Bytes of optimizer state per trainable weight; 8-bit states have a scale per 256 values; Muon's are fewer."""
CPU_OVERHEAD = 1.25
"""Memory of a process on a CPU, relative to its live tensors (fitted: `benchmarks/plan.py`)."""
REFERENCES = ((64, 2, 2, 16), (128, 4, 4, 16), (192, 8, 6, 16), (256, 4, 8, 4), (192, 4, 6, 64), (384, 6, 8, 8))
"""(width, blocks, heads, images) of the networks that are measured, at 128 px."""
REFERENCE_SIZES = ComponentSizes(text_dim=192, pooled_dim=192, text_tokens=32, text_parameters=0)


@dataclass(frozen=True, kw_only=True)
class Device:
    """Rates of a device."""

    memory: float  # bytes of memory
    flops: float  # floating-point operations per second in matrix products
    bandwidth: float  # bytes per second of the memory
    launch: float = 3e-6  # seconds per operation
    link: float = 2e10  # bytes per second between devices of a machine
    network: float = 5e9  # bytes per second between machines, per device
    per_machine: int = 8  # devices per machine
    base: float = 0.7e9  # bytes used before anything is computed
    overhead: float = 1.08  # allocated memory relative to live tensors (assumed for GPUs)
    accelerator: bool = True  # whether attention is fused in bf16 training


def data_sheet(memory: float, flops: float, bandwidth: float, **rest: Any) -> Device:
    """Return a device from GB, dense bf16 TFLOP/s and GB/s, of which training is assumed to reach 0.5 and 0.7."""
    return Device(memory=memory * 1e9, flops=flops * 1e12 * 0.5, bandwidth=bandwidth * 1e9 * 0.7, **rest)


DEVICES = {
    "h200": data_sheet(141, 989, 4800, link=3.6e11, network=4e10),
    "h100": data_sheet(80, 989, 3350, link=3.6e11, network=4e10),
    "a100-80": data_sheet(80, 312, 2039, link=2.4e11, network=2e10),
    "a100-40": data_sheet(40, 312, 1555, link=2.4e11, network=2e10),
    "rtx-5000-ada": data_sheet(32, 261, 576, per_machine=2),
    "rtx-4090": data_sheet(24, 165, 1008, per_machine=2),
}


class Plan(NamedTuple):
    """Prediction of an optimizer step, per process."""

    memory: float  # peak in bytes
    seconds: float  # duration, without overlap of communication and computation
    communicated: float  # bytes sent
    images_per_second: float  # images per second of all processes

    def __str__(self) -> str:
        return f"{self.memory / GB:7.2f} GB {self.seconds:8.3f} s {self.images_per_second:10.1f}"


def predict(recipe: TrainRecipe, traced: Trace, device: Device, gpus: int, micro: int, sizes: ComponentSizes) -> Plan:
    """Predict memory, time and communication of an optimizer step on `gpus` devices, in machines of
    `device.per_machine`, from the trace of a micro-batch of `micro` images and the sizes of the text encoders.
    """
    shards = {"replicate": 1, "shard": gpus, "hybrid": min(gpus, device.per_machine)}[recipe.sharding]
    passes = max(1, recipe.optimizer.batch // (micro * gpus))
    emas = 1 + len(recipe.optimizer.posthoc_emas)
    stored = traced.parameters + traced.trainable * (STATE_BYTES[recipe.optimizer.name] + 4 * emas)
    gathered = 0.0 if shards == 1 else 2 * 2 * traced.block  # this block and the next one, in bf16
    memory = (stored + traced.gradients) / shards + traced.live - traced.gradients + gathered
    memory = (memory + 4 * sizes.text_parameters) * device.overhead + device.base

    text = 2.0 * sizes.text_parameters * sizes.text_tokens * micro
    compute = (traced.flops + text) / device.flops + traced.moved / device.bandwidth + traced.operations * device.launch
    weights = traced.parameters / 4
    update = 4 * (weights + (5 + emas * 2) * traced.trainable) / shards / device.bandwidth

    ring = lambda n: (n - 1) / n  # noqa: E731  # fraction of the data that each member of a ring sends
    within = across = 0.0
    if shards > 1:  # weights twice per pass in bf16, gradients once in float32
        sent = passes * ring(shards) * (2 * 2 * weights + traced.gradients)
        within, across = (sent, 0.0) if shards <= device.per_machine else (0.0, sent)
    if gpus > shards:  # all-reduce of the gradients of a shard among the replicas
        sent = 2 * ring(gpus // shards) * traced.gradients / shards
        within, across = (within + sent, across) if gpus <= device.per_machine else (within, across + sent)
    seconds = passes * compute + update + within / device.link + across / device.network
    return Plan(memory, seconds, within + across, passes * micro * gpus / seconds)


def candidate_settings(recipe: TrainRecipe, gpus: int) -> Iterator[tuple[str, TrainRecipe, int]]:
    """Yield settings with decreasing memory, as (changes, recipe, micro-batch), starting with the recipe's own."""
    per_gpu = max(1, recipe.optimizer.batch // gpus)
    micro = recipe.micro_batch or per_gpu
    changes = "unchanged"
    yield changes, recipe, micro
    network = dataclasses.replace(recipe.network, gradient_checkpointing=True)
    checkpointed = dataclasses.replace(recipe, network=network)
    if not recipe.network.gradient_checkpointing:
        changes = "network.gradient_checkpointing=true"
        yield changes, checkpointed, micro
    while micro > 1:
        micro //= 2
        if per_gpu % micro == 0:
            changes = f"network.gradient_checkpointing=true micro_batch={micro}"
            yield changes, checkpointed, micro
    if recipe.optimizer.name == "adamw":
        optimizer = dataclasses.replace(recipe.optimizer, name="adamw8bit")
        yield f"{changes} optimizer.name=adamw8bit", dataclasses.replace(checkpointed, optimizer=optimizer), micro


def search(recipe: TrainRecipe, device: Device, gpus: int, sizes: ComponentSizes) -> Iterator[tuple[str, Plan, bool]]:
    """Yield (changes, plan, whether it fits) of candidate settings, up to the first that fits."""
    for changes, changed, micro in candidate_settings(recipe, gpus):
        plan = predict(changed, trace(changed, micro, sizes, device.accelerator), device, gpus, micro, sizes)
        yield changes, plan, plan.memory <= device.memory
        if plan.memory <= device.memory:
            return


def compare_shardings(
    recipe: TrainRecipe, device: Device, sizes: ComponentSizes, counts: Sequence[int] = COUNTS
) -> dict[tuple[int, str], Plan]:
    """Return the plan of every (number of devices, sharding), with the recipe's batch on each device."""
    micro = micro_batch(recipe, 1)
    traced, plans = trace(recipe, micro, sizes, device.accelerator), {}
    for gpus in counts:
        optimizer = dataclasses.replace(recipe.optimizer, batch=recipe.optimizer.batch * gpus)
        for sharding in SHARDINGS:
            changed: Any = dataclasses.replace(recipe, sharding=sharding, optimizer=optimizer)
            plans[gpus, sharding] = predict(changed, traced, device, gpus, micro, sizes)
    return plans


def describe(recipe: TrainRecipe, name: str | None, gpus: int, progress: Progress = lambda done, total: None) -> str:
    """Return the output of `likeness train --plan`: counts of the recipe, and the settings that were tried, on `gpus`
    devices: `name` of `DEVICES` or this machine, which is measured; `progress` is called as (networks measured, total).
    Raises `InputError` if the device is unknown, or the batch cannot be divided among the devices.
    """
    if gpus < 1 or recipe.optimizer.batch % gpus:
        raise InputError(f"a batch of {recipe.optimizer.batch} cannot be divided among {gpus} devices")
    micro, recipe = micro_batch(recipe, gpus), planned(recipe, name)
    device, sizes = find_device(name, recipe, progress), component_sizes(recipe)
    traced = trace(recipe, micro, sizes, device.accelerator)
    source = "measured" if name is None else "from its data sheet"
    limited = device.bandwidth < (1e13 if device.accelerator else 1e12)  # else the fit found no effect of memory
    bandwidth = f"{device.bandwidth / GB:.3g} GB/s" if limited else "memory bandwidth is not a limit"
    source_of_sizes, available = components_of(recipe)
    lines = [
        *([] if available else [f"{source_of_sizes} is not here: planned with the published components"]),
        f"weights: {traced.parameters / GB:.3g} GB, {traced.trainable:,} trainable",
        f"a pass of {micro} images: {traced.flops / 1e12:.4g} TFLOP, {traced.moved / GB:.3g} GB read and written, "
        f"{traced.operations:,} operations",
        f"{gpus} x {name or 'this machine'}, {device.memory / GB:.0f} GB each, {source}: "
        f"{device.flops / 1e12:.3g} TFLOP/s, {bandwidth}",
        f"{'memory':>10} {'step':>10} {'images/s':>10}  setting",
    ]
    if recipe.alignment_weight:
        lines.insert(-1, "the face parser of alignment_weight is not included")
    for setting, plan, fits in search(recipe, device, gpus, sizes):
        lines.append(f"{plan}  {setting}{'' if fits else '  (does not fit)'}")
        if fits:
            seconds = recipe.optimizer.images / plan.images_per_second
            duration = timedelta(seconds=round(seconds))
            lines.append(f"{recipe.optimizer.images:,} images, about {duration} without previews")
    return "\n".join(lines)


def describe_shardings(recipe: TrainRecipe, name: str | None, progress: Progress = lambda done, total: None) -> str:
    """Return the output of `likeness train --plan --compare-sharding`, a Markdown table. Raises `InputError` if the
    device is unknown, or `micro_batch` does not divide the batch.
    """
    micro_batch(recipe, 1)
    recipe = planned(recipe, name)
    device = find_device(name, recipe, progress)
    plans = compare_shardings(recipe, device, component_sizes(recipe))
    lines = [
        f"{name or 'this machine'}, {recipe.optimizer.batch} images per device, {device.per_machine} devices per "
        "machine: memory, data sent per step, time per step",
        "",
        f"| devices | {' | '.join(SHARDINGS)} |",
        "|---" * (1 + len(SHARDINGS)) + "|",
    ]
    for count in COUNTS:
        row = [plans[count, sharding] for sharding in SHARDINGS]
        cells = [f"{p.memory / GB:.1f} GB, {p.communicated / GB:.1f} GB, {p.seconds:.3g} s" for p in row]
        lines.append(f"| {count} | {' | '.join(cells)} |")
    return "\n".join(lines)


def planned(recipe: TrainRecipe, name: str | None) -> TrainRecipe:
    """Return the recipe with the precision that a device of `DEVICES`, or this machine, computes in. Raises
    `InputError` if latents of its size cannot be divided into patches.
    """
    size, patch = recipe.defaults.get("size", 256), getattr(recipe.network, "patch_size", 2)
    if size % (8 * patch):
        raise InputError(f"defaults.size is {size}: an eighth of it cannot be divided into patches of {patch}")
    if name is None:
        return with_precision(recipe, "cuda" if torch.cuda.is_available() else "cpu")
    return dataclasses.replace(recipe, precision="bf16" if recipe.precision == "auto" else recipe.precision)


def find_device(name: str | None, recipe: TrainRecipe, progress: Progress) -> Device:
    """Return a device of `DEVICES`; None measures this machine. Raises `InputError` if the device is unknown."""
    if name is None:
        return measure_device(recipe.precision, progress)
    if name not in DEVICES:
        raise InputError(f"Unknown device {name!r}. Available: {', '.join(DEVICES)}; omit it to measure this machine")
    return DEVICES[name]


def components_of(recipe: TrainRecipe) -> tuple[str | Path, bool]:
    """Return the components of a recipe, and whether they are available without a download."""
    base = recipe.network.base if isinstance(recipe.network, AdapterNetwork) else None
    source = recipe.data.components or base or BUNDLED / COMMON
    return source, Path(source).is_dir() or source in bundled_models()


def component_sizes(recipe: TrainRecipe) -> ComponentSizes:
    """Return the sizes of the recipe's components, or of the published ones if they are not available."""
    source, available = components_of(recipe)
    if not available:
        return FLUX_SIZES if isinstance(recipe.network, MDiTFaceAdapter) else ComponentSizes()
    parts = load_components(source)
    encoders = parts.text_encoders
    return ComponentSizes(
        channels=parts.vae.config.latent_channels,
        text_dim=encoders[-1].config.hidden_size,
        pooled_dim=parts.text_encoder.config.hidden_size,
        text_tokens=parts.settings["max_text_tokens"],
        text_parameters=sum(p.numel() for encoder in encoders for p in encoder.parameters()),
    )


def reference_recipe(width: int, depth: int, heads: int, precision: Any = "bf16") -> TrainRecipe:
    """Return a recipe with a network of this size at 128 px."""
    return TrainRecipe(
        network=MMFaceNetwork(hidden_size=width, depth=depth, heads=heads),
        data=DataRecipe(shards=(), condition_probabilities={"mask": 1.0}),
        optimizer=OptimizerRecipe(images=1, batch=1, learning_rate=0.0),
        defaults={"size": 128},
        precision=precision,
    )


def measure_device(precision: str = "bf16", progress: Progress = lambda done, total: None) -> Device:
    """Measure steps of the reference networks, about a minute on two cores, and fit the rates of this machine;
    `progress` is called as (networks done, total).
    """
    counts, seconds, cuda = [], [], torch.cuda.is_available()
    for number, (width, depth, heads, images) in enumerate(REFERENCES):
        progress(number, len(REFERENCES))
        recipe = reference_recipe(width, depth, heads, precision)
        traced = trace(recipe, images, REFERENCE_SIZES, accelerator=cuda)
        counts.append([traced.flops, traced.moved + 28 * traced.trainable, traced.operations])
        seconds.append(measure_step(recipe, images))
    scale = np.mean(counts, axis=0)
    rates, _ = nnls(np.array(counts) / scale / np.array(seconds)[:, None], np.ones(len(seconds)))  # relative errors
    flop, byte, launch = np.maximum(rates, 1e-6) / scale
    fitted = {"flops": 1 / flop, "bandwidth": 1 / byte, "launch": launch}
    if cuda:
        memory = torch.cuda.get_device_properties(0).total_memory
        return Device(memory=memory, per_machine=torch.cuda.device_count(), **fitted)
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return Device(memory=memory, per_machine=1, link=5e9, overhead=CPU_OVERHEAD, accelerator=False, **fitted)


def measure_step(recipe: TrainRecipe, micro: int, steps: int = 5) -> float:
    """Return the median seconds of an optimizer step with random weights and `REFERENCE_SIZES` on this machine. With
    one thread, CPU time is measured, which other programs do not affect.
    """
    device = "cuda" if torch.cuda.is_available() else "cpu"
    now = time.process_time if device == "cpu" and torch.get_num_threads() == 1 else time.perf_counter
    torch.manual_seed(0)
    network = random_network(recipe, REFERENCE_SIZES, block_counts(recipe)).to(device).train()
    use_explicit_attention(network, device == "cpu" and recipe.precision == "bf16")
    optimizer = torch.optim.AdamW(network.parameters(), fused=True)
    objective = make_objective({"name": "rectified_flow"})
    batch = random_batch(recipe, micro, REFERENCE_SIZES).to(device)
    times = []
    for _ in range(steps + 1):
        start = now()
        with torch.autocast(device, torch.bfloat16, enabled=recipe.precision == "bf16"):
            loss = denoising_losses(network, objective, batch).mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if device == "cuda":
            torch.cuda.synchronize()
        times.append(now() - start)
    return sorted(times[1:])[steps // 2]
