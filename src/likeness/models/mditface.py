"""MDiTFace: FLUX.1 with a third stream for masks, sketches and keypoints (arXiv 2511.12631).

All modalities are tokens of one sequence [text; image; spatial]. Blocks, weights and names are those of diffusers'
FLUX, so its checkpoints and LoRAs fit; the spatial stream repeats the image stream's modules, by default with the very
same weights, for a LoRA to set them apart. What the paper calls pathways is the same blocks run over other streams:

    plain FLUX     text, image                                  at every step
    holistic       text, image, spatial                         at every step
    hard           spatial                                      once: the static pathway
    decoupled      text, spatial                                once: the static pathway
    both of these  text, image + static keys and values         at every step: the dynamic pathway

Known of the paper are the pathways, the order of tokens, the shared positions and LoRA's rank. Not known, and options
here: the static pathway's modulation (`static_modulation`) and whether dynamic text reads it (`text_reads_spatial`).
Conditions do not see one another in the static pathway: each meets a text copy of its own, so that any may be dropped.

B batch, C latent channels, h x w latent size, N image tokens (h / 2)(w / 2), L text tokens, K conditions, S = K N
spatial tokens, n tokens of any stream, D width, H heads, d = D / H, T text width, P pooled width.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain
from typing import Any, Literal, NamedTuple

import torch
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from diffusers.loaders import PeftAdapterMixin
from diffusers.models.attention import FeedForward
from diffusers.models.attention_dispatch import dispatch_attention_fn
from diffusers.models.embeddings import (
    CombinedTimestepGuidanceTextProjEmbeddings,
    CombinedTimestepTextProjEmbeddings,
    apply_rotary_emb,
)
from diffusers.models.normalization import AdaLayerNormContinuous, AdaLayerNormZero
from diffusers.models.transformers.transformer_flux import (
    FluxAttention,
    FluxPosEmbed,
    FluxSingleTransformerBlock,
    FluxTransformerBlock,
)
from diffusers.utils.accelerate_utils import apply_forward_hook
from torch import Tensor, nn
from torch.nn import functional as F

from likeness.models.layers import Rope, attend, modulate, patchify, unpatchify, written_out
from likeness.models.static_cache import KeysValues, StaticCache
from likeness.models.tied_weights import begin, load_once, save_once, tie
from likeness.types import InputError, TextFeatures

PATCH = 2
"""Side of a FLUX patch, in latent pixels."""

Tokens = dict[str, Tensor]
"""Stream -> tokens [B, n, D], in the sequence's order. In single blocks text is the head of the stream after it."""


class Shared(NamedTuple):
    """What all blocks of a pass read."""

    conditioning: Tensor
    """The vector behind every modulation, [B, D]."""
    rope: Rope
    """Of all streams, one after another, [sum of n, d] each."""
    bias: Tensor | None = None
    """Added to the logits; broadcasts to [B, H, queries, keys]."""


class Stream(NamedTuple):
    """What one modality has of its own in a double block."""

    norm1: nn.Module
    query: nn.Module
    key: nn.Module
    value: nn.Module
    norm_query: nn.Module
    norm_key: nn.Module
    out: nn.Module
    norm2: nn.Module
    mlp: nn.Module


def heads_of(x: Tensor, dim: int) -> Tensor:
    """[B, n, D] -> [B, n, H, d], d = dim."""
    return x.unflatten(-1, (-1, dim))


def joint_attention(
    qkv: Sequence[tuple[Tensor, Tensor, Tensor]], known: KeysValues | None, shared: Shared, backend: Any
) -> tuple[Sequence[Tensor], KeysValues]:
    """One softmax over the keys of all streams and the known ones (equation 6):

    softmax(RoPE(Q) [RoPE(K); K_known]^T / sqrt(d) + bias) [V; V_known], Q = [Q_text; Q_image; Q_spatial], likewise K, V

    Takes the query, key and value of every stream, [B, n, H, d]; gives [B, n, D] for each, and RoPE(K) and V.
    """
    query, key, value = (torch.cat(parts, dim=1) for parts in zip(*qkv, strict=True))  # [B, sum of n, H, d]
    query = apply_rotary_emb(query, shared.rope, sequence_dim=1)
    own = KeysValues(apply_rotary_emb(key, shared.rope, sequence_dim=1), value)
    keys, values = own if known is None else (torch.cat(pair, dim=1) for pair in zip(own, known, strict=True))
    if written_out(query):
        x = attend(query.transpose(1, 2), keys.transpose(1, 2), values.transpose(1, 2), shared.bias)  # [B, sum of n, D]
    else:
        x = dispatch_attention_fn(query, keys, values, attn_mask=shared.bias, backend=backend).flatten(2)
    return x.split([stream[0].shape[1] for stream in qkv], dim=1), own


class SpatialStream(nn.Module):
    """The image stream of a FLUX double block once more, under the same names."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.norm1 = AdaLayerNormZero(width)
        self.attn = FluxAttention(width, heads, width // heads, out_dim=width, bias=True, eps=1e-6)
        self.norm2 = nn.LayerNorm(width, eps=1e-6, elementwise_affine=False)
        self.ff = FeedForward(width, width, activation_fn="gelu-approximate")


class TriStreamBlock(FluxTransformerBlock):
    """FLUX's double block with a third stream: text, image and spatial tokens have matrices of their own and meet in
    one attention. Any subset of the streams may run.
    """

    def __init__(self, width: int, heads: int, with_spatial: bool) -> None:
        super().__init__(width, heads, width // heads)
        if with_spatial:
            self.spatial = SpatialStream(width, heads)

    def stream(self, name: str) -> Stream:
        if name == "text":
            a = self.attn
            qkv = (a.add_q_proj, a.add_k_proj, a.add_v_proj, a.norm_added_q, a.norm_added_k, a.to_add_out)
            return Stream(self.norm1_context, *qkv, self.norm2_context, self.ff_context)
        own = self.spatial if name == "spatial" else self
        a = own.attn
        return Stream(own.norm1, a.to_q, a.to_k, a.to_v, a.norm_q, a.norm_k, a.to_out[0], own.norm2, own.ff)

    def forward(self, tokens: Tokens, shared: Shared, known: KeysValues | None = None) -> tuple[Tokens, KeysValues]:
        """In every stream x = x + gate * F(AdaLN(x)), F the joint attention and then an MLP. Gives the keys and values
        of all these tokens, too.
        """
        streams = {name: self.stream(name) for name in tokens}
        dim, qkv, rest = self.attn.head_dim, [], {}
        for name, x in tokens.items():
            own = streams[name]
            x, *rest[name] = own.norm1(x, emb=shared.conditioning)  # [B, n, D], 4 times [B, D]
            query = own.norm_query(heads_of(own.query(x), dim))  # [B, n, H, d]
            key = own.norm_key(heads_of(own.key(x), dim))  # [B, n, H, d]
            qkv.append((query, key, heads_of(own.value(x), dim)))
        updates, made = joint_attention(qkv, known, shared, self.attn.processor._attention_backend)  # [B, n, D] each

        result = {}
        for (name, x), update in zip(tokens.items(), updates, strict=True):
            own, (gate_1, shift, scale, gate_2) = streams[name], rest[name]
            x = x + gate_1[:, None] * own.out(update)
            result[name] = x + gate_2[:, None] * own.mlp(modulate(own.norm2(x), shift, scale))
        return result, made


class SingleStreamBlock(FluxSingleTransformerBlock):
    """FLUX's single block. Dynamic text and image tokens share its matrices; spatial tokens, and the text that goes the
    static pathway with them, share a second set. How the paper treats them here is not known; its relatives do so.
    """

    def __init__(self, width: int, heads: int, with_spatial: bool) -> None:
        super().__init__(width, heads, width // heads)
        if with_spatial:
            self.spatial = FluxSingleTransformerBlock(width, heads, width // heads)

    def forward(self, tokens: Tokens, shared: Shared, known: KeysValues | None = None) -> tuple[Tokens, KeysValues]:
        """In every stream x = x + gate * W [attention(AdaLN(x)); MLP(AdaLN(x))]. Gives the keys and values, too."""
        streams = {name: self.spatial if name == "spatial" else self for name in tokens}
        dim, qkv, rest = self.attn.head_dim, [], {}
        for name, x in tokens.items():
            own = streams[name]
            x, gate = own.norm(x, emb=shared.conditioning)  # [B, n, D], [B, D]
            query = own.attn.norm_q(heads_of(own.attn.to_q(x), dim))  # [B, n, H, d]
            key = own.attn.norm_k(heads_of(own.attn.to_k(x), dim))  # [B, n, H, d]
            qkv.append((query, key, heads_of(own.attn.to_v(x), dim)))
            rest[name] = own.act_mlp(own.proj_mlp(x)), gate  # [B, n, 4 D], [B, D]
        updates, made = joint_attention(qkv, known, shared, self.attn.processor._attention_backend)  # [B, n, D] each

        result = {}
        for (name, x), update in zip(tokens.items(), updates, strict=True):
            mlp, gate = rest[name]
            result[name] = x + gate[:, None] * streams[name].proj_out(torch.cat([update, mlp], dim=-1))
        return result, made


class MDiTFaceTransformer(ModelMixin, ConfigMixin, PeftAdapterMixin):
    """The MDiTFace network. The defaults are the size of FLUX.1-dev, which the paper's costs imply. Arguments and
    weights are named as in diffusers' `FluxTransformer2DModel`, so `from_pretrained` takes a FLUX.1 transformer, too.

    Args:
        in_channels: values of a patch, 4 C.
        num_layers: double blocks.
        num_single_layers: single blocks.
        attention_head_dim: width d of a head.
        num_attention_heads: heads H; the width D is H d.
        joint_attention_dim: width T of text tokens.
        pooled_projection_dim: width P of the pooled text.
        guidance_embeds: whether the network is guidance-distilled (FLUX.1-dev) and embeds a guidance value.
        axes_dims_rope: how many of a head's d values turn with each of (0, row, column).
        condition_names: the name of each row of the condition embedding.
        attention: how spatial tokens meet the others. `holistic`: in one sequence, at every step. `hard`: by a static
            pathway of spatial tokens alone. `decoupled`, the paper's: by a static pathway of text and spatial tokens.
            `concat`, its baseline (Table 3), has no spatial tokens: the condition's patch is concatenated to the
            image's, which is to say that its embedding by a matrix of its own is added.
        spatial_stream: `lora` ties the spatial stream's weights to the image stream's, for an adapter to change (the
            paper, as its costs imply); `full` gives it weights of its own, for training from scratch.
        static_modulation: what modulates the static pathway, which the paper does not say. `text`: time 0, guidance 1
            and the pooled text; `constant`: the same with a pooled text of zeros. `hard` is always `constant`.
        text_reads_spatial: whether text, too, attends to spatial keys, which the paper does not say.

    Raises:
        InputError: an unknown option, or rotary axes that do not fill a head.
    """

    _supports_gradient_checkpointing = True
    _no_split_modules = ("TriStreamBlock", "SingleStreamBlock")
    _repeated_blocks = ("TriStreamBlock", "SingleStreamBlock")
    _skip_layerwise_casting_patterns = ("pos_embed", "norm")

    @register_to_config
    def __init__(
        self,
        in_channels: int = 64,
        num_layers: int = 19,
        num_single_layers: int = 38,
        attention_head_dim: int = 128,
        num_attention_heads: int = 24,
        joint_attention_dim: int = 4096,
        pooled_projection_dim: int = 768,
        guidance_embeds: bool = True,
        axes_dims_rope: tuple[int, int, int] = (16, 56, 56),
        condition_names: tuple[str, ...] = ("mask", "sketch", "keypoints"),
        attention: Literal["holistic", "hard", "decoupled", "concat"] = "decoupled",
        spatial_stream: Literal["lora", "full"] = "lora",
        static_modulation: Literal["text", "constant"] = "text",
        text_reads_spatial: bool = True,
    ) -> None:
        super().__init__()
        for name, value, choices in (
            ("attention", attention, ("holistic", "hard", "decoupled", "concat")),
            ("spatial_stream", spatial_stream, ("lora", "full")),
            ("static_modulation", static_modulation, ("text", "constant")),
        ):
            if value not in choices:
                raise InputError(f"{name} is {value!r}; choose one of {', '.join(choices)}")
        if sum(axes_dims_rope) != attention_head_dim:
            raise InputError(f"axes_dims_rope {tuple(axes_dims_rope)} must add up to a head's {attention_head_dim}")
        heads, width, tokens = num_attention_heads, num_attention_heads * attention_head_dim, attention != "concat"
        combined = CombinedTimestepGuidanceTextProjEmbeddings if guidance_embeds else CombinedTimestepTextProjEmbeddings
        self.gradient_checkpointing = False
        self.pos_embed = FluxPosEmbed(theta=10_000, axes_dim=list(axes_dims_rope))
        self.time_text_embed = combined(width, pooled_projection_dim)
        self.context_embedder = nn.Linear(joint_attention_dim, width)
        self.x_embedder = nn.Linear(in_channels, width)
        if tokens:
            self.spatial_embedder = nn.Linear(in_channels, width)
        else:
            self.concat_embedder = nn.Linear(in_channels, width)
        self.condition_embed = nn.Embedding(len(condition_names), width)
        self.transformer_blocks = nn.ModuleList(TriStreamBlock(width, heads, tokens) for _ in range(num_layers))
        self.single_transformer_blocks = nn.ModuleList(
            SingleStreamBlock(width, heads, tokens) for _ in range(num_single_layers)
        )
        self.norm_out = AdaLayerNormContinuous(width, width, elementwise_affine=False, eps=1e-6)
        self.proj_out = nn.Linear(width, in_channels)
        self.register_state_dict_post_hook(save_once)
        self.register_load_state_dict_post_hook(load_once)
        self.initialise()
        self.tie_weights()

    def initialise(self) -> None:
        """Linear layers keep PyTorch's initial values; every residual branch, the output and all that FLUX lacks start
        at zero.
        """
        modulations = [module.linear for module in self.modules() if hasattr(module, "silu")]
        new = [self.concat_embedder] if self.config.attention == "concat" else []
        for layer in (*modulations, *new, self.proj_out):
            nn.init.zeros_(layer.weight)
            nn.init.zeros_(layer.bias)
        nn.init.zeros_(self.condition_embed.weight)

    def forward(
        self,
        latents: Tensor,
        time: Tensor,
        text: TextFeatures,
        condition_latents: Tensor,
        condition_index: Tensor,
        *,
        condition_scale: Tensor | None = None,
        guidance: Tensor | None = None,
        static_cache: StaticCache | None = None,
    ) -> Tensor:
        """Predict at x_t.

        Args:
            latents: x_t, [B, C, h, w]; h and w even.
            time: what `Objective.model_time` gives, [B], 0 to 1000.
            text: tokens [B, L, T] and pooled [B, P].
            condition_latents: the conditions' latents, [B, K, C, h, w], any K >= 0; read only where present.
            condition_index: row of each condition, [B, K]; -1 where it is absent. Without any, this is plain FLUX.
            condition_scale: strength s >= 0 of each condition, [B, K]: log s is added to the logits of its keys, so
                s = 1 changes nothing and s = 0 is absence. `concat` multiplies by s instead.
            guidance: the value that a guidance-distilled network embeds, [B]; 1, as in training, where not given.
            static_cache: `self.static_cache(...)` of these very prompts and conditions; computed where not given.

        Returns:
            The prediction, [B, C, h, w].

        Raises:
            InputError: shapes that do not fit, an unknown row or a negative strength (these two are looked at only
                where `can_look`), guidance that nothing embeds, a cache of another request.
        """
        self.check(latents, text, condition_latents, condition_index, condition_scale)
        (height, width), conditions, mode = latents.shape[-2:], condition_index.shape[1], self.config.attention
        if static_cache is not None:
            self.check_static()
            static_cache.check(text if mode == "decoupled" else None, condition_latents, condition_index)

        image_ids = grid_ids(height // PATCH, width // PATCH, latents.device)  # [N, 3]
        ids = [image_ids.new_zeros(text.tokens.shape[1], 3), image_ids]  # [L, 3], [N, 3]
        image = self.x_embedder(patchify(latents, PATCH))  # [B, N, D]
        tokens = {"text": self.context_embedder(text.tokens), "image": image}  # [B, L, D], [B, N, D]
        known = bias = None
        if conditions and mode == "concat":
            spatial = self.embed_conditions(self.concat_embedder, condition_latents, condition_index)  # [B, K, N, D]
            strength = strengths(condition_index, condition_scale).to(image.dtype)  # [B, K]
            tokens["image"] = image + (spatial * strength[:, :, None, None]).sum(dim=1)  # [B, N, D]
        elif conditions:
            if mode == "holistic":
                spatial = self.embed_conditions(self.spatial_embedder, condition_latents, condition_index)
                tokens["spatial"] = spatial.flatten(1, 2)  # [B, S, D]
                ids += conditions * [self.spatial_ids(image_ids)]  # [N, 3] each
            elif static_cache is None:
                known = self.static_pathway(tokens["text"], text.pooled, condition_latents, condition_index)
            else:
                known = static_cache.layers
            unmasked = condition_scale is None and self.config.text_reads_spatial
            if not (unmasked and complete(condition_index, static_cache)):
                bias = self.spatial_bias(strengths(condition_index, condition_scale), tokens)

        conditioning = self.conditioning(time, guidance, text.pooled)  # [B, D]
        tokens, _ = self.run(tokens, Shared(conditioning, self.pos_embed(torch.cat(ids)), bias), known)
        image = tokens["image"][:, -len(image_ids) :]  # [B, N, D]
        output = self.proj_out(self.norm_out(image, conditioning))  # [B, N, 4 C]
        return unpatchify(output, height, width, PATCH)  # [B, C, h, w]

    @apply_forward_hook  # so that offloading brings the weights before this call, too
    def static_cache(self, text: TextFeatures, condition_latents: Tensor, condition_index: Tensor) -> StaticCache:
        """Run the static pathway for these prompts and conditions: once for all times, guidance values and strengths.

        Args:
            text: tokens [B, L, T] and pooled [B, P].
            condition_latents: [B, K, C, h, w], K >= 1.
            condition_index: [B, K], -1 where absent.

        Raises:
            InputError: a network without a static pathway, no condition, shapes that do not fit, an unknown row.
        """
        self.check_static()
        if condition_latents.ndim != 5 or not condition_latents.shape[1]:
            raise InputError(
                f"a static cache is filled from [B, K, C, h, w], K >= 1, not {tuple(condition_latents.shape)}"
            )
        self.check(condition_latents[:, 0], text, condition_latents, condition_index.cpu(), None)
        return StaticCache(
            layers=self.static_pathway(
                self.context_embedder(text.tokens), text.pooled, condition_latents, condition_index
            ),
            text=text,
            condition_latents=condition_latents,
            condition_index=condition_index,
            complete=bool((condition_index >= 0).all()),
        )

    def static_pathway(
        self, text: Tensor, pooled: Tensor, condition_latents: Tensor, condition_index: Tensor
    ) -> tuple[KeysValues, ...]:
        """Keys and values [B, S, H, d] of the spatial tokens in every block, from <mask, text> (`hard`: from the mask),
        at no time. Each condition goes with a copy of the text in a row of its own; absent ones are masked later.

        text: embedded tokens, [B, L, D].
        """
        conditions, (height, width) = condition_index.shape[1], condition_latents.shape[-2:]
        image_ids = grid_ids(height // PATCH, width // PATCH, text.device)  # [N, 3]
        spatial = self.embed_conditions(self.spatial_embedder, condition_latents, condition_index)  # [B, K, N, D]
        tokens, ids = {"spatial": spatial.flatten(0, 1)}, [self.spatial_ids(image_ids)]  # [B K, N, D], [N, 3]
        if self.config.attention == "decoupled":
            tokens = {"text": text.repeat_interleave(conditions, dim=0), **tokens}  # [B K, L, D] first
            ids = [image_ids.new_zeros(text.shape[1], 3), *ids]
        pooled = pooled.repeat_interleave(conditions, dim=0)  # [B K, P]
        if self.config.attention == "hard" or self.config.static_modulation == "constant":
            pooled = torch.zeros_like(pooled)
        conditioning = self.conditioning(torch.zeros(len(pooled), device=text.device), None, pooled)  # [B K, D]
        _, made = self.run(tokens, Shared(conditioning, self.pos_embed(torch.cat(ids))), keep=len(image_ids))
        together = lambda x: x.unflatten(0, (-1, conditions)).flatten(1, 2)  # noqa: E731  # [B K, N, H, d] -> [B, S, H, d]
        return tuple(KeysValues(together(layer.keys), together(layer.values)) for layer in made)

    def run(
        self, tokens: Tokens, shared: Shared, known: Sequence[KeysValues] | None = None, keep: int = 0
    ) -> tuple[Tokens, list[KeysValues]]:
        """All blocks over these streams; and of every block the keys and values of the last `keep` tokens."""
        made = []
        for index, block in enumerate(chain(self.transformer_blocks, self.single_transformer_blocks)):
            if index == len(self.transformer_blocks):
                tokens = join_text(tokens)
            arguments = (tokens, shared, None if known is None else known[index])
            if torch.is_grad_enabled() and self.gradient_checkpointing:
                tokens, own = self._gradient_checkpointing_func(block, *arguments)
            else:
                tokens, own = block(*arguments)
            if keep:  # copied, since a view would hold the other tokens' keys and values in memory
                made.append(KeysValues(*(x[:, -keep:].clone() for x in own)))  # [B, keep, H, d]
        return tokens, made

    def embed_conditions(self, embedder: nn.Module, condition_latents: Tensor, condition_index: Tensor) -> Tensor:
        """Patches of every condition, embedded, plus the row of its kind: [B, K, N, D]. Absent ones are not read."""
        patches = patchify(condition_latents.flatten(0, 1), PATCH)  # [B K, N, 4 C]
        patches = patches.unflatten(0, condition_index.shape)  # [B, K, N, 4 C]
        tokens = embedder(patches.masked_fill((condition_index < 0)[:, :, None, None], 0))  # [B, K, N, D]
        row = self.condition_embed(condition_index.clamp(min=0))  # [B, K, D]
        return tokens + row[:, :, None].to(tokens.dtype)

    def spatial_ids(self, image_ids: Tensor) -> Tensor:
        """Positions [N, 3] of a condition's tokens: those of the image tokens at the same place."""
        return image_ids

    def spatial_bias(self, strength: Tensor, tokens: Tokens) -> Tensor:
        """Log s for the keys of every condition, so minus infinity where it is absent, and 0 for other keys:
        [B, 1, 1 or queries, L + N + S].
        """
        length, image = tokens["text"].shape[1], tokens["image"].shape[1]
        bias = F.pad(strength.log().repeat_interleave(image, dim=1), (length + image, 0))[:, None, None]
        if not self.config.text_reads_spatial:
            bias = bias.repeat(1, 1, sum(x.shape[1] for x in tokens.values()), 1)  # [B, 1, queries, L + N + S]
            bias[:, :, :length, length + image :] = -torch.inf
        return bias.to(tokens["image"].dtype)

    def conditioning(self, time: Tensor, guidance: Tensor | None, pooled: Tensor) -> Tensor:
        """E_time(t) + E_guidance(g) + E_text(pooled), the vector behind every modulation, [B, D]. Times and guidance
        values stay float32, where diffusers rounds them to the network's type.
        """
        if self.config.guidance_embeds:
            guidance = torch.ones_like(time) if guidance is None else guidance  # [B]
            return self.time_text_embed(time, 1000 * guidance, pooled)
        if guidance is not None:
            raise InputError("this network embeds no guidance value; leave `guidance` out")
        return self.time_text_embed(time, pooled)

    def check(
        self,
        latents: Tensor,
        text: TextFeatures,
        condition_latents: Tensor,
        condition_index: Tensor,
        condition_scale: Tensor | None,
    ) -> None:
        """Refuse what does not fit together."""
        if latents.ndim != 4 or condition_index.ndim != 2:
            found = f"{tuple(latents.shape)} and {tuple(condition_index.shape)}"
            raise InputError(f"latents and condition_index have the shapes {found}, not [B, C, h, w] and [B, K]")
        batch, channels, height, width = latents.shape
        conditions, names = condition_index.shape[1], list(self.config.condition_names)
        if 4 * channels != self.config.in_channels:
            raise InputError(f"a latent of {channels} channels; this network takes {self.config.in_channels // 4}")
        if height % PATCH or width % PATCH:
            raise InputError(f"a latent of {height}x{width} cannot be cut into patches of {PATCH}")
        for name, found, wanted in (
            ("text.tokens", text.tokens, (batch, text.tokens.shape[1], self.config.joint_attention_dim)),
            ("text.pooled", text.pooled, (batch, self.config.pooled_projection_dim)),
            ("condition_latents", condition_latents, (batch, conditions, channels, height, width)),
            ("condition_index", condition_index, (batch, conditions)),
            ("condition_scale", condition_scale, (batch, conditions)),
        ):
            if found is not None and found.shape != wanted:
                raise InputError(f"{name} has the shape {tuple(found.shape)}; this batch needs {wanted}")
        rows = condition_index.flatten().tolist() if can_look(condition_index) else []
        if any(not -1 <= row < len(names) for row in rows):
            raise InputError(f"condition rows {rows}; this network has 0 to {len(names) - 1} for {', '.join(names)}")
        if condition_scale is not None and can_look(condition_scale) and (condition_scale < 0).any():
            raise InputError(f"condition strengths {condition_scale.tolist()}; none may be negative")

    def check_static(self) -> None:
        """Refuse a cache where there is no static pathway."""
        if self.config.attention not in ("hard", "decoupled"):
            raise InputError(f"{self.config.attention} attention has no static pathway, so it takes no static cache")

    @property
    def tied(self) -> bool:
        """Whether the spatial stream's base weights are the image stream's."""
        return self.config.spatial_stream == "lora"

    def tie_weights(self) -> None:
        """Share again what the streams share, after parameters were replaced as by `to_empty`. Loading does it."""
        if self.tied:
            tie(self)

    @classmethod
    def _load_pretrained_model(cls, model: MDiTFaceTransformer, *args: Any, **kwargs: Any) -> tuple:
        """As in diffusers, and then whole; not after `from_pretrained`, which places the model on devices before."""
        loaded = super()._load_pretrained_model(model, *args, **kwargs)
        begin(model, loaded[1])
        model.tie_weights()
        return loaded

    def fuse_lora(self, *args: Any, **kwargs: Any) -> None:
        """As in diffusers, but refused where weights are tied: fusing into one stream would change the other."""
        if self.tied:
            raise InputError("a LoRA cannot be fused here: the image and the spatial stream share their weights")
        super().fuse_lora(*args, **kwargs)


def join_text(tokens: Tokens) -> Tokens:
    """Put text at the head of the stream after it, as single blocks have it."""
    if "text" not in tokens:
        return tokens
    text, (host, x), *others = tokens["text"], *list(tokens.items())[1:]
    return {host: torch.cat([text, x], dim=1), **dict(others)}


def grid_ids(rows: int, columns: int, device: torch.device) -> Tensor:
    """FLUX positions (0, row, column) of a grid of tokens, float32 [rows * columns, 3]."""
    row = torch.arange(rows, device=device).repeat_interleave(columns)
    column = torch.arange(columns, device=device).repeat(rows)
    return torch.stack([torch.zeros_like(row), row, column], dim=1).float()


def strengths(condition_index: Tensor, condition_scale: Tensor | None) -> Tensor:
    """Strength of every condition, 0 where it is absent: float32 [B, K]."""
    present = (condition_index >= 0).float()
    return present if condition_scale is None else present * condition_scale.float()


def complete(condition_index: Tensor, static_cache: StaticCache | None) -> bool:
    """Whether no condition is absent, so that attention needs no mask. Where nobody can look, only a cache knows."""
    if static_cache is not None and condition_index is static_cache.condition_index:
        return static_cache.complete
    return can_look(condition_index) and bool((condition_index >= 0).all())


def can_look(x: Tensor) -> bool:
    """Whether values may be read: not on an accelerator, where it is a wait, nor in a graph, which it would break."""
    return x.device.type == "cpu" and not torch.compiler.is_compiling()
