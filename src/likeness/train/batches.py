"""Batches of latents from shards. Random numbers are functions of (seed, position) of the sample."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils import _pytree

from likeness.data.ahead import read_ahead
from likeness.data.sampler import Sampler, stream
from likeness.data.store import IMAGE, Sample, Store
from likeness.encoders.components import Components
from likeness.encoders.latent import spatial_factor
from likeness.parallel import World
from likeness.pipelines.editing.inpainting import composite
from likeness.train.config import DataRecipe, RunRecipe, condition_names, condition_probability, split_key
from likeness.types import PHOTO, InputError, TextFeatures

MASK_DROPOUT = 0.2
"""Probability that the hole of a photo contains zeros instead of the mask."""


class Batch(NamedTuple):
    """B samples with up to K conditions each."""

    clean: Tensor  # normalized latents x_0, [B, C, h, w]
    noise: Tensor  # standard normal, [B, C, h, w]
    uniform: Tensor  # uniform in [0, 1], from which the objective samples times, [B]
    condition_latents: Tensor  # normalized, [B, K, C, h, w]
    condition_index: Tensor  # condition ids, [B, K]; -1 if absent
    captions: list[str]  # B captions; "" if the text is dropped
    text: TextFeatures | None  # their features, float32, if they are known
    numbers: Tensor | None = None  # of the samples in the concatenated stores, int64 [B]

    def to(self, device: str) -> Batch:
        """Return the batch on a device."""
        return _pytree.tree_map_only(Tensor, lambda tensor: tensor.to(device), self)

    def part(self, samples: slice) -> Batch:
        """Return some of the samples; captions are not sliced."""
        return _pytree.tree_map_only(Tensor, lambda tensor: tensor[samples], self)

    def with_text(self, components: Components) -> Batch:
        """Return the batch with text features."""
        return self if self.text is not None else self._replace(text=components.text_features(self.captions))


def latent_statistics(settings: Mapping[str, Any]) -> tuple[Tensor, Tensor]:
    """Return mean and standard deviation of raw latents from the settings of a pipeline, [1, C, 1, 1] each."""
    mean, std = (torch.tensor(settings[key], dtype=torch.float32) for key in ("latent_mean", "latent_std"))
    return mean.reshape(1, -1, 1, 1), std.reshape(1, -1, 1, 1)


def make_batch(
    samples: Sequence[Sample],
    positions: Sequence[int],
    recipe: DataRecipe,
    condition_ids: Sequence[str],
    mean: Tensor,
    std: Tensor,
    seed: int,
    patch_size: int = 2,
) -> Batch:
    """Return the batch of B samples. Random numbers depend on the seed and on the position of each in the run.
    `condition_ids` are the conditions of the network in the order of their ids; `mean` and `std` are those of raw
    latents, [1, C, 1, 1]; `patch_size` is that of the network, in latent pixels.
    """
    kinds = list(recipe.condition_probabilities)
    probabilities = np.array(list(recipe.condition_probabilities.values()), dtype=np.float64)
    cumulative = np.cumsum(probabilities / probabilities.sum())
    slots = max(1 if condition_ids else 0, *(len(split_key(kind)) for kind in kinds))  # K
    clean, noise, uniform, conditions, index, captions, text = [], [], [], [], [], [], []
    for sample, position in zip(samples, positions, strict=True):
        rng = stream(seed, position)
        number = int(rng.integers(len(sample.captions))) if sample.captions else -1
        if rng.random() < recipe.text_dropout:
            number = -1  # the empty caption
        captions.append(sample.captions[number] if number >= 0 else "")
        if sample.text:
            text.append(sample.text[number])
        kind = kinds[min(int(np.searchsorted(cumulative, rng.random(), side="right")), len(kinds) - 1)]
        uniform.append(rng.random())
        noise.append(torch.from_numpy(rng.standard_normal(tuple(sample.latents.shape), dtype=np.float32)))
        image = sample.latents if recipe.target == IMAGE else sample.conditions[recipe.target]
        if recipe.target == IMAGE and sample.log_variance is not None:  # sample the autoencoder's distribution
            normal = torch.from_numpy(rng.standard_normal(tuple(image.shape), dtype=np.float32))
            image = image + torch.exp(0.5 * sample.log_variance) * normal
        clean.append(image)
        own = sample.conditions
        if PHOTO in split_key(kind):
            own = own | {PHOTO: photo_condition(sample, mean, patch_size, rng)}
        # absent conditions, also those that a face lacks, have a placeholder that is not read
        present = [name for name in split_key(kind) if name in own]
        absent = slots - len(present)
        latents = [*(own[name] for name in present), *[sample.latents] * absent]
        conditions.append(torch.stack(latents) if slots else sample.latents[None][:0])  # [K, C, h, w]
        index.append([*(condition_ids.index(name) for name in present), *[-1] * absent])
    assert len(text) in (0, len(samples))
    features = [torch.stack(part).float() for part in zip(*text, strict=True)]  # [B, L, D], [B, P]
    return Batch(
        clean=(torch.stack(clean) - mean) / std,
        noise=torch.stack(noise),
        uniform=torch.tensor(uniform, dtype=torch.float32),
        condition_latents=(torch.stack(conditions) - mean[:, None]) / std[:, None],
        condition_index=torch.tensor(index, dtype=torch.long),
        captions=captions,
        text=TextFeatures(*features) if features else None,
    )


def photo_condition(sample: Sample, mean: Tensor, patch_size: int, rng: np.random.Generator) -> Tensor:
    """Return the image of a sample with a random hole, raw latents [C, h, w]: the hole contains the mask, or the mean,
    which is zero in normalized latents, if the face has no mask or it is dropped.
    """
    _, height, width = sample.latents.shape
    region = random_region(height, width, patch_size, rng)
    mask = sample.conditions.get("mask")
    return composite(sample.latents, mean[0] if mask is None or rng.random() < MASK_DROPOUT else mask, region)


def random_region(height: int, width: int, patch_size: int, rng: np.random.Generator) -> Tensor:
    """Return a random region of whole tokens, bool [h, w]: one to three rectangles or ellipses, or in one of seven
    cases the tokens outside them. Those after the first are left out if all would exceed 60 % of the tokens.
    """
    rows, columns = height // patch_size, width // patch_size
    y, x = np.mgrid[:rows, :columns] + 0.5
    tokens = np.zeros((rows, columns), bool)
    for _ in range(rng.integers(1, 4)):
        center, half = rng.uniform(0, 1, 2), rng.uniform(0.05, 0.4, 2)
        distances = np.abs([y / rows - center[0], x / columns - center[1]]) / half[:, None, None]  # 1 at the edge
        shape = (distances.max(axis=0) if rng.random() < 0.5 else np.hypot(*distances)) < 1
        shape[int(center[0] * rows), int(center[1] * columns)] = True
        if not tokens.any() or (tokens | shape).mean() <= 0.6:
            tokens |= shape
    if rng.random() < 1 / 7 and not tokens.all():
        tokens = ~tokens
    return torch.from_numpy(tokens.repeat(patch_size, 0).repeat(patch_size, 1))


def open_stores(recipe: RunRecipe, folders: Sequence[str], components: Components, patch_size: int) -> list[Store]:
    """Open stores and check that they were encoded with these components, at the default size of the pipeline. Raises
    `InputError` if they were not, differ in size or text features, are empty, damaged, or lack a recipe's condition.
    """
    stores = [Store(folder) for folder in folders]
    if recipe.data.verify:
        for store in stores:
            store.verify()
    text_hashes = {store.text_hash for store in stores}
    if len(text_hashes) > 1:
        raise InputError("the recipe's shards differ in their text features: encode all with the same options")
    if text_hashes - {None} and text_hashes != {components.text_hash}:
        raise InputError(f"{stores[0].folder} has text features of another text encoder: encode it again")
    if empty := [store.folder for store in stores if not len(store)]:
        raise InputError(f"{empty[0]} is empty: encode a folder with faces")
    sizes = {tuple(store[0].latents.shape) for store in stores}
    if len(sizes) > 1:
        raise InputError(
            f"the recipe's shards differ in size ({sorted(sizes)}, channels first): encode all at one size"
        )
    if any(side % patch_size for _, *sides in sizes for side in sides):
        raise InputError(
            f"latents of {sorted(sizes)[0]}, channels first, cannot be divided into patches of {patch_size}"
        )
    factor, size = spatial_factor(components.vae), recipe.defaults.get("size")
    if other := {factor * side for _, *sides in sizes for side in sides} - {size}:
        raise InputError(
            f"{stores[0].folder} contains faces of {other.pop()} px, but the recipe's defaults.size is "
            f"{'missing' if size is None else size}: the two must be equal"
        )
    for store in stores:
        if store.manifest["codec"] != components.codec_hash:
            raise InputError(f"{store.folder} was encoded with another encoder: encode it again")
        if lacking := store.lacking(recipe.data.target):
            raise InputError(f"{lacking} of {len(store)} samples in {store.folder} have no {recipe.data.target}")
        for name in condition_names(recipe.data):
            if name not in (*store.conditions, PHOTO) and condition_probability(recipe.data, name):
                raise InputError(f"{store.folder} has no {name}, which the recipe's condition_probabilities name")
    return stores


def read_batches(
    recipe: RunRecipe,
    stores: Sequence[Store],
    condition_ids: Sequence[str],
    settings: Mapping[str, Any],
    world: World,
    starts: Sequence[int],
    micro: int,
    patch_size: int,
) -> Iterator[list[Batch]]:
    """Yield this process's micro-batches of every step, prefetched by a thread, given the first image of each step in
    `starts`. Position p of a step belongs to micro-batch p // `micro`; micro-batches are assigned to the processes in
    turn. `settings` are those of the components; for `condition_ids` and `patch_size` see `make_batch`.
    """
    ends = np.cumsum([len(store) for store in stores])
    sampler = Sampler(int(ends[-1]), recipe.seed)
    mean, std = latent_statistics(settings)

    def sample_at(position: int) -> Sample:
        index = sampler[position]
        number = int(np.searchsorted(ends, index, side="right"))
        return stores[number][index - int(ends[number - 1] if number else 0)]

    def make(start: int) -> list[Batch]:
        batches = []
        for first in range(start + world.rank * micro, start + recipe.optimizer.batch, world.size * micro):
            positions = range(first, first + micro)
            samples = [sample_at(position) for position in positions]
            batch = make_batch(samples, positions, recipe.data, condition_ids, mean, std, recipe.seed, patch_size)
            batches.append(batch._replace(numbers=torch.tensor([sampler[position] for position in positions])))
        return batches

    return read_ahead(make, starts, depth=4, threads=1)
