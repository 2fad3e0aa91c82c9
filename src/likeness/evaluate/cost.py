"""Count the operations that a mask adds to MDiTFace on FLUX.1-dev, with tensors without values.

Two counts. `linear` is that of thop, which gives Table 4 of the paper: Linear layers without bias, and LayerNorms at
two operations per value, without the products of attention. `products` counts all matrix products.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from likeness.models.mditface import PATCH, MDiTFaceTransformer
from likeness.pipelines.adapters import Adapter, adapter_state, add_adapter
from likeness.types import InputError, TextFeatures

FACTOR, CHANNELS = 8, 16
"""Of the autoencoder of FLUX.1."""
DOUBLE_BLOCKS, SINGLE_BLOCKS = 19, 38
"""Of FLUX.1."""
ATTENTIONS = ("concat", "holistic", "hard", "decoupled")


class Cost(NamedTuple):
    """The cost of an image, over all steps."""

    attention: str
    """`no mask`, or the attention of `MDiTFaceTransformer`."""
    linear: int
    """Multiply-accumulates of Linear layers and LayerNorms."""
    products: int
    """Multiply-accumulates of all matrix products."""
    cache: int
    """Bytes of cached keys and values, in bf16."""
    adapter: int
    """Parameters of the adapter."""


def mditface_costs(
    *, size: int = 512, steps: int = 28, text_tokens: int = 512, conditions: int = 1, rank: int = 8
) -> list[Cost]:
    """Count the cost on FLUX.1-dev without a mask, then with an adapter for each attention. Networks of two and three
    blocks of each kind are counted and extrapolated, since all blocks of a kind cost the same.

    The static pathway runs once, the others in every step; `rank` is that of the LoRA. Raises `InputError` if the size,
    in pixels, is not a multiple of the patch size, or a number is below 1.
    """
    for name, value in (("steps", steps), ("text_tokens", text_tokens), ("conditions", conditions), ("rank", rank)):
        if value < 1:
            raise InputError(f"{name} is {value}; it must be at least 1")
    if size < 1 or size % (FACTOR * PATCH):
        raise InputError(f"The size {size} is not a multiple of {FACTOR * PATCH} pixels")
    side, costs = size // FACTOR, []
    with torch.device("meta"), torch.no_grad():
        latents, time = torch.empty(1, CHANNELS, side, side), torch.empty(1)
        text = TextFeatures(torch.empty(1, text_tokens, 4096), torch.empty(1, 768))
        given = torch.empty(1, conditions, CHANNELS, side, side), torch.empty(1, conditions, dtype=torch.long)

        def cost(attention: Any, double: int, single: int) -> tuple[int, int, int, int]:
            """Count the numbers of a `Cost` with this number of blocks of each kind."""
            variant = (
                {} if attention == "no mask" else {"attention": attention}
            )  # without conditions, all cost the same
            network = MDiTFaceTransformer(**variant, num_layers=double, num_single_layers=single)
            run = lambda *inputs, **options: network(latents, time, text, *inputs, **options)  # noqa: E731
            if not variant:
                linear, products = count(network, lambda: run(given[0][:, :0], given[1][:, :0]))
                return steps * linear, steps * products, 0, 0
            adapter = Adapter(base="", condition_names=("mask",), attention=attention, rank=rank, alpha=rank)
            add_adapter(network, adapter)
            cache = network.static_cache(text, *given) if attention in ("hard", "decoupled") else None
            first = count(network, lambda: run(*given))
            later = count(network, lambda: run(*given, static_cache=cache)) if cache else first
            linear, products = (once + (steps - 1) * again for once, again in zip(first, later, strict=True))
            cached = 2 * sum(x.numel() for layer in cache or () for x in layer)  # bf16
            return linear, products, cached, sum(value.numel() for value in adapter_state(network).values())

        for attention in ("no mask", *ATTENTIONS):
            few, double, single = (np.array(cost(attention, *blocks)) for blocks in ((2, 2), (3, 2), (2, 3)))
            total = few + (DOUBLE_BLOCKS - 2) * (double - few) + (SINGLE_BLOCKS - 2) * (single - few)
            costs.append(Cost(attention, *total.tolist()))
    return costs


def count(network: nn.Module, call: Callable[[], object]) -> tuple[int, int]:
    """Count the multiply-accumulates of a call: (linear, products)."""
    linear = 0

    def add(module: nn.Module, _: object, output: Tensor) -> None:
        nonlocal linear
        linear += output.numel() * (module.in_features if isinstance(module, nn.Linear) else 2)

    handles = [m.register_forward_hook(add) for m in network.modules() if isinstance(m, (nn.Linear, nn.LayerNorm))]
    try:
        with FlopCounterMode(display=False) as counter:
            call()
    finally:
        for handle in handles:
            handle.remove()
    return linear, counter.get_total_flops() // 2
