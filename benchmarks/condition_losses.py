"""The loss of held-out faces with their own condition, another face's and none, for the other benchmarks."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from likeness.data.store import Store
from likeness.objectives import make_objective
from likeness.train.batches import latent_statistics
from likeness.train.diagnostics import face_losses, faces_with, fixed_faces
from likeness.types import InputError, TextFeatures
from likeness.weights.hashes import encoder_hash


def condition_losses(pipeline: Any, store: Store, condition: str, *, count: int) -> dict[str, float]:
    """Return the means of `condition_losses_by_face`."""
    by_face = condition_losses_by_face(pipeline, store, condition, count=count)
    return {name: float(values.mean()) for name, values in by_face.items()}


def condition_losses_by_face(pipeline: Any, store: Store, condition: str, *, count: int) -> dict[str, np.ndarray]:
    """Return the training loss of each face at fixed noise and evenly spread times, [N].

    Args:
        pipeline: the model.
        store: shards of held-out faces, made with the model's autoencoder.
        condition: name of the condition.
        count: maximum number of faces, the first ones of the store that have the condition.

    Returns:
        `right`: with the face's own condition; `shuffled`: with the next face's; `none`: without. Noise, times and
        captions (each face's first) are the same in all three.

    Raises:
        InputError: the shards are of another autoencoder.
    """
    if store.manifest["codec"] != encoder_hash(pipeline.vae):
        raise InputError(f"{store.folder} was encoded with another encoder than the model's: encode it again")
    samples = faces_with(condition, (store[index] for index in range(len(store))), count)
    texts = [pipeline.text_features(list(sample.captions[:1]) or [""]) for sample in samples]
    text = TextFeatures(torch.cat([one.tokens for one in texts]), torch.cat([one.pooled for one in texts]))
    condition_id = list(pipeline.transformer.config.condition_names).index(condition)
    faces = fixed_faces(samples, condition, text, condition_id, *latent_statistics(pipeline.config))
    objective = make_objective(pipeline.config.objective)
    losses = face_losses(pipeline.transformer, objective, faces, str(pipeline.device))
    return {name: values.numpy() for name, values in losses.items()}
