"""Non-finite losses, invalid recipes, full disks, initial weights, post-hoc EMA, and reports."""

from __future__ import annotations

import dataclasses
import json
import shutil
import sys
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from hostile import full_disk
from PIL import Image

from builders import run, tiny_text_encoder, tiny_vae
from likeness.cli import main, parse
from likeness.encoders.components import load_components
from likeness.files import locked
from likeness.pipelines.generate import generate, resolve
from likeness.pipelines.load import load
from likeness.prepare.encode import encode_folder
from likeness.train import batches, loop, publish
from likeness.train.checkpoint import checkpoints, save_checkpoint
from likeness.train.ema import Ema, exponent, posthoc_ema, solve
from likeness.train.metrics import Reporter, read_metrics
from likeness.train.optim import make_optimizers
from likeness.train.publish import preview_requests
from likeness.train.report import write_report
from likeness.types import ConditionInput, InputError, PortraitRequest, TryAgain
from runs import SIZE, assert_identical, load_checkpoint, metrics, small, weights_of

RECIPES = Path(__file__).parents[2] / "recipes"


@pytest.fixture(scope="module")
def root(prepared_faces) -> Path:
    return prepared_faces


def test_non_finite_batch(root, tmp_path, monkeypatch):
    """Training stops and records the batch; the same command resumes from the last checkpoint without it."""

    def with_nan(samples, positions, *rest):
        batch = real(samples, positions, *rest)
        return batch._replace(clean=batch.clean * float("nan")) if 12 in positions else batch

    real = batches.make_batch
    monkeypatch.setattr(batches, "make_batch", with_nan)
    recipe, path = small(root), tmp_path / "run"
    with pytest.raises(TryAgain, match=r"the loss is nan .* images 12 to 15"):
        loop.train(recipe, path)
    (line,) = (path / "non_finite.jsonl").read_text().splitlines()
    assert json.loads(line)["positions"] == [12, 15]
    assert [path.name for path in checkpoints(path)] == ["000000000008"]
    loop.train(recipe, path)
    assert checkpoints(path)[-1].name == "000000000024"
    found = load_checkpoint(path)
    assert all(value.isfinite().all() for value in found.values())
    # as a run that skips the batch from the start
    (tmp_path / "other").mkdir()
    shutil.copy(path / "non_finite.jsonl", tmp_path / "other")
    loop.train(recipe, tmp_path / "other")
    assert_identical(load_checkpoint(tmp_path / "other"), found)


def test_exit_codes(root, tmp_path, monkeypatch, capsys):
    """75: the same command can be run again; 2: something must be fixed first."""
    real = batches.make_batch
    infinite = lambda *arguments: (batch := real(*arguments))._replace(clean=batch.clean * float("inf"))  # noqa: E731
    monkeypatch.setattr(batches, "make_batch", infinite)
    where = [f'data.shards=["{root}/shards"]', f"data.components={root}/components", "precision=fp32"]
    size = [
        "network.hidden_size=32",
        "optimizer.images=8",
        "optimizer.batch=4",
        "defaults.size=32",
        "diagnostics_every=0",
    ]
    command = ["train", RECIPES / "debug.toml", "--out", tmp_path / "run", *where, *size]
    assert run(*command) == 75
    assert "run the same command again" in capsys.readouterr().err
    assert run(*command, "optimizer.batch=0") == 2
    assert "the recipe's optimizer.batch is 0: it must be at least 1" in capsys.readouterr().err
    assert run(*command, "optimizer.images.x=1") == 2
    assert "goes below images, which is 8, not a table" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        (
            "train r.toml a=1 --plan b_c.d=2 --out x=y --gpus=2 d=[3]",
            {"recipe": Path("r.toml"), "overrides": ("a=1", "b_c.d=2", "d=[3]"), "out": Path("x=y"), "gpus": 2},
        ),
        ("train --plan r.toml a=1 --gpus 2", {"recipe": Path("r.toml"), "overrides": ("a=1",), "plan": True}),
        ("evaluate A --out x B --dtype fp32 count=3", {"sources": ("A", "B", "count=3"), "out": Path("x")}),
        ("compare A@steps=3 --allow steps size --out x B", {"sources": ("A@steps=3", "B"), "allow": ("steps", "size")}),
    ],
)
def test_options_and_arguments_mix(given, expected):
    command = parse(given.split())
    assert vars(command) | expected == vars(command)


def test_an_unknown_option_is_an_error(capsys):
    assert run("train", "r.toml", "a=1", "--plan", "b=2", "--outt", "x") == 2
    assert "--outt" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"optimizer": {"images": 2}}, "optimizer.images is 2: it must be at least a batch, 4"),
        ({"optimizer": {"learning_rate": 0.0}}, "learning_rate is 0.0: it must be above 0"),
        ({"optimizer": {"ema": 0.5}}, "optimizer.ema is 0.5"),
        ({"optimizer": {"warmup": -1}}, "warmup is -1: it must be at least 0"),
        ({"probabilities": {"mask": 0.0}}, "the sum of data.condition_probabilities is 0"),
        ({"probabilities": {"mask": 1.0, "none": -0.5}}, "data.condition_probabilities.none is -0.5"),
        ({"keep_checkpoints": 0}, "keep_checkpoints is 0"),
        ({"checkpoint_every": 0}, "checkpoint_every is 0: it must be at least 1"),
        ({"log_every": 0}, "log_every is 0: it must be at least 1"),
        ({"seed": -1}, "seed is -1: it must be at least 0"),
        ({"seed": 2**62}, "seed is 4611686018427387904: it must be below"),
        ({"defaults": {"size": SIZE, "guidance": 9.0}}, "the recipe's defaults: unknown key 'guidance'; known are"),
        ({"defaults": {"size": 512}}, "contains faces of 32 px, but the recipe's defaults.size is 512"),
        ({"defaults": {}}, "contains faces of 32 px, but the recipe's defaults.size is missing"),
        (
            {"preview": [{"keypoints": "no.json"}]},
            "preview 1 has a keypoints, which is not in the recipe's condition_prob",
        ),
        ({"preview": [{"mask": "no.png"}]}, r"no\.png"),
        ({"network": {"patch_size": 3}}, r"cannot be divided into patches of 3"),
        ({"network": {"heads": 3}}, "must be a multiple of 12"),
        ({"network": {"heads": 0}}, "network.heads is 0: it must be at least 1"),
        ({"network": {"patch_size": 0}}, "network.patch_size is 0"),
        ({"network": {"hidden_size": 0}}, "network.hidden_size is 0"),
        ({"network": {"depth": 0}}, "network.depth is 0"),
        ({"network": {"mlp_ratio": -1.0}}, "network.mlp_ratio is -1.0: it must be above 0"),
        ({"network": {"name": "mditface", "single_depth": -1}}, "network.single_depth is -1: it must be at least 0"),
        ({"network": {"name": "mditface", "single_depth": 1, "heads": 0}}, "network.heads is 0"),
        ({"network": {"name": "mmface_adapter", "base": "x", "rank": 0}}, "network.rank is 0"),
        ({"threads": -1}, "threads is -1: it must be at least 1"),
        ({"micro_batch": 0}, "micro_batch is 0: it must be at least 1"),
        ({"optimizer": {"learning_rate": float("inf")}}, "learning_rate is inf: it must be finite"),
        ({"optimizer": {"posthoc_emas": [0.2, 0.1]}}, "must be different from each other and from optimizer.ema, 0.1"),
        ({"optimizer": {"posthoc_emas": [0.2]}, "network": {"name": "mmface_adapter", "base": "x"}}, "whole network"),
        ({"init_from": "y", "network": {"name": "mmface_adapter", "base": "x"}}, "adapters start from their base"),
        ({"defaults": {"size": SIZE, "steps": 0}}, "defaults.steps is 0: it must be a whole number from 1 to 1000"),
        ({"defaults": {"size": SIZE, "steps": 5000}}, "defaults.steps is 5000: it must be a whole number from 1 to"),
        ({"defaults": {"size": SIZE, "guidance_scale": -1.0}}, "guidance_scale is -1.0: it must be a finite number of"),
        (
            {"defaults": {"size": SIZE, "guidance_scale": "x"}},
            "defaults.guidance_scale is x: it must be a finite number",
        ),
        (
            {"defaults": {"size": SIZE, "guidance_interval": [0.9]}},
            r"guidance_interval is \[0.9\]: it must be two numbers",
        ),
        ({"objective": {"name": "rectified_flow", "shift": float("nan")}}, "the objective's shift is nan"),
        ({"objective": {"name": "rectified_flow", "logit_mean": "x"}}, "the objective's logit_mean is 'x'"),
        (
            {"objective": {"name": "ddpm", "timesteps": 0}},
            "the objective's timesteps is 0: it must be a finite number abo",
        ),
        ({"objective": {"name": "ddpm", "timesteps": 9.5}}, "timesteps is 9.5: it must be a whole number"),
        ({"objective": {"name": "ddpm", "beta_start": -1}}, "the objective's beta_start is -1"),
        ({"objective": {"name": "ddpm", "beta_end": 1.5}}, "0.00085 to 1.5: they must be below 1"),
        ({"objective": {"name": ["ddpm"]}}, r"Unknown objective \['ddpm'\]"),
    ],
)
def test_invalid_recipes(root, tmp_path, changes, message):
    with pytest.raises(InputError, match=message):
        loop.train(small(root, **changes), tmp_path / "run")
    assert not (tmp_path / "run" / "checkpoints").exists()


def test_shards_that_differ(root, tmp_path):
    parts = load_components(root / "components")
    encode_folder(root / "faces", tmp_path / "large", parts, size=2 * SIZE)
    given = small(root)
    both = dataclasses.replace(given.data, shards=(*given.data.shards, str(tmp_path / "large")))
    with pytest.raises(InputError, match="shards differ in size"):
        loop.train(dataclasses.replace(given, data=both), tmp_path / "run")
    validation = dataclasses.replace(given.data, validation=(str(tmp_path / "large"),))
    with pytest.raises(InputError, match="large contains faces of 64 px"):
        loop.train(dataclasses.replace(given, data=validation), tmp_path / "run")


def test_other_or_damaged_shards(root, tmp_path, capsys):
    """A run that is resumed on other faces says so once; a flipped bit is found on request."""
    for name in ("faces", "components", "shards"):
        shutil.copytree(root / name, tmp_path / name)
    shards, parts = tmp_path / "shards", load_components(tmp_path / "components")
    loop.train(small(tmp_path, optimizer={"images": 8}), tmp_path / "run")
    path = tmp_path / "faces/train/metadata.jsonl"
    path.write_text("".join(path.read_text().splitlines(keepends=True)[:6]))
    encode_folder(tmp_path / "faces", shards, parts, size=SIZE, replace=True)
    assert "other shards" not in capsys.readouterr().err
    for images in (16, 24):
        loop.train(small(tmp_path, optimizer={"images": images}), tmp_path / "run")
        said = "was started with other shards: 10 samples then, 6 now" in capsys.readouterr().err
        assert said == (images == 16)
    (file,) = shards.glob("latents-*")
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    with pytest.raises(InputError, match=f"{file} is damaged"):
        loop.train(small(tmp_path, data={"verify": True}, optimizer={"images": 24}), tmp_path / "run")


def test_shards_may_be_moved(root, tmp_path, capsys):
    shutil.copytree(root / "shards", tmp_path / "here")
    for name, images in (("here", 8), ("there", 16)):
        (tmp_path / "here").rename(tmp_path / name)
        loop.train(small(root, data={"shards": [str(tmp_path / name)]}, optimizer={"images": images}), tmp_path / "run")
    assert "other shards" not in capsys.readouterr().err
    assert checkpoints(tmp_path / "run")[-1].name == "000000000016"


def test_components_were_replaced(root, tmp_path):
    """After components are trained again and faces encoded with them, earlier runs and models are rejected."""
    now, new = tmp_path / "now", tmp_path / "new"
    now.symlink_to(root)
    old = loop.train(small(now, optimizer={"images": 4}), tmp_path / "run")
    shutil.copytree(root / "components", new / "components")
    vae = tiny_vae()
    with torch.no_grad():
        next(vae.parameters()).mul_(1.1)
    vae.save_pretrained(new / "components" / "vae")
    encode_folder(root / "faces", new / "shards", load_components(new / "components"), size=SIZE)
    now.unlink()
    now.symlink_to(new)
    for folder, start in (("run", None), ("other", str(old))):
        with pytest.raises(InputError, match="run/model was trained on the latents of another encoder"):
            loop.train(small(now, init_from=start), tmp_path / folder)


def test_text_encoder_was_replaced(root, tmp_path):
    """Runs and models are rejected that were trained with another text encoder."""
    now, new = tmp_path / "now", tmp_path / "new"
    shutil.copytree(root / "components", new / "components")
    (new / "shards").symlink_to(root / "shards")
    now.symlink_to(new)
    old = loop.train(small(now, optimizer={"images": 4}), tmp_path / "run")
    encoder = tiny_text_encoder()
    with torch.no_grad():
        next(encoder.parameters()).mul_(1.1)
    encoder.save_pretrained(new / "components" / "text_encoder")
    for folder, start in (("run", None), ("other", str(old))):
        with pytest.raises(InputError, match="run/model was trained with another text encoder"):
            loop.train(small(now, init_from=start, optimizer={"images": 8}), tmp_path / folder)


def test_resume_after_the_initial_model_has_changed(root, tmp_path):
    """Frozen weights, which are not in the checkpoint, must be the same; without any, the model is not needed."""
    first = tmp_path / "first"
    loop.train(small(root, optimizer={"images": 4}), first)
    shutil.copytree(first, tmp_path / "old")
    start = str(tmp_path / "old" / "model")
    frozen = {"init_from": start, "trainable": ["condition_embed"]}
    part = loop.train(small(root, **frozen, optimizer={"images": 8}), tmp_path / "part").parent
    whole = loop.train(small(root, init_from=start, optimizer={"images": 8}), tmp_path / "whole").parent
    loop.train(small(root, optimizer={"images": 8}), tmp_path / "old")
    with pytest.raises(InputError, match=f"{part} was started with other frozen weights"):
        loop.train(small(root, **frozen, optimizer={"images": 12}), part)
    shutil.rmtree(tmp_path / "old")
    loop.train(small(root, init_from=start, optimizer={"images": 12}), whole)
    shutil.copytree(first, tmp_path / "old")
    loop.train(small(root, **frozen, optimizer={"images": 12}), part)


def test_one_training_per_folder(root, tmp_path):
    """A second one is rejected until the first one ends."""
    given = small(root, optimizer={"images": 4})
    with locked(tmp_path / "run"), pytest.raises(InputError, match="another process is writing to"):
        loop.train(given, tmp_path / "run")
    loop.train(given, tmp_path / "run")


def test_too_many_non_finite_batches(root, tmp_path):
    lines = [json.dumps({"start": start}) + "\n" for start in range(0, 20, 4)]
    (tmp_path / "non_finite.jsonl").write_text("".join(lines))
    with pytest.raises(InputError, match="names 5 batches"):
        loop.train(small(root), tmp_path)


def test_full_disk(root, tmp_path, capsys):
    """If a checkpoint cannot be written, the others are intact and training continues, but not beyond its end."""
    save_checkpoint(tmp_path, 10, {"weight": torch.zeros(3)})
    with full_disk(20_000):
        with pytest.raises(InputError, match=r"cannot write the checkpoint .*earlier checkpoints are intact"):
            save_checkpoint(tmp_path, 20, {"weight": torch.zeros(30_000)})
        with pytest.raises(InputError, match="cannot write"):
            loop.train(small(root, optimizer={"images": 16}), tmp_path / "run")
    assert load_checkpoint(tmp_path)["weight"].tolist() == [0.0] * 3
    assert "training continues" in capsys.readouterr().err
    loop.train(small(root, optimizer={"images": 16}), tmp_path / "run")
    assert [path.name for path in checkpoints(tmp_path / "run")] == ["000000000008", "000000000016"]


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="Linux only")
def test_log_on_a_full_disk(tmp_path, monkeypatch):
    """The lines of the log are lost, the training is not."""
    log, reporter = Path("/dev/full").open("w"), Reporter(tmp_path, 100, 0)  # noqa: SIM115
    monkeypatch.setattr(sys, "stderr", log)
    reporter.report(10, loss=1.0)
    reporter.report_diagnostics(10, {"loss": 1.0}, ["alarm"], ["message"])
    monkeypatch.undo()
    with suppress(OSError):
        log.close()
    assert len(read_metrics(tmp_path)) == 2


@pytest.mark.parametrize("most", [0, 100])
def test_reports_on_a_full_disk(tmp_path, capsys, most):
    """A line is lost, even if a part of it was written; the next one is not."""
    reporter = Reporter(tmp_path, 100, 0)
    with full_disk(most):
        reporter.write(10, {"messages": ["x" * 200]})
    assert (tmp_path / "metrics.jsonl").stat().st_size == most
    assert "metrics.jsonl: File too large; training continues" in capsys.readouterr().err
    reporter.report(20, loss=1.0)
    reporter.report(30, loss=1.0)
    reporter.close()
    with (tmp_path / "metrics.jsonl").open("ab") as file:  # damage is skipped
        file.write(b'[1]\n\xff\n{"seen": ')
    assert [line["seen"] for line in read_metrics(tmp_path)] == [20, 30]


def test_runs_of_equal_names_differ_in_weights_and_biases(tmp_path, monkeypatch):
    started: list[dict] = []
    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace(init=lambda **options: started.append(options)))
    recipe = SimpleNamespace(tensorboard=False, wandb="faces")
    for folder in ("a/run", "b/run", "a/run"):
        Reporter(tmp_path / folder, 100, 0, recipe)
    one, other, again = (options["id"] for options in started)
    assert one == again != other


def test_remains_of_killed_processes_are_deleted(root, tmp_path):
    run = loop.train(small(root, optimizer={"images": 4}), tmp_path / "run").parent
    kept = [path.name for path in checkpoints(run)]
    (run / "checkpoints" / "000000000010").mkdir()
    (run / "checkpoints" / "000000000010" / "__0_0.distcp").touch()
    (run / "averages").mkdir()
    left = run / "averages" / ".000000000010-0.1.safetensors.0123abcd.partial"
    left.touch()
    loop.train(small(root, optimizer={"images": 4}), run)
    assert [path.name for path in (run / "checkpoints").iterdir()] == kept
    assert not left.exists()


def test_faces_without_a_condition_are_reported(root, tmp_path, capsys):
    for folder in ("faces", "components"):
        shutil.copytree(root / folder, tmp_path / folder)
    path = tmp_path / "faces/train/metadata.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    for row in rows[:3]:
        del row["keypoints_file_name"]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    encode_folder(tmp_path / "faces", tmp_path / "shards", load_components(root / "components"), size=SIZE)
    loop.train(small(tmp_path, {"mask": 0.0, "keypoints": 1.0}, optimizer={"images": 4}), tmp_path / "run")
    printed = capsys.readouterr().err
    assert f"3 of {len(rows)} samples have no keypoints: in its place they are trained without condition" in printed
    assert "no mask" not in printed


def test_new_condition(root, tmp_path):
    """One embedding is trained; an image with an old condition is bit-identical."""
    old = loop.train(small(root), tmp_path / "old")
    probabilities = {"mask": 0.0, "sketch": 0.0, "keypoints": 1.0}
    optimizer = {"learning_rate": 1e-2, "weight_decay": 0.0}
    new = loop.train(
        small(root, probabilities, init_from=str(old), trainable=["condition_embed"], optimizer=optimizer),
        tmp_path / "n",
    )
    before, after = weights_of(old), weights_of(new)
    rows = {"mask": (0, 0), "sketch": (1, 1), "none": (2, 3)}
    for name in before:
        if name != "condition_embed.weight":
            assert torch.equal(before[name], after[name]), name
    for was, now in rows.values():
        assert torch.equal(before["condition_embed.weight"][was], after["condition_embed.weight"][now])
    mask = str(root / "faces/train/masks/000000.png")
    images = []
    for folder in (old, new):
        pipeline = load(folder)
        request = resolve(PortraitRequest(prompt="a face", conditions={"mask": ConditionInput(image=mask)}), pipeline)
        images.append(generate(pipeline, request, [3])[0][0].tobytes())
    assert images[0] == images[1]
    assert list(load(new).transformer.config.condition_names) == ["mask", "sketch", "keypoints", "none"]


def test_fine_tuning_run(root, tmp_path, capsys):
    """Measured and previewed before the first step; a finished run says so and cannot become shorter."""
    old = loop.train(small(root, optimizer={"images": 4}), tmp_path / "old")
    shutil.copytree(root / "faces", tmp_path / "faces")
    (tmp_path / "components").symlink_to(root / "components")
    path = tmp_path / "faces/train/metadata.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    path.write_text(
        "".join(json.dumps({**row, "text": row["text"] * (index > 3)}) + "\n" for index, row in enumerate(rows))
    )
    encode_folder(tmp_path / "faces", tmp_path / "shards", load_components(root / "components"), size=SIZE)
    run, previews = tmp_path / "run", [{"prompt": "a face"}]

    def train(images: int) -> str:
        changes = {"init_from": str(old), "diagnostics_every": 8, "preview": previews, "optimizer": {"images": images}}
        loop.train(small(tmp_path, **changes), run)
        return capsys.readouterr().err

    printed = train(10)
    assert f"4 of {len(rows)} faces have no captions: they are trained with empty text" in printed
    assert "12/12 images" in printed  # whole steps
    assert "finished" not in printed
    assert metrics(run)[0]["seen"] == 0
    assert metrics(run)[0]["diagnostics/mask_right"] > 0
    assert (run / "previews" / "000000000000.png").is_file()
    left = run / "previews" / ".000000000012.png.0123abcd.partial"  # by a killed process
    left.touch()
    assert f"{run} is finished: it has seen 12 images" in train(10)
    assert not left.exists()
    with pytest.raises(InputError, match=r"images is 8, but .* has already seen 12: set at least 12"):
        train(8)
    assert json.loads((run / "recipe.json").read_text())["optimizer"]["images"] == 10


def test_initial_weights_that_do_not_fit(root, tmp_path):
    old = loop.train(small(root, optimizer={"images": 4}), tmp_path / "old")
    with pytest.raises(InputError, match="has depth = 2, but the recipe has 3"):
        loop.train(small(root, init_from=str(old), network={"depth": 3}), tmp_path / "a")
    with pytest.raises(InputError, match="was trained with the objective's name = rectified_flow, not ddpm"):
        loop.train(small(root, init_from=str(old), objective={"name": "ddpm"}), tmp_path / "d")
    with pytest.raises(InputError, match="Unknown model 'nowhere'"):
        loop.train(small(root, init_from="nowhere"), tmp_path / "b")
    with pytest.raises(InputError, match="trainable has 'blok'"):
        loop.train(small(root, trainable=["blok"]), tmp_path / "c")


def test_checkpoints_of_a_finished_run_are_gone(root, tmp_path):
    """Its model is not replaced by that of a new run; one that had not ended starts again."""
    run = loop.train(small(root, optimizer={"images": 8}), tmp_path / "run").parent
    shutil.rmtree(run / "checkpoints")
    with pytest.raises(InputError, match="contains a trained model, but its checkpoints are gone: choose another"):
        loop.train(small(root, optimizer={"images": 16}), run)
    lines = (run / "metrics.jsonl").read_text().splitlines()
    (run / "metrics.jsonl").write_text("".join(f"{line}\n" for line in lines if json.loads(line)["seen"] < 8))
    loop.train(small(root, optimizer={"images": 8}), run)
    assert checkpoints(run)


@pytest.mark.parametrize(
    ("preview", "message"),
    [
        ({"seed": -1}, "The seed is -1"),
        ({"mask": "wide.png"}, "the mask of preview 1 is 64x32, but the image is 32x32"),
        ({"mask": "none.png"}, "none.png does not exist"),
    ],
)
def test_previews_that_cannot_be_generated(root, tmp_path, monkeypatch, preview, message):
    monkeypatch.chdir(tmp_path)
    Image.open(root / "faces/train/masks/000000.png").resize((64, 32)).save("wide.png")
    with pytest.raises(InputError, match=message):
        loop.train(small(root, preview=[preview]), tmp_path / "run")


def test_examples_of_previews_are_found_anywhere(root, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (request,) = preview_requests(small(root, preview=[{"mask": "examples/masks/smile.png"}]))
    assert "mask" in request.conditions


def test_a_preview_that_fails_costs_no_checkpoint(root, tmp_path, monkeypatch, capsys):
    def fail(*_: object) -> None:
        raise InputError("no preview")

    monkeypatch.setattr(publish, "generate", fail)
    loop.train(small(root, preview=[{"prompt": "a face"}]), tmp_path)
    assert checkpoints(tmp_path)[-1].name == "000000000024"
    assert capsys.readouterr().err.count("no preview; training continues") == 3


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"vae": "AutoencoderKL"}, "vae = 'AutoencoderKL'; it must be a library and a class"),
        ({"text_layer": -30}, "text_layer is -30"),
        ({"max_text_tokens": 1.5}, "max_text_tokens is 1.5"),
        ({"latent_mean": "0.1"}, "latent_mean is '0.1'"),
        ({"latent_std": 0.0}, "latent_std is 0.0"),
    ],
)
def test_invalid_components(root, tmp_path, changes, message):
    """`docs/training.md` describes how to write `components.json`."""
    shutil.copytree(root / "components", tmp_path / "components")
    path = tmp_path / "components" / "components.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    with pytest.raises(InputError, match=message):
        load_components(tmp_path / "components")


def test_posthoc_ema(root, tmp_path, capsys):
    """The EMA of width 0.07 from those of widths 0.05 and 0.1 is close to the one computed during training."""
    model = torch.nn.Linear(8, 8, bias=False)
    emas = {width: Ema(model, width) for width in (0.05, 0.07, 0.1)}
    stored = []
    generator = torch.Generator().manual_seed(0)
    for step in range(1, 401):
        with torch.no_grad():
            model.weight += 0.1 * torch.randn(8, 8, generator=generator)
        for ema in emas.values():
            ema.update(step)
        if step % 50 == 0:
            stored += [(step, width, emas[width].weights["weight"].clone()) for width in (0.05, 0.1)]
    coefficients = solve([(step, exponent(width)) for step, width, _ in stored], (400, exponent(0.07)))
    found = sum(factor * value for factor, (_, _, value) in zip(coefficients, stored, strict=True))
    expected, nearest = emas[0.07].weights["weight"], emas[0.05].weights["weight"]
    assert (found - expected).norm() < 0.05 * (nearest - expected).norm()

    run = tmp_path / "run"
    loop.train(small(root, optimizer={"posthoc_emas": [0.2], "learning_rate": 1e-2, "decay": "constant"}), run)
    main(["average", str(run), "0.1"])
    assert capsys.readouterr().out.strip().endswith("model-0.1")
    assert posthoc_ema(run, 0.2).name == "model-0.2"
    assert posthoc_ema(run, 0.15).name == "model-0.15"
    file = next((run / "averages").glob("*.safetensors"))
    file.write_bytes(file.read_bytes()[:100])
    with pytest.raises(InputError, match="cannot be read, download it again"):
        posthoc_ema(run, 0.12)
    names = ("model", "model-0.1", "model-0.2", "model-0.15")
    published, same, wide, between = (weights_of(run / name) for name in names)

    def distance(one: dict, other: dict) -> float:
        return sum((one[name] - other[name]).square().sum() for name in one).sqrt().item()

    assert distance(same, published) < 0.05 * distance(wide, published)
    assert 0.2 < distance(between, published) / distance(wide, published) < 0.8
    posthoc_ema(run, 0.15, seen=16)
    assert distance(weights_of(run / "model-0.15"), between) > 0.5 * distance(wide, published)
    load(run / "model-0.15")
    for width in (0.5, 0.0, -0.1):
        with pytest.raises(InputError, match=rf"the width is {width}: it must be above 0, at most 0\.28"):
            posthoc_ema(run, width)
    loop.train(small(root, optimizer={"images": 4}), tmp_path / "plain")
    with pytest.raises(InputError, match="stored no EMAs"):
        posthoc_ema(tmp_path / "plain", 0.1)
    with pytest.raises(InputError, match="stored no EMAs to combine in its first 2 images"):
        posthoc_ema(run, 0.1, seen=2)
    with pytest.raises(InputError, match="needs a run"):
        posthoc_ema(tmp_path / "nothing", 0.1)


def test_eight_bit_checkpoints(root, tmp_path):
    """They have a byte per value and resume bit-identically."""
    pytest.importorskip("torchao")
    given = small(root, network={"hidden_size": 64}, optimizer={"name": "adamw8bit", "decay": "constant"})
    with torch.compiler.set_stance("force_eager"):  # it would compile for a minute
        loop.train(given, tmp_path / "whole")
        first = small(
            root, network={"hidden_size": 64}, optimizer={"name": "adamw8bit", "decay": "constant", "images": 8}
        )
        loop.train(first, tmp_path / "parts")
        loop.train(given, tmp_path / "parts")
        model = torch.nn.Linear(256, 256)
        (optimizer,) = make_optimizers(model, given.optimizer)
        model(torch.ones(1, 256)).sum().backward()
        optimizer.step()
    state = optimizer.state[model.weight]
    assert state["exp_avg"].codes.dtype == torch.uint8
    whole, parts = weights_of(tmp_path / "whole" / "model"), weights_of(tmp_path / "parts" / "model")
    assert all(torch.equal(whole[name], parts[name]) for name in whole)


def test_reports(root, tmp_path):
    pytest.importorskip("tensorboard")
    preview = [{"prompt": "a face", "seed": 1}]
    given = small(root, preview=preview, tensorboard=True, diagnostics_every=4, log_every=4)
    loop.train(given, tmp_path)
    page = (tmp_path / "index.html").read_text()
    assert page.count("<svg") >= 7
    assert page.count("data:image/webp;base64,") == 3
    assert page.index("data:image") < page.index("<svg") < page.index("<table")  # images, curves, tables
    assert ">another face's</text>" in page  # text, not paths
    assert "Loss by mask" in page
    assert "prefers-color-scheme: dark" in page
    assert "#010101" not in page  # ink has the color of the page
    assert "http" not in page.replace("http://www.w3.org", "")  # self-contained
    assert list((tmp_path / "tensorboard").glob("events*"))
    line = next(line for line in metrics(tmp_path) if "loss" in line)
    assert {"seen", "loss", "gradient_norm", "learning_rate", "images_per_second", "memory_gb"} <= line.keys()
    # a name with HTML, an alarm and a non-finite loss
    odd = tmp_path / "<b>"
    (odd / "previews").mkdir(parents=True)
    Image.new("RGB", (8, 600)).save(odd / "previews" / "000000000001.png")
    lines = [{"seen": 1, "loss": 1.0}, {"seen": 2, "loss": float("nan"), "alarms": ["<none>"], "messages": []}]
    (odd / "metrics.jsonl").write_text("\n".join(map(json.dumps, lines)) + '\n{"seen": 3, "lo')
    page = write_report(odd).read_text()
    assert "&lt;b&gt;" in page
    assert "ALARM: &lt;none&gt;" in page
    assert "<b>" not in page
