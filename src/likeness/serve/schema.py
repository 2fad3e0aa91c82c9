"""Bodies of requests: their fields, bounds and descriptions. Unknown fields are errors."""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

from likeness.pipelines.portrait import MAX_STEPS

MAX_PROMPT = 32_000
"""Characters of a prompt, as in OpenAI's API."""

Prompt = Annotated[str, Field(max_length=MAX_PROMPT)]
Seed = Annotated[int, Field(ge=0, lt=2**63)]
ConditionName = Literal["mask", "sketch", "keypoints"]
Fraction = Annotated[float, Field(ge=0, le=1)]
Scale = Annotated[float, Field(ge=0, le=100)]
Names = Annotated[list[str], Field(max_length=32)]


class Body(BaseModel):
    """A body: JSON types are not converted, unknown fields and NaN are rejected."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)


class Generation(Body):
    """`POST /v1/images/generations`: OpenAI's fields, then ours."""

    prompt: Prompt
    model: str | None = None
    n: int = Field(1, ge=1, le=10, description="Number of images. Each further image uses the next seed.")
    size: str | None = Field(None, description="Width x height, for example 128x128, or auto.")
    response_format: Literal["b64_json", "url"] = "b64_json"
    output_format: Literal["png", "jpeg", "webp"] = "png"
    output_compression: int | None = Field(None, ge=0, le=100, description="Quality of jpeg and webp.")
    stream: bool | None = False
    partial_images: int | None = Field(None, ge=0, le=3, description="Previews per image; requires stream.")
    user: str | None = Field(None, max_length=256, description="Accepted, not stored.")
    quality: Literal["auto"] | None = None
    background: Literal["auto", "opaque"] | None = None
    moderation: Literal["auto"] | None = None

    seed: Seed | None = Field(None, description="Default: random.")
    steps: int | None = Field(None, ge=1, le=MAX_STEPS)
    guidance_scale: Scale | None = None
    negative_prompt: Prompt = ""
    control_image: dict[ConditionName, str] = Field({}, description="Base64, data URL, or id of an uploaded file.")
    conditioning_scale: Scale | dict[ConditionName, Scale] = 1.0
    control_guidance_start: Fraction | dict[ConditionName, Fraction] = 0.0
    control_guidance_end: Fraction | dict[ConditionName, Fraction] = 1.0
    upscale: bool = False

    @model_validator(mode="after")
    def check(self) -> Self:
        """Check fields that depend on others."""
        if self.partial_images and not self.stream:
            raise ValueError("partial_images requires stream")
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


class Proposal(Body):
    """`POST /v1/masks/propose`."""

    prompt: Prompt
    seed: Seed | None = Field(None, description="Default: random.")
    candidates: int = Field(4, ge=1, le=16, description="Masks to generate; the best is returned.")


class MaskCheck(Body):
    """`POST /v1/masks/check`."""

    mask: str = Field(description="Base64, data URL, or id of an uploaded file.")
    prompt: Prompt = ""


OPERATIONS: dict[str, tuple[str, ...]] = {
    "grow": ("classes", "by"),
    "shrink": ("classes", "by"),
    "remove": ("classes",),
    "mirror": (),
    "paste": ("classes", "other"),
    "fill": ("classes",),
    "rename": ("old", "to"),
    "swap": ("classes",),
    "interpolate": ("other",),
}
"""Operation of `likeness mask` -> required fields."""

OPTIONS: dict[str, tuple[str, ...]] = {
    "grow": ("over",),
    "mirror": ("classes",),
    "paste": ("over", "align"),
    "interpolate": ("at",),
}
"""Operation -> optional fields."""


class MaskEdit(Body):
    """`POST /v1/masks/edit`."""

    mask: str = Field(description="Base64, data URL, or id of an uploaded file.")
    operation: Literal["grow", "shrink", "remove", "mirror", "paste", "fill", "rename", "swap", "interpolate"]
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
        required = OPERATIONS[self.operation]
        allowed = {"mask", "operation", *required, *OPTIONS.get(self.operation, ())}
        if missing := [name for name in required if not getattr(self, name)]:
            raise ValueError(f"{self.operation} requires {' and '.join(missing)}")
        if unused := sorted(self.model_fields_set - allowed):
            raise ValueError(f"{self.operation} does not use {unused[0]}")
        if self.operation == "swap" and len(self.classes) != 2:
            raise ValueError("swap requires two classes")
        return self
