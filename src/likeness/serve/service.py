"""The blocking work of the service: reading conditions, storing images, annotating photographs, editing masks.

It runs in threads: `pool` for what belongs to jobs, in order, and `side` for everything else, one at a time.
"""

from __future__ import annotations

import base64
import binascii
import contextlib
import hashlib
import io
import json
import secrets
import threading
from collections.abc import Callable, Generator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image, ImageOps

from likeness.annotators.face_parser import load_face_parser
from likeness.annotators.landmarks import landmarker_name, open_face_finder
from likeness.conditions import CONDITIONS, Reading, inspection
from likeness.conditions.images import MAX_PIXELS, load_array, open_image, png_bytes, read_rgb
from likeness.conditions.mask import edits, mask_image
from likeness.conditions.mask.commands import OPERATIONS
from likeness.conditions.mask.geometry import shows_face
from likeness.pipelines.generate import resolve
from likeness.pipelines.image_recipe import check_fits, encode_image, environment, recipe_of
from likeness.pipelines.load import load
from likeness.pipelines.output import PortraitOutput
from likeness.pipelines.propose import propose_mask
from likeness.pipelines.sizes import parse_size
from likeness.prepare.align import cut_portrait, face_transform
from likeness.prepare.annotate import keypoints_annotator, mask_annotator, sketch_annotator
from likeness.prepare.edit import Change, Photo, Plan, composed, open_photo, plan_edit, region_steps, request_for
from likeness.serve.engine import CACHE
from likeness.serve.errors import FINAL, ApiError, invalid, invalid_input
from likeness.serve.schema import Generation, Images, MaskEdit, PhotoEdit, Proposal
from likeness.serve.store import Store, write
from likeness.types import ConditionInput, InputError, PortraitRequest
from likeness.weights.hashes import pipeline_hash

if TYPE_CHECKING:
    from likeness.serve.jobs import Job

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
    local: bool = False
    """Without keys, accept only requests to an address of this machine."""
    studio: bool = False
    """Whether to serve the page on which masks are painted."""
    landmarker: Path | None = None
    """MediaPipe's `face_landmarker.task`, for alignment and keypoints."""


class Service:
    """A loaded model with its files.

    Args:
        pipeline: the pipeline.
        store: jobs and files.
        settings: options.

    Raises:
        InputError: the landmarker cannot be used.
    """

    def __init__(self, pipeline: Any, store: Store, settings: Settings) -> None:
        self.pipeline, self.store, self.settings = pipeline, store, settings
        self.source = getattr(pipeline, "source", {"model": settings.model})  # as `likeness.load` records it
        self.fingerprint = pipeline_hash(pipeline) if settings.metadata else ""
        self.environment = environment(pipeline)
        self.stack = contextlib.ExitStack()
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
        request = self.common_request(body)
        width = height = None
        if body.size not in (None, "auto"):
            with invalid_input("size"):
                width, height = parse_size(body.size)
                if max(width, height) > settings.max_side:
                    limit = settings.max_side
                    raise InputError(f"size is {body.size}; this service allows sides of at most {limit} pixels")
        conditions, notes = {}, []
        for name, text in body.control_image.items():
            param = f"control_image.{name}"
            reading = self.read_condition(name, text, param)
            notes += [f"{name}: {line}" for line in (reading.scheme, *(note.text for note in reading.notes))]
            start, end = body.of("control_guidance_start", name), body.of("control_guidance_end", name)
            if start > end:
                raise invalid(f"{name} is active from {start} to {end}: the start comes first", param)
            scale = body.of("conditioning_scale", name)
            conditions[name] = ConditionInput(image=reading, scale=scale, start=start, end=end)
        trained = self.conditions
        if unknown := [name for name in conditions if name not in trained]:
            message = f"The model was not trained with {unknown[0]}: it takes {', '.join(trained) or 'text only'}"
            raise invalid(message, f"control_image.{unknown[0]}")
        request = replace(request, conditions=conditions, width=width, height=height, upscale=body.upscale)
        with invalid_input("size"):
            request = resolve(request, self.pipeline)
        if body.output_format == "jpeg" and self.settings.metadata:
            try:
                check_fits(self.recipe(request), "JPEG")
            except InputError as error:
                message = "The prompts are too long for the recipe in a JPEG: shorten them, or use output_format png"
                raise invalid(message, "output_format") from error
        return request, notes

    def recipe(self, request: PortraitRequest) -> dict[str, Any]:
        """Return the recipe of the image of a resolved request."""
        return recipe_of(request, self.pipeline, **self.source, fingerprint=self.fingerprint, known=self.environment)

    def common_request(self, body: Images) -> PortraitRequest:
        """Return the request of the fields that generations and edits share. Raises `ApiError`."""
        settings = self.settings
        if body.model not in (None, settings.model):
            message = f"Unknown model {body.model!r}. Available: {settings.model}"
            raise ApiError(404, message, param="model", code="model_not_found")
        if body.steps is not None and body.steps > settings.max_steps:
            raise invalid(f"steps is {body.steps}; this service allows {settings.max_steps}", "steps")
        seed = secrets.randbelow(2**31) if body.seed is None else body.seed
        with invalid_input("seed"):
            resolve(PortraitRequest(seed=seed + body.n - 1), self.pipeline)
        return PortraitRequest(
            prompt=body.prompt,
            negative_prompt=body.negative_prompt,
            guidance_scale=body.guidance_scale,
            num_inference_steps=body.steps,
            seed=seed,
        )

    def edit_of(self, body: PhotoEdit, image: bytes, mask: bytes | None) -> tuple[PortraitRequest, Photo, Plan]:
        """Check an edit, find and parse the face, and apply the change to its mask.

        Raises:
            ApiError: a field is invalid, or there is nothing to edit.
        """
        request = self.common_request(body)
        if "mask" not in self.conditions:
            message = "The model was not trained with masks, which edits require"
            raise ApiError(501, message, code="not_supported", headers=FINAL)
        if mask is not None and (body.mask_edit or body.wanted_mask or body.region):
            message = "A mask limits the change to its transparent pixels: leave mask_edit, wanted_mask and region out"
            raise ApiError(400, message, param="mask", code="invalid_value")
        wanted = None if body.wanted_mask is None else self.read_mask(body.wanted_mask, "wanted_mask")
        with invalid_input("image"):
            photo = open_photo(image, "image")
            if self.find is None and photo.image.width != photo.image.height:
                width, height = photo.image.size
                raise InputError(f"image is {width}x{height}: without --landmarker the service edits square faces only")
        with invalid_input("mask"):
            region = None if mask is None else transparent(mask)
        with invalid_input():
            change = Change(
                mask_edit=body.mask_edit,
                mask=None if wanted is None else mask_image(wanted),
                region=[name.strip() for name in body.region.split(",") if name.strip()],
                region_mask=region,
                keep=body.keep,
                face=body.face,
                whole=body.strength is not None,
            )
            read = lambda text: self.read_mask(text, "mask_edit")  # noqa: E731
            side = self.pipeline.config.defaults["size"]
            plan = plan_edit(photo, change, side, parser=self.parser, find=self.find, read=read)
            return request_for(self.pipeline, photo, plan, request, body.output_format.upper()), photo, plan

    @cached_property
    def parser(self) -> tuple[Any, int]:
        """The face parser, loaded at the first use."""
        return load_face_parser()

    def edit_steps(self, job: Job, request: PortraitRequest) -> Generator[tuple[int, int], None, PortraitOutput] | None:
        """Return the steps of an edit before the first one, for one of its images; None for generations."""
        if job.edit is None:
            return None
        return region_steps(self.pipeline, *job.edit, request, **how_of(job.body))

    @property
    def conditions(self) -> list[str]:
        """Conditions of the model."""
        return [name for name in self.pipeline.transformer.config.condition_names if name in CONDITIONS]

    def content(self, text: str, param: str) -> bytes:
        """Return the content of base64, a data URL or a stored file.

        Raises:
            ApiError: it is none of these.
        """
        if text.startswith("file-"):
            with contextlib.suppress(FileNotFoundError):  # it may expire meanwhile
                if file := self.store.find_upload(text):
                    return file.read_bytes()
            raise ApiError(404, f"{param}: there is no file {text[:80]!r}", param=param, code="file_not_found")
        head, comma, tail = text.partition(",")
        encoded = "".join((tail if comma and head.startswith("data:") else text).split())
        try:
            return base64.b64decode(encoded, validate=True)
        except (binascii.Error, ValueError) as error:
            message = f"{param} is not base64, a data URL or the id of a stored file"
            raise ApiError(400, message, param=param, code="invalid_base64") from error

    def read_condition(self, name: str, text: str, param: str) -> Reading:
        """Read a condition of a body; the same object for the same content, so that it is encoded once. Raises
        `ApiError`.
        """
        content = self.content(text, param)
        key = name, hashlib.sha256(content).digest()
        reading = self.readings.get(key)
        if reading is None:
            with invalid_input(param):
                reading = CONDITIONS[name].read(source_of(name, content, param), name=param)
            with self.changing:
                self.readings[key] = reading
                while sum(each.raw.nbytes for each in self.readings.values()) > CACHE:
                    del self.readings[next(iter(self.readings))]
        return reading

    def save(self, job: Job, index: int, image: Image.Image, preview: bool) -> tuple[str, str]:
        """Write an image with its recipe; returns the name of its file and its content in base64. A preview is not
        kept.
        """
        body, recipe = job.body, None
        kind = body.output_format.upper()
        if self.settings.metadata and not preview:
            recipe = self.recipe(replace(job.request, seed=job.seed(index)))
        if job.edit is not None:
            edited = composed(*job.edit, image, recipe, kind=kind, **how_of(body))
            job.certificates[index], content = edited.certificate, edited.content
        else:
            content = encode_image(image, kind, recipe, quality=body.output_compression)
        name = f"{job.id}/{index}.{body.output_format}"
        if not preview:
            write(self.store.images / name, content)
        return name, base64.b64encode(content).decode()

    # Conditions and masks

    def uploaded(self, condition: str, raw: np.ndarray) -> dict[str, Any]:
        """Store a condition in its canonical form; returns its id and content."""
        content = CONDITIONS[condition].encode(raw)
        id = self.store.add_upload(content, CONDITIONS[condition].suffix)
        return {"id": id, "condition": condition, "b64_json": base64.b64encode(content).decode()}

    def extract(self, condition: str, photo: bytes, size: int | None, align: bool | None) -> dict[str, Any]:
        """Extract a condition from a photograph, aligned as the images that models are trained on."""
        if align and self.find is None:
            message = "Alignment requires the option --landmarker of the service"
            raise ApiError(501, message, param="align", code="not_available", headers=FINAL)
        if size is None:
            size = self.pipeline.config.defaults["size"]
        if not 32 <= size <= self.settings.max_side:
            raise invalid(f"size is {size}; it must be from 32 to {self.settings.max_side}", "size")
        annotate = self.annotators.get(condition)
        if annotate is None:
            message = "Keypoints require the option --landmarker of the service"
            raise ApiError(501, message, code="not_available", headers=FINAL)
        aligned = self.find is not None and align is not False
        with invalid_input("image"):
            image = read_rgb(photo, "image")
            if aligned:
                transform, _, _ = face_transform(np.asarray(image), "image", self.find, size)
                pixels = cut_portrait(np.asarray(image), transform, size)
            else:
                pixels = np.asarray(ImageOps.fit(image, (size, size), Image.Resampling.LANCZOS))
        (content,) = annotate([pixels])
        reading = None if content is None else CONDITIONS[condition].read(source_of(condition, content, condition))
        if reading is None or (condition == "mask" and not shows_face(reading.raw)):
            raise ApiError(400, "image shows no face: use a photograph of a face", param="image", code="no_face")
        portrait = base64.b64encode(png_bytes(Image.fromarray(pixels))).decode()
        return {
            **self.uploaded(condition, reading.raw),
            "size": f"{size}x{size}",
            "aligned": aligned,
            "image": portrait,
        }

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
        with invalid_input("file"):
            report = inspection.inspect(source_of(condition or "mask", content, "file"), condition)
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
        try:
            found = propose_mask(self.mask_pipeline, body.prompt, seed, candidates=body.candidates)
        except InputError as error:  # the schema has checked the request
            raise RuntimeError(f"--mask-model {self.settings.mask_model} cannot be used") from error
        return {**self.uploaded("mask", found.labels), "seed": seed, "broken": list(found.broken)}

    def edit(self, body: MaskEdit) -> dict[str, Any]:
        """Apply an operation of `likeness mask`."""
        before = self.read_mask(body.mask, "mask")
        options = {name: getattr(body, name) for name in body.model_fields_set - {"mask", "operation"}}
        if body.other:
            options["other"] = self.read_mask(body.other, "other")
        with invalid_input():
            after = OPERATIONS[body.operation](before, **options)
        if not after.any():
            raise invalid("Nothing but background would remain: a mask needs a face", "classes")
        return {**self.uploaded("mask", after), "changes": edits.changes(before, after)}

    def read_mask(self, text: str, param: str) -> np.ndarray:
        """Read the labels of a mask of a body. Raises `ApiError`."""
        labels = self.read_condition("mask", text, param).raw
        if max(labels.shape) > LARGEST_EDIT:
            message = f"{param} is {labels.shape[1]}x{labels.shape[0]}: at most {LARGEST_EDIT} pixels a side are edited"
            raise invalid(message, param)
        return labels


def how_of(body: Any) -> dict[str, Any]:
    """Return the method and the strength of a `PhotoEdit`."""
    return {"method": body.method, "strength": 1.0 if body.strength is None else body.strength}


def transparent(mask: bytes) -> Image.Image:
    """Return where a mask is completely transparent, white on black. Raises `InputError` without such a pixel."""
    image = open_image(mask, "mask", max_pixels=MAX_PIXELS)
    found = np.asarray(image.convert("RGBA").getchannel("A")) == 0
    if not found.any():
        raise InputError("mask has no transparent pixels: those to edit have alpha 0")
    return Image.fromarray(found.astype(np.uint8) * 255)


def source_of(condition: str, content: bytes, name: str) -> Any:
    """Decode the content of a condition file: an image, an array (.npy, .npz), or the JSON of keypoints.

    Raises:
        InputError: it is none of these.
    """
    if content.startswith((b"\x93NUMPY", b"PK")):
        return load_array(io.BytesIO(content), name)
    if CONDITIONS[condition].raw != "points":
        return open_image(content, name)
    try:
        document = json.loads(content, parse_int=float)  # integers may be too large for floats
    except (ValueError, RecursionError) as error:
        raise InputError(f"{name} is not JSON: keypoints are a list of points as JSON") from error
    return document if isinstance(document, dict) else {"points": document}
