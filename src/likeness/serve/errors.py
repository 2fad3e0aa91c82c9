"""Errors in OpenAI's shape."""

from __future__ import annotations

import re
import reprlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse

from likeness.types import InputError

TYPES = {401: "authentication_error", 429: "rate_limit_error"}
"""Status -> type; others are `invalid_request_error`, or `server_error` from 500."""

FINAL = {"x-should-retry": "false"}
"""Headers of errors that OpenAI's clients would otherwise answer by sending the request again."""

RESPONSES: dict[int | str, dict[str, Any]] = {
    "default": {
        "description": "An error",
        "content": {
            "application/json": {
                "schema": {
                    "type": "object",
                    "properties": {
                        "error": {
                            "type": "object",
                            "properties": {
                                "message": {"type": "string"},
                                "type": {"type": "string"},
                                "param": {"type": ["string", "null"]},
                                "code": {"type": ["string", "null"]},
                            },
                        }
                    },
                }
            }
        },
    }
}
"""Error responses in OpenAPI."""

UNREADABLE = "There was an error parsing the body"
"""FastAPI's message on JSON that is no UTF-8, or too deep."""

NUMBER = "constrained-float"
"""pydantic's name of the first member of a union of a number and numbers by name."""

LONGEST = 400
"""Characters of a message."""


class ApiError(HTTPException):
    """An error response.

    Args:
        status: HTTP status.
        message: one sentence; what it repeats of the request may be long and is cut.
        param: the field that is the reason.
        code: short constant for programs.
        headers: of the response.
    """

    def __init__(
        self, status: int, message: str, *, param: str | None = None, code: str | None = None, headers: Any = None
    ) -> None:
        if len(message) > LONGEST:
            message = f"{message[: LONGEST - 1]}…"
        super().__init__(status, message, headers)
        kind = TYPES.get(status, "server_error" if status >= 500 else "invalid_request_error")
        self.error = {"message": message, "type": kind, "param": param, "code": code}


def invalid(error: InputError | str, param: str | None = None) -> ApiError:
    """Return the response to invalid input."""
    return ApiError(400, str(error), param=param, code=getattr(error, "kind", "") or "invalid_value")


@contextmanager
def invalid_input(param: str | None = None) -> Iterator[None]:
    """Raise `ApiError` for each `InputError` of a `with` block."""
    try:
        yield
    except InputError as error:
        raise invalid(error, param) from error


def respond(error: ApiError) -> JSONResponse:
    """Return the response of an error."""
    return JSONResponse({"error": error.error}, error.status_code, error.headers)


def of_validation(error: RequestValidationError) -> ApiError:
    """Return the first error of a body that breaks the schema."""
    errors: Sequence[Mapping[str, Any]] = error.errors()
    found = next(each for each in errors if each["loc"][-1] != NUMBER or not isinstance(each["input"], dict))
    names = [str(part) for part in found["loc"][1:] if part not in (NUMBER, "[key]") and "dict[" not in str(part)]
    param = ".".join(names) or None
    match found["type"]:
        case "json_invalid":
            message, param = f"The body is not valid JSON: {found['ctx']['error']}", None
        case "extra_forbidden":
            message = f"Unknown field {param!r}: leave it out, or check its name"
        case "missing":
            message = f"{param or 'The body'} is required"
        case "model_attributes_type":
            message = "The body is not a JSON object: send one, with Content-Type: application/json"
        case "value_error":
            message = str(found["msg"]).removeprefix("Value error, ")
        case _:
            text = re.sub("^(Input|String) should", "it must", found["msg"])
            message = f"{param} is {reprlib.repr(found['input'])}: {text}"
    return ApiError(400, message, param=param, code=found["type"])


async def handle(request: Request, error: Exception) -> JSONResponse:
    """Handle the exceptions of routes that have a status."""
    if isinstance(error, RequestValidationError):
        return respond(of_validation(error))
    if isinstance(error, InputError):
        return respond(invalid(error))
    if isinstance(error, ApiError):
        return respond(error)
    assert isinstance(error, HTTPException)  # of the framework: unknown path or method, malformed form
    message = "The body is not JSON in UTF-8" if error.detail == UNREADABLE else error.detail
    return respond(ApiError(error.status_code, message, headers=error.headers))
