"""A portrait drawing by U2-Net, for those who have its weights: the sketches that MMFace-DiT was trained with.

X. Qin, Z. Zhang, C. Huang, M. Dehghan, O. R. Zaiane, M. Jagersand, "U2-Net: Going Deeper with Nested U-Structure for
Salient Object Detection", Pattern Recognition 106, 2020. Modules bear the names of the official weights, and their
widths are read from the file: `u2net_portrait.pth` draws; `u2net.pth` and `u2netp.pth` have the same build but find the
subject of a photo. In shapes, h and w are halved from level to level.
"""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional as F

from likeness.types import InputError

SEEN = 512
"""Pixels of the shorter side that the network sees."""

MEAN, STD = (0.406, 0.456, 0.485), (0.225, 0.224, 0.229)
"""Of red, green and blue, after division by the picture's largest value: those of the official portrait demo, in which
ImageNet's statistics of red and blue have changed places."""

LEVELS = {1: 7, 2: 6, 3: 5, 4: 4, 5: 4, 6: 4}
"""Stage -> levels of its own U."""

DILATED = (5, 6)
"""Stages that widen their view by dilation instead of by pooling."""

PORTRAIT = {
    "stage1": (32, 64), "stage2": (32, 128), "stage3": (64, 256), "stage4": (128, 512), "stage5": (256, 512),
    "stage6": (256, 512),
    "stage5d": (256, 512), "stage4d": (128, 256), "stage3d": (64, 128), "stage2d": (32, 64), "stage1d": (16, 64),
}  # fmt: skip
"""Stage -> inner and outer channels, of the published network (44 million parameters)."""


class Block(nn.Module):
    """Convolution, batch norm, ReLU."""

    def __init__(self, channels: int, out: int, dilation: int = 1):
        super().__init__()
        self.conv_s1 = nn.Conv2d(channels, out, 3, padding=dilation, dilation=dilation)
        self.bn_s1 = nn.BatchNorm2d(out)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.bn_s1(self.conv_s1(x)))


class ResidualU(nn.Module):
    """A U-Net as a residual block (section 3.1): its lowest level, or with `dilated` every level, dilates."""

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
    """A U-Net of U-Nets: picture [B, 3, H, W] to the share of each pixel, [B, 1, H, W] in [0, 1]."""

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
    """[B, C, h, w] to half the size, rounded up, by the largest of four."""
    return F.max_pool2d(x, 2, stride=2, ceil_mode=True)


def enlarged(x: Tensor, like: Tensor) -> Tensor:
    """[B, C, h, w] to the height and width of `like`."""
    return F.interpolate(x, size=like.shape[2:], mode="bilinear", align_corners=False)


def load_u2net(path: Path) -> U2Net:
    """The network of a file of official weights, `.pth` or `.safetensors`; its widths are those of the file.

    Raises:
        InputError: the file is missing, is no file of weights, or they are not U2-Net's.
    """
    state = read_weights(path)
    names = {name: f"{name}.rebnconvin.conv_s1.weight" for name in PORTRAIT}
    inner = {name: f"{name}.rebnconv1.conv_s1.weight" for name in PORTRAIT}
    if missing := [name for name in (*names.values(), *inner.values()) if name not in state]:
        raise InputError(f"{path} holds no U2-Net: {missing[0]} is missing")
    network = U2Net({name: (len(state[inner[name]]), len(state[names[name]])) for name in PORTRAIT})
    wanted = network.state_dict()
    state = {name: wanted[name] for name in wanted if name.endswith("num_batches_tracked")} | state
    try:
        network.load_state_dict(state)
    except RuntimeError as error:
        raise InputError(f"the weights in {path} are not U2-Net's: {str(error).splitlines()[1].strip()}") from error
    return network.eval()


def read_weights(path: Path) -> dict[str, Any]:
    """Tensors by name, nothing in the file being run."""
    if not path.is_file():
        raise InputError(f"{path} does not exist: give the weights of U2-Net, u2net_portrait.pth")
    try:
        state = (
            load_file(path)
            if path.suffix == ".safetensors"
            else torch.load(path, map_location="cpu", weights_only=True)
        )
    except (OSError, RuntimeError, EOFError, KeyError, ValueError, pickle.UnpicklingError, SafetensorError) as error:
        raise InputError(f"{path} is no file of weights that can be read safely ({type(error).__name__})") from error
    if not isinstance(state, dict) or not all(isinstance(value, Tensor) for value in state.values()):
        raise InputError(f"{path} holds no weights by name: give u2net_portrait.pth as it was published")
    return state


@torch.no_grad()
def draw_sketch(network: U2Net, picture: np.ndarray) -> np.ndarray:
    """Draw a portrait with dark lines on white, as the official demo does.

    Args:
        network: U2-Net with the weights that draw.
        picture: uint8 RGB [H, W, 3]: a face that fills the picture.

    Returns:
        uint8 [H, W], 0 stroke to 255 paper, its darkest value 0 and its lightest 255.
    """
    height, width = picture.shape[:2]
    scale = SEEN / min(height, width)
    size = (round(width * scale), round(height * scale))
    seen = np.asarray(Image.fromarray(picture).resize(size, Image.Resampling.BILINEAR), dtype=np.float32)  # [h, w, 3]
    seen = (seen / max(float(seen.max()), 1.0) - np.array(MEAN, np.float32)) / np.array(STD, np.float32)
    weight = network.outconv.weight
    given = torch.from_numpy(seen).permute(2, 0, 1)[None].to(weight.device, weight.dtype)  # [1, 3, h, w]
    paper = 1 - network(given)[0, 0].float().cpu().numpy()  # [h, w]
    low, high = float(paper.min()), float(paper.max())
    tone = np.rint(255 * (paper - low) / (high - low)) if high > low else np.full_like(paper, 255)
    return np.array(Image.fromarray(tone.astype(np.uint8)).resize((width, height), Image.Resampling.BILINEAR))
