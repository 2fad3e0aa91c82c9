"""Compare diffusers' caches between steps: quality against time, side by side on one thread.

    python benchmarks/caching.py

For every cache, images of the bundled masks: CPU time and PSNR relative to the image without cache, and the fraction of
the mask's pixels that the bundled face parser finds again. MagCache's ratios are calibrated first, on one image.
"""

from __future__ import annotations

import argparse
import ast
import contextlib
import io
import time
from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import (
    FasterCacheConfig,
    FirstBlockCacheConfig,
    MagCacheConfig,
    PyramidAttentionBroadcastConfig,
    TaylorSeerCacheConfig,
)

import likeness
from likeness.annotators.face_parser import load_face_parser, parse_faces
from likeness.conditions import read_condition

MASKS = sorted((Path(__file__).parents[1] / "examples/masks").glob("*.png"))
PROMPT = "a portrait of a person"
BLOCKS = [r".*blocks\.\d+"]


def calibrated(pipeline: Any, steps: int) -> list[float]:
    """Return MagCache's ratios of a model, which diffusers prints at the end of a call."""
    pipeline.transformer.enable_cache(MagCacheConfig(calibrate=True, num_inference_steps=steps))
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        generate(pipeline, MASKS[0], steps, 1.0)
    pipeline.transformer.disable_cache()
    return ast.literal_eval(printed.getvalue().strip().splitlines()[-1])


def configurations(pipeline: Any, steps: int) -> dict[str, Any]:
    """Return name -> configuration of a cache, None without."""
    found: dict[str, Any] = {"none": None}
    for threshold in (0.05, 0.1, 0.2):
        found[f"FirstBlockCache, threshold {threshold}"] = FirstBlockCacheConfig(threshold=threshold)
    ratios = calibrated(pipeline, steps)
    for threshold in (0.06, 0.12, 0.24):
        config = MagCacheConfig(threshold=threshold, mag_ratios=ratios, num_inference_steps=steps)
        found[f"MagCache, threshold {threshold}"] = config
    for interval in (2, 3):
        options: Any = {"cache_interval": interval, "cache_identifiers": BLOCKS, "taylor_factors_dtype": torch.float32}
        found[f"TaylorSeer, interval {interval}"] = TaylorSeerCacheConfig(**options)
    for skip in (2, 3):
        options = {
            "spatial_attention_block_skip_range": skip,
            "current_timestep_callback": lambda: pipeline.current_timestep,
        }
        found[f"PyramidAttentionBroadcast, range {skip}"] = PyramidAttentionBroadcastConfig(**options)
        found[f"FasterCache, range {skip}"] = FasterCacheConfig(is_guidance_distilled=True, **options)
    return found


def generate(pipeline: Any, mask: Path, steps: int, guidance: float | None = None) -> np.ndarray:
    """Generate an image of a mask, uint8 [H, W, 3]."""
    options = {"num_inference_steps": steps, "guidance_scale": guidance, "generator": torch.Generator().manual_seed(0)}
    return np.asarray(pipeline(PROMPT, control_image={"mask": read_condition("mask", mask)[0]}, **options).images[0])


def main(model: str, count: int, steps: int | None) -> None:
    """Print a row for each cache."""
    torch.set_num_threads(1)
    pipeline, (parser, side) = likeness.load(model), load_face_parser()
    steps = steps or pipeline.config.defaults["steps"]
    rows: dict[str, list[tuple[float, float, float]]] = defaultdict(list)
    found = configurations(pipeline, steps)
    for mask in MASKS[:count]:
        labels, plain, plain_time = None, None, 1.0
        for name, config in found.items():
            if config is not None:
                pipeline.transformer.enable_cache(config)
            start = time.process_time()
            image = generate(pipeline, mask, steps)
            seconds = time.process_time() - start
            if config is None:
                plain, plain_time = image.astype(float), seconds
                raw = read_condition("mask", mask)[0].raw
                nearest = (np.arange(image.shape[0]) + 0.5) * len(raw) / image.shape[0]
                labels = raw[np.ix_(nearest.astype(int), nearest.astype(int))]
            else:
                pipeline.transformer.disable_cache()
            error = np.mean((image - plain) ** 2)
            accuracy = (parse_faces(parser, [image], size=side)[0] == labels).mean()
            rows[name].append((seconds / plain_time, error, float(accuracy)))
    print(f"{model}, {steps} steps, {count} images\n{'cache':<40}{'time':>8}{'PSNR':>8}{'mask':>8}")
    for name, values in rows.items():
        ratio, error, accuracy = np.array(values).T
        quality = 10 * np.log10(255**2 / error.mean()) if error.any() else np.inf
        print(f"{name:<40}{np.median(ratio):8.2f}{quality:8.1f}{np.mean(accuracy):8.3f}")


if __name__ == "__main__":
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--models", nargs="+", default=["mmface-mini", "mditface-mini"], help="models")
    arguments.add_argument("--count", type=int, default=8, help="number of images")
    arguments.add_argument("--steps", type=int, help="sampling steps. Default: those of the model")
    options = arguments.parse_args()
    for each in options.models:
        with torch.no_grad():
            main(each, options.count, options.steps)
