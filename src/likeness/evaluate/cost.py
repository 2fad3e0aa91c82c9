"""What a mask costs MDiTFace in operations: counted on the network itself, at full size, with tensors that have shapes
but no values.

Two counts. The paper's Table 4 comes out of what thop counts: Linear layers without bias, and LayerNorms at two a
value; attention's products, RMSNorms and activations at nothing. The other count is of all matrix products.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from likeness.models.mditface import PATCH, MDiTFaceTransformer
from likeness.models.static_cache import StaticCache
from likeness.pipelines.adapters import Adapter, adapter_state, add_adapter
from likeness.types import InputError, TextFeatures

FACTOR, CHANNELS = 8, 16
"""Of FLUX.1's autoencoder."""
NO_MASK = "no mask"
ATTENTIONS = ("concat", "holistic", "hard", "decoupled")


class Cost(NamedTuple):
    """Of one portrait, all steps together."""

    attention: str
    """`no mask`, or how masks come in (`MDiTFaceTransformer`)."""
    convention: int
    """Multiply-accumulates of Linear layers and LayerNorms, as thop counts them."""
    products: int
    """Multiply-accumulates of all matrix products."""
    cache: int
    """Bytes of cached keys and values, in bf16."""
    adapter: int
    """Parameters that come to those of FLUX.1."""


@torch.no_grad()
def mditface_costs(
    *, size: int = 512, steps: int = 28, text_tokens: int = 512, conditions: int = 1, rank: int = 8
) -> list[Cost]:
    """Costs on FLUX.1-dev without a mask, and with an adapter of each form (`recipes/mditface_lora_512.toml`).

    Args:
        size: pixels a side.
        steps: sampling steps; the static pathway runs once.
        text_tokens: of the prompt.
        conditions: how many masks and the like, K.
        rank: of the LoRA.

    Raises:
        InputError: a size that cannot be cut into patches, or a number below 1.
    """
    for name, value in (("steps", steps), ("text_tokens", text_tokens), ("conditions", conditions), ("rank", rank)):
        if value < 1:
            raise InputError(f"{name} is {value}: give at least 1")
    if size < 1 or size % (FACTOR * PATCH):
        raise InputError(f"the size {size} is not a multiple of {FACTOR * PATCH} pixels")
    costs: list[Cost] = []
    side = size // FACTOR
    with torch.device("meta"):
        latents, time = torch.empty(1, CHANNELS, side, side), torch.empty(1)
        text = TextFeatures(torch.empty(1, text_tokens, 4096), torch.empty(1, 768))
        given = torch.empty(1, conditions, CHANNELS, side, side), torch.empty(1, conditions, dtype=torch.long)
        for attention in ATTENTIONS:
            network = MDiTFaceTransformer(attention=attention)
            if not costs:  # no form adds anything to a portrait from words alone but `concat`, by its LoRA
                plain = count(network, lambda: network(latents, time, text, given[0][:, :0], given[1][:, :0]))  # noqa: B023
                costs.append(Cost(NO_MASK, steps * plain[0], steps * plain[1], 0, 0))
            adapter = Adapter(base="", condition_names=("mask",), attention=attention, rank=rank, alpha=rank)
            add_adapter(network, adapter)
            cache = static_cache(network, text, *given) if attention in ("hard", "decoupled") else None
            first = count(network, lambda: network(latents, time, text, *given))  # noqa: B023
            later = count(network, lambda: network(latents, time, text, *given, static_cache=cache)) if cache else first  # noqa: B023
            convention, products = (once + (steps - 1) * again for once, again in zip(first, later, strict=True))
            values = sum(value.numel() for value in adapter_state(network).values())
            held = cache.bytes // 2 if cache else 0  # float32 here
            costs.append(Cost(attention, convention, products, held, values))
    return costs


def static_cache(network: MDiTFaceTransformer, text: TextFeatures, latents: Tensor, index: Tensor) -> StaticCache:
    """As `MDiTFaceTransformer.static_cache`, without a look at values that are not there."""
    layers = network.static_pathway(network.context_embedder(text.tokens), text.pooled, latents, index)
    return StaticCache(layers=layers, text=text, condition_latents=latents, condition_index=index, complete=True)


def count(network: nn.Module, call: Callable[[], object]) -> tuple[int, int]:
    """Multiply-accumulates of a call: those that thop would see, and those of all matrix products."""
    seen = 0

    def see(module: nn.Module, _: object, output: Tensor) -> None:
        nonlocal seen
        seen += output.numel() * (module.in_features if isinstance(module, nn.Linear) else 2)

    handles = [m.register_forward_hook(see) for m in network.modules() if isinstance(m, (nn.Linear, nn.LayerNorm))]
    try:
        with FlopCounterMode(display=False) as counter:
            call()
    finally:
        for handle in handles:
            handle.remove()
    return seen, counter.get_total_flops() // 2
