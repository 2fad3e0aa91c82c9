"""Train the mini text tower: captions and their pictures near one another, other pairs apart (CLIP's objective).

The classes are transformers' `CLIPModel` and `CLIPTokenizer`, so that what is published loads like any CLIP. The
vocabulary is learned from the captions: a word that faces are described with is one token, which shortens captions
and training alike, and any other word falls apart into bytes and never into "unknown". The picture tower is only as
good as the text tower needs it; it stays as an offline score of how well a picture fits its words.
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
from likeness.data.folder import captions_of, read_folder, read_photo
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
from likeness.train.checkpoint import newest, save_state
from likeness.train.learner import Learner
from likeness.train.metrics import Reporter
from likeness.train.optim import Ema, learning_rate
from likeness.train.run import begun, finite_numbers
from likeness.types import InputError

START, END, WORD_END = "<|startoftext|>", "<|endoftext|>", "</w>"
BYTE_TOKENS = 512
"""Every byte twice, inside a word and at its end: what makes every character encodable."""
SMALLEST_VOCABULARY = BYTE_TOKENS + 2
IGNORED = -100
"""The class of what is not known: cross-entropy passes over it."""
LARGEST_SCALE = math.log(100)
"""Radford et al. 2021, section 2.5: the temperature is held so that logits are scaled by at most 100."""


@dataclass(frozen=True, kw_only=True)
class TextImageRecipe:
    """How the text tower, its tokenizer and the picture tower are built and trained."""

    kind: Literal["text_image"] = "text_image"
    """What the recipe trains."""
    train: tuple[str, ...]
    """Prepared folders to learn from."""
    test: tuple[str, ...]
    """Prepared folders that are only measured."""
    size: int = 64
    """Pixels a side of what the picture tower sees."""
    vocabulary: int = 2000
    """Tokens at most, 514 of them bytes and marks; fewer where the captions have fewer words."""
    max_tokens: int = 32
    """Length of a caption in tokens, start and end included; what is longer is cut."""
    text_width: int = 192
    """Width of the text tower: the text features of a transformer trained on it."""
    text_layers: int = 3
    """Layers of the text tower."""
    text_heads: int = 4
    """Attention heads of the text tower."""
    vision_width: int = 192
    """Width of the picture tower."""
    vision_layers: int = 4
    """Layers of the picture tower."""
    vision_heads: int = 4
    """Attention heads of the picture tower."""
    patch: int = 8
    """Pixels a side of the picture tower's patches."""
    projection: int = 128
    """Size of the space in which captions and pictures meet."""
    images: int
    """Pairs to see in all."""
    batch: int = 128
    """Pairs a step: each is told apart from all the others of its step."""
    learning_rate: float = 1e-3
    """Peak rate."""
    warmup: int = 3200
    """Pairs of warm-up."""
    weight_decay: float = 0.1
    """Decay of the matrices; embeddings, biases and norms are left alone."""
    crop: float = 0.9
    """Smallest side of the random crop. Pictures are never mirrored: captions may name sides."""
    brightness: float = 0.1
    """Largest relative change of the brightness."""
    attributes: float = 0.0
    """Weight of naming the rows' "attributes" from the picture alone; 0 leaves it out."""
    ema: float = 0.08
    """Relative width of the weight average."""
    choices: int = 50
    """Captions among which the measurement looks for the right one."""
    checkpoint_every: int = 12800
    """Pairs between states on disk and measurements."""
    seed: int = 0
    """Seed of every random draw."""
    compile: bool = True
    """Fuse the step with torch.compile."""
    threads: int | None = None
    """CPU threads; None leaves torch's choice."""


class Batch(NamedTuple):
    """B pairs of a picture and one of its captions."""

    pictures: Tensor
    """In [-1, 1], [B, 3, S, S]."""
    ids: Tensor
    """Tokens, [B, L]."""
    positives: Tensor
    """Which caption fits which picture, bool [B, B], symmetric: its own, and those that read the same."""
    labels: Tensor
    """Classes of the A attributes, int64 [B, A]; -100 where a row does not say."""


def attribute_classes(rows: Sequence[dict[str, Any]], most: int = 32) -> dict[str, list[str]]:
    """The attributes of the rows and the values of each: words and yes or no, 2 to `most` of them; never numbers."""
    values: dict[str, set[str]] = {}
    for row in rows:
        for name, value in row.get("attributes", {}).items():
            if isinstance(value, (str, bool)):
                values.setdefault(name, set()).add(str(value))
    return {name: sorted(found) for name, found in sorted(values.items()) if 2 <= len(found) <= most}


def train_tokenizer(captions: Iterable[str], vocabulary: int, max_tokens: int) -> CLIPTokenizer:
    """Learn CLIP's byte-level BPE from captions: lower case, no unknown token, the end token also pads.

    Args:
        captions: the text; the same text in any order gives the same tokenizer.
        vocabulary: tokens at most; bytes and marks take 514 of them.
        max_tokens: length at which `truncation=True` cuts.

    Raises:
        InputError: `vocabulary` is too small for the bytes, or `max_tokens` for a single word.
    """
    if vocabulary < SMALLEST_VOCABULARY or max_tokens < 3:
        raise InputError(
            f"a tokenizer needs vocabulary >= {SMALLEST_VOCABULARY} and max_tokens >= 3, not {vocabulary}, {max_tokens}"
        )
    clip = CLIPTokenizer().backend_tokenizer  # the normalizer and the splitting rule are CLIP's own
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
    # The trainer knows a byte at the end of a word only where it has seen it there; CLIP's vocabulary has all of them.
    merges: Any = [tuple(pair) for pair in json.loads(learned.to_str())["model"]["merges"]]
    merges = merges[: vocabulary - SMALLEST_VOCABULARY]
    tokens = [*alphabet, *(byte + WORD_END for byte in alphabet), *(left + right for left, right in merges), START, END]
    ids = {token: number for number, token in enumerate(dict.fromkeys(tokens))}
    return CLIPTokenizer(vocab=ids, merges=merges, model_max_length=max_tokens)


def build(recipe: TextImageRecipe, tokenizer: Any, device: torch.device | str = "cpu") -> CLIPModel:
    """The two towers of a recipe, with the ids of the tokenizer."""
    text = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=recipe.text_width,
        intermediate_size=4 * recipe.text_width,
        num_hidden_layers=recipe.text_layers,
        num_attention_heads=recipe.text_heads,
        max_position_embeddings=recipe.max_tokens,
        projection_dim=recipe.projection,
        # The model pools at the first end token, if it is told its id; id 2 would mean "the largest id" instead.
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    vision = CLIPVisionConfig(
        image_size=recipe.size,
        patch_size=recipe.patch,
        hidden_size=recipe.vision_width,
        intermediate_size=4 * recipe.vision_width,
        num_hidden_layers=recipe.vision_layers,
        num_attention_heads=recipe.vision_heads,
        projection_dim=recipe.projection,
    )
    config = CLIPConfig(text_config=text.to_dict(), vision_config=vision.to_dict(), projection_dim=recipe.projection)
    clip: Any = CLIPModel(config)
    set_out(clip)
    return clip.to(device)


@torch.no_grad()
def set_out(clip: CLIPModel) -> None:
    """Give the picture tower a sense of place from the start: 2-D sine positions as strong as what the patches show.

    Beyer et al. 2022, "Better plain ViT baselines for ImageNet-1k", have such positions; with CLIP's faint random ones
    the first thousands of pictures go by before the tower can tell the hair from the clothes.
    """
    embeddings: Any = clip.vision_model.embeddings
    patches, positions = embeddings.patch_embedding.weight, embeddings.position_embedding.weight
    patches.normal_(std=patches[0].numel() ** -0.5)
    grid, width = math.isqrt(embeddings.num_patches), positions.shape[1]
    count = width // 4
    frequencies = 100.0 ** -(torch.arange(count) / count) * math.pi / 2  # from half a period a patch on
    angles = torch.arange(grid)[:, None] * frequencies  # [grid, width / 4]
    wave = torch.cat([angles.sin(), angles.cos()], dim=1)  # [grid, width / 2]
    down = wave[:, None].expand(grid, grid, -1)
    across = wave[None].expand(grid, grid, -1)
    positions.zero_()
    positions[1:, : 4 * count] = 0.5 * torch.cat([down, across], dim=2).flatten(0, 1)  # [grid * grid, width]


def captioned_rows(folders: Sequence[str]) -> list[dict[str, Any]]:
    """The rows of the folders that have a caption.

    Raises:
        InputError: a folder cannot be read, or no row has a caption.
    """
    rows = [row for folder in folders for row in read_folder(folder) if captions_of(row)]
    if not rows:
        raise InputError(f"no row of {', '.join(folders) or 'no folder'} has a caption (the column 'text')")
    return rows


def read_box(path: Path, size: int, box: tuple[float, float, float, float] = (0, 0, 1, 1)) -> np.ndarray:
    """A picture, or the `box` (left, top, right, bottom; in [0, 1]) of it, reduced by areas: uint8 [size, size, 3]."""
    image = Image.fromarray(read_photo(path))
    pixels = (box[0] * image.width, box[1] * image.height, box[2] * image.width, box[3] * image.height)
    return np.asarray(image.resize((size, size), Image.Resampling.BOX, box=pixels))


class Pairs:
    """Endless training pairs; pair number p depends only on (seed, p)."""

    def __init__(
        self,
        recipe: TextImageRecipe,
        rows: list[dict[str, Any]],
        tokenizer: Any,
        classes: Mapping[str, list[str]] = MappingProxyType({}),
    ) -> None:
        self.rows, self.tokenizer, self.recipe = rows, tokenizer, recipe
        self.numbers = {
            name: {value: number for number, value in enumerate(values)} for name, values in classes.items()
        }
        self.sampler = Sampler(len(rows), recipe.seed)

    def draw(self, position: int, row: dict[str, Any]) -> tuple[np.ndarray, str]:
        """A crop of the row's picture, uint8 [S, S, 3], and one of its captions."""
        rng = stream(self.recipe.seed, position)
        captions = captions_of(row)
        caption = captions[int(rng.integers(len(captions)))]
        side = rng.uniform(self.recipe.crop, 1)
        left, top = rng.uniform(0, 1 - side), rng.uniform(0, 1 - side)
        picture = read_box(row["file_name"], self.recipe.size, (left, top, left + side, top + side))
        brightness = 1 + self.recipe.brightness * rng.uniform(-1, 1)
        return (picture * brightness).clip(0, 255).astype(np.uint8), caption

    def make(self, start: int, indices: Sequence[int]) -> Batch:
        """The pairs from number `start` on, of the rows `indices`."""
        drawn = [self.draw(start + offset, self.rows[index]) for offset, index in enumerate(indices)]
        ids = token_ids(self.tokenizer, [caption for _, caption in drawn], self.recipe.max_tokens)
        row = torch.tensor(indices)
        same_row = row[:, None] == row[None]  # [B, B]
        same_caption = (ids[:, None] == ids[None]).all(dim=2)  # [B, B]
        said = [self.rows[index].get("attributes", {}) for index in indices]
        labels = [
            [numbers.get(str(values.get(name)), IGNORED) for name, numbers in self.numbers.items()] for values in said
        ]
        return Batch(
            pictures=to_tensor([picture for picture, _ in drawn]),
            ids=ids,
            positives=same_row | same_caption,
            labels=torch.tensor(labels, dtype=torch.int64).reshape(len(indices), len(self.numbers)),  # [B, A]
        )

    def batches(self, seen: int) -> Iterator[Batch]:
        """Batches from pair number `seen` to the recipe's last, read ahead by a thread."""
        size = self.recipe.batch
        starts = range(seen, self.recipe.images, size)
        return read_ahead(
            lambda start: self.make(start, [self.sampler[start + k] for k in range(size)]), starts, threads=1
        )


def contrastive_loss(pictures: Tensor, captions: Tensor, positives: Tensor, scale: Tensor) -> Tensor:
    """Cross-entropy over the captions of each picture and the pictures of each caption (Radford et al. 2021, figure 3).

    A picture's probability is shared equally among its positives, so that captions that read the same attract.

    Args:
        pictures: unit vectors, [B, P].
        captions: unit vectors, [B, P].
        positives: which belong together, bool [B, B], symmetric.
        scale: what the cosines are multiplied by.
    """
    logits = (scale * pictures @ captions.T).float()  # [B, B]
    targets = positives / positives.sum(dim=1, keepdim=True)  # [B, B]
    return (F.cross_entropy(logits, targets) + F.cross_entropy(logits.T, targets)) / 2


def attribute_loss(head: nn.Linear, pooled: Tensor, labels: Tensor, sizes: Sequence[int]) -> Tensor:
    """Mean cross-entropy of the attributes, `sizes` classes each, read from pictures' vectors [B, D] by one matrix."""
    parts = head(pooled).float().split(list(sizes), dim=1)
    losses = [F.cross_entropy(part, labels[:, index], reduction="sum") for index, part in enumerate(parts)]
    return torch.stack(losses).sum() / (labels != IGNORED).sum().clamp(min=1)


def losses(clip: CLIPModel, head: nn.Linear | None, sizes: Sequence[int], batch: Batch) -> tuple[Tensor, Tensor]:
    """The contrastive loss and the attributes' loss, 0 where there is no head for them."""
    pooled = clip.vision_model(pixel_values=batch.pictures).pooler_output  # [B, D]
    pictures = F.normalize(clip.visual_projection(pooled).float(), dim=-1)  # [B, P]
    captions = embed_captions(clip, batch.ids)  # [B, P]
    contrast = contrastive_loss(pictures, captions, batch.positives, clip.logit_scale.exp())
    naming = attribute_loss(head, pooled, batch.labels, sizes) if head is not None else torch.zeros_like(contrast)
    return contrast, naming


@torch.no_grad()
def retrieval(
    clip: CLIPModel, tokenizer: Any, rows: Sequence[dict[str, Any]], size: int, choices: int = 50, seed: int = 0
) -> dict[str, float]:
    """How often the right caption is found among `choices` of them, and the right picture among as many.

    The rows are dealt into groups of `choices`, each with one caption a row drawn at random; rows that fill no group
    are left out (all rows are one group where there are fewer). A caption as short as "a drawing of a man" fits many
    pictures of a group, so 1 is out of reach. `longest_*` takes each row's longest caption instead.

    Args:
        clip: the towers, in evaluation mode.
        tokenizer: their tokenizer.
        rows: rows of `read_folder` with captions.
        size: pixels a side of the picture tower.
        choices: size of a group; chance is 1 / choices.
        seed: of the dealing and of the captions.

    Returns:
        `find_caption`, `find_picture`, `longest_find_caption`, `longest_find_picture` in [0, 1]; `n`, the number
        of rows measured; `choices`, the size of the groups.
    """
    choices = min(choices, len(rows))
    count = len(rows) // choices * choices
    order = np.random.default_rng([seed, 0]).permutation(len(rows))[:count]
    pictures, drawn, longest = [], [], []
    for start in range(0, count, choices):
        group = [rows[index] for index in order[start : start + choices]]
        texts = [captions_of(row) for row in group]
        random = np.random.default_rng([seed, 1, start])
        pixels = to_tensor([read_box(row["file_name"], size) for row in group])
        pictures.append(embed_images(clip, pixels.to(clip.device)))
        for kept, captions in (
            (drawn, [options[int(random.integers(len(options)))] for options in texts]),
            (longest, [max(options, key=lambda caption: (len(caption), caption)) for options in texts]),
        ):
            kept.append(embed_captions(clip, token_ids(tokenizer, captions, text_length(clip)).to(clip.device)))
    picture = torch.cat(pictures)  # [n, P]
    found: dict[str, float] = {}
    for prefix, kept in (("", drawn), ("longest_", longest)):
        caption = torch.cat(kept)
        found[f"{prefix}find_caption"] = retrieved(picture, caption, choices).float().mean().item()
        found[f"{prefix}find_picture"] = retrieved(caption, picture, choices).float().mean().item()
    return {**found, "n": count, "choices": choices}


def train_text_image(recipe: TextImageRecipe, run: Path) -> None:
    """Train, resuming from `run` where it has a state, and publish the average to `run/model`.

    There `clip` is the `CLIPModel`, `text_encoder` its `CLIPTextModel` alone and `tokenizer` the `CLIPTokenizer`; with
    attributes, `attributes.safetensors` is what names them.

    Raises:
        InputError: another process trains in `run`, it was begun with another recipe, the loss is no number, or a
            folder of the recipe is not as it should be.
    """
    with begun(recipe, run):
        learn(recipe, run)


def learn(recipe: TextImageRecipe, run: Path) -> None:
    """The training itself, in a folder that is held."""
    if recipe.threads:
        torch.set_num_threads(recipe.threads)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    rows, test = captioned_rows(recipe.train), captioned_rows(recipe.test)
    folder = run / "model" / "tokenizer"
    if newest(run):  # the embeddings belong to the tokenizer that they were begun with
        tokenizer = CLIPTokenizer.from_pretrained(folder)
    else:
        captions = (caption for row in rows for caption in captions_of(row))
        tokenizer = train_tokenizer(captions, recipe.vocabulary, recipe.max_tokens)
        tokenizer.save_pretrained(folder)
    torch.manual_seed(recipe.seed)
    clip = build(recipe, tokenizer, device)
    classes = attribute_classes(rows) if recipe.attributes else {}
    sizes = [len(values) for values in classes.values()]
    head = nn.Linear(recipe.vision_width, sum(sizes)).to(device) if classes else None
    both = nn.ModuleDict({"clip": clip} if head is None else {"clip": clip, "head": head})
    optimizers = make_optimizers(both, recipe)
    learner = Learner(model=both, optimizers=optimizers, averages=[Ema(clip, recipe.ema)])
    learner.resume(run)
    if device == "cpu":
        clip.set_attn_implementation("eager")  # for so few tokens the fused one takes longer, backward above all
    loss_of = torch.compile(losses) if recipe.compile else losses
    reporter = Reporter(run, recipe.images, learner.seen)
    clip.train()
    for batch in Pairs(recipe, rows, tokenizer, classes).batches(learner.seen):
        batch = Batch(*(tensor.to(device) for tensor in batch))
        with torch.autocast(device, torch.bfloat16):
            loss, naming = loss_of(clip, head, sizes, batch)
        (loss + recipe.attributes * naming).backward()
        rate = learning_rate(learner.seen, recipe.images, recipe.learning_rate, recipe.warmup, "cosine")
        norm = learner.step(rate, clip=1.0)
        with torch.no_grad():
            clip.logit_scale.clamp_(max=LARGEST_SCALE)
        learner.count(recipe.batch)
        seen = learner.seen
        report = seen % (recipe.batch * 50) == 0
        keep = seen % recipe.checkpoint_every < recipe.batch or seen >= recipe.images
        if report or keep:
            finite_numbers(seen, loss.item(), norm.item())
        if report:
            scale = clip.logit_scale.exp().item()
            values = {"loss": loss.item(), "gradient_norm": norm.item(), "logit_scale": scale}
            reporter.report(seen, **values, **({"attribute_loss": naming.item()} if classes else {}))
        if keep:
            averaged = publish(clip, learner, recipe, tokenizer, run)
            if head is not None:
                save_attribute_head(AttributeHead(head.weight, head.bias, classes), run / "model")
            reporter.report(seen, **retrieval(averaged, tokenizer, test, recipe.size, recipe.choices))
            save_state(run, seen, learner.state())


def make_optimizers(model: nn.Module, recipe: TextImageRecipe) -> list[torch.optim.Optimizer]:
    """Muon (Jordan et al. 2024) for the matrices of the layers, AdamW for all else; both take the same rate.

    With so few steps it matters: 16,000 pairs with Muon found more captions than 38,400 with AdamW alone.
    """
    named = list(model.named_parameters())
    hidden = [p for name, p in named if p.ndim == 2 and "encoder.layers" in name]
    matrices = [p for name, p in named if p.ndim >= 2 and "encoder.layers" not in name and "embeddings" not in name]
    others = [p for name, p in named if p.ndim < 2 or "embeddings" in name]
    groups = [{"params": matrices, "weight_decay": recipe.weight_decay}, {"params": others, "weight_decay": 0.0}]
    rate, decay = recipe.learning_rate, recipe.weight_decay
    return [
        torch.optim.Muon(hidden, lr=rate, weight_decay=decay, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(groups, lr=rate, betas=(0.9, 0.98)),
    ]


def publish(clip: CLIPModel, learner: Learner, recipe: TextImageRecipe, tokenizer: Any, run: Path) -> CLIPModel:
    """Write the averaged weights as transformers folders under `run/model`; returns the averaged model."""
    averaged = build(recipe, tokenizer, clip.device)
    averaged.load_state_dict(clip.state_dict())
    learner.averages[0].copy_to(averaged)
    averaged.eval().save_pretrained(run / "model" / "clip")
    averaged.text_model.save_pretrained(run / "model" / "text_encoder")
    return averaged
