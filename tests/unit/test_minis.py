"""`launch/minis.sh`, from two data sets to a packed model, with short recipes."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest
from sample_datasets import celeba, celebamask

from builders import run

PROJECT = Path(__file__).parents[2]
SHORT = {
    "images": 8,
    "batch": 4,
    "warmup": 0,
    "log_every": 4,
    "checkpoint_every": 8,
    "widths": [8, 16, 16, 16],
    "depths": [1, 1, 1, 1],
    "encoder_channels": [16, 16, 16],
    "decoder_channels": [16, 16, 16],
    "vocabulary": 600,
    "hidden_size": 32,
    "depth": 1,
    "single_depth": 1,
    "heads": 2,
    "steps": 2,
    "blocks": [0],
    "frozen_images": 4,
}
"""Values that replace those of the recipes, if they have the key."""


def shortened(recipe: str) -> str:
    for key, value in SHORT.items():
        recipe = re.sub(rf"^{key} = .*$", f"{key} = {value}", recipe, flags=re.MULTILINE)
    recipe = re.sub(r"^compile = true\n", "", recipe, flags=re.MULTILINE)
    recipe = re.sub(r"^(kind = .*)$", r"\1\ncompile = false", recipe, flags=re.MULTILINE)
    return recipe.replace("attribute_weight = 1.0", "attribute_weight = 1.0\nretrieval_candidates = 2")


@pytest.mark.slow
def test_from_data_sets_to_an_image(tmp_path, programs):
    """The script fails in the middle and is resumed; the models generate images."""
    project, data, out = (tmp_path / name for name in ("project", "data", "out"))
    for folder in ("launch", "examples"):
        shutil.copytree(PROJECT / folder, project / folder)
    (project / "recipes").mkdir()
    for recipe in (PROJECT / "recipes").glob("*.toml"):
        (project / "recipes" / recipe.name).write_text(shortened(recipe.read_text()))
    celeba(data / "celeba", 80)
    celebamask(data / "celebamask-hq", 88)
    assert run("prepare", "synthetic", out / "data/synthetic", "--count", 4, "--size", 128) == 0

    command = [project / "launch" / "minis.sh", data, out]
    path = f"{programs}:{os.environ['PATH']}"
    given = {
        "env": os.environ | {"PATH": path, "OMP_NUM_THREADS": "1", "HELD_OUT": "8"},
        "stderr": subprocess.PIPE,
        "text": True,
    }
    recipe = project / "recipes" / "text_image_mini.toml"
    recipe.write_text(recipe.read_text().replace("kind =", "kin ="))  # fails in the middle
    stopped = subprocess.run(command, **given)
    assert stopped.returncode == 2
    assert "kin" in stopped.stderr.splitlines()[-1], stopped.stderr[-3000:]
    recipe.write_text(recipe.read_text().replace("kin =", "kind ="))
    weights = out / "runs/autoencoder_mini/model/diffusion_pytorch_model.safetensors"
    before = weights.read_bytes()
    done = subprocess.run(command, **given)
    assert done.returncode == 0, done.stderr[-3000:]
    assert weights.read_bytes() == before
    for name in ("mmface-mini", "mditface-mini", "mmface-mini-fast"):
        portrait = tmp_path / f"{name}.png"
        assert run("generate", "a woman", "--model", out / "data" / name, "--out", portrait) == 0
        assert portrait.is_file()
