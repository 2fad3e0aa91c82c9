"""Every recipe parses, and builds on the meta device with the parameters it is meant to have."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from likeness.cli.training import trainer_of
from likeness.config import load_toml
from likeness.models.mditface import MDiTFaceTransformer
from likeness.objectives import make_objective
from likeness.train.config import MDiTFaceAdapter
from likeness.train.networks import adapter_of, begin_adapter, build_network
from likeness.train.optim import trained_parameters

RECIPES = sorted((Path(__file__).parents[2] / "recipes").glob("*.toml"))

WIDTHS = {"mmface_256_rfm": (16, 1024), "mmface_256_ddpm": (16, 1024)}
"""(latent channels, text width) of the components that a recipe is meant for; (16, 192) otherwise."""

PARAMETERS = {
    "debug": 364_224,
    "mmface_mini": 10_923_328,
    "mditface_mini": 11_859_392,
    "mmface_256_rfm": 1_345_299_776,
    "mmface_256_ddpm": 1_345_299_776,
}
"""The published 1,345,298,624 and one more condition row: `none`."""

TRAINED = {"mditface_lora_512": 28_975_616 + 3072}
"""Of an adapter on FLUX.1-dev: the LoRA that gives the costs of the paper's Table 4, and one condition row."""


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_recipe(path):
    kind, _ = trainer_of(path)
    recipe = load_toml(path, kind)
    if recipe.kind != "transformer":
        return
    channels, text = WIDTHS.get(path.stem, (16, 192))
    if isinstance(recipe.network, MDiTFaceAdapter):
        with torch.device("meta"):
            model = begin_adapter(MDiTFaceTransformer(condition_names=()), adapter_of(recipe))
        assert sum(p.numel() for p in trained_parameters(model).values()) == TRAINED[path.stem]
        return
    with torch.device("meta"):
        model = build_network(recipe, channels=channels, text_dim=text, pooled_dim=text, text_tokens=77)
    assert sum(p.numel() for p in trained_parameters(model).values()) == PARAMETERS[path.stem]
    make_objective(recipe.objective)
    assert recipe.optimizer.images % recipe.optimizer.batch == 0
