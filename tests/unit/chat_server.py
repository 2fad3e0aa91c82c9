"""A local server for OpenAI's chat completions that can simulate all failures of servers."""

from __future__ import annotations

import base64
import io
import json
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from PIL import Image

HANG, DROP = "hang", "drop"
"""Replies: hang, or close the connection."""

Reply = str | tuple[int, dict[str, str], bytes]


def reply_with(text: str | None, finish: str = "stop", tokens: int | None = 100) -> Reply:
    """Return a reply with a message."""
    reply: dict[str, Any] = {"choices": [{"message": {"content": text}, "finish_reason": finish}]}
    return 200, {}, json.dumps(reply | ({"usage": {"total_tokens": tokens}} if tokens else {})).encode()


def failed(status: int, message: str = "no", **headers: str) -> Reply:
    """Return a reply with an error."""
    headers = {name.replace("_", "-"): value for name, value in headers.items()}
    return status, headers, json.dumps({"error": {"message": message}}).encode()


class ChatServer(ThreadingHTTPServer):
    """Answers every request with `reply(text, image, number)`; `requests` records the requests."""

    daemon_threads = True

    def __init__(self, reply: Callable[[str, Image.Image | None, int], Reply], models: tuple[str, ...]):
        super().__init__(("127.0.0.1", 0), Handler)
        self.reply, self.models, self.lock = reply, models, threading.Lock()
        self.requests: list[dict[str, Any]] = []
        self.running = self.most_running = 0
        self.over = threading.Event()

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.server_port}/v1"


class Handler(BaseHTTPRequestHandler):
    """One connection."""

    server: ChatServer
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: Any) -> None:
        """Log nothing."""

    def do_GET(self) -> None:
        assert self.path == "/v1/models"
        names = [{"id": name, "object": "model"} for name in self.server.models]
        self.send((200, {}, json.dumps({"object": "list", "data": names}).encode()))

    def do_POST(self) -> None:
        assert self.path == "/v1/chat/completions"
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        (message,) = body["messages"]
        text, image = message["content"], None
        if isinstance(text, list):
            see, read = text
            head, data = see["image_url"]["url"].split(",")
            assert head == "data:image/jpeg;base64"
            text, image = read["text"], Image.open(io.BytesIO(base64.b64decode(data)))
        with self.server.lock:
            number = len(self.server.requests)
            self.server.requests.append(
                body | {"text": text, "at": time.monotonic(), "authorization": self.headers.get("Authorization")}
            )
            self.server.running += 1
            self.server.most_running = max(self.server.most_running, self.server.running)
        try:
            self.send(self.server.reply(text, image, number))
        finally:
            with self.server.lock:
                self.server.running -= 1

    def send(self, reply: Reply) -> None:
        if reply == HANG:
            self.server.over.wait(30)
        if isinstance(reply, str):
            self.close_connection = True
            return
        status, headers, content = reply
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)


@contextmanager
def chat_server(
    reply: Callable[[str, Image.Image | None, int], Reply], models: tuple[str, ...] = ("tiny-vlm",)
) -> Iterator[ChatServer]:
    """Run a server in a `with` block."""
    server = ChatServer(reply, models)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.over.set()
        server.shutdown()
        server.server_close()
