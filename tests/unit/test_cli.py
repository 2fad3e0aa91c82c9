"""The command line as its user meets it: results, notes, and one sentence with exit code 2 for bad input."""

from __future__ import annotations

import errno
import io
import json
import os
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from builders import run, tiny_pipeline
from likeness.cli import COMMANDS, execute
from likeness.cli.portraits import parse_lora
from likeness.data.synthetic import draw_face
from likeness.pipelines.image_recipe import read_recipe, request_of


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A tiny checkpoint, and files as users have them."""
    root = tmp_path_factory.mktemp("cli")
    tiny_pipeline().save_pretrained(root / "model")
    tiny_pipeline(("mask", "sketch")).save_pretrained(root / "released")
    face = draw_face(0, 0, 64)
    Image.fromarray(face.mask).save(root / "mask.png")
    Image.fromarray(face.sketch).save(root / "sketch.png")
    (root / "points.json").write_text(json.dumps({"points": (face.keypoints * 64).tolist(), "size": [64, 64]}))
    Image.fromarray(face.image).save(root / "photo.png")
    Image.fromarray(np.zeros((64, 64), np.uint8)).save(root / "empty.png")
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)).save(root / "noise.png")
    Image.fromarray(np.pad(face.mask, ((0, 0), (16, 16)))).save(root / "wide.png")
    (root / "text.png").write_text("no image")
    broken = root / "broken"
    tiny_pipeline().save_pretrained(broken)
    weights = broken / "transformer" / "diffusion_pytorch_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:500])
    return root


def test_help_needs_no_torch():
    """Help is fast because it imports no heavy module."""
    code = "import sys; from likeness.cli import main\ntry: main(['--help'])\nexcept SystemExit: pass\n"
    code += "main(['--version'])\n"
    code += "print([m for m in ('torch', 'diffusers', 'transformers', 'PIL', 'numpy') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip().endswith(f"likeness {version('likeness')}\n[]")
    assert [command for command in COMMANDS if command not in done.stdout] == []


@pytest.mark.parametrize("command", COMMANDS)
def test_help_of_every_command(command, capsys):
    assert run(command, "--help") == 0
    assert f"likeness {command}" in capsys.readouterr().out


def test_words_have_names(capsys):
    assert run("prepare", "ingest", "--help") == 0
    assert "SOURCE OUT\n" in capsys.readouterr().out


def test_stopped(tmp_path, monkeypatch, capsys):
    """Ctrl-C mentions resuming only for commands that resume."""

    class Interrupted(io.StringIO):
        def write(self, text):
            raise KeyboardInterrupt

    monkeypatch.setattr(sys, "stdout", Interrupted())
    assert run("models") == 130
    assert capsys.readouterr().err == "likeness: stopped\n"
    assert run("prepare", "synthetic", tmp_path, "--count", 1, "--size", 32) == 130
    assert capsys.readouterr().err.endswith("likeness: stopped; run the same command again to resume\n")


def test_files_without_permission(capsys):
    def locked() -> None:
        raise PermissionError(errno.EACCES, "Permission denied", "secret/a.png")

    with pytest.raises(SystemExit, match="2"):
        execute(locked)
    assert capsys.readouterr().err == "likeness: secret/a.png cannot be opened: Permission denied\n"


def test_names_of_loras(tmp_path, monkeypatch):
    """A number after "=" is the strength, unless it belongs to the name of a file."""
    monkeypatch.chdir(tmp_path)
    Path("lr=1e-4").mkdir()
    assert parse_lora("lr=1e-4") == ("lr=1e-4", 1.0)
    assert parse_lora("lr=1e-4=0.5") == ("lr=1e-4", 0.5)
    assert parse_lora("a.safetensors=0.6") == ("a.safetensors", 0.6)


@pytest.mark.parametrize(
    ("redirection", "code", "message"),
    [
        ("> /dev/full", 1, "likeness: cannot write: No space left on device"),
        (">&-", 0, ""),
        ("<&- >&- 2>&-", 0, ""),
        ("| true", 1, ""),
    ],
)
def test_unusual_streams(redirection, code, message):
    """A full or closed stdout, all streams closed, and a closed pipe give no traceback."""
    command = f"set -o pipefail; {sys.executable} -m likeness.cli models {redirection}"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True)
    assert (done.returncode, done.stderr.strip()) in ((code, message), (0, ""))
    assert done.returncode == code or redirection == "| true"  # a pipe may be read before it is closed


@pytest.mark.parametrize(
    ("option", "value", "message"),
    [
        ("--cors", "https://x.org/", "--cors is 'https://x.org/'; it must be"),
        ("--mask-model", "mask-mimi", "Unknown model 'mask-mimi'"),
    ],
)
def test_options_of_serve(tmp_path, capsys, option, value, message):
    assert run("serve", "--port", 0, "--data", tmp_path / "data", option, value) == 2
    assert message in capsys.readouterr().err


def test_names_cannot_control_the_terminal(tmp_path, capsys):
    assert run("inspect", tmp_path / "\x1b[31mred.png") == 2
    reported = capsys.readouterr().err
    assert "\\x1b[31mred.png does not exist" in reported
    assert "\x1b" not in reported


def test_metadata_cannot_control_the_terminal(tmp_path, capsys):
    row = json.dumps({"file_name": "images/\x1b]0;owned\x07x.png"})
    (tmp_path / "metadata.jsonl").write_text(row)
    assert run("prepare", "check", tmp_path) == 1
    reported = capsys.readouterr().out
    assert "\\x1b]0;owned" in reported
    assert "\x1b" not in reported


def test_output_in_ascii(tmp_path):
    """Characters that stdout lacks are written as escapes."""
    Image.fromarray(draw_face(0, 0, 64).mask).save(tmp_path / "\u2603.png")
    command = [sys.executable, "-m", "likeness.cli", "inspect", str(tmp_path / "\u2603.png"), "--fix"]
    environment = {**os.environ, "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0", "PYTHONIOENCODING": "ascii"}
    done = subprocess.run([*command, str(tmp_path / "\u2604.png")], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    assert "\\u2604.png: written" in done.stdout


def test_generate_all_conditions_and_replay(folder, tmp_path, capsys):
    out = tmp_path / "face.png"
    given = ["--mask", folder / "mask.png", "--sketch", folder / "sketch.png", "--keypoints", folder / "points.json"]
    given += ["--mask-scale", 0.9, "--sketch-scale", 0.5, "--keypoints-scale", 0.7]
    given += ["--control-guidance-start", 0.1, "--control-guidance-end", 0.8]
    assert run("generate", "a woman", *given, "--model", folder / "model", "--seed", 5, "--out", out) == 0
    conditions = request_of(read_recipe(out)[0]).conditions
    assert {name: one.scale for name, one in conditions.items()} == {"mask": 0.9, "sketch": 0.5, "keypoints": 0.7}
    assert {(one.start, one.end) for one in conditions.values()} == {(0.1, 0.8)}
    reported = capsys.readouterr()
    assert reported.out.strip() == f"{out}  seed 5"
    assert "mask: " in reported.err
    assert Image.open(out).size == (32, 32)
    assert run("replay", out, "--model", folder / "model", "--out", tmp_path / "again.png") == 0
    assert "bit-identical" in capsys.readouterr().out
    assert np.array_equal(np.asarray(Image.open(out)), np.asarray(Image.open(tmp_path / "again.png")))


def test_replay_says_what_changed(folder, tmp_path, capsys):
    out = tmp_path / "face.png"
    assert run("generate", "--model", folder / "model", "--seed", 5, "--out", out) == 0
    with Image.open(out) as image:
        from PIL.PngImagePlugin import PngInfo

        info = PngInfo()
        for key, value in image.info.items():
            if isinstance(value, str):
                info.add_itxt(key, value)
        pixels = np.array(image)
        pixels[0, 0, 0] ^= 255
        Image.fromarray(pixels).save(out, pnginfo=info)
    assert run("replay", out, "--model", folder / "model") == 2
    assert "its pixels were modified" in capsys.readouterr().err
    assert run("replay", out, "--model", folder / "released") == 2
    assert "fingerprint" in capsys.readouterr().err


def test_options_without_effect_and_the_model_of_a_run(folder, tmp_path, capsys):
    """A run folder stands for its model."""
    command = ["generate", "a man", "--model", folder, "--guidance-scale", 1, "--out", tmp_path / "face.png"]
    idle = ["--mask-scale", 0.5, "--control-guidance-end", 0.5, "--negative-prompt", "a hat", "--mask-model", "other"]
    idle.append("--no-lora-strict")
    assert run(*command, *idle) == 0
    assert capsys.readouterr().err.splitlines() == [
        "--mask-scale has no effect without --mask",
        "--control-guidance-end has no effect without a condition",
        "--mask-model has no effect without --via-mask",
        "--lora-strict has no effect without --lora",
        "the negative prompt has no effect with guidance_scale 1: choose a larger one",
    ]
    assert run(*command, "--mask-scale", 0.5, "--mask", folder / "mask.png") == 0
    assert "no effect" not in capsys.readouterr().err


def test_count_seeds_and_batch(folder, tmp_path, capsys):
    """Image k of a series equals the image of its own seed."""
    out = tmp_path / "series.webp"
    assert run("generate", "a man", "--model", folder / "model", "--seed", 8, "--count", 3, "--out", out) == 0
    assert [line.split()[-1] for line in capsys.readouterr().out.splitlines()] == ["8", "9", "10"]
    assert run("generate", "a man", "--model", folder / "model", "--seed", 9, "--out", tmp_path / "one.webp") == 0
    series, one = Image.open(tmp_path / "series-2.webp"), Image.open(tmp_path / "one.webp")
    assert np.array_equal(np.asarray(series), np.asarray(one))


def test_unconditional_face_default_name_and_stripping(folder, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for _ in range(2):
        assert run("generate", "--model", folder / "model", "--no-metadata", "--size", "48x32", "--force-size") == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["portrait-001.png", "portrait-002.png"]
    with Image.open("portrait-001.png") as image:
        assert image.size == (48, 32)
        assert image.info == {}
    pixels = [np.asarray(Image.open(path)) for path in sorted(tmp_path.iterdir())]
    assert not np.array_equal(*pixels)  # seeds are random by default


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--mask", "{}/absent.png"], "absent.png"),
        (["--mask", "{}/text.png"], "text.png"),
        (["--mask", "{}/photo.png"], "photo"),
        (["--mask", "{}/noise.png"], "noise.png"),
        (["--mask", "{}/empty.png"], "no face"),
        (["--mask", "{}/wide.png"], "96x64"),
        (["--sketch", "{}/photo.png"], "photo"),
        (["--keypoints", "{}/sketch.png"], "sketch.png"),
        (["--size", "40", "--force-size"], "multiples of 16"),
        (["--size", "64"], "Size 64x64 is not supported: the model was trained at 32x32"),
        (["--size", "big"], "--size"),
        (["--size", "999999936", "--force-size"], "both sides must be from 8 to 4096 pixels"),
        (["--negative-prompt", "ü" * 40_000, "--out", "{}/long.jpg", "--count", "2"], "too long for a JPEG"),
        (["--steps", "-4"], "steps is -4"),
        (["--count", "0"], "--count is 0; it must be from 1 to 1000"),
        (["--count", "1001"], "--count is 1001; it must be from 1 to 1000"),
        (["--seed", "-1"], "seed is -1"),
        (["--guidance-scale", "nan"], "guidance scale"),
        (["--mask", "{}/mask.png", "--mask-scale", "-1"], "scale of mask"),
        (["--out", "{}/mask.png/face.png"], "not a writable folder"),
        (["--out", "{}/face.tiff"], "must end in"),
        (["--device", "nowhere"], "Device 'nowhere' is not available. Available: "),
        (["--lora", "a=0.5", "b=0.7"], "a does not exist: pass a LoRA file"),
        (["--model", "{}/absent"], "Unknown model"),
        (["--model", "mmface-mimi"], "Unknown model 'mmface-mimi'. Did you mean mmface-mini?"),
        (["--model", "{}/model/transformer"], "no model_index.json"),
        (["--model", "{}/broken"], "broken"),
        (["--model", "{}/released", "--keypoints", "{}/points.json"], "not trained with keypoints"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_bad_input(folder, tmp_path, capsys, arguments, message):
    given = [argument.format(folder) for argument in arguments]
    if "--model" not in given:
        given += ["--model", str(folder / "model")]
    if "--out" not in given:
        given += ["--out", str(tmp_path / "face.png")]
    assert run("generate", "a woman", *given) == 2
    reported = capsys.readouterr().err.strip().splitlines()
    assert reported[-1].startswith("likeness: ")
    assert message in reported[-1]
    assert list(tmp_path.iterdir()) == []  # nothing half-written
    assert not list(folder.glob("long*"))


def test_inspect_and_fix(folder, tmp_path, capsys):
    assert run("inspect", folder / "mask.png", "--fix", tmp_path / "fixed.png") == 0
    reported = capsys.readouterr().out
    assert "skin" in reported
    assert "%" in reported
    assert Image.open(tmp_path / "fixed.png").mode == "P"
    assert run("inspect", folder / "sketch.png") == 0
    assert "sketch" in capsys.readouterr().out
    assert run("inspect", folder / "noise.png") == 2
    assert run("inspect", folder / "absent.png") == 2


def test_train_and_prepare_from_the_command_line(folder, tmp_path, capsys):
    """Synthetic faces, shards, training, and an image of the published model, by commands only."""
    from builders import save_components

    save_components(tmp_path / "components")
    assert run("prepare", "synthetic", tmp_path / "faces", "--count", 6, "--size", 32) == 0
    encode = ("prepare", "encode", tmp_path / "faces", tmp_path / "shards")
    assert run(*encode, "--components", tmp_path / "components", "--size", 32) == 0
    recipe = tmp_path / "recipe.toml"
    recipe.write_text(
        f'kind = "transformer"\n[network]\nhidden_size = 32\ndepth = 1\nheads = 2\n'
        f'[data]\nshards = ["{tmp_path}/shards"]\ncomponents = "{tmp_path}/components"\n'
        "condition_probabilities = { mask = 1.0, none = 1.0 }\n"
        "[optimizer]\nimages = 8\nbatch = 4\nlearning_rate = 1e-3\n[defaults]\nsize = 32\nsteps = 2\n"
    )
    assert run("train", recipe, "--out", tmp_path / "run") == 0
    out = tmp_path / "face.png"
    assert run("generate", "--model", tmp_path / "run" / "model", "--mask", folder / "mask.png", "--out", out) == 0
    assert out.is_file()
    capsys.readouterr()
    assert run("train", recipe, "network.width=3", "--out", tmp_path / "other") == 2
    assert "unknown key 'width'" in capsys.readouterr().err
    assert run("train", tmp_path / "absent.toml") == 2
    assert run("prepare", "encode", tmp_path, tmp_path / "shards2", "--components", tmp_path / "components") == 2
    assert run("prepare", "synthetic", tmp_path / "none", "--count", 0) == 2


def test_convert_release(tmp_path, capsys):
    assert run("convert", "mmface-release", tmp_path / "absent", tmp_path / "out", "--release", "rfm-256") == 2
    assert "does not exist" in capsys.readouterr().err
