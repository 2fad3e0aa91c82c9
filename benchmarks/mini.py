"""Measure the bundled model as its model card reports it: reconstruction by the autoencoder, loss with and without
conditions, and `likeness evaluate` with networks that did not annotate the training data.

python benchmarks/mini.py data/celeba/test --shards data/shards/test --photos data/celebamask/test \
    --face-parser runs/face_parser_evaluator --text-image runs/text_image_evaluator --train data/celeba/train \
    --out runs/mini

Run the same command again to resume.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from condition_losses import condition_losses

import likeness
from likeness.data.folder import read_folder
from likeness.data.store import Store
from likeness.evaluate.protocol import BUNDLED, Protocol
from likeness.evaluate.report import numbers_table, write_report
from likeness.evaluate.run import evaluate
from likeness.pages import markdown_table
from likeness.train.components.autoencoder import measure

SIZE = 128


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("faces", type=Path, help="prepared folder of held-out faces")
    parser.add_argument("--model", default="mmface-mini")
    parser.add_argument("--count", type=int, default=1000, help="maximum number of faces")
    parser.add_argument("--shards", type=Path, help="shards of the faces, to measure the loss")
    parser.add_argument("--photos", type=Path, nargs="*", default=[], help="folders to measure the autoencoder")
    parser.add_argument("--face-parser", default=BUNDLED, help="training run of a face parser")
    parser.add_argument("--text-image", default=BUNDLED, help="training run of a text-image pair")
    parser.add_argument("--landmarker", help="MediaPipe's face_landmarker.task, to measure the keypoint error")
    parser.add_argument("--train", help="folder of the training faces, to find the nearest neighbors")
    parser.add_argument("--out", type=Path, help="folder of the evaluation; without it, no evaluation")
    options = parser.parse_args()
    pipeline = likeness.load(options.model)
    for folder in options.photos:
        measure_autoencoder(pipeline, folder)
    if options.shards:
        measure_losses(pipeline, options.shards, options.count)
    if options.out:
        protocol = Protocol(
            count=options.count,
            face_parser=options.face_parser,
            text_image=options.text_image,
            landmarker=options.landmarker,
            train=options.train,
        )
        progress = lambda task, done, total: done % 50 or print(f"  {task}: {done} of {total}", flush=True)  # noqa: E731
        results = evaluate(
            options.faces, options.out, protocol, pipeline=pipeline, model=options.model, progress=progress
        )
        if results is not None:  # rank 0
            write_report(results, options.out)
            print(markdown_table(numbers_table(results)))
            print(options.out / "report.html")


def measure_autoencoder(pipeline: Any, folder: Path) -> None:
    """Print PSNR and the labels that a face parser recovers after encoding and decoding."""
    found = measure(pipeline.vae, read_folder(folder), SIZE)
    print(f"autoencoder on {folder}: {found['psnr']:.2f} dB, mean of {found['images']} images at {SIZE} px")
    classes = {name.removeprefix("labels_"): v for name, v in found.items() if name.startswith("labels_")}
    if classes:
        worst = ", ".join(f"{name} {value:.2f}" for name, value in sorted(classes.items(), key=lambda c: c[1])[:4])
        print(f"  recovered labels: {found['labels']:.3f}; worst classes: {worst}", flush=True)


def measure_losses(pipeline: Any, shards: Path, count: int) -> None:
    """Print the loss with the face's own condition, another face's, and none."""
    store = Store(shards)
    for condition in store.conditions:
        losses = condition_losses(pipeline, store, condition, count=count)
        text = ", ".join(f"{name} {value:.3f}" for name, value in losses.items())
        available = sum(condition in store[index].conditions for index in range(len(store)))
        print(f"loss with {condition}, n = {min(count, available)}: {text}", flush=True)


if __name__ == "__main__":
    main()
