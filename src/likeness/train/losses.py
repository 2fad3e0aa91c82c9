"""The training loss of flow matching and diffusion."""

from __future__ import annotations

from torch import Tensor, nn

from likeness.objectives import Objective
from likeness.train.batches import Batch


def denoising_losses(network: nn.Module, objective: Objective, batch: Batch) -> Tensor:
    """Return weight(t) times the mean squared error at x_t of each sample of a batch with text, float32 [B]."""
    time = objective.sample_time(batch.uniform)  # [B]
    noisy = objective.corrupt(batch.clean, batch.noise, time)  # [B, C, h, w]
    prediction = network(noisy, objective.model_time(time), batch.text, batch.condition_latents, batch.condition_index)
    target = objective.target(batch.clean, batch.noise, time)
    error = (prediction.float() - target).square().mean(dim=(1, 2, 3))  # [B]
    return objective.weight(time) * error
