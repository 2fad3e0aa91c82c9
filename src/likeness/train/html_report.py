"""The report of a run: curves, previews over time and diagnostics in one self-contained HTML file, `run/index.html`."""

from __future__ import annotations

import base64
import io
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jinja2
from PIL import Image, ImageOps

from likeness.files import write_whole
from likeness.train.metrics import read_metrics

WIDTH, HEIGHT, MARGIN = 560, 180, 46
COLORS = ("#3867d6", "#e1702d", "#3a9a5b", "#8854d0")
MAX_POINTS, MAX_PREVIEWS, MAX_ALARMS = 400, 12, 8

TITLES = {
    "loss": "loss",
    "gradient_norm": "gradient norm",
    "learning_rate": "learning rate",
    "images_per_second": "images per second",
    "memory_gb": "peak memory, GB",
}

TEMPLATE = jinja2.Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True).from_string("""<!doctype html>
<html lang=en><head><meta charset="utf-8"><title>{{ name }}</title><style>
:root { color-scheme: light dark; --line: #8884; }
body { font: 15px/1.5 system-ui, sans-serif; max-width: 74rem; margin: 2rem auto; padding: 0 1rem; }
.curves { display: grid; grid-template-columns: repeat(auto-fit, minmax(24rem, 1fr)); gap: 1rem 2rem; }
svg { width: 100%; height: auto; } svg text { font-size: 11px; fill: currentColor; } .axis { stroke: var(--line); }
figure { margin: 0 0 1rem; } figure img { max-width: 100%; border-radius: 4px; } figcaption { opacity: .7; }
.alarm { color: #c0392b; font-weight: 600; } pre { overflow: auto; border: 1px solid var(--line); padding: .7rem; }
</style></head><body><h1>{{ name }}</h1>
<p>{{ "{:,} images seen.".format(lines[-1].seen) if lines else "No report yet." }}</p>
{% for seen, alarm in alarms %}<p class="alarm">ALARM: {{ alarm }} ({{ "{:,}".format(seen) }} images)</p>{% endfor %}
{% for message in messages %}<p>{{ message }}</p>{% endfor %}
<div class="curves">
{% for chart in charts %}
<figure><figcaption>{{ chart.title }}</figcaption>
<svg viewBox="0 0 {{ width }} {{ height }}" role="img" aria-label="{{ chart.title }}">
{% for y, value in chart.ticks %}
<line class="axis" x1="{{ margin }}" x2="{{ width }}" y1="{{ y }}" y2="{{ y }}"/>
<text x="{{ margin - 4 }}" y="{{ y + 4 }}" text-anchor="end">{{ "%.3g" | format(value) }}</text>
{% endfor %}
<text x="{{ margin }}" y="{{ height - 4 }}">0</text>
<text x="{{ width }}" y="{{ height - 4 }}" text-anchor="end">{{ "{:,.0f} images".format(chart.end) }}</text>
{% for label, points in chart.curves %}
{% set color = colors[loop.index0 % colors | length] %}
<polyline points="{{ points }}" fill="none" stroke="{{ color }}" stroke-width="1.6"/>
{% if chart.curves | length > 1 %}
<text x="{{ margin + 110 * loop.index0 }}" y="10" style="fill:{{ color }}">{{ label }}</text>
{% endif %}
{% endfor %}
</svg></figure>
{% endfor %}
</div>
{% for seen, source in previews %}
<figure><img alt="previews" src="data:image/jpeg;base64,{{ source }}"><figcaption>{{ seen }}
images</figcaption></figure> {% endfor %} {% if recipe %}<details><summary>Recipe</summary><pre>{{ recipe
}}</pre></details>{% endif %} </body></html> """)


def write_report(run: Path) -> Path:
    """Write `run/index.html` from `metrics.jsonl`, `previews/` and `recipe.json`. Raises `InputError` if it cannot be
    written.
    """
    lines = read_metrics(run)
    names = dict.fromkeys(name for line in lines for name, value in line.items() if isinstance(value, (int, float)))
    curves = {name: [(line["seen"], line[name]) for line in lines if name in line] for name in names}
    charts = [chart(title, {title: curves.get(name, [])}) for name, title in TITLES.items()]
    for prefix in [name.removesuffix("_right") for name in names if name.endswith("_right")]:
        condition = prefix.removeprefix("diagnostics/")
        variants = {name: curves[f"{prefix}_{name}"] for name in ("right", "shuffled", "none")}
        charts.append(chart(f"diagnostics: loss by {condition}", variants))
        times = {name: curve for name, curve in curves.items() if name.startswith(f"{prefix}_time_")}
        times = {f"part {n} of time": curve for n, curve in enumerate(times.values(), start=1)}
        charts.append(chart(f"validation loss with {condition}, from data to noise", times))
    recipe = run / "recipe.json"
    page = TEMPLATE.render(
        name=run.name,
        lines=lines,
        alarms=[(line["seen"], alarm) for line in lines for alarm in line.get("alarms", ())][-MAX_ALARMS:],
        messages=next((line["messages"] for line in reversed(lines) if "messages" in line), ()),
        charts=[one for one in charts if one],
        previews=[
            (f"{int(path.stem):,}", jpeg(path))
            for path in reversed(subsample(sorted((run / "previews").glob("*.png")), MAX_PREVIEWS))
        ],
        recipe=recipe.read_text(encoding="utf-8") if recipe.is_file() else None,
        width=WIDTH,
        height=HEIGHT,
        margin=MARGIN,
        colors=COLORS,
    )
    write_whole(run / "index.html", page)
    return run / "index.html"


def chart(title: str, curves: Mapping[str, Sequence[tuple[float, float]]]) -> dict[str, Any] | None:
    """Return the coordinates of a chart of finite (images seen, value) points; None if there are none."""
    curves = {name: [point for point in points if math.isfinite(point[1])] for name, points in curves.items()}
    points = [point for curve in curves.values() for point in curve]
    if not points:
        return None
    end, low, high = max(x for x, _ in points), min(y for _, y in points), max(y for _, y in points)
    x_of = lambda x: MARGIN + (WIDTH - MARGIN - 8) * x / max(end, 1)  # noqa: E731
    y_of = lambda y: HEIGHT - 20 - (HEIGHT - 34) * (y - low) / ((high - low) or 1)  # noqa: E731
    return {
        "title": title,
        "end": end,
        "ticks": [(round(y_of(y), 1), y) for y in dict.fromkeys((low, (low + high) / 2, high))],
        "curves": [
            (name, " ".join(f"{x_of(x):.1f},{y_of(y):.1f}" for x, y in subsample(curve, MAX_POINTS)))
            for name, curve in curves.items()
        ],
    }


def jpeg(path: Path) -> str:
    """Return an image, at most 256 pixels high, as JPEG in base64."""
    image, buffer = Image.open(path).convert("RGB"), io.BytesIO()
    ImageOps.contain(image, (image.width, 256)).save(buffer, "JPEG", quality=88)
    return base64.b64encode(buffer.getvalue()).decode()


def subsample(values: Sequence[Any], count: int) -> list[Any]:
    """Return at most `count` values, evenly spaced and including the last."""
    step = -(-len(values) // count) or 1
    return list(values[::-1][::step][::-1])
