"""Studies of how conditions act inside a network: keys over time, attention and gates, positions.

    python benchmarks/mechanism.py keys|attention|positions MODEL PROMPT --mask FILE

Options are those of `likeness generate`. A study prints a table, and writes the numbers and a page of heat maps. Hooks
and torch's function mode observe the tensors of the network itself, so that the generated image is bit-identical. Only
sums are stored, so the studies fit networks of any size. If a step runs several passes, the first one, with the prompt,
is observed.

n tokens of a modality, H heads, d width of a head, S steps.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import chain, count
from pathlib import Path
from statistics import fmean as mean
from typing import Any

import numpy as np
import torch
import tyro
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from likeness.annotators.face_parser import load_face_parser, parse_faces
from likeness.cli import execute, union
from likeness.cli.portraits import RequestOptions, load_pipeline
from likeness.cli.terminal import print_notes, progress_bar
from likeness.conditions import CONDITIONS
from likeness.encoders.latent import spatial_factor
from likeness.evaluate.scores import pixel_accuracy
from likeness.files import write_whole
from likeness.models.mditface import PATCH, MDiTFaceTransformer
from likeness.pages import Section, markdown_table, write_page
from likeness.pages.charts import Chart, draw, limits
from likeness.pipelines.generate import generate, resolve
from likeness.types import ConditionInput, InputError, PortraitRequest

Progress = Callable[[int, int], None]
"""Called as (done, total)."""


def key_similarity(pipeline: Any, request: PortraitRequest, progress: Progress | None = None) -> dict[str, Any]:
    """Measure how much keys and values change between steps. Decoupled attention assumes that those of condition tokens
    hardly change (arXiv 2511.12631).

    The network runs with `holistic` attention, the only one in which they can change.

    Args:
        pipeline: an `MDiTFacePipeline`.
        request: a resolved request with at least one condition and two steps.
        progress: called after every step.

    Returns:
        `layers`: names; `times` of the steps; `trained_as`: the attention of the checkpoint; and for `keys` and
        `values`, by modality: `pairs`, the cosine similarity of the vectors of a token at two steps, mean over tokens,
        heads and pairs of steps, one per layer; `to_first`, the similarity to the first step, [layers][S].

    Raises:
        InputError: the network has no condition tokens, or the request has no condition or one step.
    """
    transformer = spatial_transformer(pipeline)
    if not request.conditions:
        raise InputError("This study compares the keys of conditions: pass a mask, a sketch or keypoints")
    if (request.num_inference_steps or 0) < 2:
        raise InputError(f"This study compares steps: {request.num_inference_steps} is too few, pass at least 2")
    blocks = blocks_of(transformer)
    tracks: dict[str, dict[str, list[Track]]] = {
        part: defaultdict(lambda: [Track() for _ in blocks]) for part in ("keys", "values")
    }

    def keep(block: nn.Module, inputs: tuple) -> tuple:
        return *inputs[:4], True  # also return keys and values

    def observe(index: int, block: nn.Module, inputs: tuple, output: tuple) -> Tensor:
        for part, vectors in zip(tracks, output[1], strict=True):
            for name, own in zip(state.tokens, vectors[0].split(list(state.tokens.values())), strict=True):
                tracks[part][name][index].add(own)  # [n, H, d]
        return output[0]

    with ExitStack() as stack:
        trained_as = stack.enter_context(run_as_holistic(transformer))
        state = stack.enter_context(observed(transformer))
        for index, block in enumerate(blocks.values()):
            stack.callback(block.register_forward_pre_hook(keep).remove)
            stack.callback(block.register_forward_hook(partial(observe, index)).remove)
        generate(pipeline, request, [request.seed], progress)
    similarity = {
        part: {
            name: {"pairs": [track.pairs() for track in own], "to_first": [track.to_first for track in own]}
            for name, own in by_name.items()
        }
        for part, by_name in tracks.items()
    }
    return {"layers": list(blocks), "times": state.times, "trained_as": trained_as, **similarity}


def attention_mass(pipeline: Any, request: PortraitRequest, progress: Progress | None = None) -> dict[str, Any]:
    """Measure where the attention of each modality goes, and the gates: does one modality dominate?

    Args:
        pipeline: an `MDiTFacePipeline` or `MMFacePipeline`.
        request: a resolved request; for MMFace, which runs one condition per pass, with at most one condition.
        progress: called after every step.

    Returns:
        `layers`: names; `times` of the steps; `tokens` of every modality; `mass`, by the modality of the queries and
        then of the keys, [layers][S]: the fraction of the softmax on these keys, mean over heads and queries (padding
        counts as text); `gates`, for `attention` and `mlp`, by modality, [layers][S]: mean absolute gate. A single
        block has one gate for both, and for text and image. The gate of a static pathway (`spatial`) is constant.

    Raises:
        InputError: several conditions for MMFace.
    """
    transformer = pipeline.transformer
    if not isinstance(transformer, MDiTFaceTransformer) and len(request.conditions) > 1:
        raise InputError(f"MMFace runs one condition per pass: study {' and '.join(request.conditions)} one at a time")
    blocks = blocks_of(transformer)
    per_layer = lambda: defaultdict(lambda: [[] for _ in blocks])  # noqa: E731
    mass: dict[str, dict[str, list[list[float]]]] = defaultdict(per_layer)
    gates: dict[str, dict[str, list[list[float]]]] = {"attention": per_layer(), "mlp": per_layer()}

    def observe_attention(query: Tensor, key: Tensor, bias: Tensor | None, scale: float | None) -> None:
        if state.block is None or not state.in_step:
            return
        fractions = softmax_fractions(query, key, bias, scale, state.tokens)
        for queries, row in zip(state.tokens, fractions, strict=False):
            for keys, fraction in zip(state.tokens, row, strict=True):
                mass[queries][keys][state.block].append(fraction)

    def observe_gates(index: int, names: Sequence[str], attention: Tensor, mlp: Tensor) -> None:
        for name in names:
            if state.in_step or name == "spatial":  # of a static pathway, only the condition
                gates["attention"][name][index].append(attention[0].float().abs().mean().item())
                gates["mlp"][name][index].append(mlp[0].float().abs().mean().item())

    with ExitStack() as stack:
        state = stack.enter_context(observed(transformer))
        for index, block in enumerate(blocks.values()):
            for handle in gate_hooks(block, partial(observe_gates, index)):
                stack.callback(handle.remove)
        stack.enter_context(ObserveAttention(observe_attention))
        generate(pipeline, request, [request.seed], progress)
    for layer in chain(*(layers for by_name in gates.values() for layers in by_name.values())):
        layer *= len(state.times) // len(layer)
    return {
        "layers": list(blocks),
        "times": state.times,
        "tokens": state.tokens,
        "mass": {name: dict(own) for name, own in mass.items()},
        "gates": {name: dict(own) for name, own in gates.items()},
    }


def shifted_positions(
    pipeline: Any,
    request: PortraitRequest,
    seeds: Sequence[int],
    shifts: Sequence[int],
    parser: tuple[Any, int],
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Measure what shared positions do: generate images with the positions of condition tokens shifted to the right.

    Args:
        pipeline: an `MDiTFacePipeline`.
        request: a resolved request with a mask.
        seeds: seeds of the images, for each shift.
        shifts: numbers of tokens.
        parser: a face parser and its input size in pixels (`likeness.annotators.face_parser.load_face_parser`).
        progress: called after every image.

    Returns:
        `shifts`; `unit`, pixels per token; pixel accuracies of the parsed images, [shifts][seeds]: `accuracy` against
        the mask, `moved` against the shifted mask where both overlap; and `without`, that of images without conditions
        (the floor), one per seed.

    Raises:
        InputError: the network has no condition tokens, the request has no mask, or a shift leaves no overlap.
    """
    transformer = spatial_transformer(pipeline)
    if "mask" not in request.conditions:
        raise InputError("This study measures the accuracy against a mask: pass a mask")
    height, width = int(request.height or 0), int(request.width or 0)
    unit = spatial_factor(pipeline.vae) * pipeline.patch_size
    if invalid := [shift for shift in shifts if not 0 <= shift < width // unit]:
        raise InputError(f"Cannot shift by {invalid[0]} tokens: the image is {width // unit} tokens wide")
    given = CONDITIONS["mask"].resize(request.conditions["mask"].image.raw, height, width)  # [height, width]
    network, size = parser
    total = (len(shifts) + 1) * len(seeds)

    done = count(1)

    def labels(variant: PortraitRequest) -> list[np.ndarray]:
        parsed = []
        for seed in seeds:
            image = np.asarray(generate(pipeline, variant, [seed])[0][0])
            parsed += parse_faces(network, [image], size=size)
            if progress is not None:
                progress(next(done), total)
        return parsed

    accuracy, moved = [], []
    for shift in shifts:
        with shifted(transformer, shift):
            found = labels(request)
        right = shift * unit
        accuracy.append([pixel_accuracy(given, own) for own in found])
        moved.append([pixel_accuracy(given[:, : width - right], own[:, right:]) for own in found])
    without = [pixel_accuracy(given, own) for own in labels(replace(request, conditions={}))]
    return {"shifts": list(shifts), "unit": unit, "accuracy": accuracy, "moved": moved, "without": without}


# --- Observe a network


@dataclass
class State:
    """What an observed network is computing."""

    step: int = -1
    in_step: bool = False
    """Whether the pass of a step is running; a static pathway runs before the steps."""
    block: int | None = None
    """Index of the running block."""
    tokens: dict[str, int] = field(default_factory=dict)
    """Modality -> number of tokens, in the order of the joint sequence; each condition by its name."""
    times: list[float] = field(default_factory=list)
    """The time of every step."""


@contextmanager
def observed(transformer: Any) -> Iterator[State]:
    """Keep track of what a network is computing."""
    state = State()

    def start_step(network: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        if args[0] is None:  # the static pathway
            return
        state.step, state.in_step, state.tokens = state.step + 1, True, token_counts(transformer, args[0], kwargs)
        state.times.append(float(args[1][0]))

    handles = [
        transformer.register_forward_pre_hook(start_step, with_kwargs=True),
        transformer.register_forward_hook(lambda *_: setattr(state, "in_step", False)),
    ]
    for index, block in enumerate(blocks_of(transformer).values()):
        handles.append(block.register_forward_pre_hook(lambda *_, index=index: setattr(state, "block", index)))
        handles.append(block.register_forward_hook(lambda *_: setattr(state, "block", None)))
    try:
        yield state
    finally:
        for handle in handles:
            handle.remove()


def blocks_of(transformer: Any) -> dict[str, nn.Module]:
    """Return the blocks by name, in the order in which they run."""
    if not isinstance(transformer, MDiTFaceTransformer):
        return {f"block {index}": block for index, block in enumerate(transformer.blocks)}
    double, single = transformer.transformer_blocks, transformer.single_transformer_blocks
    return {f"double {index}": block for index, block in enumerate(double)} | {
        f"single {index}": block for index, block in enumerate(single)
    }


def token_counts(transformer: Any, latents: Tensor, kwargs: Mapping[str, Any]) -> dict[str, int]:
    """Return modality -> number of tokens, in the order of the joint sequence of a pass."""
    config, text = transformer.config, kwargs["text"].tokens.shape[1]
    if not isinstance(transformer, MDiTFaceTransformer):
        return {"image": latents[0, 0].numel() // config.patch_size**2, "text": text}
    image = latents[0, 0].numel() // PATCH**2
    ids = [] if config.attention == "concat" else kwargs["condition_index"][0].tolist()
    return {"text": text, "image": image, **{config.condition_names[index]: image for index in ids}}


class Track:
    """Cosine similarity of the same vectors at different steps.

    S unit vectors u have a mean similarity of (|sum of u|^2 - S) / (S (S - 1)) over pairs, so the sum is sufficient.
    """

    def __init__(self) -> None:
        self.first: Tensor | None = None
        self.total: Tensor | float = 0.0
        self.to_first: list[float] = []

    def add(self, vectors: Tensor) -> None:
        """Add the vectors of a step, [n, H, d]."""
        unit = F.normalize(vectors.float(), dim=-1)
        self.first = unit if self.first is None else self.first
        self.total = self.total + unit
        self.to_first.append((unit * self.first).sum(-1).mean().item())

    def pairs(self) -> float:
        """Return the mean over all pairs of steps."""
        assert isinstance(self.total, Tensor)
        steps = len(self.to_first)
        return ((self.total.square().sum(-1) - steps) / (steps * (steps - 1))).mean().item()


class ObserveAttention(TorchFunctionMode):
    """Call a function with (query, key, bias, scale) of every scaled dot-product attention; the result is unchanged."""

    def __init__(self, observe: Callable[[Tensor, Tensor, Tensor | None, float | None], Any]) -> None:
        super().__init__()
        self.observe = observe

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: Any = None) -> Any:
        if func is F.scaled_dot_product_attention:
            named = dict(zip(("query", "key", "value", "attn_mask"), args, strict=False)) | (kwargs or {})
            self.observe(named["query"], named["key"], named.get("attn_mask"), named.get("scale"))
        return func(*args, **(kwargs or {}))


def softmax_fractions(
    query: Tensor, key: Tensor, bias: Tensor | None, scale: float | None, tokens: Mapping[str, int]
) -> list[list[float]]:
    """Return the fraction of the softmax that queries of a modality put on keys of each modality, for the first sample.

    Args:
        query: [B, H, queries, d], of all modalities or the first ones of `tokens`.
        key: [B, H, keys, d].
        bias: added to the logits, or a boolean mask; broadcasts to [B, H, queries, keys].
        scale: of the logits; None is 1 / sqrt(d).
        tokens: modality -> number of tokens, in the order of the keys.
    """
    heads, queries, dim = query.shape[1:]
    lengths = list(tokens.values())
    query_lengths = [n for n, end in zip(lengths, np.cumsum(lengths), strict=True) if end <= queries]
    total = torch.zeros(queries, len(tokens), device=query.device)
    for head in range(heads):  # one at a time, to save memory
        logits = query[0, head].float() @ key[0, head].float().mT * (dim**-0.5 if scale is None else scale)
        if bias is not None:
            own = bias[0].expand(heads, -1, -1)[head]  # [1 or queries, keys]
            logits = logits.masked_fill(~own, -torch.inf) if own.dtype is torch.bool else logits + own
        total += torch.stack([part.sum(1) for part in logits.softmax(-1).split(lengths, dim=1)], dim=1)
    return [part.mean(0).tolist() for part in (total / heads).split(query_lengths)]  # [queries, modalities]


def gate_hooks(block: Any, observe: Callable[[Sequence[str], Tensor, Tensor], None]) -> list[Any]:
    """Register hooks that call `observe(modalities, gate of attention, gate of MLP)`, gates [B, D]."""

    def observe_norm(names: Sequence[str], module: nn.Module, inputs: tuple, output: tuple) -> None:
        observe(names, output[1], output[-1])  # (x, gate, shift, scale, gate), or (x, gate) of both

    def observe_mmface(module: Any, inputs: tuple) -> None:
        modulation = module.modulation(inputs[2])  # [B, 12 D]
        gates = modulation.chunk(12, dim=-1)[2::3]  # [B, D] each: attention and MLP of the image, then of the text
        observe(("image",), *gates[:2])
        observe(("text",), *gates[2:])

    if hasattr(block, "modulation"):
        return [block.register_forward_pre_hook(observe_mmface)]
    single = hasattr(block, "norm")
    norms: dict[tuple[str, ...], nn.Module]
    norms = {("text", "image"): block.norm} if single else {("image",): block.norm1, ("text",): block.norm1_context}
    if hasattr(block, "spatial"):
        norms["spatial",] = block.spatial.norm if single else block.spatial.norm1
    return [norm.register_forward_hook(partial(observe_norm, names)) for names, norm in norms.items()]


# --- Temporarily change a network


@contextmanager
def run_as_holistic(transformer: MDiTFaceTransformer) -> Iterator[str]:
    """Run with holistic attention, which has the same weights. Yield the attention of the checkpoint."""
    own = transformer.config.attention
    transformer.register_to_config(attention="holistic")
    try:
        yield own
    finally:
        transformer.register_to_config(attention=own)


@contextmanager
def shifted(transformer: Any, columns: int) -> Iterator[None]:
    """Shift the positions of condition tokens to the right."""
    transformer.spatial_ids = lambda ids: ids + ids.new_tensor([0, 0, columns])
    try:
        yield
    finally:
        del transformer.spatial_ids


def spatial_transformer(pipeline: Any) -> MDiTFaceTransformer:
    """Return the network. Raises `InputError` if it has no condition tokens."""
    transformer = pipeline.transformer
    if not isinstance(transformer, MDiTFaceTransformer):
        raise InputError(f"{type(pipeline).__name__} has no condition tokens. This study requires an MDiTFace model")
    if transformer.config.attention == "concat":
        raise InputError("This checkpoint concatenates conditions to the image, so it has no condition tokens to study")
    return transformer


# --- Commands


@dataclass(frozen=True, kw_only=True)
class Study(RequestOptions):
    """A study of a model; options as in `likeness generate`."""

    model: tyro.conf.Positional[str] = field()  # required
    """Bundled model, folder of a model or an adapter, or hub id."""
    seed: int = 0
    """Seed of the image."""
    out: Path = Path("studies")
    """Folder for NAME.json and NAME.html, NAME being that of the study."""

    def prepare(self) -> tuple[Any, PortraitRequest]:
        """Load the model and resolve the request."""
        conditions = {name: ConditionInput(image=file) for name, file in self.files().items()}
        request, notes = self.request(conditions, self.seed)
        print_notes(notes)
        pipeline = load_pipeline(self.model, self.dtype, self.device, self.base)
        return pipeline, resolve(request, pipeline)


@dataclass(frozen=True, kw_only=True)
class Keys(Study):
    """Measure how much keys and values change between steps, by layer and modality."""

    def __call__(self) -> None:
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


def heat_map(title: str, values: Sequence[Sequence[float]], rows: Sequence[str], columns: Sequence[str]) -> Chart:
    """Draw a matrix of values with a color bar."""

    def paint(figure: Any, axes: Any) -> None:
        low, high = limits([value for row in values for value in row])
        image = axes.imshow(values, aspect="auto", interpolation="none", cmap="viridis", vmin=low, vmax=high)
        for axis, names, most in ((axes.yaxis, rows, 24), (axes.xaxis, columns, 8)):
            step = -(-len(names) // most)
            axis.set_ticks(range(0, len(names), step), names[::step])
        axes.tick_params(length=0)
        axes.spines[:].set_visible(False)
        figure.colorbar(image, ax=axes, pad=0.02, format="%.3g").outline.set_visible(False)

    return draw(title, paint, min(1 + 0.22 * len(values), 6.5))


def main(arguments: list[str] | None = None) -> None:
    studies = union({"keys": Keys, "attention": Attention, "positions": Positions})
    names = (tyro.conf.PositionalMetavarFromFieldName, tyro.conf.OmitSubcommandPrefixes)
    execute(lambda: tyro.cli(studies, description=__doc__, args=arguments, config=names)())


if __name__ == "__main__":
    main()
