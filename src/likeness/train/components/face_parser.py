"""Train a face parser, a semantic segmentation network with 19 classes, on a few hundred manual masks.

There are two architectures, so that one can annotate training data and the other, which does not, can evaluate
generated images. The small number of masks requires strong augmentation of geometry, color and resolution.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from PIL import Image, ImageEnhance, ImageFilter
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import (
    ConvNextConfig,
    SegformerConfig,
    SegformerForSemanticSegmentation,
    UperNetConfig,
    UperNetForSemanticSegmentation,
)

from likeness.annotators.face_parser import MEAN, STD, confusion_of, parse_faces
from likeness.conditions import CONDITIONS
from likeness.conditions.mask.classes import CLASSES
from likeness.data.ahead import read_ahead
from likeness.data.folder import column_of, read_photo
from likeness.data.sampler import stream
from likeness.train.components import steps
from likeness.train.config import ComponentRecipe, check_minimum, check_values


@dataclass(frozen=True, kw_only=True)
class FaceParserRecipe(ComponentRecipe):
    """Architecture and training of a face parser."""

    kind: Literal["face_parser"] = "face_parser"
    """What the recipe trains."""
    architecture: Literal["segformer", "upernet"] = "segformer"
    """SegFormer, or UPerNet on ConvNeXt."""
    widths: tuple[int, int, int, int] = (32, 64, 128, 192)
    """Channels at a quarter, an eighth, a sixteenth and a thirty-second of the size."""
    depths: tuple[int, int, int, int] = (2, 2, 2, 2)
    """Layers at each of these sizes."""
    decoder_width: int = 128
    """Channels of the decoder."""
    size: int = 192
    """Input size of the network in pixels."""
    test_size: int = 256
    """Image size in pixels of the measurements."""
    weight_power: float = 0.25
    """The loss weight of a class is the fraction of its pixels to the power of minus this."""
    warmup: int = 1600
    checkpoint_every: int = 3200
    compile: bool = False
    """Use torch.compile. On a CPU it makes the backward pass slower, by half."""


def check(recipe: FaceParserRecipe) -> None:
    """Check the values that only this recipe has. Raises `InputError`."""
    check_minimum(recipe, 32, "size")
    check_minimum(recipe, 1, "test_size", "decoder_width")
    check_minimum(recipe, 0, "weight_power")
    whole = all(width > 0 and width % heads_of(width) == 0 for width in recipe.widths)
    check_values(
        ("widths", list(recipe.widths), whole, "above 0, each a multiple of its number of heads, width // 32"),
        ("depths", list(recipe.depths), min(recipe.depths) > 0, "at least 1 each"),
        ("batch", recipe.batch, recipe.batch > 1 or recipe.architecture == "segformer", "at least 2 for upernet"),
    )


def heads_of(width: int) -> int:
    """Return the number of SegFormer's attention heads at a width."""
    return max(1, width // 32)


def build(recipe: FaceParserRecipe) -> Any:
    """Create the network: logits [B, 19, h, w] at a quarter of the input size (SegFormer) or at the input size."""
    labels = dict(enumerate(CLASSES))
    common = {"id2label": labels, "label2id": {name: index for index, name in labels.items()}}
    if recipe.architecture == "segformer":
        config = SegformerConfig(
            hidden_sizes=list(recipe.widths),
            depths=list(recipe.depths),
            num_attention_heads=[*map(heads_of, recipe.widths)],
            decoder_hidden_size=recipe.decoder_width,
            classifier_dropout_prob=0.1,
            drop_path_rate=0.0,
            **common,
        )
        return SegformerForSemanticSegmentation(config)
    backbone = ConvNextConfig(
        hidden_sizes=list(recipe.widths),
        depths=list(recipe.depths),
        out_features=["stage1", "stage2", "stage3", "stage4"],
    )
    config = UperNetConfig(
        backbone_config=backbone, hidden_size=recipe.decoder_width, use_auxiliary_head=False, **common
    )
    return UperNetForSemanticSegmentation(config)


class Examples:
    """An endless sequence of augmented images and masks; pair number p depends only on (seed, p).

    Decoded images are kept in memory, a third larger than the input of the network: decoding takes as long as a step.
    """

    def __init__(self, folders: Sequence[str], size: int, seed: int) -> None:
        self.size, self.seed = size, seed
        stored = size * 4 // 3
        self.pairs = [
            (Image.fromarray(read_photo(row["file_name"], stored)), Image.fromarray(steps.read_labels(row, stored)))
            for row in steps.rows_with(column_of("mask"), folders)
        ]

    def __getitem__(self, position: int) -> tuple[np.ndarray, np.ndarray]:
        """Return pair number `position`: uint8 [S, S, 3] and labels uint8 [S / 2, S / 2]."""
        rng = stream(self.seed, position)
        image, mask = self.pairs[int(rng.integers(len(self.pairs)))]
        image, mask = random_affine(image, mask, self.size, rng)
        pixels, labels = np.asarray(color_jitter(image, rng)), np.asarray(mask)
        if rng.integers(2):
            pixels, labels = pixels[:, ::-1], CONDITIONS["mask"].flip(labels)
        return np.ascontiguousarray(pixels), np.ascontiguousarray(labels)

    def batch(self, start: int, size: int) -> tuple[Tensor, Tensor]:
        """Return inputs [B, 3, S, S] and labels int64 [B, S / 2, S / 2] of the pairs from number `start` on."""
        images, labels = zip(*(self[position] for position in range(start, start + size)), strict=True)
        inputs = torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).float() / 255
        return (inputs - MEAN) / STD, torch.from_numpy(np.stack(labels)).long()


def random_affine(
    image: Image.Image, mask: Image.Image, size: int, rng: np.random.Generator
) -> tuple[Image.Image, Image.Image]:
    """Apply a random rotation of up to 15 degrees, zoom of 0.8 to 1.25 and shift to image and mask.

    The mask is returned at half the size: the network predicts at a quarter, and a loss at full size takes more time
    without a gain.
    """
    angle, zoom = np.deg2rad(rng.uniform(-15, 15)), rng.uniform(0.8, 1.25)
    shift = rng.uniform(-0.08, 0.08, 2)
    cos, sin = np.cos(angle) / zoom, np.sin(angle) / zoom

    def matrix(width: int, height: int, size: int) -> tuple[float, ...]:
        # output pixel -> input pixel, relative to the centers of both
        scale = np.array([width / size, height / size])
        offset = np.array([width, height]) * (0.5 + shift)
        a, b = cos * scale[0], -sin * scale[0]
        d, e = sin * scale[1], cos * scale[1]
        half = size / 2
        return (a, b, offset[0] - a * half - b * half, d, e, offset[1] - d * half - e * half)

    affine = Image.Transform.AFFINE
    transformed = image.transform((size, size), affine, matrix(*image.size, size), Image.Resampling.BILINEAR)
    half = size // 2
    labels = mask.transform((half, half), affine, matrix(*mask.size, half), Image.Resampling.NEAREST)
    return transformed, labels


def color_jitter(image: Image.Image, rng: np.random.Generator) -> Image.Image:
    """Change brightness, contrast and saturation at random; some images become gray, blurred or lose resolution."""
    for enhance in (ImageEnhance.Brightness, ImageEnhance.Contrast, ImageEnhance.Color):
        image = enhance(image).enhance(float(rng.uniform(0.6, 1.4)))
    if rng.random() < 0.1:
        image = image.convert("L").convert("RGB")
    chance = rng.random()
    if chance < 0.2:
        image = image.filter(ImageFilter.GaussianBlur(float(rng.uniform(0.3, 1.5))))
    elif chance < 0.4:
        size = image.size
        side = int(size[0] * rng.uniform(0.35, 0.8))
        image = image.resize((side, side), Image.Resampling.BILINEAR).resize(size, Image.Resampling.BILINEAR)
    return image


def class_weights(masks: Sequence[np.ndarray], power: float) -> Tensor:
    """Return fraction^-power of every class, with a mean of 1 over the pixels, [19]."""
    counts = np.zeros(len(CLASSES))
    for mask in masks:
        counts += np.bincount(mask.ravel(), minlength=len(CLASSES))
    fractions = (counts + 1) / counts.sum()
    weights = fractions**-power
    return torch.tensor(weights / (weights * fractions).sum(), dtype=torch.float32)


def loss_of(network: nn.Module, inputs: Tensor, labels: Tensor, weights: Tensor) -> Tensor:
    """Return the weighted cross-entropy of the logits, resized to the labels."""
    logits = network(pixel_values=inputs).logits.float()  # [B, 19, h, w]
    size = labels.shape[-2:]
    logits = F.interpolate(logits, size=size, mode="bilinear", align_corners=False)  # [B, 19, S / 2, S / 2]
    return F.cross_entropy(logits, labels, weight=weights)


def measure(network: Any, rows: list[dict[str, Any]], recipe: FaceParserRecipe) -> dict[str, float]:
    """Measure pixel accuracy, and F1 by class pooled over the images.

    Returns:
        `accuracy`; `f1_<class>` for every class that occurs; `f1`: their mean over the classes in at least 10 masks (or
        in any, if there are fewer than 20 masks); `n`, the number of images.
    """
    confusion = np.zeros((len(CLASSES), len(CLASSES)), dtype=np.int64)
    occurrences = np.zeros(len(CLASSES), dtype=np.int64)
    for row in rows:
        labels = steps.read_labels(row, recipe.test_size)
        (predicted,) = parse_faces(network, [read_photo(row["file_name"], recipe.test_size)], size=recipe.size)
        confusion += confusion_of(labels, predicted)
        occurrences[np.unique(labels)] += 1
    hits = confusion.diagonal()
    scores = 2 * hits / np.maximum(confusion.sum(0) + confusion.sum(1), 1)
    counted = occurrences >= (10 if len(rows) >= 20 else 1)
    measured = {"accuracy": float(hits.sum() / confusion.sum()), "f1": float(scores[counted].mean()), "n": len(rows)}
    return measured | {f"f1_{CLASSES[i]}": float(scores[i]) for i in np.flatnonzero(occurrences)}


def train_face_parser(recipe: FaceParserRecipe, run: Path) -> None:
    """Train, or resume, in the folder `run`, and publish the EMA weights to `run/model`. Raises as
    `steps.open_component`.
    """
    check(recipe)
    with steps.open_component(recipe, run) as (world, signals):
        examples = Examples(recipe.train, recipe.size, recipe.seed)
        test = steps.rows_with(column_of("mask"), recipe.test)
        weights = class_weights([np.asarray(mask) for _, mask in examples.pairs], recipe.weight_power).to(world.device)
        torch.manual_seed(recipe.seed)
        network = build(recipe).to(world.device).train()
        network.config.image_size = recipe.size  # recorded for inference
        settings = {"lr": recipe.learning_rate, "betas": (0.9, 0.99), "weight_decay": 0.05}
        optimizer = torch.optim.AdamW(network.parameters(), **settings)
        progress = steps.resume(recipe, run, world, signals, network, [optimizer])
        compiled = torch.compile(loss_of) if recipe.compile else loss_of
        batches = read_ahead(lambda start: examples.batch(start, recipe.batch), progress.starts)
        for start, (inputs, labels) in progress.steps(batches):
            torch.manual_seed(recipe.seed + start)  # for dropout
            with world.autocast("auto"):
                loss = compiled(network, inputs.to(world.device), labels.to(world.device), weights)
            loss.backward()
            progress.end_step(loss=loss, gradient_norm=steps.optimizer_step(progress, recipe, start))
            steps.publish(progress, recipe, lambda parser: [measure(parser, test, recipe)], steps=20)
