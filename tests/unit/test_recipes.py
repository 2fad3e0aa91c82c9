"""Every recipe parses, and builds on the meta device with the parameters it is meant to have."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from likeness.cli import trainer_of
from likeness.config import load_toml
from likeness.objectives import make_objective
from likeness.train.networks import build_network

RECIPES = sorted((Path(__file__).parents[2] / "recipes").glob("*.toml"))

WIDTHS = {"mmface_256_rfm": (16, 1024), "mmface_256_ddpm": (16, 1024)}
"""(latent channels, text width) of the components that a recipe is meant for; (16, 192) otherwise."""

PARAMETERS = {
    "debug": 364_224,
    "mmface_mini": 10_923_328,
    "mmface_256_rfm": 1_345_299_776,
    "mmface_256_ddpm": 1_345_299_776,
}
"""The published 1,345,298,624 and one more condition row: `none`."""


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_recipe(path):
    kind, _ = trainer_of(path)
    recipe = load_toml(path, kind)
    if recipe.kind != "transformer":
        return
    channels, text = WIDTHS.get(path.stem, (16, 192))
    with torch.device("meta"):
        model = build_network(recipe, channels=channels, text_dim=text, pooled_dim=text, text_tokens=77)
    assert sum(p.numel() for p in model.parameters()) == PARAMETERS[path.stem]
    make_objective(recipe.objective)
    assert recipe.optimizer.images % recipe.optimizer.batch == 0
