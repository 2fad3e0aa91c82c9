"""Is it learning? Looked at every so many images, cheaply, with a verdict in the log.

Four questions, each with an alarm that a healthy run does not raise: do all weights move; does the prediction depend on
the condition at all; do the conditions in the batches belong to their faces; and, reported without alarm because it
takes its time, is the loss lower with the right condition than with another face's. The third is answered from the
batches alone, so that it does not wait for the network: a linear map from condition to picture, fitted on half of the
pairs, predicts the other half better with the right partner than with the wrong one.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from likeness.data.store import Store
from likeness.encoders.components import Components
from likeness.objectives import Objective
from likeness.parallel import own, spread_again
from likeness.train.config import MDiTFaceAdapter, TrainRecipe
from likeness.train.learner import Learner
from likeness.train.networks import condition_names, share_of
from likeness.train.step import Batch
from likeness.train.validate import by_time, face_losses, faces_with, fixed_faces

FACES = 32
"""Faces that are measured with each condition."""
PAIRS = 256
"""Pairs of condition and picture that are kept of the batches, of different faces, the newest."""
FEW_PAIRS = 128
"""With fewer nothing is said of them,"""
FEW_PLACES = 64
"""nor where latents are smaller than 8 x 8."""
CLEAR = 4.0
"""Standard errors that are no accident: the verdict on whether a condition is used."""
CHANCE = 4.0
"""Standard errors that may be chance: the alarm about pairs. 128 true pairs had 8.7 or more, shuffled ones 2.7 or less
(masks, sketches and keypoints of drawn faces and of photographs, 128 px, 9 sets of each, four shuffles)."""
PATIENCE = 10
"""Steps before the weights and the dependence on the condition are judged: residual branches begin at zero."""
IDLE = 0.25
"""The share of a network that may go without a gradient: the last block's text stream has no reader."""


class Canary:
    """Looks at one run."""

    def __init__(
        self,
        recipe: TrainRecipe,
        learner: Learner,
        components: Components,
        objective: Objective,
        stores: Sequence[Store],
    ) -> None:
        self.learner, self.objective, self.precision = learner, objective, recipe.precision
        self.compiled = recipe.compile
        self.adapted = isinstance(recipe.network, MDiTFaceAdapter) or bool(recipe.trained)
        model: Any = learner.model
        self.rows = {name: list(model.config.condition_names).index(name) for name in condition_names(recipe)}
        self.shares = {name: share_of(recipe, name) for name in self.rows}
        mean, std = (
            torch.tensor(components.settings[key], dtype=torch.float32).reshape(1, -1, 1, 1)
            for key in ("latent_mean", "latent_std")
        )
        self.faces = {}
        for name in self.rows:
            having = [store for store in stores if name in store.conditions]  # a search for what is not there is long
            samples = faces_with(name, (store[index] for store in having for index in range(len(store))), FACES)
            if len(samples) > 1:
                text = components.text_features([sample.captions[0] if sample.captions else "" for sample in samples])
                self.faces[name] = fixed_faces(samples, name, text, objective, mean, std)
        self.pairs: dict[str, dict[float, tuple[Tensor, Tensor]]] = {name: {} for name in self.rows}
        self.given = dict.fromkeys(self.rows, 0)
        self.watched, self.steps = 0, 0
        self.idle: set[str] = set()
        self.before = self.some_weights()

    def watch(self, batches: Sequence[Batch]) -> None:
        """Note what a step was given; called between the backward pass and the optimizer."""
        if not self.steps:
            self.idle = {
                name for name, p in self.learner.model.named_parameters() if p.requires_grad and p.grad is None
            }
        self.steps += 1
        for batch in batches:
            self.watched += len(batch.clean)
            for name, row in self.rows.items():
                for sample, place in (batch.condition_index == row).nonzero().tolist():
                    self.keep_pair(name, batch.condition_latents[sample, place], batch.clean[sample])

    def keep_pair(self, name: str, condition: Tensor, picture: Tensor) -> None:
        """Keep a pair; a face once, since few faces seen often could be learnt by heart, and the oldest go first. Faces
        are told apart by their conditions: of a distribution the picture is drawn anew every time.
        """
        pairs = self.pairs[name]
        face = condition.double().sum().item()
        pairs.pop(face, None)
        pairs[face] = (condition, picture)
        if len(pairs) > PAIRS:
            del pairs[next(iter(pairs))]
        self.given[name] += 1

    def look(self) -> tuple[dict[str, float], list[str]]:
        """What is found now: numbers to keep, and sentences, those that begin with ALARM first. Every process must
        look; all find the same but for the pairs, of which each has its own.
        """
        values: dict[str, float] = {}
        alarms, notes = self.weights(), []
        model = self.learner.model
        model.eval()
        device, world = self.learner.world.device, self.learner.world
        for name, faces in self.faces.items():
            eager = torch.compiler.set_stance("force_eager") if self.compiled else nullcontext()  # another batch size
            with eager, torch.autocast(world.kind, torch.bfloat16, enabled=self.precision == "bf16"):
                losses = face_losses(model, self.objective, faces, self.rows[name], device)
            values |= {f"{name}_{variant}": loss.mean().item() for variant, loss in losses.items()}
            values |= {f"{name}_time_{n}": loss for n, loss in enumerate(by_time(losses["right"]), start=1)}
            gain = certainty(losses["shuffled"] - losses["right"])
            values[f"{name}_gain"] = gain
            if self.steps >= PATIENCE and torch.equal(losses["right"], losses["shuffled"]):
                alarms.append(f"ALARM: the prediction does not depend on the {name}")
            use = f"{values[f'{name}_shuffled'] / values[f'{name}_right'] - 1:+.2%} loss with another face's"
            verdict = "is used" if gain > CLEAR else "is not used yet" if gain > -CLEAR else "MISLEADS"
            notes.append(f"{name} {verdict} ({use}, {gain:.1f} standard errors)")
        model.train()
        spread_again(model)
        for name, pairs in self.pairs.items():
            if len(pairs) >= FEW_PAIRS and next(iter(pairs.values()))[0][0].numel() >= FEW_PLACES:
                values[f"{name}_pairs"] = fit = pairing(
                    *(torch.stack(side) for side in zip(*pairs.values(), strict=True))
                )
                if fit < CHANCE:
                    alarms.append(
                        f"ALARM: in the batches, pictures have no more to do with their own {name} than with another's "
                        f"({fit:.1f} standard errors)"
                    )
            if self.watched * self.shares[name] > FEW_PAIRS and not self.given[name]:
                alarms.append(f"ALARM: of {self.watched} samples none had a {name}")
        values["alarms"] = len(alarms)
        return values, alarms + notes

    def weights(self) -> list[str]:
        """Alarms about weights that did not move since the last look."""
        now = self.some_weights()
        still = [name for name in now if name not in self.idle and torch.equal(now[name], self.before[name])]
        self.before = now
        if self.steps < PATIENCE:
            return []
        alarms = []
        if still:
            alarms.append(f"ALARM: {len(still)} of {len(now)} weights do not move: {still[0]} and others")
        sizes = {name: parameter.numel() for name, parameter in self.learner.model.named_parameters() if name in now}
        idle = sum(size for name, size in sizes.items() if name in self.idle) / sum(sizes.values())
        if idle > IDLE:
            alarms.append(f"ALARM: no gradient reaches {idle:.0%} of the network: {min(self.idle)} and others")
        return alarms

    def some_weights(self) -> dict[str, Tensor]:
        """Up to 64 numbers of every weight that ought to move: all of a network from random weights, also those that
        somebody froze.
        """
        kept = {}
        for name, parameter in self.learner.model.named_parameters():
            if parameter.requires_grad or not self.adapted:
                numbers = own(parameter.detach()).flatten()
                if len(numbers):  # a rank's part of few rows may be empty
                    kept[name] = numbers[:: max(1, len(numbers) // 64)].clone()
        return kept


def certainty(gains: Tensor) -> float:
    """The mean of these paired differences in units of its standard error; 0 where all are equal."""
    spread = gains.double().std().item()
    return gains.double().mean().item() / max(spread / len(gains) ** 0.5, 1e-12) if spread else 0.0


def pairing(conditions: Tensor, pictures: Tensor) -> float:
    """Whether conditions belong to pictures, both [N, C, h, w] latents: how much better a picture is predicted from its
    own condition than from another's, in standard errors. The map is linear, from 3x3 places to one, about the mean
    face, fitted by ridge regression on the first half and judged on the second.
    """
    half = len(pictures) // 2
    x, y = conditions - conditions[:half].mean(0), pictures - pictures[:half].mean(0)
    features = F.unfold(x, 3, padding=1).mT  # [N, h w, 9 C]
    targets = y.flatten(2).mT  # [N, h w, C]
    known, wanted = features[:half].flatten(0, 1), targets[:half].flatten(0, 1)
    square = known.T @ known  # [9 C, 9 C]
    ridge = 0.1 * square.diagonal().mean() + 1e-6
    matrix = torch.linalg.solve(square + ridge * torch.eye(len(square)), known.T @ wanted)  # [9 C, C]
    predicted = features[half:] @ matrix  # [N / 2, h w, C]
    right = (predicted - targets[half:]).square().mean(dim=(1, 2))
    wrong = (predicted.roll(1, dims=0) - targets[half:]).square().mean(dim=(1, 2))
    return certainty(wrong - right)
