"""Power-law EMA of the weights, and its width chosen after training (post-hoc EMA).

Karras et al. 2024, "Analyzing and Improving the Training Dynamics of Diffusion Models" (arXiv 2312.02696). The weight
of the past falls as a power of progress: one number fits runs of any length, without a warm-up. EMAs of several widths
are stored at every checkpoint; any other one is close to a weighted sum of those (section 3.2). The weights follow from
the inner products of their profiles p(t) = (g + 1) t^g / T^(g + 1) over 0 < t < T.
"""

from __future__ import annotations

import copy
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save
from torch import nn

from likeness.files import read_json, write_whole, writing_folder
from likeness.parallel import World, gather, local_tensor
from likeness.train.config import MAX_EMA_WIDTH
from likeness.train.optim import trainable_parameters
from likeness.types import InputError
from likeness.weights.files import read_weights
from likeness.weights.packed import load_component

FOLDER = "averages"


class Ema:
    """Power-law EMA of the trainable parameters of a model (equation 6)."""

    def __init__(self, model: nn.Module, width: float) -> None:
        self.model, self.width, self.gamma = model, width, exponent(width)
        # clones have the dtype, device and sharding of the parameters
        self.weights = {name: p.detach().clone() for name, p in trainable_parameters(model).items()}

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Update the EMA after optimizer step number `step`, counted from 1."""
        beta = (1 - 1 / step) ** (self.gamma + 1)
        parameters = trainable_parameters(self.model)
        new: list[torch.Tensor] = [local_tensor(parameter.detach()) for parameter in parameters.values()]
        torch._foreach_lerp_([local_tensor(self.weights[name]) for name in parameters], new, 1 - beta)

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Swap the EMA weights into the model within a `with` block."""
        self.swap()
        try:
            yield
        finally:
            self.swap()

    @torch.no_grad()
    def swap(self) -> None:
        """Swap the EMA weights and the model's own; a second call restores both."""
        for name, parameter in trainable_parameters(self.model).items():
            weight = parameter.detach().clone()
            parameter.copy_(self.weights[name])
            self.weights[name].copy_(weight)

    @torch.no_grad()
    def averaged_model(self) -> Any:
        """Return a copy of the model with the EMA weights, on the CPU, in evaluation mode."""
        model = copy.deepcopy(self.model).cpu().eval()
        parameters = dict(model.named_parameters())
        for name, weight in self.weights.items():
            parameters[name].copy_(weight)
        return model


def exponent(width: float) -> float:
    """Return the exponent gamma of the EMA of a relative width (appendix C, the positive real root)."""
    inverse = width**-2
    return float(np.roots([1, 7, 16 - inverse, 12 - inverse]).real.max())


def store_emas(emas: Sequence[Ema], run: Path, seen: int, world: World) -> None:
    """Write all EMAs as float16 if there are several. Call on every rank."""
    for ema in emas if len(emas) > 1 else ():
        weights = gather(ema.weights, world)
        with world.joint_errors():
            if world.main:
                content = save({name: value.half().contiguous() for name, value in weights.items()})
                write_whole(run / FOLDER / f"{seen:012d}-{ema.width}.safetensors", content)


def posthoc_ema(run: Path, width: float, seen: int | None = None) -> Path:
    """Write the pipeline of a run with `posthoc_emas` with the EMA of a relative width, about 0.02 to 0.25, that ends
    after `seen` images, by default at the last checkpoint, to `run/model-<width>`. It is exact near the stored widths.
    Raises `InputError` if there is no EMA of that width, the run stored none, or its model is an adapter.
    """
    if not 0 < width <= MAX_EMA_WIDTH:
        raise InputError(f"the width is {width}: it must be above 0, at most {MAX_EMA_WIDTH}")
    stored = {}
    for path in sorted((run / FOLDER).glob("*.safetensors")):
        images, _, stored_width = path.stem.partition("-")
        if seen is None or int(images) <= seen:
            stored[path] = (float(images), exponent(float(stored_width)))
    if not (run / "model" / "model_index.json").is_file():
        raise InputError(f"{run / 'model'} is not a pipeline folder: `average` needs a run, and supports no adapters")
    if len({gamma for _, gamma in stored.values()}) < 2:
        when = "" if seen is None else f" in its first {seen:,} images"
        raise InputError(f"{run} stored no EMAs to combine{when}: its recipe needs optimizer.posthoc_emas")
    end = max(images for images, _ in stored.values())
    coefficients = solve(list(stored.values()), (end, exponent(width)))
    total: dict[str, torch.Tensor] = {}
    for path, coefficient in zip(stored, coefficients, strict=True):
        for name, value in read_weights(path).items():
            total[name] = total.get(name, 0) + float(coefficient) * value.float()
    out = run / f"model-{width:g}"
    with writing_folder(out) as partial:
        shutil.copytree(run / "model", partial, dirs_exist_ok=True)
        model = load_component(partial / "transformer", *read_json(partial / "model_index.json")["transformer"])
        model.load_state_dict(total, strict=False)
        model.save_pretrained(partial / "transformer")
    return out


def solve(stored: Sequence[tuple[float, float]], target: tuple[float, float]) -> np.ndarray:
    """Return the coefficient of each stored EMA (T, gamma) in the target EMA: least squares between the profiles."""
    inner = np.array([[inner_product(*a, *b) for b in stored] for a in stored])
    right = np.array([inner_product(*a, *target) for a in stored])
    return np.linalg.lstsq(inner, right, rcond=None)[0]


def inner_product(end_a: float, gamma_a: float, end_b: float, gamma_b: float) -> float:
    """Return the inner product of two profiles, from 0 to the earlier end m:
    (a + 1) (b + 1) m^(a + b + 1) / ((a + b + 1) T_a^(a + 1) T_b^(b + 1)).
    """
    m = min(end_a, end_b)
    ratio = (m / end_a) ** (gamma_a + 1) * (m / end_b) ** (gamma_b + 1) / m
    return (gamma_a + 1) * (gamma_b + 1) / (gamma_a + gamma_b + 1) * ratio
