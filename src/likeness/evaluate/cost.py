"""Count the operations that a mask adds to MDiTFace, on the full-size network with tensors without values.

Two counts. `linear` is that of thop, which gives Table 4 of the paper: Linear layers without bias, and LayerNorms at
two operations per value, without the products of attention. `products` counts all matrix products.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from likeness.models.mditface import PATCH, MDiTFaceTransformer
from likeness.pipelines.adapters import Adapter, adapter_state, add_adapter
from likeness.types import InputError, TextFeatures

FACTOR, CHANNELS = 8, 16
"""Of the autoencoder of FLUX.1."""
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


@torch.no_grad()
def mditface_costs(
    *, size: int = 512, steps: int = 28, text_tokens: int = 512, conditions: int = 1, rank: int = 8
) -> list[Cost]:
    """Count the cost on FLUX.1-dev without a mask, then with an adapter for each attention.

    Args:
        size: side in pixels.
        steps: sampling steps; the static pathway runs once.
        text_tokens: tokens of the prompt.
        conditions: number of conditions, K.
        rank: rank of the LoRA.

    Raises:
        InputError: the size is not a multiple of the patch size, or a number is below 1.
    """
    for name, value in (("steps", steps), ("text_tokens", text_tokens), ("conditions", conditions), ("rank", rank)):
        if value < 1:
            raise InputError(f"{name} is {value}; it must be at least 1")
    if size < 1 or size % (FACTOR * PATCH):
        raise InputError(f"The size {size} is not a multiple of {FACTOR * PATCH} pixels")
    costs: list[Cost] = []
    side = size // FACTOR
    with torch.device("meta"):
        latents, time = torch.empty(1, CHANNELS, side, side), torch.empty(1)
        text = TextFeatures(torch.empty(1, text_tokens, 4096), torch.empty(1, 768))
        given = torch.empty(1, conditions, CHANNELS, side, side), torch.empty(1, conditions, dtype=torch.long)
        for attention in ATTENTIONS:
            network = MDiTFaceTransformer(attention=attention)
            run = lambda *inputs, network=network, **options: network(latents, time, text, *inputs, **options)  # noqa: E731
            if not costs:  # without conditions, all attentions cost the same
                linear, products = count(network, lambda: run(given[0][:, :0], given[1][:, :0]))  # noqa: B023
                costs.append(Cost("no mask", steps * linear, steps * products, 0, 0))
            add_adapter(
                network, Adapter(base="", condition_names=("mask",), attention=attention, rank=rank, alpha=rank)
            )
            cache = network.static_cache(text, *given) if attention in ("hard", "decoupled") else None
            first = count(network, lambda: run(*given))  # noqa: B023
            later = count(network, lambda: run(*given, static_cache=cache)) if cache else first  # noqa: B023
            linear, products = (once + (steps - 1) * again for once, again in zip(first, later, strict=True))
            parameters = sum(value.numel() for value in adapter_state(network).values())
            cached = 2 * sum(x.numel() for layer in cache or () for x in layer)  # bf16
            costs.append(Cost(attention, linear, products, cached, parameters))
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
