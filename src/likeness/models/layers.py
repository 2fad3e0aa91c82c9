"""Layers that the transformers share: time embedding, patches, rotary positions, attention, modulation.

B batch, C channels, h x w latent size, p patch size, N tokens, D width, H heads, d width of a head.
"""

from __future__ import annotations

from typing import Any

import torch
from diffusers.hooks.context_parallel import ContextParallelInput, PartitionAnythingSharder
from diffusers.models.modeling_outputs import Transformer2DModelOutput
from torch import Tensor, nn
from torch.nn import functional as F

Rope = tuple[Tensor, Tensor]
"""Cosines and sines of a sequence's rotary angles, float32 [N, d / 2] each."""

SPLIT = {0: ContextParallelInput(split_dim=1, split_output=True)}
"""Context parallelism: the output of a layer, [B, N, D], is split between the processes."""


def time_frequencies(time: Tensor, dim: int) -> Tensor:
    """Sinusoidal embedding of times [B] as [cosines, sines], float32 [B, dim] (Vaswani et al. 2017, section 3.5)."""
    exponents = torch.arange(dim // 2, dtype=torch.float32, device=time.device) / (dim // 2)
    angles = time.float()[:, None] * 10_000**-exponents  # [B, dim / 2]
    return torch.cat([angles.cos(), angles.sin()], dim=-1)  # [B, dim]


def patchify(latents: Tensor, patch: int) -> Tensor:
    """[B, C, h, w] -> [B, (h / p)(w / p), C p p]. Followed by a Linear it is a convolution of stride p, but its
    rounding does not depend on the batch size on a CPU.
    """
    b, c, h, w = latents.shape
    x = latents.reshape(b, c, h // patch, patch, w // patch, patch)  # [B, C, h/p, p, w/p, p]
    return x.permute(0, 2, 4, 1, 3, 5).reshape(b, (h // patch) * (w // patch), c * patch * patch)


def unpatchify(tokens: Tensor, height: int, width: int, patch: int) -> Tensor:
    """[B, (h / p)(w / p), C p p] -> [B, C, h, w], the inverse of `patchify`."""
    b, _, values = tokens.shape
    c = values // patch**2
    x = tokens.reshape(b, height // patch, width // patch, c, patch, patch)  # [B, h/p, w/p, C, p, p]
    return x.permute(0, 3, 1, 4, 2, 5).reshape(b, c, height, width)


def rope_angles(positions: Tensor, dim: int, theta: float) -> Tensor:
    """Angles position * theta^(-2 i / dim) for i < dim / 2: float64 [N, dim / 2] (Su et al. 2021, equation 15)."""
    frequencies = theta ** (-torch.arange(0, dim, 2, dtype=torch.float64) / dim)  # [dim / 2]
    return positions.double()[:, None] * frequencies


def grid_angles(rows: int, columns: int, dim: int, theta: float) -> Tensor:
    """Axial angles of a rows x columns grid of tokens: half of the pairs rotate with the row, half with the column.
    float64 [rows * columns, dim / 2].
    """
    row = torch.arange(rows).repeat_interleave(columns)  # [N]
    column = torch.arange(columns).repeat(rows)  # [N]
    return torch.cat([rope_angles(row, dim // 2, theta), rope_angles(column, dim // 2, theta)], dim=-1)


def local_part(x: Tensor, parallel: Any) -> Tensor:
    """Return the part of a sequence [N, ...] that this process computes, given a network's `_parallel_config`: all of
    it without context parallelism.
    """
    if parallel is None:
        return x
    return PartitionAnythingSharder.shard_anything(x, 0, parallel.context_parallel_config._flattened_mesh)


def rotate(x: Tensor, rope: Rope) -> Tensor:
    """Rotate each pair (x_i, x_(i + d/2)) of x [B, H, N, d] by its angle. Pairs are halves, not neighbors: the two
    are equal up to a permutation of the weights, and halves are contiguous in memory.
    """
    cos, sin = rope  # [N, d / 2]
    first, second = x.float().chunk(2, dim=-1)  # [B, H, N, d / 2]
    rotated = torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)
    return rotated.to(x.dtype)


def split_heads(x: Tensor, heads: int) -> Tensor:
    """[B, N, D] -> [B, H, N, d]."""
    return x.unflatten(-1, (heads, -1)).transpose(1, 2)


def as_output(prediction: Tensor, return_dict: bool | None) -> Tensor | tuple[Tensor] | Transformer2DModelOutput:
    """Return the prediction, or what diffusers' transformers return with `return_dict` True or False."""
    if return_dict is None:
        return prediction
    return Transformer2DModelOutput(sample=prediction) if return_dict else (prediction,)


def explicit_attention(query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None = None) -> Tensor:
    """softmax(Q K^T / sqrt(d) + bias) V for [B, H, N, d] as separate operations; the bias broadcasts to [B, H, queries,
    keys].
    """
    logits = query @ key.transpose(-2, -1) * query.shape[-1] ** -0.5  # [B, H, queries, keys]
    weights = (logits if bias is None else logits + bias).softmax(dim=-1).to(value.dtype)
    return weights @ value


def use_explicit_attention(network: nn.Module, explicit: bool = True) -> None:
    """Select explicit attention for passes with gradients; passes without gradients stay fused.

    It is faster in bf16 training on a CPU, where the backward pass of PyTorch's fused operator takes longer than the
    rest of a step (`benchmarks/attention.py`).
    """
    for module in network.modules():
        if hasattr(module, "explicit_attention"):
            setattr(module, "explicit_attention", explicit)  # noqa: B010


def modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """Scale and shift x [B, N, D] by vectors [B, D]."""
    return x * (1 + scale[:, None]) + shift[:, None]


class TimeEmbedding(nn.Module):
    """Time [B] -> [B, D]: 256 sinusoids and a two-layer perceptron."""

    frequencies = 256

    def __init__(self, width: int) -> None:
        super().__init__()
        self.linear_1 = nn.Linear(self.frequencies, width)
        self.linear_2 = nn.Linear(width, width)

    def forward(self, time: Tensor) -> Tensor:
        x = time_frequencies(time, self.frequencies).to(self.linear_1.weight.dtype)  # [B, 256]
        return self.linear_2(F.silu(self.linear_1(x)))  # [B, D]


class MLP(nn.Module):
    """[B, N, D] -> [B, N, D] through a wider layer with GELU (tanh form)."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.linear_1 = nn.Linear(width, hidden)
        self.linear_2 = nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear_2(F.gelu(self.linear_1(x), approximate="tanh"))
