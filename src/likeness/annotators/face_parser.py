"""A picture's mask by a semantic segmentation network: any of transformers' classes that predicts our 19 classes.

The network sees the picture at the size it was trained on; its scores, not its labels, are enlarged, so that borders
are smooth and no label is invented.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from likeness.conditions.classes import CLASSES, FLIP_PAIRS

MEAN, STD = 0.5, 0.25
"""Normalisation of pixels in [0, 1], all channels alike."""


def to_input(picture: np.ndarray, size: int) -> Tensor:
    """uint8 [H, W, 3] to the network's input, [1, 3, size, size]."""
    image = Image.fromarray(picture)
    if image.size != (size, size):
        image = image.resize((size, size), Image.Resampling.LANCZOS)
    values = torch.from_numpy(np.array(image)).permute(2, 0, 1)[None].float() / 255
    return (values - MEAN) / STD


def flip_scores(scores: Tensor) -> Tensor:
    """Mirror scores [B, 19, h, w], exchanging the classes of the person's left and right."""
    order = list(range(len(CLASSES)))
    for left, right in FLIP_PAIRS:
        order[left], order[right] = right, left
    return scores.flip(-1)[:, order]


@torch.no_grad()
def parse_faces(network: Any, pictures: Sequence[np.ndarray], *, size: int, mirrored: bool = True) -> list[np.ndarray]:
    """The masks of faces.

    Args:
        network: a transformers semantic segmentation network with 19 labels in our order.
        pictures: B of uint8 RGB [H, W, 3], framed as the training pictures were; each may have a size of its own.
        size: pixels a side that the network was trained on.
        mirrored: also look at the mirrored pictures and average: a little better, twice the time.

    Returns:
        Class indices, B of uint8 [H, W].
    """
    given = torch.cat([to_input(picture, size) for picture in pictures]).to(network.device, network.dtype)
    scores = network(pixel_values=given).logits.float()  # [B, 19, h, w]
    if mirrored:
        scores = scores + flip_scores(network(pixel_values=given.flip(-1)).logits.float())
    masks = []
    for picture, own in zip(pictures, scores, strict=True):
        enlarged = F.interpolate(own[None], size=picture.shape[:2], mode="bilinear", align_corners=False)
        masks.append(enlarged.argmax(1)[0].to(torch.uint8).cpu().numpy())
    return masks
