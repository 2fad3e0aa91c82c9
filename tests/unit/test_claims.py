"""The ledger of claims: complete, decided by its numbers, and not older than the code."""

import copy
import json
import sys
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy import stats

sys.path.append(str(Path(__file__).parents[2] / "benchmarks"))  # these scripts import each other

import ablate
import claims
from baselines.composed import composed
from baselines.controlnet import controlnet
from baselines.spade import SpadeGan, gan_losses
from training_losses import contrastive_losses, dispersive_losses

from builders import randomise, whole_pipeline
from likeness.data.synthetic import draw_face
from likeness.objectives import RectifiedFlow
from likeness.pipelines.mmface import MMFacePipeline
from likeness.train.batches import Batch
from likeness.train.ema import Ema
from likeness.types import InputError, TextFeatures


def test_ledger():
    found = claims.read_claims()
    assert {claim.paper for claim in found.values()} == {"MDiTFace", "MMFace-DiT"}
    for claim in found.values():
        assert set(claim.compare[:2] if claim.compare else ()) <= set(ablate.VARIANTS)
        assert claim.command.startswith(("python benchmarks/", "likeness ", "python -m pytest "))
    assert claims.out_of_date(found) == []
    assert claims.PAGE.read_text(encoding="utf-8") == claims.page(found)


@pytest.mark.parametrize(
    ("expect", "low", "high", "verdict"),
    [
        ("higher", 0.01, 0.03, claims.REPRODUCED),
        ("higher", -0.01, 0.03, claims.UNDECIDED),
        ("higher", -0.03, -0.01, claims.CONTRADICTED),
        ("lower", -0.03, -0.01, claims.REPRODUCED),
        ("lower", 0.01, 0.03, claims.CONTRADICTED),
        ("equal", -0.01, 0.019, claims.REPRODUCED),
        ("equal", -0.01, 0.03, claims.UNDECIDED),
        ("equal", 0.03, 0.05, claims.CONTRADICTED),
        ("not lower", -0.01, 0.05, claims.REPRODUCED),
        ("not lower", -0.03, 0.05, claims.UNDECIDED),
        ("not lower", -0.05, -0.03, claims.CONTRADICTED),
    ],
)
def test_verdicts(expect, low, high, verdict):
    compare = ("hard", "decoupled", "pixel_accuracy/mask")
    claim = claims.Claim(
        paper="MDiTFace", source="", claim="", command="", change="", compare=compare, expect=expect, within=0.02
    )
    numbers = {
        "value": (low + high) / 2,
        "low": low,
        "high": high,
        "p": 0.5,
        "by_seed": [0.0, 0.0],
        "means": [0.0, 0.0],
    }
    comparisons = {claims.key_of(compare): {**numbers, "n": 2, "images": 96}}
    assert claims.verdict_of(claim, comparisons)[0] == verdict
    assert claims.verdict_of(claim, {})[0] == claims.OPEN


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


def test_interval_of_equal_differences():
    found = ablate.interval(np.full((3, 10), 0.5))
    assert (found["low"], found["high"], found["p"]) == pytest.approx((0.5, 0.5, 0.0), abs=1e-9)


def write_runs(out: Path, name: str, seeds, offset: float, fingerprint: float = 1.0) -> None:
    """Results of `train`: 20 faces, of which the first has no value; values by face are offset + seed / 100 + noise."""
    for seed in seeds:
        run, noise = out / name / f"seed-{seed}", np.random.default_rng(seed).standard_normal(20) / 1000
        (run / "evaluation").mkdir(parents=True)
        values = np.where(np.arange(20) == 0, np.nan, offset + seed / 100 + noise)
        np.savez(run / "evaluation" / "scores.npz", **{"pixel_accuracy/mask": values})
        facts = {"images": 96, "count": 20, "parameters": 1, "trainable": 1, "commit": "0", "fingerprint": fingerprint}
        means = {"pixel_accuracy/mask": float(np.nanmean(values)), "kid_text_image/mask": 0.1}
        (run / "result.json").write_text(json.dumps({**facts, "means": means}))


@pytest.fixture
def ledger(tmp_path, monkeypatch):
    """An empty one."""
    monkeypatch.setattr(ablate, "RESULTS", tmp_path / "ablations.json")
    monkeypatch.setattr(ablate, "SCORES", tmp_path / "ablations")
    return tmp_path


WANTED = [("hard", "decoupled", "pixel_accuracy/mask")]


def test_collected_runs_need_not_be_kept(ledger):
    """Runs on another machine are added to the committed ones and compared with them."""
    write_runs(ledger / "one", "decoupled", [0, 1], 0.7)
    ablate.collect(WANTED, ledger / "one", [0, 1, 2])
    write_runs(ledger / "two", "hard", [0, 1, 2], 0.6)
    ablate.collect(WANTED, ledger / "two", [0, 1, 2])
    assert not ablate.read_results()["comparisons"]  # two seeds, and no other variants that tell how much seeds vary

    write_runs(ledger / "three", "decoupled", [2], 0.8)
    ablate.collect(WANTED, ledger / "three", [2])
    stored = ablate.read_results()["variants"]["decoupled"]["seeds"]
    assert [stored[seed]["pixel_accuracy/mask"] for seed in "012"] == pytest.approx([0.7, 0.71, 0.82], abs=1e-3)
    found = ablate.read_results()["comparisons"]["hard decoupled pixel_accuracy/mask"]
    assert found["by_seed"] == pytest.approx([-0.1, -0.1, -0.2], abs=1e-6)
    assert (found["n"], found["images"]) == (19, 96)

    write_runs(ledger / "three", "decoupled", [1], 0.8, fingerprint=2.0)
    with pytest.raises(InputError, match=r"different fingerprint: 2\.0 \(seed 1\), 1\.0 \(seed 2\); remove the old"):
        ablate.collect(WANTED, ledger / "three", [1, 2])
    write_runs(ledger / "four", "decoupled", [2], 0.8, fingerprint=2.0)  # other code
    ablate.collect(WANTED, ledger / "four", [2])
    assert list(ablate.read_results()["variants"]["decoupled"]["seeds"]) == ["2"]
    assert list(ablate.read_scores("decoupled")) == ["2/pixel_accuracy/mask"]
    assert not ablate.read_results()["comparisons"]


def test_comparison_of_one_seed(ledger):
    """It takes the variance between seeds from the variants of the same network with three."""
    for name, offsets in {"decoupled": (0.7, 0.7, 0.7), "concat": (0.5, 0.52, 0.5)}.items():
        for seed, offset in enumerate(offsets):
            write_runs(ledger / "runs", name, [seed], offset)
    write_runs(ledger / "runs", "hard", [1], 0.6)
    write_runs(ledger / "runs", "mmface", [0, 1, 2], 0.1)
    ablate.collect(WANTED, ledger / "runs", [0, 1, 2])
    variance, freedom = ablate.variance_between_seeds(ablate.read_results(), WANTED[0][:2], "pixel_accuracy/mask")
    assert (variance, freedom) == (pytest.approx(np.var([-0.2, -0.18, -0.2], ddof=1), rel=1e-3), 2)
    found = ablate.read_results()["comparisons"]["hard decoupled pixel_accuracy/mask"]
    assert found["by_seed"] == pytest.approx([-0.1], abs=1e-6)
    reach = variance**0.5 * stats.t.ppf(0.975, 2)  # all faces differ equally
    assert (found["low"], found["high"]) == pytest.approx((-0.1 - reach, -0.1 + reach), rel=1e-3)
    claim = claims.Claim(paper="MDiTFace", source="", claim="", command="", change="", compare=WANTED[0])
    assert (
        "by seed -0.1000 alone; p 0.013; 19 faces" in claims.verdict_of(claim, ablate.read_results()["comparisons"])[1]
    )
    for pair in (("mmface-open", "mmface"), ("decoupled", "spade")):
        assert ablate.variance_between_seeds(ablate.read_results(), pair, "pixel_accuracy/mask") is None


def test_comparison_of_means(ledger):
    """Without committed scores by face of one variant, the means of the seeds are paired."""
    for name, offset in {"decoupled": 0.7, "hard": 0.6}.items():
        write_runs(ledger / "runs", name, [0, 1, 2], offset)
        ablate.collect(WANTED, ledger / "runs", [0, 1, 2])
    by_face = ablate.read_results()["comparisons"]["hard decoupled pixel_accuracy/mask"]
    (ledger / "ablations" / "hard.npz").unlink()
    ablate.collect(WANTED, ledger / "none", [0, 1, 2])
    found = ablate.read_results()["comparisons"]["hard decoupled pixel_accuracy/mask"]
    assert found["n"] == 1
    assert found["by_seed"] == pytest.approx(by_face["by_seed"], abs=1e-6)
    claim = claims.Claim(paper="MDiTFace", source="", claim="", command="", change="", compare=WANTED[0])
    assert (
        "means of all faces, whose variance is left out"
        in claims.verdict_of(claim, ablate.read_results()["comparisons"])[1]
    )


def random_inputs() -> tuple:
    """Latents, time, text, condition latents and index for `random_network`; the second sample has no mask."""
    draw = torch.Generator().manual_seed(1)
    latents, condition = (torch.randn(shape, generator=draw) for shape in ((2, 8, 16, 16), (2, 1, 8, 16, 16)))
    text = TextFeatures(torch.randn(2, 8, 32, generator=draw), torch.randn(2, 32, generator=draw))
    return latents, torch.tensor([900.0, 100.0]), text, condition, torch.tensor([[0], [-1]])


def random_network(name):
    return ablate.random_network(name, partial(torch.randn, generator=torch.Generator().manual_seed(0)))[0]


def test_variants_differ_and_train():
    """Every variant of a network differs from all others, and training reaches its weights."""
    same = {"no-dropout", "mmface-short", "mmface-progressive", "mmface-text"}  # differ in their data only
    same |= {"mmface-contrastive", "mmface-dispersive"}  # and in their loss only
    prints = {name: ablate.fingerprint(name) for name in ablate.VARIANTS if name not in same}
    assert len(set(prints.values())) == len(prints)
    latents, time, text, condition, index = random_inputs()
    for name in prints.keys() - {"mditface-text", "composed", "mmface-swapped"}:
        network = random_network(name)
        network(latents, time, text, condition, index).square().mean().backward()
        trained = [one for one in network.parameters() if one.requires_grad]
        assert sum(one.grad is not None and one.grad.abs().max() > 0 for one in trained) > 0.5 * len(trained)


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
