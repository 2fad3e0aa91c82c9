"""Extractors that papers use, from libraries that are not installed with the project (most require torchvision).

Each raises `MissingError` with what to install or to provide. No extractor is silently replaced by another.
"""

from __future__ import annotations

import dataclasses
import importlib
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from likeness.chat import Endpoint, Rejected, image_part
from likeness.data.folder import read_photo
from likeness.evaluate.faces import Face
from likeness.evaluate.features import Extractor, MissingError
from likeness.evaluate.protocol import Protocol
from likeness.files import first_line
from likeness.types import InputError
from likeness.weights.hashes import weights_hash

Images, Faces = Sequence[np.ndarray], Sequence[Face]

CLIP_MEAN, CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
"""Radford et al. 2021."""
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)

QUESTION = (
    "How well does this portrait show the following description? Answer with one number from 0 (not at all) to 1 "
    "(in every detail) and nothing else. Description: "
)
"""The prompt of the LLM score; part of the protocol."""


# --- Loading


@contextmanager
def required(what: str, solution: str) -> Iterator[None]:
    """Raise `MissingError` for any error in the block; libraries and the hub fail in many ways."""
    try:
        yield
    except MissingError:
        raise
    except Exception as error:
        raise MissingError(f"{what} cannot be loaded ({first_line(error)}): {solution}") from error


def import_library(name: str, purpose: str) -> Any:
    """Import a library that is not installed with the project. Raises `MissingError` if it is not installed."""
    try:
        return importlib.import_module(name)
    except ImportError as error:
        package = name.split(".")[0].replace("_", "-")
        raise MissingError(f"{purpose} requires {package}, which is not installed: pip install {package}") from error


def from_hub(class_name: str, name: str, device: str | None = None) -> Any:
    """Load a class of transformers from a folder or the hub; a network is moved to the device. Raises `MissingError` if
    it is in neither.
    """
    import transformers

    with required(f"{class_name} of {name}", "it is not a folder and could not be downloaded. Provide its folder"):
        loaded = getattr(transformers, class_name).from_pretrained(name, trust_remote_code=False)
    return loaded if device is None else loaded.to(device).eval()


# --- Images to tensors


def to_tensor(images: Images, device: str) -> Tensor:
    """Stack uint8 images, [B, 3, S, S] uint8."""
    return torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).contiguous().to(device)


def resized(images: Images, side: int) -> Images:
    """Resize images with Pillow's bicubic, uint8 [side, side, 3] each."""
    return [np.asarray(Image.fromarray(image).resize((side, side), Image.Resampling.BICUBIC)) for image in images]


def normalize(images: Images, side: int, mean: Sequence[float], std: Sequence[float], device: str = "cpu") -> Tensor:
    """Resize images (Pillow's bicubic) and normalize their channels, [B, 3, side, side]."""
    center, scale = (torch.tensor(values, device=device).view(1, 3, 1, 1) for values in (mean, std))
    return (to_tensor(resized(images, side), device).float() / 255 - center) / scale


def clip_input(clip: Any, images: Images) -> Tensor:
    """Prepare images for a published CLIP or its image encoder."""
    side = getattr(clip.config, "vision_config", clip.config).image_size
    return normalize(images, side, CLIP_MEAN, CLIP_STD)


def network_extractor(
    name: str, description: str, network: torch.nn.Module, forward: Callable[[Images, Faces], Tensor]
) -> Extractor:
    """An extractor that runs a network without gradients."""

    @torch.no_grad()
    def extract(images: Images, faces: Faces) -> np.ndarray:
        return forward(images, faces).float().cpu().numpy()

    return Extractor(name=name, description=description, hash=weights_hash(network)[:16], extract=extract)


# --- Extractors: (protocol, image size, device) -> Extractor


def clip_large(protocol: Protocol, size: int, device: str) -> Extractor:
    """Image features of the CLIP of CMMD, [B, 768]."""
    network = from_hub("CLIPVisionModelWithProjection", protocol.clip_large, device)
    forward = lambda images, faces: network(pixel_values=clip_input(network, images).to(device)).image_embeds  # noqa: E731
    return network_extractor("clip_large", protocol.clip_large, network, forward)


def dinov2(protocol: Protocol, size: int, device: str) -> Extractor:
    """The class token of a DINOv2 at 224 px (Stein et al. 2023), [B, D]."""
    network = from_hub("Dinov2Model", protocol.dinov2, device)

    def forward(images: Images, faces: Faces) -> Tensor:
        return network(pixel_values=normalize(images, 224, IMAGENET_MEAN, IMAGENET_STD, device)).pooler_output

    return network_extractor("dinov2", protocol.dinov2, network, forward)


def inception(protocol: Protocol, size: int, device: str) -> Extractor:
    """Features of FID's InceptionV3 in torch-fidelity, with its own resizing or Pillow's, [B, 2048]."""
    module = import_library("torch_fidelity.feature_extractor_inceptionv3", "InceptionV3 (FID, KID)")
    with required("torch-fidelity's InceptionV3", "set inception= to its weights file"):
        network = module.FeatureExtractorInceptionV3(
            "inception-v3-compat", ["2048"], feature_extractor_weights_path=protocol.inception
        ).to(device)
    own = protocol.resizing == "tensorflow"
    forward = lambda images, faces: network(to_tensor(images if own else resized(images, 299), device))[0]  # noqa: E731
    description = f"InceptionV3 of torch-fidelity{'' if own else ', Pillow resizing'}"
    found = network_extractor("inception", description, network, forward)
    return found if own else dataclasses.replace(found, hash=f"{found.hash}, Pillow resizing")


def lpips(protocol: Protocol, size: int, device: str) -> Extractor:
    """LPIPS 0.1 (Zhang et al. 2018) between image and photograph, [B, 1]."""
    module = import_library("lpips", "LPIPS")
    with required("The network of LPIPS", "it uses weights of torchvision"):
        network = module.LPIPS(net=protocol.lpips, verbose=False).to(device).eval()

    def forward(images: Images, faces: Faces) -> Tensor:
        photos = [read_photo(face.photo, size) for face in faces]
        generated, real = (to_tensor(x, device).float() / 127.5 - 1 for x in (images, photos))
        return network(generated, real).reshape(-1, 1)

    return network_extractor("lpips", f"lpips 0.1, {protocol.lpips}", network, forward)


def topiq(protocol: Protocol, size: int, device: str) -> Extractor:
    """TOPIQ (Chen et al. 2024) without reference, [B, 1]."""
    module = import_library("pyiqa", "TOPIQ")
    with required(f"pyiqa's {protocol.topiq}", "provide its weights"):
        network = module.create_metric(protocol.topiq, device=torch.device(device))
    forward = lambda images, faces: network(to_tensor(images, device).float() / 255).reshape(-1, 1)  # noqa: E731
    return network_extractor("topiq", f"pyiqa's {protocol.topiq}", network, forward)


# --- LLM score


def query_llm(endpoint: Endpoint, image: np.ndarray, caption: str) -> float:
    """Request a score from an OpenAI-compatible API; NaN if the answer is not a number from 0 to 1. Raises `Rejected`
    if it rejects the question, such as by a content filter, and `MissingError` if it does not respond.
    """
    content = [{"type": "text", "text": QUESTION + caption}, image_part(Image.fromarray(image), "PNG")]
    try:
        answer = endpoint.ask(content)
    except Rejected:
        raise
    except InputError as error:
        raise MissingError(f"{error}. Run the command again when the API responds") from error
    return parse_score(answer.text)


def parse_score(answer: str) -> float:
    """Parse the number from 0 to 1 in an answer; NaN if there is none, several, or one out of range."""
    numbers = [float(number) for number in re.findall(r"-?\d*\.?\d+", answer)]
    return numbers[0] if len(numbers) == 1 and 0 <= numbers[0] <= 1 else np.nan
