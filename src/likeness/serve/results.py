"""From jobs to responses: wait for a job, here or on another replica, and return its images or its state."""

from __future__ import annotations

import asyncio
import base64
import time
from collections.abc import AsyncIterator
from typing import Any

from fastapi import Request
from sse_starlette import EventSourceResponse, JSONServerSentEvent

from likeness.serve.errors import FINAL, ApiError
from likeness.serve.jobs import SHARE, Job, Jobs, response_of
from likeness.serve.schema import Generation, PhotoEdit
from likeness.serve.store import IDENTIFIER, INCOMPLETE, LOST, UNFINISHED

REJECTED = "The request with this Idempotency-Key was not accepted"
"""Its twin, sent at the same time, found the queue full."""

STREAM = {"x-accel-buffering": "no"}
"""Headers of a stream: a proxy must not buffer it."""


class Results:
    """What requests are answered; `jobs` are those in progress here."""

    def __init__(self, jobs: Jobs) -> None:
        self.jobs, self.store, self.engine, self.settings = jobs, jobs.store, jobs.engine, jobs.service.settings

    async def earlier(self, id: str, key: str, digest: str) -> tuple[dict[str, Any], Job | None] | None:
        """Return the job of an idempotency key, unless it did not complete: then the key is free, and so is the id of
        the request if it is the job's.
        """
        row = await asyncio.to_thread(self.store.find_key, key)
        if row is None:
            return None
        job = self.jobs.live.get(row["id"])
        if job is None and row["state"] in INCOMPLETE:
            if row["id"] == id:
                await asyncio.to_thread(self.store.remove, id, states=INCOMPLETE)
            else:
                await asyncio.to_thread(self.store.release, key)
            return None
        if row["request"] != digest:
            message = "The Idempotency-Key was used for another request: choose another key"
            raise ApiError(409, message, param="Idempotency-Key", code="idempotency_mismatch", headers=FINAL)
        return row, job

    async def result_of_earlier(
        self, request: Request, body: Generation | PhotoEdit, row: dict[str, Any], job: Job | None
    ) -> Any:
        """Return the result of an earlier request with the same key and body, once it is complete."""
        if job is not None:
            await self.ended(request, job, keep=True)
            if job.error is not None:
                raise job.error
        try:
            row = await self.settled(request, row["id"])
        except ApiError as error:
            if error.status_code != 404:
                raise
            raise self.full(REJECTED) from error
        if row["state"] != "completed":
            message = f"The request with this Idempotency-Key is {row['state']} on another replica: send it again"
            raise ApiError(409, message, code="not_completed")
        if not (isinstance(body, Generation) and body.stream):
            return await self.finished(request, row, body.response_format)
        complete = await self.finished(request, row, "b64_json")

        async def events() -> AsyncIterator[JSONServerSentEvent]:
            for index, image in enumerate(complete["data"]):
                yield event_of("completed", complete, index, image["b64_json"])

        return EventSourceResponse(events(), headers=STREAM)

    async def settled(self, request: Request, id: str) -> dict[str, Any]:
        """Wait until a job is finished, here or on another replica, at most `LOST` seconds after its last news."""
        row = await self.found(id, request.state.owner)
        while row["state"] in UNFINISHED and time.time() - row["seen"] < LOST:
            await asyncio.sleep(SHARE)
            row = await self.found(id, request.state.owner)
        return row

    async def ended(self, request: Request, job: Job, *, keep: bool) -> None:
        """Wait for a job. If the client disconnects, cancel it unless `keep`."""
        waits = [asyncio.create_task(job.ended.wait()), asyncio.create_task(disconnected(request))]
        try:
            await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for wait in waits:
                wait.cancel()
            if not job.ended.is_set() and not keep:
                self.jobs.cancel(job)
        if not job.ended.is_set():
            raise ApiError(499, "The client disconnected", code="disconnected")

    async def events_of(self, job: Job, *, keep: bool) -> AsyncIterator[JSONServerSentEvent]:
        """Yield the events of a stream. If the client disconnects, cancel the job unless `keep`."""
        response = response_of(job)
        try:
            while (event := await job.events.get()) is not None:
                yield event_of(event["kind"], response, event["index"], event["b64_json"], event.get("number"))
            if job.error is not None:
                yield JSONServerSentEvent({"type": "error", "error": job.error.error}, event="error")
        finally:
            if not job.ended.is_set() and not keep:
                self.jobs.cancel(job)

    async def finished(
        self, request: Request, row: dict[str, Any], form: str, contents: dict[int, str] | None = None
    ) -> dict[str, Any]:
        """Return the response of a completed job. `contents`: of its files in base64. Default: they are read."""

        def read() -> dict[int, str]:
            read = [self.read_file(row, index) for index in range(len(row["files"]))]
            return dict(enumerate(base64.b64encode(content).decode() for content in read))

        if form == "url":
            url = f"{request.base_url}v1/jobs/{row['id']}/images"
            data = [{"url": f"{url}/{i}"} for i in range(len(row["files"]))]
        else:
            contents = contents or await asyncio.to_thread(read)
            data = [{"b64_json": contents[i]} for i in sorted(contents)]
        return {**row["response"], "data": data}

    def full(self, waiting: str = "") -> ApiError:
        """Return the error for a request that is not accepted, with what is waiting. Default: the images."""
        if not self.engine.open:
            return ApiError(503, "The service is shutting down", code="shutting_down", headers={"Retry-After": "5"})
        wait = {"Retry-After": str(self.engine.seconds_until_free())}
        waiting = waiting or f"{len(self.engine.waiting)} images are waiting, of at most {self.settings.queue}"
        return ApiError(429, f"{waiting}: try again later", code="queue_full", headers=wait)

    def expired(self, id: str) -> ApiError:
        """Return the error for a job whose files were deleted."""
        return ApiError(410, f"The job {id} has expired: results are kept for {self.settings.keep:g} s", code="expired")

    def read_file(self, row: dict[str, Any], index: int) -> bytes:
        """Read an image of a job, which may expire meanwhile."""
        try:
            return (self.store.images / row["files"][index]).read_bytes()
        except FileNotFoundError as error:
            raise self.expired(row["id"]) from error

    async def found(self, id: str, owner: str) -> dict[str, Any]:
        """Return a job that is not expired."""
        row = await asyncio.to_thread(self.store.find, id, owner) if IDENTIFIER.fullmatch(id) else None
        if row is None:
            raise ApiError(404, f"There is no job {id[:80]!r}", param="id", code="job_not_found")
        if row["state"] == "expired":
            raise self.expired(id)
        ours = row["replica"] == self.store.replica
        if ours and row["state"] in UNFINISHED and id not in self.jobs.live:  # ended meanwhile
            row = await asyncio.to_thread(self.store.find, id, owner) or row
        return row

    async def description(self, request: Request, row: dict[str, Any]) -> dict[str, Any]:
        """Return what `GET /v1/jobs/{id}` says of a job."""
        job = self.jobs.live.get(row["id"]) if row["state"] in UNFINISHED else None
        described = {"id": row["id"], "object": "job", "state": row["state"], "created_at": int(row["created"])}
        if job is None:
            described["progress"] = row["progress"]
        else:
            positions = [place for task in job.tasks if (place := self.engine.position(task)) is not None]
            described |= {
                "state": job.state,
                "queue_position": min(positions) if positions and job.state == "queued" else None,
                "progress": job.progress,
            }
        if row["state"] == "completed":
            described |= {"progress": 1.0, "result": await self.finished(request, row, "url")}
        return described | {"finished_at": row["finished"] and int(row["finished"]), "error": row["error"]}


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
