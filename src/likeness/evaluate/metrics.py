"""The table of metrics. `scores.py` and `distances.py` contain the formulas.

A `PerImageMetric` gives one value per image; its mean is reported. A `SetMetric` gives one value for a set of images
compared with the photographs of the same faces.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, NamedTuple

import numpy as np
import torch

from likeness.encoders.text_image import retrieved
from likeness.evaluate import distances, scores

Array = np.ndarray
Better = Literal["higher", "lower"]


class Inputs(NamedTuple):
    """What a per-image score may use in addition to the features of the image."""

    choices: int
    """Number of candidate captions of `retrieval`."""
    train: Array | None = None
    """The extractor's output for the training photographs, [M, ...]."""


@dataclass(frozen=True)
class PerImageMetric:
    """A metric with one value per image."""

    title: str
    extractor: str
    better: Better
    score: Callable[[Array, Inputs], Array]
    """(extractor output [N, ...], inputs) -> one value per image, [n <= N]."""
    mismatch: Callable[[Array], Array] | None = None
    """Extractor output as if the condition or caption of the next face had been given, for the floor."""
    condition: str = ""
    """The condition that it measures. The floor is reported for images with this condition."""
    needs_train: bool = False
    """Whether it needs the training photographs."""
    needs_captions: bool = False
    """Whether it measures images against their captions."""
    across_seeds: bool = False
    """Whether the score compares the images of a face: it takes [R, N, ...] of R >= 2 seeds."""


@dataclass(frozen=True)
class SetMetric:
    """A metric with one value per set of images."""

    title: str
    extractor: str
    better: Better
    needs_train: ClassVar = False
    needs_captions: ClassVar = False
    distance: Callable[[Array, Array], float]
    """(features of images [N, D], of the photographs of the same faces [N, D]) -> one value."""
    features: Callable[[Array], Array]
    """Extractor output [N, ...] -> features [N, D]."""
    limits: tuple[float, float]
    """Range of the metric, to which intervals are clipped."""
    bias: Callable[[int, int], str]
    """(number of images, features D) -> a known bias at so few images, or ""."""
    minimum: Callable[[int], int]
    """Features D -> the fewest images with which two sets of images can be distinguished."""


Metric = PerImageMetric | SetMetric


# --- Scores from the outputs of extractors


def given_mask(score: Callable[[Array], Array]) -> Callable[[Array, Inputs], Array]:
    """A score of class counts against the face's own mask; NaN for faces without a mask."""

    def score_own(output: Array, inputs: Inputs) -> Array:
        counts = output[:, 0]  # [N, 19, 3]
        known = ~np.isnan(counts).any(axis=(1, 2))
        values = np.full(len(counts), np.nan)
        values[known] = score(counts[known])
        return values

    return score_own


def first_column(output: Array, inputs: Inputs) -> Array:
    """The extractor's own score, [N, 1] or [N, 2]."""
    return output[:, 0]


def complete_face(output: Array, inputs: Inputs) -> Array:
    """Whether the face parser found a complete face, [N, 3, 19, 3] -> [N]."""
    return output[:, 2, 0, 0]


def clip_score(output: Array, inputs: Inputs) -> Array:
    """100 times the cosine similarity of image and caption."""
    return 100 * (output[:, 0] * output[:, 1]).sum(axis=1)


def clip_distance(output: Array, inputs: Inputs) -> Array:
    """1 minus the cosine similarity of image and caption."""
    return 1 - clip_score(output, inputs) / 100


def retrieval(output: Array, inputs: Inputs) -> Array:
    """Whether the face's own caption is the nearest of `choices`, for the images that fill a group."""
    images, captions = (torch.from_numpy(np.ascontiguousarray(output[:, part])) for part in (0, 1))
    return retrieved(images, captions, inputs.choices).numpy().astype(float)


def nearest_training(output: Array, inputs: Inputs) -> Array:
    """Cosine similarity to the nearest training photograph."""
    assert inputs.train is not None
    images, photos = (torch.from_numpy(np.ascontiguousarray(x[:, 0])) for x in (output, inputs.train))
    return scores.nearest(images, photos)[0].numpy()


def diversity_of_seeds(output: Array, inputs: Inputs) -> Array:
    """Mean cosine distance between the images of a face, [R, N, 2, P] -> [N]."""
    return np.array([distances.diversity(output[:, face, 0]) for face in range(output.shape[1])])


def swap_columns(output: Array) -> Array:
    """Swap the values for the face's own condition and the next face's: [N, 2 or more, ...] -> [N, 2, ...]."""
    return output[:, [1, 0]]


def next_caption(output: Array) -> Array:
    """Pair the images with the captions of the next faces: [N, 2, P]."""
    return np.stack([output[:, 0], np.roll(output[:, 1], -1, axis=0)], axis=1)


def image_features(output: Array) -> Array:
    """The image features of a text-image pair, [N, 2, P] -> [N, P]."""
    return output[:, 0]


# --- Known biases


def frechet_bias(count: int, width: int) -> str:
    if count <= width:
        return f"{count} images cannot span {width} features: the distance is far too large"
    return "" if count >= 10_000 else "too large, by an amount that decreases with the number of images"


def neighbor_bias(count: int, width: int) -> str:
    return "" if count >= 1000 else "too high: neighborhoods are too large with so few images"


UNLIMITED = (-np.inf, np.inf)
MIN_SET = 10
"""Fewest images of a distance between sets."""
DISTANCES: dict[str, tuple[Any, ...]] = {
    "frechet": (distances.frechet, "lower", UNLIMITED, frechet_bias, lambda width: width + 1),
    "kid": (distances.kernel_distance, "lower", UNLIMITED, lambda count, width: "", lambda width: MIN_SET),
    "cmmd": (distances.clip_mmd, "lower", UNLIMITED, lambda count, width: "", lambda width: MIN_SET),
    "precision": (distances.precision, "higher", (0, 1), neighbor_bias, lambda width: 10 * MIN_SET),
    "recall": (distances.recall, "higher", (0, 1), neighbor_bias, lambda width: 10 * MIN_SET),
    "diversity": (distances.diversity, "higher", UNLIMITED, lambda count, width: "", lambda width: MIN_SET),
}
"""Name -> function, direction, limits, bias and minimum."""


def mask_metric(title: str, score: Callable[[Array], Array]) -> PerImageMetric:
    return PerImageMetric(f"Mask: {title}", "face_parser", "higher", given_mask(score), swap_columns, "mask")


def text_metric(title: str, better: Better, score: Callable[[Array, Inputs], Array]) -> PerImageMetric:
    return PerImageMetric(f"Text: {title}", "text_image", better, score, next_caption, needs_captions=True)


def set_metric(title: str, extractor: str, name: str) -> SetMetric:
    distance, better, *rest = DISTANCES[name]
    features = image_features if extractor == "text_image" else np.asarray
    return SetMetric(f"Set: {title}", extractor, better, distance, features, *rest)


METRICS: dict[str, Metric] = {
    "pixel_accuracy": mask_metric("pixel accuracy", scores.accuracy),
    "mean_iou": mask_metric("mIoU, absent classes excluded", scores.mean_iou),
    "mean_iou_absent_1": mask_metric("mIoU, absent classes 1", lambda counts: scores.mean_iou(counts, 1.0)),
    "mean_iou_absent_0": mask_metric("mIoU, absent classes 0", lambda counts: scores.mean_iou(counts, 0.0)),
    "rare_class_recall": mask_metric("rare classes shown", scores.rare_class_recall),
    "edge_f_score": PerImageMetric("Sketch: edge F-score", "sketch", "higher", first_column, swap_columns, "sketch"),
    "keypoint_error": PerImageMetric(
        "Keypoints: error / eye distance", "landmarks", "lower", first_column, swap_columns, "keypoints"
    ),
    "clip_score": text_metric("CLIP score, 100 cos", "higher", clip_score),
    "clip_distance": text_metric("CLIP distance, 1 - cos", "lower", clip_distance),
    "retrieval": text_metric("caption retrieval", "higher", retrieval),
    "attribute_recall": PerImageMetric(
        "Text: attribute recall", "attributes", "higher", lambda output, inputs: scores.nan_mean(output)
    ),
    "llm_score": PerImageMetric("Text: LLM score", "llm", "higher", first_column, needs_captions=True),
    "ssim": PerImageMetric("Photograph: SSIM", "ssim", "higher", first_column),
    "ms_ssim": PerImageMetric("Photograph: multi-scale SSIM", "ms_ssim", "higher", first_column),
    "lpips": PerImageMetric("Photograph: LPIPS", "lpips", "lower", first_column),
    "complete_faces": PerImageMetric("Quality: complete faces", "face_parser", "higher", complete_face),
    "sharpness": PerImageMetric("Quality: sharpness", "laplacian", "higher", first_column),
    "topiq": PerImageMetric("Quality: TOPIQ", "topiq", "higher", first_column),
    "fid": set_metric("FID", "inception", "frechet"),
    "kid": set_metric("KID", "inception", "kid"),
    "cmmd": set_metric("CMMD", "clip_large", "cmmd"),
    "fd_dinov2": set_metric("FD on DINOv2", "dinov2", "frechet"),
    "precision": set_metric("precision on DINOv2", "dinov2", "precision"),
    "recall": set_metric("recall on DINOv2", "dinov2", "recall"),
    "fd_text_image": set_metric("FD on the text-image pair", "text_image", "frechet"),
    "kid_text_image": set_metric("KID on the text-image pair", "text_image", "kid"),
    "precision_text_image": set_metric("precision on the text-image pair", "text_image", "precision"),
    "recall_text_image": set_metric("recall on the text-image pair", "text_image", "recall"),
    "diversity": set_metric("diversity, 1 - cos of two images", "text_image", "diversity"),
    "diversity_of_seeds": PerImageMetric(
        "Set: diversity of the images of a face", "text_image", "higher", diversity_of_seeds, across_seeds=True
    ),
    "nearest_training": PerImageMetric(
        "Memorization: nearest training photograph, cos", "text_image", "lower", nearest_training, needs_train=True
    ),
}
"""Name -> metric, in the order of tables."""
