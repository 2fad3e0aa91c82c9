"""The record inside an image: written, read back by others' rules, replayed, stripped, damaged."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from builders import run, tiny_pipeline
from likeness.data.synthetic import draw_face
from likeness.pipelines.generate import generate, resolve
from likeness.pipelines.image_recipe import (
    EXIF_POINTER,
    GENERATED,
    USER_COMMENT,
    XMP_KEY,
    differences,
    encode_raw,
    parameters_line,
    read_recipe,
    recipe_of,
    request_of,
    write_image,
    xmp_packet,
)
from likeness.pipelines.load import load
from likeness.types import ConditionInput, InputError, PortraitRequest
from likeness.weights.hashes import pipeline_hash


@pytest.fixture(scope="module")
def made():
    """A pipeline, a resolved request with all three conditions, its image and recipe."""
    pipeline = tiny_pipeline()
    face = draw_face(0, 0, 64)
    request = PortraitRequest(
        prompt='a "quoted" <face> & more, naïve 顔',
        negative_prompt="glasses",
        conditions={
            "mask": ConditionInput(image=face.mask, scale=0.7),
            "sketch": ConditionInput(image=face.sketch, end=0.5),
            "keypoints": ConditionInput(image=face.keypoints),
        },
        seed=2**62 + 1,
    )
    request = resolve(request, pipeline)
    image = generate(pipeline, request, [request.seed])[0][0]
    recipe = recipe_of(request, pipeline, model="tiny", fingerprint=pipeline_hash(pipeline))
    return pipeline, request, image, recipe


@pytest.mark.parametrize("suffix", ["png", "jpg", "jpeg", "webp"])
def test_round_trip(made, tmp_path, suffix):
    _, request, image, recipe = made
    path = tmp_path / f"face.{suffix}"
    write_image(image, path, recipe)
    found, pixels = read_recipe(path)
    assert found == recipe
    if suffix in ("png", "webp"):
        assert np.array_equal(pixels, np.asarray(image))
    again = request_of(found)
    assert dataclasses.replace(again, conditions={}) == dataclasses.replace(request, conditions={})
    for name, condition in request.conditions.items():
        found = again.conditions[name]
        assert dataclasses.replace(found, image=None) == dataclasses.replace(condition, image=None)
        assert np.array_equal(found.image.raw, condition.image.raw)
        assert found.image.raw.dtype == condition.image.raw.dtype


def test_replay_gives_the_same_bits(made):
    pipeline, _, image, recipe = made
    again = request_of(recipe)
    assert np.array_equal(np.asarray(generate(pipeline, again, [again.seed])[0][0]), np.asarray(image))
    assert differences(recipe, pipeline, recipe["fingerprint"]) == []


def test_settings_are_the_same_after_saving_and_not_after_a_change(made, tmp_path):
    pipeline, _, _, recipe = made
    pipeline.save_pretrained(tmp_path)
    again = load(tmp_path)
    assert differences(recipe, again, pipeline_hash(again)) == []
    again.register_to_config(defaults={**again.config.defaults, "guidance_interval": (0.2, 0.8)})
    assert [line.split(":")[0] for line in differences(recipe, again, pipeline_hash(again))] == ["settings"]


def test_differences_are_named(made):
    pipeline, _, _, recipe = made
    other = {**recipe, "environment": {**recipe["environment"], "torch": "1.0"}}
    reported = differences(other, pipeline, "0")
    assert any(line.startswith("torch: 1.0 then") for line in reported)
    assert any(line.startswith("fingerprint") for line in reported)
    assert len(reported) == 2


def test_galleries_and_the_mark_of_generated_media(made, tmp_path):
    _, _, image, recipe = made
    line = parameters_line(recipe)
    assert line.splitlines()[0] == recipe["prompt"]
    assert line.splitlines()[1] == "Negative prompt: glasses"
    assert "Steps: 4, Sampler: FlowMatchEulerDiscreteScheduler, CFG scale: 2" in line
    assert f"Seed: {2**62 + 1}, Size: 32x32" in line
    write_image(image, tmp_path / "a.png", recipe)
    with Image.open(tmp_path / "a.png") as written:
        assert written.info["parameters"] == line
        assert GENERATED in written.info[XMP_KEY]
    for name in ("a.jpg", "a.webp"):
        write_image(image, tmp_path / name, recipe)
        with Image.open(tmp_path / name) as written:
            comment = written.getexif().get_ifd(EXIF_POINTER)[USER_COMMENT]
            assert comment.removeprefix(b"UNICODE\x00").decode("utf-16-be") == line
            assert GENERATED.encode() in written.info["xmp"]


def test_stripped(made, tmp_path):
    _, _, image, _ = made
    for suffix in ("png", "jpg", "webp"):
        path = tmp_path / f"bare.{suffix}"
        write_image(image, path, None)
        with Image.open(path) as written:
            assert not {"parameters", XMP_KEY, "xmp", "exif"} & set(written.info)
        with pytest.raises(InputError, match="has no recipe"):
            read_recipe(path)


def test_jpeg_without_room_keeps_the_hashes(made, tmp_path):
    """A condition that does not fit into a JPEG's 64 KiB of XMP is left out, which is an error on replay."""
    _, _, image, recipe = made
    noise = np.random.default_rng(0).integers(0, 256, (256, 256), dtype=np.uint8)
    large = {**recipe, "conditions": {"sketch": {**recipe["conditions"]["sketch"], "data": encode_raw(noise)}}}
    write_image(image, tmp_path / "a.jpg", large)
    found, _ = read_recipe(tmp_path / "a.jpg")
    assert found["conditions"]["sketch"]["sha256"] == large["conditions"]["sketch"]["sha256"]
    with pytest.raises(InputError, match="does not contain its sketch"):
        request_of(found)
    with pytest.raises(InputError, match="too long for a JPEG"):
        write_image(image, tmp_path / "b.jpg", {**recipe, "prompt": "long " * 8000})
    assert not (tmp_path / "b.jpg").exists()


EDIT = {
    **{"method": "replacement", "strength": 1.0, "photo": "", "width": 32, "height": 32},
    **{"transform": [[1.0, 0.0, 0.0], [0.0, 1.0, 0.0]], "region": {}, "before": {}, "certificate": {}},
}
"""An edit of a photograph of 32 pixels."""


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"schema": 99}, "has version 99"),
        ({"prompt": ...}, "the key 'prompt' is missing"),
        ({"seed": None}, "seed is None"),
        ({"seed": -1}, "the seed is not from 0"),
        ({"prompt": "\ud800"}, "surrogates not allowed"),
        ({"guidance_scale": float("nan")}, "not JSON compliant"),
        ({"steps": "4"}, "steps is '4', which is not of type int"),
        ({"steps": True}, "steps is True"),
        ({"steps": 10**9}, "1000000000 steps"),
        ({"steps": 5000}, "5000 steps"),
        ({"edit": EDIT, "width": 2**18, "height": 2**18}, "at 262144x262144; there are at most"),
        ({"edit": EDIT, "width": -1}, "at -1x32; there are at most"),
        ({"guidance_scale": 10**400}, "guidance_scale is too large for a float"),
        ({"steps": 10**9}, "digits"),  # more than Python converts
        ({"width": 4096, "height": 4096}, "of 4096x4096 pixels, the image has 32x32: it was edited"),
        ({"guidance_scale": "high"}, "guidance_scale is 'high'"),
        ({"model": ["owner/name"]}, "model is"),
        ({"quantize": "int1"}, "quantize is 'int1'"),
        ({"command": "rm"}, "unknown key 'command'"),
        ({"adapters": {"x": {"scale": 1.0, "source": "a/b", "token": "hf"}}}, "unknown key 'token'"),
        ({"environment": {"dtype": "int8"}}, "dtype is 'int8'"),
        ({"environment": {"dtype": []}}, "dtype is []"),
        ({"environment": None}, "environment is None"),
    ],
)
def test_damaged_recipes(made, tmp_path, capsys, change, message):
    _, _, image, recipe = made
    changed = {key: value for key, value in {**recipe, **change}.items() if value is not ...}
    info = PngInfo()
    packet = xmp_packet(changed)
    info.add_itxt(XMP_KEY, packet.replace("1000000000", "1" * 5000) if message == "digits" else packet)
    image.save(tmp_path / "a.png", pnginfo=info)
    assert run("replay", tmp_path / "a.png") == 2
    line = capsys.readouterr().err
    assert line.count("\n") == 1
    assert message in line


@pytest.mark.parametrize(
    ("name", "data"),
    [
        ("mask", {"png": "AAAA"}),
        ("mask", {"points": [[0, 0]]}),
        ("mask", encode_raw(np.full((8, 8), 19, np.uint8))),
        ("mask", encode_raw(np.zeros((8, 8, 3), np.uint8))),
        ("keypoints", {"points": [[0, None]]}),
        ("keypoints", {"points": [0.5]}),
        ("keypoints", {"points": [[0.5, 0.5]] * 10}),
        ("keypoints", {"points": [[0, 10**400]]}),
        ("mask", encode_raw(np.zeros((5000, 5000), np.uint8))),
    ],
)
def test_damaged_conditions(made, name, data):
    recipe = made[3]
    entry = {**recipe["conditions"][name], "data": data}
    with pytest.raises(InputError, match=f"The {name} of the recipe is damaged"):
        request_of({**recipe, "conditions": {name: entry}})


def test_only_bundled_models_are_loaded_by_name(made, tmp_path, capsys):
    """A model or LoRA that an image names may be anything; the user must name it."""
    _, _, image, recipe = made
    for changes, message in (
        ({"model": "owner/name"}, "--model 'owner/name'"),
        ({"model": str(tmp_path)}, f"--model '{tmp_path}'"),
        ({"model": "mmface-mini", "adapters": {"x": {"scale": 1.0, "source": "owner/lora"}}}, "--lora 'owner/lora'"),
    ):
        write_image(image, tmp_path / "a.png", {**recipe, **changes})
        assert run("replay", tmp_path / "a.png") == 2
        assert capsys.readouterr().err.rstrip().endswith(f"if you trust them, add {message}")


def test_replays_record_the_model_that_made_them(made, tmp_path, capsys):
    pipeline, _, image, recipe = made
    pipeline.save_pretrained(tmp_path / "one")
    other = tiny_pipeline()
    other.transformer.patch_embed.weight.data *= 2
    other.save_pretrained(tmp_path / "other")
    write_image(image, tmp_path / "a.png", recipe)
    assert run("replay", tmp_path / "a.png", "--model", tmp_path / "other", "--out", tmp_path / "b.png") == 2
    found, _ = read_recipe(tmp_path / "b.png")
    assert (found["model"], found["fingerprint"]) == (str(tmp_path / "other"), pipeline_hash(other))
    assert run("replay", tmp_path / "b.png", "--model", tmp_path / "other") == 0
    assert "bit-identical" in capsys.readouterr().out


def test_images_from_python(tmp_path, capsys):
    """`save` writes what `generate` writes: each image is replayed from its file; calls that no seed describes are
    rejected.
    """
    tiny_pipeline().save_pretrained(tmp_path / "model")
    pipeline, new = load(tmp_path / "model"), lambda *numbers: [torch.Generator().manual_seed(n) for n in numbers]
    mask = draw_face(0, 0, 64).mask
    call = {"negative_prompt": "glasses", "control_image": mask, "conditioning_scale": 0.7}
    files = pipeline(["a man", "a woman"], **call, generator=new(3, 4)).save(tmp_path / "face.png")
    assert [file.name for file in files] == ["face-1.png", "face-2.png"]
    files += pipeline(guidance_scale=1.0, generator=torch.Generator().manual_seed(5)).save(tmp_path / "one.webp")
    for file in files:
        assert run("replay", file, "--model", tmp_path / "model") == 0, capsys.readouterr().err
        assert read_recipe(file)[0]["model"] == str(tmp_path / "model")
    used = new(3)
    torch.randn(1, generator=used[0])
    for options in (
        {"generator": used},
        {},
        {"generator": new(3), "num_images_per_prompt": 2},
        {"generator": new(3), "guidance_interval": (0, 1)},
    ):
        with pytest.raises(InputError, match=r"have no recipe|generators for"):
            pipeline("a man", **options).save(tmp_path / "none.png")
    with pytest.raises(InputError, match="Only PIL images"):
        pipeline("a man", generator=new(3), output_type="np").save(tmp_path / "none.png")
    assert not (tmp_path / "none.png").exists()


def test_changed_condition_is_noticed(made):
    recipe = made[3]
    entry = {**recipe["conditions"]["mask"], "sha256": "0" * 64}
    with pytest.raises(InputError, match="mask of the recipe was modified"):
        request_of({**recipe, "conditions": {"mask": entry}})


def test_unwritable_and_unknown(made, tmp_path):
    _, _, image, recipe = made
    with pytest.raises(InputError, match="must end in"):
        write_image(image, tmp_path / "a.gif", recipe)
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="cannot write"):
        write_image(image, tmp_path / "file" / "a.png", recipe)
    (tmp_path / "text.png").write_text("no image")
    (tmp_path / "script.eps").write_text("%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n")  # Pillow would run it
    Image.new("1", (9000, 9000)).save(tmp_path / "huge.png")
    for name, message in {"text.png": "not a readable", "script.eps": "not a readable", "huge.png": "pixels"}.items():
        with pytest.raises(InputError, match=message):
            read_recipe(tmp_path / name)
    with pytest.raises(InputError, match="does not exist"):
        read_recipe(tmp_path / "absent.png")
