"""Encode captions with frozen text encoders: CLIP alone, or CLIP and T5 as in FLUX.1.

CLIP's tokens are those of a hidden state (MMFace-DiT: the last but one), its pooled vector is that of the end-of-text
token. All captions are padded to the same length without a padding mask, as in MMFace-DiT's code and in FLUX.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from likeness.types import TextFeatures


@torch.no_grad()
def encode_text(
    tokenizer: Any,
    text_encoder: Any,
    captions: Sequence[str],
    *,
    max_tokens: int,
    layer: int = -2,
    batched: bool = False,
) -> TextFeatures:
    """Encode B captions with CLIP.

    Args:
        tokenizer: a CLIP tokenizer.
        text_encoder: a `CLIPTextModel`.
        captions: B strings, truncated to `max_tokens`.
        max_tokens: length L to which captions are padded, start and end tokens included.
        layer: index of the hidden state; -1 is the last layer, before the final norm.
        batched: one pass for all captions also on a CPU: faster, but rounding then depends on B.

    Returns:
        tokens [B, L, D] and pooled [B, D], on the model's device and in its dtype.
    """
    chunks = token_chunks(tokenizer, text_encoder, captions, max_tokens, batched)
    outputs = [text_encoder(chunk, output_hidden_states=True) for chunk in chunks]
    return TextFeatures(
        torch.cat([output.hidden_states[layer] for output in outputs]),
        torch.cat([output.pooler_output for output in outputs]),
    )


@torch.no_grad()
def encode_text_flux(
    tokenizer: Any,
    text_encoder: Any,
    tokenizer_2: Any,
    text_encoder_2: Any,
    captions: Sequence[str],
    *,
    max_tokens: int = 512,
    batched: bool = False,
) -> TextFeatures:
    """Encode B captions as FLUX.1 does: the last layer of T5 as tokens, the pooled vector of CLIP.

    Args:
        tokenizer: a CLIP tokenizer; captions are padded or truncated to its maximum length, 77.
        text_encoder: a `CLIPTextModel`.
        tokenizer_2: a T5 tokenizer.
        text_encoder_2: a `T5EncoderModel`.
        captions: B strings.
        max_tokens: length L to which captions are padded or truncated for T5.
        batched: one pass for all captions also on a CPU: faster, but rounding then depends on B.

    Returns:
        tokens [B, L, T] and pooled [B, P], on the models' devices and in their dtypes.
    """
    clip_chunks = token_chunks(tokenizer, text_encoder, captions, tokenizer.model_max_length, batched)
    t5_chunks = token_chunks(tokenizer_2, text_encoder_2, captions, max_tokens, batched)
    return TextFeatures(
        torch.cat([text_encoder_2(chunk).last_hidden_state for chunk in t5_chunks]),
        torch.cat([text_encoder(chunk).pooler_output for chunk in clip_chunks]),
    )


def token_ids(tokenizer: Any, captions: Sequence[str], max_tokens: int) -> Tensor:
    """Tokenize B captions, padded or truncated to L = `max_tokens`: [B, L]."""
    options = {"padding": "max_length", "max_length": max_tokens, "truncation": True, "return_tensors": "pt"}
    return tokenizer(list(captions), **options).input_ids


def token_chunks(
    tokenizer: Any, text_encoder: Any, captions: Sequence[str], max_tokens: int, batched: bool
) -> Sequence[Tensor]:
    """Token ids of captions, [b, L] each. On a CPU b = 1 unless `batched`, so that captions are independent."""
    ids = token_ids(tokenizer, captions, max_tokens).to(text_encoder.device)  # [B, L]
    return ids.split(1) if ids.device.type == "cpu" and not batched else (ids,)


def truncated_text(tokenizer: Any, caption: str, max_tokens: int) -> str:
    """Return the words of `caption` that are truncated at `max_tokens`, at least in part; "" if there are none."""
    encoded = tokenizer(caption, return_offsets_mapping=True, verbose=False)
    if len(encoded.input_ids) <= max_tokens:
        return ""
    start, _ = encoded.offset_mapping[max_tokens - 1]  # the last position is the end token's
    return caption[caption.rfind(" ", 0, start + 1) + 1 :].strip()
