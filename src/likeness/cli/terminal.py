"""What all commands share: arguments, progress, and a quiet terminal."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import tyro

PathArgument = tyro.conf.Positional[Path]


def quiet_libraries() -> None:
    """Our own bar and notes are enough: diffusers and transformers speak of errors only."""
    import diffusers.utils.logging
    import transformers.utils.logging

    for library in (diffusers, transformers):
        library.utils.logging.set_verbosity_error()
        library.utils.logging.disable_progress_bar()


def tell_counts(out: Path, found: dict[str, Any]) -> None:
    """What an ingest did: counts on stdout, the first skipped files on stderr."""
    told = [f"skipped {file}: {reason}" for file, reason in found["skipped"].items()]
    tell(told[:20] + [f"and {len(told) - 20} more"] * (len(told) > 20))
    counts = ", ".join(f"{value} {name}" for name, value in found.items() if name != "skipped")
    print(f"{out}: {counts}, {len(found['skipped'])} skipped")


def tell(lines: list[str]) -> None:
    """Notes for the user, on stderr, so that stdout holds results only."""
    for line in lines:
        print(line, file=sys.stderr)


@contextmanager
def progress_bar(title: str) -> Iterator[Callable[[int, int], None]]:
    """A bar on stderr, moved by calls with (done, in all)."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    console = Console(stderr=True)
    own = sys.stdout.isatty()  # rich would send stdout to stderr along with the bar
    with Progress(
        *columns, console=console, transient=True, disable=not console.is_terminal, redirect_stdout=own
    ) as progress:
        task = progress.add_task(title, total=None)
        yield lambda done, total: progress.update(task, completed=done, total=total)
