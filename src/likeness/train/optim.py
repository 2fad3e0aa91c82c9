"""Learning rates and weight averages as functions of images seen, so that batch size and restarts change nothing."""

from __future__ import annotations

import math
from typing import Any, Literal

import torch
from torch import nn

from likeness.parallel import own
from likeness.train.config import OptimizerRecipe
from likeness.types import InputError

Decay = Literal["constant", "linear", "cosine"]


def learning_rate(seen: int, total: int, peak: float, warmup: int, decay: Decay) -> float:
    """The rate after `seen` of `total` images: a linear warm-up over `warmup` images, then the decay to 0."""
    if seen < warmup:
        return peak * (seen + 1) / warmup
    if decay == "constant":
        return peak
    progress = min((seen - warmup) / max(total - warmup, 1), 1.0)
    return peak * (1 - progress if decay == "linear" else (1 + math.cos(math.pi * progress)) / 2)


class Ema:
    """Power-law average of a model's weights (Karras et al. 2024, "Analyzing and Improving the Training Dynamics of
    Diffusion Models", equation 6): the weight of the past falls as a power of progress, so that one number fits
    runs of any length and no warm-up is needed.
    """

    def __init__(self, model: nn.Module, relative_width: float = 0.1) -> None:
        self.model, self.relative_width, self.gamma = model, relative_width, power_of(relative_width)
        # clones keep the dtype, device and sharding of the parameters they follow
        self.weights = {name: p.detach().clone() for name, p in trained_parameters(model).items()}

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Follow the model after optimizer step number `step`, counted from 1."""
        beta = (1 - 1 / step) ** (self.gamma + 1)
        parameters = trained_parameters(self.model)
        theirs: list[torch.Tensor] = [own(parameter.detach()) for parameter in parameters.values()]
        torch._foreach_lerp_([own(self.weights[name]) for name in parameters], theirs, 1 - beta)

    @torch.no_grad()
    def copy_to(self, model: nn.Module) -> None:
        """Put the average into `model`; what was not trained is left alone."""
        parameters = dict(model.named_parameters())
        for name, weight in self.weights.items():
            parameters[name].copy_(weight)

    @torch.no_grad()
    def swap(self) -> None:
        """Exchange the average and the model's own weights; a second call exchanges them back."""
        for name, parameter in trained_parameters(self.model).items():
            theirs = parameter.detach().clone()
            parameter.copy_(self.weights[name])
            self.weights[name].copy_(theirs)


def trained_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters that are trained: all of a network from random weights, the adapters of a frozen one."""
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def power_of(relative_width: float) -> float:
    """The exponent gamma whose average has this relative width (same paper, appendix C, the real root above 0)."""
    from numpy import roots

    inverse = relative_width**-2
    return float(roots([1, 7, 16 - inverse, 12 - inverse]).real.max())


def make_optimizers(model: nn.Module, recipe: OptimizerRecipe) -> list[torch.optim.Optimizer]:
    """The optimizers of a transformer: AdamW, AdamW with states of 8 bits (Dettmers et al. 2022; torchao's, since
    bitsandbytes' cannot be sharded), or Muon for the matrices of its blocks and AdamW for all else.

    Modulations stay with AdamW: they begin at zero, and their outputs are scales and gates, no features to be turned.

    Raises:
        InputError: torchao is not installed.
    """
    named = trained_parameters(model)
    inner = {n for n, p in named.items() if recipe.name == "muon" and p.ndim == 2 and is_inner(n)}
    settings = {"lr": recipe.learning_rate, "weight_decay": recipe.weight_decay}
    if recipe.name == "adamw8bit":
        return [adamw8bit()(list(named.values()), betas=recipe.betas, **settings)]
    rest = [parameter for name, parameter in named.items() if name not in inner]
    optimizers: list[torch.optim.Optimizer] = [torch.optim.AdamW(rest, betas=recipe.betas, fused=True, **settings)]
    if inner:
        matrices = [named[name] for name in sorted(inner)]
        optimizers.append(torch.optim.Muon(matrices, adjust_lr_fn="match_rms_adamw", **settings))
    return optimizers


def is_inner(name: str) -> bool:
    """Whether a parameter, by its name, belongs to a block and is no modulation."""
    return "blocks." in name and "modulation" not in name and ".norm" not in name  # FLUX: norm1.linear and the like


def adamw8bit() -> Any:
    """torchao's class, which fuses itself with torch.compile when it takes its first step."""
    try:
        from torchao.optim import AdamW8bit
    except ImportError as error:
        raise InputError("the optimizer adamw8bit needs torchao: pip install 'likeness[train]'") from error
    return AdamW8bit
