"""The MDiTFace pipeline: FLUX without conditions, the static cache, guidance, files, commands.

`test_pipeline.py` tests what both pipelines have in common.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import FluxPipeline
from PIL import Image

from builders import (
    run,
    save_components,
    tiny_flux_pipeline,
    tiny_mditface,
    tiny_mditface_pipeline,
    tiny_pipeline,
    two_text_encoders,
)
from likeness.conditions import CONDITIONS
from likeness.data.synthetic import draw_face
from likeness.encoders.latent import to_tensor
from likeness.encoders.text import encode_text
from likeness.models.layers import patchify
from likeness.models.mditface import MDiTFaceTransformer
from likeness.objectives.flow import dynamic_shift
from likeness.pipelines.load import load
from likeness.pipelines.mditface import MDiTFacePipeline
from likeness.prepare.components import pack_model
from likeness.types import ConditionInput, InputError, TextFeatures
from likeness.weights.hashes import pipeline_hash

PROMPT, NEGATIVE = "a woman with red hair", "a man"
MODES = ("holistic", "hard", "decoupled", "concat")


@pytest.fixture(scope="module")
def face() -> dict[str, np.ndarray]:
    drawn = draw_face(0, 0, 64)
    return {"mask": drawn.mask, "sketch": drawn.sketch, "keypoints": drawn.keypoints}


@pytest.fixture(scope="module", params=[True, False], ids=["dev", "schnell"])
def flux(request, tmp_path_factory) -> tuple[FluxPipeline, Path]:
    """A whole FLUX.1, and its folder."""
    pipeline = tiny_flux_pipeline(guidance_embeds=request.param)
    folder = tmp_path_factory.mktemp("flux")
    pipeline.save_pretrained(folder)
    return pipeline, folder


def seed(number: int = 7) -> torch.Generator:
    return torch.Generator().manual_seed(number)


# --- FLUX.1


@pytest.mark.parametrize(("height", "width"), [(32, 32), (48, 64)])
def test_without_a_condition_it_is_flux(flux, height, width):
    """The same noise, text, steps, codec: the same latents and images as diffusers' own pipeline."""
    theirs, folder = flux
    ours = load(folder)
    size = {"height": height, "width": width, "num_inference_steps": 5}
    guidance = {"guidance_scale": 3.5} if ours.transformer.config.guidance_embeds else {}
    for kind in ("latent", "np"):
        wanted = theirs(PROMPT, generator=seed(), output_type=kind, **size, **guidance).images
        found = ours(PROMPT, generator=seed(), output_type=kind, **size, **guidance).images
        if kind == "latent":
            assert wanted.abs().mean() > 0.1
            torch.testing.assert_close(patchify(found, 2), wanted, atol=1e-4, rtol=0)
        else:
            np.testing.assert_allclose(found, wanted, atol=1e-4)


def test_true_guidance_is_flux_s():
    theirs = tiny_flux_pipeline(guidance_embeds=False)
    ours = MDiTFacePipeline(
        **{n: p for n, p in theirs.components.items() if p is not None and n != "transformer"},
        transformer=tiny_mditface(guidance_embeds=False),
        sizes="any",
    )
    ours.transformer.load_state_dict(theirs.transformer.state_dict(), strict=False)
    size = {"height": 32, "width": 32, "num_inference_steps": 4, "output_type": "latent"}
    wanted = theirs(PROMPT, negative_prompt=NEGATIVE, true_cfg_scale=2.5, generator=seed(), **size).images
    found = ours(PROMPT, NEGATIVE, guidance_scale=2.5, generator=seed(), **size).images
    torch.testing.assert_close(patchify(found, 2), wanted, atol=1e-4, rtol=0)
    plain = ours(PROMPT, NEGATIVE, guidance_scale=1.0, generator=seed(), **size).images
    assert (found - plain).abs().max() > 1e-2


def test_flux_alone_takes_words_only(flux, face):
    _, folder = flux
    pipeline = load(folder)
    with pytest.raises(InputError, match="not trained with mask: it takes text only"):
        pipeline(PROMPT, control_image={"mask": face["mask"]})
    dev = pipeline.transformer.config.guidance_embeds
    wanted = {"size": 512, "steps": 28, "guidance_scale": 3.5} if dev else {"steps": 4, "guidance_scale": 1.0}
    assert wanted.items() <= pipeline.config.defaults.items()
    assert (pipeline.config.latent_mean, pipeline.config.latent_std) == (0.1159, 1 / 0.3611)
    assert pipeline.config.max_text_tokens == 512


def test_flux_s_own_transformer_is_rejected(flux):
    with pytest.raises(InputError, match=r"FluxTransformer2DModel: load FLUX\.1 with likeness\.load"):
        MDiTFacePipeline.from_pretrained(flux[1])
    transformer = MDiTFaceTransformer.from_pretrained(flux[1], subfolder="transformer")
    assert MDiTFacePipeline.from_pretrained(flux[1], transformer=transformer).tokenizer_2 is not None


def test_what_is_not_flux_is_rejected(flux, tmp_path):
    folder = tmp_path / "flux"
    flux[0].save_pretrained(folder)
    (folder / "transformer" / "diffusion_pytorch_model.safetensors").unlink()
    with pytest.raises(InputError, match=r"The FluxPipeline in .* cannot be loaded"):
        load(folder)
    parts = {name: part for name, part in flux[0].components.items() if part is not None}
    parts |= {"transformer": tiny_mditface(), "tokenizer_2": None}
    with pytest.raises(InputError, match="must both be set"):
        MDiTFacePipeline(**parts)


def test_steps_move_towards_noise_with_the_size():
    """FLUX.1-dev's numbers: 0.5 at 256 tokens, 1.15 at 4096; 512 px are 1024 tokens."""
    config = tiny_flux_pipeline().scheduler.config
    assert [round(dynamic_shift(tokens, config), 4) for tokens in (256, 1024, 4096)] == [0.5, 0.63, 1.15]
    seen = []
    pipeline = two_text_encoders()
    watch = lambda pipe, i, timestep, given: seen.append(float(timestep)) or {}  # noqa: E731
    for size in (32, 64):
        pipeline(PROMPT, height=size, width=size, force_size=True, generator=seed(), callback_on_step_end=watch)
    small, large = seen[:4], seen[4:]
    assert small[0] == large[0] == 1000
    assert all(750 - 250 * i < a < b for i, (a, b) in enumerate(zip(small[1:], large[1:], strict=True)))


# --- Conditions


@torch.no_grad()
def by_hand(pipeline, prompt, negative, controls, guidance, interval, steps=4) -> torch.Tensor:
    """The whole generation at 32 px, every step from scratch: no cache, one pass a forward."""
    network, names = pipeline.transformer, pipeline.transformer.config.condition_names
    encode = lambda text: encode_text(pipeline.tokenizer, pipeline.text_encoder, [text], max_tokens=12)  # noqa: E731
    text = [encode(prompt), encode(negative)]
    x = torch.randn((1, 4, 4, 4), generator=seed())
    for i in range(steps):
        t = 1 - i / steps
        active = {name: c for name, c in controls.items() if c[2] <= i / steps < c[3]}
        kinds = {name: CONDITIONS[name] for name in active}
        images = [kind.render(kind.resize(active[name][0], 32, 32), 32, 32) for name, kind in kinds.items()]
        latents = pipeline.codec.encode(to_tensor(images))[None] if images else x[:, None][:, :0]
        rows = torch.tensor([[names.index(name) for name in active]], dtype=torch.long)
        scale = torch.tensor([[c[1] for c in active.values()]], dtype=torch.float32)
        time = torch.tensor([1000 * t])
        prompted, unprompted = (
            network(x, time, TextFeatures(*one), latents, rows, condition_scale=scale) for one in text
        )
        g = guidance if interval[0] <= t <= interval[1] else 1.0
        x = x - (unprompted + g * (prompted - unprompted)) / steps
    return x


@pytest.mark.parametrize("attention", MODES)
@pytest.mark.parametrize(("guidance", "interval"), [(1.0, (0, 1)), (3.0, (0, 1)), (3.0, (0.4, 0.8)), (0.0, (0.4, 0.8))])
def test_a_generation_is_its_formula(face, attention, guidance, interval):
    """Guidance, strengths and intervals of conditions equal a generation without caches."""
    pipeline = tiny_mditface_pipeline(attention=attention)
    controls = {"mask": (face["mask"], 0.5, 0.0, 0.75), "sketch": (face["sketch"], 1.0, 0.5, 1.0)}
    found = pipeline(
        PROMPT,
        NEGATIVE,
        {name: c[0] for name, c in controls.items()},
        conditioning_scale={name: c[1] for name, c in controls.items()},
        control_guidance_start={name: c[2] for name, c in controls.items()},
        control_guidance_end={name: c[3] for name, c in controls.items()},
        guidance_scale=guidance,
        guidance_interval=interval,
        generator=seed(),
        output_type="latent",
    ).images
    wanted = by_hand(pipeline, PROMPT, NEGATIVE, controls, guidance, interval)
    torch.testing.assert_close(found, wanted, atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize(("attention", "runs"), [("holistic", 0), ("hard", 1), ("decoupled", 1), ("concat", 0)])
def test_the_static_pathway_runs_once(face, attention, runs):
    """For prompt and negative prompt, all conditions and all steps together; not at all without a condition."""
    pipeline, seen = tiny_mditface_pipeline(attention=attention), []

    class Counting(MDiTFaceTransformer):
        def static_pathway(self, text, pooled, condition_latents, condition_index):
            seen.append(tuple(condition_index.shape))
            return super().static_pathway(text, pooled, condition_latents, condition_index)

    pipeline.transformer.__class__ = Counting
    both = {"mask": face["mask"], "sketch": face["sketch"]}
    pipeline(PROMPT, control_image=both, guidance_interval=(0.3, 0.9), control_guidance_end={"mask": 0.5})
    assert seen == [(2, 2)] * runs
    pipeline(PROMPT)
    pipeline(PROMPT, control_image=both, conditioning_scale=0.0)
    assert len(seen) == runs


@pytest.mark.parametrize("own", [False, True])
@pytest.mark.parametrize("make", [tiny_pipeline, tiny_mditface_pipeline], ids=["mmface", "mditface"])
@pytest.mark.parametrize("guidance", [0.0, 1.0, 3.0])
def test_a_batch_that_runs_together_gives_the_same_images(face, make, guidance, own):
    """As on an accelerator: images with and without text, negative prompt and conditions in one forward."""
    pipeline = make()

    class Together(type(pipeline)):
        def groups(self, count: int, device: torch.device) -> list[range]:
            return [range(count)]

    given = {
        "prompt": [PROMPT, "", "a man", PROMPT],
        "negative_prompt": [NEGATIVE, "", "a man", ""],
        "control_image": {"mask": [face["mask"], None, face["mask"], None], "sketch": [face["sketch"]] * 3 + [None]},
    }
    given |= {"guidance_scale": guidance, "control_guidance_end": {"sketch": 0.5}, "output_type": "np"}
    if own:
        weak, late = ConditionInput(image=face["mask"], scale=0.3), ConditionInput(image=face["mask"], start=0.5)
        given["control_image"]["mask"] = [face["mask"], None, weak, late]
    alone = pipeline(**given, generator=[seed(i) for i in range(4)]).images
    pipeline.__class__ = Together
    together = pipeline(**given, generator=[seed(i) for i in range(4)]).images
    np.testing.assert_allclose(together, alone, atol=1e-4)


# --- A guidance-distilled network


def test_distilled_guidance(face):
    """The network embeds g, 1 outside the interval; true guidance never acts."""
    pipeline = two_text_encoders()
    make = lambda **more: pipeline(PROMPT, generator=seed(), output_type="latent", **more).images  # noqa: E731
    three = make(guidance_scale=3.0)
    assert (three - make(guidance_scale=2.0)).abs().max() > 1e-3
    assert torch.equal(make(), make(guidance_scale=3.5))
    assert torch.equal(make(guidance_scale=3.0, guidance_interval=(2.0, 2.0)), make(guidance_scale=1.0))
    assert (three - make(guidance_scale=3.0, guidance_interval=(0.0, 0.5))).abs().max() > 1e-3
    with pytest.raises(InputError, match="has no negative prompt: leave 'a man' out"):
        pipeline(PROMPT, NEGATIVE)


def test_two_text_encoders_give_each_picture_its_own_bits(face):
    """Text through T5 and CLIP, masks, and no input: bit-identical individually and batched."""
    pipeline = two_text_encoders()
    prompts, masks = [PROMPT, "", "a man with a beard"], [face["mask"], face["mask"], None]
    generators = [seed(i) for i in range(3)]
    both = pipeline(prompts, control_image={"mask": masks}, generator=generators, output_type="np").images
    for i, (prompt, mask, image) in enumerate(zip(prompts, masks, both, strict=True)):
        control = {} if mask is None else {"mask": mask}
        alone = pipeline(prompt, control_image=control, generator=seed(i), output_type="np").images[0]
        assert np.array_equal(alone, image)


def test_both_text_encoders_matter_and_truncated_text_are_told():
    pipeline = two_text_encoders()
    make = lambda pipe: pipe(PROMPT, generator=seed(), output_type="latent").images  # noqa: E731
    before = make(pipeline)
    for name in ("text_encoder", "text_encoder_2"):
        other = two_text_encoders()
        with torch.no_grad():
            for parameter in getattr(other, name).parameters():
                parameter.mul_(0.5)
        assert (make(other) - before).abs().max() > 1e-4
    notes = pipeline("a woman with red hair and " + "a blue hat " * 9, num_inference_steps=1).notes
    assert any("longer than 12 tokens" in note and "blue hat" in note for note in notes)


def test_two_text_encoders_are_saved_and_loaded(tmp_path, face):
    pipeline = two_text_encoders(spatial_stream="full")
    pipeline.save_pretrained(tmp_path)
    again = load(tmp_path)
    make = lambda pipe: pipe(PROMPT, control_image=face, generator=seed(), output_type="np").images  # noqa: E731
    assert np.array_equal(make(again), make(pipeline))
    assert pipeline_hash(again) == pipeline_hash(pipeline)
    with torch.no_grad():
        next(again.text_encoder_2.parameters()).mul_(2)
    assert pipeline_hash(again) != pipeline_hash(pipeline)


# --- Files and commands


@pytest.fixture(scope="module")
def folder(tmp_path_factory, face) -> Iterator[Path]:
    """A trained model as `train` publishes it, packed next to `common`; a mask."""
    root = tmp_path_factory.mktemp("mditface")
    save_components(root / "common")
    pipeline = tiny_mditface_pipeline()
    pipeline.save_pretrained(root / "run")
    from likeness.encoders.components import load_components

    codec = load_components(root / "common").codec_hash
    (root / "run" / "codec.json").write_text(json.dumps({"codec": codec}))
    pack_model(root / "run", root / "mini")
    Image.fromarray(face["mask"]).save(root / "mask.png")
    return root


def test_packed(folder, face):
    assert {path.name for path in (folder / "mini").iterdir()} == {
        "codec.json",
        "model_index.json",
        "scheduler",
        "transformer",
    }
    make = lambda pipe: pipe(PROMPT, control_image=face, generator=seed(), output_type="np").images  # noqa: E731
    packed, whole = load(folder / "mini"), load(folder / "run")
    assert type(packed) is type(whole) is MDiTFacePipeline
    assert np.array_equal(make(whole), make(tiny_mditface_pipeline()))
    np.testing.assert_allclose(make(packed), make(whole), atol=0.02)


def test_generate_and_replay(folder, tmp_path, capsys):
    out = tmp_path / "face.png"
    given = ("a man", "--mask", folder / "mask.png", "--mask-scale", 0.7, "--model", folder / "mini", "--seed", 5)
    assert run("generate", *given, "--negative-prompt", "hat", "--control-guidance-end", 0.6, "--out", out) == 0
    assert run("replay", out, "--model", folder / "mini") == 0
    assert "bit-identical" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--base", "somewhere"], "is not an adapter: leave the base model"),
        (["--size", "40", "--force-size"], "multiples of 16"),
        (["--guidance-scale", "-1"], "guidance scale"),
    ],
)
def test_bad_input(folder, tmp_path, capsys, arguments, message):
    assert run("generate", "a man", "--model", folder / "mini", "--out", tmp_path / "face.png", *arguments) == 2
    assert message in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_verify(folder, tmp_path):
    """`likeness verify mditface` measures what the paper measured. Resizing has no effect without FID."""
    faces, out = tmp_path / "faces", tmp_path / "verified"
    assert run("prepare", "synthetic", faces, "--count", 3, "--size", 64) == 0
    settings = ("--steps", 1, "--guidance-scale", 2, "--caption", "first", "--file-format", "png")
    bundled = ("face_parser=bundled", "text_image=bundled")
    assert run("verify", "mditface", folder / "mini", faces, *bundled, "--out", out, *settings) == 0
    found = json.loads((out / "verification.json").read_text())
    assert found["published"]["pixel_accuracy"] == pytest.approx(0.9464)
    (trial,) = found["trials"]
    assert 0 <= trial["pixel_accuracy"][0] <= 1
