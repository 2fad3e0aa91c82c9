"""What users of diffusers expect of its pipelines and transformers, for both networks (docs/diffusers.md)."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from accelerate import cpu_offload
from diffusers import (
    AutoModel,
    DEISMultistepScheduler,
    DiffusionPipeline,
    DPMSolverMultistepScheduler,
    FlowMatchEulerDiscreteScheduler,
    FlowMatchHeunDiscreteScheduler,
    PipelineQuantizationConfig,
    TorchAoConfig,
    UniPCMultistepScheduler,
)
from diffusers.callbacks import SDCFGCutoffCallback
from diffusers.models.attention_dispatch import attention_backend
from diffusers.models.modeling_outputs import Transformer2DModelOutput
from diffusers.pipelines.flux.pipeline_flux import calculate_shift
from torch.utils._python_dispatch import TorchDispatchMode
from torchao.quantization import Int8WeightOnlyConfig

from builders import tiny_flux_pipeline, tiny_mditface_pipeline, tiny_pipeline
from likeness.data.synthetic import draw_face
from likeness.models.mditface_blocks import JointAttentionProcessor
from likeness.objectives import make_objective
from likeness.objectives.flow import dynamic_shift
from likeness.pipelines.load import load
from likeness.types import InputError, TextFeatures

PROMPT, NEGATIVE = "a woman with red hair", "a man with a beard"
MASK = draw_face(0, 0, 64).mask


def tied() -> Any:
    """MDiTFace whose image and spatial stream share their weights, as with FLUX.1."""
    return tiny_mditface_pipeline(spatial_stream="lora")


NETWORKS: dict[str, Callable[[], Any]] = {"mmface": tiny_pipeline, "mditface": tiny_mditface_pipeline, "tied": tied}


@pytest.fixture(params=NETWORKS)
def make(request) -> Callable[[], Any]:
    return NETWORKS[request.param]


def image(pipeline: Any, prompt: str = PROMPT, **more: Any) -> np.ndarray:
    """The image of a seed and a mask."""
    given = {"control_image": {"mask": MASK}, "generator": torch.Generator().manual_seed(7), "output_type": "np"}
    return pipeline(prompt, **given | more).images


@pytest.fixture
def nan_if_unset() -> Iterator[None]:
    """Memory without values is NaN, so that an offloaded weight cannot have its value by chance."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("kind", ["block_level", "leaf_level"])
def test_group_offload_to_a_disk(make, kind, tmp_path, nan_if_unset):
    pipeline = make()
    expected = image(pipeline)
    options = {"offload_type": kind, "num_blocks_per_group": 1, "offload_to_disk_path": str(tmp_path)}
    if make is tied and kind == "leaf_level":
        with pytest.raises(InputError, match="share their weights: choose 'block_level'"):
            pipeline.enable_group_offload("cpu", **options)
    else:
        pipeline.enable_group_offload("cpu", **options)
        assert sum(parameter.isnan().any() for parameter in pipeline.transformer.parameters()) > 10
        with pytest.raises(InputError, match="weights are offloaded and cannot be read"):
            pipeline(PROMPT, generator=[torch.Generator().manual_seed(0)]).save(tmp_path / "face.png")
    for _ in range(2):
        assert np.array_equal(image(pipeline), expected)


def test_sequential_offload(make, tmp_path):
    """diffusers' method does this for every component, with an accelerator as device."""
    pipeline = make()
    if make is tied:
        with pytest.raises(InputError, match="use enable_group_offload"):
            pipeline.enable_sequential_cpu_offload(device="meta")
        return
    expected = image(pipeline)
    for model in (pipeline.transformer, pipeline.vae, pipeline.text_encoder):
        cpu_offload(model, torch.device("cpu"), offload_buffers=len(model._parameters) > 0)
    assert pipeline.text_encoder.device.type == "meta"
    assert np.array_equal(image(pipeline), expected)
    with pytest.raises(InputError, match="weights are offloaded and cannot be read"):
        pipeline(PROMPT, generator=[torch.Generator().manual_seed(0)]).save(tmp_path / "face.png")


@pytest.mark.parametrize(
    "scheduler",
    [DPMSolverMultistepScheduler, UniPCMultistepScheduler, DEISMultistepScheduler, FlowMatchHeunDiscreteScheduler],
)
def test_schedulers_with_the_configuration_of_flux(scheduler):
    """Schedulers without these settings in their configuration use FLUX.1's, as in diffusers."""
    pipeline = tiny_mditface_pipeline()
    flux = FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True)
    options = {"prediction_type": "flow_prediction", "use_flow_sigmas": True}
    pipeline.scheduler = scheduler.from_config(flux.config, **options)
    times = []

    def record(pipe, step, time, tensors):
        times.append(float(time))
        return tensors

    assert np.isfinite(image(pipeline, callback_on_step_end=record)).all()
    wanted = scheduler.from_config(flux.config, **options)
    schedule = make_objective(pipeline.config.objective).schedule(wanted, pipeline.config.defaults["steps"])
    if scheduler is not FlowMatchHeunDiscreteScheduler:
        side = pipeline.config.defaults["size"] // pipeline.vae_scale_factor // pipeline.patch_size
        schedule["mu"] = calculate_shift(side**2)
    wanted.set_timesteps(**schedule)
    assert times == pytest.approx(wanted.timesteps.tolist()[: len(times)])


def test_dynamic_shift():
    for tokens in (4, 256, 4096):
        assert dynamic_shift(tokens, {}) == pytest.approx(calculate_shift(tokens))


def test_layerwise_casting(make):
    """Weights are stored in bfloat16 and computed with in float32."""
    pipeline = make()
    expected = image(pipeline)
    pipeline.transformer.enable_layerwise_casting(storage_dtype=torch.bfloat16, compute_dtype=torch.float32)
    assert sum(weight.dtype is torch.bfloat16 for weight in pipeline.transformer.parameters()) > 10
    found = image(pipeline)
    assert not np.array_equal(found, expected)
    np.testing.assert_allclose(found, expected, atol=0.03)


def test_quantization_config(make, tmp_path):
    """torchao's 8-bit weights through diffusers: nearly the same image."""
    pipeline = make()
    expected = image(pipeline)
    pipeline.save_pretrained(tmp_path)
    config = PipelineQuantizationConfig(quant_mapping={"transformer": TorchAoConfig(Int8WeightOnlyConfig())})
    again = type(pipeline).from_pretrained(tmp_path, quantization_config=config, dtype=torch.float32)
    again.set_progress_bar_config(disable=True)
    assert sum(hasattr(weight, "qdata") for weight in again.transformer.parameters()) > 10
    found = image(again)
    assert not np.array_equal(found, expected)
    np.testing.assert_allclose(found, expected, atol=0.05)


class Operations(TorchDispatchMode):
    """Records the names of operations."""

    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.add(func.overloadpacket.__name__)
        return func(*args, **kwargs or {})


@torch.no_grad()
def test_attention_backend(make):
    network, fused = make().transformer, "_scaled_dot_product_flash_attention_for_cpu"
    given = inputs() | {"condition_index": torch.zeros(2, 1, dtype=torch.long)}
    given |= {} if make is tiny_pipeline else {"all_present": True}  # attention without a mask
    with attention_backend("native"):  # restores the default backend, which `set_attention_backend` also sets
        with Operations() as native:
            expected = network(**given)
        network.set_attention_backend("_native_math")
        with Operations() as math:
            found = network(**given)
    assert fused in native.names - math.names
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-3)


def test_attention_processors():
    """A processor replaces the attention of every block."""
    pipeline = tiny_pipeline()
    processors = pipeline.transformer.attn_processors
    assert list(processors) == ["blocks.0.attention.processor", "blocks.1.attention.processor"]
    expected = image(pipeline)
    pipeline.transformer.set_attn_processor(lambda attention, image, text, rope: (0 * image, 0 * text))
    assert not np.array_equal(image(pipeline), expected)
    pipeline.transformer.set_attn_processor(processors)
    pipeline.transformer.fuse_qkv_projections()
    assert np.array_equal(image(pipeline), expected)


class Half(JointAttentionProcessor):
    """Half of the attention's output. diffusers passes only arguments that are in the signature."""

    def __call__(self, attn, x, *_, projections, sizes, shared, static, keep):
        output = super().__call__(
            attn, x, projections=projections, sizes=sizes, shared=shared, static=static, keep=keep
        )
        return (output[0] / 2, output[1]) if keep else output / 2


def test_attention_processors_of_mditface():
    pipeline = tiny_mditface_pipeline()
    processors, expected = pipeline.transformer.attn_processors, image(pipeline)
    pipeline.transformer.set_attn_processor(Half())
    assert not np.array_equal(image(pipeline), expected)
    pipeline.transformer.set_attn_processor(processors)
    assert np.array_equal(image(pipeline), expected)
    with pytest.raises(InputError, match="cannot be fused"):
        pipeline.transformer.fuse_qkv_projections()


def inputs() -> dict[str, Any]:
    """Arguments of a network for two images of 16 tokens."""
    g = torch.Generator().manual_seed(1)
    return {
        "latents": torch.randn(2, 4, 8, 8, generator=g),
        "time": torch.tensor([100.0, 900.0]),
        "text": TextFeatures(torch.randn(2, 12, 32, generator=g), torch.randn(2, 32, generator=g)),
        "condition_latents": torch.randn(2, 1, 4, 8, 8, generator=g),
        "condition_index": torch.tensor([[0], [-1]]),
    }


@torch.no_grad()
def test_return_dict(make):
    network, given = make().transformer, inputs()
    prediction, output = network(**given), network(**given, return_dict=True)
    assert isinstance(output, Transformer2DModelOutput)
    (alone,) = network(**given, return_dict=False)
    assert torch.equal(output.sample, prediction)
    assert torch.equal(alone, prediction)


def test_callbacks_change_the_guidance_scale(make):
    pipeline, seen = make(), []

    def stop_guidance(pipe, step, timestep, tensors):
        seen.append((pipe.guidance_scale, pipe.do_classifier_free_guidance))
        pipe._guidance_scale = 1.0 if step == 1 else pipe._guidance_scale
        return tensors

    found = image(pipeline, guidance_scale=3.0, callback_on_step_end=stop_guidance)
    assert seen == [(3.0, True), (3.0, True), (1.0, False), (1.0, False)]
    assert np.array_equal(found, image(pipeline, guidance_scale=3.0, guidance_interval=(0.6, 1.0)))
    assert not np.array_equal(found, image(pipeline, guidance_scale=3.0))

    def start_guidance(pipe, step, timestep, tensors):
        pipe._guidance_scale = 3.0
        return tensors

    with pytest.raises(InputError, match=r"set the guidance scale to 3.0, but the call started with 1"):
        image(pipeline, guidance_scale=1.0, callback_on_step_end=start_guidance)
    with pytest.raises(InputError, match="returned control_image, but it can change only latents"):
        image(pipeline, callback_on_step_end=lambda *_: {"control_image": None})
    with pytest.raises(InputError, match=r"returned latents of shape \(1, 4, 2, 2\), not"):
        image(pipeline, callback_on_step_end=lambda *_: {"latents": torch.zeros(1, 4, 2, 2)})
    with pytest.raises(InputError, match="Callbacks receive latents, not prompt_embeds"):
        image(pipeline, callback_on_step_end=SDCFGCutoffCallback(cutoff_step_ratio=0.5))


def test_prompts_are_encoded_once(make, tmp_path, caplog):
    """`encode_prompt`, then a pipeline without text encoders: bit-identical images."""
    pipeline = make()
    pipeline.save_pretrained(tmp_path)
    expected = image(pipeline, negative_prompt=NEGATIVE, guidance_scale=2.0)
    names = ("prompt_embeds", "negative_prompt_embeds", "pooled_prompt_embeds", "negative_pooled_prompt_embeds")
    embeds = dict(zip(names, pipeline.encode_prompt(PROMPT, NEGATIVE), strict=True))
    assert [tuple(x.shape) for x in embeds.values()] == [(1, 12, 32)] * 2 + [(1, 32)] * 2
    small = type(pipeline).from_pretrained(tmp_path, text_encoder=None, tokenizer=None)
    small.set_progress_bar_config(disable=True)
    assert np.array_equal(image(small, "", guidance_scale=2.0, **embeds), expected)
    assert torch.equal(pipeline.encode_prompt([PROMPT, None])[0], torch.cat(pipeline.encode_prompt(PROMPT)[:2]))
    pipeline.encode_prompt("a blue hat " * 9)
    assert "the prompt is longer than 12 tokens; truncated: " in caplog.text
    both = {name: torch.cat([x, x]) for name, x in embeds.items()}
    assert np.array_equal(image(small, "", guidance_scale=2.0, num_images_per_prompt=1, **both)[:1], expected)
    assert not image_requests(small, **embeds)
    alone = {name: embeds[name] for name in names[::2]}
    for changes, message in (
        ({"prompt_embeds": None}, "prompt_embeds and its pooled embeddings belong together"),
        ({"prompt_embeds": embeds["prompt_embeds"].numpy()}, "are of type ndarray and Tensor; pass tensors"),
        ({"pooled_prompt_embeds": embeds["prompt_embeds"]}, r"have shapes \(1, 12, 32\) and \(1, 12, 32\)"),
        ({"prompt_embeds": embeds["prompt_embeds"][:, :5]}, "have 12 tokens .*; this call requires 5 tokens"),
        ({"prompt_embeds": embeds["prompt_embeds"][..., :8]}, "widths 8 and 32; this call requires"),
        ({"prompt": PROMPT}, "exclude each other"),
        (dict.fromkeys(names[1::2]), "has no text encoder for ''"),
    ):
        with pytest.raises(InputError, match=message):
            image(small, **{"prompt": "", "guidance_scale": 2.0, **embeds, **changes})
    assert np.array_equal(image(small, "", guidance_scale=1.0, **alone), image(pipeline, guidance_scale=1.0))


def image_requests(pipeline: Any, **embeds: Any) -> list[Any]:
    """The recipes of a call; embeddings cannot be recorded."""
    return pipeline(**embeds, generator=[torch.Generator().manual_seed(1)], num_inference_steps=1).requests


def test_a_folder_loads_through_diffusers(make, tmp_path):
    pipeline = make()
    pipeline.save_pretrained(tmp_path)
    again = DiffusionPipeline.from_pretrained(tmp_path)
    again.set_progress_bar_config(disable=True)
    assert type(again) is type(pipeline)
    assert np.array_equal(image(again), image(pipeline))
    network = AutoModel.from_pretrained(str(tmp_path), subfolder="transformer")
    assert type(network) is type(pipeline.transformer)


def test_image_processor(make):
    """Images of any size become those of a size that the network supports, and back."""
    pipeline = make()
    assert pipeline.vae_scale_factor == 8
    tensor = pipeline.image_processor.preprocess(torch.rand(1, 3, 50, 70))
    assert tensor.shape == (1, 3, 48, 64)
    assert pipeline.image_processor.postprocess(tensor, output_type="pil")[0].size == (64, 48)


def test_a_rejected_lora_leaves_nothing(tmp_path):
    """The weights of the transformer fit, one of the text encoder does not."""
    tiny_flux_pipeline().save_pretrained(tmp_path)
    pipeline = load(tmp_path)
    modules = [name for name, _ in pipeline.transformer.named_modules()]
    state = {}
    for layer, width in (
        ("transformer.transformer_blocks.0.attn.to_q", 32),
        ("text_encoder.text_model.encoder.layers.0.self_attn.q_proj", 16),
    ):
        state |= {f"{layer}.lora_A.weight": torch.ones(4, 32), f"{layer}.lora_B.weight": torch.ones(width, 4)}
    with pytest.raises(InputError, match="was not made for this network"):
        pipeline.load_lora_weights(state)
    assert [name for name, _ in pipeline.transformer.named_modules()] == modules
    assert not any(getattr(part, "peft_config", None) for part in (pipeline.transformer, pipeline.text_encoder))
    assert pipeline.loras == {}
