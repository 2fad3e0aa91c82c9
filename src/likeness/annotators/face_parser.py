"""Masks by a semantic segmentation network: any class of transformers that predicts parts of a face.

The network runs at its training size. Its logits, not its labels, are enlarged, so that borders are smooth.
`Translated` wraps third-party networks, so that all parsers have the same input and output. Their labels are matched by
name, never by position: orders differ without notice, names rarely do.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F

from likeness.conditions.mask.classes import CLASS_INDEX, CLASSES, COUNTERPART, NAMES, plain_name
from likeness.files import first_line, read_json
from likeness.types import InputError
from likeness.weights.catalog import BUNDLED, COMMON, checkpoint_file
from likeness.weights.files import check_files
from likeness.weights.packed import PACKED, load_component

PROCESSOR = "preprocessor_config.json"
"""Configuration of the image processor of a transformers checkpoint."""

MEAN, STD = 0.5, 0.25
"""Normalization of pixels in [0, 1], equal for all channels."""

IMPOSSIBLE = -1e4
"""Logit of a class that a network lacks: low, but finite after interpolation and addition, also in half precision."""


NEEDED = ("background", "skin", "nose", "l_eye", "r_eye", "u_lip", "l_lip", "hair")
"""Classes that every face parser needs."""

PARSER_NAMES = NAMES | {"skin": (*NAMES["skin"], "beard")}
"""Class -> names in face parsers; some label a beard, which is skin here."""

CLASS_OF: dict[str, int] = {name: CLASS_INDEX[own] for own, names in PARSER_NAMES.items() for name in names}
"""Name in other parsers -> class."""


def load_face_parser(source: str | Path = "bundled", *, swapped: bool = False) -> tuple[Any, int]:
    """Load a face parser with this project's input and 19 classes, and the side of its input in pixels.

    `source` is `bundled`, a folder, packed or not, or a Hub id (`owner/name`) of any semantic segmentation network of
    transformers. Its labels are matched by name, its normalization is read from `preprocessor_config.json`; without
    that file it must be a parser trained by this project. `swapped`: its left is the viewer's left.

    Raises `InputError` if it cannot be read, its labels are not parts of a face, or its input is not a whole square
    image.
    """
    from transformers import AutoModelForSemanticSegmentation

    source = BUNDLED / COMMON / "face_parser" if str(source) == "bundled" else source
    config = read_json(checkpoint_file(source, "config.json"))
    packed = (Path(source) / PACKED).is_file()
    if Path(source).is_dir() and not packed:  # `load_component` checks the files itself
        check_files(Path(source))
    try:
        if packed:
            network = load_component(Path(source), "transformers", config["architectures"][0])
        else:
            network = AutoModelForSemanticSegmentation.from_pretrained(
                source, dtype=torch.float32, trust_remote_code=False
            ).eval()
    except (OSError, ValueError, RuntimeError) as error:
        raise InputError(f"{source} is not a semantic segmentation network: {first_line(error)}") from error
    labels = tuple(network.config.id2label[index] for index in range(network.config.num_labels))
    classes = classes_of(labels, str(source), swapped=swapped)
    processor = checkpoint_file(source, PROCESSOR)
    if processor.is_file():
        return translated(network, classes, read_json(processor), str(source))
    size = getattr(network.config, "image_size", None)
    if labels != CLASSES or not isinstance(size, int):
        raise InputError(f"{source} has no {PROCESSOR} with the size and normalization of its input: save it there")
    return network, size


def classes_of(labels: Sequence[str], where: str, *, swapped: bool = False) -> tuple[int, ...]:
    """Return the class of each label of a network, by name. `swapped`: its left is the person's right. Raises
    `InputError` if a name is unknown, or a class of `NEEDED` is missing; `where` is the network's name.
    """
    known = [plain_name(name) for name in labels]
    unknown = [label for label, name in zip(labels, known, strict=True) if name not in CLASS_OF]
    if unknown:
        shown = ", ".join(unknown[:8]) + (", ..." if len(unknown) > 8 else "")
        raise InputError(
            f"{len(unknown)} of the {len(labels)} labels of {where} are not parts of a face: {shown}. "
            "Name them in id2label of its config.json, for example skin, l_eye, u_lip, hair"
        )
    classes = [CLASS_OF[name] for name in known]
    if missing := [name for name in NEEDED if CLASS_INDEX[name] not in classes]:
        raise InputError(f"{where} has no label for {', '.join(missing)}: it is not a face parser")
    if swapped:
        classes = [COUNTERPART.get(index, index) for index in classes]
    return tuple(classes)


def to_input(image: np.ndarray, size: int) -> Tensor:
    """Convert an image, uint8 [H, W, 3], to the network's input, [1, 3, size, size]."""
    resized = Image.fromarray(image)
    if resized.size != (size, size):
        resized = resized.resize((size, size), Image.Resampling.LANCZOS)
    values = torch.from_numpy(np.array(resized)).permute(2, 0, 1)[None].float() / 255
    return (values - MEAN) / STD


def flip_scores(scores: Tensor) -> Tensor:
    """Mirror logits [B, 19, h, w] horizontally and swap the classes of the person's left and right."""
    order = [COUNTERPART.get(index, index) for index in range(len(CLASSES))]
    return scores.flip(-1)[:, order]


@torch.no_grad()
def parse_faces(network: Any, images: Sequence[np.ndarray], *, size: int) -> list[np.ndarray]:
    """Predict the masks of B faces, uint8 RGB [H, W, 3] in any size, framed as the training images: B of uint8 [H, W].

    `network` has 19 labels in canonical order, or is `Translated`; `size` is the side of its training images in pixels.
    Logits are averaged with those of the mirrored image: slightly better, twice the time.
    """
    given = torch.cat([to_input(image, size) for image in images]).to(network.device, network.dtype)
    scores = network(pixel_values=given).logits.float()  # [B, 19, h, w]
    scores = scores + flip_scores(network(pixel_values=given.flip(-1)).logits.float())
    masks = []
    for image, logits in zip(images, scores, strict=True):
        enlarged = F.interpolate(logits[None], size=image.shape[:2], mode="bilinear", align_corners=False)
        masks.append(enlarged.argmax(1)[0].to(torch.uint8).cpu().numpy())
    return masks


def confusion_of(labels: np.ndarray, found: np.ndarray) -> np.ndarray:
    """Count pixels by true class (rows) and predicted class (columns), int64 [19, 19]."""
    pairs = labels.astype(np.int64) * len(CLASSES) + found  # uint8 would overflow from class 13 on
    return np.bincount(pairs.ravel(), minlength=len(CLASSES) ** 2).reshape(len(CLASSES), len(CLASSES))


class Translated(nn.Module):
    """Third-party segmentation network with this project's input and 19 classes."""

    def __init__(self, network: Any, classes: Sequence[int], mean: Sequence[float], std: Sequence[float], bgr: bool):
        """`classes`: our class of each of its labels; `mean` and `std`: its normalization of pixels in [0, 1].

        All of them are buffers, so that the hash of the weights includes them.
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
    """Wrap a third-party network with our class of each of its labels and its normalization (`settings`, the content of
    its `preprocessor_config.json`); also return the side of its input in pixels. `where` is its name in error messages.

    Raises `InputError` if its images are not resized to a square, or its normalization is not defined.
    """
    size = settings.get("size")
    if isinstance(size, Mapping):
        sides = [size[key] for key in ("height", "width", "shortest_edge") if key in size]
        size = sides[0] if sides and all(side == sides[0] for side in sides) else None
    if not isinstance(size, int) or size < 32 or not settings.get("do_resize", True):
        raise InputError(f"{where} does not take squares of one size (size of its processor: {settings.get('size')})")
    if settings.get("do_center_crop"):
        raise InputError(f"{where} crops the center of an image (do_center_crop): its masks would lack the border")
    # (255 p rescale - mean) / std of a pixel p in [0, 1] equals (p - mean / r) / (std / r) with r = 255 rescale.
    factor = settings.get("rescale_factor", 1 / 255) if settings.get("do_rescale", True) else 1.0
    mean: Any = [0.0] * 3
    std: Any = [1.0] * 3
    if settings.get("do_normalize", True):
        mean, std = settings.get("image_mean"), settings.get("image_std")
    if not (is_numbers([factor], 1) and is_numbers(mean, 3) and is_numbers(std, 3) and min(factor, *std) > 0):
        wanted = "a positive rescale_factor, and image_mean and image_std of three numbers (or do_normalize false)"
        raise InputError(f"{where} has no valid normalization: its processor needs {wanted}")
    mean, std = ([value / (255 * factor) for value in values] for values in (mean, std))
    return Translated(network, classes, mean, std, bool(settings.get("do_flip_channel_order"))).eval(), size


def is_numbers(values: Any, count: int) -> bool:
    """Return whether this is a list of so many finite numbers."""
    plain = isinstance(values, list) and all(type(value) in (int, float) for value in values)
    return plain and len(values) == count and bool(np.isfinite(values).all())


def sides_swapped(masks: Sequence[np.ndarray]) -> bool:
    """Return whether most masks with both eyes, at least three, have the person's left eye on the viewer's left."""
    votes = []
    for mask in masks:
        left, right = (np.nonzero(mask == CLASS_INDEX[name])[1] for name in ("l_eye", "r_eye"))
        if min(len(left), len(right)) > 2e-4 * mask.size:
            votes.append((right.mean() - left.mean()) / mask.shape[1] > 0.08)
    return len(votes) > 2 and float(np.mean(votes)) > 0.5
