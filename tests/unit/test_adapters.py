"""Adapters: save, load, scale and remove those of this project and other LoRAs; weights that do not match."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import FluxPipeline
from peft import LoraConfig, get_peft_model_state_dict
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import nn

from builders import (
    in_original_names,
    run,
    tiny_flux,
    tiny_flux_pipeline,
    tiny_mditface_pipeline,
    tiny_pipeline,
    write_gguf,
)
from likeness.data.synthetic import draw_face
from likeness.models.layers import patchify
from likeness.pipelines.adapters import (
    MMFACE_NAME,
    NAME,
    Adapter,
    MMFaceLora,
    active_adapters,
    add_adapter,
    add_loras,
    load_adapter,
    lora_targets,
    restore_adapters,
    save_adapter,
    unload_adapter,
)
from likeness.pipelines.editing.pipelines import MDiTFaceImg2ImgPipeline, MMFaceImg2ImgPipeline
from likeness.pipelines.generate import generate, resolve
from likeness.pipelines.image_recipe import read_recipe, request_of
from likeness.pipelines.load import load
from likeness.pipelines.mditface import MDiTFacePipeline
from likeness.types import InputError
from likeness.weights.hashes import pipeline_hash

PROMPT = "a woman with red hair"
STYLE = ("attn.to_q", "attn.to_v", "ff.net.2", "proj_mlp")  # what ordinary LoRAs for FLUX.1 change
TURBO = ("x_embedder", "context_embedder", "proj_out", "norm_out.linear", "timestep_embedder.linear_1", "attn.to_k")
"""What step distillations change, too."""


@torch.no_grad()
def randomised(network: nn.Module, std: float = 0.2, number: int = 0) -> nn.Module:
    """With a LoRA, and condition rows, that are no longer at their zero beginning."""
    generator = torch.Generator().manual_seed(number)
    for name, parameter in network.named_parameters():
        if ".lora_" in name or name.startswith(("condition_embed", "concat_embedder")):
            parameter.copy_(std * torch.randn(parameter.shape, generator=generator))
    return network


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    """FLUX.1-dev in `flux`; an adapter in `adapter`; LoRAs in diffusers' and kohya's format; a mask."""
    root = tmp_path_factory.mktemp("adapters")
    tiny_flux_pipeline().save_pretrained(root / "flux")
    adapter = Adapter(
        base=str(root / "flux"), condition_names=("mask", "sketch"), rank=4, alpha=2, defaults={"size": 32, "steps": 3}
    )
    network = load(root / "flux").transformer
    add_adapter(network, adapter)
    save_adapter(randomised(network), root / "adapter", adapter)
    for name, layers, rank in (("style", STYLE, 3), ("turbo", TURBO, 6)):
        network = lora_of(tiny_flux(), layers, rank)
        state = get_peft_model_state_dict(network)
        config = network.peft_config["default"].to_dict()
        FluxPipeline.save_lora_weights(root / name, state, transformer_lora_adapter_metadata=config)
    save_file(kohya(), root / "kohya.safetensors")
    Image.fromarray(draw_face(0, 0, 64).mask).save(root / "mask.png")
    return root


def lora_of(network: nn.Module, layers: tuple[str, ...], rank: int, std: float = 0.1) -> nn.Module:
    """A network with a random LoRA on the layers of these names."""
    found = [name for name, module in network.named_modules() if isinstance(module, nn.Linear)]
    targets = [name for name in found if name.endswith(layers) and "spatial" not in name]
    network.add_adapter(LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=targets))
    return randomised(network, std, number=rank)


def kohya() -> dict[str, torch.Tensor]:
    """One layer in the format of kohya's scripts, with alpha."""
    g, name = torch.Generator().manual_seed(9), "lora_unet_double_blocks_0_img_attn_proj"
    down, up = torch.randn(4, 32, generator=g), torch.randn(32, 4, generator=g)
    return {f"{name}.lora_down.weight": down, f"{name}.lora_up.weight": up, f"{name}.alpha": torch.tensor(2.0)}


def make(pipeline: MDiTFacePipeline, control: dict | None = None, **more) -> torch.Tensor:
    given = {"height": 32, "width": 32, "num_inference_steps": 3, "generator": torch.Generator().manual_seed(7), **more}
    return pipeline(PROMPT, control_image=control or {}, output_type="latent", **given).images


def flux_of(root: Path, *loras: Path, weights: list[float] | None = None) -> torch.Tensor:
    """What diffusers' own pipeline makes with these LoRAs, as our latents are packed."""
    theirs = FluxPipeline.from_pretrained(root / "flux")
    theirs.set_progress_bar_config(disable=True)
    for path in loras:
        theirs.load_lora_weights(path, adapter_name=path.stem)
    if loras:
        theirs.set_adapters([path.stem for path in loras], weights)
    given = {"height": 32, "width": 32, "num_inference_steps": 3, "generator": torch.Generator().manual_seed(7)}
    return theirs(PROMPT, output_type="latent", **given).images


@pytest.fixture(scope="module")
def mask() -> dict[str, np.ndarray]:
    return {"mask": draw_face(0, 0, 64).mask}


# --- The adapter


def test_folder_and_its_configuration(root):
    assert sorted(path.name for path in (root / "adapter").iterdir()) == ["adapter.json", "adapter.safetensors"]
    config = json.loads((root / "adapter" / "adapter.json").read_text())
    assert config == {
        "base": str(root / "flux"),
        "condition_names": ["mask", "sketch"],
        "attention": "decoupled",
        "static_modulation": "text",
        "text_reads_spatial": True,
        "targets": "spatial",
        "rank": 4,
        "alpha": 2,
        "defaults": {"size": 32, "steps": 3},
    }
    weights = load_file(root / "adapter" / "adapter.safetensors")
    targets = lora_targets(load(root / "flux").transformer)
    pairs = {f"{name}.lora_{half}.weight" for name in targets for half in "AB"}
    assert weights.keys() == {*pairs, "condition_embed.weight"}


@pytest.mark.parametrize("attention", ["holistic", "hard", "decoupled", "concat"])
def test_round_trip(root, tmp_path, mask, attention):
    """Begun, changed, saved and loaded again: the same bits, for every attention."""
    adapter = Adapter(
        base=str(root / "flux"), condition_names=("mask",), attention=attention, static_modulation="constant"
    )
    pipeline = load_with(root / "flux", adapter)
    fresh = make(pipeline)
    torch.testing.assert_close(patchify(fresh, 2), flux_of(root), atol=1e-4, rtol=0)
    randomised(pipeline.transformer)
    save_adapter(pipeline.transformer, tmp_path / "adapter", adapter)
    again = load(tmp_path / "adapter")
    assert again.transformer.config.attention == attention
    assert again.transformer.config.static_modulation == "constant"
    assert torch.equal(make(again, mask), make(pipeline, mask))
    assert (make(again, mask) - make(again)).abs().max() > 1e-3
    assert pipeline_hash(again) == pipeline_hash(pipeline)
    if attention != "concat":
        assert torch.equal(make(again), fresh)  # text alone do not see the adapter


def load_with(base: Path, adapter: Adapter) -> MDiTFacePipeline:
    """FLUX.1 with a new adapter, as training begins."""
    from likeness.pipelines.load import load_folder

    pipeline = load_folder(base, torch.float32, adapter.network)
    pipeline.set_progress_bar_config(disable=True)
    add_adapter(pipeline.transformer, adapter)
    return pipeline


def test_alpha_counts(root, tmp_path, mask):
    """Its scale is alpha / rank."""
    shutil.copytree(root / "adapter", tmp_path / "adapter")
    values = json.loads((tmp_path / "adapter" / "adapter.json").read_text())
    (tmp_path / "adapter" / "adapter.json").write_text(json.dumps({**values, "alpha": 4}))
    double, single = load(tmp_path / "adapter"), load(root / "adapter")
    assert (make(double, mask) - make(single, mask)).abs().max() > 1e-3
    double.set_adapters(NAME, 0.5)
    torch.testing.assert_close(make(double, mask), make(single, mask), atol=1e-6, rtol=0)


def test_scaled_and_unloaded(root, mask):
    pipeline = load(root / "adapter")
    assert pipeline.config.defaults["steps"] == 3
    full = make(pipeline, mask)
    pipeline.set_adapters(NAME, 0.5)
    assert (make(pipeline, mask) - full).abs().max() > 1e-3
    pipeline.set_adapters(NAME, 1.0)
    assert torch.equal(make(pipeline, mask), full)
    delete = lambda pipe: pipe.delete_adapters(NAME)  # noqa: E731
    for unload in (unload_adapter, MDiTFacePipeline.unload_lora_weights, delete):
        unload(pipeline)
        base = load(root / "flux").config
        assert {name: pipeline.config[name] for name in ("defaults", "sizes")} == {
            name: base[name] for name in ("defaults", "sizes")
        }
        torch.testing.assert_close(patchify(make(pipeline), 2), flux_of(root), atol=1e-4, rtol=0)
        with pytest.raises(InputError, match="not trained with mask: it takes text only"):
            make(pipeline, mask)
        load_adapter(pipeline, root / "adapter")
        assert torch.equal(make(pipeline, mask), full)
    with pytest.raises(InputError, match="not part of a model folder"):
        pipeline.save_pretrained(root / "whole")
    assert not (root / "whole").exists()
    with pytest.raises(InputError, match="not trained with keypoints: it takes mask, sketch"):
        make(pipeline, {"keypoints": draw_face(0, 0, 64).keypoints})


def test_number_formats(root, mask):
    pipeline = load(root / "adapter", dtype=torch.bfloat16)
    assert {parameter.dtype for parameter in pipeline.transformer.parameters()} == {torch.bfloat16}
    wanted = make(load(root / "adapter"), mask)
    assert 0 < (make(pipeline, mask) - wanted).abs().mean() < 0.05 * wanted.abs().mean()


# --- LoRAs of others


@pytest.mark.parametrize("names", [("style",), ("turbo",), ("style", "turbo"), ("kohya.safetensors",)])
def test_loras_act_as_in_diffusers(root, mask, names):
    """Without a condition the images are diffusers' own, with the adapter loaded; with one, both act."""
    pipeline = load(root / "adapter")
    before = make(pipeline, mask)
    for name in names:
        assert pipeline.load_lora_weights(root / name, Path(name).stem) == []
    assert pipeline.get_active_adapters() == [NAME, *(Path(name).stem for name in names)]
    wanted = flux_of(root, *(root / name for name in names))
    assert (wanted - flux_of(root)).abs().max() > 1e-2
    torch.testing.assert_close(patchify(make(pipeline), 2), wanted, atol=1e-4, rtol=0)
    after = make(pipeline, mask)
    assert (after - before).abs().max() > 1e-2
    pipeline.set_adapters([Path(name).stem for name in names])
    assert (make(pipeline, mask) - after).abs().max() > 1e-3  # the adapter acted, too
    pipeline.set_adapters(NAME)
    assert torch.equal(make(pipeline, mask), before)


def test_loras_are_scaled_and_removed(root, mask):
    pipeline = load(root / "adapter")
    before = make(pipeline, mask)
    pipeline.set_adapters(NAME, 0.7)
    weaker = make(pipeline, mask)
    pipeline.load_lora_weights(root / "style", "style")
    pipeline.load_lora_weights(root / "turbo", "turbo")
    pipeline.set_adapters([NAME, "style", "turbo"], [0.7, 0.5, 1.0])
    wanted = flux_of(root, root / "style", root / "turbo", weights=[0.5, 1.0])
    torch.testing.assert_close(patchify(make(pipeline), 2), wanted, atol=1e-4, rtol=0)
    pipeline.delete_adapters(["style", "turbo"])
    assert torch.equal(make(pipeline, mask), weaker)
    pipeline.set_adapters(NAME, 1.0)
    assert torch.equal(make(pipeline, mask), before)


def test_loading_keeps_the_strength_of_others(root, mask):
    pipeline = load(root / "adapter")
    pipeline.set_adapters(NAME, 0.0)
    off = make(pipeline, mask)
    pipeline.load_lora_weights({key: 0 * value for key, value in kohya().items()}, "nothing")
    assert torch.equal(make(pipeline, mask), off)


def test_a_lora_of_the_text_encoder(root):
    """LoRAs that contain weights of the text encoder apply them."""
    pipeline = load(root / "flux")
    layer = next(n for n, m in pipeline.text_encoder.named_modules() if n.endswith("layers.0.self_attn.q_proj"))
    down, up = torch.randn(2, 32, generator=torch.Generator().manual_seed(0)), torch.ones(32, 2)
    state = {f"text_encoder.{layer}.lora_A.weight": down, f"text_encoder.{layer}.lora_B.weight": up}
    before = make(pipeline)
    pipeline.load_lora_weights(state, "text")
    assert (make(pipeline) - before).abs().max() > 1e-4


def test_loras_of_the_text_encoder_act_together(root, tmp_path):
    """As their parts in the transformer do; a replay has them both."""
    pipeline = load(root / "flux")
    layer = next(n for n, m in pipeline.text_encoder.named_modules() if n.endswith("layers.0.self_attn.q_proj"))
    for number, name in enumerate(("one", "two")):
        down, up = torch.randn(2, 32, generator=torch.Generator().manual_seed(number)), torch.ones(32, 2)
        state = {f"text_encoder.{layer}.lora_A.weight": down, f"text_encoder.{layer}.lora_B.weight": up}
        save_file(state, tmp_path / f"{name}.safetensors")
        pipeline.load_lora_weights(tmp_path / f"{name}.safetensors", name)
    assert pipeline.text_encoder.get_submodule(layer).active_adapters == ["one", "two"]
    again = load(root / "flux")
    restore_adapters(again, json.loads(json.dumps(active_adapters(pipeline))))
    assert torch.equal(make(again), make(pipeline))


def test_deleted_loras_leave_a_folder_that_loads(root, tmp_path):
    pipeline = load(root / "flux")
    before = make(pipeline)
    pipeline.load_lora_weights(root / "style", "style")
    pipeline.delete_adapters("style")
    pipeline.save_pretrained(tmp_path)
    assert torch.equal(make(load(tmp_path)), before)


def test_a_lora_without_its_prefix(root):
    """As a single network's `save_lora_adapter` writes it."""
    pipeline, other = load(root / "flux"), load(root / "flux")
    state = load_file(next((root / "style").iterdir()))
    pipeline.load_lora_weights(state, "style")
    other.load_lora_weights({key.removeprefix("transformer."): value for key, value in state.items()}, "style")
    assert torch.equal(make(pipeline), make(other))


def test_what_does_not_fit_is_listed_and_rejected(root):
    """All of it, key by key, with the reason; on demand the rest is loaded."""
    good = "transformer.transformer_blocks.0.attn.to_q"
    state = {
        f"{good}.lora_A.weight": torch.ones(2, 32),
        f"{good}.lora_B.weight": torch.ones(32, 2),
        "transformer.transformer_blocks.7.attn.to_q.lora_A.weight": torch.ones(2, 32),
        "transformer.transformer_blocks.7.attn.to_q.lora_B.weight": torch.ones(32, 2),
        "transformer.transformer_blocks.1.attn.to_q.lora_A.weight": torch.ones(2, 48),
        "transformer.transformer_blocks.1.attn.to_q.lora_B.weight": torch.ones(32, 2),
        "transformer.transformer_blocks.1.attn.to_k.lora_A.weight": torch.ones(2, 32),
        "transformer.transformer_blocks.1.attn.to_v.lora_A.weight": torch.ones(2, 32),
        "transformer.transformer_blocks.1.attn.to_v.lora_B.weight": torch.ones(32, 3),
        "transformer.transformer_blocks.1.attn.norm_q.lora_A.weight": torch.ones(2, 32),
        "transformer.transformer_blocks.1.attn.norm_q.lora_B.weight": torch.ones(32, 2),
        "unet.down.0.lora_A.weight": torch.ones(2, 32),
    }
    pipeline = load(root / "adapter")
    before, layers = make(pipeline), dict(pipeline.transformer.named_modules())
    with pytest.raises(
        InputError, match="the state dict was not made for this network; 10 weights do not match"
    ) as raised:
        pipeline.load_lora_weights(state, "style")
    listed = dict(line.strip().split(": ", 1) for line in str(raised.value).splitlines()[1:])
    assert listed.keys() == {key for key in state if not key.startswith(good)}
    assert dict(pipeline.transformer.named_modules()).keys() == layers.keys()  # nothing was changed
    for part, reason in (
        ("blocks.7.attn.to_q.lora_A", "unknown layer"),
        ("blocks.1.attn.to_q.lora_B", "for a layer of 32 x 48; this one is 32 x 32"),
        ("blocks.1.attn.to_k.lora_A", "not a pair of LoRA matrices"),
        ("blocks.1.attn.to_v.lora_A", "ranks 2 and 3"),
        ("norm_q.lora_A", "not a Linear"),
        ("unet.down.0.lora_A", "not a pair of LoRA matrices"),
    ):
        assert reason in next(why for key, why in listed.items() if part in key)
    left_out = pipeline.load_lora_weights(state, "style", strict=False)
    assert sorted(left_out) == [f"{key}: {why}" for key, why in sorted(listed.items())]
    assert (make(pipeline) - before).abs().max() > 1e-4
    modules = pipeline.transformer.named_modules()
    wrapped = {name for name, module in modules if "style" in getattr(module, "lora_A", {})}
    assert wrapped == {good.removeprefix("transformer.")}


@pytest.mark.parametrize("strict", [True, False])
def test_foreign_files_are_rejected(root, tmp_path, strict):
    pipeline = load(root / "adapter")
    foreign = {f"unet.down.{i}.lora_{half}.weight": torch.ones(2, 2) for i in range(3) for half in "AB"}
    save_file(foreign, tmp_path / "sd.safetensors")
    (tmp_path / "text.safetensors").write_text("no weights")
    for source, message in (
        (tmp_path / "sd.safetensors", "sd.safetensors was not made for this network; 6 weights do not match"),
        (tmp_path / "text.safetensors", "text.safetensors cannot be read"),
        (tmp_path / "absent.safetensors", "absent.safetensors does not exist"),
        (root / "adapter" / "adapter.safetensors", "condition_embed.weight: not a pair"),
    ):
        if strict or "condition" not in message:
            with pytest.raises(InputError, match=message):
                pipeline.load_lora_weights(source, "other", strict=strict)
    pipeline.load_lora_weights(root / "style", "style")
    with pytest.raises(InputError, match="'style' exists already"):
        pipeline.load_lora_weights(root / "turbo", "style")


# --- Adapters that do not fit


def changed(root: Path, out: Path, weights: dict | None = None, **values) -> Path:
    """The adapter with other weights, or other values in its configuration."""
    shutil.copytree(root / "adapter", out)
    config = json.loads((out / "adapter.json").read_text())
    (out / "adapter.json").write_text(json.dumps({**config, **values}))
    if weights is not None:
        save_file(weights, out / "adapter.safetensors")
    return out


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"rank": 8}, r"does not match this network; 50 weights do not match:\n.*shape \(4, 32\), not \(8, 32\)"),
        ({"condition_names": ["mask"]}, r"condition_embed\.weight: shape \(2, 32\), not \(1, 32\)"),
        ({"attention": "concat"}, "x_embedder.lora_A.weight: missing"),
        ({"attention": "soft"}, "attention is 'soft'"),
        ({"ranks": 4}, "unknown key 'ranks'"),
        ({"base": "/nowhere/flux"}, "Unknown model '/nowhere/flux'"),
        ({"rank": 0}, "rank is 0 and alpha 2; the rank must be at least 1"),
        ({"alpha": 0}, "rank is 4 and alpha 0; .* alpha must not be 0"),
        ({"defaults": {"stepz": 3}}, "Unknown default 'stepz'"),
        ({"defaults": {"steps": "x"}}, "steps is 'x'"),
    ],
)
def test_wrong_configurations(root, tmp_path, values, message):
    with pytest.raises(InputError, match=message):
        load(changed(root, tmp_path / "adapter", **values))


def test_broken_and_misplaced_folders(root, tmp_path):
    adapter = changed(root, tmp_path / "adapter")
    (adapter / "adapter.safetensors").write_bytes(b"no weights")
    with pytest.raises(InputError, match=r"adapter\.safetensors cannot be read"):
        load(adapter)
    (adapter / "adapter.safetensors").unlink()
    with pytest.raises(InputError, match=r"adapter\.safetensors cannot be read"):
        load(adapter)
    (adapter / "adapter.json").write_text("{")
    with pytest.raises(InputError, match=r"adapter\.json is not valid JSON"):
        load(adapter)
    tiny_pipeline().save_pretrained(tmp_path / "mmface")
    with pytest.raises(InputError, match=r"is a MMFacePipeline: the base of an adapter must be FLUX\.1"):
        load(root / "adapter", base=tmp_path / "mmface")
    tiny_flux_pipeline(num_layers=1).save_pretrained(tmp_path / "smaller")
    with pytest.raises(InputError, match=r"does not match this network; 12 weights.*\n.*blocks\.1.*unknown weight"):
        load(root / "adapter", base=tmp_path / "smaller")


def test_networks_that_take_no_adapter(root):
    pipeline = load(root / "adapter")
    with pytest.raises(InputError, match="already: unload it first"):
        load_adapter(pipeline, root / "adapter")
    with pytest.raises(InputError, match="separate weights for its spatial stream"):
        load_adapter(tiny_mditface_pipeline(), root / "adapter")
    with pytest.raises(InputError, match="the network concat: load the base with attention='decoupled'"):
        load_adapter(tiny_mditface_pipeline(attention="concat", spatial_stream="lora"), root / "adapter")
    with pytest.raises(InputError, match="no adapter to save"):
        save_adapter(load(root / "flux").transformer, root / "other", Adapter(base="x", condition_names=("mask",)))
    assert not (root / "other").exists()


# --- The command line


def test_generate_and_replay(root, tmp_path, capsys):
    """With the adapter's own base, and with another that the recipe remembers."""
    shutil.copytree(root / "flux", tmp_path / "moved")
    orphan = changed(root, tmp_path / "orphan", base="/nowhere/flux")
    given = ("generate", PROMPT, "--mask", root / "mask.png", "--seed", 5)
    assert run(*given, "--model", root / "adapter", "--out", tmp_path / "a.png") == 0
    assert run(*given, "--model", orphan, "--base", tmp_path / "moved", "--out", tmp_path / "b.png") == 0
    one, other = (np.asarray(Image.open(tmp_path / name)) for name in ("a.png", "b.png"))
    assert np.array_equal(one, other)
    moved = ("--model", orphan, "--base", tmp_path / "moved")
    for name, confirmed in (("a.png", ("--model", root / "adapter")), ("b.png", moved)):
        assert run("replay", tmp_path / name, *confirmed) == 0
        assert "bit-identical" in capsys.readouterr().out
    assert run("replay", tmp_path / "b.png", "--model", orphan) == 2
    assert f"if you trust them, add --base '{tmp_path / 'moved'}'" in capsys.readouterr().err
    assert run(*given, "--model", orphan, "--out", tmp_path / "c.png") == 2
    assert "Unknown model '/nowhere/flux'" in capsys.readouterr().err
    assert run(*given, "--negative-prompt", "hat", "--model", root / "adapter", "--out", tmp_path / "c.png") == 2
    assert "has no negative prompt" in capsys.readouterr().err
    assert run(*given, "--model", root / "flux", "--out", tmp_path / "c.png") == 2
    assert "takes text only" in capsys.readouterr().err


def lora_file(root: Path, name: str) -> Path:
    return next((root / name).iterdir())


def test_generate_with_loras_and_replay(root, tmp_path, capsys):
    """Recipes contain files and strengths; LoRAs from a state dict or a missing file are rejected."""
    shutil.copy(lora_file(root, "style"), tmp_path / "style.safetensors")
    given = ("generate", PROMPT, "--mask", root / "mask.png", "--seed", 5, "--model", root / "adapter")
    assert run(*given, "--out", tmp_path / "plain.png") == 0
    loras = (f"{tmp_path / 'style.safetensors'}=0.6", root / "turbo")
    assert run(*given, "--lora", *loras, "--out", tmp_path / "a.png") == 0
    pipeline = load(root / "adapter")
    pipeline.load_lora_weights(root / "style", "style")
    pipeline.load_lora_weights(root / "turbo", "turbo")
    pipeline.set_adapters([NAME, "style", "turbo"], [1.0, 0.6, 1.0])
    request = resolve(request_of(read_recipe(tmp_path / "a.png")[0]), pipeline)
    wanted = np.asarray(generate(pipeline, request, [5])[0][0])
    made, plain = (np.asarray(Image.open(tmp_path / name)) for name in ("a.png", "plain.png"))
    assert np.array_equal(made, wanted)
    assert not np.array_equal(made, plain)
    recorded = read_recipe(tmp_path / "a.png")[0]["adapters"]
    assert [entry["scale"] for entry in recorded.values()] == [1.0, 0.6, 1.0]
    assert read_recipe(tmp_path / "plain.png")[0]["adapters"] == {NAME: {"scale": 1.0}}
    capsys.readouterr()
    sources = ("--lora", tmp_path / "style.safetensors", root / "turbo")
    for name, confirmed in (("a.png", sources), ("plain.png", ())):
        assert run("replay", tmp_path / name, "--model", root / "adapter", *confirmed) == 0
        assert "bit-identical" in capsys.readouterr().out
    assert run("replay", tmp_path / "a.png", "--model", root / "adapter") == 2
    assert f"add --lora '{tmp_path / 'style.safetensors'}' '{root / 'turbo'}'" in capsys.readouterr().err
    assert run("replay", tmp_path / "plain.png", "--model", root / "adapter", *sources) == 2
    assert "has no LoRA" in capsys.readouterr().err
    assert run("replay", tmp_path / "a.png", "--model", root / "flux", *sources) == 2
    assert "no adapter 'mditface'" in capsys.readouterr().err
    (tmp_path / "style.safetensors").unlink()
    assert run("replay", tmp_path / "a.png", "--model", root / "adapter", *sources) == 2
    assert "style.safetensors does not exist" in capsys.readouterr().err


def test_recipes_hold_what_acts(root, mask):
    """All active adapters are recorded with their current strength, however they were loaded."""
    pipeline = load(root / "adapter")
    assert active_adapters(pipeline) == {NAME: {"scale": 1.0}}
    pipeline.load_lora_weights(root / "style", "style", token="hf_secret", cache_dir="somewhere")
    pipeline.set_adapters([NAME, "style"], [0.5, 0.3])
    recorded = active_adapters(pipeline)
    assert recorded == {NAME: {"scale": 0.5}, "style": {"scale": 0.3, "source": str(root / "style"), "strict": True}}
    again = load(root / "adapter")
    restore_adapters(again, json.loads(json.dumps(recorded)))
    assert torch.equal(make(again, mask), make(pipeline, mask))
    pipeline.set_adapters("style")
    assert set(active_adapters(pipeline)) == {"style"}
    pipeline.delete_adapters("style")
    pipeline.load_lora_weights(kohya(), "numbers")
    with pytest.raises(InputError, match="'numbers' was loaded from a state dict, not from a file"):
        restore_adapters(load(root / "adapter"), active_adapters(pipeline))
    with pytest.raises(InputError, match=r"adapter_name is 'my\.style'; it must not contain a dot"):
        pipeline.load_lora_weights(root / "style", "my.style")
    pipeline.unload_lora_weights()
    assert active_adapters(pipeline) == pipeline.loras == {}
    assert active_adapters(tiny_pipeline()) == {}


def test_adapters_that_are_off_stay_off(mmface):
    """An image that was generated without the adapter of a folder is repeated without it."""
    pipeline, again = load(mmface / "all"), load(mmface / "all")
    pipeline.disable_lora()
    restore_adapters(again, active_adapters(pipeline))
    assert active_adapters(again) == {}
    assert torch.equal(make(again), make(pipeline))


def test_recipes_are_of_the_call(mmface, tmp_path):
    """`save` rejects a pipeline whose adapters or dtype have changed since."""
    pipeline = load(mmface / "base")
    pipeline.load_lora_weights(mmface / "style", "style")
    pipeline.set_adapters("style", 0.5)
    output = pipeline(PROMPT, generator=torch.Generator().manual_seed(1))
    changes = [
        lambda: pipeline.set_adapters("style", 1.0),
        lambda: pipeline.set_adapters("style", 0.5) or pipeline.to(torch.bfloat16),
        lambda: pipeline.to(torch.float32) and pipeline.unload_lora_weights(),
    ]
    (file,) = output.save(tmp_path / "a.png")
    assert read_recipe(file)[0]["adapters"]["style"]["scale"] == 0.5
    for change in changes:
        change()
        with pytest.raises(InputError, match="adapters or the dtype of the pipeline have changed since the call"):
            output.save(tmp_path / "b.png")


def test_pipelines_that_share_networks_share_loras(mmface):
    one = load(mmface / "base")
    other = MMFaceImg2ImgPipeline.from_pipe(one)
    one.load_lora_weights(mmface / "style")
    other.unload_lora_weights()
    for _ in range(2):
        other.load_lora_weights(mmface / "all")
    assert one.loras == other.loras
    assert list(active_adapters(one)) == ["lora_1", "lora_2"]
    assert all(entry["source"] == str(mmface / "all") for entry in active_adapters(one).values())
    one.delete_adapters("lora_1")
    other.load_lora_weights(mmface / "style")
    assert list(one.loras) == list(active_adapters(one)) == ["lora_2", "lora_1"]


def test_strengths_are_recorded_to_the_bit(root, tmp_path):
    """Thirds, ranks that differ from layer to layer, and rsLoRA's scale; nothing where LoRAs are off."""
    network = tiny_flux()
    layers = ("transformer_blocks.0.attn.to_q", "transformer_blocks.1.attn.to_q")
    ranks = {layers[0]: 3, layers[1]: 7}
    network.add_adapter(LoraConfig(rank_pattern=ranks, lora_alpha=5, use_rslora=True, target_modules=list(layers)))
    state = get_peft_model_state_dict(randomised(network, 0.1))
    config = network.peft_config["default"].to_dict()
    FluxPipeline.save_lora_weights(tmp_path / "rs", state, transformer_lora_adapter_metadata=config)
    pipeline = load(root / "flux")
    pipeline.load_lora_weights(tmp_path / "rs", "rs")
    pipeline.set_adapters("rs", 1 / 3)
    again = load(root / "flux")
    restore_adapters(again, json.loads(json.dumps(active_adapters(pipeline))))
    assert torch.equal(make(again), make(pipeline))
    pipeline.disable_lora()
    assert active_adapters(pipeline) == {}


def test_strengths_by_block_cannot_be_recorded(root):
    pipeline = load(root / "adapter")
    pipeline.load_lora_weights(root / "style", "style")
    names = [name for name, module in pipeline.transformer.named_modules() if "style" in getattr(module, "scaling", {})]
    pipeline.transformer.get_submodule(names[0]).set_scale("style", 0.2)
    assert active_adapters(pipeline)["style"]["scale"] is None
    with pytest.raises(InputError, match="differed between layers"):
        restore_adapters(load(root / "adapter"), active_adapters(pipeline))


@pytest.mark.parametrize("strict", [True, False])
def test_loras_that_fit_in_part(root, tmp_path, capsys, strict):
    """Listed key by key: rejected, or on demand left out and reported."""
    state = load_file(lora_file(root, "style"))
    state |= {f"transformer.transformer_blocks.7.attn.to_q.lora_{half}.weight": torch.ones(2, 2) for half in "AB"}
    save_file(state, tmp_path / "part.safetensors")
    given = ("generate", PROMPT, "--model", root / "adapter", "--lora", tmp_path / "part.safetensors")
    out = tmp_path / "a.png"
    assert run(*given, "--out", out, *(() if strict else ("--no-lora-strict",))) == (2 if strict else 0)
    reported = capsys.readouterr().err
    assert reported.count("transformer.transformer_blocks.7.attn.to_q.lora_") == 2
    assert out.exists() != strict
    if not strict:
        assert run("replay", out, "--model", root / "adapter", "--lora", tmp_path / "part.safetensors") == 0


@pytest.mark.parametrize(
    ("lora", "message"),
    [
        ("absent.safetensors", "absent.safetensors does not exist"),
        ("style.safetensors=nan", "a file and its strength as FILE=0.6"),
    ],
)
def test_bad_loras(root, tmp_path, capsys, lora, message):
    assert run("generate", "--model", root / "adapter", "--lora", lora, "--out", tmp_path / "a.png") == 2
    assert message in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


# --- MMFace


@pytest.fixture(scope="module")
def mmface(tmp_path_factory) -> Path:
    """An MMFace in `base`, adapters with `attention` and `all` targets, and a LoRA in diffusers' format."""
    root = tmp_path_factory.mktemp("mmface")
    tiny_pipeline().save_pretrained(root / "base")
    for number, targets in enumerate(("attention", "all")):
        adapter = MMFaceLora(base=str(root / "base"), targets=targets, rank=2, alpha=6, defaults={"steps": 3})
        network = load(root / "base").transformer
        add_adapter(network, adapter)
        save_adapter(randomised(network, number=number), root / targets, adapter)
    network = lora_of(load(root / "base").transformer, ("image_mlp.linear_1", "time_embed.linear_1"), 3)
    config = network.peft_config["default"].to_dict()
    state = get_peft_model_state_dict(network)
    FluxPipeline.save_lora_weights(root / "style", state, transformer_lora_adapter_metadata=config)
    return root


def test_mmface_adapters_and_loras_stack(mmface, mask, tmp_path, capsys):
    """A folder acts alike as `--model` and as `--lora`, with its alpha; LoRAs are scaled, recorded and removed."""
    base, stacked = load(mmface / "base"), load(mmface / "all")
    before, own = make(base, mask), make(stacked, mask)
    assert stacked.config.defaults["steps"] == 3
    assert len(lora_targets(base.transformer, "attention")) == 2 * 4
    assert len(lora_targets(base.transformer, "all")) == 2 * (4 + 4 + 1)
    base.load_lora_weights(mmface / "all", "all")
    assert torch.equal(make(base, mask), own)
    base.load_lora_weights(mmface / "style", "style")
    base.set_adapters(["all", "style"], [1.0, 0.5])
    stacked.load_lora_weights(mmface / "style", "style")
    stacked.set_adapters([MMFACE_NAME, "style"], [1.0, 0.5])
    both = make(stacked, mask)
    assert torch.equal(make(base, mask), both)
    assert (both - own).abs().max() > 1e-3
    again = load(mmface / "all")
    restore_adapters(again, json.loads(json.dumps(active_adapters(stacked))))
    assert torch.equal(make(again, mask), both)
    base.delete_adapters(["all", "style"])
    stacked.unload_lora_weights()
    assert torch.equal(make(base, mask), before)
    assert torch.equal(make(stacked, mask), before)

    given = ("generate", PROMPT, "--mask", tmp_path / "mask.png", "--model", mmface / "attention")
    Image.fromarray(draw_face(0, 0, 64).mask).save(tmp_path / "mask.png")
    assert run(*given, "--lora", f"{mmface / 'style'}=0.3", mmface / "all", "--out", tmp_path / "a.png") == 0
    recorded = read_recipe(tmp_path / "a.png")[0]["adapters"]
    assert {name: entry["scale"] for name, entry in recorded.items()} == {"mmface": 1.0, "lora_1": 0.3, "lora_2": 1.0}
    again = ("replay", tmp_path / "a.png", "--model", mmface / "attention", "--lora", mmface / "style", mmface / "all")
    assert run(*again) == 0
    assert "bit-identical" in capsys.readouterr().out


def test_attention_kwargs_scale_the_loras_of_a_call(root, mmface, mask):
    """As `set_adapters` with each strength times the scale; the strengths themselves stay."""
    for folder, style, own in (
        (mmface / "all", mmface / "style", MMFACE_NAME),
        (root / "adapter", root / "style", NAME),
    ):
        pipeline = load(folder)
        pipeline.load_lora_weights(style, "style")
        pipeline.set_adapters([own, "style"], [1.0, 0.5])
        full = make(pipeline, mask)
        half = make(pipeline, mask, attention_kwargs={"scale": 0.5})
        off = make(pipeline, mask, attention_kwargs={"scale": 0})
        assert torch.equal(make(pipeline, mask), full)
        pipeline.set_adapters([own, "style"], [0.5, 0.25])
        assert torch.equal(make(pipeline, mask), half)
        edit = (MMFaceImg2ImgPipeline if own == MMFACE_NAME else MDiTFaceImg2ImgPipeline).from_pipe(pipeline)
        given = {"image": np.zeros((32, 32, 3), np.uint8), "control_image": mask, "output_type": "latent"}
        edited = [
            edit(PROMPT, **given, generator=torch.Generator().manual_seed(0), attention_kwargs={"scale": scale}).images
            for scale in (0.0, 1.0)
        ]
        assert not torch.equal(*edited)
        pipeline.disable_lora()
        torch.testing.assert_close(make(pipeline, mask), off, atol=1e-6, rtol=0)
        with pytest.raises(InputError, match="with output_type='sampling', use set_adapters"):
            pipeline(PROMPT, output_type="sampling", attention_kwargs={"scale": 0.5})
        for wrong in ({"scale": "much"}, {"strength": 1}, [1]):
            with pytest.raises(InputError, match="attention_kwargs"):
                make(pipeline, mask, attention_kwargs=wrong)


@pytest.mark.parametrize(
    ("model", "lora", "message"),
    [
        ("mmface/base", "flux/style", "was not made for this network; 24 weights do not match"),
        ("flux/flux", "mmface/all", "was not made for this network; 36 weights do not match"),
        ("mmface/wrong", None, "The adapter is for an MMFace, but the network is a MDiTFaceTransformer"),
        ("flux/wrong", None, "the base of an adapter must be FLUX.1"),
    ],
)
def test_adapters_of_the_other_network(root, mmface, tmp_path, capsys, model, lora, message):
    for folder, source, base in ((mmface, "all", root / "flux"), (root, "adapter", mmface / "base")):
        shutil.copytree(folder / source, folder / "wrong", dirs_exist_ok=True)
        values = json.loads((folder / "wrong" / "adapter.json").read_text())
        (folder / "wrong" / "adapter.json").write_text(json.dumps(values | {"base": str(base)}))
    place = lambda name: {"mmface": mmface, "flux": root}[name.split("/")[0]] / name.split("/")[1]  # noqa: E731
    loras = ("--lora", place(lora)) if lora else ()
    assert run("generate", "--model", place(model), *loras, "--out", tmp_path / "a.png") == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "a.png").exists()


# --- 8-bit weights and offloading


def test_8_bit_base(root, mask, tmp_path, capsys):
    """Half of bf16's memory, nearly the same latents; streams stay tied, adapter and LoRAs act as before."""
    whole, narrow = load(root / "adapter"), load(root / "adapter", quantize="int8")
    for pipeline in (whole, narrow):
        add_loras(pipeline, [(str(root / "style"), 0.5)])
    weights = dict(narrow.transformer.named_parameters(remove_duplicate=False))
    name = "transformer_blocks.0.{}attn.to_k.base_layer.weight"
    assert weights[name.format("spatial.")] is weights[name.format("").replace(".base_layer", "")]
    assert weights[name.format("spatial.")].qdata.dtype is torch.int8
    assert weights["condition_embed.weight"].dtype is torch.float32
    for control in ({}, mask):
        wanted = make(whole, control)
        assert 0 < (make(narrow, control) - wanted).abs().mean() < 0.05 * wanted.abs().mean()
    bf16 = load(root / "flux", dtype=torch.bfloat16, quantize="int8")
    assert (make(bf16) - make(load(root / "flux"))).abs().mean() < 0.05 * wanted.abs().mean()
    given = ("generate", PROMPT, "--mask", root / "mask.png", "--model", root / "adapter", "--quantize", "int8")
    assert run(*given, "--lora", root / "style", "--out", tmp_path / "a.png") == 0
    assert read_recipe(tmp_path / "a.png")[0]["quantize"] == "int8"
    assert run("replay", tmp_path / "a.png", "--model", root / "adapter", "--lora", root / "style") == 0
    assert "bit-identical" in capsys.readouterr().out


def test_gguf_base(root, mask, tmp_path, capsys):
    """Adapter and LoRAs act as on the whole base; streams stay tied."""
    base = shutil.copytree(root / "flux", tmp_path / "flux")
    (base / "transformer" / "diffusion_pytorch_model.safetensors").unlink()
    flux = load(root / "flux").transformer
    write_gguf(base / "transformer" / "q8.gguf", in_original_names(flux, flux.state_dict()), "Q8_0")
    whole, narrow = load(root / "adapter"), load(root / "adapter", base=base)
    for pipeline in (whole, narrow):
        add_loras(pipeline, [(str(root / "style"), 0.5)])
    for control in ({}, mask):
        wanted = make(whole, control)
        assert 0 < (make(narrow, control) - wanted).abs().mean() < 0.05 * wanted.abs().mean()
    given = ("--model", root / "adapter", "--base", base)
    assert run("generate", PROMPT, "--mask", root / "mask.png", *given, "--out", tmp_path / "a.png") == 0
    assert run("replay", tmp_path / "a.png", *given) == 0
    assert "bit-identical" in capsys.readouterr().out
    with pytest.raises(InputError, match="is quantized already: leave quantize out"):
        load(base, quantize="int8")
    shutil.copy(base / "transformer" / "q8.gguf", base / "transformer" / "q4.gguf")
    with pytest.raises(InputError, match=r"has q4\.gguf, q8\.gguf: keep one GGUF file"):
        load(base)


def test_8_bits_are_for_flux(root, tmp_path, monkeypatch):
    tiny_mditface_pipeline().save_pretrained(tmp_path)
    with pytest.raises(InputError, match=r"is a MDiTFacePipeline: only FLUX\.1 can be loaded in 8 bits"):
        load(tmp_path, quantize="int8")
    monkeypatch.setitem(sys.modules, "torchao.quantization", None)
    with pytest.raises(InputError, match=r"pip install 'likeness\[quantize\]'"):
        load(root / "flux", quantize="int8")


def test_offloading_needs_an_accelerator(root, tmp_path, capsys):
    given = ("generate", "--model", root / "flux", "--offload", "--device", "cpu", "--out", tmp_path / "a.png")
    assert run(*given) == 2
    assert "Offload requires an accelerator" in capsys.readouterr().err
