"""Batches, checkpoints and the training loop: exact, resumable, and rejecting data that do not fit."""

from __future__ import annotations

import json
import pickle
import shutil
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn
from torch.distributed.checkpoint import FileSystemReader, FileSystemWriter
from torch.nn import functional as F

from builders import tiny_transformer
from likeness.data.sampler import Sampler
from likeness.data.store import Sample, Store
from likeness.encoders.components import load_components
from likeness.files import writing_folder
from likeness.objectives import RectifiedFlow
from likeness.parallel import SINGLE_PROCESS
from likeness.pipelines.generate import generate, resolve
from likeness.pipelines.load import load
from likeness.prepare.encode import encode_folder
from likeness.train import loop
from likeness.train.batches import latent_statistics, make_batch
from likeness.train.checkpoint import checkpoints, save_checkpoint
from likeness.train.config import DataRecipe
from likeness.train.ema import Ema, exponent
from likeness.train.features import ParserFeatures, parser_features
from likeness.train.losses import AlignmentLoss, denoising_losses
from likeness.train.muon import Muon, orthogonalize
from likeness.train.networks import freeze_others
from likeness.train.optim import learning_rate, make_optimizers
from likeness.train.train_state import TrainState
from likeness.types import ConditionInput, InputError, PortraitRequest
from runs import check_resume, killed_after_checkpoint, load_checkpoint, metrics, sigterm_in_step, small, weights_of


@pytest.fixture(scope="module")
def root(prepared_faces) -> Path:
    return prepared_faces


def test_sampler_sees_every_face_once_an_epoch():
    sampler = Sampler(7, seed=1)
    epochs = [[sampler[p] for p in range(start, start + 7)] for start in (0, 7, 14)]
    assert all(sorted(epoch) == list(range(7)) for epoch in epochs)
    assert epochs[0] != epochs[1]
    assert Sampler(7, seed=1)[16] == epochs[2][2]


def test_batch_depends_on_positions_only():
    """A sample's draws are the same in any batch, on any rank."""
    samples = [
        Sample(torch.full((4, 4, 4), float(i)), {"mask": torch.ones(4, 4, 4)}, [f"caption {k}" for k in range(5)])
        for i in range(6)
    ]
    data = DataRecipe(shards=(), condition_probabilities={"mask": 0.5, "none": 0.5})
    one, zero = torch.ones(1), torch.zeros(1)
    whole = make_batch(samples, range(10, 16), data, ["mask", "none"], zero, one, seed=3)
    part = make_batch(samples[4:], range(14, 16), data, ["mask", "none"], zero, one, seed=3)
    assert torch.equal(whole.noise[4:], part.noise)
    assert torch.equal(whole.uniform[4:], part.uniform)
    assert torch.equal(whole.condition_index[4:], part.condition_index)
    assert whole.captions[4:] == part.captions


def test_probabilities_of_conditions_and_text_dropout():
    """Text is dropped once, in 10 % of 10,000 samples, and conditions have their probabilities."""
    sample = Sample(torch.zeros(1, 1, 1), {"mask": torch.zeros(1, 1, 1), "sketch": torch.zeros(1, 1, 1)}, ["caption"])
    data = DataRecipe(shards=(), condition_probabilities={"mask": 0.45, "sketch": 0.35, "none": 0.2}, text_dropout=0.1)
    n, one, zero = 10_000, torch.ones(1), torch.zeros(1)
    batch = make_batch([sample] * n, range(n), data, ["mask", "sketch", "none"], zero, one, seed=0)
    assert abs(batch.captions.count("") / n - 0.1) < 0.01
    index = batch.condition_index[:, 0]
    for condition_id, probability in ((0, 0.45), (1, 0.35), (-1, 0.2)):
        assert abs((index == condition_id).float().mean().item() - probability) < 0.015
    assert abs(batch.uniform.mean().item() - 0.5) < 0.01
    assert abs(batch.noise.std().item() - 1) < 0.03


def test_several_conditions_at_once():
    conditions = {name: torch.full((2, 4, 4), float(value)) for value, name in enumerate(("mask", "sketch"), start=1)}
    both, lacking = Sample(torch.zeros(2, 4, 4), conditions, []), Sample(torch.zeros(2, 4, 4), {}, [])
    data = DataRecipe(shards=(), condition_probabilities={"mask+sketch": 1.0})
    mean, std = torch.full((1, 2, 1, 1), 1.0), torch.full((1, 2, 1, 1), 2.0)
    batch = make_batch([both, lacking], [0, 1], data, ["sketch", "mask"], mean, std, seed=0)
    assert batch.condition_index.tolist() == [[1, 0], [-1, -1]]
    assert batch.condition_latents.shape == (2, 2, 2, 4, 4)
    assert batch.condition_latents[0].mean(dim=(1, 2, 3)).tolist() == [0.0, 0.5]
    assert (batch.clean == -0.5).all()


def test_photo_condition():
    """Mask or zeros in a random region of whole tokens, the image outside it, with the draws of the position."""
    image, mask = torch.randn(2, 2, 16, 16, generator=torch.Generator().manual_seed(0))
    data = DataRecipe(shards=(), condition_probabilities={"mask+photo": 1.0})
    mean, std = torch.full((1, 2, 1, 1), 1.5), torch.full((1, 2, 1, 1), 2.0)
    n, samples = 400, [Sample(image, {"mask": mask}, []), Sample(image, {}, [])]
    batch, whole, short = (
        make_batch(samples * (count // 2), range(count), data, ["mask", "photo"], mean, std, 0, patch_size)
        for count, patch_size in ((n, 4), (n, 2), (2, 4))
    )
    assert torch.equal(batch.condition_latents[:2], short.condition_latents)
    assert batch.condition_index[:2].tolist() == [[0, 1], [1, -1]]
    image, mask = ((one - mean[0]) / std[0] for one in (image, mask))
    sizes, zeros = [], 0
    for item in range(n):
        photo = batch.condition_latents[item, 1 - item % 2]  # [C, h, w]
        region = (photo != image).any(dim=0)  # [h, w]
        tokens = region[::4, ::4]
        assert torch.equal(region, tokens.repeat_interleave(4, 0).repeat_interleave(4, 1))
        zeros += bool((photo[:, region] == 0).all())
        assert torch.equal(photo[:, region], 0 * mask[:, region]) or torch.equal(photo[:, region], mask[:, region])
        assert item % 2 == 0 or (photo[:, region] == 0).all()  # the second face has no mask
        sizes.append(tokens.float().mean().item())
    assert 0.5 < zeros / n < 0.7
    assert min(sizes) > 0
    assert max(sizes) < 1
    assert np.mean(np.array(sizes) <= 0.6) > 0.85
    assert np.std(sizes) > 0.15
    assert (whole.condition_latents[:, :, :, 2:4] != batch.condition_latents[:, :, :, 2:4]).any()


@pytest.mark.parametrize(
    ("name", "probabilities", "weight"), [("adamw", None, 0.0), ("muon", {"mask": 0.3, "photo": 0.7}, 0.5)]
)
def test_resume_is_exact(root, tmp_path, name, probabilities, weight):
    """Killed after a checkpoint, then stopped by SIGTERM: bit-identical weights, EMA, optimizer states and previews."""
    preview = [{"prompt": "a face", "mask": f"{root}/faces/train/masks/000000.png", "seed": 5}]
    recipe = small(root, probabilities, optimizer={"name": name}, preview=preview, alignment_weight=weight)
    train = lambda run: loop.train(recipe, run)  # noqa: E731
    check_resume(train, tmp_path, killed_after_checkpoint(), sigterm_in_step(3, 20))
    assert [int(path.name) for path in checkpoints(tmp_path / "parts")] == [20, 24]


@pytest.mark.parametrize("bf16", [True, False])
def test_muon_is_that_of_torch(bf16, monkeypatch):
    """Equal up to rounding in bf16, which torch always uses."""
    monkeypatch.setattr("likeness.train.muon.supports_bf16", lambda device: bf16)
    draw = torch.Generator().manual_seed(0)
    shapes = [(8, 24), (24, 8), (8, 24), (8, 8)]
    start = [torch.randn(shape, generator=draw) for shape in shapes]
    ours, theirs = ([nn.Parameter(one.clone()) for one in start] for _ in range(2))
    muon = Muon(ours, lr=0.1, weight_decay=0.2)
    reference = torch.optim.Muon(theirs, lr=0.1, weight_decay=0.2, adjust_lr_fn="match_rms_adamw")
    for _ in range(3):
        for one, other, shape in zip(ours, theirs, shapes, strict=True):
            one.grad = torch.randn(shape, generator=draw)
            other.grad = one.grad.clone()
        muon.step()
        reference.step()
    for one, other, before in zip(ours, theirs, start, strict=True):
        assert (one - other).norm() < 0.01 * (other - before).norm()
        assert torch.allclose(muon.state[one]["momentum_buffer"], reference.state[other]["momentum_buffer"])


@pytest.mark.parametrize("shape", [(3, 16, 48), (3, 48, 16)])
def test_orthogonalized_matrices(shape):
    matrices = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    left, values, right = torch.linalg.svd(orthogonalize(matrices).float(), full_matrices=False)
    assert 0.6 < values.min() <= values.max() < 1.3
    u, _, v = torch.linalg.svd(matrices, full_matrices=False)
    assert ((left @ right) * (u @ v)).sum(dim=(1, 2)) / 16 == pytest.approx([1.0] * 3, abs=0.02)


def test_muon_takes_the_matrices_of_the_blocks(root):
    network = tiny_transformer()
    adamw, muon = make_optimizers(network, small(root, optimizer={"name": "muon"}).optimizer)
    names = {parameter: name for name, parameter in network.named_parameters()}
    taken = {names[parameter] for group in muon.param_groups for parameter in group["params"]}
    left = {names[parameter] for group in adamw.param_groups for parameter in group["params"]}
    assert taken | left == set(names.values())
    assert not taken & left
    assert "blocks.0.attention.image_qkv.weight" in taken
    assert {"patch_embed.weight", "blocks.0.modulation.weight", "final.weight", "text_embed.weight"} <= left
    freeze_others(network, ("blocks.0.attention.image_qkv.weight",))  # as a LoRA: matrices of blocks only
    (only,) = make_optimizers(network, small(root, optimizer={"name": "muon"}).optimizer)
    assert isinstance(only, Muon)
    network.requires_grad_(True)
    (alone,) = make_optimizers(network, small(root).optimizer)
    assert sum(len(group["params"]) for group in alone.param_groups) == len(names)


def test_preview_is_what_generate_makes(root, tmp_path):
    """The published pipeline generates the pixels of the preview."""
    mask = f"{root}/faces/train/masks/000000.png"
    pipeline = load(loop.train(small(root, preview=[{"prompt": "a face", "mask": mask, "seed": 5}]), tmp_path))
    assert pipeline.config.sizes == [[32, 32]]  # those of the shards
    request = resolve(
        PortraitRequest(prompt="a face", conditions={"mask": ConditionInput(image=mask)}, seed=5), pipeline
    )
    image = generate(pipeline, request, [5])[0][0]
    preview = Image.open(sorted((tmp_path / "previews").iterdir())[-1])
    assert np.array_equal(np.asarray(preview), np.asarray(image))


def test_loss_falls(root, tmp_path):
    loop.train(small(root, optimizer={"images": 480}, log_every=48, checkpoint_every=480), tmp_path)
    losses = [line["loss"] for line in metrics(tmp_path)]
    assert losses[-1] < 0.9 * losses[0]


@pytest.mark.parametrize("name", ["mmface", "mditface"])
def test_features_are_aligned_to_those_of_the_face_parser(root, tmp_path, name):
    """The loss falls faster than without weight; the published network is without projection."""
    network = {"name": name} | ({"single_depth": 3} if name == "mditface" else {})
    last = []
    for weight in (1e-9, 1.0):
        run = tmp_path / str(weight)
        given = {"images": 320, "batch": 8, "learning_rate": 3e-3}
        loop.train(small(root, {"mask": 1.0}, network=network, optimizer=given, alignment_weight=weight), run)
        last.append(metrics(run)[-1]["alignment"])
    assert last[1] < last[0] - 0.05
    assert any("projection" in tensor for tensor in load_checkpoint(run))
    assert not any("projection" in name for name in weights_of(run / "model"))


def test_alignment_loss_is_its_formula(root, tmp_path):
    """Of known tokens and features; features are kept in a file and read again; a second start finds it."""
    components, store = load_components(root / "components"), Store(root / "shards")
    features = ParserFeatures("bundled", components, [store], tmp_path, 2, SINGLE_PROCESS)
    mean, std = latent_statistics(components.settings)
    clean = torch.stack([(store[number].latents - mean[0]) / std[0] for number in (1, 3)])
    numbers = torch.tensor([1, 3])
    found = features(numbers, clean)
    torch.testing.assert_close(found, parser_features(features.parser, features.codec, clean), atol=2e-3, rtol=2e-3)
    torch.testing.assert_close(found.mean(dim=(2, 3)), torch.zeros(2, 128), atol=2e-3, rtol=0)
    again = ParserFeatures("bundled", components, [store], tmp_path, 2, SINGLE_PROCESS)
    assert torch.equal(again(numbers, torch.zeros_like(clean)), found)
    ParserFeatures("bundled", components, [store, store], tmp_path, 2, SINGLE_PROCESS)
    assert len(list(tmp_path.iterdir())) == 1  # that of other shards is deleted

    network, names = tiny_transformer(), ["mask", "sketch", "keypoints", "none"]
    loss = AlignmentLoss(network, features)
    batch = make_batch(
        [store[1], store[3]],
        [0, 1],
        DataRecipe(shards=(), condition_probabilities={"mask": 1.0}),
        names,
        mean,
        std,
        seed=0,
    )
    batch = batch._replace(numbers=numbers).with_text(components)
    denoising_losses(network, RectifiedFlow(), batch)
    projected = loss.projected
    expected = 1 - F.cosine_similarity(projected, found, dim=1).mean()
    torch.testing.assert_close(loss(batch), expected)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"alignment_weight": -1}, "alignment_weight is -1"),
        ({"alignment_weight": 1, "data": {"target": "mask"}}, "alignment_weight needs a whole network that generates"),
        ({"alignment_weight": 1, "network": {"patch_size": 1}}, "image tokens of 16 px, but they have 8 px"),
    ],
)
def test_alignment_that_cannot_be_trained_is_rejected(root, tmp_path, changes, message):
    with pytest.raises(InputError, match=message):
        loop.train(small(root, {"sketch": 1.0}, **changes), tmp_path)


def test_run_of_another_recipe_is_rejected(root, tmp_path):
    loop.train(small(root, optimizer={"images": 4}), tmp_path)
    with pytest.raises(InputError, match="another network"):
        loop.train(small(root, optimizer={"images": 4}, network={"depth": 3}), tmp_path)


def test_shards_of_another_autoencoder_are_rejected(root, tmp_path):
    copy = tmp_path / "shards"
    shutil.copytree(root / "shards", copy)
    manifest = json.loads((copy / "manifest.json").read_text())
    (copy / "manifest.json").write_text(json.dumps({**manifest, "codec": "0" * 64}))
    with pytest.raises(InputError, match="another encoder"):
        loop.train(small(root, data={"shards": [str(copy)]}), tmp_path / "run")


def test_text_features_of_the_shards(root, tmp_path):
    """Stored features give the losses of the encoder; those of another encoder or of some shards are rejected."""
    components, out = load_components(root / "components"), tmp_path / "shards"
    encode_folder(root / "faces", out, components, size=32, text_features=True)

    def train(run: str, *shards: Path) -> float:
        recipe = small(root, optimizer={"images": 8}, data={"shards": [str(path) for path in shards]})
        loop.train(recipe, tmp_path / run)
        return metrics(tmp_path / run)[0]["loss"]

    assert train("stored", out) == pytest.approx(train("computed", root / "shards"), rel=1e-3)
    with pytest.raises(InputError, match="differ in their text features"):
        train("mixed", out, root / "shards")
    manifest = json.loads((out / "manifest.json").read_text())
    (out / "manifest.json").write_text(json.dumps({**manifest, "text": "0" * 64}))
    with pytest.raises(InputError, match="another text encoder"):
        train("other", out)
    with pytest.raises(InputError, match="another text encoder"):
        encode_folder(root / "faces", out, components, size=32)


def test_condition_without_data_is_rejected(root, tmp_path):
    with pytest.raises(InputError, match="has no depth"):
        loop.train(small(root, {"mask": 0.5, "depth": 0.5}), tmp_path)


def test_checkpoints_are_complete_and_few(tmp_path):
    for seen in (10, 20, 30):
        save_checkpoint(tmp_path, seen, {"weight": torch.full((3,), float(seen))}, keep=2)
    assert [path.name for path in checkpoints(tmp_path)] == ["000000000020", "000000000030"]
    # the incomplete checkpoint of a killed process is ignored
    ignore = shutil.ignore_patterns(".metadata")
    shutil.copytree(checkpoints(tmp_path)[-1], tmp_path / "checkpoints" / "000000000040", ignore=ignore)
    assert load_checkpoint(tmp_path)["weight"].tolist() == [30.0] * 3


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 0x40
    path.write_bytes(data)


class Code:
    """An object whose unpickling runs code."""

    def __reduce__(self):
        return print, ("code ran",)


def outside(path: Path) -> None:
    metadata = pickle.loads(path.read_bytes())
    for info in metadata.storage_data.values():
        info.relative_path = f"../000000000010/{info.relative_path}"
    path.write_bytes(pickle.dumps(metadata))


DAMAGES = {
    "flipped bit": ("__0_0.distcp", flip, "its SHA-256 is not the recorded one; delete it to resume from 000000000010"),
    "cut off": ("__0_0.distcp", lambda path: path.write_bytes(path.read_bytes()[:20]), "__0_0.distcp is damaged"),
    "missing": ("__0_0.distcp", Path.unlink, "__0_0.distcp is damaged"),
    "flipped bit in the metadata": (".metadata", flip, "delete it to resume from 000000000010"),
    "code": (".metadata", lambda path: path.write_bytes(pickle.dumps(Code())), "builtins.print, which is not of a"),
    "no metadata": (".metadata", lambda path: path.write_bytes(pickle.dumps([1])), "contains a list"),
    "another folder": (".metadata", outside, r"outside its folder\); delete it to resume from 000000000010"),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_damaged_checkpoints(tmp_path, capsys, name):
    """One sentence that names the checkpoint before it; nothing in it is run."""
    file, damage, message = DAMAGES[name]
    for seen in (10, 20):
        save_checkpoint(tmp_path, seen, {"weight": torch.full((300,), float(seen))})
    newest = checkpoints(tmp_path)[-1]
    damage(newest / file)
    with pytest.raises(InputError, match=f"000000000020.*{message}"):
        load_checkpoint(tmp_path)
    assert "code ran" not in capsys.readouterr().out
    shutil.rmtree(newest)
    assert load_checkpoint(tmp_path)["weight"].tolist() == [10.0] * 300


def test_ctrl_c_during_a_checkpoint_stops(tmp_path, monkeypatch):
    """DCP turns it into an error of its own."""

    def interrupt(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    save_checkpoint(tmp_path, 10, {"weight": torch.zeros(3)})
    monkeypatch.setattr(FileSystemWriter, "write_data", interrupt)
    with pytest.raises(KeyboardInterrupt):
        save_checkpoint(tmp_path, 20, {"weight": torch.zeros(3)})
    assert [path.name for path in checkpoints(tmp_path)] == ["000000000010"]
    monkeypatch.setattr(FileSystemReader, "read_data", interrupt)
    with pytest.raises(KeyboardInterrupt):
        load_checkpoint(tmp_path)


def test_folders_are_written_atomically(tmp_path):
    """There is always a whole one, also if writing fails."""
    folder, stop, bad = tmp_path / "model", threading.Event(), []

    def watch() -> None:
        while not stop.is_set():
            try:
                assert all((folder / name).read_text() for name in "ab")
            except (OSError, AssertionError) as error:
                bad.append(error)
            stop.wait(0.0005)

    def write(text: str) -> None:
        with writing_folder(folder) as partial:
            for name in "ab":
                (partial / name).write_text(text)

    write("0")
    thread = threading.Thread(target=watch)
    thread.start()
    for number in range(60):
        write(str(number))
    with pytest.raises(UnicodeEncodeError):
        write("\ud800")
    stop.set()
    thread.join()
    assert [path.name for path in tmp_path.iterdir()] == ["model"]
    assert [(folder / name).read_text() for name in "ab"] == ["59", "59"]
    assert not bad


def test_a_step_clips_the_gradient():
    model = torch.nn.Linear(2, 1, bias=False)
    before = model.weight.detach().clone()
    state = TrainState(model=model, optimizers=[torch.optim.SGD(model.parameters(), lr=1.0)])
    for gradient, change in (([[3.0, 4.0]], [[0.3, 0.4]]), ([[0.3, 0.4]], [[0.15, 0.2]])):
        model.weight.grad = torch.tensor(gradient)
        norm = state.step(0.5, 1.0)
        torch.testing.assert_close(norm, torch.tensor(gradient).norm())
        torch.testing.assert_close(before - model.weight.detach(), torch.tensor(change), atol=1e-5, rtol=1e-5)
        before = model.weight.detach().clone()
    assert model.weight.grad is None


def test_learning_rate():
    rate = lambda seen, decay: learning_rate(seen, 100, 1.0, 10, decay)  # noqa: E731
    assert rate(0, "cosine") == pytest.approx(0.1)
    assert rate(10, "cosine") == 1.0
    assert rate(55, "cosine") == pytest.approx(0.5)
    assert rate(55, "linear") == pytest.approx(0.5)
    assert rate(100, "linear") == pytest.approx(0.0)
    assert rate(99, "constant") == 1.0


def test_power_law_ema():
    """Against the definition: the EMA at step n weighs step t by t^gamma, normalized."""
    model = torch.nn.Linear(1, 1, bias=False)
    ema = Ema(model, 0.1)
    assert exponent(0.1) == pytest.approx(6.94, abs=0.01)
    values = torch.randn(200, generator=torch.Generator().manual_seed(0))
    for step, value in enumerate(values, start=1):
        with torch.no_grad():
            model.weight.fill_(value)
        ema.update(step)
    steps = torch.arange(1, 201, dtype=torch.float64)
    weights = steps**ema.gamma / (steps**ema.gamma).sum()
    assert ema.weights["weight"].item() == pytest.approx((weights * values).sum().item(), abs=0.02)
    average = ema.averaged_model().weight.item()
    with ema.applied():
        assert model.weight.item() == average
    assert model.weight.item() == values[-1].item()
