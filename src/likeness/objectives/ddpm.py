"""DDPM: a thousand noise levels, and the network predicts the noise (or v), weighted by min-SNR.

Ho et al. 2020 (arXiv 2006.11239) with Stable Diffusion's scaled-linear betas; v is Salimans and Ho 2022
(arXiv 2202.00512); the weight is Hang et al. 2023 (arXiv 2303.09556), gamma 5 as in the MMFace-DiT paper.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

import torch
from diffusers import DPMSolverMultistepScheduler
from torch import Tensor

from likeness.objectives.base import check_numbers, column
from likeness.types import InputError


@dataclass(frozen=True, kw_only=True)
class DDPM:
    """x_t = sqrt(a_t) x_0 + sqrt(1 - a_t) noise, a_t the cumulative product of 1 - beta; t is an integer step."""

    prediction: Literal["epsilon", "v_prediction"] = "epsilon"
    """Target: the noise, or v = sqrt(a_t) noise - sqrt(1 - a_t) x_0."""
    snr_gamma: float | None = 5.0
    """Cap of the signal-to-noise ratio in the weight; None weights all times equally."""
    timesteps: int = 1000
    """Number of noise levels."""
    beta_start: float = 0.00085
    """First beta."""
    beta_end: float = 0.012
    """Last beta; those between are evenly spaced in their square roots."""

    def __post_init__(self) -> None:
        if self.prediction not in ("epsilon", "v_prediction"):
            raise InputError(f"prediction is {self.prediction!r}; choose epsilon or v_prediction")
        if self.snr_gamma is not None:
            check_numbers(self, "snr_gamma", positive=True)
        check_numbers(self, "timesteps", "beta_start", "beta_end", positive=True)
        if type(self.timesteps) is not int:
            raise InputError(f"the objective's timesteps is {self.timesteps}: it must be a whole number")
        if max(self.beta_start, self.beta_end) >= 1:
            raise InputError(f"the objective's betas are {self.beta_start} to {self.beta_end}: they must be below 1")

    @cached_property
    def alpha_squared(self) -> Tensor:
        """a_t for t = 0 .. timesteps - 1, float32 [T]."""
        betas = torch.linspace(self.beta_start**0.5, self.beta_end**0.5, self.timesteps, dtype=torch.float32) ** 2
        return torch.cumprod(1 - betas, dim=0)

    def sample_time(self, uniform: Tensor) -> Tensor:
        return (uniform.double() * self.timesteps).floor().clamp(max=self.timesteps - 1).float()

    def corrupt(self, clean: Tensor, noise: Tensor, time: Tensor) -> Tensor:
        alpha, sigma = self._alpha_sigma(time, clean)
        return alpha * clean + sigma * noise

    def target(self, clean: Tensor, noise: Tensor, time: Tensor) -> Tensor:
        if self.prediction == "epsilon":
            return noise
        alpha, sigma = self._alpha_sigma(time, clean)
        return alpha * noise - sigma * clean

    def denoise(self, noisy: Tensor, prediction: Tensor, time: Tensor) -> Tensor:
        alpha, sigma = self._alpha_sigma(time, noisy)
        return (
            (noisy - sigma * prediction) / alpha if self.prediction == "epsilon" else alpha * noisy - sigma * prediction
        )

    def weight(self, time: Tensor) -> Tensor:
        if self.snr_gamma is None:
            return torch.ones_like(time, dtype=torch.float32)
        squared = self._squared(time)
        snr = squared / (1 - squared)
        capped = snr.clamp(max=self.snr_gamma)
        # an error in v weighs SNR + 1 times the same error in x_0, one in epsilon SNR times
        return capped / snr if self.prediction == "epsilon" else capped / (snr + 1)

    def noise_level(self, time: Tensor) -> Tensor:
        return (1 - self._squared(time)).sqrt()

    def model_time(self, time: Tensor) -> Tensor:
        return time

    def scheduler(self) -> DPMSolverMultistepScheduler:
        return DPMSolverMultistepScheduler(
            num_train_timesteps=self.timesteps,
            beta_start=self.beta_start,
            beta_end=self.beta_end,
            beta_schedule="scaled_linear",
            prediction_type=self.prediction,
        )

    def check_scheduler(self, scheduler: Any) -> None:
        own, config = getattr(scheduler, "alphas_cumprod", None), scheduler.config
        if own is None or config.get("use_flow_sigmas") or config.get("prediction_type") != self.prediction:
            raise InputError(
                f"{type(scheduler).__name__} does not fit this model, a DDPM: use a scheduler for DDPM with "
                f"prediction_type={self.prediction!r}, such as DPMSolverMultistepScheduler"
            )
        if len(own) != self.timesteps or not torch.allclose(own.cpu().float(), self.alpha_squared, atol=1e-3):
            raise InputError(
                f"{type(scheduler).__name__} has other betas than this model: create it with "
                f"{type(scheduler).__name__}.from_config(pipeline.scheduler.config)"
            )

    def schedule(self, scheduler: Any, steps: int) -> dict[str, Any]:
        return {"num_inference_steps": steps}

    def time_of(self, timesteps: Tensor) -> Tensor:
        return timesteps.to(torch.float32)

    def config(self) -> dict[str, Any]:
        return {"name": "ddpm", **dataclasses.asdict(self)}

    def _squared(self, time: Tensor) -> Tensor:
        return self.alpha_squared.to(time.device)[time.long()]

    def _alpha_sigma(self, time: Tensor, like: Tensor) -> tuple[Tensor, Tensor]:
        squared = self._squared(time)
        return column(squared.sqrt(), like), column((1 - squared).sqrt(), like)
