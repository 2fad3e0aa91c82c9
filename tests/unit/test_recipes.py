"""Every recipe parses, and builds on the meta device with the parameters it is meant to have."""

from __future__ import annotations

import itertools
import re
from pathlib import Path

import pytest
import torch

from likeness.cli.training import trainer_of
from likeness.config import load_toml
from likeness.models.mditface import MDiTFaceTransformer
from likeness.objectives import make_objective
from likeness.pipelines.load import load
from likeness.train.config import MDiTFaceAdapter, TrainRecipe, check_student, parts_of
from likeness.train.networks import (
    adapter_of,
    begin_adapter,
    build_network,
    choose_trained,
    condition_names,
    share_of,
)
from likeness.train.optim import trained_parameters
from likeness.train.student import blocks_of

RECIPES = sorted((Path(__file__).parents[2] / "recipes").glob("*.toml"))

WIDTHS = {f"mmface_{size}_{objective}": (16, 1024) for size in (256, 512) for objective in ("rfm", "ddpm")}
"""(latent channels, text width) of the components that a recipe is meant for; (16, 192) otherwise."""

PARAMETERS = {
    "debug": 364_224,
    "mmface_mini": 10_923_328,
    "mditface_mini": 11_859_392,
    "mmface_256_rfm": 1_345_299_776,
    "mmface_256_ddpm": 1_345_299_776,
    "mmface_512_rfm": 1_345_299_776,
    "mmface_512_ddpm": 1_345_299_776,
    "finetune_mini": 10_923_328,
    "add_keypoints": 4 * 192,
}
"""The published 1,345,298,624 and one more condition row: `none`."""

TRAINED = {"mditface_lora_512": 28_975_616 + 3072}
"""Of an adapter on FLUX.1-dev: the LoRA that gives the costs of the paper's Table 4, and one condition row."""


def test_fine_tuning_needs_what_annotate_makes():
    """Masks and sketches come from the bundled parser; keypoints would need a file of one's own."""
    recipe = load_toml(RECIPES[0].parent / "finetune_mini.toml", TrainRecipe)
    assert {name for name in condition_names(recipe) if share_of(recipe, name)} == {"mask", "sketch"}
    assert "keypoints" in condition_names(recipe)


def states(path: Path, parameters: int) -> bool:
    """Whether the comment that a recipe begins with says these parameters, the memory and the time to expect."""
    comment = " ".join(itertools.takewhile(lambda line: line.startswith("#"), path.read_text().splitlines()))
    return f"{parameters:,}" in comment and " GB" in comment and bool(re.search(r" h\b|hours|minutes", comment))


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_recipe(path):
    kind, _ = trainer_of(path)
    recipe = load_toml(path, kind)
    if recipe.kind == "student":
        check_student(recipe)
        network = load(recipe.teacher).transformer
        assert max(recipe.discriminator.blocks) < len(blocks_of(network)[0])
        assert {part for share in recipe.data.condition_shares for part in parts_of(share)} <= set(
            network.config.condition_names
        )
        assert states(path, sum(p.numel() for p in network.parameters()))
        assert recipe.optimizer.images % recipe.optimizer.batch == 0
        return
    if recipe.kind != "transformer":
        return
    channels, text = WIDTHS.get(path.stem, (16, 192))
    if isinstance(recipe.network, MDiTFaceAdapter):
        with torch.device("meta"):
            model = begin_adapter(MDiTFaceTransformer(condition_names=()), adapter_of(recipe))
        assert sum(p.numel() for p in trained_parameters(model).values()) == TRAINED[path.stem]
        assert states(path, TRAINED[path.stem])
        return
    with torch.device("meta"):
        model = build_network(recipe, channels=channels, text_dim=text, pooled_dim=text, text_tokens=77)
    choose_trained(model, recipe)
    assert sum(p.numel() for p in trained_parameters(model).values()) == PARAMETERS[path.stem]
    assert states(path, PARAMETERS[path.stem])
    make_objective(recipe.objective)
    assert recipe.optimizer.images % recipe.optimizer.batch == 0
