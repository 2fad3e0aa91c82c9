"""What a recipe will need before it is begun: memory and time of a step on a named device, and what would fit.

One micro-batch is run forward and backward with tensors that have shapes but no values, and every operation is counted:
its floating-point operations, the bytes it reads and writes, and what is alive when. Time is linear in the three counts
(operations launched, too); their prices come from a device's data sheet, or are measured on this machine.
"""

from __future__ import annotations

import dataclasses
import weakref
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry, sdpa_flop_count

from likeness.models.mditface import MDiTFaceTransformer
from likeness.objectives import make_objective
from likeness.pipelines.catalogue import BUNDLED, COMMON
from likeness.pipelines.load import load_components, read_json
from likeness.train.config import MDiTFaceAdapter, TrainRecipe, parts_of
from likeness.train.devices import DEVICES, Device
from likeness.train.networks import adapter_of, begin_adapter, build_network, choose_trained
from likeness.train.step import loss_of
from likeness.types import InputError, TextFeatures

GB = 1e9
ATTENTION = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
ATTENTION_BACKWARD = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward
STATE_BYTES = {"adamw": 8.0, "adamw8bit": 2.03, "muon": 8.0}
"""Bytes of optimizer state a trained weight; 8-bit ones have a scale for every 256 numbers; Muon's are fewer."""


@dataclass(frozen=True, kw_only=True)
class Stands:
    """Sizes of what a network stands on."""

    channels: int = 16
    text_dim: int = 1024
    pooled_dim: int = 1024
    text_tokens: int = 77
    tower_parameters: int = 340_000_000
    """Of the text towers, which lie beside the network in float32. The default is Stable Diffusion 2.1's."""


FLUX_STANDS = Stands(text_dim=4096, pooled_dim=768, text_tokens=512, tower_parameters=4_885_000_000)
"""T5-XXL and CLIP-L."""


@dataclass(frozen=True, kw_only=True)
class Trace:
    """What one micro-batch costs a process, and what the network weighs."""

    parameters: int
    """Bytes of all weights."""
    trained: int
    """Number of weights that are trained."""
    gradients: int
    """Bytes of their gradients."""
    block: int
    """Most weights in one block: what a process that shares weights holds whole at a time."""
    alive: int
    """Most bytes alive beside the weights, gradients among them."""
    flops: float
    moved: float
    """Bytes read and written."""
    operations: int


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


class Meter(TorchDispatchMode):
    """Counts operations, and the storage that is alive."""

    def __init__(self) -> None:
        super().__init__()
        self.flops, self.moved, self.operations, self.alive, self.peak = 0.0, 0.0, 0, 0, 0
        self.known: dict[int, int] = {}

    def know(self, tensor: Tensor) -> None:
        """Count a tensor's storage until it dies."""
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key not in self.known:
            self.known[key] = storage.nbytes()
            self.alive += storage.nbytes()
            self.peak = max(self.peak, self.alive)
            weakref.finalize(storage, self.forget, key)

    def forget(self, key: int) -> None:
        self.alive -= self.known.pop(key, 0)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
        before = {x.untyped_storage()._cdata for x in given}
        result = func(*args, **(kwargs or {}))
        made = [x for x in tree_leaves(result) if isinstance(x, Tensor)]
        packet = func._overloadpacket
        if packet in (ATTENTION, ATTENTION_BACKWARD):
            backward = packet is ATTENTION_BACKWARD
            query, key, value = (x.shape for x in (args[1:4] if backward else args[:3]))
            self.flops += sdpa_flop_count(query, key, value) * (2.5 if backward else 1)
        elif packet in flop_registry:
            self.flops += flop_registry[packet](*args, **(kwargs or {}), out_val=result)
        new = [x for x in made if x.untyped_storage()._cdata not in before]
        if new or func._schema.is_mutable:  # else a view: nothing happens
            self.operations += 1
            self.moved += sum(x.numel() * x.element_size() for x in (*given, *made))
        for tensor in new:
            self.know(tensor)
        return result


def trace(recipe: TrainRecipe, micro: int, stands: Stands) -> Trace:
    """Count what a micro-batch of `micro` images costs. Blocks of a kind cost the same: two and three of each are
    counted, and the rest follows.
    """
    depths = depths_of(recipe)
    few = [min(depth, 2) for depth in depths]
    counted = trace_blocks(recipe, micro, stands, few)
    total = dataclasses.asdict(counted)
    for kind, depth in enumerate(depths):
        if depth > 2:
            more = trace_blocks(recipe, micro, stands, [n + (kind == at) for at, n in enumerate(few)])
            for name in total.keys() - {"block"}:
                total[name] += (depth - 2) * (getattr(more, name) - getattr(counted, name))
    return Trace(**total)


def trace_blocks(recipe: TrainRecipe, micro: int, stands: Stands, depths: Sequence[int]) -> Trace:
    """Count with so many blocks of each kind."""
    side = recipe.defaults.get("size", 256) // 8
    most = max(1, *(len(parts_of(share)) for share in recipe.data.condition_shares))
    objective = make_objective(recipe.objective)
    if objective.config()["name"] == "ddpm":  # looks its noise levels up, which shapes cannot; flow costs the same
        objective = make_objective({"name": "rectified_flow"})
    with FakeTensorMode():
        network = fake_network(recipe, stands, depths)
        if recipe.network.gradient_checkpointing:
            network.enable_gradient_checkpointing()
        network.train()
        latents = torch.zeros(micro, stands.channels, side, side)
        text = TextFeatures(
            torch.zeros(micro, stands.text_tokens, stands.text_dim), torch.zeros(micro, stands.pooled_dim)
        )
        conditions = torch.zeros(micro, most, stands.channels, side, side)
        index = torch.zeros(micro, most, dtype=torch.long)
        with Meter() as meter:
            with torch.autocast("cpu", torch.bfloat16, enabled=recipe.precision == "bf16"):
                loss = loss_of(
                    network, objective, latents, latents.clone(), torch.zeros(micro), text, conditions, index
                )
            loss.backward()
        named = dict(network.named_parameters())
        blocks = [m for m in network.modules() if type(m).__name__ in network._no_split_modules]
        return Trace(
            parameters=sum(p.numel() * p.element_size() for p in named.values()),
            trained=sum(p.numel() for p in named.values() if p.requires_grad),
            gradients=sum(p.numel() * 4 for p in named.values() if p.grad is not None),
            block=max(sum(p.numel() for p in block.parameters()) for block in blocks),
            alive=meter.peak,
            flops=meter.flops,
            moved=meter.moved,
            operations=meter.operations,
        )


def depths_of(recipe: TrainRecipe) -> list[int]:
    """Blocks of each kind."""
    if isinstance(recipe.network, MDiTFaceAdapter):
        sizes = base_sizes(recipe.network)
        return [sizes.get("num_layers", 19), sizes.get("num_single_layers", 38)]
    return [value for name in ("depth", "single_depth") if (value := getattr(recipe.network, name, None)) is not None]


def base_sizes(network: MDiTFaceAdapter) -> dict[str, Any]:
    """What an adapter's base says of itself; nothing where it is no folder here: then it has FLUX.1's size."""
    config = Path(network.base) / "transformer" / "config.json"
    sizes = read_json(config) if config.is_file() else {}
    return {key: value for key, value in sizes.items() if not key.startswith("_")}


def fake_network(recipe: TrainRecipe, stands: Stands, depths: Sequence[int] | None = None) -> Any:
    """The network of a recipe, with so many blocks of each kind where that is said."""
    if isinstance(recipe.network, MDiTFaceAdapter):
        sizes = base_sizes(recipe.network) | {"condition_names": (), "attention": recipe.network.attention}
        if depths:
            sizes |= {"num_layers": depths[0], "num_single_layers": depths[1]}
        base = MDiTFaceTransformer.from_config(sizes)
        network: nn.Module = begin_adapter(base.to(torch.bfloat16), adapter_of(recipe))
    else:
        if depths:
            changed: Any = dict(zip(("depth", "single_depth"), depths, strict=False))
            recipe = dataclasses.replace(recipe, network=dataclasses.replace(recipe.network, **changed))
        network = build_network(
            recipe,
            channels=stands.channels,
            text_dim=stands.text_dim,
            pooled_dim=stands.pooled_dim,
            text_tokens=stands.text_tokens,
        )
    choose_trained(network, recipe)
    return network


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
        plan = predict(changed, trace(changed, micro, stands), device, gpus, micro, stands)
        found.append((setting, plan, plan.memory <= device.memory))
        if found[-1][2]:
            break
    return found


def layouts(
    recipe: TrainRecipe, device: Device, stands: Stands, counts: tuple[int, ...]
) -> list[tuple[int, str, Plan]]:
    """The plans of every layout on so many devices, the batch growing with them: the recipe's batch on each."""
    micro = recipe.micro_batch or recipe.optimizer.batch
    traced, plans = trace(recipe, micro, stands), []
    for gpus in counts:
        grown = dataclasses.replace(recipe.optimizer, batch=recipe.optimizer.batch * gpus)
        for layout in ("replicate", "shard", "hybrid"):
            changed: Any = dataclasses.replace(recipe, layout=layout, optimizer=grown)
            if gpus > 1 or layout == "replicate":
                plans.append((gpus, layout, predict(changed, traced, device, gpus, micro, stands)))
    return plans


def describe(recipe: TrainRecipe, name: str | None, gpus: int) -> str:
    """What `likeness train --plan` says: the counts, the settings that were tried, and every layout on 1 to `gpus`.

    Args:
        recipe: the run.
        name: a device of `DEVICES`; None measures this machine.
        gpus: how many.

    Raises:
        InputError: there is no data about such a device, or the batch cannot be shared among so many.
    """
    if name is not None and name not in DEVICES:
        raise InputError(
            f"there is no data sheet of {name!r}; known are {', '.join(DEVICES)}, or none for this machine"
        )
    if gpus < 1 or recipe.optimizer.batch % gpus:
        raise InputError(f"a batch of {recipe.optimizer.batch} cannot be shared among {gpus} devices")
    from likeness.train.calibrate import this_machine

    device = DEVICES[name] if name else this_machine(recipe.precision)
    stands = stands_of(recipe)
    micro = recipe.micro_batch or recipe.optimizer.batch // gpus
    traced = trace(recipe, micro, stands)
    prices = "measured here" if name is None else "from its data sheet"
    lines = [
        f"weights: {traced.parameters / GB:.3g} GB, {traced.trained:,} of them trained",
        f"a pass of {micro} images: {traced.flops / 1e12:.4g} TFLOP, {traced.moved / GB:.3g} GB read and written, "
        f"{traced.operations:,} operations",
        f"{gpus} x {name or 'this machine'}, {device.memory / GB:.0f} GB each, {prices}: "
        f"{device.flops / 1e12:.3g} TFLOP/s, {device.bandwidth / GB:.3g} GB/s",
        f"{'memory':>10} {'step':>10} {'images/s':>10}  setting",
    ]
    for setting, plan, fits in fitting(recipe, device, gpus, stands):
        lines.append(f"{row(plan)}  {setting}{'' if fits else '  (does not fit)'}")
    if gpus > 1:
        lines.append(f"{'memory':>10} {'step':>10} {'images/s':>10} {'sent/step':>10}  devices, {micro} images on each")
        counts = tuple(2**power for power in range(gpus.bit_length()) if 2**power <= gpus)
        batch = dataclasses.replace(
            recipe, micro_batch=micro, optimizer=dataclasses.replace(recipe.optimizer, batch=micro)
        )
        for count, layout, plan in layouts(batch, device, stands, counts):
            lines.append(f"{row(plan)} {plan.communicated / GB:7.2f} GB  {count} {layout}")
    return "\n".join(lines)


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
