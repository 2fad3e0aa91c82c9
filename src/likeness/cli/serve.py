"""The command that serves a model over HTTP. Its fields are its options."""

from __future__ import annotations

import logging
import re
import socket
import sys
import threading
import webbrowser
from contextlib import nullcontext
from dataclasses import dataclass
from ipaddress import ip_address
from pathlib import Path
from typing import Any, Literal

import tyro

from likeness.cli.output import exit_on_sigterm
from likeness.types import DtypeName, InputError
from likeness.weights.catalog import DEFAULT, MASK_MODEL, find_model

LARGEST = 10**9
"""Bound of all numeric options."""

ORIGIN = re.compile(r"\*|[a-z][a-z0-9+.-]*://[^/?#@\sA-Z]+")
"""Form of the values of --cors."""


@dataclass(frozen=True, kw_only=True)
class Serve:
    """Serve a model over HTTP with the OpenAI images API (docs/serve.md)."""

    model: str = DEFAULT
    """Bundled model, folder of a model or an adapter, or hub id."""
    base: str | None = None
    """Base model of an adapter. Default: the one that the adapter names."""
    name: str | None = None
    """Name of the model in the API. Default: MODEL."""
    host: str = "127.0.0.1"
    """Address to listen on; 0.0.0.0 accepts connections from other machines."""
    port: int = 8000
    """Port to listen on; 0 chooses a free one."""
    data: Path = Path("likeness-data")
    """Folder for jobs, images and uploads; created if missing."""
    database: str | None = None
    """SQLAlchemy URL of a database that replicas share, such as postgresql+psycopg://HOST/NAME. Default: SQLite in
    DATA."""
    replica: str | None = None
    """Name of this replica with DATABASE. Default: host name and port."""
    api_key_file: Path | None = None
    """File with one API key per line. Default: no key is required."""
    queue: int = 64
    """Largest number of waiting images; further requests get status 429."""
    keep: float = 3600
    """Seconds for which finished jobs and uploads are kept."""
    max_steps: int = 100
    """Largest number of steps of a request."""
    max_side: int = 2048
    """Largest side of an image in pixels."""
    max_body: int = 32
    """Largest body of a request in MiB."""
    shutdown_timeout: float = 30
    """Seconds for which a shutdown waits for accepted images."""
    cors: tuple[str, ...] = ()
    """Origins of web pages that may send requests, for example https://example.org. Default: none."""
    metadata: bool = True
    """Write the recipe and the label for generated media into images."""
    log_prompts: bool = False
    """Write prompts to the access log."""
    deterministic: bool = False
    """On an accelerator, generate each image individually, so that it does not depend on other requests."""
    mask_model: str = MASK_MODEL
    """Model that generates masks."""
    landmarker: Path | None = None
    """MediaPipe's face_landmarker.task, for alignment and keypoints."""
    device: str = "auto"
    """Device, for example cuda or cpu; auto takes an accelerator if present."""
    dtype: DtypeName = "auto"
    """Dtype; auto is fp32 on a CPU, bf16 or fp16 on an accelerator."""
    quantize: Literal["int8"] | None = None
    """Store the matrices of FLUX.1's transformer in 8 bits."""
    studio: bool = False
    """Also serve the page on which masks are painted, at /studio/ (docs/studio.md)."""

    def __call__(self) -> None:
        self.check()
        listener = listen(self.host, self.port)
        port = listener.getsockname()[1]
        from likeness.files import locked

        logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s %(message)s")
        with locked(self.data) if self.database is None else nullcontext():
            replica = self.replica or f"{socket.gethostname()}:{port}"
            app = self.application(replica, local=ip_address(listener.getsockname()[0]).is_loopback)
            from uvicorn import Config

            from likeness.serve.server import Server

            config = Config(
                app,
                log_config=None,
                access_log=False,
                timeout_graceful_shutdown=int(self.shutdown_timeout) + 5,
                server_header=False,
            )
            self.started(port)
            print(f"Serving {self.name or self.model} at http://{in_url(self.host)}:{port}", flush=True)
            sys.setswitchinterval(0.0005)  # the engine waits less for threads that run Python
            with exit_on_sigterm():  # the server raises the signal again after its shutdown
                Server(config).run(sockets=[listener])

    def started(self, port: int) -> None:
        """Called before the service runs."""

    def check(self) -> None:
        """Check the numbers and origins. Raises `InputError`."""
        least = {"queue": 10, "keep": 1, "max_steps": 1, "max_side": 8, "max_body": 1, "shutdown_timeout": 0}
        for name, value in least.items():
            if not value <= getattr(self, name) < LARGEST:  # also NaN
                option = f"--{name.replace('_', '-')}"
                raise InputError(f"{option} is {getattr(self, name)}; it must be at least {value} and below {LARGEST}")
        for origin in self.cors:
            if not ORIGIN.fullmatch(origin):
                text = "it must be *, or an origin as browsers send it: scheme://host or scheme://host:port"
                raise InputError(f"--cors is {origin!r}; {text}, in lower case")

    def application(self, replica: str, *, local: bool = False) -> Any:
        """Load the model and return the ASGI application.

        Args:
            replica: name of this replica in a shared database.
            local: whether the service listens on a loopback address.

        Raises:
            InputError: the model, the mask model, the data folder, the database or the keys cannot be read, the model's
                defaults exceed a limit, or a package is missing.
        """
        keys = read_keys(self.api_key_file)
        try:
            from likeness.serve.app import create_app
            from likeness.serve.service import Service, Settings
            from likeness.serve.store import Store
        except ImportError as error:
            raise InputError(f"The service requires {error.name}: pip install 'likeness[serve]'") from error
        from likeness.cli.portraits import adapt_threads, load_pipeline

        settings = Settings(
            model=self.name or self.model,
            max_bytes=self.max_body * 2**20,
            keys=keys,
            shutdown=self.shutdown_timeout,
            **{
                name: getattr(self, name)
                for name in (
                    *("max_steps", "max_side", "queue", "keep", "cors", "metadata", "log_prompts"),
                    *("deterministic", "mask_model", "landmarker"),
                )
            },
            studio=self.studio,
            local=local,
        )
        find_model(self.mask_model)
        store = Store(self.data, self.database, replica if self.database else "")
        pipeline = load_pipeline(self.model, self.dtype, self.device, self.base, self.quantize)
        adapt_threads(pipeline)
        for option, limit, name in (("--max-steps", self.max_steps, "steps"), ("--max-side", self.max_side, "size")):
            if (default := pipeline.config.defaults[name]) > limit:
                raise InputError(f"{option} is {limit}, below the default of {self.model}, {default}: raise it")
        return create_app(Service(pipeline, store, settings))


@dataclass(frozen=True, kw_only=True)
class Studio(Serve):
    """Paint a mask or a sketch in the browser and see the face change (docs/studio.md)."""

    studio: tyro.conf.Suppress[bool] = True
    browser: bool = True
    """Open the page in the default browser."""

    def started(self, port: int) -> None:
        host = "localhost" if self.host in ("0.0.0.0", "::") else in_url(self.host)
        address = f"http://{host}:{port}/studio/"
        print(f"The studio is at {address}", flush=True)
        if self.browser:
            threading.Timer(1, webbrowser.open, [address]).start()


def in_url(host: str) -> str:
    """Return a host as URLs contain it: IPv6 addresses have brackets."""
    return f"[{host}]" if ":" in host else host


def read_keys(file: Path | None) -> tuple[str, ...]:
    """Return the API keys in a file, one per line."""
    if file is None:
        return ()
    try:
        keys = tuple(line.strip() for line in file.read_text(encoding="utf-8-sig").splitlines() if line.strip())
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"The API keys in {file} cannot be read: {error}") from error
    if not keys:
        raise InputError(f"{file} contains no API key: write one per line")
    return keys


def listen(host: str, port: int) -> socket.socket:
    """Return a socket that listens. Raises `InputError` if the address cannot be used."""
    try:
        return socket.create_server((host, port), family=socket.AF_INET6 if ":" in host else socket.AF_INET)
    except (OSError, OverflowError, TypeError, ValueError) as error:  # also of names that cannot be encoded
        raise InputError(f"Cannot listen on {host}:{port}: {error}; choose another --host or --port") from error
