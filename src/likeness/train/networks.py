"""The network of a recipe, from random weights, sized by what it stands on."""

from __future__ import annotations

from collections.abc import Sequence

from diffusers import ModelMixin

from likeness.models.mditface import MDiTFaceTransformer
from likeness.models.mmface import MMFaceTransformer
from likeness.train.config import MDiTFaceNetwork, TrainRecipe
from likeness.types import InputError


def build_network(
    recipe: TrainRecipe, *, channels: int, text_dim: int, pooled_dim: int, text_tokens: int
) -> ModelMixin:
    """The network of a recipe.

    Args:
        recipe: the run.
        channels: C of the latents.
        text_dim: width of the text tokens.
        pooled_dim: width of the pooled text.
        text_tokens: largest number of text tokens.

    Raises:
        InputError: the recipe asks the network for something that it does not do.
    """
    n = recipe.network
    names = condition_names(recipe)
    if isinstance(n, MDiTFaceNetwork):
        if n.hidden_size % (8 * n.heads):  # whole heads, in pairs of values along three axes
            raise InputError(
                f"hidden_size is {n.hidden_size}: with {n.heads} heads it must be a multiple of {8 * n.heads}"
            )
        return MDiTFaceTransformer(
            in_channels=4 * channels,
            num_layers=n.depth,
            num_single_layers=n.single_depth,
            attention_head_dim=n.hidden_size // n.heads,
            num_attention_heads=n.heads,
            joint_attention_dim=text_dim,
            pooled_projection_dim=pooled_dim,
            guidance_embeds=False,
            axes_dims_rope=rope_axes(n.hidden_size // n.heads),
            condition_names=names,
            attention=n.attention,
            spatial_stream="full",
            static_modulation=n.static_modulation,
        )
    several = [share for share in recipe.data.condition_shares if "+" in share]
    if several:
        raise InputError(f"condition_shares has {several[0]!r}, but MMFace-DiT takes one condition at a time")
    if pooled_dim != text_dim:
        raise InputError(
            f"MMFace-DiT takes one text tower; here tokens are {text_dim} and the pooled text {pooled_dim} wide"
        )
    return MMFaceTransformer(
        patch_size=n.patch_size,
        latent_channels=channels,
        hidden_size=n.hidden_size,
        depth=n.depth,
        heads=n.heads,
        mlp_ratio=n.mlp_ratio,
        text_dim=text_dim,
        max_text_tokens=text_tokens,
        condition_names=(*names, "none"),
        text_rope=n.text_rope,
    )


def condition_names(recipe: TrainRecipe) -> tuple[str, ...]:
    """The conditions that the recipe trains, in the order in which it names them."""
    return tuple(dict.fromkeys(name for share in recipe.data.condition_shares for name in parts_of(share)))


def parts_of(share: str) -> Sequence[str]:
    """The conditions of one entry of `condition_shares`: "mask+sketch" has two, "none" has none."""
    return [] if share == "none" else share.split("+")


def rope_axes(head_dim: int) -> tuple[int, int, int]:
    """How a head's values are shared among (0, row, column), as FLUX's 128 are: (16, 56, 56); all even."""
    each = 7 * head_dim // 8 // 4 * 2
    return head_dim - 2 * each, each, each
