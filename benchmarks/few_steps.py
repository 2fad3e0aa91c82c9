"""Time whole images of the few-step student, its teacher and a small GAN generator, side by side on one thread.

    python benchmarks/few_steps.py

An image of the pipelines includes encoding prompt and mask, and decoding. The generator is that of SNGAN (Miyato et
al. 2018, table 3) for 128 px with half the channels, unconditional, with random weights: a lower bound for a GAN of its
size.
"""

from __future__ import annotations

import argparse
import itertools
from pathlib import Path

import torch
from side_by_side import median_seconds
from torch import Tensor, nn
from torch.nn import functional as F

import likeness
from likeness.conditions import read_condition
from likeness.encoders.latent import to_pixels

MASK = Path(__file__).parents[1] / "examples/masks/smile.png"
PROMPT = "a smiling woman with blond hair"
STEPS = {"mmface-mini-fast": (4, 2, 1), "mmface-mini": (12,)}


class UpBlock(nn.Module):
    """Residual block that doubles the size."""

    def __init__(self, channels: int, out: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.BatchNorm2d(channels), nn.BatchNorm2d(out)
        self.conv1, self.conv2 = nn.Conv2d(channels, out, 3, padding=1), nn.Conv2d(out, out, 3, padding=1)
        self.shortcut = nn.Conv2d(channels, out, 1)

    def forward(self, x: Tensor) -> Tensor:
        up = F.interpolate(F.relu(self.norm1(x)), scale_factor=2)  # [B, C, 2 h, 2 w]
        residual = self.conv2(F.relu(self.norm2(self.conv1(up))))  # [B, C', 2 h, 2 w]
        return F.interpolate(self.shortcut(x), scale_factor=2) + residual


class Generator(nn.Module):
    """Noise [B, 128] to images [B, 3, 128, 128]."""

    def __init__(self, widths: tuple[int, ...] = (512, 512, 256, 128, 64, 32)) -> None:
        super().__init__()
        self.width = widths[0]
        self.dense = nn.Linear(128, 16 * widths[0])
        self.blocks = nn.Sequential(*(UpBlock(a, b) for a, b in itertools.pairwise(widths)))
        self.norm, self.out = nn.BatchNorm2d(widths[-1]), nn.Conv2d(widths[-1], 3, 3, padding=1)

    def forward(self, noise: Tensor) -> Tensor:
        x = self.dense(noise).unflatten(1, (self.width, 4, 4))  # [B, C, 4, 4]
        return torch.tanh(self.out(F.relu(self.norm(self.blocks(x)))))  # [B, 3, 128, 128]


def main(rounds: int) -> None:
    """Print seconds per image and the ratio to the generator."""
    torch.set_num_threads(1)
    generator, mask = Generator().eval(), read_condition("mask", MASK)[0]
    functions = {"GAN generator": lambda: to_pixels(generator(torch.randn(1, 128)))}
    for model, numbers in STEPS.items():
        pipeline = likeness.load(model)
        for steps in numbers:
            functions[f"{model}, {steps} steps"] = lambda pipeline=pipeline, steps=steps: pipeline(
                PROMPT, control_image={"mask": mask}, num_inference_steps=steps
            )
    with torch.no_grad():
        seconds = median_seconds(functions, rounds)
    parameters = sum(p.numel() for p in generator.parameters()) / 1e6
    print(f"parameters of the generator: {parameters:.1f} million")
    for name, value in seconds.items():
        print(f"{name:28s} {1000 * value:8.1f} ms   ratio {value / seconds['GAN generator']:6.2f}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=15)
    main(parser.parse_args().rounds)
