"""The blocking work of the service: reading conditions, storing images, annotating photographs, editing masks.

It runs in threads: `pool` for what belongs to jobs, in order, and `side` for everything else, one at a time.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import json
import secrets
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from likeness.annotators.landmarks import find_faces, landmarker_name, open_face_finder
from likeness.conditions import CONDITIONS, Reading, inspection
from likeness.conditions.framing import portrait_transform
from likeness.conditions.images import open_image, png_bytes, read_rgb
from likeness.conditions.mask import edits
from likeness.pipelines.generate import resolve
from likeness.pipelines.image_recipe import environment, recipe_of, write_image
from likeness.pipelines.load import load
from likeness.pipelines.propose import propose_mask
from likeness.pipelines.sizes import parse_size
from likeness.prepare.align import cut_portrait, refine_landmarks
from likeness.prepare.annotate import keypoints_annotator, mask_annotator, sketch_annotator
from likeness.prepare.ingest.convert import centre_square, crop_and_resize
from likeness.serve.engine import CACHE
from likeness.serve.errors import ApiError, invalid
from likeness.serve.jobs import Job
from likeness.serve.schema import Generation, MaskEdit, Proposal
from likeness.serve.store import Store
from likeness.types import ConditionInput, InputError, PortraitRequest
from likeness.weights.hashes import pipeline_hash

LARGEST_EDIT = 2048
"""Largest side of a mask that is edited or interpolated."""


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Options of the service."""

    model: str
    """Name of the model in the API."""
    max_steps: int = 100
    max_side: int = 2048
    """Largest side of an image in pixels."""
    max_bytes: int = 32 * 2**20
    """Largest body of a request."""
    queue: int = 64
    """Largest number of waiting images."""
    keep: float = 3600
    """Seconds for which finished jobs and uploads are kept."""
    shutdown: float = 30
    """Seconds for which a shutdown waits for images."""
    keys: tuple[str, ...] = ()
    """API keys; without any, everyone may send requests."""
    cors: tuple[str, ...] = ()
    """Origins of web pages that may send requests."""
    metadata: bool = True
    """Whether images contain their recipe."""
    log_prompts: bool = False
    deterministic: bool = False
    """Generate every image by itself on an accelerator, too."""
    mask_model: str = "mask-mini"
    landmarker: Path | None = None
    """MediaPipe's `face_landmarker.task`, for alignment and keypoints."""


class Service:
    """A loaded model with its files.

    Args:
        pipeline: the pipeline.
        store: jobs and files.
        settings: options.
        source: `model`, `base` and `quantize` with which the pipeline was loaded, for recipes.

    Raises:
        InputError: the landmarker cannot be used.
    """

    def __init__(self, pipeline: Any, store: Store, settings: Settings, source: dict[str, Any] | None = None) -> None:
        self.pipeline, self.store, self.settings = pipeline, store, settings
        self.source = source or {"model": settings.model}
        self.fingerprint = pipeline_hash(pipeline) if settings.metadata else ""
        self.environment = environment(pipeline)
        self.stack = ExitStack()
        self.find = None
        if settings.landmarker is not None:
            self.find = self.stack.enter_context(open_face_finder(settings.landmarker))
        self.readings: dict[tuple[str, bytes], Reading] = {}
        """The last conditions, by name and hash of the content, oldest first."""
        self.changing = threading.Lock()
        self.pool = ThreadPoolExecutor(1, "likeness-files")
        self.side = ThreadPoolExecutor(1, "likeness-side")

    def close(self) -> None:
        """End the threads and close the database."""
        self.pool.shutdown()
        self.side.shutdown()
        self.stack.close()
        self.store.close()

    # Generation

    def request_of(self, body: Generation) -> tuple[PortraitRequest, list[str]]:
        """Check a request and read its conditions; also returns notes on them.

        Raises:
            ApiError: a field is invalid.
        """
        settings = self.settings
        if body.model not in (None, settings.model):
            message = f"Unknown model {body.model!r}. Available: {settings.model}"
            raise ApiError(404, message, param="model", code="model_not_found")
        if body.steps is not None and body.steps > settings.max_steps:
            raise invalid(InputError(f"steps is {body.steps}; this service allows {settings.max_steps}"), "steps")
        width = height = None
        if body.size not in (None, "auto"):
            try:
                width, height = parse_size(body.size)
            except InputError as error:
                raise invalid(error, "size") from error
            if max(width, height) > settings.max_side:
                message = f"size is {body.size}; this service allows sides of at most {settings.max_side} pixels"
                raise invalid(InputError(message), "size")
        conditions, notes = {}, []
        for name, text in body.control_image.items():
            param = f"control_image.{name}"
            reading = self.read_condition(name, text, param)
            notes += [f"{name}: {line}" for line in (reading.scheme, *(note.text for note in reading.notes))]
            start, end = body.of("control_guidance_start", name), body.of("control_guidance_end", name)
            if start > end:
                raise invalid(InputError(f"{name} is active from {start} to {end}: the start comes first"), param)
            scale = body.of("conditioning_scale", name)
            conditions[name] = ConditionInput(image=reading, scale=scale, start=start, end=end)
        trained = self.conditions
        if unknown := [name for name in conditions if name not in trained]:
            message = f"The model was not trained with {unknown[0]}: it takes {', '.join(trained) or 'text only'}"
            raise invalid(InputError(message), f"control_image.{unknown[0]}")
        request = PortraitRequest(
            prompt=body.prompt,
            negative_prompt=body.negative_prompt,
            conditions=conditions,
            guidance_scale=body.guidance_scale,
            num_inference_steps=body.steps,
            width=width,
            height=height,
            upscale=body.upscale,
            seed=secrets.randbelow(2**31) if body.seed is None else body.seed,
        )
        try:
            resolve(PortraitRequest(seed=request.seed + body.n - 1), self.pipeline)
        except InputError as error:
            raise invalid(error, "seed") from error
        try:
            return resolve(request, self.pipeline), notes
        except InputError as error:
            raise invalid(error, "size") from error

    @property
    def conditions(self) -> list[str]:
        """Conditions of the model."""
        return [name for name in self.pipeline.transformer.config.condition_names if name in CONDITIONS]

    def content(self, text: str, param: str) -> bytes:
        """Return the content of base64, a data URL or an uploaded file.

        Raises:
            ApiError: it is none of these.
        """
        if text.startswith("file-"):
            file = self.store.find_upload(text)
            if file is None:
                raise ApiError(404, f"{param}: there is no file {text[:80]!r}", param=param, code="file_not_found")
            return file.read_bytes()
        head, comma, tail = text.partition(",")
        try:
            return base64.b64decode(tail if comma and head.startswith("data:") else text, validate=True)
        except (binascii.Error, ValueError) as error:
            message = f"{param} is not base64, a data URL or the id of an uploaded file"
            raise ApiError(400, message, param=param, code="invalid_base64") from error

    def read_condition(self, name: str, text: str, param: str) -> Reading:
        """Read a condition of a body; the same object for the same content, so that it is encoded once. Raises
        `ApiError`.
        """
        content = self.content(text, param)
        key = name, hashlib.sha256(content).digest()
        reading = self.readings.get(key)
        if reading is None:
            try:
                reading = CONDITIONS[name].read(source_of(name, content, param), name=param)
            except InputError as error:
                raise invalid(error, param) from error
            with self.changing:
                self.readings[key] = reading
                while sum(each.raw.nbytes for each in self.readings.values()) > CACHE:
                    del self.readings[next(iter(self.readings))]
        return reading

    def save(self, job: Job, index: int, image: Image.Image, preview: bool) -> tuple[str, str]:
        """Write an image with its recipe; returns the name of its file and its content in base64. A preview is not
        kept.
        """
        body, request = job.body, job.request
        name = f"{job.id}/{'preview-' * preview}{index}.{body.output_format}"
        recipe = None
        if self.settings.metadata and not preview:
            own = replace(request, seed=job.seed(index))
            recipe = recipe_of(own, self.pipeline, **self.source, fingerprint=self.fingerprint, known=self.environment)
        path = self.store.images / name
        write_image(image, path, recipe, quality=body.output_compression)
        content = base64.b64encode(path.read_bytes()).decode()
        if preview:
            path.unlink()
        return name, content

    # Conditions and masks

    def uploaded(self, condition: str, raw: np.ndarray) -> dict[str, Any]:
        """Store a condition in its canonical form; returns its id and content."""
        content = CONDITIONS[condition].encode(raw)
        id = self.store.add_upload(content, CONDITIONS[condition].suffix)
        return {"id": id, "condition": condition, "b64_json": base64.b64encode(content).decode()}

    def extract(self, condition: str, photo: bytes, size: int | None, align: bool | None) -> dict[str, Any]:
        """Extract a condition from a photograph, aligned as the images that models are trained on."""
        if align and self.find is None:
            raise ApiError(501, "Alignment requires the option --landmarker of the service", param="align")
        size = size or self.pipeline.config.defaults["size"]
        if not 32 <= size <= self.settings.max_side:
            raise invalid(InputError(f"size is {size}; it must be from 32 to {self.settings.max_side}"), "size")
        annotate = self.annotators.get(condition)
        if annotate is None:
            raise ApiError(501, "Keypoints require the option --landmarker of the service", code="not_available")
        try:
            image = read_rgb(photo, "image")
        except InputError as error:
            raise invalid(error, "image") from error
        aligned = self.find is not None and align is not False
        if not aligned:
            image = crop_and_resize(image, centre_square(*image.size), size)
        pixels = self.align(np.asarray(image), size) if aligned else np.asarray(image)
        (content,) = annotate([pixels])
        if content is None:
            raise ApiError(400, "image shows no face: use a photograph of a face", param="image", code="no_face")
        reading = CONDITIONS[condition].read(source_of(condition, content, condition))
        portrait = base64.b64encode(png_bytes(Image.fromarray(pixels))).decode()
        return {
            **self.uploaded(condition, reading.raw),
            "size": f"{size}x{size}",
            "aligned": aligned,
            "image": portrait,
        }

    def align(self, photo: np.ndarray, size: int) -> np.ndarray:
        """Cut the largest face out of a photograph, uint8 [size, size, 3]."""
        assert self.find is not None
        faces = find_faces(self.find, photo)
        if not faces:
            message = "image shows no face: use another photograph, or align=false for one that is aligned"
            raise ApiError(400, message, param="image", code="no_face")
        points = refine_landmarks(self.find, photo, faces[0])
        return cut_portrait(photo, portrait_transform(points, size), size)

    @cached_property
    def annotators(self) -> dict[str, Callable[[list[np.ndarray]], list[bytes | None]]]:
        """The annotators, loaded at the first use."""
        found = {"mask": mask_annotator("bundled").annotate, "sketch": sketch_annotator(None).annotate}
        if self.find is not None and self.settings.landmarker is not None:
            find = self.find
            name = landmarker_name(self.settings.landmarker)
            found["keypoints"] = keypoints_annotator(lambda image: next(iter(find(image)), None), name).annotate
        return found

    def inspect(self, content: bytes, condition: str | None) -> dict[str, Any]:
        """Report what a condition file contains, and store its canonical form."""
        if condition is None and content.lstrip()[:1] in (b"{", b"["):
            condition = "keypoints"
        try:
            report = inspection.inspect(source_of(condition or "mask", content, "file"), condition)
        except InputError as error:
            raise invalid(error, "file") from error
        return {
            **self.uploaded(report.condition, report.raw),
            "format": report.scheme,
            "size": None if report.size is None else f"{report.size[0]}x{report.size[1]}",
            "classes": [{"name": name, "pixels": n, "fraction": fraction} for name, n, fraction in report.classes],
            "problems": [note._asdict() for note in report.problems],
        }

    @cached_property
    def mask_pipeline(self) -> Any:
        """The model that generates masks, loaded at the first use."""
        return load(self.settings.mask_model)

    def propose(self, body: Proposal) -> dict[str, Any]:
        """Generate a mask for a sentence."""
        seed = secrets.randbelow(2**31) if body.seed is None else body.seed
        found = propose_mask(self.mask_pipeline, body.prompt, seed, candidates=body.candidates)
        return {**self.uploaded("mask", found.labels), "seed": seed, "broken": list(found.broken)}

    def edit(self, body: MaskEdit) -> dict[str, Any]:
        """Apply an operation of `likeness mask`."""
        before = self.read_mask(body.mask, "mask")
        other = self.read_mask(body.other, "other") if body.other else before
        try:
            after = OPERATIONS[body.operation](before, other, body)
        except InputError as error:
            raise invalid(error) from error
        if not after.any():
            raise invalid(InputError("Nothing but background would remain: a mask needs a face"), "classes")
        return {**self.uploaded("mask", after), "changes": edits.changes(before, after)}

    def read_mask(self, text: str, param: str) -> np.ndarray:
        """Read the labels of a mask of a body. Raises `ApiError`."""
        labels = self.read_condition("mask", text, param).raw
        if max(labels.shape) > LARGEST_EDIT:
            message = f"{param} is {labels.shape[1]}x{labels.shape[0]}: at most {LARGEST_EDIT} pixels a side are edited"
            raise invalid(InputError(message), param)
        return labels


OPERATIONS: dict[str, Callable[[np.ndarray, np.ndarray, MaskEdit], np.ndarray]] = {
    "grow": lambda mask, _, body: edits.grow(
        mask, body.classes, edits.radius_of(body.by or "", mask.shape), tuple(body.over)
    ),
    "shrink": lambda mask, _, body: edits.shrink(mask, body.classes, edits.radius_of(body.by or "", mask.shape)),
    "remove": lambda mask, _, body: edits.remove(mask, body.classes),
    "mirror": lambda mask, _, body: edits.mirror(mask, body.classes),
    "paste": lambda mask, other, body: edits.paste(mask, other, body.classes, tuple(body.over), body.align),
    "fill": lambda mask, _, body: edits.fill_holes(mask, body.classes),
    "rename": lambda mask, _, body: edits.rename(mask, body.old or "", body.to or ""),
    "swap": lambda mask, _, body: edits.swap(mask, *body.classes),
    "interpolate": lambda mask, other, body: edits.interpolate(mask, other, body.at),
}
"""Operation -> function from mask, other mask and body to the edited mask."""


def source_of(condition: str, content: bytes, name: str) -> Any:
    """Decode the content of a condition file: an image, or the JSON of keypoints.

    Raises:
        InputError: it is neither.
    """
    if CONDITIONS[condition].raw != "points":
        return open_image(content, name)
    try:
        document = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise InputError(f"{name} is not JSON: keypoints are a list of points as JSON") from error
    return document if isinstance(document, dict) else {"points": document}
