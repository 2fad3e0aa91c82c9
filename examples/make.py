"""Make the example conditions from images of the bundled model.

python examples/make.py [face_landmarker.task]

Each image is generated from a prompt (some from a mask that was generated from it), enlarged to 256 px, and annotated
by the annotators that prepare training data (with landmarks if MediaPipe's file is given).
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import torch
from PIL import Image

import likeness
from likeness.annotators.face_parser import load_face_parser, parse_faces
from likeness.annotators.landmarks import open_landmarker
from likeness.annotators.sketch import extract_sketch
from likeness.conditions.mask import edits, mask_image
from likeness.conditions.mask.classes import CLASSES
from likeness.pipelines.propose import propose_mask
from likeness.prepare.annotate import annotate_folder

HERE = Path(__file__).parent
SIZE = 256
PORTRAITS: dict[str, tuple[str, int, bool]] = {
    "smile": ("a smiling woman with blond hair", 4, False),
    "fringe": ("a woman with brown hair and bangs", 0, False),
    "long-hair": ("a woman with wavy hair", 13, False),
    "short-hair": ("a young man with black hair", 9, False),
    "curly": ("a woman with wavy hair", 13, True),
    "beard": ("a man with black hair and a beard", 2, True),
    "glasses": ("a man with glasses", 3, True),
    "earrings": ("a woman with earrings and heavy makeup", 11, True),
    "hat": ("a woman with a hat", 0, False),
    "old": ("an old man with grey hair", 3, True),
}
"""Name of the files -> (prompt, seed, whether the prompt is first turned into a mask)."""
FACES: dict[str, int] = {
    "a smiling woman with blond hair": 4,
    "an old man with grey hair and glasses": 9,
    "a young woman with long brown hair": 5,
    "a man with black hair and a beard": 9,
}
"""Caption -> seed of the faces of `faces/`, a prepared folder."""


def main() -> None:
    with open_landmarker(Path(sys.argv[1])) if len(sys.argv) > 1 else nullcontext() as find:
        make(find)
    make_faces(HERE / "faces")


def make_faces(folder: Path) -> None:
    pipeline, lines = likeness.load(), []
    (folder / "images").mkdir(parents=True, exist_ok=True)
    for number, (caption, seed) in enumerate(FACES.items()):
        name = f"images/{number}.png"
        pipeline(caption, generator=torch.Generator().manual_seed(seed)).save(folder / name)
        lines.append(json.dumps({"file_name": name, "text": [caption]}) + "\n")
    (folder / "metadata.jsonl").write_text("".join(lines))
    annotate_folder(folder, parser="bundled")


def make(find: Callable[[np.ndarray], np.ndarray | None] | None) -> None:
    pipeline, proposing = likeness.load(), likeness.load("mask-mini")
    parser, parser_size = load_face_parser()
    for name, (prompt, seed, via_mask) in PORTRAITS.items():
        given = {"mask": propose_mask(proposing, prompt, seed).labels} if via_mask else {}
        portrait = pipeline(prompt, control_image=given, generator=torch.Generator().manual_seed(seed)).images[0]
        picture = np.array(portrait.resize((SIZE, SIZE), Image.Resampling.BICUBIC))
        (mask,) = parse_faces(parser, [picture], size=parser_size)
        mask = edits.clean(mask, [CLASSES[index] for index in np.unique(mask) if index])
        mask_image(mask).save(HERE / "masks" / f"{name}.png", optimize=True)
        Image.fromarray(extract_sketch(picture)).save(HERE / "sketches" / f"{name}.png", optimize=True)
        if find is not None and (points := find(picture)) is not None:
            content = {"points": np.round(points * SIZE, 1).tolist(), "size": [SIZE, SIZE]}
            (HERE / "keypoints" / f"{name}.json").write_text(json.dumps(content) + "\n")


if __name__ == "__main__":
    main()
