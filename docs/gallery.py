"""Generate the galleries with the bundled models: fixed seeds, none left out.

    python docs/gallery.py

`gallery.png`: conditions in the first row, images of three prompts below. `gallery_variations.png`: one mask with eight
prompts, and eight masks with one prompt in 20 steps of the teacher and 4, 2 and 1 of the student.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image

import likeness
from likeness.conditions import CONDITIONS

ROOT = Path(__file__).parents[1]
SIZE, GAP = 128, 4
COLUMNS = [
    ("mask", "masks/smile.png"),
    ("mask", "masks/beard.png"),
    ("mask", "masks/glasses.png"),
    ("sketch", "sketches/fringe.png"),
    ("sketch", "sketches/old.png"),
    ("keypoints", "keypoints/earrings.json"),
    (None, None),
]
PROMPTS = ["a smiling woman with blond hair", "an old man with grey hair", "a young woman with black hair"]
VARIATIONS = [
    "a smiling woman with blond hair", "a woman with black hair and heavy makeup", "a young woman with brown hair",
    "an old woman with grey hair", "a man with long hair", "a smiling man with a beard", "a serious man", "",
]  # fmt: skip
MASKS = ["smile", "fringe", "long-hair", "short-hair", "beard", "earrings", "glasses", "hat"]
Row = Sequence[Image.Image | None]


def control(name: str | None, file: str | None) -> tuple[dict[str, np.ndarray], Image.Image | None]:
    """Read a condition: the pipeline's argument, and its rendering."""
    if name is None or file is None:
        return {}, None
    condition = CONDITIONS[name]
    raw = condition.read(ROOT / "examples" / file).raw
    return {name: raw}, Image.fromarray(condition.render(condition.resize(raw, SIZE, SIZE), SIZE, SIZE))


def sheet(rows: Sequence[Row], file: str) -> None:
    """Save images in rows."""
    width, height = (count * (SIZE + GAP) - GAP for count in (len(rows[0]), len(rows)))
    canvas = Image.new("RGB", (width, height), "white")
    for y, row in enumerate(rows):
        for x, image in enumerate(row):
            if image is not None:
                canvas.paste(image, (x * (SIZE + GAP), y * (SIZE + GAP)))
    canvas.save(ROOT / "docs" / file, optimize=True)


def main() -> None:
    def generate(prompt: str, conditions: dict[str, np.ndarray], seed: int, steps: int | None = None) -> Image.Image:
        model = teacher if steps == 20 else student
        generator = torch.Generator().manual_seed(seed)
        return model(prompt, control_image=conditions, num_inference_steps=steps, generator=generator).images[0]

    teacher, student = likeness.load("mmface-mini"), likeness.load("mmface-mini-fast")
    controls = [control(*column) for column in COLUMNS]
    rows: list[Row] = [[rendering for _, rendering in controls]]
    for number, prompt in enumerate(PROMPTS, start=1):
        rows.append([generate(prompt, given, number) for given, _ in controls])
    sheet(rows, "gallery.png")

    one, _ = control("mask", "masks/long-hair.png")
    masks = [control("mask", f"masks/{name}.png") for name in MASKS]
    rows = [[generate(prompt, one, seed) for seed, prompt in enumerate(VARIATIONS)], [image for _, image in masks]]
    for steps in (20, 4, 2, 1):
        rows.append(
            [generate("a smiling person", given, 50 + column, steps) for column, (given, _) in enumerate(masks)]
        )
    sheet(rows, "gallery_variations.png")


if __name__ == "__main__":
    main()
