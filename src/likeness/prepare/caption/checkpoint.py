"""Local models through transformers: a vision-language model that describes and a language model that checks.

Torchvision is not needed: images are prepared by PIL processors, and video processors are not loaded. For millions of
captions, serve the model with vLLM and use its endpoint instead.
"""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from likeness.device import choose_device
from likeness.files import first_line
from likeness.prepare.caption.models import ANSWER_TOKENS, Answer, Model, Question
from likeness.types import InputError


def open_vision_model(checkpoint: str, device: str | None = None) -> Model:
    """Load a vision-language model, such as `OpenGVLab/InternVL3-8B-hf`.

    Args:
        checkpoint: hub name or folder; remote code is not run.
        device: device, as in `likeness.device.choose_device`.

    Raises:
        InputError: it cannot be loaded, needs torchvision, or has no chat template.
    """
    from transformers import AutoModelForImageTextToText

    processor = load_processor(checkpoint)
    network = load_network(AutoModelForImageTextToText, checkpoint, device)

    def encode(questions: Sequence[Question]) -> Any:
        texts = [
            processor.apply_chat_template(
                [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": question.text}]}],
                add_generation_prompt=True,
                tokenize=False,
            )
            for question in questions
        ]
        images = [[question.image] for question in questions]
        return processor(images=images, text=texts, padding=True, return_tensors="pt")

    return greedy(checkpoint, network, processor.tokenizer, encode)


def open_language_model(checkpoint: str, device: str | None = None) -> Model:
    """Load a language model, such as `Qwen/Qwen3-8B`.

    Args:
        checkpoint: hub name or folder; remote code is not run.
        device: device, as in `likeness.device.choose_device`.

    Raises:
        InputError: it cannot be loaded or has no chat template.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    except (OSError, ValueError, KeyError) as error:
        raise InputError(f"the tokenizer of {checkpoint} cannot be loaded: {first_line(error)}") from error
    check_template(checkpoint, tokenizer)
    network = load_network(AutoModelForCausalLM, checkpoint, device)

    def encode(questions: Sequence[Question]) -> Any:
        texts = [
            tokenizer.apply_chat_template(
                [{"role": "user", "content": question.text}],
                add_generation_prompt=True,
                tokenize=False,
                enable_thinking=False,  # no reasoning by Qwen3; other templates ignore it
            )
            for question in questions
        ]
        return tokenizer(texts, padding=True, add_special_tokens=False, return_tensors="pt")

    return greedy(checkpoint, network, tokenizer, encode)


def greedy(checkpoint: str, network: Any, tokenizer: Any, encode: Any) -> Model:
    """Return a model that answers the questions of a call in one batch, one call at a time."""
    tokenizer.padding_side = "left"
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    lock = threading.Lock()
    ends = network.generation_config.eos_token_id
    ends = set(ends if isinstance(ends, list) else [ends]) | {tokenizer.eos_token_id}

    def answer(questions: Sequence[Question]) -> Iterator[Answer]:
        with lock, torch.inference_mode():
            inputs = encode(questions).to(network.device)
            inputs = {name: v.to(network.dtype) if v.is_floating_point() else v for name, v in inputs.items()}
            tokens = network.generate(
                **inputs, max_new_tokens=ANSWER_TOKENS, do_sample=False, pad_token_id=tokenizer.pad_token_id
            )
        for output in tokens[:, inputs["input_ids"].shape[1] :].tolist():
            yield Answer(tokenizer.decode(output, skip_special_tokens=True), any(token in ends for token in output))

    settings = f"greedy, {ANSWER_TOKENS} tokens"
    return Model(checkpoint_name(checkpoint), settings, answer)


def checkpoint_name(given: str) -> str:
    """Return a hub name unchanged; for a folder, its name and a hash of configuration and parts of the weights."""
    folder = Path(given)
    if not folder.is_dir():
        return given
    digest = hashlib.sha256()
    for file in sorted([*folder.glob("*.json"), *folder.glob("*.jinja"), *folder.glob("*.safetensors")]):
        digest.update(f"{file.name} {file.stat().st_size} ".encode())
        with file.open("rb") as opened:
            opened.seek(max(0, file.stat().st_size - 2**16))
            digest.update(opened.read())
    return f"{folder.resolve().name}@{digest.hexdigest()[:8]}"


def load_network(kind: Any, checkpoint: str, device: str | None) -> Any:
    """Load the network of a checkpoint in the dtype it was saved in."""
    place = choose_device(device)
    try:
        network = kind.from_pretrained(checkpoint, dtype="auto").to(place).eval()
    except Exception as error:  # hub, files and safetensors raise many errors
        raise InputError(f"the model {checkpoint} cannot be loaded: {first_line(error)}") from error
    network.generation_config.temperature = network.generation_config.top_p = network.generation_config.top_k = None
    return network


def load_processor(checkpoint: str) -> Any:
    """Load the processor of a checkpoint without its video part."""
    from transformers import AutoConfig
    from transformers.models.auto.processing_auto import PROCESSOR_MAPPING

    try:
        config = AutoConfig.from_pretrained(checkpoint)
        if type(config) not in PROCESSOR_MAPPING:
            raise InputError(f"{checkpoint} is not a model for images and text ({config.model_type})")
        full = PROCESSOR_MAPPING[type(config)]
        parts = [part for part in full.get_attributes() if "video" not in part]
        without_videos: Any = type(full.__name__, (full,), {"get_attributes": classmethod(lambda cls: parts)})
        processor = without_videos.from_pretrained(checkpoint)
    except InputError:
        raise
    except Exception as error:
        if "torchvision" in str(error).lower():
            raise InputError(
                f"the processor of {checkpoint} needs torchvision, which likeness does not use: serve the model "
                "with vLLM and give its address to --vlm"
            ) from error
        raise InputError(f"the processor of {checkpoint} cannot be loaded: {first_line(error)}") from error
    check_template(checkpoint, processor if processor.chat_template else processor.tokenizer)
    return processor


def check_template(checkpoint: str, tokenizer: Any) -> None:
    """Reject models without a chat template: they are not instruction-tuned."""
    if not tokenizer.chat_template:
        raise InputError(f"{checkpoint} has no chat template: use an instruction-tuned checkpoint")
