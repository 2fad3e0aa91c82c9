"""Every metric, as data: what it reads, how a number comes of it, which way is better, and what spoils it.

`scores.py` and `distances.py` have the formulas. A metric is either a value a picture, whose mean is reported, or one
value for a set of pictures against the photographs.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch

from likeness.encoders.text_image import finds
from likeness.evaluate import distances, scores
from likeness.evaluate.config import Protocol

Array = np.ndarray


@dataclass(frozen=True, kw_only=True)
class Metric:
    """One metric."""

    title: str
    """What tables call it."""
    extractor: str
    """Whose values it reads."""
    better: Literal["higher", "lower"]
    values: Callable[[Array, Array | None, Protocol], Array] | None = None
    """(what the extractor said [N, ...], the same of the reference, protocol) -> a value a picture, [n <= N]."""
    distance: Callable[[Array, Array], float] | None = None
    """(features of the portraits [N, D], of the photographs of the same faces [N, D]) -> one value."""
    features: Callable[[Array], Array] = lambda found: found
    """What a distance takes of the extractor's values: [N, ...] -> [N, D]."""
    rounds: Callable[[Array], Array] | None = None
    """Instead of `values`: what the extractor said in R rounds, [R, N, ...] -> a value a face, [N]."""
    reference: Literal["", "real", "train"] = ""
    """What it is held against: nothing more, the photographs of the same faces, or those of the training."""
    another: Callable[[Array], Array] | None = None
    """The extractor's values as if another face's condition or caption had been asked for: the floor."""
    condition: str = ""
    """The condition that it measures: the floor is shown for portraits that were given it."""
    ceiling: bool = True
    """Whether autoencoded photographs have a meaningful score."""
    least: int = 2
    """Pictures without which there is no number."""
    limits: tuple[float, float] = (-np.inf, np.inf)
    """Between which an interval is cut: what a share or the like cannot leave."""
    bias: Callable[[int, int], str] = lambda count, width: ""
    """(pictures, features D) -> what is wrong with the number at so few pictures; "" where nothing is."""


def exchanged(found: Array) -> Array:
    """Own and another's score, exchanged: [N, 2, ...]."""
    return found[:, ::-1]


def next_caption(found: Array) -> Array:
    """Pictures beside the next faces' captions: [N, 2, P]."""
    return np.stack([found[:, 0], np.roll(found[:, 1], -1, axis=0)], axis=1)


def few_for_frechet(count: int, width: int) -> str:
    """The Fréchet distance's bias."""
    if count <= width:
        return f"{count} pictures cannot fill {width} features: the distance is far too large"
    return "" if count >= 10_000 else "too large by an amount that falls with the number of pictures"


def few_for_neighbours(count: int, width: int) -> str:
    """The bias of precision and recall."""
    return "" if count >= 1000 else "reaches are too long with so few pictures: too high"


def mask(score: Callable[[Array], Array]) -> Callable[[Array, Array | None, Protocol], Array]:
    """A score of the counts against the own mask; NaN where there is none."""

    def values(found: Array, reference: Array | None, protocol: Protocol) -> Array:
        own = found[:, 0]
        known = ~np.isnan(own).any(axis=(1, 2))
        result = np.full(len(own), np.nan)
        result[known] = score(own[known])
        return result

    return values


def first(found: Array, reference: Array | None, protocol: Protocol) -> Array:
    """The extractor's own score, [N, 1] or [N, 2]."""
    return found[:, 0]


def clip_score(found: Array, reference: Array | None, protocol: Protocol) -> Array:
    """100 times the cosine of picture and caption."""
    return 100 * (found[:, 0] * found[:, 1]).sum(axis=1)


def found_captions(found: Array, reference: Array | None, protocol: Protocol) -> Array:
    """Whether the own caption is the likest, for the pictures that fill a group."""
    pictures, captions = (torch.from_numpy(np.ascontiguousarray(found[:, part])) for part in (0, 1))
    return finds(pictures, captions, protocol.choices).numpy().astype(float)


def nearest_photo(found: Array, reference: Array | None, protocol: Protocol) -> Array:
    """Cosine to the likest training photograph."""
    assert reference is not None
    pictures, photos = (torch.from_numpy(np.ascontiguousarray(x[:, 0])) for x in (found, reference))
    return scores.nearest(pictures, photos)[0].numpy()


def between_seeds(found: Array) -> Array:
    """Mean cosine distance between the portraits of one face, [R, N, 2, P] -> [N]."""
    return np.array([distances.diversity(found[:, face, 0]) for face in range(found.shape[1])])


def pictures_of(found: Array) -> Array:
    """The pictures' features of a text-image pair, [N, 2, P] -> [N, P]."""
    return found[:, 0]


COUNTS: dict[str, Any] = {"extractor": "face_parser", "better": "higher", "another": exchanged, "condition": "mask"}
PAIR: dict[str, Any] = {"extractor": "text_image", "another": next_caption}
SET: dict[str, Any] = {"reference": "real", "least": 10}

METRICS: dict[str, Metric] = {
    # masks
    "pixel_accuracy": Metric(title="Mask: pixel accuracy", values=mask(scores.accuracy), **COUNTS),
    "mean_iou": Metric(title="Mask: mIoU, absent classes left out", values=mask(scores.mean_iou), **COUNTS),
    "mean_iou_absent_1": Metric(
        title="Mask: mIoU, absent classes 1", values=mask(lambda counts: scores.mean_iou(counts, 1.0)), **COUNTS
    ),
    "mean_iou_absent_0": Metric(
        title="Mask: mIoU, absent classes 0", values=mask(lambda counts: scores.mean_iou(counts, 0.0)), **COUNTS
    ),
    "rare_class_recall": Metric(
        title="Mask: rare classes shown", values=mask(scores.rare_class_recall), **COUNTS
    ),
    # sketches and keypoints
    "edge_f_score": Metric(
        title="Sketch: edge F-score", extractor="sketch", better="higher", values=first, another=exchanged,
        condition="sketch",
    ),
    "keypoint_error": Metric(
        title="Keypoints: error / eye distance", extractor="landmarks", better="lower", values=first,
        another=exchanged, condition="keypoints",
    ),
    # words
    "clip_score": Metric(title="Words: CLIP score, 100 cos", better="higher", values=clip_score, **PAIR),
    "clip_distance": Metric(
        title="Words: CLIP distance, 1 - cos", better="lower", **PAIR,
        values=lambda found, reference, protocol: 1 - clip_score(found, reference, protocol) / 100,
    ),
    "retrieval": Metric(title="Words: own caption found", better="higher", values=found_captions, **PAIR),
    "attribute_recall": Metric(
        title="Words: attributes named", extractor="attributes", better="higher",
        values=lambda found, reference, protocol: scores.mean_known(found),
    ),
    "llm_score": Metric(title="Words: LLM score", extractor="judge", better="higher", values=first),
    # the photograph
    "ssim": Metric(title="Photograph: SSIM", extractor="ssim", better="higher", values=first),
    "ms_ssim": Metric(title="Photograph: multi-scale SSIM", extractor="ms_ssim", better="higher", values=first),
    "lpips": Metric(title="Photograph: LPIPS", extractor="lpips", better="lower", values=first),
    "topiq": Metric(title="Quality: TOPIQ", extractor="topiq", better="higher", values=first),
    # sets
    "fid": Metric(
        title="Set: FID", extractor="inception", better="lower", distance=distances.frechet, bias=few_for_frechet, **SET
    ),
    "kid": Metric(
        title="Set: KID", extractor="inception", better="lower", distance=distances.kernel_distance, **SET
    ),
    "cmmd": Metric(
        title="Set: CMMD", extractor="clip_large", better="lower", distance=distances.clip_mmd, **SET
    ),
    "fd_dinov2": Metric(
        title="Set: FD on DINOv2", extractor="dinov2", better="lower", distance=distances.frechet,
        bias=few_for_frechet, **SET,
    ),
    "precision": Metric(
        title="Set: precision on DINOv2", extractor="dinov2", better="higher", distance=distances.precision,
        bias=few_for_neighbours, limits=(0, 1), **SET,
    ),
    "recall": Metric(
        title="Set: recall on DINOv2", extractor="dinov2", better="higher", distance=distances.recall,
        bias=few_for_neighbours, limits=(0, 1), **SET,
    ),
    "fd_text_image": Metric(
        title="Set: FD on the text-image pair", extractor="text_image", better="lower", features=pictures_of,
        distance=distances.frechet, bias=few_for_frechet, **SET,
    ),
    "kid_text_image": Metric(
        title="Set: KID on the text-image pair", extractor="text_image", better="lower", features=pictures_of,
        distance=distances.kernel_distance, **SET,
    ),
    "precision_text_image": Metric(
        title="Set: precision on the text-image pair", extractor="text_image", better="higher", features=pictures_of,
        distance=distances.precision, bias=few_for_neighbours, limits=(0, 1), **SET,
    ),
    "recall_text_image": Metric(
        title="Set: recall on the text-image pair", extractor="text_image", better="higher", features=pictures_of,
        distance=distances.recall, bias=few_for_neighbours, limits=(0, 1), **SET,
    ),
    "diversity": Metric(
        title="Set: diversity, 1 - cos of two portraits", extractor="text_image", better="higher",
        features=pictures_of, distance=distances.diversity, **SET,
    ),
    "diversity_of_seeds": Metric(
        title="Set: diversity of one face's portraits", extractor="text_image", better="higher", rounds=between_seeds,
        ceiling=False,
    ),
    "nearest_training": Metric(
        title="Memory: cosine to the nearest training photograph", extractor="text_image", better="lower",
        values=nearest_photo, reference="train",
    ),
}  # fmt: skip
"""Name -> metric, in the order of tables."""
