"""A model knows the sizes it was trained at; another size is rejected, resampled or forced, here and in its recipe."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from PIL import Image

from builders import run, tiny_mditface_pipeline, tiny_pipeline
from likeness.data.synthetic import draw_face
from likeness.pipelines.image_recipe import read_recipe, settings_hash
from likeness.pipelines.load import load
from likeness.pipelines.sizes import generation_size, parse_size, trained_sizes
from likeness.types import InputError
from likeness.weights.catalog import BUNDLED, bundled_models

SEVERAL = {"sizes": [[128, 128], [256, 256], [256, 320]], "defaults": {"size": 128}}


def test_sizes_of_a_model():
    assert trained_sizes(SEVERAL) == [(128, 128), (256, 256), (256, 320)]
    assert trained_sizes({"defaults": {"size": 512}}) == [(512, 512)]  # a folder of an earlier version
    assert trained_sizes({"sizes": None, "defaults": {"size": 512}}) == [(512, 512)]
    assert trained_sizes({"sizes": "any", "defaults": {"size": 512}}) == []
    for name in bundled_models():
        assert json.loads((BUNDLED / name / "model_index.json").read_text())["sizes"] == [[128, 128]]


@pytest.mark.parametrize(
    ("size", "options", "found"),
    [
        ((128, 128), {}, (128, 128)),
        ((256, 320), {}, (256, 320)),
        ((256, 320), {"upscale": True}, (256, 320)),
        ((512, 512), {"upscale": True}, (256, 256)),
        ((150, 150), {"upscale": True}, (128, 128)),
        ((64, 64), {"upscale": True}, (128, 128)),
        ((512, 640), {"upscale": True}, (256, 320)),
        ((333, 416), {"upscale": True}, (256, 320)),  # the same to within rounding
        ((512, 512), {"force_size": True}, (512, 512)),
        ((128, 128), {"force_size": True}, (128, 128)),
    ],
)
def test_size_to_generate_at(size, options, found):
    assert generation_size(SEVERAL, size, **options) == found
    assert generation_size({"sizes": "any", "defaults": {"size": 512}}, size, **options) == size


@pytest.mark.parametrize(
    ("size", "options", "message"),
    [
        ((512, 512), {}, "trained at 128x128, 256x256, 256x320. Use a trained size, upscale .*, or force_size"),
        ((320, 256), {"upscale": True}, "none with its aspect ratio. Use a trained size, or force_size"),
        ((500, 640), {"upscale": True}, "none with its aspect ratio"),
        ((5000, 5000), {"upscale": True}, "from 8 to 4096 pixels"),
        ((128, 99999), {"force_size": True}, "Size 128x99999 is not supported: both sides must be from 8 to 4096"),
        ((4, 4), {"upscale": True}, "from 8 to 4096 pixels"),
        ((512, 512), {"upscale": True, "force_size": True}, "exclude each other"),
    ],
)
def test_rejected_sizes(size, options, message):
    with pytest.raises(InputError, match=message):
        generation_size(SEVERAL, size, **options)
    if max(size) > 4096:
        with pytest.raises(InputError, match=message):
            generation_size({"sizes": "any", "defaults": {"size": 512}}, size, **options)


def test_parse_size():
    assert parse_size("128") == (128, 128)
    assert parse_size("128x160") == (128, 160)
    for text in ("", "x", "big", "128x", "-1", "0", "1x2x3", "1.5", "²"):
        with pytest.raises(InputError, match="give pixels as 128 or as 128x160"):
            parse_size(text)


@pytest.mark.parametrize("make", [tiny_pipeline, tiny_mditface_pipeline])
def test_upscaling_resamples_the_trained_size(make):
    pipeline, mask = make(), {"mask": draw_face(0, 0, 64).mask}
    call = lambda **more: pipeline(  # noqa: E731
        "a woman", control_image=mask, generator=torch.Generator().manual_seed(1), **more
    )
    trained = call(output_type="np").images[0]  # [32, 32, 3]
    large = call(output_type="np", height=80, width=80, upscale=True).images[0]  # [80, 80, 3]
    wanted = [
        np.asarray(Image.fromarray(channel).resize((80, 80), Image.Resampling.LANCZOS))
        for channel in np.moveaxis(trained, 2, 0).copy()
    ]
    np.testing.assert_allclose(large, np.stack(wanted, axis=2).clip(0, 1), atol=1e-5)
    image = call(height=80, width=80, upscale=True)
    assert image.images[0].size == (80, 80)
    assert image.notes == call().notes
    assert np.abs(np.asarray(image.images[0]) / 255 - large).max() <= 0.5 / 255 + 1e-6
    tensor = call(output_type="pt", height=80, width=80, upscale=True).images
    assert np.array_equal(tensor[0].permute(1, 2, 0).numpy(), large)


def test_forcing_warns():
    pipeline = tiny_pipeline()
    call = lambda **more: pipeline("a woman", generator=torch.Generator().manual_seed(1), **more)  # noqa: E731
    (note,) = call(height=64, width=48, force_size=True).notes
    assert note == "warning: the model was trained at 32x32, not at 48x64: expect artifacts"
    assert call(force_size=True).notes == []


def test_sizes_travel_with_a_folder(tmp_path):
    """And change no image: the settings in recipes are the same with and without them."""
    pipeline = tiny_pipeline()
    several = [[32, 32], [48, 32]]
    settings = settings_hash(pipeline)
    pipeline.register_to_config(sizes=several)
    pipeline.save_pretrained(tmp_path)
    again = load(tmp_path)
    assert again.config.sizes == several
    assert again("a woman", height=32, width=48).images[0].size == (48, 32)
    assert settings_hash(again) == settings
    index = json.loads((tmp_path / "model_index.json").read_text())
    del index["sizes"]
    (tmp_path / "model_index.json").write_text(json.dumps(index))
    assert trained_sizes(load(tmp_path).config) == [(32, 32)]
    for wrong in ("128x128", ["128x128"], [[32]], [[0, 32]], [32, 32], []):
        (tmp_path / "model_index.json").write_text(json.dumps({**index, "sizes": wrong}))
        with pytest.raises(InputError, match="sizes"):
            load(tmp_path)


def test_command_line(tmp_path, capsys):
    tiny_pipeline().save_pretrained(tmp_path / "model")
    given = ("generate", "a woman", "--model", tmp_path / "model", "--seed", 2)
    assert run(*given, "--size", 64, "--out", tmp_path / "no.png") == 2
    assert "Size 64x64 is not supported: the model was trained at 32x32" in capsys.readouterr().err
    assert not (tmp_path / "no.png").exists()
    for option, recorded in (("--upscale", True), ("--force-size", None)):
        image = tmp_path / f"{option}.png"
        assert run(*given, "--size", 64, option, "--out", image) == 0
        assert ("warning: the model was trained at 32x32" in capsys.readouterr().err) == (option == "--force-size")
        recipe, pixels = read_recipe(image)
        assert recipe.get("upscale") is recorded
        assert pixels.shape == (64, 64, 3)
        assert run("replay", image, "--model", tmp_path / "model") == 0
        assert capsys.readouterr().out.endswith("bit-identical\n")
    assert run("models") == 0
    assert capsys.readouterr().out.count("  128x128  ") == 4
