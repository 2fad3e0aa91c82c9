"""The measured quality of the bundled model, as its card has it: what survives the autoencoder, how much the conditions
lower the loss, and how well portraits of held-out faces keep to masks, sketches and words in the eyes of judges that
made no training data.

python benchmarks/mini.py data/celeba/test --shards data/shards/test --photos data/celebamask/test \
    --judge runs/face_parser_judge --text-judge runs/text_image_judge --train data/celeba/train --out runs/judged

Portraits are kept in --out, so that an interrupted run goes on; every portrait has the number of its face as its seed.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

import likeness
from likeness.annotators.face_parser import parse_faces
from likeness.annotators.sketch import extract_sketch
from likeness.conditions import CONDITIONS
from likeness.data.folder import captions_of, column_of, read_folder, read_photo
from likeness.data.store import Store
from likeness.encoders.latent import LatentCodec
from likeness.evaluate.scores import edge_f_score, interval, nearest, pixel_accuracy, retrieval
from likeness.pipelines.generate import generate, resolve
from likeness.pipelines.load import load_face_parser, load_text_image
from likeness.train.components import text_image
from likeness.train.components.autoencoder import measure, through
from likeness.train.validate import condition_losses
from likeness.types import PortraitRequest

SIZE = 128
CHOICES = 50
KINDS = ("mask", "sketch", "none")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("faces", type=Path, help="prepared folder of held-out faces")
    parser.add_argument("--model", default="mmface-mini")
    parser.add_argument("--count", type=int, default=1000)
    parser.add_argument("--shards", type=Path, help="their shards: adds the losses")
    parser.add_argument("--photos", type=Path, nargs="*", default=[], help="folders for the autoencoder")
    parser.add_argument("--judge", type=Path, help="run folder of a face parser")
    parser.add_argument("--text-judge", type=Path, help="run folder of a text-image pair")
    parser.add_argument("--train", type=Path, help="folder of the training faces: adds the nearest neighbours")
    parser.add_argument("--out", type=Path, help="where portraits are kept")
    options = parser.parse_args()
    pipeline = likeness.load(options.model)
    for folder in options.photos:
        autoencoder(pipeline, folder)
    if options.shards:
        store = Store(options.shards)
        for condition in store.conditions:
            losses = condition_losses(pipeline, store, condition, count=options.count)
            told = ", ".join(f"{name} {value:.3f}" for name, value in losses.items())
            having = sum(condition in store[index].conditions for index in range(len(store)))
            print(f"loss with {condition}, n = {min(options.count, having)}: {told}", flush=True)
    if options.out:
        judged(pipeline, options)


def autoencoder(pipeline: Any, folder: Path) -> None:
    """What survives the autoencoder."""
    found = measure(pipeline.vae, read_folder(folder), SIZE)
    print(f"autoencoder on {folder}: {found['psnr']:.2f} dB, mean of {found['pictures']} pictures at {SIZE} px")
    classes = {name.removeprefix("labels_"): v for name, v in found.items() if name.startswith("labels_")}
    if classes:
        worst = ", ".join(f"{name} {share:.2f}" for name, share in sorted(classes.items(), key=lambda c: c[1])[:4])
        print(f"  labels that survive: {found['labels']:.3f}; worst: {worst}", flush=True)


def judged(pipeline: Any, options: argparse.Namespace) -> None:
    """Make the portraits and let the judges see them."""
    rows = [row for row in read_folder(options.faces) if column_of("mask") in row][: options.count]
    photos = [read_photo(row["file_name"], SIZE) for row in rows]
    codec = LatentCodec(pipeline.vae)
    decoded = [through(codec, photo) for photo in photos]
    portraits = {kind: [portrait(pipeline, options.out, kind, i, row) for i, row in enumerate(rows)] for kind in KINDS}
    print(f"portraits of {len(rows)} held-out faces at {SIZE} px, one caption each, seed = number of the face")

    if options.judge:
        network, size = load_face_parser(options.judge / "model")
        given = [raw_condition(row, "mask") for row in rows]
        see = lambda pictures: parse_all(network, pictures, size)  # noqa: E731
        made = (portraits["mask"], portraits["none"], decoded)
        table("pixel accuracy against the given mask", *made, given, see, pixel_accuracy)
    given = [raw_condition(row, "sketch") for row in rows]
    draw = lambda pictures: [extract_sketch(picture) for picture in pictures]  # noqa: E731
    made = (portraits["sketch"], portraits["none"], decoded)
    table("edge F-score against the given sketch (1.5 px)", *made, given, draw, edge_f_score)

    if options.text_judge:
        clip, tokenizer = load_text_image(options.text_judge / "model")
        length = clip.text_model.embeddings.position_embedding.num_embeddings
        captions = torch.cat(
            [text_image.embed_captions(clip, text_image.to_ids(tokenizer, [first_caption(r)], length)) for r in rows]
        )
        features = {name: picture_features(clip, pictures) for name, pictures in {**portraits, "real": photos}.items()}
        for name, found in features.items():
            told = retrieval(found, captions, CHOICES)
            other = retrieval(found, captions.roll(1, 0), CHOICES)
            print(f"right caption among {CHOICES}, {name}: {told:.3f}; another's: {other:.3f}", flush=True)
        if options.train:
            trained = [read_photo(row["file_name"], SIZE) for row in read_folder(options.train)]
            others = picture_features(clip, trained)
            found = {name: nearest(features[name], others) for name in ("none", "real")}
            for name, (likest, _) in found.items():
                print(f"nearest training face, {name}: cosine {likest.mean():.3f}, at most {likest.max():.3f}")
            likest, index = found["none"]
            order = likest.argsort(descending=True)[:8].tolist()
            sheet([portraits["none"][i] for i in order], [trained[index[i]] for i in order], options.out)


def portrait(pipeline: Any, out: Path, kind: str, number: int, row: dict[str, Any]) -> np.ndarray:
    """The portrait of a face from its first caption and its mask, its sketch, or nothing: uint8 [S, S, 3]."""
    file = out / kind / f"{number:06d}.png"
    if not file.is_file():
        given = {} if kind == "none" else {kind: row[column_of(kind)]}
        request = resolve(PortraitRequest(prompt=first_caption(row), control_image=given, seed=number), pipeline)
        file.parent.mkdir(parents=True, exist_ok=True)
        generate(pipeline, request, [number])[0][0].save(file)
        if number % 50 == 49:
            print(f"  {kind}: {number + 1} portraits", flush=True)
    return read_photo(file)


def table(
    title: str,
    right: Sequence[np.ndarray],
    none: Sequence[np.ndarray],
    ceiling: Sequence[np.ndarray],
    given: Sequence[np.ndarray],
    see: Callable[[Sequence[np.ndarray]], list[np.ndarray]],
    score: Callable[[np.ndarray, np.ndarray], float],
) -> None:
    """The score with the right condition, another face's, none, and of autoencoded photographs."""
    seen = {"right": see(right), "none": see(none), "ceiling": see(ceiling)}
    seen["shuffled"] = seen["right"][1:] + seen["right"][:1]  # the portrait that the next face's condition made
    means = {}
    for name in ("right", "shuffled", "none", "ceiling"):
        values = np.array([score(wanted, found) for wanted, found in zip(given, seen[name], strict=True)])
        low, high = interval(values)
        means[name] = values.mean()
        print(f"{title}, {name}: {values.mean():.3f} (95 %: {low:.3f} to {high:.3f})", flush=True)
    print(f"  right is {means['right'] / means['ceiling']:.3f} of the ceiling")


def raw_condition(row: dict[str, Any], name: str) -> np.ndarray:
    """A row's mask or sketch at the size of the portraits."""
    condition = CONDITIONS[name]
    return condition.resize(condition.read(row[column_of(name)]).raw, SIZE, SIZE)


def parse_all(network: Any, pictures: Sequence[np.ndarray], size: int) -> list[np.ndarray]:
    """Masks of many pictures."""
    parts = [parse_faces(network, pictures[at : at + 16], size=size) for at in range(0, len(pictures), 16)]
    return [mask for part in parts for mask in part]


def picture_features(clip: Any, pictures: Sequence[np.ndarray]) -> Tensor:
    """Features of uint8 pictures, [N, D]."""
    side = clip.config.vision_config.image_size
    small = [np.asarray(Image.fromarray(p).resize((side, side), Image.Resampling.BOX)) for p in pictures]
    batches = [text_image.to_tensor(small[at : at + 64]) for at in range(0, len(small), 64)]
    return torch.cat([text_image.embed_pictures(clip, batch) for batch in batches])


def first_caption(row: dict[str, Any]) -> str:
    """The caption that the portrait is made from."""
    return captions_of(row)[0]


def sheet(portraits: Sequence[np.ndarray], neighbours: Sequence[np.ndarray], out: Path) -> None:
    """Portraits above their nearest training faces; photographs: to look at, not to publish."""
    Image.fromarray(np.vstack([np.hstack(portraits), np.hstack(neighbours)])).save(out / "neighbours.png")


if __name__ == "__main__":
    main()
