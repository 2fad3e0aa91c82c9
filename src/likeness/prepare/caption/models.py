"""Models that answer questions about images and texts, behind an endpoint or in a checkpoint.

A question is one user message, decoded greedily, so that the answer is always the same and is cached. Checkpoints work
without torchvision: images are prepared by PIL processors, and video processors are not loaded. For millions of
captions, serve the model with vLLM and use its endpoint instead.
"""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image

from likeness.chat import Answer, Meter, Rejected, image_part, open_endpoint
from likeness.device import choose_device
from likeness.encoders.text_image import load_attribute_head, load_text_image, name_attributes, resize_images
from likeness.files import first_line
from likeness.types import InputError
from likeness.weights.catalog import BUNDLED, COMMON

ANSWER_TOKENS = 256
"""Most tokens of an answer: three captions, so that a long one can be cut after a sentence."""

MAX_REJECTED = 20
"""Consecutive rejected questions after which the run ends; three before the first answer."""

NO_CODE: dict[str, Any] = {"trust_remote_code": False}
"""Arguments of `from_pretrained` with which a checkpoint that contains code is an error; the default asks the user."""


class Question(NamedTuple):
    """A question about an image, or about text only."""

    text: str
    image: Image.Image | None = None
    """RGB, before the text."""


@dataclass(frozen=True)
class Model:
    """A model that answers."""

    name: str
    """Name for the records."""
    settings: str
    """Everything else that affects its answers, as text."""
    answer: Callable[[Sequence[Question]], Iterator[Answer]]
    """Yields answers in order, without waiting for later ones."""

    def key(self, text: str, image: str = "") -> str:
        """Return the key of an answer, 32 hexadecimal digits; `image` is the image file's hash and size limit."""
        parts = "\0".join((self.name, self.settings, text, image))
        return hashlib.sha256(parts.encode(errors="surrogatepass")).hexdigest()[:32]


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
    """Open a model by its address, or by the hub name or folder of a checkpoint; with `vision` it must accept images.

    `name`, `fields` (JSON), `key_variable` and `meter` are for endpoints, `device` is for checkpoints.

    Raises:
        InputError: it cannot be opened, or an option is for endpoints only.
    """
    if not source.startswith(("http://", "https://")):
        if name is not None or fields != "{}" or key_variable is not None:
            raise InputError(
                f"{source} is a checkpoint: names, fields and keys are for endpoints, whose address begins with http"
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


def open_checkpoint(checkpoint: str, *, vision: bool, device: str | None = None) -> Model:
    """Load a vision-language model, such as `OpenGVLab/InternVL3-8B-hf`, or a language model, such as `Qwen/Qwen3-8B`.

    It answers the questions of a call in one batch, one call at a time, by greedy decoding. Remote code is not run.

    Raises:
        InputError: it cannot be loaded, needs torchvision, or has no chat template.
    """
    from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, AutoTokenizer

    with loading(checkpoint):
        processor = load_processor(checkpoint) if vision else AutoTokenizer.from_pretrained(checkpoint, **NO_CODE)
    tokenizer = processor.tokenizer if vision else processor
    if not (processor.chat_template or tokenizer.chat_template):
        raise InputError(f"{checkpoint} has no chat template: use an instruction-tuned checkpoint")
    place = choose_device(device)
    with loading(checkpoint):
        kind: Any = AutoModelForImageTextToText if vision else AutoModelForCausalLM
        network = kind.from_pretrained(checkpoint, dtype="auto", **NO_CODE).to(place).eval()
    config = network.generation_config
    config.temperature = config.top_p = config.top_k = None
    ends = {tokenizer.eos_token_id}.union(torch.as_tensor(config.eos_token_id).reshape(-1).tolist())
    tokenizer.padding_side = "left"
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    lock = threading.Lock()

    def encode(questions: Sequence[Question]) -> Any:
        parts = [[{"type": "image"}, {"type": "text", "text": text}] if vision else text for text, _ in questions]
        options = {"add_generation_prompt": True, "tokenize": False}
        if not vision:
            options["enable_thinking"] = False  # no reasoning by Qwen3; other templates ignore it
        texts = [processor.apply_chat_template([{"role": "user", "content": part}], **options) for part in parts]
        if vision:
            images = [[question.image] for question in questions]
            return processor(images=images, text=texts, padding=True, return_tensors="pt")
        return tokenizer(texts, padding=True, add_special_tokens=False, return_tensors="pt")

    def answer(questions: Sequence[Question]) -> Iterator[Answer]:
        with lock, torch.inference_mode():
            inputs = encode(questions).to(network.device)
            inputs = {name: v.to(network.dtype) if v.is_floating_point() else v for name, v in inputs.items()}
            tokens = network.generate(
                **inputs, max_new_tokens=ANSWER_TOKENS, do_sample=False, pad_token_id=tokenizer.pad_token_id
            )
        for output in tokens[:, inputs["input_ids"].shape[1] :].tolist():
            yield Answer(tokenizer.decode(output, skip_special_tokens=True), not ends.isdisjoint(output))

    return Model(checkpoint_name(checkpoint), f"greedy, {ANSWER_TOKENS} tokens", answer)


@contextmanager
def loading(checkpoint: str) -> Iterator[None]:
    """Turn any error of the hub, files, transformers and safetensors into `InputError`."""
    try:
        yield
    except InputError:
        raise
    except Exception as error:
        text = f"{checkpoint} cannot be loaded: {first_line(error)}"
        if isinstance(error, ImportError):
            text += "; likeness does not use torchvision: serve the model with vLLM and give its address instead"
        raise InputError(text) from error


def load_processor(checkpoint: str) -> Any:
    """Load the processor of a checkpoint without its video part."""
    from transformers import AutoConfig
    from transformers.models.auto.processing_auto import PROCESSOR_MAPPING

    config = AutoConfig.from_pretrained(checkpoint, **NO_CODE)
    if type(config) not in PROCESSOR_MAPPING:
        raise InputError(f"{checkpoint} is not a model for images and text ({config.model_type})")
    full = PROCESSOR_MAPPING[type(config)]
    parts = [part for part in full.get_attributes() if "video" not in part]
    without_videos: Any = type(full.__name__, (full,), {"get_attributes": classmethod(lambda cls: parts)})
    return without_videos.from_pretrained(checkpoint, **NO_CODE)


def checkpoint_name(checkpoint: str) -> str:
    """Return a hub name unchanged; for a folder, its name and a hash of configuration and parts of the weights."""
    folder = Path(checkpoint)
    if not folder.is_dir():
        return checkpoint
    digest = hashlib.sha256()
    for file in sorted([*folder.glob("*.json"), *folder.glob("*.jinja"), *folder.glob("*.safetensors")]):
        digest.update(f"{file.name} {file.stat().st_size} ".encode())
        with file.open("rb") as opened:
            opened.seek(max(0, file.stat().st_size - 2**16))
            digest.update(opened.read())
    return f"{folder.resolve().name}@{digest.hexdigest()[:8]}"


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
