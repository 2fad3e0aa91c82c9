"""The scripts of `launch/`: two machines of two processes as a user starts them, refusals, and what SLURM is told."""

from __future__ import annotations

import os
import re
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from likeness.config import load_toml
from likeness.train import loop
from likeness.train.checkpoint import load_state, states
from likeness.train.config import TrainRecipe
from runs import SIZE, prepare

PROJECT = Path(__file__).parents[2]
TORCHRUN = PROJECT / "launch" / "torchrun.sh"
DEBUG = PROJECT / "recipes" / "debug.toml"


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    return prepare(tmp_path_factory.mktemp("launch"), 10)


def shortened(root: Path) -> list[str]:
    """Changes that make four steps of four small faces of the debug recipe, in float32."""
    where = [f'data.shards=["{root}/shards"]', f"data.components={root}/components", f"defaults.size={SIZE}"]
    length = ["optimizer.images=16", "optimizer.batch=4", "log_every=4", "checkpoint_every=8", "canary_every=0"]
    return [*where, *length, "network.hidden_size=32", "precision=fp32"]


def environment(**given: str) -> dict[str, str]:
    """This one, with the project's commands on the path and one thread a process."""
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    return os.environ | {"PATH": path, "OMP_NUM_THREADS": "1", "PROCESSES": "2"} | given


def test_two_machines_of_two(root, tmp_path):
    """Layout hybrid on a mesh of (2, 2): weights spread within a machine and repeated on the other; what is learnt, in
    two passes a step, is what one process learns.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    given = [*shortened(root), "optimizer.images=32", "optimizer.batch=8"]
    command = [TORCHRUN, DEBUG, "--out", tmp_path / "run", *given, "layout=hybrid", "micro_batch=1"]
    where = environment(MACHINES="2", MASTER=f"127.0.0.1:{port}", RUN_ID="test", RESTARTS="0")
    machines = [subprocess.Popen(command, env=where, stderr=subprocess.PIPE, text=True) for _ in range(2)]
    said = [machine.communicate(timeout=900)[1] for machine in machines]
    assert [machine.returncode for machine in machines] == [0, 0], said[0][-3000:] + said[1][-3000:]
    loop.train(load_toml(DEBUG, TrainRecipe, (*given, "threads=1")), tmp_path / "alone")
    found, wanted = load_state(tmp_path / "run"), load_state(tmp_path / "alone")
    assert found.keys() == wanted.keys()
    for name, value in wanted.items():
        if name.startswith("model/"):
            assert (found[name] - value).abs().mean() < 2e-5, name
    assert len(list((tmp_path / "run/checkpoints/000000000032").glob("*.distcp"))) == 4  # every process has its part


def test_what_is_refused_is_not_started_again(root, tmp_path):
    """Each process says it once, and the script ends as the command does."""
    command = [TORCHRUN, DEBUG, *shortened(root), "optimizer.batch=5", "--out", tmp_path / "run"]
    done = subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=900)
    assert done.returncode == 2, done.stderr[-3000:]
    assert done.stderr.count("a batch of 5 cannot be cut into parts") == 2
    assert not (tmp_path / "run").exists()


def test_told_to_end(root, tmp_path):
    """SIGTERM to the script, as SLURM sends it: every process gets it, a state is written, and the exit code says that
    the same command goes on.
    """
    command = [TORCHRUN, DEBUG, *shortened(root), "optimizer.images=40000", "checkpoint_every=40000"]
    script = subprocess.Popen([*command, "--out", tmp_path], env=environment(), stderr=subprocess.PIPE, text=True)
    while script.poll() is None and not reported(tmp_path):
        time.sleep(0.05)
    script.terminate()
    errors = script.communicate(timeout=900)[1]
    assert script.returncode == 75, errors[-3000:]
    assert errors.count("run the same command again to go on") == 2
    (state,) = states(tmp_path)
    assert 0 < int(state.name) < 40_000


def reported(run: Path) -> bool:
    """Whether a run has reported anything yet."""
    return (run / "metrics.jsonl").is_file() and bool((run / "metrics.jsonl").read_text())


@pytest.mark.skipif(bool(list(Path("/dev").glob("nvidia[0-9]*"))), reason="there is a GPU")
def test_without_a_gpu():
    given = {name: value for name, value in os.environ.items() if name != "PROCESSES"}
    done = subprocess.run([TORCHRUN, DEBUG], env=given, capture_output=True, text=True)
    assert done.returncode == 2
    assert "no GPU here; PROCESSES=2" in done.stderr


def test_slurm(tmp_path):
    """Every machine is told how many there are, which leads, and the user's words; a stand-in takes srun's place."""
    for name, body in {
        "srun": 'echo "$MACHINES $MASTER $RUN_ID"; printf "%s\\n" "$@"',
        "scontrol": '[ "$1 $2 $3" = "show hostnames node[3-4]" ] && printf "node3\\nnode4\\n"',
    }.items():
        (tmp_path / name).write_text(f"#!/usr/bin/env bash\n{body}\n")
        (tmp_path / name).chmod(0o755)
    given = {"PATH": f"{tmp_path}:{os.environ['PATH']}", "SLURM_JOB_NUM_NODES": "2", "SLURM_JOB_ID": "17"}
    given["SLURM_JOB_NODELIST"] = "node[3-4]"
    words = ["recipes/debug.toml", 'data.shards=["a b"]']
    script = PROJECT / "launch" / "slurm.sbatch"
    done = subprocess.run(["bash", script, *words], env=given, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines() == [
        "2 node3:29500 17",
        "--kill-on-bad-exit=1",
        "launch/torchrun.sh",
        *words,
    ]
    assert subprocess.run(["bash", script], env=given, capture_output=True).returncode == 2
    (log,) = re.findall(r"^#SBATCH --output=(.*)$", script.read_text(), re.MULTILINE)
    assert Path(log).parent == Path()  # SLURM makes no folders, and a checkout has none for runs
