"""The network of a recipe: with random weights or those of another model, or an adapter on a frozen base."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import ModelMixin
from torch import nn

from likeness.device import choose_precision
from likeness.encoders.components import FLUX, Components, part_folder
from likeness.files import read_json
from likeness.models.mditface import MDiTFaceTransformer
from likeness.models.mmface import MMFaceTransformer
from likeness.objectives import Objective, make_objective
from likeness.pipelines.adapters import Adapter, MMFaceLora, add_adapter, new_weights
from likeness.train.config import (
    AdapterNetwork,
    MDiTFaceAdapter,
    MDiTFaceNetwork,
    MMFaceAdapter,
    TrainRecipe,
    check_single_conditions,
    condition_names,
)
from likeness.types import InputError
from likeness.weights.catalog import CODEC, find_model
from likeness.weights.packed import load_component


def with_precision(recipe: TrainRecipe, device: str) -> TrainRecipe:
    """Return the recipe with the precision of a device (`choose_precision`). A frozen FLUX.1 is in bf16 anywhere."""
    frozen_flux = recipe.precision == "auto" and isinstance(recipe.network, MDiTFaceAdapter)
    precision = "bf16" if frozen_flux else choose_precision(recipe.precision, device)
    return dataclasses.replace(recipe, precision=precision)


def build_network(
    recipe: TrainRecipe, *, channels: int, text_dim: int, pooled_dim: int, text_tokens: int
) -> ModelMixin:
    """Create the network of a recipe for latents of C `channels`, at most `text_tokens` tokens of width `text_dim` and
    pooled text of width `pooled_dim`; an adapter's base determines its own sizes. Raises `InputError` if the recipe
    does not fit the network.
    """
    n, names = recipe.network, condition_names(recipe.data)
    if isinstance(n, AdapterNetwork):
        base, adapter = find_model(n.base), adapter_of(recipe)
        index = read_json(base / "model_index.json")
        kind, flux = index.get("_class_name"), isinstance(adapter, Adapter)
        if kind not in ((FLUX, "MDiTFacePipeline") if flux else ("MMFacePipeline",)):
            raise InputError(
                f"{n.base} is a {kind}: the base of an adapter must be {'FLUX.1' if flux else 'an MMFace'}"
            )
        if not flux:
            transformer = load_component(part_folder(base, "transformer"), *index["transformer"])
            check_base(n.base, transformer, make_objective(index["objective"]), recipe)
            return add_new_adapter(transformer, adapter)
        # the condition embeddings are part of the adapter
        options = {name: value for name, value in adapter.network.items() if name != "condition_names"}
        transformer = MDiTFaceTransformer.from_pretrained(
            base / "transformer", dtype=torch.bfloat16, use_safetensors=True, **options
        )
        return add_new_adapter(transformer, adapter)
    if isinstance(n, MDiTFaceNetwork):
        if n.hidden_size % (8 * n.heads):  # heads of pairs of values along three axes
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
    if n.hidden_size % (4 * n.heads):  # heads of pairs of values along two axes
        raise InputError(f"hidden_size is {n.hidden_size}: with {n.heads} heads it must be a multiple of {4 * n.heads}")
    if pooled_dim != text_dim:
        raise InputError(
            f"MMFace-DiT needs one text encoder, but text tokens are {text_dim} wide and pooled text {pooled_dim}"
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


def check_base(name: str, transformer: Any, objective: Objective, recipe: TrainRecipe) -> None:
    """Check that the base of an adapter on an MMFace has the recipe's conditions and objective. Raises `InputError`."""
    check_single_conditions(recipe.data)
    known = [own for own in transformer.config.condition_names if own != "none"]
    if new := [own for own in condition_names(recipe.data) if own not in known]:
        raise InputError(f"condition_probabilities has {new[0]}, but {name} was trained with {', '.join(known)}")
    check_same_objective(name, objective, make_objective(recipe.objective))


def check_same_objective(name: str, objective: Objective, wanted: Objective) -> None:
    """Check that a model with this objective predicts what the wanted one does. Raises `InputError`."""
    base, ours = objective.config(), wanted.config()
    for key in ("name", "prediction", "time_scale"):
        if base.get(key) != ours.get(key):
            raise InputError(f"{name} was trained with the objective's {key} = {base.get(key)}, not {ours.get(key)}")


def adapter_of(recipe: TrainRecipe) -> Adapter | MMFaceLora:
    """Return the configuration of the adapter that a recipe trains."""
    n = recipe.network
    if isinstance(n, MMFaceAdapter):
        return MMFaceLora(base=n.base, targets=n.targets, rank=n.rank, alpha=n.alpha, defaults=recipe.defaults)
    assert isinstance(n, MDiTFaceAdapter)
    return Adapter(
        base=n.base,
        condition_names=condition_names(recipe.data),
        attention=n.attention,
        static_modulation=n.static_modulation,
        targets=n.targets,
        rank=n.rank,
        alpha=n.alpha,
        defaults=recipe.defaults,
    )


def add_new_adapter(transformer: Any, adapter: Adapter | MMFaceLora) -> Any:
    """Freeze a base and add a new adapter, trainable in float32: the LoRA, and on FLUX.1 the condition embeddings and,
    for `concat`, the new matrix.
    """
    transformer.requires_grad_(False)
    add_adapter(transformer, adapter)
    for name, parameter in transformer.named_parameters():
        parameter.requires_grad_(".lora_" in name or name.startswith(new_weights(transformer)))
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    return transformer


def rope_axes(head_dim: int) -> tuple[int, int, int]:
    """Return the rotary dimensions of a head for (0, row, column), in the proportions of FLUX's 128: (16, 56, 56)."""
    each = 7 * head_dim // 8 // 4 * 2
    return head_dim - 2 * each, each, each


def check_same_components(model: Path, components: Components) -> None:
    """Check that a model was trained with these components: same encoder of images, latent statistics and text
    encoders. What its folder does not record is not checked. Raises `InputError` if it was trained with others.
    """
    advice = "name the components that it was trained on, or start a new run"
    recorded = read_json(model / CODEC) if (model / CODEC).is_file() else {}
    if recorded.get("codec", components.codec_hash) != components.codec_hash:
        raise InputError(f"{model} was trained on the latents of another encoder: {advice}")
    if "text" in recorded and recorded["text"] != components.text_hash:
        raise InputError(f"{model} was trained with another text encoder: {advice}")
    index = read_json(model / "model_index.json") if (model / "model_index.json").is_file() else {}
    for key in ("latent_mean", "latent_std"):
        if key in index and not np.allclose(index[key], components.settings[key]):  # one number, or one per channel
            raise InputError(f"{model} was trained with another {key} than that of the components: {advice}")


def load_initial_weights(network: Any, source: str, objective: Objective, components: Components) -> None:
    """Load the weights of the model `source`, a recipe's `init_from`. Condition embeddings are matched by name, so that
    conditions can be added or removed; those of new conditions keep their initial values. Raises `InputError` if the
    model is an adapter, or has another network, objective or encoder.
    """
    folder = find_model(source)
    if not (folder / "model_index.json").is_file():
        raise InputError(f"init_from is {source}: training continues from whole networks, not from adapters")
    check_same_components(folder, components)
    index = read_json(folder / "model_index.json")
    if index.get("objective"):  # FLUX.1's folder has none
        check_same_objective(source, make_objective(index["objective"]), objective)
    initial = load_component(folder / "transformer", *index["transformer"])
    plain = lambda value: list(value) if isinstance(value, tuple) else value  # noqa: E731  # as in JSON
    for key, value in network.config.items():
        if not key.startswith("_") and key != "condition_names" and plain(initial.config.get(key)) != plain(value):
            raise InputError(f"{source} has {key} = {initial.config.get(key)}, but the recipe has {value}")
    weights = initial.state_dict()
    embeddings, names = weights.pop("condition_embed.weight"), list(initial.config.condition_names)
    network.load_state_dict(weights, strict=False)
    with torch.no_grad():
        for condition_id, name in enumerate(network.config.condition_names):
            if name in names:
                network.condition_embed.weight[condition_id] = embeddings[names.index(name)]


def freeze_others(network: nn.Module, prefixes: tuple[str, ...]) -> None:
    """Freeze all parameters whose names start with none of the prefixes; without prefixes, freeze none. Raises
    `InputError` if no parameter's name starts with a prefix.
    """
    for prefix in prefixes:
        if not any(name.startswith(prefix) for name, _ in network.named_parameters()):
            names = sorted({name.split(".")[0] for name, _ in network.named_parameters()})
            raise InputError(f"trainable has {prefix!r}, but the network's parameters start with {', '.join(names)}")
    for name, parameter in network.named_parameters():
        if prefixes and not name.startswith(prefixes):
            parameter.requires_grad_(False)
