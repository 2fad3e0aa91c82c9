"""The routes of the service. They run in the event loop, which never blocks: all work happens in threads."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import hashlib
import logging
import time
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from prometheus_client import generate_latest
from pydantic import ValidationError
from sse_starlette import EventSourceResponse, JSONServerSentEvent
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware

from likeness.conditions import CONDITIONS
from likeness.conditions.images import MAX_PIXELS
from likeness.pipelines.sizes import format_sizes, trained_sizes
from likeness.serve.engine import Closed, Engine, Full, measure_batch, warm_up
from likeness.serve.errors import FINAL, RESPONSES, ApiError, handle
from likeness.serve.forms import form_body, read_form, text_fields
from likeness.serve.jobs import SHARE, Job, Jobs, response_of
from likeness.serve.middleware import Frame, Metrics, access
from likeness.serve.schema import (
    MAX_CANDIDATES,
    MAX_EDIT,
    MAX_PROMPT,
    ConditionName,
    Generation,
    MaskCheck,
    MaskEdit,
    PhotoEdit,
    Proposal,
)
from likeness.serve.service import LARGEST_EDIT, Service
from likeness.serve.store import IDENTIFIER, LOST, UNFINISHED, Taken
from likeness.serve.studio import add_studio, check_mask, mask_classes, read_image_recipe
from likeness.types import InputError

SIDE_QUEUE = 16
"""Largest number of waiting requests other than images."""

EXPIRY = 30
"""Seconds between searches for expired jobs."""

GRACE = 4
"""Seconds after the end of the jobs, at a shutdown, in which their responses are sent."""

STREAM = {"x-accel-buffering": "no"}
"""Headers of a stream: a proxy must not buffer it."""

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
        every: dict[str, Any] = {"allow_methods": ["*"], "allow_headers": ["*"], "expose_headers": ["x-request-id"]}
        app.add_middleware(CORSMiddleware, allow_origins=settings.cors, **every)

    async def beside(work: Callable[..., Any], *arguments: Any) -> Any:
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
            portrait, photo, plan = service.edit_of(body, image, mask)
            return {"request": portrait, "notes": plan.notes, "edit": (photo, plan)}

        return await images(request, body, image + b"mask" + (mask or b""), beside, accept)

    async def images(
        request: Request, body: Generation | PhotoEdit, files: bytes, run: Callable[..., Any], accept: Callable[[], Any]
    ) -> Any:
        """Generate images as a job; returns the response. `run` calls `accept`, which checks the body, in a thread."""
        id, owner = request.state.id, request.state.owner
        if settings.log_prompts:
            access.info("%s %r", id, body.prompt)
        digest = hashlib.sha256(body.model_dump_json().encode() + files).hexdigest()
        key = request.headers.get("idempotency-key")
        if key is not None:
            if not key.strip():
                message = "The Idempotency-Key is empty: send a key of its own with each request, or none"
                raise ApiError(400, message, param="Idempotency-Key", code="invalid_value")
            key = hashlib.sha256(f"{owner}\0{key}".encode()).hexdigest()
            if (known := await earlier(id, key, digest)) is not None:
                return await result_of(request, body, *known)
        if state["error"]:
            raise ApiError(503, state["error"], code="not_ready")
        if not engine.open or len(engine.waiting) + body.n > settings.queue:  # checked again when queued
            raise full()

        def create() -> Job:
            checked = accept()
            store.create(id, owner=owner, request=digest, key=key)
            return Job(id=id, body=body, **checked)

        accepted = accepting[id, owner] = asyncio.Event()
        try:
            job = await run(create)
            jobs.start(job)
        except Taken as error:
            if key is not None and (known := await earlier(id, key, digest)) is not None:  # sent at the same time
                return await result_of(request, body, *known)
            message = f"A request with the id {id} or with this Idempotency-Key exists: choose another"
            raise ApiError(409, message, code="duplicate_request", headers=FINAL) from error
        except (Full, Closed) as error:
            await asyncio.to_thread(store.remove, id)
            raise full() from error
        finally:
            accepting.pop((id, owner), None)
            accepted.set()
        if isinstance(body, Generation) and body.stream:
            return EventSourceResponse(
                events_of(job, keep=key is not None),
                headers=STREAM,
                shutdown_grace_period=settings.shutdown + GRACE,
            )
        await ended(request, job, keep=key is not None)
        if job.error is not None:
            raise job.error
        row = {"id": id, "files": job.files, "response": response_of(job)}
        return await finished(request, row, body.response_format, job.contents)

    async def earlier(id: str, key: str, digest: str) -> tuple[dict[str, Any], Job | None] | None:
        """Return the job of an idempotency key, unless it did not complete: then the key is free, and so is the id of
        the request if it is the job's.
        """
        row = await asyncio.to_thread(store.find_key, key)
        if row is None:
            return None
        job = jobs.live.get(row["id"])
        if job is None and row["state"] not in ("completed", *UNFINISHED):
            if row["id"] == id:
                await asyncio.to_thread(store.remove, id)
            else:
                await asyncio.to_thread(store.release, key)
            return None
        if row["request"] != digest:
            message = "The Idempotency-Key was used for another request: choose another key"
            raise ApiError(409, message, param="Idempotency-Key", code="idempotency_mismatch")
        return row, job

    async def result_of(request: Request, body: Generation | PhotoEdit, row: dict[str, Any], job: Job | None) -> Any:
        """Return the result of an earlier request with the same key and body, once it is complete."""
        if job is not None:
            await ended(request, job, keep=True)
            if job.error is not None:
                raise job.error
        row = await settled(request, row["id"])
        if row["state"] != "completed":
            message = f"The request with this Idempotency-Key is {row['state']} on another replica: send it again"
            raise ApiError(409, message, code="not_completed")
        if not (isinstance(body, Generation) and body.stream):
            return await finished(request, row, body.response_format)
        complete = await finished(request, row, "b64_json")

        async def events() -> AsyncIterator[JSONServerSentEvent]:
            for index, image in enumerate(complete["data"]):
                yield event_of("completed", complete, index, image["b64_json"])

        return EventSourceResponse(events(), headers=STREAM)

    async def settled(request: Request, id: str) -> dict[str, Any]:
        """Wait until a job is finished, here or on another replica, at most `LOST` seconds after its last news."""
        row = await found(id, request.state.owner)
        while row["state"] in UNFINISHED and time.time() - row["seen"] < LOST:
            await asyncio.sleep(SHARE)
            row = await found(id, request.state.owner)
        return row

    async def ended(request: Request, job: Job, *, keep: bool) -> None:
        """Wait for a job. If the client disconnects, cancel it unless `keep`."""
        waits = [asyncio.create_task(job.ended.wait()), asyncio.create_task(disconnected(request))]
        try:
            await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for wait in waits:
                wait.cancel()
            if not job.ended.is_set() and not keep:
                jobs.cancel(job)
        if not job.ended.is_set():
            raise ApiError(499, "The client disconnected", code="disconnected")

    async def events_of(job: Job, *, keep: bool) -> AsyncIterator[JSONServerSentEvent]:
        """Yield the events of a stream. If the client disconnects, cancel the job unless `keep`."""
        response = response_of(job)
        try:
            while (event := await job.events.get()) is not None:
                yield event_of(event["kind"], response, event["index"], event["b64_json"], event.get("number"))
            if job.error is not None:
                yield JSONServerSentEvent({"type": "error", "error": job.error.error}, event="error")
        finally:
            if not job.ended.is_set() and not keep:
                jobs.cancel(job)

    async def finished(
        request: Request, row: dict[str, Any], form: str, contents: dict[int, str] | None = None
    ) -> dict[str, Any]:
        """Return the response of a completed job. `contents`: of its files in base64. Default: they are read."""

        def read() -> dict[int, str]:
            read = [read_file(row, index) for index in range(len(row["files"]))]
            return dict(enumerate(base64.b64encode(content).decode() for content in read))

        if form == "url":
            url = f"{request.base_url}v1/jobs/{row['id']}/images"
            data = [{"url": f"{url}/{i}"} for i in range(len(row["files"]))]
        else:
            contents = contents or await asyncio.to_thread(read)
            data = [{"b64_json": contents[i]} for i in sorted(contents)]
        return {**row["response"], "data": data}

    # Jobs

    def expired(id: str) -> ApiError:
        return ApiError(410, f"The job {id} has expired: results are kept for {settings.keep:g} s", code="expired")

    def read_file(row: dict[str, Any], index: int) -> bytes:
        """Read an image of a job, which may expire meanwhile."""
        try:
            return (store.images / row["files"][index]).read_bytes()
        except FileNotFoundError as error:
            raise expired(row["id"]) from error

    async def found(id: str, owner: str) -> dict[str, Any]:
        """Return a job that is not expired."""
        row = await asyncio.to_thread(store.find, id, owner) if IDENTIFIER.fullmatch(id) else None
        if row is None:
            raise ApiError(404, f"There is no job {id[:80]!r}", param="id", code="job_not_found")
        if row["state"] == "expired":
            raise expired(id)
        if row["state"] in UNFINISHED and row["replica"] == store.replica and id not in jobs.live:  # ended meanwhile
            row = await asyncio.to_thread(store.find, id, owner) or row
        return row

    async def description(request: Request, row: dict[str, Any]) -> dict[str, Any]:
        job = jobs.live.get(row["id"]) if row["state"] in UNFINISHED else None
        told = {"id": row["id"], "object": "job", "state": row["state"], "created_at": int(row["created"])}
        if job is None:
            told["progress"] = row["progress"]
        else:
            positions = [place for task in job.tasks if (place := engine.position(task)) is not None]
            told |= {
                "state": job.state,
                "queue_position": min(positions) if positions and job.state == "queued" else None,
                "progress": job.progress,
            }
        if row["state"] == "completed":
            told |= {"progress": 1.0, "result": await finished(request, row, "url")}
        return told | {"finished_at": row["finished"] and int(row["finished"]), "error": row["error"]}

    @app.get("/v1/jobs/{id}")
    async def read_job(request: Request, id: str) -> dict[str, Any]:
        return await description(request, await found(id, request.state.owner))

    @app.delete("/v1/jobs/{id}")
    async def cancel_job(request: Request, id: str) -> dict[str, Any]:
        if (accepted := accepting.get((id, request.state.owner))) is not None:
            await accepted.wait()
        row = await found(id, request.state.owner)
        if (job := jobs.live.get(id)) is not None:
            jobs.cancel(job)
            await job.ended.wait()
        elif row["state"] in UNFINISHED:
            await asyncio.to_thread(store.cancel, id)
        return await description(request, await settled(request, id))

    @app.get("/v1/jobs/{id}/images/{index}")
    async def read_image(request: Request, id: str, index: int) -> Response:
        row = await found(id, request.state.owner)
        if not 0 <= index < len(row["files"] or []):
            raise ApiError(404, f"The job {id} has no image {index}", param="index", code="image_not_found")
        content = await asyncio.to_thread(read_file, row, index)
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
        return await beside(service.extract, name, form["image"], None if size is None else int(size), wanted)

    @app.post("/v1/inspect", openapi_extra=form_body(("file",), text_fields("condition")))
    async def inspect(request: Request) -> Any:
        form = await read_form(request, files=("file",), fields=("condition",))
        condition = form.get("condition")
        if condition is not None and condition not in CONDITIONS:
            message = f"Unknown condition {condition[:80]!r}. Available: {', '.join(CONDITIONS)}"
            raise ApiError(400, message, param="condition", code="invalid_value")
        return await beside(service.inspect, form["file"], condition)

    @app.post("/v1/masks/propose")
    async def propose(body: Proposal) -> Any:
        return await beside(service.propose, body)

    @app.post("/v1/masks/edit")
    async def edit_mask(body: MaskEdit) -> Any:
        return await beside(service.edit, body)

    @app.post("/v1/masks/check")
    async def check(body: MaskCheck) -> Any:
        return await beside(lambda: check_mask(service.read_mask(body.mask, "mask"), body.prompt))

    @app.post("/v1/recipes", openapi_extra=form_body(("image",), text_fields()))
    async def recipe(request: Request) -> Any:
        form = await read_form(request, files=("image",), fields=())
        return await beside(read_image_recipe, form["image"])

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
            "sizes": format_sizes(trained_sizes(config)).split(", ") if trained_sizes(config) else "any",
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
                "n": 10,
                "partial_images": 3,
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

    def full() -> ApiError:
        if not engine.open:
            return ApiError(503, "The service is shutting down", code="shutting_down", headers={"Retry-After": "5"})
        wait = {"Retry-After": str(engine.seconds_until_free())}
        message = f"{len(engine.waiting)} images are waiting, of at most {settings.queue}: try again later"
        return ApiError(429, message, code="queue_full", headers=wait)

    if settings.studio:
        add_studio(app)
    started = int(time.time())
    return app


def event_of(
    kind: str, response: dict[str, Any], index: int, content: str, number: int | None = None
) -> JSONServerSentEvent:
    """Return an event of a stream, `completed` or `partial_image`: an image in base64, of the job of a response."""
    type = f"image_generation.{kind}"
    shared = {name: response[name] for name in ("size", "quality", "background", "output_format", "id")}
    own = {"partial_image_index": number}
    if number is None:
        own = {"seed": response["seeds"][index], "notes": response["notes"]}
    data = {"type": type, "created_at": response["created"], **shared, "b64_json": content, "image_index": index, **own}
    return JSONServerSentEvent(data, event=type)


async def disconnected(request: Request) -> None:
    """Return when the client has closed the connection. The body must have been read."""
    while (await request.receive())["type"] != "http.disconnect":
        pass
