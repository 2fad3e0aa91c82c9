"""One rank of several: runs the command and trains every job of a JSON file, and records errors per rank."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import torch

from likeness.cli import main
from likeness.config import build
from likeness.train import loop
from likeness.train.config import TrainRecipe
from likeness.types import InputError

torch.set_num_threads(1)
torch.compiler.set_stance("force_eager")  # torchao's optimizer would compile for a minute
command, jobs = json.loads(Path(sys.argv[1]).read_text())
main(command)
for values, run in jobs:
    try:
        loop.train(build(TrainRecipe, values), Path(run))
    except InputError as error:
        Path(f"{run}.error.{os.environ['RANK']}").write_text(str(error))
