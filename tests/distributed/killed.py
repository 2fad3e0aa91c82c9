"""Train in child processes that are killed at given moments, then in one that finishes.

    killed.py recipe.json RUN MOMENT...      MOMENT: kill when a path of this pattern below RUN appears

The children are forked: imports take longer than the training.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from pathlib import Path

import torch

from likeness.config import build
from likeness.train import loop
from likeness.train.config import TrainRecipe

torch.set_num_threads(1)
recipe = build(TrainRecipe, json.loads(Path(sys.argv[1]).read_text()))
run = Path(sys.argv[2])
for moment in (*sys.argv[3:], None):
    child = os.fork()
    if not child:
        loop.train(recipe, run)
        os._exit(0)
    while moment and not any(run.glob(moment)):
        time.sleep(0.0005)
        if os.waitpid(child, os.WNOHANG)[0]:
            sys.exit(f"training ended before {moment} appeared")
    if moment:
        os.kill(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    if moment is None and status:
        sys.exit("the last training failed")
    print(moment, status, sorted(path.name for path in (run / "checkpoints").glob("*")), flush=True)
