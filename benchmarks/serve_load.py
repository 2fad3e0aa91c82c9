"""Load the service: mixed requests, 64 concurrent against 64 serial requests, and SIGTERM during load.

    python benchmarks/serve_load.py --model FOLDER --requests 10000 --steps 1

Of the mixed requests 10 % are cancelled at a random time, 5 % are malformed and 2 % disconnect. Reported are answers
that are not as expected, jobs left over, and memory. `tests/unit/test_serve.py` runs a short version of each.
"""

from __future__ import annotations

import argparse
import base64
import io
import json
import os
import random
import signal
import socket
import sqlite3
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import requests
from PIL import Image

ROOT = Path(__file__).parents[1]
CLIENTS = 16


@contextmanager
def service(model: str, data: Path):
    """A service in a process of its own with one thread for the network; yields its address and process."""
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT / "src")}
    command = [sys.executable, "-m", "likeness.cli", "serve", "--model", model, "--port", "0", "--data", str(data)]
    with (data.parent / "serve.log").open("w") as log:
        process = subprocess.Popen(
            [*command, "--queue", "256", "--keep", "60"], stdout=subprocess.PIPE, stderr=log, text=True, env=environment
        )
    assert process.stdout is not None
    url = process.stdout.readline().split()[-1]
    try:
        while True:
            try:
                if requests.get(f"{url}/readyz", timeout=60).ok:
                    break
            except requests.ConnectionError:
                pass
            time.sleep(0.1)
        yield url, process
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait(120)


def generate(url: str, body: dict[str, Any], **headers: str) -> requests.Response:
    """Generate images, with the header `x-request-id` as `x_request_id`."""
    named = {name.replace("_", "-"): value for name, value in headers.items()}
    return requests.post(f"{url}/v1/images/generations", json=body, headers=named, timeout=600)


def mixed(url: str, count: int, *, steps: int, longer: int = 20, name: str = "load") -> Counter[str]:
    """Send mixed requests from 16 clients; those that end early have `longer` more steps.

    Returns:
        Kind and answer -> requests; `WRONG` is before those that are not as expected.
    """
    generator = random.Random(name)
    kinds = generator.choices(["cancelled", "malformed", "disconnected", "plain"], [10, 5, 2, 83], k=count)
    waits = [generator.uniform(0, 0.5) for _ in kinds]

    def send(index: int) -> str:
        kind, id = kinds[index], f"{name}-{index}"
        body = {"prompt": f"face {index % 100}", "seed": index, "steps": steps + longer * (kind != "plain")}
        match kind:
            case "malformed":
                return f"status {generate(url, {**body, 'seed': 'a'}, x_request_id=id).status_code}"
            case "disconnected":
                disconnect(url, id, body, waits[index])
                return "no answer"
            case "cancelled":
                timer = threading.Timer(waits[index], requests.delete, [f"{url}/v1/jobs/{id}"], {"timeout": 600})
                timer.start()
                status = generate(url, body, x_request_id=id).status_code
                timer.join()
                return f"status {status}"
        answer = generate(url, body, x_request_id=id)
        return f"status {answer.status_code}" if answer.ok and answer.json()["data"][0]["b64_json"] else answer.text

    def told(index: int) -> str:
        try:
            answer = send(index)
        except requests.RequestException as error:
            answer = repr(error)
        known = {"cancelled": ("status 200", "status 409"), "malformed": ("status 400",), "plain": ("status 200",)}
        good = answer in known.get(kinds[index], ("no answer",))
        return f"{'' if good else 'WRONG: '}{kinds[index]}, {answer[:80]}"

    with ThreadPoolExecutor(CLIENTS) as pool:
        return Counter(pool.map(told, range(count)))


def disconnect(url: str, id: str, body: dict[str, Any], seconds: float) -> None:
    """Send a request and close the connection some seconds later."""
    host, port = url.removeprefix("http://").split(":")
    content = json.dumps(body).encode()
    head = f"POST /v1/images/generations HTTP/1.1\r\nhost: x\r\nx-request-id: {id}\r\n"
    head += f"content-type: application/json\r\ncontent-length: {len(content)}\r\n\r\n"
    with socket.create_connection((host, int(port))) as connection:
        connection.sendall(head.encode() + content)
        time.sleep(seconds)


def left(url: str, data: Path, seconds: float = 60) -> dict[str, float]:
    """Wait until no image is in progress; returns what is left after some seconds: images and unfinished jobs."""
    for _ in range(int(10 * seconds)):
        lines = requests.get(f"{url}/metrics", timeout=60).text.splitlines()
        found = {line.split()[0]: float(line.split()[1]) for line in lines if line[0] != "#"}
        images = found["likeness_queue_length"] + found["likeness_running_images"]
        with sqlite3.connect(data / "jobs.sqlite") as database:
            unfinished = "SELECT count(*) FROM jobs WHERE state IN ('queued', 'running')"
            jobs = database.execute(unfinished).fetchone()[0]
        if not images and not jobs:
            break
        time.sleep(0.1)
    return {"images left in the engine": images, "unfinished jobs left": jobs}


def same(url: str, controls: list[str], steps: int, count: int = 64) -> bool:
    """Whether `count` concurrent requests of different prompts, conditions, steps and guidance give the bytes of as
    many serial ones. `controls`: a mask and a sketch in base64.
    """
    mask, sketch = controls
    conditions = [{}, {"mask": mask}, {"sketch": sketch}, {"mask": mask, "sketch": sketch}]

    def send(i: int) -> bytes:
        body = {"prompt": f"a face {i % 5}", "seed": i, "steps": 1 + i % steps, "control_image": conditions[i % 4]}
        answer = generate(url, {**body, "guidance_scale": 1 + (i % 8 == 0)})
        return base64.b64decode(answer.json()["data"][0]["b64_json"])

    serial = [send(i) for i in range(count)]
    order = random.sample(range(count), count)
    with ThreadPoolExecutor(count) as pool:
        concurrent = list(pool.map(send, order))
    return len(set(serial)) == count and concurrent == [serial[i] for i in order]


def terminated(url: str, process: subprocess.Popen, data: Path, *, steps: int, count: int = 64) -> dict[str, int]:
    """Send SIGTERM during `count` requests, and compare what their answers reported with the database and the files."""
    done = threading.Semaphore(0)

    def send(index: int) -> bytes | None:
        try:
            answer = generate(url, {"prompt": "a", "seed": index, "steps": steps}, x_request_id=f"end-{index}")
        except requests.RequestException:
            return None  # not accepted any more
        done.release()
        return base64.b64decode(answer.json()["data"][0]["b64_json"]) if answer.ok else None

    with ThreadPoolExecutor(CLIENTS) as pool:
        answers = pool.map(send, range(count))
        for _ in range(4):
            done.acquire()
        process.send_signal(signal.SIGTERM)
        contents = list(answers)
    process.wait(120)
    with sqlite3.connect(data / "jobs.sqlite") as database:
        states = dict(database.execute("SELECT id, state FROM jobs").fetchall())
    kept = lambda i: data / "images" / f"end-{i}" / "0.png"  # noqa: E731
    completed = [i for i, content in enumerate(contents) if content is not None]
    lost = [i for i in completed if states[f"end-{i}"] != "completed" or kept(i).read_bytes() != contents[i]]
    wrong = [id for id, state in states.items() if state in ("queued", "running")]
    return {"completed": len(completed), "lost": len(lost), "without an end": len(wrong)}


def memory(process: subprocess.Popen) -> float:
    """Resident memory of a process in MiB."""
    lines = Path(f"/proc/{process.pid}/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmRSS")) / 1024


def example(file: str) -> str:
    """An example file with 64 pixels a side, in base64."""
    buffer = io.BytesIO()
    Image.open(ROOT / "examples" / file).resize((64, 64), Image.Resampling.NEAREST).save(buffer, "PNG")
    return base64.b64encode(buffer.getvalue()).decode()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="mmface-mini-fast")
    parser.add_argument("--steps", type=int, default=1)
    parser.add_argument("--requests", type=int, default=1000)
    parser.add_argument("--same", type=int, default=3, help="repetitions of 64 concurrent against 64 serial requests")
    options = parser.parse_args()
    steps, controls = options.steps, [example("masks/smile.png"), example("sketches/fringe.png")]
    with tempfile.TemporaryDirectory() as folder:
        data = Path(folder) / "data"
        with service(options.model, data) as (url, process):
            for number in range(options.same):
                print(f"64 concurrent = 64 serial, {number + 1}: {same(url, controls, steps + 3)}", flush=True)
            sizes, seen, begin = [], Counter(), time.perf_counter()
            for part in range(10):
                seen += mixed(url, options.requests // 10, steps=steps, name=f"load-{part}")
                sizes.append(memory(process))
                print(
                    f"{sum(seen.values()):6d} requests, {time.perf_counter() - begin:.0f} s, {sizes[-1]:.0f} MiB",
                    flush=True,
                )
            print(json.dumps(dict(sorted(seen.items())) | left(url, data), indent=2))
            print(f"memory at the end / after a tenth: {sizes[-1] / sizes[0]:.3f}")
            print(json.dumps(terminated(url, process, data, steps=steps + 3)))


if __name__ == "__main__":
    main()
