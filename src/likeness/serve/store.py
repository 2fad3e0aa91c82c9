"""Jobs on disk: their state in a database, images and uploads in files of one folder.

SQLite by default; replicas share a database by its URL, for example PostgreSQL, and then the folder, too. A job is
marked `completed` only after its files are on disk. After a restart, jobs that this replica had not finished are
`interrupted`.
"""

from __future__ import annotations

import contextlib
import re
import secrets
import shutil
import sqlite3
import time
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from sqlalchemy import (
    JSON,
    URL,
    Boolean,
    Column,
    Engine,
    Float,
    MetaData,
    String,
    Table,
    create_engine,
    delete,
    event,
    insert,
    inspect,
    make_url,
    select,
    update,
)
from sqlalchemy.exc import IntegrityError, SQLAlchemyError

from likeness.files import first_line, write_whole
from likeness.types import InputError

IDENTIFIER = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,63}")
"""Form of the ids of requests and files: they become file names."""

LOST = 60
"""Seconds without news from its replica after which a job is interrupted."""

FORGOTTEN = 7 * 86400
"""Seconds after which the id of a finished job is no longer known as expired."""

BUSY = 10
"""Seconds for which a database that another process writes is waited for."""

UNFINISHED = ("queued", "running")
"""States of a job in progress; the others are completed, failed, cancelled, interrupted and expired."""

INCOMPLETE = ("failed", "cancelled", "interrupted", "expired")
"""States of a job that did not complete: its id and its idempotency key are free."""

JOBS = Table(
    "jobs",
    MetaData(),
    Column("id", String(64), primary_key=True),
    Column("replica", String(64), nullable=False),  # which replica works on it
    Column("owner", String(64), nullable=False),  # hash of the API key, "" without keys
    Column("key", String(64), unique=True),  # hash of owner and Idempotency-Key
    Column("request", String(64), nullable=False),  # hash of the request
    Column("state", String(16), nullable=False),
    Column("created", Float, nullable=False),
    Column("seen", Float, nullable=False),  # when its replica last reported it
    Column("progress", Float, nullable=False),
    Column("cancel", Boolean, nullable=False),  # whether another replica was asked to cancel it
    Column("finished", Float, index=True),
    Column("error", JSON),  # of a failed job, in OpenAI's shape
    Column("response", JSON),  # of a completed job, without the images
    Column("files", JSON),  # names of its images
)


class Taken(Exception):
    """A job has this id already."""


class Store:
    """The jobs and files of a replica.

    Args:
        folder: the data folder; created if missing.
        url: SQLAlchemy URL of the database. Default: SQLite in the folder.
        replica: name of this replica, at most 64 characters, if several share a database and a folder.

    Raises:
        InputError: the folder or the database cannot be used, or the name is too long.
    """

    def __init__(self, folder: Path, url: str | None = None, replica: str = "") -> None:
        if len(replica) > 64:
            text = f"The name of the replica, {replica}, has {len(replica)} characters"
            raise InputError(f"{text}: give --replica one of at most 64")
        self.images, self.uploads = folder / "images", folder / "uploads"
        try:
            self.images.mkdir(parents=True, exist_ok=True)
            self.uploads.mkdir(exist_ok=True)
            self.replica = replica
            self.database = connect(url or URL.create("sqlite", database=str(folder / "jobs.sqlite")))
            create_table(self.database)
        except OSError as error:
            raise InputError(f"The data folder {folder} cannot be used: {error.strerror or error}") from error
        except (SQLAlchemyError, ImportError) as error:
            raise InputError(f"The database of the jobs cannot be used: {first_line(error)}") from error
        self._interrupt(JOBS.c.replica == self.replica)

    def create(self, id: str, *, owner: str, request: str, key: str | None = None) -> None:
        """Add a queued job. Raises `Taken` if one has this id or key."""
        row = {"id": id, "replica": self.replica, "owner": owner, "request": request, "key": key}
        try:
            new = {"state": "queued", "created": time.time(), "seen": time.time(), "progress": 0.0, "cancel": False}
            with self.database.begin() as connection:
                connection.execute(insert(JOBS).values(**row, **new))
        except IntegrityError as error:
            raise Taken from error

    def share(self, jobs: Mapping[str, tuple[str, float]]) -> list[str]:
        """Report state and progress of this replica's jobs to the others; returns those that they want to cancel."""
        with self.database.begin() as connection:
            for id, (state, progress) in jobs.items():
                row = (JOBS.c.id == id) & JOBS.c.state.in_(UNFINISHED)
                connection.execute(update(JOBS).where(row).values(state=state, progress=progress, seen=time.time()))
            wanted = JOBS.c.id.in_(list(jobs)) & JOBS.c.cancel
            return list(connection.scalars(select(JOBS.c.id).where(wanted)))

    def cancel(self, id: str) -> None:
        """Ask the replica of a job to cancel it."""
        self._update(JOBS.c.id == id, cancel=True)

    def _interrupt(self, condition: Any) -> None:
        """Interrupt unfinished jobs. The replica of one may finish it meanwhile: its files then stay."""
        lost = JOBS.c.state.in_(UNFINISHED) & condition
        text = "The service was stopped before the job was complete: send the request again"
        error = {"message": text, "type": "server_error", "param": None, "code": "interrupted"}
        with self.database.connect() as connection:
            ids = connection.scalars(select(JOBS.c.id).where(lost)).all()
        for id in ids:
            if self._update(lost & (JOBS.c.id == id), state="interrupted", finished=time.time(), error=error):
                self.discard(id)

    def remove(self, id: str, *, states: Collection[str] = UNFINISHED) -> None:
        """Remove a job in one of these states. Default: one that was not accepted."""
        with self.database.begin() as connection:
            connection.execute(delete(JOBS).where((JOBS.c.id == id) & JOBS.c.state.in_(states)))

    def release(self, key: str) -> None:
        """Free an idempotency key whose job did not complete, unless another request took it meanwhile."""
        self._update((JOBS.c.key == key) & JOBS.c.state.in_(INCOMPLETE), key=None)

    def find(self, id: str, owner: str) -> dict[str, Any] | None:
        """Return a job of an owner, or None."""
        return self._find((JOBS.c.id == id) & (JOBS.c.owner == owner))

    def find_key(self, key: str) -> dict[str, Any] | None:
        """Return the job of an idempotency key, or None."""
        return self._find(JOBS.c.key == key)

    def _find(self, condition: Any) -> dict[str, Any] | None:
        with self.database.connect() as connection:
            row = connection.execute(select(JOBS).where(condition)).mappings().first()
        return None if row is None else dict(row)

    def finish(self, id: str, state: str, **values: Any) -> bool:
        """Record the final state of a job; returns False if it is finished already, and stays as it is."""
        unfinished = (JOBS.c.id == id) & JOBS.c.state.in_(UNFINISHED)
        return self._update(unfinished, state=state, finished=time.time(), **values) > 0

    def _update(self, condition: Any, **values: Any) -> int:
        """Change jobs; returns their number."""
        with self.database.begin() as connection:
            return connection.execute(update(JOBS).where(condition).values(**values)).rowcount

    def expire(self, keep: float) -> int:
        """Delete the files of jobs that finished more than `keep` seconds ago, and old uploads; returns their number.
        The ids stay known as expired for a week, their idempotency keys are free again. Also interrupts jobs of lost
        replicas.
        """
        if self.replica:
            self._interrupt((JOBS.c.replica != self.replica) & (JOBS.c.seen < time.time() - LOST))
        before = time.time() - keep
        old = (JOBS.c.finished < before) & (JOBS.c.state != "expired")
        with self.database.connect() as connection:
            ids = connection.scalars(select(JOBS.c.id).where(old)).all()
        for id in ids:
            self.discard(id)  # first, so that no file is left of a job that is reported as expired
            self._update(old & (JOBS.c.id == id), state="expired", key=None, response=None, error=None, files=None)
        with self.database.begin() as connection:
            connection.execute(delete(JOBS).where(JOBS.c.state == "expired", JOBS.c.finished < before - FORGOTTEN))
        for file in self.uploads.iterdir():
            with contextlib.suppress(FileNotFoundError):  # another replica deleted it
                if file.stat().st_mtime < before:
                    file.unlink()
        return len(ids)

    def discard(self, id: str) -> None:
        """Delete the images of a job."""
        shutil.rmtree(self.images / id, ignore_errors=True)

    def add_upload(self, content: bytes, suffix: str) -> str:
        """Store a condition file; returns its id."""
        id = f"file-{secrets.token_hex(16)}"
        write(self.uploads / f"{id}{suffix}", content)
        return id

    def find_upload(self, id: str) -> Path | None:
        """Return the file of an id, or None."""
        found = [self.uploads / f"{id}{suffix}" for suffix in (".png", ".json")] if IDENTIFIER.fullmatch(id) else []
        return next((file for file in found if file.is_file()), None)

    def close(self) -> None:
        """Close the connections."""
        self.database.dispose()


def write(file: Path, content: bytes) -> None:
    """Write a file atomically. Raises `OSError`, since a full disk is no fault of the request."""
    try:
        write_whole(file, content)
    except InputError as error:
        raise OSError(str(error)) from error


def create_table(database: Engine) -> None:
    """Create the table unless it exists. Replicas may start at the same time. Raises `InputError` if it is that of
    another version.
    """
    try:
        JOBS.metadata.create_all(database)
    except SQLAlchemyError:
        if not inspect(database).has_table(JOBS.name):
            raise
    existing = {column["name"] for column in inspect(database).get_columns(JOBS.name)}
    if existing != set(JOBS.c.keys()):
        raise InputError("The jobs were stored by another version of likeness: choose another data folder or database")


def connect(url: str | URL) -> Engine:
    """Open a database. SQLite writes a log ahead, so that readers and the writer do not wait for each other. Raises
    `InputError` for one in memory, which every thread would have for itself.
    """
    database = create_engine(url, pool_pre_ping=make_url(url).get_backend_name() != "sqlite")
    if database.dialect.name == "sqlite":
        if database.url.database in (None, "", ":memory:"):
            raise InputError(f"The database {url} is in memory: give a file, sqlite:///FILE")

        @event.listens_for(database, "connect")
        def configure(connection: Any, record: Any) -> None:
            connection.execute(f"PRAGMA busy_timeout = {1000 * BUSY}")
            connection.execute("PRAGMA synchronous = NORMAL")
            deadline = time.monotonic() + BUSY
            while True:
                try:
                    connection.execute("PRAGMA journal_mode = WAL")
                    return
                except sqlite3.OperationalError:  # another process changes it, for which SQLite does not wait
                    if time.monotonic() > deadline:
                        raise
                    time.sleep(0.05)

    return database
