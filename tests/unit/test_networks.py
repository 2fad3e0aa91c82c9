"""Networks from recipes: the right class and rows, and recipes that ask for the impossible."""

from __future__ import annotations

import pytest
import torch

from likeness.config import build
from likeness.models.mditface import MDiTFaceTransformer
from likeness.models.mmface import MMFaceTransformer
from likeness.pipelines import mditface, mmface
from likeness.train.config import PIPELINE_DEFAULTS, TrainRecipe, condition_names
from likeness.train.networks import build_network, rope_axes
from likeness.types import InputError

OPTIMIZER = {"images": 4, "batch": 2, "learning_rate": 1e-3}
MMFACE = {"hidden_size": 32, "depth": 1, "heads": 2}
MDITFACE = {"name": "mditface", "hidden_size": 32, "depth": 1, "single_depth": 1, "heads": 2}


def made(network: dict, shares: dict[str, float], pooled: int = 24):
    data = {"shards": ["x"], "condition_probabilities": shares}
    recipe = build(TrainRecipe, {"network": network, "data": data, "optimizer": OPTIMIZER})
    with torch.device("meta"):
        return build_network(recipe, channels=4, text_dim=24, pooled_dim=pooled, text_tokens=12), recipe


def test_mmface():
    model, recipe = made(MMFACE, {"mask": 0.5, "none": 0.1, "sketch": 0.4})
    assert isinstance(model, MMFaceTransformer)
    assert condition_names(recipe.data) == ("mask", "sketch")
    assert tuple(model.config.condition_names) == ("mask", "sketch", "none")


def test_mditface_takes_several():
    model, recipe = made(MDITFACE, {"mask": 0.5, "mask+sketch": 0.2, "none": 0.1}, pooled=16)
    assert isinstance(model, MDiTFaceTransformer)
    assert condition_names(recipe.data) == ("mask", "sketch")
    assert tuple(model.config.condition_names) == ("mask", "sketch")
    assert model.config.in_channels == 16
    assert model.config.joint_attention_dim == 24
    assert model.config.pooled_projection_dim == 16
    assert not model.config.guidance_embeds


def test_rope_axes_are_even_and_like_those_of_flux():
    assert rope_axes(128) == (16, 56, 56)
    for head in range(8, 129, 4):
        axes = rope_axes(head)
        assert sum(axes) == head
        assert min(axes) > 0
        assert all(axis % 2 == 0 for axis in axes)


def test_defaults_are_those_of_the_pipelines():
    assert set(PIPELINE_DEFAULTS) == set(mmface.DEFAULTS) == set(mditface.DEFAULTS)


@pytest.mark.parametrize(
    ("network", "shares", "pooled", "words"),
    [
        (MMFACE, {"mask+sketch": 1.0}, 24, "one condition at a time"),
        (MMFACE, {"mask": 1.0}, 16, "needs one text encoder"),
        (MMFACE | {"heads": 3}, {"mask": 1.0}, 24, "hidden_size is 32: with 3 heads it must be a multiple of 12"),
        (MDITFACE | {"hidden_size": 36}, {"mask": 1.0}, 24, "must be a multiple of"),
        (MDITFACE | {"name": "unet"}, {"mask": 1.0}, 24, "'unet'; choose one of 'mmface', 'mditface'"),
        (MDITFACE | {"patch_size": 2}, {"mask": 1.0}, 24, "unknown key 'patch_size'"),
        (MMFACE | {"single_depth": 2}, {"mask": 1.0}, 24, "unknown key 'single_depth'"),
    ],
)
def test_impossible_recipes(network, shares, pooled, words):
    with pytest.raises(InputError, match=words):
        made(network, shares, pooled)
