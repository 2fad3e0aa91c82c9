"""Count the cost of a micro-batch without computing it: forward and backward pass with fake tensors, which have shapes
but no values, noting floating-point operations, bytes read and written, and live memory.
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
from likeness.models.mmface import MMFaceTransformer
from likeness.objectives import make_objective
from likeness.train.batches import Batch
from likeness.train.config import AdapterNetwork, MDiTFaceAdapter, MMFaceAdapter, TrainRecipe, split_key
from likeness.train.losses import denoising_losses
from likeness.train.networks import adapter_of, add_new_adapter, build_network, freeze_others
from likeness.types import TextFeatures
from likeness.weights.catalog import bundled_models, find_model

CPU_ATTENTION = {  # operator: (index of the query, FLOPs relative to the forward pass)
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: (0, 1.0),
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: (1, 2.5),
}


@dataclass(frozen=True, kw_only=True)
class ComponentSizes:
    """Sizes of the components. The defaults are those of MMFace-DiT as published (Stable Diffusion 2.1's encoder)."""

    channels: int = 16  # channels of the latents
    text_dim: int = 1024  # width of text tokens
    pooled_dim: int = 1024  # width of pooled text
    text_tokens: int = 77  # text tokens per caption
    text_parameters: int = 340_000_000  # parameters of the text encoders, in float32


FLUX_SIZES = ComponentSizes(text_dim=4096, pooled_dim=768, text_tokens=512, text_parameters=4_885_000_000)
"""T5-XXL and CLIP-L."""


@dataclass(frozen=True, kw_only=True)
class Trace:
    """Cost of one micro-batch, and sizes of the network."""

    parameters: int  # bytes of all weights
    trainable: int  # number of trainable weights
    gradients: int  # bytes of gradients
    block: int  # weights of the largest block, which a rank of a sharded network gathers at a time
    live: int  # peak of the live bytes in addition to the weights, including gradients
    flops: float  # floating-point operations
    moved: float  # bytes read and written
    operations: int  # number of operations


class Meter(TorchDispatchMode):
    """Count operations and live storage."""

    def __init__(self) -> None:
        super().__init__()
        self.flops, self.moved, self.operations, self.live, self.peak = 0.0, 0.0, 0, 0, 0
        self.storages: dict[int, int] = {}

    def add(self, tensor: Tensor) -> None:
        """Count a tensor's storage until it is freed."""
        storage = tensor.untyped_storage()
        if storage._cdata not in self.storages:
            self.storages[storage._cdata] = storage.nbytes()
            self.live += storage.nbytes()
            self.peak = max(self.peak, self.live)
            weakref.finalize(storage, self.remove, storage._cdata)

    def remove(self, key: int) -> None:
        """Stop counting a storage."""
        self.live -= self.storages.pop(key, 0)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        inputs = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
        before = {x.untyped_storage()._cdata for x in inputs}
        result = func(*args, **(kwargs or {}))
        outputs = [x for x in tree_leaves(result) if isinstance(x, Tensor)]
        packet = func._overloadpacket
        if packet in CPU_ATTENTION:
            first, factor = CPU_ATTENTION[packet]
            self.flops += factor * sdpa_flop_count(*(x.shape for x in args[first : first + 3]))
        elif packet in flop_registry:
            self.flops += flop_registry[packet](*args, **(kwargs or {}), out_val=result)
        new = [x for x in outputs if x.untyped_storage()._cdata not in before]
        if new or func._schema.is_mutable:  # not a view
            self.operations += 1
            self.moved += sum(x.numel() * x.element_size() for x in (*inputs, *outputs))
        for tensor in new:
            self.add(tensor)
        return result


def trace(recipe: TrainRecipe, micro: int, sizes: ComponentSizes, accelerator: bool = False) -> Trace:
    """Count the cost of a micro-batch of `micro` images, on an accelerator or a CPU. Two and three blocks of each kind
    are traced and extrapolated, since all blocks of a kind cost the same.
    """
    depths = block_counts(recipe)
    few = [min(depth, 2) for depth in depths]
    base = trace_blocks(recipe, micro, sizes, few, accelerator)
    total = dataclasses.asdict(base)
    for kind, depth in enumerate(depths):
        if depth > 2:
            more = trace_blocks(recipe, micro, sizes, [n + (kind == index) for index, n in enumerate(few)], accelerator)
            for name in total.keys() - {"block"}:
                total[name] += (depth - 2) * (getattr(more, name) - getattr(base, name))
    return Trace(**total)


def trace_blocks(
    recipe: TrainRecipe, micro: int, sizes: ComponentSizes, depths: Sequence[int], accelerator: bool = False
) -> Trace:
    """Count the cost with this number of blocks of each kind."""
    objective = make_objective(recipe.objective)
    if objective.config()["name"] == "ddpm":  # looks up noise levels by value; rectified flow costs the same
        objective = make_objective({"name": "rectified_flow"})
    with FakeTensorMode():
        network = random_network(recipe, sizes, depths).train()
        use_explicit_attention(network, not accelerator and recipe.precision == "bf16")
        batch = random_batch(recipe, micro, sizes)
        with Meter() as meter:
            with torch.autocast("cpu", torch.bfloat16, enabled=recipe.precision == "bf16"):
                loss = denoising_losses(network, objective, batch).mean()
            loss.backward()
        parameters = list(network.parameters())
        blocks = [m for m in network.modules() if type(m).__name__ in network._no_split_modules]
        return Trace(
            parameters=sum(p.numel() * p.element_size() for p in parameters),
            trainable=sum(p.numel() for p in parameters if p.requires_grad),
            gradients=sum(p.numel() * 4 for p in parameters if p.grad is not None),
            block=max(sum(p.numel() for p in block.parameters()) for block in blocks),
            live=meter.peak,
            flops=meter.flops,
            moved=meter.moved,
            operations=meter.operations,
        )


def random_batch(recipe: TrainRecipe, micro: int, sizes: ComponentSizes) -> Batch:
    """Return a batch of the shapes of a recipe: random values, all conditions present."""
    side = recipe.defaults.get("size", 256) // 8
    slots = max(1, *(len(split_key(key)) for key in recipe.data.condition_probabilities))
    latents = torch.randn(micro, sizes.channels, side, side)
    return Batch(
        clean=latents,
        noise=torch.randn_like(latents),
        uniform=torch.rand(micro),
        condition_latents=torch.randn(micro, slots, sizes.channels, side, side),
        condition_index=torch.zeros(micro, slots, dtype=torch.long),
        captions=[],
        text=TextFeatures(torch.randn(micro, sizes.text_tokens, sizes.text_dim), torch.randn(micro, sizes.pooled_dim)),
    )


DEPTHS = {"mmface_adapter": ("depth",), "mditface_adapter": ("num_layers", "num_single_layers")}
"""Adapter -> the options of its base for the number of blocks of each kind."""


def block_counts(recipe: TrainRecipe) -> list[int]:
    """Return the number of blocks of each kind."""
    if isinstance(recipe.network, MMFaceAdapter):
        return [base_config(recipe.network).get("depth", 28)]
    if isinstance(recipe.network, MDiTFaceAdapter):
        config = base_config(recipe.network)
        return [config.get("num_layers", 19), config.get("num_single_layers", 38)]
    return [value for name in ("depth", "single_depth") if (value := getattr(recipe.network, name, None)) is not None]


def base_config(network: AdapterNetwork) -> dict[str, Any]:
    """Return the configuration of an adapter's base if it is local, else nothing: it has the published sizes."""
    folder = find_model(network.base) if network.base in bundled_models() else Path(network.base)
    folder = folder / "model" if (folder / "model").is_dir() else folder  # of a training run
    config = folder / "transformer" / "config.json"
    return {key: value for key, value in (read_json(config) if config.is_file() else {}).items() if key[0] != "_"}


def random_network(recipe: TrainRecipe, sizes: ComponentSizes, depths: Sequence[int]) -> Any:
    """Create the network of a recipe with random weights and this number of blocks of each kind."""
    network: Any
    if isinstance(recipe.network, AdapterNetwork):
        config = base_config(recipe.network) | dict(zip(DEPTHS[recipe.network.name], depths, strict=True))
        with unset_fake_temporarily(), torch.device("meta"):  # PEFT moves new weights; fake tensors cannot be moved
            if isinstance(recipe.network, MDiTFaceAdapter):
                config |= {"condition_names": (), "attention": recipe.network.attention}
                base: Any = MDiTFaceTransformer.from_config(config).to(torch.bfloat16)
            else:
                base = MMFaceTransformer.from_config(config)
            network = add_new_adapter(base, adapter_of(recipe))
        from_meta(network)
    else:
        changed: Any = dict(zip(("depth", "single_depth"), depths, strict=False))
        recipe = dataclasses.replace(recipe, network=dataclasses.replace(recipe.network, **changed))
        network = build_network(
            recipe,
            channels=sizes.channels,
            text_dim=sizes.text_dim,
            pooled_dim=sizes.pooled_dim,
            text_tokens=sizes.text_tokens,
        )
    freeze_others(network, recipe.trainable)
    if recipe.network.gradient_checkpointing:
        network.enable_gradient_checkpointing()
    return network


def from_meta(network: nn.Module) -> None:
    """Replace the tensors of a network on the meta device by new ones; shared tensors stay shared."""
    new: dict[Tensor, Tensor] = {}
    for module in network.modules():
        for tensors in (module._parameters, module._buffers):
            for name, old in tensors.items():
                if old is not None and old not in new:
                    empty = torch.empty(old.shape, dtype=old.dtype)
                    new[old] = nn.Parameter(empty, old.requires_grad) if isinstance(old, nn.Parameter) else empty
                if old is not None:
                    tensors[name] = new[old]  # type: ignore[assignment]
