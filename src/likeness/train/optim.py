"""Optimizers, and the learning rate as a function of images seen, so that batch size and restarts change nothing."""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import nn
from torch.distributed.tensor import DTensor

from likeness.train.config import OptimizerRecipe
from likeness.train.muon import Muon
from likeness.types import InputError


def learning_rate(
    seen: int, total: int, peak: float, warmup: int, decay: Literal["constant", "linear", "cosine"] = "cosine"
) -> float:
    """Return the learning rate after `seen` of `total` images: linear warm-up over `warmup` images, then decay to 0."""
    if seen < warmup:
        return peak * (seen + 1) / warmup
    if decay == "constant":
        return peak
    progress = min((seen - warmup) / max(total - warmup, 1), 1.0)
    return peak * (1 - progress if decay == "linear" else (1 + math.cos(math.pi * progress)) / 2)


def trainable_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """Return the parameters that require gradients, by name."""
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def make_optimizers(model: nn.Module, recipe: OptimizerRecipe) -> list[torch.optim.Optimizer]:
    """Create the optimizers of a transformer: AdamW, AdamW with 8-bit states (Dettmers et al. 2022; torchao's, since
    bitsandbytes' cannot be sharded), or Muon for the matrices of the blocks and AdamW for the rest.

    Modulations stay with AdamW: they are initialized with zeros, and their outputs are scales and gates.

    Raises:
        InputError: torchao is not installed.
    """
    parameters = trainable_parameters(model)
    settings = {"lr": recipe.learning_rate, "weight_decay": recipe.weight_decay}
    if recipe.name == "adamw8bit":
        try:
            from torchao.optim import AdamW8bit  # compiles itself at its first step
        except ImportError as error:
            raise InputError("the optimizer adamw8bit needs torchao: pip install 'likeness[train]'") from error
        if any(isinstance(parameter, DTensor) for parameter in parameters.values()):
            # the caches of compiled code on disk do not distinguish parts of different size of a sharded weight
            from torch._functorch import config as autograd  # here, because torch._inductor takes a second to load
            from torch._inductor import config as inductor

            inductor.fx_graph_cache = autograd.enable_autograd_cache = False
        return [AdamW8bit(list(parameters.values()), betas=recipe.betas, **settings)]
    matrices = {n: p for n, p in parameters.items() if recipe.name == "muon" and p.ndim == 2 and is_in_block(n)}
    rest = [parameter for name, parameter in parameters.items() if name not in matrices]
    optimizers: list[torch.optim.Optimizer] = []
    if rest:
        optimizers.append(torch.optim.AdamW(rest, betas=recipe.betas, fused=True, **settings))
    if matrices:
        ordered = [matrices[name] for name in sorted(matrices)]
        optimizers.append(Muon(ordered, **settings))
    return optimizers


def is_in_block(name: str) -> bool:
    """Return whether a parameter belongs to a block and not to its modulation, which FLUX names norm1.linear etc."""
    return "blocks." in name and "modulation" not in name and ".norm" not in name
