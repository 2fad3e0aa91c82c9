"""MMFace-DiT: a dual-stream diffusion transformer for text and one spatial condition (arXiv 2603.29029).

Image and text tokens have separate weights and one joint attention. Time, pooled text and the kind of condition
modulate every layer. The latent of the condition is concatenated to that of the image along channels, so it adds no
tokens.

B batch, C latent channels, h x w latent size, p patch size, N image tokens (h / p)(w / p), L text tokens, D width,
H heads, d = D / H, T text width, K conditions (always 1 here).
"""

from __future__ import annotations

from typing import Any, ClassVar, Literal

import torch
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from diffusers.hooks.context_parallel import ContextParallelOutput
from diffusers.loaders import PeftAdapterMixin
from diffusers.models.attention import AttentionMixin, AttentionModuleMixin
from diffusers.models.attention_dispatch import dispatch_attention_fn
from torch import Tensor, nn
from torch.nn import functional as F

from likeness.models.caching import OUTPUT, Caches
from likeness.models.layers import (
    MLP,
    SPLIT,
    Rope,
    TimeEmbedding,
    as_output,
    explicit_attention,
    grid_angles,
    local_part,
    modulate,
    patchify,
    rope_angles,
    rotate,
    split_heads,
    unpatchify,
)
from likeness.types import InputError, TextFeatures


class JointAttentionProcessor:
    """Shared RoPE attention: queries, keys and values of both streams, image first, in one softmax (section 3.2).

    Q = [Q_image; Q_text], likewise K and V; Attention = softmax(RoPE(Q) RoPE(K)^T / sqrt(d)) V.
    """

    _attention_backend = None  # `set_attention_backend` of diffusers
    _parallel_config = None  # `enable_parallelism` of diffusers

    def __call__(self, attention: JointAttention, image: Tensor, text: Tensor, rope: Rope) -> tuple[Tensor, Tensor]:
        qkv = torch.cat([attention.image_qkv(image), attention.text_qkv(text)], dim=1)  # [B, N + L, 3 D]
        query, key, value = (split_heads(x, attention.heads) for x in qkv.chunk(3, dim=-1))  # [B, H, N + L, d]
        query, key = rotate(query, rope), rotate(key, rope)
        if attention.explicit_attention and torch.is_grad_enabled():
            x = explicit_attention(query, key, value).transpose(1, 2)  # [B, N + L, H, d]
        else:
            heads_last = [x.transpose(1, 2) for x in (query, key, value)]  # [B, N + L, H, d] each
            options = {"backend": self._attention_backend, "parallel_config": self._parallel_config}
            x = dispatch_attention_fn(*heads_last, **options)  # [B, N + L, H, d]
        image, text = x.flatten(2).split([image.shape[1], text.shape[1]], dim=1)  # [B, N, D], [B, L, D]
        return attention.image_out(image), attention.text_out(text)


class JointAttention(nn.Module, AttentionModuleMixin):
    """The layers of the joint attention."""

    explicit_attention = False  # `use_explicit_attention`
    _default_processor_cls = JointAttentionProcessor
    _available_processors = (JointAttentionProcessor,)
    _supports_qkv_fusion = False  # they are one layer per stream already

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.processor = JointAttentionProcessor()
        self.image_qkv = nn.Linear(width, 3 * width, bias=False)
        self.text_qkv = nn.Linear(width, 3 * width, bias=False)
        self.image_out = nn.Linear(width, width, bias=False)
        self.text_out = nn.Linear(width, width, bias=False)

    def forward(self, image: Tensor, text: Tensor, rope: Rope) -> tuple[Tensor, Tensor]:
        return self.processor(self, image, text, rope)


class MMFaceBlock(nn.Module):
    """Both streams: x = x + gate * F(AdaLN(x)), F the joint attention and then an MLP (section 3.2)."""

    def __init__(self, width: int, heads: int, mlp_width: int) -> None:
        super().__init__()
        self.modulation = nn.Linear(width, 12 * width)
        self.norm = nn.LayerNorm(width, eps=1e-6, elementwise_affine=False)  # without weights: shared by all four uses
        self.attention = JointAttention(width, heads)
        self.image_mlp = MLP(width, mlp_width)
        self.text_mlp = MLP(width, mlp_width)

    def forward(
        self, hidden_states: Tensor, encoder_hidden_states: Tensor, conditioning: Tensor, rope: Rope
    ) -> tuple[Tensor, Tensor]:
        """Image [B, N, D] and text [B, L, D], under the names that diffusers' caches need; conditioning [B, D] after
        SiLU.
        """
        image, text = hidden_states, encoder_hidden_states
        modulation = self.modulation(conditioning)  # [B, 12 D]
        image_1, scale_i1, gate_i1, image_2, scale_i2, gate_i2, *rest = modulation.chunk(12, dim=-1)  # [B, D] each
        text_1, scale_t1, gate_t1, text_2, scale_t2, gate_t2 = rest

        image_update, text_update = self.attention(
            modulate(self.norm(image), image_1, scale_i1), modulate(self.norm(text), text_1, scale_t1), rope
        )
        image = image + gate_i1[:, None] * image_update
        text = text + gate_t1[:, None] * text_update

        image = image + gate_i2[:, None] * self.image_mlp(modulate(self.norm(image), image_2, scale_i2))
        text = text + gate_t2[:, None] * self.text_mlp(modulate(self.norm(text), text_2, scale_t2))
        return image, text


class MMFaceTransformer(Caches, ModelMixin, ConfigMixin, AttentionMixin, PeftAdapterMixin):
    """The MMFace-DiT network. The defaults are the published one: 1,345,298,624 parameters.

    Args:
        patch_size: side of a patch, in latent pixels.
        latent_channels: channels of the noisy latent, of the prediction and of the condition's latent.
        hidden_size: width D, a multiple of 4 heads.
        depth: number of blocks.
        heads: attention heads.
        mlp_ratio: width of an MLP over D.
        text_dim: width of text tokens and of the pooled text.
        max_text_tokens: largest number of text tokens.
        condition_names: names of the ids of the condition embedding. An absent condition has the id of `none`, or 0
            without `none`, as in the training of the released weights.
        text_rope: `sequential` rotates text token l by position l over the whole head (the paper's 1-D positions);
            `none` does not rotate text (in the released code every text token has position 0).
        rope_theta: base of the rotary frequencies.

    Raises:
        InputError: `hidden_size` is not a multiple of 4 heads, or `text_rope` is unknown.
    """

    _supports_gradient_checkpointing = True
    _no_split_modules = ("MMFaceBlock",)
    _repeated_blocks = ("MMFaceBlock",)
    _skip_layerwise_casting_patterns = ("time_embed", "norm")
    _cp_plan: ClassVar = {"patch_embed": SPLIT, "text_embed": SPLIT, "final": ContextParallelOutput(gather_dim=1)}
    _cached_blocks: ClassVar = {MMFaceBlock: OUTPUT | {"return_encoder_hidden_states_index": 1}}

    @register_to_config
    def __init__(
        self,
        patch_size: int = 2,
        latent_channels: int = 16,
        hidden_size: int = 1152,
        depth: int = 28,
        heads: int = 16,
        mlp_ratio: float = 4.0,
        text_dim: int = 1024,
        max_text_tokens: int = 77,
        condition_names: tuple[str, ...] = ("mask", "sketch"),
        text_rope: Literal["sequential", "none"] = "sequential",
        rope_theta: float = 10_000.0,
    ) -> None:
        super().__init__()
        if hidden_size % (4 * heads):
            raise InputError(f"hidden_size {hidden_size} must be a multiple of 4 heads = {4 * heads}")
        if text_rope not in ("sequential", "none"):
            raise InputError(f"text_rope is {text_rope!r}; choose sequential or none")
        self.gradient_checkpointing = False
        self.patch_embed = nn.Linear(2 * latent_channels * patch_size**2, hidden_size)
        self.text_embed = nn.Linear(text_dim, hidden_size)
        self.time_embed = TimeEmbedding(hidden_size)
        self.pooled_embed = nn.Linear(text_dim, hidden_size)
        self.condition_embed = nn.Embedding(len(condition_names), hidden_size)
        # A parameter of the published network for dropping the pooled text. It is never read: absent text is the
        # encoded empty string.
        self.null_pooled = nn.Parameter(torch.zeros(text_dim))
        self.blocks = nn.ModuleList(MMFaceBlock(hidden_size, heads, int(hidden_size * mlp_ratio)) for _ in range(depth))
        self.final_modulation = nn.Linear(hidden_size, 2 * hidden_size)
        self.final_norm = nn.LayerNorm(hidden_size, eps=1e-6, elementwise_affine=False)
        self.final = nn.Linear(hidden_size, latent_channels * patch_size**2)
        self.initialize()

    def initialize(self) -> None:
        """Initialize residual branches and the output to zero; blocks keep PyTorch's initial values."""
        nn.init.xavier_uniform_(self.patch_embed.weight)
        nn.init.zeros_(self.patch_embed.bias)
        for layer in (self.time_embed.linear_1, self.time_embed.linear_2, self.pooled_embed, self.condition_embed):
            nn.init.normal_(layer.weight, std=0.02)
        for layer in (*(block.modulation for block in self.blocks), self.final_modulation, self.final):
            nn.init.zeros_(layer.weight)  # pyrefly: ignore
            nn.init.zeros_(layer.bias)  # pyrefly: ignore

    @property
    def absent_id(self) -> int:
        """Id of an absent condition."""
        names = list(self.config.condition_names)
        return names.index("none") if "none" in names else 0

    def forward(
        self,
        latents: Tensor,
        time: Tensor,
        text: TextFeatures,
        condition_latents: Tensor,
        condition_index: Tensor,
        *,
        rope: Rope | None = None,
        return_dict: bool | None = None,
    ) -> Any:
        """Predict the target of the objective at x_t.

        Args:
            latents: x_t, [B, C, h, w]; h and w any multiples of the patch size.
            time: output of `Objective.model_time`, [B].
            text: tokens [B, L, T] and pooled [B, T].
            condition_latents: latent of the condition, [B, 1, C, h, w]; ignored if it is absent.
            condition_index: id of the condition, [B, 1]; -1 if it is absent.
            rope: `self.rope(...)` for this size. Default: computed.
            return_dict: True returns diffusers' `Transformer2DModelOutput`, False the tuple (prediction,).

        Returns:
            The prediction, [B, C, h, w].
        """
        height, width = latents.shape[-2:]
        assert condition_index.shape[1] == 1, "one condition per pass"

        present = condition_index[:, 0] >= 0  # [B]
        condition = condition_latents[:, 0].masked_fill(~present[:, None, None, None], 0)  # [B, C, h, w]
        patches = patchify(torch.cat([latents, condition], dim=1), self.config.patch_size)  # [B, N, 2 C p p]
        image = self.patch_embed(patches)  # [B, N, D]
        tokens = self.text_embed(text.tokens)  # [B, L, D]
        if rope is None:
            rope = self.rope(height, width, text.tokens.shape[1], tokens.device)
        if self._parallel_config is not None:
            streams = [patches.shape[1], text.tokens.shape[1]]  # N, L of all processes
            parts = [[local_part(x, self._parallel_config) for x in table.split(streams)] for table in rope]
            rope = torch.cat(parts[0]), torch.cat(parts[1])
        conditioning = self.conditioning(time, text.pooled, condition_index)  # [B, D]

        for block in self.blocks:
            if torch.is_grad_enabled() and self.gradient_checkpointing:
                image, tokens = self._gradient_checkpointing_func(block, image, tokens, conditioning, rope)
            else:
                image, tokens = block(image, tokens, conditioning, rope)

        shift, scale = self.final_modulation(conditioning).chunk(2, dim=-1)  # [B, D] each
        output = self.final(modulate(self.final_norm(image), shift, scale))  # [B, N, C p p]
        return as_output(unpatchify(output, height, width, self.config.patch_size), return_dict)  # [B, C, h, w]

    def conditioning(self, time: Tensor, pooled_text: Tensor, condition_index: Tensor) -> Tensor:
        """SiLU(E_time(t) + E_caption(pooled) + E_modality(m)), the input of every modulation, [B, D] (section 3.3)."""
        kind = torch.where(condition_index[:, 0] >= 0, condition_index[:, 0], self.absent_id)  # [B]
        return F.silu(self.time_embed(time) + self.pooled_embed(pooled_text) + self.condition_embed(kind))

    def rope(self, height: int, width: int, text_tokens: int, device: torch.device | str = "cpu") -> Rope:
        """Rotary tables of the joint sequence [image; text] for a latent of height x width, [N + L, d / 2] each."""
        dim = self.config.hidden_size // self.config.heads
        theta, patch = self.config.rope_theta, self.config.patch_size
        image = grid_angles(height // patch, width // patch, dim, theta)  # [N, d / 2]
        positions = torch.arange(text_tokens) * (self.config.text_rope == "sequential")  # [L]
        angles = torch.cat([image, rope_angles(positions, dim, theta)])  # [N + L, d / 2]
        return angles.cos().float().to(device), angles.sin().float().to(device)
