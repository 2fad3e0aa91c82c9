"""Captions to text features with a frozen CLIP text model.

Tokens come from a named layer (the paper takes the last but one) and the pooled vector from the end-of-text token.
Every caption is padded to the same length: there is no padding mask, as in the paper's code.
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
    ids = tokenizer(list(captions), padding="max_length", max_length=max_tokens, truncation=True, return_tensors="pt")
    ids = ids.input_ids.to(text_encoder.device)  # [B, L]
    # One caption at a time on a CPU: its bits must not depend on what else is in the batch.
    chunks: Sequence[Tensor] = ids.split(1) if ids.device.type == "cpu" and not together else (ids,)
    outputs = [text_encoder(chunk, output_hidden_states=True) for chunk in chunks]
    return TextFeatures(
        torch.cat([output.hidden_states[layer] for output in outputs]),
        torch.cat([output.pooler_output for output in outputs]),
    )


def cut_words(tokenizer: Any, caption: str, max_tokens: int) -> str:
    """The words of `caption` that do not fit wholly into `max_tokens`; the empty string where all of it fits."""
    encoded = tokenizer(caption, return_offsets_mapping=True, verbose=False)
    if len(encoded.input_ids) <= max_tokens:
        return ""
    start, _ = encoded.offset_mapping[max_tokens - 1]  # the last place is the end token's
    return caption[caption.rfind(" ", 0, start + 1) + 1 :].strip()
