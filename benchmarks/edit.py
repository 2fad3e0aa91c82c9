"""Compare the methods of editing on photographs of faces.

python benchmarks/edit.py PHOTOS --count 40                  # a folder of aligned square faces
python benchmarks/edit.py PHOTOS --model mditface-mini --out edited/   # also write the images
python benchmarks/edit.py PHOTOS --count 200 --in-turn --ways inversion:1 replacement:1 image_to_image:1

Every photograph gets every request of `REQUESTS` that applies to it, or with --in-turn the first such one from its
number on, by every method with the same seed.
Columns: requests; pixels changed outside the region, over all edits; accuracy, the fraction of the region's pixels in
which the bundled parser finds the wanted class, and that of an image generated from scratch with the same mask and
prompt; seam, the gradient energy next to the region's border, as wide as the feather, over that of the photograph,
median; distance, the mean difference to the photograph inside the region, of 255; identity, the fraction of edits whose
nearest photograph in the bundled image encoder, of all of the run, is their own; dB, how well an inversion reconstructs
the photograph; seconds per edit without loading and parsing, median.
"""

from __future__ import annotations

import argparse
import re
import time
from functools import cache
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from scipy import ndimage

from likeness.annotators.face_parser import load_face_parser, parse_faces
from likeness.annotators.landmarks import open_face_finder
from likeness.conditions import Reading
from likeness.encoders.text_image import embed_images, load_text_image, resize_images
from likeness.pipelines.generate import call_options, resolve
from likeness.pipelines.load import load
from likeness.prepare.align import cut_portrait, face_transform
from likeness.prepare.edit import MARGIN, Change, Photo, carry_out, open_photo, paste_region, plan_edit
from likeness.types import ConditionInput, InputError, PortraitRequest
from likeness.weights.catalog import BUNDLED, COMMON

EXAMPLES = Path(__file__).parents[1] / "examples" / "masks"

REQUESTS: dict[str, tuple[Change, str]] = {
    "more hair": (Change(mask_edit="grow hair 6"), ""),
    "less hair": (Change(mask_edit="shrink hair 4"), ""),
    "red hair": (Change(region=["hair"]), "a person with red hair"),
    "a hat": (Change(mask_edit=f"paste hat from '{EXAMPLES / 'hat.png'}'"), "a person with a hat"),
    "glasses": (Change(mask_edit=f"paste eye_g from '{EXAMPLES / 'glasses.png'}'"), "a person with glasses"),
    "no glasses": (Change(mask_edit="remove eye_g", region=["eye_g"]), "a person without glasses"),
}
"""Name -> change and prompt."""

WAYS = [
    *(("replacement", 1.0), ("replacement", 0.8)),
    *(("image_to_image", 1.0), ("image_to_image", 0.6)),
    ("langevin", 1.0),
    *(("flow_edit", 1.0), ("flow_edit", 0.8)),
    *(("inversion", 1.0), ("inversion", 0.8)),
]
"""Method and strength."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("photos", type=Path, help="folder of photographs")
    parser.add_argument("--count", type=int, default=20, help="number of photographs")
    parser.add_argument("--model", default="mmface-mini", help="model")
    parser.add_argument("--landmarker", type=Path, help="face_landmarker.task, if the photographs are not aligned")
    parser.add_argument("--out", type=Path, help="folder for the edited photographs")
    parser.add_argument("--in-turn", action="store_true", help="one request per photograph, in turn")
    parser.add_argument("--ways", nargs="+", default=WAYS, type=way, help="method:strength")
    parser.add_argument("--by-request", action="store_true", help="also print a row per request")
    options = parser.parse_args()
    pipeline, parser_ = load(options.model, device="cpu"), load_face_parser()
    pipeline.set_progress_bar_config(disable=True)
    rows: dict[str, list[tuple[float, ...]]] = {}
    files = sorted(path for path in options.photos.iterdir() if path.suffix.lower() in (".jpg", ".png", ".webp"))
    if options.landmarker is None:
        measure_all(files[: options.count], pipeline, parser_, None, options, rows)
    else:
        with open_face_finder(options.landmarker) as find:
            measure_all(files[: options.count], pipeline, parser_, find, options, rows)
    print(
        f"{'method':<22}{'edits':>6}{'outside':>9}{'accuracy':>10}{'scratch':>9}{'seam':>7}{'distance':>10}{'identity':>10}{'dB':>7}{'s':>7}"
    )
    for name, found in rows.items():
        if name[0] == " " and not options.by_request:
            continue
        outside, accuracy, scratch, seam, distance, identity, quality, seconds = np.array(found).T
        print(
            f"{name:<22}{len(found):>6}{int(outside.sum()):>9}{accuracy.mean():>10.3f}{scratch.mean():>9.3f}"
            f"{np.median(seam):>7.2f}{distance.mean():>10.1f}{identity.mean():>10.2f}{quality.mean():>7.1f}"
            f"{np.median(seconds):>7.2f}"
        )


def way(text: str) -> tuple[str, float]:
    """Parse "inversion:0.8"."""
    method, _, strength = text.partition(":")
    return method, float(strength or 1)


def measure_all(files, pipeline, parser, find, options, rows) -> None:
    """Edit photographs and collect a row per edit, by method and by request."""
    (network, size), out = parser, options.out
    photos = [open_photo(file) for file in files]
    side = pipeline.config.defaults["size"]
    transforms = [face_transform(photo.pixels, photo.name, find, side)[0] for photo in photos]
    own = embed([cut_portrait(one.pixels, move, side) for one, move in zip(photos, transforms, strict=True)])
    for number, (file, photo) in enumerate(zip(files, photos, strict=True)):
        names = [*REQUESTS][number % len(REQUESTS) :] + [*REQUESTS][: number % len(REQUESTS)]
        done = 0
        for request_name in names:
            if options.in_turn and done:
                break
            change, prompt = REQUESTS[request_name]
            try:
                plan = plan_edit(photo, change, pipeline.config.defaults["size"], parser=parser, find=find)
            except InputError:  # this face has none of the classes
                continue
            done += 1
            side = len(plan.region)
            request = PortraitRequest(prompt=prompt, seed=number)
            mask = {"mask": ConditionInput(image=Reading(raw=plan.after, scheme=""))}
            whole = resolve(PortraitRequest(prompt=prompt, seed=number, conditions=mask), pipeline)
            made = pipeline(**call_options(whole, [number])).images[0].resize((side, side), Image.Resampling.LANCZOS)
            (labels,) = parse_faces(network, [np.array(made)], size=size)
            scratch = (labels == plan.after)[plan.region].mean()
            for method, strength in options.ways:
                start = time.perf_counter()
                edited = carry_out(pipeline, photo, plan, request, kind="PNG", strength=strength, method=method)
                seconds = time.perf_counter() - start
                if out is not None:
                    out.mkdir(parents=True, exist_ok=True)
                    name = f"{file.stem}-{request_name.replace(' ', '-')}-{method}-{strength:g}.png"
                    (out / name).write_bytes(edited.content)
                result = np.array(edited.image.convert("RGB"))
                portrait = cut_portrait(result, plan.transform, side)
                (labels,) = parse_faces(network, [portrait], size=size)
                accuracy = (labels == plan.after)[plan.region].mean()
                seam, distance = compare(photo, result, plan)
                nearest = (embed([portrait]) @ own.T).argmax()
                decibels = [float(number) for note in edited.notes for number in re.findall(r"([\d.]+) dB", note)]
                measured = (accuracy, scratch, seam, distance, float(nearest == number), *(decibels or [np.nan]))
                row = (edited.certificate["changed_outside"], *measured, seconds)
                for name in (f"{method} {strength:g}", f"  {request_name}, {method} {strength:g}"):
                    rows.setdefault(name, []).append(row)


@cache
def encoder():
    """The bundled image encoder."""
    return load_text_image(BUNDLED / COMMON)[0]


def embed(images: list[np.ndarray]) -> np.ndarray:
    """Unit vectors of images in the bundled image encoder, [N, P]."""
    clip = encoder()
    with torch.no_grad():
        return embed_images(clip, resize_images(images, clip.config.vision_config.image_size)).numpy()


def compare(photo: Photo, result: np.ndarray, plan) -> tuple[float, float]:
    """Return the gradient energy on the region's border over the photograph's, and the difference inside."""
    own = np.array(photo.image.convert("RGB")).astype(np.float64)
    _, inside = paste_region(photo, np.zeros((*plan.region.shape, 3), np.uint8), plan)
    width = MARGIN * len(plan.region) / np.hypot(*plan.transform[:, 0])  # of the feather, in pixels of the photograph
    ring = np.maximum(*(ndimage.distance_transform_edt(np.pad(one, 1, mode="edge")) for one in (inside, ~inside)))
    ring = ring[1:-1, 1:-1] <= width
    energy = [
        sum((np.gradient(image, axis=axis) ** 2).sum(-1)[ring].mean() for axis in (0, 1))
        for image in (result.astype(np.float64), own)
    ]
    return energy[0] / max(energy[1], 1e-9), float(np.abs(result - own)[inside].mean())


if __name__ == "__main__":
    main()
