"""Check at intervals during training whether the model learns, and report alarms that a healthy run does not raise.

Four questions: do all weights change; does the prediction depend on the condition; do the conditions of a batch belong
to their faces; and, without an alarm since it takes long to develop, is the loss lower with the right condition than
with another face's. The third is answered from the batches alone: a linear map from condition to image, fitted to half
of the pairs, predicts the images of the other half better from their own conditions than from others'.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from contextlib import nullcontext
from dataclasses import replace
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from likeness.data.sampler import stream
from likeness.data.store import IMAGE, Sample, Store
from likeness.encoders.components import Components
from likeness.objectives import Objective
from likeness.parallel import local_tensor, reshard
from likeness.train.batches import Batch, latent_statistics
from likeness.train.config import AdapterNetwork, TrainRecipe, condition_names, condition_probability
from likeness.train.losses import denoising_losses
from likeness.train.metrics import Reporter
from likeness.train.train_state import TrainState
from likeness.types import TextFeatures

FACES, PASS = 32, 16
"""Faces measured with each condition, and per forward pass."""
MAX_PAIRS, MIN_PAIRS = 256, 128
"""Pairs of condition and image kept from the batches, and how many the test of pairs needs."""
MIN_PIXELS = 64
"""Smallest latents for the test of pairs, 8 x 8."""
USED, UNDECIDED = 4.0, 2.0
"""Standard errors above which a condition is reported as used, and below which it no longer is: a value that varies
around one limit would alternate between two verdicts. The same below zero for misleading conditions."""
PAIRED = 4.0
"""Standard errors below which pairs raise an alarm. 128 true pairs had 8.7 or more, shuffled ones 2.7 or less (masks,
sketches and keypoints of synthetic faces and of photographs, 128 px, 9 sets each, four shuffles)."""
MIN_STEPS = 10
"""Steps before alarms about weights and the dependence on a condition: residual branches are initialized with zeros."""
MAX_UNUSED = 0.25
"""Fraction of a network that may have no gradient: the output of the last block's text stream is not read."""
TIME_BINS = 4


class Diagnostics:
    """The diagnostics of one run."""

    def __init__(
        self,
        recipe: TrainRecipe,
        state: TrainState,
        components: Components,
        objective: Objective,
        stores: Sequence[Store],
    ) -> None:
        self.recipe, self.state, self.objective = recipe, state, objective
        self.partial = isinstance(recipe.network, AdapterNetwork) or bool(recipe.trainable)
        model: Any = state.model
        self.ids = {name: list(model.config.condition_names).index(name) for name in condition_names(recipe.data)}
        self.faces: dict[str, Batch] = {}
        for name, condition_id in self.ids.items():
            having = [store for store in stores if name in store.conditions]  # reading the others takes long
            samples = faces_with(name, (store[index] for store in having for index in range(len(store))), FACES)
            if recipe.data.target != IMAGE:
                samples = [replace(sample, latents=sample.conditions[recipe.data.target]) for sample in samples]
            if len(samples) > 1:
                text = components.text_features([sample.captions[0] if sample.captions else "" for sample in samples])
                statistics = latent_statistics(components.settings)
                self.faces[name] = fixed_faces(samples, name, text, condition_id, *statistics)
        self.pairs: dict[str, dict[float, tuple[Tensor, Tensor]]] = {name: {} for name in self.ids}
        self.occurrences = dict.fromkeys(self.ids, 0)
        self.samples, self.steps = 0, 0
        self.unused: set[str] = set()
        self.verdicts = dict.fromkeys(self.ids, 0)
        self.before = self.some_weights()

    def watch(self, batches: Sequence[Batch]) -> None:
        """Record the batches of a step. Call between backward pass and optimizer step."""
        if not self.steps:
            named = self.state.model.named_parameters()
            self.unused = {name for name, p in named if p.requires_grad and p.grad is None}
        self.steps += 1
        for batch in batches:
            self.samples += len(batch.clean)
            for name, condition_id in self.ids.items():
                for sample, slot in (batch.condition_index == condition_id).nonzero().tolist():
                    self.add_pair(name, batch.condition_latents[sample, slot], batch.clean[sample])

    def add_pair(self, name: str, condition: Tensor, image: Tensor) -> None:
        """Keep a pair, once per face, since few faces could be memorized; the oldest are dropped. Faces are identified
        by their conditions: latents of images may be sampled from a distribution.
        """
        pairs = self.pairs[name]
        face = condition.double().sum().item()
        pairs.pop(face, None)
        pairs[face] = (condition.clone(), image.clone())  # not views of a whole batch
        if len(pairs) > MAX_PAIRS:
            del pairs[next(iter(pairs))]
        self.occurrences[name] += 1

    def report(self, reporter: Reporter | None) -> None:
        """Run the diagnostics and report them on the main rank. Call on every rank; the test of pairs uses the pairs of
        its rank.
        """
        values, alarms, messages = {}, self.weight_alarms(), []
        model, world = self.state.model, self.state.world
        model.eval()
        for name, faces in self.faces.items():
            # another batch size, for which nothing should be compiled
            eager = torch.compiler.set_stance("force_eager") if self.recipe.compile else nullcontext()
            with eager, world.autocast(self.recipe.precision):
                losses = face_losses(model, self.objective, faces, world.device)
            values |= {f"{name}_{variant}": loss.mean().item() for variant, loss in losses.items()}
            by_time = losses["right"].tensor_split(min(TIME_BINS, len(losses["right"])))  # from data to noise
            values |= {f"{name}_time_{n}": loss.mean().item() for n, loss in enumerate(by_time, start=1)}
            values[f"{name}_gain"] = gain = standard_errors(losses["shuffled"] - losses["right"])
            if self.steps >= MIN_STEPS and torch.equal(losses["right"], losses["shuffled"]):
                alarms.append(f"the prediction does not depend on the {name}")
            change = f"{values[f'{name}_shuffled'] / values[f'{name}_right'] - 1:+.2%} loss with another face's"
            self.verdicts[name] = verdict_of(gain, self.verdicts[name])
            verdict = ("is not used yet", "is used", "is misleading")[self.verdicts[name]]
            messages.append(f"{name} {verdict} ({change}, {gain:.1f} standard errors)")
        model.train()
        reshard(model)
        for name, pairs in self.pairs.items():
            if len(pairs) >= MIN_PAIRS and next(iter(pairs.values()))[0][0].numel() >= MIN_PIXELS:
                conditions, images = (torch.stack(side) for side in zip(*pairs.values(), strict=True))
                values[f"{name}_pairs"] = evidence = pairing(conditions, images)
                if evidence < PAIRED:
                    alarms.append(
                        f"in the batches, images are no closer to their own {name} than to another's "
                        f"({evidence:.1f} standard errors)"
                    )
            expected = self.samples * condition_probability(self.recipe.data, name)
            if expected > MIN_PAIRS and not self.occurrences[name]:
                alarms.append(f"none of {self.samples} samples had a {name}")
        values["alarms"] = len(alarms)
        if reporter:
            reporter.report_diagnostics(self.state.images_seen, values, alarms, messages)

    def weight_alarms(self) -> list[str]:
        """Return alarms about weights that did not change since the last call."""
        now = self.some_weights()
        constant = [name for name in now if name not in self.unused and torch.equal(now[name], self.before[name])]
        self.before = now
        if self.steps < MIN_STEPS:
            return []
        alarms = []
        if constant:
            alarms.append(f"{len(constant)} of {len(now)} weights do not change: {constant[0]} and others")
        sizes = {name: parameter.numel() for name, parameter in self.state.model.named_parameters() if name in now}
        total, unused = sum(sizes.values()), sum(size for name, size in sizes.items() if name in self.unused)
        if unused > MAX_UNUSED * total:  # a rank may have no part of any weight
            alarms.append(f"{unused / total:.0%} of the network has no gradient: {min(self.unused)} and others")
        return alarms

    def some_weights(self) -> dict[str, Tensor]:
        """Return up to 64 values of every weight that should change: all weights, even frozen ones, unless an adapter
        or some parameters are trained.
        """
        weights = {}
        for name, parameter in self.state.model.named_parameters():
            if parameter.requires_grad or not self.partial:
                values = local_tensor(parameter.detach()).flatten()
                if len(values):  # empty on a rank without a part of it
                    weights[name] = values[:: max(1, len(values) // 64)].clone()
        return weights


def faces_with(condition: str, samples: Iterable[Sample], count: int) -> list[Sample]:
    """Return the first `count` samples that have a condition."""
    return list(islice((sample for sample in samples if condition in sample.conditions), count))


def fixed_faces(
    samples: Sequence[Sample],
    condition: str,
    text: TextFeatures,
    condition_id: int,
    mean: Tensor,
    std: Tensor,
) -> Batch:
    """Return the batch of N faces with a condition for `face_losses`: the text features of their captions, mean and
    standard deviation of raw latents [1, C, 1, 1], noise by number, and times at the middles of N equal parts, from
    data to noise.
    """
    clean = torch.stack([sample.latents for sample in samples])  # [N, C, h, w]
    noise = [stream(0, n).standard_normal(tuple(clean.shape[1:]), dtype="float32") for n in range(len(samples))]
    conditions = torch.stack([sample.conditions[condition] for sample in samples])  # [N, C, h, w]
    return Batch(
        clean=(clean - mean) / std,
        noise=torch.stack([torch.from_numpy(one) for one in noise]),
        uniform=(torch.arange(len(samples)) + 0.5) / len(samples),
        condition_latents=((conditions - mean) / std)[:, None],  # [N, 1, C, h, w]
        condition_index=torch.full((len(samples), 1), condition_id),
        captions=[],
        text=text,
    )


@torch.no_grad()
def face_losses(network: nn.Module, objective: Objective, faces: Batch, device: str) -> dict[str, Tensor]:
    """Return the training loss of each face [N] with its own condition (`right`), the next face's (`shuffled`) and
    none.
    """
    variants = {
        "right": faces,
        "shuffled": faces._replace(condition_latents=faces.condition_latents.roll(-1, dims=0)),
        "none": faces._replace(condition_index=torch.full_like(faces.condition_index, -1)),
    }
    parts = [slice(start, start + PASS) for start in range(0, len(faces.clean), PASS)]
    return {
        name: torch.cat([denoising_losses(network, objective, batch.part(part).to(device)).cpu() for part in parts])
        for name, batch in variants.items()
    }


def verdict_of(gain: float, before: int) -> int:
    """Return 1 for a condition that is used, -1 for a misleading one, else 0, given the verdict before.

    Args:
        gain: loss with another face's condition minus the loss with the own one, in standard errors.
        before: the verdict before.
    """
    sign = 1 if gain > 0 else -1
    return sign if abs(gain) > (UNDECIDED if sign == before else USED) else 0


def standard_errors(differences: Tensor) -> float:
    """Return the mean of paired differences in units of its standard error; 0 if all are equal."""
    spread = differences.double().std().item()
    return differences.double().mean().item() / max(spread / len(differences) ** 0.5, 1e-12) if spread else 0.0


def pairing(conditions: Tensor, images: Tensor) -> float:
    """Return how much better images are predicted from their own conditions than from others', in standard errors. The
    map is linear, from 3 x 3 pixels to one, relative to the mean face, fitted by ridge regression to the first half and
    evaluated on the second.

    Args:
        conditions: latents, [N, C, h, w].
        images: latents, [N, C, h, w].
    """
    half = len(images) // 2
    x, y = conditions - conditions[:half].mean(0), images - images[:half].mean(0)
    features = F.unfold(x, 3, padding=1).mT  # [N, h w, 9 C]
    targets = y.flatten(2).mT  # [N, h w, C]
    fit_x, fit_y = features[:half].flatten(0, 1), targets[:half].flatten(0, 1)
    square = fit_x.T @ fit_x  # [9 C, 9 C]
    ridge = 0.1 * square.diagonal().mean() + 1e-6
    matrix = torch.linalg.solve(square + ridge * torch.eye(len(square)), fit_x.T @ fit_y)  # [9 C, C]
    predicted = features[half:] @ matrix  # [N / 2, h w, C]
    right = (predicted - targets[half:]).square().mean(dim=(1, 2))
    wrong = (predicted.roll(1, dims=0) - targets[half:]).square().mean(dim=(1, 2))
    return standard_errors(wrong - right)
