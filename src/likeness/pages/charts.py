"""Charts as SVG that follows the colors of its page, drawn with matplotlib. Text stays text.

Axes span at least `MIN_SPAN` of their values, so that noise is not magnified; curves of a few points have markers.
"""

from __future__ import annotations

import io
import math
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

INK, FAINT = "#010101", "#020202"
"""Placeholders for the page's colors."""
COLORS = ("#3b82d6", "#e0752d", "#2f9e63", "#9a6be0", "#d6457e", "#8a8f98")
"""Of series; readable on light and dark."""
STYLE = {
    "svg.fonttype": "none",
    "svg.hashsalt": "likeness",
    "font.size": 10,
    "text.color": INK,
    "axes.labelcolor": INK,
    "axes.edgecolor": FAINT,
    "xtick.color": FAINT,
    "ytick.color": FAINT,
    "xtick.labelcolor": INK,
    "ytick.labelcolor": INK,
    "grid.color": FAINT,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.facecolor": "none",
    "figure.facecolor": "none",
    "savefig.facecolor": "none",
    "legend.frameon": False,
}
WIDTH, HEIGHT = 5.0, 2.5
"""Inches; a column of a page is about as wide."""
MIN_SPAN = 0.05
MAX_POINTS, FEW_POINTS = 400, 12


class Chart(NamedTuple):
    """A chart of a page."""

    title: str
    svg: str


def draw(title: str, paint: Callable[[Any, Any], None], height: float = HEIGHT) -> Chart:
    """Return the chart that `paint(figure, axes)` draws."""
    import matplotlib  # a second, for commands that write a page only
    from matplotlib.figure import Figure

    with matplotlib.rc_context(STYLE):
        figure, buffer = Figure(figsize=(WIDTH, height), layout="constrained"), io.StringIO()
        paint(figure, figure.subplots())
        figure.savefig(buffer, format="svg", metadata=dict.fromkeys(("Creator", "Date", "Format", "Type")))
    svg = buffer.getvalue()
    svg = re.sub(r'<g id="[^"]*"', "<g", svg[svg.index("<svg") :])  # a page has several charts
    svg = re.sub(r'<svg (.*?) width="[^"]*" height="[^"]*"', r'<svg role="img" \1', svg, count=1)
    return Chart(title, svg.replace(INK, "currentColor").replace(FAINT, "var(--line)"))


def limits(values: Sequence[float], margin: float = 0.0) -> tuple[float, float]:
    """Return the range of values, at least `MIN_SPAN` of the largest, with a margin relative to it."""
    low, high = min(values), max(values)
    missing = max(MIN_SPAN * max(abs(low), abs(high)) - (high - low), 0) or float(low == high)
    low, high = low - missing / 2, high + missing / 2
    return low - margin * (high - low), high + margin * (high - low)


def line_chart(title: str, curves: Mapping[str, Sequence[tuple[float, float]]], *, zero: bool = False) -> Chart | None:
    """Draw curves of (images seen, y) by name, with a legend above the plot if there are several; None without a finite
    point. With `zero`, the y axis starts at 0.
    """
    finite = {name: [point for point in points if math.isfinite(point[1])] for name, points in curves.items()}
    finite = {name: points[::-1][:: -(-len(points) // MAX_POINTS)] for name, points in finite.items() if points}
    if not finite:
        return None

    def paint(figure: Any, axes: Any) -> None:
        from matplotlib.ticker import EngFormatter, MaxNLocator

        for (name, points), color in zip(finite.items(), COLORS, strict=False):
            marker = "o" if len(points) <= FEW_POINTS else ""
            axes.plot(*zip(*points, strict=True), label=name, color=color, marker=marker, markersize=4, linewidth=1.6)
        values = [y for points in finite.values() for _, y in points]
        axes.set_ylim(*limits([*values, *[0.0] * zero], margin=0.06))
        axes.set_xlim(0, 1.02 * max(x for points in finite.values() for x, _ in points) or 1)
        axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))
        axes.yaxis.set_major_locator(MaxNLocator(5))
        axes.xaxis.set_major_formatter(EngFormatter(sep=""))
        axes.yaxis.set_major_formatter(lambda value, _: f"{value:.4g}")
        axes.set_xlabel("images seen")
        axes.grid(axis="y")
        if len(finite) > 1:
            figure.legend(loc="outside upper left", ncols=4)

    return draw(title, paint)


def bar_chart(title: str, bars: Mapping[str, Sequence[float]], labels: Sequence[str]) -> Chart:
    """Draw horizontal bars from 0 to 1, a group for each label and a color for each key of `bars`."""

    def paint(figure: Any, axes: Any) -> None:
        size = 0.8 / len(bars)
        for number, ((name, values), color) in enumerate(zip(bars.items(), COLORS, strict=False)):
            places = [index + (number + 0.5) * size - 0.4 for index in range(len(labels))]
            axes.barh(places, values, size, label=name, color=color)
        axes.set_yticks(range(len(labels)), labels)
        axes.set_ylim(len(labels) - 0.5, -0.5)
        axes.set_xlim(0, 1)
        axes.grid(axis="x")
        axes.set_axisbelow(True)
        if len(bars) > 1:
            figure.legend(loc="outside upper left", ncols=len(bars))

    return draw(title, paint, 0.8 + 0.26 * len(labels))


def interval_chart(title: str, rows: Sequence[tuple[str, float, float, float]], marks: Sequence[float]) -> Chart:
    """Draw values with their intervals, one below the other: rows of (label, value, low, high), and vertical lines at
    `marks`.
    """

    def paint(figure: Any, axes: Any) -> None:
        places = range(len(rows))
        names, values, low, high = zip(*rows, strict=True)
        for position in marks:
            axes.axvline(position, color=FAINT, linewidth=1.2)
        axes.hlines(places, low, high, color=COLORS[0], linewidth=2)
        axes.plot(values, places, "o", color=COLORS[0], markersize=5)
        axes.set_yticks(places, names)
        axes.set_ylim(len(rows) - 0.4, -0.6)
        axes.set_xlim(*limits([*low, *high, *marks], margin=0.04))

    return draw(title, paint, 0.6 + 0.28 * len(rows))
