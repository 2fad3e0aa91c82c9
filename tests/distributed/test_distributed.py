"""Two processes give the results of one, with every sharding; their number may change; a killed run loses nothing."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch

from builders import free_port, run
from likeness.config import build
from likeness.data.store import Store
from likeness.parallel import mesh_shape
from likeness.train import loop
from likeness.train.config import TrainRecipe
from likeness.types import InputError
from runs import SIZE, assert_identical, load_checkpoint, metrics, prepare, small_values

HERE = Path(__file__).parent
MMFACE = {"name": "mmface", "hidden_size": 32, "depth": 2, "heads": 2}
WIDE = MMFACE | {"hidden_size": 64}  # large enough for 8-bit states of sharded matrices
EIGHT_BIT = {"name": "adamw8bit"}
PREVIEW = [{"prompt": "a face", "seed": 1}]


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    """Ten synthetic faces, tiny components, a tiny FLUX.1, and shards of both autoencoders."""
    return prepare(tmp_path_factory.mktemp("distributed"), 10, flux=True)


def job(root: Path, network: dict[str, Any] | None = None, images: int = 16, **changes: Any) -> dict[str, Any]:
    """Values of a recipe: 4 images per step, a constant learning rate, float32."""
    optimizer = {"images": images, "decay": "constant"} | changes.pop("optimizer", {})
    return small_values(root, network=network or MMFACE, optimizer=optimizer, log_every=4, **changes)


def alone(values: dict[str, Any], run: Path) -> Path:
    """Train in this process; return the run."""
    loop.train(build(TrainRecipe, values), run)
    return run


def execute(programs: Path, *words: object, ranks: int = 1) -> list[str]:
    """Run a script of this folder, as torchrun starts it if there are several ranks; return the output of each."""
    where = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    where |= {"WORLD_SIZE": str(ranks), "LOCAL_WORLD_SIZE": str(ranks)}
    command = [programs / "python", *map(str, words)]
    started = [
        subprocess.Popen(
            command, env=os.environ | where | {"RANK": rank, "LOCAL_RANK": rank}, stdout=subprocess.PIPE,
            stderr=subprocess.PIPE, text=True,
        )
        for rank in map(str, range(ranks))
    ]  # fmt: skip
    outputs = [process.communicate(timeout=900) for process in started]
    for process, output in zip(started, outputs, strict=True):
        assert process.returncode == 0, output[0] + output[1][-3000:]
    return [output for output, _ in outputs]


@pytest.fixture(scope="module")
def runs(root, programs) -> Path:
    """All runs of two processes, which train one after the other in the same processes."""
    adapter = {"name": "mditface_adapter", "base": str(root / "flux"), "rank": 2, "alpha": 2}
    jobs = {
        "replicate": job(root, sharding="replicate"),
        "shard": job(root, sharding="shard"),
        "accumulate": job(root, sharding="shard", micro_batch=1),
        "checkpointing": job(root, MMFACE | {"gradient_checkpointing": True}),
        "muon": job(root, optimizer={"name": "muon"}),
        "aligned": job(root, alignment_weight=0.5),
        "compiled": job(root, compile=True),
        "bf16": job(root, precision="bf16", diagnostics_every=8),
        "eight_bit": job(root, WIDE, optimizer=EIGHT_BIT),
        "eight_bit_parts": job(root, WIDE, images=8, optimizer=EIGHT_BIT),
        "eight_bit_parts again": job(root, WIDE, optimizer=EIGHT_BIT),
        "eight_bit_two_then_one": job(root, WIDE, images=8, optimizer=EIGHT_BIT),
        "eight_bit_one_then_two": job(root, WIDE, optimizer=EIGHT_BIT),
        "adapter": job(root, adapter, precision="bf16", preview=PREVIEW),
        "not_a_number": job(root, optimizer={"learning_rate": 1e30}),
        "indivisible": job(root, micro_batch=3),
        "no_place": job(root),
    }
    (root / "no_place").mkdir()
    (root / "no_place" / "checkpoints").write_text("not a folder")
    with torch.compiler.set_stance("force_eager"):  # torchao's optimizer would compile for a minute
        alone(job(root, WIDE, images=8, optimizer=EIGHT_BIT), root / "eight_bit_one_then_two")
    metadata = next((root / "faces").rglob("metadata.jsonl"))
    metadata.write_text(metadata.read_text() * 30)  # several blocks, which the processes share
    encode = ["prepare", "encode", str(root / "faces"), str(root / "encoded"), "--size", str(SIZE)]
    encode += ["--components", str(root / "components")]
    trainings = [[values, str(root / name.split()[0])] for name, values in jobs.items()]
    (root / "jobs.json").write_text(json.dumps([encode, trainings]))
    execute(programs, HERE / "worker.py", root / "jobs.json", ranks=2)
    return root


def test_context_parallelism(programs):
    """Two processes generate an image together."""
    execute(programs, HERE / "context_parallel.py", ranks=2)


def assert_close(run: Path, reference: Path, tolerance: float = 2e-5, rel: float = 1e-3) -> None:
    """Same names, and weights close on average: AdamW turns a rounded gradient near 0 into a step of 1e-3.
    Weights hardly depend on the scale of the gradients; their norms, and losses, show it.
    """
    found, wanted = load_checkpoint(run), load_checkpoint(reference)
    assert found.keys() == wanted.keys()
    weights = [name for name in wanted if name.startswith("model/")]
    assert weights
    for name in weights:
        off = (found[name] - wanted[name]).abs()
        assert off.mean() < tolerance, name
    steps, expected = ([line for line in metrics(path) if "gradient_norm" in line] for path in (run, reference))
    assert len(steps) == len(expected) > 0
    for key in ("loss", "gradient_norm"):
        assert [step[key] for step in steps] == pytest.approx([step[key] for step in expected], rel=rel)


@pytest.fixture(scope="module")
def plain(root) -> Path:
    return alone(job(root), root / "plain")


@pytest.mark.parametrize("name", ["replicate", "shard", "accumulate", "checkpointing", "compiled"])
def test_two_processes(runs, plain, name):
    assert_close(runs / name, plain)
    assert (runs / name / "model" / "model_index.json").is_file()


def test_parts_of_a_batch_add_up(root, plain, tmp_path):
    """Four micro-batches of one image are a batch of four."""
    assert_close(alone(job(root, micro_batch=1), tmp_path), plain)


def test_other_networks_and_optimizers(runs, root, tmp_path):
    adapter = {"name": "mditface_adapter", "base": str(root / "flux"), "rank": 2, "alpha": 2}
    assert_close(runs / "muon", alone(job(root, optimizer={"name": "muon"}), tmp_path / "muon"), 2e-4)
    assert_close(runs / "aligned", alone(job(root, alignment_weight=0.5), tmp_path / "aligned"), 2e-4)
    assert_close(runs / "adapter", alone(job(root, adapter, precision="bf16"), tmp_path / "adapter"), 2e-4, 0.02)
    assert_close(runs / "bf16", alone(job(root, precision="bf16"), tmp_path / "bf16"), 2e-4, 0.02)
    assert (runs / "adapter" / "model" / "adapter.safetensors").is_file()
    assert [path.name for path in sorted((runs / "adapter" / "previews").iterdir())] == [
        f"{n:012d}.png" for n in (8, 16)
    ]
    lines = [json.loads(line) for line in (runs / "bf16" / "metrics.jsonl").read_text().splitlines()]
    assert {"diagnostics/mask_right", "diagnostics/sketch_none"} <= {key for line in lines for key in line}


def test_eight_bit_checkpoints(runs, root, tmp_path):
    """They are sharded as the weights; a run may be interrupted and change its number of processes."""
    with torch.compiler.set_stance("force_eager"):
        plain = alone(job(root, WIDE, optimizer=EIGHT_BIT), tmp_path / "plain")
        assert_close(runs / "eight_bit", plain)
        assert_close(runs / "eight_bit_one_then_two", plain)
        found, parts = load_checkpoint(runs / "eight_bit"), load_checkpoint(runs / "eight_bit_parts")
        assert all(torch.equal(found[name], parts[name]) for name in found)
        assert_close(alone(job(root, WIDE, optimizer=EIGHT_BIT), runs / "eight_bit_two_then_one"), plain)
    weights = sum(value.numel() for name, value in found.items() if name.startswith("model/"))
    kept = sum(path.stat().st_size for path in (runs / "eight_bit/checkpoints/000000000016").iterdir())
    assert kept < 14 * weights  # weights, average and states of 32 bits would take 16 bytes each


def test_encode(runs):
    """Every process encodes a part of the faces into the same store."""
    found, wanted = Store(runs / "encoded"), Store(runs / "shards")
    assert len(found) == 30 * len(wanted) == 300
    assert all(torch.allclose(found[n].latents, wanted[n % 10].latents, atol=2e-3) for n in range(300))


def test_all_processes_stop_together(runs):
    for name, message in (("not_a_number", "the batch of images"), ("indivisible", "batch of 4 cannot be divided")):
        errors = [(runs / f"{name}.error.{rank}").read_text() for rank in (0, 1)]
        assert message in errors[0]
        assert errors[0] == errors[1]
    errors = [(runs / f"no_place.error.{rank}").read_text() for rank in (0, 1)]
    assert "cannot write the checkpoint" in errors[0]
    assert "another process stopped with an error" in errors[1]


def test_shardings():
    assert mesh_shape("replicate", [8] * 16) == (16, 1)
    assert mesh_shape("shard", [8] * 16) == (1, 16)
    assert mesh_shape("hybrid", [8] * 16) == (2, 8)
    for machines in ([8] * 12, [8] * 8 + [4] * 4):
        with pytest.raises(InputError, match="equal size"):
            mesh_shape("hybrid", machines)


def test_all_ranks_raise_the_same_error(programs):
    """One rank has exit code 75: so have all, unless another must be fixed first. Unequal machines are found by all."""
    for output in execute(programs, HERE / "errors.py", ranks=3):
        message, *kinds = output.splitlines()
        assert message.startswith("hybrid sharding needs machines of equal size")
        assert kinds == ["TryAgain", "InputError"]


@pytest.mark.parametrize("missing", ["LOCAL_RANK", "MASTER_PORT"])
def test_ranks_without_torchrun_are_rejected(tmp_path, monkeypatch, capsys, missing):
    given = {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv(missing)
    overrides = ['data.shards=["x"]', 'data.components="x"']
    assert run("train", "debug", *overrides, "--out", tmp_path / "run") == 2
    assert f"WORLD_SIZE is 2, but {missing} is ''" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_machines_communicate_once_per_step(programs):
    """Hybrid sharding on two machines of two: gradients are reduced within a machine after every pass, and between the
    machines after the last.
    """
    (output,) = execute(programs, HERE / "pretended.py")
    found = json.loads(output.splitlines()[-1])
    (spread, added), (spread_thrice, added_thrice) = found["1"], found["3"]
    assert added > 0
    assert (spread_thrice, added_thrice) == (3 * spread, added)


def test_killed_at_any_time(root, tmp_path, programs):
    """SIGKILL while a checkpoint is written, after it, and while the model is published: bit-identical in the end."""
    values = job(root, checkpoint_every=4, preview=[{"prompt": "a face", "seed": 1}])
    whole = load_checkpoint(alone(values, tmp_path / "whole"))
    (tmp_path / "recipe.json").write_text(json.dumps(values))
    moments = [
        "checkpoints/000000000004",
        "checkpoints/000000000008/.metadata",
        ".model.*.partial",
        "previews/000000000012.png",
    ]
    execute(programs, HERE / "killed.py", tmp_path / "recipe.json", tmp_path / "run", *moments)
    found = load_checkpoint(tmp_path / "run")
    assert_identical(found, whole)
    for path in ("model/transformer/diffusion_pytorch_model.safetensors", "previews/000000000016.png"):
        assert (tmp_path / "run" / path).read_bytes() == (tmp_path / "whole" / path).read_bytes()
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    reference = [json.loads(line) for line in (tmp_path / "whole" / "metrics.jsonl").read_text().splitlines()]
    assert [(line["seen"], line["loss"]) for line in lines] == [(line["seen"], line["loss"]) for line in reference]
