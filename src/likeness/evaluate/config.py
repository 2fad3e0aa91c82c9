"""What an evaluation measures and how: the protocol, from a TOML file or the command line.

Whatever changes a number is a field here or a fact that is recorded beside it (`evaluation.py`); a number without its
protocol is worth nothing. Needs no torch.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from likeness.conditions import CONDITIONS
from likeness.types import InputError

BUNDLED = "bundled"
"""The extractor that ships with the package."""

NONE = "none"
"""Words only."""

CEILING, REAL, TRAIN = "ceiling", "real", "train"
"""Sets that are no portraits: autoencoded photographs, photographs, and those that the model learnt from."""

RESULTS, SCORES = "results.json", "scores.npz"
"""Files of a finished evaluation."""

OFFLINE = (
    "pixel_accuracy",
    "mean_iou",
    "mean_iou_absent_1",
    "mean_iou_absent_0",
    "rare_class_recall",
    "edge_f_score",
    "keypoint_error",
    "clip_score",
    "clip_distance",
    "retrieval",
    "attribute_recall",
    "ssim",
    "ms_ssim",
    "fd_text_image",
    "kid_text_image",
    "precision_text_image",
    "recall_text_image",
    "diversity",
    "diversity_of_seeds",
    "nearest_training",
)
"""The metrics that need no download: those of a protocol that names none."""


@dataclass(frozen=True, kw_only=True)
class Protocol:
    """How a model, or pictures of any method, are measured."""

    given: tuple[str, ...] = ("mask", "sketch", NONE)
    """What portraits are made from beside the caption, a set of portraits each: conditions joined by "+", or "none"."""
    count: int | None = None
    """Faces at most, the first that have a caption and every condition in `given`; None takes all of them."""
    seeds: int = 1
    """Portraits a face and set. The seed of face number k is k, in the next round k + 1,000,000, and so on."""
    caption: Literal["first", "longest"] = "first"
    """Which of a face's captions a portrait is made from and held against."""
    size: int | None = None
    """Pixels a side at which pictures are compared; None: the model's own, or that of the pictures."""
    steps: int | None = None
    """Sampling steps; None takes the checkpoint's own."""
    guidance_scale: float | None = None
    """Text guidance; None takes the checkpoint's own."""
    metrics: tuple[str, ...] = OFFLINE
    """Names of `metrics.METRICS`."""
    train: str | None = None
    """Prepared folder that the model has learnt from: what the nearest training face is looked for in."""
    choices: int = 50
    """Captions among which the right one is looked for."""
    face_parser: str = BUNDLED
    """"bundled", a folder, or a hub id such as jonathandinu/face-parsing."""
    text_image: str = BUNDLED
    """"bundled", a folder with `clip` and `tokenizer`, or a hub id such as openai/clip-vit-base-patch16."""
    landmarker: str | None = None
    """MediaPipe's face_landmarker.task, for the keypoint error."""
    inception: str | None = None
    """File with torch-fidelity's InceptionV3; None lets it download its own."""
    clip_large: str = "openai/clip-vit-large-patch14-336"
    """Folder or hub id of the CLIP that CMMD was published with."""
    dinov2: str = "facebook/dinov2-large"
    """Folder or hub id of a DINOv2."""
    lpips: Literal["alex", "vgg", "squeeze"] = "alex"
    """Network of LPIPS."""
    topiq: str = "topiq_nr-face"
    """pyiqa's name of the TOPIQ variant."""
    judge: str | None = None
    """Address of an OpenAI-compatible service for the LLM score, such as http://localhost:8000/v1; the key is read from
    the environment variable OPENAI_API_KEY."""
    judge_model: str = "gpt-4o-mini"
    """The model that the service is asked for."""
    draws: int = 2000
    """Bootstrap draws of a mean; distances between sets take a twentieth of them."""

    def __post_init__(self) -> None:
        if not self.given or len(set(self.given)) != len(self.given):
            raise InputError(f"given is {', '.join(self.given) or 'empty'}: name each set of portraits once")
        for given in self.given:
            for name in conditions_of(given):
                if name not in CONDITIONS:
                    known = ", ".join((*CONDITIONS, NONE))
                    raise InputError(f"given names the condition {name!r}; known are {known}, and several joined by +")
        for name, least in (("count", 1), ("seeds", 1), ("size", 8), ("choices", 2), ("draws", 100)):
            if (value := getattr(self, name)) is not None and value < least:
                raise InputError(f"{name} is {value}; it must be at least {least}")


def conditions_of(given: str) -> tuple[str, ...]:
    """The conditions of a set of portraits: "mask+sketch" -> ("mask", "sketch"); "none" -> ()."""
    return () if given == NONE else tuple(given.split("+"))
