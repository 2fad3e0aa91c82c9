"""Programs `likeness` and `python` that run in forks of one process, which has imported everything.

Importing takes longer than what a command does with tiny networks. `forked_commands` starts the server and writes the
programs, which forward their streams, folder, environment, SIGTERM and exit code; started as a script, this file is the
server.
"""

from __future__ import annotations

import importlib
import json
import os
import pkgutil
import runpy
import signal
import socket
import subprocess
import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

CLIENT = """#!{python} -SE
import json, os, signal, socket, sys
server = socket.socket(socket.AF_UNIX)
server.connect({address!r})
job = json.dumps([os.path.basename(sys.argv[0]), sys.argv[1:], os.getcwd(), dict(os.environ)]).encode()
socket.send_fds(server, [len(job).to_bytes(4, "big")], [1, 2])
server.sendall(job)
child = int.from_bytes(server.recv(4), "big")
signal.signal(signal.SIGTERM, lambda number, _: os.kill(child, number))
sys.exit(int.from_bytes(server.recv(1) or b"\\x89", "big"))
"""


@contextmanager
def forked_commands(folder: Path) -> Iterator[Path]:
    """Yield a folder with the programs."""
    address, programs = str(folder / "server"), folder / "bin"
    programs.mkdir()
    for name in ("likeness", "python"):
        (programs / name).write_text(CLIENT.format(python=sys.executable, address=address))
        (programs / name).chmod(0o755)
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    server = subprocess.Popen([sys.executable, __file__, address], env=environment, stdout=subprocess.PIPE, text=True)
    try:
        assert server.stdout is not None
        assert server.stdout.readline() == "ready\n"
        yield programs
    finally:
        server.kill()
        server.communicate()


def serve(address: str) -> None:
    """Run every command in a fork."""
    import likeness

    for module in pkgutil.walk_packages(likeness.__path__, "likeness."):
        if "__main__" not in module.name:
            importlib.import_module(module.name)
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # the system removes children that ended
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(address)
    listener.listen()
    print("ready", flush=True)
    while True:
        client = listener.accept()[0]
        length, streams, *_ = socket.recv_fds(client, 4, 2)
        job = b""
        while len(job) < int.from_bytes(length, "big"):
            job += client.recv(1 << 16)
        if not os.fork():
            run_job(client, streams, *json.loads(job))
        for stream in streams:
            os.close(stream)
        client.close()


def run_job(client: socket.socket, streams: list[int], program: str, words: list[str], folder: str, env: dict) -> None:
    """Run a command in this process, send its process id first and its exit code at the end, and exit."""
    from likeness.cli import main

    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    for target, stream in zip((1, 2), streams, strict=True):
        os.dup2(stream, target)
    os.chdir(folder)
    os.environ.clear()
    os.environ.update(env)
    code = 1
    client.send(os.getpid().to_bytes(4, "big"))
    try:
        if program == "python":
            sys.argv = words
            sys.path.insert(0, str(Path(words[0]).parent))
            runpy.run_path(words[0], run_name="__main__")
        else:
            main(words)
        code = 0
    except SystemExit as stopped:
        code = stopped.code if isinstance(stopped.code, int) else int(stopped.code is not None)
        if isinstance(stopped.code, str):
            print(stopped.code, file=sys.stderr)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        client.send(bytes([code]))
        os._exit(code)


if __name__ == "__main__":
    serve(sys.argv[1])
