"""Commands that look into a network: at work (`likeness study ...`), and what it costs (`likeness cost`)."""

from __future__ import annotations

import io
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean as mean
from typing import Annotated, Any, Literal

import tyro

from likeness.cli.portraits import load_pipeline
from likeness.cli.terminal import progress_bar, tell
from likeness.types import DtypeName, InputError, PortraitRequest


@dataclass(frozen=True, kw_only=True)
class Subject:
    """The model and the portrait that are studied; as in `likeness generate`."""

    model: tyro.conf.Positional[str]
    """A bundled model, a folder of a model or an adapter, or a hub id."""
    prompt: tyro.conf.Positional[str] = ""
    """What to show."""
    negative_prompt: str = ""
    """What to steer away from."""
    mask: Path | None = None
    """Semantic mask."""
    sketch: Path | None = None
    """Dark lines on white."""
    keypoints: Path | None = None
    """68 or 478 points."""
    base: str | None = None
    """The base model of an adapter, where it is not the one that the adapter names."""
    steps: int | None = None
    """Sampling steps; the model's own by default."""
    guidance_scale: float | None = None
    """How strongly the words act; the model's own by default."""
    seed: int = 0
    """Seed of the portrait."""
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
    """How much keys and values of mask tokens change from step to step, layer by layer, beside those of text and image.

    Args:
        out: Folder for keys.json and keys.png.
    """
    from likeness.evaluate.heatmap import heat_maps
    from likeness.evaluate.mechanism import key_similarity

    pipeline, request = prepare(subject)
    with progress_bar("Generating") as advance:
        found = key_similarity(pipeline, request, advance)
    if found["trained_as"] != "holistic":
        tell([f"this checkpoint was trained with {found['trained_as']} attention and is run as holistic here"])
    names = list(found["keys"])
    print("cosine similarity of a token's keys and values at two steps, mean over all pairs of steps")
    columns = {f"{part} {name}": found[part][name]["pairs"] for part in ("keys", "values") for name in names}
    print_table([*found["layers"], "mean"], {name: [*values, mean(values)] for name, values in columns.items()})
    panels = [{f"{part}, {name}": found[part][name]["to_first"] for name in names} for part in ("keys", "values")]
    across = "step: cosine similarity to the first step"
    write(out, "keys", subject, request, found, heat_maps(panels, found["layers"], step_names(found), across))


def attention(subject: SubjectArgument, *, out: Path = OUT) -> None:
    """Where the attention of image and text tokens goes, and how wide the gates open, layer by layer and step by step.

    Args:
        out: Folder for attention.json and attention.png.
    """
    from likeness.evaluate.heatmap import heat_maps
    from likeness.evaluate.mechanism import attention_mass

    pipeline, request = prepare(subject)
    with progress_bar("Generating") as advance:
        found = attention_mass(pipeline, request, advance)
    names, gates = list(found["tokens"]), found["gates"]
    tokens = ", ".join(f"{count} {name}" for name, count in found["tokens"].items())
    print(f"share of the image's attention, and mean absolute gates; means over the steps ({tokens} tokens)")
    columns = {f"to {name}": list(map(mean, found["mass"]["image"][name])) for name in names}
    columns |= {f"gate {name}": list(map(mean, layers)) for name, layers in gates["attention"].items()}
    print_table([*found["layers"], "mean"], {name: [*values, mean(values)] for name, values in columns.items()})
    panels: list[dict[str, Any]] = [
        {f"{asking} to {name}": found["mass"][asking][name] for name in names} for asking in found["mass"]
    ]
    panels += [{f"{kind} gate, {name}": layers for name, layers in own.items()} for kind, own in gates.items()]
    write(out, "attention", subject, request, found, heat_maps(panels, found["layers"], step_names(found), "step"))


def positions(
    subject: SubjectArgument,
    *,
    shifts: tuple[int, ...] = (0, 1, 2, 4),
    count: int = 4,
    parser: str = "bundled",
    out: Path = OUT,
) -> None:
    """How well portraits keep to the mask when its tokens get positions further to the right.

    Args:
        shifts: By how many tokens.
        count: Portraits for each shift; their seeds count up.
        parser: What reads the portraits' masks: `bundled`, a folder of a face parser, or a hub id.
        out: Folder for positions.json and positions.png.
    """
    if count < 1 or not shifts:
        raise InputError(f"{count} portraits for {len(shifts)} shifts: give at least one of both")
    from likeness.evaluate.heatmap import heat_maps
    from likeness.evaluate.mechanism import shifted_positions
    from likeness.pipelines.load import load_face_parser

    pipeline, request = prepare(subject)
    judge = load_face_parser(parser)
    seeds = [request.seed + number for number in range(count)]
    with progress_bar("Generating") as advance:
        found = shifted_positions(pipeline, request, seeds, shifts, judge, advance)
    found |= {"parser": parser, "seeds": seeds}
    print(f"pixel accuracy against the mask, mean of {count} portraits read by the face parser {parser}")
    rows = [f"shift {shift}" for shift in shifts]
    moved = "mask moved along"
    print_table(rows, {"mask": list(map(mean, found["accuracy"])), moved: list(map(mean, found["moved"]))})
    print(f"without any condition: {mean(found['without']):.3f}; one token is {found['unit']} pixels")
    panels = [{"accuracy": found["accuracy"], moved: found["moved"]}]
    write(out, "positions", subject, request, found, heat_maps(panels, rows, [str(s) for s in seeds], "seed"))


def cost(
    network: tyro.conf.Positional[Literal["mditface"]],
    *,
    size: int = 512,
    steps: int = 28,
    text_tokens: int = 512,
    conditions: int = 1,
    rank: int = 8,
) -> None:
    """What a mask adds to a portrait by MDiTFace on FLUX.1-dev: operations and memory of every form of attention.

    Counted on the network at full size, without weights; half a minute.

    Args:
        network: The network.
        size: Pixels a side.
        steps: Sampling steps.
        text_tokens: Tokens of the prompt.
        conditions: How many masks, sketches and keypoints at once.
        rank: Of the adapter's LoRA.
    """
    from likeness.evaluate.cost import mditface_costs

    plain, *forms = mditface_costs(size=size, steps=steps, text_tokens=text_tokens, conditions=conditions, rank=rank)
    holistic = next(form for form in forms if form.attention == "holistic")
    most = holistic.convention - plain.convention, holistic.products - plain.products
    print(f"10^12 multiply-accumulates of one portrait, {size} px, {steps} steps, {text_tokens} text tokens, ", end="")
    print(f"{conditions} condition{'s' * (conditions > 1)}, LoRA rank {rank}")
    print(f"{'':10}{'Linear, LayerNorm':>30}{'all products':>30}{'cache':>12}{'adapter':>12}")
    print(f"{'':10}" + f"{'in all':>10}{'added':>10}{'saving':>10}" * 2 + f"{'MB, bf16':>12}{'parameters':>12}")
    for row in (plain, *forms):
        line = f"{row.attention:10}"
        for macs, none, whole in zip(row[1:3], plain[1:3], most, strict=True):
            line += f"{macs / 1e12:10.2f}{(macs - none) / 1e12:10.2f}{1 - (macs - none) / whole:10.1%}"
        print(f"{line}{row.cache / 1e6:12.0f}{row.adapter:12,}")
    print("saving: of what holistic attention adds; the left count is that of the paper's Table 4 (docs/mditface.md)")


def prepare(subject: Subject) -> tuple[Any, PortraitRequest]:
    """The model and the request, with nothing left open."""
    from likeness.pipelines.sizes import parse_size

    width, height = (None, None) if subject.size is None else parse_size(subject.size, "--size")
    given = {"mask": subject.mask, "sketch": subject.sketch, "keypoints": subject.keypoints}
    request = PortraitRequest(
        prompt=subject.prompt,
        negative_prompt=subject.negative_prompt,
        control_image={name: path for name, path in given.items() if path is not None},
        guidance_scale=subject.guidance_scale,
        num_inference_steps=subject.steps,
        width=width,
        height=height,
        force_size=subject.force_size,
        seed=subject.seed,
    )
    from likeness.conditions.request import read_conditions

    request, notes = read_conditions(request)  # before the model is loaded: a wrong file should not cost a wait
    tell(notes)

    from likeness.pipelines.generate import resolve

    pipeline = load_pipeline(subject.model, subject.dtype, subject.device, subject.base)
    return pipeline, resolve(request, pipeline)


def print_table(rows: Sequence[str], columns: Mapping[str, Sequence[float]]) -> None:
    """Numbers by row and column."""
    first = max(map(len, rows))
    widths = {name: max(len(name), 6) for name in columns}
    print(" " * first, *(f"{name:>{width}}" for name, width in widths.items()), sep="  ")
    for number, row in enumerate(rows):
        print(f"{row:{first}}", *(f"{columns[name][number]:{width}.3f}" for name, width in widths.items()), sep="  ")


def step_names(found: Mapping[str, Any]) -> list[str]:
    """The steps, counted from 1."""
    return [str(number + 1) for number in range(len(found["times"]))]


def write(
    out: Path, name: str, subject: Subject, request: PortraitRequest, found: Mapping[str, Any], picture: Any
) -> None:
    """What was found, with what it was found on, as numbers and as a picture."""
    from likeness.files import write_whole

    asked = {**vars(request), "control_image": sorted(request.control_image)}
    buffer = io.BytesIO()
    picture.save(buffer, "PNG")
    write_whole(out / f"{name}.json", json.dumps({"model": subject.model, "request": asked, **found}, indent=1))
    write_whole(out / f"{name}.png", buffer.getvalue())
    print(f"{out / name}.json  {out / name}.png")
