"""Extract a sketch with U2-Net and its official weights, as in the training data of MMFace-DiT.

X. Qin, Z. Zhang, C. Huang, M. Dehghan, O. R. Zaiane, M. Jagersand, "U2-Net: Going Deeper with Nested U-Structure for
Salient Object Detection", Pattern Recognition 106, 2020. Modules have the names of the official weights; widths are
read from the file. `u2net_portrait.pth` draws sketches; `u2net.pth` and `u2netp.pth` have the same architecture but
segment the subject of a photo. In shapes, h and w are halved from level to level.
"""

from __future__ import annotations

import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F

from likeness.annotators.sketch import DRAWING, extract_sketch
from likeness.device import choose_device
from likeness.types import InputError
from likeness.weights.files import read_weights
from likeness.weights.hashes import network_name

Sketcher = Callable[[np.ndarray], np.ndarray]
"""Portrait uint8 RGB [H, W, 3] -> dark lines on white, uint8 [H, W]."""

INPUT_SIDE = 512
"""Shorter side of the network's input in pixels."""

MEAN, STD = (0.406, 0.456, 0.485), (0.225, 0.224, 0.229)
"""Of red, green and blue after division by the image's maximum, as in the official portrait demo, which swaps
ImageNet's statistics of red and blue."""

LEVELS = {1: 7, 2: 6, 3: 5, 4: 4, 5: 4, 6: 4}
"""Stage -> number of levels."""

DILATED = (5, 6)
"""Stages that use dilation instead of pooling."""

PORTRAIT = {
    "stage1": (32, 64), "stage2": (32, 128), "stage3": (64, 256), "stage4": (128, 512), "stage5": (256, 512),
    "stage6": (256, 512),
    "stage5d": (256, 512), "stage4d": (128, 256), "stage3d": (64, 128), "stage2d": (32, 64), "stage1d": (16, 64),
}  # fmt: skip
"""Stage -> inner and outer channels of the published network (44 million parameters)."""


class Block(nn.Module):
    """Convolution, batch norm, ReLU."""

    def __init__(self, channels: int, out: int, dilation: int = 1):
        super().__init__()
        self.conv_s1 = nn.Conv2d(channels, out, 3, padding=dilation, dilation=dilation)
        self.bn_s1 = nn.BatchNorm2d(out)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.bn_s1(self.conv_s1(x)))


class ResidualU(nn.Module):
    """Residual U-block (section 3.1). The lowest level, or with `dilated` every level, uses dilation."""

    def __init__(self, channels: int, inner: int, out: int, levels: int, dilated: bool):
        super().__init__()
        self.levels, self.dilated = levels, dilated
        self.rebnconvin = Block(channels, out)
        for level in range(1, levels + 1):
            dilation = 2 ** (level - 1) if dilated else 1 + (level == levels)
            self.add_module(f"rebnconv{level}", Block(out if level == 1 else inner, inner, dilation))
        for level in range(levels - 1, 0, -1):
            dilation = 2 ** (level - 1) if dilated else 1
            self.add_module(f"rebnconv{level}d", Block(2 * inner, out if level == 1 else inner, dilation))

    def forward(self, x: Tensor) -> Tensor:
        outer = self.rebnconvin(x)  # [B, out, h, w]
        x, kept = outer, []
        for level in range(1, self.levels + 1):
            if not self.dilated and 1 < level < self.levels:
                x = halved(x)
            x = self.get_submodule(f"rebnconv{level}")(x)  # [B, inner, ...]
            kept.append(x)
        for level in range(self.levels - 1, 0, -1):
            skip = kept[level - 1]
            x = self.get_submodule(f"rebnconv{level}d")(torch.cat([enlarged(x, skip), skip], dim=1))
        return x + outer


class U2Net(nn.Module):
    """U-Net of U-Nets: image [B, 3, H, W] -> probability per pixel, [B, 1, H, W]."""

    def __init__(self, widths: dict[str, tuple[int, int]] = PORTRAIT):
        super().__init__()
        channels = 3
        for stage in range(1, 7):
            name = f"stage{stage}"
            self.add_module(name, ResidualU(channels, *widths[name], LEVELS[stage], stage in DILATED))
            channels = widths[name][1]
        for stage in range(5, 0, -1):
            name = f"stage{stage}d"
            joined = channels + widths[f"stage{stage}"][1]
            self.add_module(name, ResidualU(joined, *widths[name], LEVELS[stage], stage in DILATED))
            channels = widths[name][1]
        for stage in range(1, 7):
            name = f"stage{stage}d" if stage < 6 else "stage6"
            self.add_module(f"side{stage}", nn.Conv2d(widths[name][1], 1, 3, padding=1))
        self.outconv = nn.Conv2d(6, 1, 1)

    def forward(self, x: Tensor) -> Tensor:
        kept = []
        for stage in range(1, 7):
            x = self.get_submodule(f"stage{stage}")(x if stage == 1 else halved(x))
            kept.append(x)
        sides = [self.get_submodule("side6")(x)]
        for stage in range(5, 0, -1):
            skip = kept[stage - 1]
            x = self.get_submodule(f"stage{stage}d")(torch.cat([enlarged(x, skip), skip], dim=1))
            sides.append(self.get_submodule(f"side{stage}")(x))
        whole = [enlarged(side, x) for side in reversed(sides)]  # side 1 to 6, each [B, 1, H, W]
        return torch.sigmoid(self.outconv(torch.cat(whole, dim=1)))


def halved(x: Tensor) -> Tensor:
    """Max-pool [B, C, h, w] to half the size, rounded up."""
    return F.max_pool2d(x, 2, stride=2, ceil_mode=True)


def enlarged(x: Tensor, like: Tensor) -> Tensor:
    """Resize [B, C, h, w] to the height and width of `like`."""
    return F.interpolate(x, size=like.shape[2:], mode="bilinear", align_corners=False)


def load_u2net(path: Path) -> U2Net:
    """Load official weights, `.pth` or `.safetensors`; the file determines the widths. Raises `InputError` if it is
    missing, does not contain weights, or not those of U2-Net.
    """
    if not path.is_file():
        raise InputError(f"{path} does not exist: download the weights of U2-Net, u2net_portrait.pth")
    state = read_weights(path) if path.suffix == ".safetensors" else read_pickle(path)
    names = {name: f"{name}.rebnconvin.conv_s1.weight" for name in PORTRAIT}
    inner = {name: f"{name}.rebnconv1.conv_s1.weight" for name in PORTRAIT}
    if missing := [name for name in (*names.values(), *inner.values()) if name not in state]:
        raise InputError(f"{path} does not contain U2-Net: {missing[0]} is missing")
    network = U2Net({name: (len(state[inner[name]]), len(state[names[name]])) for name in PORTRAIT})
    wanted = network.state_dict()
    state = {name: wanted[name] for name in wanted if name.endswith("num_batches_tracked")} | state
    try:
        network.load_state_dict(state)
    except RuntimeError as error:
        raise InputError(f"the weights in {path} are not U2-Net's: {str(error).splitlines()[1].strip()}") from error
    return network.eval()


def read_pickle(path: Path) -> dict[str, Any]:
    """Load tensors by name from a `.pth` file without executing code in it."""
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except (OSError, RuntimeError, EOFError, KeyError, ValueError, pickle.UnpicklingError) as error:
        raise InputError(f"{path} is not a weights file that can be loaded safely ({type(error).__name__})") from error
    if not isinstance(state, dict) or not all(isinstance(value, Tensor) for value in state.values()):
        raise InputError(f"{path} does not map names to tensors: use u2net_portrait.pth as published")
    return state


@torch.no_grad()
def draw_sketch(network: U2Net, image: np.ndarray) -> np.ndarray:
    """Draw a portrait, uint8 RGB [H, W, 3] filled by a face, with dark lines on white, as the official demo does: uint8
    [H, W], stretched to 0 (stroke) to 255 (paper).
    """
    height, width = image.shape[:2]
    scale = INPUT_SIDE / min(height, width)
    size = (round(width * scale), round(height * scale))
    pixels = np.asarray(Image.fromarray(image).resize(size, Image.Resampling.BILINEAR), dtype=np.float32)  # [h, w, 3]
    pixels = (pixels / max(float(pixels.max()), 1.0) - np.array(MEAN, np.float32)) / np.array(STD, np.float32)
    weight = network.outconv.weight
    given = torch.from_numpy(pixels).permute(2, 0, 1)[None].to(weight.device, weight.dtype)  # [1, 3, h, w]
    paper = 1 - network(given)[0, 0].float().cpu().numpy()  # [h, w]
    low, high = float(paper.min()), float(paper.max())
    tone = np.rint(255 * (paper - low) / (high - low)) if high > low else np.full_like(paper, 255)
    return np.array(Image.fromarray(tone.astype(np.uint8)).resize((width, height), Image.Resampling.BILINEAR))


def load_sketcher(weights: Path | None = None, *, device: str | None = None) -> tuple[Sketcher, str]:
    """Return a sketch extractor, and the name by which datasets record it: U2-Net with these weights on a device
    (`choose_device`), or XDoG. Raises `InputError` if the weights or the device cannot be used.
    """
    device = choose_device(device)
    if weights is None:
        return extract_sketch, f"XDoG {DRAWING}"
    network = load_u2net(weights).to(device)
    return lambda image: draw_sketch(network, image), network_name(network)
