"""Device placement on an accelerator that the CPU plays (`accelerator.py`): a tensor left on the CPU raises."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from accelerator import accelerator
from builders import tiny_mditface, tiny_mditface_pipeline, tiny_pipeline, tiny_transformer, two_text_encoders
from likeness.data.synthetic import draw_face
from likeness.objectives import RectifiedFlow
from likeness.parallel import World
from likeness.pipelines.generate import resolve
from likeness.serve.engine import Engine, Event, Task
from likeness.train.batches import Batch
from likeness.train.config import OptimizerRecipe
from likeness.train.ema import Ema
from likeness.train.losses import denoising_losses
from likeness.train.optim import make_optimizers
from likeness.train.train_state import TrainState
from likeness.types import ConditionInput, PortraitRequest, TextFeatures

FIRST = ["mmface", "mditface"]
FACE = draw_face(0, 0, 64)
NETWORKS: dict[str, Callable[[], Any]] = {
    "mmface": tiny_pipeline,
    "mditface": tiny_mditface_pipeline,
    "tied": lambda: tiny_mditface_pipeline(spatial_stream="lora"),
    "holistic": lambda: tiny_mditface_pipeline(attention="holistic"),
    "flux": lambda: two_text_encoders(text_reads_spatial=False),
}


def images(pipeline: Any) -> np.ndarray:
    """Two images in one batch, one without a mask and both with a sketch that acts in some of the steps."""
    return pipeline(
        ["a woman with red hair", "a man"],
        control_image={"mask": [FACE.mask, None], "sketch": FACE.sketch},
        conditioning_scale={"mask": 0.5},
        control_guidance_end={"sketch": 0.5},
        generator=[torch.Generator().manual_seed(seed) for seed in (1, 2)],
        output_type="np",
    ).images


def place(pipeline: Any, device: torch.device) -> None:
    pipeline.to(device)


def offload(pipeline: Any, device: torch.device) -> None:
    pipeline.enable_model_cpu_offload(device=device)


@pytest.mark.parametrize("network", NETWORKS)
@pytest.mark.parametrize("put", [place, offload])
def test_pipelines(network, put):
    expected, pipeline = images(NETWORKS[network]()), NETWORKS[network]()
    with accelerator() as device:
        put(pipeline, device)
        found = images(pipeline)
        assert pipeline._execution_device.type == device.type
        assert pipeline.transformer.device.type == (device.type if put is place else "cpu")
    np.testing.assert_allclose(found, expected, atol=1e-5)


def test_devices_must_match():
    """The check of these tests: operations on two devices raise, copies do not."""
    with accelerator() as device:
        there = torch.ones(2, device=device)
        assert (there.cpu() + torch.ones(2)).tolist() == [2, 2]
        with pytest.raises(RuntimeError, match="on the CPU"):
            there + torch.ones(2)


@pytest.mark.parametrize("make", [tiny_pipeline, tiny_mditface_pipeline], ids=FIRST)
def test_engine_of_the_service(make):
    """Two images advance as one batch, each with the image of its own call."""
    pipeline = make()
    requests = [
        PortraitRequest(prompt="a woman", seed=1, conditions={"mask": ConditionInput(image=FACE.mask)}),
        PortraitRequest(prompt="a man", seed=2, conditions={"mask": ConditionInput(image=FACE.mask)}),
    ]
    generators = [torch.Generator().manual_seed(request.seed) for request in requests]
    given = {"control_image": {"mask": FACE.mask}, "generator": generators}
    expected = pipeline([request.prompt for request in requests], **given).images
    events: list[list[Event]] = [[], []]
    with accelerator() as device:
        pipeline.to(device)
        engine = Engine(pipeline, batch=2)
        resolved = [resolve(request, pipeline) for request in requests]
        engine.submit([Task(request=r, report=e.append, previews=1) for r, e in zip(resolved, events, strict=True)])
        engine.open = False
        engine.thread.run()  # in this thread, where the accelerator is active
    for own, image in zip(events, expected, strict=True):
        assert [event.kind for event in own] == ["started", "preview", "image"], own
        difference = np.asarray(own[-1].image).astype(int) - np.asarray(image)
        assert abs(difference).max() <= 1


@pytest.mark.parametrize("make", [tiny_transformer, lambda: tiny_mditface(spatial_stream="full")], ids=FIRST)
def test_training_steps(make):
    """Loss, gradient norm and weights are those of the CPU."""

    def train(device: torch.device | str) -> list[float]:
        g = torch.Generator().manual_seed(1)
        normal = lambda *shape: torch.randn(*shape, generator=g)  # noqa: E731
        model = make().to(device).train()
        model.enable_gradient_checkpointing()
        optimizers = make_optimizers(model, OptimizerRecipe(images=8, batch=2, learning_rate=1e-3))
        for group in (group for optimizer in optimizers for group in optimizer.param_groups):
            group["fused"] = False  # torch's fused kernels are for known devices
        state = TrainState(model=model, optimizers=optimizers, emas=[Ema(model, 0.1)], world=World(device=str(device)))
        numbers = []
        for _ in range(3):
            batch = Batch(
                clean=normal(2, 4, 4, 4),
                noise=normal(2, 4, 4, 4),
                uniform=torch.rand(2, generator=g),
                condition_latents=normal(2, 1, 4, 4, 4),
                condition_index=torch.tensor([[0], [-1]]),
                captions=["", ""],
                text=TextFeatures(normal(2, 12, 32), normal(2, 32)),
            ).to(str(device))
            loss = denoising_losses(model, RectifiedFlow(), batch).mean()
            loss.backward()
            norm = state.step(1e-3, 1.0)
            state.count(2)
            numbers += [loss.item(), norm.item()]
        return numbers + [weight.double().sum().item() for weight in state.emas[0].weights.values()]

    expected = train("cpu")
    with accelerator() as device:
        found = train(device)
    assert found == pytest.approx(expected, rel=1e-4, abs=1e-4)
