"""The order in which training reads faces: endless, shuffled again in each epoch, a function of (seed, position) only.

Position p is the p-th sample of the whole run, over all processes. Nothing depends on rank, batch size or restart.
"""

from __future__ import annotations

import numpy as np


class Sampler:
    """Position -> index of a face; every face once per epoch."""

    def __init__(self, count: int, seed: int) -> None:
        self.count, self.seed = count, seed
        self._epoch, self._order = -1, np.empty(0, dtype=np.int64)

    def __getitem__(self, position: int) -> int:
        epoch, offset = divmod(position, self.count)
        if epoch != self._epoch:  # the order of one epoch is cached, since positions mostly increase
            self._order = np.random.default_rng([self.seed, epoch]).permutation(self.count)
            self._epoch = epoch
        return int(self._order[offset])


def stream(seed: int, position: int) -> np.random.Generator:
    """Return the random numbers of one sample, in this order: caption, dropout, condition, time, noise, if the
    autoencoder returns a distribution the latent, and if the condition is a photo its region.
    """
    # The 1 separates them from the orders of the sampler; only epochs 1 and 2 share numbers, with position 0.
    return np.random.default_rng([seed, 1, position])


def step_stream(seed: int, position: int) -> np.random.Generator:
    """Return the random numbers of the training step that starts at this position, for a whole batch."""
    return np.random.default_rng([seed, 2, position])
