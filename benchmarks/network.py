"""The network's forward pass, its gradients, and a whole training step against the plain formulas, side by side in one
run.

    python benchmarks/network.py [--hidden 256 --depth 8 --heads 8 --batch 8] [--precision bf16] [--compile]

The plain training step is written as one would: attention unfused, AdamW parameter by parameter, and the loss looked at
in every step. Ours is that of `likeness.train`. Prints the median of alternating rounds and the ratio; the ratio is the
result, the seconds depend on the machine.
"""

from __future__ import annotations

import argparse
import functools
from collections.abc import Callable

import plain_mmface
import torch
from side_by_side import median_seconds

from likeness.models.mmface import MMFaceTransformer
from likeness.train.config import OptimizerRecipe
from likeness.train.optim import make_optimizers
from likeness.train.train_state import TrainState
from likeness.types import TextFeatures


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--hidden", type=int, default=256)
    parser.add_argument("--depth", type=int, default=8)
    parser.add_argument("--heads", type=int, default=8)
    parser.add_argument("--latent", type=int, default=16, help="side of the latent")
    parser.add_argument("--tokens", type=int, default=32)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="fp32")
    parser.add_argument("--compile", action="store_true", help="fuse ours with torch.compile, as the mini recipes do")
    options = parser.parse_args()
    torch.manual_seed(0)
    model = MMFaceTransformer(
        hidden_size=options.hidden, depth=options.depth, heads=options.heads, text_dim=192, max_text_tokens=77
    )
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.05)
    b, side = options.batch, options.latent
    given = (
        torch.randn(b, 16, side, side),
        torch.rand(b) * 1000,
        TextFeatures(torch.randn(b, options.tokens, 192), torch.randn(b, 192)),
        torch.randn(b, 1, 16, side, side),
        torch.zeros(b, 1, dtype=torch.long),
    )

    autocast = functools.partial(torch.autocast, "cpu", torch.bfloat16, enabled=options.precision == "bf16")

    def gradients(function: Callable[..., torch.Tensor]) -> torch.Tensor:
        model.zero_grad()
        with autocast():
            loss = function(*given).float().square().mean()
        loss.backward()
        return loss

    rope = model.rope(side, side, options.tokens)
    plain = lambda *inputs: plain_mmface.forward(model, *inputs)  # noqa: E731
    with torch.no_grad(), autocast():
        difference = (model(*given) - plain(*given)).norm() / plain(*given).norm()
        both = {"ours": lambda: model(*given, rope=rope), "plain": lambda: plain(*given)}
        forward = median_seconds(both, options.rounds)
    both = {"ours": lambda: gradients(model), "plain": lambda: gradients(plain)}
    backward = median_seconds(both, options.rounds)

    recipe = OptimizerRecipe(images=1, batch=1, learning_rate=1e-4)
    state = TrainState(model=model, optimizers=make_optimizers(model, recipe))
    adamw = torch.optim.AdamW(model.parameters(), lr=1e-4, foreach=False)

    def plain_step() -> float:
        loss = gradients(plain)
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0, foreach=False)
        adamw.step()
        return loss.item()

    def our_step() -> None:
        gradients(model)
        state.step(1e-4, 1.0)

    if options.compile:
        model.compile(dynamic=False)
    step = median_seconds({"ours": our_step, "plain": plain_step}, options.rounds)
    form = f"{options.precision}{', ours compiled in the last line' * options.compile}"
    print(f"{options.depth} blocks of {options.hidden}, batch {b}, {torch.get_num_threads()} threads, {form}")
    print(f"relative difference of the outputs: {difference:.1e}")
    for name, found in (("forward", forward), ("gradients", backward), ("training step", step)):
        ours, theirs = found["ours"], found["plain"]
        print(f"{name:14s} ours {ours * 1e3:8.1f} ms   plain {theirs * 1e3:8.1f} ms   ratio {theirs / ours:.2f}")


if __name__ == "__main__":
    main()
