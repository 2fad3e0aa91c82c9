"""Client for OpenAI-compatible chat completions: vLLM, SGLang, llama.cpp, Ollama, hosted services.

Temporary errors (429, 5xx, time-outs, broken connections and responses) are retried with exponential backoff; any other
4xx ends the run with the server's message. Redirects are not followed and `.netrc` is not read, so the key is sent to
the given address only; it is never printed.
"""

from __future__ import annotations

import base64
import io
import os
import random
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from email.utils import parsedate_to_datetime
from typing import Any, NamedTuple
from urllib.parse import urlsplit

import requests
from PIL import Image

from likeness.types import InputError

KEY_VARIABLE = "LIKENESS_API_KEY"
"""Environment variable of the API key."""

OPENAI_KEY, OPENAI_HOST = "OPENAI_API_KEY", "api.openai.com"
"""Environment variable of OpenAI's key, and the only host that it is sent to by default."""

TEMPORARY = (408, 409, 425, 429)
"""Statuses below 500 that are retried."""

ONE_QUESTION = (400, 413, 415, 422)
"""Statuses that may concern one question only, such as an image that a content filter rejects."""

MAX_WAIT = 600.0
"""Longest Retry-After in seconds; the run ends if a server requests more."""


class BudgetSpent(Exception):
    """The budget is spent, or the run is being stopped."""


class Rejected(InputError):
    """The server rejects this question."""


class Answer(NamedTuple):
    """An answer of a model."""

    text: str
    finished: bool = True
    """Whether it ended, rather than reached the maximum number of tokens."""


@dataclass
class Meter:
    """Rate limit and budget of a run, shared by all threads and endpoints."""

    requests_per_minute: float | None = None
    most_requests: int | None = None
    """Budget of this run, including retries."""
    most_tokens: int | None = None
    """Budget of this run for questions and answers; pending requests may exceed it."""
    tries: int = 6
    first_wait: float = 1.0
    """Seconds before the first retry, doubled for each further one."""
    timeout: float = 120.0
    """Seconds without data after which a request fails."""
    requests: int = 0
    tokens: int = 0
    stopped: threading.Event = field(default_factory=threading.Event)
    _next: float = 0.0
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def take(self) -> None:
        """Count a request and wait until it may be sent. Raises `BudgetSpent`."""
        with self._lock:
            over_requests = self.most_requests is not None and self.requests >= self.most_requests
            over_tokens = self.most_tokens is not None and self.tokens >= self.most_tokens
            if over_requests or over_tokens:
                raise BudgetSpent
            self.requests += 1
            start = max(time.monotonic(), self._next)
            self._next = start + (60 / self.requests_per_minute if self.requests_per_minute else 0)
        self.wait(start - time.monotonic())

    def wait(self, seconds: float) -> None:
        """Sleep. Raises `BudgetSpent` if the run is stopped."""
        if self.stopped.wait(max(0.0, seconds)):
            raise BudgetSpent

    def delay(self, seconds: float) -> None:
        """Delay the requests of all threads."""
        with self._lock:
            self._next = max(self._next, time.monotonic() + seconds)

    def spend(self, tokens: int) -> None:
        """Count tokens."""
        with self._lock:
            self.tokens += tokens


@dataclass(frozen=True, kw_only=True)
class Endpoint:
    """A model behind an address."""

    address: str
    """Without a trailing slash and `/chat/completions`."""
    model: str
    fields: Mapping[str, Any]
    """Fields of each request, in addition to model and messages."""
    key: str = field(repr=False)
    """API key; may be empty."""
    meter: Meter

    def ask(self, content: Any) -> Answer:
        """Send one user message, a text or a list of text and image parts.

        Raises:
            Rejected: the server rejects this question.
            BudgetSpent: the budget is spent.
            InputError: the server does not respond or returns a permanent error.
        """
        body = {"model": self.model, "messages": [{"role": "user", "content": content}], **self.fields}
        reply = send("POST", f"{self.address}/chat/completions", self.key, self.meter, body)
        choice = reply["choices"][0]
        text = choice["message"].get("content") or choice["message"].get("refusal") or ""
        return Answer(text, choice.get("finish_reason") != "length")


def open_endpoint(
    address: str,
    model: str | None = None,
    meter: Meter | None = None,
    *,
    fields: Mapping[str, Any] | None = None,
    key_variable: str | None = None,
) -> Endpoint:
    """Open the model of an endpoint.

    Args:
        address: URL of the API, such as `http://localhost:8000/v1`; the default path is `/v1`.
        model: name of the model; None takes the only one that is served.
        meter: rate limit and budget.
        fields: fields of each request; those that are None are omitted.
        key_variable: environment variable of the key. Default: `KEY_VARIABLE`, or else `OPENAI_KEY` if the host is
            `OPENAI_HOST`; both may be unset.

    Raises:
        InputError: the address or the variable is invalid, or the server does not respond.
    """
    root, meter = plain_address(address), meter or Meter()
    if key_variable is not None and not os.environ.get(key_variable):
        raise InputError(  # do not print the value, which may be the key itself
            f"the environment variable with the key of {root} is not set: set it, and give its name, not the key, to "
            "--vlm-key-variable or --refiner-key-variable"
        )
    defaults = (KEY_VARIABLE, OPENAI_KEY) if urlsplit(root).hostname == OPENAI_HOST else (KEY_VARIABLE,)
    key = read_key(defaults if key_variable is None else (key_variable,))
    if model is None:
        entries = send("GET", f"{root}/models", key, meter).get("data")
        ids = [entry.get("id") for entry in entries if isinstance(entry, dict)] if isinstance(entries, list) else []
        served = sorted(id for id in ids if isinstance(id, str))
        if len(served) != 1:
            listed = ", ".join(served[:8]) or "no model"
            raise InputError(f"{root} serves {listed}: choose a model with --vlm-name or --refiner-name")
        model = served[0]
    given = {name: value for name, value in (fields or {}).items() if value is not None}
    return Endpoint(address=root, model=model, fields=given, key=key, meter=meter)


def read_key(variables: Sequence[str]) -> str:
    """Return the key in the first of these environment variables that is set, without white space around it; or "".
    Raises `InputError`, without the key, if it contains characters that are not allowed in a header.
    """
    name = next((name for name in variables if os.environ.get(name)), "")
    key = os.environ.get(name, "").strip()
    if not all("!" <= character <= "~" for character in key):
        raise InputError(
            f"the key in the environment variable {name} contains a space, a line end or a non-ASCII character"
        )
    return key


def plain_address(address: str) -> str:
    """Return the address without a trailing slash and `/chat/completions`. Raises `InputError`, without the address,
    if it contains more than host, port and path.
    """
    try:
        url = urlsplit(address.strip())
        plain = url.scheme in ("http", "https") and "@" not in url.netloc and not (url.query or url.fragment)
        if not plain or not url.hostname or url.port == 0:
            raise ValueError("not a plain address")
    except ValueError as error:
        raise InputError(
            "the address of an endpoint must be plain, such as http://localhost:8000/v1; give the key in the "
            f"environment variable {KEY_VARIABLE}"
        ) from error
    path = url.path.rstrip("/").removesuffix("/chat/completions") or "/v1"
    return f"{url.scheme}://{url.netloc}{path}"


def image_part(image: Image.Image, format: str = "JPEG") -> dict[str, Any]:
    """Return an image as part of a message, in a data URI."""
    stream = io.BytesIO()
    image.save(stream, format, quality=95)
    data = base64.b64encode(stream.getvalue()).decode()
    return {"type": "image_url", "image_url": {"url": f"data:image/{format.lower()};base64,{data}"}}


def send(method: str, url: str, key: str, meter: Meter, body: Any = None) -> dict[str, Any]:
    """Send a request, with retries after temporary errors; a POST is metered. Raises as `Endpoint.ask`."""

    def authorize(request: Any) -> Any:  # without this function, requests would read .netrc
        if key:
            request.headers["Authorization"] = f"Bearer {key}"
        return request

    started, fault = time.monotonic(), ""
    timeout = (min(10.0, meter.timeout), meter.timeout)
    for tried in range(meter.tries):
        if method == "POST":
            meter.take()
        wait = meter.first_wait * 2**tried * random.uniform(0.75, 1.25)  # jitter between threads
        try:
            response = requests.request(method, url, json=body, timeout=timeout, allow_redirects=False, auth=authorize)
        except requests.RequestException as error:
            fault = "time-out" if isinstance(error, requests.Timeout) else root_cause(error)
        else:
            fault, reply = read_reply(response, method)
            fault = fault.replace(key, "[key]") if key else fault  # some servers repeat it
            if not fault:
                meter.spend(tokens_of(reply, meter, url) if method == "POST" else 0)
                return reply
            status = response.status_code
            if 300 <= status < 500 and status not in TEMPORARY:
                raise Rejected(fault) if status in ONE_QUESTION else InputError(f"{url} returned an error: {fault}")
            requested = retry_after(response.headers.get("Retry-After", ""))
            if requested > MAX_WAIT:
                raise InputError(f"{url} requests a wait of {requested:.0f} s ({fault})")
            if requested:
                wait = max(wait, requested)
                meter.delay(wait)
        if tried + 1 < meter.tries:
            meter.wait(min(wait, MAX_WAIT))
    seconds = time.monotonic() - started
    raise InputError(f"{url} does not respond: {fault}, {meter.tries} attempts in {seconds:.0f} s")


def read_reply(response: requests.Response, method: str) -> tuple[str, dict[str, Any]]:
    """Return the error of a response, or "", and its content."""
    try:
        reply = response.json()
    except (ValueError, RecursionError):
        reply = None
    message = reply  # the server's error message
    while isinstance(message, dict):
        message = next((message[name] for name in ("error", "message", "detail") if message.get(name)), response.text)
    message = " ".join((message if isinstance(message, str) else response.text).split())[:300]
    if response.status_code != 200:
        return f"{response.status_code} {response.reason}: {message}".rstrip(": "), {}
    if not isinstance(reply, dict):
        return f"the response is not JSON ({response.text[:60]!r})", {}
    if method == "POST":
        try:
            content = reply["choices"][0]["message"].get("content")
        except (KeyError, IndexError, TypeError, AttributeError):
            return f"the response has no message ({message})", {}
        if content is not None and not isinstance(content, str):
            return "the message is not text", {}
    return "", reply


def root_cause(error: BaseException) -> str:
    """Describe the first error of a chain."""
    while (cause := error.__cause__ or error.__context__) is not None:
        error = cause
    return getattr(error, "strerror", None) or str(error) or type(error).__name__


def retry_after(header: str) -> float:
    """Parse Retry-After, a number or a date, to seconds; 0 if it is neither."""
    for parse in (float, lambda text: parsedate_to_datetime(text).timestamp() - time.time()):
        try:
            return max(0.0, parse(header))
        except (ValueError, OverflowError):
            continue
    return 0.0


def tokens_of(reply: dict[str, Any], meter: Meter, url: str) -> int:
    """Return the tokens of a question and its answer; 0 if the server does not report them. Raises `InputError` if they
    are needed for the budget.
    """
    usage = reply.get("usage")
    total = usage.get("total_tokens") if isinstance(usage, dict) else None
    if not isinstance(total, int) and meter.most_tokens is not None:
        raise InputError(f"{url} does not report tokens: give the budget in requests")
    return total if isinstance(total, int) else 0
