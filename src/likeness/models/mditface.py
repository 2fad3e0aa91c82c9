"""MDiTFace: FLUX.1 with a third stream for masks, sketches and keypoints (arXiv 2511.12631).

All modalities are tokens of one sequence [text; image; spatial]. Blocks, weights and names are those of diffusers'
FLUX, so that its checkpoints and LoRAs can be loaded. The spatial stream repeats the modules of the image stream, by
default with shared weights, which a LoRA makes different. The paper's pathways run the same blocks on other streams:

    plain FLUX       text, image                                  at every step
    holistic         text, image, spatial                         at every step
    hard             spatial                                      once: the static pathway
    decoupled        text, spatial                                once: the static pathway
    the latter two   text, image + static keys and values         at every step: the dynamic pathway

The paper describes the pathways, the order of tokens, the shared positions and the LoRA's rank. It does not describe
the modulation of the static pathway (`static_modulation`) and whether dynamic text attends to it
(`text_reads_spatial`). Conditions do not attend to each other in the static pathway: each has a copy of the text, so
that any of them can be removed.

B batch, C latent channels, h x w latent size, N image tokens (h / 2)(w / 2), L text tokens, K conditions, S = K N
spatial tokens, n tokens of any stream, D width, H heads, d = D / H, T text width, P pooled width.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from diffusers.hooks.context_parallel import ContextParallelInput, ContextParallelOutput
from diffusers.loaders import PeftAdapterMixin
from diffusers.models.attention import AttentionMixin
from diffusers.models.embeddings import CombinedTimestepGuidanceTextProjEmbeddings, CombinedTimestepTextProjEmbeddings
from diffusers.models.normalization import AdaLayerNormContinuous
from diffusers.models.transformers.transformer_flux import FluxPosEmbed
from torch import Tensor, nn
from torch.nn import functional as F

from likeness.models.caching import OUTPUT, Caches
from likeness.models.layers import SPLIT, as_output, local_part, patchify, unpatchify
from likeness.models.mditface_blocks import (
    KeysValues,
    Shared,
    SingleStreamBlock,
    TriStreamBlock,
    join_streams,
    join_text,
    split_streams,
)
from likeness.models.original_flux import load_original
from likeness.models.tied_weights import init_missing, load_shared_once, record_counterparts, save_shared_once, tie
from likeness.types import InputError, TextFeatures

PATCH = 2
"""Side of a FLUX patch, in latent pixels."""

StaticCache = tuple[KeysValues, ...]
"""Output of the static pathway, one entry per block. It depends on conditions and prompt, but not on time: a generation
computes it once (`MDiTFaceTransformer.static_cache`)."""


class MDiTFaceTransformer(Caches, ModelMixin, ConfigMixin, AttentionMixin, PeftAdapterMixin):
    """The MDiTFace network. The defaults are the size of FLUX.1-dev, which the paper's costs imply. Arguments and
    weights have the names of diffusers' `FluxTransformer2DModel`, so `from_pretrained` loads a FLUX.1 transformer, too.

    Args:
        in_channels: values of a patch, 4 C.
        num_layers: double blocks.
        num_single_layers: single blocks.
        attention_head_dim: width d of a head.
        num_attention_heads: heads H; the width D is H d.
        joint_attention_dim: width T of text tokens.
        pooled_projection_dim: width P of the pooled text.
        guidance_embeds: whether the network is guidance-distilled (FLUX.1-dev) and embeds a guidance value.
        axes_dims_rope: how many of a head's d values rotate with each of (0, row, column).
        condition_names: names of the ids of the condition embedding.
        attention: how spatial tokens interact with the others. `holistic`: in one sequence, at every step. `hard`: by a
            static pathway of spatial tokens alone. `decoupled` (the paper): by a static pathway of text and spatial
            tokens. `concat`, its baseline (Table 3), has no spatial tokens: patches of condition and image are
            concatenated, that is, an embedding of the condition with separate weights is added.
        spatial_stream: `lora` shares the weights of spatial and image stream, for an adapter to change (the paper, as
            its costs imply); `full` gives the spatial stream separate weights, for training from scratch.
        static_modulation: modulation of the static pathway, which the paper does not describe. `text`: time 0, guidance
            1 and the pooled text; `constant`: the same with a pooled text of zeros. `hard` is always `constant`.
        text_reads_spatial: whether text also attends to spatial keys, which the paper does not describe.

    Raises:
        InputError: an unknown option, or rotary axes that do not add up to a head.
    """

    _supports_gradient_checkpointing = True
    _no_split_modules = ("TriStreamBlock", "SingleStreamBlock")
    _repeated_blocks = ("TriStreamBlock", "SingleStreamBlock")
    _skip_layerwise_casting_patterns = ("pos_embed", "norm")
    _cached_blocks: ClassVar = {TriStreamBlock: OUTPUT, SingleStreamBlock: OUTPUT}

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
            raise InputError(f"axes_dims_rope {tuple(axes_dims_rope)} must add up to {attention_head_dim}")
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
        self.register_state_dict_post_hook(save_shared_once)
        self.register_load_state_dict_post_hook(load_shared_once)
        self.initialize()
        record_counterparts(self)
        self.tie_weights()

    def initialize(self) -> None:
        """Initialize residual branches, the output and all weights that FLUX lacks to zero; other linear layers keep
        PyTorch's initial values.
        """
        modulations = [module.linear for module in self.modules() if hasattr(module, "silu")]
        new = [self.concat_embedder] if self.config.attention == "concat" else []
        for layer in (*modulations, *new, self.proj_out):
            nn.init.zeros_(layer.weight)
            nn.init.zeros_(layer.bias)
        nn.init.zeros_(self.condition_embed.weight)

    def forward(
        self,
        latents: Tensor | None,
        time: Tensor | None,
        text: TextFeatures,
        condition_latents: Tensor,
        condition_index: Tensor,
        *,
        all_present: bool = False,
        condition_scale: Tensor | None = None,
        guidance: Tensor | None = None,
        static_cache: StaticCache | None = None,
        return_dict: bool | None = None,
    ) -> Any:
        """Predict the target of the objective at x_t.

        Args:
            latents: x_t, [B, C, h, w]; h and w even. None: run the static pathway only (`static_cache`).
            time: output of `Objective.model_time`, [B], 0 to 1000.
            text: tokens [B, L, T] and pooled [B, P].
            condition_latents: latents of the conditions, [B, K, C, h, w], any K >= 0; ignored if absent.
            condition_index: id of each condition, [B, K]; -1 if it is absent. Without any, this is plain FLUX.
            all_present: the caller guarantees that no id is -1, so that attention runs without a mask.
            condition_scale: strength s >= 0 of each condition, [B, K]: log s is added to the logits of its keys, so
                s = 1 changes nothing and s = 0 is absence. `concat` multiplies by s instead.
            guidance: the value that a guidance-distilled network embeds, [B]. Default: 1, as in training.
            static_cache: `self.static_cache(...)` of these prompts and conditions; condition latents are then ignored.
                Default: computed.
            return_dict: True returns diffusers' `Transformer2DModelOutput`, False the tuple (prediction,).

        Returns:
            The prediction, [B, C, h, w]; the static cache if there are no latents.

        Raises:
            InputError: guidance for a network without guidance embedding.
        """
        if latents is None or time is None:
            embedded = self.context_embedder(text.tokens)  # [B, L, D]
            return self.static_pathway(embedded, text.pooled, condition_latents, condition_index)
        (height, width), conditions, mode = latents.shape[-2:], condition_index.shape[1], self.config.attention
        image_ids = self.image_ids(height, width, latents.device)  # [N, 3]
        image = self.x_embedder(patchify(latents, PATCH))  # [B, N, D]
        tokens = {"text": self.context_embedder(text.tokens), "image": image}  # [B, L, D], [B, N, D]
        ids = [image_ids.new_zeros(tokens["text"].shape[1], 3), image_ids]  # [L, 3], [N, 3]
        static = bias = None
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
                static = self.static_pathway(tokens["text"], text.pooled, condition_latents, condition_index)
            else:
                static = static_cache
            if not (all_present and condition_scale is None and self.config.text_reads_spatial):
                if self._parallel_config is not None:
                    raise InputError(
                        "With context parallelism, conditions have strength 1: leave conditioning_scale out"
                    )
                bias = self.spatial_bias(strengths(condition_index, condition_scale), tokens)

        conditioning = self.conditioning(time, guidance, text.pooled)  # [B, D]
        shared = Shared(conditioning, self.pos_embed(torch.cat(ids)), bias)
        image = self.run_blocks(tokens, shared, static)[0]["image"][:, -len(image_ids) :]  # [B, N, D]
        output = self.proj_out(self.norm_out(image, conditioning))  # [B, N, 4 C]
        return as_output(unpatchify(output, height, width, PATCH), return_dict)  # [B, C, h, w]

    def static_cache(self, text: TextFeatures, condition_latents: Tensor, condition_index: Tensor) -> StaticCache:
        """Run the static pathway of these prompts, tokens [B, L, T] and pooled [B, P], and conditions [B, K, C, h, w],
        K >= 1, with ids [B, K], -1 if absent, for all times, guidance values and strengths. Raises `InputError` if the
        network has no static pathway.
        """
        if self.config.attention not in ("hard", "decoupled"):
            raise InputError(f"{self.config.attention} attention has no static pathway")
        # a whole forward pass, so that hooks such as those of offloading run
        return nn.Module.__call__(self, None, None, text, condition_latents, condition_index)

    def static_pathway(
        self, text: Tensor, pooled: Tensor, condition_latents: Tensor, condition_index: Tensor
    ) -> StaticCache:
        """Keys and values [B, S, H, d] of the spatial tokens in every block, from <mask, text> (`hard`: from the mask),
        at time 0. Each condition is a separate sample with a copy of the text; absent ones are masked later.

        text: embedded tokens, [B, L, D].
        """
        conditions, (height, width) = condition_index.shape[1], condition_latents.shape[-2:]
        image_ids = self.image_ids(height, width, text.device)  # [N, 3]
        spatial = self.embed_conditions(self.spatial_embedder, condition_latents, condition_index)  # [B, K, N, D]
        tokens, ids = {"spatial": spatial.flatten(0, 1)}, [self.spatial_ids(image_ids)]  # [B K, N, D], [N, 3]
        if self.config.attention == "decoupled":
            tokens = {"text": text.repeat_interleave(conditions, dim=0), **tokens}  # [B K, L, D] first
            ids = [image_ids.new_zeros(text.shape[1], 3), *ids]
        pooled = pooled.repeat_interleave(conditions, dim=0)  # [B K, P]
        if self.config.attention == "hard" or self.config.static_modulation == "constant":
            pooled = torch.zeros_like(pooled)
        conditioning = self.conditioning(torch.zeros(len(pooled), device=text.device), None, pooled)  # [B K, D]
        _, layers = self.run_blocks(tokens, Shared(conditioning, self.pos_embed(torch.cat(ids))), keep=len(image_ids))
        merge = lambda x: x.unflatten(0, (-1, conditions)).flatten(1, 2)  # noqa: E731  # [B K, N, H, d] -> [B, S, H, d]
        return tuple(KeysValues(merge(layer.keys), merge(layer.values)) for layer in layers)

    def run_blocks(
        self,
        tokens: dict[str, Tensor],
        shared: Shared,
        static: Sequence[KeysValues] | None = None,
        keep: int = 0,
    ) -> tuple[dict[str, Tensor], list[KeysValues]]:
        """Run all blocks on tokens [B, n, D]. Also returns the keys and values of the last `keep` tokens of every
        block.
        """
        hidden_states, kept = join_streams(list(tokens.values())), []  # [B, sum of n, D]
        sizes = {name: x.shape[1] for name, x in tokens.items()}
        for index, block in enumerate(chain(self.transformer_blocks, self.single_transformer_blocks)):
            if index == len(self.transformer_blocks):
                sizes = join_text(sizes)
            arguments = (hidden_states, sizes, shared, None if static is None else static[index], keep > 0)
            if torch.is_grad_enabled() and self.gradient_checkpointing:
                output = self._gradient_checkpointing_func(block, *arguments)
            else:
                output = block(*arguments)
            hidden_states, own = output if keep else (output, ())
            if keep:  # a copy, since a view would keep those of the other tokens in memory
                kept.append(KeysValues(*(x[:, -keep:].clone() for x in own)))  # [B, keep, H, d]
        return split_streams(hidden_states, sizes), kept

    def embed_conditions(self, embedder: nn.Module, condition_latents: Tensor, condition_index: Tensor) -> Tensor:
        """Embed the patches of every condition and add the embedding of its id: [B, K, N, D]. Absent ones are zeros."""
        patches = patchify(condition_latents.flatten(0, 1), PATCH)  # [B K, N, 4 C]
        patches = patches.unflatten(0, condition_index.shape)  # [B, K, N, 4 C]
        tokens = embedder(patches.masked_fill((condition_index < 0)[:, :, None, None], 0))  # [B, K, N, D]
        kind = self.condition_embed(condition_index.clamp(min=0))  # [B, K, D]
        return tokens + kind[:, :, None].to(tokens.dtype)

    def image_ids(self, height: int, width: int, device: torch.device) -> Tensor:
        """Positions [N, 3] of the tokens of a latent of height x width: with context parallelism, of this process."""
        return local_part(grid_ids(height // PATCH, width // PATCH, device), self._parallel_config)

    def spatial_ids(self, image_ids: Tensor) -> Tensor:
        """Positions [N, 3] of a condition's tokens: those of the image tokens at the same place."""
        return image_ids

    def spatial_bias(self, strength: Tensor, tokens: dict[str, Tensor]) -> Tensor:
        """Log s for the keys of every condition, minus infinity if it is absent, and 0 for other keys:
        [B, 1, 1 or queries, L + N + S].
        """
        length, image = tokens["text"].shape[1], tokens["image"].shape[1]
        bias = F.pad(strength.log().repeat_interleave(image, dim=1), (length + image, 0))[:, None, None]
        if not self.config.text_reads_spatial:
            bias = bias.repeat(1, 1, sum(x.shape[1] for x in tokens.values()), 1)  # [B, 1, queries, L + N + S]
            bias[:, :, :length, length + image :] = -torch.inf
        return bias.to(tokens["image"].dtype)

    def conditioning(self, time: Tensor, guidance: Tensor | None, pooled: Tensor) -> Tensor:
        """E_time(t) + E_guidance(g) + E_text(pooled), the input of every modulation, [B, D]. Times and guidance values
        stay float32, whereas diffusers rounds them to the network's dtype.
        """
        if self.config.guidance_embeds:
            guidance = torch.ones_like(time) if guidance is None else guidance  # [B]
            return self.time_text_embed(time, 1000 * guidance, pooled)
        if guidance is not None:
            raise InputError("This network does not embed guidance values: leave `guidance` out")
        return self.time_text_embed(time, pooled)

    @property
    def _cp_plan(self) -> dict[str, Any]:
        """Context parallelism: every process has a part of each stream."""
        plan = {"x_embedder": SPLIT, "context_embedder": SPLIT, "proj_out": ContextParallelOutput(gather_dim=1)}
        by_condition = {0: ContextParallelInput(split_dim=2, split_output=True)}  # of [B, K, N, D]
        embedders = [name for name in ("spatial_embedder", "concat_embedder") if hasattr(self, name)]
        return plan | dict.fromkeys(embedders, by_condition)

    @property
    def tied(self) -> bool:
        """Whether the spatial stream shares the base weights of the image stream."""
        return self.config.spatial_stream == "lora"

    def tie_weights(self) -> None:
        """Share the weights of both streams again after parameters were replaced, as by `to_empty`."""
        if self.tied:
            tie(self)

    @classmethod
    def from_single_file(
        cls, path: str | Path, *, dtype: torch.dtype = torch.bfloat16, attention_head_dim: int = 128, **options: Any
    ) -> MDiTFaceTransformer:
        """Load the transformer of a FLUX.1 in a single .safetensors or .gguf file, in the names of the original code.
        Quantized matrices of a GGUF file stay quantized, and are dequantized whenever they are used.

        Args:
            path: the file, which may also contain other components.
            dtype: data type of the weights, and of the dequantized ones.
            attention_head_dim: width of a head; all other sizes follow from the weights.
            **options: other arguments of this class, such as `condition_names`. Default: no conditions.

        Raises:
            InputError: the file cannot be read, does not contain such a transformer, or is quantized and
                `spatial_stream` is not `lora`.
        """
        return load_original(cls, Path(path), dtype, attention_head_dim, options)

    @classmethod
    def _load_pretrained_model(cls, model: MDiTFaceTransformer, *args: Any, **kwargs: Any) -> tuple:
        """As in diffusers, then initialize weights that FLUX lacks. `from_pretrained` places the model on devices
        after this method, which requires all of them.
        """
        loaded = super()._load_pretrained_model(model, *args, **kwargs)
        init_missing(model, loaded[1])
        model.tie_weights()
        return loaded

    def enable_group_offload(
        self,
        onload_device: torch.device | str,
        offload_device: torch.device | str = "cpu",
        offload_type: str = "block_level",
        *args: Any,
        **options: Any,
    ) -> None:
        """As in diffusers, but leaf by leaf to a disk is rejected if weights are tied: diffusers would offload them
        with one module while the other needs them.
        """
        if self.tied and options.get("offload_to_disk_path") and offload_type == "leaf_level":
            raise InputError(
                "offload_type 'leaf_level' to a disk is not supported, because the image and the spatial stream share "
                "their weights: choose 'block_level', or leave offload_to_disk_path out"
            )
        super().enable_group_offload(onload_device, offload_device, offload_type, *args, **options)

    def fuse_qkv_projections(self) -> None:
        """Rejected: `JointAttentionProcessor` uses the layers of each stream."""
        raise InputError(
            "The projections of queries, keys and values cannot be fused: each stream has layers of its own"
        )

    def fuse_lora(self, *args: Any, **kwargs: Any) -> None:
        """As in diffusers, but rejected if weights are tied: fusing into one stream would change the other."""
        if self.tied:
            raise InputError("A LoRA cannot be fused: the image and the spatial stream share their weights")
        super().fuse_lora(*args, **kwargs)


def select(cache: StaticCache, start: int, stop: int, keep: Sequence[int], conditions: int) -> StaticCache:
    """Select samples start <= b < stop and some of the conditions of a cache.

    Conditions do not attend to each other in the static pathway, so the result equals a cache of these alone.
    """

    def part(x: Tensor) -> Tensor:
        x = x[start:stop]  # [b, S, H, d], a view
        if len(keep) == conditions:
            return x
        return x.unflatten(1, (conditions, -1))[:, keep].flatten(1, 2)  # [b, len(keep) N, H, d]

    return tuple(KeysValues(part(keys), part(values)) for keys, values in cache)


def grid_ids(rows: int, columns: int, device: torch.device) -> Tensor:
    """FLUX positions (0, row, column) of a grid of tokens, float32 [rows * columns, 3]."""
    row = torch.arange(rows, device=device).repeat_interleave(columns)
    column = torch.arange(columns, device=device).repeat(rows)
    return torch.stack([torch.zeros_like(row), row, column], dim=1).float()


def strengths(condition_index: Tensor, condition_scale: Tensor | None) -> Tensor:
    """Strength of every condition, 0 if it is absent: float32 [B, K]."""
    present = (condition_index >= 0).float()
    return present if condition_scale is None else present * condition_scale.float()
