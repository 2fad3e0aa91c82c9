"""FlowEdit (arXiv 2412.08629): move the image by the difference between two predictions, without inversion.

At each time both conditions see the image with the same noise. What both predict equally stays as it is, so that an
edit from one mask to another keeps texture and light; two passes per step.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch

from likeness.pipelines.editing.base import Editing
from likeness.pipelines.sampling import predict


def flow_edit(editing: Editing) -> Iterator[None]:
    """Algorithm 1 of the paper with one noise per step (n_avg = 1, n_min = 0)."""
    target, source = editing.target, editing.source
    assert source is not None, "FlowEdit compares two calls"
    target.latents = editing.clean  # between steps, the edited x_0
    for step in range(editing.start, target.steps):
        source.latents = editing.noised(editing.draw(), step)
        edited = target.latents
        target.latents = edited + source.latents - editing.clean
        source.step = target.step = step
        _, (wanted, given) = predict([target, source])
        after = target.times[step + 1] if step + 1 < target.steps else 0.0
        edited = edited + (after - target.times[step]) * (wanted - given)
        target.latents, target.step = torch.where(editing.region, edited, editing.clean), step + 1
        yield
