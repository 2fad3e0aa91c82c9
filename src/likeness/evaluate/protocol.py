"""The protocol of an evaluation: what is measured and how. Does not import torch.

Everything that changes a number is a field of `Protocol` or a fact in `results.Measurement.protocol`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from likeness.chat import plain_address
from likeness.conditions import CONDITIONS
from likeness.types import InputError

BUNDLED = "bundled"
"""The network that ships with the package."""

NONE = "none"
"""A condition set without conditions: images from text only."""

CEILING, REAL, TRAIN = "ceiling", "real", "train"
"""Reference sets: autoencoded photographs, photographs, training photographs."""

DEFAULT_METRICS = (
    "pixel_accuracy", "mean_iou", "mean_iou_absent_1", "mean_iou_absent_0", "rare_class_recall", "edge_f_score",
    "keypoint_error", "clip_score", "clip_distance", "retrieval", "attribute_recall", "complete_faces", "sharpness",
    "ssim", "ms_ssim", "fd_text_image", "kid_text_image", "precision_text_image", "recall_text_image", "diversity",
    "diversity_of_seeds", "nearest_training",
)  # fmt: skip
"""The metrics that are measured by default. `ssim` and `ms_ssim` require torchmetrics, `keypoint_error` MediaPipe and
its model."""


@dataclass(frozen=True, kw_only=True)
class Protocol:
    """How a model, or the images of any method, are measured."""

    given: tuple[str, ...] = ("mask", "sketch", NONE)
    """Condition sets. Each is one condition, several joined by "+", or "none" for text only. The model generates one
    set of images for each."""
    count: int | None = None
    """Maximum number of faces: the first ones with every condition in `given` and, if any has one, a caption. None:
    all."""
    seeds: int = 1
    """Images per face and condition set. The seed of face k is k + 1,000,000 r for r = 0, ..., seeds - 1."""
    caption: Literal["first", "longest"] = "first"
    """Which caption of a face is the prompt."""
    size: int | None = None
    """Side in pixels at which images are compared. None: the model's default, or the size of the images."""
    steps: int | None = None
    """Sampling steps. None: the checkpoint's default."""
    guidance_scale: float | None = None
    """Classifier-free guidance scale. None: the checkpoint's default."""
    mask_model: str | None = None
    """Model that proposes the mask of an image from text only, such as mask-mini. None: these images have no mask."""
    metrics: tuple[str, ...] = DEFAULT_METRICS
    """Names of `metrics.METRICS`."""
    train: str | None = None
    """Prepared folder of the training faces, for `nearest_training`."""
    choices: int = 50
    """Number of candidate captions of `retrieval`."""
    face_parser: str = BUNDLED
    """"bundled", a folder, or a hub id such as jonathandinu/face-parsing."""
    text_image: str = BUNDLED
    """"bundled", a folder with `clip` and `tokenizer`, or a hub id such as openai/clip-vit-base-patch16."""
    landmarker: str | None = None
    """MediaPipe's face_landmarker.task, for the keypoint error."""
    inception: str | None = None
    """File with the weights of torch-fidelity's InceptionV3. None: torch-fidelity downloads them."""
    resizing: Literal["tensorflow", "pillow"] = "tensorflow"
    """Resizing of images to the 299 pixels of FID's InceptionV3: that of its original code, or Pillow's bicubic as in
    clean-fid (Parmar et al. 2022)."""
    clip_large: str = "openai/clip-vit-large-patch14-336"
    """Folder or hub id of the CLIP of CMMD."""
    dinov2: str = "facebook/dinov2-large"
    """Folder or hub id of a DINOv2."""
    lpips: Literal["alex", "vgg", "squeeze"] = "alex"
    """Network of LPIPS."""
    topiq: str = "topiq_nr-face"
    """Name of the TOPIQ variant in pyiqa."""
    llm_url: str | None = None
    """URL of an OpenAI-compatible API for the LLM score, such as http://localhost:8000/v1. The key is read from the
    environment variable LIKENESS_API_KEY, or for api.openai.com OPENAI_API_KEY."""
    llm_model: str = "gpt-4o-mini"
    """Model to request from the API."""
    bootstrap_samples: int = 2000
    """Bootstrap samples of a mean. Distances between sets use a twentieth of them."""

    def __post_init__(self) -> None:
        sets = [conditions_of(given) for given in self.given]
        different = {frozenset(names) for names in sets}
        if not sets or len(different) < len(sets) or sum(map(len, different)) < sum(map(len, sets)):
            raise InputError(f"given is {', '.join(self.given) or 'empty'}: name each set of conditions once")
        for given in self.given:
            for name in conditions_of(given):
                if name not in CONDITIONS:
                    known = ", ".join((*CONDITIONS, NONE))
                    raise InputError(f"Unknown condition {name!r} in given. Available: {known}; join several by +")
        minimums = {"count": 1, "seeds": 1, "size": 8, "choices": 2, "bootstrap_samples": 100}
        for name, minimum in minimums.items():
            if (value := getattr(self, name)) is not None and value < minimum:
                raise InputError(f"{name} is {value}; it must be at least {minimum}")
        if self.llm_url is not None:
            plain_address(self.llm_url)  # results contain it


def conditions_of(given: str) -> tuple[str, ...]:
    """Split a condition set: "mask+sketch" -> ("mask", "sketch"); "none" -> ()."""
    return () if given == NONE else tuple(given.split("+"))
