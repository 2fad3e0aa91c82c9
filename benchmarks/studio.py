"""Time from the end of a stroke to the new image in the studio, in a real browser, by stage.

    python benchmarks/studio.py                       # measures; with the bundled default model
    python benchmarks/studio.py --screenshots FOLDER  # also of the states of the page

Requires chromium. The service and the browser share this machine. Prints the median and the 90th percentile of previews
in ms: encoding the mask, the service (with HTTP), drawing. The last line is the pipeline's own call for such a request.
"""

from __future__ import annotations

import argparse
import re
import shutil
import statistics
import subprocess
import sys
import time
from pathlib import Path

import numpy as np

from likeness.runtime import configure_process

configure_process()  # threads as in the service: before torch is imported

from likeness.cli.portraits import adapt_threads  # noqa: E402
from likeness.pipelines.generate import generate, resolve  # noqa: E402
from likeness.pipelines.load import load  # noqa: E402
from likeness.types import ConditionInput, PortraitRequest  # noqa: E402

ROOT = Path(__file__).resolve().parent.parent
MASK = ROOT / "examples/masks/smile.png"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="mmface-mini-fast")
    parser.add_argument("--strokes", type=int, default=30)
    parser.add_argument("--screenshots", type=Path, help="folder for screenshots")
    options = parser.parse_args()
    from playwright.sync_api import sync_playwright

    chromium = shutil.which("chromium") or sys.exit("This benchmark requires chromium")
    command = [sys.executable, "-m", "likeness.cli", "studio", "--no-browser", "--port", "0", "--model", options.model]
    with (
        subprocess.Popen([*command, "--data", "out/studio"], stdout=subprocess.PIPE, text=True) as service,
        sync_playwright() as playwright,
    ):
        try:
            assert service.stdout is not None
            address = re.search(r"http\S+", next(line for line in service.stdout if "studio" in line))
            assert address is not None
            browser = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox", "--disable-gpu"])
            page = browser.new_page(viewport={"width": 1280, "height": 800})
            page.goto(address[0])
            page.wait_for_selector("html[data-ready]", timeout=120_000)
            previews = measure(page, options.strokes)
            if options.screenshots is not None:
                options.screenshots.mkdir(parents=True, exist_ok=True)
                show_states(page, options.screenshots)
        finally:
            service.terminate()
    pipeline = load(options.model)
    adapt_threads(pipeline)
    steps = 1 if pipeline.config.defaults["steps"] <= 4 else 4
    request = resolve(
        PortraitRequest(prompt="a woman", conditions={"mask": ConditionInput(image=MASK)}, num_inference_steps=steps),
        pipeline,
    )
    calls = []
    for _ in range(options.strokes):
        start = time.perf_counter()
        generate(pipeline, request, [1])
        calls.append(1e3 * (time.perf_counter() - start))
    for name, times in {**previews, "pipeline call": calls}.items():
        print(f"{name:14} median {statistics.median(times):6.0f} ms   p90 {np.quantile(times, 0.9):6.0f} ms")


def measure(page, strokes: int) -> dict[str, list[float]]:
    """Paint strokes and read the stages of each preview."""
    page.fill("#prompt", "a woman with long blond hair")
    with page.expect_file_chooser() as chooser:
        page.click("#open")
    chooser.value.set_files(MASK)
    page.wait_for_selector("#timing[data-kind=full]", timeout=120_000)
    box = page.locator("#canvas").bounding_box()
    found: dict[str, list[float]] = {"preview": [], "encode": [], "service": [], "draw": []}
    for i in range(strokes + 3):  # the first three warm up
        page.evaluate("document.getElementById('timing').dataset.kind = ''")
        page.locator(f"input[name=class][value='{13 + i % 2}']").check(force=True)  # hair and hat: each stroke changes
        x, y = box["x"] + box["width"] * (0.4 + 0.01 * (i % 15)), box["y"] + box["height"] * 0.3
        page.mouse.move(x, y)
        page.mouse.down()
        page.mouse.move(x + 30, y - 20, steps=3)
        page.mouse.up()
        page.wait_for_selector("#timing[data-kind=preview]", timeout=60_000)
        text = page.inner_text("#timing")
        numbers = [float(number) for number in re.findall(r"\d+", text)]
        if i >= 3:
            for name, number in zip(found, numbers, strict=True):
                found[name].append(number)
    page.wait_for_selector("#timing[data-kind=full]", timeout=60_000)
    page.evaluate("document.getElementById('timing').dataset.kind = ''")  # of the painted image
    for _ in range(strokes + 3):
        page.keyboard.press("Control+z")
    return found


def show_states(page, folder: Path) -> None:
    """Write a screenshot of each main state of the page."""

    def shoot(name: str) -> None:
        page.wait_for_timeout(800)
        page.screenshot(path=folder / f"{name}.png")

    page.wait_for_selector("#timing[data-kind=full]", timeout=60_000)  # of the undone strokes
    page.click("#variations")
    page.wait_for_selector("#strip img", timeout=60_000)
    shoot("studio")
    for name, width, height in (("small", 1024, 700), ("tablet", 768, 1024), ("phone", 390, 844)):
        page.set_viewport_size({"width": width, "height": height})
        shoot(name)
    page.set_viewport_size({"width": 1280, "height": 800})
    page.click("#examples")
    shoot("examples")
    page.keyboard.press("Escape")
    page.click("#propose")
    page.wait_for_selector("#choose button:nth-child(4) img", timeout=120_000)
    shoot("proposed")
    page.keyboard.press("Escape")
    with page.expect_file_chooser() as chooser:
        page.click("#photo")
    chooser.value.set_files(ROOT / "examples/faces/images/2.png")
    page.wait_for_function("() => document.getElementById('note').textContent !== ''")
    page.evaluate("document.getElementById('timing').dataset.kind = ''")
    page.locator("input[name=class][value='14']").check(force=True)
    box = page.locator("#canvas").bounding_box()
    page.mouse.move(box["x"] + box["width"] * 0.4, box["y"] + box["height"] * 0.12)
    page.mouse.down()
    page.mouse.move(box["x"] + box["width"] * 0.6, box["y"] + box["height"] * 0.12, steps=5)
    page.mouse.up()
    page.wait_for_selector("#timing[data-kind=full]", timeout=60_000)
    shoot("photograph")
    page.click("#comparison")
    page.locator("#history button").nth(1).click()
    shoot("compare")
    page.click("#comparison")
    page.click("#theme")
    shoot("dark")
    page.click("#help")
    shoot("keys")


if __name__ == "__main__":
    main()
