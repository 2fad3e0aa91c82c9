"""Convert the released MMFace-DiT checkpoints to pipeline folders.

Differences in conventions are folded into the weights: flow time from noise to data, the sign of the velocity, the
order of values inside a patch, and rotary pairs that are neighbors instead of halves. Differences that cannot be
folded are settings of the pipeline.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from likeness.files import read_json, writing_folder
from likeness.models.layers import time_frequencies
from likeness.models.mmface import MMFaceTransformer
from likeness.objectives import DDPM, RectifiedFlow
from likeness.types import InputError
from likeness.weights.files import read_weights
from likeness.weights.packed import load_component

Kind = Literal["flow", "diffusion"]

TIME_SCALE = 999.0
"""Factor of the released flow network on its time in [0, 1]."""

HEAD_DIM = 72
"""Width of a head in every released checkpoint; weights do not determine the number of heads."""


class Release(NamedTuple):
    """One published checkpoint, in a folder `checkpoint-<step>`."""

    kind: Kind
    step: int
    size: int


RELEASES = {
    "ddpm-256": Release("diffusion", 440_700, 256),
    "rfm-256": Release("flow", 283_517, 256),
    "rfm-512": Release("flow", 44_070, 512),
}

FLUX_SCALE, FLUX_SHIFT = 0.3611, 0.1159
"""FLUX.1's latents are FLUX_SCALE (z - FLUX_SHIFT), where z is the output of its autoencoder."""

PADDING = "!"
"""Token 0 of CLIP's vocabulary, with which Stable Diffusion 2.1 pads captions."""

COMPATIBILITY: dict[str, Any] = {
    "text_layer": -2,  # penultimate layer, without the final norm; the pooled text is the EOS token after it
    "max_text_tokens": 77,
    "condition_resize": "lanczos",  # masks were resized as images
}
"""Settings the released weights were trained with; fields of `MMFacePipeline`."""

LAYERS = {
    "t_embedder.mlp.0": "time_embed.linear_1",
    "t_embedder.mlp.2": "time_embed.linear_2",
    "c_embedder.proj": "pooled_embed",
    "clip_seq_proj": "text_embed",
    "x_embedder.proj": "patch_embed",
    "final_layer.adaLN_modulation.1": "final_modulation",
    "final_layer.linear": "final",
}
"""Released layer -> ours, outside of blocks. Each has a weight and a bias."""

BLOCK_LAYERS = {
    "adaLN_modulation.1": "modulation",
    "mlp_i.0": "image_mlp.linear_1",
    "mlp_i.2": "image_mlp.linear_2",
    "mlp_t.0": "text_mlp.linear_1",
    "mlp_t.2": "text_mlp.linear_2",
}
"""The same inside `blocks.<n>.`."""


def convert_state(state: Mapping[str, Tensor], kind: Kind, heads: int | None = None) -> MMFaceTransformer:
    """Convert the weights of a released network, under its names, to an `MMFaceTransformer` with `heads` attention
    heads (default: heads of width 72). `flow` folds time direction and sign into the weights; `diffusion` predicts the
    noise in both. Raises `InputError` if keys are missing, unknown or of another shape; all of them are listed.
    """
    try:
        embed = state["x_embedder.proj.weight"]
        text_dim = state["clip_seq_proj.weight"].shape[1]
        hidden = state["blocks.0.mlp_i.0.weight"].shape[0]
        width, in_channels, patch, _ = embed.shape
    except KeyError as error:
        raise InputError(f"These are not MMFace-DiT weights: the key {error.args[0]!r} is missing") from error
    except (IndexError, ValueError) as error:
        raise InputError("These are not MMFace-DiT weights: x_embedder or clip_seq_proj has another shape") from error
    depth = 1 + max(int(found[1]) for key in state if (found := re.match(r"blocks\.(\d+)\.", key)))
    heads = heads or width // HEAD_DIM
    if width % (4 * heads):
        raise InputError(f"The width {width} is not a multiple of 4 x {heads} heads: pass the number of heads")
    with torch.device("meta"):
        model = MMFaceTransformer(
            patch_size=patch,
            latent_channels=in_channels // 2,
            hidden_size=width,
            depth=depth,
            heads=heads,
            mlp_ratio=hidden / width,
            text_dim=text_dim,
            max_text_tokens=77,
            condition_names=("mask", "sketch"),
            text_rope="none",
        )
    shapes = {name: tuple(value.shape) for name, value in model.state_dict().items()}
    names = released_names(depth)  # ours -> theirs
    expected = {key for keys in names.values() for key in keys}
    faults = [f"missing {key}" for key in sorted(expected - state.keys())]
    faults += [f"unexpected {key}" for key in sorted(state.keys() - expected)]
    converted: dict[str, Tensor] = {}
    for name, keys in names.items():
        if not state.keys() >= set(keys):
            continue
        try:
            value = state[keys[0]].float()
            if name == "patch_embed.weight":
                value = value.flatten(1)  # [D, 2 C, p, p] -> [D, 2 C p p]
            elif name.startswith("final."):  # (p, q, C) -> (C, p, q); the flow target is data - noise there
                value = value.unflatten(0, (patch, patch, -1)).movedim(2, 0).flatten(0, 2)
                value = -value if kind == "flow" else value
            elif name == "time_embed.linear_1.weight" and kind == "flow":
                value = reverse_time(value)
            elif len(keys) == 3:
                query, key, value = (state[key].float() for key in keys)
                value = torch.cat([halves(query, heads), halves(key, heads), value])  # [3 D, D]
        except (IndexError, RuntimeError, ValueError):
            found = ", ".join(str(tuple(state[key].shape)) for key in keys)
            faults.append(f"{', '.join(keys)} of shape {found}: {name} requires {shapes[name]}")
            continue
        if tuple(value.shape) != shapes[name]:
            faults.append(f"{', '.join(keys)} gives {name} of shape {tuple(value.shape)}, not {shapes[name]}")
        converted[name] = value
    if faults:
        raise InputError(f"{len(faults)} keys do not match the MMFace-DiT network:\n  " + "\n  ".join(faults))
    model.load_state_dict(converted, assign=True)
    return model.eval()


def released_names(depth: int) -> dict[str, tuple[str, ...]]:
    """Return our name -> released names: one, or those of query, key and value, which we concatenate."""
    layers = LAYERS | {
        f"blocks.{n}.{theirs}": f"blocks.{n}.{ours}" for n in range(depth) for theirs, ours in BLOCK_LAYERS.items()
    }
    names: dict[str, tuple[str, ...]] = {"null_pooled": ("c_embedder.null_feature_pooled",)}
    names["condition_embed.weight"] = ("modality_embedder.weight",)
    for theirs, ours in layers.items():
        names |= {f"{ours}.{leaf}": (f"{theirs}.{leaf}",) for leaf in ("weight", "bias")}
    for n in range(depth):
        for suffix, stream in (("", "image"), ("_t", "text")):
            theirs, ours = f"blocks.{n}.attn.to_", f"blocks.{n}.attention.{stream}_"
            names[f"{ours}qkv.weight"] = tuple(f"{theirs}{letter}{suffix}.weight" for letter in "qkv")
            names[f"{ours}out.weight"] = (f"{theirs}out{suffix}.weight",)
    return names


def reverse_time(weight: Tensor) -> Tensor:
    """Return the first time layer [D, 256] for the opposite time direction: cos(f (s - u)) and sin(f (s - u)) are a
    rotation of cos(f u) and sin(f u) by the angle f s, which is folded into the columns of the layer.
    """
    half = weight.shape[1] // 2
    rotation = time_frequencies(torch.tensor([TIME_SCALE]), weight.shape[1])[0].double()  # [256]
    cos, sin = rotation[:half], rotation[half:]
    on_cos, on_sin = weight.double().split(half, dim=1)
    return torch.cat([on_cos * cos + on_sin * sin, on_cos * sin - on_sin * cos], dim=1).float()


def halves(weight: Tensor, heads: int) -> Tensor:
    """Reorder rows [H d, D] of queries or keys so that rotary pairs (2 i, 2 i + 1) become (i, i + d / 2)."""
    return weight.unflatten(0, (heads, -1, 2)).transpose(1, 2).flatten(0, 2)


def convert_release(
    path: Path,
    out: Path,
    *,
    release: str | None = None,
    text_encoder: Path | None = None,
    vae: Path | None = None,
) -> list[str]:
    """Convert a released checkpoint to a pipeline folder. Return the components that are missing to generate images,
    one sentence each.

    Args:
        path: the `checkpoint-<step>` folder or the safetensors file in it.
        out: the folder to write; it must not exist or be empty.
        release: one of `RELEASES`, if the path does not identify it.
        text_encoder: a folder with `CLIPTextModel` weights and its tokenizer (or `text_encoder/` and `tokenizer/`).
        vae: a folder with FLUX.1's autoencoder.

    Raises `InputError` if the input is not a released checkpoint, or `out` is not empty.
    """
    from likeness.pipelines.mmface import MMFacePipeline

    steps = {f"checkpoint-{known.step}": name for name, known in RELEASES.items()}
    name = release or next((steps[part] for part in path.resolve().parts if part in steps), None)
    if name not in RELEASES:
        raise InputError(f"The release of {path} is unknown: pass --release, one of {', '.join(RELEASES)}")
    which = RELEASES[name]
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise InputError(f"{out} is not an empty folder: choose another")
    file = path / "dit_model_weights_ema.safetensors" if path.is_dir() else path
    if not file.is_file():
        raise InputError(f"{file} does not exist: pass a released checkpoint-<step> folder or its safetensors file")
    transformer = convert_state(read_weights(file), which.kind)
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
    with writing_folder(out) as partial:
        pipeline.save_pretrained(partial)
        source = {"release": name, "file": file.name}
        (partial / "source.json").write_text(json.dumps(source, indent=2), encoding="utf-8")
    missing = []
    if encoder is None:
        missing.append(
            "the text encoder of Stable Diffusion 2.1 (OpenCLIP ViT-H, 23 layers): run again with --text-encoder DIR "
            "and another output folder; see docs/released-weights.md"
        )
    if vae is None:
        missing.append(
            "the autoencoder of FLUX.1: run again with --vae DIR and another output folder; "
            "see docs/released-weights.md"
        )
    return missing


def latent_statistics(vae: Any) -> dict[str, Any]:
    """Return the `latent_mean` and `latent_std` of an autoencoder for the latents of the releases, FLUX_SCALE z without
    the shift. The latents of taef1 are FLUX_SCALE (z - FLUX_SHIFT).
    """
    from diffusers import AutoencoderTiny

    if isinstance(vae, AutoencoderTiny):
        return {"latent_mean": -FLUX_SCALE * FLUX_SHIFT, "latent_std": 1.0}
    return {"latent_mean": 0.0, "latent_std": 1 / FLUX_SCALE}


def load_text_encoder(folder: Path) -> tuple[Any, Any]:
    """Load a CLIP text model and its tokenizer from a folder, or from the two subfolders of a pipeline folder.

    The network reads the padding, too. It must be that of Stable Diffusion 2.1, "!"; other repositories with the same
    vocabulary pad with the end token.
    """
    encoder = load_component(subfolder(folder, "text_encoder"), "transformers", "CLIPTextModel")
    tokenizer = load_component(subfolder(folder, "tokenizer"), "transformers", "CLIPTokenizer")
    tokenizer.pad_token = PADDING
    return encoder, tokenizer


def load_vae(folder: Path) -> Any:
    """Load an autoencoder from a folder, or from the `vae` subfolder of a pipeline folder."""
    folder = subfolder(folder, "vae")
    return load_component(folder, "diffusers", read_json(folder / "config.json").get("_class_name", "?"))


def subfolder(folder: Path, name: str) -> Path:
    """Return the folder of a component in a pipeline folder, or the folder itself."""
    return folder / name if (folder / name).is_dir() else folder
