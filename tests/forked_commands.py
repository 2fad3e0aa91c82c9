"""A `likeness` program whose commands run in forks of one process, which has imported everything.

For scripts of many commands: importing takes longer than what a command does with tiny networks. `forked_commands`
starts the server and writes the program; started as a script, this file is the server.
"""

from __future__ import annotations

import importlib
import json
import os
import pkgutil
import socket
import subprocess
import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

CLIENT = """#!{python} -SE
import json, os, socket, sys
server = socket.socket(socket.AF_UNIX)
server.connect({address!r})
job = json.dumps([sys.argv[1:], os.getcwd(), dict(os.environ)]).encode()
socket.send_fds(server, [len(job).to_bytes(4, "big")], [1, 2])
server.sendall(job)
sys.exit(int.from_bytes(server.recv(1), "big"))
"""


@contextmanager
def forked_commands(folder: Path) -> Iterator[Path]:
    """Yield a folder with the program `likeness`."""
    address, program = str(folder / "server"), folder / "bin" / "likeness"
    program.parent.mkdir()
    program.write_text(CLIENT.format(python=sys.executable, address=address))
    program.chmod(0o755)
    server = subprocess.Popen([sys.executable, __file__, address], stdout=subprocess.PIPE, text=True)
    try:
        assert server.stdout is not None
        assert server.stdout.readline() == "ready\n"
        yield program.parent
    finally:
        server.kill()
        server.communicate()


def serve(address: str) -> None:
    """Run commands in forks, one at a time."""
    import likeness
    from likeness.cli import main

    for module in pkgutil.walk_packages(likeness.__path__, "likeness."):
        if "__main__" not in module.name:
            importlib.import_module(module.name)
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
        words, folder, environment = json.loads(job)
        child = os.fork()
        if not child:
            for target, stream in zip((1, 2), streams, strict=True):
                os.dup2(stream, target)
            os.chdir(folder)
            os.environ.clear()
            os.environ.update(environment)
            code = 1
            try:
                main(words)
                code = 0
            except SystemExit as stopped:
                code = int(stopped.code or 0)
            except BaseException:
                traceback.print_exc()
            finally:
                sys.stdout.flush()
                sys.stderr.flush()
                os._exit(code)
        client.send(bytes([os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])]))
        for stream in streams:
            os.close(stream)
        client.close()


if __name__ == "__main__":
    serve(sys.argv[1])
