"""The studio in a real browser, against a reference rasteriser in Python."""

from __future__ import annotations

import base64
import io
import math
import shutil
import socket
import time
from collections import Counter
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import requests
from PIL import Image

from likeness.conditions import CONDITIONS
from likeness.conditions.mask.classes import CLASSES, COUNTERPART, PALETTE
from likeness.conditions.mask.commands import OPERATIONS
from likeness.data.synthetic import draw_face
from likeness.pipelines.image_recipe import read_recipe
from likeness.serve import engine
from serving import serving

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
pytestmark = pytest.mark.skipif(
    CHROMIUM is None, reason="the studio's tests require chromium (Debian: apt install chromium)"
)
ROOT = Path(__file__).parents[2]
SIDE = 256
FACE = np.asarray(Image.fromarray(draw_face(0, 0, SIDE).mask))


# The reference: the same rules, written for clarity


def disk(size: int, shape: str = "round") -> list[tuple[int, int]]:
    """Pixels of a brush, relative to its position."""
    inside = [
        (x - size // 2, y - size // 2)
        for y in range(size)
        for x in range(size)
        if shape == "square" or (2 * x - size + 1) ** 2 + (2 * y - size + 1) ** 2 <= size * size - size
    ]
    return inside


def bresenham(a: tuple[int, int], b: tuple[int, int]) -> list[tuple[int, int]]:
    (x, y), (dx, dy) = a, (abs(b[0] - a[0]), -abs(b[1] - a[1]))
    sx, sy, error, points = (1 if a[0] < b[0] else -1), (1 if a[1] < b[1] else -1), dx + dy, []
    while True:
        points.append((x, y))
        if (x, y) == b:
            return points
        twice = 2 * error
        if twice >= dy:
            error, x = error + dy, x + sx
        if twice <= dx:
            error, y = error + dx, y + sy


def paint(layer: np.ndarray, pixels, value: int, lock=(), mirror=None) -> None:
    height, width = layer.shape
    for x, y in pixels:
        if 0 <= x < width and 0 <= y < height:
            if not lock or layer[y, x] in lock:
                layer[y, x] = value
            if mirror is not None and (not lock or layer[y, width - 1 - x] in lock):
                layer[y, width - 1 - x] = mirror.get(value, value)


def strokes(points, size: int, shape: str = "round"):
    """Pixels that a brush covers along a path, in order."""
    path = [points[0], *(p for a, b in pairwise(points) for p in bresenham(a, b))]
    return ((x + dx, y + dy) for x, y in path for dx, dy in disk(size, shape))


def area_of(points, height: int):
    """Pixels inside a polygon (even-odd at pixel centers) and of its outline."""
    edges = list(zip(points, [*points[1:], points[0]], strict=True))
    for y in range(height):
        crossings = sorted(
            x0 + ((y - y0) * (x1 - x0)) / (y1 - y0) for (x0, y0), (x1, y1) in edges if (y0 <= y) != (y1 <= y)
        )
        for left, right in zip(crossings[::2], crossings[1::2], strict=False):
            yield from ((x, y) for x in range(math.ceil(left), math.floor(right) + 1))
    for a, b in edges:
        yield from bresenham(a, b)


def region(layer: np.ndarray, x: int, y: int):
    """Connected pixels (4 neighbors) of the value at (x, y)."""
    found, stack = {(x, y)}, [(x, y)]
    while stack:
        x, y = stack.pop()
        for u, v in ((x - 1, y), (x + 1, y), (x, y - 1), (x, y + 1)):
            inside = 0 <= u < layer.shape[1] and 0 <= v < layer.shape[0]
            if inside and (u, v) not in found and layer[v, u] == layer[y, x]:
                found.add((u, v))
                stack.append((u, v))
    return found


def smoothed(layer: np.ndarray) -> np.ndarray:
    out = layer.copy()
    for y in range(layer.shape[0]):
        for x in range(layer.shape[1]):
            counts = Counter(layer[max(0, y - 1) : y + 2, max(0, x - 1) : x + 2].ravel().tolist())
            most = max(counts.values())
            if counts[layer[y, x]] < most:
                out[y, x] = min(value for value, count in counts.items() if count == most)
    return out


# The browser


@pytest.fixture(scope="module")
def browser():
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        found = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox", "--disable-gpu"])
        yield found
        found.close()


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    with serving(tmp_path_factory.mktemp("studio"), studio=True, max_bytes=3_000_000) as found:
        yield found


@pytest.fixture
def page(browser, server):
    """The studio, loaded; at the end there is no error, and no request has left the service."""
    context = browser.new_context(viewport={"width": 1024, "height": 700}, accept_downloads=True)
    page, errors, addresses = context.new_page(), [], []
    page.on("pageerror", lambda error: errors.append(str(error)))
    page.on("console", lambda message: errors.append(message.text) if message.type == "error" else None)
    page.on("request", lambda request: addresses.append(request.url))
    page.set_default_timeout(20_000)
    open_page(page, server)
    page.uncheck("#live", force=True) if page.locator("#live").is_visible() else page.evaluate("live.checked = false")
    yield page
    context.close()
    allowed = ("Failed to load resource", "ERR_INTERNET_DISCONNECTED")  # logged by the browser for every error status
    assert [error for error in errors if not error.startswith(allowed)] == []
    assert [address for address in addresses if not address.startswith((server.url, "blob:", "data:"))] == []


def open_page(page, server) -> None:
    page.goto(f"{server.url}/studio/")
    page.wait_for_selector("html[data-ready]")


def wait(page, condition: str) -> None:
    """Wait until an expression is true. (`wait_for_function` evaluates text, which the page's policy forbids.)"""
    deadline = time.monotonic() + 20
    while not page.evaluate(condition):
        assert time.monotonic() < deadline, (condition, page.inner_text("#status"))
        page.wait_for_timeout(20)


def layer_of(page, name: str = "mask") -> np.ndarray:
    content = page.evaluate(f"studio.doc.layers.{name}.data.reduce((text, v) => text + String.fromCharCode(v), '')")
    return np.frombuffer(content.encode("latin-1"), np.uint8).reshape(SIDE, SIDE)


def put(page, labels: np.ndarray) -> None:
    """Set the mask, as a file would."""
    page.evaluate(
        """content => {
            const {doc, view} = studio;
            doc.history.begin();
            doc.layers.mask.data.set(Uint8Array.from(content, (character) => character.charCodeAt(0)));
            doc.history.commit();
            view.draw();
        }""",
        labels.tobytes().decode("latin-1"),
    )


def drag(page, points, *, button: str = "left", modifiers: tuple[str, ...] = ()) -> list[tuple[int, int]]:
    """Drag the mouse through pixels of the layer; returns the pixels that the page sees."""
    box = page.locator("#canvas").bounding_box()
    view = page.evaluate("({x: studio.view.x, y: studio.view.y, zoom: studio.view.zoom})")
    places = [
        (round(box["x"] + view["x"] + (x + 0.5) * view["zoom"]), round(box["y"] + view["y"] + (y + 0.5) * view["zoom"]))
        for x, y in points
    ]
    for key in modifiers:
        page.keyboard.down(key)
    page.mouse.move(*places[0])
    page.mouse.down(button=button)
    for place in places[1:]:
        page.mouse.move(*place)
    page.mouse.up(button=button)
    for key in modifiers:
        page.keyboard.up(key)
    return [
        (math.floor((x - box["x"] - view["x"]) / view["zoom"]), math.floor((y - box["y"] - view["y"]) / view["zoom"]))
        for x, y in places
    ]


def choose(page, *, tool: str = "brush", value: str = "skin", size: int | None = None) -> None:
    page.locator(f"input[name=tool][value={tool}]").check(force=True)
    page.locator(f"input[name=class][value='{CLASSES.index(value)}']").check(force=True)
    if size is not None:
        page.evaluate(f"studio.state.sizes.{tool} = {size}")


def saved_content(page, button: str) -> bytes:
    with page.expect_download() as download:
        page.click(button)
    return Path(download.value.path()).read_bytes()


def saved(page, button: str) -> Image.Image:
    return Image.open(io.BytesIO(saved_content(page, button)))


PATH = [(40, 60), (90, 70), (130, 140), (60, 200), (10, 250)]


CASES = [
    ("brush", {"size": 1}),
    ("brush", {"size": 9}),
    ("brush", {"size": 14, "shape": "square"}),
    ("brush", {"size": 10, "mirror": True, "value": "l_eye"}),
    ("brush", {"size": 12, "lock": ("hair", "skin"), "value": "hat"}),
    ("eraser", {"size": 11}),
    ("line", {"size": 5}),
    ("contour", {}),
    ("fill", {"value": "cloth"}),
    ("fill", {"value": "cloth", "whole": True}),
]


def test_strokes_equal_the_reference(page):
    """Tools change exactly the pixels that the reference changes; undo takes them back. Saved files have them."""
    for tool, options in CASES:
        value, size = options.get("value", "skin"), options.get("size", 1)
        lock = tuple(CLASSES.index(name) for name in options.get("lock", ()))
        put(page, FACE)
        choose(page, tool=tool, value=value, size=size if "size" in options else None)
        page.set_checked("#square", "shape" in options)
        page.set_checked("#mirror", "mirror" in options)
        for index in lock:
            page.locator(f"input[name=lock][value='{index}']").check()
        points = drag(page, PATH[:1] if tool == "fill" else PATH, modifiers=("Shift",) if options.get("whole") else ())
        for index in lock:
            page.locator(f"input[name=lock][value='{index}']").uncheck()
        wanted, index = FACE.copy(), 0 if tool == "eraser" else CLASSES.index(value)
        if tool == "line":
            points = [points[0], points[-1]]
        if tool == "contour":
            pixels = area_of(points, SIDE)
        elif tool == "fill" and options.get("whole"):
            ((x, y),) = points
            pixels = [(u, v) for v, u in np.argwhere(wanted == wanted[y, x]).tolist()]
        elif tool == "fill":
            pixels = region(wanted, *points[0])
        else:
            pixels = strokes(points, size, options.get("shape", "round"))
        paint(wanted, pixels, index, lock, COUNTERPART if "mirror" in options else None)
        assert (wanted != FACE).any()
        np.testing.assert_array_equal(layer_of(page), wanted, err_msg=f"{tool} {options}")
        page.click("#undo")
        np.testing.assert_array_equal(layer_of(page), FACE)
        page.keyboard.press("Control+Shift+Z")
        np.testing.assert_array_equal(layer_of(page), wanted)
    image = saved(page, "#save-mask")
    np.testing.assert_array_equal(np.asarray(image), wanted)
    assert image.mode == "P"
    assert image.getpalette()[: 3 * len(CLASSES)] == PALETTE.ravel().tolist()
    np.testing.assert_array_equal(np.asarray(saved(page, "#save-index")), wanted)


def test_raster_operations_equal_the_reference(page):
    """Contours that cross themselves, smoothing, and moves: class pixels at their new place, no hole behind them."""
    random = np.random.default_rng(0)
    layer = random.integers(0, 3, (24, 31), dtype=np.uint8)
    call = """async ([name, data, width, height, given]) => {
        const raster = await import('/studio/raster.js');
        const layer = {data: Uint8Array.from(data), width, height};
        if (name === 'smooth') raster.smooth(layer);
        if (name === 'contour') raster.contour(layer, given, raster.painter(layer, 7));
        if (name === 'move') raster.move(layer, raster.pixelsOf(layer, given[0]), given[1], given[2], given[3]);
        return Array.from(layer.data);
    }"""

    def result(name: str, source: np.ndarray, given=None) -> np.ndarray:
        height, width = source.shape
        found = page.evaluate(call, [name, source.ravel().tolist(), width, height, given])
        return np.array(found, np.uint8).reshape(source.shape)

    np.testing.assert_array_equal(result("smooth", layer), smoothed(layer))
    for _ in range(20):
        points = [(int(x), int(y)) for x, y in random.integers(-4, 34, (6, 2))]
        wanted = layer.copy()
        paint(wanted, area_of(points, 24), 7)
        np.testing.assert_array_equal(result("contour", layer, points), wanted)
    nose = CLASSES.index("nose")
    moved = result("move", FACE, [nose, 12, -7, 1])
    np.testing.assert_array_equal(moved == nose, np.roll(nose == FACE, (-7, 12), (0, 1)))
    left = (nose == FACE) & (moved != nose)
    assert set(np.unique(moved[left])) <= set(np.unique(FACE)) - {nose}
    np.testing.assert_array_equal(moved[(nose != FACE) & (moved != nose)], FACE[(nose != FACE) & (moved != nose)])
    larger = result("move", FACE, [nose, 0, 0, 2])
    assert (larger == nose).sum() == pytest.approx(4 * (nose == FACE).sum(), rel=0.1)


def test_undo_and_redo_of_200_random_operations(page):
    """Every state returns exactly, in both directions."""
    put(page, FACE)
    states = page.evaluate("""async () => {
        const raster = await import('/studio/raster.js');
        const { doc } = studio, layers = Object.values(doc.layers), states = [];
        let seed = 1;
        const random = (n) => (seed = (seed * 48271) % 2147483647) % n;
        const sum = ({data}) => data.reduce((sum, value) => (Math.imul(sum, 31) + value) | 0, 7);
        const hash = () => layers.map(sum).join();
        states.push(hash());
        while (states.length <= 200) {
            const layer = layers[random(2)], mirror = random(2) ? {4: 5, 5: 4} : null;
            const put = raster.painter(layer, random(19), {mirror});
            doc.history.begin();
            const point = () => [random(256), random(256)];
            const rows = () => raster.brushRows(1 + random(30), random(2) ? 'round' : 'square');
            const shift = () => random(40) - 20;
            [() => raster.stroke(put, point(), point(), rows()),
             () => raster.fill(layer, ...point(), put, random(2) === 1),
             () => raster.contour(layer, [point(), point(), point()], put),
             () => raster.move(layer, raster.pixelsOf(layer, random(19)), shift(), shift())][random(4)]();
            if (doc.history.commit()) states.push(hash());
        }
        const back = [], forth = [];
        while (back.length < 200) { doc.history.undo(); back.push(hash()); }
        while (forth.length < 200) { doc.history.redo(); forth.push(hash()); }
        return {states, back, forth};
    }""")
    assert states["back"] == states["states"][-2::-1]
    assert states["forth"] == states["states"][1:]
    assert len(set(states["states"])) > 150


def test_files_open_in_every_form(page, tmp_path):
    """Index and palette PNG, an array, a sketch: their content arrives; other files are rejected with a sentence."""
    indices, colors, array, sketch = (tmp_path / name for name in ("i.png", "p.png", "m.npy", "s.png"))
    Image.fromarray(FACE).save(indices)
    Image.fromarray(PALETTE[FACE]).save(colors)
    np.save(array, FACE)
    drawing = draw_face(0, 0, SIDE).sketch
    Image.fromarray(drawing).save(sketch)
    for file in (indices, colors, array):
        put(page, np.zeros_like(FACE))
        open_file(page, file)
        wait(page, "studio.doc.hasMask")
        np.testing.assert_array_equal(layer_of(page), FACE)
    open_file(page, sketch)
    wait(page, "studio.doc.hasSketch")
    np.testing.assert_array_equal(layer_of(page, "sketch"), CONDITIONS["sketch"].read(sketch).raw)
    np.testing.assert_array_equal(np.asarray(saved(page, "#save-sketch")), layer_of(page, "sketch"))
    page.locator("input[name=layer][value=mask]").check(force=True)
    (tmp_path / "text.png").write_text("no image")
    Image.new("1", (12000, 12000)).save(tmp_path / "huge.png")
    with Image.open(ROOT / "examples/faces/images/1.png") as photo:
        photo.convert("RGB").save(tmp_path / "photo.jpg")
    Image.new("RGB", (64, 64), "teal").save(tmp_path / "wall.png")
    choose(page, value="necklace")
    for button, name, words in (
        ("#open", "text.png", "not a readable image"),
        ("#open", "huge.png", "pixels"),
        ("#open", "photo.jpg", "photo.jpg is neither a mask nor a sketch"),
        ("#photo", "wall.png", "shows no face"),
        ("#paste", "i.png", "no necklace"),
    ):
        open_file(page, tmp_path / name, button)
        wait(page, f"document.getElementById('status').textContent.includes({words!r})")
        np.testing.assert_array_equal(layer_of(page), FACE)


def open_file(page, file: Path, button: str = "#open") -> None:
    with page.expect_file_chooser() as chooser:
        page.click(button)
    chooser.value.set_files(file)


def test_a_dropped_image_restores_its_request(page, server):
    """Prompt, seed, strength and mask of an image that likeness made."""
    mask = base64.b64encode(CONDITIONS["mask"].encode(FACE)).decode()
    answer = server.client.images.generate(
        prompt="a man with a hat", extra_body={"seed": 77, "control_image": {"mask": mask}, "conditioning_scale": 0.5}
    )
    page.fill("#prompt", "my prompt")  # has the focus
    page.evaluate(
        """content => {
            const bytes = Uint8Array.from(atob(content), (c) => c.charCodeAt(0)), data = new DataTransfer();
            data.items.add(new File([bytes], 'face.png', {type: 'image/png'}));
            window.dispatchEvent(new DragEvent('drop', {dataTransfer: data}));
        }""",
        answer.data[0].b64_json,
    )
    wait(page, "studio.doc.hasMask")
    assert page.input_value("#prompt") == "a man with a hat"
    assert page.input_value("#seed") == "77"
    assert page.evaluate("studio.doc.values.maskScale") == 0.5
    np.testing.assert_array_equal(layer_of(page), FACE)
    page.click("#undo")  # brings back all that the image replaced
    assert not page.evaluate("studio.doc.hasMask")
    assert (page.input_value("#prompt"), page.input_value("#seed")) == ("my prompt", "1")
    page.click("#redo")
    assert page.input_value("#prompt") == "a man with a hat"


def test_an_image_with_a_seed_that_the_page_cannot_represent(page, server, tmp_path):
    answer = server.client.images.generate(prompt="a man", extra_body={"seed": 2**53 + 1, "steps": 1})
    (tmp_path / "face.png").write_bytes(base64.b64decode(answer.data[0].b64_json))
    open_file(page, tmp_path / "face.png")
    wait(page, "document.getElementById('status').textContent.includes('2^53')")
    assert (page.input_value("#seed"), page.input_value("#prompt")) == ("1", "")


def test_sketches_of_other_shapes(page, tmp_path):
    """They are padded to a square, and thin lines of large ones stay."""
    sketch = Image.new("L", (2048, 1024), 255)
    for y in range(24, 1024, 100):
        sketch.paste(0, (0, y, 2048, y + 3))
    sketch.save(tmp_path / "sketch.png")
    open_file(page, tmp_path / "sketch.png", "#open")
    wait(page, "studio.doc.hasSketch")
    found = layer_of(page, "sketch")
    assert (found[:64] == 255).all()
    assert (found[192:] == 255).all()
    rows = np.flatnonzero(found.min(axis=1) < 220)
    assert len({row - 1 if row - 1 in rows else row for row in rows}) >= 10


def test_keys(page):
    """Tools, size, mirror, lock, layer, erase while a key is held, Alt picks, panning, help."""
    put(page, FACE)
    page.locator("#canvas").focus()
    for key, tool in (("f", "fill"), ("e", "eraser"), ("b", "brush")):
        page.keyboard.press(key)
        assert page.evaluate("studio.state.tool") == tool
    size = page.evaluate("studio.state.sizes.brush")
    page.keyboard.press("]")
    page.keyboard.press("[")
    assert page.evaluate("studio.state.sizes.brush") == size
    page.keyboard.press("r")
    assert page.is_checked("#mirror")
    page.keyboard.press("r")
    page.keyboard.press("k")
    assert page.is_checked("input[name=lock][value='1']")
    page.keyboard.press("k")
    x, y = np.argwhere(CLASSES.index("hair") == FACE)[0][::-1].tolist()
    drag(page, [(x, y)], modifiers=("Alt",))
    assert page.evaluate("studio.state.value") == CLASSES.index("hair")
    page.keyboard.down("x")
    ((x, y),) = drag(page, [(128, 128)])
    page.keyboard.up("x")
    assert layer_of(page)[y, x] == 0
    before = page.evaluate("studio.view.x")
    page.keyboard.down(" ")
    drag(page, [(100, 100), (140, 100)])
    page.keyboard.up(" ")
    assert page.evaluate("studio.view.x") > before
    page.keyboard.press("0")
    assert page.evaluate("studio.view.x") == before
    painted = layer_of(page)
    page.check("input[name=tool][value=brush]")  # has the focus now
    page.locator("#canvas").hover()
    page.keyboard.down(" ")
    drag(page, [(100, 100), (140, 100)])
    page.keyboard.up(" ")
    assert page.evaluate("studio.view.x") > before
    np.testing.assert_array_equal(layer_of(page), painted)
    page.keyboard.press("v")
    assert page.evaluate("studio.state.layer") == "sketch"
    page.keyboard.press("?")
    assert page.locator("#keys").is_visible()


def test_touch_and_pen(page):
    """Two or three fingers zoom and paint nothing, whichever is lifted first; nor does the hand that holds a pen. Undo
    during a stroke drops it.
    """
    session, box = page.context.new_cdp_session(page), page.locator("#canvas").bounding_box()
    x, y = box["x"] + box["width"] / 2, box["y"] + box["height"] / 2

    def touch(*fingers: tuple[int, float], kind: str = "touchMove") -> None:
        points = [{"id": id, "x": x + right, "y": y + 10 * id} for id, right in fingers]
        session.send("Input.dispatchTouchEvent", {"type": kind, "touchPoints": points})

    def pen(kind: str, right: float) -> None:
        event = {"type": kind, "x": x + right, "y": y, "button": "left", "pointerType": "pen", "force": 0.5}
        session.send("Input.dispatchMouseEvent", {**event, "clickCount": 1})

    zoom = page.evaluate("studio.view.zoom")
    touch((0, 0), kind="touchStart")
    touch((0, 20))
    touch((0, 20), (1, -20), kind="touchStart")
    touch((0, 20), (1, -20), (2, 0), kind="touchStart")
    touch((0, 60), (1, -60), (2, 0))
    touch((1, -60), (2, 0), kind="touchEnd")
    touch((1, -60), (2, 30))
    touch((2, 30), kind="touchEnd")
    touch((2, 90))
    touch(kind="touchEnd")
    assert page.evaluate("studio.view.zoom") > 1.5 * zoom
    assert not layer_of(page).any()
    touch((0, 0), kind="touchStart")
    touch((0, 20))
    touch(kind="touchEnd")
    painted = layer_of(page)
    assert painted.any()
    page.click("#undo")
    touch((0, 0), kind="touchStart")  # a stroke that a second finger interrupts stays
    touch((0, 20))
    page.wait_for_timeout(400)
    touch((0, 20), (1, -20), kind="touchStart")
    touch(kind="touchEnd")
    assert layer_of(page).any()
    page.click("#undo")
    assert not layer_of(page).any()
    pen("mousePressed", 0)
    touch((0, 100), kind="touchStart")
    pen("mouseMoved", 20)
    touch((0, -100))
    pen("mouseReleased", 20)
    touch(kind="touchEnd")
    assert 0 < layer_of(page).sum() < painted.sum()  # thinner: half the pressure
    before = layer_of(page)
    put(page, FACE)
    page.mouse.move(x, y)
    page.mouse.down()
    page.mouse.move(x + 50, y)
    page.keyboard.press("Control+Z")
    page.mouse.move(x + 80, y)
    page.mouse.up()
    np.testing.assert_array_equal(layer_of(page), FACE)
    page.keyboard.press("Control+Z")
    np.testing.assert_array_equal(layer_of(page), before)


def test_controls_have_names_and_the_keyboard_leaves_the_canvas(page):
    names = "[...document.querySelectorAll('button, input:not([hidden]), textarea, canvas')].filter((each) =>"
    names += " !each.labels?.length && !each.ariaLabel && !each.textContent.trim()).map((each) => each.outerHTML)"
    assert page.evaluate(names) == []
    named = "(selector) => [...document.querySelectorAll(selector)].filter((each) =>"
    named += " !document.getElementById(each.getAttribute('aria-labelledby')))"
    assert page.evaluate(f"({named})('dialog').map((each) => each.id)") == []
    assert page.locator("div[aria-label]:not([role])").count() == 0
    page.locator("#canvas").focus()
    page.keyboard.press("Shift+Tab")
    assert page.evaluate("document.activeElement.id") != "canvas"


@pytest.mark.parametrize("size", [(1024, 700), (768, 1024), (390, 844)])
def test_the_page_fits_the_screen(page, size):
    """The page itself does not scroll, and the canvas stays in view while the controls are used."""
    page.set_viewport_size(dict(zip(("width", "height"), size, strict=True)))
    for control in ("#grow", "#variations", "#save-image", "#undo"):
        page.locator(control).scroll_into_view_if_needed()
        assert page.evaluate("[scrollX, scrollY, document.body.scrollWidth <= innerWidth]") == [0, 0, True]
        box = page.locator("#canvas").bounding_box()
        assert min(box["width"], box["height"]) > 280
        assert 0 <= box["x"] <= size[0] - box["width"]
        assert 0 <= box["y"] <= size[1] - box["height"]


def figures(server) -> dict[str, float]:
    """The figures of /metrics without parameters, and the images by result."""
    rows = [row.split() for row in requests.get(f"{server.url}/metrics", timeout=9).text.splitlines()]
    return {name.removeprefix("likeness_"): float(value) for name, value, *_ in rows if name.startswith("likeness_")}


def test_a_preview_appears_and_a_newer_one_cancels_it(page, server, monkeypatch):
    """A stroke starts a preview, then the full image; a stroke during a job cancels it in the service, too."""
    page.evaluate("document.getElementById('live').checked = true")
    choose(page, tool="brush", value="skin", size=40)
    drag(page, PATH)
    page.wait_for_selector("#timing[data-kind=full]")
    assert page.locator("#image").is_visible()
    assert page.locator("#history img").count() == 1
    page.evaluate("studio.live.rest = 4000; studio.live.start('preview')")  # it can be saved before the full image
    page.wait_for_selector("#timing[data-kind=preview]")
    with page.expect_download() as download:
        page.click("#save-image")
    assert Image.open(download.value.path()).format == "JPEG"
    assert download.value.suggested_filename.endswith(".jpeg")
    page.wait_for_selector("#timing[data-kind=full]")
    page.evaluate("document.getElementById('timing').dataset.kind = ''")
    page.evaluate("studio.live.start('preview'); studio.live.start('preview')")  # as of two strokes at once
    page.wait_for_selector("#timing[data-kind=full]")
    assert page.evaluate("studio.live.cancelled") == 1
    assert page.evaluate("studio.live.job") is None
    for start in ("preview", "full"):  # a change and then variations: only the change still needs its image
        page.evaluate("document.getElementById('timing').dataset.kind = ''; studio.live.rest = 200")
        page.evaluate(f"document.getElementById('strip').replaceChildren(); studio.live.start('{start}')")
        if start == "full":
            page.wait_for_selector("#timing[data-kind=full]")
            page.evaluate("document.getElementById('timing').dataset.kind = ''")
        page.click("#variations")
        page.wait_for_selector("#strip button:nth-child(4)")
        page.wait_for_timeout(1000)
        assert page.get_attribute("#timing", "data-kind") == ("full" if start == "preview" else "")
    page.evaluate("studio.live.rest = 4000; studio.live.start('preview')")  # and so not after a return to an image
    page.wait_for_selector("#timing[data-kind=preview]")
    page.evaluate("studio.live.rest = 200; document.getElementById('strip').replaceChildren()")
    page.click("#history img")
    page.evaluate("document.getElementById('timing').dataset.kind = ''")
    page.click("#variations")
    page.wait_for_selector("#strip button:nth-child(4)")
    page.wait_for_timeout(1000)
    assert page.get_attribute("#timing", "data-kind") == ""
    advance = engine.advance
    monkeypatch.setattr(engine, "advance", lambda *given, **options: (time.sleep(0.2), advance(*given, **options)))
    before = figures(server).get('images_total{result="cancelled"}', 0)
    page.evaluate("studio.live.start('full')")
    deadline = time.monotonic() + 20
    while not figures(server)["running_images"]:
        page.wait_for_timeout(20)
        assert time.monotonic() < deadline
    page.evaluate("studio.live.start('preview')")
    while figures(server).get('images_total{result="cancelled"}', 0) == before:
        page.wait_for_timeout(20)
        assert time.monotonic() < deadline
    assert 'images_total{result="failed"}' not in figures(server)


def test_work_survives_a_lost_service_and_a_reload(page, server):
    """Without a connection a stroke stays and the page says so; it reconnects; a reload brings the work back."""
    page.evaluate("document.getElementById('live').checked = true")
    page.context.set_offline(True)
    drag(page, PATH)
    wait(page, "document.getElementById('status').textContent.includes('does not answer')")
    painted = layer_of(page)
    assert painted.any()
    page.context.set_offline(False)
    page.wait_for_selector("#timing[data-kind=full]")
    page.fill("#prompt", "a woman")
    page.fill("#seed", "")  # is ignored
    page.reload()
    page.wait_for_selector("html[data-ready]")
    page.wait_for_selector("#problems li")
    assert page.input_value("#seed") == "1"
    np.testing.assert_array_equal(layer_of(page), painted)
    assert page.input_value("#prompt") == "a woman"
    other = page.context.new_page()  # another tab has work of its own
    open_page(other, server)
    assert not layer_of(other).any()
    other.add_init_script("Object.defineProperty(window, 'sessionStorage', {get() { throw new Error('forbidden'); }})")
    open_page(other, server)
    drag(other, PATH)
    assert layer_of(other).any()
    other.close()


def test_a_service_that_cannot_generate_is_asked_once(page, server):
    """The page waits until the service is ready; if it then has another model, the page is loaded again."""
    page.evaluate("document.getElementById('live').checked = true")
    broken = {"status": 503, "json": {"error": {"message": "The warm-up image failed", "code": "not_ready"}}}
    sent, about = [], requests.get(f"{server.url}/v1/capabilities", timeout=9).json() | {"model": "other"}
    page.route("**/v1/images/generations", lambda route: (sent.append(route), route.fulfill(**broken)))
    page.route("**/readyz", lambda route: route.fulfill(**broken))
    drag(page, PATH)
    painted = layer_of(page)
    page.wait_for_timeout(3500)
    assert len(sent) == 1
    assert page.inner_text("#status") == "The warm-up image failed"
    page.route("**/v1/capabilities", lambda route: route.fulfill(json=about))
    with page.expect_event("load"):
        page.unroute("**/readyz")
    page.wait_for_selector("html[data-ready]")
    np.testing.assert_array_equal(layer_of(page), painted)


def test_a_response_that_is_cut_off(page):
    page.route("**/v1/images/generations", lambda route: route.fulfill(status=200, body='{"data": ['))
    page.click("#generate")
    wait(page, "document.getElementById('status').textContent.includes('does not answer')")


def test_a_stroke_stays_on_its_layer(page):
    """The result of an operation waits for the end of a stroke on the sketch."""
    put(page, FACE)
    choose(page, tool="brush", value="hair", size=8)
    page.locator("input[name=layer][value=sketch]").check(force=True)
    held = []
    page.route("**/v1/masks/edit", lambda route: held.append(route))
    page.click("#grow")
    while not held:
        page.wait_for_timeout(20)
    box = page.locator("#canvas").bounding_box()
    x, y = box["x"] + box["width"] / 2, box["y"] + box["height"] / 2
    page.mouse.move(x, y)
    page.mouse.down()
    with page.expect_response("**/v1/masks/edit"):
        held[0].continue_()
    page.wait_for_timeout(500)
    assert page.evaluate("studio.state.layer") == "sketch"
    page.mouse.move(x + 60, y)
    page.mouse.up()
    wait(page, "studio.state.layer === 'mask'")
    np.testing.assert_array_equal(layer_of(page), OPERATIONS["grow"](FACE, classes=["hair"], by="1"))
    assert (layer_of(page, "sketch") == 0).any(axis=0).sum() > 20


def test_a_frame_of_an_animation_has_its_own_mask(page):
    """While it plays, the image that is shown can be saved; a click on a frame shows the mask that made it."""
    put(page, FACE)
    open_file(page, ROOT / "examples/masks/hat.png", "#interpolate")
    page.wait_for_selector("#strip button:nth-child(7)", timeout=120_000)
    wait(page, "!document.getElementById('save-image').disabled")
    shown = "[...document.querySelectorAll('#strip button')].some(({entry}) => entry === studio.results.current)"
    assert page.evaluate(shown)
    page.locator("#strip button").last.click()
    np.testing.assert_array_equal(layer_of(page), CONDITIONS["mask"].read(ROOT / "examples/masks/hat.png").raw)
    assert page.inner_text("#note") == ""


def test_redo_brings_back_what_was_typed(page):
    page.fill("#prompt", "first")
    page.evaluate("studio.doc.history.begin(); studio.doc.replace({}, {prompt: ''})")
    page.fill("#prompt", "a long description")
    for button, prompt in (("#undo", "first"), ("#redo", "a long description")):
        page.click(button)
        assert page.input_value("#prompt") == prompt


def test_problems_have_corrections(page):
    """Swapped eyes are named and corrected by one click; so is a hat that the sentence denies."""
    swapped = FACE.copy()
    swapped[FACE == 4], swapped[FACE == 5] = 5, 4
    swapped[:20] = CLASSES.index("hat")
    put(page, swapped)
    swapped[150, 20:23], swapped[FACE == 11] = CLASSES.index("cloth"), 6
    put(page, swapped)
    page.fill("#prompt", "a woman without a hat")
    page.wait_for_selector("#problems li")
    text = page.inner_text("#problems")
    assert "the person's left eye is left of the person's right eye: the sides look swapped" in text
    page.click("#problems li[data-kind=contradiction] button")
    wait(page, "!studio.doc.layers.mask.data.includes(14)")
    page.click("#problems li[data-kind=swapped-sides] button")
    page.wait_for_selector("#problems li[data-kind=swapped-sides]", state="detached")
    page.click("#problems li[data-kind=specks]:has-text('clothes') button")
    wait(page, "studio.doc.layers.mask.data[150 * 256 + 20] !== 18")
    labels = layer_of(page)
    np.testing.assert_array_equal(labels[FACE == 4], 4)
    np.testing.assert_array_equal(labels[FACE == 5], 5)
    choose(page, value="hair")
    position = page.evaluate("studio.doc.history.position")
    page.evaluate("[1, 2, 3].forEach(() => document.getElementById('grow').click())")
    wait(page, f"studio.doc.history.position === {position + 3}")
    for _ in range(3):
        labels = OPERATIONS["grow"](labels, classes=["hair"], by="1")
    np.testing.assert_array_equal(layer_of(page), labels)


def test_painting_on_a_photograph_changes_only_what_was_painted(page, server):
    """A photograph is parsed; a stroke on its mask regenerates that region and no pixel outside it."""
    open_file(page, ROOT / "examples/faces/images/1.png", "#photo")
    wait(page, "studio.doc.hasMask")
    page.wait_for_selector("#history img")
    for key, edited in (("z", False), ("y", True)):
        page.keyboard.press(f"Control+{key}")
        assert page.evaluate("[studio.doc.photo !== null, studio.doc.hasMask]") == [edited, edited]
    page.evaluate("document.getElementById('live').checked = true")
    choose(page, tool="brush", value="hat", size=30)
    drag(page, [(60, 20), (190, 24)])
    page.wait_for_selector("#timing[data-kind=full]")
    assert page.inner_text("#note").startswith("Certificate: 0 pixels changed outside")
    page.click("#variations")
    page.wait_for_selector("#strip button:nth-child(4)")
    page.locator("#strip button").last.click()
    assert page.inner_text("#note").startswith("Certificate: 0 pixels changed outside")
    assert page.input_value("#seed") == "4"
    assert read_recipe(saved_content(page, "#save-image"))[0]["edit"]["certificate"]["changed_inside"] > 0
    note = "document.getElementById('note').textContent"
    page.click("#examples")  # ends the edit
    page.click("#choose button:has(img[alt='glasses'])")
    wait(page, f"document.getElementById('timing').dataset.kind === 'full' && {note} === ''")
    example = CONDITIONS["mask"].read(ROOT / "examples/masks/glasses.png").raw
    np.testing.assert_array_equal(layer_of(page), example)
    page.click("#examples")
    wait(page, "[...document.querySelectorAll('#choose img')].every(({naturalWidth}) => naturalWidth === 256)")
    assert page.locator("#choose img").count() == len(list((ROOT / "examples/masks").iterdir()))
    page.keyboard.press("Escape")
    page.locator("#history button").last.click()  # the photograph
    drag(page, [(60, 20), (190, 24)])
    wait(page, f"document.getElementById('timing').dataset.kind === 'full' && {note}.startsWith('Certificate')")
    page.click("#comparison")
    page.locator("#history button").last.click()
    assert page.locator("#compare").is_visible()
    page.click("#comparison")
    assert page.locator("#compare").is_hidden()


def test_the_page_needs_no_key_but_the_service_does(tmp_path, browser):
    """With API keys the page loads and takes its key from the address; nothing may be loaded from elsewhere."""
    with serving(tmp_path, studio=True, keys=("sec+ret&",)) as server:
        for path in ("", "studio"):
            answer = requests.get(f"{server.url}/{path}", timeout=9)
            assert answer.url.endswith("/studio/")
        assert "default-src 'none'" in answer.headers["content-security-policy"]
        for path in ("/studio/../v1/models", "/studio/%2e%2e/v1/models"):
            assert b" 404 " in first_line_of(server.url, path)
        page = browser.new_page()
        page.goto(f"{server.url}/studio/#key=sec+ret&")
        page.wait_for_selector("html[data-ready]", timeout=20_000)
        page.close()
    with serving(tmp_path / "plain") as server:
        assert requests.get(f"{server.url}/studio/", timeout=9).status_code == 404
        image = io.BytesIO()
        Image.new("RGB", (32, 32)).save(image, "PNG")
        answer = requests.post(f"{server.url}/v1/recipes", files={"image": image.getvalue()}, timeout=9)
        assert answer.status_code == 400
        assert "has no recipe" in answer.json()["error"]["message"]


def first_line_of(url: str, path: str) -> bytes:
    """The status line of the response to a path that is sent as it is."""
    host, port = url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port))) as connection:
        connection.sendall(f"GET {path} HTTP/1.1\r\nhost: {host}\r\nconnection: close\r\n\r\n".encode())
        return connection.makefile("rb").readline()
