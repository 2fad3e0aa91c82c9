"""U2-Net: official parameter names, published architecture, dark strokes on white."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch.nn import functional as F

from likeness.annotators.u2net import INPUT_SIDE, MEAN, PORTRAIT, STD, U2Net, draw_sketch, load_sketcher, load_u2net
from likeness.data.synthetic import draw_face
from likeness.types import InputError

STAGES = {
    "stage1": "in 1 2 3 4 5 6 7 6d 5d 4d 3d 2d 1d",
    "stage2": "in 1 2 3 4 5 6 5d 4d 3d 2d 1d",
    "stage3": "in 1 2 3 4 5 4d 3d 2d 1d",
    "stage4": "in 1 2 3 4 3d 2d 1d",
    "stage5": "in 1 2 3 4 3d 2d 1d",
    "stage6": "in 1 2 3 4 3d 2d 1d",
    "stage5d": "in 1 2 3 4 3d 2d 1d",
    "stage4d": "in 1 2 3 4 3d 2d 1d",
    "stage3d": "in 1 2 3 4 5 4d 3d 2d 1d",
    "stage2d": "in 1 2 3 4 5 6 5d 4d 3d 2d 1d",
    "stage1d": "in 1 2 3 4 5 6 7 6d 5d 4d 3d 2d 1d",
}
"""Stage -> its blocks, rebnconv<name>, in the official weights."""

OFFICIAL = [
    f"{stage}.rebnconv{block}.{part}"
    for stage, blocks in STAGES.items()
    for block in blocks.split()
    for part in (
        "conv_s1.weight", "conv_s1.bias", "bn_s1.weight", "bn_s1.bias", "bn_s1.running_mean", "bn_s1.running_var",
        "bn_s1.num_batches_tracked",
    )
] + [
    f"{layer}.{part}"
    for layer in ("side1", "side2", "side3", "side4", "side5", "side6", "outconv")
    for part in ("weight", "bias")
]  # fmt: skip

SHAPES = {
    "stage1.rebnconvin.conv_s1.weight": (64, 3, 3, 3),
    "stage1.rebnconv1.conv_s1.weight": (32, 64, 3, 3),
    "stage1.rebnconv1d.conv_s1.weight": (64, 64, 3, 3),
    "stage2.rebnconvin.conv_s1.weight": (128, 64, 3, 3),
    "stage3.rebnconv4d.conv_s1.weight": (64, 128, 3, 3),
    "stage4.rebnconv4.conv_s1.weight": (128, 128, 3, 3),
    "stage5.rebnconv2d.conv_s1.weight": (256, 512, 3, 3),
    "stage6.rebnconv1d.conv_s1.weight": (512, 512, 3, 3),
    "stage5d.rebnconvin.conv_s1.weight": (512, 1024, 3, 3),
    "stage4d.rebnconvin.conv_s1.weight": (256, 1024, 3, 3),
    "stage3d.rebnconvin.conv_s1.weight": (128, 512, 3, 3),
    "stage2d.rebnconvin.conv_s1.weight": (64, 256, 3, 3),
    "stage1d.rebnconvin.conv_s1.weight": (64, 128, 3, 3),
    "side1.weight": (1, 64, 3, 3),
    "side3.weight": (1, 128, 3, 3),
    "side6.weight": (1, 512, 3, 3),
    "outconv.weight": (1, 6, 1, 1),
}

TINY = {name: (2, 3 + number % 3) for number, name in enumerate(PORTRAIT)}
"""Adjacent widths differ, so that wrong connections fail."""


@pytest.fixture(scope="module")
def tiny() -> U2Net:
    """Random weights and statistics, none 0 or 1."""
    torch.manual_seed(0)
    network = U2Net(TINY)
    for name, value in network.state_dict().items():
        if value.is_floating_point():
            value.copy_(torch.rand_like(value) + 0.5 if "running_var" in name else 0.4 * torch.randn_like(value))
    return network.eval()


def test_official_names_and_sizes():
    with torch.device("meta"):
        network, small = U2Net(), U2Net(dict.fromkeys(PORTRAIT, (16, 64)))
    state = network.state_dict()
    assert sorted(state) == sorted(OFFICIAL)
    assert {name: tuple(state[name].shape) for name in SHAPES} == SHAPES
    assert sum(p.numel() for p in network.parameters()) == 44_009_869  # 176 MB
    assert sum(p.numel() for p in small.parameters()) == 1_131_181  # u2netp.pth, 4.7 MB


def block(state: dict, name: str, x: torch.Tensor, dilation: int = 1) -> torch.Tensor:
    """A block without modules: convolution, batch norm by its statistics, ReLU."""
    x = F.conv2d(x, state[f"{name}.conv_s1.weight"], state[f"{name}.conv_s1.bias"], padding=dilation, dilation=dilation)
    mean, var = state[f"{name}.bn_s1.running_mean"], state[f"{name}.bn_s1.running_var"]
    x = (x - mean[:, None, None]) / (var[:, None, None] + 1e-5).sqrt()
    return F.relu(x * state[f"{name}.bn_s1.weight"][:, None, None] + state[f"{name}.bn_s1.bias"][:, None, None])


@torch.no_grad()
def test_blocks_match_the_paper(tiny):
    """The published RSU-4 and RSU-4F, figure 2, written out line by line."""
    torch.manual_seed(1)
    stage, state = tiny.stage4, tiny.stage4.state_dict()
    x = torch.randn(2, TINY["stage3"][1], 21, 14)  # odd sides are rounded up

    def up(small: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
        return F.interpolate(small, size=like.shape[2:], mode="bilinear", align_corners=False)

    def down(large: torch.Tensor) -> torch.Tensor:
        return F.max_pool2d(large, 2, ceil_mode=True)

    outer = block(state, "rebnconvin", x)
    first = block(state, "rebnconv1", outer)
    second = block(state, "rebnconv2", down(first))
    third = block(state, "rebnconv3", down(second))
    fourth = block(state, "rebnconv4", third, dilation=2)
    third_d = block(state, "rebnconv3d", torch.cat([fourth, third], 1))
    second_d = block(state, "rebnconv2d", torch.cat([up(third_d, second), second], 1))
    first_d = block(state, "rebnconv1d", torch.cat([up(second_d, first), first], 1))
    assert torch.allclose(stage(x), first_d + outer, atol=1e-5)

    stage, state = tiny.stage5, tiny.stage5.state_dict()
    x = torch.randn(2, TINY["stage4"][1], 9, 9)
    outer = block(state, "rebnconvin", x)
    first = block(state, "rebnconv1", outer)
    second = block(state, "rebnconv2", first, dilation=2)
    third = block(state, "rebnconv3", second, dilation=4)
    fourth = block(state, "rebnconv4", third, dilation=8)
    third_d = block(state, "rebnconv3d", torch.cat([fourth, third], 1), dilation=4)
    second_d = block(state, "rebnconv2d", torch.cat([third_d, second], 1), dilation=2)
    first_d = block(state, "rebnconv1d", torch.cat([second_d, first], 1))
    assert torch.allclose(stage(x), first_d + outer, atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("size", [(64, 64), (70, 51)])
def test_shapes_and_range(tiny, size):
    torch.manual_seed(2)
    found = tiny(torch.randn(2, 3, *size))
    assert found.shape == (2, 1, *size)
    assert 0 < found.min() < found.max() < 1


@pytest.mark.parametrize("form", ["pth", "legacy.pth", "safetensors"])
def test_weights_are_read(tiny, tmp_path, form):
    path = tmp_path / f"u2net_portrait.{form}"
    state = tiny.state_dict()
    if form == "safetensors":
        save_file(state, path)
    else:
        torch.save(state, path, _use_new_zipfile_serialization=form == "pth")
    loaded = load_u2net(path)
    assert all(torch.equal(value, state[name]) for name, value in loaded.state_dict().items())
    assert not loaded.training


def test_rejected_files(tiny, tmp_path):
    with pytest.raises(InputError, match=r"does not exist: download the weights of U2-Net"):
        load_u2net(tmp_path / "none.pth")
    (tmp_path / "text.pth").write_text("no weights")
    with pytest.raises(InputError, match="not a weights file"):
        load_u2net(tmp_path / "text.pth")
    torch.save(tiny, tmp_path / "whole.pth")  # a pickled module could run code
    with pytest.raises(InputError, match="not a weights file that can be loaded safely"):
        load_u2net(tmp_path / "whole.pth")
    torch.save({"a": torch.zeros(1)}, tmp_path / "other.pth")
    with pytest.raises(InputError, match=r"does not contain U2-Net: stage1\.rebnconvin"):
        load_u2net(tmp_path / "other.pth")
    state = dict(tiny.state_dict())
    del state["side3.bias"]
    torch.save(state, tmp_path / "part.pth")
    with pytest.raises(InputError, match=r"are not U2-Net's: .*side3\.bias"):
        load_u2net(tmp_path / "part.pth")


@torch.no_grad()
def test_drawing(tiny, monkeypatch):
    """As the demo: 512 pixels, its statistics, 1 - output, stretched to the full range, resized back."""
    monkeypatch.setattr("likeness.annotators.u2net.INPUT_SIDE", 64)
    assert INPUT_SIDE == 512
    image = (draw_face(0, 0, 64).image * 0.8).astype(np.uint8)
    values = image.astype(np.float32) / image.max()
    given = torch.tensor((values - np.float32(MEAN)) / np.float32(STD)).permute(2, 0, 1)[None]
    paper = 1 - tiny(given)[0, 0].numpy()
    wanted = np.rint(255 * (paper - paper.min()) / (paper.max() - paper.min()))
    found = draw_sketch(tiny, image)
    assert found.dtype == np.uint8
    assert (found.min(), found.max()) == (0, 255)
    assert np.abs(found - wanted).max() <= 1
    assert draw_sketch(tiny, draw_face(0, 0, 48).image).shape == (48, 48)
    black = draw_sketch(tiny, np.zeros((64, 64, 3), np.uint8))  # valid, although its maximum is 0
    assert (black.min(), black.max()) == (0, 255)
    monkeypatch.setattr(tiny, "forward", lambda x: torch.full_like(x[:, :1], 0.3))
    assert (draw_sketch(tiny, image) == 255).all()  # without contrast: no lines


def test_probable_lines_are_dark():
    network = U2Net(dict.fromkeys(PORTRAIT, (2, 2))).eval()
    for value in network.state_dict().values():
        value.zero_()
    with torch.no_grad():
        network.outconv.weight[0, 0] = 1.0  # the first side output alone, which is set below
    network.side1.forward = lambda x: torch.linspace(-4, 4, x.shape[3]).expand(1, 1, x.shape[2], -1)  # type: ignore
    sketch = draw_sketch(network, np.full((64, 64, 3), 100, np.uint8))
    assert sketch[:, 0].min() > 240
    assert sketch[:, -1].max() < 15


def test_sketchers(tiny, tmp_path):
    torch.save(tiny.state_dict(), tmp_path / "u2net_portrait.pth")
    _, name = load_sketcher(tmp_path / "u2net_portrait.pth")
    assert name.startswith("U2Net ")
    assert len(name.split()[1]) == 12
    _, plain = load_sketcher()
    assert plain == "XDoG 1"
