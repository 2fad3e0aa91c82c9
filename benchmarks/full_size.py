"""Time and memory of the full-size networks on one GPU, with random weights.

    python benchmarks/full_size.py [--device cuda] [--tiny] [--rounds 20] [--out numbers.json]

MMFace-DiT (1.345 B parameters) at 256 and 512 px, and MDiTFace on FLUX.1 (12 B) at 512 px: a step without a condition,
with a mask and recomputed static pathway, and with a mask and cached static pathway. Medians of alternating rounds.
`--tiny` checks the script with small networks.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from side_by_side import median_seconds

from likeness.models.mditface import MDiTFaceTransformer
from likeness.models.mmface import MMFaceTransformer
from likeness.types import TextFeatures

MMFACE = {"hidden_size": 1152, "depth": 28, "heads": 16, "text_dim": 1024, "max_text_tokens": 77}
TINY_MMFACE = {"hidden_size": 64, "depth": 2, "heads": 2, "text_dim": 1024, "max_text_tokens": 77}
TINY_FLUX = {"num_layers": 1, "num_single_layers": 1, "num_attention_heads": 2}


def fill(model: Any, device: str) -> Any:
    """Give a model that was built on the meta device random weights in bfloat16 on a device."""
    model = model.to(torch.bfloat16).to_empty(device=device).eval()
    for tensor in (*model.parameters(), *model.buffers()):
        if tensor.is_floating_point():
            torch.nn.init.normal_(tensor, std=0.02)
    return model


def milliseconds(functions: Mapping[str, Callable[[], object]], rounds: int, device: str) -> dict[str, float]:
    """Return the median milliseconds of each function, on the GPU until its work is done."""

    def until_done(function: Callable[[], object]) -> None:
        function()
        if device.startswith("cuda"):
            torch.cuda.synchronize()

    if device.startswith("cuda"):  # the peak is that of the passes: tied weights are separate until the model is filled
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    timed = {name: partial(until_done, function) for name, function in functions.items()}
    return {name: 1000 * value for name, value in median_seconds(timed, rounds, wall=True).items()}


@torch.no_grad()
def mmface(options: argparse.Namespace) -> dict[str, float]:
    """One pass with a mask at 256 and 512 px."""
    with torch.device("meta"):
        model: Any = MMFaceTransformer(**(TINY_MMFACE if options.tiny else MMFACE))
    model, functions = fill(model, options.device), {}
    for size in (256, 512):
        side, tensor = size // 8, {"device": options.device, "dtype": torch.bfloat16}
        inputs = (
            torch.randn(1, 16, side, side, **tensor),
            torch.full((1,), 500.0, device=options.device),
            TextFeatures(torch.randn(1, 77, 1024, **tensor), torch.randn(1, 1024, **tensor)),
            torch.randn(1, 1, 16, side, side, **tensor),
            torch.zeros(1, 1, dtype=torch.long, device=options.device),
        )
        rope = model.rope(side, side, 77, options.device)
        functions[f"MMFace-DiT, {size} px, ms"] = lambda inputs=inputs, rope=rope: model(*inputs, rope=rope)
    return milliseconds(functions, options.rounds, options.device)


@torch.no_grad()
def mditface(options: argparse.Namespace) -> dict[str, float]:
    """One step at 512 px without and with a mask."""
    with torch.device("meta"):
        model: Any = MDiTFaceTransformer(
            condition_names=("mask",),
            attention="decoupled",
            spatial_stream="lora",
            **(TINY_FLUX if options.tiny else {}),
        )
    model, tensor = fill(model, options.device), {"device": options.device, "dtype": torch.bfloat16}
    model.tie_weights()
    latents, time = torch.randn(1, 16, 64, 64, **tensor), torch.full((1,), 500.0, device=options.device)
    text = TextFeatures(torch.randn(1, 512, 4096, **tensor), torch.randn(1, 768, **tensor))
    mask, index = torch.randn(1, 1, 16, 64, 64, **tensor), torch.zeros(1, 1, dtype=torch.long, device=options.device)
    cache = model.static_cache(text, mask, index)
    functions = {
        "MDiTFace, no condition, ms": lambda: model(latents, time, text, mask[:, :0], index[:, :0]),
        "MDiTFace, mask, recomputed, ms": lambda: model(latents, time, text, mask, index, all_present=True),
        "MDiTFace, mask, cached, ms": lambda: model(
            latents, time, text, mask, index, all_present=True, static_cache=cache
        ),
    }
    return milliseconds(functions, options.rounds, options.device)


def main() -> None:
    """Print and write the numbers."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    gpu = options.device.startswith("cuda")
    numbers: dict[str, Any] = {"device": torch.cuda.get_device_name() if gpu else "CPU", "torch": torch.__version__}
    for name, measure in (("MMFace-DiT", mmface), ("MDiTFace", mditface)):
        numbers |= measure(options)
        if gpu:
            numbers[f"{name}, peak memory, GiB"] = torch.cuda.max_memory_allocated() / 2**30
        if options.out:
            options.out.write_text(json.dumps(numbers, indent=1))
    for name, value in numbers.items():
        print(f"{name:36s} {value if isinstance(value, str) else round(value, 2)}")


if __name__ == "__main__":
    main()
