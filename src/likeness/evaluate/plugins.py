"""The extractors that papers name: networks of others, through the libraries that keep them.

None of them is needed by the rest, none is installed with the project (most bring torchvision), and each says what it
lacks. Their weights come from where the library gets them, or from a folder.
"""

from __future__ import annotations

import base64
import hashlib
import importlib
import io
import json
import os
import re
import urllib.error
import urllib.request
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from likeness.data.folder import read_photo
from likeness.evaluate.config import Protocol
from likeness.evaluate.faces import Face
from likeness.evaluate.features import Extractor, Missing
from likeness.files import first_line
from likeness.pipelines.load import weights_hash

CLIP_MEAN, CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
"""Radford et al. 2021."""
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
"""What networks of ImageNet are given."""

QUESTION = (
    "How well does this portrait show the following description? Answer with one number from 0 (not at all) to 1 "
    "(in every detail) and nothing else. Description: "
)
"""What the judge is asked; part of the protocol."""


def library(name: str, purpose: str) -> Any:
    """A library that is not installed with the project.

    Raises:
        Missing: it is not there.
    """
    try:
        return importlib.import_module(name)
    except ImportError as error:
        package = name.split(".")[0].replace("_", "-")
        raise Missing(f"{purpose} needs {package}, which is not installed: pip install {package}") from error


def from_hub(class_name: str, name: str, device: str) -> Any:
    """A network of transformers from a folder or the hub.

    Raises:
        Missing: it is in neither.
    """
    import transformers

    try:
        return getattr(transformers, class_name).from_pretrained(name).to(device).eval()
    except Exception as error:  # transformers and the hub say no in many ways
        raise Missing(
            f"{name} is neither a folder nor could it be downloaded ({first_line(error)}): give a folder with it"
        ) from error


def stacked(pictures: Sequence[np.ndarray], device: str) -> Tensor:
    """uint8 pictures as [B, 3, S, S] in [0, 255], uint8."""
    return torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2).contiguous().to(device)


def normalised(
    pictures: Sequence[np.ndarray], side: int, mean: Sequence[float], std: Sequence[float], device: str = "cpu"
) -> Tensor:
    """Pictures enlarged or reduced (Pillow's bicubic) and normalised by channel, [B, 3, side, side]."""
    bicubic = Image.Resampling.BICUBIC
    small = [np.asarray(Image.fromarray(picture).resize((side, side), bicubic)) for picture in pictures]
    channels = (torch.tensor(values, device=device).view(1, 3, 1, 1) for values in (mean, std))
    centre, scale = channels
    return (stacked(small, device).float() / 255 - centre) / scale


def load_clip(name: str, device: str) -> tuple[Any, Any]:
    """A `CLIPModel` and its tokenizer from the hub."""
    return from_hub("CLIPModel", name, device), from_hub_tokenizer(name)


def from_hub_tokenizer(name: str) -> Any:
    """The tokenizer beside a CLIP."""
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(name)
    except Exception as error:
        raise Missing(f"{name} has no tokenizer that can be read ({first_line(error)})") from error


def clip_input(clip: Any) -> Callable[[Sequence[np.ndarray]], Tensor]:
    """How a published CLIP, or its picture tower alone, takes uint8 pictures."""
    side = getattr(clip.config, "vision_config", clip.config).image_size
    return lambda pictures: normalised(pictures, side, CLIP_MEAN, CLIP_STD)


def clip_large(protocol: Protocol, size: int, device: str) -> Extractor:
    """Features of CMMD's CLIP, [B, 768]."""
    network = from_hub("CLIPVisionModelWithProjection", protocol.clip_large, device)
    prepare = clip_input(network)

    @torch.no_grad()
    def look(pictures: Sequence[np.ndarray], faces: Sequence[Face]) -> np.ndarray:
        return network(pixel_values=prepare(pictures).to(device)).image_embeds.float().cpu().numpy()

    return Extractor(name="clip_large", what=protocol.clip_large, hash=weights_hash(network)[:16], look=look)


def dinov2(protocol: Protocol, size: int, device: str) -> Extractor:
    """The class token of a DINOv2 at 224 px (Stein et al. 2023), [B, D]."""
    network = from_hub("Dinov2Model", protocol.dinov2, device)

    @torch.no_grad()
    def look(pictures: Sequence[np.ndarray], faces: Sequence[Face]) -> np.ndarray:
        given = normalised(pictures, 224, IMAGENET_MEAN, IMAGENET_STD, device)
        return network(pixel_values=given).pooler_output.float().cpu().numpy()

    return Extractor(name="dinov2", what=protocol.dinov2, hash=weights_hash(network)[:16], look=look)


def inception(protocol: Protocol, size: int, device: str) -> Extractor:
    """The 2048 features of FID's InceptionV3 as torch-fidelity has it, with its own resize, [B, 2048]."""
    module = library("torch_fidelity.feature_extractor_inceptionv3", "the InceptionV3 of FID and KID")
    try:
        network = module.FeatureExtractorInceptionV3(
            "inception-v3-compat", ["2048"], feature_extractor_weights_path=protocol.inception
        ).to(device)
    except Exception as error:  # a download that fails, or another file
        raise Missing(
            f"torch-fidelity's InceptionV3 cannot be loaded ({first_line(error)}): set inception=its weights file"
        ) from error

    @torch.no_grad()
    def look(pictures: Sequence[np.ndarray], faces: Sequence[Face]) -> np.ndarray:
        return network(stacked(pictures, device))[0].float().cpu().numpy()

    return Extractor(name="inception", what="InceptionV3 of torch-fidelity", hash=weights_hash(network)[:16], look=look)


def lpips(protocol: Protocol, size: int, device: str) -> Extractor:
    """LPIPS 0.1 (Zhang et al. 2018) of portrait and photograph, [B, 1]."""
    module = library("lpips", "LPIPS")
    try:
        network = module.LPIPS(net=protocol.lpips, verbose=False).to(device).eval()
    except Exception as error:
        raise Missing(
            f"the network of LPIPS cannot be loaded ({first_line(error)}): its weights are torchvision's"
        ) from error

    @torch.no_grad()
    def look(pictures: Sequence[np.ndarray], faces: Sequence[Face]) -> np.ndarray:
        made = stacked(pictures, device).float() / 127.5 - 1
        real = stacked([read_photo(face.photo, size) for face in faces], device).float() / 127.5 - 1
        return network(made, real).reshape(-1, 1).float().cpu().numpy()

    what = f"lpips 0.1, {protocol.lpips}"
    return Extractor(name="lpips", what=what, hash=weights_hash(network)[:16], look=look)


def topiq(protocol: Protocol, size: int, device: str) -> Extractor:
    """TOPIQ (Chen et al. 2024) without a reference, [B, 1]."""
    module = library("pyiqa", "TOPIQ")
    try:
        network = module.create_metric(protocol.topiq, device=torch.device(device))
    except Exception as error:
        raise Missing(f"pyiqa cannot make {protocol.topiq} ({first_line(error)}): its weights must be there") from error

    @torch.no_grad()
    def look(pictures: Sequence[np.ndarray], faces: Sequence[Face]) -> np.ndarray:
        return network(stacked(pictures, device).float() / 255).reshape(-1, 1).float().cpu().numpy()

    return Extractor(name="topiq", what=f"pyiqa's {protocol.topiq}", hash=weights_hash(network)[:16], look=look)


def judge(protocol: Protocol, size: int, device: str) -> Extractor:
    """A language model's score of how well portrait and caption agree, 0 to 1, [B, 1]; NaN where it gives no number."""
    if protocol.judge is None:
        raise Missing("the LLM score asks a service: set judge=http://host/v1, an OpenAI-compatible address")
    address, model = protocol.judge, protocol.judge_model

    def look(pictures: Sequence[np.ndarray], faces: Sequence[Face]) -> np.ndarray:
        answers = [ask(address, model, seen, face.caption) for seen, face in zip(pictures, faces, strict=True)]
        return np.array(answers)[:, None]

    what = f"{model} at {address}"
    hashed = hashlib.sha256(f"{model} {QUESTION}".encode()).hexdigest()[:16]
    return Extractor(name="judge", what=what, hash=hashed, look=look)


def ask(address: str, model: str, picture: np.ndarray, caption: str) -> float:
    """One question to an OpenAI-compatible service; NaN where the answer is no number from 0 to 1.

    Raises:
        Missing: the service does not answer.
    """
    buffer = io.BytesIO()
    Image.fromarray(picture).save(buffer, "PNG")
    content = [
        {"type": "text", "text": QUESTION + caption},
        {
            "type": "image_url",
            "image_url": {"url": f"data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}"},
        },
    ]
    body = {"model": model, "temperature": 0, "messages": [{"role": "user", "content": content}]}
    headers = {"Content-Type": "application/json"}
    if key := os.environ.get("OPENAI_API_KEY"):
        headers["Authorization"] = f"Bearer {key}"
    request = urllib.request.Request(f"{address.rstrip('/')}/chat/completions", json.dumps(body).encode(), headers)
    try:
        with urllib.request.urlopen(request, timeout=120) as response:
            told = json.load(response)["choices"][0]["message"]["content"]
    except (urllib.error.URLError, OSError, ValueError, KeyError, IndexError, TypeError) as error:
        raise Missing(
            f"the judge at {address} does not answer ({first_line(error)}): run again when it does"
        ) from error
    return score_in(told) if isinstance(told, str) else np.nan


def score_in(answer: str) -> float:
    """The one number from 0 to 1 in an answer; NaN where there is none, another, or several."""
    numbers = [float(number) for number in re.findall(r"-?\d*\.?\d+", answer)]
    return numbers[0] if len(numbers) == 1 and 0 <= numbers[0] <= 1 else np.nan
