"""diffusers' caches between steps: passes that change, images next to one another, and what cannot work."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import (
    FasterCacheConfig,
    FirstBlockCacheConfig,
    MagCacheConfig,
    PyramidAttentionBroadcastConfig,
    TaylorSeerCacheConfig,
    TextKVCacheConfig,
)
from diffusers.hooks import apply_first_block_cache, apply_pyramid_attention_broadcast

from builders import randomise, tiny_mditface_pipeline, tiny_pipeline
from likeness.data.synthetic import draw_face
from likeness.types import InputError

STEPS = 6


def mmface() -> Any:
    """An MMFace whose attention matters."""
    pipeline = tiny_pipeline()
    randomise(pipeline.transformer, std=0.2)
    return pipeline


NETWORKS: dict[str, Callable[..., Any]] = {"mmface": mmface, "mditface": tiny_mditface_pipeline}
CHANGING = {"guidance_interval": (0.2, 0.7), "control_guidance_start": 0.3, "control_guidance_end": 0.9}
"""Passes that start and end within a call."""


def first_block(pipeline: Any, reuse: bool) -> Any:
    return FirstBlockCacheConfig(threshold=1e9 if reuse else 0.0)


def magnitudes(pipeline: Any, reuse: bool) -> Any:
    options = {"num_inference_steps": STEPS, "retention_ratio": 0.0, "max_skip_steps": STEPS if reuse else 0}
    return MagCacheConfig(mag_ratios=torch.ones(STEPS), threshold=1e9, **options)


def taylor(pipeline: Any, reuse: bool) -> Any:
    options = {"cache_identifiers": [r".*blocks\.\d+"], "taylor_factors_dtype": torch.float32}
    return TaylorSeerCacheConfig(disable_cache_before_step=1 if reuse else STEPS, **options)


def pyramid(pipeline: Any, reuse: bool) -> Any:
    options: dict[str, Any] = {"current_timestep_callback": lambda: pipeline.current_timestep}
    options |= {"spatial_attention_timestep_skip_range": (-1, 1001)}
    return PyramidAttentionBroadcastConfig(spatial_attention_block_skip_range=3 if reuse else 1, **options)


def faster(pipeline: Any, reuse: bool) -> Any:
    options: dict[str, Any] = {"current_timestep_callback": lambda: pipeline.current_timestep}
    options |= {"spatial_attention_timestep_skip_range": (-1, 1001), "is_guidance_distilled": True}
    return FasterCacheConfig(spatial_attention_block_skip_range=3 if reuse else 1, **options)


CONFIGURATIONS = (first_block, magnitudes, taylor, pyramid, faster)
CASES = [(network, config) for network in NETWORKS for config in CONFIGURATIONS]


def images(pipeline: Any, seeds: tuple[int, ...] = (7,), **more: Any) -> np.ndarray:
    """Images of two prompts and a mask, in turn."""
    prompts = ["a woman with red hair" if seed % 2 else "a man with a beard" for seed in seeds]
    given = {"control_image": {"mask": draw_face(0, 0, 64).mask}, "guidance_scale": 3.0, "output_type": "np"}
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    return pipeline(prompts, generator=generators, num_inference_steps=STEPS, **given | more).images


@pytest.mark.parametrize(("network", "config"), CASES)
def test_a_cache_that_computes_everything_changes_nothing(network, config):
    """Up to the rounding of passes that run separately, also for passes that start and end."""
    pipeline = NETWORKS[network]()
    expected = images(pipeline, (7, 8), **CHANGING)
    pipeline.transformer.enable_cache(config(pipeline, reuse=False))
    np.testing.assert_allclose(images(pipeline, (7, 8), **CHANGING), expected, atol=1e-4)


@pytest.mark.parametrize(("network", "config"), CASES)
@pytest.mark.parametrize("changes", [{}, CHANGING], ids=["same", "changing"])
def test_images_do_not_depend_on_others(network, config, changes):
    """States belong to one call, image and kind of pass; `disable_cache` restores the images without cache."""
    pipeline = NETWORKS[network]()
    plain = images(pipeline, (7, 8), **changes)
    pipeline.transformer.enable_cache(config(pipeline, reuse=True))
    both = images(pipeline, (7, 8), **changes)
    assert np.abs(both - plain).max() > 1e-3
    for index, seed in enumerate((7, 8)):
        assert np.array_equal(images(pipeline, (seed,), **changes)[0], both[index])
    pipeline.transformer.disable_cache()
    assert np.array_equal(images(pipeline, (7, 8), **changes), plain)


@pytest.mark.parametrize("network", NETWORKS)
def test_a_cache_with_group_offload(network, tmp_path):
    """Both have hooks on the blocks; MDiTFace's static pathway runs without those of the cache."""
    plain, pipeline = NETWORKS[network](), NETWORKS[network]()
    for each in (plain, pipeline):
        each.transformer.enable_cache(first_block(each, reuse=True))
    options = {"offload_type": "block_level", "num_blocks_per_group": 1, "offload_to_disk_path": str(tmp_path)}
    pipeline.transformer.enable_group_offload("cpu", **options)
    assert np.array_equal(images(pipeline, **CHANGING), images(plain, **CHANGING))


@pytest.mark.parametrize("network", NETWORKS)
def test_states_are_dropped_when_the_passes_change(network):
    """First-block caching that always reuses runs the last block once per kind of pass and per set of passes."""
    pipeline, calls = NETWORKS[network](), []
    transformer = pipeline.transformer
    last = transformer.blocks[-1] if network == "mmface" else transformer.single_transformer_blocks[-1]
    layer = last.image_mlp if network == "mmface" else last.proj_mlp  # of the block, within its hooks
    layer.register_forward_hook(lambda *_: calls.append(1))
    transformer.enable_cache(FirstBlockCacheConfig(threshold=1e9))
    for expected, changes in (
        (2, {}),  # prompt and negative prompt
        (1, {"guidance_scale": 1.0}),
        (1 + 2 + 1, {"guidance_interval": (0.3, 0.7)}),
        (2 + 2, {"control_guidance_end": 0.5}),
    ):
        calls.clear()
        images(pipeline, **changes)
        assert len(calls) == expected, changes


def test_ratios_belong_to_steps():
    """A kind of pass that starts late reads MagCache's ratios of its steps."""
    pipeline, steps = mmface(), []
    pipeline.transformer.enable_cache(magnitudes(pipeline, reuse=True))
    hook = pipeline.transformer.blocks[0]._diffusers_hook.hooks["mag_cache_leader_block_hook"]
    pipeline.transformer.blocks[0].register_forward_hook(
        lambda *_: steps.append(hook.state_manager.get_state().step_index)
    )
    images(pipeline, guidance_scale=1.0, control_guidance_start=0.5)
    assert steps == list(range(STEPS))


def test_what_cannot_work_is_rejected():
    ours = tiny_pipeline()
    for config, message in (
        (TextKVCacheConfig(), "TextKVCacheConfig is not supported. Supported: First"),
        (PyramidAttentionBroadcastConfig(), "PyramidAttentionBroadcastConfig needs current_timestep_callback"),
        (FasterCacheConfig(current_timestep_callback=lambda: 0), "FasterCacheConfig needs is_guidance_distilled=True"),
        (TaylorSeerCacheConfig(), "TaylorSeerCacheConfig matches no layer of MMFaceTransformer"),
    ):
        with pytest.raises(InputError, match=message):
            ours.transformer.enable_cache(config)
        assert not ours.transformer.is_cache_enabled
    ours.transformer.enable_cache(MagCacheConfig(mag_ratios=torch.ones(28)))
    with pytest.raises(InputError, match="MagCacheConfig is enabled already"):
        ours.transformer.enable_cache(FirstBlockCacheConfig())
    with pytest.raises(InputError, match="has num_inference_steps=28, but the call has 6 steps"):
        images(ours)
    ours.transformer.disable_cache()
    weaker = tiny_pipeline().transformer
    weaker.enable_cache(FirstBlockCacheConfig())
    with pytest.raises(InputError, match="guidance_model has a cache between steps"):
        images(ours, guidance_model=weaker)
    for apply, config in (
        (apply_first_block_cache, FirstBlockCacheConfig()),
        (apply_pyramid_attention_broadcast, pyramid(ours, True)),
    ):
        pipeline = tiny_pipeline()
        apply(pipeline.transformer, config)
        with pytest.raises(InputError, match=r"enable caches with pipeline.transformer.enable_cache\(config\)"):
            images(pipeline)
