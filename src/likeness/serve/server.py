"""The web server of the service."""

from __future__ import annotations

import asyncio
import socket
from typing import Any

import uvicorn


class Server(uvicorn.Server):
    """uvicorn for the application of `create_app`: a shutdown ends the jobs, and so their responses, for which uvicorn
    alone waits first.
    """

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        app: Any = self.config.app
        ending = asyncio.create_task(app.state.end_jobs())
        await super().shutdown(sockets)
        ending.cancel()  # complete, unless a second Ctrl-C ended the server at once
