"""Clients and replicas of the service: ComfyUI's nodes with a stand-in of its executor, Ray Serve with two replicas."""

from __future__ import annotations

import base64
import importlib.util
import io
import json
import os
import socket
import sqlite3
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from threading import Thread

import numpy as np
import openai
import pytest
import requests
import torch
from PIL import Image

from builders import free_port, load_script, tiny_pipeline
from likeness.conditions import CONDITIONS
from likeness.conditions.mask.classes import PALETTE
from likeness.data.synthetic import draw_face
from serving import serving

ROOT = Path(__file__).parents[2]


# ComfyUI

TENSORS = {"IMAGE": 4, "MASK": 3}
WIDGETS = {"STRING": str, "INT": int, "FLOAT": (int, float)}


def execute(nodes, workflow: dict, id: str, done: dict | None = None) -> tuple:
    """Run a node of a workflow (API format) after the nodes that it needs, with the type checks of ComfyUI."""
    done = {} if done is None else done
    if id in done:
        return done[id]
    kind = nodes.NODE_CLASS_MAPPINGS[workflow[id]["class_type"]]
    declared = kind.INPUT_TYPES()
    types = declared["required"] | declared.get("optional", {})
    given = {}
    for name, value in workflow[id]["inputs"].items():
        type_, options = types[name][0], (types[name][1:] or ({},))[0]
        if isinstance(value, list):  # a link: [node, output]
            source, output = value
            value = source if isinstance(source, torch.Tensor) else execute(nodes, workflow, source, done)[output]
        if isinstance(type_, list):
            assert value in type_
        elif type_ in TENSORS:
            assert value.ndim == TENSORS[type_]
        else:
            assert isinstance(value, WIDGETS[type_])
            assert not isinstance(value, str) or "min" not in options
            if "min" in options:
                assert options["min"] <= value <= options["max"]
        given[name] = value
    for name, (_, *options) in declared["required"].items():
        if name not in given and options and "default" in options[0]:
            given[name] = options[0]["default"]
    assert set(declared["required"]) <= set(given)
    results = getattr(kind(), kind.FUNCTION)(**given)
    assert len(results) == len(kind.RETURN_TYPES)
    for type_, result in zip(kind.RETURN_TYPES, results, strict=True):
        if type_ == "IMAGE":
            assert result.dtype == torch.float32
            assert result.ndim == 4
            assert result.shape[-1] == 3
            assert 0 <= result.min() <= result.max() <= 1
        else:
            assert isinstance(result, str)
    done[id] = results
    return results


@pytest.fixture(scope="module")
def nodes():
    return load_script(ROOT / "integrations/comfyui/__init__.py")


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    with serving(tmp_path_factory.mktemp("data")) as found:
        yield found


def test_a_comfyui_workflow_gives_the_image_of_the_api(nodes, server):
    """Mask and sketch as IMAGEs give the image that the same files give over HTTP."""
    face = draw_face(0, 0, 64)
    mask = torch.from_numpy(PALETTE[face.mask].astype(np.float32) / 255)[None]
    sketch = torch.from_numpy(np.repeat(face.sketch[..., None], 3, -1).astype(np.float32) / 255)[None]
    given = {"prompt": "a man", "seed": 3, "count": 2, "steps": 2, "server": server.url}
    given |= {"mask": [mask, 0], "sketch": [sketch, 0], "sketch_scale": 0.5}
    image, notes = execute(nodes, {"1": {"class_type": "LikenessGenerate", "inputs": given}}, "1")
    contents = {name: CONDITIONS[name].encode(getattr(face, name)) for name in ("mask", "sketch")}
    answer = server.client.images.generate(
        prompt="a man",
        n=2,
        extra_body={
            "seed": 3,
            "steps": 2,
            "control_image": {name: base64.b64encode(content).decode() for name, content in contents.items()},
            "conditioning_scale": {"mask": 1.0, "sketch": 0.5},
        },
    )
    for i, wanted in enumerate(answer.data):
        pixels = np.asarray(Image.open(io.BytesIO(base64.b64decode(wanted.b64_json))))
        np.testing.assert_array_equal((image[i].numpy() * 255).round().astype(np.uint8), pixels)
    assert "mask" in notes


def test_a_comfyui_workflow_extracts_a_mask_and_generates(nodes, server, monkeypatch):
    """A link passes the mask of a photograph on; the service's errors are shown as they are."""
    photo = torch.from_numpy(draw_face(0, 1, 64).image.astype(np.float32) / 255)[None]
    shared = {"server": server.url}
    extract = {"photograph": [photo, 0], "condition": "mask", **shared}
    workflow = {
        "a": {"class_type": "LikenessExtractCondition", "inputs": extract},
        "b": {"class_type": "LikenessGenerate", "inputs": {"prompt": "", "mask": ["a", 0], "seed": 1, **shared}},
    }
    image, _ = execute(nodes, {**workflow, "b": _with_defaults(nodes, workflow["b"])}, "b")
    assert image.shape == (1, 32, 32, 3)
    workflow["b"]["inputs"]["size"] = "9999x9999"
    with pytest.raises(RuntimeError, match="size is 9999x9999"):
        execute(nodes, {**workflow, "b": _with_defaults(nodes, workflow["b"])}, "b")
    monkeypatch.setenv("LIKENESS_API_KEY", "ключ")
    for address in ("http://127.0.0.1:9", "127.0.0.1:9", ""):
        with pytest.raises(RuntimeError, match="cannot be reached"):
            nodes.send("models", server=address, json={})
    edit = {"photograph": [photo, 0], "area": [torch.ones(1, 32, 64), 0], "prompt": "", "seed": 1, **shared}
    with pytest.raises(ValueError, match="area is 64x32, but the photograph is 64x64"):
        execute(nodes, {"c": {"class_type": "LikenessEditPhotograph", "inputs": edit}}, "c")


def test_comfyui_nodes_name_another_service(nodes):
    class Other(BaseHTTPRequestHandler):
        def do_POST(self):
            self.send_response(404)
            self.end_headers()
            self.wfile.write(b'{"detail": "Not Found"}')

    with HTTPServer(("127.0.0.1", 0), Other) as other:
        Thread(target=other.handle_request).start()
        with pytest.raises(RuntimeError, match="is not a likeness service: status 404"):
            nodes.send("models", server=f"http://127.0.0.1:{other.server_port}", json={})


def test_comfyui_nodes_say_that_the_service_is_slow(nodes):
    with (
        socket.create_server(("127.0.0.1", 0)) as silent,
        pytest.raises(RuntimeError, match=r"did not answer within 0\.1 s"),
    ):
        nodes.send("models", server=f"http://127.0.0.1:{silent.getsockname()[1]}", timeout=0.1, json={})


def test_a_comfyui_workflow_edits_a_photograph(nodes, server):
    """The area is generated anew, near pixels may be blended, and all others stay; a proposed mask is in colors."""
    photo = Image.open(ROOT / "examples/faces/images/1.png").convert("RGB")
    given = torch.from_numpy(np.asarray(photo).astype(np.float32) / 255)[None]
    area = torch.zeros(given.shape[:3])
    area[:, :40] = 1
    shared = {"prompt": "a hat", "seed": 1, "server": server.url}
    edit = {"photograph": [given, 0], "area": [area, 0], **shared}
    (image,) = execute(nodes, {"e": {"class_type": "LikenessEditPhotograph", "inputs": edit}}, "e")
    same = (image == given).all(-1)
    assert same[:, 40:].all()
    assert not same[:, :40].all()
    (mask,) = execute(nodes, {"p": {"class_type": "LikenessProposeMask", "inputs": shared}}, "p")
    colors = (mask[0].numpy() * 255).round().astype(np.uint8).reshape(-1, 3)
    assert {tuple(color) for color in colors.tolist()} <= {tuple(color) for color in PALETTE.tolist()}


def _with_defaults(nodes, node: dict) -> dict:
    """A node with the values that ComfyUI's widgets have at first."""
    declared = nodes.NODE_CLASS_MAPPINGS[node["class_type"]].INPUT_TYPES()["required"]
    defaults = {name: options[0]["default"] for name, (_, *options) in declared.items() if options}
    return node | {"inputs": defaults | node["inputs"]}


# Ray Serve


RAY = """
import json, sys
import ray
from click import UsageError
from ray import serve
from ray_serve import application

port, given, wrong = json.loads(sys.argv[1])
for argument, message in wrong.items():
    try:
        application(dict([argument.split("=")]))
    except UsageError as error:  # one sentence of `serve run`
        assert message in str(error), error
    else:
        raise AssertionError(argument)
ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False)
serve.start(http_options={"host": "127.0.0.1", "port": port})
serve.run(application(given), name="likeness")
print("ready", flush=True)
sys.stdin.read()
serve.shutdown()
ray.shutdown()
"""
"""Ray's driver, in a process of its own: it replaces `print` and the handlers of signals."""


def test_two_replicas_of_ray_serve(tmp_path):
    """Replicas give the same images, stream, and cancel each other's jobs."""
    if importlib.util.find_spec("ray") is None:
        pytest.skip("Ray is not installed: pip install 'likeness[ray]'")
    wrong = {
        "host=0.0.0.0": "Unknown argument 'host'",
        "queue=many": "queue=many: ",
        "max_replicas=0": "max_replicas=0: ",
        "queue=1": "must be at least 10",
        "model=x": "share their jobs",
        "cors=https://x.org,https://y.org": "share their jobs",
    }
    tiny_pipeline().save_pretrained(tmp_path / "model")
    database = tmp_path / "jobs.sqlite"
    given = {"model": str(tmp_path / "model"), "data": str(tmp_path / "data"), "database": f"sqlite:///{database}"}
    port = free_port()
    path = os.pathsep.join([str(ROOT / "launch"), *sys.path])
    command = [sys.executable, "-c", RAY, json.dumps([port, {**given, "min_replicas": "2", "num_cpus": "0.5"}, wrong])]
    options = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    environment = os.environ | {"PYTHONPATH": path, "RAY_USAGE_STATS_ENABLED": "0"}
    with subprocess.Popen(command, env=environment, **options) as driver:
        assert any(line.startswith("ready") for line in driver.stdout)
        client = openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="any", max_retries=0)

        def image(seed: int) -> str:
            return client.images.generate(prompt="a man", extra_body={"seed": seed}).data[0].b64_json

        with ThreadPoolExecutor(12) as pool:
            first, second = np.array(list(pool.map(image, [*range(12), *range(12)]))).reshape(2, 12)
        assert (first == second).all()
        assert len(set(first)) == 12
        with sqlite3.connect(database) as connection:
            assert len(connection.execute("select distinct replica from jobs").fetchall()) == 2
        events = client.images.generate(prompt="a man", stream=True, partial_images=1, extra_body={"steps": 4})
        assert [event.type.split(".")[-1] for event in events] == ["partial_image", "completed"]
        for i in range(4):  # whichever replica is asked
            url, headers = f"http://127.0.0.1:{port}/v1", {"x-request-id": f"long-{i}"}
            body = {"prompt": "", "n": 10, "steps": 100}
            with ThreadPoolExecutor(1) as pool:
                running = pool.submit(
                    requests.post, f"{url}/images/generations", json=body, headers=headers, timeout=60
                )
                while not requests.get(f"{url}/jobs/long-{i}", timeout=9).json().get("progress"):
                    assert not running.done()
                assert requests.delete(f"{url}/jobs/long-{i}", timeout=30).json()["state"] == "cancelled"
                assert running.result().status_code == 409
        driver.communicate()
