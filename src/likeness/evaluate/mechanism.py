"""What happens inside a network while it makes a portrait: three studies of how conditions act.

The networks know nothing of it. Hooks on their blocks and torch's function mode see the very tensors that they compute
with, so what is told is exact and the portrait keeps its bits. Only sums are kept, never a step's tensors, so that the
studies fit a network of any size. Of several passes a step, the first is looked at: the one with the prompt.

n tokens of a modality, H heads, d width of a head, S steps.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import chain
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

OnStep = Callable[[int, int], None]
"""Told (done, in all)."""

WORDS_ONLY: dict[str, Any] = {
    name: {} for name in ("control_image", "conditioning_scale", "control_guidance_start", "control_guidance_end")
}
"""What takes the conditions out of a request."""


def key_similarity(pipeline: Any, request: PortraitRequest, on_step: OnStep | None = None) -> dict[str, Any]:
    """How much keys and values change from step to step: what decoupled attention rests on is that those of condition
    tokens hardly do (arXiv 2511.12631). Beside them those of text and image tokens, in the same heads.

    Every checkpoint with spatial tokens is run as `holistic`, the one attention in which they could change; what was
    trained `hard` or `decoupled` was not made for it, and `trained_as` says so.

    Args:
        pipeline: an `MDiTFacePipeline`.
        request: what `resolve` gave: at least one condition and two steps.
        on_step: called after every step as (steps done, steps in all).

    Returns:
        `layers`, their names; `times` of the steps; `trained_as`; and for `keys` and `values`, by modality: `pairs`,
        the cosine similarity of a token's vectors at two steps, mean over tokens, heads and all pairs of steps, one a
        layer; `to_first`, that to the first step, [layers][S].

    Raises:
        InputError: a network without spatial tokens, a request without condition, a single step.
    """
    transformer = spatial_transformer(pipeline)
    if not request.control_image:
        raise InputError("the keys of conditions are studied: give a mask, a sketch or keypoints")
    if (request.num_inference_steps or 0) < 2:
        raise InputError(f"steps are compared: {request.num_inference_steps} is too few, give at least 2")
    blocks = blocks_of(transformer)
    tracks: dict[str, dict[str, list[Track]]] = {"keys": defaultdict(list), "values": defaultdict(list)}

    def see(index: int, block: nn.Module, given: tuple, output: tuple) -> None:
        for part, vectors in zip(tracks, output[1], strict=True):
            own = vectors[0].split(list(now.tokens.values()))  # [n, H, d] of every modality
            for name, found in zip(now.tokens, own, strict=True):
                if now.step == 0:
                    tracks[part][name].append(Track())
                tracks[part][name][index].add(found)

    with ExitStack() as stack:
        trained_as = stack.enter_context(run_as_holistic(transformer))
        now = stack.enter_context(watched(transformer))
        for index, block in enumerate(blocks.values()):
            stack.callback(block.register_forward_hook(partial(see, index)).remove)
        generate(pipeline, request, [request.seed], on_step)
    return {
        "layers": list(blocks),
        "times": now.times,
        "trained_as": trained_as,
        **{
            part: {
                name: {"pairs": [track.pairs() for track in own], "to_first": [track.to_first for track in own]}
                for name, own in of.items()
            }
            for part, of in tracks.items()
        },
    }


def attention_mass(pipeline: Any, request: PortraitRequest, on_step: OnStep | None = None) -> dict[str, Any]:
    """Where the attention of every modality goes, and how wide the gates open: does one modality dominate?

    Args:
        pipeline: an `MDiTFacePipeline` or `MMFacePipeline`.
        request: what `resolve` gave; MMFace takes one condition a pass, so at most one.
        on_step: called after every step as (steps done, steps in all).

    Returns:
        `layers`, their names; `times` of the steps; `tokens` of every modality; `mass`, by the queries' and then the
        keys' modality, [layers][S]: the share of the softmax on those keys, mean over heads and queries, which adds up
        to 1 over the keys' modalities (padding tokens of the text count as text); `gates`, for `attention` and `mlp`,
        by modality, [layers][S]: mean absolute gate. A single block has one gate for both and for text and image; that
        of a static pathway (`spatial`) is the same at every step.

    Raises:
        InputError: several conditions for MMFace.
    """
    transformer = pipeline.transformer
    ours = isinstance(transformer, MDiTFaceTransformer)
    if not ours and len(request.control_image) > 1:
        raise InputError(f"MMFace takes one condition a pass: study {' and '.join(request.control_image)} one by one")
    blocks = blocks_of(transformer)
    mass: dict[str, dict[str, list[list[float]]]] = defaultdict(lambda: defaultdict(lambda: [[] for _ in blocks]))
    gates: dict[str, dict[str, list[list[float]]]] = {
        name: defaultdict(lambda: [[] for _ in blocks]) for name in ("attention", "mlp")
    }

    def see_attention(query: Tensor, key: Tensor, bias: Tensor | None, scale: float | None) -> None:
        if now.block is None or not now.inside:
            return
        for asking, shares in zip(now.tokens, softmax_shares(query, key, bias, scale, now.tokens), strict=False):
            for name, share in zip(now.tokens, shares, strict=True):
                mass[asking][name][now.block].append(share)

    def see_gates(index: int, names: Sequence[str], attention: Tensor, mlp: Tensor) -> None:
        for name in names:
            if now.inside or name == "spatial":  # of a static pathway, the condition's only
                gates["attention"][name][index].append(attention[0].float().abs().mean().item())
                gates["mlp"][name][index].append(mlp[0].float().abs().mean().item())

    with ExitStack() as stack:
        now = stack.enter_context(watched(transformer))
        for index, block in enumerate(blocks.values()):
            for handle in (watch_gates if ours else watch_mmface_gates)(block, partial(see_gates, index)):
                stack.callback(handle.remove)
        stack.enter_context(SeeAttention(see_attention))
        generate(pipeline, request, [request.seed], on_step)
    for layer in chain(*(own for kind in gates.values() for own in kind.values())):
        layer *= len(now.times) // len(layer)
    return {
        "layers": list(blocks),
        "times": now.times,
        "tokens": now.tokens,
        "mass": {asking: dict(own) for asking, own in mass.items()},
        "gates": {name: dict(own) for name, own in gates.items()},
    }


def shifted_positions(
    pipeline: Any,
    request: PortraitRequest,
    seeds: Sequence[int],
    shifts: Sequence[int],
    parser: tuple[Any, int],
    on_portrait: OnStep | None = None,
) -> dict[str, Any]:
    """What the shared positions do: portraits with the mask's tokens moved to the right of where they belong.

    Args:
        pipeline: an `MDiTFacePipeline`.
        request: what `resolve` gave, with a mask.
        seeds: one portrait each, for every shift.
        shifts: tokens by which the columns of all conditions' positions are moved.
        parser: a face parser and the pixels that it sees (`likeness.pipelines.load.load_face_parser`).
        on_portrait: called after every portrait as (done, in all).

    Returns:
        `shifts`; `unit`, pixels a token; and pixel accuracies of the parsed portraits, [shifts][seeds]: `accuracy`
        against the mask, `moved` against the mask moved along, over what both cover. `without` is that of portraits
        made without any condition, one a seed: the floor.

    Raises:
        InputError: a network without spatial tokens, a request without mask, a shift that leaves nothing to compare.
    """
    transformer = spatial_transformer(pipeline)
    if "mask" not in request.control_image:
        raise InputError("the accuracy is measured against a mask: give one")
    height, width = int(request.height or 0), int(request.width or 0)
    unit = spatial_factor(pipeline.vae) * pipeline.patch_size
    if wrong := [shift for shift in shifts if not 0 <= shift < width // unit]:
        raise InputError(f"a shift of {wrong[0]} tokens; the picture is {width // unit} tokens wide")
    given = CONDITIONS["mask"].resize(request.control_image["mask"].raw, height, width)  # [height, width]
    network, size = parser
    done, total = 0, (len(shifts) + 1) * len(seeds)

    def labels(wanted: PortraitRequest) -> list[np.ndarray]:
        nonlocal done
        found = []
        for seed in seeds:
            picture = np.asarray(generate(pipeline, wanted, [seed])[0][0])
            found += parse_faces(network, [picture], size=size)
            done += 1
            if on_portrait is not None:
                on_portrait(done, total)
        return found

    accuracy, moved = [], []
    for shift in shifts:
        with shifted(transformer, shift):
            found = labels(request)
        right = shift * unit
        accuracy.append([pixel_accuracy(given, own) for own in found])
        moved.append([pixel_accuracy(given[:, : width - right], own[:, right:]) for own in found])
    without = [pixel_accuracy(given, own) for own in labels(replace(request, **WORDS_ONLY))]
    return {"shifts": list(shifts), "unit": unit, "accuracy": accuracy, "moved": moved, "without": without}


# --- Watching a network


@dataclass
class Now:
    """Where a watched network is."""

    step: int = -1
    """Number of the step."""
    inside: bool = False
    """Whether a step's pass runs; a static pathway, which comes before the steps, does not count as one."""
    block: int | None = None
    """Number of the block that runs."""
    tokens: dict[str, int] = field(default_factory=dict)
    """Modality -> its number of tokens, in the order of the joint sequence; each condition by its name."""
    times: list[float] = field(default_factory=list)
    """What the network embedded at every step."""


@contextmanager
def watched(transformer: Any) -> Iterator[Now]:
    """Know at any moment where the network is."""
    now = Now()

    def begin(network: nn.Module, given: tuple, named: dict[str, Any]) -> None:
        now.step, now.inside, now.tokens = now.step + 1, True, layout(transformer, given[0], named)
        now.times.append(float(given[1][0]))

    def enter(index: int, *_: Any) -> None:
        now.block = index

    def leave(*_: Any) -> None:
        now.block = None

    def end(*_: Any) -> None:
        now.inside = False

    handles = [transformer.register_forward_pre_hook(begin, with_kwargs=True), transformer.register_forward_hook(end)]
    for index, block in enumerate(blocks_of(transformer).values()):
        handles += [block.register_forward_pre_hook(partial(enter, index)), block.register_forward_hook(leave)]
    try:
        yield now
    finally:
        for handle in handles:
            handle.remove()


def blocks_of(transformer: Any) -> dict[str, nn.Module]:
    """A network's blocks by name, in the order in which they run."""
    if not isinstance(transformer, MDiTFaceTransformer):
        return {f"block {index}": block for index, block in enumerate(transformer.blocks)}
    double, single = transformer.transformer_blocks, transformer.single_transformer_blocks
    return {f"double {index}": block for index, block in enumerate(double)} | {
        f"single {index}": block for index, block in enumerate(single)
    }


def layout(transformer: Any, latents: Tensor, given: Mapping[str, Any]) -> dict[str, int]:
    """Modality -> number of tokens, in the order of a pass's joint sequence."""
    config, text = transformer.config, given["text"].tokens.shape[1]
    if not isinstance(transformer, MDiTFaceTransformer):
        return {"image": latents[0, 0].numel() // config.patch_size**2, "text": text}
    image = latents[0, 0].numel() // PATCH**2
    rows = [] if config.attention == "concat" else given["condition_index"][0].tolist()
    return {"text": text, "image": image, **{config.condition_names[row]: image for row in rows}}


class Track:
    """Cosine similarity of the same vectors at different steps, as the steps go by.

    S unit vectors u have the mean (|sum of u|^2 - S) / (S (S - 1)) over pairs, so their sum is all that is kept.
    """

    def __init__(self) -> None:
        self.first: Tensor | None = None
        self.total: Tensor | float = 0.0
        self.to_first: list[float] = []

    def add(self, vectors: Tensor) -> None:
        """One step's vectors, [n, H, d]."""
        unit = F.normalize(vectors.float(), dim=-1)
        self.first = unit if self.first is None else self.first
        self.total = self.total + unit
        self.to_first.append((unit * self.first).sum(-1).mean().item())

    def pairs(self) -> float:
        """Mean over all pairs of steps."""
        assert isinstance(self.total, Tensor)
        steps = len(self.to_first)
        return ((self.total.square().sum(-1) - steps) / (steps * (steps - 1))).mean().item()


class SeeAttention(TorchFunctionMode):
    """Shows every scaled dot-product attention (query, key, bias, scale) while it is entered; the result stays."""

    def __init__(self, see: Callable[[Tensor, Tensor, Tensor | None, float | None], None]) -> None:
        super().__init__()
        self.see = see

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: Any = None) -> Any:
        if func is F.scaled_dot_product_attention:
            given = dict(zip(("query", "key", "value", "attn_mask"), args, strict=False)) | (kwargs or {})
            self.see(given["query"], given["key"], given.get("attn_mask"), given.get("scale"))
        return func(*args, **(kwargs or {}))


def softmax_shares(
    query: Tensor, key: Tensor, bias: Tensor | None, scale: float | None, tokens: Mapping[str, int]
) -> list[list[float]]:
    """Of the first sample: the share of the softmax that queries of a modality put on keys of each modality.

    Args:
        query: [B, H, queries, d]; where not all modalities ask, the first of `tokens` do.
        key: [B, H, keys, d].
        bias: added to the logits; broadcasts to [B, H, queries, keys].
        scale: of the logits; 1 / sqrt(d) where not given.
        tokens: modality -> number of tokens, in the order of the keys.
    """
    heads, queries, dim = query.shape[1:]
    asking = [n for n, end in zip(tokens.values(), np.cumsum(list(tokens.values())), strict=True) if end <= queries]
    total = torch.zeros(queries, len(tokens), device=query.device)
    for head in range(heads):  # one by one: all together are large
        logits = query[0, head].float() @ key[0, head].float().mT * (dim**-0.5 if scale is None else scale)
        if bias is not None:
            whole = bias[0].expand(heads, -1, -1)[head]  # [1 or queries, keys]
            logits = logits.masked_fill(~whole, -torch.inf) if whole.dtype is torch.bool else logits + whole
        shares = logits.softmax(-1).split(list(tokens.values()), dim=1)
        total += torch.stack([share.sum(1) for share in shares], dim=1)  # [queries, modalities]
    return [part.mean(0).tolist() for part in (total / heads).split(asking)]


def watch_gates(block: Any, see: Callable[[Sequence[str], Tensor, Tensor], None]) -> list[Any]:
    """Hooks that show the gates of a block of MDiTFace: (modalities, attention's gate, the MLP's), [B, D] each."""
    single = hasattr(block, "norm")
    norms: dict[tuple[str, ...], nn.Module]
    norms = {("text", "image"): block.norm} if single else {("image",): block.norm1, ("text",): block.norm1_context}
    if hasattr(block, "spatial"):
        norms["spatial",] = block.spatial.norm if single else block.spatial.norm1

    def show(names: Sequence[str], module: nn.Module, given: tuple, output: tuple) -> None:
        see(names, output[1], output[-1])  # (x, gate, shift, scale, gate), or (x, gate) of both

    return [norm.register_forward_hook(partial(show, names)) for names, norm in norms.items()]


def watch_mmface_gates(block: Any, see: Callable[[Sequence[str], Tensor, Tensor], None]) -> list[Any]:
    """The same for a block of MMFace, whose modulation may have been computed before the loop."""

    def show(module: Any, given: tuple) -> None:
        _, _, conditioning, _, modulation = given
        modulation = module.modulation(conditioning) if modulation is None else modulation  # [B, 12 D]
        gates = modulation.chunk(12, dim=-1)[2::3]  # [B, D] each: image's attention and MLP, then text's
        see(("image",), *gates[:2])
        see(("text",), *gates[2:])

    return [block.register_forward_pre_hook(show)]


# --- Changing how a network runs, for a while


@contextmanager
def run_as_holistic(transformer: MDiTFaceTransformer) -> Iterator[str]:
    """Run as holistic: the weights of all attentions with spatial tokens are the same. Gives the own attention."""
    own = transformer.config.attention
    transformer.register_to_config(attention="holistic")
    try:
        yield own
    finally:
        transformer.register_to_config(attention=own)


@contextmanager
def shifted(transformer: Any, columns: int) -> Iterator[None]:
    """Give conditions' tokens the positions of the image tokens so many columns further to the right."""
    transformer.spatial_ids = lambda ids: ids + ids.new_tensor([0, 0, columns])
    try:
        yield
    finally:
        del transformer.spatial_ids


# --- What a study is made on


def spatial_transformer(pipeline: Any) -> MDiTFaceTransformer:
    """The pipeline's network, where conditions are tokens in it."""
    transformer = pipeline.transformer
    if not isinstance(transformer, MDiTFaceTransformer):
        raise InputError(f"{type(pipeline).__name__} has no tokens for conditions, so there is nothing to study here")
    if transformer.config.attention == "concat":
        raise InputError("this checkpoint concatenates conditions to the image, so they have no tokens to study")
    return transformer
