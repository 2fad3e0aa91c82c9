"""Training passes of the minis' networks by `torch.compile` against plain ones, side by side in one run (CPU, bf16).

    CXX=g++ OMP_NUM_THREADS=1 python benchmarks/compiled.py mmface-mini mditface-mini [--batch 48]

Prints the lowest cosine between compiled and plain gradients of a weight, the weights whose compiled gradients are not
finite, and the ratio of times of passes forward and backward. The networks have random weights, with none at zero, and
one mask per sample, absent in every second one. Compiling a network takes 1 to 5 minutes.
"""

from __future__ import annotations

import argparse
from typing import Any

import torch
from side_by_side import median_seconds
from torch.nn import functional as F

from likeness import MDiTFaceTransformer, MMFaceTransformer
from likeness.models.layers import use_explicit_attention
from likeness.types import TextFeatures
from likeness.weights.catalog import find_model

LATENT, TEXT_TOKENS = 16, 32


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="+", choices=("mmface-mini", "mditface-mini"))
    parser.add_argument("--batch", type=int, default=48)
    parser.add_argument("--rounds", type=int, default=9)
    options = parser.parse_args()
    for name in options.models:
        measure(name, options.batch, options.rounds)


def measure(name: str, batch: int, rounds: int) -> None:
    torch.manual_seed(0)
    folder = find_model(name) / "transformer"
    network: Any
    if name == "mmface-mini":
        network = MMFaceTransformer.from_config(MMFaceTransformer.load_config(folder))
        channels, width, pooled = network.config.latent_channels, network.config.text_dim, network.config.text_dim
    else:
        network = MDiTFaceTransformer.from_config(MDiTFaceTransformer.load_config(folder))
        c = network.config
        channels, width, pooled = c.in_channels // 4, c.joint_attention_dim, c.pooled_projection_dim
    for weight in network.parameters():
        torch.nn.init.normal_(weight, std=0.05)
    use_explicit_attention(network.train())
    absent = network.config.condition_names.index("none") if "none" in network.config.condition_names else -1
    index = torch.zeros(batch, 1, dtype=torch.long)  # [B, 1]
    index[1::2] = absent
    text = TextFeatures(torch.randn(batch, TEXT_TOKENS, width), torch.randn(batch, pooled))
    latents, condition, target = torch.randn(3, batch, channels, LATENT, LATENT)  # [B, C, h, w] each
    arguments = (latents, 1000 * torch.rand(batch), text, condition[:, None], index)

    def gradients(forward: Any) -> dict[str, torch.Tensor]:
        network.zero_grad()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = F.mse_loss(forward(*arguments).float(), target)
        loss.backward()
        return {name: weight.grad for name, weight in network.named_parameters() if weight.grad is not None}

    compiled = torch.compile(network, dynamic=False)
    ours, plain = gradients(compiled), gradients(network)
    broken = [name for name, gradient in ours.items() if not gradient.isfinite().all()]
    cosines = {
        name: F.cosine_similarity(ours[name].flatten(), gradient.flatten(), dim=0).item()
        for name, gradient in plain.items()
        if name not in broken
    }
    worst = min(cosines, key=cosines.__getitem__)
    seconds = median_seconds({"compiled": lambda: gradients(compiled), "plain": lambda: gradients(network)}, rounds)
    print(
        f"{name}: lowest cosine of {len(cosines)} weights {cosines[worst]:.5f} ({worst}); not finite: {len(broken)} "
        f"weights; compiled {seconds['compiled']:.3f} s, plain {seconds['plain']:.3f} s, "
        f"ratio {seconds['plain'] / seconds['compiled']:.2f}"
    )


if __name__ == "__main__":
    main()
