"""What a micro-batch costs, counted without computing it: a recipe's network is run forward and backward with tensors
that have shapes but no values, and every operation is noted: its floating-point operations, the bytes it reads and
writes, and what is alive when.
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
from torch._subclasses.fake_tensor import FakeTensorMode, unset_fake_temporarily
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry, sdpa_flop_count

from likeness.files import read_json
from likeness.models.layers import use_explicit_attention
from likeness.models.mditface import MDiTFaceTransformer
from likeness.objectives import make_objective
from likeness.train.config import MDiTFaceAdapter, TrainRecipe, parts_of
from likeness.train.networks import adapter_of, begin_adapter, build_network, choose_trained
from likeness.train.step import loss_of
from likeness.types import TextFeatures

ATTENTION = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
ATTENTION_BACKWARD = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward


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


def trace(recipe: TrainRecipe, micro: int, stands: Stands, accelerator: bool = False) -> Trace:
    """Count what a micro-batch of `micro` images costs, on an accelerator or a CPU. Blocks of a kind cost the same: two
    and three of each are counted, and the rest follows.
    """
    depths = depths_of(recipe)
    few = [min(depth, 2) for depth in depths]
    counted = trace_blocks(recipe, micro, stands, few, accelerator)
    total = dataclasses.asdict(counted)
    for kind, depth in enumerate(depths):
        if depth > 2:
            more = trace_blocks(recipe, micro, stands, [n + (kind == at) for at, n in enumerate(few)], accelerator)
            for name in total.keys() - {"block"}:
                total[name] += (depth - 2) * (getattr(more, name) - getattr(counted, name))
    return Trace(**total)


def trace_blocks(
    recipe: TrainRecipe, micro: int, stands: Stands, depths: Sequence[int], accelerator: bool = False
) -> Trace:
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
        use_explicit_attention(network, not accelerator and recipe.precision == "bf16")
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
        with unset_fake_temporarily(), torch.device("meta"):  # PEFT moves what it adds, which fake tensors do not bear
            base = MDiTFaceTransformer.from_config(sizes).to(torch.bfloat16)
            network: nn.Module = begin_adapter(base, adapter_of(recipe))
        from_meta(network)
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


def from_meta(network: nn.Module) -> None:
    """Put new tensors in the place of those on the meta device; what was shared is shared again."""
    made: dict[Tensor, Tensor] = {}
    for module in network.modules():
        places: tuple[dict[str, Any], ...] = (module._parameters, module._buffers)
        for tensors in places:
            for name, old in tensors.items():
                if old is not None and old not in made:
                    new = torch.empty(old.shape, dtype=old.dtype)
                    made[old] = nn.Parameter(new, old.requires_grad) if isinstance(old, nn.Parameter) else new
                if old is not None:
                    tensors[name] = made[old]
