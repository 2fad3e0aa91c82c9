"""Both pipelines with tiny components: subsets, seeds, batches, scales, callbacks, output types, invalid arguments."""

from __future__ import annotations

import copy
import itertools
import math
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    FlowMatchHeunDiscreteScheduler,
    UniPCMultistepScheduler,
)
from PIL import Image

from builders import randomise, tiny_mditface_pipeline, tiny_pipeline, tiny_transformer
from likeness.data.synthetic import draw_face
from likeness.encoders.text import truncated_text
from likeness.objectives import DDPM, RectifiedFlow
from likeness.pipelines.inputs import encode_prompts
from likeness.pipelines.load import load
from likeness.pipelines.mmface import MMFacePipeline
from likeness.pipelines.portrait import PortraitPipeline
from likeness.types import ConditionInput, InputError

PROMPT = "a woman with red hair"


@pytest.fixture(scope="module", params=[tiny_pipeline, tiny_mditface_pipeline], ids=["mmface", "mditface"])
def pipeline(request) -> PortraitPipeline:
    return request.param()


@pytest.fixture(scope="module")
def faces() -> list[dict[str, np.ndarray]]:
    found = [draw_face(0, index, 64) for index in range(2)]
    return [{"mask": face.mask, "sketch": face.sketch, "keypoints": face.keypoints} for face in found]


def seeds(*numbers: int) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(number) for number in numbers]


def make(pipeline, prompt=PROMPT, negative="", control=None, numbers=(7,), **more) -> np.ndarray:
    return pipeline(prompt, negative, control, generator=seeds(*numbers), output_type="np", **more).images


def test_every_subset_is_its_own_image(pipeline, faces):
    names = ("text", "mask", "sketch", "keypoints")
    images = {}
    for size in range(len(names) + 1):
        for subset in itertools.combinations(names, size):
            control = {name: faces[0][name] for name in subset if name != "text"}
            images[subset] = make(pipeline, PROMPT if "text" in subset else "", control=control)
    for one, other in itertools.combinations(images, 2):
        assert not np.array_equal(images[one], images[other]), (one, other)


def test_order_of_conditions_does_not_matter(pipeline, faces):
    one = make(pipeline, control={"mask": faces[0]["mask"], "sketch": faces[0]["sketch"]})
    other = make(pipeline, control={"sketch": faces[0]["sketch"], "mask": faces[0]["mask"]})
    np.testing.assert_allclose(one, other, atol=1e-5)


@pytest.mark.parametrize("threads", [1, 2])
def test_picture_depends_on_its_own_request_only(pipeline, faces, threads):
    """Bit for bit: alone, in batches of several sizes, in another order, with neighbors of every kind."""
    torch.set_num_threads(threads)
    requests = [
        (PROMPT, {}, 11),
        ("", {"mask": faces[0]["mask"]}, 12),
        (PROMPT, {"mask": faces[1]["mask"], "sketch": faces[1]["sketch"]}, 13),
        ("a man with a beard", {"sketch": faces[0]["sketch"]}, 14),
        ("", {}, 15),
    ]
    alone = [make(pipeline, prompt, control=control, numbers=(seed,))[0] for prompt, control, seed in requests]
    for order in ([0, 1, 2, 3, 4], [4, 2, 0], [3, 1], [1, 1, 2, 0, 3, 4, 2, 2]):
        batch = [requests[k] for k in order]
        control = {n: [c.get(n) for _, c, _ in batch] for n in ("mask", "sketch") if any(n in c for _, c, _ in batch)}
        together = make(pipeline, [p for p, _, _ in batch], control=control, numbers=[s for _, _, s in batch])
        for k, image in zip(order, together, strict=True):
            assert np.array_equal(image, alone[k]), (order, k)


def test_one_generator_draws_in_turn(pipeline):
    generator = torch.Generator().manual_seed(3)
    two = pipeline(PROMPT, generator=generator, num_images_per_prompt=2, output_type="np").images
    one = pipeline(PROMPT, generator=torch.Generator().manual_seed(3), output_type="np").images
    assert np.array_equal(two[0], one[0])
    assert not np.array_equal(two[1], one[0])


def test_scale_zero_is_bitwise_absent(pipeline, faces):
    absent = make(pipeline)
    assert np.array_equal(make(pipeline, control={"mask": faces[0]["mask"]}, conditioning_scale=0.0), absent)
    assert np.array_equal(make(pipeline, control={"mask": faces[0]["mask"]}, control_guidance_end=0.0), absent)
    both = {"mask": faces[0]["mask"], "sketch": faces[0]["sketch"]}
    assert np.array_equal(
        make(pipeline, control=both, conditioning_scale={"sketch": 0.0}),
        make(pipeline, control={"mask": faces[0]["mask"]}),
    )


def test_scales_and_intervals_matter(pipeline, faces):
    control = {"mask": faces[0]["mask"]}
    full = make(pipeline, control=control)
    for change in (
        {"conditioning_scale": 0.5},
        {"control_guidance_start": 0.5},
        {"control_guidance_end": 0.5},
        {"guidance_scale": 1.0},
        {"guidance_interval": (0.4, 0.6)},
        {"negative": "a man"},
    ):
        assert not np.array_equal(make(pipeline, control=control, **change), full), change


def test_guidance_that_changes_nothing_costs_nothing(pipeline):
    """Without text, the prompt is the negative prompt: any guidance gives the very same bits."""
    assert np.array_equal(make(pipeline, "", guidance_scale=9.0), make(pipeline, "", guidance_scale=1.0))


def test_guidance_formula(pipeline):
    """One step of Euler from the same noise is linear in the guidance scale."""
    step = {
        g: pipeline(PROMPT, guidance_scale=g, num_inference_steps=1, generator=seeds(1), output_type="latent").images
        for g in (0.0, 1.0, 3.0)
    }
    torch.testing.assert_close(step[3.0], step[0.0] + 3 * (step[1.0] - step[0.0]), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("scale", [0.0, 1.0, 1.7])
def test_autoguidance_formula(pipeline, faces, scale):
    """One step of Euler from the same noise: v = v_0 + w (v_1 - v_0), with text guidance and a condition."""
    weaker = randomise(copy.deepcopy(pipeline.transformer), std=0.1)
    other = type(pipeline)(**pipeline.components | {"transformer": weaker}, **settings_of(pipeline))
    call = {"control_image": {"mask": faces[0]["mask"]}, "num_inference_steps": 1, "output_type": "latent"}
    latents = lambda used, **more: used(PROMPT, generator=seeds(1), **call, **more).images  # noqa: E731
    v_0, v_1 = latents(other), latents(pipeline)
    found = latents(pipeline, guidance_model=weaker, autoguidance_scale=scale)
    torch.testing.assert_close(found, v_0 + scale * (v_1 - v_0), atol=1e-4, rtol=1e-4)
    assert not torch.allclose(v_0, v_1, atol=1e-2)
    runs = []
    weaker.register_forward_hook(lambda *_: runs.append(1))
    latents(pipeline, guidance_model=weaker, autoguidance_scale=1.0)
    assert not runs
    outside = latents(pipeline, guidance_model=weaker, autoguidance_interval=(0.0, 0.5))
    assert torch.equal(outside, v_1)


def settings_of(pipeline) -> dict:
    parts = {*pipeline.components}
    return {k: v for k, v in pipeline.config.items() if k not in parts and not k.startswith("_")}


def test_sizes(pipeline, faces):
    assert make(pipeline, height=48, width=80, force_size=True).shape == (1, 48, 80, 3)
    with pytest.raises(InputError, match="64x64"):
        make(pipeline, control={"mask": faces[0]["mask"]}, height=48, width=80, force_size=True)


def test_output_types(pipeline):
    call = lambda kind: pipeline(PROMPT, generator=seeds(1), output_type=kind).images  # noqa: E731
    array, tensor, image, latent = call("np"), call("pt"), call("pil")[0], call("latent")
    assert array.dtype == np.float32
    assert tensor.shape == (1, 3, 32, 32)
    assert latent.shape == (1, 4, 4, 4)
    np.testing.assert_allclose(tensor.permute(0, 2, 3, 1).numpy(), array)
    np.testing.assert_allclose(np.asarray(image) / 255, array[0], atol=0.5 / 255 + 1e-6)
    assert isinstance(pipeline(PROMPT, return_dict=False, output_type="np"), tuple)


def test_callbacks_see_change_and_stop(pipeline):
    seen = []

    def watch(pipe, i, timestep, tensors):
        seen.append((i, float(timestep), tensors["latents"].shape))
        return tensors

    make(pipeline, callback_on_step_end=watch)
    assert [i for i, *_ in seen] == [0, 1, 2, 3]
    assert seen[0][1] == 1000
    assert all(shape == (1, 4, 4, 4) for *_, shape in seen)

    def zero(pipe, i, timestep, tensors):
        return {"latents": torch.zeros_like(tensors["latents"])} if i == 3 else {}

    latents = pipeline(PROMPT, output_type="latent", callback_on_step_end=zero).images
    assert latents.abs().max() == 0

    def stop(pipe, i, timestep, tensors):
        pipe._interrupt = True
        seen.append(i)
        return {}

    seen.clear()
    make(pipeline, callback_on_step_end=stop)
    assert seen == [0]


def test_encoded_texts_and_conditions_are_reused(pipeline, faces):
    """Images of several calls with one cache are bit-identical; texts and conditions are encoded once."""
    encoded: dict = {}
    for control in ({"mask": faces[0]["mask"]}, {"mask": faces[1]["mask"]}, {}):
        for number in (1, 2):
            cached = make(pipeline, control=control, numbers=(number,), encoded=encoded)
            assert np.array_equal(cached, make(pipeline, control=control, numbers=(number,)))
    assert len(encoded) == 4  # prompt, negative prompt, two masks


def test_latents(pipeline):
    noise = torch.randn((1, 4, 4, 4), generator=torch.Generator().manual_seed(7))
    assert np.array_equal(pipeline(PROMPT, latents=noise, output_type="np").images, make(pipeline))


def test_other_schedulers_and_objectives():
    pipeline = tiny_pipeline()
    euler = make(pipeline)
    pipeline.scheduler = FlowMatchHeunDiscreteScheduler()
    assert not np.array_equal(make(pipeline), euler)
    solver = tiny_pipeline()
    solver.register_to_config(objective=RectifiedFlow(sampler="dpm++").config())
    solver.scheduler = FlowMatchEulerDiscreteScheduler()  # as in a pipeline whose own scheduler it is
    assert np.array_equal(make(solver), euler)
    for prediction in ("epsilon", "v_prediction"):
        objective = DDPM(prediction=prediction)
        pipeline.scheduler = objective.scheduler()
        pipeline.register_to_config(objective=objective.config())
        assert np.isfinite(make(pipeline)).all()


FLOW, NOISE = RectifiedFlow(), DDPM()
SOLVER = RectifiedFlow(sampler="dpm++").scheduler().config


@pytest.mark.parametrize(
    ("objective", "scheduler", "message"),
    [
        (FLOW, DPMSolverMultistepScheduler(use_flow_sigmas=True), "prediction_type='flow_prediction'"),
        (FLOW, EulerDiscreteScheduler(), "does not fit this model, a rectified flow: use FlowMatchEuler"),
        (FLOW, DDIMScheduler(), "does not fit this model, a rectified flow"),
        (FLOW, DPMSolverMultistepScheduler.from_config(SOLVER, use_karras_sigmas=True), "has use_karras_sigmas=True"),
        (FLOW, UniPCMultistepScheduler.from_config(SOLVER), ""),
        (NOISE, FLOW.scheduler(), "does not fit this model, a DDPM"),
        (NOISE, RectifiedFlow(sampler="dpm++").scheduler(), "does not fit this model, a DDPM"),
        (NOISE, DDPM(prediction="v_prediction").scheduler(), "prediction_type='epsilon'"),
        (NOISE, DDIMScheduler(), "has other betas than this model"),
        (NOISE, EulerDiscreteScheduler.from_config(NOISE.scheduler().config), ""),
    ],
)
def test_schedulers_of_other_objectives_are_rejected(objective, scheduler, message):
    pipeline = tiny_pipeline()
    pipeline.register_to_config(objective=objective.config())
    pipeline.scheduler = scheduler
    with pytest.raises(InputError, match=message) if message else nullcontext():
        make(pipeline)


@pytest.mark.parametrize("shift", [1.0, 2.0])
def test_dpm_solver_formula(shift):
    """DPM-Solver++(2M), algorithm 2 of its paper, with alpha = 1 - t, sigma = t and lambda = log(alpha / sigma)."""
    pipeline, objective = tiny_pipeline(), RectifiedFlow(sampler="dpm++", shift=shift)
    pipeline.scheduler = objective.scheduler()
    pipeline.register_to_config(objective=objective.config())
    noise = torch.randn(1, 4, 4, 4, generator=torch.Generator().manual_seed(0))
    call = {"guidance_scale": 1.0, "output_type": "latent"}
    found = pipeline(PROMPT, latents=noise, num_inference_steps=5, **call).images

    def velocity(x: torch.Tensor, t: float) -> torch.Tensor:
        """One step of Euler from t = 1 to 0 with the network at time t."""
        fixed = copy.copy(pipeline.transformer)
        fixed.forward = lambda latents, time, **rest: pipeline.transformer.forward(
            latents, torch.full_like(time, 1000 * t), **rest
        )
        euler = MMFacePipeline(**{**pipeline.components, "transformer": fixed}, **settings_of(tiny_pipeline()))
        euler.scheduler = RectifiedFlow().scheduler()
        return x - euler(PROMPT, latents=x, num_inference_steps=1, **call).images

    times = [0.999 * (1 - i / 5) for i in range(5)] + [0.0]
    times = [shift * t / (1 + (shift - 1) * t) for t in times]
    x, previous, earlier = noise, None, 0.0
    level = lambda t: math.log((1 - t) / t)  # noqa: E731
    for t, after in itertools.pairwise(times):
        clean = x - t * velocity(x, t)
        if after == 0:
            x = clean
            break
        direction = clean
        if previous is not None:
            ratio = (level(t) - level(earlier)) / (level(after) - level(t))
            direction = (1 + 1 / (2 * ratio)) * clean - previous / (2 * ratio)
        x = after / t * x + ((1 - after) - after / t * (1 - t)) * direction
        previous, earlier = clean, t
    torch.testing.assert_close(found, x, atol=2e-4, rtol=2e-4)


@pytest.mark.parametrize("objective", [DDPM(), RectifiedFlow(sampler="sde-dpm++"), RectifiedFlow(sampler="renoise")])
def test_samplers_with_noise_draw_it_from_the_generator(objective):
    """Each image from its own: again the same, and alone as in a batch."""
    pipeline = tiny_pipeline()
    pipeline.register_to_config(objective=objective.config())
    pipeline.scheduler = objective.scheduler()
    if isinstance(objective, DDPM):
        pipeline.scheduler = DDPMScheduler.from_config(pipeline.scheduler.config)
    both = make(pipeline, [PROMPT, "a man"], numbers=(1, 2))
    assert np.array_equal(make(pipeline, [PROMPT, "a man"], numbers=(1, 2)), both)
    assert np.array_equal(make(pipeline, "a man", numbers=(2,))[0], both[1])


def test_texts_that_nothing_reads_are_not_encoded(pipeline):
    """Without guidance a negative prompt changes no bit, and what is cut from it is not reported."""
    plain = pipeline(PROMPT, guidance_scale=1.0, generator=seeds(7), output_type="np")
    if not pipeline.transformer.config.get("guidance_embeds"):
        negative = pipeline(PROMPT, "long " * 40, guidance_scale=1.0, generator=seeds(7), output_type="np")
        assert np.array_equal(negative.images, plain.images)
        assert negative.notes == ["the negative prompt has no effect with guidance_scale 1: choose a larger one"]
        assert "the negative prompt is longer" in pipeline(PROMPT, "long " * 40).notes[0]


def test_what_diffusers_users_bring(pipeline, faces):
    """NumPy's numbers, tensors as conditions, None for no negative prompt; callbacks find how many steps there are."""
    steps = []
    given = {"height": np.int64(32), "width": np.int64(32), "num_inference_steps": np.int64(4), "negative_prompt": None}
    watch = lambda pipe, *_: steps.append((pipe.num_timesteps, pipe.interrupt)) or {}  # noqa: E731
    mask = {"mask": torch.from_numpy(faces[0]["mask"].copy())}
    made = pipeline(
        PROMPT, control_image=mask, generator=seeds(7), output_type="np", callback_on_step_end=watch, **given
    )
    assert np.array_equal(made.images, make(pipeline, control={"mask": faces[0]["mask"]}))
    assert steps == 4 * [(4, False)]
    images = [
        pipeline(["a", none], [none, "x"], generator=seeds(1, 2), output_type="latent").images for none in (None, "")
    ]
    assert torch.equal(*images)


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"condition_resize": "nearest"}, "nearest"),
        ({"defaults": {"stepz": 2}}, "stepz"),
        ({"defaults": {"steps": "four"}}, "steps is 'four'"),
        ({"defaults": 3}, "defaults is 3"),
        ({"objective": 3}, "objective is 3"),
        ({"latent_mean": "a"}, "latent_mean is 'a'"),
        ({"latent_mean": [0.0] * 3}, "latent_mean is .*; it must be a finite number or a list of 4"),
        ({"latent_std": float("nan")}, "latent_std is nan"),
        ({"latent_std": [1.0, 1.0, 0.0, 1.0]}, "latent_std is .*; all values must be greater than 0"),
        ({"text_layer": 99}, "text_layer is 99; it must be a whole number from -3 to 2"),
        ({"max_text_tokens": -5}, "max_text_tokens is -5"),
    ],
)
@pytest.mark.parametrize("made", [tiny_pipeline, tiny_mditface_pipeline])
def test_invalid_settings_are_rejected(made, setting, message):
    whole = made()
    with pytest.raises(InputError, match=message):
        type(whole)(**whole.components, **setting)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_save_and_load(tmp_path, faces, dtype):
    pipeline = tiny_pipeline()
    pipeline.save_pretrained(tmp_path)
    again = load(tmp_path, dtype=dtype)
    assert again.transformer.dtype == again.vae.dtype == again.text_encoder.dtype == dtype
    control = {"mask": faces[0]["mask"]}
    image, wanted = make(again, control=control), make(pipeline, control=control)
    if dtype is torch.float32:
        assert np.array_equal(image, wanted)
    np.testing.assert_allclose(image, wanted, atol=0.1)
    assert MMFacePipeline.from_pretrained(tmp_path).config.objective == pipeline.config.objective


def test_checkpoint_without_the_none_row(faces):
    """As released: an absent condition is the zero latent with the mask's row; keypoints have no row."""
    pipeline = tiny_pipeline(("mask", "sketch"))
    assert not np.array_equal(make(pipeline), make(pipeline, control={"mask": faces[0]["mask"]}))
    with pytest.raises(InputError, match=r"not trained with keypoints: it takes mask, sketch"):
        make(pipeline, control={"keypoints": faces[0]["keypoints"]})


def test_lanczos_setting_blends_and_crops(faces):
    """The released weights saw masks resized as images; any aspect ratio is cropped."""
    pipeline = tiny_pipeline()
    exact = make(pipeline, control={"mask": faces[0]["mask"]})
    pipeline.register_to_config(condition_resize="lanczos")
    assert not np.array_equal(make(pipeline, control={"mask": faces[0]["mask"]}), exact)
    assert make(pipeline, control={"mask": faces[0]["mask"][:48]}).shape == (1, 32, 32, 3)


def test_notes_tell_what_was_read_and_cut(pipeline, faces):
    output = pipeline("a woman with red hair and " + "a blue hat " * 9, control_image={"mask": faces[0]["mask"]})
    assert any(note.startswith("mask: ") for note in output.notes)
    cut = next(note for note in output.notes if "truncated" in note)
    assert "blue hat" in cut
    assert "red hair" not in cut


def test_arguments_without_effect_are_noted(pipeline, faces):
    for options in ({"conditioning_scale": 0.5}, {"control_guidance_end": 0.5}):
        assert "no effect without a condition" in pipeline(PROMPT, **options).notes[0]
        assert "no effect" not in " ".join(pipeline(PROMPT, control_image=faces[0]["mask"], **options).notes)
        own = {"mask": ConditionInput(image=faces[0]["mask"])}
        assert "or on a ConditionInput" in " ".join(pipeline(PROMPT, control_image=own, **options).notes)
    for options, missing in (
        ({"autoguidance_scale": 3.0}, "guidance_model"),
        ({"autoguidance_interval": (0.0, 0.5)}, "guidance_model"),
        ({"attention_kwargs": {"scale": 0.2}}, "a LoRA"),
    ):
        assert pipeline(PROMPT, **options).notes[0].endswith(f"no effect without {missing}")


def test_the_kind_of_a_single_condition_is_recognized(pipeline, faces, tmp_path):
    Image.fromarray(faces[0]["mask"]).save(tmp_path / "any.png")
    for name, source in {"mask": str(tmp_path / "any.png"), "sketch": Image.fromarray(faces[0]["sketch"])}.items():
        assert np.array_equal(make(pipeline, control=source), make(pipeline, control={name: faces[0][name]}))
    assert np.array_equal(
        make(pipeline, control=torch.from_numpy(faces[0]["keypoints"])),
        make(pipeline, control={"keypoints": faces[0]["keypoints"]}),
    )


def test_syntax_of_other_tools_is_noted(pipeline):
    for prompt in ("a (smiling:1.4) woman", "a woman <lora:style:0.8>", "a woman BREAK a hat"):
        notes = pipeline(prompt, num_inference_steps=1, output_type="latent").notes
        assert sum("read as plain text" in note for note in notes) == 1
    for prompt in ("a woman (smiling)", "a break: 3"):
        assert not pipeline(prompt, num_inference_steps=1, output_type="latent").notes


def test_prompts_must_be_unicode(pipeline):
    """Bytes of another encoding become lone surrogates on the command line."""
    with pytest.raises(InputError, match="is not valid UTF-8"):
        pipeline("caf\udce9 girl")
    with pytest.raises(InputError, match="is not valid UTF-8"):
        pipeline.encode_prompt("a girl", "caf\udce9")
    with pytest.raises(InputError, match="A prompt is 5; it must be a string"):
        pipeline.encode_prompt(5)


def test_truncated_text_begin_with_a_word(pipeline):
    prompt = "extraordinarily unusual words"
    for limit in range(3, 12):
        cut = truncated_text(pipeline.tokenizer, prompt, limit)
        assert cut in ("extraordinarily unusual words", "unusual words", "words")
    assert truncated_text(pipeline.tokenizer, prompt, 100) == ""
    assert truncated_text(pipeline.tokenizer, "unusual\nwords\tof many lines", 9) in (
        "words\tof many lines",
        "of many lines",
    )
    assert len(truncated_text(pipeline.tokenizer, "x" * 100, 50)) == 100 - 48


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_inference_steps": 0}, "number of steps is 0"),
        ({"num_inference_steps": -3}, "number of steps is -3"),
        ({"height": 48}, "Size 32x48 is not supported: the model was trained at 32x32, none with its aspect ratio"),
        ({"height": 64, "width": 64}, r"Use a trained size, upscale \(--upscale\) .*, or force_size"),
        ({"height": 40, "force_size": True}, "multiples of 16"),
        ({"width": 8, "force_size": True}, "multiples of 16"),
        ({"height": 64, "width": 64, "upscale": True, "force_size": True}, "exclude each other"),
        ({"height": 64, "width": 64, "upscale": True, "output_type": "latent"}, "Latents cannot be upscaled"),
        ({"height": 8192, "width": 8192, "upscale": True}, "from 8 to 4096"),
        ({"guidance_scale": float("nan")}, "guidance scale"),
        ({"guidance_scale": -1.0}, "guidance scale"),
        ({"guidance_scale": 10**400}, "guidance_scale is too large"),
        ({"guidance_interval": (0, 10**400)}, "guidance_interval is"),
        ({"latents": np.zeros((1, 4, 4, 4))}, "latents is of type ndarray"),
        ({"output_type": "jpeg"}, "output_type"),
        ({"num_images_per_prompt": 0}, "num_images_per_prompt"),
        ({"prompt": ["a", "b", "c"], "negative_prompt": ["x", "y"]}, "2 values of negative prompt do not match 3"),
        ({"prompt": 3}, "must be a string"),
        ({"generator": [torch.Generator()] * 2}, "2 generators for 1 images"),
        ({"latents": torch.zeros(1, 4, 8, 8)}, "shape"),
        ({"latents": torch.zeros(1, 4, 4, 4), "generator": 5}, "generator is 5; pass torch.Generator"),
        ({"control_image": {"depth": np.zeros((8, 8), np.uint8)}}, "Unknown condition 'depth'"),
        ({"conditioning_scale": {"mask": 1.0}}, "but control_image does not"),
        ({"callback_on_step_end_tensor_inputs": ["prompt_embeds"]}, "Callbacks receive"),
        ({"height": 0}, "Size 32x0"),
        ({"height": "32"}, "height is '32'"),
        ({"prompt": []}, "list of prompt is empty"),
        ({"control_image": np.zeros((8, 8), np.uint8)}, "is not a known condition"),
        ({"control_image": 3}, "control_image is of type int"),
        ({"guidance_interval": 0.5}, "two numbers"),
        ({"guidance_interval": (0.8, 0.2)}, "the lower noise level comes first"),
        ({"autoguidance_interval": 1}, "autoguidance_interval is 1; it must be two numbers"),
        ({"autoguidance_scale": float("inf")}, "autoguidance_scale is inf"),
        ({"guidance_model": torch.nn.Identity()}, "guidance_model is a Identity"),
        (
            {"guidance_model": tiny_transformer(("mask", "none"))},
            "guidance_model (is a MM|has another condition_names)",
        ),
    ],
)
def test_rejected_arguments(pipeline, change, message):
    with pytest.raises(InputError, match=message):
        pipeline(**{"prompt": PROMPT, **change})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"conditioning_scale": -1.0}, "scale of mask"),
        ({"conditioning_scale": [0.5]}, r"conditioning_scale is \[0.5\]"),
        ({"control_guidance_start": 0.8, "control_guidance_end": 0.2}, "acts from"),
        ({"control_guidance_end": 1.5}, "acts from"),
    ],
)
def test_control_rejected_arguments(pipeline, faces, change, message):
    with pytest.raises(InputError, match=message):
        pipeline(PROMPT, control_image={"mask": faces[0]["mask"]}, **change)


def concurrently(function: Callable[[int], Any], count: int) -> list[Any]:
    """Results of 32 threads, which are switched often."""
    interval = sys.getswitchinterval()
    sys.setswitchinterval(2e-4)
    try:
        with ThreadPoolExecutor(32) as pool:
            return list(pool.map(function, range(count)))
    finally:
        sys.setswitchinterval(interval)


@torch.no_grad()
def test_texts_of_many_threads():
    """A call must not see the padding and truncation of another."""
    pipeline, texts = tiny_pipeline(), ["a woman", "a man with a beard", "", "a smiling person " * 8]
    encode = lambda k: encode_prompts(pipeline, texts[k % 4 : k % 4 + 1], [], {}, [])  # noqa: E731
    wanted = [encode(k) for k in range(4)]
    for k, found in enumerate(concurrently(encode, 1000)):
        assert torch.equal(found.tokens, wanted[k % 4].tokens)
        assert torch.equal(found.pooled, wanted[k % 4].pooled)


def test_images_of_many_threads(pipeline, faces):
    """Bit-identical to one after another, while callbacks of some calls stop them early and others count steps."""

    def call(k: int) -> tuple[np.ndarray, list[int]]:
        steps = []

        def watch(pipe, i, timestep, tensors):
            steps.append(pipe.num_timesteps)
            pipe._interrupt = k % 3 == 0
            return {}

        given = {"num_inference_steps": 2 + k % 2, "callback_on_step_end": watch}
        image = make(
            pipeline, f"{PROMPT} {k % 5}", control={"mask": faces[0]["mask"]} if k % 2 else {}, numbers=(k,), **given
        )
        return image, steps

    wanted = [call(k) for k in range(30)]
    assert [steps for _, steps in wanted[:4]] == [[2], [3, 3, 3], [2, 2], [3]]
    for (image, steps), (expected, counted) in zip(concurrently(call, 30), wanted, strict=True):
        assert np.array_equal(image, expected)
        assert steps == counted
