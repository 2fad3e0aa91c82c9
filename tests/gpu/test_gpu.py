"""Both networks on the accelerator of this machine: placement, offloading, number formats, training, the service."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from builders import tiny_mditface_pipeline, tiny_pipeline
from likeness.data.synthetic import draw_face
from likeness.serve.engine import measure_batch, warm_up
from likeness.train.loop import train
from runs import metrics, small, weights_of

pytestmark = pytest.mark.skipif(not torch.accelerator.is_available(), reason="no accelerator (torch.accelerator)")
DEVICE = torch.accelerator.current_accelerator() or torch.device("cpu")
FACE = draw_face(0, 0, 64)
NETWORKS: dict[str, Callable[[], Any]] = {
    "mmface": tiny_pipeline,
    "mditface": tiny_mditface_pipeline,
    "tied": lambda: tiny_mditface_pipeline(spatial_stream="lora"),
}


def images(pipeline: Any) -> np.ndarray:
    """Two images in one batch, one without a mask and both with a sketch that acts in some of the steps."""
    return pipeline(
        ["a woman with red hair", "a man"],
        control_image={"mask": [FACE.mask, None], "sketch": FACE.sketch},
        control_guidance_end={"sketch": 0.5},
        generator=[torch.Generator().manual_seed(seed) for seed in (1, 2)],
        output_type="np",
    ).images


PLACES: dict[str, Callable[[Any], Any]] = {
    "device": lambda pipeline: pipeline.to(DEVICE),
    "model offload": lambda pipeline: pipeline.enable_model_cpu_offload(device=DEVICE),
    "sequential offload": lambda pipeline: pipeline.enable_sequential_cpu_offload(device=DEVICE),
    "groups of blocks": lambda pipeline: pipeline.enable_group_offload(DEVICE, num_blocks_per_group=1),
    "groups of leaves": lambda pipeline: pipeline.enable_group_offload(DEVICE, offload_type="leaf_level"),
    "streamed leaves": lambda pipeline: pipeline.enable_group_offload(
        DEVICE, offload_type="leaf_level", use_stream=True
    ),
}


@pytest.mark.parametrize("network", NETWORKS)
@pytest.mark.parametrize("place", PLACES)
def test_images_are_those_of_the_cpu(network, place):
    if network == "tied" and place == "sequential offload":
        pytest.skip("rejected: shared weights")
    expected, pipeline = images(NETWORKS[network]()), NETWORKS[network]()
    PLACES[place](pipeline)
    for _ in range(2):
        np.testing.assert_allclose(images(pipeline), expected, atol=0.02)  # TF32


@pytest.mark.parametrize("network", NETWORKS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_number_formats(network, dtype):
    expected, pipeline = images(NETWORKS[network]()), NETWORKS[network]().to(DEVICE, dtype)
    np.testing.assert_allclose(images(pipeline), expected, atol=0.15)


@pytest.mark.parametrize("network", [{}, {"name": "mditface", "depth": 1, "single_depth": 1}])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_training(prepared_faces, tmp_path, network, precision):
    train(small(prepared_faces, network=network, precision=precision), tmp_path)
    assert all(np.isfinite(line["loss"]) for line in metrics(tmp_path) if "loss" in line)
    assert all(weight.isfinite().all() for weight in weights_of(tmp_path / "model").values())


@pytest.mark.parametrize("network", NETWORKS)
def test_service(network):
    pipeline = NETWORKS[network]().to(DEVICE)
    assert warm_up(pipeline) > 0
    assert measure_batch(pipeline) >= 1
