"""Output that all commands share: notes, errors and progress bars."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import tyro

PathArgument = tyro.conf.Positional[Path]


def quiet_libraries() -> None:
    """Restrict the output of diffusers and transformers to errors."""
    import diffusers.utils.logging
    import transformers.utils.logging

    for library in (diffusers, transformers):
        library.utils.logging.set_verbosity_error()
        library.utils.logging.disable_progress_bar()


def print_counts(out: Path, found: dict[str, Any]) -> None:
    """Print the counts of an import to stdout, and the first skipped files to stderr."""
    skipped = [f"skipped {file}: {reason}" for file, reason in found["skipped"].items()]
    print_notes(skipped[:20] + [f"and {len(skipped) - 20} more"] * (len(skipped) > 20))
    counts = ", ".join(f"{value} {name}" for name, value in found.items() if name != "skipped")
    print(f"{out}: {counts}, {len(found['skipped'])} skipped")


def print_notes(lines: list[str]) -> None:
    """Print notes to stderr; stdout is for results."""
    for line in lines:
        print(printable(line), file=sys.stderr)


def print_error(message: str) -> None:
    """Print an error to stderr."""
    print(f"likeness: {printable(message)}", file=sys.stderr)


def printable(text: str) -> str:
    """Escape control characters, which names of files could use to change the terminal."""
    return re.sub(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]", lambda match: f"\\x{ord(match[0]):02x}", text)


@contextmanager
def progress_bar(title: str) -> Iterator[Callable[..., None]]:
    """Show a progress bar on stderr, updated by calls with (done, total) or (done, total, another title)."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    console = Console(stderr=True)
    own = sys.stdout.isatty()  # rich would send stdout to stderr along with the bar
    with Progress(
        *columns, console=console, transient=True, disable=not console.is_terminal, redirect_stdout=own
    ) as progress:
        task = progress.add_task(title, total=None)
        yield lambda done, total, title=title: progress.update(task, description=title, completed=done, total=total)
