"""The record inside every picture: its recipe, a line that existing galleries read, and the mark that it is generated.

One XMP packet carries IPTC's `trainedAlgorithmicMedia` and our recipe (JSON) in PNG, JPEG and WebP alike; an A1111
`parameters` line stands beside it. The recipe holds the conditions themselves, so that a picture can be made again
from its file alone.
"""

from __future__ import annotations

import base64
import hashlib
import io
import json
import platform
import re
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any
from xml.etree import ElementTree
from xml.sax.saxutils import quoteattr

import numpy as np
import torch
from PIL import Image, PngImagePlugin

from likeness.conditions.base import Reading
from likeness.files import writing_whole
from likeness.pipelines.adapters import acting
from likeness.pipelines.formats import format_of
from likeness.types import InputError, PortraitRequest

SCHEMA = 1
"""Version of the recipe's layout."""

GENERATED = "http://cv.iptc.org/newscodes/digitalsourcetype/trainedAlgorithmicMedia"
"""IPTC digital source type of a picture that a trained model made."""

IPTC = "http://iptc.org/std/Iptc4xmpExt/2008-02-29/"
RDF = "http://www.w3.org/1999/02/22-rdf-syntax-ns#"
NAMESPACE = "urn:likeness:recipe"
XMP_KEY = "XML:com.adobe.xmp"
USER_COMMENT = 0x9286  # EXIF
EXIF_POINTER = 0x8769
JPEG_XMP_LIMIT = 65_000
"""A JPEG's XMP packet must fit into one segment of 64 KiB."""


def recipe_of(
    request: PortraitRequest,
    pipeline: Any,
    *,
    model: str,
    fingerprint: str,
    base: str | None = None,
    quantize: str | None = None,
) -> dict[str, Any]:
    """Everything that decides a picture's pixels.

    Args:
        request: the request, with nothing left open (`likeness.pipelines.generate.resolve`).
        pipeline: the pipeline that made it.
        model: the name under which it was loaded.
        fingerprint: hash of its weights (`likeness.weights.hashes.pipeline_hash`).
        base: the base under which it was loaded, where the name is an adapter's and the base not its own.
        quantize: how its weights were narrowed when it was loaded.
    """
    adapters = acting(pipeline)
    return {
        "schema": SCHEMA,
        "model": model,
        **({"base": base} if base else {}),
        **({"quantize": quantize} if quantize else {}),
        **({"adapters": adapters} if adapters else {}),
        "fingerprint": fingerprint,
        "pipeline": type(pipeline).__name__,
        "scheduler": type(pipeline.scheduler).__name__,
        "prompt": request.prompt,
        "negative_prompt": request.negative_prompt,
        "conditions": {
            name: {
                "scheme": reading.scheme,
                "sha256": hash_of(reading.raw),
                "data": embed(reading.raw),
                "scale": request.conditioning_scale.get(name, 1.0),
                "start": request.control_guidance_start.get(name, 0.0),
                "end": request.control_guidance_end.get(name, 1.0),
            }
            for name, reading in request.control_image.items()
        },
        "guidance_scale": request.guidance_scale,
        "steps": request.num_inference_steps,
        "width": request.width,
        "height": request.height,
        **({"upscale": True} if request.upscale else {}),
        "seed": request.seed,
        "environment": environment(pipeline),
    }


def environment(pipeline: Any) -> dict[str, Any]:
    """What else the bits depend on: versions, processor, threads and number format."""
    packages = ("likeness", "torch", "diffusers", "transformers", "numpy")
    return {
        **{name: version(name) for name in packages},
        "python": platform.python_version(),
        "processor": processor(),
        "threads": torch.get_num_threads(),
        "device": pipeline._execution_device.type,
        "dtype": str(pipeline.transformer.dtype).removeprefix("torch."),
        "settings": settings_hash(pipeline),
    }


def settings_hash(pipeline: Any) -> str:
    """Hash the settings that affect an image in addition to request and weights, such as objective and latent
    statistics. `sizes` is left out: it decides which requests are accepted.
    """
    parts = pipeline.components  # weights have a hash of their own
    values = {
        "pipeline": {name: value for name, value in pipeline.config.items() if name not in {*parts, "sizes"}},
        "scheduler": dict(pipeline.scheduler.config),
    }
    public = {part: {k: v for k, v in found.items() if not k.startswith("_")} for part, found in values.items()}
    return hashlib.sha256(json.dumps(public, sort_keys=True).encode()).hexdigest()[:16]


def processor() -> str:
    """The processor's model, as far as the system tells."""
    try:
        found = re.search(r"^model name\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    except OSError:
        found = None
    return found[1].strip() if found else platform.processor() or platform.machine()


def request_of(recipe: Mapping[str, Any]) -> PortraitRequest:
    """The request of a recipe, its conditions unpacked.

    Raises:
        InputError: the recipe is damaged, of a newer layout, or its conditions are not inside.
    """
    try:
        if recipe["schema"] > SCHEMA:
            raise InputError(f"the recipe has layout {recipe['schema']}, this version reads up to {SCHEMA}: update")
        conditions = recipe["conditions"]
        readings = {}
        for name, entry in conditions.items():
            if entry["data"] is None:
                raise InputError(f"the recipe does not hold its {name} (the file format had no room for it)")
            raw = unembed(entry["data"])
            if hash_of(raw) != entry["sha256"]:
                raise InputError(f"the recipe's {name} was changed: its hash does not fit")
            readings[name] = Reading(raw=raw, scheme=entry["scheme"])
        return PortraitRequest(
            prompt=recipe["prompt"],
            negative_prompt=recipe["negative_prompt"],
            control_image=readings,
            conditioning_scale={name: entry["scale"] for name, entry in conditions.items()},
            control_guidance_start={name: entry["start"] for name, entry in conditions.items()},
            control_guidance_end={name: entry["end"] for name, entry in conditions.items()},
            guidance_scale=recipe["guidance_scale"],
            num_inference_steps=recipe["steps"],
            width=recipe["width"],
            height=recipe["height"],
            upscale=recipe.get("upscale", False),
            seed=recipe["seed"],
        )
    except (KeyError, TypeError, AttributeError) as error:
        raise InputError(f"the recipe is damaged: {error!r}") from error


def hash_of(raw: np.ndarray) -> str:
    """SHA-256 of a condition's raw form, by which recipes know it."""
    return hashlib.sha256(raw.tobytes()).hexdigest()


def embed(raw: np.ndarray) -> dict[str, Any]:
    """A raw condition as JSON: a lossless PNG for labels and lines, numbers for points."""
    if raw.dtype != np.uint8:
        return {"points": raw.tolist()}
    buffer = io.BytesIO()
    Image.fromarray(raw).save(buffer, "PNG", optimize=True)
    return {"png": base64.b64encode(buffer.getvalue()).decode()}


def unembed(data: Mapping[str, Any]) -> np.ndarray:
    """The inverse of `embed`."""
    if "points" in data:
        return np.asarray(data["points"], dtype=np.float32)
    try:
        return np.array(Image.open(io.BytesIO(base64.b64decode(data["png"]))))
    except (OSError, ValueError) as error:
        raise InputError(f"a condition inside the recipe is damaged: {error}") from error


def parameters_line(recipe: Mapping[str, Any]) -> str:
    """The recipe in the form that A1111-style galleries read."""
    lines = [recipe["prompt"]]
    if recipe["negative_prompt"]:
        lines.append(f"Negative prompt: {recipe['negative_prompt']}")
    controls = [f"{name} {entry['scale']:g}" for name, entry in recipe["conditions"].items()]
    fields = {
        "Steps": recipe["steps"],
        "Sampler": recipe["scheduler"],
        "CFG scale": f"{recipe['guidance_scale']:g}",
        "Seed": recipe["seed"],
        "Size": f"{recipe['width']}x{recipe['height']}",
        "Model hash": recipe["fingerprint"][:10],
        "Model": recipe["model"],
        **({"Conditions": "; ".join(controls)} if controls else {}),
        "Version": f"likeness {recipe['environment']['likeness']}",
    }
    lines.append(", ".join(f"{name}: {value}" for name, value in fields.items()))
    return "\n".join(lines)


def xmp_packet(recipe: Mapping[str, Any]) -> str:
    """The XMP packet: the mark of generated media and the recipe."""
    text = quoteattr(json.dumps(recipe, ensure_ascii=True, separators=(",", ":")))
    return (
        '<?xpacket begin="\ufeff" id="W5M0MpCehiHzreSzNTczkc9d"?>'
        f'<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf:RDF xmlns:rdf="{RDF}">'
        f'<rdf:Description rdf:about="" xmlns:Iptc4xmpExt="{IPTC}" xmlns:likeness="{NAMESPACE}" '
        f'Iptc4xmpExt:DigitalSourceType="{GENERATED}" likeness:recipe={text}/>'
        '</rdf:RDF></x:xmpmeta><?xpacket end="w"?>'
    )


def write_picture(
    picture: Image.Image, path: Path, recipe: Mapping[str, Any] | None, *, overwrite: bool = True
) -> None:
    """Write an image with its recipe atomically.

    Args:
        picture: the image.
        path: the file; its suffix selects PNG, JPEG or WebP (lossless).
        recipe: its recipe, or None to write pixels only.
        overwrite: whether to replace an existing file.

    Raises:
        InputError: the suffix is unknown, the recipe too long for the format, or the file cannot be written.
        FileExistsError: the file exists, and `overwrite` is False.
    """
    kind = format_of(path)
    options: dict[str, Any] = {"JPEG": {"quality": 95, "subsampling": 0}, "WEBP": {"lossless": True}}.get(kind, {})
    if recipe is not None:
        packet = xmp_packet(recipe)
        if kind == "PNG":
            info = PngImagePlugin.PngInfo()
            info.add_text("parameters", parameters_line(recipe))
            info.add_itxt(XMP_KEY, packet)
            options["pnginfo"] = info
        else:
            if kind == "JPEG" and len(packet.encode()) > JPEG_XMP_LIMIT:
                packet = xmp_packet(without_data(recipe))
            exif = Image.Exif()
            comment = b"UNICODE\x00" + parameters_line(recipe).encode("utf-16-be")
            exif.get_ifd(EXIF_POINTER)[USER_COMMENT] = comment
            options |= {"exif": exif, "xmp": packet.encode()}
    buffer = io.BytesIO()
    try:
        picture.save(buffer, kind, **options)
    except ValueError as error:  # JPEG's blocks hold 64 KiB
        raise InputError(
            f"the recipe of {path} is too long for a {kind}: write a .png, or use --no-metadata"
        ) from error
    with writing_whole(path, overwrite=overwrite) as file:
        file.write(buffer.getvalue())


def without_data(recipe: Mapping[str, Any]) -> dict[str, Any]:
    """The recipe without the conditions' pixels; their hashes stay."""
    conditions = {name: {**entry, "data": None} for name, entry in recipe["conditions"].items()}
    return {**recipe, "conditions": conditions}


def read_recipe(path: Path) -> tuple[dict[str, Any], np.ndarray]:
    """The recipe inside a picture, and its pixels (uint8 [H, W, 3]).

    Raises:
        InputError: the file is missing, is no picture, or holds no recipe of ours.
    """
    try:
        with Image.open(path) as image:
            packet = image.info.get(XMP_KEY) or image.info.get("xmp") or ""
            pixels = np.array(image.convert("RGB"))
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise InputError(f"{path} cannot be read as a picture: {getattr(error, 'strerror', None) or error}") from error
    text = packet.decode("utf-8", "replace") if isinstance(packet, bytes) else packet
    text = text.rstrip("\x00")
    body = re.search(r"<x:xmpmeta.*</x:xmpmeta>", text, re.DOTALL)
    if body is None:
        raise InputError(f"{path} holds no recipe: it was not made by likeness, or its metadata was stripped")
    try:
        for description in ElementTree.fromstring(body[0]).iter(f"{{{RDF}}}Description"):
            if recipe := description.get(f"{{{NAMESPACE}}}recipe"):
                return json.loads(recipe), pixels
    except (ElementTree.ParseError, json.JSONDecodeError) as error:
        raise InputError(f"the recipe in {path} is damaged: {error}") from error
    raise InputError(f"{path} holds no recipe: it was not made by likeness, or its metadata was stripped")


def differences(recipe: Mapping[str, Any], pipeline: Any, fingerprint: str) -> list[str]:
    """What differs between the recipe's circumstances and these; bits are promised only where nothing does."""
    now = {**environment(pipeline), "fingerprint": fingerprint}
    then = {**recipe.get("environment", {}), "fingerprint": recipe.get("fingerprint")}
    names: Sequence[str] = [name for name in now if then.get(name) != now[name]]
    return [f"{name}: {then.get(name)} then, {now[name]} now" for name in names]
