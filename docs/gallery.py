"""Make the README's picture with the bundled model: conditions on top, portraits of two sentences below.

python docs/gallery.py
"""

from __future__ import annotations

from pathlib import Path

import torch
from PIL import Image

import likeness
from likeness.conditions import CONDITIONS

ROOT = Path(__file__).parents[1]
COLUMNS = [
    ("mask", "masks/smile.png"),
    ("mask", "masks/short-hair.png"),
    ("mask", "masks/fringe.png"),
    ("sketch", "sketches/long-hair.png"),
    ("sketch", "sketches/short-hair.png"),
    ("keypoints", "keypoints/smile.json"),
    (None, None),
]
SENTENCES = ["a smiling woman with blond hair", "an old man with grey hair", "a young woman with black hair"]
SIZE, GAP = 128, 4


def main() -> None:
    pipeline = likeness.load()
    sheet = Image.new("RGB", (len(COLUMNS) * (SIZE + GAP) - GAP, (1 + len(SENTENCES)) * (SIZE + GAP) - GAP), "white")
    for column, (name, file) in enumerate(COLUMNS):
        control = {}
        if name is not None and file is not None:
            condition = CONDITIONS[name]
            raw = condition.read(ROOT / "examples" / file).raw
            picture = condition.render(condition.resize(raw, SIZE, SIZE), SIZE, SIZE)
            sheet.paste(Image.fromarray(picture), (column * (SIZE + GAP), 0))
            control = {name: raw}
        for row, sentence in enumerate(SENTENCES, start=1):
            generator = torch.Generator().manual_seed(10 * column + row)
            portrait = pipeline(sentence, control_image=control, generator=generator).images[0]
            sheet.paste(portrait, (column * (SIZE + GAP), row * (SIZE + GAP)))
    sheet.save(ROOT / "docs" / "gallery.png", optimize=True)


if __name__ == "__main__":
    main()
