"""The ledger of claims: complete, decided by its numbers, and not older than the code."""

import argparse
import copy
import itertools
import json
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from scipy import stats
from torch.nn import functional as F

sys.path.append(str(Path(__file__).parents[2] / "benchmarks"))  # these scripts import each other

import ablate
import claims
import conflicts
from baselines.composed import composed
from baselines.controlnet import controlnet
from baselines.spade import SpadeGan, gan_losses
from training_losses import alignment_losses, contrastive_losses, dispersive_losses, features_of

from builders import randomise, whole_pipeline
from likeness.conditions.mask.classes import CLASS_INDEX
from likeness.data.synthetic import draw_face
from likeness.encoders.components import load_components
from likeness.evaluate.distances import kernel_distance
from likeness.objectives import RectifiedFlow
from likeness.pipelines.mmface import MMFacePipeline
from likeness.prepare.encode import encode_folder
from likeness.prepare.synthetic import write_synthetic
from likeness.train.batches import Batch
from likeness.train.ema import Ema
from likeness.types import InputError, TextFeatures
from likeness.weights.catalog import BUNDLED, COMMON
from runs import assert_identical, load_checkpoint, sigterm_in_step


def test_ledger():
    found = claims.read_claims()
    assert {claim.paper for claim in found.values()} == {"MDiTFace", "MMFace-DiT"}
    for claim in found.values():
        assert set(claim.pair or ()) <= set(ablate.VARIANTS)
        assert claims.command_of(claim).startswith(("python benchmarks/", "likeness ", "python -m pytest "))
    assert claims.out_of_date(found) == []
    assert claims.PAGE.read_text(encoding="utf-8") == claims.page(found)


@pytest.mark.parametrize(
    ("expected", "low", "high", "verdict"),
    [
        ("higher", 0.01, 0.03, claims.REPRODUCED),
        ("higher", -0.01, 0.03, claims.UNDECIDED),
        ("higher", -0.03, -0.01, claims.CONTRADICTED),
        ("lower", -0.03, -0.01, claims.REPRODUCED),
        ("lower", 0.01, 0.03, claims.CONTRADICTED),
        ("equal 0.02", -0.01, 0.019, claims.REPRODUCED),
        ("equal 0.02", -0.01, 0.03, claims.UNDECIDED),
        ("equal 0.02", 0.03, 0.05, claims.CONTRADICTED),
        ("not lower 0.02", -0.01, 0.05, claims.REPRODUCED),
        ("not lower 0.02", -0.03, 0.05, claims.UNDECIDED),
        ("not lower 0.02", -0.05, -0.03, claims.CONTRADICTED),
    ],
)
def test_verdicts(expected, low, high, verdict):
    assert claims.decide(expected, low, high) == verdict
    with pytest.raises(InputError, match=r"'rather 0\.02' is not higher, lower, equal MARGIN or not lower MARGIN"):
        claims.parse("rather 0.02")


def test_page():
    """Verdicts name their metric and their seeds, and KID is in thousandths."""
    metrics = {"kid_text_image/mask": "lower", "conflict/text": "higher", "edge_f_score/sketch": "higher"}
    claim = claims.Claim(paper="MDiTFace", source="", claim="", change="", pair=("hard", "decoupled"), metrics=metrics)
    numbers = {"value": -0.002, "low": -0.003, "high": -0.001, "p": 0.02, "means": [0.001, 0.003], "n": 1}
    comparisons = {
        "hard decoupled kid_text_image/mask": numbers | {"by_seed": [-0.002]},
        "hard decoupled conflict/text": numbers | {"by_seed": [-0.002] * 3, "n": 40},
    }
    assert claims.verdicts_of(claim, comparisons) == {
        "KID x 1000": "reproduced (1 seed)",
        "text of contradictions": "contradicted",
        "edges F (sketch)": claims.OPEN,
    }
    _, _, first, second, third = claims.comparison_table(claim, comparisons)
    assert "| 1.0000 | 3.0000 | -2.0000, -3.0000 to -1.0000 | -2.0000 | 0.020 | means | lower |" in first
    assert "| 40 faces | higher | contradicted |" in second
    assert third == "| edges F (sketch) |  |  |  |  |  |  | higher | not run yet |"
    assert claims.command_of(claim).startswith("python benchmarks/ablate.py train hard decoupled --shards")


@pytest.mark.parametrize("between_seeds", [0.0, 0.01, 0.02, 0.05, 0.1])
def test_interval_covers_both_variances(between_seeds):
    """The standard error of 100 faces is 0.01."""
    rng = np.random.default_rng(0)
    covered = 0
    for _ in range(400):
        seeds, faces = between_seeds * rng.standard_normal((3, 1)), 0.1 * rng.standard_normal((1, 100))
        found = ablate.interval(0.05 + seeds + faces + 0.05 * rng.standard_normal((3, 100)))
        covered += found["low"] <= 0.05 <= found["high"]
        assert (found["low"] > 0 or found["high"] < 0) == (found["p"] < 0.05)
    assert covered / 400 > 0.93


def test_interval_of_equal_seeds_depends_on_faces():
    """Five standard errors are significant if the seeds differ by their faces only."""
    rng = np.random.default_rng(0)
    found = [ablate.interval(0.05 + 0.1 * rng.standard_normal((1, 100)) * np.ones((3, 1))) for _ in range(100)]
    assert sum(one["p"] < 0.05 for one in found) > 95


def test_kid_by_face():
    """Its mean is KID; its variance over N is that of KID over draws of N faces."""
    rng = np.random.default_rng(0)

    def draw() -> np.ndarray:
        return ablate.kid_by_face(rng.standard_normal((30, 4)) + 0.5, rng.standard_normal((30, 4)))

    sets = rng.standard_normal((2, 30, 4))
    assert ablate.kid_by_face(*sets).mean() == pytest.approx(kernel_distance(*sets))
    values = np.array([draw() for _ in range(200)])  # [draws, N]
    assert np.sqrt(values.var(axis=1, ddof=1).mean() / 30) == pytest.approx(values.mean(axis=1).std(), rel=0.2)


def test_interval_of_equal_differences():
    found = ablate.interval(np.full((3, 10), 0.5))
    assert (found["low"], found["high"], found["p"]) == pytest.approx((0.5, 0.5, 0.0), abs=1e-9)


def write_runs(out: Path, name: str, seeds, offset: float, *, noise: float = 0.0, **changes) -> None:
    """Results of `train`: 20 faces, of which the first has no value; values by face are offset + seed / 100 + noise
    that all variants of a seed have in common + `noise` of this variant.
    """
    for seed in seeds:
        run, common = out / name / f"seed-{seed}", np.random.default_rng(seed).standard_normal(20) / 1000
        own = noise * np.random.default_rng([seed, *name.encode()]).standard_normal(20)
        (run / "evaluation").mkdir(parents=True)
        values = np.where(np.arange(20) == 0, np.nan, offset + seed / 100 + common + own)
        np.savez(run / "evaluation" / "scores.npz", **{"pixel_accuracy/mask": values})
        facts = {"images": 96, "count": 20, "faces": "f", "precision": "fp32", "parameters": 1, "trainable": 1}
        facts |= {"commit": f"commit {seed}", "fingerprint": {"losses": [1.0, 0.5], "settings": "s"}, **changes}
        means = {"pixel_accuracy/mask": float(np.nanmean(values)), "kid_text_image/mask": 0.1}
        (run / "result.json").write_text(json.dumps({**facts, "means": means}))


@pytest.fixture
def ledger(tmp_path, monkeypatch):
    """An empty one."""
    monkeypatch.setattr(ablate, "RESULTS", tmp_path / "ablations.json")
    monkeypatch.setattr(ablate, "SCORES", tmp_path / "ablations")
    return tmp_path


WANTED = [("hard", "decoupled", "pixel_accuracy/mask")]
KEY = " ".join(WANTED[0])
NEW = {"losses": [1.0, 0.6], "settings": "s"}


def test_collected_runs_need_not_be_kept(ledger):
    """Runs on another machine are added to the committed ones and compared with them."""
    write_runs(ledger / "one", "decoupled", [0, 1], 0.7)
    ablate.collect(WANTED, ledger / "one", [0, 1, 2])
    write_runs(ledger / "two", "hard", [0, 1, 2], 0.6)
    ablate.collect(WANTED, ledger / "two", [0, 1, 2])
    write_runs(ledger / "three", "decoupled", [2], 0.8)
    ablate.collect(WANTED, ledger / "three", [2])
    stored = ablate.read_results()["variants"]["decoupled"]
    assert [stored["seeds"][seed]["pixel_accuracy/mask"] for seed in "012"] == pytest.approx(
        [0.7, 0.71, 0.82], abs=1e-3
    )
    assert stored["commits"] == {"0": "commit 0", "1": "commit 1", "2": "commit 2"}
    found = ablate.read_results()["comparisons"][KEY]
    assert found["by_seed"] == pytest.approx([-0.1, -0.1, -0.2], abs=1e-6)
    assert found["n"] == 19

    write_runs(ledger / "three", "decoupled", [1], 0.8, fingerprint=NEW)
    with pytest.raises(InputError, match=r"different fingerprint \(seed 1\); remove the old ones"):
        ablate.collect(WANTED, ledger / "three", [1, 2])


@pytest.mark.parametrize("change", [{"fingerprint": NEW}, {"faces": "g"}, {"precision": "bf16"}, {"images": 48}])
def test_other_runs_replace_the_committed_ones(ledger, change):
    """Only runs of the same faces, budget and precision are compared."""
    for name, offset in {"decoupled": 0.7, "hard": 0.6}.items():
        write_runs(ledger / "old", name, [0, 1, 2], offset)
    ablate.collect(WANTED, ledger / "old", [0, 1, 2])
    assert list(ablate.read_results()["comparisons"]) == [KEY]
    write_runs(ledger / "new", "decoupled", [1, 2], 0.8, **change)
    ablate.collect(WANTED, ledger / "new", [0, 1, 2])
    assert list(ablate.read_results()["variants"]["decoupled"]["seeds"]) == ["1", "2"]
    assert list(ablate.read_scores("decoupled")) == ["1/pixel_accuracy/mask", "2/pixel_accuracy/mask"]
    kept = ablate.read_results()["comparisons"]
    assert bool(kept) == ("fingerprint" in change)
    if kept:
        assert kept[KEY]["by_seed"] == pytest.approx([-0.2, -0.2], abs=1e-6)


def test_interval_of_a_comparison(ledger):
    """The variance between seeds is that of all variants of the network with three seeds; the one between faces is the
    comparison's own.
    """
    for name, offsets in {"decoupled": (0.7, 0.7, 0.7), "concat": (0.5, 0.52, 0.5)}.items():
        for seed, offset in enumerate(offsets):
            write_runs(ledger / "runs", name, [seed], offset, noise=0.01)
    write_runs(ledger / "runs", "hard", [1], 0.6, noise=0.01)
    write_runs(ledger / "runs", "mmface", [0, 1, 2], 0.1)
    wanted = [*WANTED, ("concat", "decoupled", "pixel_accuracy/mask")]
    ablate.collect(wanted, ledger / "runs", [0, 1, 2])
    results = ablate.read_results()
    variance, freedom = ablate.variance_between_seeds(results, WANTED[0][:2], "pixel_accuracy/mask")
    by_seed = results["comparisons"]["concat decoupled pixel_accuracy/mask"]["by_seed"]
    assert (variance, freedom) == (pytest.approx(np.var(by_seed, ddof=1), rel=1e-3), 2)

    scores = {name: ablate.read_scores(name) for name in ("hard", "decoupled")}
    by_face = scores["hard"]["1/pixel_accuracy/mask"] - scores["decoupled"]["1/pixel_accuracy/mask"]
    weights = np.array([variance, np.nanvar(by_face, ddof=1) / 19])
    reach = weights.sum() ** 0.5 * (stats.t.ppf(0.975, [2, 18]) @ weights) / weights.sum()
    found = results["comparisons"][KEY]
    assert (found["high"] - found["low"]) / 2 == pytest.approx(reach, rel=1e-4)
    assert found["by_seed"] == pytest.approx([np.nanmean(by_face)], abs=1e-6)


def test_interval_of_a_gan(ledger):
    """Its trainings differ more: they do not enter the intervals of others, and it has no interval of one seed."""
    wanted = [("mmface", "spade", "pixel_accuracy/mask"), ("mmface", "mmface-open", "pixel_accuracy/mask")]
    for name in ("mmface", "mmface-single"):
        write_runs(ledger / "runs", name, [0, 1, 2], 0.7, noise=0.01)
    write_runs(ledger / "runs", "mmface-open", [0], 0.6)
    write_runs(ledger / "runs", "spade", [0], 0.5)
    ablate.collect(wanted, ledger / "runs", [0, 1, 2])
    before = ablate.read_results()["comparisons"]
    assert list(before) == ["mmface mmface-open pixel_accuracy/mask"]
    write_runs(ledger / "runs", "spade", [1], 0.3)
    write_runs(ledger / "runs", "spade", [2], 0.4)
    ablate.collect(wanted, ledger / "runs", [0, 1, 2])
    after = ablate.read_results()["comparisons"]
    assert after["mmface mmface-open pixel_accuracy/mask"] == before["mmface mmface-open pixel_accuracy/mask"]
    gan = after["mmface spade pixel_accuracy/mask"]
    assert np.var(gan["by_seed"], ddof=1) == pytest.approx(0.01, rel=0.1)
    assert gan["high"] - gan["low"] > 2 * 0.1 / 3**0.5


def test_comparison_of_means(ledger):
    """Without committed scores by face of one variant, the means of the seeds are paired."""
    for name, offset in {"decoupled": 0.7, "hard": 0.6}.items():
        write_runs(ledger / "runs", name, [0, 1, 2], offset)
        ablate.collect(WANTED, ledger / "runs", [0, 1, 2])
    by_face = ablate.read_results()["comparisons"][KEY]
    (ledger / "ablations" / "hard.npz").unlink()
    ablate.collect(WANTED, ledger / "none", [0, 1, 2])
    found = ablate.read_results()["comparisons"][KEY]
    assert found["n"] == 1
    assert found["by_seed"] == pytest.approx(by_face["by_seed"], abs=1e-6)


@pytest.fixture(scope="module")
def options(tmp_path_factory) -> argparse.Namespace:
    """Options of `train` for synthetic faces: two steps."""
    root = tmp_path_factory.mktemp("ablations")
    write_synthetic(root / "faces", 4, seed=0)
    components = load_components(BUNDLED / COMMON)
    for size in (128, 64):
        encode_folder(root / "faces", root / f"shards-{size}", components, size=size)
    shards, small = str(root / "shards-128"), str(root / "shards-64")
    data = {"shards": [shards], "small_shards": [small], "test": shards, "faces": root / "faces", "out": root / "runs"}
    return argparse.Namespace(**data, images=96, count=4, compile=False)


@pytest.mark.parametrize("name", ["mmface-progressive", "mmface-short"])
def test_training_resumes(options, monkeypatch, name):
    """A variant that is stopped within its training has the results of one that is not, and is trained once only."""
    monkeypatch.setattr(ablate, "CONFLICT_FACES", 1)
    sizes, captions = [], set()
    losses = ablate.VARIANTS[name].losses

    def recorded(model, objective, batch):
        sizes.append(batch.clean.shape[-1])
        captions.update(batch.captions)
        return losses(model, objective, batch)

    monkeypatch.setitem(ablate.VARIANTS, name, replace(ablate.VARIANTS[name], losses=recorded))
    ablate.train(name, 0, options)
    assert sizes[:2] == ([8, 16] if name == "mmface-progressive" else [16, 16])
    assert captions
    assert any("," in one or "." in one for one in captions) == (name == "mmface-progressive")
    parts = argparse.Namespace(**vars(options) | {"out": options.out.with_name("parts")})
    with sigterm_in_step(1, 48):
        ablate.train(name, 0, parts)
    ablate.train(name, 0, parts)
    one, other = (folder / name / "seed-0" for folder in (options.out, parts.out))
    results = [json.loads((run / "result.json").read_text()) | {"commit": ""} for run in (one, other)]
    assert results[0] == results[1]
    assert_identical(load_checkpoint(one), load_checkpoint(other))
    for file in ("loss.npz", "conflict.npz"):
        found = [dict(np.load(run / file)) for run in (one, other)]
        assert all(np.array_equal(found[0][key], found[1][key]) for key in found[0].keys() | found[1].keys())
    wanted = {"loss/right", "conflict/text", "pixel_accuracy/mask", "edge_f_score/sketch", "pixel_accuracy/none"}
    assert wanted <= results[0]["means"].keys()
    steps = len(sizes)
    ablate.train(name, 0, options)
    assert len(sizes) == steps
    with pytest.raises(InputError, match=r"has a result with images = 96, not 48: change --out"):
        ablate.train(name, 0, argparse.Namespace(**vars(options) | {"images": 48}))


class Painter:
    """A pipeline that paints masks: the given one, with a hat if the prompt demands one and it obeys."""

    def __init__(self, obeys: bool) -> None:
        self.obeys = obeys

    def __call__(self, prompt, control_image, generator, **options):
        labels = control_image["mask"].raw.copy()
        if self.obeys and "wearing a hat" in prompt:
            labels[:60] = CLASS_INDEX["hat"]
        return SimpleNamespace(images=[Image.fromarray(labels)])


@pytest.mark.parametrize("obeys", [True, False])
def test_conflicts(monkeypatch, obeys):
    """Text is followed only as far as its images agree more often than those of a neutral prompt."""
    mask = draw_face(0, 0, 128).mask
    mask[mask == CLASS_INDEX["hat"]] = 0
    monkeypatch.setattr(conflicts, "parse_faces", lambda network, images, size: images)
    scores = conflicts.measure_conflicts(Painter(obeys), [mask], (None, 0))
    by_prompt = {one.prompt: one for one in scores}
    hat = by_prompt["a person wearing a hat"]
    assert (hat.text, hat.neutral, hat.agreed) == (float(obeys), 0.0, 1.0)
    assert (hat.mask < 1) == obeys
    assert all(one.text == one.neutral == 0 and one.mask == 1 for one in scores if one is not hat)
    twice = [*scores, *(one._replace(face=3, text=0.5) for one in scores[:2])]
    means = conflicts.means_by_face(twice, lambda one: one.text)
    assert means.tolist() == [float(obeys) / len(scores), 0.5]


def random_inputs() -> tuple:
    """Latents, time, text, condition latents and index for `random_network`; the second sample has no mask."""
    draw = torch.Generator().manual_seed(1)
    latents, condition = (torch.randn(shape, generator=draw) for shape in ((2, 8, 16, 16), (2, 1, 8, 16, 16)))
    text = TextFeatures(torch.randn(2, 8, 32, generator=draw), torch.randn(2, 32, generator=draw))
    return latents, torch.tensor([900.0, 100.0]), text, condition, torch.tensor([[0], [-1]])


def random_network(name):
    return ablate.random_network(name, partial(torch.randn, generator=torch.Generator().manual_seed(0)))[0]


def test_variants_differ_and_train():
    """The fingerprint of every variant differs from all others, and a training step lowers the loss."""
    prints = {name: ablate.fingerprint(name) for name in ablate.VARIANTS}
    for one, other in itertools.combinations(prints.values(), 2):
        assert not ablate.is_same_code(one, other)
    untrained, opposed = {"composed", "mmface-scaled", "mmface-swapped"}, {"spade"}
    for name in prints.keys() - untrained - opposed:
        before, after = prints[name]["losses"]
        assert after < before
    assert ablate.is_same_code(prints["mmface"], ablate.fingerprint("mmface"))


def test_a_fingerprint_shows_changes(monkeypatch):
    """Of the optimizer, the loss, the recipe, and how the captions are treated."""
    before = ablate.fingerprint("mmface")
    variant = ablate.VARIANTS["mmface"]
    changed = [
        replace(variant, losses=contrastive_losses),
        replace(variant, changes={"optimizer": {"name": "adamw"}}),
        replace(variant, changes={"data": {"condition_probabilities": {"mask": 0.5, "sketch": 0.3, "none": 0.2}}}),
        replace(variant, changes={"defaults": {"guidance_scale": 3.0}}),
        replace(variant, caption=ablate.first_clause),
        replace(variant, progressive=True),
    ]
    for one in changed:
        monkeypatch.setitem(ablate.VARIANTS, "mmface", one)
        assert not ablate.is_same_code(ablate.fingerprint("mmface"), before)


def test_losses_are_their_formulas():
    network, (latents, _, text, condition, index) = random_network("mmface-dispersive"), random_inputs()
    noise, uniform = torch.randn(latents.shape, generator=torch.Generator().manual_seed(2)), torch.tensor([0.3, 0.6])
    batch = Batch(latents, noise, uniform, condition, index, captions=[], text=text)
    objective = RectifiedFlow()
    times = objective.sample_time(uniform)
    mixed = torch.stack([(1 - t) * x + t * e for t, x, e in zip(times, latents, noise, strict=True)])
    velocity = network(mixed, objective.model_time(times), text, condition, index)
    features = network.blocks[1].features
    own = [(velocity[i] - (noise - latents)[i]).square().mean() for i in (0, 1)]
    other = [(velocity[i] - (noise - latents)[1 - i]).square().mean() for i in (0, 1)]

    contrastive = contrastive_losses(network, objective, batch)
    torch.testing.assert_close(contrastive, torch.stack([own[i] - 0.05 * other[i] for i in (0, 1)]))
    distance = (features[0] - features[1]).square().mean()
    dispersion = torch.log((2 + 2 * torch.exp(-distance / 0.5)) / 4)
    torch.testing.assert_close(dispersive_losses(network, objective, batch), torch.stack(own) + 0.5 * dispersion)
    assert torch.equal(copy.deepcopy(network)(*random_inputs()), network(*random_inputs()))

    aligned = random_network("mmface-aligned")
    velocity, target = aligned(mixed, objective.model_time(times), text, condition, index), features_of(latents)
    projected = aligned.projection(aligned.blocks[1].features.transpose(1, 2).reshape(2, -1, 8, 8))
    torch.testing.assert_close(target.mean(dim=(2, 3)), torch.zeros(2, 128), atol=1e-4, rtol=0)
    for i, loss in enumerate(alignment_losses(aligned, objective, batch)):
        cosines = F.cosine_similarity(projected[i].flatten(1).T, target[i].flatten(1).T)  # of the 64 tokens
        own = (velocity[i] - (noise - latents)[i]).square().mean()
        torch.testing.assert_close(loss, own + 0.5 * (1 - cosines.mean()))


def test_averages_of_shared_weights():
    """The EMA weights of a network whose streams share modules replace the trained ones in both streams."""
    network = random_network("mmface-single")
    ema = Ema(network, 0.1)
    for parameter in network.parameters():
        parameter.data.add_(1.0)
    averaged = ema.averaged_model()
    attention = averaged.blocks[0].attention
    assert attention.text_qkv is attention.image_qkv
    assert torch.equal(attention.text_qkv.weight, ema.weights["blocks.0.attention.image_qkv.weight"])


@torch.no_grad()
def test_controlnet_starts_as_its_base():
    base, given = random_network("mmface-text"), random_inputs()
    model = controlnet(None, base)
    absent = torch.full_like(given[-1], -1)
    assert torch.equal(model(*given), base(*given[:-1], absent))
    assert {name.split("_")[0] for name, one in model.named_parameters() if one.requires_grad} == {"control"}
    torch.nn.init.normal_(model.control_outputs[0].weight)
    assert torch.equal(model(*given)[1], base(*given[:-1], absent)[1])  # without a condition
    masked = model(*given)[0]
    torch.nn.init.normal_(model.control_embed.weight)
    assert not torch.allclose(model(*given)[0], masked)  # the mask is read


def test_a_gan_in_a_pipeline():
    """One step from noise to image; the mask changes it."""
    pipeline = whole_pipeline(MMFacePipeline, randomise(SpadeGan(4, 32), std=0.2).eval())
    images = [
        pipeline("a face", control_image=control, num_inference_steps=1, output_type="np",
                 generator=torch.Generator().manual_seed(0)).images
        for control in (None, {"mask": draw_face(0, 0, 64).mask})
    ]  # fmt: skip
    assert np.isfinite(images).all()
    assert np.abs(images[0] - images[1]).max() > 1e-3


@torch.no_grad()
def test_composition_is_its_formula():
    text, mask, given = random_network("mmface-text"), random_network("mmface-mask"), random_inputs()
    absent = torch.full_like(given[-1], -1)
    without = mask(*given[:-1], absent)
    wanted = text(*given[:-1], absent) + mask(*given) - without
    found = composed(None, text, mask)(*given)
    torch.testing.assert_close(found, wanted)
    torch.testing.assert_close(found[1], text(*given[:-1], absent)[1])
    other = TextFeatures(given[2].tokens + 1, given[2].pooled + 1)
    assert torch.equal(mask(given[0], given[1], other, *given[3:]), mask(*given))  # the mask network is blind to text


def test_one_step_of_the_gan_is_its_generator():
    """An Euler step from time 1 to 0 returns the generator's latents; each loss trains its own network only."""
    model, (noise, time, text, mask, index) = random_network("spade"), random_inputs()
    condition = model.condition_map(mask, index)
    fake = model.generate(noise, text.pooled, condition)
    torch.testing.assert_close(noise - model(noise, time, text, mask, index), fake)
    assert not condition[1].any()  # without a condition
    batch = Batch(torch.zeros_like(noise), noise, time, mask, index, captions=[], text=text)
    gan_losses(model, None, batch).sum().backward()
    wanted = (1 - model.discriminator(batch.clean, condition, text.pooled)).relu().mean(dim=(1, 2, 3))
    wanted = wanted + (1 + model.discriminator(fake.detach(), condition, text.pooled)).relu().mean(dim=(1, 2, 3))
    weight = model.discriminator.score.weight
    torch.testing.assert_close(torch.autograd.grad(wanted.sum(), weight)[0], weight.grad)
    assert model.out.weight.grad.abs().max() > 0


@torch.no_grad()
def test_a_cache_of_another_mask_gives_another_result():
    """The static pathway depends on the mask: after a change of the mask, a cache must be computed again."""
    network, (latents, time, text, mask, _) = random_network("decoupled"), random_inputs()
    index = torch.zeros(2, 1, dtype=torch.long)
    stale, new = (network.static_cache(text, one, index) for one in (mask, -mask))
    wanted = network(latents, time, text, -mask, index)
    assert torch.equal(network(latents, time, text, -mask, index, static_cache=new), wanted)
    assert (network(latents, time, text, -mask, index, static_cache=stale) - wanted).abs().max() > 1e-3


def test_captions_are_cut():
    assert ablate.first_clause("a woman with red hair, smiling and wearing a hat.") == "a woman with red hair"
    assert ablate.first_clause("") == ""
