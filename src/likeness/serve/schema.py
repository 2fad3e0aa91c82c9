"""Bodies of requests: their fields, bounds and descriptions. Unknown fields are errors."""

from __future__ import annotations

from inspect import signature
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

from likeness.conditions.mask.commands import OPERATIONS
from likeness.types import MAX_STEPS

MAX_IMAGES, MAX_PREVIEWS = 10, 3
"""Most images of a request, and previews of an image."""

MAX_PROMPT = 32_000
"""Characters of a prompt, as in OpenAI's API."""

MAX_EDIT = 2000
"""Characters of commands that edit a mask: each takes time."""

MAX_CANDIDATES = 16
"""Masks that are generated for a proposal."""

Prompt = Annotated[str, Field(max_length=MAX_PROMPT)]
Seed = Annotated[int, Field(ge=0, lt=2**63)]
ConditionName = Literal["mask", "sketch", "keypoints"]
Fraction = Annotated[float, Field(ge=0, le=1)]
Scale = Annotated[float, Field(ge=0, le=100)]
Names = Annotated[list[str], Field(max_length=32)]


class Body(BaseModel):
    """A body: JSON types are not converted, unknown fields and NaN are rejected."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def without_nulls(cls, values: Any) -> Any:
        """Leave null fields at their defaults, as OpenAI's API does."""
        return {k: value for k, value in values.items() if value is not None} if isinstance(values, dict) else values


class Images(Body):
    """Fields of both requests for images."""

    prompt: Prompt
    model: str | None = None
    n: int = Field(1, ge=1, le=MAX_IMAGES, description="Number of images. Each further image uses the next seed.")
    response_format: Literal["b64_json", "url"] = "b64_json"
    user: str | None = Field(None, max_length=256, description="Accepted, not stored.")
    quality: Literal["auto"] | None = None
    seed: Seed | None = Field(None, description="Default: random.")
    steps: int | None = Field(None, ge=1, le=MAX_STEPS)
    guidance_scale: Scale | None = None
    negative_prompt: Prompt = ""


class Generation(Images):
    """`POST /v1/images/generations`: OpenAI's fields, then ours."""

    size: str | None = Field(None, description="Width x height, for example 128x128, or auto.")
    output_format: Literal["png", "jpeg", "webp"] = "png"
    output_compression: int | None = Field(None, ge=0, le=100, description="Quality of jpeg and webp.")
    stream: bool | None = False
    partial_images: int | None = Field(None, ge=0, le=MAX_PREVIEWS, description="Previews per image; requires stream.")
    background: Literal["auto", "opaque"] | None = None
    moderation: Literal["auto"] | None = None

    control_image: dict[ConditionName, str] = Field({}, description="Base64, data URL, or id of a stored file.")
    conditioning_scale: Scale | dict[ConditionName, Scale] = 1.0
    control_guidance_start: Fraction | dict[ConditionName, Fraction] = 0.0
    control_guidance_end: Fraction | dict[ConditionName, Fraction] = 1.0
    upscale: bool = False

    @model_validator(mode="after")
    def check(self) -> Self:
        """Check fields that depend on others."""
        if self.partial_images and not self.stream:
            raise ValueError("partial_images requires stream")
        if self.stream and self.response_format == "url":
            raise ValueError("stream sends images as b64_json: leave response_format out, or stream")
        if self.output_compression is not None and self.output_format == "png":
            raise ValueError("output_compression requires output_format jpeg or webp")
        for name in ("conditioning_scale", "control_guidance_start", "control_guidance_end"):
            value = getattr(self, name)
            if isinstance(value, dict) and (unused := sorted(set(value) - set(self.control_image))):
                raise ValueError(f"{name} contains {unused[0]}, but control_image does not")
        return self

    def of(self, field: str, condition: str) -> float:
        """Return the value of a field for one condition."""
        value, default = getattr(self, field), type(self).model_fields[field].default
        return value.get(condition, default) if isinstance(value, dict) else value


class PhotoEdit(Images):
    """`POST /v1/images/edits`, a form: OpenAI's fields but the files, then ours, which are those of `likeness edit`."""

    model_config = ConfigDict(strict=False)  # the values of a form are text

    size: Literal["auto"] | None = Field(None, description="The result has the size of the photograph.")
    output_format: Literal["png", "webp"] = Field("png", description="Lossless.")
    output_compression: None = None
    partial_images: None = None
    background: Literal["auto"] | None = None

    mask_edit: str = Field("", max_length=MAX_EDIT, description="Commands; a FILE is the id of a stored file.")
    wanted_mask: str | None = Field(None, description="The wanted mask: base64, data URL or id of a stored file.")
    region: str = Field("", max_length=MAX_PROMPT, description="Classes to generate again, such as hair,hat.")
    keep: str = Field("", max_length=MAX_PROMPT, description='Classes whose pixels stay, or "all but hair".')
    strength: float | None = Field(None, gt=0, le=1, description="Alone: the whole face. Default: 1.")
    method: Literal["replacement", "image_to_image", "langevin", "flow_edit", "inversion", "inpainting"] = "replacement"
    face: int | None = Field(None, ge=1, description="Number of the face. Default: 1, the largest.")


class Proposal(Body):
    """`POST /v1/masks/propose`."""

    prompt: Prompt
    seed: Seed | None = Field(None, description="Default: random.")
    candidates: int = Field(4, ge=1, le=MAX_CANDIDATES, description="Masks to generate; the best is returned.")


class MaskCheck(Body):
    """`POST /v1/masks/check`."""

    mask: str = Field(description="Base64, data URL, or id of a stored file.")
    prompt: Prompt = ""


class MaskEdit(Body):
    """`POST /v1/masks/edit`."""

    mask: str = Field(description="Base64, data URL, or id of a stored file.")
    operation: Literal["grow", "shrink", "remove", "mirror", "paste", "fill", "clean", "rename", "swap", "interpolate"]
    classes: Names = []
    by: str | None = Field(None, description="4 for 4 % of the shorter side, or 5px.")
    over: Names = []
    other: str | None = Field(None, description="The other mask, as mask.")
    align: bool = False
    old: str | None = None
    to: str | None = None
    at: Fraction = 0.5

    @model_validator(mode="after")
    def check(self) -> Self:
        """Check that the fields are those of the operation."""
        _, *options = signature(OPERATIONS[self.operation]).parameters.values()
        if missing := [each.name for each in options if each.default is each.empty and not getattr(self, each.name)]:
            raise ValueError(f"{self.operation} requires {' and '.join(missing)}")
        if unused := sorted(self.model_fields_set - {"mask", "operation", *(each.name for each in options)}):
            raise ValueError(f"{self.operation} does not use {unused[0]}")
        if self.operation == "swap" and len(self.classes) != 2:
            raise ValueError("swap requires two classes")
        return self
