"""Captions to text features with frozen text models: one CLIP tower, or CLIP and T5 as in FLUX.1.

CLIP's tokens come from a named layer (MMFace-DiT takes the last but one) and its pooled vector from the end-of-text
token. Every caption is padded to the same length: there is no padding mask, as in MMFace-DiT's code and in FLUX.
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
    together: bool = False,
) -> TextFeatures:
    """Features of B captions.

    Args:
        tokenizer: a CLIP tokenizer.
        text_encoder: a `CLIPTextModel`.
        captions: B strings; what does not fit into `max_tokens` is cut (`cut_words` says what).
        max_tokens: length L to which captions are padded, start and end tokens included.
        layer: index into the model's hidden states; -1 is the last layer, before the final norm.
        together: all captions in one pass also on a CPU: faster, but the bits then depend on B.

    Returns:
        tokens [B, L, D] and pooled [B, D], on the model's device and in its dtype.
    """
    chunks = token_ids(tokenizer, text_encoder, captions, max_tokens, together)
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
    together: bool = False,
) -> TextFeatures:
    """Features of B captions as FLUX.1 takes them: T5's last layer as tokens, CLIP's pooled vector.

    Args:
        tokenizer: a CLIP tokenizer; captions are padded or cut to its own length, 77.
        text_encoder: a `CLIPTextModel`.
        tokenizer_2: a T5 tokenizer.
        text_encoder_2: a `T5EncoderModel`.
        captions: B strings.
        max_tokens: length L to which T5's captions are padded or cut.
        together: all captions in one pass also on a CPU: faster, but the bits then depend on B.

    Returns:
        tokens [B, L, T] and pooled [B, P], on the models' devices and in their dtypes.
    """
    clip_chunks = token_ids(tokenizer, text_encoder, captions, tokenizer.model_max_length, together)
    t5_chunks = token_ids(tokenizer_2, text_encoder_2, captions, max_tokens, together)
    return TextFeatures(
        torch.cat([text_encoder_2(chunk).last_hidden_state for chunk in t5_chunks]),
        torch.cat([text_encoder(chunk).pooler_output for chunk in clip_chunks]),
    )


def to_ids(tokenizer: Any, captions: Sequence[str], max_tokens: int) -> Tensor:
    """Token numbers of B captions, padded or cut to L = `max_tokens`: [B, L]."""
    encoded = tokenizer(
        list(captions), padding="max_length", max_length=max_tokens, truncation=True, return_tensors="pt"
    )
    return encoded.input_ids


def token_ids(
    tokenizer: Any, text_encoder: Any, captions: Sequence[str], max_tokens: int, together: bool
) -> Sequence[Tensor]:
    """Token numbers of captions, [b, L] each: one caption at a time on a CPU, since its bits must not depend on what
    else is in the batch, unless `together`.
    """
    ids = to_ids(tokenizer, captions, max_tokens).to(text_encoder.device)  # [B, L]
    return ids.split(1) if ids.device.type == "cpu" and not together else (ids,)


def cut_words(tokenizer: Any, caption: str, max_tokens: int) -> str:
    """The words of `caption` that do not fit wholly into `max_tokens`; the empty string where all of it fits."""
    encoded = tokenizer(caption, return_offsets_mapping=True, verbose=False)
    if len(encoded.input_ids) <= max_tokens:
        return ""
    start, _ = encoded.offset_mapping[max_tokens - 1]  # the last place is the end token's
    return caption[caption.rfind(" ", 0, start + 1) + 1 :].strip()
