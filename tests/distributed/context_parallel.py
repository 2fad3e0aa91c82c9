"""One of two processes that compute an image together: the same as alone, up to rounding, with half of the tokens each.

diffusers assigns the processes to accelerators; here they pretend that there are some.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
from diffusers import ContextParallelConfig, FirstBlockCacheConfig
from torch import distributed

sys.path.insert(0, str(Path(__file__).parents[1]))

from builders import randomise, tiny_mditface_pipeline, tiny_pipeline
from likeness.data.synthetic import draw_face
from likeness.types import InputError


def image(pipeline: Any, kinds: tuple[str, ...], **more: Any) -> np.ndarray:
    """Generate an image from a prompt and conditions."""
    face = draw_face(0, 0, 64)
    control = {kind: getattr(face, kind) for kind in kinds}
    given = {"control_image": control or None, "guidance_scale": 3.0, "num_inference_steps": 3, "output_type": "np"}
    return pipeline("a woman", generator=torch.Generator().manual_seed(1), **given | more).images


def error_of(pipeline: Any, kinds: tuple[str, ...], **more: Any) -> str:
    """Return the message of the error of a request."""
    try:
        image(pipeline, kinds, **more)
    except InputError as error:
        return str(error)
    return ""


def check(pipeline: Any, requests: list[tuple[str, ...]]) -> None:
    transformer, tokens = randomise(pipeline.transformer, std=0.2), set()
    layer = transformer.blocks[0].image_mlp if hasattr(transformer, "blocks") else transformer.transformer_blocks[0].ff
    layer.register_forward_pre_hook(lambda _, inputs: tokens.add(inputs[0].shape[1]))
    expected = [image(pipeline, kinds) for kinds in requests]
    (alone,) = tokens
    tokens.clear()
    transformer.enable_parallelism(config=ContextParallelConfig(ulysses_degree=2, ulysses_anything=True))
    for kinds, wanted in zip(requests, expected, strict=True):
        np.testing.assert_allclose(image(pipeline, kinds), wanted, atol=1e-5)
    assert tokens == {alone // 2}
    if transformer.config.get("attention", "concat") != "concat":  # strengths change the attention
        assert "leave conditioning_scale out" in error_of(pipeline, ("mask",), conditioning_scale=0.5)
    transformer.enable_cache(FirstBlockCacheConfig())
    assert "cannot be combined with context parallelism" in error_of(pipeline, ())


torch.set_num_threads(1)
distributed.init_process_group("gloo")
with patch.object(torch.accelerator, "device_count", lambda: 2):
    check(tiny_pipeline(), [(), ("mask",)])
    for mode in ("decoupled", "hard", "holistic", "concat"):
        check(tiny_mditface_pipeline(attention=mode), [(), ("mask",), ("mask", "sketch")])
distributed.destroy_process_group()
