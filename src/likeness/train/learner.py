"""What learns: a network, its optimizers and its averages; how they take a step, and how they are put away and found
again. All trainings share it; each keeps its own loop.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor, nn

from likeness.parallel import ALONE, World, whole
from likeness.train.checkpoint import entries, newest, read_into
from likeness.train.optim import Ema, trained_parameters
from likeness.types import InputError


@dataclass(kw_only=True)
class Learner:
    """A network in training."""

    model: nn.Module
    """The network; its parameters that require gradients are trained."""
    optimizers: Sequence[torch.optim.Optimizer]
    """Each for its part of them."""
    averages: Sequence[Ema]
    """Averages of the weights; the first is what is published."""
    world: World = field(default=ALONE)
    """Who trains."""
    seen: int = 0
    """Images seen."""

    def step(self, rate: float, clip: float) -> Tensor:
        """One optimizer step at this rate with the gradients that are there, scaled to a norm of at most `clip`.
        Parameter groups with a `rate_factor` take the rate times that factor.

        Returns:
            The norm before, a tensor (no host sync).
        """
        parameters = list(trained_parameters(self.model).values())
        norm = whole(nn.utils.clip_grad_norm_(parameters, clip))
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                scaled = rate * group.get("rate_factor", 1.0)
                if isinstance(group["lr"], Tensor):  # torchao's
                    group["lr"].fill_(scaled)
                else:
                    group["lr"] = scaled
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        return norm

    def count(self, images: int) -> None:
        """Count the images of a step, and let the averages follow."""
        self.seen += images
        for average in self.averages:
            average.update(self.seen // images)

    def state(self) -> dict[str, Tensor]:
        """Every tensor that a resumed run needs, by name: weights, buffers, averages, optimizer states."""
        trained = trained_parameters(self.model)
        frozen = {name for name, _ in self.model.named_parameters(remove_duplicate=False)} - trained.keys()
        state = {f"model/{name}": value for name, value in self.model.state_dict().items() if name not in frozen}
        for number, average in enumerate(self.averages):
            state |= {f"average/{number}/{name}": value for name, value in average.weights.items()}
        names: dict[Tensor, str] = {parameter: name for name, parameter in trained.items()}
        for number, optimizer in enumerate(self.optimizers):
            for parameter, values in optimizer.state.items():
                for key, value in values.items():
                    state[f"optimizer/{number}/{names[parameter]}/{key}"] = value
        return state

    def resume(self, run: Path) -> bool:
        """Take up the newest state in `run`; False where there is none.

        Raises:
            InputError: it cannot be read, or is of another network.
        """
        path = newest(run)
        if path is None:
            return False
        found = entries(path)
        self.make_room(found)
        state = self.state()
        if state.keys() != found.keys() or any(tuple(found[n].size) != tuple(v.shape) for n, v in state.items()):
            odd = sorted(state.keys() ^ found.keys()) or ["a shape"]
            raise InputError(f"the checkpoint {path} is of another network ({odd[0]}): choose another run folder")
        read_into(path, state, self.world)
        self.seen = int(path.name)
        return True

    def make_room(self, found: Mapping[str, object]) -> None:
        """Let the optimizers make their states for the parameters that have any on disk: a step at rate 0."""
        for number, optimizer in enumerate(self.optimizers):
            kept = {name.split("/")[2] for name in found if name.startswith(f"optimizer/{number}/")}
            for name, parameter in trained_parameters(self.model).items():
                if name in kept:
                    parameter.grad = torch.zeros_like(parameter)
            rates = [group["lr"] for group in optimizer.param_groups]
            for group, rate in zip(optimizer.param_groups, rates, strict=True):
                group["lr"] = rate * 0
            optimizer.step()
            for group, rate in zip(optimizer.param_groups, rates, strict=True):
                group["lr"] = rate
            self.model.zero_grad(set_to_none=True)
