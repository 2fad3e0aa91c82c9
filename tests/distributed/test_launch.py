"""The scripts of `launch/`: two machines, errors, SIGTERM, and the arguments of SLURM."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest

from builders import free_port
from likeness.config import load_toml
from likeness.train import loop
from likeness.train.checkpoint import checkpoints
from likeness.train.config import TrainRecipe
from runs import SIZE, load_checkpoint, metrics

PROJECT = Path(__file__).parents[2]
TORCHRUN = PROJECT / "launch" / "torchrun.sh"
DEBUG = PROJECT / "recipes" / "debug.toml"


@pytest.fixture(scope="module")
def root(prepared_faces) -> Path:
    return prepared_faces


def shortened(root: Path) -> list[str]:
    """Overrides of the debug recipe: four steps of four small faces, in float32."""
    where = [f'data.shards=["{root}/shards"]', f"data.components={root}/components", f"defaults.size={SIZE}"]
    length = ["optimizer.images=16", "optimizer.batch=4", "log_every=4", "checkpoint_every=8", "diagnostics_every=0"]
    return [*where, *length, "network.hidden_size=32", "precision=fp32"]


def environment(programs: Path, **given: str) -> dict[str, str]:
    """The environment with `likeness` and torchrun on the path and one thread per process."""
    path = f"{programs}:{Path(sys.executable).parent}:{os.environ['PATH']}"
    return os.environ | {"PATH": path, "OMP_NUM_THREADS": "1", "PROCESSES": "2"} | given


def test_two_machines(root, tmp_path, programs):
    """Hybrid sharding between two machines, with two passes per step: the weights are those of one process."""
    given = shortened(root)
    command = [TORCHRUN, DEBUG, "--out", tmp_path / "run", *given, "sharding=hybrid", "micro_batch=1"]
    where = environment(
        programs, PROCESSES="1", MACHINES="2", MASTER=f"127.0.0.1:{free_port()}", RUN_ID="test", RESTARTS="0"
    )
    machines = [subprocess.Popen(command, env=where, stderr=subprocess.PIPE, text=True) for _ in range(2)]
    said = [machine.communicate(timeout=900)[1] for machine in machines]
    assert [machine.returncode for machine in machines] == [0, 0], said[0][-3000:] + said[1][-3000:]
    loop.train(load_toml(DEBUG, TrainRecipe, (*given, "threads=1")), tmp_path / "alone")
    found, wanted = load_checkpoint(tmp_path / "run"), load_checkpoint(tmp_path / "alone")
    assert found.keys() == wanted.keys()
    for name, value in wanted.items():
        if name.startswith("model/"):
            assert (found[name] - value).abs().mean() < 2e-5, name
    losses, expected = ([line["loss"] for line in metrics(tmp_path / name)] for name in ("run", "alone"))
    assert losses == pytest.approx(expected, rel=1e-3)
    assert len(list((tmp_path / "run/checkpoints/000000000016").glob("*.distcp"))) == 2  # one per process


def test_invalid_recipes_are_not_restarted(root, tmp_path, programs):
    """The error is reported once, and the script has the exit code of the command."""
    command = [TORCHRUN, DEBUG, *shortened(root), "micro_batch=3", "--out", tmp_path / "run"]
    done = subprocess.run(
        command, env=environment(programs, PROCESSES="1"), capture_output=True, text=True, timeout=900
    )
    assert done.returncode == 2, done.stderr[-3000:]
    assert done.stderr.count("a batch of 4 cannot be divided into micro-batches") == 1
    assert not (tmp_path / "run").exists()


def test_sigterm(root, tmp_path, programs):
    """The script forwards SIGTERM to every process; they save a checkpoint, and the exit code is 75."""
    command = [TORCHRUN, DEBUG, *shortened(root), "optimizer.images=40000", "checkpoint_every=40000"]
    script = subprocess.Popen(
        [*command, "--out", tmp_path], env=environment(programs), stderr=subprocess.PIPE, text=True
    )
    while script.poll() is None and not reported(tmp_path):
        time.sleep(0.05)
    script.terminate()
    errors = script.communicate(timeout=900)[1]
    assert script.returncode == 75, errors[-3000:]
    assert errors.count("run the same command again to resume") == 2
    (state,) = checkpoints(tmp_path)
    assert 0 < int(state.name) < 40_000


def reported(run: Path) -> bool:
    """Return whether a run has reported anything."""
    return (run / "metrics.jsonl").is_file() and bool((run / "metrics.jsonl").read_text())


@pytest.mark.skipif(bool(list(Path("/dev").glob("nvidia[0-9]*"))), reason="this machine has a GPU")
def test_without_a_gpu():
    given = {name: value for name, value in os.environ.items() if name != "PROCESSES"}
    done = subprocess.run([TORCHRUN, DEBUG], env=given, capture_output=True, text=True)
    assert done.returncode == 2
    assert "no GPU found; PROCESSES=2" in done.stderr


def test_slurm(tmp_path):
    """Arguments and environment of every machine, from a stand-in for srun."""
    for name, body in {
        "srun": 'echo "$MACHINES $MASTER $RUN_ID"; printf "%s\\n" "$@"',
        "scontrol": '[ "$1 $2 $3" = "show hostnames node[3-4]" ] && printf "node3\\nnode4\\n"',
    }.items():
        (tmp_path / name).write_text(f"#!/usr/bin/env bash\n{body}\n")
        (tmp_path / name).chmod(0o755)
    given = {"PATH": f"{tmp_path}:{os.environ['PATH']}", "SLURM_JOB_NUM_NODES": "2", "SLURM_JOB_ID": "17"}
    given["SLURM_CPUS_PER_TASK"] = "64"
    given["SLURM_JOB_NODELIST"] = "node[3-4]"
    arguments = ["recipes/debug.toml", 'data.shards=["a b"]']
    script = PROJECT / "launch" / "slurm.sbatch"
    done = subprocess.run(["bash", script, *arguments], env=given, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines() == [
        "2 node3:29500 17",
        "--kill-on-bad-exit=1",
        "launch/torchrun.sh",
        *arguments,
    ]
    assert subprocess.run(["bash", script], env=given, capture_output=True).returncode == 2
    (log,) = re.findall(r"^#SBATCH --output=(.*)$", script.read_text(), re.MULTILINE)
    assert Path(log).parent == Path()  # SLURM creates no folders
