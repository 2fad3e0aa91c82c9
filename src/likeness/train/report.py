"""The page of a run: alarms, diagnostics, previews over time and curves, in `run/index.html`."""

from __future__ import annotations

from functools import partial
from pathlib import Path

from PIL import Image

from likeness.pages import Figure, Section, embed, write_page
from likeness.pages.charts import line_chart
from likeness.train.metrics import read_metrics

PREVIEW = 256
"""Height of embedded previews, in pixels."""
MAX_PREVIEWS, MAX_ALARMS = 12, 8
MIN_POINTS = 4
"""Curves of fewer points are in the table of values only."""

TITLES = {
    "loss": "Loss",
    "gradient_norm": "Gradient norm",
    "learning_rate": "Learning rate",
    "images_per_second": "Images per second",
    "memory_gb": "Peak memory, GB",
}


def write_report(run: Path) -> Path:
    """Write `run/index.html` from `metrics.jsonl`, `previews/` and `recipe.json`. Raises `InputError` if it cannot be
    written.
    """
    lines = read_metrics(run)
    measured = {name for line in lines for name, value in line.items() if isinstance(value, (int, float))} - {"seen"}
    names = [*(name for name in TITLES if name in measured), *sorted(measured - TITLES.keys())]
    curves = {name: [(line["seen"], line[name]) for line in lines if name in line] for name in names}
    groups = {title: {title: curves[name]} for name, title in TITLES.items() if name in curves}
    for prefix in [name.removesuffix("_right") for name in names if name.endswith("_right")]:
        condition = prefix.removeprefix("diagnostics/")
        groups[f"Loss by {condition}"] = {
            title: curves[f"{prefix}_{name}"]
            for title, name in {"right": "right", "another face's": "shuffled", "none": "none"}.items()
        }
        times = [curve for name, curve in curves.items() if name.startswith(f"{prefix}_time_")]
        groups[f"Loss with {condition} by part of the time, 1 is nearest to data"] = {
            str(n): curve for n, curve in enumerate(times, start=1)
        }
    long = {title: own for title, own in groups.items() if max(map(len, own.values()), default=0) >= MIN_POINTS}
    charts = [line_chart(title, own, zero=not title.startswith("Loss")) for title, own in long.items()]
    alarms = [(line["seen"], alarm) for line in lines for alarm in line.get("alarms", ())][-MAX_ALARMS:]
    messages = next((line["messages"] for line in reversed(lines) if "messages" in line), ())
    loss = curves.get("loss")
    previews = sorted(path for path in (run / "previews").glob("*.png") if path.stem.isdigit())
    previews = previews[::-1][:: -(-len(previews) // MAX_PREVIEWS) or 1]  # newest first
    recipe = run / "recipe.json"
    seen = f"{lines[-1]['seen']:,} images seen" if lines else "No report yet"
    sections = [
        Section(
            alarms=[f"ALARM: {alarm} ({count:,} images)" for count, alarm in alarms],
            verdict=[f"{seen}, loss {loss[-1][1]:.4g}." if loss else f"{seen}."],
            lines=list(messages),
        ),
        Section(
            title="Previews" if previews else "",
            figures=[
                Figure([(f"{int(path.stem):,} images", embed(partial(Image.open, path), (2**14, PREVIEW)))])
                for path in previews
            ],
        ),
        Section(title="Curves" if charts else "", charts=[chart for chart in charts if chart]),
        Section(
            title="Values" if curves else "",
            header=["", "last", "lowest", "highest"] if curves else (),
            rows=[
                [TITLES.get(name, name), *(f"{value:.4g}" for value in (last, min(values), max(values)))]
                for name, values in ((name, [value for _, value in curve]) for name, curve in curves.items())
                for last in values[-1:]
            ],
        ),
        Section(title="Recipe", code=recipe.read_text(encoding="utf-8")) if recipe.is_file() else Section(),
    ]
    write_page(run / "index.html", run.name, sections)
    return run / "index.html"
