"""Editing: methods at the level of latents, and `likeness edit` on photographs."""

from __future__ import annotations

import re
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler, PNDMScheduler
from diffusers.callbacks import SDCFGCutoffCallback
from PIL import Image, ImageCms, ImageOps
from scipy import ndimage
from test_images import swap_primaries

from builders import run, tiny_mditface_pipeline, tiny_pipeline
from likeness import (
    MDiTFaceImg2ImgPipeline,
    MDiTFaceInpaintPipeline,
    MDiTFacePipeline,
    MMFaceImg2ImgPipeline,
    MMFaceInpaintPipeline,
    MMFacePipeline,
)
from likeness.annotators.face_parser import load_face_parser, parse_faces
from likeness.conditions import CONDITIONS
from likeness.conditions.framing import TRAINED
from likeness.conditions.images import read_rgb
from likeness.conditions.keypoints import STROKES
from likeness.conditions.mask.classes import CLASS_INDEX, PALETTE
from likeness.data.synthetic import draw_face
from likeness.encoders.latent import to_tensor
from likeness.models.label_decoder import LabelDecoder
from likeness.objectives import DDPM, RectifiedFlow
from likeness.pipelines.editing import DESCRIBED, METHODS, edit_steps, last, latent_region
from likeness.pipelines.editing.langevin import renoised
from likeness.pipelines.image_recipe import COMPOSITE, XMP_KEY, decode_raw, encode_raw, read_recipe, write_image
from likeness.pipelines.load import load
from likeness.prepare.edit import Change, edit_photo, in_portrait, open_photo, plan_edit
from likeness.train import loop
from likeness.types import InputError, PortraitRequest
from runs import small

FACE, OTHER = draw_face(0, 0, 32), draw_face(0, 1, 32)


def seeded(seed: int = 3) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def edit(pipeline, prompt="", on_step=None, **arguments):
    return last(edit_steps(pipeline, prompt, **arguments), on_step)


def with_objective(pipeline, objective):
    pipeline.register_to_config(objective=objective.config())
    pipeline.scheduler = objective.scheduler()
    return pipeline


NAMES = ("mask", "sketch", "photo", "none")
PIPELINES = {
    "mmface": lambda: tiny_pipeline(NAMES),
    "mditface": lambda: tiny_mditface_pipeline(condition_names=NAMES),
    "dpm++": lambda: with_objective(tiny_pipeline(NAMES), RectifiedFlow(sampler="dpm++")),
    "renoise": lambda: with_objective(tiny_pipeline(NAMES), RectifiedFlow(sampler="renoise")),
    "ddpm": lambda: with_objective(tiny_pipeline(NAMES), DDPM()),
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
    if name == "ddpm" and method in DESCRIBED:
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
    if method in ("replacement", "image_to_image"):
        whole = edit(pipeline, "hair", generator=seeded(), **{**arguments, "mask_image": None})
        plain = pipeline("hair", control_image={"mask": OTHER.mask}, generator=seeded(), output_type="latent")
        assert torch.equal(whole.images, plain.images)


@pytest.mark.parametrize("name", ["mmface", "mditface"])
def test_inpainting_sees_photograph_and_mask(name):
    """The network's only condition is the image outside the region, and inside it the mask, or zeros without one."""
    pipeline, region = PIPELINES[name](), np.zeros((8, 8), np.uint8)
    region[:2, 4:] = 255
    seen = []
    pipeline.transformer.register_forward_pre_hook(lambda *call: seen.append(call[2]), with_kwargs=True)
    arguments = {"image": FACE.image, "mask_image": region, "method": "inpainting", "guidance_scale": 1.0}
    images = to_tensor([FACE.image]), to_tensor([CONDITIONS["mask"].render(OTHER.mask, 32, 32)])
    clean, wanted = map(pipeline.codec.encode, images)
    inside = torch.zeros(1, 1, 4, 4, dtype=torch.bool)
    inside[..., :2, 2:] = True
    for control, filling in (({"mask": OTHER.mask}, wanted), (None, 0 * clean)):
        edit(pipeline, "hair", control_image=control, num_inference_steps=1, generator=seeded(), **arguments)
        condition = seen[-1]
        assert condition["condition_index"].tolist() == [[NAMES.index("photo")]]
        assert torch.equal(condition["condition_latents"][:, 0], torch.where(inside, filling, clean))
    with pytest.raises(InputError, match="only a mask as condition: leave sketch out"):
        edit(pipeline, control_image={"sketch": OTHER.sketch}, **arguments)


@pytest.mark.parametrize("method", DESCRIBED)
def test_equal_descriptions_change_nothing(method):
    """An inversion reports its error, which is small."""
    pipeline, same = tiny_pipeline(), {"mask": FACE.mask}
    options = {"image": FACE.image, "method": method, "guidance_scale": 1.0, "output_type": "latent"}
    found = edit(pipeline, "a", source_prompt="a", control_image=same, source_control_image=same, **options)
    clean = pipeline.codec.encode(to_tensor([FACE.image]))
    assert torch.allclose(found.images, clean, atol=1e-5 if method == "flow_edit" else 1e-2)
    reported = [float(number) for note in found.notes for number in re.findall(r"([\d.]+) dB", note)]
    assert [decibels > 40 for decibels in reported] == [True] * (method == "inversion")
    again = edit(
        pipeline, "a", source_prompt="a", control_image=same, source_control_image=same, latents=0 * clean, **options
    )
    assert again.images.shape == clean.shape


@pytest.mark.parametrize("objective", [RectifiedFlow(), DDPM()])
def test_a_langevin_step_keeps_the_marginal(objective):
    """With an exact prediction, x_t keeps its mean and variance, and half of the variance of its noise."""
    clean, time = torch.full((1, 4, 64, 64), 0.3), objective.time_of(torch.tensor([400.0]))
    noise, fresh = (torch.randn(clean.shape, generator=torch.Generator().manual_seed(seed)) for seed in (1, 2))
    noisy = objective.corrupt(clean, noise, time)
    found = renoised(objective, noisy, objective.target(clean, noise, time), time, fresh)
    signal, level = objective.corrupt(clean, 0 * clean, time), float(objective.noise_level(time))
    assert float((found - signal).mean()) == pytest.approx(0, abs=0.02)
    assert float((found - signal).std()) == pytest.approx(level, rel=0.03)
    kept = float(((found - signal) * (noisy - signal)).mean()) / level**2
    assert kept == pytest.approx(0.5**0.5, rel=0.03)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"method": "flow"}, "Unknown method 'flow'. Did you mean flow_edit"),
        ({"strength": 0}, "strength is 0; it must be greater than 0"),
        ({"strength": float("nan")}, "strength is nan"),
        ({"mask_image": np.zeros((8, 8), np.uint8)}, "mask_image is all black"),
        ({"method": None}, "Unknown method None"),
        ({"image": FACE.image.astype(float)}, "image has values from .* in \\[0, 1\\]"),
        ({"image": np.full((32, 32, 3), np.nan)}, "image has values from nan"),
        ({"image": FACE.image.astype(int) - 128}, "image has values from .* in \\[0, 255\\]"),
        ({"image": FACE.image.astype(str)}, "image has the dtype <U"),
        ({"mask_image": [["hair"]]}, "mask_image is of type list"),
        ({"generator": 3}, "generator is 3; pass torch.Generator"),
        ({"output_type": "png"}, "output_type is 'png'"),
        ({"width": 48, "height": 48, "upscale": True, "output_type": "latent"}, "Latents cannot be upscaled"),
        ({"image": FACE.image[:16]}, "the image to edit is 32x16, but the image is 32x32"),
        ({"num_inference_steps": 0}, "number of steps is 0"),
        ({"method": "inpainting"}, "inpainting requires a network with the condition photo, .* recipes/inpaint_mini"),
        ({"callback_on_step_end": SDCFGCutoffCallback()}, "Callbacks receive latents, not prompt_embeds"),
    ],
)
def test_rejected_arguments(changes, said):
    with pytest.raises(InputError, match=said):
        edit(tiny_pipeline(), **{"image": FACE.image, **changes})


@pytest.mark.parametrize("side", [8, 12, 16, 40])
def test_regions_of_masks_of_any_size(side):
    """Of 16 tokens a side, all that a white pixel touches, also if it is larger than a token or crosses its border."""
    latents = [32, 32]
    assert latent_region(np.ones((side, side), bool), latents, 2).all()
    mask = np.zeros((side, side), bool)
    mask[2, side - 1] = True
    rows, columns = (
        [token for token in range(16) if token < (i + 1) * 16 / side and token + 1 > i * 16 / side]
        for i in (2, side - 1)
    )
    wanted = np.zeros((16, 16), bool)
    wanted[np.ix_(rows, columns)] = True
    assert np.array_equal(latent_region(mask, latents, 2)[0, 0, ::2, ::2], wanted)


def test_models_of_masks_edit_no_images():
    pipeline = tiny_pipeline()
    pipeline.vae = LabelDecoder(palette=PALETTE.tolist(), latent_channels=4, block_out_channels=(8, 8), layers=1)
    with pytest.raises(InputError, match="has a LabelDecoder, which cannot encode images"):
        edit(pipeline, image=FACE.image)


@pytest.mark.parametrize("scheduler", [DDIMScheduler, DDPMScheduler, PNDMScheduler])
def test_schedulers_without_an_index(scheduler):
    pipeline = PIPELINES["ddpm"]()
    pipeline.scheduler = scheduler.from_config(pipeline.scheduler.config)
    images = edit(pipeline, image=FACE.image, strength=0.5, generator=seeded(), output_type="latent").images
    assert images.isfinite().all()


CLASSES = {
    "mmface": (MMFacePipeline, MMFaceInpaintPipeline, MMFaceImg2ImgPipeline),
    "mditface": (MDiTFacePipeline, MDiTFaceInpaintPipeline, MDiTFaceImg2ImgPipeline),
}


@pytest.mark.parametrize("name", CLASSES)
def test_classes_of_diffusers(name, tmp_path):
    """They share everything with the text-to-image pipeline, are `edit`, and save its folder."""
    generation, inpaint_class, image_class = CLASSES[name]
    pipeline, region = PIPELINES[name](), np.zeros((8, 8), np.uint8)
    region[:2, 4:] = 255
    pipeline.source = {"model": "tiny"}
    inpaint = inpaint_class.from_pipe(pipeline)
    changing = image_class.from_pipe(inpaint, scheduler=RectifiedFlow(sampler="dpm++").scheduler())
    back = generation.from_pipe(changing)
    for other in (inpaint, changing, back):
        assert other.config.defaults == pipeline.config.defaults
        assert other.source == pipeline.source
        same = {key: other.components[key] is component for key, component in pipeline.components.items()}
        assert all(same[key] for key in same if key != "scheduler"), same
    assert type(back) is generation
    assert type(pipeline.scheduler) is not type(back.scheduler)
    options = {"control_image": {"mask": OTHER.mask}, "num_inference_steps": 2}

    found = inpaint("hair", FACE.image, region, generator=seeded(), **options).images[0]
    wanted = edit(pipeline, "hair", image=FACE.image, mask_image=region, generator=seeded(), **options).images[0]
    assert np.array_equal(found, wanted)
    (images,) = changing("hair", FACE.image, strength=0.5, generator=seeded(), return_dict=False, **options)
    wanted = edit(back, "hair", image=FACE.image, strength=0.5, generator=seeded(), **options)
    assert np.array_equal(images[0], wanted.images[0])
    assert type(inpaint("hair", FACE.image, region, method="flow_edit", **options).images[0]) is Image.Image

    inpaint.save_pretrained(tmp_path)
    assert type(load(tmp_path)) is generation
    again = inpaint_class.from_pretrained(tmp_path)
    again.set_progress_bar_config(disable=True)
    assert np.array_equal(again("hair", FACE.image, region, generator=seeded(), **options).images[0], found)
    for strength in (0, 2):
        with pytest.raises(InputError, match=f"strength is {strength}; it must be greater than 0 and at most 1"):
            changing("hair", FACE.image, strength=strength)
    with pytest.raises(InputError, match="image is of type NoneType; it must be a path"):
        changing("hair")
    with pytest.raises(InputError, match=r"Unknown component 'sampler'\. Available: .*scheduler"):
        image_class.from_pipe(pipeline, sampler=3)
    for other in CLASSES.values():
        if other[0] is not generation:
            with pytest.raises(InputError, match="the networks differ"):
                other[1].from_pipe(pipeline)


def test_batches_and_forms_of_images():
    """One image and mask per prompt, each image several times; all forms of an image are the same."""
    pipeline = MMFaceInpaintPipeline.from_pipe(tiny_pipeline())
    region, faces = np.zeros((2, 32, 32), bool), [FACE.image, OTHER.image]
    region[0, :8], region[1, 16:] = True, True
    options = {"output_type": "latent", "num_inference_steps": 2}
    single = [
        pipeline("hair", faces[i], region[i], generator=seeded(2 * i + j), **options).images[0]
        for i in range(2)
        for j in range(2)
    ]
    floats = np.stack(faces).astype(np.float32) / 255
    tensors = torch.from_numpy(floats).movedim(-1, 1)
    for images, masks in (
        (faces, list(region)),
        ([Image.fromarray(face) for face in faces], [Image.fromarray(mask) for mask in region]),
        (np.stack(faces), region[..., None]),
        (floats, list(region.astype(float))),
        (np.stack(faces).astype(int), list(region * 255)),
        (tensors, torch.from_numpy(region)[:, None].float()),
        (list((255 * tensors).byte()), list(torch.from_numpy(region).byte() * 255)),
    ):
        generators = [seeded(seed) for seed in range(4)]
        found = pipeline("hair", images, masks, num_images_per_prompt=2, generator=generators, **options)
        assert all(torch.equal(one, other) for one, other in zip(found.images, single, strict=True))
    tokens, _, pooled, _ = pipeline.encode_prompt("hair")
    embeds = {"prompt_embeds": tokens, "pooled_prompt_embeds": pooled, **options}
    for method in ("replacement", "flow_edit"):
        by_text, by_embeds, empty, none = (
            pipeline(prompt, faces, list(region), generator=seeded(), method=method, **given).images
            for prompt, given in (("hair", options), (None, embeds), ("", options), (None, options))
        )
        assert torch.equal(by_text, by_embeds)
        assert torch.equal(empty, none)
    some, empty = (
        pipeline(texts, FACE.image, generator=seeded(), **options).images for texts in (["a", None], ["a", ""])
    )
    assert torch.equal(some, empty)
    (note,) = pipeline("hair", FACE.image, source_prompt="face", generator=seeded(), **options).notes
    assert note == "source_prompt and source_control_image have no effect with the method replacement"
    with pytest.raises(InputError, match="2 values of image do not match 3 of prompt"):
        pipeline(["a", "b", "c"], faces)
    with pytest.raises(InputError, match=r"mask_image has shape \[2, 2, 2\]"):
        pipeline("a", FACE.image, np.zeros((2, 2, 2)))


def test_sizes_of_images():
    """An image is resized to the size of the call, which must be a trained one, or is upscaled."""
    pipeline, large = MMFaceImg2ImgPipeline.from_pipe(tiny_pipeline()), Image.fromarray(FACE.image).resize((96, 96))
    assert pipeline("", large).images[0].size == (32, 32)
    assert pipeline("", large, width=48, height=48, upscale=True).images[0].size == (48, 48)
    assert pipeline("", large, width=48, height=48, force_size=True, output_type="latent").images.shape[-1] == 6
    with pytest.raises(InputError, match="48x48"):
        pipeline("", large, width=48, height=48)


@pytest.mark.parametrize("method", METHODS)
def test_callbacks(method):
    """They see every step, can replace the latents and stop the edit; the pipeline keeps no state."""
    pipeline = MMFaceInpaintPipeline.from_pipe(PIPELINES["mmface"]())
    options = {"method": method, "strength": 0.5, "generator": seeded(), "output_type": "latent"}
    seen = []

    def callback(call, step, timestep, tensors):
        seen.append((step, float(timestep), call.num_timesteps, tuple(tensors)))
        call._interrupt = interrupt
        return {"latents": torch.full_like(tensors["latents"], 7.0)}

    interrupt = False
    ended = pipeline("hair", FACE.image, callback_on_step_end=callback, **options)
    assert [(step, total, names) for step, _, total, names in seen] == [(0, 2, ("latents",)), (1, 2, ("latents",))]
    assert seen[0][1] > seen[1][1] > 0
    assert (ended.images == 7).all()
    interrupt = True
    pipeline("hair", FACE.image, callback_on_step_end=callback, **options)
    assert len(seen) == 3
    assert not hasattr(pipeline, "_interrupt")
    with pytest.raises(InputError, match="Callbacks receive"):
        pipeline("hair", FACE.image, callback_on_step_end_tensor_inputs=["noise"])


@pytest.mark.parametrize("method", METHODS)
def test_callbacks_change_the_guidance_scale(method):
    """As in text to image: the following steps use it."""
    pipeline = MMFaceInpaintPipeline.from_pipe(PIPELINES["mmface"]())
    seen = []

    def stop_guidance(call, step, timestep, tensors):
        seen.append(call.guidance_scale)
        call._guidance_scale = 1.0
        return {}

    def make(**more) -> torch.Tensor:
        options = {"method": method, "generator": seeded(), "output_type": "latent", "guidance_scale": 3.0}
        return pipeline("hair", FACE.image, **options, **more).images

    stopped = make(callback_on_step_end=stop_guidance)
    assert seen == [3.0, 1.0, 1.0, 1.0]
    assert not torch.equal(stopped, make())
    assert not torch.equal(stopped, make(guidance_interval=(2.0, 2.0)))


@pytest.mark.parametrize("method", ["flow_edit", "inversion"])
def test_scales_of_conditions_that_the_given_image_lacks(method):
    pipeline = MMFaceInpaintPipeline.from_pipe(PIPELINES["mmface"]())
    given = {"method": method, "control_image": {"mask": FACE.mask}, "generator": seeded(), "output_type": "latent"}
    full = pipeline("hair", FACE.image, **given).images
    given["generator"] = seeded()
    assert not torch.equal(pipeline("hair", FACE.image, **given, conditioning_scale={"mask": 0.5}).images, full)


# Photographs

SIDE = 128


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    """A tiny model in a folder."""
    folder = tmp_path_factory.mktemp("model")
    tiny_pipeline().save_pretrained(folder)
    return folder


def face_image(number: int = 0) -> Image.Image:
    return Image.fromarray(draw_face(0, number, SIDE).image)


def saved(image: Image.Image, path: Path, **options) -> Path:
    image.save(path, **options)
    return path


def orientation(value: int) -> Image.Exif:
    exif = Image.Exif()
    exif[0x0112] = value
    return exif


PHOTOS = {
    "rgb.png": lambda path: saved(face_image(), path),
    "grey.png": lambda path: saved(face_image().convert("L"), path),
    "grey-alpha.png": lambda path: saved(face_image().convert("LA"), path),
    "grey-key.png": lambda path: saved(face_image().convert("L"), path, transparency=200),
    "palette.png": lambda path: saved(face_image().quantize(64), path),
    "photo.jpg": lambda path: saved(face_image().resize((320, 320)), path, quality=90),
    "turned.jpg": lambda path: saved(face_image().rotate(90, expand=True), path, exif=orientation(6)),
    "mirrored.png": lambda path: saved(face_image().transpose(0), path, exif=orientation(2)),
}


def alpha_photo(path: Path) -> Path:
    """Colors are hidden under transparent pixels."""
    image = face_image().convert("RGBA")
    image.putalpha(Image.linear_gradient("L").resize((SIDE, SIDE)))
    return saved(image, path, icc_profile=ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes())


PHOTOS["alpha.png"] = alpha_photo


@pytest.mark.parametrize("name", PHOTOS)
def test_every_other_pixel_is_that_of_the_photograph(name, model, tmp_path, capsys):
    photo, out = PHOTOS[name](tmp_path / name), tmp_path / ("out.webp" if name == "alpha.png" else "out.png")
    command = ("edit", photo, "red hair", "--region", "hair", "--keep", "skin", "--model", model, "--seed", 4)
    assert run(*command, "--out", out) == 0, capsys.readouterr().err
    assert "pixels changed outside it: 0" in capsys.readouterr().out
    recipe, _ = read_recipe(out)
    with Image.open(photo) as given, Image.open(out) as written:
        before, after = np.array(ImageOps.exif_transpose(given).convert("RGBA")), np.array(written.convert("RGBA"))
        assert written.info.get("icc_profile") == given.info.get("icc_profile")
        assert written.mode.startswith("L") == given.mode.startswith("L")
        packet = written.info.get(XMP_KEY) or written.info["xmp"].decode()
    assert COMPOSITE in packet
    changed = (before != after).any(-1)
    region = Image.fromarray(decode_raw(recipe["edit"]["region"], "sketch"))
    inside = np.array(region.resize(changed.shape[::-1], Image.Resampling.NEAREST)) > 0
    assert not changed[~inside].any()
    assert changed[inside].mean() > 0.5
    counts = recipe["edit"]["certificate"]
    assert counts == {
        "photo_pixels": changed.size,
        "region_pixels": inside.sum(),
        "changed_inside": changed.sum(),
        "changed_outside": 0,
    }
    # again from the recipe
    assert run("replay", out, "--model", model) == 2
    assert "is an edited photograph: pass the original with --photo" in capsys.readouterr().err
    again = tmp_path / f"again{out.suffix}"
    assert run("replay", out, "--model", model, "--photo", photo, "--out", again) == 0, capsys.readouterr().err
    assert again.read_bytes() == out.read_bytes()
    if name == "alpha.png":
        with Image.open(out) as written:
            written.putalpha(255)
            write_image(written, again, recipe)
        assert run("replay", again, "--model", model, "--photo", photo) == 2
        assert "its pixels were modified, or it is a lossy WebP" in capsys.readouterr().err


def test_an_edit_without_metadata(model, tmp_path, capsys):
    """The pixels and the color profile are the same; nothing else is in the file."""
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    photo = saved(face_image(), tmp_path / "photo.png", icc_profile=profile)
    command = ("edit", photo, "red hair", "--region", "hair", "--model", model, "--seed", 4)
    for suffix in ("png", "webp"):
        whole, bare = tmp_path / f"whole.{suffix}", tmp_path / f"bare.{suffix}"
        assert run(*command, "--out", whole) == 0, capsys.readouterr().err
        assert run(*command, "--out", bare, "--no-metadata") == 0, capsys.readouterr().err
        with Image.open(whole) as one, Image.open(bare) as other:
            np.testing.assert_array_equal(np.array(one), np.array(other))
            assert one.info["icc_profile"] == other.info["icc_profile"] == profile
        assert b"likeness" in whole.read_bytes()
        assert not [text for text in (b"likeness", b"red hair", COMPOSITE.encode()) if text in bare.read_bytes()]


def test_a_face_in_a_photograph(model, tmp_path, capsys):
    """Through the alignment, with a rotated face among two; masks of the photograph and of the aligned face."""
    canvas = Image.fromarray(np.random.default_rng(0).integers(90, 110, (300, 400, 3), np.uint8))
    canvas.paste(face_image().resize((90, 90)), (300, 10))
    canvas.paste(face_image(1).rotate(8, Image.Resampling.BICUBIC).resize((200, 200)), (20, 60))
    photo = open_photo(saved(canvas, tmp_path / "two.png"))

    def find(image: np.ndarray) -> list[np.ndarray]:
        """Landmarks of the pasted faces, in the whole photograph only."""
        if image.shape[0] != 300:
            return []
        return [drawn_landmarks(*pasted) / image.shape[1::-1] for pasted in (((300, 10), 90), ((20, 60), 200))]

    pipeline, options = load(model), {"parser": load_face_parser(), "find": find}
    request = PortraitRequest(prompt="hair", seed=1)
    large, small = (
        edit_photo(pipeline, photo, Change(region=["hair"], face=face), request, **options) for face in (None, 2)
    )
    assert large.notes[0].endswith("two.png has 2 faces: face 1 by size is used, at (120, 172)")
    for edited, box in ((large, (20, 60, 220, 260)), (small, (300, 10, 390, 100))):
        changed = (np.array(edited.image) != np.array(canvas)).any(-1)
        columns = np.nonzero(changed)[1]
        assert box[0] - 60 <= columns.min() <= columns.max() <= box[2] + 60
        assert (columns.mean() > 250) == (box[0] == 300)
        assert edited.certificate["changed_outside"] == 0 < edited.certificate["changed_inside"]
    for face in (0, 3):
        with pytest.raises(InputError, match=f"has 2 faces; there is no face {face}"):
            edit_photo(pipeline, photo, Change(region=["hair"], face=face), request, **options)
    # a face at the border
    cropped = canvas.crop((0, 0, 365, 300))
    cut = open_photo(saved(cropped, tmp_path / "cut.png"))
    edited = edit_photo(pipeline, cut, Change(region=["hair"], face=2), request, **options)
    assert any("% of the portrait is outside the photo; expect artifacts" in note for note in edited.notes)
    assert edited.certificate["changed_outside"] == 0 < edited.certificate["changed_inside"]
    hair = np.full((300, 365), CLASS_INDEX["hair"], np.uint8)  # a mask of the photograph ends at its border
    (tmp_path / "hair.png").write_bytes(CONDITIONS["mask"].encode(hair))
    change = Change(mask=tmp_path / "hair.png", face=2)
    plan = plan_edit(cut, change, SIDE, parser=options["parser"], find=find)
    inside = in_portrait(np.ones_like(hair), cut, plan.transform, len(plan.after), "mask") > 0
    assert (plan.after[inside] == CLASS_INDEX["hair"]).all()
    assert np.array_equal(plan.after[~inside], plan.before[~inside])
    assert 0.5 < inside.mean() < 0.99
    # a region painted on the photograph
    painted = np.zeros((300, 400), np.uint8)
    painted[100:150, 80:160] = 255
    edited = edit_photo(pipeline, photo, Change(region_mask=Image.fromarray(painted)), request, **options)
    changed = (np.array(edited.image) != np.array(canvas)).any(-1)
    assert not changed[(ndimage.maximum_filter(painted, 5) == 0)].any()
    assert changed[painted > 0].mean() > 0.5
    layer = Image.fromarray(painted).convert("RGB")  # white strokes on a transparent layer: the same region
    layer.putalpha(Image.fromarray(painted))
    again = edit_photo(pipeline, photo, Change(region_mask=layer), request, **options)
    assert again.image.tobytes() == edited.image.tobytes()
    for region in (painted[:, :300][:100], np.rot90(painted)):
        with pytest.raises(InputError, match="it must be 400x300 as the photograph, or square"):
            edit_photo(pipeline, photo, Change(region_mask=Image.fromarray(region.copy())), request, **options)
    painted[:] = 0
    painted[:20, :20] = 255
    with pytest.raises(InputError, match="outside the aligned face"):
        edit_photo(pipeline, photo, Change(region_mask=Image.fromarray(painted), face=2), request, **options)


def drawn_landmarks(place: tuple[int, int], side: int) -> np.ndarray:
    """Landmarks [478, 2] in pixels of a portrait that was pasted at a place."""
    parts = {name: np.array(TRAINED[name]) * side + place for name in TRAINED}
    points = np.tile(np.mean(list(parts.values()), axis=0), (478, 1))
    points[list(STROKES["r_eye"][3])], points[list(STROKES["l_eye"][3])] = parts["right eye"], parts["left eye"]
    points[[61, 291]] = parts["mouth"]
    points[[234, 454]] += [[-side / 4, 0], [side / 4, 0]]
    return points


def test_only_what_was_painted_changes(tmp_path):
    """A mask of the photograph's own size or twice its size, as pages paint on it, differs in the strokes only."""
    file, parser = Path(__file__).parents[2] / "examples/faces/images/1.png", load_face_parser()
    photo = open_photo(file)
    (own,) = parse_faces(parser[0], [photo.pixels], size=parser[1])
    change = Change(mask=tmp_path / "mask.png")
    for factor in (1, 2):
        mask = np.kron(own, np.ones((factor, factor), np.uint8))
        change.mask.write_bytes(CONDITIONS["mask"].encode(mask))
        with pytest.raises(InputError, match="the region is empty: the mask does not change"):
            plan_edit(photo, change, 128, parser=parser)
        mask[: 20 * factor, : 30 * factor] = CLASS_INDEX["hat"]
        change.mask.write_bytes(CONDITIONS["mask"].encode(mask))
        plan = plan_edit(photo, change, 128, parser=parser)
        assert (plan.before != plan.after).sum() == 20 * 30
        assert not plan.region[40:].any()


def test_masks_and_whole_portraits(model, tmp_path, capsys):
    """All ways to name a region; the wanted mask is the condition."""
    photo = saved(face_image(), tmp_path / "a.png")
    other = tmp_path / "other mask.png"
    other.write_bytes(CONDITIONS["mask"].encode(draw_face(0, 1, SIDE).mask))
    command = ("edit", photo, "--model", model, "--seed", 4, "--out", tmp_path / "b.png")
    sizes, methods = [], []
    for changes in (
        ("--mask-edit", "grow hair 6; shrink hair 2px"),
        ("--mask-edit", "grow hair 6", "--keep", "all but hair", "--method", "flow_edit"),
        ("--mask-edit", f"paste hair from '{other}'"),
        ("--mask", other, "--steps", 8),
        ("--strength", 0.5),
    ):
        assert run(*command, *changes) == 0, capsys.readouterr().err
        recipe, _ = read_recipe(tmp_path / "b.png")
        sizes.append(recipe["edit"]["certificate"]["region_pixels"])
        methods.append(recipe["edit"]["method"])
        assert run("replay", tmp_path / "b.png", "--model", model, "--photo", photo) == 0
    assert sizes[1] < sizes[0] < SIDE**2
    assert sizes[-1] == SIDE**2
    assert methods == [
        "flow_edit",
        "flow_edit",
        "flow_edit",
        "inversion",
        "replacement",
    ]  # the best for each, by default
    assert recipe["edit"]["strength"] == 0.5


def test_inpainting_with_a_trained_model(prepared_faces, tmp_path, capsys):
    """A model that was trained with holes edits and replays through the command line; another is rejected."""
    recipe = small(prepared_faces, {"mask": 0.5, "photo": 0.5}, optimizer={"images": 8})
    photo, model = saved(face_image(), tmp_path / "a.png"), loop.train(recipe, tmp_path / "run")
    command = ("edit", photo, "--region", "hair", "--method", "inpainting", "--seed", 4, "--out", tmp_path / "b.png")
    assert run(*command, "--model", model) == 0, capsys.readouterr().err
    again = ("replay", tmp_path / "b.png", "--photo", photo, "--out", tmp_path / "c.png", "--model", model)
    assert run(*again) == 0, capsys.readouterr().err
    assert (tmp_path / "b.png").read_bytes() == (tmp_path / "c.png").read_bytes()
    assert run(*command[:-2], "--out", tmp_path / "d.png", "--model", "mmface-mini") == 2
    assert "inpainting requires a network with the condition photo" in capsys.readouterr().err
    assert not (tmp_path / "d.png").exists()


def deep(image: Image.Image) -> Image.Image:
    return Image.fromarray(np.asarray(image.convert("L")).astype(np.uint16) * 257)


def rgb16(path: Path) -> Path:
    """A PNG of 16-bit RGB, which Pillow reads but does not write."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", 32, 32, 16, 2, 0, 0, 0)
    rows = zlib.compress((b"\0" + bytes(32 * 6)) * 32)
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", rows) + chunk(b"IEND", b""))
    return path


REJECTED = {
    "16 bits": (lambda p: saved(deep(face_image()), p / "a.png"), (), "has 16 bits per value"),
    "16-bit RGB": (lambda p: rgb16(p / "a.png"), (), "has 16 bits per value"),
    "CMYK": (lambda p: saved(face_image().convert("CMYK"), p / "a.jpg"), (), "is a CMYK image"),
    "no face": (lambda p: saved(Image.new("RGB", (64, 64), "green"), p / "a.png"), (), "shows no face that the parser"),
    "not square": (lambda p: saved(face_image().crop((0, 0, 64, 128)), p / "a.png"), (), "not a square portrait: pass"),
    "100 megapixels": (lambda p: saved(Image.new("1", (10000, 10000)), p / "a.png"), (), "has too many pixels"),
    "100 megapixels, JPEG": (lambda p: saved(Image.new("L", (10000, 10000)), p / "a.jpg"), (), "has too many pixels"),
    "no file": (lambda p: p / "a.png", (), "does not exist"),
    "JPEG": (None, ("--out", "b.jpg"), "b.jpg must end in .png or .webp"),
    "another format": (None, ("--out", "b.tiff"), "b.tiff must end in .png or .webp"),
    "folder": (lambda p: (p / "d.png").mkdir() or saved(face_image(), p / "a.png"), ("--out", "d.png"), "is a folder"),
    "onto itself": (None, ("--out", "a.png"), "would overwrite the input"),
    "onto a mask": (None, ("--mask-edit", "paste hair from black.png", "--out", "black.png"), "would overwrite the"),
    "nothing": (None, ("--region", ""), "nothing to edit: pass --mask-edit, --mask, --region, --region-mask or"),
    "class": (None, ("--region", "hear"), "Unknown class 'hear'"),
    "absent class": (None, ("--region", "necklace"), "the region is empty"),
    "kept": (None, ("--region", "hair", "--keep", "hair"), "the region is empty"),
    "edit": (None, ("--mask-edit", "grwo hair 8"), "Unknown edit 'grwo'. Did you mean grow"),
    "short edit": (None, ("--mask-edit", "grow hair"), "cannot be read: write grow CLASSES BY"),
    "quote": (None, ("--mask-edit", "paste hat from 'a"), "has an open quote"),
    "empty source": (None, ("--mask-edit", "paste hat from"), "cannot be read: write paste CLASSES from FILE"),
    "empty class": (None, ("--mask-edit", "grow hair 8 over"), "cannot be read: write grow CLASSES BY"),
    "no source": (None, ("--mask-edit", "paste hat"), "cannot be read: write paste CLASSES from FILE"),
    "black": (None, ("--region-mask", "black.png"), "the region is empty"),
    "strength": (None, ("--strength", "1.5"), "strength is 1.5"),
    "face": (None, ("--region", "hair", "--face", "2"), "face 2 cannot be found without"),
    "method": (None, ("--region", "hair", "--method", "magic"), "Unknown method 'magic'"),
}


@pytest.mark.parametrize("case", REJECTED)
def test_bad_input(case, model, tmp_path, monkeypatch, capsys):
    """One sentence, exit code 2, and no file."""
    monkeypatch.chdir(tmp_path)
    make, arguments, said = REJECTED[case]
    saved(Image.new("RGB", (64, 64)), tmp_path / "black.png")
    photo = (make or (lambda p: saved(face_image(), p / "a.png")))(tmp_path)
    before = {path.name: path.is_file() and path.read_bytes() for path in tmp_path.iterdir()}
    arguments = arguments if "--out" in arguments else (*arguments, "--out", "b.png")
    arguments = arguments if make is None and arguments[0] != "--out" else (*arguments, "--region", "hair")
    assert run("edit", photo, "--model", model, *arguments) == 2
    error = capsys.readouterr().err
    assert said in error
    assert error.count("\n") == 1
    assert {path.name: path.is_file() and path.read_bytes() for path in tmp_path.iterdir()} == before


def test_recipes_of_other_photographs(model, tmp_path, capsys):
    photo, out = saved(face_image(), tmp_path / "a.png"), tmp_path / "b.png"
    assert run("edit", photo, "--region", "hair", "--model", model, "--out", out) == 0
    capsys.readouterr()
    before = photo.read_bytes()
    for image, given, again, said in (
        (out, saved(face_image(1), tmp_path / "c.png"), "d.png", "is not the photograph that was edited"),
        (photo, photo, "d.png", "has no recipe"),
        (out, photo, "a.png", "would overwrite the input"),
    ):
        assert run("replay", image, "--model", model, "--photo", given, "--out", tmp_path / again) == 2
        assert said in capsys.readouterr().err
    assert photo.read_bytes() == before
    recipe, pixels = read_recipe(out)
    for changes, said in (
        ({"transform": [[1e-9, 0, 0], [0, 1e-9, 0]]}, "its transform or its method is invalid"),
        ({"transform": [[float("nan")] * 3] * 2}, "its transform or its method is invalid"),
        ({"transform": [[1.0, 0.0], [1.0]]}, "another shape than [2, 3]"),
        ({"method": "magic"}, "its transform or its method is invalid"),
        ({"before": encode_raw(np.zeros((8, 8), np.uint8))}, "its region and its masks do not match"),
        ({"region": recipe["edit"]["before"]}, "its region and its masks do not match"),
        ({"region": {"png": "?"}}, "is damaged"),
        ({"strength": 7.0}, "strength is 7"),
        ({"width": 7}, "it was edited"),
    ):
        damaged = {**recipe, "edit": {**recipe["edit"], **changes}}
        write_image(Image.fromarray(pixels), tmp_path / "damaged.png", damaged)
        assert run("replay", tmp_path / "damaged.png", "--model", model, "--photo", photo) == 2, changes
        assert said in capsys.readouterr().err, changes
    with pytest.raises(InputError, match="would change every pixel"):
        write_image(Image.fromarray(pixels), tmp_path / "lossy.jpg", recipe)
    assert not (tmp_path / "lossy.jpg").exists()


def test_generated_grays_are_converted_to_the_profile(tmp_path):
    """A gray photograph with linear values looks as one in sRGB, and so does its edit."""
    gray = np.array(face_image().convert("L")) / 255
    linear = np.where(gray <= 0.04045, gray / 12.92, ((gray + 0.055) / 1.055) ** 2.4)
    dark = Image.fromarray(np.rint(255 * linear).astype(np.uint8))
    plain = open_photo(saved(face_image().convert("L"), tmp_path / "a.png"))
    photos = plain, open_photo(saved(dark, tmp_path / "b.png", icc_profile=LINEAR))
    assert np.abs(photos[0].pixels.astype(int) - photos[1].pixels).mean() < 3
    pipeline, parser, request = tiny_pipeline(), load_face_parser(), PortraitRequest(seed=1)
    pipeline.source = {"model": "tiny"}
    edited = [edit_photo(pipeline, photo, Change(region=["hair"]), request, parser=parser) for photo in photos]
    found = [
        np.array(read_rgb(saved(each.image, tmp_path / "c.png", icc_profile=photo.profile))).astype(int)
        for each, photo in zip(edited, photos, strict=True)
    ]
    inside = np.array(edited[0].image) != np.array(face_image().convert("L"))
    assert np.abs(found[0] - found[1])[inside].mean() < 6


def icc_tag(kind: bytes, content: bytes) -> bytes:
    """The content of a tag of an ICC profile, padded to 4 bytes."""
    return (kind + bytes(4) + content).ljust(-(-(8 + len(content)) // 4) * 4, b"\0")


def linear_gray_profile() -> bytes:
    """An ICC profile of gray values that are proportional to the luminance."""
    white = struct.pack(">3i", *(round(value * 65536) for value in (0.9642, 1.0, 0.8249)))
    tags = {
        b"desc": icc_tag(b"desc", struct.pack(">I", 7) + b"linear\0" + bytes(78)),
        b"wtpt": icc_tag(b"XYZ ", white),
        b"kTRC": icc_tag(b"curv", bytes(4)),  # no entries: the identity
    }
    start, table, data = 132 + 12 * len(tags), b"", b""
    for name, content in tags.items():
        table += name + struct.pack(">II", start + len(data), len(content))
        data += content
    size = struct.pack(">I", start + len(data))
    header = size + bytes(4) + bytes([2, 0x40, 0, 0]) + b"mntrGRAYXYZ " + bytes(12) + b"acsp" + bytes(28) + white
    return header.ljust(128, b"\0") + struct.pack(">I", len(tags)) + table + data


LINEAR = linear_gray_profile()


def test_generated_colors_are_converted_to_the_profile(tmp_path):
    """A photograph whose profile swaps red and blue looks the same, and so does its edit."""
    srgb = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    swapped = Image.fromarray(np.ascontiguousarray(np.array(face_image())[..., ::-1]))
    plain = open_photo(saved(face_image(), tmp_path / "a.png"))
    other = open_photo(saved(swapped, tmp_path / "b.png", icc_profile=swap_primaries(srgb)))
    pipeline, parser, request = tiny_pipeline(), load_face_parser(), PortraitRequest(seed=1)
    pipeline.source = {"model": "tiny"}
    found = [
        np.array(edit_photo(pipeline, photo, Change(region=["hair"]), request, parser=parser).image).astype(int)
        for photo in (plain, other)
    ]
    inside = (found[0] != np.array(face_image())).any(-1)
    assert np.abs(found[0] - found[1][..., ::-1])[inside].mean() < 5 < np.abs(found[0] - found[1])[inside].mean()
