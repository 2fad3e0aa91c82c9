"""An accelerator for tests on machines without one: torch's `meta` device, whose tensors here have values.

Operations run on the CPU. As on a real accelerator, an operation raises if its tensors are on different devices, and
NumPy cannot read them. Images and losses can be compared with those of the CPU.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

DEVICE = torch.device("meta")
TENSOR, aten = torch.tensor, torch.ops.aten
MIXED = (aten._to_copy.default, aten.copy_.default, aten.index.Tensor)
"""Operations with tensors on two devices: copies, and indices on the CPU."""


class Remote(torch.Tensor):
    """A tensor on the accelerator; `local` has its values."""

    local: torch.Tensor

    @staticmethod
    def __new__(cls, local: torch.Tensor) -> Remote:
        layout = {"strides": local.stride(), "storage_offset": local.storage_offset()}
        tensor = torch.Tensor._make_wrapper_subclass(cls, local.shape, dtype=local.dtype, device=DEVICE, **layout)
        tensor.local = local
        return tensor

    def __getitem__(self, index: Any) -> torch.Tensor:
        """Make tensors of lists, of which torch makes tensors without values."""
        parts = index if isinstance(index, tuple) else (index,)
        return super().__getitem__(tuple(TENSOR(part) if isinstance(part, list) else part for part in parts))

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        return execute(func, args, kwargs or {})


class Accelerator(TorchDispatchMode):
    """While active, new tensors on the `meta` device have values."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return execute(func, args, kwargs or {})


def execute(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    """Run an operation on the values, after a check of the devices. Numbers may be on the CPU, as elsewhere."""
    tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
    remote = any(isinstance(tensor, Remote) for tensor in tensors)
    assert all(isinstance(tensor, Remote) or not tensor.is_meta for tensor in tensors), f"{func}: no values"
    on_cpu = [tensor for tensor in tensors if not isinstance(tensor, Remote) and tensor.dim()]
    if remote and on_cpu and func not in MIXED:
        raise RuntimeError(f"{func}: tensors on {DEVICE} and on the CPU")
    if kwargs.get("device") is not None:
        remote = torch.device(kwargs["device"]).type == DEVICE.type
        kwargs = {**kwargs, "device": "cpu"}
    local_args, local_kwargs = tree_map_only(Remote, lambda tensor: tensor.local, (args, kwargs))
    result = func(*local_args, **local_kwargs)
    if func._schema.is_mutable:
        return kwargs.get("out", args[0]) if isinstance(result, torch.Tensor) else result
    return tree_map_only(torch.Tensor, Remote, result) if remote else result


def tensor_of(data: Any, device: Any = None, **options: Any) -> torch.Tensor:
    """As `torch.tensor`, which gives tensors on the `meta` device no values."""
    return TENSOR(data, **options).to(device or "cpu")


@contextmanager
def accelerator() -> Iterator[torch.device]:
    """Activate the accelerator in this thread."""
    module = SimpleNamespace(empty_cache=lambda: None, synchronize=lambda: None)
    with patch.object(torch, DEVICE.type, module, create=True), patch.object(torch, "tensor", tensor_of), Accelerator():
        yield DEVICE
