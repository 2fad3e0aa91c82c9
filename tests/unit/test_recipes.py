"""Every recipe is valid and has its stated number of parameters."""

from __future__ import annotations

import itertools
import re
from pathlib import Path

import pytest
import torch

from builders import run
from likeness.cli.training import trainer_of
from likeness.config import load_toml
from likeness.models.mditface import MDiTFaceTransformer
from likeness.objectives import make_objective
from likeness.pipelines.load import load
from likeness.train.config import (
    AdapterNetwork,
    MDiTFaceAdapter,
    TrainRecipe,
    check,
    condition_names,
    condition_probability,
    find_recipe,
)
from likeness.train.losses import blocks_of
from likeness.train.networks import adapter_of, add_new_adapter, build_network, freeze_others
from likeness.train.optim import trainable_parameters
from likeness.types import InputError

RECIPES = sorted((Path(__file__).parents[2] / "recipes").glob("*.toml"))

WIDTHS = {f"mmface_{size}_{objective}": (16, 1024) for size in (256, 512) for objective in ("rfm", "ddpm")}
"""(latent channels, text width) of a recipe's components; (16, 192) otherwise."""

PARAMETERS = {
    "debug": 364_224,
    "mmface_mini": 10_923_328,
    "mditface_mini": 11_859_392,
    "mask_mini": 4_898_048,
    "mmface_256_rfm": 1_345_299_776,
    "mmface_256_ddpm": 1_345_299_776,
    "mmface_512_rfm": 1_345_299_776,
    "mmface_512_ddpm": 1_345_299_776,
    "finetune_mini": 10_923_328,
    "add_keypoints": 4 * 192,
    "inpaint_mini": 10_923_328 + 192,
}
"""The published 1,345,298,624 and the embedding of `none`."""

TRAINED = {"mditface_lora_512": 28_975_616 + 3072, "mmface_lora_mini": 147_456}
"""Of an adapter on FLUX.1-dev: the LoRA of the costs in the paper's Table 4, and one condition embedding."""


def test_fine_tuning_needs_what_annotate_makes():
    """Masks and sketches, for which everything is bundled; keypoints need a file with a model."""
    recipe = load_toml(RECIPES[0].parent / "finetune_mini.toml", TrainRecipe)
    assert {name for name in condition_names(recipe.data) if condition_probability(recipe.data, name)} == {
        "mask",
        "sketch",
    }
    assert "keypoints" in condition_names(recipe.data)


def comment_states(path: Path, parameters: int) -> bool:
    """Return whether the comment of a recipe states these parameters, the memory and the time."""
    comment = " ".join(itertools.takewhile(lambda line: line.startswith("#"), path.read_text().splitlines()))
    return f"{parameters:,}" in comment and " GB" in comment and bool(re.search(r" h\b|hours|minutes", comment))


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_recipe(path):
    kind, _ = trainer_of(path)
    recipe = load_toml(path, kind)
    if recipe.kind == "student":
        check(recipe)
        network = load(recipe.teacher).transformer
        assert max(recipe.discriminator.blocks) < len(blocks_of(network)[0])
        assert set(condition_names(recipe.data)) <= set(network.config.condition_names)
        assert comment_states(path, sum(p.numel() for p in network.parameters()))
        assert recipe.optimizer.images % recipe.optimizer.batch == 0
        return
    if recipe.kind != "transformer":
        return
    check(recipe)
    channels, text = WIDTHS.get(path.stem, (16, 192))
    if isinstance(recipe.network, AdapterNetwork):
        flux = isinstance(recipe.network, MDiTFaceAdapter)
        base = None if flux else load(recipe.network.base).transformer
        with torch.device("meta"):
            model = add_new_adapter(base or MDiTFaceTransformer(condition_names=()), adapter_of(recipe))
        assert sum(p.numel() for p in trainable_parameters(model).values()) == TRAINED[path.stem]
        assert comment_states(path, TRAINED[path.stem])
        return
    with torch.device("meta"):
        model = build_network(recipe, channels=channels, text_dim=text, pooled_dim=text, text_tokens=77)
    freeze_others(model, recipe.trainable)
    assert sum(p.numel() for p in trainable_parameters(model).values()) == PARAMETERS[path.stem]
    assert comment_states(path, PARAMETERS[path.stem])
    make_objective(recipe.objective)
    assert recipe.optimizer.images % recipe.optimizer.batch == 0


def test_recipes_have_names(tmp_path, monkeypatch, capsys):
    """Those of the project, and first those in recipes/; the plan of a name is that of its file."""
    monkeypatch.chdir(tmp_path)
    assert find_recipe(Path("debug")).read_bytes() == (RECIPES[0].parent / "debug.toml").read_bytes()
    (tmp_path / "recipes").mkdir()
    (tmp_path / "recipes" / "debug.toml").write_text('kind = "none"')
    assert run("train", "debug") == 2
    assert "recipes/debug.toml has kind = 'none'" in capsys.readouterr().err
    assert run("train", "mmface-mini") == 2
    assert "Unknown recipe 'mmface-mini'. Did you mean mmface_mini? Available: " in capsys.readouterr().err
    assert run("train", "absent.toml") == 2
    assert "cannot read absent.toml" in capsys.readouterr().err


def test_files_from_windows(tmp_path):
    """A byte order mark is accepted; backslashes in double quotes are explained."""
    file = tmp_path / "a.toml"
    file.write_bytes(b"\xef\xbb\xbf" + (Path(__file__).parents[2] / "recipes" / "debug.toml").read_bytes())
    assert load_toml(file, TrainRecipe).optimizer.images > 0
    for path in ("C:\\Users\\me", "C:\\data\\me"):
        file.write_text(f'[data]\nshards = ["{path}"]\n')
        with pytest.raises(InputError, match="use forward slashes or single quotes"):
            load_toml(file, TrainRecipe)
    for content in (b'kind = "\xff"', b"kind = " + b"[" * 100_000):
        file.write_bytes(content)
        with pytest.raises(InputError, match="is not valid TOML"):
            load_toml(file, TrainRecipe)
