"""ControlNet on a frozen MMFace-DiT that was trained on text alone (Zhang et al. 2023, arXiv 2302.05543).

A trainable copy of the first half of the blocks reads image and condition; layers that start at zero add its image
tokens to those of the frozen network. Copying half a transformer follows PixArt-delta (arXiv 2401.05252). Letters: see
`likeness.models.mmface`.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from likeness.models.layers import Rope, modulate, patchify, unpatchify
from likeness.models.mmface import MMFaceTransformer
from likeness.types import TextFeatures


class ControlNet(MMFaceTransformer):
    """A frozen network and its trainable copy; `controlnet` creates it."""

    def add_copy(self) -> None:
        """Freeze the network and add the copy. The result computes what the network does."""
        self.requires_grad_(False)
        width, channels = self.config.hidden_size, self.config.latent_channels * self.config.patch_size**2
        self.control_blocks = copy.deepcopy(self.blocks[: (len(self.blocks) + 1) // 2]).requires_grad_(True)
        self.control_kind = nn.Embedding(len(self.config.condition_names), width)
        self.control_embed = nn.Linear(channels, width)
        self.control_outputs = nn.ModuleList(nn.Linear(width, width) for _ in self.control_blocks)
        for parameter in [
            self.control_kind.weight,
            *self.control_embed.parameters(),
            *self.control_outputs.parameters(),
        ]:
            nn.init.zeros_(parameter)

    def forward(
        self,
        latents: Tensor,
        time: Tensor,
        text: TextFeatures,
        condition_latents: Tensor,
        condition_index: Tensor,
        *,
        rope: Rope | None = None,
    ) -> Tensor:
        """As `MMFaceTransformer.forward`; without a condition, the frozen network alone determines the prediction."""
        height, width = latents.shape[-2:]
        patch, present = self.config.patch_size, condition_index >= 0  # [B, 1]
        image = self.patch_embed(patchify(torch.cat([latents, torch.zeros_like(latents)], dim=1), patch))  # [B, N, D]
        tokens = self.text_embed(text.tokens)  # [B, L, D]
        if rope is None:
            rope = self.rope(height, width, tokens.shape[1], tokens.device)
        conditioning = self.conditioning(time, text.pooled, torch.full_like(condition_index, -1))  # [B, D]

        condition = condition_latents[:, 0].masked_fill(~present[:, :, None, None], 0)  # [B, C, h, w]
        control = image + self.control_embed(patchify(condition, patch))  # [B, N, D]
        control_tokens = tokens
        control_conditioning = conditioning + F.silu(self.control_kind(condition_index[:, 0].clamp(min=0)))  # [B, D]
        for index, block in enumerate(self.blocks):
            image, tokens = block(image, tokens, conditioning, rope)
            if index < len(self.control_blocks):
                control, control_tokens = self.control_blocks[index](
                    control, control_tokens, control_conditioning, rope
                )
                image = image + self.control_outputs[index](control) * present[:, :, None]

        shift, scale = self.final_modulation(conditioning).chunk(2, dim=-1)  # [B, D] each
        output = self.final(modulate(self.final_norm(image), shift, scale))  # [B, N, C p p]
        return unpatchify(output, height, width, patch)  # [B, C, h, w]


def controlnet(network: Any, base: MMFaceTransformer) -> ControlNet:
    """Return the ControlNet of a base. `network`, that of the variant's recipe, is not used."""
    model: Any = ControlNet.from_config(base.config)
    model.load_state_dict(base.state_dict())
    model.add_copy()
    return model
