"""A picture's mask by a semantic segmentation network: any of transformers' classes that predicts parts of a face.

The network sees the picture at the size it was trained on; its scores, not its labels, are enlarged, so that borders
are smooth and no label is invented. Networks of others are dressed as ours (`Translated`), so that whoever parses a
face knows one kind of parser only.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F

from likeness.conditions.mask.classes import CLASS_INDEX, CLASSES, FLIP_PAIRS
from likeness.types import InputError

MEAN, STD = 0.5, 0.25
"""Normalisation of pixels in [0, 1], all channels alike."""

IMPOSSIBLE = -1e4
"""The score of a class that a network does not know: low, yet finite when enlarged and added, in half precision too."""


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
        network: a transformers semantic segmentation network with 19 labels in our order, or a `Translated` one.
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


def confusion_of(labels: np.ndarray, found: np.ndarray) -> np.ndarray:
    """Pixels by true class (rows) and found class (columns), int64 [19, 19]."""
    pairs = labels.astype(np.int64) * len(CLASSES) + found  # uint8 would overflow from class 13 on
    return np.bincount(pairs.ravel(), minlength=len(CLASSES) ** 2).reshape(len(CLASSES), len(CLASSES))


class Translated(nn.Module):
    """Another's segmentation network that takes our input and answers in our 19 classes."""

    def __init__(self, network: Any, classes: Sequence[int], mean: Sequence[float], std: Sequence[float], bgr: bool):
        """`classes`: ours of each of its labels; `mean` and `std`: its normalisation of pixels in [0, 1].

        All of it is kept in buffers, so that the hash of the weights tells two translations of one network apart.
        """
        super().__init__()
        self.network = network
        self.labels = [[label for label, own in enumerate(classes) if own == index] for index in range(len(CLASSES))]
        theirs = torch.tensor([mean, std], dtype=torch.float64)[..., None, None]  # [2, 3, 1, 1]
        self.register_buffer("scale", (STD / theirs[1]).float())
        self.register_buffer("shift", ((MEAN - theirs[0]) / theirs[1]).float())
        self.register_buffer("classes", torch.tensor(classes))
        self.register_buffer("channels", torch.tensor([2, 1, 0] if bgr else [0, 1, 2]))

    @property
    def device(self) -> torch.device:
        return self.network.device

    @property
    def dtype(self) -> torch.dtype:
        return self.network.dtype

    def forward(self, pixel_values: Tensor) -> SimpleNamespace:
        given = pixel_values[:, self.channels] * self.scale + self.shift
        scores = self.network(pixel_values=given).logits  # [B, L, h, w]
        unknown = torch.full_like(scores[:, 0], IMPOSSIBLE)
        ours = [scores[:, labels].amax(1) if labels else unknown for labels in self.labels]
        return SimpleNamespace(logits=torch.stack(ours, dim=1))  # [B, 19, h, w]


def translated(network: Any, classes: Sequence[int], settings: Mapping[str, Any], where: str) -> tuple[Translated, int]:
    """Another's network dressed as ours, and the pixels a side that it sees.

    Args:
        network: a transformers semantic segmentation network.
        classes: our class of each of its labels.
        settings: its image processor's, as `preprocessor_config.json` has them.
        where: how messages call the network.

    Raises:
        InputError: the processor wants what a square portrait cannot give.
    """
    size = settings.get("size")
    if isinstance(size, Mapping):
        sides = {size[key] for key in ("height", "width", "shortest_edge") if key in size}
        size = sides.pop() if len(sides) == 1 else None
    if not isinstance(size, int) or not settings.get("do_resize", True):
        raise InputError(f"{where} does not see squares of one size (its processor's size is {settings.get('size')})")
    if settings.get("do_center_crop"):
        raise InputError(
            f"{where} looks at the middle of a picture only (do_center_crop): its masks would lack the rim"
        )
    # They compute (255 p rescale - mean) / std for a pixel p in [0, 1]: the same as (p - mean / r) / (std / r).
    rescale = 255 * settings.get("rescale_factor", 1 / 255) if settings.get("do_rescale", True) else 255.0
    mean, std = [0.0] * 3, [1.0] * 3
    if settings.get("do_normalize", True):
        mean, std = settings.get("image_mean", []), settings.get("image_std", [])
        if not all(isinstance(values, list) and len(values) == 3 for values in (mean, std)) or min(std) <= 0:
            raise InputError(f"the processor of {where} says neither image_mean and image_std nor that it has none")
    mean, std = ([value / rescale for value in values] for values in (mean, std))
    return Translated(network, classes, mean, std, bool(settings.get("do_flip_channel_order"))).eval(), size


def sides_exchanged(masks: Sequence[np.ndarray]) -> bool:
    """Whether most masks that show both eyes, three at least, have the person's left one on the viewer's left."""
    votes = []
    for mask in masks:
        left, right = (np.nonzero(mask == CLASS_INDEX[name])[1] for name in ("l_eye", "r_eye"))
        if min(len(left), len(right)) > 2e-4 * mask.size:
            votes.append((right.mean() - left.mean()) / mask.shape[1] > 0.08)
    return len(votes) > 2 and float(np.mean(votes)) > 0.5
