"""The service over HTTP: a real server with a tiny model, the unmodified OpenAI client and plain requests."""

from __future__ import annotations

import base64
import contextlib
import errno
import io
import json
import os
import pwd
import shutil
import signal
import socket
import sqlite3
import subprocess
import sys
import tempfile
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import openai
import pytest
import requests
from fastapi.testclient import TestClient
from PIL import Image

from builders import load_script, tiny_mditface_pipeline, tiny_pipeline
from likeness.annotators.face_parser import load_face_parser
from likeness.cli.serve import Serve
from likeness.conditions import CONDITIONS
from likeness.conditions.mask import mask_image
from likeness.conditions.mask.commands import OPERATIONS
from likeness.data.synthetic import draw_face
from likeness.pipelines.generate import generate, resolve
from likeness.pipelines.image_recipe import read_recipe, request_of
from likeness.pipelines.sampling import advance
from likeness.prepare.edit import Change, edit_photo, open_photo
from likeness.serve import app, engine
from likeness.serve.app import create_app
from likeness.serve.engine import sampling_of
from likeness.serve.service import Service, Settings
from likeness.serve.store import FORGOTTEN, INCOMPLETE, JOBS, LOST, Store, Taken
from likeness.types import ConditionInput, InputError, PortraitRequest
from serving import serving

ROOT = Path(__file__).parents[2]
MASK, SKETCH = ROOT / "examples/masks/smile.png", ROOT / "examples/sketches/fringe.png"
POINTS = ROOT / "examples/keypoints/smile.json"

LOAD = load_script(ROOT / "benchmarks" / "serve_load.py")


def b64(content: bytes | Path) -> str:
    return base64.b64encode(content.read_bytes() if isinstance(content, Path) else content).decode()


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    with serving(tmp_path_factory.mktemp("data"), max_bytes=3_000_000) as found:
        yield found


def post(server, path="images/generations", **options):
    return requests.post(f"{server.url}/v1/{path}", timeout=60, **options)


def wait_for(condition, seconds: float = 30) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


# The pipeline, one step at a time


@pytest.mark.parametrize("make", [tiny_pipeline, tiny_mditface_pipeline])
def test_calls_advance_in_turns_or_together(make):
    """Calls that enter and leave between steps give the images that each gives alone; in batches up to rounding."""
    pipeline = make()
    conditions = [{}, {"mask": ConditionInput(image=MASK)}, {"sketch": ConditionInput(image=SKETCH, scale=0.5)}]
    wanted = [
        resolve(
            PortraitRequest(prompt=f"a face {i}", conditions=conditions[i % 3], num_inference_steps=2 + i, seed=i),
            pipeline,
        )
        for i in range(4)
    ]
    alone = [np.asarray(generate(pipeline, request, [request.seed])[0][0]) for request in wanted]
    for together in (False, True):
        samplings = [sampling_of(pipeline, request) for request in wanted]
        while active := [sampling for sampling in samplings if sampling.step < sampling.steps]:
            advance(active[::-1], together=together)
            assert active[0].images(preview=True)[0].size == (32, 32)
        images = [np.asarray(sampling.images()[0]) for sampling in samplings]
        most = max(int(np.abs(one.astype(int) - other).max()) for one, other in zip(images, alone, strict=True))
        assert most <= (2 if together else 0)


# The OpenAI client


def test_openai_client(server, tmp_path):
    client = server.client
    assert [model.id for model in client.models.list()] == ["tiny"]
    more = {"seed": 7, "steps": 2, "guidance_scale": 1.5, "negative_prompt": "a hat"}
    more |= {"control_image": {"mask": b64(MASK), "keypoints": b64(POINTS)}, "conditioning_scale": {"mask": 0.5}}
    answer = client.images.generate(prompt="a woman", model="tiny", n=2, size="32x32", extra_body=more)
    assert answer.size == "32x32"
    assert len(answer.data) == 2
    for index, image in enumerate(answer.data):
        (tmp_path / "image.png").write_bytes(base64.b64decode(image.b64_json))
        recipe, pixels = read_recipe(tmp_path / "image.png")
        request = request_of(recipe)
        assert (recipe["seed"], recipe["steps"], request.conditions["mask"].scale) == (7 + index, 2, 0.5)
        assert np.array_equal(np.asarray(generate(tiny_pipeline(), request, [request.seed])[0][0]), pixels)
    linked = client.images.generate(prompt="x", response_format="url", output_format="webp", output_compression=50)
    assert Image.open(io.BytesIO(requests.get(linked.data[0].url, timeout=60).content)).format == "WEBP"
    assert "truncated" in client.images.generate(prompt="smile " * 100).notes[0]
    with pytest.raises(openai.BadRequestError) as error:
        client.images.generate(prompt="x", n=11)
    assert error.value.param == "n"
    with pytest.raises(openai.NotFoundError, match="tiny"):
        client.images.generate(prompt="x", model="dall-e-3")


@pytest.mark.parametrize(("steps", "partial", "previews"), [(4, 3, 3), (4, 0, 0), (1, 2, 0)])
def test_stream(server, steps, partial, previews):
    """Previews are images, not noise or copies, and the last event is the image that is generated without a stream."""
    options = {"prompt": "a man", "extra_body": {"seed": 3, "steps": steps}}
    events = list(server.client.images.generate(stream=True, partial_images=partial, **options))
    assert [event.type.rpartition(".")[2] for event in events] == ["partial_image"] * previews + ["completed"]
    assert [event.partial_image_index for event in events[:-1]] == list(range(previews))
    images = [np.asarray(Image.open(io.BytesIO(base64.b64decode(event.b64_json)))).astype(int) for event in events]
    far = [np.abs(image - images[-1]).mean() for image in images]
    assert far == sorted(far, reverse=True)
    assert len(set(far)) == len(far)
    assert events[-1].b64_json == server.client.images.generate(**options).data[0].b64_json


def encoded(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()


def photograph(width: int = 200, height: int = 200) -> Image.Image:
    return Image.fromarray(draw_face(0, 0, 128).image).resize((width, height))


def hole(size: int, alpha: int = 0) -> bytes:
    """A mask whose upper left quarter is to be edited."""
    image = Image.new("RGBA", (size, size), "white")
    image.paste((0, 0, 0, alpha), (0, 0, size // 2, size // 2))
    return encoded(image)


def test_edit_with_a_mask(server, tmp_path):
    """The OpenAI client edits a photograph; every pixel that the mask does not free stays, and the response says so."""
    photo = photograph()
    answer = server.client.images.edit(
        prompt="hair", image=encoded(photo), mask=hole(200), n=2, extra_body={"seed": 5, "steps": 2}
    )
    assert answer.size == "200x200"
    pipeline = tiny_pipeline()
    pipeline.source = {"model": "tiny"}
    white = Image.new("L", (200, 200))
    white.paste(255, (0, 0, 100, 100))
    for index, image in enumerate(answer.data):
        (tmp_path / "edited.png").write_bytes(base64.b64decode(image.b64_json))
        rejected = post(server, "recipes", files={"image": (tmp_path / "edited.png").read_bytes()})
        assert (rejected.status_code, rejected.json()["error"]["code"]) == (400, "edited")  # no request generates it
        recipe, pixels = read_recipe(tmp_path / "edited.png")
        changed = (pixels != np.asarray(photo)).any(axis=-1)
        assert changed[:100, :100].mean() > 0.5
        counts = answer.certificates[index]
        assert counts["changed_outside"] == changed[100:].sum() + changed[:, 100:].sum() == 0
        assert counts["changed_inside"] == changed.sum()
        assert recipe["edit"]["certificate"] == counts
        request = PortraitRequest(prompt="hair", seed=5 + index, num_inference_steps=2)
        change, parser = Change(region_mask=white), load_face_parser()
        alone = edit_photo(pipeline, open_photo(encoded(photo)), change, request, parser=parser)
        assert np.array_equal(np.asarray(alone.image), pixels)


@pytest.mark.parametrize(
    "change",
    [
        {"mask_edit": "grow hair 8"},
        {"mask_edit": "paste hair from OTHER"},
        {"wanted_mask": "OTHER"},
        {"region": "hair,hat", "keep": "skin, eyes", "method": "flow_edit", "output_format": "webp"},
        {"strength": 0.5},
    ],
)
def test_edit_with_classes(server, change):
    other = post(server, "inspect", files={"file": encoded(mask_image(draw_face(0, 1, 128).mask))}).json()["id"]
    form = {name: value.replace("OTHER", other) if isinstance(value, str) else value for name, value in change.items()}
    answer = post(server, "images/edits", files={"image": encoded(photograph())}, data={"prompt": "", **form})
    assert answer.ok, answer.text
    (counts,) = answer.json()["certificates"]
    assert (counts["changed_outside"], counts["changed_inside"] > 0) == (0, True)


INVALID_EDITS = {
    "nothing to edit": ({}, {}, None),
    "opaque mask": ({"mask": hole(200, alpha=1)}, {}, "mask"),
    "damaged mask": ({"mask": b"text"}, {}, "mask"),
    "mask of another size": ({"mask": encoded(Image.new("LA", (200, 100)))}, {}, None),
    "mask and classes": ({"mask": hole(200)}, {"mask_edit": "grow hair 4"}, "mask"),
    "lossy": ({"mask": hole(200)}, {"output_format": "jpeg"}, "output_format"),
    "size": ({"mask": hole(200)}, {"size": "1024x1024"}, "size"),
    "stream": ({"mask": hole(200)}, {"stream": "true"}, "stream"),
    "count": ({"mask": hole(200)}, {"n": "11"}, "n"),
    "model": ({"mask": hole(200)}, {"model": "other"}, "model"),
    "many commands": ({}, {"mask_edit": "grow hair 4; " * 200}, "mask_edit"),
    "long class": ({}, {"region": "a" * 30_000}, None),
    "incomplete command": ({}, {"mask_edit": "grow hair"}, None),
    "path as id": ({}, {"mask_edit": "paste hair from ../../etc/passwd"}, "mask_edit"),
    "strength": ({}, {"strength": "0"}, "strength"),
    "not square": ({"image": encoded(photograph(200, 100)), "mask": hole(200)}, {}, "image"),
    "no face": ({"image": encoded(Image.new("RGB", (64, 64))), "mask": hole(64)}, {}, None),
    "no image": ({"image": b""}, {}, "image"),
    "text as image": ({"image": None}, {"image": "x"}, "image"),
}


@pytest.mark.parametrize("case", INVALID_EDITS)
def test_invalid_edits(server, case):
    files, form, param = INVALID_EDITS[case]
    files = {"image": encoded(photograph()), **files}
    answer = post(server, "images/edits", files=files, data={"prompt": "a", **form})
    assert 400 <= answer.status_code < 500, answer.text
    assert answer.json()["error"]["param"] == param, answer.text
    assert len(answer.json()["error"]["message"]) < 500


def test_load(server):
    """A short version of benchmarks/serve_load.py."""
    small = [encoded(Image.open(file).resize((64, 64), Image.Resampling.NEAREST)) for file in (MASK, SKETCH)]
    assert LOAD.same(server.url, [b64(content) for content in small], steps=2)
    answers = LOAD.mixed(server.url, 60, steps=1)
    assert len({kind.split(",")[0] for kind in answers}) == 4
    assert not [kind for kind in answers if "WRONG" in kind]
    assert set(LOAD.left(server.url, server.folder).values()) == {0}


# Invalid input


def png(width: int, height: int) -> bytes:
    buffer = io.BytesIO()
    Image.new("1", (width, height)).save(buffer, "PNG")
    return buffer.getvalue()


WRONG = {
    "malformed JSON": ("{", None),
    "no object": ("[]", None),
    "empty": ("", None),
    "deep": ("[" * 100_000, None),
    "no prompt": ({}, "prompt"),
    "prompt of another type": ({"prompt": ["a"]}, "prompt"),
    "long prompt": ({"prompt": "a" * 1_000_000}, "prompt"),
    "half a character": ('{"prompt": "\\ud800"}', "prompt"),
    "unknown field": ({"prompt": "a", "style": "vivid"}, "style"),
    "unsupported value": ({"prompt": "a", "background": "transparent"}, "background"),
    "n of zero": ({"prompt": "a", "n": 0}, "n"),
    "n as text": ({"prompt": "a", "n": "1"}, "n"),
    "NaN": ('{"prompt": "a", "guidance_scale": NaN}', "guidance_scale"),
    "seed too large": ({"prompt": "a", "seed": 2**63}, "seed"),
    "last seed too large": ({"prompt": "a", "seed": 2**63 - 1, "n": 2}, "seed"),
    "steps": ({"prompt": "a", "steps": 101}, "steps"),
    "size": ({"prompt": "a", "size": "32 by 32"}, "size"),
    "untrained size": ({"prompt": "a", "size": "48x48"}, "size"),
    "huge size": ({"prompt": "a", "size": "999999999x999999999"}, "size"),
    "previews without stream": ({"prompt": "a", "partial_images": 1}, None),
    "compression of PNG": ({"prompt": "a", "output_compression": 5}, None),
    "URL in a stream": ({"prompt": "a", "stream": True, "response_format": "url"}, None),
    "long prompt in a JPEG": ({"prompt": "ä" * 12_000, "output_format": "jpeg"}, "output_format"),
    "unknown condition": ({"prompt": "a", "control_image": {"pose": "AA=="}}, "control_image.pose"),
    "no base64": ({"prompt": "a", "control_image": {"mask": "***"}}, "control_image.mask"),
    "base64 of no image": ({"prompt": "a", "control_image": {"mask": b64(b"hello")}}, "control_image.mask"),
    "bomb": ({"prompt": "a", "control_image": {"mask": b64(png(40_000, 40_000))}}, "control_image.mask"),
    "photograph as mask": ({"prompt": "a", "control_image": {"mask": b64(png(64, 20))}}, "control_image.mask"),
    "keypoints of no JSON": ({"prompt": "a", "control_image": {"keypoints": b64(b"[[")}}, "control_image.keypoints"),
    "huge keypoints": (
        {"prompt": "a", "control_image": {"keypoints": b64(b"[[" + b"9" * 400 + b", 0]]")}},
        "control_image.keypoints",
    ),
    "long model": ({"prompt": "a", "model": "a" * 1_000_000}, "model"),
    "keypoints of text": ({"prompt": "a", "control_image": {"keypoints": b64(b'["a"]')}}, "control_image.keypoints"),
    "path as id": ({"prompt": "a", "control_image": {"mask": "file-../../etc/passwd"}}, "control_image.mask"),
    "scale of nothing": ({"prompt": "a", "conditioning_scale": {"mask": 1.0}}, None),
    "end before start": (
        {
            "prompt": "a",
            "control_image": {"mask": b64(MASK)},
            "control_guidance_start": 0.5,
            "control_guidance_end": 0.1,
        },
        "control_image.mask",
    ),
}


@pytest.mark.parametrize("case", WRONG)
def test_invalid_bodies(server, case):
    body, param = WRONG[case]
    content = body if isinstance(body, str) else json.dumps(body)
    answer = post(server, data=content, headers={"content-type": "application/json"})
    error = answer.json()["error"]
    assert 400 <= answer.status_code < 500, error
    assert set(error) == {"message", "type", "param", "code"}
    assert error["param"] == param, error
    assert "\n" not in error["message"]
    assert len(error["message"]) < 500


MESSAGES = {
    '{"prompt": "a", "n": 11}': "n is 11: it must be less than or equal to 10",
    '{"prompt": "a", "conditioning_scale": {"mask": "x"}}': "conditioning_scale.mask is 'x': it must be a valid number",
    '{"prompt": "a", "conditioning_scale": "x"}': "conditioning_scale is 'x': it must be a valid number",
    "[]": "The body is not a JSON object: send one, with Content-Type: application/json",
    b'{"prompt": "\xff"}': "The body is not JSON in UTF-8",
}


@pytest.mark.parametrize("body", MESSAGES)
def test_messages_have_the_field_the_value_and_the_correction(server, body):
    answer = post(server, data=body, headers={"content-type": "application/json"})
    assert answer.status_code == 400
    assert answer.json()["error"]["message"] == MESSAGES[body]


def test_a_body_without_its_type(server):
    answer = post(server, data='{"prompt": "a"}')
    assert answer.status_code == 400
    assert "Content-Type: application/json" in answer.json()["error"]["message"]


def test_base64_in_lines(server):
    """That is how the program `base64` writes it."""
    body = {"prompt": "a", "steps": 1, "control_image": {"mask": base64.encodebytes(MASK.read_bytes()).decode()}}
    assert post(server, json=body).ok


@pytest.mark.parametrize(
    ("method", "path", "options", "status"),
    [
        ("POST", "images/generations", {"data": b"x" * 3_000_001}, 413),
        ("POST", "images/generations", {"data": iter([b"x" * 1_000_000] * 4)}, 413),
        ("POST", "images/generations", {"json": {"prompt": "a"}, "headers": {"x-request-id": "../a"}}, 400),
        ("POST", "images/generations", {"json": {"prompt": "a"}, "headers": {"Idempotency-Key": ""}}, 400),
        ("GET", "jobs/..%2F..%2Fetc%2Fpasswd", {}, 404),
        ("GET", "jobs/unknown", {}, 404),
        ("DELETE", "jobs/unknown", {}, 404),
        ("GET", "images/generations", {}, 405),
        ("GET", "nothing", {}, 404),
        ("GET", "models/other", {}, 404),
        ("POST", "conditions/pose", {}, 400),
        ("POST", "conditions/mask", {"json": {}}, 400),
        ("POST", "conditions/mask", {"files": {"photo": b"x"}}, 400),
        ("POST", "conditions/mask", {"files": {"image": b"x"}}, 400),
        ("POST", "conditions/mask", {"files": {"image": MASK.read_bytes()}, "data": {"size": "1e9"}}, 400),
        ("POST", "conditions/mask", {"files": {"image": MASK.read_bytes()}, "data": {"size": "0"}}, 400),
        ("POST", "conditions/mask", {"files": {"image": encoded(Image.new("RGB", (64, 64), "teal"))}}, 400),
        ("POST", "conditions/keypoints", {"files": {"image": MASK.read_bytes()}}, 501),
        ("POST", "inspect", {"files": {"file": b"{"}}, 400),
        ("POST", "inspect", {"files": {"file": MASK.read_bytes()}, "data": {"condition": "pose"}}, 400),
        ("POST", "masks/edit", {"json": {"mask": "file-0", "operation": "grow", "classes": ["hair"], "by": "4"}}, 404),
        ("POST", "masks/edit", {"json": {"mask": b64(MASK), "operation": "grow", "classes": ["hair"]}}, 400),
        ("POST", "masks/edit", {"json": {"mask": b64(MASK), "operation": "remove", "classes": ["x"]}}, 400),
        ("POST", "masks/edit", {"json": {"mask": b64(MASK), "operation": "mirror", "by": "4"}}, 400),
        ("POST", "masks/propose", {"json": {"prompt": "a", "candidates": 1000}}, 400),
    ],
)
def test_invalid_requests(server, method, path, options, status):
    answer = requests.request(method, f"{server.url}/v1/{path}", timeout=60, **options)
    assert answer.status_code == status, answer.text
    assert set(answer.json()["error"]) == {"message", "type", "param", "code"}
    assert answer.headers["x-request-id"]


def test_limits_and_keys(tmp_path):
    with serving(tmp_path, queue=2, keys=("one", "two"), keep=1.0) as server:
        for headers in ({}, {"Authorization": "Bearer on"}):
            answer = post(server, json={"prompt": "a"}, headers=headers)
            assert (answer.status_code, answer.json()["error"]["code"]) == (401, "invalid_api_key")
        with pytest.raises(openai.RateLimitError) as error:
            server.client.images.generate(prompt="a", n=3)
        assert int(error.value.response.headers["retry-after"]) >= 1
        assert "0 images are waiting, of at most 2" in str(error.value)
        one, two = ({"Authorization": f"Bearer {key}", "x-request-id": "mine"} for key in ("one", "two"))
        assert post(server, json={"prompt": "a"}, headers=one).headers["x-request-id"] == "mine"
        assert post(server, json={"prompt": "a"}, headers=one).status_code == 409
        assert requests.get(f"{server.url}/v1/jobs/mine", headers=two, timeout=60).status_code == 404
        job = lambda: requests.get(f"{server.url}/v1/jobs/mine", headers=one, timeout=60)  # noqa: E731
        wait_for(lambda: job().status_code == 410)
        assert not list(server.store.images.iterdir())


def test_damaged_model(tmp_path):
    pipeline = tiny_pipeline()
    list(pipeline.transformer.parameters())[-1].data.fill_(float("nan"))
    with serving(tmp_path, pipeline) as server:
        assert requests.get(f"{server.url}/readyz", timeout=60).status_code == 503
        answer = post(server, json={"prompt": "a"})
        assert answer.status_code == 503
        assert "not finite" in answer.json()["error"]["message"]


def test_requests_during_a_warm_up_that_fails(tmp_path):
    """A request that arrives before the failure does not wait for ever."""
    pipeline, waiting = tiny_pipeline(), threading.Event()

    class Damaged(type(pipeline)):
        def __call__(self, *args, **kwargs):
            waiting.wait(30)
            raise InputError("the weights are damaged")

    pipeline.__class__ = Damaged
    app = create_app(Service(pipeline, Store(tmp_path), Settings(model="tiny")))
    with TestClient(app) as client, ThreadPoolExecutor(1) as pool:
        answer = pool.submit(client.post, "/v1/images/generations", json={"prompt": "a"}, headers={"x-request-id": "a"})
        wait_for(lambda: "likeness_queue_length 1.0" in client.get("/metrics").text)
        waiting.set()
        assert answer.result(30).status_code == 503
        assert "damaged" in answer.result().json()["error"]["message"]
        assert client.get("/v1/jobs/a").json()["state"] == "interrupted"


@pytest.mark.parametrize("origin", ["https://one.example", "https://two.example"])
def test_web_pages_of_other_origins(tmp_path, origin):
    with serving(tmp_path, cors=("https://one.example",), keys=("one",)) as server:
        headers = {"Origin": origin, "Access-Control-Request-Method": "POST"}
        answer = requests.options(f"{server.url}/v1/images/generations", headers=headers, timeout=60)
        assert answer.ok == (origin == "https://one.example")
        headers |= {"Sec-Fetch-Site": "cross-site", "Authorization": "Bearer one"}
        answer = post(server, "recipes", files={"image": MASK.read_bytes()}, headers=headers)  # needs no permission
        assert answer.status_code == (400 if origin == "https://one.example" else 403)
        del headers["Sec-Fetch-Site"]  # browsers send it to servers on this machine or with TLS only
        answer = post(server, "recipes", files={"image": MASK.read_bytes()}, headers=headers)
        assert answer.status_code == (400 if origin == "https://one.example" else 403)
        answer = post(server, "recipes", files={"image": MASK.read_bytes()}, headers=headers | {"Origin": server.url})
        assert answer.status_code == 400
        headers["Sec-Fetch-Site"] = "same-site"  # another port of this machine, for example
        answer = post(server, "recipes", files={"image": MASK.read_bytes()}, headers=headers)
        assert answer.status_code == (400 if origin == "https://one.example" else 403)


def test_a_local_service_has_only_local_names(tmp_path):
    """A web page cannot reach it by a host name of its own that leads to this machine (DNS rebinding)."""
    with serving(tmp_path, local=True, cors=("https://one.example",)) as server:
        for host, ok in {"evil.example:8000": False, "": False, "localhost:1": True, "[::1]:1": True}.items():
            assert requests.get(f"{server.url}/v1/models", headers={"Host": host}, timeout=60).ok == ok
        assert requests.get(f"{server.url}/v1/models", headers={"Host": "one.example"}, timeout=60).ok
    with serving(tmp_path, local=True, keys=("one",)) as server:
        headers = {"Host": "evil.example", "Authorization": "Bearer one"}
        assert requests.get(f"{server.url}/v1/models", headers=headers, timeout=60).ok


def test_browsers_reach_an_open_service_by_address_only(tmp_path, caplog):
    """Other programs may use any name, for example that of a container."""
    caplog.set_level("INFO", "likeness.access")
    with serving(tmp_path, cors=("https://one.example",)) as server:
        for host, origin, ok in [
            ("evil.example:8000", "http://evil.example:8000", False),
            ("evil.example:8000", None, True),
            ("192.168.0.7:8000", "http://192.168.0.7:8000", True),
            ("one.example", "https://one.example", True),
        ]:
            headers = {"Host": host} | ({} if origin is None else {"Origin": origin})
            assert requests.get(f"{server.url}/v1/models", headers=headers, timeout=60).ok == ok
        answer = requests.get(f"{server.url}/v1/models", headers={"Origin": "https://one.example"}, timeout=60)
        assert "x-should-retry" in answer.headers["access-control-expose-headers"]
        requests.get(f"{server.url}/x%0Aforged", timeout=60)
    assert "/x%0Aforged" in caplog.text


@pytest.mark.parametrize("field", ["prompt", "size", "model"])
def test_text_that_is_not_utf8(server, field):
    content = json.dumps({"prompt": "a", field: "\ud800"})
    answer = post(server, data=content, headers={"content-type": "application/json"})
    assert answer.status_code in (400, 404, 422), answer.text


def test_null_is_the_default(server):
    names = ("n", "size", "stream", "output_format", "response_format", "negative_prompt", "upscale", "steps")
    answer = post(server, json={"prompt": "a", "seed": 1} | dict.fromkeys(names))
    assert answer.status_code == 200
    assert answer.json()["seeds"] == [1]


def test_photographs_in_memory_are_limited(server, monkeypatch):
    """Other images are generated meanwhile."""
    monkeypatch.setattr(app, "MAX_PHOTOS", -1)
    assert post(server, json={"prompt": "a", "steps": 1}).ok
    answer = post(
        server, "images/edits", data={"prompt": "a", "region": "hair"}, files={"image": encoded(photograph())}
    )
    assert answer.status_code == 429
    assert answer.headers["retry-after"]


# Jobs


def long_request(server, id: str, path: str = "images/generations", **headers) -> threading.Thread:
    """Start a request of 100 steps and wait until it runs."""
    body = {"prompt": "a", "steps": 100, "n": 2}
    files = {"image": encoded(photograph()), "mask": hole(200)}
    options = {"data": body, "files": files} if path == "images/edits" else {"json": body}
    send = lambda: post(server, path, **options, headers={"x-request-id": id, **headers})  # noqa: E731
    thread = threading.Thread(target=send)
    thread.start()
    wait_for(lambda: requests.get(f"{server.url}/v1/jobs/{id}", timeout=60).json().get("progress", 0) > 0)
    return thread


def events_in(text: str) -> list[dict]:
    """Return the data of the events of a stream."""
    return [json.loads(line.removeprefix("data: ")) for line in text.splitlines() if line.startswith("data: ")]


def figure(server, name: str) -> float:
    """Return a figure of /metrics, 0 if it is missing."""
    lines = requests.get(f"{server.url}/metrics", timeout=60).text.splitlines()
    return next((float(line.split()[1]) for line in lines if line.startswith(f"{name} ")), 0)


@pytest.mark.parametrize("path", ["images/generations", "images/edits"])
def test_cancel(server, path):
    id, cancelled = path.replace("/", "-"), 'likeness_images_total{result="cancelled"}'
    before, thread = figure(server, cancelled), long_request(server, id, path)
    running = requests.get(f"{server.url}/v1/jobs/{id}", timeout=60).json()
    assert running["state"] == "running"
    assert 0 < running["progress"] < 1
    assert server.client.images.generate(prompt="a", extra_body={"steps": 1}).data  # enters between its steps
    assert requests.delete(f"{server.url}/v1/jobs/{id}", timeout=60).json()["state"] == "cancelled"
    thread.join(30)
    assert figure(server, cancelled) == before + 2
    assert figure(server, "likeness_running_images") == 0
    assert not list(server.store.images.glob(f"{id}*"))


def test_cancelling_deletes_the_images_that_are_complete(server):
    headers, folder = {"x-request-id": "partly"}, server.store.images / "partly"
    with ThreadPoolExecutor(1) as pool:  # the last images wait until the first are complete
        sent = pool.submit(post, server, json={"prompt": "a", "steps": 60, "n": 10}, headers=headers)
        wait_for(lambda: list(folder.glob("*.png")))
        assert requests.delete(f"{server.url}/v1/jobs/partly", timeout=60).json()["state"] == "cancelled"
        assert sent.result().status_code == 409
    assert not folder.exists()


def test_cancelling_during_acceptance(server, monkeypatch):
    """A job that is not accepted yet is cancelled as soon as it is."""
    accept, accepted = Service.request_of, threading.Event()
    monkeypatch.setattr(Service, "request_of", lambda *given: accepted.wait(30) and accept(*given))
    with ThreadPoolExecutor(2) as pool:
        sent = pool.submit(post, server, json={"prompt": "a", "steps": 100}, headers={"x-request-id": "early"})
        time.sleep(0.5)
        deleted = pool.submit(requests.delete, f"{server.url}/v1/jobs/early", timeout=60)
        time.sleep(0.5)
        accepted.set()
        assert deleted.result().json().get("state") == "cancelled"
        assert sent.result().status_code == 409


def test_a_poll_at_the_end_of_a_job(server, monkeypatch):
    """A job that ends while its row is read is not reported as queued."""
    find, thread = server.store.find, long_request(server, "polled")

    def late(*given):
        row = find(*given)
        if row["state"] == "queued":
            thread.join(60)
        return row

    monkeypatch.setattr(server.store, "find", late)
    found = requests.get(f"{server.url}/v1/jobs/polled", timeout=60).json()
    assert (found["state"], found["progress"]) == ("completed", 1)


def test_a_job_that_completes_while_it_is_interrupted_keeps_its_images(server, monkeypatch):
    body = {"prompt": "a", "steps": 1, "response_format": "url"}
    assert post(server, json=body, headers={"x-request-id": "late"}).ok
    update = server.store._update
    with server.store.database.begin() as connection:
        connection.execute(JOBS.update().where(JOBS.c.id == "late").values(state="running"))

    def completed_before(condition, **values):
        update(JOBS.c.id == "late", state="completed")
        return update(condition, **values)

    monkeypatch.setattr(server.store, "_update", completed_before)
    server.store._interrupt(JOBS.c.id == "late")
    assert requests.get(f"{server.url}/v1/jobs/late", timeout=60).json()["state"] == "completed"
    assert list((server.store.images / "late").iterdir())


def test_a_job_that_another_replica_gave_up(server):
    """It is interrupted for its client, too, and leaves no image."""
    headers, url = {"x-request-id": "given-up"}, f"{server.url}/v1/jobs/given-up"
    with ThreadPoolExecutor(1) as pool:
        sent = pool.submit(post, server, json={"prompt": "a", "steps": 100}, headers=headers)
        wait_for(lambda: requests.get(url, timeout=60).json().get("progress", 0) > 0)
        server.store._interrupt(JOBS.c.id == "given-up")
        assert (sent.result().status_code, sent.result().json()["error"]["code"]) == (503, "interrupted")
    assert requests.get(url, timeout=60).json()["state"] == "interrupted"
    assert not (server.store.images / "given-up").exists()


def test_a_full_disk(server, monkeypatch, caplog):
    """It is the service's failure, which its log explains; the response has no path."""

    def full(*given):
        raise OSError(errno.ENOSPC, "No space left on device")

    failed = 'likeness_images_total{result="failed"}'
    before = figure(server, failed)
    monkeypatch.setattr("likeness.files.os.replace", full)
    mask = {"mask": b64(MASK), "operation": "mirror"}
    answers = [post(server, json={"prompt": "a", "steps": 1}), post(server, "masks/edit", json=mask)]
    assert [answer.status_code for answer in answers] == [500, 500]
    assert not [answer for answer in answers if str(server.folder) in answer.text]
    assert figure(server, failed) == before + 1
    assert caplog.text.count("Traceback") >= 2
    assert "could not be stored" in caplog.text


def test_an_upload_that_expires_while_it_is_read(server, monkeypatch):
    monkeypatch.setattr(server.store, "find_upload", lambda id: server.folder / "gone.png")
    answer = post(server, "masks/check", json={"mask": "file-0"})
    assert (answer.status_code, answer.json()["error"]["code"]) == (404, "file_not_found")


def test_a_mask_model_that_cannot_be_used(tmp_path):
    """It is not the client's fault."""
    with serving(tmp_path, mask_model=str(tmp_path / "missing")) as server:
        assert post(server, "masks/propose", json={"prompt": "a"}).status_code == 500


@pytest.mark.parametrize("stream", [False, True])
def test_disconnected_clients_leave_no_job(server, stream):
    body = json.dumps({"prompt": "a", "steps": 100, "n": 2, "stream": stream}).encode()
    head = f"POST /v1/images/generations HTTP/1.1\r\nhost: x\r\nx-request-id: gone-{stream}\r\n"
    head += f"content-type: application/json\r\ncontent-length: {len(body)}\r\n\r\n"
    with socket.create_connection(("127.0.0.1", int(server.url.rpartition(":")[2]))) as connection:
        connection.sendall(head.encode() + body)
        job = lambda: requests.get(f"{server.url}/v1/jobs/gone-{stream}", timeout=60).json()  # noqa: E731
        wait_for(lambda: job().get("state") == "running")
    wait_for(lambda: job()["state"] == "cancelled")


def test_idempotency_key(server):
    body, headers = {"prompt": "a", "steps": 2}, {"Idempotency-Key": "k"}
    first, again = (post(server, json=body, headers=headers) for _ in range(2))
    assert first.json() == again.json()  # not another random seed
    assert post(server, json={"prompt": "b"}, headers=headers).status_code == 409
    thread = long_request(server, "kept", **{"Idempotency-Key": "other"})
    requests.delete(f"{server.url}/v1/jobs/kept", timeout=60)
    thread.join(30)
    headers = {"Idempotency-Key": "other", "x-request-id": "kept"}
    assert post(server, json=body, headers=headers).ok  # a cancelled request uses up neither key nor id
    again = post(server, json=body, headers={"x-request-id": "kept"})
    assert (again.status_code, again.headers["x-should-retry"]) == (409, "false")


def test_idempotency_key_keeps_the_form_of_the_response(server):
    body, headers = {"prompt": "a", "steps": 2, "n": 2}, {"Idempotency-Key": "url"}
    first, again = (post(server, json=body | {"response_format": "url"}, headers=headers) for _ in range(2))
    assert first.json() == again.json()
    body |= {"stream": True, "partial_images": 1}
    first, again = (events_in(post(server, json=body, headers={"Idempotency-Key": "stream"}).text) for _ in range(2))
    assert [event for event in first if event["type"] == "image_generation.completed"] == again
    assert len(again) == 2
    (event,) = events_in(post(server, json={"prompt": "smile " * 100, "steps": 1, "stream": True}).text)
    assert "truncated" in event["notes"][0]


def test_requests_with_one_idempotency_key_at_the_same_time(server):
    files = {"image": encoded(photograph()), "mask": hole(200)}
    send = lambda _: post(  # noqa: E731
        server, "images/edits", data={"prompt": "a", "steps": 2}, files=files, headers={"Idempotency-Key": "many"}
    )
    with ThreadPoolExecutor(4) as pool:
        answers = list(pool.map(send, range(4)))
    assert [answer.status_code for answer in answers] == [200] * 4
    assert len({answer.text for answer in answers}) == 1


def test_retries_at_the_same_time(server):
    """Of a cancelled request: they are one job, whose image stays."""
    headers, url = {"x-request-id": "tried", "Idempotency-Key": "tried"}, f"{server.url}/v1/jobs/tried"
    with ThreadPoolExecutor(6) as pool:
        first = pool.submit(post, server, json={"prompt": "a", "steps": 100, "n": 10}, headers=headers)
        wait_for(lambda: requests.get(url, timeout=60).ok)
        assert requests.delete(url, timeout=60).json()["state"] == "cancelled"
        assert first.result().status_code == 409
        retry = lambda _: post(server, json={"prompt": "a", "steps": 10}, headers=headers)  # noqa: E731
        answers = list(pool.map(retry, range(6)))
    assert [answer.status_code for answer in answers] == [200] * 6
    assert len({answer.text for answer in answers}) == 1
    assert requests.get(f"{url}/images/0", timeout=60).ok


def test_a_retry_leaves_a_job_that_another_retry_started(tmp_path):
    """Both found the same incomplete job; the second removes neither the job of the first nor its key."""
    store = Store(tmp_path / "what? a%20b")
    store.create("a", owner="", request="", key="k")
    store.finish("a", "cancelled")
    store.remove("a", states=INCOMPLETE)
    store.create("a", owner="", request="", key="k")
    store.remove("a", states=INCOMPLETE)
    store.release("k")
    assert store.find_key("k")["state"] == "queued"
    store.remove("a")  # as not accepted
    assert store.find_key("k") is None
    store.close()
    assert [file.name for file in tmp_path.iterdir()] == ["what? a%20b"]


def test_a_shutdown_during_a_long_step(tmp_path, monkeypatch):
    """The server cancels the request before the step is complete; the error has the form of all others."""
    step = engine.advance
    with ThreadPoolExecutor(1) as pool, serving(tmp_path, shutdown=0, graceful=1) as server:
        monkeypatch.setattr(engine, "advance", lambda *given, **options: (time.sleep(4), step(*given, **options)))
        answer = pool.submit(post, server, json={"prompt": "a"})
        wait_for(lambda: figure(server, "likeness_running_images"))
    assert (answer.result().status_code, answer.result().json()["error"]["code"]) == (503, "interrupted")


def test_a_shutdown_interrupts_long_jobs(tmp_path):
    """Every form of request gets an error when the time is over, and the job is stored as interrupted."""
    body, kinds = {"prompt": "a", "steps": 100, "n": 10}, {"plain": {}, "stream": {"stream": True}, "kept": {}}
    with ThreadPoolExecutor(3) as pool:
        with serving(tmp_path, shutdown=0.5) as server:
            headers = {id: {"x-request-id": id} for id in kinds}
            headers["kept"]["Idempotency-Key"] = "k"
            sent = {id: pool.submit(post, server, json=body | more, headers=headers[id]) for id, more in kinds.items()}
            wait_for(lambda: figure(server, "likeness_running_images") + figure(server, "likeness_queue_length") == 30)
        answers = {id: answer.result() for id, answer in sent.items()}
    assert [answers[id].status_code for id in ("plain", "kept")] == [503, 503]
    assert events_in(answers["stream"].text)[-1]["error"]["code"] == "interrupted"
    store = Store(tmp_path)
    for id in kinds:
        row = store.find(id, "")
        assert (row["state"], row["error"]["code"]) == ("interrupted", "interrupted")
        assert "is shutting down" in row["error"]["message"]
    store.close()


@pytest.fixture
def database(request):
    """URL of the database: SQLite in the folder, or a PostgreSQL server of its own."""
    if request.param == "sqlite":
        yield None
        return
    programs = sorted(Path("/usr/lib/postgresql").glob("*/bin/initdb"))
    if not programs or (os.getuid() == 0 and "postgres" not in {user.pw_name for user in pwd.getpwall()}):
        pytest.skip("PostgreSQL is not installed: apt-get install postgresql")
    pytest.importorskip("psycopg", reason="the driver is not installed: pip install 'psycopg[binary]'")
    user = {"user": "postgres"} if os.getuid() == 0 else {}  # it does not run as root
    with tempfile.TemporaryDirectory() as folder:  # a short path, for the socket
        if user:
            shutil.chown(folder, "postgres")
        command = [programs[-1].with_name("pg_ctl"), "-D", f"{folder}/data", "-l", f"{folder}/log", "-w"]
        initdb = [programs[-1], "-D", f"{folder}/data", "-U", "postgres", "--no-sync"]
        subprocess.run(initdb, check=True, capture_output=True, **user)
        start = [*command, "-o", f"-k {folder} -c listen_addresses= -c fsync=off", "start"]
        subprocess.run(start, check=True, stdout=subprocess.DEVNULL, **user)
        try:
            yield f"postgresql+psycopg://postgres@/postgres?host={folder}"
        finally:
            subprocess.run([*command, "-m", "immediate", "stop"], check=True, stdout=subprocess.DEVNULL, **user)


@pytest.mark.parametrize("database", ["sqlite", "postgresql"], indirect=True)
def test_restart(tmp_path, database):
    with serving(tmp_path, database=database) as server:
        headers = {"x-request-id": "done", "Idempotency-Key": "k"}
        first = post(server, json={"prompt": "a"}, headers=headers).json()
        before = requests.get(f"{server.url}/v1/jobs/done/images/0", timeout=60).content
    store, other = Store(tmp_path, database, "one"), Store(tmp_path, database, "two")
    store.create("killed", owner="", request="", key="own")  # as a process that was killed leaves it
    other.create("elsewhere", owner="", request="")
    for taken in ({"id": "killed"}, {"id": "new", "key": "own"}):
        with pytest.raises(Taken):
            other.create(**taken, owner="", request="")
    (tmp_path / "images" / "killed").mkdir()
    store.close()
    with serving(tmp_path, database=database, replica="one") as server:
        job = lambda id: requests.get(f"{server.url}/v1/jobs/{id}", timeout=60).json()  # noqa: E731
        assert requests.get(job("done")["result"]["data"][0]["url"], timeout=60).content == before
        assert post(server, json={"prompt": "a"}, headers=headers).json() == first
        assert not (tmp_path / "images" / "killed").exists()
        assert job("killed")["state"] == job("killed")["error"]["code"] == "interrupted"
        assert job("elsewhere")["state"] == "queued"
    other.release("own")
    other.create("again", owner="", request="", key="own")
    other.finish("elsewhere", "completed", response={"id": "elsewhere"}, files=[])
    assert other.find("elsewhere", "")["response"] == {"id": "elsewhere"}
    upload = other.add_upload(b"content", ".png")
    other.expire(3600)
    assert other.find_upload(upload).read_bytes() == b"content"
    assert other.expire(-1) == 3
    assert other.find_upload(upload) is None
    assert other.find("done", "")["state"] == "expired"
    other._update(JOBS.c.id == "done", finished=time.time() - FORGOTTEN - 1)
    other.expire(0)
    assert other.find("done", "") is None
    other.close()


@pytest.mark.parametrize("database", ["sqlite", "postgresql"], indirect=True)
def test_two_replicas(tmp_path, database):
    """Each replica knows the progress of the other's jobs, cancels them, and waits for their results."""
    shared = {"database": database or f"sqlite:///{tmp_path / 'jobs.sqlite'}"}
    with ThreadPoolExecutor(8) as pool:  # replicas that start at the same time
        for store in pool.map(lambda name: Store(tmp_path, shared["database"], name), "abcdefgh"):
            store.close()
    with serving(tmp_path, **shared, replica="one") as one, serving(tmp_path, **shared, replica="two") as two:
        body, headers = {"prompt": "a", "n": 10, "steps": 100}, {"x-request-id": "long"}
        url, key = f"{two.url}/v1/jobs/long", {"Idempotency-Key": "k"}
        with ThreadPoolExecutor(2) as pool:
            first = pool.submit(post, one, json=body, headers=headers)
            wait_for(lambda: 0 < requests.get(url, timeout=60).json().get("progress", 0) < 1)
            assert requests.get(url, timeout=60).json()["state"] == "running"
            assert requests.delete(url, timeout=60).json()["state"] == "cancelled"
            assert first.result().status_code == 409
            body, headers = {"prompt": "a", "n": 4, "steps": 20}, key
            first = pool.submit(post, one, json=body, headers=headers)
            wait_for(lambda: figure(one, "likeness_running_images"))
            second = pool.submit(post, two, json=body, headers=headers)
            assert second.result().json() == first.result().json()
        store = Store(tmp_path, shared["database"], "three")
        store.create("lost", owner="", request="")  # its replica has reported nothing for a minute
        store._update(JOBS.c.id == "lost", seen=time.time() - LOST - 1)
        one.store.expire(3600)
        assert requests.get(f"{two.url}/v1/jobs/lost", timeout=60).json()["state"] == "interrupted"
        store.close()


# Conditions and masks


def test_conditions_and_masks(server):
    files = {"image": MASK.read_bytes()}
    for name in ("mask", "sketch"):
        found = post(server, f"conditions/{name}", files=files, data={"size": "64"}).json()
        assert Image.open(io.BytesIO(base64.b64decode(found["b64_json"]))).size == (64, 64)
        assert not found["aligned"]
        assert post(server, json={"prompt": "a", "steps": 1, "control_image": {name: found["id"]}}).ok
    report = post(server, "inspect", files={"file": MASK.read_bytes()}).json()
    assert report["condition"] == "mask"
    assert {"hair", "skin"} <= {found["name"] for found in report["classes"]}
    assert post(server, "inspect", files={"file": POINTS.read_bytes()}).json()["condition"] == "keypoints"
    mask = report["id"]
    for edit in (
        {"operation": "grow", "classes": ["hair"], "by": "4"},
        {"operation": "shrink", "classes": ["hair"], "by": "4"},
        {"operation": "remove", "classes": ["hair"]},
        {"operation": "mirror"},
        {"operation": "paste", "classes": ["hair"], "other": b64(ROOT / "examples/masks/fringe.png")},
        {"operation": "fill", "classes": ["skin"]},
        {"operation": "clean", "classes": ["hair"]},
        {"operation": "rename", "old": "hair", "to": "hat"},
        {"operation": "swap", "classes": ["l_eye", "r_eye"]},
        {"operation": "interpolate", "other": b64(ROOT / "examples/masks/fringe.png")},
    ):
        answer = post(server, "masks/edit", json={"mask": mask, **edit})
        assert answer.ok, answer.text
        assert set(answer.json()) == {"id", "condition", "b64_json", "changes"}
        options = {name: value for name, value in edit.items() if name != "operation"}
        if "other" in options:
            options["other"] = CONDITIONS["mask"].read(ROOT / "examples/masks/fringe.png").raw
        wanted = OPERATIONS[edit["operation"]](CONDITIONS["mask"].read(MASK).raw, **options)
        image = Image.open(io.BytesIO(base64.b64decode(answer.json()["b64_json"])))
        assert (CONDITIONS["mask"].read(image).raw == wanted).all()
    swapped = OPERATIONS["swap"](CONDITIONS["mask"].read(MASK).raw, classes=["l_eye", "r_eye"])
    body = {"mask": base64.b64encode(CONDITIONS["mask"].encode(swapped)).decode(), "prompt": "a bald man"}
    found = post(server, "masks/check", json=body).json()
    assert "hair" in str(found["contradictions"])
    assert "swap" in str(found["problems"])
    body["prompt"] = "a man " * 1000 + "who is bald"  # beyond what is checked
    assert post(server, "masks/check", json=body).json()["contradictions"] == []
    image = server.client.images.generate(prompt="a man", extra_body={"seed": 5, "steps": 1}).data[0].b64_json
    request = post(server, "recipes", files={"image": base64.b64decode(image)}).json()
    assert (request["prompt"], request["seed"]) == ("a man", 5)


def test_model_information(server):
    told = requests.get(f"{server.url}/v1/capabilities", timeout=60).json()
    assert told["sizes"] == ["32x32"]
    assert told["conditions"] == ["mask", "sketch", "keypoints"]
    assert told["batch_size"] == 1
    assert told["seconds_per_image"] > 0
    assert {"mask_side", "mask_edit", "photo_pixels", "candidates"} <= set(told["limits"])
    assert requests.get(f"{server.url}/healthz", timeout=60).json() == {"status": "ok"}


def test_openapi(server):
    """Every body is described, and errors in the form in which they are sent."""
    paths = requests.get(f"{server.url}/openapi.json", timeout=60).json()["paths"]
    posted = {path: found["post"] for path, found in paths.items() if "post" in found}
    assert [path for path, found in posted.items() if "requestBody" not in found] == []
    form = posted["/v1/images/edits"]["requestBody"]["content"]["multipart/form-data"]["schema"]
    assert {"image", "mask", "prompt", "region"} <= set(form["properties"])
    assert form["required"] == ["image", "prompt"]
    responses = [method["responses"] for found in paths.values() for method in found.values()]
    assert [found for found in responses if "422" in found or "default" not in found] == []


# The command


def test_options_of_the_command(tmp_path):
    """Keys, limits and the metadata of images arrive in the service."""
    tiny_pipeline().save_pretrained(tmp_path / "model")
    (tmp_path / "keys").write_text("\ufeffone\n\n two \n")
    given = {"model": str(tmp_path / "model"), "data": tmp_path / "data", "api_key_file": tmp_path / "keys"}
    app = Serve(**given, metadata=False, queue=10, max_body=1, max_side=64, max_steps=30).application("")
    with TestClient(app) as client:
        generate = lambda key, **body: client.post(  # noqa: E731
            "/v1/images/generations",
            json={"prompt": "a", "steps": 1, **body},
            headers={"Authorization": f"Bearer {key}"},
        )
        assert generate("three").status_code == 401
        image = generate("one").json()["data"][0]["b64_json"]
        assert generate("two").status_code == 200
        (tmp_path / "image.png").write_bytes(base64.b64decode(image))
        with pytest.raises(InputError, match="no recipe"):
            read_recipe(tmp_path / "image.png")
        assert generate("one", prompt="a" * 2**20).status_code == 413
        assert generate("one", size="128x128", upscale=True).json()["error"]["param"] == "size"
        assert generate("one", steps=31).json()["error"]["param"] == "steps"
        assert generate("one", n=10).status_code == 200
    (tmp_path / "keys").write_text("\n")
    with pytest.raises(InputError, match="contains no API key: write one per line"):
        Serve(**given).application("")


def test_command(tmp_path):
    """`likeness serve` generates with a bundled model; on SIGTERM it completes the stream in progress, and keeps every
    image that it reported.
    """
    data = tmp_path / "data"
    command = [sys.executable, "-m", "likeness.cli", "serve", "--port", "0", "--data", str(data)]
    command += ["--shutdown-timeout", "200"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        url = process.stdout.readline().split()[-1]
        wait_for(lambda: ready(url), 120)
        assert requests.get(f"{url}/healthz", headers={"Host": "evil.example"}, timeout=60).status_code == 403
        client = openai.OpenAI(base_url=f"{url}/v1", api_key="any", max_retries=0)
        body = {"prompt": "a man", "candidates": 1}
        mask = requests.post(f"{url}/v1/masks/propose", json=body, timeout=60).json()
        more = {"steps": 12, "control_image": {"mask": mask["id"]}}
        with client.images.generate(prompt="secret", stream=True, partial_images=2, extra_body=more) as events:
            next(events)
            found = LOAD.terminated(url, process, data, steps=1, count=24)
            assert found["completed"] >= 4
            assert found["lost"] == found["without an end"] == 0
            assert [event.type for event in events][-1] == "image_generation.completed"
        assert process.wait(60) == 128 + signal.SIGTERM
        text = process.stderr.read()
        assert "/v1/images/generations 200" in text
        assert "secret" not in text
    finally:
        process.kill()
        process.communicate()


def ready(url: str) -> bool:
    try:
        return requests.get(f"{url}/readyz", timeout=60).ok
    except requests.ConnectionError:
        return False


def test_data_of_another_version(tmp_path):
    with contextlib.closing(sqlite3.connect(tmp_path / "jobs.sqlite")) as database:
        database.execute("CREATE TABLE jobs (id TEXT PRIMARY KEY, state TEXT)")
    with pytest.raises(InputError, match="another version of likeness: choose another data folder"):
        Store(tmp_path)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"replica": "a" * 65}, "has 65 characters: give --replica one of at most 64"),
        ({"url": "sqlite://"}, "is in memory: give a file"),
    ],
)
def test_invalid_databases(tmp_path, options, message):
    with pytest.raises(InputError, match=message):
        Store(tmp_path, **options)
