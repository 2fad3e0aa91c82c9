"""A model that answers questions, behind an address (`endpoint`) or here (`checkpoint`): what the stage knows of it.

One user message a question, decoded greedily, so that the same question has the same answer and answers can be kept by
their question.
"""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from PIL import Image

from likeness.pipelines.catalogue import BUNDLED, COMMON
from likeness.types import InputError

ANSWER_TOKENS = 256
"""Most tokens of an answer: three times a caption, so that one that is too long can be cut at a sentence."""


class Question(NamedTuple):
    """What a model is asked."""

    text: str
    picture: Image.Image | None = None
    """RGB, seen before the text."""


class Answer(NamedTuple):
    """What it said."""

    text: str
    finished: bool = True
    """Whether it came to its end, rather than to the largest number of tokens."""


@dataclass(frozen=True)
class Model:
    """A model that answers."""

    name: str
    """What records call it."""
    settings: str
    """Whatever else decides its answers, as text."""
    answer: Callable[[Sequence[Question]], Iterator[Answer]]
    """Answers in order, each as soon as it is there."""


def question_key(model: Model, text: str, picture: str = "") -> str:
    """What an answer is kept under, 32 hexadecimal digits.

    Args:
        model: who is asked.
        text: the message.
        picture: hash of the picture's file, and how it is shown.
    """
    parts = "\0".join((model.name, model.settings, text, picture))
    return hashlib.sha256(parts.encode(errors="surrogatepass")).hexdigest()[:32]


def load_counter(components: Path = BUNDLED / COMMON) -> Callable[[str], int]:
    """Counts tokens, start and end among them, with the tokenizer of a pipeline folder or of `common/`.

    Raises:
        InputError: there is none, or it cannot be read.
    """
    from transformers import AutoTokenizer

    from likeness.files import first_line

    places = (components / "tokenizer", components.parent / COMMON / "tokenizer", components)
    where = next((place for place in places if (place / "tokenizer_config.json").is_file()), None)
    if where is None:
        raise InputError(f"{components} holds no tokenizer: give a model's folder")
    try:
        tokenizer = AutoTokenizer.from_pretrained(where)
    except (OSError, ValueError, KeyError) as error:
        raise InputError(f"the tokenizer in {where} cannot be read: {first_line(error)}") from error
    turn = threading.Lock()  # fast tokenizers change themselves while they encode

    def count(text: str) -> int:
        with turn:
            return len(tokenizer(text, truncation=False, verbose=False)["input_ids"])

    return count
