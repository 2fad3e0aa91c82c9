"""One program on one CPU or on many machines: torch's own distribution, and nothing else knows of ranks.

Ranks form a (replicate, shard) mesh: weights, gradients and optimizer states are spread along `shard` and repeated
along `replicate`, so that one mechanism (`fully_shard`) is data parallelism, sharding, or both. A single process has no
mesh and runs the plain modules: its bits are those of a program without this file.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor

from likeness.types import InputError

Layout = Literal["replicate", "shard", "hybrid"]


@dataclass(frozen=True, kw_only=True)
class World:
    """The processes that train together, and this one's place among them."""

    rank: int = 0
    """This process."""
    size: int = 1
    """How many there are."""
    device: str = "cpu"
    """Where this process computes."""
    mesh: DeviceMesh | None = None
    """(replicate, shard); None for a single process."""

    @property
    def main(self) -> bool:
        """Whether this process writes files and speaks."""
        return self.rank == 0

    @property
    def kind(self) -> str:
        """The device without its number, for autocast."""
        return torch.device(self.device).type

    def wait(self) -> None:
        """Until every process is here."""
        if self.size > 1:
            dist.barrier()

    def agree(self, good: bool) -> bool:
        """Whether all processes say so. They tell one another on the CPU: no accelerator is waited for."""
        bad = torch.tensor(float(not good))
        return not mean_over_ranks(bad, self).item()

    @contextmanager
    def together(self) -> Iterator[None]:
        """What is refused in one process within a `with` block is refused in all at its end, so that none waits for one
        that has stopped.
        """
        problem = None
        try:
            yield
        except InputError as error:
            problem = error
        if not self.agree(problem is None):
            raise problem or InputError("another process was refused; its message says why")


ALONE = World()


def rank_and_world() -> tuple[int, int]:
    """This process's number and how many there are, as torchrun and its like tell: RANK and WORLD_SIZE.

    Raises:
        InputError: they are no such numbers.
    """
    told = os.environ.get("RANK", "0"), os.environ.get("WORLD_SIZE", "1")
    if not all(text.isdigit() for text in told) or not int(told[0]) < int(told[1]):
        raise InputError(f"RANK is {told[0]} and WORLD_SIZE {told[1]}: the rank must count from 0 to WORLD_SIZE - 1")
    return int(told[0]), int(told[1])


def begin(layout: Layout = "shard") -> World:
    """Join the processes that `torchrun` started, or be alone.

    Args:
        layout: how weights lie on the ranks (`mesh_shape`).

    Raises:
        InputError: the ranks cannot be laid out so.
    """
    cuda = torch.cuda.is_available()
    _, size = rank_and_world()
    if size == 1:
        return World(device="cuda" if cuda else "cpu")
    local = int(os.environ["LOCAL_RANK"])
    if cuda:
        torch.cuda.set_device(local)
    if not dist.is_initialized():
        dist.init_process_group("cpu:gloo,cuda:nccl" if cuda else "gloo")
    shape = mesh_shape(layout, size, int(os.environ.get("LOCAL_WORLD_SIZE", size)))
    mesh = init_device_mesh("cuda" if cuda else "cpu", shape, mesh_dim_names=("replicate", "shard"))
    return World(rank=dist.get_rank(), size=size, device=f"cuda:{local}" if cuda else "cpu", mesh=mesh)


def mesh_shape(layout: Layout, size: int, local: int) -> tuple[int, int]:
    """Ranks along (replicate, shard): `replicate` repeats everything on each rank, `shard` spreads it over all ranks,
    `hybrid` spreads it within a machine of `local` ranks and repeats it on each machine.

    Raises:
        InputError: hybrid, and machines of unequal size.
    """
    if layout == "hybrid" and size % local:
        raise InputError(f"layout hybrid needs machines of equal size: {size} processes are no multiple of {local}")
    shard = {"replicate": 1, "shard": size, "hybrid": local}[layout]
    return size // shard, shard


def shard_model(model: Any, world: World, precision: Literal["bf16", "fp32"]) -> None:
    """Spread a network over the mesh, block by block; it must have the same weights in every process.

    Weights stay float32; in bf16 they travel and compute as such, and gradients are added up in float32. Inputs are not
    cast: times are float32.
    """
    if world.mesh is None:
        return
    dtype = torch.bfloat16 if precision == "bf16" else None
    policy = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32, cast_forward_inputs=False)
    blocks = [module for module in model.modules() if type(module).__name__ in (model._no_split_modules or ())]
    for module in (*blocks, model):
        fully_shard(module, mesh=world.mesh, mp_policy=policy)
    if hasattr(model, "static_cache"):  # the other way into a network
        register_fsdp_forward_method(model, "static_cache")


def spread_again(model: nn.Module) -> None:
    """After passes without a backward one, whose end does this: spread the outermost weights over the ranks again."""
    if isinstance(model, FSDPModule):
        model.reshard()


def synchronise(model: nn.Module, world: World, last: bool) -> None:
    """Say before a backward pass whether it is the last of its step. Replicas add up their gradients once a step; where
    gradients are spread they are spread after every pass, so that no rank holds a whole one.
    """
    if isinstance(model, FSDPModule) and world.mesh is not None:
        model.set_requires_gradient_sync(last or world.mesh.size(1) > 1)
        if world.mesh.size(0) > 1:
            model.set_requires_all_reduce(last)


def mean_over_ranks(values: Tensor, world: World) -> Tensor:
    """The mean over all processes, in every one of them."""
    if world.size > 1:
        values = values.detach().clone()
        dist.all_reduce(values)
        values /= world.size
    return values


def whole(tensor: Tensor) -> Tensor:
    """A tensor that may be spread over ranks, in one piece; every process must ask."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def gather(tensors: Mapping[str, Tensor], world: World) -> dict[str, Tensor]:
    """Tensors in one piece on the main process's CPU, one at a time; nothing on the others."""
    pieces: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        value = whole(tensor)
        if world.main:
            pieces[name] = value.detach().cpu()
    return pieces


def own(tensor: Tensor) -> Tensor:
    """This rank's part of a tensor, sharing its memory: for what is done element by element."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor
