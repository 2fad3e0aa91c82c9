"""Rectified flow: a straight line from data to noise, and the network predicts its direction.

Liu et al. 2022 (arXiv 2209.03003); MMFace-DiT uses it with uniform time. Here t = 0 is data and t = 1 is noise, as
in diffusers; the released MMFace-DiT weights have the opposite direction, which is reversed by their conversion.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from diffusers import DPMSolverMultistepScheduler, FlowMatchEulerDiscreteScheduler
from torch import Tensor

from likeness.objectives.base import check_numbers, column
from likeness.types import InputError

TIMESTEPS = 1000  # diffusers' flow schedulers count time in thousandths


@dataclass(frozen=True, kw_only=True)
class RectifiedFlow:
    """x_t = (1 - t) x_0 + t noise; the target is v = noise - x_0."""

    time_sampling: Literal["uniform", "logit_normal"] = "logit_normal"
    """Training times: uniform (MMFace-DiT), or sigmoid of a normal (Esser et al. 2024, equation 19)."""
    logit_mean: float = 0.0
    """Mean of that normal."""
    logit_std: float = 1.0
    """Standard deviation of that normal."""
    shift: float = 1.0
    """Shifts training times and sampling steps towards noise: t -> s t / (1 + (s - 1) t) (same paper, equation 23)."""
    time_scale: float = 1000.0
    """Factor of t before it is embedded; 999 in the released MMFace-DiT weights."""
    sampler: Literal["euler", "dpm++", "sde-dpm++", "renoise"] = "euler"
    """Sampler of published pipelines: Euler's method; DPM-Solver++(2M) (Lu et al. 2022, arXiv 2211.01095), or its SDE
    form, which replaces a part of the noise by fresh noise at every step; or, for few-step models, x_next =
    (1 - t_next) x_0 + t_next noise, with x_0 estimated by `denoise` and only fresh noise."""

    def __post_init__(self) -> None:
        if self.time_sampling not in ("uniform", "logit_normal"):
            raise InputError(f"time_sampling is {self.time_sampling!r}; choose uniform or logit_normal")
        if self.sampler not in ("euler", "dpm++", "sde-dpm++", "renoise"):
            raise InputError(f"sampler is {self.sampler!r}; choose euler, dpm++, sde-dpm++ or renoise")
        check_numbers(self, "logit_mean")
        check_numbers(self, "shift", "logit_std", "time_scale", positive=True)

    def sample_time(self, uniform: Tensor) -> Tensor:
        time = uniform.to(torch.float32)
        if self.time_sampling == "logit_normal":
            # the clamp keeps the tails finite: 1e-6 is beyond four standard deviations
            normal = torch.special.ndtri(time.double().clamp(1e-6, 1 - 1e-6)).float()
            time = torch.sigmoid(self.logit_mean + self.logit_std * normal)
        return self._shifted(time)

    def corrupt(self, clean: Tensor, noise: Tensor, time: Tensor) -> Tensor:
        t = column(time, clean)
        return (1 - t) * clean + t * noise

    def target(self, clean: Tensor, noise: Tensor, time: Tensor) -> Tensor:
        return noise - clean

    def denoise(self, noisy: Tensor, prediction: Tensor, time: Tensor) -> Tensor:
        """Estimate x_0 = x_t - t v from x_t and the predicted v, both [B, C, h, w], at times [B]."""
        return noisy - column(time, noisy) * prediction

    def weight(self, time: Tensor) -> Tensor:
        return torch.ones_like(time, dtype=torch.float32)

    def noise_level(self, time: Tensor) -> Tensor:
        return time

    def model_time(self, time: Tensor) -> Tensor:
        return time * self.time_scale

    def scheduler(self) -> FlowMatchEulerDiscreteScheduler | DPMSolverMultistepScheduler:
        if self.sampler.endswith("dpm++"):
            flow = {"prediction_type": "flow_prediction", "use_flow_sigmas": True, "flow_shift": self.shift}
            algorithm = self.sampler.replace("dpm", "dpmsolver")
            return DPMSolverMultistepScheduler(num_train_timesteps=TIMESTEPS, algorithm_type=algorithm, **flow)
        renoise = self.sampler == "renoise"
        return FlowMatchEulerDiscreteScheduler(num_train_timesteps=TIMESTEPS, stochastic_sampling=renoise)

    def check_scheduler(self, scheduler: Any) -> None:
        config = scheduler.config
        solves = {"prediction_type": "flow_prediction", "use_flow_sigmas": True}  # of solvers for several objectives
        if hasattr(scheduler, "alphas_cumprod") or "prediction_type" in config:
            if any(config.get(name) != value for name, value in solves.items()):
                raise InputError(
                    f"{type(scheduler).__name__} does not fit this model, a rectified flow: use "
                    "FlowMatchEulerDiscreteScheduler, or a solver with use_flow_sigmas=True and "
                    "prediction_type='flow_prediction' such as DPMSolverMultistepScheduler"
                )
            names = ("use_karras_sigmas", "use_exponential_sigmas", "use_beta_sigmas", "use_lu_lambdas")
            if others := [name for name in names if config.get(name)]:
                raise InputError(
                    f"{type(scheduler).__name__} has {others[0]}=True, which replaces the flow sigmas of this "
                    "model: leave it out"
                )

    def schedule(self, scheduler: Any, steps: int) -> dict[str, Any]:
        if not isinstance(scheduler, FlowMatchEulerDiscreteScheduler):
            return {"num_inference_steps": steps}
        # n equal steps from 1 to 0 (the scheduler appends the 0). The scheduler's default sigmas end at 1/1000 and are
        # not uniform: with them, 8 steps miss the integral by 3 %.
        sigmas = torch.linspace(1, 1 / steps, steps, dtype=torch.float64)
        return {"sigmas": self._shifted(sigmas).tolist()}

    def time_of(self, timesteps: Tensor) -> Tensor:
        return timesteps.to(torch.float32) / TIMESTEPS

    def config(self) -> dict[str, Any]:
        return {"name": "rectified_flow", **dataclasses.asdict(self)}

    def _shifted(self, time: Tensor) -> Tensor:
        return self.shift * time / (1 + (self.shift - 1) * time)


def dynamic_shift(tokens: int, scheduler: Mapping[str, Any]) -> float:
    """Return mu, by which FLUX.1's sampler shifts its steps towards noise, t -> e^mu t / (1 + (e^mu - 1) t): more for
    larger images (FLUX's `get_schedule`).

    Args:
        tokens: image tokens, (h / 2)(w / 2).
        scheduler: the scheduler's configuration; mu is linear in the tokens, `base_shift` at `base_image_seq_len` and
            `max_shift` at `max_image_seq_len`. Default: those of FLUX.1-dev, 0.5 at 256 and 1.15 at 4096.
    """
    low, high = scheduler.get("base_image_seq_len", 256), scheduler.get("max_image_seq_len", 4096)
    first, last = scheduler.get("base_shift", 0.5), scheduler.get("max_shift", 1.15)
    return first + (last - first) / (high - low) * (tokens - low)
