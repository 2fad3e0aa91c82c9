"""The routes of the service. They run in the event loop, which never blocks: all work happens in threads."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import json
import logging
import time
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from prometheus_client import generate_latest
from pydantic import ValidationError
from sse_starlette import EventSourceResponse
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware

from likeness.conditions import CONDITIONS
from likeness.conditions.images import MAX_PIXELS
from likeness.pipelines.sizes import format_sizes, trained_sizes
from likeness.serve.engine import Closed, Engine, Full, measure_batch, warm_up
from likeness.serve.errors import FINAL, RESPONSES, ApiError, handle
from likeness.serve.forms import form_body, read_form, text_fields
from likeness.serve.jobs import Job, Jobs, response_of
from likeness.serve.middleware import Frame, Metrics, access
from likeness.serve.results import REJECTED, STREAM, Results
from likeness.serve.schema import (
    MAX_CANDIDATES,
    MAX_EDIT,
    MAX_IMAGES,
    MAX_PREVIEWS,
    MAX_PROMPT,
    ConditionName,
    Generation,
    MaskCheck,
    MaskEdit,
    PhotoEdit,
    Proposal,
)
from likeness.serve.service import LARGEST_EDIT, Service
from likeness.serve.store import UNFINISHED, Taken
from likeness.serve.studio import add_studio, check_mask, mask_classes, read_image_recipe
from likeness.types import InputError

EXPOSED = ["x-request-id", "x-should-retry", "retry-after"]
"""Headers that pages of allowed origins can read."""

MAX_PHOTOS = 2**31
"""Bytes of decoded photographs of accepted edits from which further requests wait."""

SIDE_QUEUE = 16
"""Largest number of waiting requests other than images."""

EXPIRY = 30
"""Seconds between searches for expired jobs."""

GRACE = 4
"""Seconds after the end of the jobs, at a shutdown, in which their responses are sent."""

log = logging.getLogger(__name__)


def create_app(service: Service) -> FastAPI:
    """Return the application of a service; its engine starts with it."""
    settings, store, metrics = service.settings, service.store, Metrics()

    def on_step(seconds: float, images: int) -> None:
        metrics.step.observe(seconds)
        metrics.batch.observe(images)

    engine = Engine(service.pipeline, queue=settings.queue, on_step=on_step)
    metrics.queue.set_function(lambda: len(engine.waiting))
    metrics.running.set_function(lambda: len(engine.running))
    jobs = Jobs(engine, service, lambda kind: metrics.images.labels(kind).inc())
    results = Results(jobs)
    state: dict[str, Any] = {"ready": False, "side": 0, "error": None}
    accepting: dict[tuple[str, str], asyncio.Event] = {}  # id and owner of a request -> set when its job has started

    def prepare() -> None:
        """Generate a warm-up image, then start the engine with a measured batch size."""
        try:
            engine.seconds_per_image = warm_up(service.pipeline)
            engine.batch = measure_batch(service.pipeline, deterministic=settings.deterministic)
        except Exception as error:
            log.exception("The warm-up image failed")
            state["error"] = jobs.closing = f"The warm-up image failed: {error}"
            engine.close()
            return
        engine.start()
        state["ready"] = True

    async def expire() -> None:
        while True:
            await asyncio.sleep(min(EXPIRY, settings.keep))
            try:
                await asyncio.to_thread(store.expire, settings.keep)
            except Exception:
                log.exception("Expired jobs could not be deleted")

    @contextlib.asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        warming = asyncio.create_task(asyncio.to_thread(prepare))
        expiring, sharing = asyncio.create_task(expire()), asyncio.create_task(jobs.share())
        yield
        expiring.cancel()
        await warming
        await jobs.close(settings.shutdown)
        sharing.cancel()
        await asyncio.to_thread(service.close)

    app = FastAPI(title="likeness", lifespan=lifespan, docs_url=None, redoc_url=None, responses=RESPONSES)
    app.state.end_jobs = lambda: jobs.close(settings.shutdown)
    for kind in (HTTPException, RequestValidationError, InputError):
        app.add_exception_handler(kind, handle)
    app.add_middleware(Frame, service=service, metrics=metrics)
    if settings.cors:  # around the frame: a browser asks for permission without a key
        every: dict[str, Any] = {"allow_methods": ["*"], "allow_headers": ["*"], "expose_headers": EXPOSED}
        app.add_middleware(CORSMiddleware, allow_origins=settings.cors, **every)

    async def in_side_pool(work: Callable[..., Any], *arguments: Any) -> Any:
        """Run blocking work that is no image, one at a time."""
        if state["side"] >= SIDE_QUEUE:
            raise ApiError(429, "Too many requests are waiting", code="queue_full", headers={"Retry-After": "2"})
        state["side"] += 1
        try:
            return await asyncio.get_running_loop().run_in_executor(service.side, work, *arguments)
        finally:
            state["side"] -= 1

    # Images

    @app.post("/v1/images/generations")
    async def generations(request: Request, body: Generation) -> Any:
        def accept() -> dict[str, Any]:
            portrait, notes = service.request_of(body)
            return {"request": portrait, "notes": notes}

        return await images(request, body, b"", asyncio.to_thread, accept)

    @app.post("/v1/images/edits", openapi_extra=form_body(("image", "mask"), PhotoEdit.model_json_schema()))
    async def edit_image(request: Request) -> Any:
        form = await read_form(
            request, files=("image", "mask"), fields=tuple(PhotoEdit.model_fields), size=settings.max_bytes
        )
        image, mask = form.pop("image"), form.pop("mask", None)
        try:
            body = PhotoEdit.model_validate(form)
        except ValidationError as error:
            raise RequestValidationError(
                [{**each, "loc": ("body", *each["loc"])} for each in error.errors()]
            ) from error

        def accept() -> dict[str, Any]:
            photos = [job.edit[0] for job in list(jobs.live.values()) if job.edit]
            if sum(2 * photo.pixels.nbytes for photo in photos) > MAX_PHOTOS:  # in two forms
                raise results.full(f"{len(photos)} edits of large photographs are waiting")
            portrait, photo, plan = service.edit_of(body, image, mask)
            return {"request": portrait, "notes": plan.notes, "edit": (photo, plan)}

        return await images(request, body, image + b"mask" + (mask or b""), in_side_pool, accept)

    async def images(
        request: Request, body: Generation | PhotoEdit, files: bytes, run: Callable[..., Any], accept: Callable[[], Any]
    ) -> Any:
        """Generate images as a job; returns the response. `run` calls `accept`, which checks the body, in a thread."""
        id, owner = request.state.id, request.state.owner
        if settings.log_prompts:
            access.info("%s %r", id, body.prompt)
        content = json.dumps(body.model_dump())  # escapes what is not UTF-8, which is rejected later
        digest = hashlib.sha256(content.encode() + files).hexdigest()
        key = request.headers.get("idempotency-key")
        if key is not None:
            if not key.strip():
                message = "The Idempotency-Key is empty: send a key of its own with each request, or none"
                raise ApiError(400, message, param="Idempotency-Key", code="invalid_value")
            key = hashlib.sha256(f"{owner}\0{key}".encode()).hexdigest()
            if (known := await results.earlier(id, key, digest)) is not None:
                return await results.result_of_earlier(request, body, *known)
        if state["error"]:
            raise ApiError(503, state["error"], code="not_ready")
        if not engine.open or len(engine.waiting) + body.n > settings.queue:  # checked again when queued
            raise results.full()

        def create() -> Job:
            checked = accept()
            store.create(id, owner=owner, request=digest, key=key)
            return Job(id=id, body=body, **checked)

        accepted = accepting[id, owner] = asyncio.Event()
        try:
            job = await run(create)
            jobs.start(job)
        except Taken as error:
            known = None if key is None else await results.earlier(id, key, digest)
            if known is not None:  # sent at the same time
                return await results.result_of_earlier(request, body, *known)
            if key is not None and await asyncio.to_thread(store.find, id, owner) is None:
                raise results.full(REJECTED) from error
            message = f"A request with the id {id} or with this Idempotency-Key exists: choose another"
            raise ApiError(409, message, code="duplicate_request", headers=FINAL) from error
        except (Full, Closed) as error:
            await asyncio.to_thread(store.remove, id)
            raise results.full() from error
        finally:
            accepting.pop((id, owner), None)
            accepted.set()
        if isinstance(body, Generation) and body.stream:
            return EventSourceResponse(
                results.events_of(job, keep=key is not None),
                headers=STREAM,
                shutdown_grace_period=settings.shutdown + GRACE,
            )
        await results.ended(request, job, keep=key is not None)
        if job.error is not None:
            raise job.error
        row = {"id": id, "files": job.files, "response": response_of(job)}
        return await results.finished(request, row, body.response_format, job.contents)

    # Jobs

    async def acceptance(request: Request, id: str) -> None:
        """Wait for the start of a job whose request is being accepted."""
        if (accepted := accepting.get((id, request.state.owner))) is not None:
            await accepted.wait()

    @app.get("/v1/jobs/{id}")
    async def read_job(request: Request, id: str) -> dict[str, Any]:
        await acceptance(request, id)
        return await results.description(request, await results.found(id, request.state.owner))

    @app.delete("/v1/jobs/{id}")
    async def cancel_job(request: Request, id: str) -> dict[str, Any]:
        await acceptance(request, id)
        row = await results.found(id, request.state.owner)
        if (job := jobs.live.get(id)) is not None:
            jobs.cancel(job)
            await job.ended.wait()
        elif row["state"] in UNFINISHED:
            await asyncio.to_thread(store.cancel, id)
        return await results.description(request, await results.settled(request, id))

    @app.get("/v1/jobs/{id}/images/{index}")
    async def read_image(request: Request, id: str, index: int) -> Response:
        row = await results.found(id, request.state.owner)
        if not 0 <= index < len(row["files"] or []):
            raise ApiError(404, f"The job {id} has no image {index}", param="index", code="image_not_found")
        content = await asyncio.to_thread(results.read_file, row, index)
        return Response(content, media_type=f"image/{Path(row['files'][index]).suffix[1:]}")

    # Conditions and masks

    @app.post("/v1/conditions/{name}", openapi_extra=form_body(("image",), text_fields("size", "align")))
    async def extract(request: Request, name: ConditionName) -> Any:
        form = await read_form(request, files=("image",), fields=("size", "align"))
        size, align = form.get("size"), form.get("align")
        if size is not None and not (size.isdecimal() and len(size) < 6):
            raise ApiError(400, f"size is {size[:80]!r}; it must be pixels, for example 128", param="size")
        if align not in (None, "true", "false"):
            raise ApiError(400, f"align is {align[:80]!r}; choose true or false", param="align")
        wanted = None if align is None else align == "true"
        return await in_side_pool(service.extract, name, form["image"], None if size is None else int(size), wanted)

    @app.post("/v1/inspect", openapi_extra=form_body(("file",), text_fields("condition")))
    async def inspect(request: Request) -> Any:
        form = await read_form(request, files=("file",), fields=("condition",))
        condition = form.get("condition")
        if condition is not None and condition not in CONDITIONS:
            message = f"Unknown condition {condition[:80]!r}. Available: {', '.join(CONDITIONS)}"
            raise ApiError(400, message, param="condition", code="invalid_value")
        return await in_side_pool(service.inspect, form["file"], condition)

    @app.post("/v1/masks/propose")
    async def propose(body: Proposal) -> Any:
        return await in_side_pool(service.propose, body)

    @app.post("/v1/masks/edit")
    async def edit_mask(body: MaskEdit) -> Any:
        return await in_side_pool(service.edit, body)

    @app.post("/v1/masks/check")
    async def check(body: MaskCheck) -> Any:
        return await in_side_pool(lambda: check_mask(service.read_mask(body.mask, "mask"), body.prompt[:MAX_EDIT]))

    @app.post("/v1/recipes", openapi_extra=form_body(("image",), text_fields()))
    async def recipe(request: Request) -> Any:
        form = await read_form(request, files=("image",), fields=())
        return await in_side_pool(read_image_recipe, form["image"])

    # Models and operations

    @app.get("/v1/models")
    async def models() -> dict[str, Any]:
        return {"object": "list", "data": [await model(settings.model)]}

    @app.get("/v1/models/{id:path}")
    async def model(id: str) -> dict[str, Any]:
        if id != settings.model:
            message = f"Unknown model {id[:80]!r}. Available: {settings.model}"
            raise ApiError(404, message, param="model", code="model_not_found")
        return {"id": id, "object": "model", "created": started, "owned_by": "likeness"}

    @app.get("/v1/capabilities")
    async def capabilities() -> dict[str, Any]:
        config = service.pipeline.config
        return {
            "model": settings.model,
            "sizes": [format_sizes([size]) for size in trained_sizes(config)] or "any",
            "conditions": service.conditions,
            "defaults": {name: config.defaults[name] for name in ("size", "steps", "guidance_scale")},
            "output_formats": ["png", "jpeg", "webp"],
            "batch_size": engine.batch,
            "seconds_per_image": round(engine.seconds_per_image, 3),
            "mask_classes": mask_classes(),
            "edits": "mask" in service.conditions,
            "extract": ["mask", "sketch", *["keypoints"] * (service.find is not None)],
            "align": service.find is not None,
            "limits": {
                "n": MAX_IMAGES,
                "partial_images": MAX_PREVIEWS,
                "steps": settings.max_steps,
                "side": settings.max_side,
                "prompt": MAX_PROMPT,
                "mask_edit": MAX_EDIT,
                "mask_side": LARGEST_EDIT,
                "photo_pixels": MAX_PIXELS,
                "candidates": MAX_CANDIDATES,
                "body_bytes": settings.max_bytes,
                "queue": settings.queue,
                "keep_seconds": settings.keep,
            },
        }

    @app.get("/healthz")
    async def health() -> dict[str, str]:
        return {"status": "ok"}

    @app.get("/readyz")
    async def readiness() -> dict[str, str]:
        if not state["ready"] or not engine.open:
            raise ApiError(503, state["error"] or "The service is not ready", code="not_ready")
        return {"status": "ready"}

    @app.get("/metrics")
    async def figures() -> Response:
        return Response(generate_latest(metrics.registry), media_type="text/plain; version=0.0.4")

    if settings.studio:
        add_studio(app)
    started = int(time.time())
    return app
