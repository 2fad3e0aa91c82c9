"""Objectives: a perfect network and the objective's own scheduler must give the clean latent back."""

from __future__ import annotations

import pytest
import torch
from diffusers import DDPMScheduler

from likeness.objectives import DDPM, RectifiedFlow, make_objective

FLOWS = [
    RectifiedFlow(time_sampling="uniform"),
    RectifiedFlow(),
    RectifiedFlow(shift=3.0),
    RectifiedFlow(time_scale=999.0),
]
DDPMS = [DDPM(), DDPM(prediction="v_prediction"), DDPM(snr_gamma=None)]
SHAPE = (2, 4, 8, 8)


def draw(seed: int) -> torch.Tensor:
    return torch.randn(SHAPE, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("objective", FLOWS + DDPMS, ids=str)
@pytest.mark.parametrize("steps", [1, 8, 50])
def test_oracle_recovers_the_clean_latent(objective, steps):
    clean, noise = draw(0), draw(1)
    scheduler = objective.scheduler()
    scheduler.set_timesteps(**objective.schedule(scheduler, steps))
    times = objective.time_of(scheduler.timesteps)
    latents = objective.corrupt(clean, noise, times[:1].expand(2))
    for timestep, time in zip(scheduler.timesteps, times, strict=True):
        at = time.expand(2)
        # the perfect network knows the clean latent and retrieved the noise that is in x_t
        zero = torch.zeros_like(clean)
        signal, sigma = objective.corrupt(clean, zero, at), objective.corrupt(zero, zero + 1, at)
        prediction = objective.target(clean, (latents - signal) / sigma, at)
        latents = scheduler.step(prediction, timestep, latents, return_dict=False)[0]
    assert (latents - clean).norm() / clean.norm() < 1e-3


@pytest.mark.parametrize("objective", FLOWS, ids=str)
def test_flow_corrupts_as_its_scheduler_does(objective):
    clean, noise = draw(0), draw(1)
    scheduler = objective.scheduler()
    scheduler.set_timesteps(**objective.schedule(scheduler, 10))
    for timestep in scheduler.timesteps:
        theirs = scheduler.scale_noise(clean, timestep[None].expand(2), noise)
        ours = objective.corrupt(clean, noise, objective.time_of(timestep[None].expand(2)))
        torch.testing.assert_close(ours, theirs, atol=2e-6, rtol=1e-5)


@pytest.mark.parametrize("objective", DDPMS, ids=str)
def test_ddpm_corrupts_as_diffusers_does(objective):
    clean, noise = draw(0), draw(1)
    reference = DDPMScheduler.from_config(objective.scheduler().config)
    for step in (0, 1, 500, 999):
        timesteps = torch.tensor([step, step])
        theirs = reference.add_noise(clean, noise, timesteps)
        torch.testing.assert_close(objective.corrupt(clean, noise, timesteps.float()), theirs)


def test_flow_steps_are_even():
    """The scheduler's own eight sigmas end at 1/1000; even steps miss the integral of a line by rounding only."""
    scheduler = RectifiedFlow().scheduler()
    scheduler.set_timesteps(**RectifiedFlow().schedule(scheduler, 8))
    torch.testing.assert_close(scheduler.sigmas, torch.linspace(1, 0, 9))
    scheduler.set_timesteps(8)
    assert (scheduler.sigmas - torch.linspace(1, 0, 9)).abs().max() > 0.01


def test_shift_moves_steps_towards_noise():
    scheduler = RectifiedFlow(shift=3.0).scheduler()
    scheduler.set_timesteps(**RectifiedFlow(shift=3.0).schedule(scheduler, 4))
    torch.testing.assert_close(scheduler.sigmas, torch.tensor([1.0, 0.9, 0.75, 0.5, 0.0]))


def test_time_sampling():
    uniform = (torch.arange(10_000) + 0.5) / 10_000
    assert torch.equal(RectifiedFlow(time_sampling="uniform").sample_time(uniform), uniform)
    logit_normal = RectifiedFlow().sample_time(uniform)
    assert logit_normal.dtype == torch.float32
    logits = torch.logit(logit_normal.double())
    assert abs(logits.mean()) < 1e-3
    assert abs(logits.std() - 1) < 1e-2
    steps = DDPM().sample_time(uniform)
    assert steps.min() == 0
    assert steps.max() == 999
    assert steps.unique().numel() == 1000
    assert DDPM().sample_time(torch.tensor([1 - 1e-9])).item() == 999


def test_min_snr_weight():
    """min(SNR, 5) / SNR for the noise, min(SNR, 5) / (SNR + 1) for v; 1 without gamma."""
    time = torch.tensor([0.0, 300.0, 999.0])
    squared = DDPM().alpha_squared[time.long()]
    snr = squared / (1 - squared)
    assert snr[0] > 5 > snr[2]
    torch.testing.assert_close(DDPM().weight(time), torch.minimum(snr, torch.tensor(5.0)) / snr)
    torch.testing.assert_close(
        DDPM(prediction="v_prediction").weight(time), torch.minimum(snr, torch.tensor(5.0)) / (snr + 1)
    )
    assert torch.equal(DDPM(snr_gamma=None).weight(time), torch.ones(3))


def test_noise_level_grows_with_time():
    for objective, times in ((RectifiedFlow(), torch.linspace(0, 1, 11)), (DDPM(), torch.arange(0.0, 1000, 100))):
        levels = objective.noise_level(times)
        assert (levels.diff() > 0).all()
        assert 0 <= levels.min() <= levels.max() <= 1


@pytest.mark.parametrize("objective", [*FLOWS, *DDPMS, RectifiedFlow(sampler="dpm++")], ids=str)
def test_configuration_round_trip(objective):
    assert make_objective(objective.config()) == objective


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"name": "score"}, "score"),
        ({"name": "ddpm", "shift": 1}, "shift"),
        ({"name": "rectified_flow", "shift": 0}, "shift is 0: it must be a finite number above 0"),
        ({"name": "rectified_flow", "sampler": "heun"}, "choose euler, dpm"),
        ({"name": "ddpm", "prediction": "x0"}, "x0"),
    ],
)
def test_bad_configuration_is_named(config, message):
    with pytest.raises(ValueError, match=message):
        make_objective(config)
