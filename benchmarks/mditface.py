"""What a mask costs MDiTFace: a step without a condition, holistic, hard and decoupled, side by side in one run.

    python benchmarks/mditface.py [--hidden 192 --depth 3 --single-depth 5 --heads 6 --batch 2]

The network of `recipes/mditface_mini.toml` by default, with random weights, at as many spatial as image tokens. Prints
medians of alternating rounds and their ratio to no condition, and how far cached and recomputed outputs differ.
"""

from __future__ import annotations

import argparse

import torch
from side_by_side import median_seconds

from likeness.models.mditface import MDiTFaceTransformer
from likeness.train.networks import rope_axes
from likeness.types import TextFeatures


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hidden", type=int, default=192)
    parser.add_argument("--depth", type=int, default=3, help="double blocks")
    parser.add_argument("--single-depth", type=int, default=5, help="single blocks")
    parser.add_argument("--heads", type=int, default=6)
    parser.add_argument("--latent", type=int, default=16, help="side of the latent")
    parser.add_argument("--tokens", type=int, default=32, help="text tokens")
    parser.add_argument("--batch", type=int, default=2, help="2 is a guided step of one portrait")
    parser.add_argument("--rounds", type=int, default=31)
    options = parser.parse_args()
    b, side, head = options.batch, options.latent, options.hidden // options.heads

    def network(attention: str) -> MDiTFaceTransformer:
        torch.manual_seed(0)
        model = MDiTFaceTransformer(
            in_channels=64,
            num_layers=options.depth,
            num_single_layers=options.single_depth,
            attention_head_dim=head,
            num_attention_heads=options.heads,
            joint_attention_dim=192,
            pooled_projection_dim=192,
            guidance_embeds=False,
            axes_dims_rope=rope_axes(head),
            attention=attention,
            spatial_stream="full",
        )
        for parameter in model.parameters():
            torch.nn.init.normal_(parameter, std=0.05)
        return model.eval()

    latents, time = torch.randn(b, 16, side, side), torch.full((b,), 500.0)
    text = TextFeatures(torch.randn(b, options.tokens, 192), torch.randn(b, 192))
    mask, row = torch.randn(b, 1, 16, side, side), torch.zeros(b, 1, dtype=torch.long)
    models = {name: network(name) for name in ("holistic", "hard", "decoupled")}
    with torch.no_grad():
        caches = {name: models[name].static_cache(text, mask, row) for name in ("hard", "decoupled")}

        def step(name: str) -> torch.Tensor:
            return models[name](latents, time, text, mask, row, static_cache=caches.get(name))

        functions = {"no condition": lambda: models["decoupled"](latents, time, text, mask[:, :0], row[:, :0])}
        functions |= {name: lambda name=name: step(name) for name in models}
        functions["static pathway, once"] = lambda: models["decoupled"].static_cache(text, mask, row)
        seconds = median_seconds(functions, options.rounds)
        print(
            f"{options.depth} + {options.single_depth} blocks of {options.hidden}, batch {b}, "
            f"{options.tokens} text, {side * side // 4} image and as many spatial tokens, "
            f"{torch.get_num_threads()} threads, fp32"
        )
        for name, found in seconds.items():
            print(f"{name:22s} {found * 1e3:7.1f} ms   ratio to no condition {found / seconds['no condition']:.2f}")
        for dtype in (torch.float32, torch.bfloat16):
            for name in ("hard", "decoupled"):
                model = models[name].to(dtype)
                given = (TextFeatures(*(x.to(dtype) for x in text)), mask.to(dtype), row)
                cached = model(latents.to(dtype), time, *given, static_cache=model.static_cache(*given)).float()
                anew = model(latents.to(dtype), time, *given).float()
                difference = ((cached - anew).abs().max() / anew.abs().max()).item()
                print(f"cached against recomputed, {name}, {dtype}: largest relative difference {difference:.1e}")


if __name__ == "__main__":
    main()
