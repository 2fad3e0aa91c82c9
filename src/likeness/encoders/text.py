"""Encode captions with frozen text encoders: CLIP alone, or CLIP and T5 as in FLUX.1.

CLIP's tokens are those of a hidden state (MMFace-DiT: the last but one), its pooled vector is that of the end-of-text
token. All captions are padded to the same length without a padding mask, as in MMFace-DiT's code and in FLUX.
"""

from __future__ import annotations

import math
import re
import threading
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from likeness.types import InputError, TextFeatures

LONGEST_WORD = 20
"""Characters without whitespace above which text is not taken for one word."""

TOKENIZING = threading.Lock()
"""Locked while a tokenizer is called: a call changes its padding and truncation, which threads share."""


@torch.no_grad()
def encode_text(
    tokenizer: Any,
    text_encoder: Any,
    captions: Sequence[str],
    *,
    max_tokens: int,
    layer: int = -2,
    tokenizer_2: Any = None,
    text_encoder_2: Any = None,
    batched: bool = False,
    device: torch.device | None = None,
) -> TextFeatures:
    """Encode B captions with CLIP, or as FLUX.1 does: tokens [B, L, D] from T5's last layer, the pooled vector [B, P]
    from CLIP, on this device, by default that of CLIP, and in the models' dtypes.

    `max_tokens` is the length L to which captions are padded or truncated, start and end tokens included; with T5,
    captions for CLIP are padded to the maximum length of its tokenizer, 77. `layer` is the index of CLIP's hidden state
    for tokens; -1 is the last layer, before the final norm. `batched`: one pass for all captions also on a CPU, which
    is faster, but rounding then depends on B.
    """
    clip_length = max_tokens if text_encoder_2 is None else tokenizer.model_max_length
    device = text_encoder.device if device is None else device
    chunks = token_chunks(tokenizer, captions, clip_length, batched, device)
    outputs = [text_encoder(chunk, output_hidden_states=True) for chunk in chunks]
    if text_encoder_2 is None:
        tokens = [output.hidden_states[layer] for output in outputs]  # [b, L, D] each
    else:
        chunks = token_chunks(tokenizer_2, captions, max_tokens, batched, device)
        tokens = [text_encoder_2(chunk).last_hidden_state for chunk in chunks]  # [b, L, D] each
    return TextFeatures(torch.cat(tokens), torch.cat([output.pooler_output for output in outputs]))


def check_text_settings(text_encoder: Any, layer: Any, max_tokens: Any) -> None:
    """Raise `InputError` if a text encoder has no such hidden state, or start and end exceed `max_tokens`."""
    if type(max_tokens) is not int or max_tokens < 2:
        raise InputError(f"max_text_tokens is {max_tokens!r}; it must be a whole number of at least 2")
    states = getattr(getattr(text_encoder, "config", None), "num_hidden_layers", math.inf) + 1
    if type(layer) is not int or not -states <= layer < states:
        raise InputError(f"text_layer is {layer!r}; it must be a whole number from {-states} to {states - 1}")


def token_ids(tokenizer: Any, captions: Sequence[str], max_tokens: int) -> Tensor:
    """Tokenize B captions, padded or truncated to L = `max_tokens`: [B, L]."""
    options = {"padding": "max_length", "max_length": max_tokens, "truncation": True, "return_tensors": "pt"}
    with TOKENIZING:
        return tokenizer(list(captions), **options).input_ids


def token_chunks(
    tokenizer: Any, captions: Sequence[str], max_tokens: int, batched: bool, device: torch.device
) -> Sequence[Tensor]:
    """Token ids of captions, [b, L] each. On a CPU b = 1 unless `batched`, so that captions are independent."""
    ids = token_ids(tokenizer, captions, max_tokens).to(device)  # [B, L]
    return ids.split(1) if ids.device.type == "cpu" and not batched else (ids,)


def truncated_text(tokenizer: Any, caption: str, max_tokens: int) -> str:
    """Return the words of `caption` that are truncated at `max_tokens`, at least in part; "" if there are none."""
    with TOKENIZING:
        encoded = tokenizer(caption, return_offsets_mapping=True, verbose=False)
    if len(encoded.input_ids) <= max_tokens:
        return ""
    start, _ = encoded.offset_mapping[max_tokens - 1]  # the last position is the end token's
    word = len(re.split(r"\s", caption[: start + 1])[-1])  # of a language without spaces: all before
    return caption[start + 1 - word if word <= LONGEST_WORD else start :].strip()
