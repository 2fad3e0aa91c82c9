"""Real components at tiny size: the same classes as the shipped models, small enough for a test to run in a second."""

from __future__ import annotations

import contextlib
import importlib.util
import random
import socket
import sys
from pathlib import Path
from typing import Any

import gguf
import torch
from diffusers import (
    AutoencoderDC,
    AutoencoderKL,
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    FluxTransformer2DModel,
)
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors, trainers
from transformers import (
    CLIPConfig,
    CLIPModel,
    CLIPTextConfig,
    CLIPTextModel,
    PreTrainedTokenizerFast,
    SegformerConfig,
    SegformerForSemanticSegmentation,
    T5Config,
    T5EncoderModel,
)

from likeness.conditions.mask.classes import CLASSES
from likeness.encoders.components import Components
from likeness.models.mditface import MDiTFaceTransformer
from likeness.models.mmface import MMFaceTransformer
from likeness.models.original_flux import SHIFT_FIRST, original_names
from likeness.objectives import RectifiedFlow
from likeness.pipelines.mditface import MDiTFacePipeline
from likeness.pipelines.mmface import MMFacePipeline
from likeness.weights.hashes import encoder_hash

CAPTIONS = ["a woman with red hair", "a man with a beard and glasses", "a smiling person in a blue hat"]
START, END = "<|startoftext|>", "<|endoftext|>"
MAX_TOKENS = 12


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """A byte-level tokenizer with CLIP's start and end tokens."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=400, special_tokens=[START, END], initial_alphabet=alphabet)
    tokenizer.train_from_iterator(CAPTIONS, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{START} $A {END}", special_tokens=[(START, 0), (END, 1)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token=START, eos_token=END, pad_token=END, model_max_length=MAX_TOKENS
    )


def tiny_vae() -> AutoencoderDC:
    """Factor 8, 4 channels."""
    torch.manual_seed(1)
    return AutoencoderDC(
        latent_channels=4,
        encoder_block_out_channels=(4, 8, 16, 32),
        decoder_block_out_channels=(4, 8, 16, 32),
        encoder_layers_per_block=(0, 1, 1, 1),
        decoder_layers_per_block=(0, 1, 1, 1),
    ).eval()


def tiny_text_encoder() -> CLIPTextModel:
    """32 wide, two layers."""
    torch.manual_seed(2)
    config = CLIPTextConfig(
        vocab_size=400,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=MAX_TOKENS,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=1,
    )
    return CLIPTextModel(config).eval()


def tiny_clip() -> CLIPModel:
    """A text-image pair for `tiny_tokenizer` and images of 16 pixels."""
    torch.manual_seed(3)
    text = tiny_text_encoder().config.to_dict()
    vision = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    vision |= {"image_size": 16, "patch_size": 8}
    return CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=8)).eval()


def tiny_face_parser() -> SegformerForSemanticSegmentation:
    """A face parser for 32 x 32 pixels."""
    torch.manual_seed(4)
    labels = dict(enumerate(CLASSES))
    config = SegformerConfig(
        hidden_sizes=[8, 16, 16, 16],
        depths=[1, 1, 1, 1],
        num_attention_heads=[1, 1, 1, 1],
        decoder_hidden_size=16,
        id2label=labels,
        label2id={name: index for index, name in labels.items()},
        image_size=32,
    )
    return SegformerForSemanticSegmentation(config).eval()


def tiny_transformer(condition_names: tuple[str, ...] = ("mask", "sketch", "keypoints", "none")) -> MMFaceTransformer:
    """32 wide, two blocks, with no weight left at zero, so that every input matters."""
    torch.manual_seed(3)
    model = MMFaceTransformer(
        patch_size=2,
        latent_channels=4,
        hidden_size=32,
        depth=2,
        heads=2,
        text_dim=32,
        max_text_tokens=MAX_TOKENS,
        condition_names=condition_names,
    )
    return randomise(model).eval()


TINY_FLUX = {
    "in_channels": 16,
    "num_layers": 2,
    "num_single_layers": 2,
    "attention_head_dim": 16,
    "num_attention_heads": 2,
    "joint_attention_dim": 32,
    "pooled_projection_dim": 32,
    "guidance_embeds": True,
    "axes_dims_rope": (4, 6, 6),
}
"""Configuration of a FLUX transformer 32 wide, for latents of 4 channels."""


def tiny_mditface(**changes) -> MDiTFaceTransformer:
    """32 wide, two blocks of either kind, with no weight left at zero, so that every input matters."""
    torch.manual_seed(5)
    return randomise(MDiTFaceTransformer(**{**TINY_FLUX, **changes}), std=0.2).eval()


def tiny_flux(**changes) -> FluxTransformer2DModel:
    """FLUX's transformer at the size of `tiny_mditface`."""
    return randomise(FluxTransformer2DModel(**{**TINY_FLUX, **changes}), std=0.2).eval()


def in_original_names(network: Any, weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Weights of FLUX as in the original code's file: some layers are concatenated, and a norm has a scale."""
    found = {}
    for layer, targets in original_names(network).items():
        for leaf in ("weight", "bias"):
            parts = [weights[f"{target}.{leaf}"] for target in targets if f"{target}.{leaf}" in weights]
            if parts and "lora" not in layer:
                value = torch.cat(parts)
                value = torch.cat(value.chunk(2)[::-1]) if layer == SHIFT_FIRST else value
                found[f"{layer}.{'scale' if 'query_norm' in layer or 'key_norm' in layer else leaf}"] = value
    return found


def write_gguf(path: Path, weights: dict, kind: str) -> dict:
    """Write a GGUF file with matrices of whole blocks quantized to `kind`, such as Q8_0, and other weights as float32.
    Returns all as float32 after quantization.
    """
    writer, found = gguf.GGUFWriter(path, "flux"), {}
    for name, value in weights.items():
        own = gguf.GGMLQuantizationType[kind if value.ndim == 2 and value.shape[1] % 32 == 0 else "F32"]
        data = gguf.quantize(value.detach().float().numpy(), own)
        writer.add_tensor(name, data, raw_dtype=own)
        found[name] = torch.from_numpy(gguf.dequantize(data, own).astype("float32")).reshape(value.shape)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return found


def tiny_flux_pipeline(**changes) -> FluxPipeline:
    """A complete FLUX.1: two text encoders, an autoencoder of factor 8 with scale and shift, dynamic shifting."""
    torch.manual_seed(6)
    sizes = {"d_model": 32, "d_kv": 8, "d_ff": 32, "num_layers": 2, "num_heads": 2}
    t5 = T5EncoderModel(T5Config(vocab_size=400, feed_forward_proj="gated-gelu", **sizes))
    vae = AutoencoderKL(
        block_out_channels=(8, 8, 8, 8),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        latent_channels=4,
        norm_num_groups=4,
        layers_per_block=1,
        use_quant_conv=False,
        use_post_quant_conv=False,
        scaling_factor=0.3611,
        shift_factor=0.1159,
    )
    dev = changes.get("guidance_embeds", True)
    pipeline = FluxPipeline(
        transformer=tiny_flux(**changes),
        vae=vae.eval(),
        text_encoder=tiny_text_encoder(),
        tokenizer=tiny_tokenizer(),
        text_encoder_2=t5.eval(),
        tokenizer_2=tiny_tokenizer(),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0 if dev else 1.0, use_dynamic_shifting=dev),
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@torch.no_grad()
def randomise(model: torch.nn.Module, std: float = 0.05) -> torch.nn.Module:
    """Give every parameter random values: the initial zeros of gates and outputs would hide whole branches."""
    generator = torch.Generator().manual_seed(4)
    for parameter in model.parameters():
        parameter.copy_(std * torch.randn(parameter.shape, generator=generator))
    return model


def tiny_components() -> Components:
    """The components of a tiny transformer."""
    vae = tiny_vae()
    settings = {"latent_mean": [0.0] * 4, "latent_std": [1.0] * 4, "text_layer": -2, "max_text_tokens": MAX_TOKENS}
    return Components(
        vae=vae,
        text_encoder=tiny_text_encoder(),
        tokenizer=tiny_tokenizer(),
        settings=settings,
        codec_hash=encoder_hash(vae),
    )


def tiny_pipeline(condition_names: tuple[str, ...] = ("mask", "sketch", "keypoints", "none")) -> MMFacePipeline:
    """A whole pipeline at 32 px, 4 steps."""
    return whole_pipeline(MMFacePipeline, tiny_transformer(condition_names))


def tiny_mditface_pipeline(**changes) -> MDiTFacePipeline:
    """A pipeline with one text encoder as the bundled mini: 32 px, 4 steps, classifier-free guidance."""
    network = {"guidance_embeds": False, "spatial_stream": "full", **changes}
    return whole_pipeline(MDiTFacePipeline, tiny_mditface(**network))


def two_text_encoders(**changes) -> MDiTFacePipeline:
    """FLUX.1's components with a network of three conditions."""
    parts = {name: part for name, part in tiny_flux_pipeline().components.items() if part is not None}
    parts["transformer"] = tiny_mditface(**changes)
    pipeline = MDiTFacePipeline(**parts, max_text_tokens=12, defaults={"size": 32, "steps": 4})
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def whole_pipeline(pipeline_class, transformer):
    """A transformer with the tiny components."""
    parts = tiny_components()
    objective = RectifiedFlow()
    pipeline = pipeline_class(
        transformer=transformer,
        vae=parts.vae,
        text_encoder=parts.text_encoder,
        tokenizer=parts.tokenizer,
        scheduler=objective.scheduler(),
        objective=objective.config(),
        defaults={"size": 32, "steps": 4, "guidance_scale": 2.0},
        **parts.settings,
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def save_components(folder: Path) -> Path:
    """The tiny components as a folder that `load_components` reads."""
    import json

    parts = tiny_components()
    parts.vae.save_pretrained(folder / "vae")
    parts.text_encoder.save_pretrained(folder / "text_encoder")
    parts.tokenizer.save_pretrained(folder / "tokenizer")
    index = {
        "vae": ["diffusers", "AutoencoderDC"],
        "text_encoder": ["transformers", "CLIPTextModel"],
        "tokenizer": ["transformers", type(parts.tokenizer).__name__],
        **parts.settings,
    }
    (folder / "components.json").write_text(json.dumps(index))
    return folder


def run(*arguments: object) -> int:
    """Exit code of a command."""
    from likeness.cli import main

    try:
        main([str(argument) for argument in arguments])
    except SystemExit as stopped:
        return int(stopped.code or 0)
    return 0


def free_port() -> int:
    """Return a free port below those that the system gives to connections (from 32768 on Linux), so that no connection
    takes it before its server starts.
    """
    while True:
        port = random.randrange(20_000, 32_000)
        with contextlib.suppress(OSError), socket.create_server(("127.0.0.1", port)):
            return port


def load_script(file: Path):
    """Import a file that is not part of the package, as the program that uses it does."""
    spec = importlib.util.spec_from_file_location(file.parent.name if file.stem == "__init__" else file.stem, file)
    assert spec is not None
    assert spec.loader is not None
    script = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = script  # where dataclasses look for the types of their fields
    spec.loader.exec_module(script)
    return script
