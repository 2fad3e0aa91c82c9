"""The network of a recipe: from random weights, sized by what it stands on, or an adapter on a frozen base."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import ModelMixin
from torch import nn

from likeness.encoders.components import FLUX, Components
from likeness.files import read_json
from likeness.models.mditface import MDiTFaceTransformer
from likeness.models.mmface import MMFaceTransformer
from likeness.models.tied_weights import NEW
from likeness.pipelines.adapters import Adapter, add_adapter
from likeness.train.config import (
    MDiTFaceAdapter,
    MDiTFaceNetwork,
    TrainRecipe,
    check_single_conditions,
    parts_of,
)
from likeness.types import InputError
from likeness.weights.catalog import CODEC, find_model
from likeness.weights.packed import load_component


def build_network(
    recipe: TrainRecipe, *, channels: int, text_dim: int, pooled_dim: int, text_tokens: int
) -> ModelMixin:
    """The network of a recipe. An adapter's base has the sizes that it has: the arguments are not read.

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
    if isinstance(n, MDiTFaceAdapter):
        adapter = adapter_of(recipe)
        base = find_model(n.base)
        if (kind := read_json(base / "model_index.json").get("_class_name")) not in (FLUX, "MDiTFacePipeline"):
            raise InputError(f"{n.base} is a {kind}: the base of an adapter must be FLUX.1")
        # its condition rows come with the adapter
        options = {name: value for name, value in adapter.network.items() if name != "condition_names"}
        transformer = MDiTFaceTransformer.from_pretrained(base / "transformer", dtype=torch.bfloat16, **options)
        return begin_adapter(transformer, adapter)
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
            spatial_stream=n.spatial_stream,
            static_modulation=n.static_modulation,
        )
    check_single_conditions(recipe.data)
    if n.hidden_size % (4 * n.heads):  # whole heads, in pairs of values along two axes
        raise InputError(f"hidden_size is {n.hidden_size}: with {n.heads} heads it must be a multiple of {4 * n.heads}")
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


def adapter_of(recipe: TrainRecipe) -> Adapter:
    """The configuration of the adapter that a recipe trains."""
    n = recipe.network
    assert isinstance(n, MDiTFaceAdapter)
    return Adapter(
        base=n.base,
        condition_names=condition_names(recipe),
        attention=n.attention,
        static_modulation=n.static_modulation,
        targets=n.targets,
        rank=n.rank,
        alpha=n.alpha,
        defaults=recipe.defaults,
    )


def begin_adapter(transformer: MDiTFaceTransformer, adapter: Adapter) -> MDiTFaceTransformer:
    """Freeze a base and put a new adapter on it: the LoRA, the conditions' rows and for `concat` the new matrix are
    trained, in float32.
    """
    transformer.requires_grad_(False)
    add_adapter(transformer, adapter)
    for name, parameter in transformer.named_parameters():
        parameter.requires_grad_(".lora_" in name or name.startswith(NEW))
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    return transformer


def condition_names(recipe: TrainRecipe) -> tuple[str, ...]:
    """The conditions that the recipe trains, in the order in which it names them."""
    return tuple(dict.fromkeys(name for share in recipe.data.condition_shares for name in parts_of(share)))


def share_of(recipe: TrainRecipe, condition: str) -> float:
    """How often a sample is meant to have a condition, 0 to 1. One of share 0 has its row, but is not learnt."""
    shares = recipe.data.condition_shares
    return sum(share for kind, share in shares.items() if condition in parts_of(kind)) / sum(shares.values())


def rope_axes(head_dim: int) -> tuple[int, int, int]:
    """How a head's values are shared among (0, row, column), as FLUX's 128 are: (16, 56, 56); all even."""
    each = 7 * head_dim // 8 // 4 * 2
    return head_dim - 2 * each, each, each


def same_codec(model: Path, components: Components) -> None:
    """Check that a published model was trained on the latents of these components: the same encoder and the same
    statistics. What a folder does not record is not checked.

    Raises:
        InputError: it was trained on others.
    """
    advice = "name the components that it was trained on, or start a new run"
    if (model / CODEC).is_file() and not components.same_encoder(read_json(model / CODEC)["codec"]):
        raise InputError(f"{model} was trained on the latents of another encoder: {advice}")
    index = read_json(model / "model_index.json") if (model / "model_index.json").is_file() else {}
    for key in ("latent_mean", "latent_std"):
        if key in index and not np.allclose(index[key], components.settings[key]):  # one number, or one per channel
            raise InputError(f"{model} was trained with another {key} than that of the components: {advice}")


def start_from(network: Any, recipe: TrainRecipe, components: Components) -> None:
    """Give a network the weights of the model that a recipe starts from. Rows of the condition embedding go by name, so
    that conditions may be added or left out; the rows of new ones keep their first values.

    Args:
        network: built by the recipe.
        recipe: the run.
        components: what it stands on.

    Raises:
        InputError: the model is an adapter, or its network or encoder is another than the recipe's.
    """
    if recipe.start is None:
        return
    folder = find_model(recipe.start)
    if not (folder / "model_index.json").is_file() or isinstance(recipe.network, MDiTFaceAdapter):
        raise InputError(f"start is {recipe.start}: only a whole network can be gone on from, not an adapter")
    same_codec(folder, components)
    given = load_component(folder / "transformer", *read_json(folder / "model_index.json")["transformer"])
    for key, value in network.config.items():
        if not key.startswith("_") and key != "condition_names" and plain(given.config.get(key)) != plain(value):
            raise InputError(f"{recipe.start} has {key} = {given.config.get(key)}, but the recipe makes it {value}")
    weights = given.state_dict()
    rows, names = weights.pop("condition_embed.weight"), list(given.config.condition_names)
    network.load_state_dict(weights, strict=False)
    with torch.no_grad():
        for row, name in enumerate(network.config.condition_names):
            if name in names:
                network.condition_embed.weight[row] = rows[names.index(name)]


def plain(value: Any) -> Any:
    """A configuration's value as JSON has it."""
    return list(value) if isinstance(value, tuple) else value


def choose_trained(network: nn.Module, recipe: TrainRecipe) -> None:
    """Freeze all but the parameters that the recipe names.

    Raises:
        InputError: it names none that there is.
    """
    for beginning in recipe.trained:
        if not any(name.startswith(beginning) for name, _ in network.named_parameters()):
            names = sorted({name.split(".")[0] for name, _ in network.named_parameters()})
            raise InputError(f"trained has {beginning!r}, but the network's parameters begin with {', '.join(names)}")
    for name, parameter in network.named_parameters():
        if recipe.trained and not name.startswith(recipe.trained):
            parameter.requires_grad_(False)
