"""pi-Flow, the control of the students (benchmarks/pi_flow.py): its policy and its loss against exact solutions."""

import sys
from pathlib import Path

import torch
from torch import nn

sys.path.append(str(Path(__file__).parents[2] / "benchmarks"))

import pi_flow

from builders import randomise
from likeness.models.mmface import MMFaceTransformer
from likeness.objectives import RectifiedFlow
from likeness.train.batches import Batch
from likeness.types import TextFeatures

STEPS = 4
DATA = torch.linspace(-1, 1, 2 * 4 * 4 * 4).reshape(2, 4, 4, 4)


class Known(nn.Module):
    """A flow whose data are known: v = (x_t - x_0) / t, for `points` times."""

    def __init__(self, points: int = 1) -> None:
        super().__init__()
        self.points = points

    def forward(self, latents, time, *given):
        data = DATA.repeat(len(latents) // 2, 1, 1, 1)
        velocity = (latents - data) / (time / 1000)[:, None, None, None]
        return velocity.repeat(1, self.points, 1, 1)


def batch_of(uniform):
    draw = torch.Generator().manual_seed(0)
    text = TextFeatures(torch.randn(2, 3, 8, generator=draw), torch.randn(2, 8, generator=draw))
    conditions = torch.randn(2, 1, 4, 4, 4, generator=draw), torch.tensor([[0], [-1]])
    return Batch(DATA, torch.randn(DATA.shape, generator=draw), torch.tensor(uniform), *conditions, [], text)


def loss_of(network, batch, **options):
    options = {"teacher": Known(), "guidance_scale": 2.0, "guidance_interval": (0.1, 0.9)} | options
    empty = TextFeatures(torch.zeros(1, 3, 8), torch.zeros(1, 8))
    return pi_flow.imitation_losses(network, RectifiedFlow(), batch, steps=STEPS, empty=empty, **options)


def test_the_exact_policy_has_no_loss_at_any_time():
    for uniform in ([0.0, 0.1], [0.3, 0.62], [0.76, 1.0]):
        assert loss_of(Known(pi_flow.POINTS), batch_of(uniform)).max() < 1e-8


def test_guidance_of_the_teacher_is_imitated_within_its_interval():
    """A teacher whose velocity is larger by 1 with text: guidance 3 adds 3 within the interval, 1 outside."""

    class Prompted(Known):
        def forward(self, latents, time, text, *given):
            return super().forward(latents, time) + (text.pooled != 0).any(dim=1).float()[:, None, None, None]

    for uniform, added in (([0.3, 0.4], 9.0), ([0.99, 0.99], 1.0)):  # t in (0.5, 0.75) and below 0.25
        options = {"teacher": Prompted(), "guidance_scale": 3.0, "guidance_interval": (0.4, 0.9)}
        loss = loss_of(Known(pi_flow.POINTS), batch_of(uniform), **options)
        torch.testing.assert_close(loss, torch.full((2,), added))


def test_a_policy_interpolates_its_points():
    """x_0(t) is linear within the segment; at its ends it is the first and the last point."""
    points = torch.arange(pi_flow.POINTS).float()[None, :, None, None, None].expand(3, -1, 4, 4, 4)
    start, time = torch.full((3,), 0.5), torch.tensor([0.5, 0.375, 0.25])
    velocity = pi_flow.policy_velocity(points, torch.zeros(3, 4, 4, 4), time, start, STEPS)
    expected = -torch.tensor([0.0, (pi_flow.POINTS - 1) / 2, pi_flow.POINTS - 1]) / time
    torch.testing.assert_close(velocity[:, 0, 0, 0], expected)


def test_a_widened_network_starts_as_the_network():
    """Every point is its x_0, so a step of the policy is one of the network with Euler's method."""
    sizes = {"hidden_size": 16, "depth": 1, "heads": 2, "text_dim": 8, "latent_channels": 4}
    network = randomise(MMFaceTransformer(**sizes))
    policy = pi_flow.PolicyTransformer(**sizes)
    policy.load_state_dict(network.state_dict())
    pi_flow.widen(policy)
    policy.steps, policy.objective = STEPS, RectifiedFlow()
    batch = batch_of([0.0, 0.0])
    given = batch.text, batch.condition_latents, batch.condition_index
    time = torch.tensor([1000.0, 250.0])
    torch.testing.assert_close(policy(batch.noise, time, *given), network(batch.noise, time, *given))
