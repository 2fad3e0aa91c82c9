"""ComfyUI nodes that use a running `likeness serve` (docs/serve.md). They load no model.

Install: copy or link this folder to `ComfyUI/custom_nodes/likeness`. ComfyUI passes an IMAGE as float32 [B, H, W, 3] in
0..1 and a MASK as float32 [B, H, W] in 0..1. The API key, if the service needs one, is that of the environment variable
LIKENESS_API_KEY: ComfyUI writes the inputs of nodes into workflows and images.
"""

from __future__ import annotations

import base64
import io
import os
from typing import Any

import numpy as np
import requests
import torch
from PIL import Image

SERVER: dict[str, Any] = {"server": ("STRING", {"default": "http://127.0.0.1:8000"})}
SEED = ("INT", {"default": 0, "min": 0, "max": 2**31 - 1, "control_after_generate": True})
TEXT = ("STRING", {"multiline": True, "default": ""})
UNIT = {"min": 0.0, "max": 1.0, "step": 0.01}


def send(path: str, *, server: str, timeout: float = 600, **body: Any) -> dict[str, Any]:
    """POST to the service (`json=`, or `files=` and `data=`) and return its answer.

    Raises:
        RuntimeError: it cannot be reached, does not answer in time, or rejects the request; the message is the
            service's.
    """
    key = os.environ.get("LIKENESS_API_KEY")
    headers = {"Authorization": f"Bearer {key}".encode()} if key else {}
    try:
        response = requests.post(f"{server.rstrip('/')}/v1/{path}", headers=headers, timeout=timeout, **body)
    except requests.ReadTimeout as error:
        raise RuntimeError(f"The likeness service at {server!r} did not answer within {timeout:g} s") from error
    except requests.RequestException as error:
        message = (
            f"The likeness service at {server!r} cannot be reached: start `likeness serve`, and give its http://..."
        )
        raise RuntimeError(message) from error
    try:
        answer = response.json()
    except ValueError as error:
        raise RuntimeError(f"{server} is not a likeness service: status {response.status_code}") from error
    if not response.ok:
        try:
            message = answer["error"]["message"]
        except (KeyError, TypeError):
            message = f"{server} is not a likeness service: status {response.status_code}"
        raise RuntimeError(message)
    return answer


def to_png(image: torch.Tensor, alpha: torch.Tensor | None = None) -> bytes:
    """Encode an IMAGE [1, H, W, 3] as PNG; `alpha` is [H, W] in 0..1."""
    if len(image) > 1:
        raise ValueError(f"The batch has {len(image)} images: connect a single one (ImageFromBatch)")
    pixels = image[0] if alpha is None else torch.cat([image[0, ..., :3], alpha[..., None]], dim=-1)
    buffer = io.BytesIO()
    Image.fromarray((pixels.cpu().numpy() * 255).round().clip(0, 255).astype(np.uint8)).save(buffer, format="PNG")
    return buffer.getvalue()


def to_image(*contents: str) -> torch.Tensor:
    """Decode images in base64 to an IMAGE [B, H, W, 3]. A mask gets the colors of its palette."""
    images = [Image.open(io.BytesIO(base64.b64decode(content))).convert("RGB") for content in contents]
    return torch.from_numpy(np.stack([np.asarray(image) for image in images]).astype(np.float32) / 255)


class Generate:
    """Generate faces from text and optional conditions."""

    RETURN_TYPES = ("IMAGE", "STRING")
    RETURN_NAMES = ("image", "notes")
    FUNCTION = "run"
    CATEGORY = "likeness"

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {
            "required": {
                "prompt": TEXT,
                "seed": SEED,
                "count": ("INT", {"default": 1, "min": 1, "max": 10}),
                "steps": ("INT", {"default": 0, "min": 0, "max": 1000, "tooltip": "0: the model's default"}),
                "guidance_scale": (
                    "FLOAT",
                    {"default": -1.0, "min": -1.0, "max": 100.0, "step": 0.1, "tooltip": "-1: the model's default"},
                ),
                "size": ("STRING", {"default": "auto", "tooltip": "Width x height, for example 128x128"}),
                **SERVER,
            },
            "optional": {
                "negative_prompt": TEXT,
                "mask": ("IMAGE",),
                "mask_scale": ("FLOAT", {"default": 1.0, **UNIT}),
                "sketch": ("IMAGE",),
                "sketch_scale": ("FLOAT", {"default": 1.0, **UNIT}),
            },
        }

    def run(
        self,
        prompt: str,
        seed: int,
        count: int,
        steps: int,
        guidance_scale: float,
        size: str,
        server: str,
        negative_prompt: str = "",
        mask: torch.Tensor | None = None,
        mask_scale: float = 1.0,
        sketch: torch.Tensor | None = None,
        sketch_scale: float = 1.0,
    ) -> tuple[torch.Tensor, str]:
        given = {"mask": (mask, mask_scale), "sketch": (sketch, sketch_scale)}
        given = {name: (image, scale) for name, (image, scale) in given.items() if image is not None}
        body = {
            "prompt": prompt,
            "negative_prompt": negative_prompt,
            "seed": seed,
            "n": count,
            "size": size,
            "control_image": {name: base64.b64encode(to_png(image)).decode() for name, (image, _) in given.items()},
            "conditioning_scale": {name: scale for name, (_, scale) in given.items()},
        }
        if steps:
            body["steps"] = steps
        if guidance_scale >= 0:
            body["guidance_scale"] = guidance_scale
        answer = send("images/generations", server=server, json=body)
        return to_image(*(image["b64_json"] for image in answer["data"])), "\n".join(answer["notes"])


class ProposeMask:
    """Generate a semantic mask from text."""

    RETURN_TYPES = ("IMAGE",)
    RETURN_NAMES = ("mask",)
    FUNCTION = "run"
    CATEGORY = "likeness"

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {"required": {"prompt": TEXT, "seed": SEED, **SERVER}}

    def run(self, prompt: str, seed: int, server: str) -> tuple[torch.Tensor]:
        answer = send("masks/propose", server=server, json={"prompt": prompt, "seed": seed})
        return (to_image(answer["b64_json"]),)


class ExtractCondition:
    """Extract a mask or a sketch from a photograph; also returns the photograph as the condition shows it."""

    RETURN_TYPES = ("IMAGE", "IMAGE")
    RETURN_NAMES = ("condition", "photograph")
    FUNCTION = "run"
    CATEGORY = "likeness"

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {"required": {"photograph": ("IMAGE",), "condition": (["mask", "sketch"],), **SERVER}}

    def run(self, photograph: torch.Tensor, condition: str, server: str) -> tuple[torch.Tensor, torch.Tensor]:
        files = {"image": ("image.png", to_png(photograph), "image/png")}
        answer = send(f"conditions/{condition}", server=server, files=files)
        return to_image(answer["b64_json"]), to_image(answer["image"])


class EditPhotograph:
    """Regenerate the area of a photograph where the MASK is 1; all other pixels stay."""

    RETURN_TYPES = ("IMAGE",)
    FUNCTION = "run"
    CATEGORY = "likeness"

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {"required": {"photograph": ("IMAGE",), "area": ("MASK",), "prompt": TEXT, "seed": SEED, **SERVER}}

    def run(
        self, photograph: torch.Tensor, area: torch.Tensor, prompt: str, seed: int, server: str
    ) -> tuple[torch.Tensor]:
        if area.shape[1:] != photograph.shape[1:3]:
            (height, width), (own, other) = photograph.shape[1:3], area.shape[1:]
            raise ValueError(f"area is {other}x{own}, but the photograph is {width}x{height}: both need the same size")
        keep = 1 - area.round()[0]  # the API regenerates where alpha is 0
        files = {
            "image": ("image.png", to_png(photograph), "image/png"),
            "mask": ("mask.png", to_png(photograph, keep), "image/png"),
        }
        fields = {"prompt": prompt, "seed": seed}
        answer = send("images/edits", server=server, files=files, data=fields)
        return (to_image(answer["data"][0]["b64_json"]),)


NODE_CLASS_MAPPINGS = {
    "LikenessGenerate": Generate,
    "LikenessProposeMask": ProposeMask,
    "LikenessExtractCondition": ExtractCondition,
    "LikenessEditPhotograph": EditPhotograph,
}
NODE_DISPLAY_NAME_MAPPINGS = {
    "LikenessGenerate": "Generate face (likeness)",
    "LikenessProposeMask": "Propose mask (likeness)",
    "LikenessExtractCondition": "Extract mask or sketch (likeness)",
    "LikenessEditPhotograph": "Edit photograph (likeness)",
}
