"""Client for OpenAI-compatible chat completions: vLLM, SGLang, llama.cpp, Ollama, hosted services.

Temporary errors (429, 5xx, time-outs, broken connections and responses) are retried with exponential backoff; any other
4xx ends the run with the server's message. Redirects are not followed and `.netrc` is not read, so the key is sent to
the given address only.
"""

from __future__ import annotations

import base64
import io
import json
import os
import random
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from email.utils import parsedate_to_datetime
from typing import Any
from urllib.parse import urlsplit

import requests
from PIL import Image

from likeness.prepare.caption.models import ANSWER_TOKENS, Answer, Model, Question
from likeness.types import InputError

KEY_VARIABLE = "LIKENESS_API_KEY"
"""Default environment variable of the API key."""

TEMPORARY = (408, 409, 425, 429)
"""Statuses below 500 that are retried."""

ONE_QUESTION = (400, 413, 415, 422)
"""Statuses that may concern one question only, such as an image that a content filter rejects."""

MAX_REJECTED = 20
"""Consecutive rejected questions after which the run ends."""

MAX_WAIT = 600.0
"""Longest Retry-After in seconds; the run ends if a server requests more."""


class BudgetSpent(Exception):
    """The budget is spent, or the run is being stopped."""


class Rejected(Exception):
    """The server rejects this question."""


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
        """Count a request and wait until it may be sent.

        Raises:
            BudgetSpent: the budget is spent.
        """
        with self._lock:
            over_requests = self.most_requests is not None and self.requests >= self.most_requests
            over_tokens = self.most_tokens is not None and self.tokens >= self.most_tokens
            if self.stopped.is_set() or over_requests or over_tokens:
                raise BudgetSpent
            self.requests += 1
            start = max(time.monotonic(), self._next)
            self._next = start + (60 / self.requests_per_minute if self.requests_per_minute else 0)
        self.wait(start - time.monotonic())

    def wait(self, seconds: float) -> None:
        """Sleep.

        Raises:
            BudgetSpent: the run is stopped.
        """
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


def open_endpoint(
    address: str, name: str | None, meter: Meter, *, fields: str = "{}", key_variable: str | None = None
) -> Model:
    """Open the model of an endpoint.

    Args:
        address: URL of the API, such as `http://localhost:8000/v1`; the default path is `/v1`.
        name: name of the model; None takes the only one that is served.
        meter: rate limit and budget.
        fields: JSON of additional fields of each request, such as `{"chat_template_kwargs": {"enable_thinking":
            false}}`; null removes a field.
        key_variable: environment variable of the key; default `KEY_VARIABLE`, which may be unset.

    Raises:
        InputError: the address, the fields or the variable are invalid, or the server does not respond.
    """
    root = root_of(address)
    try:
        extra = json.loads(fields)
    except ValueError as error:
        raise InputError(f"the request fields {fields!r} are not JSON: {error}") from error
    if not isinstance(extra, dict):
        raise InputError(f'the request fields {fields!r} must be a JSON object, such as {{"top_p": 0.9}}')
    if key_variable is not None and not os.environ.get(key_variable):
        raise InputError(  # do not print the value, which may be the key itself
            f"the environment variable with the key of {root} is not set: set it, and give its name, not the key, to "
            "--vlm-key-variable or --refiner-key-variable"
        )
    key = os.environ.get(key_variable or KEY_VARIABLE, "")
    sessions = threading.local()
    rejected = [MAX_REJECTED - 3]  # before the first answer, three rejections end the run

    def session() -> requests.Session:
        if not hasattr(sessions, "value"):
            sessions.value = requests.Session()
            sessions.value.auth = lambda request: authorize(request, key)
        return sessions.value

    served = name or only_model(send(session(), "GET", f"{root}/models", None, meter), root)
    settings = {"max_tokens": ANSWER_TOKENS, "temperature": 0.0} | extra
    settings = {field: value for field, value in settings.items() if value is not None}

    def answer(questions: Sequence[Question]) -> Iterator[Answer]:
        for question in questions:
            body = {"model": served, "messages": [{"role": "user", "content": content_of(question)}], **settings}
            try:
                reply = send(session(), "POST", f"{root}/chat/completions", body, meter)
            except Rejected as error:
                rejected[0] += 1
                if rejected[0] >= MAX_REJECTED:
                    raise InputError(f"{root} rejects all questions: {error}") from error
                raise
            rejected[0] = 0
            yield answer_of(reply)

    return Model(served, json.dumps(settings, sort_keys=True), answer)


def root_of(address: str) -> str:
    """Return the address without a trailing slash and `/chat/completions`."""
    try:
        url = urlsplit(address.strip())
        plain = url.hostname and not url.username and not url.query and not url.fragment and url.port != 0
        if not plain:
            raise ValueError("not a plain address")
    except ValueError as error:
        raise InputError(
            "the address of an endpoint must be plain, such as http://localhost:8000/v1; give the key in the "
            f"environment variable {KEY_VARIABLE}"
        ) from error
    path = url.path.rstrip("/").removesuffix("/chat/completions") or "/v1"
    return f"{url.scheme}://{url.netloc}{path}"


def authorize(request: Any, key: str) -> Any:
    """Add the key to a request. Without this function, requests would read .netrc."""
    if key:
        request.headers["Authorization"] = f"Bearer {key}"
    return request


def only_model(reply: dict[str, Any], root: str) -> str:
    """Return the name of the only model that is served."""
    names = [entry["id"] for entry in reply.get("data") or [] if isinstance(entry, dict) and "id" in entry]
    if len(names) != 1:
        served = ", ".join(sorted(names)[:8]) or "no model"
        raise InputError(f"{root} serves {served}: choose a model with --vlm-name or --refiner-name")
    return names[0]


def content_of(question: Question) -> Any:
    """Return a question as message content, with the image as JPEG in a data URI."""
    if question.image is None:
        return question.text
    return [
        {"type": "image_url", "image_url": {"url": data_uri(question.image)}},
        {"type": "text", "text": question.text},
    ]


def data_uri(image: Image.Image) -> str:
    """Encode an image as data URI."""
    stream = io.BytesIO()
    image.save(stream, "JPEG", quality=95)
    return "data:image/jpeg;base64," + base64.b64encode(stream.getvalue()).decode()


def answer_of(reply: dict[str, Any]) -> Answer:
    """Return the answer of a reply that `read_reply` validated."""
    choice = reply["choices"][0]
    message = choice["message"]
    return Answer(message.get("content") or message.get("refusal") or "", choice.get("finish_reason") != "length")


def send(session: requests.Session, method: str, url: str, body: Any, meter: Meter) -> dict[str, Any]:
    """Send a request, with retries after temporary errors.

    Raises:
        Rejected: the server rejects this question.
        BudgetSpent: the budget is spent.
        InputError: the server does not respond or returns a permanent error.
    """
    began, fault = time.monotonic(), ""
    for tried in range(meter.tries):
        if method == "POST":
            meter.take()
        wait = meter.first_wait * 2**tried * random.uniform(0.75, 1.25)  # jitter between threads
        try:
            response = session.request(
                method, url, json=body, timeout=(min(10.0, meter.timeout), meter.timeout), allow_redirects=False
            )
        except requests.RequestException as error:
            fault = connection_error(error)
        else:
            fault, reply = read_reply(response, method)
            if not fault:
                meter.spend(tokens_of(reply, meter, url) if method == "POST" else 0)
                return reply
            status = response.status_code
            if 300 <= status < 500 and status not in TEMPORARY:
                raise Rejected(fault) if status in ONE_QUESTION else InputError(f"{url} returned an error: {fault}")
            requested = retry_after(response.headers.get("Retry-After"))
            if requested > MAX_WAIT:
                raise InputError(f"{url} requests a wait of {requested:.0f} s ({fault})")
            if requested:
                wait = max(wait, requested)
                meter.delay(wait)
        if tried + 1 < meter.tries:
            meter.wait(min(wait, MAX_WAIT))
    seconds = time.monotonic() - began
    raise InputError(f"{url} does not respond: {fault}, {meter.tries} attempts in {seconds:.0f} s")


def read_reply(response: requests.Response, method: str) -> tuple[str, dict[str, Any]]:
    """Return the error of a response, or "", and its content."""
    try:
        reply = response.json()
    except ValueError:
        reply = None
    if response.status_code != 200:
        return f"{response.status_code} {response.reason}: {message_of(reply, response.text)}".rstrip(": "), {}
    if not isinstance(reply, dict):
        return f"the response is not JSON ({response.text[:60]!r})", {}
    if method == "POST":
        try:
            content = reply["choices"][0]["message"].get("content")
        except (KeyError, IndexError, TypeError, AttributeError):
            return f"the response has no message ({message_of(reply, response.text)})", {}
        if content is not None and not isinstance(content, str):
            return "the message is not text", {}
    return "", reply


def message_of(reply: Any, text: str) -> str:
    """Return the server's error message."""
    while isinstance(reply, dict):
        reply = next((reply[name] for name in ("error", "message", "detail") if reply.get(name)), text)
    return " ".join((reply if isinstance(reply, str) else text).split())[:300]


def connection_error(error: requests.RequestException) -> str:
    """Describe a connection error."""
    if isinstance(error, requests.Timeout):
        return "time-out"
    reason: BaseException = error
    while (deeper := reason.__cause__ or reason.__context__) is not None:
        reason = deeper
    return getattr(reason, "strerror", None) or str(reason) or type(error).__name__


def retry_after(header: str | None) -> float:
    """Parse Retry-After, a number or a date, to seconds; 0 if absent."""
    if not header:
        return 0.0
    try:
        return max(0.0, float(header))
    except ValueError:
        pass
    try:
        return max(0.0, parsedate_to_datetime(header).timestamp() - time.time())
    except ValueError:
        return 0.0


def tokens_of(reply: dict[str, Any], meter: Meter, url: str) -> int:
    """Return the tokens of a question and its answer."""
    usage = reply.get("usage") if isinstance(reply.get("usage"), dict) else {}
    total = usage.get("total_tokens")
    if isinstance(total, int):
        return total
    if meter.most_tokens is not None:
        raise InputError(f"{url} does not report tokens: give the budget in requests")
    return 0
