"""A run's page: curves, previews over time and the canary's verdicts in one static HTML file that needs nothing else.

It is written anew at every checkpoint from `metrics.jsonl` and `previews/`; open `runs/<name>/index.html`.
"""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from PIL import Image

from likeness.files import write_whole
from likeness.train.metrics import METRICS, read_metrics

WIDTH, HEIGHT, MARGIN = 560, 180, 46
COLOURS = ("#3867d6", "#e1702d", "#3a9a5b", "#8854d0")
PREVIEWS = 12
"""Most previews shown, evenly spaced in time; the last is always among them."""

STYLE = """
:root { color-scheme: light dark; --line: #8884; }
body { font: 15px/1.5 system-ui, sans-serif; max-width: 74rem; margin: 2rem auto; padding: 0 1rem; }
.curves { display: grid; grid-template-columns: repeat(auto-fit, minmax(24rem, 1fr)); gap: 1rem 2rem; }
svg { width: 100%; height: auto; } svg text { font-size: 11px; fill: currentColor; } .axis { stroke: var(--line); }
figure { margin: 0 0 1rem; } figure img { max-width: 100%; border-radius: 4px; } figcaption { opacity: .7; }
.alarm { color: #c0392b; font-weight: 600; } pre { overflow: auto; border: 1px solid var(--line); padding: .7rem; }
"""


def write_page(run: Path) -> Path:
    """Write `run/index.html`.

    Raises:
        InputError: it cannot be written.
    """
    lines = read_metrics(run) if (run / METRICS).is_file() else []
    names = dict.fromkeys(name for line in lines for name, value in line.items() if isinstance(value, (int, float)))
    curves = {name: [(line["seen"], line[name]) for line in lines if name in line] for name in names}
    conditions = dict.fromkeys(
        name.removeprefix("canary/").partition("_")[0] for name in names if name.endswith("_right")
    )
    charts = [
        chart(title, {title: curves[name]})
        for name, title in (
            ("loss", "loss"),
            ("gradient_norm", "gradient norm"),
            ("learning_rate", "learning rate"),
            ("images_per_second", "images a second"),
            ("memory_gb", "peak memory, GB"),
        )
        if name in curves
    ]
    for condition in conditions:
        of = lambda name: curves.get(f"canary/{condition}_{name}", [])  # noqa: B023, E731
        charts.append(chart(f"canary: loss by {condition}", {name: of(name) for name in ("right", "shuffled", "none")}))
        times = {f"part {n} of time": of(f"time_{n}") for n in range(1, 5) if of(f"time_{n}")}
        charts.append(chart(f"validation loss with {condition}, from data to noise", times))
    said = [(line["seen"], line["canary"]) for line in lines if "canary" in line]
    alarms = [(seen, sentence) for seen, all_of in said for sentence in all_of if sentence.startswith("ALARM")]
    parts = [
        f"<h1>{escape(run.name)}</h1>",
        f"<p>{lines[-1]['seen']:,} images seen.</p>" if lines else "<p>No report yet.</p>",
        *(f'<p class="alarm">{seen:,} images: {escape(sentence)}</p>' for seen, sentence in alarms[-8:]),
        *(f"<p>{escape(sentence)}</p>" for sentence in (said[-1][1] if said else []) if sentence[:5] != "ALARM"),
        f'<div class="curves">{"".join(charts)}</div>',
        *previews(run),
    ]
    if (run / "recipe.json").is_file():
        recipe = json.dumps(json.loads((run / "recipe.json").read_text()), indent=1)
        parts.append(f"<details><summary>Recipe</summary><pre>{escape(recipe)}</pre></details>")
    head = f'<meta charset="utf-8"><title>{escape(run.name)}</title><style>{STYLE}</style>'
    write_whole(
        run / "index.html", f"<!doctype html><html lang=en><head>{head}</head><body>{''.join(parts)}</body></html>"
    )
    return run / "index.html"


def chart(title: str, curves: Mapping[str, Sequence[tuple[float, float]]]) -> str:
    """Curves of (images seen, value) in one frame; values that are not finite are left out."""
    curves = {name: [p for p in points if abs(p[1]) < float("inf")] for name, points in curves.items()}
    points = [point for curve in curves.values() for point in curve]
    if not points:
        return ""
    right, low, high = max(x for x, _ in points), min(y for _, y in points), max(y for _, y in points)
    x_of = lambda x: MARGIN + (WIDTH - MARGIN - 8) * x / max(right, 1)  # noqa: E731
    y_of = lambda y: HEIGHT - 20 - (HEIGHT - 34) * (y - low) / ((high - low) or 1)  # noqa: E731
    drawn = [
        f'<line class="axis" x1="{MARGIN}" x2="{WIDTH}" y1="{y_of(y):.1f}" y2="{y_of(y):.1f}"/>'
        f'<text x="{MARGIN - 4}" y="{y_of(y) + 4:.1f}" text-anchor="end">{y:.3g}</text>'
        for y in dict.fromkeys((low, (low + high) / 2, high))
    ]
    drawn += [
        f'<text x="{MARGIN}" y="{HEIGHT - 4}">0</text>',
        f'<text x="{WIDTH}" y="{HEIGHT - 4}" text-anchor="end">{right:,.0f} images</text>',
    ]
    for number, (name, curve) in enumerate(curves.items()):
        colour = COLOURS[number % len(COLOURS)]
        path = " ".join(f"{x_of(x):.1f},{y_of(y):.1f}" for x, y in thin(curve, 400))
        drawn.append(f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="1.6"/>')
        if len(curves) > 1:
            drawn.append(f'<text x="{MARGIN + 110 * number}" y="10" style="fill:{colour}">{escape(name)}</text>')
    svg = f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(title)}">{"".join(drawn)}</svg>'
    return f"<figure><figcaption>{escape(title)}</figcaption>{svg}</figure>"


def previews(run: Path) -> list[str]:
    """The previews as figures, the newest first, at most 256 pixels high."""
    figures = []
    for path in reversed(thin(sorted((run / "previews").glob("*.png")), PREVIEWS)):
        picture, buffer = Image.open(path).convert("RGB"), io.BytesIO()
        if picture.height > 256:
            picture = picture.resize((picture.width * 256 // picture.height, 256), Image.Resampling.LANCZOS)
        picture.save(buffer, "JPEG", quality=88)
        source = f"data:image/jpeg;base64,{base64.b64encode(buffer.getvalue()).decode()}"
        figures.append(
            f'<figure><img alt="previews" src="{source}"><figcaption>{int(path.stem):,} images</figcaption></figure>'
        )
    return figures


def thin(values: Sequence[Any], most: int) -> list[Any]:
    """At most `most` of them, evenly spaced, the last among them."""
    step = -(-len(values) // most) or 1
    return list(values[::-1][::step][::-1])
