"""Models that run here, through transformers: one of vision and language that describes, one of language that checks.

No torchvision: pictures are prepared by the processors that need PIL only, and processors that also read videos are
built without that part. For millions of captions serve the model with vLLM and give its address instead.
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
    """A checkpoint of transformers that answers questions about pictures, such as `OpenGVLab/InternVL3-8B-hf`.

    Args:
        checkpoint: hub name or folder; nothing of its own code is run.
        device: Device, as in `likeness.device.choose_device`.

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
        pictures = [[question.picture] for question in questions]
        return processor(images=pictures, text=texts, padding=True, return_tensors="pt")

    return greedy(checkpoint, network, processor.tokenizer, encode)


def open_language_model(checkpoint: str, device: str | None = None) -> Model:
    """A checkpoint of transformers that answers questions in text, such as `Qwen/Qwen3-8B`.

    Args:
        checkpoint: hub name or folder; nothing of its own code is run.
        device: Device, as in `likeness.device.choose_device`.

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
                enable_thinking=False,  # Qwen3 answers at once; templates that do not know it pass it over
            )
            for question in questions
        ]
        return tokenizer(texts, padding=True, add_special_tokens=False, return_tensors="pt")

    return greedy(checkpoint, network, tokenizer, encode)


def greedy(checkpoint: str, network: Any, tokenizer: Any, encode: Any) -> Model:
    """The model that answers all questions of a call in one batch, one call at a time."""
    tokenizer.padding_side = "left"
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    turn = threading.Lock()
    ends = network.generation_config.eos_token_id
    ends = set(ends if isinstance(ends, list) else [ends]) | {tokenizer.eos_token_id}

    def answer(questions: Sequence[Question]) -> Iterator[Answer]:
        with turn, torch.inference_mode():
            inputs = encode(questions).to(network.device)
            inputs = {name: v.to(network.dtype) if v.is_floating_point() else v for name, v in inputs.items()}
            tokens = network.generate(
                **inputs, max_new_tokens=ANSWER_TOKENS, do_sample=False, pad_token_id=tokenizer.pad_token_id
            )
        for said in tokens[:, inputs["input_ids"].shape[1] :].tolist():
            yield Answer(tokenizer.decode(said, skip_special_tokens=True), any(token in ends for token in said))

    settings = f"greedy, {ANSWER_TOKENS} tokens"
    return Model(checkpoint_name(checkpoint), settings, answer)


def checkpoint_name(given: str) -> str:
    """A hub name as it is; a folder by its name and a hash of its configuration and of samples of its weights."""
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
    except Exception as error:  # hub, files and safetensors have many ways to say no
        raise InputError(f"the model {checkpoint} cannot be loaded: {first_line(error)}") from error
    network.generation_config.temperature = network.generation_config.top_p = network.generation_config.top_k = None
    return network


def load_processor(checkpoint: str) -> Any:
    """What prepares pictures and texts for a checkpoint, without the part for videos."""
    from transformers import AutoConfig
    from transformers.models.auto.processing_auto import PROCESSOR_MAPPING

    try:
        config = AutoConfig.from_pretrained(checkpoint)
        if type(config) not in PROCESSOR_MAPPING:
            raise InputError(f"{checkpoint} is no model that reads pictures and texts ({config.model_type})")
        whole = PROCESSOR_MAPPING[type(config)]
        parts = [part for part in whole.get_attributes() if "video" not in part]
        without_videos: Any = type(whole.__name__, (whole,), {"get_attributes": classmethod(lambda cls: parts)})
        processor = without_videos.from_pretrained(checkpoint)
    except InputError:
        raise
    except Exception as error:
        if "torchvision" in str(error).lower():
            raise InputError(
                f"the processor of {checkpoint} insists on torchvision, which likeness does without: serve the model "
                "with vLLM and give its address to --vlm"
            ) from error
        raise InputError(f"the processor of {checkpoint} cannot be loaded: {first_line(error)}") from error
    check_template(checkpoint, processor if processor.chat_template else processor.tokenizer)
    return processor


def check_template(checkpoint: str, speaker: Any) -> None:
    """A model without a chat template was never taught to answer."""
    if not speaker.chat_template:
        raise InputError(f"{checkpoint} has no chat template: give a checkpoint that was tuned to follow instructions")
