"""Local models through transformers: a vision-language model that describes and a language model that checks.

Torchvision is not needed: images are prepared by PIL processors, and video processors are not loaded. For millions of
captions, serve the model with vLLM and use its endpoint instead.
"""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from likeness.chat import Answer
from likeness.device import choose_device
from likeness.files import first_line
from likeness.prepare.caption.questions import ANSWER_TOKENS, Model, Question
from likeness.types import InputError

NO_CODE: dict[str, Any] = {"trust_remote_code": False}
"""Arguments of `from_pretrained` with which a checkpoint that contains code is an error; the default asks the user."""


def open_checkpoint(checkpoint: str, *, vision: bool, device: str | None = None) -> Model:
    """Load a vision-language model, such as `OpenGVLab/InternVL3-8B-hf`, or a language model, such as `Qwen/Qwen3-8B`.

    It answers the questions of a call in one batch, one call at a time, by greedy decoding.

    Args:
        checkpoint: hub name or folder; remote code is not run.
        vision: whether the questions have images.
        device: device, as in `likeness.device.choose_device`.

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
