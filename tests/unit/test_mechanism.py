"""`benchmarks/mechanism.py`: known values, values computed in another way, and bit-identical images."""

from __future__ import annotations

import json
from itertools import combinations
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch.nn import functional as F

from builders import load_script, tiny_face_parser, tiny_mditface_pipeline, tiny_pipeline
from likeness.annotators.face_parser import parse_faces
from likeness.conditions import CONDITIONS
from likeness.data.synthetic import draw_face
from likeness.evaluate.scores import pixel_accuracy
from likeness.pipelines.generate import generate, resolve
from likeness.types import ConditionInput, InputError, PortraitRequest

mechanism = load_script(Path(__file__).parents[2] / "benchmarks" / "mechanism.py")
DOUBLE, SINGLE = ("double 0", "double 1"), ("single 0", "single 1")


def request_for(pipeline, *names: str, **more) -> PortraitRequest:
    face = draw_face(0, 0, 64)
    control = {name: getattr(face, name) for name in names}
    return resolve(
        PortraitRequest(
            prompt="a woman with red hair",
            conditions={name: ConditionInput(image=image) for name, image in control.items()},
            seed=3,
            **more,
        ),
        pipeline,
    )


# --- Keys over time


@pytest.mark.parametrize("attention", ["holistic", "hard", "decoupled"])
def test_key_similarity_equals_all_pairs(attention):
    """Equal to the mean over all pairs of keys before rotation, which does not change angles."""
    pipeline = tiny_mditface_pipeline(attention=attention)
    request = request_for(pipeline, "mask")
    before = generate(pipeline, request, [3])[0][0].tobytes()
    seen: dict[str, list[torch.Tensor]] = {"keys": [], "values": []}
    last = pipeline.transformer.single_transformer_blocks[1].spatial.attn
    last.norm_k.register_forward_hook(lambda *call: seen["keys"].append(call[2][0]))
    last.to_v.register_forward_hook(lambda *call: seen["values"].append(call[2][0].unflatten(-1, (2, 16))))
    found = mechanism.key_similarity(pipeline, request)
    assert found["layers"] == [*DOUBLE, *SINGLE]
    assert found["trained_as"] == attention == pipeline.transformer.config.attention
    assert found["times"] == [1000, 750, 500, 250]
    for part, vectors in seen.items():
        assert len(vectors) == 4
        cosines = [F.cosine_similarity(a, b, dim=-1).mean().item() for a, b in combinations(vectors, 2)]
        assert found[part]["mask"]["pairs"][-1] == pytest.approx(np.mean(cosines), abs=1e-5)
        first = [F.cosine_similarity(vectors[0], b, dim=-1).mean().item() for b in vectors]
        assert found[part]["mask"]["to_first"][-1] == pytest.approx(first, abs=1e-5)
        assert set(found[part]) == {"text", "image", "mask"}
    assert generate(pipeline, request, [3])[0][0].tobytes() == before


def test_similarity_without_time_is_1():
    """If modulations do not depend on time, text and mask are constant in the first block, but the image is not."""
    pipeline = tiny_mditface_pipeline()
    block = pipeline.transformer.transformer_blocks[0]
    with torch.no_grad():
        for norm in (block.spatial.norm1, block.norm1_context, block.norm1):
            norm.linear.weight.zero_()
    found = mechanism.key_similarity(pipeline, request_for(pipeline, "mask", "sketch"))
    assert set(found["keys"]) == {"text", "image", "mask", "sketch"}
    for part in ("keys", "values"):
        pairs = {name: own["pairs"] for name, own in found[part].items()}
        for name in ("text", "mask", "sketch"):
            assert pairs[name][0] == pytest.approx(1, abs=1e-5)
            assert pairs[name][-1] < 0.999
        assert pairs["image"][0] < 0.9


# --- Attention and gates


def test_softmax_fractions_equal_the_full_softmax():
    g = torch.Generator().manual_seed(0)
    query, key = torch.randn(2, 3, 7, 8, generator=g), torch.randn(2, 3, 12, 8, generator=g)
    tokens = {"text": 3, "image": 4, "mask": 5}
    bias = torch.randn(2, 1, 1, 12, generator=g)
    bias[:, :, :, 2] = -torch.inf
    for mask, scale in ((None, None), (bias, None), (bias.expand(2, 1, 7, 12), 0.7), (bias > 0, None)):
        fractions = np.array(mechanism.softmax_fractions(query, key, mask, scale, tokens))
        values = torch.eye(12).expand(2, 3, 12, 12)  # the output of the attention is its weights
        weights = F.scaled_dot_product_attention(query, key, values, attn_mask=mask, scale=scale)[0].mean(0)
        expected = [
            [part[:, a:b].sum(1).mean() for a, b in ((0, 3), (3, 7), (7, 12))] for part in (weights[:3], weights[3:])
        ]
        np.testing.assert_allclose(fractions, expected, atol=1e-6)


@pytest.mark.parametrize("attention", ["holistic", "hard", "decoupled", "concat"])
def test_zero_queries_attend_uniformly(attention):
    pipeline = tiny_mditface_pipeline(attention=attention)
    with torch.no_grad():
        for name, parameter in pipeline.transformer.named_parameters():
            if ".to_q." in name or ".add_q_proj." in name:
                parameter.zero_()
    found = mechanism.attention_mass(pipeline, request_for(pipeline, "mask", "sketch"))
    tokens = found["tokens"]
    assert tokens == {"text": 12, "image": 4} | ({} if attention == "concat" else {"mask": 4, "sketch": 4})
    queries = {"text", "image"} | ({"mask", "sketch"} if attention == "holistic" else set())
    assert set(found["mass"]) == queries
    for fractions in found["mass"].values():
        for name, layers in fractions.items():
            assert np.shape(layers) == (4, 4)
            np.testing.assert_allclose(layers, tokens[name] / sum(tokens.values()), atol=1e-6)


def test_text_does_not_attend_to_conditions():
    pipeline = tiny_mditface_pipeline(text_reads_spatial=False)
    found = mechanism.attention_mass(pipeline, request_for(pipeline, "mask"))["mass"]
    assert np.abs(found["text"]["mask"]).max() == 0
    assert np.min(found["image"]["mask"]) > 0
    for fractions in found.values():
        np.testing.assert_allclose(np.sum(list(fractions.values()), axis=0), 1, atol=1e-5)


@pytest.mark.parametrize("attention", ["holistic", "decoupled"])
def test_gates_equal_the_modulation(attention):
    """With zero weights, the gates are the biases."""
    pipeline = tiny_mditface_pipeline(attention=attention)
    gates = {"norm1": {2: -0.25, 5: 0.5}, "norm1_context": {2: 0.125, 5: 1.0}, "norm": {2: -2.0}}
    with torch.no_grad():
        for name, module in pipeline.transformer.named_modules():
            values = gates.get(name.rsplit(".", 1)[-1], {}) if hasattr(module, "linear") else {}
            for place, value in values.items():
                module.linear.weight.zero_()
                module.linear.bias.unflatten(0, (-1, 32))[place] = value * (2 if "spatial" in name else 1)
    found = mechanism.attention_mass(pipeline, request_for(pipeline, "mask"))["gates"]
    for kind, image, text in (("attention", 0.25, 0.125), ("mlp", 0.5, 1.0)):
        assert np.shape(found[kind]["spatial"]) == (4, 4)
        for name, double, single in (("image", image, 2), ("text", text, 2), ("spatial", 2 * image, 4)):
            np.testing.assert_allclose(found[kind][name], [[double] * 4] * 2 + [[single] * 4] * 2, atol=1e-6)


@pytest.mark.parametrize("names", [(), ("sketch",)])
def test_mmface_mass_and_gates(names):
    pipeline = tiny_pipeline()
    with torch.no_grad():
        for block in pipeline.transformer.blocks:
            block.attention.image_qkv.weight[:32].zero_()  # the queries
            block.modulation.weight.zero_()
            block.modulation.bias.copy_(torch.arange(12).repeat_interleave(32))
    found = mechanism.attention_mass(pipeline, request_for(pipeline, *names))
    assert found["tokens"] == {"image": 4, "text": 12}
    np.testing.assert_allclose(found["mass"]["image"]["text"], [[0.75] * 4] * 2, atol=1e-6)
    assert np.ptp(found["mass"]["text"]["image"]) > 0
    assert {name: np.unique(own).tolist() for name, own in found["gates"]["attention"].items()} == {
        "image": [2],
        "text": [8],
    }
    assert {name: np.unique(own).tolist() for name, own in found["gates"]["mlp"].items()} == {
        "image": [5],
        "text": [11],
    }


@pytest.mark.parametrize("make", [tiny_pipeline, tiny_mditface_pipeline])
def test_observation_is_bit_identical(make):
    pipeline = make()
    request = request_for(pipeline, "mask")
    before, seen = generate(pipeline, request, [3])[0][0], []
    with (
        mechanism.observed(pipeline.transformer) as state,
        mechanism.ObserveAttention(lambda *_: seen.append((state.step, state.block))),
    ):
        during = generate(pipeline, request, [3])[0][0]
    assert during.tobytes() == before.tobytes()
    blocks = 2 if make is tiny_pipeline else 4
    assert [place for place in seen if place[1] is not None][-4 * blocks :] == [
        (step, block) for step in range(4) for block in range(blocks)
    ]
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in pipeline.transformer.modules())


# --- Positions


def test_shifted_positions():
    pipeline, parser = tiny_mditface_pipeline(), tiny_face_parser()
    request, reported = request_for(pipeline, "mask", height=64, width=64, force_size=True), []
    found = mechanism.shifted_positions(
        pipeline, request, [3, 4], [0, 2], (parser, 32), lambda *done: reported.append(done)
    )
    assert reported == [(number, 6) for number in range(1, 7)]
    assert found["unit"] == 16
    given = CONDITIONS["mask"].resize(draw_face(0, 0, 64).mask, 64, 64)
    with mechanism.shifted(pipeline.transformer, 2):
        images = [np.asarray(generate(pipeline, request, [seed])[0][0]) for seed in (3, 4)]
    labels = parse_faces(parser, images, size=32)
    assert found["accuracy"][1] == [pixel_accuracy(given, own) for own in labels]
    assert found["moved"][1] == [pixel_accuracy(given[:, :32], own[:, 32:]) for own in labels]
    assert found["accuracy"][0] == found["moved"][0]
    straight = np.asarray(generate(pipeline, request, [3])[0][0])
    assert not np.array_equal(straight, images[0])
    assert found["accuracy"][0][0] == pixel_accuracy(given, parse_faces(parser, [straight], size=32)[0])


# --- Commands


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("study")
    tiny_mditface_pipeline().save_pretrained(root / "mditface")
    tiny_mditface_pipeline(attention="concat").save_pretrained(root / "concat")
    tiny_pipeline().save_pretrained(root / "mmface")
    tiny_face_parser().save_pretrained(root / "parser")
    face = draw_face(0, 0, 64)
    Image.fromarray(face.mask).save(root / "mask.png")
    Image.fromarray(face.sketch).save(root / "sketch.png")
    return root


@pytest.mark.parametrize(
    ("command", "model", "options", "texts"),
    [
        ("keys", "mditface", ["--sketch", "sketch.png"], ["trained with decoupled", "values sketch", "single 1"]),
        ("attention", "mditface", ["--steps", "2"], ["to mask", "gate spatial", "12 text, 4 image, 4 mask tokens"]),
        ("attention", "mmface", [], ["to text", "gate image", "block 1"]),
        (
            "positions",
            "mditface",
            ["--count", "2", "--parser", "parser"],
            ["shift 1", "Without conditions", "16 pixels"],
        ),
    ],
)
def test_commands(folder, tmp_path, capsys, monkeypatch, command, model, options, texts):
    monkeypatch.chdir(folder)
    arguments = [command, model, "a woman", "--mask", "mask.png", "--seed", 3, "--out", tmp_path / "out", *options]
    shifts = ("--shifts", 0, 1) if command == "positions" else ()
    mechanism.main([str(argument) for argument in (*arguments, *shifts)])
    printed = capsys.readouterr()
    assert all(text in printed.out + printed.err for text in texts)
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [f"{command}.html", f"{command}.json"]
    found = json.loads((tmp_path / "out" / f"{command}.json").read_text())
    assert found["request"]["seed"] == 3
    assert "mask" in found["request"]["conditions"]
    page = (tmp_path / "out" / f"{command}.html").read_text()
    assert page.count("<svg") == page.count("<image ") // 2 >= 2  # a heat map and its color bar


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["keys", "mmface", "--mask", "mask.png"], "MMFacePipeline has no condition tokens"),
        (["keys", "concat", "--mask", "mask.png"], "concatenates conditions"),
        (["keys", "mditface"], "pass a mask, a sketch or keypoints"),
        (["keys", "mditface", "--mask", "mask.png", "--steps", "1"], "pass at least 2"),
        (
            ["attention", "mmface", "--mask", "mask.png", "--sketch", "sketch.png"],
            "study mask and sketch one at a time",
        ),
        (["positions", "mmface", "--mask", "mask.png"], "no condition tokens"),
        (["positions", "mditface", "--sketch", "sketch.png"], "against a mask: pass a mask"),
        (["positions", "mditface", "--mask", "mask.png"], "Cannot shift by 2 tokens: the image is 2 tokens wide"),
        (["positions", "mditface", "--mask", "mask.png", "--count", "0"], "count is 0"),
        (["keys", "nowhere", "--mask", "mask.png"], "Unknown model 'nowhere'"),
        (["attention", "mditface", "--mask", "absent.png"], "absent.png"),
    ],
)
def test_bad_input(folder, tmp_path, capsys, monkeypatch, arguments, text):
    monkeypatch.chdir(folder)
    with pytest.raises(SystemExit, match="2"):
        mechanism.main([*arguments, "--out", str(tmp_path / "out")])
    assert text in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_negative_shift_is_rejected():
    pipeline = tiny_mditface_pipeline()
    with pytest.raises(InputError, match="Cannot shift by -1 tokens"):
        mechanism.shifted_positions(pipeline, request_for(pipeline, "mask"), [0], [-1], (tiny_face_parser(), 32))
