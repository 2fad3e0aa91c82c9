"""The measured quality of the bundled model, as its card has it.

likeness prepare synthetic data/synthetic_test --count 512 --seed 1
likeness prepare encode data/synthetic_test data/shards_test
python benchmarks/mini.py data/synthetic_test data/shards_test [more prepared folders for the autoencoder]
"""

from __future__ import annotations

import argparse
from pathlib import Path

import likeness
from likeness.data.folder import read_folder
from likeness.data.store import Store
from likeness.train.components.autoencoder import measure
from likeness.train.validate import condition_losses

SIZE = 128
FACES = 256


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("faces", type=Path)
    parser.add_argument("shards", type=Path)
    parser.add_argument("more", type=Path, nargs="*")
    options = parser.parse_args()
    pipeline = likeness.load()
    for folder in (options.faces, *options.more):
        found = measure(pipeline.vae, read_folder(folder)[:FACES], SIZE)
        classes = {name.removeprefix("labels_"): v for name, v in found.items() if name.startswith("labels_")}
        print(
            f"autoencoder on {folder.name}: {found['psnr']:.2f} dB, mean of {found['pictures']} pictures at {SIZE} px"
        )
        if classes:
            worst = ", ".join(f"{name} {share:.2f}" for name, share in sorted(classes.items(), key=lambda c: c[1])[:3])
            print(f"  labels that survive: {found['labels']:.3f}; worst: {worst}")
    store = Store(options.shards)
    for condition in ("mask", "sketch", "keypoints"):
        losses = condition_losses(pipeline, store, condition, count=FACES)
        told = ", ".join(f"{name} {value:.3f}" for name, value in losses.items())
        print(f"loss with {condition}, n = {FACES}: {told}")


if __name__ == "__main__":
    main()
