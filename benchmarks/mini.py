"""The measured quality of the bundled model, as its card has it: what survives the autoencoder, how much the conditions
lower the loss, and `likeness evaluate` with judges that made no training data.

python benchmarks/mini.py data/celeba/test --shards data/shards/test --photos data/celebamask/test \
    --judge runs/face_parser_judge --text-judge runs/text_image_judge --train data/celeba/train --out runs/judged

--out gets the portraits, results.json, report.md and report.html; an interrupted run goes on.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import likeness
from likeness.data.folder import read_folder
from likeness.data.store import Store
from likeness.evaluate.config import BUNDLED, Protocol
from likeness.evaluate.evaluation import evaluate
from likeness.evaluate.page import write_report
from likeness.evaluate.report import markdown_table
from likeness.train.components.autoencoder import measure
from likeness.train.validate import condition_losses

SIZE = 128


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("faces", type=Path, help="prepared folder of held-out faces")
    parser.add_argument("--model", default="mmface-mini")
    parser.add_argument("--count", type=int, default=1000)
    parser.add_argument("--shards", type=Path, help="their shards: adds the losses")
    parser.add_argument("--photos", type=Path, nargs="*", default=[], help="folders for the autoencoder")
    parser.add_argument("--judge", default=BUNDLED, help="run folder of a face parser")
    parser.add_argument("--text-judge", default=BUNDLED, help="run folder of a text-image pair")
    parser.add_argument("--landmarker", help="MediaPipe's face_landmarker.task: adds the keypoint error")
    parser.add_argument("--train", help="folder of the training faces: adds the nearest neighbours")
    parser.add_argument("--out", type=Path, help="where portraits and the report are kept: adds the judges' numbers")
    options = parser.parse_args()
    pipeline = likeness.load(options.model)
    for folder in options.photos:
        autoencoder(pipeline, folder)
    if options.shards:
        losses(pipeline, options.shards, options.count)
    if options.out:
        settings = Protocol(
            count=options.count,
            face_parser=options.judge,
            text_image=options.text_judge,
            landmarker=options.landmarker,
            train=options.train,
        )
        report = lambda what, done, total: done % 50 or print(f"  {what}: {done} of {total}", flush=True)  # noqa: E731
        results = evaluate(options.faces, options.out, settings, pipeline=pipeline, model=options.model, report=report)
        if results is not None:  # None in all processes but the first
            write_report(results, options.out)
            print(markdown_table(results))
            print(options.out / "report.html")


def autoencoder(pipeline: Any, folder: Path) -> None:
    """What survives the autoencoder."""
    found = measure(pipeline.vae, read_folder(folder), SIZE)
    print(f"autoencoder on {folder}: {found['psnr']:.2f} dB, mean of {found['pictures']} pictures at {SIZE} px")
    classes = {name.removeprefix("labels_"): v for name, v in found.items() if name.startswith("labels_")}
    if classes:
        worst = ", ".join(f"{name} {share:.2f}" for name, share in sorted(classes.items(), key=lambda c: c[1])[:4])
        print(f"  labels that survive: {found['labels']:.3f}; worst: {worst}", flush=True)


def losses(pipeline: Any, shards: Path, count: int) -> None:
    """The loss with the right condition, another face's, and none."""
    store = Store(shards)
    for condition in store.conditions:
        found = condition_losses(pipeline, store, condition, count=count)
        told = ", ".join(f"{name} {value:.3f}" for name, value in found.items())
        having = sum(condition in store[index].conditions for index in range(len(store)))
        print(f"loss with {condition}, n = {min(count, having)}: {told}", flush=True)


if __name__ == "__main__":
    main()
