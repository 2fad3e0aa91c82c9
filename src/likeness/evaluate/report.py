"""What an evaluation found, as tables in Markdown; `page.py` writes them, and the page with pictures.

A table has a row a metric and a column a set of portraits, then the floor (another face's condition or caption) and the
ceiling (photographs through the autoencoder), without which a score says little.
"""

from __future__ import annotations

import tomllib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from likeness.evaluate.config import CEILING
from likeness.evaluate.metrics import METRICS

PUBLISHED = Path(__file__).with_name("published.toml")

BETTER = {"higher": "↑", "lower": "↓"}


def published_tables() -> list[dict[str, Any]]:
    """The numbers that papers print, as texts, so that they keep the digits they are printed with."""
    return tomllib.loads(PUBLISHED.read_text(), parse_float=str)["table"]


def rounded(value: float, sign: str = "") -> str:
    """A number as tables show it: four places below 10, two above; what four places would hide (KID), by its power of
    ten.

    Args:
        value: the number.
        sign: "+" for differences.
    """
    form = ".1e" if 0 < abs(value) < 5e-4 else ".4f" if abs(value) < 10 else ".2f"
    return f"{value:{sign}{form}}"


def cell(number: Mapping[str, Any] | None) -> str:
    """A value with its interval."""
    if number is None:
        return "-"
    mark = " ⚠" if number["warning"] else ""
    return f"{rounded(number['value'])} ({rounded(number['low'])} to {rounded(number['high'])}){mark}"


def columns_of(results: Mapping[str, Any]) -> list[str]:
    """The sets that have a column, the ceiling last."""
    given = list(results["portraits"])
    return given + ([CEILING] if any(number["given"] == CEILING for number in results["numbers"]) else [])


def rows_of(results: Mapping[str, Any]) -> list[list[str]]:
    """The table of all numbers: title, n, one cell a set, the floor, the ceiling."""
    by_place = {(n["metric"], n["given"], n["against"]): n for n in results["numbers"]}
    rows = []
    for key in dict.fromkeys(number["metric"] for number in results["numbers"]):
        metric = METRICS[key]
        own = {given: by_place.get((key, given, "own")) for given in columns_of(results)}
        floor = next((n for n in results["numbers"] if n["metric"] == key and n["against"] == "another"), None)
        counts = sorted({number["n"] for number in own.values() if number})
        n = str(counts[0]) if len(counts) == 1 else f"{counts[0]} to {counts[-1]}"
        cells = [cell(own[given]) for given in results["portraits"]]
        told = f"{cell(floor)} [{floor['given']}]" if floor else "-"
        rows.append([f"{metric.title} {BETTER[metric.better]}", n, *cells, told, cell(own.get(CEILING))])
    return rows


def header_of(results: Mapping[str, Any]) -> list[str]:
    """The heads of `rows_of`."""
    return ["metric", "n", *(f"from {given}" for given in results["portraits"]), "another face's", "ceiling"]


def markdown_table(results: Mapping[str, Any]) -> str:
    """All numbers as one Markdown table."""
    return table(header_of(results), rows_of(results))


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(str(value) for value in line) + " |" for line in lines)


def protocol_lines(results: Mapping[str, Any]) -> list[str]:
    """The protocol in words, one fact a line."""
    protocol = results["protocol"]
    told = [f"{key}: {value}" for key, value in protocol.items() if value is not None]
    told += [f"{name}: {found['what']}, hash {found['hash']}" for name, found in results["extractors"].items()]
    return [*told, "seed of a portrait: the number of its face, plus 1,000,000 in each further round"]


def warnings_of(results: Mapping[str, Any]) -> list[str]:
    """What is wrong with single numbers."""
    found = [f"{METRICS[n['metric']].title}, n = {n['n']}: {n['warning']}" for n in results["numbers"] if n["warning"]]
    return list(dict.fromkeys(found))


def markdown(results: Mapping[str, Any]) -> str:
    """The whole report as Markdown."""
    model = results["protocol"].get("model") or "pictures"
    parts = [
        f"# {model}: {results['protocol']['n']} faces of {results['protocol']['split']}",
        markdown_table(results),
        "In brackets the 95 % interval: bootstrap over faces; for sets, the spread over random parts.",
    ]
    for title, lines in (
        ("Warnings", warnings_of(results)),
        ("Not measured", [f"{METRICS[entry['metric']].title}: {entry['why']}" for entry in results["missing"]]),
        ("Not read", [f"{fault['file']}: {fault['why']}" for fault in results["faults"]]),
        ("Notes", results["notes"]),
        ("Protocol", protocol_lines(results)),
    ):
        if lines:
            parts += [f"## {title}", "\n".join(f"- {line}" for line in lines)]
    for given, classes in results["classes"].items():
        rows = [[c["class"], str(c["n"]), rounded(c["iou"]), rounded(c["shown"])] for c in classes]
        parts += [f"## Classes, {given}", table(["class", "n", "IoU, pixels pooled", "shown"], rows)]
    parts.append("## Published, under other protocols: not comparable with the numbers above")
    for entry in published_tables():
        parts += [f"### {entry['title']}", table(["method", *entry["columns"]], entry["rows"])]
        parts.append(f"Source: {entry['source']}. Not stated: {entry['unknown']}.")
    return "\n\n".join(parts) + "\n"
