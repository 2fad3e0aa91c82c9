"""The order in which faces are seen: endless, shuffled anew each epoch, and a function of (seed, position) only.

Position p is the p-th sample of the whole run, over all processes. Nothing depends on rank, batch size or restart.
"""

from __future__ import annotations

import numpy as np


class Sampler:
    """Position -> face index, every face once an epoch."""

    def __init__(self, count: int, seed: int) -> None:
        self.count, self.seed = count, seed
        self._epoch, self._order = -1, np.empty(0, dtype=np.int64)

    def __getitem__(self, position: int) -> int:
        epoch, offset = divmod(position, self.count)
        if epoch != self._epoch:  # one epoch's order is kept: positions mostly grow
            self._order = np.random.default_rng([self.seed, epoch]).permutation(self.count)
            self._epoch = epoch
        return int(self._order[offset])


def stream(seed: int, position: int) -> np.random.Generator:
    """The random numbers of one sample: its caption, dropout, condition, time, noise and, where the autoencoder gives a
    distribution, its latent, drawn in this order.
    """
    # The 1 keeps them apart from the sampler's orders: only position 0 shares its numbers with epoch 1's, without harm.
    return np.random.default_rng([seed, 1, position])


def step_stream(seed: int, position: int) -> np.random.Generator:
    """Return the random numbers of the training step that begins at this position, for draws that belong to a whole
    batch instead of one sample.
    """
    return np.random.default_rng([seed, 2, position])
