"""The state of a training: a network, its optimizers and EMAs, the optimizer step, and resuming from a checkpoint."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from likeness.parallel import SINGLE_PROCESS, World, full_tensor
from likeness.train.checkpoint import checkpoint_entries, newest, read_into
from likeness.train.ema import Ema
from likeness.train.optim import trainable_parameters


@dataclass(kw_only=True)
class TrainState:
    """What a training updates and saves."""

    model: nn.Module  # the network; its parameters that require gradients are trained
    optimizers: Sequence[torch.optim.Optimizer]  # each for some of these parameters
    emas: Sequence[Ema] = ()  # EMAs of the weights; the first one is published
    world: World = SINGLE_PROCESS  # the processes that train
    images_seen: int = 0  # number of training images so far

    def step(self, rate: float, max_norm: float) -> Tensor:
        """Take an optimizer step at a learning rate, with gradients clipped to a norm of `max_norm`. In parameter
        groups with a `rate_factor` the rate is multiplied by that factor.

        Returns:
            The norm before clipping, a tensor (no host synchronization).
        """
        norm = full_tensor(nn.utils.clip_grad_norm_(trainable_parameters(self.model).values(), max_norm))
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
        """Count the images of a step and update the EMAs."""
        self.images_seen += images
        for ema in self.emas:
            ema.update(self.images_seen // images)

    def tensors(self) -> dict[str, Tensor]:
        """Return every tensor that a resumed run needs, by name: weights, buffers, EMAs, optimizer states."""
        trainable = trainable_parameters(self.model)
        frozen = {name for name, _ in self.model.named_parameters(remove_duplicate=False)} - trainable.keys()
        tensors = {f"model/{name}": value for name, value in self.model.state_dict().items() if name not in frozen}
        for number, ema in enumerate(self.emas):
            tensors |= {f"average/{number}/{name}": value for name, value in ema.weights.items()}
        names: dict[Tensor, str] = {parameter: name for name, parameter in trainable.items()}
        for number, optimizer in enumerate(self.optimizers):
            for parameter, values in optimizer.state.items():
                for key, value in values.items():
                    tensors[f"optimizer/{number}/{names[parameter]}/{key}"] = value
        return tensors

    def resume(self, run: Path) -> None:
        """Continue from the newest checkpoint in `run`, if there is one. Raises `InputError` if it cannot be read, or
        is of another network.
        """
        if path := newest(run):
            stored = checkpoint_entries(path)
            self.create_optimizer_states(stored)
            read_into(path, self.tensors(), self.world)
            self.images_seen = int(path.name)

    def create_optimizer_states(self, stored: Collection[str]) -> None:
        """Let the optimizers create states for the parameters that have one in a checkpoint: a step at rate 0."""
        for number, optimizer in enumerate(self.optimizers):
            names = {name.split("/")[2] for name in stored if name.startswith(f"optimizer/{number}/")}
            for name, parameter in trainable_parameters(self.model).items():
                if name in names:
                    parameter.grad = torch.zeros_like(parameter)
            rates = [group["lr"] for group in optimizer.param_groups]
            for group in optimizer.param_groups:
                group["lr"] = group["lr"] * 0
            optimizer.step()
            for group, rate in zip(optimizer.param_groups, rates, strict=True):
                group["lr"] = rate
            self.model.zero_grad(set_to_none=True)
