"""Multipart forms: reading them, and their description in OpenAPI."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fastapi import Request
from starlette.datastructures import UploadFile

from likeness.serve.errors import ApiError


def form_body(files: tuple[str, ...], fields: Mapping[str, Any]) -> dict[str, Any]:
    """Describe a form that `read_form` reads, for OpenAPI. `fields`: JSON schema of the text fields."""
    properties = {**{name: {"type": "string", "format": "binary"} for name in files}, **fields["properties"]}
    schema = {**fields, "properties": properties, "required": [files[0], *fields.get("required", [])]}
    return {"requestBody": {"required": True, "content": {"multipart/form-data": {"schema": schema}}}}


def text_fields(*names: str) -> dict[str, Any]:
    """Return the JSON schema of optional text fields."""
    return {"type": "object", "additionalProperties": False, "properties": {name: {"type": "string"} for name in names}}


async def read_form(
    request: Request, *, files: tuple[str, ...], fields: tuple[str, ...], size: int = 1024
) -> dict[str, Any]:
    """Read a multipart form: files, of which the first is required, and optional text fields of at most `size` bytes.

    Raises:
        ApiError: it is malformed, or has other fields.
    """
    if not request.headers.get("content-type", "").startswith("multipart/form-data"):
        message = f"The body must be multipart/form-data with the file {files[0]}"
        raise ApiError(400, message, param=files[0], code="no_form")
    found: dict[str, Any] = {}
    async with request.form(max_files=len(files), max_fields=len(fields), max_part_size=size) as form:
        for name, value in form.multi_items():
            name = name.removesuffix("[]")  # clients send a list of one image so
            if name not in (*files, *fields):
                message = f"Unknown field {name[:80]!r}. Available: {', '.join((*files, *fields))}"
                raise ApiError(400, message, param=name[:80], code="extra_forbidden")
            if isinstance(value, UploadFile) != (name in files) or name in found:
                kind = "a file" if name in files else "text"
                raise ApiError(400, f"{name} must be given once, as {kind}", param=name)
            found[name] = await value.read() if isinstance(value, UploadFile) else value
    if files[0] not in found:
        raise ApiError(400, f"{files[0]} is required", param=files[0], code="missing")
    return found
