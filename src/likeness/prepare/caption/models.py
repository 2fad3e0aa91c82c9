"""Open models that answer questions, behind an endpoint or in a checkpoint."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path

import numpy as np

from likeness.chat import Answer, Meter, Rejected, image_part, open_endpoint
from likeness.encoders.text_image import load_attribute_head, load_text_image, name_attributes, resize_images
from likeness.files import first_line
from likeness.prepare.caption.checkpoint import open_checkpoint
from likeness.prepare.caption.questions import ANSWER_TOKENS, Model, Question
from likeness.types import InputError
from likeness.weights.catalog import BUNDLED, COMMON

MAX_REJECTED = 20
"""Consecutive rejected questions after which the run ends; three before the first answer."""


def open_model(
    source: str,
    *,
    vision: bool,
    meter: Meter | None = None,
    name: str | None = None,
    fields: str = "{}",
    key_variable: str | None = None,
    device: str | None = None,
) -> Model:
    """Open a model by its address or checkpoint.

    Args:
        source: address of an endpoint, or hub name or folder of a checkpoint.
        vision: whether it must accept images.
        meter: meter of an endpoint.
        name: name of the model at an endpoint.
        fields: JSON of additional fields of an endpoint's requests, such as `{"chat_template_kwargs":
            {"enable_thinking": false}}`; null removes a field.
        key_variable: environment variable of an endpoint's key.
        device: device of a checkpoint, as in `likeness.device.choose_device`.

    Raises:
        InputError: it cannot be opened, or an option is for endpoints only.
    """
    if not source.startswith(("http://", "https://")):
        if name is not None or fields != "{}":
            raise InputError(
                f"{source} is a checkpoint: names and fields are for endpoints, whose address begins with http"
            )
        return open_checkpoint(source, vision=vision, device=device)
    try:
        extra = json.loads(fields)
    except ValueError as error:
        raise InputError(f"the request fields {fields!r} are not JSON: {error}") from error
    if not isinstance(extra, dict):
        raise InputError(f'the request fields {fields!r} must be a JSON object, such as {{"top_p": 0.9}}')
    settings = {"max_tokens": ANSWER_TOKENS, "temperature": 0.0} | extra
    endpoint = open_endpoint(source, name, meter, fields=settings, key_variable=key_variable)
    rejected = MAX_REJECTED - 3

    def answer(questions: Sequence[Question]) -> Iterator[Answer]:
        nonlocal rejected
        for text, image in questions:
            try:
                reply = endpoint.ask(text if image is None else [image_part(image), {"type": "text", "text": text}])
            except Rejected as error:
                rejected += 1
                if rejected >= MAX_REJECTED:
                    raise InputError(f"{endpoint.address} rejects all questions: {error}") from error
                raise
            rejected = 0
            yield reply

    return Model(endpoint.model, json.dumps(endpoint.fields, sort_keys=True), answer)


def load_counter(components: Path = BUNDLED / COMMON) -> Callable[[str], int]:
    """Return a function that counts tokens, including start and end, with the tokenizer of a pipeline folder.

    Raises:
        InputError: the tokenizer is missing or cannot be read.
    """
    from transformers import AutoTokenizer

    folders = (components / "tokenizer", components.parent / COMMON / "tokenizer", components)
    folder = next((folder for folder in folders if (folder / "tokenizer_config.json").is_file()), None)
    if folder is None:
        raise InputError(f"{components} has no tokenizer: give the folder of a model")
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    except (OSError, ValueError, KeyError) as error:
        raise InputError(f"the tokenizer in {folder} cannot be read: {first_line(error)}") from error
    lock = threading.Lock()  # fast tokenizers are not thread-safe

    def count(text: str) -> int:
        with lock:
            return len(tokenizer(text, truncation=False, verbose=False)["input_ids"])

    return count


def load_attributes() -> Callable[[np.ndarray], dict[str, bool]]:
    """Return a function from an image, uint8 RGB [H, W, 3], to the attributes that the bundled model predicts."""
    clip, _ = load_text_image(BUNDLED / COMMON)
    head = load_attribute_head(BUNDLED / COMMON)
    assert head is not None
    predict, side = partial(name_attributes, clip, head), clip.config.vision_config.image_size
    return lambda image: {name: value == "True" for name, value in predict(resize_images([image], side))[0].items()}
