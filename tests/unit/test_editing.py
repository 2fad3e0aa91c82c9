"""Editing: methods at the level of latents, and `likeness edit` on photographs."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from builders import tiny_mditface_pipeline, tiny_pipeline
from likeness.data.synthetic import draw_face
from likeness.encoders.latent import to_tensor
from likeness.objectives import DDPM, RectifiedFlow
from likeness.pipelines.editing import METHODS, edit
from likeness.types import InputError

FACE, OTHER = draw_face(0, 0, 32), draw_face(0, 1, 32)


def seeded(seed: int = 3) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def with_objective(pipeline, objective):
    pipeline.register_to_config(objective=objective.config())
    pipeline.scheduler = objective.scheduler()
    return pipeline


PIPELINES = {
    "mmface": tiny_pipeline,
    "mditface": tiny_mditface_pipeline,
    "dpm++": lambda: with_objective(tiny_pipeline(), RectifiedFlow(sampler="dpm++")),
    "renoise": lambda: with_objective(tiny_pipeline(), RectifiedFlow(sampler="renoise")),
    "ddpm": lambda: with_objective(tiny_pipeline(), DDPM()),
}


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", PIPELINES)
def test_methods(name, method):
    """Latents outside the region are those of the image; without a region and with all steps it is plain generation."""
    pipeline = PIPELINES[name]()
    region = np.zeros((64, 64), np.uint8)
    region[:20, 40:] = 255  # of four tokens a side it touches those of row 0 and 1, column 2 and 3
    options = {"control_image": {"mask": OTHER.mask}, "source_control_image": {"mask": FACE.mask}, "method": method}
    arguments = {"image": FACE.image, "mask_image": region, "output_type": "latent", **options}
    if (name, method) == ("ddpm", "flow_edit"):
        with pytest.raises(InputError, match="requires a rectified flow"):
            edit(pipeline, "hair", generator=seeded(), **arguments)
        return
    steps = []
    found, again, weaker = (
        edit(pipeline, "hair", generator=seeded(), strength=strength, on_step=lambda *s: steps.append(s), **arguments)
        for strength in (1.0, 1.0, 0.5)
    )
    assert steps == [(1, 4), (2, 4), (3, 4), (4, 4)] * 2 + [(1, 2), (2, 2)]
    clean = pipeline.codec.encode(to_tensor([FACE.image]))
    inside = torch.zeros(1, 1, 4, 4, dtype=torch.bool)
    inside[..., :2, 2:] = True
    for result in (found, weaker):
        same = (result.images == clean).all(dim=1, keepdim=True)
        assert torch.equal(same, ~inside) or method == "image_to_image"
        assert not same[inside].any()
    assert torch.equal(found.images, again.images)
    assert not torch.equal(found.images, weaker.images)
    if method != "flow_edit":
        whole = edit(pipeline, "hair", generator=seeded(), **{**arguments, "mask_image": None})
        plain = pipeline("hair", control_image={"mask": OTHER.mask}, generator=seeded(), output_type="latent")
        assert torch.equal(whole.images, plain.images)


def test_flow_edit_between_equal_descriptions_changes_nothing():
    pipeline, same = tiny_pipeline(), {"mask": FACE.mask}
    options = {"image": FACE.image, "method": "flow_edit", "guidance_scale": 1.0, "output_type": "latent"}
    found = edit(pipeline, "a", source_prompt="a", control_image=same, source_control_image=same, **options)
    assert torch.allclose(found.images, pipeline.codec.encode(to_tensor([FACE.image])), atol=1e-5)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"method": "flow"}, "Unknown method 'flow'. Did you mean flow_edit"),
        ({"strength": 0}, "strength is 0; it must be greater than 0"),
        ({"strength": float("nan")}, "strength is nan"),
        ({"mask_image": np.zeros((8, 8), np.uint8)}, "mask_image is all black"),
        ({"image": FACE.image[:16]}, "the image to edit is 32x16, but the image is 32x32"),
        ({"num_inference_steps": 0}, "number of steps is 0"),
    ],
)
def test_rejected_arguments(changes, said):
    with pytest.raises(InputError, match=said):
        edit(tiny_pipeline(), **{"image": FACE.image, **changes})
