"""Attention in training on a CPU: PyTorch's fused operator against the formula written out, side by side in one run.

    python benchmarks/attention.py [--batch 48 --heads 6 --tokens 96 --width 32]

Prints medians of alternating rounds of forward and backward pass, and their ratio. The default shape is the mini's.
"""

from __future__ import annotations

import argparse

import torch
from side_by_side import median_seconds
from torch.nn import functional as F

from likeness.models.layers import explicit_attention


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, default=48)
    parser.add_argument("--heads", type=int, default=6)
    parser.add_argument("--tokens", type=int, default=96)
    parser.add_argument("--width", type=int, default=32, help="of a head")
    parser.add_argument("--rounds", type=int, default=9)
    options = parser.parse_args()
    shape = (options.batch, options.heads, options.tokens, options.width)
    for dtype in (torch.float32, torch.bfloat16):
        query, key, value = (torch.randn(shape, dtype=dtype, requires_grad=True) for _ in range(3))
        found = median_seconds(
            {
                "written out": lambda qkv=(query, key, value): explicit_attention(*qkv).sum().backward(),
                "fused": lambda qkv=(query, key, value): F.scaled_dot_product_attention(*qkv).sum().backward(),
            },
            options.rounds,
        )
        ours, theirs = found["written out"], found["fused"]
        print(f"{dtype}: written out {ours * 1e3:.1f} ms, fused {theirs * 1e3:.1f} ms, ratio {theirs / ours:.2f}")


if __name__ == "__main__":
    main()
