"""Features of the training images from a face parser, to which a network's own features are aligned.

B samples, C latent channels, h x w latent size, F channels of the parser's third stage, h' x w' its size: H / 16 x
W / 16 for images of H x W, that of the grid of image tokens.
"""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import SegformerForSemanticSegmentation

from likeness.annotators.face_parser import MEAN, STD, load_face_parser
from likeness.data.store import Store
from likeness.encoders.components import Components
from likeness.encoders.latent import LatentCodec, spatial_factor
from likeness.files import writing_whole
from likeness.parallel import World
from likeness.types import InputError
from likeness.weights.hashes import weights_hash

STRIDE = 16
"""Side in pixels of a place of the features; that of an image token must be equal."""


class ParserFeatures:
    """Features of the samples of stores, computed from their latents at first use.

    On a CPU, where this takes as long as a training step, they are kept in a file of the run folder, 2 F h' w' bytes
    per sample; on an accelerator they are computed every time.

    Args:
        source: a SegFormer, as in `load_face_parser`.
        components: the autoencoder and the statistics of the latents.
        stores: the shards of the training.
        run: folder of the run.
        patch_size: that of the network.
        world: the processes of the training. Create it on every rank.

    Raises:
        InputError: the parser is no SegFormer, tokens are not of `STRIDE` pixels, or the file cannot be written.
    """

    def __init__(
        self, source: str, components: Components, stores: Sequence[Store], run: Path, patch_size: int, world: World
    ) -> None:
        parser, _ = load_face_parser(source)
        if not isinstance(parser, SegformerForSemanticSegmentation):
            raise InputError(f"face_parser is {source}, which is no SegFormer with this project's classes")
        if (side := patch_size * spatial_factor(components.vae)) != STRIDE:
            raise InputError(f"alignment_weight needs image tokens of {STRIDE} px, but they have {side} px")
        settings, device = components.settings, world.device
        self.parser = parser.to(device)
        vae = copy.deepcopy(components.vae).to(device, memory_format=torch.channels_last)
        self.codec = LatentCodec(vae, settings["latent_mean"], settings["latent_std"], batched=True)
        _, height, width = stores[0][0].latents.shape
        self.shape = (self.parser.config.hidden_sizes[2], height // patch_size, width // patch_size)  # [F, h', w']
        self.kept: Any = None
        if world.device_type == "cpu":
            key = "".join([weights_hash(parser), weights_hash(vae), *(store.content_hash() for store in stores)])
            file = run / f"features-{hashlib.sha256(key.encode()).hexdigest()[:16]}.bin"
            shape = (sum(len(store) for store in stores), *self.shape)
            with world.joint_errors():
                if world.main and not file.is_file():
                    for other in run.glob("features-*.bin"):  # of other shards
                        other.unlink()
                    with writing_whole(file) as opened:  # zeros, so that the space is there
                        for _ in range(shape[0]):
                            opened.write(bytes(2 * int(np.prod(self.shape))))
            self.kept = np.memmap(file, np.float16, "r+", shape=shape)  # not known: last channel 0

    def __call__(self, numbers: Tensor, clean: Tensor) -> Tensor:
        """Return `parser_features` of samples with these numbers, [B], and normalized latents, [B, C, h, w]: float32
        [B, F, h', w'].
        """
        if self.kept is None:
            return parser_features(self.parser, self.codec, clean)
        rows = numbers.numpy()
        unknown = ~self.kept[rows, -1].any(axis=(1, 2))  # [B]
        if unknown.any():
            found = parser_features(self.parser, self.codec, clean[torch.from_numpy(unknown)])
            self.kept[rows[unknown], :-1] = found[:, :-1].half().numpy()
            self.kept[rows[unknown], -1] = found[:, -1].half().numpy()  # last, as a mark of complete rows
        return torch.from_numpy(self.kept[rows]).float()


@torch.no_grad()
def parser_features(parser: Any, codec: LatentCodec, clean: Tensor) -> Tensor:
    """Return the features of normalized latents [B, C, h, w] from the third stage of a SegFormer, [B, F, h', w']; each
    channel has mean 0 and standard deviation 1 over its image.
    """
    images = codec.decode(clean).clamp(-1, 1)  # [B, 3, H, W]
    pixels = (images / 2 + 0.5 - MEAN) / STD
    features = parser.segformer(pixel_values=pixels, output_hidden_states=True).hidden_states[2]
    mean, std = features.mean(dim=(2, 3), keepdim=True), features.std(dim=(2, 3), keepdim=True)
    return (features - mean) / (std + 1e-6)
