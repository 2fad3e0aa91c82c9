"""Choose the weight average after the training (Karras et al. 2024, arXiv 2312.02696, section 3.2).

Averages of two or more widths are kept at every checkpoint. Any power-law average is then close to a weighted sum of
those; the weights follow from the inner products of their profiles p(t) = (g + 1) t^g / T^(g + 1) over 0 < t < T.
"""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save

from likeness.files import read_json, write_whole
from likeness.parallel import gather
from likeness.train.config import WIDEST
from likeness.train.learner import Learner
from likeness.train.optim import power_of
from likeness.types import InputError
from likeness.weights.packed import load_component

FOLDER = "averages"


def keep_averages(learner: Learner, run: Path) -> None:
    """Write all averages as float16, where there are several; every process must ask."""
    if len(learner.averages) < 2:
        return
    for average in learner.averages:
        weights = gather(average.weights, learner.world)
        with learner.world.together():
            if learner.world.main:
                content = save({name: value.half().contiguous() for name, value in weights.items()})
                write_whole(run / FOLDER / f"{learner.seen:012d}-{average.relative_width}.safetensors", content)


def average_of(run: Path, width: float, seen: int | None = None) -> Path:
    """Write the pipeline of `run` with the average of relative width `width` to `run/model-<width>`.

    Args:
        run: a run with `ema_choices`.
        width: of the average, 0.02 to 0.25 or so; near those kept it is exact.
        seen: images at which it ends; None takes the last checkpoint.

    Raises:
        InputError: there is no average of that width, the run kept none, or its model is an adapter.
    """
    if not 0 < width <= WIDEST:
        raise InputError(f"the width is {width}: it must be above 0, at most {WIDEST}")
    kept = {}
    for path in sorted((run / FOLDER).glob("*.safetensors")):
        images, _, relative = path.stem.partition("-")
        if seen is None or int(images) <= seen:
            kept[path] = (float(images), power_of(float(relative)))
    if len({gamma for _, gamma in kept.values()}) < 2:
        raise InputError(f"{run} kept no averages to choose from: its recipe needs optimizer.ema_choices")
    if not (run / "model" / "model_index.json").is_file():
        raise InputError(f"{run / 'model'} is no pipeline folder: an adapter's average is chosen before training")
    end = max(images for images, _ in kept.values())
    shares = solve(list(kept.values()), (end, power_of(width)))
    total: dict[str, torch.Tensor] = {}
    for path, share in zip(kept, shares, strict=True):
        for name, value in load_file(path).items():
            total[name] = total.get(name, 0) + float(share) * value.float()
    out = run / f"model-{width:g}"
    fresh = out.with_suffix(out.suffix + ".partial")
    shutil.rmtree(fresh, ignore_errors=True)
    shutil.copytree(run / "model", fresh)
    entry = read_json(fresh / "model_index.json")["transformer"]
    model = load_component(fresh / "transformer", *entry)
    model.load_state_dict(total, strict=False)
    model.save_pretrained(fresh / "transformer")
    shutil.rmtree(out, ignore_errors=True)
    fresh.rename(out)
    return out


def solve(kept: list[tuple[float, float]], wanted: tuple[float, float]) -> np.ndarray:
    """The share of each kept average, (T, gamma), in the wanted one: least squares between their profiles."""
    inner = np.array([[product(*a, *b) for b in kept] for a in kept])
    target = np.array([product(*a, *wanted) for a in kept])
    return np.linalg.lstsq(inner, target, rcond=None)[0]


def product(end_a: float, power_a: float, end_b: float, power_b: float) -> float:
    """The inner product of two profiles, from 0 to the earlier end m:
    (a + 1) (b + 1) m^(a + b + 1) / ((a + b + 1) T_a^(a + 1) T_b^(b + 1)).
    """
    m = min(end_a, end_b)
    ratio = (m / end_a) ** (power_a + 1) * (m / end_b) ** (power_b + 1) / m
    return (power_a + 1) * (power_b + 1) / (power_a + power_b + 1) * ratio
