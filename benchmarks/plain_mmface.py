"""MMFace-DiT written down plainly from its formulas, as the baseline that speed is measured against.

Separate projections, attention as explicit softmax, rotary tables made anew in every layer by complex numbers. It
takes the weights of an `MMFaceTransformer` and must give the same numbers: a test compares the two.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional as F

from likeness.models.mmface import MMFaceTransformer
from likeness.types import TextFeatures


def rotary(x: Tensor, angles: Tensor) -> Tensor:
    """Pairs (i, i + d / 2) of x [B, H, N, d] as complex numbers, turned by angles [N, d / 2]."""
    real, imaginary = x.float().chunk(2, dim=-1)
    turned = torch.complex(real, imaginary) * torch.polar(torch.ones_like(angles), angles)
    return torch.cat([turned.real, turned.imag], dim=-1).to(x.dtype)


def angles_of(rows: int, columns: int, tokens: int, dim: int, theta: float, sequential: bool) -> Tensor:
    """Angles of every token of [image; text], [N + L, dim / 2]."""
    table = []
    for row in range(rows):
        for column in range(columns):
            axis = [theta ** (-2 * i / (dim // 2)) for i in range(dim // 4)]
            table.append([row * f for f in axis] + [column * f for f in axis])
    for position in range(tokens):
        table.append([sequential * position * theta ** (-2 * i / dim) for i in range(dim // 2)])
    return torch.tensor(table, dtype=torch.float32)


def layer_norm(x: Tensor) -> Tensor:
    """(x - mean) / sqrt(variance + 1e-6), no weights."""
    return (x - x.mean(-1, keepdim=True)) / (x.var(-1, keepdim=True, unbiased=False) + 1e-6).sqrt()


def forward(
    model: MMFaceTransformer,
    latents: Tensor,
    time: Tensor,
    text: TextFeatures,
    condition_latents: Tensor,
    condition_index: Tensor,
) -> Tensor:
    """The network's prediction [B, C, h, w], with the weights of `model`."""
    config = model.config
    p, heads, width = config.patch_size, config.heads, config.hidden_size
    d = width // heads
    b, c, h, w = latents.shape
    present = (condition_index[:, 0] >= 0).to(latents.dtype)[:, None, None, None]
    x = torch.cat([latents, condition_latents[:, 0] * present], dim=1)
    # patches are a convolution of stride p
    x = F.conv2d(x, model.patch_embed.weight.reshape(width, 2 * c, p, p), model.patch_embed.bias, stride=p)
    image = x.flatten(2).transpose(1, 2)  # [B, N, D]
    words = model.text_embed(text.tokens)  # [B, L, D]
    frequencies = torch.tensor([math.exp(-math.log(10_000) * i / 128) for i in range(128)])
    waves = torch.cat([(time[:, None] * frequencies).cos(), (time[:, None] * frequencies).sin()], dim=-1)
    row = torch.where(condition_index[:, 0] >= 0, condition_index[:, 0], model.absent_id)
    vector = model.time_embed.linear_2(F.silu(model.time_embed.linear_1(waves)))
    vector = F.silu(vector + model.pooled_embed(text.pooled) + model.condition_embed(row))  # [B, D]

    def split(y: Tensor) -> Tensor:
        return y.reshape(b, -1, heads, d).permute(0, 2, 1, 3)  # [B, H, N, d]

    for block in model.blocks:
        shifts = block.modulation(vector).chunk(12, dim=-1)
        si1, ci1, gi1, si2, ci2, gi2, st1, ct1, gt1, st2, ct2, gt2 = (s[:, None] for s in shifts)
        image_in = layer_norm(image) * (1 + ci1) + si1
        words_in = layer_norm(words) * (1 + ct1) + st1
        weights_image = block.attention.image_qkv.weight.chunk(3)
        weights_words = block.attention.text_qkv.weight.chunk(3)
        q, k, v = (
            torch.cat([split(image_in @ wi.T), split(words_in @ wt.T)], dim=2)
            for wi, wt in zip(weights_image, weights_words, strict=True)
        )
        angles = angles_of(h // p, w // p, words.shape[1], d, config.rope_theta, config.text_rope == "sequential")
        q, k = rotary(q, angles), rotary(k, angles)
        mixed = torch.softmax(q @ k.transpose(-1, -2) / math.sqrt(d), dim=-1) @ v
        mixed = mixed.permute(0, 2, 1, 3).reshape(b, -1, width)
        count = image.shape[1]
        image = image + gi1 * block.attention.image_out(mixed[:, :count])
        words = words + gt1 * block.attention.text_out(mixed[:, count:])
        image = image + gi2 * block.image_mlp(layer_norm(image) * (1 + ci2) + si2)
        words = words + gt2 * block.text_mlp(layer_norm(words) * (1 + ct2) + st2)
    shift, scale = model.final_modulation(vector).chunk(2, dim=-1)
    out = model.final(layer_norm(image) * (1 + scale[:, None]) + shift[:, None])  # [B, N, C p p]
    out = out.reshape(b, h // p, w // p, c, p, p)
    return torch.einsum("bhwcpq->bchpwq", out).reshape(b, c, h, w)
