"""The studio: a page on which masks and sketches are painted (docs/studio.md), and the endpoints for it."""

from __future__ import annotations

import base64
import re
from pathlib import Path
from typing import Any

import numpy as np
from fastapi import FastAPI
from starlette.responses import RedirectResponse
from starlette.staticfiles import StaticFiles
from starlette.types import Message, Receive, Scope, Send

from likeness.conditions import CONDITIONS, inspection
from likeness.conditions.mask.classes import CLASS_INDEX, CLASSES, COUNTERPART, PALETTE, TITLES
from likeness.conditions.mask.contradictions import find_contradictions
from likeness.conditions.mask.geometry import measure, swapped_pairs
from likeness.pipelines.image_recipe import read_recipe, request_of
from likeness.types import InputError

POLICY = (
    b"default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src 'self' blob: data:; "
    b"base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
"""What the page may load: nothing from another origin."""


class Page(StaticFiles):
    """The files of the page."""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def labeled(message: Message) -> None:
            if message["type"] == "http.response.start":
                own = [(b"content-security-policy", POLICY), (b"cache-control", b"no-cache")]
                message["headers"] = [*message["headers"], *own, (b"x-content-type-options", b"nosniff")]
            await send(message)

        await super().__call__(scope, receive, labeled)


def add_studio(app: FastAPI) -> None:
    """Serve the page at /studio/; / leads to it."""
    app.mount("/studio", Page(directory=Path(__file__).parent / "web", html=True))

    @app.get("/", include_in_schema=False)
    async def root() -> RedirectResponse:
        return RedirectResponse("/studio/")


def mask_classes() -> list[dict[str, Any]]:
    """Return the classes of masks: name, title, color [r, g, b], and the number of the class on the other side."""
    return [
        {"name": name, "title": TITLES.get(name, name), "color": PALETTE[i].tolist(), "pair": COUNTERPART.get(i)}
        for i, name in enumerate(CLASSES)
    ]


def check_mask(labels: np.ndarray, prompt: str) -> dict[str, Any]:
    """Return the problems of a mask and its contradictions to a sentence, each with an operation that corrects it, if
    there is one.
    """
    geometry = measure(labels)
    swapped = iter(swapped_pairs(geometry))  # in the order of their notes, likewise
    specks_of = inspection.specked_classes(labels, geometry)
    specked = iter(specks_of)
    fixes = {
        "swapped-sides": lambda: correction("Swap them", "swap", *next(swapped)),
        "specks": lambda: correction("Remove", "clean", next(specked)),
    }
    problems = [
        {"kind": kind, "text": in_words(text), **fixes.get(kind, dict)()}
        for kind, text in inspection.mask_problems(labels, geometry, specks_of)
    ]
    found = [
        {"kind": "contradiction", "text": in_words(text)}
        | (correction(f"Remove {in_words(part)}", "remove", CLASS_INDEX[part]) if removable else {})
        for text, part, excess in find_contradictions(geometry, prompt)
        for removable in [excess and geometry.pixels[CLASS_INDEX[part]] < labels.size]
    ]
    return {"problems": problems, "contradictions": found}


def correction(title: str, operation: str, *classes: int) -> dict[str, Any]:
    """Return the field with an operation that corrects a problem."""
    return {"fix": {"title": title, "operation": operation, "fields": {"classes": [CLASSES[i] for i in classes]}}}


def in_words(text: str) -> str:
    """Replace the names of classes in a sentence by words."""

    def words(found: re.Match[str]) -> str:
        sided = CLASS_INDEX[found[0]] in COUNTERPART
        return f"the person's {TITLES[found[0]]}" if sided else TITLES[found[0]]

    return re.sub(rf"\b({'|'.join(TITLES)})\b", words, text)


def read_image_recipe(content: bytes) -> dict[str, Any]:
    """Return the request that made an image: fields of `POST /v1/images/generations`.

    Raises:
        InputError: the image has no recipe, it is damaged, or that of an edited photograph.
    """
    recipe, _ = read_recipe(content)
    if recipe.get("edit"):
        raise InputError("This is an edited photograph, which no request generates: use likeness replay", kind="edited")
    request = request_of(recipe)
    control = {
        name: base64.b64encode(CONDITIONS[name].encode(condition.image.raw)).decode()
        for name, condition in request.conditions.items()
    }
    return {
        "prompt": request.prompt,
        "negative_prompt": request.negative_prompt,
        "seed": request.seed,
        "steps": request.num_inference_steps,
        "guidance_scale": request.guidance_scale,
        "size": f"{request.width}x{request.height}",
        "upscale": request.upscale,
        "control_image": control,
        "conditioning_scale": {name: condition.scale for name, condition in request.conditions.items()},
        "control_guidance_start": {name: condition.start for name, condition in request.conditions.items()},
        "control_guidance_end": {name: condition.end for name, condition in request.conditions.items()},
    }
