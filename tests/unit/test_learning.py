"""Numbers that are none, full disks, models to go on from, averages chosen afterwards, and what a run shows."""

from __future__ import annotations

import dataclasses
import json
import resource
import shutil
import signal
from pathlib import Path

import pytest
import torch
from PIL import Image

from builders import run, tiny_vae
from likeness.cli import main, words_first
from likeness.cli.evaluation import compare
from likeness.cli.training import train
from likeness.encoders.components import load_components
from likeness.pipelines.generate import generate, resolve
from likeness.pipelines.load import load
from likeness.prepare.encode import encode_folder
from likeness.train import loop
from likeness.train.checkpoint import load_state, save_state, states
from likeness.train.metrics import Reporter
from likeness.train.optim import Ema, make_optimizers, power_of
from likeness.train.page import write_page
from likeness.train.posthoc import average_of, solve
from likeness.train.run import held
from likeness.types import ConditionInput, InputError, PortraitRequest, TryAgain
from runs import SIZE, metrics, prepare, small, weights_of

RECIPES = Path(__file__).parents[2] / "recipes"


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    return prepare(tmp_path_factory.mktemp("learning"), 10)


def test_a_batch_that_is_no_number(root, tmp_path, monkeypatch):
    """The run stops with the batch recorded; the same command goes on from the last checkpoint without it."""

    def spoil(samples, positions, *rest):
        batch = real(samples, positions, *rest)
        return batch._replace(clean=batch.clean * float("nan")) if 12 in positions else batch

    real = loop.make_batch
    monkeypatch.setattr(loop, "make_batch", spoil)
    given = small(root)
    with pytest.raises(TryAgain, match=r"loss is nan .* images 12 to 15"):
        loop.train(given, tmp_path / "run")
    (line,) = (tmp_path / "run" / "non_finite.jsonl").read_text().splitlines()
    assert json.loads(line)["positions"] == [12, 15]
    assert [path.name for path in states(tmp_path / "run")] == ["000000000008"]
    loop.train(given, tmp_path / "run")
    assert [path.name for path in states(tmp_path / "run")][-1] == "000000000024"
    found = load_state(tmp_path / "run")
    assert all(value.isfinite().all() for value in found.values())
    # it is the run that knew from the beginning
    (tmp_path / "other").mkdir()
    shutil.copy(tmp_path / "run" / "non_finite.jsonl", tmp_path / "other")
    loop.train(given, tmp_path / "other")
    other = load_state(tmp_path / "other")
    assert all(torch.equal(found[name], other[name]) for name in found)


def test_exit_codes(root, tmp_path, monkeypatch, capsys):
    """75 says that the same command goes on by itself, 2 that it does not."""
    real = loop.make_batch
    monkeypatch.setattr(loop, "make_batch", lambda *given: (b := real(*given))._replace(clean=b.clean * float("inf")))
    where = [f'data.shards=["{root}/shards"]', f"data.components={root}/components", "precision=fp32"]
    size = ["network.hidden_size=32", "optimizer.images=8", "optimizer.batch=4", "defaults.size=32", "canary_every=0"]
    command = ["train", RECIPES / "debug.toml", "--out", tmp_path / "run", *where, *size]
    assert run(*command) == 75
    assert "run the same command again" in capsys.readouterr().err
    assert run(*command, "optimizer.batch=0") == 2
    assert "the recipe's optimizer.batch is 0: it must be at least 1" in capsys.readouterr().err
    assert run(*command, "optimizer.images.x=1") == 2
    assert "goes below images, which is 8 and no table" in capsys.readouterr().err


def test_words_may_stand_anywhere():
    given = ["r.toml", "a=1", "--plan", "b.c=2", "--out", "x=y", "--gpus=2", "d=[3]"]
    assert words_first(train, given) == ["r.toml", "a=1", "b.c=2", "d=[3]", "--plan", "--out", "x=y", "--gpus=2"]
    assert words_first(train, ["--plan", "r.toml", "a=1", "--gpus", "2"]) == ["r.toml", "a=1", "--plan", "--gpus", "2"]
    given = ["--allow", "steps", "size", "A@steps=3", "--out", "x", "B"]
    assert words_first(compare, given) == ["A@steps=3", "B", "--allow", "steps", "size", "--out", "x"]


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"optimizer": {"images": 2}}, "optimizer.images is 2: it must be at least a batch, 4"),
        ({"optimizer": {"learning_rate": 0.0}}, "learning_rate is 0.0: it must be above 0"),
        ({"optimizer": {"ema": 0.5}}, "optimizer.ema is 0.5"),
        ({"optimizer": {"warmup": -1}}, "warmup is -1: it must be at least 0"),
        ({"shares": {"mask": 0.0}}, "the sum of data.condition_shares is 0"),
        ({"shares": {"mask": 1.0, "none": -0.5}}, "data.condition_shares.none is -0.5"),
        ({"keep": 0}, "keep is 0"),
        ({"checkpoint_every": 0}, "checkpoint_every is 0: it must be at least 1"),
        ({"log_every": 0}, "log_every is 0: it must be at least 1"),
        ({"seed": -1}, "seed is -1: it must be at least 0"),
        ({"defaults": {"size": SIZE, "guidance": 9.0}}, "the recipe's defaults: unknown key 'guidance'; known are"),
        ({"defaults": {"size": 512}}, "holds faces of 32 px, but the recipe's defaults.size is 512"),
        ({"defaults": {}}, "holds faces of 32 px, but the recipe's defaults.size is not given"),
        ({"preview": [{"keypoints": "no.json"}]}, "preview 1 has a keypoints, which the recipe's condition_shares"),
        ({"preview": [{"mask": "no.png"}]}, r"no\.png"),
        ({"network": {"patch_size": 3}}, r"cannot be cut into patches of 3"),
        ({"network": {"heads": 3}}, "must be a multiple of 12"),
    ],
)
def test_refused_before_work_begins(root, tmp_path, changes, words):
    with pytest.raises(InputError, match=words):
        loop.train(small(root, **changes), tmp_path / "run")
    assert not (tmp_path / "run" / "checkpoints").exists()


def test_stores_that_do_not_go_together(root, tmp_path):
    parts = load_components(root / "components")
    encode_folder(root / "faces", tmp_path / "large", parts, size=2 * SIZE)
    given = small(root)
    both = dataclasses.replace(given.data, shards=(*given.data.shards, str(tmp_path / "large")))
    with pytest.raises(InputError, match="shards differ in size"):
        loop.train(dataclasses.replace(given, data=both), tmp_path / "run")
    unseen = dataclasses.replace(given.data, validation=(str(tmp_path / "large"),))
    with pytest.raises(InputError, match="large holds faces of 64 px"):
        loop.train(dataclasses.replace(given, data=unseen), tmp_path / "run")


def test_models_on_another_autoencoder(root, tmp_path):
    """The components were trained anew under the same name, and the faces encoded again: no older model goes on."""
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
            loop.train(small(now, start=start), tmp_path / folder)


def test_one_training_a_folder(root, tmp_path):
    """A second one is refused; the first one's end opens the folder again."""
    given = small(root, optimizer={"images": 4})
    with held(tmp_path / "run"), pytest.raises(InputError, match="another process trains in"):
        loop.train(given, tmp_path / "run")
    loop.train(given, tmp_path / "run")


def test_too_many_such_batches(root, tmp_path):
    lines = [json.dumps({"start": start}) + "\n" for start in range(0, 20, 4)]
    (tmp_path / "non_finite.jsonl").write_text("".join(lines))
    with pytest.raises(InputError, match="names 5 batches"):
        loop.train(small(root), tmp_path)


def test_full_disk(root, tmp_path, capsys):
    """A checkpoint that cannot be written is said, leaves the others alone, and the run goes on, not past its end."""
    save_state(tmp_path, 10, {"weight": torch.zeros(3)})
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    old = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, before[1]))
        with pytest.raises(InputError, match=r"cannot write the checkpoint .*earlier checkpoints are intact"):
            save_state(tmp_path, 20, {"weight": torch.zeros(30_000)})
        with pytest.raises(InputError, match="cannot write"):
            loop.train(small(root, optimizer={"images": 16}), tmp_path / "run")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, old)
    assert load_state(tmp_path)["weight"].tolist() == [0.0] * 3
    assert "training goes on" in capsys.readouterr().err
    loop.train(small(root, optimizer={"images": 16}), tmp_path / "run")
    assert [path.name for path in states(tmp_path / "run")] == ["000000000008", "000000000016"]


def test_reports_on_a_full_disk(tmp_path, capsys):
    reporter = Reporter(tmp_path, 100, 0)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    old = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (0, before[1]))
        reporter.report(10, loss=2.0)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, old)
    assert "metrics.jsonl: File too large; training goes on" in capsys.readouterr().err
    reporter.report(20, loss=1.0)
    reporter.close()
    assert [line["seen"] for line in metrics(tmp_path)] == [20]


def test_a_new_condition_leaves_the_old_ones_alone(root, tmp_path):
    """One row is trained; a portrait with a mask stays the same to the byte."""
    old = loop.train(small(root), tmp_path / "old")
    shares = {"mask": 0.0, "sketch": 0.0, "keypoints": 1.0}
    optimizer = {"learning_rate": 1e-2, "weight_decay": 0.0}
    new = loop.train(
        small(root, shares, start=str(old), trained=["condition_embed"], optimizer=optimizer), tmp_path / "n"
    )
    before, after = weights_of(old), weights_of(new)
    rows = {"mask": (0, 0), "sketch": (1, 1), "none": (2, 3)}
    for name in before:
        if name != "condition_embed.weight":
            assert torch.equal(before[name], after[name]), name
    for was, now in rows.values():
        assert torch.equal(before["condition_embed.weight"][was], after["condition_embed.weight"][now])
    mask = str(root / "faces/train/masks/000000.png")
    pictures = []
    for folder in (old, new):
        pipeline = load(folder)
        request = resolve(PortraitRequest(prompt="a face", conditions={"mask": ConditionInput(image=mask)}), pipeline)
        pictures.append(generate(pipeline, request, [3])[0][0].tobytes())
    assert pictures[0] == pictures[1]
    assert list(load(new).transformer.config.condition_names) == ["mask", "sketch", "keypoints", "none"]


def test_starts_that_do_not_fit(root, tmp_path):
    old = loop.train(small(root, optimizer={"images": 4}), tmp_path / "old")
    with pytest.raises(InputError, match="has depth = 2, but the recipe makes it 3"):
        loop.train(small(root, start=str(old), network={"depth": 3}), tmp_path / "a")
    with pytest.raises(InputError, match="Unknown model 'nowhere'"):
        loop.train(small(root, start="nowhere"), tmp_path / "b")
    with pytest.raises(InputError, match="trained has 'blok'"):
        loop.train(small(root, trained=["blok"]), tmp_path / "c")


def test_averages_may_be_chosen_afterwards(root, tmp_path, capsys):
    """The average put together from those of widths 0.05 and 0.1 is the one that was followed all along."""
    model = torch.nn.Linear(8, 8, bias=False)
    followed = {width: Ema(model, width) for width in (0.05, 0.07, 0.1)}
    kept = []
    generator = torch.Generator().manual_seed(0)
    for step in range(1, 401):
        with torch.no_grad():
            model.weight += 0.1 * torch.randn(8, 8, generator=generator)
        for average in followed.values():
            average.update(step)
        if step % 50 == 0:
            kept += [(step, width, followed[width].weights["weight"].clone()) for width in (0.05, 0.1)]
    shares = solve([(step, power_of(width)) for step, width, _ in kept], (400, power_of(0.07)))
    found = sum(share * value for share, (_, _, value) in zip(shares, kept, strict=True))
    wanted, nearest = followed[0.07].weights["weight"], followed[0.05].weights["weight"]
    assert (found - wanted).norm() < 0.05 * (nearest - wanted).norm()

    run = tmp_path / "run"
    loop.train(small(root, optimizer={"ema_choices": [0.2]}), run)
    main(["average", str(run), "0.1"])
    assert capsys.readouterr().out.strip().endswith("model-0.1")
    same, published = weights_of(run / "model-0.1"), weights_of(run / "model")
    assert all((same[name] - published[name]).abs().max() < 1e-3 for name in published)
    assert average_of(run, 0.15, seen=16).name == "model-0.15"
    load(run / "model-0.15")
    for width in (0.5, 0.0, -0.1):
        with pytest.raises(InputError, match=rf"the width is {width}: it must be above 0, at most 0\.28"):
            average_of(run, width)
    loop.train(small(root, optimizer={"images": 4}), tmp_path / "plain")
    with pytest.raises(InputError, match="kept no averages"):
        average_of(tmp_path / "plain", 0.1)


def test_eight_bit_states(root, tmp_path):
    """They take a byte a number, resume to the bit, and learn."""
    pytest.importorskip("torchao")
    given = small(root, network={"hidden_size": 64}, optimizer={"name": "adamw8bit", "decay": "constant"})
    with torch.compiler.set_stance("force_eager"):  # it would compile itself for a minute
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


def test_what_a_run_shows(root, tmp_path):
    pytest.importorskip("tensorboard")
    preview = [{"prompt": "a face", "seed": 1}]
    given = small(root, preview=preview, tensorboard=True, canary_every=8)
    loop.train(given, tmp_path)
    page = (tmp_path / "index.html").read_text()
    assert page.count("<svg") >= 7
    assert page.count("data:image/jpeg;base64,") == 3
    assert "canary: loss by mask" in page
    assert "http" not in page.replace("http://www.w3.org", "")  # it needs nothing else
    assert list((tmp_path / "tensorboard").glob("events*"))
    line = next(line for line in metrics(tmp_path) if "loss" in line)
    assert {"seen", "loss", "gradient_norm", "learning_rate", "images_per_second", "memory_gb"} <= line.keys()
    # a name that is no HTML, an alarm, and a loss that is none
    odd = tmp_path / "<b>"
    (odd / "previews").mkdir(parents=True)
    Image.new("RGB", (8, 600)).save(odd / "previews" / "000000000001.png")
    lines = [{"seen": 1, "loss": 1.0}, {"seen": 2, "loss": float("nan"), "canary": ["ALARM: <none>"]}]
    (odd / "metrics.jsonl").write_text("\n".join(map(json.dumps, lines)) + '\n{"seen": 3, "lo')
    page = write_page(odd).read_text()
    assert "&lt;b&gt;" in page
    assert "ALARM: &lt;none&gt;" in page
    assert "<b>" not in page
