"""One of four processes with a fake process group: count how often the gradients of a step of one and of three passes
are reduced within a machine and between the two machines, as JSON, {passes: [reduce-scatter, all-reduce]}.
"""

from __future__ import annotations

import json
from collections import Counter
from typing import Any

import torch
import torch.distributed as dist
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode

from builders import tiny_transformer
from likeness.parallel import World, set_gradient_sync, shard_model
from likeness.types import TextFeatures


class Collectives(TorchDispatchMode):
    """Count collectives by name."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.counts[str(func)] += "c10d" in str(func)
        return func(*args, **(kwargs or {}))


dist.init_process_group("fake", rank=0, world_size=4, store=FakeStore())
mesh = dist.init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicate", "shard"))
model, world = tiny_transformer(), World(size=4, mesh=mesh)
shard_model(model, world, "fp32")
latents, index = torch.zeros(1, 4, 4, 4), torch.zeros(1, 1, dtype=torch.long)
found = {}
for passes in (1, 3):
    with Collectives() as collectives:
        for number in range(passes):
            set_gradient_sync(model, world, last=number == passes - 1)
            text = TextFeatures(torch.zeros(1, 4, 32), torch.zeros(1, 32))
            model(latents, torch.zeros(1), text, latents[:, None], index).sum().backward()
    found[passes] = [
        sum(count for name, count in collectives.counts.items() if kind in name)
        for kind in ("reduce_scatter", "allreduce")
    ]
print(json.dumps(found))
