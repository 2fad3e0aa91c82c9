"""The blocks of MDiTFace: FLUX's blocks of diffusers with a third stream (arXiv 2511.12631, equation 6).

B batch, n tokens of any stream, S spatial tokens, D width, H heads, d = D / H.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from diffusers.models.attention import FeedForward
from diffusers.models.attention_dispatch import dispatch_attention_fn
from diffusers.models.embeddings import apply_rotary_emb
from diffusers.models.normalization import AdaLayerNormZero
from diffusers.models.transformers.transformer_flux import (
    FluxAttention,
    FluxSingleTransformerBlock,
    FluxTransformerBlock,
)
from torch import Tensor, nn

from likeness.models.layers import Rope, explicit_attention, modulate

Sizes = dict[str, int]
"""Stream -> number of its tokens n, in the order of the sequence. In single blocks text is part of the next stream."""


class KeysValues(NamedTuple):
    """Keys and values of the spatial tokens in one block, after QK-norm and rotary positions."""

    keys: Tensor
    """[B, S, H, d]; conditions are concatenated."""
    values: Tensor
    """[B, S, H, d]."""


class Shared(NamedTuple):
    """Inputs of all blocks of a pass."""

    conditioning: Tensor
    """Input of every modulation, [B, D]."""
    rope: Rope
    """Of all streams, concatenated, [sum of n, d] each."""
    bias: Tensor | None = None
    """Added to the logits; broadcasts to [B, H, queries, keys]."""


class Projections(NamedTuple):
    """The layers of one stream in a joint attention."""

    query: nn.Module
    key: nn.Module
    value: nn.Module
    norm_query: nn.Module
    norm_key: nn.Module
    out: nn.Module = nn.Identity()
    """Single blocks have none."""


class Stream(NamedTuple):
    """The modules of one stream of a double block."""

    norm1: nn.Module
    projections: Projections
    norm2: nn.Module
    mlp: nn.Module


def split_streams(hidden_states: Tensor, sizes: Sizes) -> dict[str, Tensor]:
    """[B, sum of n, D] -> [B, n, D] for each stream."""
    return dict(zip(sizes, hidden_states.split(list(sizes.values()), dim=1), strict=True))


def join_streams(streams: Sequence[Tensor]) -> Tensor:
    """[B, n, D] for each stream -> [B, sum of n, D]."""
    return torch.cat(list(streams), dim=1) if len(streams) > 1 else streams[0]


def join_text(sizes: Sizes) -> Sizes:
    """Add the text to the stream after it, as in single blocks."""
    if "text" not in sizes:
        return sizes
    text, (name, size), *others = sizes["text"], *list(sizes.items())[1:]
    return {name: text + size, **dict(others)}


def split_heads(x: Tensor, dim: int) -> Tensor:
    """[B, n, D] -> [B, n, H, d], d = dim."""
    return x.unflatten(-1, (-1, dim))


class JointAttentionProcessor:
    """One softmax over the keys of all streams and the static ones (equation 6):

    softmax(RoPE(Q) [RoPE(K); K_static]^T / sqrt(d) + bias) [V; V_static], Q = [Q_text; Q_image; Q_spatial]
    """

    _attention_backend = None  # `set_attention_backend` of diffusers
    _parallel_config = None  # `enable_parallelism` of diffusers

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        *_: None,
        projections: Sequence[Projections],
        sizes: Sizes,
        shared: Shared,
        static: KeysValues | None,
        keep: bool,
    ) -> Tensor | tuple[Tensor, KeysValues]:
        """
        Args:
            attn: the attention of a block, whose other arguments are unused (`_`).
            hidden_states: normalized tokens of all streams, [B, sum of n, D].
            projections: layers of every stream.
            sizes: number of tokens of every stream.
            shared: rotary positions and bias.
            static: keys and values of the static pathway.
            keep: also return RoPE(K) and V.

        Returns:
            [B, sum of n, D]; RoPE(K) and V.
        """
        qkv = []
        for stream, x in zip(projections, split_streams(hidden_states, sizes).values(), strict=True):  # [B, n, D]
            query = stream.norm_query(split_heads(stream.query(x), attn.head_dim))  # [B, n, H, d]
            key = stream.norm_key(split_heads(stream.key(x), attn.head_dim))  # [B, n, H, d]
            qkv.append((query, key, split_heads(stream.value(x), attn.head_dim)))
        query, key, value = (torch.cat(parts, dim=1) for parts in zip(*qkv, strict=True))  # [B, sum of n, H, d]
        query = apply_rotary_emb(query, shared.rope, sequence_dim=1)
        own = KeysValues(apply_rotary_emb(key, shared.rope, sequence_dim=1), value)
        keys, values = own if static is None else (torch.cat(pair, dim=1) for pair in zip(own, static, strict=True))
        if attn.explicit_attention and torch.is_grad_enabled():
            heads_first = [x.transpose(1, 2) for x in (query, keys, values)]  # [B, H, ..., d] each
            x = explicit_attention(*heads_first, bias=shared.bias).transpose(1, 2)  # [B, sum of n, H, d]
        else:
            options = {"backend": self._attention_backend, "parallel_config": self._parallel_config}
            x = dispatch_attention_fn(query, keys, values, attn_mask=shared.bias, **options)  # [B, sum of n, H, d]
        parts = zip(projections, split_streams(x.flatten(2), sizes).values(), strict=True)  # [B, n, D]
        x = join_streams([stream.out(part) for stream, part in parts])  # [B, sum of n, D]
        return (x, own) if keep else x


class SpatialStream(nn.Module):
    """A copy of the image stream of a FLUX double block, with the same names."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.norm1 = AdaLayerNormZero(width)
        self.attn = FluxAttention(width, heads, width // heads, out_dim=width, bias=True, eps=1e-6)
        self.norm2 = nn.LayerNorm(width, eps=1e-6, elementwise_affine=False)
        self.ff = FeedForward(width, width, activation_fn="gelu-approximate")


class TriStreamBlock(FluxTransformerBlock):
    """FLUX's double block with a third stream: text, image and spatial tokens have separate weights and one joint
    attention. Any subset of the streams can run.
    """

    def __init__(self, width: int, heads: int, with_spatial: bool) -> None:
        super().__init__(width, heads, width // heads)
        self.attn.set_processor(JointAttentionProcessor())
        self.attn.explicit_attention = False  # `use_explicit_attention`
        if with_spatial:
            self.spatial = SpatialStream(width, heads)

    def stream(self, name: str) -> Stream:
        if name == "text":
            a = self.attn
            qkv = Projections(a.add_q_proj, a.add_k_proj, a.add_v_proj, a.norm_added_q, a.norm_added_k, a.to_add_out)
            return Stream(self.norm1_context, qkv, self.norm2_context, self.ff_context)
        own = self.spatial if name == "spatial" else self
        a = own.attn
        qkv = Projections(a.to_q, a.to_k, a.to_v, a.norm_q, a.norm_k, a.to_out[0])
        return Stream(own.norm1, qkv, own.norm2, own.ff)

    def forward(
        self, hidden_states: Tensor, sizes: Sizes, shared: Shared, static: KeysValues | None = None, keep: bool = False
    ) -> Tensor | tuple[Tensor, KeysValues]:
        """In every stream x = x + gate * F(AdaLN(x)), F the joint attention and then an MLP: [B, sum of n, D] to the
        same; with `keep` also the keys and values of these tokens. diffusers' caches need the name `hidden_states`.
        """
        streams, tokens = {name: self.stream(name) for name in sizes}, split_streams(hidden_states, sizes)
        normed, rest = [], {}
        for name, x in tokens.items():
            x, *rest[name] = streams[name].norm1(x, emb=shared.conditioning)  # [B, n, D], 4 times [B, D]
            normed.append(x)
        options: Any = {"sizes": sizes, "shared": shared, "static": static, "keep": keep}
        options["projections"] = [stream.projections for stream in streams.values()]
        output: Any = self.attn(join_streams(normed), **options)

        updates, result = split_streams(output[0] if keep else output, sizes), []  # [B, n, D] each
        for name, x in tokens.items():
            own, (gate_1, shift, scale, gate_2) = streams[name], rest[name]
            x = x + gate_1[:, None] * updates[name]
            result.append(x + gate_2[:, None] * own.mlp(modulate(own.norm2(x), shift, scale)))
        hidden_states = join_streams(result)  # [B, sum of n, D]
        return (hidden_states, output[1]) if keep else hidden_states


class SingleStreamBlock(FluxSingleTransformerBlock):
    """FLUX's single block. Dynamic text and image tokens share its weights. Spatial tokens share a second set with the
    text of the static pathway: the paper does not describe this; related work does so.
    """

    def __init__(self, width: int, heads: int, with_spatial: bool) -> None:
        super().__init__(width, heads, width // heads)
        self.attn.set_processor(JointAttentionProcessor())
        self.attn.explicit_attention = False  # `use_explicit_attention`
        if with_spatial:
            self.spatial = FluxSingleTransformerBlock(width, heads, width // heads)

    def forward(
        self, hidden_states: Tensor, sizes: Sizes, shared: Shared, static: KeysValues | None = None, keep: bool = False
    ) -> Tensor | tuple[Tensor, KeysValues]:
        """In every stream x = x + gate * W [attention(AdaLN(x)); MLP(AdaLN(x))]; as in `TriStreamBlock`."""
        streams = {name: self.spatial if name == "spatial" else self for name in sizes}
        tokens = split_streams(hidden_states, sizes)
        projections, normed, rest = [], [], {}
        for name, x in tokens.items():
            own, a = streams[name], streams[name].attn
            x, gate = own.norm(x, emb=shared.conditioning)  # [B, n, D], [B, D]
            projections.append(Projections(a.to_q, a.to_k, a.to_v, a.norm_q, a.norm_k))
            normed.append(x)
            rest[name] = own.act_mlp(own.proj_mlp(x)), gate  # [B, n, 4 D], [B, D]
        options: Any = {"sizes": sizes, "shared": shared, "static": static, "keep": keep}
        output: Any = self.attn(join_streams(normed), projections=projections, **options)

        updates, result = split_streams(output[0] if keep else output, sizes), []  # [B, n, D] each
        for name, x in tokens.items():
            mlp, gate = rest[name]
            result.append(x + gate[:, None] * streams[name].proj_out(torch.cat([updates[name], mlp], dim=-1)))
        hidden_states = join_streams(result)  # [B, sum of n, D]
        return (hidden_states, output[1]) if keep else hidden_states
