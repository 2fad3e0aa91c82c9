"""The one writer of pages for people: training runs, evaluations, comparisons, studies and contact sheets.

A page is a list of sections: verdict and images first, then charts, then tables. It is one HTML file without scripts
or external files, readable on a phone and in dark mode; `markdown` renders the same sections as text.
"""

from __future__ import annotations

import base64
import io
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
from jinja2 import Environment, PackageLoader, select_autoescape
from PIL import Image

from likeness.files import write_whole
from likeness.pages.charts import Chart
from likeness.types import InputError

SIDE = 160
"""Side of an embedded image, in pixels."""


class Figure(NamedTuple):
    """Images side by side, with text below."""

    images: Sequence[tuple[str, str]]
    """Label, and the output of `embed`. A single image is as wide as it is."""
    captions: Sequence[str] = ()
    place: str = ""
    """Where it comes from."""
    faults: Sequence[str] = ()


@dataclass(frozen=True, kw_only=True)
class Section:
    """A part of a page, in the order of its fields. Markdown omits sections of figures, charts or code."""

    title: str = ""
    level: int = 2
    alarms: Sequence[str] = ()
    verdict: Sequence[str] = ()
    """What the page says, one sentence each."""
    figures: Sequence[Figure] = ()
    charts: Sequence[Chart] = ()
    header: Sequence[str] = ()
    rows: Sequence[Sequence[str]] = ()
    text: str = ""
    lines: Sequence[str] = ()
    code: str = ""
    """Unfolded on demand."""


def render(template: str, title: str, sections: Iterable[Section]) -> str:
    """Render `page.html.jinja` or `page.md.jinja`."""
    environment = Environment(
        loader=PackageLoader("likeness.pages"),
        autoescape=select_autoescape(("html.jinja",)),
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template(template).render(title=title, sections=list(sections))


def write_page(file: Path, title: str, sections: Iterable[Section]) -> None:
    """Write an HTML page. Raises `InputError` if it cannot be written."""
    page = render("page.html.jinja", title, sections)
    write_whole(file, page.encode(errors="replace"))  # captions may have lone surrogates, which cannot be encoded


def write_markdown(file: Path, title: str, sections: Iterable[Section]) -> None:
    """Write Markdown, likewise."""
    write_whole(file, render("page.md.jinja", title, sections).encode(errors="replace"))


def markdown_table(section: Section) -> str:
    """Render the table of a section as Markdown."""
    return render("page.md.jinja", "", [Section(header=section.header, rows=section.rows)]).strip()


def embed(read: Callable[[], np.ndarray | Image.Image], size: tuple[int, int] = (SIDE, SIDE)) -> str:
    """Return an image as a data URL, shrunk to a size; "" if `read` raises `InputError`."""
    try:
        content = read()
    except InputError:
        return ""
    image, buffer = content if isinstance(content, Image.Image) else Image.fromarray(content), io.BytesIO()
    image.thumbnail(size)
    image.save(buffer, "WEBP", quality=90)
    return f"data:image/webp;base64,{base64.b64encode(buffer.getvalue()).decode()}"
