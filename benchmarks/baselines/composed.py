"""Composition of a text-only and a mask-only network at sampling (Unite and Conquer, Nair et al. 2023).

If text and mask are independent given the image, p(x | text, mask) is proportional to p(x | text) p(x | mask) / p(x),
so predictions add:

    v = v_text(x, text) + w (v_mask(x, mask) - v_mask(x)), w = 1

Nothing is trained; guidance acts on the text as usual. Letters: see `likeness.models.mmface`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from likeness.models.layers import Rope
from likeness.models.mmface import MMFaceTransformer
from likeness.types import TextFeatures


class Composed(MMFaceTransformer):
    """The text network, which also contains the mask network; `composed` creates it."""

    mask_network: MMFaceTransformer
    weight = 1.0

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
        """As `MMFaceTransformer.forward`; without a condition, the text network alone."""
        absent = torch.full_like(condition_index, -1)
        prediction = super().forward(latents, time, text, condition_latents, absent, rope=rope)  # [B, C, h, w]
        with_mask, without = (
            self.mask_network(latents, time, text, condition_latents, index, rope=rope)
            for index in (condition_index, absent)
        )  # [B, C, h, w] each; equal if the mask is absent
        return prediction + self.weight * (with_mask - without)


def composed(network: Any, text_network: MMFaceTransformer, mask_network: MMFaceTransformer) -> Composed:
    """Return the composition of two networks. `network`, that of the variant's recipe, is not used."""
    model: Any = Composed.from_config(text_network.config)
    model.load_state_dict(text_network.state_dict())
    model.mask_network = mask_network
    return model


def without_text(network: MMFaceTransformer) -> MMFaceTransformer:
    """Let a network ignore its text."""
    for layer in (network.text_embed, network.pooled_embed):
        for parameter in layer.parameters():
            torch.nn.init.zeros_(parameter.requires_grad_(False))
    return network
