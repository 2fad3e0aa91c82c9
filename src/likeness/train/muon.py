"""Muon: momentum whose update of a matrix is orthogonalized (Jordan et al. 2024, https://kellerjordan.github.io/posts/muon).

Apart from rounding it is `torch.optim.Muon`, but faster: it orthogonalizes all matrices of a shape in one batch, and in
float32 on processors that would emulate bfloat16.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from likeness.device import supports_bf16

COEFFICIENTS = 3.4445, -4.7750, 2.0315
"""Of a polynomial a x + b x^3 + c x^5 that moves singular values in (0, 1] to about 1: five rounds, to 0.7 to 1.2."""


class Muon(torch.optim.Optimizer):
    """Muon with Nesterov momentum and decoupled weight decay, for matrices. The learning rate is scaled so that updates
    are as large as AdamW's: by 0.2 sqrt(max(m, n)) for an m x n matrix (Liu et al. 2025, arXiv 2502.16982).
    """

    def __init__(
        self, matrices: Iterable[nn.Parameter], lr: float, weight_decay: float, momentum: float = 0.95
    ) -> None:
        super().__init__(matrices, {"lr": lr, "weight_decay": weight_decay, "momentum": momentum})

    @torch.no_grad()
    def step(self) -> None:  # pyrefly: ignore
        """Update all matrices that have a gradient."""
        for group in self.param_groups:
            rate, momentum = group["lr"], group["momentum"]
            shapes: dict[torch.Size, list[Tensor]] = defaultdict(list)
            for matrix in group["params"]:
                if matrix.grad is not None:
                    shapes[matrix.shape].append(matrix)
            for shape, matrices in shapes.items():
                gradients: list[Any] = [matrix.grad for matrix in matrices]
                for matrix in matrices:
                    if not self.state[matrix]:
                        self.state[matrix]["momentum_buffer"] = torch.zeros_like(matrix)
                buffers = [self.state[matrix]["momentum_buffer"] for matrix in matrices]
                torch._foreach_lerp_(buffers, gradients, 1 - momentum)
                updates = orthogonalize(torch.stack(torch._foreach_lerp(gradients, buffers, momentum)))  # [M, m, n]
                torch._foreach_mul_(matrices, 1 - rate * group["weight_decay"])
                scaled = rate * 0.2 * math.sqrt(max(shape))
                torch._foreach_add_(matrices, list(updates.to(matrices[0].dtype).unbind()), alpha=-scaled)


def orthogonalize(matrices: Tensor) -> Tensor:
    """Move the singular values of matrices [M, m, n] to about 1 by five Newton-Schulz iterations."""
    a, b, c = COEFFICIENTS
    x = matrices.bfloat16() if supports_bf16(matrices.device.type) else matrices.float()
    tall = x.shape[1] > x.shape[2]
    x = x.mT if tall else x  # [M, small, large]
    x = x / torch.linalg.matrix_norm(x, keepdim=True).clamp(min=1e-7)
    for _ in range(5):
        gram = x @ x.mT  # [M, small, small]
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.mT if tall else x
