"""Released checkpoints: the outputs of the official network after conversion, and errors that name every key."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderTiny
from safetensors import safe_open
from safetensors.torch import save_file

from builders import run, tiny_text_encoder, tiny_tokenizer, tiny_vae
from likeness.convert.mmface_release import convert_release, convert_state, reverse_time
from likeness.models.layers import time_frequencies
from likeness.objectives import make_objective
from likeness.pipelines.load import load
from likeness.types import InputError, TextFeatures

ROOT = Path(__file__).parents[2]
REFERENCE = Path(os.environ.get("LIKENESS_REFERENCE", ROOT.parent / "shared/reference")) / "mmface-dit"
"""Weights, inputs and outputs of the official network at toy size; not part of the project."""

needs_reference = pytest.mark.skipif(not REFERENCE.is_dir(), reason="LIKENESS_REFERENCE names no folder")
TIME_SCALE = 999.0


def read(name: str) -> tuple[dict, dict, dict, dict, str, int]:
    with safe_open(REFERENCE / f"{name}.safetensors", "pt") as file:
        tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
        metadata = file.metadata()
    parts = [{k[len(p) :]: v for k, v in tensors.items() if k.startswith(p)} for p in ("weights.", "in.", "out.")]
    return (*parts, tensors, metadata["kind"], json.loads(metadata["config"])["num_heads"])


def call(model, given: dict, latents: torch.Tensor, time: torch.Tensor, uncond: str = "") -> torch.Tensor:
    text = TextFeatures(given[f"in.{uncond}text_tokens"], given[f"in.{uncond}pooled_text"])
    conditions = given["in.condition_latents"][:, None]
    with torch.no_grad():
        return model(latents, time, text, conditions, given["in.modality"][:, None])


def relative_error(found: torch.Tensor, wanted: torch.Tensor) -> float:
    return ((found - wanted).norm() / wanted.norm()).item()


@needs_reference
@pytest.mark.parametrize("name", ["flow_16ch", "flow_4ch", "diffusion_16ch"])
def test_official_prediction(name):
    weights, inputs, outputs, given, kind, heads = read(name)
    model = convert_state(weights, kind, heads)
    if kind == "flow":  # theirs: 0 is noise and data - noise is predicted
        time, sign = TIME_SCALE * (1 - inputs["timestep"]), -1
    else:
        time, sign = inputs["timestep"].float(), 1
    assert relative_error(sign * call(model, given, inputs["latents"], time), outputs["prediction"]) < 1e-5


@needs_reference
@pytest.mark.parametrize("name", ["flow_16ch", "flow_4ch"])
def test_official_sampling(name):
    """Eight guided Euler steps through diffusers' scheduler, guidance 4."""
    weights, inputs, outputs, given, kind, heads = read(name)
    model = convert_state(weights, kind, heads)
    objective = make_objective({"name": "rectified_flow", "time_scale": TIME_SCALE})
    scheduler = objective.scheduler()
    scheduler.set_timesteps(**objective.schedule(scheduler, 8))
    latents = inputs["latents"]
    for timestep in scheduler.timesteps:
        time = objective.model_time(objective.time_of(timestep)).expand(latents.shape[0])
        with_text, without = call(model, given, latents, time), call(model, given, latents, time, "uncond_")
        latents = scheduler.step(without + 4 * (with_text - without), timestep, latents, return_dict=False)[0]
    assert relative_error(latents, outputs["euler8_cfg4"]) < 1e-5


def official_state(width: int = 144, depth: int = 1, text_dim: int = 32) -> dict[str, torch.Tensor]:
    """Random weights under the official names, two heads of 72, text as wide as the tiny text encoder."""
    g = torch.Generator().manual_seed(0)
    draw = lambda *shape: 0.02 * torch.randn(*shape, generator=g)  # noqa: E731
    linear = lambda name, o, i: {f"{name}.weight": draw(o, i), f"{name}.bias": draw(o)}  # noqa: E731
    state = {"x_embedder.proj.weight": draw(width, 8, 2, 2), "x_embedder.proj.bias": draw(width)}
    state |= linear("t_embedder.mlp.0", width, 256) | linear("t_embedder.mlp.2", width, width)
    state |= linear("c_embedder.proj", width, text_dim) | {"c_embedder.null_feature_pooled": draw(text_dim)}
    state |= linear("clip_seq_proj", width, text_dim) | {"modality_embedder.weight": draw(2, width)}
    state |= linear("final_layer.adaLN_modulation.1", 2 * width, width) | linear("final_layer.linear", 16, width)
    for n in range(depth):
        state |= linear(f"blocks.{n}.adaLN_modulation.1", 12 * width, width)
        for stream in ("", "_t"):
            state |= {f"blocks.{n}.attn.to_{x}{stream}.weight": draw(width, width) for x in ("q", "k", "v", "out")}
        for stream in ("i", "t"):
            state |= linear(f"blocks.{n}.mlp_{stream}.0", 4 * width, width)
            state |= linear(f"blocks.{n}.mlp_{stream}.2", width, 4 * width)
    return state


@pytest.fixture
def release(tmp_path) -> Path:
    folder = tmp_path / "checkpoint-283517"
    folder.mkdir()
    save_file(official_state(), folder / "dit_model_weights_ema.safetensors")
    return folder


@pytest.mark.parametrize(
    ("name", "objective", "size"),
    [("rfm-256", "rectified_flow", 256), ("rfm-512", "rectified_flow", 512), ("ddpm-256", "ddpm", 256)],
)
def test_folder_makes_images(release, tmp_path, name, objective, size):
    """Encoder and autoencoder given: the folder loads and generates, with the settings it was trained with."""
    (tmp_path / "encoder").mkdir()
    tiny_text_encoder().save_pretrained(tmp_path / "encoder" / "text_encoder")
    tiny_tokenizer().save_pretrained(tmp_path / "encoder" / "tokenizer")
    tiny_vae().save_pretrained(tmp_path / "vae")
    out = tmp_path / "out"
    file = release / "dit_model_weights_ema.safetensors"
    missing = convert_release(file, out, release=name, text_encoder=tmp_path / "encoder", vae=tmp_path / "vae")
    assert missing == []
    pipeline = load(out)
    config = pipeline.config
    assert config.objective["name"] == objective
    assert config.defaults["size"] == size
    assert config.sizes == [[size, size]]
    assert config.condition_resize == "lanczos"
    assert config.text_layer == -2
    assert config.latent_mean == 0.0
    assert config.latent_std == pytest.approx(1 / 0.3611)
    assert pipeline.transformer.config.text_rope == "none"
    # the tiny text encoder takes fewer tokens than CLIP
    pipeline.register_to_config(max_text_tokens=12)
    image = pipeline("a face", height=32, width=32, force_size=True, num_inference_steps=2, output_type="np").images
    assert image.shape == (1, 32, 32, 3)


def test_padding_is_that_of_stable_diffusion(release, tmp_path):
    """The padding is that of the release for any tokenizer, because the network reads it."""
    tiny_text_encoder().save_pretrained(tmp_path / "encoder" / "text_encoder")
    tiny_tokenizer().save_pretrained(tmp_path / "encoder" / "tokenizer")
    convert_release(release, tmp_path / "out", text_encoder=tmp_path / "encoder")
    ids = load(tmp_path / "out").tokenizer("a", padding="max_length", max_length=12).input_ids
    assert ids[-1] == tiny_tokenizer().convert_tokens_to_ids("!") != tiny_tokenizer().pad_token_id


def test_scaled_latents_of_a_tiny_autoencoder(release, tmp_path):
    """y = s (z - m), as taef1 gives it, and z itself become the same latents: s z."""
    vae = AutoencoderTiny(
        latent_channels=16,
        encoder_block_out_channels=(8, 8, 8, 8),
        decoder_block_out_channels=(8, 8, 8, 8),
        num_encoder_blocks=(1, 1, 1, 1),
        num_decoder_blocks=(1, 1, 1, 1),
    )
    vae.save_pretrained(tmp_path / "vae")
    convert_release(release, tmp_path / "out", vae=tmp_path / "vae")
    tiny = load(tmp_path / "out").config
    z = torch.linspace(-3, 3, 7)
    y = 0.3611 * (z - 0.1159)
    torch.testing.assert_close((y - tiny.latent_mean) / tiny.latent_std, 0.3611 * z)


def test_release_is_known_by_its_folder_and_gaps_are_named(release, tmp_path):
    missing = convert_release(release, tmp_path / "out")
    assert len(missing) == 2
    assert "text encoder" in missing[0]
    assert "autoencoder" in missing[1]
    with pytest.raises(InputError, match="no vae and no text_encoder"):
        load(tmp_path / "out")("a face", height=32, width=32, num_inference_steps=1)


def test_conversion_of_weights():
    """Time runs the other way, rotary pairs are halves, and the prediction of the flow has the other sign."""
    g = torch.Generator().manual_seed(0)
    weight, time = torch.randn(8, 256, generator=g), torch.tensor([0.0, 300.0, 999.0])
    waves = [time_frequencies(moment, 256) for moment in (time, TIME_SCALE - time)]
    wanted = waves[1] @ weight.T
    torch.testing.assert_close(waves[0] @ reverse_time(weight).T, wanted, atol=1e-3, rtol=0)

    state = official_state()
    flow, diffusion = (convert_state(state, kind) for kind in ("flow", "diffusion"))
    assert torch.equal(flow.final.weight, -diffusion.final.weight)
    assert torch.equal(flow.time_embed.linear_1.weight, reverse_time(state["t_embedder.mlp.0.weight"]))
    assert torch.equal(diffusion.time_embed.linear_1.weight, state["t_embedder.mlp.0.weight"])
    heads = flow.config.heads
    for name, suffix in (("image", ""), ("text", "_t")):
        query, key, value = flow.get_parameter(f"blocks.0.attention.{name}_qkv.weight").chunk(3)
        for letter, found in (("q", query), ("k", key)):
            official = state[f"blocks.0.attn.to_{letter}{suffix}.weight"].unflatten(0, (heads, -1))  # [H, d, D]
            halves = torch.cat([official[:, 0::2], official[:, 1::2]], dim=1)
            assert torch.equal(found, halves.flatten(0, 1))
        assert torch.equal(value, state[f"blocks.0.attn.to_v{suffix}.weight"])


def test_every_key_that_does_not_fit_is_listed():
    state = official_state()
    del state["t_embedder.mlp.2.bias"]
    state["extra.weight"] = torch.zeros(1)
    state["clip_seq_proj.bias"] = torch.zeros(3)
    name = "blocks.0.attn.to_q.weight"
    state[name] = state[name][1:]
    with pytest.raises(InputError) as caught:
        convert_state(state, "flow")
    expected = (
        "4 keys",
        "missing t_embedder.mlp.2.bias",
        "unexpected extra.weight",
        "clip_seq_proj.bias gives text_embed.bias of shape (3,)",
        f"{name}, blocks.0.attn.to_k.weight, blocks.0.attn.to_v.weight of shape ",
    )
    assert all(message in str(caught.value) for message in expected)
    state["x_embedder.proj.weight"] = torch.zeros(3, 3)
    with pytest.raises(InputError, match="not MMFace-DiT weights: x_embedder"):
        convert_state(state, "flow")


def test_rejected_arguments(release, tmp_path):
    with pytest.raises(InputError, match="does not exist"):
        convert_release(tmp_path / "absent", tmp_path / "out", release="rfm-256")
    (tmp_path / "text.safetensors").write_text("no tensors")
    with pytest.raises(InputError, match="cannot be read"):
        convert_release(tmp_path / "text.safetensors", tmp_path / "out", release="rfm-256")
    with pytest.raises(InputError, match="is unknown: pass --release"):
        convert_release(tmp_path / "text.safetensors", tmp_path / "out")
    for taken in (tmp_path, tmp_path / "text.safetensors"):
        with pytest.raises(InputError, match="is not an empty folder: choose another"):
            convert_release(release, taken)
    with pytest.raises(InputError, match="cannot be read"):
        convert_release(release, tmp_path / "out", text_encoder=tmp_path)
    with pytest.raises(InputError, match=r"config\.json cannot be read"):
        convert_release(release, tmp_path / "out", vae=tmp_path)
    with pytest.raises(InputError, match="not MMFace-DiT"):
        convert_state({"a": torch.zeros(1)}, "flow")
    assert not (tmp_path / "out").exists()


@pytest.fixture
def converted(release, tmp_path) -> Path:
    """A converted toy release that generates images of 32 px."""
    (tmp_path / "encoder").mkdir()
    tiny_text_encoder().save_pretrained(tmp_path / "encoder" / "text_encoder")
    tiny_tokenizer().save_pretrained(tmp_path / "encoder" / "tokenizer")
    tiny_vae().save_pretrained(tmp_path / "vae")
    out = tmp_path / "converted"
    file = release / "dit_model_weights_ema.safetensors"
    convert_release(file, out, release="rfm-256", text_encoder=tmp_path / "encoder", vae=tmp_path / "vae")
    index = json.loads((out / "model_index.json").read_text())
    index |= {"max_text_tokens": 12, "sizes": [[32, 32]], "defaults": {**index["defaults"], "size": 32}}
    (out / "model_index.json").write_text(json.dumps(index))
    return out


def test_verify_finds_the_protocols_that_explain_published_numbers(converted, tmp_path, capsys, monkeypatch):
    faces, out = tmp_path / "faces", tmp_path / "verified"
    assert run("prepare", "synthetic", faces, "--count", 4, "--size", 32) == 0
    rows = [json.loads(line) for line in (faces / "train" / "metadata.jsonl").read_text().splitlines()]
    del rows[3]["mask_file_name"]  # a face that cannot be generated is left out
    (faces / "train" / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    command = [
        "verify",
        "release",
        str(converted),
        str(faces),
        "face_parser=bundled",
        "text_image=bundled",
        "--out",
        str(out),
        "--steps",
        "1",
        "2",
    ]
    command += ["--guidance-scale", "2", "--caption", "first", "--resizing", "pillow"]
    assert run(*command) == 0
    first = json.loads((out / "verification.json").read_text())
    settings = [(trial["steps"], trial["file_format"]) for trial in first["trials"]]
    assert sorted(settings) == [(1, "jpg"), (1, "png"), (2, "jpg"), (2, "png")]
    assert first["published"]["fid"] == 16.63
    assert first["published"]["pixel_accuracy"] == pytest.approx(0.9374)
    conventions = [first["published"][name] for name in ("mean_iou", "mean_iou_absent_0", "mean_iou_absent_1")]
    assert conventions == [pytest.approx(0.5012)] * 3
    assert all("pixel_accuracy" in trial and "fid" not in trial for trial in first["trials"])  # FID needs a download
    assert "fid 16.63: not measured: InceptionV3" in capsys.readouterr().out
    assert (out / "verification.html").is_file()
    assert {trial["pixel_accuracy"][3] for trial in first["trials"]} == {3}

    measured = {(trial["steps"], trial["file_format"]): trial["pixel_accuracy"][0] for trial in first["trials"]}
    row = {"pixel_accuracy": measured[2, "png"]}
    monkeypatch.setattr("likeness.evaluate.verify.published_row", lambda *arguments: row)
    assert run(*command) == 0  # as if the paper had printed what two steps give
    second = json.loads((out / "verification.json").read_text())
    best = second["trials"][0]
    assert (best["steps"], best["file_format"], best["explained"]) == (2, "png", ["pixel_accuracy"])
    assert {(t["steps"], t["file_format"]): t["pixel_accuracy"][0] for t in second["trials"]} == measured


def test_verify_takes_the_conditions_of_a_protocol(tmp_path, capsys):
    (tmp_path / "protocol.toml").write_text('given = ["keypoints"]')
    given = ("release", "mmface-mini", "FACES", "--protocol", tmp_path / "protocol.toml", "--out", tmp_path / "out")
    assert run("verify", *given) == 2
    assert "the paper has numbers for mask, sketch" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["release", "mmface-mini", "FACES", "given=keypoints"], "the paper has numbers for mask, sketch"),
        (["mditface", "mmface-mini", "FACES"], "mmface-mini is a MMFacePipeline"),
        (["paper", "mmface-mini", "FACES"], "verify requires release or mditface"),
        (["release", "mmface-mini", "FACES", "steps=20"], "use --steps, not steps="),
        (["release", "mmface-mini", "FACES", "metrics=fid"], "omit the setting metrics"),
        (["release", "mmface-mini", "FACES", "mask_model=mask-mini"], "omit the setting mask_model"),
        (["release", "mmface-mini", "FACES", "given=mask,sketch"], "given is mask"),
    ],
)
def test_verify_rejects(tmp_path, capsys, arguments, message):
    assert run("verify", *arguments, "--out", tmp_path / "out") == 2
    assert message in capsys.readouterr().err
