"""The released MMFace-DiT checkpoints as a folder that `likeness.load` reads.

What differs from our conventions is folded into the weights once, so that the network needs no special cases: flow
time that runs from noise to data, the sign of the velocity, the order of values inside a patch, and rotary pairs
that are neighbours instead of halves. What cannot be folded is recorded as settings of the pipeline.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import safe_open
from torch import Tensor

from likeness.models.layers import time_frequencies
from likeness.models.mmface import MMFaceTransformer
from likeness.objectives import DDPM, RectifiedFlow
from likeness.types import InputError

Kind = Literal["flow", "diffusion"]

TIME_SCALE = 999.0
"""What the released flow network multiplies its time in [0, 1] by."""

HEAD_DIM = 72
"""Width of a head in every released checkpoint; the number of heads cannot be read from the weights."""


@dataclass(frozen=True, kw_only=True)
class Release:
    """One published checkpoint."""

    kind: Kind
    step: int
    size: int


RELEASES: dict[str, Release] = {
    "ddpm-256": Release(kind="diffusion", step=440_700, size=256),
    "rfm-256": Release(kind="flow", step=283_517, size=256),
    "rfm-512": Release(kind="flow", step=44_070, size=512),
}
"""The three published checkpoints; each lies in a folder `checkpoint-<step>`."""

FLUX_SCALE, FLUX_SHIFT = 0.3611, 0.1159
"""FLUX.1's latents are FLUX_SCALE (z - FLUX_SHIFT), z what its autoencoder gives."""

PADDING = "!"
"""Token 0 of CLIP's vocabulary, with which Stable Diffusion 2.1 pads captions."""

COMPATIBILITY: dict[str, Any] = {
    "text_layer": -2,  # penultimate layer, without the final norm; the pooled text is the EOS token after it
    "max_text_tokens": 77,
    "condition_resize": "lanczos",  # masks were resized as pictures
}
"""Settings the released weights were trained with; fields of `MMFacePipeline`."""

PLAIN_KEYS = {
    "t_embedder.mlp.0.bias": "time_embed.linear_1.bias",
    "t_embedder.mlp.2.weight": "time_embed.linear_2.weight",
    "t_embedder.mlp.2.bias": "time_embed.linear_2.bias",
    "c_embedder.proj.weight": "pooled_embed.weight",
    "c_embedder.proj.bias": "pooled_embed.bias",
    "c_embedder.null_feature_pooled": "null_pooled",
    "clip_seq_proj.weight": "text_embed.weight",
    "clip_seq_proj.bias": "text_embed.bias",
    "modality_embedder.weight": "condition_embed.weight",
    "x_embedder.proj.bias": "patch_embed.bias",
    "final_layer.adaLN_modulation.1.weight": "final_modulation.weight",
    "final_layer.adaLN_modulation.1.bias": "final_modulation.bias",
}
"""Official key -> ours, for what carries over as it is."""

BLOCK_KEYS = {
    "adaLN_modulation.1.weight": "modulation.weight",
    "adaLN_modulation.1.bias": "modulation.bias",
    "attn.to_out.weight": "attention.image_out.weight",
    "attn.to_out_t.weight": "attention.text_out.weight",
    **{
        f"mlp_{theirs}.{number}.{part}": f"{ours}_mlp.linear_{1 + number // 2}.{part}"
        for theirs, ours in (("i", "image"), ("t", "text"))
        for number in (0, 2)
        for part in ("weight", "bias")
    },
}
"""The same inside `blocks.<n>.`."""


def convert_state(state: Mapping[str, Tensor], kind: Kind, heads: int | None = None) -> MMFaceTransformer:
    """The official network's weights as an `MMFaceTransformer`.

    Args:
        state: tensors under the official names.
        kind: `flow` folds time direction and sign in; `diffusion` predicts the noise in both.
        heads: attention heads; None means heads of 72.

    Raises:
        InputError: a key is missing, left over or of a wrong shape; all of them are listed.
    """
    try:
        embed, final = state["x_embedder.proj.weight"], state["final_layer.linear.weight"]
        text_dim = state["clip_seq_proj.weight"].shape[1]
        hidden = state["blocks.0.mlp_i.0.weight"].shape[0]
    except KeyError as error:
        raise InputError(f"these are not MMFace-DiT weights: the key {error.args[0]!r} is missing") from error
    width, in_channels, patch = embed.shape[:3]
    numbers = [int(found[1]) for key in state if (found := re.match(r"blocks\.(\d+)\.", key))]
    heads = heads or width // HEAD_DIM
    if width % (4 * heads):
        raise InputError(f"a width of {width} does not divide into {heads} heads: give the number of heads")
    config = {
        "patch_size": patch,
        "latent_channels": in_channels // 2,
        "hidden_size": width,
        "depth": max(numbers) + 1,
        "heads": heads,
        "mlp_ratio": hidden / width,
        "text_dim": text_dim,
        "max_text_tokens": 77,
        "condition_names": ["mask", "sketch"],
        "text_rope": "none",
    }

    left = dict(state)
    missing: list[str] = []

    def take(key: str) -> Tensor | None:
        if key not in left:
            missing.append(key)
            return None
        return left.pop(key).float()

    ours: dict[str, Tensor | None] = {new: take(old) for old, new in PLAIN_KEYS.items()}
    ours["patch_embed.weight"] = take("x_embedder.proj.weight").flatten(1)  # type: ignore[union-attr]
    for part in ("weight", "bias"):
        final = take(f"final_layer.linear.{part}")
        if final is not None:
            # their patch values are ordered (p, q, C), ours (C, p, q)
            final = final.unflatten(0, (patch, patch, -1)).movedim(2, 0).flatten(0, 2)
            ours[f"final.{part}"] = -final if kind == "flow" else final  # theirs is data - noise, ours noise - data
    first = take("t_embedder.mlp.0.weight")
    if first is not None:
        ours["time_embed.linear_1.weight"] = reverse_time(first) if kind == "flow" else first
    for number in range(config["depth"]):
        theirs, mine = f"blocks.{number}.", f"blocks.{number}."
        for old, new in BLOCK_KEYS.items():
            ours[mine + new] = take(theirs + old)
        for suffix, stream in (("", "image"), ("_t", "text")):
            query, key, value = (take(f"{theirs}attn.to_{letter}{suffix}.weight") for letter in "qkv")
            if query is not None and key is not None and value is not None:
                joined = torch.cat([halves(query, heads), halves(key, heads), value])
                ours[f"{mine}attention.{stream}_qkv.weight"] = joined

    with torch.device("meta"):
        model = MMFaceTransformer.from_config(config)
    expected = {name: tuple(value.shape) for name, value in model.state_dict().items()}
    found_tensors = {name: value for name, value in ours.items() if value is not None}
    wrong = [f"{k} has shape {tuple(v.shape)}, not {expected[k]}" for k, v in found_tensors.items()
             if tuple(v.shape) != expected[k]]  # fmt: skip
    faults = [f"missing {key}" for key in missing] + [f"unexpected {key}" for key in left] + wrong
    if faults:
        raise InputError(f"{len(faults)} keys do not fit the MMFace-DiT network:\n  " + "\n  ".join(faults))
    model.load_state_dict(found_tensors, assign=True)
    return model.eval()


def reverse_time(weight: Tensor) -> Tensor:
    """The first time layer [D, 256] for time that runs the other way.

    cos(f (s - u)) and sin(f (s - u)) are a rotation of cos(f u) and sin(f u) by the angle f s, so the turn folds into
    the columns of the layer behind them.
    """
    half = weight.shape[1] // 2
    turn = time_frequencies(torch.tensor([TIME_SCALE]), weight.shape[1])[0].double()  # [256]
    cos, sin = turn[:half], turn[half:]
    on_cos, on_sin = weight.double().split(half, dim=1)
    return torch.cat([on_cos * cos + on_sin * sin, on_cos * sin - on_sin * cos], dim=1).float()


def halves(weight: Tensor, heads: int) -> Tensor:
    """Rows [H d, D] of queries or keys, reordered so that rotary pairs (2 i, 2 i + 1) become (i, i + d / 2)."""
    return weight.unflatten(0, (heads, -1, 2)).transpose(1, 2).flatten(0, 2)


def read_release(path: Path) -> tuple[dict[str, Tensor], Path]:
    """The tensors of a released checkpoint: its folder or its safetensors file.

    Raises:
        InputError: there is no such file, or it is not safetensors.
    """
    file = path / "dit_model_weights_ema.safetensors" if path.is_dir() else path
    if not file.is_file():
        raise InputError(f"{file} does not exist: give a released checkpoint-<step> folder or its safetensors file")
    try:
        with safe_open(file, framework="pt") as tensors:
            return {key: tensors.get_tensor(key) for key in tensors.keys()}, file  # noqa: SIM118
    except Exception as error:
        raise InputError(f"{file} cannot be read as safetensors: {error}") from error


def release_of(path: Path, name: str | None) -> Release:
    """Which release a path is: by name, or by the step in `checkpoint-<step>`."""
    if name is not None:
        if name not in RELEASES:
            raise InputError(f"the release {name!r} is unknown; choose one of {', '.join(RELEASES)}")
        return RELEASES[name]
    for release in RELEASES.values():
        if f"checkpoint-{release.step}" in path.resolve().parts:
            return release
    raise InputError(f"cannot tell which release {path} is; add --release, one of {', '.join(RELEASES)}")


def convert_release(
    path: Path,
    out: Path,
    *,
    release: str | None = None,
    text_encoder: Path | None = None,
    vae: Path | None = None,
    heads: int | None = None,
) -> list[str]:
    """Write a released checkpoint as a pipeline folder.

    Args:
        path: the `checkpoint-<step>` folder or the safetensors file in it.
        out: the folder to write; it must not exist or be empty.
        release: one of `RELEASES`, where the path does not tell.
        text_encoder: a folder with `CLIPTextModel` weights and its tokenizer (or `text_encoder/` and `tokenizer/`).
        vae: a folder with FLUX.1's autoencoder.
        heads: attention heads; None means heads of 72.

    Returns:
        What is missing for the folder to make pictures, one sentence each.

    Raises:
        InputError: the input does not fit, or `out` is in use.
    """
    from likeness.pipelines.mmface import MMFacePipeline

    which = release_of(path, release)
    if out.exists() and any(out.iterdir()):
        raise InputError(f"{out} is not empty: choose another folder, so that nothing is overwritten")
    state, file = read_release(path)
    transformer = convert_state(state, which.kind, heads)
    objective = RectifiedFlow(time_sampling="uniform", time_scale=TIME_SCALE) if which.kind == "flow" else DDPM()
    encoder, tokenizer = load_text_encoder(text_encoder) if text_encoder else (None, None)
    autoencoder = load_vae(vae) if vae else None
    pipeline = MMFacePipeline(
        transformer=transformer,
        vae=autoencoder,
        text_encoder=encoder,
        tokenizer=tokenizer,
        scheduler=objective.scheduler(),
        objective=objective.config(),
        defaults={"size": which.size, "steps": 50, "guidance_scale": 7.5},
        sizes=[[which.size, which.size]],
        **COMPATIBILITY,
        **latent_statistics(autoencoder),
    )
    pipeline.save_pretrained(out)
    (out / "source.json").write_text(json.dumps({"release": release or file.parent.name, "file": file.name}, indent=2))
    missing = []
    if encoder is None:
        missing.append(
            "the text encoder of Stable Diffusion 2.1 (OpenCLIP ViT-H, 23 layers): add --text-encoder DIR; "
            "docs/released-weights.md says what serves"
        )
    if vae is None:
        missing.append("the autoencoder of FLUX.1: add --vae DIR; docs/released-weights.md says what serves")
    return missing


def latent_statistics(vae: Any) -> dict[str, Any]:
    """`latent_mean` and `latent_std` with which an autoencoder gives the latents of the releases: FLUX_SCALE z, without
    the shift. taef1, whose latents y = FLUX_SCALE (z - FLUX_SHIFT) are scaled already, lacks the shift alone.
    """
    from diffusers import AutoencoderTiny

    if isinstance(vae, AutoencoderTiny):
        return {"latent_mean": -FLUX_SCALE * FLUX_SHIFT, "latent_std": 1.0}
    return {"latent_mean": 0.0, "latent_std": 1 / FLUX_SCALE}


def load_text_encoder(folder: Path) -> tuple[Any, Any]:
    """A CLIP text model and its tokenizer from a folder, or from the two subfolders of a pipeline folder.

    The network reads all 77 tokens, the padding, too: it must be that of Stable Diffusion 2.1, "!", where the same
    vocabulary in other repositories is padded with the end token.
    """
    from transformers import CLIPTextModel, CLIPTokenizer

    model = folder / "text_encoder" if (folder / "text_encoder").is_dir() else folder
    tokenizer = folder / "tokenizer" if (folder / "tokenizer").is_dir() else folder
    try:
        encoder, words = CLIPTextModel.from_pretrained(model), CLIPTokenizer.from_pretrained(tokenizer)
        words.pad_token = PADDING
        return encoder, words
    except (OSError, ValueError) as error:
        raise InputError(f"{folder} holds no CLIP text model with its tokenizer: {error}") from error


def load_vae(folder: Path) -> Any:
    """An autoencoder from a folder, or from the `vae` subfolder of a pipeline folder; its class is in its config."""
    import diffusers

    where = folder / "vae" if (folder / "vae").is_dir() else folder
    try:
        name = json.loads((where / "config.json").read_text())["_class_name"]
        return getattr(diffusers, name).from_pretrained(where)
    except (OSError, ValueError, KeyError, AttributeError) as error:
        raise InputError(f"{folder} holds no diffusers autoencoder: {error}") from error
