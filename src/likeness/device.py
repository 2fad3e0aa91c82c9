"""Choose where a command computes and in which number format.

One function for every `--device`: a name is checked against the hardware that PyTorch can use, `auto` is resolved to
the accelerator or the CPU. It imports torch only, not torch.distributed, so that commands start quickly.
"""

from __future__ import annotations

import os
from typing import Literal

import torch

from likeness.files import first_line
from likeness.types import InputError

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
"""Name on the command line -> torch's number format."""


def choose_device(device: str | torch.device | None) -> str:
    """Resolve a device name.

    Args:
        device: `auto` takes CUDA, MPS or XPU if present, else the CPU; None is the CPU; or a device or its name, such
            as `cuda`, `cuda:1`, `mps` or `cpu`. Without an index, each process that torchrun started takes an
            accelerator of its own, by LOCAL_RANK.

    Returns:
        A device that works here, such as `cpu`, `mps` or `cuda:0`.

    Raises:
        InputError: the device is not available, or computations on it fail. The message lists the available ones.
    """
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    kind, count = ("cpu", 0) if accelerator is None else (accelerator.type, torch.accelerator.device_count())
    available = [*(f"{kind}:{index}" for index in range(count)), "cpu"]
    device = "cpu" if device is None else str(device)
    chosen = kind if device == "auto" else device
    rank = os.environ.get("LOCAL_RANK", os.environ.get("RANK"))
    if chosen == kind and count and rank is not None:
        chosen = f"{kind}:{int(rank) % count}"
    if chosen not in (kind, *available):
        raise InputError(f"Device {device!r} is not available. Available: {', '.join(available)}")
    try:
        torch.ones(1, device=chosen).add(1)  # this build of PyTorch may lack kernels for the GPU that it finds
    except (RuntimeError, AssertionError) as error:
        raise InputError(f"Device {chosen!r} does not work: {first_line(error)}. Use another, such as cpu") from error
    return chosen


def choose_dtype(dtype: torch.dtype | str, device: str) -> torch.dtype:
    """Resolve a number format.

    Args:
        dtype: a format, its name on the command line or in PyTorch, or `auto`: float32 on a CPU; on an accelerator
            bfloat16 if it supports that, else float16.
        device: what `choose_device` returned.

    Raises:
        InputError: the name is unknown.
    """
    if isinstance(dtype, torch.dtype):
        return dtype
    names = DTYPES | {str(value).removeprefix("torch."): value for value in DTYPES.values()}
    if dtype != "auto":
        if dtype not in names:
            raise InputError(f"Unknown dtype {dtype!r}. Available: auto, {', '.join(names)}")
        return names[dtype]
    if device == "cpu":
        return torch.float32
    return torch.bfloat16 if supports_bf16(device) else torch.float16


def choose_precision(precision: str, device: str) -> Literal["bf16", "fp32"]:
    """Resolve the precision of a training: `auto` is bf16 on a device that multiplies bfloat16 matrices itself, else
    fp32; `bf16` and `fp32` stay.
    """
    return "bf16" if precision == "bf16" or (precision == "auto" and supports_bf16(device)) else "fp32"


def supports_bf16(device: str) -> bool:
    """Return whether a device multiplies bfloat16 matrices itself. A processor that cannot emulates it, several times
    slower than float32.
    """
    if device == "cpu":
        return any(present is True for name, present in torch.cpu.get_capabilities().items() if name.endswith("bf16"))
    if device.startswith("cuda"):
        return torch.cuda.is_bf16_supported(including_emulation=False)
    try:
        matrix = torch.ones(2, 2, dtype=torch.bfloat16, device=device)
        matrix.mm(matrix)
    except (RuntimeError, TypeError):
        return False
    return True
