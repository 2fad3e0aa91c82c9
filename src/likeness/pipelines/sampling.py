"""A call of a pipeline between its steps, and the function that runs one step of several calls.

A pipeline's own `__call__` advances one call to its end. The service advances many, which enter and leave between
steps: each has its own times, sampler state and generators, so that an image depends on its own request only.

B images, S steps, C latent channels, h x w latent size, P passes through the network.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_map

from likeness.types import ConditionInput, InputError, TextFeatures


@dataclass(frozen=True, kw_only=True)
class EncodedBatch:
    """Checked and encoded arguments: B images in S steps, of T distinct texts and M distinct conditions."""

    text: TextFeatures
    """Of the distinct texts, tokens [T, L, D]."""
    prompts: list[int]
    """Index of each image's prompt in `text`, [B]."""
    negatives: list[int]
    """Index of its negative prompt, [B]."""
    conditions: list[dict[str, ConditionInput]]
    """The conditions of each image, [B]."""
    latent_indices: list[dict[str, int]]
    """Their indices in `condition_latents`, 1 to M, [B]."""
    condition_latents: Tensor
    """[M + 1, C, h, w]; the first is an absent condition, zeros."""
    condition_ids: Tensor
    """Their ids in the network's condition embedding, [M + 1]; -1 for absent."""
    guidance: list[float]
    """Text guidance g at every step, 1 outside its interval, [S]."""
    times: Tensor
    """Network input at every step, float32 [S]."""


class Passes(NamedTuple):
    """The P forward passes of one step for a group of images."""

    items: list[int]
    """Image of each, [P]."""
    weights: list[float]
    """Factor of each in the prediction of its image, [P]."""
    arguments: dict[str, Any]
    """Arguments of the network in addition to latents and times, [P, ...] each."""
    shared: dict[str, Any]
    """Arguments of the network that all passes share."""
    kinds: list[str]
    """What each computes, [P]: passes of one kind share a context of diffusers' caches."""


@dataclass(kw_only=True)
class Sampling:
    """A call of a pipeline after `step` of its S steps."""

    pipeline: Any
    """The pipeline."""
    batch: EncodedBatch
    latents: Tensor
    """x_t, float32 [B, C, h, w]."""
    scheduler: Any
    """The sampler, whose state belongs to this call."""
    step_options: dict[str, Any]
    """Options of the sampler's `step`."""
    pass_functions: list[Callable[[int], Passes]]
    """Function from a step to the passes of each group of images."""
    levels: list[float]
    """Noise level at every step, [S]."""
    guidance_scale: float
    """Text guidance at the start."""
    guidance_interval: tuple[float, float]
    """Noise levels at which it acts."""
    guidance_model: Any
    """Weaker network of autoguidance, or None."""
    guidance_model_scale: float
    guidance_model_interval: tuple[float, float]
    output_type: str
    size: tuple[int, int]
    """Requested (width, height) of the images, in pixels."""
    notes: list[str]
    """Notes on the inputs (`PortraitOutput.notes`)."""
    objective: Any
    """The objective, which estimates x_0."""
    times: Tensor
    """Its time at every step, float32 [S]."""
    step: int = 0
    """Steps done."""
    last: tuple[Tensor, Tensor] | None = None
    """Input and prediction of the last step, [B, C, h, w] each."""

    @property
    def steps(self) -> int:
        """Number of steps, S."""
        return len(self.levels)

    def guide(self, scale: float) -> None:
        """Set the text guidance of the following steps.

        Raises:
            InputError: the call started with 1, and so without negative prompts.
        """
        if self.guidance_scale == 1 != scale and not self.pipeline.transformer.config.get("guidance_embeds"):
            raise InputError(
                f"The callback set the guidance scale to {scale}, but the call started with 1, without negative "
                "prompts: start with another guidance_scale"
            )
        low, high = self.guidance_interval
        self.batch.guidance[self.step :] = [scale if low <= x <= high else 1.0 for x in self.levels[self.step :]]

    def images(self, *, preview: bool = False) -> Any:
        """Decode the images, or with `preview` the estimate of x_0 at the last step.

        Raises:
            InputError: they are not finite.
        """
        latents = self.latents
        if preview:
            assert self.last is not None, "no step is done"
            latents = self.objective.denoise(*self.last, self.times[self.step - 1])
        return self.pipeline.decode(latents, self.output_type, self.size)


@torch.no_grad()
def predict(samplings: Sequence[Sampling], *, together: bool = False) -> tuple[list[Tensor], list[Tensor]]:
    """Run the network at the current step of several calls of one pipeline.

    Args:
        samplings: the calls; none is complete.
        together: run passes with arguments of the same shapes in one batch. That is faster on an accelerator, but
            rounding then depends on the batch.

    Returns:
        Input and guided prediction of each call, [B, C, h, w] each.
    """
    inputs, predictions = [], []
    for sampling in samplings:
        scaled, timestep = sampling.latents, sampling.scheduler.timesteps[sampling.step]
        if hasattr(sampling.scheduler, "scale_model_input"):  # samplers of variance-exploding models
            scaled = sampling.scheduler.scale_model_input(scaled, timestep)
        inputs.append(scaled)
        predictions.append(torch.zeros_like(scaled))
    runs = [(i, passes_at(s.step)) for i, s in enumerate(samplings) for passes_at in s.pass_functions]
    if samplings[0].pipeline.transformer.is_cache_enabled:
        return inputs, cached_predictions(samplings, inputs, runs)
    for group in groups(runs, samplings, inputs) if together else [[run] for run in runs]:
        dtype = samplings[0].batch.condition_latents.dtype  # of the network, without a search of its parameters
        latents = torch.cat([inputs[i][passes.items] for i, passes in group]).to(dtype)  # [P, C, h, w]
        times = torch.cat(
            [samplings[i].batch.times[samplings[i].step].expand(len(passes.items)) for i, passes in group]
        )  # [P]
        outputs = network_output(samplings[group[0][0]], latents, times, joined([passes for _, passes in group]))
        for (i, passes), own in zip(group, outputs.split([len(passes.items) for _, passes in group]), strict=True):
            for item, weight, output in zip(passes.items, passes.weights, own, strict=True):
                predictions[i][item] += weight * output
    return inputs, predictions


def cached_predictions(
    samplings: Sequence[Sampling], inputs: Sequence[Tensor], runs: Sequence[tuple[int, Passes]]
) -> list[Tensor]:
    """Run the network with one of diffusers' caches: passes of one kind at a time, each with the state of its earlier
    steps; all states are dropped when the passes are not those of the last step. Return the predictions.
    """
    transformer = samplings[0].pipeline.transformer
    contexts = [(id(samplings[i]), number, *passes.items, *passes.kinds) for number, (i, passes) in enumerate(runs)]
    last, _ = getattr(transformer, "_last_contexts", (None, None))
    if contexts != last:
        transformer._reset_stateful_cache()
        transformer._last_contexts = contexts, list(samplings)  # no other object can have the id of one that exists
    predictions = [torch.zeros_like(own) for own in inputs]
    for number, (i, passes) in enumerate(runs):
        sampling = samplings[i]
        sampling.pipeline._current_timestep = sampling.scheduler.timesteps[sampling.step]
        for kind in dict.fromkeys(passes.kinds):
            rows = [row for row, own in enumerate(passes.kinds) if own == kind]
            items = [passes.items[row] for row in rows]
            latents = inputs[i][items].to(sampling.batch.condition_latents.dtype)  # [p, C, h, w]
            times = sampling.batch.times[sampling.step].expand(len(rows))  # [p]
            arguments = tree_map(lambda x, rows=rows: x[rows], passes.arguments) | passes.shared
            with transformer.cache_context(f"{id(sampling)} {number} {kind}", step_index=sampling.step):
                outputs = network_output(sampling, latents, times, arguments)
            for row, item, output in zip(rows, items, outputs, strict=True):
                predictions[i][item] += passes.weights[row] * output
    return predictions


def advance(samplings: Sequence[Sampling], *, together: bool = False) -> None:
    """Run the next step of several calls: `predict`, then the sampler."""
    inputs, predictions = predict(samplings, together=together)
    for sampling, scaled, prediction in zip(samplings, inputs, predictions, strict=True):
        timestep = sampling.scheduler.timesteps[sampling.step]
        sampling.last = scaled, prediction
        sampling.latents = sampling.scheduler.step(
            prediction, timestep, sampling.latents, **sampling.step_options, return_dict=False
        )[0]
        sampling.step += 1


def network_output(sampling: Sampling, latents: Tensor, times: Tensor, arguments: dict[str, Any]) -> Tensor:
    """Run the network, and the weaker one of autoguidance; float32 [P, C, h, w]."""
    outputs = sampling.pipeline.transformer(latents, times, **arguments).float()
    low, high = sampling.guidance_model_interval
    acts = sampling.guidance_model is not None and sampling.guidance_model_scale != 1
    if acts and low <= sampling.levels[sampling.step] <= high:
        arguments = {name: value for name, value in arguments.items() if name != "static_cache"}  # of the other weights
        weaker = sampling.guidance_model(latents, times, **arguments).float()
        outputs = weaker + sampling.guidance_model_scale * (outputs - weaker)
    return outputs


def groups(
    runs: Sequence[tuple[int, Passes]], samplings: Sequence[Sampling], inputs: Sequence[Tensor]
) -> list[list[tuple[int, Passes]]]:
    """Group passes that can run as one batch: arguments of the same names and shapes, and no autoguidance."""
    found: dict[Any, list[tuple[int, Passes]]] = {}
    for i, passes in runs:
        leaves, structure = tree_flatten((passes.arguments, passes.shared))
        own = len(tree_flatten(passes.arguments)[0])
        shapes = [tuple(leaf.shape[1:]) for leaf in leaves[:own]]
        shared = [tuple(leaf.shape) if isinstance(leaf, Tensor) else leaf for leaf in leaves[own:]]
        alone = i if samplings[i].guidance_model is not None else None
        key = (tuple(inputs[i].shape[1:]), str(structure), *shapes, *shared, alone)
        found.setdefault(key, []).append((i, passes))
    return list(found.values())


def joined(passes: Sequence[Passes]) -> dict[str, Any]:
    """Concatenate the arguments of passes that form one batch."""
    first = passes[0]
    if len(passes) == 1:
        return {**first.arguments, **first.shared}
    columns = tree_map(lambda *leaves: torch.cat(leaves), *(each.arguments for each in passes))
    return {**columns, **first.shared}
