"""What a recipe will need before it is begun: memory and time of a step on a named device, and what would fit.

Time is linear in the counts of `likeness.train.trace` (operations launched, too); their prices come from the device's
data sheet, or are measured on this machine.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from likeness.encoders.components import load_components
from likeness.parallel import Layout
from likeness.train.config import MDiTFaceAdapter, TrainRecipe, micro_batch
from likeness.train.devices import DEVICES, Device
from likeness.train.trace import FLUX_STANDS, Stands, Trace, trace
from likeness.types import InputError
from likeness.weights.catalog import BUNDLED, COMMON

GB = 1e9
LAYOUTS: tuple[Layout, ...] = ("replicate", "shard", "hybrid")
COUNTS = (1, 8, 16, 64, 512)
"""Devices for which layouts are compared."""
STATE_BYTES = {"adamw": 8.0, "adamw8bit": 2.03, "muon": 8.0}
"""Bytes of optimizer state a trained weight; 8-bit ones have a scale for every 256 numbers; Muon's are fewer."""


@dataclass(frozen=True, kw_only=True)
class Plan:
    """A prediction for one process of a layout."""

    memory: float
    """Peak, in bytes."""
    seconds: float
    """A whole optimizer step, communication not hidden behind computation."""
    communicated: float
    """Bytes that a process sends in a step."""
    images_per_second: float
    """Of all processes together."""


def predict(recipe: TrainRecipe, traced: Trace, device: Device, gpus: int, micro: int, stands: Stands) -> Plan:
    """Memory, time and communication of a step of `recipe` on `gpus` devices.

    Args:
        recipe: the run.
        traced: of a micro-batch of `micro` images.
        device: what it runs on.
        gpus: how many, in machines of `device.together`.
        micro: images a process computes at once.
        stands: for the weights of the text towers.
    """
    local = min(gpus, device.together)
    shard = {"replicate": 1, "shard": gpus, "hybrid": local}[recipe.layout]
    passes = max(1, recipe.optimizer.batch // (micro * gpus))
    averages = 1 + len(recipe.optimizer.ema_choices)
    kept = traced.parameters + traced.trained * (STATE_BYTES[recipe.optimizer.name] + 4 * averages)
    spread = 0.0 if shard == 1 else 2 * 2 * traced.block  # this block's weights and the next one's, in bf16
    memory = (kept + traced.gradients) / shard + traced.alive - traced.gradients + spread
    memory = (memory + 4 * stands.tower_parameters) * device.slack + device.base

    towers = 2.0 * stands.tower_parameters * stands.text_tokens * micro
    compute = passes * ((traced.flops + towers) / device.flops + traced.moved / device.bandwidth)
    compute += passes * traced.operations * device.launch
    update = 4 * (traced.parameters / 4 + (5 + averages * 2) * traced.trained) / shard / device.bandwidth

    ring = lambda n: (n - 1) / n  # noqa: E731  # a ring sends this share of the whole from each member
    within = across = 0.0
    weights = traced.parameters / 4
    if shard > 1:  # weights twice a pass in bf16, gradients once in float32
        sent = passes * ring(shard) * (2 * 2 * weights + traced.gradients)
        within, across = (sent, 0.0) if shard <= device.together else (0.0, sent)
    if gpus > shard:  # sum of the replicas' gradients, of the part that each holds
        sent = 2 * ring(gpus // shard) * traced.gradients / shard
        within, across = (within + sent, across) if gpus <= device.together else (within, across + sent)
    seconds = compute + update + within / device.link + across / device.network
    return Plan(
        memory=memory,
        seconds=seconds,
        communicated=within + across,
        images_per_second=passes * micro * gpus / seconds,
    )


def choices(recipe: TrainRecipe, gpus: int) -> list[tuple[str, TrainRecipe, int]]:
    """Settings to try in turn, as (what is changed, recipe, micro-batch): the recipe's own, then ever more frugal."""
    share = max(1, recipe.optimizer.batch // gpus)
    micro = recipe.micro_batch or share
    tried = [("as it is", recipe, micro)]
    saving = dataclasses.replace(recipe, network=dataclasses.replace(recipe.network, gradient_checkpointing=True))
    if not recipe.network.gradient_checkpointing:
        tried.append(("network.gradient_checkpointing=true", saving, micro))
    while micro > 1:
        micro //= 2
        if share % micro == 0:
            tried.append((f"network.gradient_checkpointing=true micro_batch={micro}", saving, micro))
    if recipe.optimizer.name == "adamw":
        frugal = dataclasses.replace(saving, optimizer=dataclasses.replace(saving.optimizer, name="adamw8bit"))
        tried.append((f"{tried[-1][0]} optimizer.name=adamw8bit", frugal, micro))
    return tried


def fitting(recipe: TrainRecipe, device: Device, gpus: int, stands: Stands) -> list[tuple[str, Plan, bool]]:
    """The recipe's plan and those of more frugal settings up to the first that fits, as (setting, plan, fits)."""
    found = []
    for setting, changed, micro in choices(recipe, gpus):
        traced = trace(changed, micro, stands, device.accelerator)
        plan = predict(changed, traced, device, gpus, micro, stands)
        found.append((setting, plan, plan.memory <= device.memory))
        if found[-1][2]:
            break
    return found


def layouts(
    recipe: TrainRecipe, device: Device, stands: Stands, counts: tuple[int, ...]
) -> list[tuple[int, str, Plan]]:
    """The plans of every layout on so many devices, the batch growing with them: the recipe's batch on each."""
    micro = recipe.micro_batch or recipe.optimizer.batch
    traced, plans = trace(recipe, micro, stands, device.accelerator), []
    for gpus in counts:
        grown = dataclasses.replace(recipe.optimizer, batch=recipe.optimizer.batch * gpus)
        for layout in LAYOUTS:
            changed: Any = dataclasses.replace(recipe, layout=layout, optimizer=grown)
            if gpus > 1 or layout == "replicate":
                plans.append((gpus, layout, predict(changed, traced, device, gpus, micro, stands)))
    return plans


def describe(recipe: TrainRecipe, name: str | None, gpus: int) -> str:
    """What `likeness train --plan` says: the counts, and the settings that were tried.

    Args:
        recipe: the run.
        name: a device of `DEVICES`; None measures this machine.
        gpus: how many.

    Raises:
        InputError: there is no data about such a device, or the batch cannot be shared among so many.
    """
    if gpus < 1 or recipe.optimizer.batch % gpus:
        raise InputError(f"a batch of {recipe.optimizer.batch} cannot be shared among {gpus} devices")
    micro = micro_batch(recipe, gpus)
    device, stands = device_named(name, recipe), stands_of(recipe)
    traced = trace(recipe, micro, stands, device.accelerator)
    prices = "measured here" if name is None else "from its data sheet"
    felt = device.bandwidth < (1e13 if device.accelerator else 1e12)  # else the fit has found it to cost nothing
    memory = f"{device.bandwidth / GB:.3g} GB/s" if felt else "reading and writing cost nothing beside that"
    lines = [
        f"weights: {traced.parameters / GB:.3g} GB, {traced.trained:,} of them trained",
        f"a pass of {micro} images: {traced.flops / 1e12:.4g} TFLOP, {traced.moved / GB:.3g} GB read and written, "
        f"{traced.operations:,} operations",
        f"{gpus} x {name or 'this machine'}, {device.memory / GB:.0f} GB each, {prices}: "
        f"{device.flops / 1e12:.3g} TFLOP/s, {memory}",
        f"{'memory':>10} {'step':>10} {'images/s':>10}  setting",
    ]
    for setting, plan, fits in fitting(recipe, device, gpus, stands):
        lines.append(f"{row(plan)}  {setting}{'' if fits else '  (does not fit)'}")
    return "\n".join(lines)


def describe_layouts(recipe: TrainRecipe, name: str | None) -> str:
    """What `likeness train --plan --layouts` says: memory, communication and time of a step in every layout on 1 to 512
    devices, the recipe's batch on each, as a Markdown table.

    Raises:
        InputError: there is no data about such a device, or `micro_batch` does not divide the batch.
    """
    micro_batch(recipe, 1)
    device, stands = device_named(name, recipe), stands_of(recipe)
    lines = [
        f"{name or 'this machine'}, {recipe.optimizer.batch} images on each, {device.together} in a machine: memory, "
        "what it sends in a step, time of a step",
        "",
        f"| devices | {' | '.join(LAYOUTS)} |",
        "|---" * (1 + len(LAYOUTS)) + "|",
    ]
    plans = {(count, layout): plan for count, layout, plan in layouts(recipe, device, stands, COUNTS)}
    for count in COUNTS:
        cells = [plans.get((count, layout), plans[count, "replicate"]) for layout in LAYOUTS]  # one has no layout
        told = [f"{p.memory / GB:.1f} GB, {p.communicated / GB:.1f} GB, {p.seconds:.3g} s" for p in cells]
        lines.append(f"| {count} | {' | '.join(told)} |")
    return "\n".join(lines)


def device_named(name: str | None, recipe: TrainRecipe) -> Device:
    """A device of `DEVICES`, or this machine, measured.

    Raises:
        InputError: there is no data about such a device.
    """
    if name is None:
        from likeness.train.calibrate import this_machine

        return this_machine(recipe.precision)
    if name not in DEVICES:
        raise InputError(
            f"there is no data sheet of {name!r}; known are {', '.join(DEVICES)}, or none for this machine"
        )
    return DEVICES[name]


def row(plan: Plan) -> str:
    """Memory, time and speed in columns."""
    return f"{plan.memory / GB:7.2f} GB {plan.seconds:8.3f} s {plan.images_per_second:10.1f}"


def stands_of(recipe: TrainRecipe) -> Stands:
    """Sizes of what the recipe's network stands on, where it is at hand; else of what was published with it."""
    adapter = isinstance(recipe.network, MDiTFaceAdapter)
    source = recipe.data.components or (recipe.network.base if isinstance(recipe.network, MDiTFaceAdapter) else None)
    if source is not None and not Path(source).is_dir():
        return FLUX_STANDS if adapter else Stands()
    parts = load_components(source or BUNDLED / COMMON)
    width = parts.text_encoder.config.hidden_size
    towers = [tower for tower in (parts.text_encoder, parts.text_encoder_2) if tower is not None]
    return Stands(
        channels=parts.vae.config.latent_channels,
        text_dim=towers[-1].config.hidden_size,
        pooled_dim=width,
        text_tokens=parts.settings["max_text_tokens"],
        tower_parameters=sum(p.numel() for tower in towers for p in tower.parameters()),
    )
