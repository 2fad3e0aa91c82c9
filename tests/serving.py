"""A running service with a tiny model, for tests."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import openai
import requests
from uvicorn import Config

from builders import tiny_pipeline
from likeness.serve.app import create_app
from likeness.serve.server import Server
from likeness.serve.service import Service, Settings
from likeness.serve.store import Store


@contextmanager
def serving(
    folder: Path, pipeline=None, database: str | None = None, replica: str = "", graceful: int | None = None, **settings
) -> Iterator[SimpleNamespace]:
    """A server that has generated its warm-up image: its address, a client, its store."""
    store = Store(folder, database, replica)
    app = create_app(Service(pipeline or tiny_pipeline(), store, Settings(model="tiny", **settings)))
    server = Server(Config(app, port=0, log_config=None, access_log=False, timeout_graceful_shutdown=graceful))
    listener = socket.create_server(("127.0.0.1", 0))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, daemon=True)
    thread.start()
    url = f"http://127.0.0.1:{listener.getsockname()[1]}"
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        try:
            answer = requests.get(f"{url}/readyz", timeout=60)
            if answer.ok or "warm-up" in answer.text:
                break
        except requests.ConnectionError:
            pass
        time.sleep(0.02)
    else:
        raise AssertionError(f"{url} is not ready after a minute")
    key = (settings.get("keys") or ("any",))[0]
    client = openai.OpenAI(base_url=f"{url}/v1", api_key=key, max_retries=0)
    try:
        yield SimpleNamespace(url=url, client=client, store=store, folder=folder)
    finally:
        server.should_exit = True
        thread.join(60)
    assert not thread.is_alive()
