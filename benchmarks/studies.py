"""Small training studies of the design of MDiTFace: own or shared matrices for conditions; rank and targets of a LoRA.

python benchmarks/studies.py --shards data/shards/celeba --test data/shards/test --images 20000 --base-images 40000

Networks are 128 wide and 6 deep. `own` and `shared` are trained on masks from random weights. For the LoRAs, a base is
trained without conditions, like a small FLUX, and frozen. The result is the loss on held-out faces with the right mask,
another face's and none (`condition_losses.py`). Without --shards, faces are synthetic. Run the same command again
to resume.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

from condition_losses import condition_losses
from safetensors.torch import load_file

import likeness
from likeness.cli import main as command
from likeness.cli.terminal import quiet_libraries
from likeness.config import build
from likeness.data.store import Store
from likeness.files import write_whole
from likeness.pipelines.adapters import WEIGHTS
from likeness.train.config import TrainRecipe
from likeness.train.loop import train

NETWORK = {"name": "mditface", "hidden_size": 128, "depth": 2, "single_depth": 4, "heads": 4}
SIZE = 128
MASKS, TEXT_ONLY = {"mask": 0.8, "none": 0.2}, {"none": 1.0}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shards", nargs="*", default=[], help="shards of the training faces; synthetic by default")
    parser.add_argument("--test", help="shards of held-out faces, encoded by the same autoencoder")
    parser.add_argument("--components", help="components that encoded the shards; the bundled ones by default")
    parser.add_argument("--faces", type=int, default=2000, help="number of synthetic faces")
    parser.add_argument("--images", type=int, default=20_000, help="training images of each LoRA")
    parser.add_argument("--base-images", type=int, default=40_000, help="training images of base, `own` and `shared`")
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--ranks", type=int, nargs="*", default=[2, 4, 8, 16, 32])
    parser.add_argument("--count", type=int, default=200, help="number of held-out faces")
    parser.add_argument("--threads", type=int, help="CPU threads")
    parser.add_argument("--compile", action="store_true", help="use torch.compile; takes 1 to 2 minutes per network")
    parser.add_argument("--out", type=Path, default=Path("runs/studies"))
    options = parser.parse_args()
    quiet_libraries()
    if not options.shards:
        options.shards = [str(synthetic_shards(options, options.faces, 0))]
        options.test = str(synthetic_shards(options, options.count, 1))
    elif not options.test:
        parser.error("--shards requires --test: losses are measured on held-out faces")

    rows = [
        study(options, name, {**NETWORK, "spatial_stream": stream}, MASKS, options.base_images)
        for name, stream in (("own", "full"), ("shared", "lora"))
    ]
    base = options.out / "base"
    train(recipe(options, {**NETWORK, "spatial_stream": "lora"}, TEXT_ONLY, options.base_images), base)
    for targets in ("spatial", "all"):
        for rank in options.ranks:
            lora = {"name": "mditface_adapter", "base": str(base / "model"), "gradient_checkpointing": False}
            lora |= {"rank": rank, "alpha": rank, "targets": targets}
            rows.append(study(options, f"lora-{targets}-{rank}", lora, MASKS, options.images))

    print(f"\nloss on {options.count} held-out faces, by mask; LoRAs on a base of {options.base_images} images")
    print(f"{'':16}  {'images':>8}  {'trainable':>9}  {'share':>7}  {'right':>6}  {'shuffled':>8}  {'none':>6}")
    for row in rows:
        print(
            f"{row['name']:16}  {row['images']:8}  {row['trained']:9}  {row['share']:7.2%}  "
            f"{row['right']:6.4f}  {row['shuffled']:8.4f}  {row['none']:6.4f}"
        )


def study(
    options: argparse.Namespace, name: str, network: dict[str, Any], probabilities: dict[str, float], images: int
) -> dict[str, Any]:
    """Train and measure a network; return a row of the table. `share` is relative to the frozen parameters."""
    run = options.out / name
    result = run / f"result-{images}-{options.count}.json"
    if not result.is_file():
        print(f"{name}:", flush=True)
        start = time.monotonic()
        model = train(recipe(options, network, probabilities, images), run)
        print(f"{name}: {time.monotonic() - start:.0f} s", flush=True)
        pipeline = likeness.load(model)
        total = sum(parameter.numel() for parameter in pipeline.transformer.parameters())
        adapter = model / WEIGHTS
        trained = sum(value.numel() for value in load_file(adapter).values()) if adapter.is_file() else total
        share = trained / (total - trained or total)
        losses = condition_losses(pipeline, Store(options.test), "mask", count=options.count)
        row = {"name": name, "images": images, "trained": trained, "share": share, **losses}
        write_whole(result, json.dumps(row, indent=2))
    return json.loads(result.read_text())


def recipe(
    options: argparse.Namespace, network: dict[str, Any], probabilities: dict[str, float], images: int
) -> TrainRecipe:
    """Return the recipe: Muon for full networks, as for the bundled model; AdamW for LoRAs."""
    full = network["name"] == "mditface"
    data = {"shards": options.shards, "condition_probabilities": probabilities, "text_dropout": 0.1}
    values: dict[str, Any] = {
        "network": network,
        "objective": {"name": "rectified_flow", "time_sampling": "logit_normal"},
        "data": data | ({"components": options.components} if options.components else {}),
        "optimizer": {
            "name": "muon" if full else "adamw",
            "images": images,
            "batch": options.batch,
            "learning_rate": 1.5e-3 if full else 1e-3,
            "warmup": images // 20,
            "decay": "linear",
        },
        "defaults": {"size": SIZE, "steps": 20, "guidance_scale": 2.0},
        "threads": options.threads,
        "compile": options.compile,
        "log_every": max(images // 10, options.batch),
        "checkpoint_every": max(images // 5, options.batch),
    }
    return build(TrainRecipe, values)


def synthetic_shards(options: argparse.Namespace, count: int, seed: int) -> Path:
    """Write shards of synthetic faces."""
    folder = options.out / f"faces-{seed}"
    components = ["--components", options.components] if options.components else []
    command(["prepare", "synthetic", str(folder), "--count", str(count), "--seed", str(seed), "--size", str(SIZE)])
    encode = ["prepare", "encode", str(folder), str(folder / "shards"), "--size", str(SIZE), "--precision", "bf16"]
    command([*encode, *components])
    return folder / "shards"


if __name__ == "__main__":
    main()
