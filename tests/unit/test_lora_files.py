"""LoRA files as training tools write them: every key acts, or is listed with the reason."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from builders import run, tiny_flux_pipeline
from likeness.pipelines.load import load
from likeness.types import InputError

TO_Q, CLIP_Q = "transformer_blocks.0.attn.to_q", "encoder.layers.0.self_attn.q_proj"
KOHYA = "lora_unet_double_blocks_0_img_attn_proj"


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("flux")
    tiny_flux_pipeline().save_pretrained(root)
    return root


@pytest.fixture(scope="module")
def flux(root):
    return load(root)


@pytest.fixture
def pipeline(flux):
    yield flux
    flux.unload_lora_weights()


def pair(name: str, out: int = 32, *, style: str = "lora_A lora_B", rank: int = 4, **more: float) -> dict:
    """The LoRA of a layer with 32 inputs, and further weights of one number."""
    g, (down, up) = torch.Generator().manual_seed(len(name)), style.split()
    state = {f"{name}.{down}.weight": torch.randn(rank, 32, generator=g)}
    state |= {f"{name}.{up}.weight": torch.randn(out, rank, generator=g)}
    return state | {f"{name}.{leaf}": torch.tensor(value) for leaf, value in more.items()}


def product(state: dict) -> torch.Tensor:
    """B A of a single pair."""
    down, up = list(state.values())[:2]
    return up @ down


def change(network: torch.nn.Module, layer: str) -> torch.Tensor:
    """The change of a layer's weight by its LoRA."""
    found = network.get_submodule(layer)
    return found.lora_B["x"].weight @ found.lora_A["x"].weight * found.scaling["x"]


DOWN_UP = "lora_down lora_up"

LAYERS = {
    "diffusers": (pair(f"transformer.{TO_Q}"), [TO_Q], 1),
    "alpha next to A and B": (pair(f"transformer.{TO_Q}", alpha=2.0), [TO_Q], 0.5),
    "as PEFT names a network": (pair(f"base_model.model.{TO_Q}"), [TO_Q], 1),
    "earlier diffusers": (pair(f"transformer.{TO_Q}", style="lora.down lora.up"), [TO_Q], 1),
    "kohya": (pair(KOHYA, style=DOWN_UP, alpha=2.0), ["transformer_blocks.0.attn.to_out.0"], 0.5),
    "kohya, one layer of three": (
        pair("lora_unet_double_blocks_1_txt_attn_qkv", 96, style=DOWN_UP, alpha=1.0),
        [f"transformer_blocks.1.attn.add_{part}_proj" for part in "qkv"],
        0.25,
    ),
    "kohya, single block": (
        pair("lora_unet_single_blocks_0_linear1", 224, style=DOWN_UP, alpha=4.0),
        [*(f"single_transformer_blocks.0.attn.to_{part}" for part in "qkv"), "single_transformer_blocks.0.proj_mlp"],
        1,
    ),
    "kohya, outside the blocks": (
        pair("lora_unet_guidance_in_out_layer", style=DOWN_UP, alpha=8.0),
        ["time_text_embed.guidance_embedder.linear_2"],
        2,
    ),
    "kohya, names of diffusers": (
        pair("lora_transformer_transformer_blocks_0_attn_to_q", style=DOWN_UP, alpha=4.0),
        [TO_Q],
        1,
    ),
    "ComfyUI": (
        pair("diffusion_model.single_blocks.1.modulation.lin", 96, style=DOWN_UP, alpha=4.0),
        ["single_transformer_blocks.1.norm.linear"],
        1,
    ),
    "original names": (
        pair("base_model.model.double_blocks.0.txt_mlp.0", 128),
        ["transformer_blocks.0.ff_context.net.0.proj"],
        1,
    ),
    "XLabs": (
        pair("double_blocks.0.processor.qkv_lora1", 96, style="down up"),
        [f"transformer_blocks.0.attn.to_{part}" for part in "qkv"],
        1,
    ),
    "CLIP, diffusers": (pair(f"text_encoder.text_model.{CLIP_Q}"), [CLIP_Q], 1),
    "CLIP, transformers 5": (pair(f"text_encoder.{CLIP_Q}", alpha=2.0), [CLIP_Q], 0.5),
    "CLIP, kohya": (
        pair("lora_te1_text_model_encoder_layers_0_self_attn_q_proj", style=DOWN_UP, alpha=2.0),
        [CLIP_Q],
        0.5,
    ),
}


@pytest.mark.parametrize("name", LAYERS)
def test_layers_of_every_format(pipeline, tmp_path, name):
    """The weight of the layers changes by alpha / r B A, and no other layer is wrapped."""
    state, layers, scale = LAYERS[name]
    save_file(state, tmp_path / "lora.safetensors")
    assert pipeline.load_lora_weights(tmp_path, "x") == []
    network = pipeline.text_encoder if "CLIP" in name else pipeline.transformer
    torch.testing.assert_close(torch.cat([change(network, layer) for layer in layers]), scale * product(state))
    parts = (pipeline.transformer, pipeline.text_encoder)
    wrapped = [n for net in parts for n, module in net.named_modules() if "x" in getattr(module, "lora_A", {})]
    assert sorted(wrapped) == sorted(layers)


def test_shift_and_scale_of_the_last_layer(pipeline):
    """The original code has them in the other order."""
    state = pair("lora_unet_final_layer_adaLN_modulation_1", 64, style=DOWN_UP, alpha=4.0)
    pipeline.load_lora_weights(state, "x")
    shift, scale = product(state).chunk(2)
    torch.testing.assert_close(change(pipeline.transformer, "norm_out.linear"), torch.cat([scale, shift]))


def test_both_encoders_and_a_bias(pipeline, tmp_path):
    """Parts of one file act together; ranks differ; the bias of B is scaled as B."""
    clip = pair(f"text_encoder.text_model.{CLIP_Q}", rank=2)
    state = pair(f"transformer.{TO_Q}", alpha=2.0) | {f"transformer.{TO_Q}.lora_B.bias": torch.ones(32)} | clip
    save_file(state, tmp_path / "lora.safetensors")
    assert pipeline.load_lora_weights(tmp_path / "lora.safetensors", "x") == []
    torch.testing.assert_close(change(pipeline.text_encoder, CLIP_Q), product(clip))
    layer = pipeline.transformer.get_submodule(TO_Q)
    torch.testing.assert_close(layer.lora_B["x"].bias * layer.scaling["x"], torch.full((32,), 0.5))


@pytest.mark.parametrize(("pattern", "rslora", "scale"), [({}, False, 4), ({}, True, 8), ({TO_Q: 2}, False, 0.5)])
def test_folders_of_peft(pipeline, tmp_path, pattern, rslora, scale):
    """`save_pretrained` of PEFT: the scale is in the configuration; its list of layers may be incomplete."""
    state = pair(f"base_model.model.{TO_Q}")
    save_file(state, tmp_path / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": 4, "lora_alpha": 16, "alpha_pattern": pattern, "use_rslora": rslora}
    (tmp_path / "adapter_config.json").write_text(json.dumps({**config, "target_modules": ["nothing"]}))
    pipeline.load_lora_weights(tmp_path, "x")
    torch.testing.assert_close(change(pipeline.transformer, TO_Q), scale * product(state))


GOOD = pair(KOHYA, style=DOWN_UP, alpha=4.0)
XL = "lora_unet_down_blocks_1_attentions_0_transformer_blocks_0_attn1_to_q"
NAN = pair(f"transformer.{TO_Q}")
NAN[f"transformer.{TO_Q}.lora_A.weight"][0, 0] = float("nan")

REJECTED = {
    "T5, kohya": (pair("lora_te2_encoder_block_0_layer_0_SelfAttention_q", 16, style=DOWN_UP), "unknown layer"),
    "T5, ComfyUI": (pair("text_encoders.t5xxl.transformer.encoder.block.0.x", style=DOWN_UP), "unknown layer"),
    "T5, diffusers": (pair("text_encoder_2.encoder.block.0.layer.0.SelfAttention.q", 16), "unknown layer"),
    "DoRA, kohya": (pair("lora_unet_double_blocks_0_img_mlp_2", style=DOWN_UP, dora_scale=1.0), "DoRA magnitudes"),
    "DoRA, PEFT": (pair(f"transformer.{TO_Q}", lora_magnitude_vector=1.0), "DoRA magnitudes"),
    "SDXL": (pair(XL, style=DOWN_UP, alpha=4.0), "unknown layer"),
    "LoKr": ({f"lycoris_{TO_Q}.lokr_w1": torch.ones(4, 4), f"lycoris_{TO_Q}.alpha": torch.ones(())}, "not a pair"),
    "LoHa": ({f"lycoris_{TO_Q}.hada_w1_a": torch.ones(4, 4)}, "not a pair"),
    "bias": (pair("lora_unet_double_blocks_0_img_mlp_2", style=DOWN_UP, diff_b=0.0), "not a pair"),
    "alpha alone": ({"lora_unet_final_layer_linear.alpha": torch.ones(())}, "not a pair"),
    "A alone": ({f"transformer.{TO_Q}.lora_A.weight": torch.ones(4, 32)}, "not a pair"),
    "convolution": ({f"{TO_Q}.lora_{half}.weight": torch.ones(4, 4, 1, 1) for half in "AB"}, "not matrices"),
    "rank 0": (pair(TO_Q, rank=0), "ranks 0 and 0"),
    "a larger model": (pair(TO_Q, 48), "for a layer of 48 x 32"),
    "twice": (pair("lora_unet_double_blocks.0.img_attn.proj", style=DOWN_UP), "repeats transformer.transformer_blocks"),
    "not a number": (NAN, "not finite"),
    "alpha is Inf": (pair(TO_Q, alpha=float("inf")), "not finite"),
}


@pytest.mark.parametrize("name", REJECTED)
def test_keys_that_do_not_match_are_listed(pipeline, tmp_path, name):
    """Under the names of the file; on demand they are left out, and the rest acts."""
    state, reason = REJECTED[name]
    save_file(GOOD | state, tmp_path / "lora.safetensors")
    with pytest.raises(InputError, match=r"lora\.safetensors was not made for this network") as raised:
        pipeline.load_lora_weights(tmp_path / "lora.safetensors", "x")
    listed = dict(line.strip().split(": ", 1) for line in str(raised.value).splitlines()[1:])
    assert listed.keys() == state.keys() or name == "twice"
    assert all(reason in why for why in listed.values())
    assert not hasattr(pipeline.transformer, "peft_config")
    left_out = pipeline.load_lora_weights(tmp_path, "x", strict=False)
    assert left_out == [f"{key}: {why}" for key, why in sorted(listed.items())]
    torch.testing.assert_close(change(pipeline.transformer, "transformer_blocks.0.attn.to_out.0"), product(GOOD))


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({"a.safetensors": {}}, "is not a LoRA: it contains no weights"),
        ({"a.safetensors": b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n"}, "Git LFS"),
        ({"a.safetensors": b"\x10\0\0\0\0\0\0\0{}"}, r"a\.safetensors cannot be read"),
        ({"a.safetensors": GOOD, "b.safetensors": GOOD}, r"has a\.safetensors, b\.safetensors: pass one"),
        ({"a.bin": b"pickle"}, "has no .safetensors file: pass one"),
        (
            {"adapter_model.safetensors": GOOD, "adapter_config.json": b'{"lora_alpha": 0}'},
            "lora_alpha of the LoRA .* is 0; it must be a finite number other than 0",
        ),
        (
            {"adapter_model.safetensors": GOOD, "adapter_config.json": b'{"lora_alpha": NaN}'},
            "lora_alpha of the LoRA .* is nan",
        ),
        (
            {"adapter_model.safetensors": GOOD, "adapter_config.json": b'{"lora_alpha": 1' + b"0" * 400 + b"}"},
            "lora_alpha of the LoRA .* must be a finite number",
        ),
        (
            {"adapter_model.safetensors": GOOD, "adapter_config.json": b'{"alpha_pattern": {"(": 4}}'},
            r"alpha_pattern of the LoRA .* has '\(', which is not a regular expression",
        ),
    ],
)
def test_files_that_are_no_lora(flux, tmp_path, files, message):
    folder = tmp_path / "lora"
    folder.mkdir()
    for name, content in files.items():
        if isinstance(content, bytes):
            (folder / name).write_bytes(content)
        else:
            save_file(content, folder / name)
    with pytest.raises(InputError, match=message):
        flux.load_lora_weights(folder)


@pytest.mark.parametrize("metadata", ["[[1, 2]]", "[" * 20_000, "{"])
def test_metadata_that_are_no_mapping(flux, tmp_path, metadata):
    save_file({"a": torch.zeros(1)}, tmp_path / "a.safetensors", {"lora_adapter_metadata": metadata})
    with pytest.raises(InputError, match="they must be a mapping"):
        flux.load_lora_weights(tmp_path / "a.safetensors")


def test_other_file_formats_are_named(flux, tmp_path):
    (tmp_path / "style.ckpt").write_bytes(b"pickle")
    with pytest.raises(InputError, match=r"style\.ckpt is not a \.safetensors file: convert it"):
        flux.load_lora_weights(tmp_path / "style.ckpt")


def test_a_negative_alpha_reverses_a_lora(pipeline, tmp_path):
    state = pair(TO_Q, alpha=-2.0)
    save_file(state, tmp_path / "lora.safetensors")
    pipeline.load_lora_weights(tmp_path / "lora.safetensors", "x")
    torch.testing.assert_close(change(pipeline.transformer, TO_Q), -0.5 * product(state))


def test_loras_without_text_encoder(root, tmp_path):
    """Prompts were encoded before, and the text encoder was removed."""
    pipeline = load(root)
    pipeline.text_encoder = pipeline.text_encoder_2 = None
    save_file(GOOD, tmp_path / "lora.safetensors")
    for remove in (lambda: pipeline.delete_adapters("x"), pipeline.unload_lora_weights):
        pipeline.load_lora_weights(tmp_path / "lora.safetensors", "x")
        pipeline.set_adapters("x", 0.5)
        remove()
        assert not getattr(pipeline.transformer, "peft_config", {})
    save_file(pair(f"text_encoder.text_model.{CLIP_Q}"), tmp_path / "text.safetensors")
    with pytest.raises(InputError, match="unknown layer"):
        pipeline.load_lora_weights(tmp_path / "text.safetensors")


def test_a_lora_of_nan_is_no_image(root, tmp_path, capsys):
    save_file(NAN, tmp_path / "nan.safetensors")
    given = ("generate", "--model", root, "--lora", tmp_path / "nan.safetensors", "--out", tmp_path / "a.png")
    assert run(*given) == run(*given, "--no-lora-strict") == 2
    assert capsys.readouterr().err.count("lora_A.weight: not finite (NaN or Inf)") == 2
    assert not (tmp_path / "a.png").exists()
