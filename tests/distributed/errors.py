"""One of three ranks on machines of two and one: print the classes of the errors that all ranks raise together."""

from __future__ import annotations

import os

from likeness.parallel import init_world
from likeness.types import InputError, TryAgain

rank = int(os.environ["RANK"])
os.environ["LOCAL_WORLD_SIZE"] = "1" if rank == 2 else "2"
try:
    init_world("hybrid")
except InputError as error:
    print(error)
world = init_world("shard")
for errors in ([TryAgain("locked")], [TryAgain("locked"), InputError("invalid")]):
    try:
        with world.joint_errors():
            if rank < len(errors):
                raise errors[rank]
    except InputError as error:
        print(type(error).__name__)
