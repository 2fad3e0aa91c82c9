"""Train a face parser: picture to the 19 classes, from a few hundred hand-made masks.

Two architectures of transformers are at hand, so that one can make training data and the other, which never does,
can judge generated pictures. So few masks need strong augmentation: geometry, colour, and loss of resolution.
"""

from __future__ import annotations

from collections.abc import Iterator
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
from likeness.data.folder import column_of, read_folder, read_photo
from likeness.data.sampler import stream
from likeness.train.checkpoint import save_state
from likeness.train.learner import Learner
from likeness.train.metrics import Reporter
from likeness.train.optim import Ema, learning_rate
from likeness.train.run import begun, finite_numbers
from likeness.types import InputError


@dataclass(frozen=True, kw_only=True)
class FaceParserRecipe:
    """How a face parser is built and trained."""

    kind: Literal["face_parser"] = "face_parser"
    """What the recipe trains."""
    train: tuple[str, ...]
    """Prepared folders with masks to learn from."""
    test: tuple[str, ...]
    """Prepared folders with masks that are only measured."""
    architecture: Literal["segformer", "upernet"] = "segformer"
    """SegFormer, or UPerNet on ConvNeXt."""
    widths: tuple[int, int, int, int] = (32, 64, 128, 192)
    """Channels at a quarter, an eighth, a sixteenth and a thirty-second of the size."""
    depths: tuple[int, int, int, int] = (2, 2, 2, 2)
    """Layers at each."""
    decoder_width: int = 128
    """Channels where the four are joined."""
    size: int = 192
    """Pixels a side that the network sees."""
    measured_size: int = 256
    """Pixels a side at which it is measured."""
    weight_power: float = 0.25
    """A class weighs its share of the pixels to the power of minus this: rare classes count for more."""
    images: int
    """Pictures to see in all."""
    batch: int = 16
    """Pictures a step."""
    learning_rate: float = 1e-3
    """Peak rate."""
    warmup: int = 1600
    """Pictures of warm-up."""
    ema: float = 0.08
    """Relative width of the weight average."""
    checkpoint_every: int = 3200
    """Pictures between states on disk."""
    seed: int = 0
    """Seed of every random draw."""
    compile: bool = False
    """Fuse the step with torch.compile: on a CPU it made the backward pass half as fast again as it was without."""
    threads: int | None = None
    """CPU threads; None leaves torch's choice."""


def build(recipe: FaceParserRecipe) -> Any:
    """The network of a recipe: logits [B, 19, h, w], h and w a quarter of the input or the input's own."""
    labels = dict(enumerate(CLASSES))
    common = {"id2label": labels, "label2id": {name: index for index, name in labels.items()}}
    if recipe.architecture == "segformer":
        config = SegformerConfig(
            hidden_sizes=list(recipe.widths),
            depths=list(recipe.depths),
            num_attention_heads=[max(1, width // 32) for width in recipe.widths],
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
    """Endless augmented pairs; pair number p depends only on (seed, p).

    The pictures are held decoded, a third larger than the network sees them: decoding them anew cost as much as a step.
    """

    def __init__(self, folders: tuple[str, ...], size: int, seed: int) -> None:
        self.size, self.seed = size, seed
        held = size * 4 // 3
        mask = CONDITIONS["mask"]
        self.pairs = [
            (
                Image.fromarray(read_photo(row["file_name"], held)),
                Image.fromarray(mask.resize(mask.read(row[column_of("mask")]).raw, held, held)),
            )
            for row in rows_with_masks(folders)
        ]

    def __getitem__(self, position: int) -> tuple[np.ndarray, np.ndarray]:
        """Pair number `position`: uint8 [S, S, 3] and labels uint8 [S / 2, S / 2]."""
        rng = stream(self.seed, position)
        image, mask = self.pairs[int(rng.integers(len(self.pairs)))]
        image, mask = turn_and_crop(image, mask, self.size, rng)
        image = recolour(image, rng)
        picture, labels = np.asarray(image), np.asarray(mask)
        if rng.integers(2):
            picture, labels = picture[:, ::-1], CONDITIONS["mask"].flip(labels)
        return np.ascontiguousarray(picture), np.ascontiguousarray(labels)


def rows_with_masks(folders: tuple[str, ...]) -> list[dict[str, Any]]:
    """The rows of the folders that have a mask.

    Raises:
        InputError: there are none.
    """
    rows = [row for folder in folders for row in read_folder(folder) if column_of("mask") in row]
    if not rows:
        raise InputError(f"no row of {', '.join(folders)} has a mask")
    return rows


def turn_and_crop(
    image: Image.Image, mask: Image.Image, size: int, rng: np.random.Generator
) -> tuple[Image.Image, Image.Image]:
    """A random turn of up to 15 degrees, zoom of 0.8 to 1.25 and shift, the same for picture and mask.

    The mask comes at half the size: the network answers at a quarter of it, and a loss at the full size costs more time
    than it teaches.
    """
    angle, zoom = np.deg2rad(rng.uniform(-15, 15)), rng.uniform(0.8, 1.25)
    shift = rng.uniform(-0.08, 0.08, 2)
    cos, sin = np.cos(angle) / zoom, np.sin(angle) / zoom

    def matrix(width: int, height: int, size: int) -> tuple[float, ...]:
        # output pixel -> input pixel, about the centre of both
        scale = np.array([width / size, height / size])
        offset = np.array([width, height]) * (0.5 + shift)
        a, b = cos * scale[0], -sin * scale[0]
        d, e = sin * scale[1], cos * scale[1]
        half = size / 2
        return (a, b, offset[0] - a * half - b * half, d, e, offset[1] - d * half - e * half)

    affine = Image.Transform.AFFINE
    turned = image.transform((size, size), affine, matrix(*image.size, size), Image.Resampling.BILINEAR)
    half = size // 2
    labels = mask.transform((half, half), affine, matrix(*mask.size, half), Image.Resampling.NEAREST)
    return turned, labels


def recolour(image: Image.Image, rng: np.random.Generator) -> Image.Image:
    """Random brightness, contrast and colour; sometimes grey, sometimes blurred or at half the resolution."""
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


def batches(examples: Examples, seen: int, total: int, batch: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Batches from pair number `seen` on, read ahead: inputs [B, 3, S, S] and labels int64 [B, S / 2, S / 2]."""

    def make(start: int) -> tuple[Tensor, Tensor]:
        pictures, labels = zip(*(examples[position] for position in range(start, start + batch)), strict=True)
        inputs = torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2).float() / 255
        return (inputs - MEAN) / STD, torch.from_numpy(np.stack(labels)).long()

    return read_ahead(make, range(seen, total, batch))


def class_weights(masks: list[np.ndarray], power: float) -> Tensor:
    """share^-power of every class, with a mean of 1 over the pixels, [19]."""
    counts = np.zeros(len(CLASSES))
    for mask in masks:
        counts += np.bincount(mask.ravel(), minlength=len(CLASSES))
    shares = (counts + 1) / counts.sum()
    weights = shares**-power
    return torch.tensor(weights / (weights * shares).sum(), dtype=torch.float32)


def loss_of(network: nn.Module, inputs: Tensor, labels: Tensor, weights: Tensor) -> Tensor:
    """Weighted cross-entropy of the scores, brought to the labels' size."""
    scores = network(pixel_values=inputs).logits.float()  # [B, 19, h, w]
    scores = F.interpolate(scores, size=labels.shape[-2:], mode="bilinear", align_corners=False)
    return F.cross_entropy(scores, labels, weight=weights)


def measure(network: Any, rows: list[dict[str, Any]], recipe: FaceParserRecipe) -> dict[str, float]:
    """Pixel accuracy, and F1 by class pooled over the pictures.

    Returns:
        `accuracy`; `f1_<class>` for every class that occurs; `f1`: their mean over the classes that at least 10 masks
        have (all that occur, where there are fewer than 20 masks); and `n`.
    """
    size = recipe.measured_size
    confusion = np.zeros((len(CLASSES), len(CLASSES)), dtype=np.int64)
    occurs = np.zeros(len(CLASSES), dtype=np.int64)
    for row in rows:
        mask = CONDITIONS["mask"]
        labels = mask.resize(mask.read(row[column_of("mask")]).raw, size, size)
        (found,) = parse_faces(network, [read_photo(row["file_name"], size)], size=recipe.size)
        confusion += confusion_of(labels, found)
        occurs[np.unique(labels)] += 1
    hits = confusion.diagonal()
    scores = 2 * hits / np.maximum(confusion.sum(0) + confusion.sum(1), 1)
    counted = occurs >= (10 if len(rows) >= 20 else 1)
    measured = {"accuracy": float(hits.sum() / confusion.sum()), "f1": float(scores[counted].mean()), "n": len(rows)}
    return measured | {f"f1_{CLASSES[i]}": float(scores[i]) for i in np.flatnonzero(occurs)}


def train_face_parser(recipe: FaceParserRecipe, run: Path) -> None:
    """Train, resuming from `run` where it has a state, and publish the average to `run/model`.

    Raises:
        InputError: another process trains in `run`, it was begun with another recipe, the loss is no number, or a
            folder of the recipe is missing or has no masks.
    """
    with begun(recipe, run):
        learn(recipe, run)


def learn(recipe: FaceParserRecipe, run: Path) -> None:
    """The training itself, in a folder that is held."""
    if recipe.threads:
        torch.set_num_threads(recipe.threads)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    examples, test = Examples(recipe.train, recipe.size, recipe.seed), rows_with_masks(recipe.test)
    weights = class_weights([np.asarray(mask) for _, mask in examples.pairs], recipe.weight_power).to(device)
    torch.manual_seed(recipe.seed)
    network = build(recipe).to(device).train()
    optimizer = torch.optim.AdamW(network.parameters(), lr=recipe.learning_rate, betas=(0.9, 0.99), weight_decay=0.05)
    learner = Learner(model=network, optimizers=[optimizer], averages=[Ema(network, recipe.ema)])
    learner.resume(run)
    compiled = torch.compile(loss_of) if recipe.compile else loss_of
    reporter = Reporter(run, recipe.images, learner.seen)
    for inputs, labels in batches(examples, learner.seen, recipe.images, recipe.batch):
        torch.manual_seed(recipe.seed + learner.seen)  # dropout's stream: a function of progress
        with torch.autocast(device, torch.bfloat16):
            loss = compiled(network, inputs.to(device), labels.to(device), weights)
        loss.backward()
        rate = learning_rate(learner.seen, recipe.images, recipe.learning_rate, recipe.warmup, "cosine")
        norm = learner.step(rate, clip=1.0)
        learner.count(recipe.batch)
        seen = learner.seen
        report = seen % (recipe.batch * 20) == 0
        keep = seen % recipe.checkpoint_every < recipe.batch or seen >= recipe.images
        if report or keep:
            finite_numbers(seen, loss.item(), norm.item())
        if report:
            reporter.report(seen, loss=loss.item(), gradient_norm=norm.item())
        if keep:
            reporter.report(seen, **measure(publish(learner, recipe, run), test, recipe))
            save_state(run, seen, learner.state())


def publish(learner: Learner, recipe: FaceParserRecipe, run: Path) -> Any:
    """Write the averaged network as a transformers folder, `run/model`, and return it."""
    averaged = build(recipe)
    averaged.load_state_dict(learner.model.state_dict())
    learner.averages[0].copy_to(averaged)
    averaged.config.image_size = recipe.size  # what whoever uses it must know
    averaged.eval().save_pretrained(run / "model")
    return averaged
