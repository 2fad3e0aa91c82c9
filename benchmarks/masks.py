"""Read masks in all published formats and count which are read correctly, rejected, or read incorrectly.

python benchmarks/masks.py                                  # synthetic faces
python benchmarks/masks.py --folder data/hq/test            # the masks of a prepared folder

Each mask is written in 4 palettes x 5 class orders x 6 formats: class numbers (index), a palette PNG whose numbers
follow the order and whose colors follow the palette, RGB, BGR, one-hot planes, and one file per part. A correct result
equals the labels in canonical order; an `InputError` is a rejection; anything else is wrong. A format that does not
depend on the palette or the order is read once and weighted accordingly.
"""

from __future__ import annotations

import argparse
import tempfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from PIL import Image

from likeness.conditions.mask import read, resize
from likeness.conditions.mask.classes import CLASSES, ORDERS, PALETTES, order_table
from likeness.data.folder import each_row
from likeness.data.synthetic import draw_face
from likeness.types import InputError

TIMES = {"facer or SegFace": 2}
"""Order -> number of tools that use it, 1 by default: five in total."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, help="prepared folder with masks. Default: synthetic faces")
    parser.add_argument("--count", type=int, default=80, help="number of masks")
    parser.add_argument("--size", type=int, default=256, help="side in pixels")
    options = parser.parse_args()
    counts: dict[str, Counter[str]] = {}
    rejections: Counter[str] = Counter()
    for labels in masks(options.folder, options.count, options.size):
        with tempfile.TemporaryDirectory() as folder:
            for form, order, source, weight in forms(labels, Path(folder)):
                try:
                    result = "right" if np.array_equal(read(source).raw, labels) else "wrong"
                except InputError as error:
                    result = "rejected"
                    rejections[f"{form}, {order}: {error.kind}"] += weight
                counts.setdefault(form, Counter())[result] += weight
    print(f"{'form':<10}{'right':>8}{'rejected':>9}{'wrong':>7}{'right':>10}")
    for form, found in [*counts.items(), ("all", sum(counts.values(), Counter()))]:
        percentage = 100 * found["right"] / found.total()
        print(f"{form:<10}{found['right']:>8}{found['rejected']:>9}{found['wrong']:>7}{percentage:>8.2f} %")
    for reason, count in rejections.most_common(8):
        print(f"rejected {count} times: {reason}")


def masks(folder: Path | None, count: int, size: int) -> Iterator[np.ndarray]:
    """Canonical labels uint8 [size, size]."""
    if folder is None:
        yield from (draw_face(0, index, size).mask for index in range(count))
        return
    files = [row["mask_file_name"] for row in each_row(folder) if "mask_file_name" in row][:count]
    yield from (resize(read(file).raw, size, size) for file in files)


def forms(labels: np.ndarray, folder: Path) -> Iterator[tuple[str, str, Path | np.ndarray, int]]:
    """Yield (format, order, file or array, weight)."""
    tools = sum(TIMES.get(order, 1) for order in ORDERS)
    for order in ORDERS:
        numbers, weight = np.argsort(order_table(order))[labels].astype(np.uint8), TIMES.get(order, 1)
        Image.fromarray(numbers).save(folder / "index.png")
        yield "index", order, folder / "index.png", weight * len(PALETTES)
        yield "one-hot", order, np.eye(len(CLASSES), dtype=np.uint8)[numbers].transpose(2, 0, 1), weight * len(PALETTES)
        for palette in PALETTES.values():
            image = Image.fromarray(numbers)
            image.putpalette(palette[order_table(order)].tobytes())
            image.save(folder / "palette.png")
            yield "palette", order, folder / "palette.png", weight
    for palette in PALETTES.values():
        for form, channels in (("RGB", slice(None)), ("BGR", slice(None, None, -1))):
            Image.fromarray(np.ascontiguousarray(palette[labels][..., channels])).save(folder / f"{form}.png")
            yield form, "any", folder / f"{form}.png", tools
    (folder / "parts").mkdir()
    for index in np.unique(labels)[1:].tolist():
        Image.fromarray(((labels == index) * 255).astype(np.uint8)).save(folder / "parts" / f"0_{CLASSES[index]}.png")
    yield "parts", "any", folder / "parts", tools * len(PALETTES)


if __name__ == "__main__":
    main()
