"""Differences between MMFace-DiT's official code and its paper, where this project follows the paper; tests show both.

`tests/distributed` tests gradients of the whole batch on several processes, and `test_training.py` that text is dropped
once.
"""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest
import torch

from likeness.config import load_toml
from likeness.models.mmface import MMFaceTransformer
from likeness.objectives import RectifiedFlow, make_objective
from likeness.train import loop
from likeness.train.checkpoint import checkpoints
from likeness.train.config import TrainRecipe
from likeness.train.ema import exponent
from likeness.train.networks import build_network
from likeness.train.optim import learning_rate
from likeness.types import TextFeatures
from runs import load_checkpoint, small

RECIPES = Path(__file__).parents[2] / "recipes"


def test_learning_rate_does_not_rise_again():
    """A schedule advanced by each of two processes reaches 0 at half of the run, and the peak again at its end."""
    o = load_toml(RECIPES / "mmface_256_rfm.toml", TrainRecipe).optimizer
    steps = range(0, o.images + 1, o.images // 200)
    ours = [learning_rate(seen, o.images, o.learning_rate, o.warmup, o.decay) for seen in steps]
    falling = [rate for seen, rate in zip(steps, ours, strict=True) if seen >= o.warmup]
    assert all(later < earlier for earlier, later in itertools.pairwise(falling))
    assert ours[-1] == 0


def test_times_are_float32():
    """bf16 has about 1,400 different times."""
    uniform = torch.rand(10_000, generator=torch.Generator().manual_seed(0))
    times = RectifiedFlow(time_sampling="uniform").sample_time(uniform)
    assert times.dtype == torch.float32
    assert len(times.unique()) > 9_900
    with torch.autocast("cpu", torch.bfloat16):
        assert RectifiedFlow().model_time(times).dtype == torch.float32


@pytest.mark.parametrize("size", [256, 512])
def test_min_snr_is_used(size):
    """lambda = 5 is in the recipe and in the weight; without it, as released, all times have equal weight."""
    objective = make_objective(load_toml(RECIPES / f"mmface_{size}_ddpm.toml", TrainRecipe).objective)
    times = torch.tensor([10.0, 500.0, 990.0])
    squared = objective.alpha_squared[times.long()]
    snr = squared / (1 - squared)
    assert torch.allclose(objective.weight(times), snr.clamp(max=5) / snr)
    assert objective.weight(times)[0] < 0.1
    assert make_objective({"name": "ddpm", "snr_gamma": None}).weight(times).tolist() == [1, 1, 1]


@pytest.mark.parametrize("objective", ["rfm", "ddpm"])
def test_512_is_initialized_with_256(objective):
    """50 epochs at an effective batch of 16 from the weights of the 256 px stage, with the same network."""
    small, large = (load_toml(RECIPES / f"mmface_{size}_{objective}.toml", TrainRecipe) for size in (256, 512))
    assert large.init_from == f"runs/mmface_256_{objective}/model"
    assert (large.network, large.objective) == (small.network, small.objective)
    assert (small.optimizer.images, small.optimizer.batch) == (300 * 94_000, 32)
    assert (large.optimizer.images, large.optimizer.batch) == (50 * 94_000, 16)
    assert small.optimizer.name == large.optimizer.name == "adamw8bit"
    assert small.network.gradient_checkpointing
    with torch.device("meta"):
        build_network(large, channels=16, text_dim=1024, pooled_dim=1024, text_tokens=77)


def test_pooled_text_is_not_dropped_in_the_network():
    """The null vector of the official network exists for the parameter count, but is not used."""
    model = MMFaceTransformer(hidden_size=32, depth=1, heads=2, latent_channels=4, text_dim=16, max_text_tokens=4)
    torch.nn.init.normal_(model.final.weight)
    model.train()
    inputs = (
        torch.randn(64, 4, 4, 4),
        torch.rand(64),
        TextFeatures(torch.randn(64, 4, 16), torch.randn(64, 16)),
        torch.zeros(64, 1, 4, 4, 4),
        torch.zeros(64, 1, dtype=torch.long),
    )
    before = model(*inputs)
    torch.nn.init.normal_(model.null_pooled)
    assert torch.equal(model(*inputs), before)
    before.sum().backward()
    assert model.null_pooled.grad is None


def test_text_has_positions():
    """The paper's sequential positions by default; all zero, as released, by option."""
    model = MMFaceTransformer(hidden_size=32, depth=1, heads=2, text_dim=16)
    _, sines = model.rope(4, 4, 5)
    assert (sines[4:].abs().sum(dim=1) > 0).tolist() == [False, True, True, True, True]
    released = MMFaceTransformer(hidden_size=32, depth=1, heads=2, text_dim=16, text_rope="none")
    assert released.rope(4, 4, 5)[1][4:].abs().sum() == 0


def test_ema_is_updated_after_every_step(prepared_faces, tmp_path):
    """Weights after every step give the published EMA; a step of several passes is one update."""
    recipe = small(prepared_faces, micro_batch=1, checkpoint_every=4, keep_checkpoints=6)
    loop.train(recipe, tmp_path)
    expected: dict[str, torch.Tensor] = {}
    for step, path in enumerate(checkpoints(tmp_path), start=1):
        found = load_checkpoint(tmp_path, path)
        beta = (1 - 1 / step) ** (exponent(recipe.optimizer.ema) + 1)
        for name in (name for name in found if name.startswith("average/0/")):
            weight = found[name.replace("average/0/", "model/")]
            expected[name] = beta * expected[name] + (1 - beta) * weight if step > 1 else weight
            assert torch.allclose(found[name], expected[name], atol=1e-6), (step, name)
    assert step == 6
