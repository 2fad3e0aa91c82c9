"""Studies of how conditions act inside a network (`likeness study`).

Hooks and torch's function mode observe the tensors of the network itself, so the generated image is bit-identical. Only
sums are stored, so the studies fit networks of any size. If a step runs several passes, the first one, with the prompt,
is observed.

n tokens of a modality, H heads, d width of a head, S steps.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import chain, count
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from likeness.annotators.face_parser import parse_faces
from likeness.conditions import CONDITIONS
from likeness.encoders.latent import spatial_factor
from likeness.evaluate.scores import pixel_accuracy
from likeness.models.mditface import PATCH, MDiTFaceTransformer
from likeness.pipelines.generate import generate
from likeness.types import InputError, PortraitRequest

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

    def observe(index: int, block: nn.Module, inputs: tuple, output: tuple) -> None:
        for part, vectors in zip(tracks, output[1], strict=True):
            for name, own in zip(state.tokens, vectors[0].split(list(state.tokens.values())), strict=True):
                tracks[part][name][index].add(own)  # [n, H, d]

    with ExitStack() as stack:
        trained_as = stack.enter_context(run_as_holistic(transformer))
        state = stack.enter_context(observed(transformer))
        for index, block in enumerate(blocks.values()):
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
