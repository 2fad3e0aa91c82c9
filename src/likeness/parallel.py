"""Distributed training on one or many machines with FSDP.

Ranks form a (replicate, shard) mesh: weights, gradients and optimizer states are sharded along `shard` and replicated
along `replicate`, so that `fully_shard` provides data parallelism, sharding, or both. A single process has no mesh and
runs the plain modules: its results are bit-identical to those without this module.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor

from likeness.device import choose_precision
from likeness.types import InputError, TryAgain

Sharding = Literal["replicate", "shard", "hybrid"]


@dataclass(frozen=True, kw_only=True)
class World:
    """The processes of a training, and the rank of this one."""

    rank: int = 0
    """Rank of this process."""
    size: int = 1
    """Number of processes."""
    device: str = "cpu"
    """Device of this process."""
    mesh: DeviceMesh | None = None
    """(replicate, shard); None for a single process."""

    @property
    def main(self) -> bool:
        """Whether this process writes files and reports."""
        return self.rank == 0

    @property
    def device_type(self) -> str:
        """The device without its number, for autocast."""
        return torch.device(self.device).type

    def autocast(self, precision: str) -> torch.autocast:
        """A context that computes in this precision; for `auto` see `choose_precision`."""
        enabled = choose_precision(precision, self.device_type) == "bf16"
        return torch.autocast(self.device_type, torch.bfloat16, enabled=enabled)

    def all_true(self, good: bool) -> bool:
        """Return whether `good` is True on all ranks. Communication on the CPU avoids waiting for an accelerator."""
        bad = torch.tensor(float(not good))
        return not mean_over_ranks(bad, self).item()

    @contextmanager
    def joint_errors(self) -> Iterator[None]:
        """Raise an `InputError` of one rank within a `with` block on all ranks at its end, so that none waits for a
        rank that has stopped. All raise `TryAgain` if no rank has another error.
        """
        problem = None
        try:
            yield
        except InputError as error:
            problem = error
        good = self.all_true(problem is None)
        temporary = self.all_true(problem is None or isinstance(problem, TryAgain))
        if good:
            return
        if problem is None or isinstance(problem, TryAgain) != temporary:
            message = str(problem or "another process stopped with an error; see its message")
            raise (TryAgain if temporary else InputError)(message) from problem
        raise problem


SINGLE_PROCESS = World()


def rank_and_world() -> tuple[int, int]:
    """Return rank and number of processes from the environment variables RANK and WORLD_SIZE, as torchrun sets them.

    Raises:
        InputError: they are not valid.
    """
    values = os.environ.get("RANK", "0"), os.environ.get("WORLD_SIZE", "1")
    if not all(text.isdigit() for text in values) or not int(values[0]) < int(values[1]):
        raise InputError(
            f"RANK is {values[0]} and WORLD_SIZE {values[1]}: the rank must count from 0 to WORLD_SIZE - 1"
        )
    return int(values[0]), int(values[1])


def init_world(sharding: Sharding = "shard") -> World:
    """Join the processes that `torchrun` started; without it, return a world of one process.

    Args:
        sharding: how weights are distributed over the ranks (`mesh_shape`).

    Raises:
        InputError: this number of ranks does not support it, or the environment variables of torchrun are missing.
    """
    cuda = torch.cuda.is_available()
    _, size = rank_and_world()
    if size == 1:
        return World(device="cuda" if cuda else "cpu")
    for name in ("LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        value = os.environ.get(name, "")
        if not value or (name != "MASTER_ADDR" and not value.isdigit()):
            raise InputError(f"WORLD_SIZE is {size}, but {name} is {value!r}: start the processes with torchrun")
    local = int(os.environ["LOCAL_RANK"])
    if cuda:
        torch.cuda.set_device(local)
    if not dist.is_initialized():
        dist.init_process_group("cpu:gloo,cuda:nccl" if cuda else "gloo")
    machine = torch.tensor(int(os.environ.get("LOCAL_WORLD_SIZE", size)))
    machines = [torch.empty_like(machine) for _ in range(size)]
    dist.all_gather(machines, machine)
    shape = mesh_shape(sharding, [int(count) for count in machines])
    mesh = init_device_mesh("cuda" if cuda else "cpu", shape, mesh_dim_names=("replicate", "shard"))
    return World(rank=dist.get_rank(), size=size, device=f"cuda:{local}" if cuda else "cpu", mesh=mesh)


def mesh_shape(sharding: Sharding, machines: Sequence[int]) -> tuple[int, int]:
    """Return the ranks along (replicate, shard): `replicate` replicates everything on each rank, `shard` shards it over
    all ranks, `hybrid` shards it within a machine and replicates it on each machine. `machines` are the numbers of
    ranks on the machine of each rank.

    Raises:
        InputError: hybrid, and machines of unequal size.
    """
    size, sizes = len(machines), sorted(set(machines))
    if sharding == "hybrid" and (len(sizes) > 1 or size % sizes[0]):
        raise InputError(
            f"hybrid sharding needs machines of equal size, but {size} processes are on machines of "
            f"{' and '.join(map(str, sizes))}: use shard or replicate"
        )
    shard = {"replicate": 1, "shard": size, "hybrid": sizes[0]}[sharding]
    return size // shard, shard


def shard_model(model: Any, world: World, precision: str) -> None:
    """Shard a network over the mesh, block by block; it must have the same weights on every rank.

    Weights stay float32. In bf16, they are communicated and used in bf16, and gradients are reduced in float32. Inputs
    are not cast, since times are float32.
    """
    if world.mesh is None:
        return
    dtype = torch.bfloat16 if precision == "bf16" else None
    policy = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32, cast_forward_inputs=False)
    blocks = [module for module in model.modules() if type(module).__name__ in (model._no_split_modules or ())]
    for module in (*blocks, model):
        fully_shard(module, mesh=world.mesh, mp_policy=policy)


def reshard(model: nn.Module) -> None:
    """Reshard the outermost weights after forward passes without a backward pass, at whose end FSDP does this."""
    if isinstance(model, FSDPModule):
        model.reshard()


def set_gradient_sync(model: nn.Module, world: World, last: bool) -> None:
    """Configure the next backward pass. Replicas reduce their gradients after the last pass of a step; sharded
    gradients are reduced after every pass, so that no rank stores unsharded ones.
    """
    if isinstance(model, FSDPModule) and world.mesh is not None:
        model.set_requires_gradient_sync(last or world.mesh.size(1) > 1)
        if world.mesh.size(0) > 1:
            model.set_requires_all_reduce(last)


def mean_over_ranks(values: Tensor, world: World) -> Tensor:
    """Return the mean over all ranks. Call on every rank."""
    if world.size > 1:
        values = values.detach().clone()
        dist.all_reduce(values)
        values /= world.size
    return values


def full_tensor(tensor: Tensor) -> Tensor:
    """Return a possibly sharded tensor unsharded. Call on every rank."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def gather(tensors: Mapping[str, Tensor], world: World) -> dict[str, Tensor]:
    """Return unsharded tensors on the main process's CPU, nothing on the others. Call on every rank."""
    pieces: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        value = full_tensor(tensor)
        if world.main:
            pieces[name] = value.detach().cpu()
    return pieces


def local_tensor(tensor: Tensor) -> Tensor:
    """Return this rank's part of a tensor, which shares its memory, for elementwise operations."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor
