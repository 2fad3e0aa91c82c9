"""Packed weights and bundled folders: small errors, whole pipelines, rejected_arguments."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from builders import (
    run,
    tiny_clip,
    tiny_face_parser,
    tiny_pipeline,
    tiny_text_encoder,
    tiny_tokenizer,
    tiny_transformer,
    tiny_vae,
)
from likeness.annotators.face_parser import load_face_parser
from likeness.encoders.components import load_components
from likeness.encoders.text_image import AttributeHead, load_attribute_head, load_text_image, save_attribute_head
from likeness.files import read_json
from likeness.models.mmface import MMFaceTransformer
from likeness.objectives import RectifiedFlow
from likeness.pipelines.load import load
from likeness.pipelines.mmface import MMFacePipeline
from likeness.prepare.components import join_components, pack_model
from likeness.prepare.synthetic import write_synthetic
from likeness.types import InputError
from likeness.weights.hashes import encoder_hash
from likeness.weights.packed import SCALE, load_component, pack, save_packed, unpack


def test_error_is_at_most_half_a_step():
    g = torch.Generator().manual_seed(0)
    state = {
        "matrix": torch.randn(5, 7, generator=g) * torch.tensor([[1e-3], [1.0], [10.0], [0.0], [1e-8]]),
        "kernel": torch.randn(3, 2, 3, 3, generator=g),
        "bias": torch.randn(4, generator=g),
        "number": torch.tensor([3]),
    }
    packed = pack(state)
    assert packed["matrix"].dtype == packed["kernel"].dtype == torch.int8
    assert packed["bias"].dtype == torch.float16
    again = unpack(packed)
    assert again.keys() == state.keys()
    for name in ("matrix", "kernel"):
        step = packed[name + SCALE].reshape(-1, *[1] * (state[name].ndim - 1))
        assert ((again[name] - state[name]).abs() <= step / 2 * 1.001).all()
    assert torch.equal(again["number"], state["number"])
    assert unpack(packed, torch.bfloat16)["matrix"].dtype == torch.bfloat16


def test_text_encoder_round_trip(tmp_path):
    """Its position ids are a buffer that is not saved."""
    encoder = tiny_text_encoder()
    save_packed(encoder, tmp_path)
    again = load_component(tmp_path, "transformers", "CLIPTextModel")
    ids = torch.tensor([[0, 50, 60, 70, 1, 1]])
    wanted, found = encoder(ids).pooler_output, again(ids).pooler_output
    assert (found - wanted).norm() / wanted.norm() < 0.02


def test_encoders_stored_in_bf16_load_in_float32(tmp_path):
    """transformers would keep the stored dtype."""
    tiny_text_encoder().bfloat16().save_pretrained(tmp_path)
    assert load_component(tmp_path, "transformers", "CLIPTextModel").dtype == torch.float32


@pytest.fixture(scope="module")
def bundle(tmp_path_factory) -> Path:
    """`common/` and a packed model next to it, made by the commands' own functions."""
    root = tmp_path_factory.mktemp("bundle")
    write_synthetic(root / "faces", 4, 32, seed=0)
    tiny_vae().save_pretrained(root / "autoencoder" / "model")
    tiny_text_encoder().save_pretrained(root / "text" / "model" / "text_encoder")
    tiny_tokenizer().save_pretrained(root / "text" / "model" / "tokenizer")
    clip = tiny_clip()
    clip.save_pretrained(root / "text" / "model" / "clip")
    matrix = torch.ones(2, clip.config.vision_config.hidden_size)
    save_attribute_head(AttributeHead(matrix, torch.ones(2), {"Smiling": ["False", "True"]}), root / "text" / "model")
    tiny_face_parser().save_pretrained(root / "parser" / "model")
    runs = (root / "autoencoder", root / "text")
    join_components(*runs, root / "common", root / "faces", size=32, face_parser=root / "parser")
    parts = load_components(root / "common")
    objective = RectifiedFlow()
    pipeline = MMFacePipeline(
        transformer=tiny_transformer(),
        vae=parts.vae,
        text_encoder=parts.text_encoder,
        tokenizer=parts.tokenizer,
        scheduler=objective.scheduler(),
        objective=objective.config(),
        defaults={"size": 32, "steps": 4, "guidance_scale": 2.0},
        **parts.settings,
    )
    pipeline.save_pretrained(root / "run")
    (root / "run" / "codec.json").write_text(json.dumps({"codec": parts.codec_hash}))
    pack_model(root / "run", root / "mini")
    return root


def test_packed_model_makes_the_same_images(bundle):
    assert {path.name for path in (bundle / "mini").iterdir()} == {
        "codec.json",
        "model_index.json",
        "scheduler",
        "transformer",
    }
    make = lambda pipe: pipe("a face", generator=torch.Generator().manual_seed(0), output_type="np").images  # noqa: E731
    np.testing.assert_allclose(make(load(bundle / "mini")), make(load(bundle / "run")), atol=0.02)
    assert "_name_or_path" not in (bundle / "mini/transformer/config.json").read_text()
    size = sum(path.stat().st_size for path in (bundle / "mini").rglob("*") if path.is_file())
    assert size < (bundle / "run/transformer/diffusion_pytorch_model.safetensors").stat().st_size / 2


def test_difference_from_a_base(bundle, tmp_path):
    """A model close to its base needs 4 bits per value; the base must be there and unchanged."""
    shutil.copytree(bundle, tmp_path / "b")
    root = tmp_path / "b"
    fine_tuned = MMFaceTransformer.from_pretrained(root / "run" / "transformer")
    g = torch.Generator().manual_seed(1)
    for parameter in fine_tuned.parameters():
        parameter.data += 1e-3 * torch.randn(parameter.shape, generator=g)
    fine_tuned.save_pretrained(root / "run" / "transformer")
    pack_model(root / "run", root / "fast", root / "mini")
    found, base = (load(root / name).transformer.state_dict() for name in ("fast", "mini"))
    for name, value in fine_tuned.state_dict().items():
        difference = (value - base[name]).abs().max()
        assert (found[name] - value).abs().max() <= difference / 14 * 1.01 + 1e-6, name
    sizes = [sum(file.stat().st_size for file in (root / name / "transformer").iterdir()) for name in ("fast", "mini")]
    assert sizes[0] < 0.8 * sizes[1]
    with pytest.raises(InputError, match="not a difference itself"):
        pack_model(root / "run", root / "other", root / "fast")
    save_packed(tiny_transformer(("mask", "none")), root / "small" / "transformer")
    shutil.copy(root / "mini" / "model_index.json", root / "small")
    with pytest.raises(InputError, match="condition_names differs"):
        pack_model(root / "run", root / "other", root / "small")
    save_packed(tiny_transformer(), root / "mini" / "transformer")
    (root / "mini" / "transformer" / "packed.safetensors").rename(root / "mini" / "transformer" / "moved")
    with pytest.raises(InputError, match="missing or has changed"):
        load(root / "fast")


def test_packing_again_replaces_all(bundle, tmp_path, monkeypatch):
    """Nothing of the former model or components is left; what fails changes nothing."""
    shutil.copytree(bundle, tmp_path / "b")
    root = tmp_path / "b"
    pack_model(root / "run", root / "again", root / "mini")
    assert (root / "again" / "transformer" / "difference.safetensors").is_file()
    with pytest.raises(InputError, match="is the base: choose another folder"):
        pack_model(root / "run", root / "mini", root / "mini")
    pack_model(root / "run", root / "again")
    assert sorted(file.name for file in (root / "again" / "transformer").iterdir()) == [
        "config.json",
        "packed.safetensors",
    ]
    save_packed(tiny_transformer(), root / "again" / "transformer", root / "mini" / "transformer")
    assert not (root / "again" / "transformer" / "packed.safetensors").exists()
    before = (root / "common" / "components.json").read_text()
    with pytest.raises(InputError, match=r"AutoencoderDC in .* cannot be loaded"):
        join_components(root / "text", root / "autoencoder", root / "common", root / "faces", size=32)
    assert (root / "common" / "components.json").read_text() == before
    for size in (0, 31):
        with pytest.raises(InputError, match=f"size {size} is not supported: it must be a multiple of"):
            join_components(root / "autoencoder", root / "text", root / "common", root / "faces", size=size)
    for write in (pack_model, lambda run, out: join_components(root / "autoencoder", root / "text", out, run, size=32)):
        with pytest.raises(InputError, match=r"faces contains other files, but no .*\.json: choose another folder"):
            write(root / "run", root / "faces")
    (root / "text" / "model" / "attributes.safetensors").unlink()
    monkeypatch.setattr("likeness.prepare.components.MEASURED_IMAGES", 3)
    join_components(root / "autoencoder", root / "text", root / "common", root / "faces", size=32)
    assert sorted(file.name for file in (root / "common").iterdir()) == [
        "clip",
        "components.json",
        "text_encoder",
        "tokenizer",
        "vae",
    ]
    assert json.loads((root / "common" / "components.json").read_text())["measured_on"] == 3  # of 4


def test_statistics_normalize_latents(bundle):
    parts = load_components(bundle / "common")
    assert len(parts.settings["latent_mean"]) == 4
    assert parts.settings["max_text_tokens"] == 12
    assert parts.codec_hash == encoder_hash(parts.vae)


def test_what_measures_is_packed_beside(bundle):
    network, size = load_face_parser(bundle / "common" / "face_parser")
    plain, plain_size = load_face_parser(bundle / "parser" / "model")
    assert size == plain_size == 32
    image = torch.rand(1, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    wanted, found = plain(image).logits, network(image).logits
    assert 0 < (found - wanted).norm() / wanted.norm() < 0.05
    clip, tokenizer = load_text_image(bundle / "common")
    assert tokenizer.get_vocab() == tiny_tokenizer().get_vocab()
    given = torch.rand(1, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    wanted, found = (model.get_image_features(given).pooler_output for model in (tiny_clip(), clip))
    assert (found - wanted).norm() / wanted.norm() < 0.05
    head = load_attribute_head(bundle / "common")
    assert head.classes == {"Smiling": ["False", "True"]}
    assert torch.equal(head.weight, load_attribute_head(bundle / "text" / "model").weight)
    with pytest.raises(InputError, match="not a text-image model"):
        load_text_image(bundle / "mini")


def test_model_of_another_autoencoder_is_rejected(bundle, tmp_path):
    (tmp_path / "common").symlink_to(bundle / "common")
    (tmp_path / "run").mkdir()
    for file in ("model_index.json", "transformer", "scheduler"):
        (tmp_path / "run" / file).symlink_to(bundle / "run" / file)
    (tmp_path / "run" / "codec.json").write_text(json.dumps({"codec": "0" * 64}))
    with pytest.raises(InputError, match="another encoder"):
        pack_model(tmp_path / "run", tmp_path / "mini")
    codec = read_json(bundle / "run" / "codec.json")
    (tmp_path / "run" / "codec.json").write_text(json.dumps(codec | {"text": "0" * 64}))
    with pytest.raises(InputError, match="another text encoder"):
        pack_model(tmp_path / "run", tmp_path / "mini")
    assert not (tmp_path / "mini").exists()


def test_broken_folders_are_named(bundle, tmp_path):
    with pytest.raises(InputError, match=r"is not a model folder: it has no model_index\.json"):
        load_components(tmp_path)
    write_json = (tmp_path / "model_index.json").write_text
    shutil.copytree(bundle / "common", tmp_path, dirs_exist_ok=True)
    index = read_json(tmp_path / "components.json")
    (tmp_path / "components.json").unlink()
    write_json(json.dumps({name: index[name] for name in ("vae", "text_encoder", "tokenizer")}))
    with pytest.raises(InputError, match="has no latent_mean"):
        load_components(tmp_path)
    write_json(json.dumps(index | {"vae": ["diffusers", "NewScheduler"]}))
    with pytest.raises(InputError, match=r"diffusers\.NewScheduler is not in the installed diffusers"):
        load_components(tmp_path)
    with pytest.raises(InputError, match="no published model"):
        join_components(tmp_path, tmp_path, tmp_path / "out", bundle / "faces", size=32)
    (tmp_path / "model_index.json").write_text('{"_class_name": "FluxPipeline"}')
    with pytest.raises(InputError, match="FluxPipeline"):
        load(tmp_path)
    (tmp_path / "model_index.json").write_text("{")
    with pytest.raises(InputError, match="not valid JSON"):
        load(tmp_path)
    index = json.loads((bundle / "mini" / "model_index.json").read_text())
    (tmp_path / "model_index.json").write_text(json.dumps(index))
    with pytest.raises(InputError, match="incomplete"):
        load(tmp_path)


@pytest.mark.parametrize(
    "entry",
    [["os", "system"], ["likeness.cli", "main"], ["diffusers", "DiffusionPipeline"], ["transformers", "AutoModel"]],
)
@pytest.mark.parametrize("packed", [True, False])
def test_classes_that_a_model_may_name(bundle, tmp_path, entry, packed):
    """Only those of components, whether or not the weights are packed."""
    index = json.loads((bundle / "mini" / "model_index.json").read_text())
    (tmp_path / "model_index.json").write_text(json.dumps({**index, "transformer": entry}))
    (tmp_path / "transformer").mkdir()
    if packed:
        (tmp_path / "transformer" / "packed.safetensors").write_bytes(b"")
    with pytest.raises(InputError, match=rf"Component {entry[0]}\.{entry[1]} is not supported"):
        load(tmp_path)


POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 9\n"
WEIGHTS = "diffusion_pytorch_model.safetensors"


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """An ordinary pipeline folder."""
    folder = tmp_path_factory.mktemp("pipeline")
    tiny_pipeline().save_pretrained(folder)
    return folder


@pytest.mark.parametrize("damage", ["pointer", "cut off"])
@pytest.mark.parametrize(
    "file",
    [
        f"transformer/{WEIGHTS}",
        f"vae/{WEIGHTS}",
        "text_encoder/model.safetensors",
        "tokenizer/tokenizer.json",
        "scheduler/scheduler_config.json",
        "transformer/config.json",
    ],
)
def test_incomplete_files_are_named(folder, tmp_path, capsys, file, damage):
    shutil.copytree(folder, tmp_path / "model")
    path = tmp_path / "model" / file
    path.write_bytes(POINTER if damage == "pointer" else path.read_bytes()[: path.stat().st_size // 2])
    assert run("generate", "--model", tmp_path / "model", "--out", tmp_path / "a.png") == 2
    line = capsys.readouterr().err.strip().splitlines()[-1]
    assert line.startswith("likeness: ")
    assert str(path) in line
    assert (damage == "pointer") == ("git lfs pull" in line)
    assert not (tmp_path / "a.png").exists()


@pytest.mark.parametrize(
    ("file", "change", "message"),
    [
        ("model_index.json", {"_class_name": ["MMFacePipeline"]}, "is a ['MMFacePipeline']. Supported"),
        ("model_index.json", {"vae": ["diffusers", None]}, "diffusers.None is not supported"),
        ("model_index.json", {"vae": ["diffusers", ["AutoencoderDC"]]}, "is not supported"),
        ("model_index.json", {"defaults": 3}, "defaults is 3"),
        ("model_index.json", {"text_layer": 99}, "text_layer is 99"),
        ("transformer/config.json", {"heads": 0}, "cannot be loaded"),
        ("transformer/config.json", {"hidden_size": "64"}, "cannot be loaded"),
        ("transformer/config.json", {"condition_names": 7}, "cannot be loaded"),
        ("scheduler/scheduler_config.json", {"num_train_timesteps": "a"}, "cannot be loaded"),
    ],
)
def test_values_of_wrong_types(folder, tmp_path, file, change, message):
    shutil.copytree(folder, tmp_path / "model")
    path = tmp_path / "model" / file
    path.write_text(json.dumps({**read_json(path), **change}))
    with pytest.raises(InputError) as raised:
        load(tmp_path / "model")
    assert message in str(raised.value)
    assert str(tmp_path) in str(raised.value) or "not supported" in message


@pytest.mark.parametrize("part", ["transformer", "text_encoder"])
def test_pickles_are_not_loaded(folder, tmp_path, part):
    """In the folder of a pipeline, and of a component that models share."""
    shutil.copytree(folder, tmp_path / "model")
    (file,) = (tmp_path / "model" / part).glob("*.safetensors")
    torch.save(load_file(file), file.with_name("pytorch_model.bin" if file.stem == "model" else f"{file.stem}.bin"))
    file.unlink()
    with pytest.raises(InputError, match="cannot be loaded"):
        load(tmp_path / "model")
    entry = read_json(folder / "model_index.json")[part]
    with pytest.raises(InputError, match="cannot be loaded"):
        load_component(tmp_path / "model" / part, *entry)


@pytest.mark.parametrize(("part", "message"), [("transformer", "The latents are"), ("vae", "The images are")])
def test_weights_that_are_not_finite_are_no_image(folder, tmp_path, capsys, part, message):
    shutil.copytree(folder, tmp_path / "model")
    state = load_file(tmp_path / "model" / part / WEIGHTS)
    name = max(name for name in state if name.endswith("bias") and "encoder." not in name.replace("decoder.", ""))
    save_file({**state, name: torch.full_like(state[name], float("nan"))}, tmp_path / "model" / part / WEIGHTS)
    assert run("generate", "--model", tmp_path / "model", "--out", tmp_path / "a.png") == 2
    assert f"{message} not finite" in capsys.readouterr().err
    assert not (tmp_path / "a.png").exists()


@pytest.mark.parametrize("device", ["cuda:99", "nowhere"])
def test_devices_that_are_not_there_are_rejected(device):
    with pytest.raises(InputError, match=f"Device '{device}' is not available. Available: .*cpu"):
        load(device=device)


def test_unknown_quantization(folder):
    with pytest.raises(InputError, match="quantize is 'int4'; choose int8"):
        load(folder, quantize="int4")


def test_hub_ids_fail_with_a_sentence(monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(InputError, match="neither a folder nor available on the Hub"):
        load("nobody/no-such-model")
