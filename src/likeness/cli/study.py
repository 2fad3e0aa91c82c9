"""Commands that study a network: how conditions act in it (`likeness study ...`), and its cost (`likeness cost`)."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean as mean
from typing import Annotated, Any, Literal

import tyro

from likeness.cli.portraits import load_pipeline
from likeness.cli.terminal import print_notes, progress_bar
from likeness.types import ConditionInput, DtypeName, InputError, PortraitRequest


@dataclass(frozen=True, kw_only=True)
class Subject:
    """The model and the request to study; options as in `likeness generate`."""

    model: tyro.conf.Positional[str]
    """Bundled model, folder of a model or an adapter, or hub id."""
    prompt: tyro.conf.Positional[str] = ""
    """Prompt."""
    negative_prompt: str = ""
    """Negative prompt."""
    mask: Path | None = None
    """Semantic mask."""
    sketch: Path | None = None
    """Sketch, dark lines on white."""
    keypoints: Path | None = None
    """68 or 478 facial keypoints."""
    base: str | None = None
    """Base model of an adapter, if it is not the one that the adapter names."""
    steps: int | None = None
    """Sampling steps. Default: the model's."""
    guidance_scale: float | None = None
    """Classifier-free guidance scale. Default: the model's."""
    seed: int = 0
    """Seed of the image."""
    size: str | None = None
    """Size in pixels, as 128 or 128x160 (width x height): one that the model was trained at."""
    force_size: bool = False
    """Generate at SIZE even if the model was not trained at it."""
    device: str = "auto"
    """Device, for example cuda or cpu; auto takes an accelerator if present."""
    dtype: DtypeName = "auto"
    """Number format; auto is fp32 on a CPU, bf16 or fp16 on an accelerator."""


SubjectArgument = Annotated[Subject, tyro.conf.arg(name="")]

OUT = Path("studies")


def keys(subject: SubjectArgument, *, out: Path = OUT) -> None:
    """Measure how much keys and values change between steps, by layer and modality.

    Args:
        out: Folder for keys.json and keys.html.
    """
    from likeness.evaluate.study import key_similarity

    pipeline, request = prepare(subject)
    with progress_bar("Generating") as advance:
        found = key_similarity(pipeline, request, advance)
    notes = []
    if found["trained_as"] != "holistic":
        notes = [
            f"This checkpoint was trained with {found['trained_as']} attention and runs with holistic attention here"
        ]
    print_notes(notes)
    parts = [(part, name) for part in ("keys", "values") for name in found[part]]
    table = {f"{part} {name}": found[part][name]["pairs"] for part, name in parts}
    text = "Cosine similarity of a token's keys and values at two steps, mean over all pairs of steps"
    maps = {f"{part} {name}, similarity to the first step": found[part][name]["to_first"] for part, name in parts}
    write(out, "keys", subject, request, found, text, with_mean(found["layers"], table), maps, step_names(found))


def attention(subject: SubjectArgument, *, out: Path = OUT) -> None:
    """Measure where the attention of each modality goes, and the gates, by layer and step.

    Args:
        out: Folder for attention.json and attention.html.
    """
    from likeness.evaluate.study import attention_mass

    pipeline, request = prepare(subject)
    with progress_bar("Generating") as advance:
        found = attention_mass(pipeline, request, advance)
    mass, gates = found["mass"], found["gates"]
    tokens = ", ".join(f"{count} {name}" for name, count in found["tokens"].items())
    text = f"Fraction of the image's attention, and mean absolute gates; means over the steps ({tokens} tokens)"
    table = {f"to {name}": list(map(mean, layers)) for name, layers in mass["image"].items()}
    table |= {f"gate {name}": list(map(mean, layers)) for name, layers in gates["attention"].items()}
    maps = {f"{queries} to {name}": layers for queries, own in mass.items() for name, layers in own.items()}
    maps |= {f"{kind} gate, {name}": layers for kind, own in gates.items() for name, layers in own.items()}
    write(out, "attention", subject, request, found, text, with_mean(found["layers"], table), maps, step_names(found))


def positions(
    subject: SubjectArgument,
    *,
    shifts: tuple[int, ...] = (0, 1, 2, 4),
    count: int = 4,
    parser: str = "bundled",
    out: Path = OUT,
) -> None:
    """Measure how well images match the mask if the positions of its tokens are shifted to the right.

    Args:
        shifts: Numbers of tokens.
        count: Images per shift, with consecutive seeds.
        parser: Face parser: bundled, a folder, or a hub id.
        out: Folder for positions.json and positions.html.
    """
    if count < 1 or not shifts:
        raise InputError(f"count is {count} and shifts has {len(shifts)} values: both require at least one")
    from likeness.annotators.face_parser import load_face_parser
    from likeness.evaluate.study import shifted_positions

    pipeline, request = prepare(subject)
    network = load_face_parser(parser)
    seeds = [request.seed + number for number in range(count)]
    with progress_bar("Generating") as advance:
        found = shifted_positions(pipeline, request, seeds, shifts, network, advance)
    found |= {"parser": parser, "seeds": seeds}
    text = (
        f"Pixel accuracy against the mask, mean of {count} images parsed by the face parser {parser}. "
        f"Without conditions: {mean(found['without']):.3f}. One token is {found['unit']} pixels"
    )
    maps = {"mask": found["accuracy"], "shifted mask": found["moved"]}
    table = {name: list(map(mean, values)) for name, values in maps.items()}
    rows = {f"shift {shift}": [values[index] for values in table.values()] for index, shift in enumerate(shifts)}
    columns = [f"seed {seed}" for seed in seeds]
    write(out, "positions", subject, request, found, text, (list(table), rows), maps, columns)


def cost(
    network: tyro.conf.Positional[Literal["mditface"]],
    *,
    size: int = 512,
    steps: int = 28,
    text_tokens: int = 512,
    conditions: int = 1,
    rank: int = 8,
) -> None:
    """Count the operations and memory that a mask adds to MDiTFace on FLUX.1-dev, for every form of attention.

    Runs the full-size network without weights, in half a minute.

    Args:
        network: The network.
        size: Side in pixels.
        steps: Sampling steps.
        text_tokens: Tokens of the prompt.
        conditions: Number of simultaneous conditions.
        rank: Rank of the adapter's LoRA.
    """
    from likeness.evaluate.cost import mditface_costs

    plain, *forms = mditface_costs(size=size, steps=steps, text_tokens=text_tokens, conditions=conditions, rank=rank)
    holistic = next(form for form in forms if form.attention == "holistic")
    print(f"10^12 multiply-accumulates per image: {size} px, {steps} steps, {text_tokens} text tokens, ", end="")
    print(f"{conditions} condition{'s' * (conditions > 1)}, LoRA rank {rank}")
    print(f"{'':10}{'Linear, LayerNorm':>30}{'all products':>30}{'cache':>12}{'adapter':>12}")
    print(f"{'':10}" + f"{'total':>10}{'added':>10}{'saved':>10}" * 2 + f"{'MB, bf16':>12}{'parameters':>12}")
    for row in (plain, *forms):
        line = f"{row.attention:10}"
        for own, none, full in zip(row[1:3], plain[1:3], holistic[1:3], strict=True):
            line += f"{own / 1e12:10.2f}{(own - none) / 1e12:10.2f}{1 - (own - none) / (full - none):10.1%}"
        print(f"{line}{row.cache / 1e6:12.0f}{row.adapter:12,}")
    print("saved: relative to holistic attention. The left count is that of Table 4 of the paper (docs/mditface.md)")


def prepare(subject: Subject) -> tuple[Any, PortraitRequest]:
    """Load the model and resolve the request."""
    from likeness.conditions import CONDITIONS, read_conditions
    from likeness.pipelines.sizes import parse_size

    width, height = (None, None) if subject.size is None else parse_size(subject.size, "--size")
    files = {name: getattr(subject, name) for name in CONDITIONS}
    request = PortraitRequest(
        prompt=subject.prompt,
        negative_prompt=subject.negative_prompt,
        conditions={name: ConditionInput(image=path) for name, path in files.items() if path is not None},
        guidance_scale=subject.guidance_scale,
        num_inference_steps=subject.steps,
        width=width,
        height=height,
        force_size=subject.force_size,
        seed=subject.seed,
    )
    request, notes = read_conditions(request)  # before the slow part
    print_notes(notes)

    from likeness.pipelines.generate import resolve

    pipeline = load_pipeline(subject.model, subject.dtype, subject.device, subject.base)
    return pipeline, resolve(request, pipeline)


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
    out: Path,
    name: str,
    subject: Subject,
    request: PortraitRequest,
    found: Mapping[str, Any],
    text: str,
    table: Table,
    maps: Mapping[str, Sequence[Sequence[float]]],
    map_columns: Sequence[str],
) -> None:
    """Print a table; write the numbers with the request as JSON, and the table and heat maps as HTML."""
    from likeness.evaluate.report import Section, markdown_table, render
    from likeness.files import write_whole

    columns, rows = table
    cells = [[row, *(f"{value:.3f}" for value in values)] for row, values in rows.items()]
    sections = [Section(text=text, header=["", *columns], rows=cells)]
    print(markdown_table(sections[0]))
    for title, values in maps.items():
        cells = [[row, *(f"{value:.3f}" for value in own)] for row, own in zip(rows, values, strict=False)]
        limits = min(map(min, values)), max(map(max, values))
        sections.append(Section(title=title, level=3, header=["", *map_columns], rows=cells, heat=limits))
    content = {"model": subject.model, "request": {**vars(request), "conditions": sorted(request.conditions)}}
    write_whole(out / f"{name}.json", json.dumps({**content, **found}, indent=1))
    write_whole(out / f"{name}.html", render("report.html.jinja", f"{subject.model}: {name}", sections))
    print(f"{out / name}.json  {out / name}.html")
