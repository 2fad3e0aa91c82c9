"""Devices to plan for: their data sheets, and the share of them that training reaches. No torch here.

The share of the peak is assumed, 0.5 of dense bf16 and 0.7 of the memory's bandwidth, not measured; `--plan` on the
machine itself measures (`likeness.train.calibrate`).
"""

from __future__ import annotations

from dataclasses import dataclass

PEAK_SHARE = 0.5
BANDWIDTH_SHARE = 0.7


@dataclass(frozen=True, kw_only=True)
class Device:
    """What a step is priced by."""

    memory: float
    """Bytes."""
    flops: float
    """Floating-point operations a second that matrix products reach."""
    bandwidth: float
    """Bytes a second that the memory gives."""
    launch: float = 3e-6
    """Seconds an operation costs by itself."""
    link: float = 2e10
    """Bytes a second to a neighbour in the same machine."""
    network: float = 5e9
    """Bytes a second a device to another machine."""
    together: int = 8
    """Devices in a machine."""
    base: float = 0.7e9
    """Bytes taken before anything is computed."""
    slack: float = 1.08
    """What allocation wastes."""
    accelerator: bool = True
    """Whether attention is always fused; networks write it out in bf16 training on a CPU."""


def sheet(memory: float, flops: float, bandwidth: float, **rest: float) -> Device:
    """A device from its data sheet: GB, dense bf16 TFLOP/s, GB/s."""
    return Device(
        memory=memory * 1e9,
        flops=flops * 1e12 * PEAK_SHARE,
        bandwidth=bandwidth * 1e9 * BANDWIDTH_SHARE,
        **rest,  # type: ignore[arg-type]
    )


DEVICES = {
    "h200": sheet(141, 989, 4800, link=3.6e11, network=4e10),
    "h100": sheet(80, 989, 3350, link=3.6e11, network=4e10),
    "a100-80": sheet(80, 312, 2039, link=2.4e11, network=2e10),
    "a100-40": sheet(40, 312, 1555, link=2.4e11, network=2e10),
    "rtx-5000-ada": sheet(32, 261, 576, together=2),
    "rtx-4090": sheet(24, 165, 1008, together=2),
}
"""By name."""
