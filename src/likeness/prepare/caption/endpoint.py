"""A model behind an address that speaks OpenAI's chat completions: vLLM, SGLang, llama.cpp, Ollama, hosted services.

Whatever may pass (429, 5xx, time-outs, broken connections and answers) is tried again, each time after twice the wait;
whatever will not (any other 4xx) ends the run with the server's own words. Redirects are not followed and `.netrc` is
not read: the key goes to the address it was meant for.
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
"""Environment variable of the key; servers of one's own need none."""

PASSING = (408, 409, 425, 429)
"""Statuses below 500 that may pass."""

ONE_QUESTION = (400, 413, 415, 422)
"""Statuses that may be about one question alone, such as a picture that a service will not look at."""

REFUSED_IN_A_ROW = 20
"""Questions refused one after the other from which the server refuses all."""

LONGEST_WAIT = 600.0
"""Seconds; where a server asks for more, the run ends instead."""


class Spent(Exception):
    """The budget allows no further request, or the run is being stopped."""


class Refused(Exception):
    """The server will not answer this one question."""


@dataclass
class Meter:
    """Requests and tokens of a run, over all its threads and endpoints, and the pace they are kept at."""

    requests_per_minute: float | None = None
    most_requests: int | None = None
    """Budget of this run; repeated ones count."""
    most_tokens: int | None = None
    """Budget of this run, questions and answers together; overrun at most by the requests under way."""
    tries: int = 6
    first_wait: float = 1.0
    """Seconds before the second try; doubled with each."""
    timeout: float = 120.0
    """Seconds without a byte after which a request counts as failed."""
    requests: int = 0
    tokens: int = 0
    stopped: threading.Event = field(default_factory=threading.Event)
    _next: float = 0.0
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def take(self) -> None:
        """Wait for the turn of a request and count it.

        Raises:
            Spent: there is none left.
        """
        with self._lock:
            over_requests = self.most_requests is not None and self.requests >= self.most_requests
            over_tokens = self.most_tokens is not None and self.tokens >= self.most_tokens
            if self.stopped.is_set() or over_requests or over_tokens:
                raise Spent
            self.requests += 1
            start = max(time.monotonic(), self._next)
            self._next = start + (60 / self.requests_per_minute if self.requests_per_minute else 0)
        self.wait(start - time.monotonic())

    def wait(self, seconds: float) -> None:
        """Sleep, unless the run is stopped.

        Raises:
            Spent: it is.
        """
        if self.stopped.wait(max(0.0, seconds)):
            raise Spent

    def hold(self, seconds: float) -> None:
        """Let no request of any thread begin for a while."""
        with self._lock:
            self._next = max(self._next, time.monotonic() + seconds)

    def spend(self, tokens: int) -> None:
        """Count the tokens of an answer."""
        with self._lock:
            self.tokens += tokens


def open_endpoint(
    address: str, name: str | None, meter: Meter, *, fields: str = "{}", key_variable: str | None = None
) -> Model:
    """The model behind an address.

    Args:
        address: of the API, such as `http://localhost:8000/v1`; without a path, `/v1` is meant.
        name: of the model there; None takes the only one that is served.
        meter: pace and budget, which two endpoints of a run share.
        fields: JSON of further fields of each request, such as `{"chat_template_kwargs": {"enable_thinking": false}}`;
            null takes a field out.
        key_variable: environment variable of the key; None reads `KEY_VARIABLE`, where it is set.

    Raises:
        InputError: the address, the fields or the variable are wrong, or the server does not answer.
    """
    root = root_of(address)
    try:
        extra = json.loads(fields)
    except ValueError as error:
        raise InputError(f"the further fields {fields!r} are not JSON: {error}") from error
    if not isinstance(extra, dict):
        raise InputError(f'the further fields {fields!r} must be a JSON object, such as {{"top_p": 0.9}}')
    if key_variable is not None and not os.environ.get(key_variable):
        raise InputError(  # without what was given, which may be the key itself
            f"no environment variable of the given name holds the key of {root}: set one, and give its name, not the "
            "key, to --vlm-key-variable or --refiner-key-variable"
        )
    key = os.environ.get(key_variable or KEY_VARIABLE, "")
    channels = threading.local()
    refused = [REFUSED_IN_A_ROW - 3]  # before the first success, three refusals are about all questions

    def channel() -> requests.Session:
        if not hasattr(channels, "session"):
            channels.session = requests.Session()
            channels.session.auth = lambda request: authorise(request, key)
        return channels.session

    served = name or only_model(send(channel(), "GET", f"{root}/models", None, meter), root)
    settings = {"max_tokens": ANSWER_TOKENS, "temperature": 0.0} | extra
    settings = {field: value for field, value in settings.items() if value is not None}

    def answer(questions: Sequence[Question]) -> Iterator[Answer]:
        for question in questions:
            body = {"model": served, "messages": [{"role": "user", "content": content_of(question)}], **settings}
            try:
                reply = send(channel(), "POST", f"{root}/chat/completions", body, meter)
            except Refused as error:
                refused[0] += 1
                if refused[0] >= REFUSED_IN_A_ROW:
                    raise InputError(f"{root} refuses: {error}") from error
                raise
            refused[0] = 0
            yield answer_of(reply)

    return Model(served, json.dumps(settings, sort_keys=True), answer)


def root_of(address: str) -> str:
    """The address without a trailing slash, `/chat/completions`, or anything that does not belong."""
    try:
        url = urlsplit(address.strip())
        plain = url.hostname and not url.username and not url.query and not url.fragment and url.port != 0
        if not plain:
            raise ValueError("more than an address")
    except ValueError as error:
        raise InputError(
            "the address of an endpoint must be plain: give one such as http://localhost:8000/v1, and a key by the "
            f"environment variable {KEY_VARIABLE}"
        ) from error
    path = url.path.rstrip("/").removesuffix("/chat/completions") or "/v1"
    return f"{url.scheme}://{url.netloc}{path}"


def authorise(request: Any, key: str) -> Any:
    """Put the key into a request; a function of ours, because requests would look into .netrc otherwise."""
    if key:
        request.headers["Authorization"] = f"Bearer {key}"
    return request


def only_model(reply: dict[str, Any], root: str) -> str:
    """The name of the one model that is served."""
    names = [entry["id"] for entry in reply.get("data") or [] if isinstance(entry, dict) and "id" in entry]
    if len(names) != 1:
        served = ", ".join(sorted(names)[:8]) or "no model"
        raise InputError(f"{root} serves {served}: name one of its models by --vlm-name or --refiner-name")
    return names[0]


def content_of(question: Question) -> Any:
    """A question as the protocol has it; pictures as JPEG in a data URI."""
    if question.picture is None:
        return question.text
    return [
        {"type": "image_url", "image_url": {"url": data_uri(question.picture)}},
        {"type": "text", "text": question.text},
    ]


def data_uri(picture: Image.Image) -> str:
    """A picture as text."""
    stream = io.BytesIO()
    picture.save(stream, "JPEG", quality=95)
    return "data:image/jpeg;base64," + base64.b64encode(stream.getvalue()).decode()


def answer_of(reply: dict[str, Any]) -> Answer:
    """The answer in a reply that `fault_of` found whole."""
    choice = reply["choices"][0]
    message = choice["message"]
    return Answer(message.get("content") or message.get("refusal") or "", choice.get("finish_reason") != "length")


def send(session: requests.Session, method: str, url: str, body: Any, meter: Meter) -> dict[str, Any]:
    """One request, tried again while its fault may pass.

    Raises:
        Refused: the server will not answer this question.
        Spent: the budget allows no further try.
        InputError: the server does not answer, or refuses for good.
    """
    began, fault = time.monotonic(), ""
    for tried in range(meter.tries):
        if method == "POST":
            meter.take()
        wait = meter.first_wait * 2**tried * random.uniform(0.75, 1.25)  # threads that failed together come back apart
        try:
            response = session.request(
                method, url, json=body, timeout=(min(10.0, meter.timeout), meter.timeout), allow_redirects=False
            )
        except requests.RequestException as error:
            fault = words_of(error)
        else:
            fault, reply = read_reply(response, method)
            if not fault:
                meter.spend(tokens_of(reply, meter, url) if method == "POST" else 0)
                return reply
            status = response.status_code
            if 300 <= status < 500 and status not in PASSING:
                raise Refused(fault) if status in ONE_QUESTION else InputError(f"{url} refuses: {fault}")
            asked = retry_after(response.headers.get("Retry-After"))
            if asked > LONGEST_WAIT:
                raise InputError(f"{url} asks to come back in {asked:.0f} s ({fault})")
            if asked:
                wait = max(wait, asked)
                meter.hold(wait)
        if tried + 1 < meter.tries:
            meter.wait(min(wait, LONGEST_WAIT))
    seconds = time.monotonic() - began
    raise InputError(f"{url} gives no answer: {fault}, {meter.tries} times in {seconds:.0f} s")


def read_reply(response: requests.Response, method: str) -> tuple[str, dict[str, Any]]:
    """What is wrong with a response, or "", and what it holds."""
    try:
        reply = response.json()
    except ValueError:
        reply = None
    if response.status_code != 200:
        return f"{response.status_code} {response.reason}: {message_of(reply, response.text)}".rstrip(": "), {}
    if not isinstance(reply, dict):
        return f"an answer that is no JSON ({response.text[:60]!r})", {}
    if method == "POST":
        try:
            content = reply["choices"][0]["message"].get("content")
        except (KeyError, IndexError, TypeError, AttributeError):
            return f"an answer without a message ({message_of(reply, response.text)})", {}
        if content is not None and not isinstance(content, str):
            return "an answer whose message is no text", {}
    return "", reply


def message_of(reply: Any, text: str) -> str:
    """The server's own words about a fault."""
    while isinstance(reply, dict):
        reply = next((reply[name] for name in ("error", "message", "detail") if reply.get(name)), text)
    return " ".join((reply if isinstance(reply, str) else text).split())[:300]


def words_of(error: requests.RequestException) -> str:
    """A failure of the connection in a few words."""
    if isinstance(error, requests.Timeout):
        return "no answer in time"
    reason: BaseException = error
    while (deeper := reason.__cause__ or reason.__context__) is not None:
        reason = deeper
    return getattr(reason, "strerror", None) or str(reason) or type(error).__name__


def retry_after(header: str | None) -> float:
    """Seconds that a server asks to wait, given as a number or as a date; 0 where it asks for nothing."""
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
    """Tokens that a question and its answer took."""
    usage = reply.get("usage") if isinstance(reply.get("usage"), dict) else {}
    total = usage.get("total_tokens")
    if isinstance(total, int):
        return total
    if meter.most_tokens is not None:
        raise InputError(f"{url} does not say how many tokens it took: give the budget in requests")
    return 0
