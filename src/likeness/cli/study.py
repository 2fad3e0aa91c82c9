"""Commands that study a network: how conditions act in it (`likeness study ...`), and its cost (`likeness cost`)."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean as mean
from typing import Any, Literal

import tyro

from likeness.cli.portraits import RequestOptions, load_pipeline
from likeness.cli.terminal import print_notes, progress_bar
from likeness.types import InputError, PortraitRequest


@dataclass(frozen=True, kw_only=True)
class Study(RequestOptions):
    """A command that studies a model; options as in `likeness generate`."""

    model: tyro.conf.Positional[str] = field()  # required
    """Bundled model, folder of a model or an adapter, or hub id."""
    seed: int = 0
    """Seed of the image."""
    out: Path = Path("studies")
    """Folder for NAME.json and NAME.html, NAME being that of the study."""

    def prepare(self) -> tuple[Any, PortraitRequest]:
        """Load the model and resolve the request."""
        request = self.request(self.seed)

        from likeness.pipelines.generate import resolve

        pipeline = load_pipeline(self.model, self.dtype, self.device, self.base)
        return pipeline, resolve(request, pipeline)


@dataclass(frozen=True, kw_only=True)
class Keys(Study):
    """Measure how much keys and values change between steps, by layer and modality."""

    def __call__(self) -> None:
        from likeness.evaluate.study import key_similarity

        pipeline, request = self.prepare()
        with progress_bar("Generating") as advance:
            found = key_similarity(pipeline, request, advance)
        trained = found["trained_as"]
        if trained != "holistic":
            print_notes([f"This checkpoint was trained with {trained} attention and runs with holistic attention here"])
        parts = [(part, name) for part in ("keys", "values") for name in found[part]]
        table = {f"{part} {name}": found[part][name]["pairs"] for part, name in parts}
        text = "Cosine similarity of a token's keys and values at two steps, mean over all pairs of steps"
        maps = {f"{part} {name}, similarity to the first step": found[part][name]["to_first"] for part, name in parts}
        rows = with_mean(found["layers"], table)
        write(self.out / "keys", self.model, request, found, text, rows, maps, step_names(found))


@dataclass(frozen=True, kw_only=True)
class Attention(Study):
    """Measure where the attention of each modality goes, and the gates, by layer and step."""

    def __call__(self) -> None:
        from likeness.evaluate.study import attention_mass

        pipeline, request = self.prepare()
        with progress_bar("Generating") as advance:
            found = attention_mass(pipeline, request, advance)
        mass, gates = found["mass"], found["gates"]
        tokens = ", ".join(f"{count} {name}" for name, count in found["tokens"].items())
        text = f"Fraction of the image's attention, and mean absolute gates; means over the steps ({tokens} tokens)"
        table = {f"to {name}": list(map(mean, layers)) for name, layers in mass["image"].items()}
        table |= {f"gate {name}": list(map(mean, layers)) for name, layers in gates["attention"].items()}
        maps = {f"{queries} to {name}": layers for queries, own in mass.items() for name, layers in own.items()}
        maps |= {f"{kind} gate, {name}": layers for kind, own in gates.items() for name, layers in own.items()}
        rows = with_mean(found["layers"], table)
        write(self.out / "attention", self.model, request, found, text, rows, maps, step_names(found))


@dataclass(frozen=True, kw_only=True)
class Positions(Study):
    """Measure how well images match the mask if the positions of its tokens are shifted to the right."""

    shifts: tuple[int, ...] = (0, 1, 2, 4)
    """Numbers of tokens."""
    count: int = 4
    """Images per shift, with consecutive seeds."""
    parser: str = "bundled"
    """Face parser: bundled, a folder, or a hub id."""

    def __call__(self) -> None:
        if self.count < 1 or not self.shifts:
            raise InputError(
                f"count is {self.count} and shifts has {len(self.shifts)} values: both require at least one"
            )
        from likeness.annotators.face_parser import load_face_parser
        from likeness.evaluate.study import shifted_positions

        pipeline, request = self.prepare()
        network = load_face_parser(self.parser)
        seeds = [request.seed + number for number in range(self.count)]
        with progress_bar("Generating") as advance:
            found = shifted_positions(pipeline, request, seeds, self.shifts, network, advance)
        found |= {"parser": self.parser, "seeds": seeds}
        text = (
            f"Pixel accuracy against the mask, mean of {self.count} images parsed by the face parser {self.parser}. "
            f"Without conditions: {mean(found['without']):.3f}. One token is {found['unit']} pixels"
        )
        maps = {"mask": found["accuracy"], "shifted mask": found["moved"]}
        table = {name: list(map(mean, values)) for name, values in maps.items()}
        rows = {f"shift {shift}": [values[n] for values in table.values()] for n, shift in enumerate(self.shifts)}
        columns = [f"seed {seed}" for seed in seeds]
        write(self.out / "positions", self.model, request, found, text, (list(table), rows), maps, columns)


@dataclass(frozen=True, kw_only=True)
class Cost:
    """Count the operations and memory that a mask adds to MDiTFace on FLUX.1-dev, for every form of attention.

    Runs the full-size network without weights, in half a minute.
    """

    network: tyro.conf.Positional[Literal["mditface"]]
    """The network."""
    size: int = 512
    """Side in pixels."""
    steps: int = 28
    """Sampling steps."""
    text_tokens: int = 512
    """Tokens of the prompt."""
    conditions: int = 1
    """Number of simultaneous conditions."""
    rank: int = 8
    """Rank of the adapter's LoRA."""

    def __call__(self) -> None:
        from likeness.evaluate.cost import mditface_costs

        plain, *forms = mditface_costs(**{name: value for name, value in vars(self).items() if name != "network"})
        holistic = next(form for form in forms if form.attention == "holistic")
        print(
            f"10^12 multiply-accumulates per image: {self.size} px, {self.steps} steps, {self.text_tokens} text tokens"
            f", {self.conditions} condition{'s' * (self.conditions > 1)}, LoRA rank {self.rank}"
        )
        print(f"{'':10}{'Linear, LayerNorm':>30}{'all products':>30}{'cache':>12}{'adapter':>12}")
        print(f"{'':10}" + f"{'total':>10}{'added':>10}{'saved':>10}" * 2 + f"{'MB, bf16':>12}{'parameters':>12}")
        for row in (plain, *forms):
            line = f"{row.attention:10}"
            for own, none, full in zip(row[1:3], plain[1:3], holistic[1:3], strict=True):
                line += f"{own / 1e12:10.2f}{(own - none) / 1e12:10.2f}{1 - (own - none) / (full - none):10.1%}"
            print(f"{line}{row.cache / 1e6:12.0f}{row.adapter:12,}")
        print(
            "saved: relative to holistic attention. The left count is that of Table 4 of the paper (docs/mditface.md)"
        )


Table = tuple[list[str], dict[str, list[float]]]
"""Names of the columns, and the values of each row."""


def with_mean(layers: Sequence[str], columns: Mapping[str, Sequence[float]]) -> Table:
    """Arrange columns of one value per layer as a table, with their means."""
    rows = {layer: [values[index] for values in columns.values()] for index, layer in enumerate(layers)}
    return list(columns), {**rows, "mean": [mean(values) for values in columns.values()]}


def step_names(found: Mapping[str, Any]) -> list[str]:
    """The steps, starting at 1."""
    return [f"step {number + 1}" for number in range(len(found["times"]))]


def write(
    stem: Path,
    model: str,
    request: PortraitRequest,
    found: Mapping[str, Any],
    text: str,
    table: Table,
    maps: Mapping[str, Sequence[Sequence[float]]],
    map_columns: Sequence[str],
) -> None:
    """Print a table; write the numbers with the request as JSON, and heat maps and the table as a page."""
    from likeness.files import write_whole
    from likeness.pages import Section, markdown_table, write_page
    from likeness.pages.charts import heat_map

    columns, rows = table
    cells = [[row, *(f"{value:.3f}" for value in values)] for row, values in rows.items()]
    section = Section(title="Means", header=["", *columns], rows=cells)
    charts = [heat_map(title, values, list(rows)[: len(values)], map_columns) for title, values in maps.items()]
    print(text, markdown_table(section), sep="\n\n")
    content = {"model": model, "request": {**vars(request), "conditions": sorted(request.conditions)}}
    write_whole(stem.with_suffix(".json"), json.dumps({**content, **found}, indent=1))
    page = [Section(verdict=[f"{text}."]), Section(charts=charts), section]
    write_page(stem.with_suffix(".html"), f"{model}: {stem.name}", page)
    print(f"{stem}.json  {stem}.html")
