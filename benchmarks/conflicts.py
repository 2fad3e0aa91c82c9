"""Measure which modality a model follows if mask and prompt contradict each other.

    python benchmarks/conflicts.py FOLDER --model mmface-mini --count 40

FOLDER is a prepared folder of held-out faces with masks. Every prompt of `PROMPTS` that contradicts the mask of a face
(`find_contradictions`) is a pair. Its image is parsed by the bundled face parser. *text*: the fraction of images whose
parsed mask does not contradict the prompt; *neutral*: the same with the prompt "a person", which a model that ignores
text attains with any prompt; *mask*: the accuracy of the pixels of the mask; *agreed*: the same with the prompt "a
person"; *part*: the intersection over union of the disputed class. Intervals are 95 % bootstrap intervals of text minus
neutral over faces.
"""

from __future__ import annotations

import argparse
from collections import defaultdict
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

import likeness
from likeness.annotators.face_parser import load_face_parser, parse_faces
from likeness.conditions import Reading
from likeness.conditions.mask.classes import CLASS_INDEX
from likeness.conditions.mask.contradictions import find_contradictions
from likeness.conditions.mask.geometry import measure
from likeness.evaluate.faces import read_condition, read_faces
from likeness.evaluate.protocol import Protocol
from likeness.evaluate.scores import pixel_accuracy
from likeness.evaluate.stats import bootstrap_interval

PROMPTS = (
    "a bald man",
    "a woman with long hair",
    "a man with short hair",
    "a person wearing glasses",
    "a person without glasses",
    "a person wearing a hat",
    "a person without a hat",
)
NEUTRAL = "a person"


class Pair(NamedTuple):
    """A mask and a prompt that contradicts it."""

    face: int
    prompt: str
    part: str
    """The disputed class."""


class Scores(NamedTuple):
    """Scores of one pair."""

    face: int
    prompt: str
    text: float
    """Whether the image agrees with the prompt, 0 or 1."""
    neutral: float
    """Whether the image of a prompt that does not contradict the mask agrees with this one."""
    mask: float
    """Accuracy of the pixels against the mask."""
    part: float
    """Intersection over union of the disputed class; 1 if the mask does not have it and the image neither."""
    agreed: float
    """Accuracy with a prompt that does not contradict the mask."""


def find_pairs(masks: Sequence[np.ndarray]) -> list[Pair]:
    """Return every pair of a mask, uint8 [H, W], and a prompt that contradicts it."""
    pairs = []
    for face, mask in enumerate(masks):
        for prompt in PROMPTS:
            pairs += [Pair(face, prompt, found.part) for found in find_contradictions(measure(mask), prompt)[:1]]
    return pairs


def measure_conflicts(
    pipeline: Any, masks: Sequence[np.ndarray], parser: tuple[Any, int], **options: Any
) -> list[Scores]:
    """Generate and score an image of every pair; face k has seed k. `options` are further arguments of the pipeline."""
    network, size = parser

    def parsed(mask: np.ndarray, prompt: str, seed: int) -> np.ndarray:
        control = {"mask": Reading(raw=mask, scheme="mask of the pair")}
        generator = torch.Generator().manual_seed(seed)
        image = pipeline(prompt, control_image=control, generator=generator, **options).images[0]
        image = np.asarray(image.resize(mask.shape[::-1]))
        return parse_faces(network, [image], size=size)[0]

    def follows(labels: np.ndarray, prompt: str) -> float:
        return float(not find_contradictions(measure(labels), prompt))

    neutral: dict[int, np.ndarray] = {}  # the parsed images of a neutral prompt
    scores = []
    for face, prompt, part in find_pairs(masks):
        mask = masks[face]
        if face not in neutral:
            neutral[face] = parsed(mask, NEUTRAL, face)
        labels = parsed(mask, prompt, face)
        given, found = mask == CLASS_INDEX[part], labels == CLASS_INDEX[part]
        overlap = float((given & found).sum() / union) if (union := (given | found).sum()) else 1.0
        text = follows(labels, prompt), follows(neutral[face], prompt)
        accuracy = pixel_accuracy(mask, labels), pixel_accuracy(mask, neutral[face])
        scores.append(Scores(face, prompt, *text, accuracy[0], overlap, accuracy[1]))
    return scores


def means_by_face(scores: Sequence[Scores], value: Callable[[Scores], float]) -> np.ndarray:
    """Return the mean of a value over the pairs of each face that has any, [F]: pairs of a face are not independent."""
    faces = sorted({one.face for one in scores})
    return np.array([np.mean([value(one) for one in scores if one.face == face]) for face in faces])


def read_masks(folder: Path, count: int, size: int) -> list[np.ndarray]:
    """Return the masks of the first faces of a prepared folder, uint8 [size, size]."""
    faces, _ = read_faces(folder, Protocol(given=("mask",), count=count))
    masks = [read_condition(face.conditions, "mask", size) for face in faces]
    return [mask for mask in masks if mask is not None]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="prepared folder of held-out faces with masks")
    parser.add_argument("--model", nargs="+", default=["mmface-mini"], help="models")
    parser.add_argument("--count", type=int, default=40, help="number of faces")
    parser.add_argument("--guidance-scale", type=float, help="text guidance; the model's default otherwise")
    options = parser.parse_args()
    columns = ("text", "neutral", "mask", "agreed", "part")
    print(f"{'model':18} {'prompt':26} {'pairs':>5}" + "".join(f"{name:>9}" for name in columns))
    for model in options.model:
        pipeline = likeness.load(model)
        pipeline.set_progress_bar_config(disable=True)
        masks = read_masks(options.folder, options.count, pipeline.config.defaults["size"])
        rows = defaultdict(list)
        for score in measure_conflicts(pipeline, masks, load_face_parser(), guidance_scale=options.guidance_scale):
            rows[score.prompt].append(score)
            rows["all"].append(score)
        for prompt, scores in rows.items():
            values = {name: np.array([getattr(one, name) for one in scores]) for name in columns}
            low, high = bootstrap_interval(means_by_face(scores, lambda one: one.text - one.neutral))
            print(f"{model:18} {prompt:26} {len(scores):5}", end="")
            print("".join(f"{value.mean():9.3f}" for value in values.values()), end="")
            print(f"  text - neutral in [{low:.2f}, {high:.2f}]", flush=True)


if __name__ == "__main__":
    main()
