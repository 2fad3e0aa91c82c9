"""Train a text encoder together with an image encoder, by contrastive learning (CLIP).

The classes are transformers' `CLIPModel` and `CLIPTokenizer`, so that the result loads as any CLIP. The vocabulary is
learned from the captions: words that describe faces are one token, which shortens captions and training. Other words
are split into bytes; no word is unknown. The image encoder is kept to evaluate how well images match their captions.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from tokenizers import Tokenizer, pre_tokenizers
from tokenizers.models import BPE
from tokenizers.trainers import BpeTrainer
from torch import Tensor, nn
from transformers import CLIPConfig, CLIPModel, CLIPTextConfig, CLIPTokenizer, CLIPVisionConfig

from likeness.data.ahead import read_ahead
from likeness.data.folder import attributes_of, captions_of, read_photo
from likeness.data.sampler import Sampler, stream
from likeness.encoders.latent import to_tensor
from likeness.encoders.text import token_ids
from likeness.encoders.text_image import (
    AttributeHead,
    embed_captions,
    embed_images,
    retrieved,
    save_attribute_head,
    text_length,
)
from likeness.files import log_line, writing_folder
from likeness.train.checkpoint import newest
from likeness.train.components import steps
from likeness.train.config import ComponentRecipe, check_minimum, check_values
from likeness.train.muon import Muon
from likeness.types import InputError

START, END, WORD_END = "<|startoftext|>", "<|endoftext|>", "</w>"
MIN_VOCABULARY = 2 * 256 + 2
"""Every byte twice, within a word and at its end, so that every character can be encoded; start and end."""
IGNORED = -100
"""Class of unknown attributes, which cross-entropy ignores."""
MAX_LOG_SCALE = math.log(100)
"""Radford et al. 2021, section 2.5: the temperature is clipped so that logits are scaled by at most 100."""


@dataclass(frozen=True, kw_only=True)
class TextImageRecipe(ComponentRecipe):
    """Architecture and training of tokenizer, text encoder and image encoder. `images` counts pairs."""

    kind: Literal["text_image"] = "text_image"
    """What the recipe trains."""
    size: int = 64
    """Input size of the image encoder in pixels."""
    vocabulary: int = 2000
    """Largest number of tokens, 514 of which are bytes, start and end."""
    max_tokens: int = 32
    """Length of a caption in tokens, including start and end; longer ones are truncated."""
    text_width: int = 192
    """Width of the text encoder and of its features."""
    text_layers: int = 3
    """Layers of the text encoder."""
    text_heads: int = 4
    """Attention heads of the text encoder."""
    vision_width: int = 192
    """Width of the image encoder."""
    vision_layers: int = 4
    """Layers of the image encoder."""
    vision_heads: int = 4
    """Attention heads of the image encoder."""
    patch: int = 8
    """Patch size of the image encoder in pixels."""
    projection: int = 128
    """Dimension of the shared embedding space."""
    batch: int = 128
    """Pairs per step; each is contrasted with all others of its step."""
    warmup: int = 3200
    weight_decay: float = 0.1
    """Weight decay of the matrices; embeddings, biases and norms have none."""
    crop: float = 0.9
    """Smallest side of the random crop. Images are not flipped, since captions may name sides."""
    brightness: float = 0.1
    """Largest relative change of the brightness."""
    attribute_weight: float = 0.0
    """Weight of a loss that predicts the column "attributes" from the image. 0 disables it."""
    retrieval_candidates: int = 50
    """Number of captions among which the measurement searches the right one."""
    checkpoint_every: int = 12_800


def check(recipe: TextImageRecipe) -> None:
    """Check the values that only this recipe has. Raises `InputError`."""
    for part in ("text", "vision"):
        check_minimum(recipe, 1, *(f"{part}_{name}" for name in ("width", "layers", "heads")))
        width, heads = getattr(recipe, f"{part}_width"), getattr(recipe, f"{part}_heads")
        check_values((f"{part}_width", width, width % heads == 0, f"a multiple of {part}_heads, {heads}"))
    check_minimum(recipe, 1, "patch", "projection", "retrieval_candidates")
    check_minimum(recipe, recipe.patch, "size")
    check_minimum(recipe, 0, "weight_decay", "brightness", "attribute_weight")
    check_values(("crop", recipe.crop, 0 < recipe.crop <= 1, "above 0, at most 1"))


class Batch(NamedTuple):
    """B pairs of an image and one of its captions."""

    images: Tensor  # in [-1, 1], [B, 3, S, S]
    ids: Tensor  # token ids, [B, L]
    positives: Tensor  # which captions match which images, bool [B, B], symmetric: its own, and identical ones
    labels: Tensor  # classes of the A attributes, int64 [B, A]; -100 if unknown


def attribute_classes(rows: Sequence[dict[str, Any]], max_classes: int = 32) -> dict[str, list[str]]:
    """Return the attributes of the rows with their values: strings and booleans with 2 to `max_classes` different
    values, not numbers.
    """
    values: dict[str, set[str]] = {}
    for row in rows:
        for name, value in attributes_of(row).items():
            if isinstance(value, (str, bool)):
                values.setdefault(name, set()).add(str(value))
    return {name: sorted(found) for name, found in sorted(values.items()) if 2 <= len(found) <= max_classes}


def train_tokenizer(captions: Iterable[str], vocabulary: int, max_tokens: int) -> CLIPTokenizer:
    """Train CLIP's byte-level BPE tokenizer on captions in any order: lower case, no unknown token, up to `vocabulary`
    tokens, including 514 for bytes, start and end; truncation to `max_tokens`, padding with the end token. Raises
    `InputError` if `vocabulary` is too small for the bytes, or `max_tokens` for a single word.
    """
    if vocabulary < MIN_VOCABULARY or max_tokens < 3:
        raise InputError(
            f"a tokenizer needs vocabulary >= {MIN_VOCABULARY} and max_tokens >= 3, not {vocabulary}, {max_tokens}"
        )
    clip = CLIPTokenizer().backend_tokenizer  # for CLIP's normalizer and splitting rule
    learned = Tokenizer(BPE(end_of_word_suffix=WORD_END))
    learned.normalizer, learned.pre_tokenizer = clip.normalizer, clip.pre_tokenizer
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = BpeTrainer(
        vocab_size=vocabulary - 2,
        min_frequency=2,
        show_progress=False,
        initial_alphabet=alphabet,
        end_of_word_suffix=WORD_END,
    )
    learned.train_from_iterator(captions, trainer)
    # The trainer lacks bytes that never end a word in the captions; CLIP's vocabulary has all of them.
    merges: Any = [tuple(pair) for pair in json.loads(learned.to_str())["model"]["merges"]]
    merges = merges[: vocabulary - MIN_VOCABULARY]
    tokens = [*alphabet, *(byte + WORD_END for byte in alphabet), *(left + right for left, right in merges), START, END]
    ids = {token: number for number, token in enumerate(dict.fromkeys(tokens))}
    return CLIPTokenizer(vocab=ids, merges=merges, model_max_length=max_tokens)


def build(recipe: TextImageRecipe, tokenizer: Any, device: torch.device | str = "cpu") -> CLIPModel:
    """Create both encoders of a recipe, with the token ids of the tokenizer."""

    def sizes(width: int, layers: int, heads: int) -> dict[str, Any]:
        named = {"hidden_size": width, "intermediate_size": 4 * width, "num_hidden_layers": layers}
        return {**named, "num_attention_heads": heads, "projection_dim": recipe.projection}

    text = CLIPTextConfig(
        **sizes(recipe.text_width, recipe.text_layers, recipe.text_heads),
        vocab_size=len(tokenizer),
        max_position_embeddings=recipe.max_tokens,
        # The model pools at the first end token if its id is known; the default 2 would select the largest id instead.
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    vision_sizes = sizes(recipe.vision_width, recipe.vision_layers, recipe.vision_heads)
    vision = CLIPVisionConfig(**vision_sizes, image_size=recipe.size, patch_size=recipe.patch)
    config = CLIPConfig(text_config=text.to_dict(), vision_config=vision.to_dict(), projection_dim=recipe.projection)
    clip: Any = CLIPModel(config)
    init_positions(clip)
    return clip.to(device)


@torch.no_grad()
def init_positions(clip: CLIPModel) -> None:
    """Initialize the positions of the image encoder with 2-D sines of the magnitude of the patch embeddings (Beyer et
    al. 2022, "Better plain ViT baselines for ImageNet-1k"). CLIP's small random positions delay training by thousands
    of images.
    """
    embeddings: Any = clip.vision_model.embeddings
    patches, positions = embeddings.patch_embedding.weight, embeddings.position_embedding.weight
    patches.normal_(std=patches[0].numel() ** -0.5)
    grid, width = math.isqrt(embeddings.num_patches), positions.shape[1]
    count = width // 4
    frequencies = 100.0 ** -(torch.arange(count) / count) * math.pi / 2  # from half a period per patch
    angles = torch.arange(grid)[:, None] * frequencies  # [grid, width / 4]
    wave = torch.cat([angles.sin(), angles.cos()], dim=1)  # [grid, width / 2]
    down = wave[:, None].expand(grid, grid, -1)
    across = wave[None].expand(grid, grid, -1)
    positions.zero_()
    positions[1:, : 4 * count] = 0.5 * torch.cat([down, across], dim=2).flatten(0, 1)  # [grid * grid, width]


def read_box(path: Path, size: int, box: tuple[float, float, float, float] = (0, 0, 1, 1)) -> np.ndarray:
    """Read an image, or the `box` (left, top, right, bottom; in [0, 1]) of it, box-filtered: uint8 [size, size, 3]."""
    image = Image.fromarray(read_photo(path))
    pixels = (box[0] * image.width, box[1] * image.height, box[2] * image.width, box[3] * image.height)
    return np.asarray(image.resize((size, size), Image.Resampling.BOX, box=pixels))


class Pairs:
    """An endless sequence of training pairs; pair number p depends only on (seed, p)."""

    def __init__(
        self,
        recipe: TextImageRecipe,
        rows: list[dict[str, Any]],
        tokenizer: Any,
        classes: Mapping[str, list[str]] = MappingProxyType({}),
    ) -> None:
        self.rows, self.tokenizer, self.recipe = rows, tokenizer, recipe
        self.classes = classes
        self.sampler = Sampler(len(rows), recipe.seed)

    def augmented_pair(self, position: int, row: dict[str, Any]) -> tuple[np.ndarray, str]:
        """Return a crop of the row's image, uint8 [S, S, 3], and one of its captions."""
        rng = stream(self.recipe.seed, position)
        captions = captions_of(row)
        caption = captions[int(rng.integers(len(captions)))]
        side = rng.uniform(self.recipe.crop, 1)
        left, top = rng.uniform(0, 1 - side), rng.uniform(0, 1 - side)
        image = read_box(row["file_name"], self.recipe.size, (left, top, left + side, top + side))
        brightness = 1 + self.recipe.brightness * rng.uniform(-1, 1)
        return (image * brightness).clip(0, 255).astype(np.uint8), caption

    def make(self, start: int, indices: Sequence[int]) -> Batch:
        """Return the pairs from number `start` on, of the rows `indices`."""
        pairs = [self.augmented_pair(start + offset, self.rows[index]) for offset, index in enumerate(indices)]
        ids = token_ids(self.tokenizer, [caption for _, caption in pairs], self.recipe.max_tokens)
        row = torch.tensor(indices)
        same_row = row[:, None] == row[None]  # [B, B]
        same_caption = (ids[:, None] == ids[None]).all(dim=2)  # [B, B]
        own = [attributes_of(self.rows[index]) for index in indices]
        values = [[(str(row.get(name)), known) for name, known in self.classes.items()] for row in own]
        labels = [[known.index(value) if value in known else IGNORED for value, known in row] for row in values]
        return Batch(
            images=to_tensor([image for image, _ in pairs]),
            ids=ids,
            positives=same_row | same_caption,
            labels=torch.tensor(labels, dtype=torch.int64).reshape(len(indices), len(self.classes)),  # [B, A]
        )

    def batches(self, starts: Sequence[int]) -> Iterator[Batch]:
        """Yield the batches that start at these pairs, prefetched by a thread."""
        size = self.recipe.batch
        return read_ahead(
            lambda start: self.make(start, [self.sampler[start + k] for k in range(size)]), starts, threads=1
        )


def contrastive_loss(images: Tensor, captions: Tensor, positives: Tensor, scale: Tensor) -> Tensor:
    """Return the cross-entropy over the captions of each image and the images of each caption, unit vectors [B, P] both
    (Radford et al. 2021, figure 3), with the inverse temperature `scale`. The target probability is divided equally
    among the `positives`, bool [B, B], symmetric.
    """
    logits = (scale * images @ captions.T).float()  # [B, B]
    targets = positives / positives.sum(dim=1, keepdim=True)  # [B, B]
    return (F.cross_entropy(logits, targets) + F.cross_entropy(logits.T, targets)) / 2


def attribute_loss(head: nn.Linear, pooled: Tensor, labels: Tensor, sizes: Sequence[int]) -> Tensor:
    """Return the mean cross-entropy of the attributes, `sizes` classes each, predicted from image features [B, D]."""
    parts = head(pooled).float().split(list(sizes), dim=1)
    losses = [F.cross_entropy(part, labels[:, index], reduction="sum") for index, part in enumerate(parts)]
    return torch.stack(losses).sum() / (labels != IGNORED).sum().clamp(min=1)


def losses(clip: CLIPModel, head: nn.Linear | None, sizes: Sequence[int], batch: Batch) -> tuple[Tensor, Tensor]:
    """Return the contrastive loss and the loss of the attributes, 0 without a head."""
    pooled = clip.vision_model(pixel_values=batch.images).pooler_output  # [B, D]
    images = F.normalize(clip.visual_projection(pooled).float(), dim=-1)  # [B, P]
    captions = embed_captions(clip, batch.ids)  # [B, P]
    contrastive = contrastive_loss(images, captions, batch.positives, clip.logit_scale.exp())
    if head is None:
        return contrastive, torch.zeros_like(contrastive)
    return contrastive, attribute_loss(head, pooled, batch.labels, sizes)


@torch.no_grad()
def retrieval(
    clip: CLIPModel, tokenizer: Any, rows: Sequence[dict[str, Any]], size: int, candidates: int = 50, seed: int = 0
) -> dict[str, float]:
    """Measure how often the right caption is retrieved among `candidates` captions, and the right image among as many.

    The rows are divided at random into groups of `candidates`, with one random caption per row; rows that fill no group
    are omitted (fewer rows are one group). A caption such as "a drawing of a man" matches several images of a group, so
    that 1 cannot be reached. `longest_*` uses each row's longest caption instead.

    Args:
        clip: the model, in evaluation mode, with its tokenizer.
        rows: rows of `read_folder` with captions.
        size: input size of the image encoder in pixels.
        candidates: size of a group; chance is 1 / candidates.

    Returns:
        `find_caption`, `find_picture`, `longest_find_caption`, `longest_find_picture` in [0, 1]; `n`, the number of
        rows measured; `candidates`, the size of the groups.
    """
    candidates = min(candidates, len(rows))
    count = len(rows) // candidates * candidates
    order = np.random.default_rng([seed, 0]).permutation(len(rows))[:count]
    images, random, longest = [], [], []
    for start in range(0, count, candidates):
        group = [rows[index] for index in order[start : start + candidates]]
        rng = np.random.default_rng([seed, 1, start])
        pixels = to_tensor([read_box(row["file_name"], size) for row in group])
        images.append(embed_images(clip, pixels.to(clip.device)))
        texts = [captions_of(row) for row in group]
        for embedded, captions in (
            (random, [options[int(rng.integers(len(options)))] for options in texts]),
            (longest, [max(options, key=lambda caption: (len(caption), caption)) for options in texts]),
        ):
            embedded.append(embed_captions(clip, token_ids(tokenizer, captions, text_length(clip)).to(clip.device)))
    image = torch.cat(images)  # [n, P]
    results: dict[str, float] = {}
    for prefix, embedded in (("", random), ("longest_", longest)):
        caption = torch.cat(embedded)  # [n, P]
        results[f"{prefix}find_caption"] = retrieved(image, caption, candidates).float().mean().item()
        results[f"{prefix}find_picture"] = retrieved(caption, image, candidates).float().mean().item()
    return {**results, "n": count, "candidates": candidates}


def make_optimizers(model: nn.Module, recipe: TextImageRecipe) -> list[torch.optim.Optimizer]:
    """Create Muon (Jordan et al. 2024) for the matrices of the layers and AdamW for the rest, with one learning rate.

    In short trainings Muon is better: 16,000 pairs retrieved more captions than 38,400 with AdamW alone.
    """
    named = list(model.named_parameters())
    hidden = [p for name, p in named if p.ndim == 2 and "encoder.layers" in name]
    matrices = [p for name, p in named if p.ndim >= 2 and "encoder.layers" not in name and "embeddings" not in name]
    others = [p for name, p in named if p.ndim < 2 or "embeddings" in name]
    groups = [{"params": matrices, "weight_decay": recipe.weight_decay}, {"params": others, "weight_decay": 0.0}]
    rate, decay = recipe.learning_rate, recipe.weight_decay
    return [
        Muon(hidden, lr=rate, weight_decay=decay),
        torch.optim.AdamW(groups, lr=rate, betas=(0.9, 0.98)),
    ]


def train_text_image(recipe: TextImageRecipe, run: Path) -> None:
    """Train, or resume, in the folder `run`, and publish the EMA weights to `run/model`: `clip` is the `CLIPModel`,
    `text_encoder` its `CLIPTextModel`, `tokenizer` the `CLIPTokenizer`, and `attributes.safetensors` the attribute
    head. Raises as `steps.open_component`.
    """
    check(recipe)
    with steps.open_component(recipe, run) as (world, signals):
        rows, test = (steps.rows_with("text", folders) for folders in (recipe.train, recipe.test))
        stored = run / "tokenizer"
        if newest(run):  # the embeddings belong to the tokenizer
            tokenizer = CLIPTokenizer.from_pretrained(stored)
        else:
            captions = (caption for row in rows for caption in captions_of(row))
            tokenizer = train_tokenizer(captions, recipe.vocabulary, recipe.max_tokens)
            with writing_folder(stored) as folder:
                tokenizer.save_pretrained(folder)
        torch.manual_seed(recipe.seed)
        clip = build(recipe, tokenizer, world.device)
        classes = attribute_classes(rows) if recipe.attribute_weight else {}
        if recipe.attribute_weight and not classes:
            log_line("the faces have no attributes: no attribute head is trained, and attribute_weight has no effect")
        sizes = [len(values) for values in classes.values()]
        head = nn.Linear(recipe.vision_width, sum(sizes)).to(world.device) if classes else None
        both = nn.ModuleDict({"clip": clip} if head is None else {"clip": clip, "head": head})
        progress = steps.resume(recipe, run, world, signals, both, make_optimizers(both, recipe))
        if world.device_type == "cpu":
            clip.set_attn_implementation("eager")  # faster for so few tokens, most of all in the backward pass
        loss_of = torch.compile(losses) if recipe.compile else losses
        clip.train()

        def save(published: Any, folder: Path) -> None:
            tokenizer.save_pretrained(folder / "tokenizer")
            published["clip"].save_pretrained(folder / "clip")
            published["clip"].text_model.save_pretrained(folder / "text_encoder")
            if head is not None:
                own = published["head"]
                save_attribute_head(AttributeHead(own.weight, own.bias, classes), folder)

        def measure(published: Any) -> list[dict[str, float]]:
            return [retrieval(published["clip"], tokenizer, test, recipe.size, recipe.retrieval_candidates)]

        for start, batch in progress.steps(Pairs(recipe, rows, tokenizer, classes).batches(progress.starts)):
            batch = Batch(*(tensor.to(world.device) for tensor in batch))
            with world.autocast("auto"):
                loss, of_attributes = loss_of(clip, head, sizes, batch)
            (loss + recipe.attribute_weight * of_attributes).backward()
            norm = steps.optimizer_step(progress, recipe, start)
            with torch.no_grad():
                clip.logit_scale.clamp_(max=MAX_LOG_SCALE)
            values = {"loss": loss, "gradient_norm": norm, "logit_scale": clip.logit_scale.exp()}
            progress.end_step(**values, **({"attribute_loss": of_attributes} if classes else {}))
            steps.publish(progress, recipe, measure, save)
