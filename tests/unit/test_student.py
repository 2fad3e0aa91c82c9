"""The few-step student: training, exact resume, its sampler, and recipes that do not fit."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from builders import run as command
from builders import tiny_mditface, tiny_mditface_pipeline, tiny_pipeline, tiny_transformer
from likeness.config import build
from likeness.models.layers import modulate, unpatchify
from likeness.objectives import DDPM, RectifiedFlow
from likeness.pipelines.generate import generate, resolve
from likeness.pipelines.load import load
from likeness.train import student
from likeness.train.checkpoint import checkpoints
from likeness.train.config import StudentRecipe
from likeness.train.ema import posthoc_ema
from likeness.train.student import Discriminator, Samples, draw, losses_of, student_rate, train_student
from likeness.types import ConditionInput, InputError, PortraitRequest
from runs import (
    SIZE,
    check_resume,
    killed_after_checkpoint,
    load_checkpoint,
    metrics,
    sigterm_in_step,
    weights_of,
)

TEACHERS = {"mmface": tiny_pipeline, "mditface": tiny_mditface_pipeline}


@pytest.fixture(scope="module")
def prepared(prepared_faces, tmp_path_factory) -> Path:
    """Ten synthetic faces, their shards, and a teacher for each network."""
    root = tmp_path_factory.mktemp("student")
    for name in ("faces", "shards"):
        (root / name).symlink_to(prepared_faces / name)
    for name, make in TEACHERS.items():
        make().save_pretrained(root / name)
    return root


def recipe(root: Path, teacher: str = "mmface", **changes: Any) -> StudentRecipe:
    """Six steps of 3 new images, 12 samples; stage 1 for three steps, of which the first is a warm-up."""
    probabilities = {"mask": 0.4, "sketch": 0.3, "none": 0.3}
    values: dict[str, Any] = {
        "teacher": str(root / teacher),
        "data": {"shards": [str(root / "shards")], "condition_probabilities": probabilities} | changes.pop("data", {}),
        "optimizer": {"images": 18, "batch": 3, "learning_rate": 1e-3, "betas": [0.0, 0.99], "weight_decay": 0.0}
        | changes.pop("optimizer", {}),
        "discriminator": {"blocks": [0, 1], "width": 8, "frozen_images": 9, "warmup": 3, "learning_rate": 1e-3}
        | changes.pop("discriminator", {}),
        "preview": [{"prompt": "a face", "mask": str(root / "faces/train/masks/000000.png"), "seed": 5}],
        "precision": "fp32",
        "log_every": 3,
        "checkpoint_every": 6,
    }
    return build(StudentRecipe, values | changes)


@pytest.mark.parametrize("teacher", TEACHERS)
def test_resume_is_exact(prepared, tmp_path, teacher):
    """Killed in stage 1, and MMFace also stopped by SIGTERM between the stages and killed in stage 2."""
    given = recipe(prepared, teacher)
    interruptions = [killed_after_checkpoint()]
    if teacher == "mmface":
        interruptions += [sigterm_in_step(1, 9), killed_after_checkpoint()]
    whole = check_resume(lambda run: train_student(given, run), tmp_path, *interruptions)
    assert [int(path.name) for path in checkpoints(tmp_path / "parts")] == [12, 18]
    parts = ("student/model", "student/average/0", "student/optimizer/0", "backbone/model", "backbone/optimizer")
    for part in parts:
        assert any(name.startswith(f"{part}/") for name in whole), part
    assert {name for name in whole if name.startswith("rollout/")} == {f"rollout/{name}" for name in Samples._fields}


def test_stages(prepared, tmp_path):
    """In the warm-up only the heads are trained, in stage 1 the heads and the student, in stage 2 everything."""

    def weights(images: int) -> dict[str, torch.Tensor]:
        train_student(recipe(prepared, optimizer={"images": images, "decay": "constant"}, preview=[]), tmp_path)
        return load_checkpoint(tmp_path)

    teacher = weights_of(prepared / "mmface")
    warm, first, second = weights(3), weights(9), weights(12)
    name = "blocks.0.attention.image_qkv.weight"
    assert torch.equal(warm[f"student/model/{name}"], teacher[name])
    assert not torch.equal(first[f"student/model/{name}"], teacher[name])
    assert not torch.equal(first["heads/model/0.embed.weight"], warm["heads/model/0.embed.weight"])
    assert torch.equal(first[f"backbone/model/{name}"], teacher[name])
    assert not torch.equal(second[f"backbone/model/{name}"], teacher[name])
    assert torch.equal(second["backbone/model/final.weight"], teacher["final.weight"])  # nothing reads its output


def test_initial_weights(prepared, tmp_path):
    """With `init_from` the student starts from another model, the discriminator still from the teacher."""
    earlier = train_student(recipe(prepared, optimizer={"images": 12}, preview=[]), tmp_path / "earlier")
    still = {"optimizer": {"images": 12, "learning_rate": 1e-12}, "discriminator": {"learning_rate": 1e-12}}
    train_student(recipe(prepared, init_from=str(earlier), preview=[], **still), tmp_path / "run")
    found, name = load_checkpoint(tmp_path / "run"), "blocks.0.attention.image_qkv.weight"
    for part, model in (("student", earlier), ("backbone", prepared / "mmface")):
        torch.testing.assert_close(found[f"{part}/model/{name}"], weights_of(model)[name], rtol=0, atol=1e-7)
    assert not torch.allclose(weights_of(earlier)[name], weights_of(prepared / "mmface")[name], rtol=0, atol=1e-4)


@pytest.mark.parametrize("teacher", TEACHERS)
def test_published_student(prepared, tmp_path, teacher):
    """An ordinary pipeline folder: defaults, previews, 1, 2 and 4 steps, deterministic per seed in any batch. MDiTFace
    is trained with several conditions in a sample; `likeness average` works on the run of a student.
    """
    probabilities = {"mask": 0.4, "sketch": 0.3, "none": 0.3}
    if teacher == "mditface":
        probabilities = {"mask": 0.3, "mask+sketch": 0.4, "keypoints": 0.1, "none": 0.2}
    emas = {"ema": 0.1, "posthoc_emas": [0.2]}
    given = recipe(prepared, teacher, data={"condition_probabilities": probabilities}, optimizer=emas)
    pipeline = load(train_student(given, tmp_path))
    assert pipeline.scheduler.config.stochastic_sampling
    defaults = pipeline.config.defaults
    assert (defaults["size"], defaults["steps"], defaults["guidance_scale"]) == (SIZE, 4, 1.0)
    preview = given.preview[0]
    request = resolve(
        PortraitRequest(prompt=preview.prompt, conditions={"mask": ConditionInput(image=preview.mask)}), pipeline
    )
    (image,), _ = generate(pipeline, request, [preview.seed])
    published = Image.open(sorted((tmp_path / "previews").iterdir())[-1])
    assert np.array_equal(np.asarray(published), np.asarray(image))
    files = {"mask": "masks"} if teacher == "mmface" else {"mask": "masks", "sketch": "sketches"}
    paths = {name: str(prepared / f"faces/train/{folder}/000000.png") for name, folder in files.items()}
    conditions = {name: ConditionInput(image=path) for name, path in paths.items()}
    for steps in (1, 2, 4):
        request = PortraitRequest(prompt="a face", conditions=conditions, num_inference_steps=steps)
        request = resolve(request, pipeline)
        first, second = generate(pipeline, request, [3, 4])[0]
        assert np.array_equal(np.asarray(second), np.asarray(generate(pipeline, request, [4])[0][0]))
        assert not np.array_equal(np.asarray(first), np.asarray(second))
    reported = metrics(tmp_path)
    assert [line["seen"] for line in reported] == [3, 6, 9, 12, 15, 18]
    assert all(np.isfinite(line["gap"]) and 0 <= line["accuracy"] <= 1 for line in reported)
    averaged = load(posthoc_ema(tmp_path, 0.15))
    assert averaged.scheduler.config.stochastic_sampling
    assert averaged.config.defaults["guidance_scale"] == 1.0


def test_commands(prepared, tmp_path):
    """`likeness train` and `likeness generate`, and an image that is replayed from its own recipe."""
    shards, teacher = prepared / "shards", prepared / "mmface"
    path = tmp_path / "fast.toml"
    path.write_text(f"""
        kind = "student"
        teacher = "{teacher}"
        precision = "bf16"
        [data]
        shards = ["{shards}"]
        condition_probabilities = {{ mask = 0.5, keypoints = 0.2, none = 0.3 }}
        [optimizer]
        images = 4
        batch = 2
        learning_rate = 1e-5
        betas = [0.0, 0.99]
        [discriminator]
        blocks = [1]
        width = 8
        frozen_images = 2
        [defaults]
        steps = 2
    """)
    assert command("train", path, "--out", tmp_path / "run") == 0
    mask = prepared / "faces/train/masks/000000.png"
    options = ("--model", tmp_path / "run" / "model", "--mask", mask, "--seed", 7)
    assert command("generate", "a face", *options, "--out", tmp_path / "default.png") == 0
    assert command("generate", "a face", *options, "--steps", 2, "--out", tmp_path / "two.png") == 0
    assert command("generate", "a face", *options, "--steps", 4, "--out", tmp_path / "four.png") == 0
    images = {name: np.asarray(Image.open(tmp_path / f"{name}.png")) for name in ("default", "two", "four")}
    assert np.array_equal(images["default"], images["two"])
    assert not np.array_equal(images["two"], images["four"])
    model, again = tmp_path / "run" / "model", tmp_path / "again.png"
    assert command("replay", tmp_path / "four.png", "--model", model, "--out", again) == 0
    assert np.array_equal(np.asarray(Image.open(again)), images["four"])


@pytest.mark.parametrize("steps", [1, 2, 4])
def test_sampler_is_the_plain_formula(steps):
    """x_0 = x_t - t v; x_next = (1 - t_next) x_0 + t_next noise, t = 1, ..., 1 / steps."""
    pipeline = tiny_pipeline()
    pipeline.scheduler = RectifiedFlow(sampler="renoise").scheduler()

    def sample(seed: int) -> torch.Tensor:
        generators = [torch.Generator().manual_seed(seed)]
        settings = {"num_inference_steps": steps, "guidance_scale": 1.0, "output_type": "latent"}
        return pipeline("a face", generator=generators, **settings).images

    generator = torch.Generator().manual_seed(8)
    x = torch.randn((1, 4, SIZE // 8, SIZE // 8), generator=generator)
    text, absent = pipeline.text_features(["a face"]), torch.tensor([[-1]])
    for step in range(steps):
        t, after = 1 - step / steps, 1 - (step + 1) / steps
        with torch.no_grad():
            v = pipeline.transformer(x, torch.tensor([1000 * t]), text, torch.zeros(1, 1, *x.shape[1:]), absent)
        clean = x - t * v
        x = (1 - after) * clean + after * torch.randn(x.shape, generator=generator)
    torch.testing.assert_close(sample(8), x, rtol=1e-5, atol=1e-5)
    assert torch.equal(sample(8), sample(8))
    assert not torch.equal(sample(8), sample(9))


def given_samples(count: int, index: list[list[int]]) -> Samples:
    normal = lambda *size: torch.randn(size, generator=torch.Generator().manual_seed(sum(size)))  # noqa: E731
    latents, conditions = normal(count, 4, 4, 4), normal(count, len(index[0]), 4, 4, 4)
    return Samples(latents, latents, conditions, torch.tensor(index), normal(count, 12, 32), normal(count, 32))


@pytest.mark.parametrize("attention", ["mmface", "decoupled", "holistic", "concat"])
def test_discriminator_reads_the_image_tokens(attention):
    """Logits for all heads and tokens with a mask, a sketch, keypoints or none, which depend on text and condition."""
    if attention == "mmface":
        network, index, depth = tiny_transformer(), [[0], [1], [2], [-1]], 2
    else:
        network = tiny_mditface(guidance_embeds=False, attention=attention, spatial_stream="full")
        index, depth = [[0, 1], [1, -1], [-1, 2], [-1, -1]], 4
    discriminator = Discriminator(network, range(depth), width=8)
    samples, time = given_samples(4, index), torch.full((4,), 500.0)
    arguments = samples.arguments()
    with torch.no_grad():
        logits = discriminator(samples.clean, time, *arguments)
        assert logits.shape == (4, depth, 4)
        other = Samples(*(x.roll(1, 0) for x in samples)).arguments()
        assert not torch.equal(discriminator(samples.clean, time, *other), logits)
        assert torch.equal(discriminator(samples.clean, time, *arguments), logits)
        assert torch.equal(
            discriminator.backbone(samples.clean, time, *arguments), network(samples.clean, time, *arguments)
        )


@pytest.mark.parametrize("network", ["mmface", "mditface"])
def test_discriminator_compiles_as_one_graph(network):
    """The hooks do not break the graph, and every call reads its own features."""
    teacher = tiny_transformer() if network == "mmface" else TEACHERS[network]().transformer
    discriminator = Discriminator(teacher, [0, 1], width=8)
    compiled = torch.compile(discriminator, backend="eager", fullgraph=True, dynamic=False)
    samples, time = given_samples(4, [[0], [1], [2], [-1]]), torch.full((4,), 500.0)
    with torch.no_grad():
        for latents in (samples.clean, 2 * samples.clean):
            ours = compiled(latents, time, *samples.arguments())
            assert torch.equal(ours, discriminator(latents, time, *samples.arguments()))


def test_features_are_those_of_the_network():
    """What the last head reads, through the network's own output layers, is the network's own prediction."""
    network = tiny_transformer()
    discriminator = Discriminator(network, [1], width=8)
    samples, time = given_samples(2, [[0], [-1]]), torch.tensor([100.0, 900.0])
    read = []
    discriminator.heads[0].register_forward_pre_hook(lambda _, given: read.append(given))
    with torch.no_grad():
        discriminator(samples.clean, time, *samples.arguments())
        image, conditioning, grid = read[0]
        shift, scale = network.final_modulation(conditioning).chunk(2, dim=-1)
        output = network.final(modulate(network.final_norm(image), shift, scale))
        assert torch.equal(unpatchify(output, 4, 4, 2), network(samples.clean, time, *samples.arguments()))
    assert grid == (2, 2)


def test_gradients_of_both_sides(prepared):
    """One backward pass: the discriminator gets the gradient of softplus(fake - real), the student that of
    softplus(real - fake), and nothing else of the discriminator's losses.
    """
    given = recipe(prepared, flow_weight=0.0, discriminator={"penalty": 0.0, "mismatch": 0.0, "frozen_images": 0})
    objective, samples = RectifiedFlow(), given_samples(4, [[0], [1], [2], [-1]])
    network, discriminator = tiny_transformer(), Discriminator(tiny_transformer(), [0, 1], width=8)
    times = torch.tensor([1.0, 0.75, 0.5, 0.25])
    draws = draw(given.discriminator, 0, 0, (4, 4, 4, 4))
    flow = torch.zeros(1, 4, 4, 4), torch.ones(1)
    arguments = (network, discriminator, objective, given, samples, times, draws, flow, True)
    losses_of(*arguments)[0].backward()
    ours = {name: p.grad.clone() for name, p in network.named_parameters() if p.grad is not None}
    theirs = {name: p.grad.clone() for name, p in discriminator.named_parameters() if p.grad is not None}
    network.zero_grad()
    discriminator.zero_grad()

    # The same by two backward passes, written out
    noisy = (1 - times[:, None, None, None]) * samples.previous + times[:, None, None, None] * draws.noise
    fake = noisy - times[:, None, None, None] * network(noisy, 1000 * times, *samples.arguments())
    level = draws.time[:, None, None, None]
    noised = [(1 - level) * x + level * draws.discriminator_noise for x in (fake, samples.clean)]
    of_fake, of_real = (discriminator(x, 1000 * draws.time, *samples.arguments()) for x in noised)
    softplus = torch.nn.functional.softplus
    softplus(of_fake - of_real).mean().backward(retain_graph=True)
    for name, parameter in discriminator.named_parameters():
        if parameter.grad is not None:
            torch.testing.assert_close(theirs[name], parameter.grad, rtol=1e-3, atol=1e-6)
    network.zero_grad()
    softplus(of_real - of_fake).mean().backward()
    exact = torch.cat([p.grad.flatten() for name, p in network.named_parameters() if name in ours])
    found = torch.cat([gradient.flatten() for gradient in ours.values()])
    assert torch.nn.functional.cosine_similarity(exact, found, dim=0) > 0.999
    assert 0.95 < found.norm() / exact.norm() < 1.05


def test_further_losses(prepared):
    """R1 by finite differences, real images with the text and conditions of another sample, and flow matching."""
    given = recipe(prepared, flow_weight=0.5, discriminator={"penalty": 3.0, "penalty_noise": 0.1, "mismatch": 2.0})
    objective, samples = RectifiedFlow(), given_samples(4, [[0], [1], [2], [-1]])
    network, discriminator = tiny_transformer(), Discriminator(tiny_transformer(), [0, 1], width=8)
    times = torch.tensor([1.0, 0.75, 0.5, 0.25])
    draws = draw(given.discriminator, 0, 0, (4, 4, 4, 4))
    flow = torch.ones(1, 4, 4, 4), torch.tensor([0.25])
    loss, _, report = losses_of(network, discriminator, objective, given, samples, times, draws, flow, True)

    level = draws.time[:, None, None, None]
    noised = (1 - level) * samples.clean + level * draws.discriminator_noise
    part = slice(None, None, student.SUBSET)

    def logits(latents: torch.Tensor, of: Samples, shift: float | torch.Tensor = 0.0) -> torch.Tensor:
        return discriminator(latents[part] + shift, 1000 * draws.time[part], *of.part(part).arguments())

    real = logits(noised, samples)
    penalty = (logits(noised, samples, 0.1 * draws.penalty_noise) - real).square().mean()
    other = Samples(*(tensor.roll(1, dims=0) for tensor in samples))
    mismatch = torch.nn.functional.softplus(logits(noised, other) - real).mean()
    first = samples.part(slice(1))
    velocity = network(0.75 * first.clean + 0.25, torch.tensor([250.0]), *first.arguments())
    matching = (velocity - (1 - first.clean)).square().mean()
    for name, wanted in {"penalty": penalty, "mismatch": mismatch, "flow": matching}.items():
        torch.testing.assert_close(report[name], wanted, rtol=1e-3, atol=1e-5)
    torch.testing.assert_close(
        loss, report["adversarial"] + 3 * penalty + 2 * mismatch + 0.5 * matching, rtol=1e-3, atol=1e-5
    )


def test_every_batch_has_every_time(prepared, tmp_path, monkeypatch):
    """A sample goes from noise through all times on the student's own estimates, and then leaves."""
    seen = []

    def kept(*arguments):
        seen.append((arguments[4], arguments[5], real(*arguments)))
        return seen[-1][2]

    real = student.losses_of
    monkeypatch.setattr(student, "losses_of", kept)
    train_student(recipe(prepared, preview=[]), tmp_path)
    for (before, _, result), (samples, times, _) in itertools.pairwise(seen):
        assert times.tolist() == [1.0] * 3 + [0.75] * 3 + [0.5] * 3 + [0.25] * 3
        assert torch.equal(samples.clean[3:], before.clean[:-3])
        assert torch.equal(samples.tokens[3:], before.tokens[:-3])
        assert torch.equal(samples.index[3:], before.index[:-3])
        assert torch.equal(samples.previous[3:], result[1][:-3])
        assert torch.equal(samples.previous[:3], samples.clean[:3])


def test_one_step(prepared, tmp_path):
    """A student of one step has no samples that continue."""
    pipeline = load(train_student(recipe(prepared, steps=1, optimizer={"images": 6}, preview=[]), tmp_path))
    assert pipeline.config.defaults["steps"] == 1


def test_learning_rates(prepared):
    given = recipe(prepared, frozen_learning_rate=1e-2, optimizer={"images": 109, "warmup": 4, "decay": "linear"})
    assert [round(student_rate(given, start), 5) for start in (3, 5, 7, 8)] == [0.0025, 0.0075, 0.01, 0.01]
    assert [round(student_rate(given, start), 6) for start in (9, 11, 13, 61, 109)] == [2.5e-4, 7.5e-4, 1e-3, 5e-4, 0]


def test_recipes_that_do_not_fit(prepared, tmp_path):
    def rejected(message: str, **changes: Any) -> None:
        with pytest.raises(InputError, match=message):
            train_student(recipe(prepared, **changes), tmp_path / "run")
        assert not (tmp_path / "run").exists()

    rejected("Unknown model .*nowhere", teacher=str(prepared / "nowhere"))
    rejected("discriminator.blocks has 2, but the teacher's blocks are 0 to 1", discriminator={"blocks": [0, 2]})
    rejected("Unknown model .*missing", init_from=str(prepared / "missing"))
    rejected("different blocks", discriminator={"blocks": [1, 1]})
    rejected("steps is 0: it must be at least 1", steps=0)
    rejected("defaults.steps is 3, but a student of 4 steps is trained for 1, 2, 4", defaults={"steps": 3})
    rejected("defaults.steps is 2.0: it must be a whole number", defaults={"steps": 2.0})
    rejected("unknown key 'speed'", defaults={"speed": 3})
    rejected("components is .*: it must be omitted", data={"components": "elsewhere"})
    rejected("validation is .*: it must be omitted", data={"validation": [str(prepared / "shards")]})
    rejected("was not trained with beard", data={"condition_probabilities": {"beard": 1.0}})
    rejected("one condition at a time", data={"condition_probabilities": {"mask+sketch": 1.0}})
    rejected("mismatch needs at least 2", optimizer={"batch": 1})
    rejected("frozen_learning_rate is -1.0: it must be above 0", frozen_learning_rate=-1.0)
    diffusion = tiny_pipeline()
    diffusion.register_to_config(objective=DDPM().config())
    diffusion.save_pretrained(tmp_path / "diffusion")
    rejected("is not a flow model: its objective is ddpm", teacher=str(tmp_path / "diffusion"))
    tiny_mditface_pipeline(guidance_embeds=True).save_pretrained(tmp_path / "distilled")
    rejected("guidance-distilled", teacher=str(tmp_path / "distilled"))
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter" / "adapter.json").write_text(json.dumps({"base": "x"}))
    rejected("is an adapter, not an MMFace or MDiTFace pipeline", teacher=str(tmp_path / "adapter"))


def test_another_recipe_in_the_same_folder(prepared, tmp_path):
    train_student(recipe(prepared, optimizer={"images": 3}, preview=[]), tmp_path)
    with pytest.raises(InputError, match="started with another discriminator"):
        train_student(recipe(prepared, discriminator={"width": 4}, preview=[]), tmp_path)


def test_teacher_that_changes_in_stage_1_is_rejected(prepared, tmp_path):
    """Checkpoints of stage 1 do not contain the frozen copy of the teacher."""
    for name in ("faces", "shards"):
        (tmp_path / name).symlink_to(prepared / name)
    teacher = tiny_pipeline()
    teacher.save_pretrained(tmp_path / "mmface")
    train_student(recipe(tmp_path, optimizer={"images": 3}, preview=[]), tmp_path / "run")
    with torch.no_grad():
        next(teacher.transformer.parameters()).mul_(1.1)
    teacher.save_pretrained(tmp_path / "mmface")
    with pytest.raises(InputError, match="was started with other frozen weights"):
        train_student(recipe(tmp_path, optimizer={"images": 6}, preview=[]), tmp_path / "run")
