"""Threads, quiet imports and the cold start, in processes as users start them."""

from __future__ import annotations

import gc
import logging
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from diffusers.utils import logging as diffusers_logging
from PIL import Image

import likeness
from builders import run, tiny_pipeline
from likeness.pipelines.adapters import MMFaceLora, add_adapter, save_adapter
from likeness.pipelines.image_recipe import read_recipe, write_image
from likeness.pipelines.load import load
from likeness.runtime import SMALL_WORK, THREAD_VARIABLES, choose_threads, mute_noise

VARIABLES = (*THREAD_VARIABLES, "OMP_WAIT_POLICY")


def python(code: str, **variables: str) -> subprocess.CompletedProcess[str]:
    """Run code in a process in which the user has set these variables only."""
    clean = {name: value for name, value in os.environ.items() if name not in VARIABLES}
    command = [sys.executable, "-c", code]
    return subprocess.run(command, env=clean | variables, capture_output=True, text=True, check=True)


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("runtime") / "model"
    tiny_pipeline().save_pretrained(folder)
    return folder


@pytest.fixture
def no_variables(monkeypatch):
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)


def test_python_users_see_nothing():
    """Neither loading nor a change of dtype prints anything, with torchao installed and without."""
    code = "import torch, likeness\nfor name in ('mmface-mini', 'mditface-mini'):\n"
    done = python(code + "    likeness.load(name).to(torch.bfloat16)", OMP_NUM_THREADS="1")
    assert done.stdout + done.stderr == ""


@pytest.mark.parametrize(
    ("name", "noise", "warning"),
    [
        ("torchao", "Failed to load /x/torchao/_C_mxfp8.abi3.so: no", "Failed to load the weights"),
        (
            "torch.utils._pytree",
            "<enum 'KernelPreference'> is an Enum subclass and is now natively supported",
            "<enum 'Mine'> is an Enum subclass and is now natively supported",
        ),
        (
            "diffusers.quantizers.torchao.torchao_quantizer",
            "Unable to import `torchao` Tensor objects. This may affect loading",
            "torchao is too old",
        ),
        (
            "diffusers.models.modeling_utils",
            "There are modules in AutoencoderDC that should be kept in float32: []. Casting",
            "There are modules in AutoencoderDC that should be kept in float32: ['norm']. Casting",
        ),
    ],
)
def test_other_warnings_are_shown(name, noise, warning):
    mute_noise()
    mute_noise()
    seen: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: seen.append(record.getMessage())
    logger = logging.getLogger(name)
    logger.addHandler(handler)
    level = logger.level
    logger.setLevel(logging.WARNING)  # the command line, run by an earlier test, raises that of diffusers
    try:
        logger.warning(noise)
        logger.warning(warning)
    finally:
        logger.setLevel(level)
        logger.removeHandler(handler)
    assert seen == [warning]


def test_load_changes_no_setting():
    torch.set_num_threads(2)
    before = gc.get_threshold(), gc.isenabled(), diffusers_logging.is_progress_bar_enabled()
    likeness.load()
    assert torch.get_num_threads() == 2
    assert (gc.get_threshold(), gc.isenabled(), diffusers_logging.is_progress_bar_enabled()) == before


@pytest.mark.parametrize(("given", "expected"), [({}, "PASSIVE"), ({"OMP_WAIT_POLICY": "ACTIVE"}, "ACTIVE")])
def test_wait_policy_is_set_before_torch(given, expected):
    code = "import sys, os\nfrom likeness.cli import main\nsys.argv[1:] = ['--version']\nmain()\n"
    done = python(code + "print(os.environ['OMP_WAIT_POLICY'], 'torch' in sys.modules)", **given)
    assert done.stdout.splitlines()[-1] == f"{expected} False"


def test_threads_follow_the_work(no_variables, monkeypatch):
    torch.set_num_threads(2)
    choose_threads(SMALL_WORK)
    assert torch.get_num_threads() == 2
    for name in THREAD_VARIABLES:
        monkeypatch.setenv(name, "2")
        choose_threads(1)
        assert torch.get_num_threads() == 2
        monkeypatch.delenv(name)
    choose_threads(1)
    assert torch.get_num_threads() == 1


def test_bundled_models_use_one_thread():
    """At the trained size they are small work, at four times that side they are not."""
    from likeness.pipelines.generate import work_of

    for name in ("mmface-mini", "mditface-mini"):
        pipeline = likeness.load(name)
        assert work_of(pipeline, 128, 128) < SMALL_WORK < work_of(pipeline, 512, 512)


def test_generate_and_replay_threads(model, tmp_path, no_variables, capsys):
    """The image records the chosen threads; a replay uses the recorded ones."""
    out = tmp_path / "one.png"
    torch.set_num_threads(2)
    assert run("generate", "--model", model, "--seed", 5, "--out", out) == 0
    assert read_recipe(out)[0]["environment"]["threads"] == 1
    torch.set_num_threads(2)
    assert run("replay", out, "--model", model) == 0
    assert torch.get_num_threads() == 1
    assert "threads" not in capsys.readouterr().err


def test_threads_of_the_user_are_kept(model, tmp_path, no_variables, monkeypatch, capsys):
    monkeypatch.setenv("OMP_NUM_THREADS", "2")
    out = tmp_path / "two.png"
    torch.set_num_threads(2)
    assert run("generate", "--model", model, "--seed", 5, "--out", out) == 0
    assert read_recipe(out)[0]["environment"]["threads"] == 2
    torch.set_num_threads(1)
    run("replay", out, "--model", model)
    assert "threads: 2 then, 1 now" in capsys.readouterr().err
    monkeypatch.delenv("OMP_NUM_THREADS")
    recipe, pixels = read_recipe(out)
    recipe["environment"]["threads"] = True
    write_image(Image.fromarray(pixels), out, recipe)
    assert run("replay", out, "--model", model) == 0


def test_generate_imports_what_it_needs(tmp_path):
    """A mask and a sketch with bundled models: scipy's filters read the sketch, its other parts stay out."""
    root = Path(__file__).parents[2] / "examples"
    given = ["generate", "a woman", "--steps", "1", "--out", str(tmp_path / "face.png"), "--model"]
    given[2:2] = ["--mask", str(root / "masks/smile.png"), "--sketch", str(root / "sketches/smile.png")]
    absent = {"peft", "torchao", "scipy.optimize", "scipy.stats", "mediapipe", "tensorboard", "torchmetrics", "pyarrow"}
    code = "import sys\nfrom likeness.cli import main\nfor model in ('mmface-mini', 'mditface-mini'):\n"
    code += f"    sys.argv[1:] = [*{given}, model]\n    main()\nprint({absent} & set(sys.modules))"
    done = python(code, OMP_NUM_THREADS="1")
    assert done.stdout.splitlines()[-1] == "set()"


def test_a_mask_model_that_is_an_adapter_imports_peft(model, tmp_path):
    """Although the model of the image is bundled."""
    pipeline, adapter = load(model), MMFaceLora(base=str(model), rank=2)
    add_adapter(pipeline.transformer, adapter)
    save_adapter(pipeline.transformer, tmp_path / "adapter", adapter)
    given = ["generate", "--via-mask", "--mask-model", str(tmp_path / "adapter"), "--out", str(tmp_path / "a.png")]
    code = f"import sys\nfrom likeness.cli import main\nsys.argv[1:] = {given}\ntry:\n    main()\n"
    done = python(code + "except SystemExit as end:\n    print(end.code)", OMP_NUM_THREADS="1")
    assert done.stdout.splitlines()[-1] == "2"
    assert "this model does not generate masks" in done.stderr


def test_hidden_packages_come_back():
    """They can be imported afterwards, and nothing is hidden once diffusers has looked for them."""
    code = "import sys\nfrom likeness.runtime import optional_packages_hidden as hidden\nwith hidden():\n"
    code += "    assert sys.modules['scipy'] is None\nimport scipy, diffusers\nwith hidden():\n    import peft\n"
    python(code, OMP_NUM_THREADS="1")
