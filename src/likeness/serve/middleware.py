"""What surrounds every request of the service: its id, API key, limits, metrics and access log."""

from __future__ import annotations

import asyncio
import hashlib
import logging
import secrets
import time
from collections.abc import Mapping
from ipaddress import IPv4Address, IPv6Address, ip_address
from typing import Any
from urllib.parse import quote, urlsplit

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from likeness.serve.engine import BATCHES
from likeness.serve.errors import ApiError, respond
from likeness.serve.service import Service
from likeness.serve.store import IDENTIFIER

OPEN = ("/healthz", "/readyz")
"""Paths that need no API key."""

READING = ("GET", "HEAD", "OPTIONS")
"""Methods that a link on any web page may use."""

log = logging.getLogger(__name__)
access = logging.getLogger("likeness.access")


class Metrics:
    """The figures of `/metrics`."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        own: dict[str, Any] = {"registry": self.registry}
        self.queue = Gauge("likeness_queue_length", "Waiting images", **own)
        self.running = Gauge("likeness_running_images", "Images in progress", **own)
        self.batch = Histogram("likeness_batch_size", "Images per step of the engine", buckets=BATCHES, **own)
        self.step = Histogram("likeness_step_seconds", "Time of a step of the engine", **own)
        self.images = Counter("likeness_images", "Images by result", ["result"], **own)
        self.requests = Counter("likeness_requests", "Requests by path and status", ["path", "status"], **own)
        self.latency = Histogram("likeness_request_seconds", "Time of a request by path", ["path"], **own)


class Frame:
    """What surrounds every request: its id, the API key, the size limit, the access log."""

    def __init__(self, app: ASGIApp, service: Service, metrics: Metrics) -> None:
        self.app, self.service, self.metrics = app, service, metrics
        self.keys = [hashlib.sha256(key.encode()).digest() for key in service.settings.keys]
        self.open = not self.keys and "*" not in service.settings.cors

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        headers = {name: value.decode("latin-1") for name, value in scope["headers"]}
        id = headers.get(b"x-request-id", "")
        own = f"req-{secrets.token_hex(16)}"
        scope.setdefault("state", {}).update(id=id or own, owner="")
        status, received, start = None, 0, time.perf_counter()

        async def limited() -> Message:
            nonlocal received
            message = await receive()
            received += len(message.get("body", b""))
            if received > self.service.settings.max_bytes:
                raise self.too_large()
            return message

        async def labeled(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message["headers"] = [*message["headers"], (b"x-request-id", scope["state"]["id"].encode())]
            await send(message)

        try:
            if id and not IDENTIFIER.fullmatch(id):
                scope["state"]["id"] = own
                message = "x-request-id must be 1 to 64 letters, digits, - and _, and begin with a letter or digit"
                raise ApiError(400, message, param="x-request-id")
            host, origins = headers.get(b"host", ""), self.service.settings.cors
            allowed = [origin.partition("://")[2] for origin in origins]
            if self.open and host not in allowed and self.may_be_rebound(host, headers):
                message = f"The host {host[:80]!r} is not this machine: set API keys, or allow its origin with --cors"
                raise ApiError(403, message, param="host", code="unknown_host")
            page = scope["path"] in ("/", "/studio") or scope["path"].startswith("/studio/")
            if self.keys and not (page and self.service.settings.studio) and scope["path"] not in OPEN:
                scope["state"]["owner"] = self.owner(headers.get(b"authorization", ""))
            if (
                scope["method"] not in READING
                and is_foreign(headers)
                and not ({headers.get(b"origin"), "*"} & set(origins))
            ):
                message = "Web pages of other origins may not send requests: allow them with the option --cors"
                raise ApiError(403, message, code="cross_site")
            length = headers.get(b"content-length", "0")
            if not length.isdecimal() or int(length) > self.service.settings.max_bytes:
                raise self.too_large()
            await self.app(scope, limited, labeled)
        except ApiError as error:  # of this method: the application handles its own
            await respond(error)(scope, receive, labeled)
        except asyncio.CancelledError:  # uvicorn ends requests some seconds after `--shutdown-timeout`
            if status is not None:
                raise
            message = "The service is shutting down: send the request again"
            await respond(ApiError(503, message, code="interrupted"))(scope, receive, labeled)
        except Exception:
            log.exception("The request %s failed", scope["state"]["id"])
            if status is None:
                message = "The service failed: its log has the reason"
                await respond(ApiError(500, message, code="internal_error"))(scope, receive, labeled)
        finally:
            seconds = time.perf_counter() - start
            path = getattr(scope.get("route"), "path", "other")  # as declared: an id is no label
            self.metrics.requests.labels(path, status or 499).inc()
            self.metrics.latency.labels(path).observe(seconds)
            line = scope["state"]["id"], scope["method"], quote(scope["path"]), status, 1e3 * seconds
            access.info("%s %s %s %s %.0f ms", *line)

    def may_be_rebound(self, host: str, headers: Mapping[bytes, str]) -> bool:
        """Return whether a request may come from a page whose host name was led to this machine (DNS rebinding). Such
        a page has a name, and browsers send `Origin` with everything that it posts.
        """
        address = address_of(host)
        if self.service.settings.local:
            return address is None or not address.is_loopback
        return address is None and b"origin" in headers

    def owner(self, authorization: str) -> str:
        """Return the name of an API key. Every key is compared, in constant time."""
        given = hashlib.sha256(authorization.removeprefix("Bearer ").encode()).digest()
        found = [secrets.compare_digest(given, key) for key in self.keys]
        if not any(found):
            message = "The API key is missing or unknown: send Authorization: Bearer KEY"
            raise ApiError(401, message, code="invalid_api_key", headers={"WWW-Authenticate": "Bearer"})
        return given.hex()[:32]

    def too_large(self) -> ApiError:
        """Return the response to a body that is too large."""
        limit = self.service.settings.max_bytes
        return ApiError(413, f"The body is too large: at most {limit / 2**20:.0f} MiB", code="too_large")


def is_foreign(headers: Mapping[bytes, str]) -> bool:
    """Whether a web page of another origin sent a request. To servers on this machine or with TLS browsers say so
    themselves, except that another port is the same site; to others they send the page's origin.
    """
    site, origin = headers.get(b"sec-fetch-site"), headers.get(b"origin")
    if site in ("cross-site", "same-origin", "none"):
        return site == "cross-site"
    return origin is not None and origin.partition("://")[2] != headers.get(b"host")


def address_of(host: str) -> IPv4Address | IPv6Address | None:
    """Return the IP address in a `Host` header, for localhost that of this machine; None for other names."""
    try:
        name = urlsplit(f"//{host}").hostname or ""
        return ip_address("127.0.0.1" if name == "localhost" else name)
    except ValueError:
        return None
